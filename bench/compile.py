"""One UNet step of this project and of its peers, timed side by side: ``python -m pqcad_ao.bench.compile --json FILE``.

Every contender lives in a process of its own, so that its memory is its own, and the parent lets them run in turn
(A B C, A B C, ...), one at a time, so that a change in the machine's load meets them all. Contenders that wait burn
no CPU: libgomp's and TBB's threads sleep some milliseconds after their last work, libiomp's after 200, and the parent
pauses longer than that between turns; what a waiting process did burn is in the result as ``idle_cpu_s``.
``OMP_WAIT_POLICY=PASSIVE`` is left unset, as it would slow the contenders that are built on OpenMP and not the others.
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import math
import operator
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import IO, Any

import torch
from diffusers import DDIMScheduler
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from pqcad_ao.bench.machine import (
    check_threads,
    describe,
    loadavg,
    native_bf16,
    peak_gmacs,
    peak_rss_bytes,
    reset_peak_rss,
    rss_bytes,
    timed,
)
from pqcad_ao.capture import sample_shape
from pqcad_ao.evaluate import sqnr_db
from pqcad_ao.files import check_writable
from pqcad_ao.models import NAMES, load_model
from pqcad_ao.sampling import predict, sample
from pqcad_ao.serialization import quantized_state

REFERENCE = "torch_eager_fp32"
MACHINE = "machine"  # the worker that is no contender
TRAJECTORY_STEPS = 20
CALIBRATION_IMAGES = 160  # for every contender that calibrates
CHECK_BATCHES = 4
TEXT_TOKENS = 77
PROFILED = 3  # steps behind the breakdown by operator
OPERATORS = 8  # named in it
PAUSE = 0.25  # seconds between turns; OpenMP threads of libiomp spin for 0.2 after their last work


def float_model(model: str) -> tuple[nn.Module, DDIMScheduler]:
    """The float32 network that the rows start from, and its scheduler.

    Raises:
        ValueError: an unknown name, a folder without a UNet, or a UNet that is quantized already or takes inputs that
            cannot be made up.
    """
    unet, scheduler = load_model(model)
    if quantized_state(unet) is not None or getattr(unet, "is_quantized", False):
        raise ValueError(f"model={model!r} is quantized: give the full-precision network, the rows quantize it")
    sample_shape(unet)
    random_conditioning(unet, 1, torch.Generator())
    return unet.float(), scheduler


def random_conditioning(unet: nn.Module, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random text states and class labels for the networks that take them.

    Raises:
        ValueError: the network takes conditioning of another kind.
    """
    config: Any = unet.config
    if config.get("addition_embed_type") or config.get("class_embed_type"):
        raise ValueError(
            f"{type(unet).__name__} takes added embeddings: only text states and class labels can be made up"
        )
    values = {}
    if config.get("cross_attention_dim") is not None:
        width = config.get("encoder_hid_dim") or config.cross_attention_dim
        values["encoder_hidden_states"] = torch.randn(batch, TEXT_TOKENS, width, generator=generator)
    if config.get("num_class_embeds"):
        values["class_labels"] = torch.randint(config.num_class_embeds, (batch,), generator=generator)
    return values


class Step(nn.Module):
    """A UNet as a function of tensors, ``f(x_t, timesteps, *conditioning)``, which is the form that exporters take."""

    def __init__(self, unet: nn.Module, names: Sequence[str] = ()) -> None:
        super().__init__()
        self.unet, self.names = unet, tuple(names)

    def forward(self, x_t: Tensor, timesteps: Tensor, *values: Tensor) -> Tensor:
        return predict(self.unet, x_t, timesteps, dict(zip(self.names, values, strict=True)))


@dataclass
class Workload:
    """What every contender is given.

    Attributes:
        unet: float32, its contender's own. names: of the conditioning arguments.
        calibration: batches of (x_t, timesteps, *conditioning) from full-precision trajectories.
        check: more of them, from other noise, on which the outputs are compared.
        model: what the network was loaded as. folder: for files of this run.
    """

    unet: nn.Module
    scheduler: DDIMScheduler
    names: list[str]
    calibration: list[tuple[Tensor, ...]]
    check: list[tuple[Tensor, ...]]
    threads: int
    model: str
    folder: Path

    @property
    def example(self) -> tuple[Tensor, ...]:
        return self.check[0]


def trajectory_inputs(unet: nn.Module, scheduler: DDIMScheduler, batch: int, seed: int) -> dict[str, Any]:
    """Batches of inputs met on full-precision DDIM trajectories, for calibrating and for checking the contenders."""
    generator = torch.Generator().manual_seed(seed)
    shape = sample_shape(unet)
    names = list(random_conditioning(unet, 1, torch.Generator()))

    def walk(trajectories: int) -> list[tuple[Tensor, ...]]:
        noise = torch.randn(trajectories * batch, *shape, generator=generator)
        given = random_conditioning(unet, len(noise), generator)
        met: list[tuple[Tensor, ...]] = []

        def keep(first: int, step: int, timestep: Tensor, x_t: Tensor) -> None:
            values = (value[first : first + batch] for value in given.values())
            met.append((x_t.clone(), torch.full((batch,), int(timestep)), *values))

        sample(unet, scheduler, noise, TRAJECTORY_STEPS, conditioning=given, batch_size=batch, callback=keep)
        return met

    def evenly(batches: list[tuple[Tensor, ...]], count: int) -> list[tuple[Tensor, ...]]:
        return [batches[(2 * index + 1) * len(batches) // (2 * count)] for index in range(count)]

    count = max(4, math.ceil(CALIBRATION_IMAGES / batch))
    calibration = walk(math.ceil(count / TRAJECTORY_STEPS))
    return {"names": names, "calibration": evenly(calibration, count), "check": evenly(walk(1), CHECK_BATCHES)}


@dataclass
class Contender:
    """A step that is ready to be timed.

    Attributes:
        call: (x_t, timesteps, *conditioning) to the prediction, a float tensor.
        resident_weight_bytes: of the weights in the form in which the contender's program holds them. Copies that a
            library packs for itself are not in it; they are in ``step_peak_rss_bytes``.
        arithmetic: what the machine executes.
        backend: what runs the graph.
    """

    call: Callable[..., Tensor]
    resident_weight_bytes: int
    arithmetic: str
    backend: str


def tensor_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes behind these tensors, shared storage counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return tensor_bytes([*module.parameters(), *module.buffers()])


def build_torch_eager_fp32(work: Workload) -> Contender:
    return Contender(Step(work.unet, work.names), module_bytes(work.unet), "float32", "torch eager")


def frozen(module: nn.Module, example: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """``torch.compile`` with the weights folded in and packed, the originals dropped.

    The options are Inductor's global state and are read while it compiles, which is during the first call.
    """
    from torch._inductor import config

    compiled = torch.compile(module, fullgraph=True)
    with config.patch(freezing=True, freezing_discard_parameters=True):
        compiled(*example)
    return compiled


def build_torch_compile_fp32(work: Workload) -> Contender:
    weight_bytes = module_bytes(work.unet)
    return Contender(frozen(Step(work.unet, work.names), work.example), weight_bytes, "float32", "inductor, freezing")


def build_torch_compile_bf16(work: Workload) -> Contender:
    """The whole network in bfloat16, as with ``torch_dtype``: as fast as autocast, and no float32 originals stay."""
    unet = work.unet.to(torch.bfloat16)
    weight_bytes = module_bytes(unet)

    def cast(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(value.bfloat16() if value.is_floating_point() else value for value in inputs)

    compiled = frozen(Step(unet, work.names), cast(work.example))
    arithmetic = "bfloat16 products, float32 sums"
    return Contender(lambda *inputs: compiled(*cast(inputs)).float(), weight_bytes, arithmetic, "inductor, freezing")


def build_torchao_int8(work: Workload) -> Contender:
    """torchao's PT2E flow: X86InductorQuantizer, static int8, its own fusions in Inductor. Checked with torchao 0.18.

    Where the processor multiplies bfloat16, what is not int8 runs under autocast ("int8-mixed-bf16"): measured faster.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    class FloatTensorsOnly(X86InductorQuantizer):
        """The stock quantizer also annotates the broadcast of the integer timestep, which no observer can count."""

        def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            model = super().annotate(model)
            for node in model.graph.nodes:
                annotation = node.meta.get("quantization_annotation")
                inputs = annotation.input_qspec_map if annotation is not None else {}
                if any(not source.meta["val"].is_floating_point() for source in inputs):
                    del node.meta["quantization_annotation"]
            return model

    quantizer = FloatTensorsOnly().set_global(get_default_x86_inductor_quantization_config())
    exported = torch.export.export(Step(work.unet, work.names), work.example).module()
    prepared = prepare_pt2e(exported, quantizer)
    for batch in work.calibration:
        prepared(*batch)
    converted = convert_pt2e(prepared)
    for node in list(converted.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:  # holds float32 where autocast gives bfloat16
            converted.graph.erase_node(node)
    converted.recompile()
    weight_bytes = graph_weight_bytes(converted)
    mixed = native_bf16()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        compiled = frozen(converted, work.example)

    def call(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            return compiled(*inputs).float()

    return Contender(call, weight_bytes, int8_arithmetic(), "inductor, freezing" + ", bf16 autocast" * mixed)


def int8_arithmetic() -> str:
    return f"int8 convolutions and linears, {'bfloat16' if native_bf16() else 'float32'} elsewhere"


def graph_weight_bytes(module: torch.fx.GraphModule) -> int:
    """Bytes of the tensors that a graph reads from its module."""
    names = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    values = [operator.attrgetter(name)(module) for name in names]
    return tensor_bytes([value for value in values if isinstance(value, Tensor)])


def openvino_model(work: Workload):
    """The network as an OpenVINO model with static shapes."""
    import openvino

    kinds = {torch.float32: openvino.Type.f32, torch.int64: openvino.Type.i64}
    shapes = [(list(value.shape), kinds[value.dtype]) for value in work.example]
    return openvino.convert_model(Step(work.unet, work.names), example_input=work.example, input=shapes)


def openvino_contender(model, work: Workload, precision: str, arithmetic: str) -> Contender:
    """Compile for one stream on all threads, with which OpenVINO answers a single request soonest."""
    import openvino

    constants = [op.output(0) for op in model.get_ops() if op.get_type_name() == "Constant"]
    weight_bytes = sum(math.prod(value.get_shape()) * value.get_element_type().size for value in constants)
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": work.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()

    def call(*inputs: Tensor) -> Tensor:
        outputs = request.infer([value.numpy() for value in inputs], share_inputs=True, share_outputs=True)
        return torch.from_numpy(outputs[0])

    return Contender(call, weight_bytes, arithmetic, f"openvino, {precision}")


def build_openvino_fp32(work: Workload) -> Contender:
    return openvino_contender(openvino_model(work), work, "f32", "float32")


def build_openvino_bf16(work: Workload) -> Contender:
    return openvino_contender(openvino_model(work), work, "bf16", "bfloat16 products, float32 sums")


def build_openvino_int8(work: Workload) -> Contender:
    """NNCF's post-training quantization, then the CPU plugin.

    Measured faster and more exact than NNCF's defaults: the model type that smooths the attention's inputs, and, where
    the processor has it, bfloat16 for what is not int8.
    """
    import nncf

    samples = nncf.Dataset([[value.numpy() for value in batch] for batch in work.calibration])
    model = nncf.quantize(
        openvino_model(work), samples, subset_size=len(work.calibration), model_type=nncf.ModelType.TRANSFORMER
    )
    return openvino_contender(model, work, "bf16" if native_bf16() else "f32", int8_arithmetic())


def quantize_fixed(unet: nn.Module, scheduler: DDIMScheduler, conditioning: dict[str, Tensor], bits: int = 4) -> None:
    """This project's fixed-bit W4A4, or other ``bits`` of activations; learning moves its values, not its speed."""
    from pqcad_ao import PQCADConfig, quantize_

    config = PQCADConfig(mode="ptq", activation_bits=bits, calibration_points=CALIBRATION_IMAGES)
    quantize_(unet, config, scheduler=scheduler, conditioning=conditioning or None, progress=False)


def build_pqcad_w4a4(work: Workload) -> Contender:
    from pqcad_ao import ops

    quantize_fixed(work.unet, work.scheduler, dict(zip(work.names, work.example[2:], strict=True)))
    compiled: Any = torch.compile(work.unet, backend="pqcad")
    call = Step(compiled, work.names)
    call(*work.example)
    return Contender(call, module_bytes(work.unet), ops.arithmetic(), "pqcad")


def build_pqcad_pt2(work: Workload, bits: int) -> Contender:
    """The same network compiled ahead of time for the schedule, by a process that is gone when the steps are timed."""
    from pqcad_ao import ops
    from pqcad_ao.backend import load_pt2

    package, rows = work.folder / "unet.pt2", dict(zip(work.names, work.example[2:], strict=True))
    torch.save(rows, work.folder / "conditioning.pt")
    arguments = [work.model, str(package), str(len(work.example[0])), str(work.folder / "conditioning.pt"), str(bits)]
    code = "import sys; from pqcad_ao.bench.compile import export_package; export_package(*sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, *arguments], stdout=sys.stderr, check=False)
    if done.returncode:
        raise RuntimeError(f"the export ended with code {done.returncode}: see above")
    loaded = load_pt2(package)

    def call(x_t: Tensor, timesteps: Tensor, *values: Tensor) -> Tensor:
        return loaded(x_t, timesteps[:1], **dict(zip(work.names, values, strict=True)))

    # what the package holds beside the packed weights is code and tables of the schedule: all of it counts
    return Contender(call, package.stat().st_size, ops.arithmetic(), "pqcad, AOTInductor, one schedule")


@torch.no_grad()
def export_package(model: str, path: str, batch: str, conditioning: str, bits: str) -> None:
    """What :func:`build_pqcad_pt2` runs in a process of its own."""
    from pqcad_ao.backend import export_pt2

    unet, scheduler = float_model(model)
    rows = torch.load(conditioning)
    quantize_fixed(unet, scheduler, rows, int(bits))
    options: dict[str, Any] = {"num_inference_steps": TRAJECTORY_STEPS, "batch_size": int(batch)}
    export_pt2(unet, path, scheduler=scheduler, conditioning=rows or None, min_sqnr_db=0.0, **options)


@dataclass(frozen=True)
class Row:
    """How a contender is built, and the packages without which it is skipped."""

    build: Callable[[Workload], Contender]
    requires: tuple[str, ...] = ()


ROWS = {
    REFERENCE: Row(build_torch_eager_fp32),
    "torch_compile_fp32": Row(build_torch_compile_fp32),
    "torch_compile_bf16": Row(build_torch_compile_bf16),
    "torchao_int8": Row(build_torchao_int8, ("torchao",)),
    "openvino_fp32": Row(build_openvino_fp32, ("openvino",)),
    "openvino_bf16": Row(build_openvino_bf16, ("openvino",)),
    "openvino_int8": Row(build_openvino_int8, ("openvino", "nncf")),
    "pqcad_w4a4": Row(build_pqcad_w4a4),
    "pqcad_w4a4_pt2": Row(partial(build_pqcad_pt2, bits=4)),
    # Winograd stays exact: two more bits of the activations cost next to no time
    "pqcad_w4a5_pt2": Row(partial(build_pqcad_pt2, bits=5)),
    "pqcad_w4a6_pt2": Row(partial(build_pqcad_pt2, bits=6)),
}


def gmac_per_step(step: nn.Module, example: tuple[Tensor, ...]) -> float:
    """Billions of multiply-accumulates of one call: convolutions, matrix products and attention."""
    with FlopCounterMode(display=False) as counter:
        step(*example)
    return counter.get_total_flops() / 2e9


def prepare(spec: dict[str, Any]) -> tuple[dict[str, Any], Callable[[int], dict[str, Any]]]:
    """The worker that is no contender: make the inputs for all and count the work; its turns measure the machine."""
    unet, scheduler = float_model(spec["model"])
    inputs = trajectory_inputs(unet, scheduler, spec["batch"], spec["seed"])
    torch.save(inputs, Path(spec["folder"]) / "inputs.pt")
    gmac = gmac_per_step(Step(unet, inputs["names"]), inputs["check"][0])
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    return {"gmac": gmac, "parameters": parameters}, lambda iterations: {"peaks": peak_gmacs()}


def contend(spec: dict[str, Any]) -> tuple[dict[str, Any], Callable[[int], dict[str, Any]]]:
    """A contender's worker: build it, compare its outputs with the reference's; its turns time ``iterations`` steps."""
    folder = Path(spec["folder"])
    inputs = torch.load(folder / "inputs.pt")
    base = rss_bytes()
    unet, scheduler = float_model(spec["model"])
    work = Workload(unet, scheduler, threads=spec["threads"], model=spec["model"], folder=folder, **inputs)
    example = work.example
    start = time.perf_counter()
    contender = ROWS[spec["name"]].build(work)
    contender.call(*example)
    compile_s = time.perf_counter() - start
    outputs = [contender.call(*batch).float().clone() for batch in work.check]
    if not all(output.isfinite().all() for output in outputs):
        raise FloatingPointError("its output holds NaN or infinity")
    if spec["name"] == REFERENCE:
        torch.save(outputs, folder / "reference.pt")
    sqnr = sqnr_db(torch.stack(torch.load(folder / "reference.pt")), torch.stack(outputs))
    operators = {} if contender.backend.startswith("openvino") else operator_ms(contender.call, example)
    del unet, work, inputs, outputs
    release_memory()
    facts = {
        "arithmetic": contender.arithmetic,
        "backend": contender.backend,
        "resident_weight_bytes": contender.resident_weight_bytes,
        "base_rss_bytes": base,
        "compile_s": compile_s,
        "sqnr_db_vs_fp32": sqnr if math.isfinite(sqnr) else None,
        "operators_ms": operators,
    }
    return facts, lambda iterations: {"ms": timed(lambda: contender.call(*example), iterations)}


def operator_ms(call: Callable[..., Tensor], example: tuple[Tensor, ...]) -> dict[str, float]:
    """Milliseconds of a step by operator, the longest first; what Inductor generated counts as one."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(PROFILED):
            call(*example)
    spent: dict[str, float] = {}
    for event in profile.key_averages():
        generated = event.key.startswith(("## Call CompiledFxGraph", "graph_"))
        name = "generated by Inductor" if generated else event.key
        spent[name] = spent.get(name, 0.0) + event.self_cpu_time_total / 1000 / PROFILED
    longest = sorted(spent.items(), key=lambda item: -item[1])
    return dict(longest[:OPERATORS]) | {"all others": sum(ms for _, ms in longest[OPERATORS:])}


def release_memory() -> None:
    """Give back what building needed and stepping does not: garbage, compiler processes, freed heap pages."""
    gc.collect()
    if "torch._inductor.async_compile" in sys.modules:
        sys.modules["torch._inductor.async_compile"].shutdown_compile_workers()
    with suppress(AttributeError, OSError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


@torch.no_grad()
def serve() -> None:
    """A worker process: a line of JSON in, a line of JSON out. First the specification, then turns, then ``stop``."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not reach the parent as a reply
    spec = json.loads(sys.stdin.readline())
    torch.set_num_threads(spec["threads"])

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")

    try:
        facts, turn = (prepare if spec["name"] == MACHINE else contend)(spec)
        build_peak = peak_rss_bytes()
        resettable = reset_peak_rss()
        reply(facts)
        idle, asleep = 0.0, time.process_time()
        for line in sys.stdin:
            idle += time.process_time() - asleep
            command = json.loads(line)
            if "stop" in command:
                peak = peak_rss_bytes()
                memory = {"peak_rss_bytes": max(build_peak, peak), "step_peak_rss_bytes": peak if resettable else None}
                reply({**memory, "idle_cpu_s": idle})
                return
            answer = turn(command["run"])
            reply(answer)
            asleep = time.process_time()
    except Exception as error:
        traceback.print_exc()
        reply({"failed": reason(error)})


def reason(error: Exception) -> str:
    """One line of an exception."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class Failed(RuntimeError):
    """A worker could not do what it was asked; the message is the reason."""


class Worker:
    """The parent's end of a worker process; a context manager that ends the process."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.name = spec["name"]
        folder = Path(spec["folder"])
        threads = str(spec["threads"])
        environment = os.environ | {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TORCHINDUCTOR_CACHE_DIR": str(folder / f"inductor-{self.name}"),  # compile_s is from scratch for all
        }
        self.log = folder / f"{self.name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from pqcad_ao.bench.compile import serve; serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            )
        self._send(spec)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self._stdin, self._stdout):
            with suppress(OSError):
                pipe.close()

    @property
    def _stdin(self) -> IO[str]:
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def _stdout(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def _send(self, message: dict[str, Any]) -> None:
        with suppress(BrokenPipeError):  # it is gone; receive() says why
            self._stdin.write(json.dumps(message) + "\n")
            self._stdin.flush()

    def receive(self) -> dict[str, Any]:
        """The next reply.

        Raises:
            Failed: the worker says so, or ended without a word.
        """
        line = self._stdout.readline()
        if not line:
            log = [text for text in self.log.read_text(errors="replace").splitlines() if text.strip()]
            raise Failed(
                f"its process ended with code {self.process.wait()}: {log[-1].strip() if log else 'no output'}"
            )
        answer = json.loads(line)
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        self._send(message)
        return self.receive()


def check_rows(rows: Sequence[str] | None) -> list[str]:
    """The rows to measure, the reference first, which is always among them.

    Raises:
        ValueError: an unknown name.
    """
    unknown = [name for name in rows or () if name not in ROWS]
    if unknown:
        raise ValueError(f"rows={', '.join(map(repr, unknown))}: allowed are {', '.join(ROWS)}")
    return [name for name in ROWS if rows is None or name in rows or name == REFERENCE]


def check_counts(name: str, values: Sequence[int]) -> list[int]:
    """Whole numbers from 1, or ValueError."""
    values = list(values)
    if not values or any(isinstance(value, bool) or not isinstance(value, int) or value < 1 for value in values):
        raise ValueError(f"{name}={values if len(values) != 1 else values[0]}: allowed are whole numbers from 1")
    return values


def missing_packages(name: str) -> list[str]:
    return [package for package in ROWS[name].requires if importlib.util.find_spec(package) is None]


def bench_compile(
    model: str = "demo",
    *,
    batches: Sequence[int] = (1, 8),
    rounds: int = 7,
    iterations: int = 3,
    threads: int | None = None,
    rows: Sequence[str] | None = None,
    seed: int = 0,
    json_path: str | Path | None = None,
    plot_path: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Time one UNet step of every contender, in turn, on this machine's processor.

    Args:
        model: ``demo``, ``ddpm-cifar10`` (random weights: for speed and size, never for quality), or a folder that
            holds a full-precision diffusers UNet.
        batches: batch sizes, one after the other.
        rounds: turns of each contender.
        iterations: timed steps in a turn, after one that is not timed.
        threads: for every contender; None: all available cores.
        rows: names from ``ROWS``; None: all. ``torch_eager_fp32`` is always measured, the others are compared with it.
        seed: of the inputs.
        json_path: where the result goes as JSON.
        plot_path: where a bar chart goes, as PNG or what the ending says.
        progress: show a bar.

    Returns:
        The JSON's content. ``rows`` holds one dict for each name and batch: ``ms`` (median over all timed steps),
        ``ms_min``, ``ms_max``, ``runs`` (timed steps), ``ratio_vs_torch_eager_fp32`` (eager's time over this row's in
        the same round, median over rounds: above 1 is faster), ``ratio_min``, ``ratio_max``, ``gmacs`` (the float
        network's multiply-accumulates over ``ms``, in G/s), ``resident_weight_bytes``, ``peak_rss_bytes`` (building
        included),
        ``step_peak_rss_bytes`` (stepping only), ``base_rss_bytes`` (the process before it loads the network),
        ``compile_s`` (from the float network to the first output, calibration included), ``sqnr_db_vs_fp32`` (over
        batches from sampling trajectories; None: no difference), ``arithmetic``, ``backend``, ``idle_cpu_s`` (CPU time
        burnt while others ran), ``operators_ms`` (of a profiled step, by operator; empty for OpenVINO); or ``skipped``
        with the reason. ``roofline`` holds for each batch ``gmac`` and the
        machine's measured ``peak_gmacs_fp32``, ``peak_gmacs_bf16``, ``peak_gmacs_int8`` (None: no such kernel), with
        the ``ms`` that ``gmac`` would take at each.

    Raises:
        ValueError: an unknown model or row, a folder without a full-precision UNet, a count below 1.
        OSError: there is no folder for the files.
        RuntimeError: the reference itself cannot run.
    """
    names, sizes = check_rows(rows), check_counts("batches", batches)
    check_counts("rounds", [rounds])
    check_counts("iterations", [iterations])
    threads = check_threads(threads)
    target = None if json_path is None else check_writable(json_path)  # now, and not after half an hour
    chart = None if plot_path is None else check_writable(plot_path)
    float_model(model)  # what is wrong with it is said before any process starts
    result: dict[str, Any] = {"benchmark": "compile", "model": model, "seed": seed, **describe(threads)}
    result |= {"rounds": rounds, "iterations": iterations, "roofline": [], "rows": []}
    with tqdm(total=len(sizes) * len(names) * (1 + rounds), desc="bench compile", disable=not progress) as bar:
        for batch in sizes:
            with tempfile.TemporaryDirectory(prefix="pqcad-bench-") as folder:
                spec = {"model": model, "seed": seed, "threads": threads, "batch": batch, "folder": folder}
                facts, measured = _measure(spec, names, rounds, iterations, bar)
            result["parameters"] = facts.pop("parameters")
            result["roofline"].append(facts)
            result["rows"] += measured
    result["loadavg_end"] = loadavg()
    if target is not None:
        target.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    if chart is not None:
        plot(result, chart)
    return result


def _measure(
    spec: dict[str, Any], names: list[str], rounds: int, iterations: int, bar: tqdm
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One batch size: build all, then go round; the roofline's facts and the rows."""
    rows = {name: {"name": name, "batch": spec["batch"]} for name in names}
    turns: dict[str, list[list[float]]] = {name: [] for name in names}
    peaks: list[dict[str, float]] = []
    with ExitStack() as stack:

        def start(name: str) -> tuple[Worker, dict[str, Any]]:
            worker = stack.enter_context(Worker(spec | {"name": name}))
            facts = worker.receive()
            time.sleep(PAUSE)
            return worker, facts

        def skip(name: str, why: str) -> None:
            rows[name] = {"name": name, "batch": spec["batch"], "skipped": why}
            if name == REFERENCE:
                raise RuntimeError(f"{REFERENCE}, to which all others are compared, failed: {why}")

        try:
            machine, facts = start(MACHINE)
        except Failed as error:
            raise RuntimeError(f"the network's inputs could not be made: {error}") from error
        workers: dict[str, Worker] = {}
        for name in names:
            bar.set_postfix_str(f"batch {spec['batch']}, building {name}")
            missing = missing_packages(name)
            try:
                if missing:
                    raise Failed(f"not installed: {', '.join(missing)} (pip install 'pqcad_ao[bench]')")
                workers[name], found = start(name)
                rows[name] |= found
            except Failed as error:
                skip(name, str(error))
            bar.update()
        for turn in range(rounds):
            peaks.append(machine.ask({"run": 1})["peaks"])
            time.sleep(PAUSE)
            for name in names:
                bar.set_postfix_str(f"batch {spec['batch']}, round {turn + 1}, {name}")
                bar.update()
                if "skipped" in rows[name]:
                    continue
                try:
                    turns[name].append(workers[name].ask({"run": iterations})["ms"])
                except Failed as error:
                    skip(name, str(error))
                time.sleep(PAUSE)
        for name in names:
            if "skipped" not in rows[name]:
                try:
                    rows[name] |= workers[name].ask({"stop": True})
                except Failed as error:
                    skip(name, str(error))
    roofline = {"batch": spec["batch"], **facts}
    for kind in ("fp32", "bf16", "int8"):
        peak = max((measured[kind] for measured in peaks if kind in measured), default=None)
        roofline[f"peak_gmacs_{kind}"] = peak
        roofline[f"ms_at_peak_{kind}"] = None if peak is None else facts["gmac"] / peak * 1e3
    for name, row in rows.items():
        if "skipped" not in row:
            row |= _statistics(turns[name], turns[REFERENCE], facts["gmac"])
    return roofline, list(rows.values())


def _statistics(turns: list[list[float]], reference: list[list[float]], gmac: float) -> dict[str, float]:
    times = [value for turn in turns for value in turn]
    ratios = [median(theirs) / median(ours) for ours, theirs in zip(turns, reference, strict=True)]
    return {
        "ms": median(times),
        "ms_min": min(times),
        "ms_max": max(times),
        "runs": len(times),
        "ratio_vs_torch_eager_fp32": median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "gmacs": gmac / median(times) * 1e3,
    }


def table(result: dict[str, Any]) -> str:
    """The result as text: rows, what was skipped and why, the roofline, the machine."""
    header = [
        "row",
        "batch",
        "ms",
        "min",
        "max",
        "× eager",
        "GMAC/s",
        "SQNR dB",
        "weights MB",
        "step RSS MB",
        "compile s",
    ]
    body, skipped = [], []
    for row in result["rows"]:
        if "skipped" in row:
            skipped.append(f"skipped {row['name']}, batch {row['batch']}: {row['skipped']}")
            continue
        times = [f"{row[key]:.2f}" for key in ("ms", "ms_min", "ms_max")]
        megabytes = [row[key] and f"{row[key] / 1e6:.1f}" for key in ("resident_weight_bytes", "step_peak_rss_bytes")]
        sqnr = row["sqnr_db_vs_fp32"]
        rates = [
            f"{row['ratio_vs_torch_eager_fp32']:.2f}",
            f"{row['gmacs']:.0f}",
            "-" if sqnr is None else f"{sqnr:.1f}",
        ]
        body.append([row["name"], row["batch"], *times, *rates, *megabytes, f"{row['compile_s']:.0f}"])
    lines = [tabulate(body, header, disable_numparse=True, colalign=("left",) + ("right",) * 10), *skipped]
    for line in result["roofline"]:
        peaks = [
            f"{kind} {line[f'peak_gmacs_{kind}']:.0f} GMAC/s = {line[f'ms_at_peak_{kind}']:.2f} ms"
            for kind in ("fp32", "bf16", "int8")
            if line[f"peak_gmacs_{kind}"]
        ]
        lines.append(
            f"batch {line['batch']}: {line['gmac']:.2f} GMAC a step; at this machine's peak: {'; '.join(peaks)}"
        )
    arithmetic = {row["name"]: row["arithmetic"] for row in result["rows"] if "arithmetic" in row}
    lines += [f"{name} executes: {what}" for name, what in arithmetic.items() if name == "pqcad_w4a4"]
    for row in result["rows"]:
        if row["name"] == "pqcad_w4a4" and row.get("operators_ms"):
            parts = "; ".join(f"{name} {ms:.2f} ms" for name, ms in row["operators_ms"].items())
            lines.append(f"{row['name']}, batch {row['batch']}, by operator (profiled): {parts}")
    machine, load = result["cpu"], result["loadavg"][0]
    lines.append(
        f"{result['model']} on {machine['name']}, {result['threads']} threads, load average {load} at the start"
    )
    if load > 0.5:
        lines.append("the machine was not idle: ratios from this run mean more than its milliseconds")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: str | Path) -> None:
    """Bars: time of a step for each batch size with lines at the machine's peaks, and the resident weights."""
    from matplotlib.figure import Figure

    sizes = [line["batch"] for line in result["roofline"]]
    figure = Figure(figsize=(4.5 * (len(sizes) + 1), 4), layout="constrained")
    axes = figure.subplots(1, len(sizes) + 1, squeeze=False)
    measured = [row for row in result["rows"] if "skipped" not in row]

    def bars(axis, rows: list[dict[str, Any]], values: list[float], texts: list[str], title: str) -> None:
        colors = ["tab:orange" if row["name"].startswith("pqcad") else "tab:blue" for row in rows]
        drawn = axis.barh([row["name"] for row in rows], values, color=colors)
        axis.bar_label(drawn, texts, padding=3, fontsize=8)
        axis.set_xlim(0, 1.45 * max(values))
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)

    for axis, line in zip(axes[0], result["roofline"], strict=False):
        rows = [row for row in measured if row["batch"] == line["batch"]]
        texts = [f"{row['ms']:.1f} ({row['ratio_vs_torch_eager_fp32']:.2f}×)" for row in rows]
        bars(axis, rows, [row["ms"] for row in rows], texts, f"ms a step, batch {line['batch']}")
        for kind, style in (("fp32", "--"), ("int8", ":")):
            if line[f"ms_at_peak_{kind}"]:
                axis.axvline(line[f"ms_at_peak_{kind}"], color="gray", linestyle=style, label=f"{kind} peak")
        axis.legend(fontsize=8, loc="lower right")
    rows = [row for row in measured if row["batch"] == sizes[0]]
    megabytes = [row["resident_weight_bytes"] / 1e6 for row in rows]
    bars(axes[0, -1], rows, megabytes, [f"{value:.1f}" for value in megabytes], "resident weights, MB")
    figure.suptitle(f"{result['model']}, {result['cpu']['name']}, {result['threads']} threads", fontsize=10)
    figure.savefig(path, dpi=120)


def whole_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``pqcad bench compile``."""
    parser.add_argument("--model", default="demo", help=f"{', '.join(NAMES)}, or a folder with a diffusers UNet")
    parser.add_argument("--batches", type=whole_numbers, metavar="N,N", help="batch sizes (1,8; on a GPU 1,16,64,256)")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for the GPU's own contenders (cpu)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender (7)")
    parser.add_argument("--iterations", type=int, help="timed steps in a turn (3; on a GPU 10)")
    parser.add_argument("--threads", type=int, help="for every contender (all available cores)")
    parser.add_argument("--rows", type=lambda text: text.split(","), metavar="ROW,ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (0)")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    parser.add_argument("--plot", metavar="FILE", help="write a bar chart there")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what the parsed options ask for and print the table.

    Raises:
        ValueError: as :func:`bench_compile`, or options that the chosen device does not have.
    """
    if args.device != "cpu":
        from pqcad_ao.bench import compile_gpu

        if args.plot or args.threads:
            raise ValueError("--plot and --threads belong to --device cpu")
        asked = {"batches": args.batches, "iterations": args.iterations, "rows": args.rows, "json_path": args.json}
        result = compile_gpu.bench_compile_gpu(
            args.model,
            device=args.device,
            rounds=args.rounds,
            seed=args.seed,
            **{name: value for name, value in asked.items() if value is not None},
        )
        print(compile_gpu.table(result))
        return result
    result = bench_compile(
        args.model,
        batches=args.batches or (1, 8),
        rounds=args.rounds,
        iterations=3 if args.iterations is None else args.iterations,
        threads=args.threads,
        rows=args.rows,
        seed=args.seed,
        json_path=args.json,
        plot_path=args.plot,
    )
    print(table(result))
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pqcad_ao.bench.compile", description="one UNet step, side by side")
    add_arguments(parser)
    try:
        run(parser.parse_args(argv))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
