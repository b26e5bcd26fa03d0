"""The contenders: one UNet step of this project and of its peers, each as its users would run it."""

import math
import operator
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from pqcad_ao.bench.compile.workload import CALIBRATION_IMAGES, Step, Workload, float_model
from pqcad_ao.utils.machine import native_bf16

REFERENCE = "torch_eager_fp32"


@dataclass
class Contender:
    """A step that is ready to be timed.

    Attributes:
        call: (x_t, timesteps, *conditioning) to the prediction, a float tensor.
        resident_weight_bytes: of the weights in the form in which the contender's program holds them. Copies that a
            library packs for itself are not in it; they are in ``step_peak_rss_bytes``.
        arithmetic: what the machine executes.
        backend: what runs the graph.
        sampled: what :func:`~pqcad_ao.diffusion.sampling.sample` walks with; None: ``call`` alone.
        ready_s: seconds that a process waits for its first step of a network that is quantized already: the first call
            of what ``torch.compile`` returned, or loading the package; None: not measured.
    """

    call: Callable[..., Tensor]
    resident_weight_bytes: int
    arithmetic: str
    backend: str
    sampled: Callable[..., Tensor] | None = None
    ready_s: float | None = None


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


def build_torchao_int8(work: Workload, mixed: bool) -> Contender:
    """torchao's PT2E flow: X86InductorQuantizer, static int8, its own fusions in Inductor. Checked with torchao 0.18.

    Args:
        mixed: what is not int8 runs under autocast in bfloat16 ("int8-mixed-bf16"), where the processor multiplies it.
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
    mixed = mixed and native_bf16()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        compiled = frozen(converted, work.example)

    def call(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            return compiled(*inputs).float()

    return Contender(call, weight_bytes, int8_arithmetic(mixed), "inductor, freezing" + ", bf16 autocast" * mixed)


def int8_arithmetic(mixed: bool) -> str:
    return f"int8 convolutions and linears, {'bfloat16' if mixed else 'float32'} elsewhere"


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


def build_openvino_int8(work: Workload, mixed: bool) -> Contender:
    """NNCF's post-training quantization, then the CPU plugin.

    Measured faster and more exact than NNCF's defaults: the model type that smooths the attention's inputs.

    Args:
        mixed: what is not int8 is computed in bfloat16, where the processor multiplies it.
    """
    import nncf

    samples = nncf.Dataset([[value.numpy() for value in batch] for batch in work.calibration])
    model = nncf.quantize(
        openvino_model(work), samples, subset_size=len(work.calibration), model_type=nncf.ModelType.TRANSFORMER
    )
    mixed = mixed and native_bf16()
    return openvino_contender(model, work, "bf16" if mixed else "f32", int8_arithmetic(mixed))


def build_onnxruntime_int8(work: Workload) -> Contender:
    """ONNX Runtime's static post-training quantization, with the options that it advises for processors with VNNI.

    Everything it can quantize is: faster than the products alone, and a few dB less exact.
    """
    import onnx
    import onnxruntime
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quant_pre_process,
        quantize_static,
    )

    names = [f"in{index}" for index in range(len(work.example))]

    def given(batch: Sequence[Tensor]) -> dict[str, Any]:
        return {name: value.numpy() for name, value in zip(names, batch, strict=True)}

    class Calibration(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(work.calibration)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else given(batch)

    exported, inferred, quantized = (work.folder / f"{name}.onnx" for name in ("exported", "inferred", "quantized"))
    torch.onnx.export(Step(work.unet, work.names), work.example, exported, input_names=names, dynamo=False)
    quant_pre_process(exported, inferred, skip_symbolic_shape=True)
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
    quantize_static(inferred, quantized, Calibration(), quant_format=QuantFormat.QDQ, **types)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = work.threads
    session = onnxruntime.InferenceSession(quantized, options, providers=["CPUExecutionProvider"])

    def call(*inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, given(inputs))[0])

    constants = onnx.load(quantized).graph.initializer
    weight_bytes = sum(onnx.numpy_helper.to_array(value).nbytes for value in constants)
    return Contender(call, weight_bytes, "int8, float32 where ONNX Runtime has no int8 kernel", "onnxruntime")


def build_ncnn(work: Workload, int8: bool) -> Contender:
    """What ncnn makes of pnnx's conversion, and for 8 bits of the scales that ncnn2table would write.

    Its convolutions of 3×3 take 6-bit weights in 8 bits, for their Winograd form. The scales are those of the largest
    magnitudes; the clipped ones that ncnn2table finds by relative entropy were measured less exact.
    """
    from pqcad_ao.bench.compile import ncnn_files
    from pqcad_ao.bench.compile.ncnn_network import NcnnNetwork, convert

    param, weights = convert(Step(work.unet, work.names), work.example, work.folder)
    network = NcnnNetwork(param, weights, work.threads)
    arithmetic = "float32"
    if int8:
        layers = ncnn_files.read(param, weights)
        ncnn_files.quantize(layers, network.largest_inputs(layers, work.calibration))
        ncnn_files.write(layers, param, weights)
        network = NcnnNetwork(param, weights, work.threads)
        arithmetic = "int8 convolutions, linears and attention, 6-bit weights in 3×3 convolutions, float32 elsewhere"
    return Contender(network, weights.stat().st_size, arithmetic, "ncnn, image by image")


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
    start = time.perf_counter()
    call(*work.example)
    ready_s = time.perf_counter() - start
    return Contender(call, module_bytes(work.unet), ops.arithmetic(), "pqcad", ready_s=ready_s)


def build_pqcad_cached(work: Workload, shallow: bool) -> Contender:
    """One of both kinds of step where features are kept: in full, or with the feature of the same inputs at hand."""
    from pqcad_ao import ops
    from pqcad_ao.cached_unet import ShallowStep
    from pqcad_ao.graph.capture import capture
    from pqcad_ao.passes.cache_split import cache_split

    rows = dict(zip(work.names, work.example[2:], strict=True))
    quantize_fixed(work.unet, work.scheduler, rows)
    cut = cache_split(capture(work.unet, tuple(work.example[0].shape[1:]), rows).graph)
    full: Any = torch.compile(cut.full, backend="pqcad")
    after: Any = torch.compile(ShallowStep(cut.shallow), backend="pqcad")

    def call_full(x_t: Tensor, timesteps: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        both: tuple[Tensor, Tensor] = full(x_t, timesteps, dict(zip(work.names, values, strict=True)))
        return both

    if not shallow:
        return Contender(lambda *inputs: call_full(*inputs)[0], module_bytes(cut.full), ops.arithmetic(), "pqcad")
    kept = {batch[0].data_ptr(): call_full(*batch)[1].clone() for batch in work.check}
    line = torch.ones(1, cut.feature_shape[0], 1, 1), torch.zeros(1, cut.feature_shape[0], 1, 1)

    def call(x_t: Tensor, timesteps: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(work.names, values, strict=True))
        prediction: Tensor = after(x_t, timesteps, given, kept[x_t.data_ptr()], *line)
        return prediction

    return Contender(call, module_bytes(cut.shallow), ops.arithmetic(), "pqcad")


def build_pqcad_pt2(work: Workload, bits: int, part: int = 1, cached: bool = False) -> Contender:
    """The same network compiled ahead of time for the schedule, by a process that is gone when the steps are timed.

    Args:
        part: the schedule has this part of the steps, as a distilled network takes. cached: features are kept for one.
    """
    from pqcad_ao import ops
    from pqcad_ao.compile.loaded import load_pt2

    package, rows = work.folder / "unet.pt2", dict(zip(work.names, work.example[2:], strict=True))
    torch.save(rows, work.folder / "conditioning.pt")
    given = [len(work.example[0]), work.folder / "conditioning.pt", bits, work.steps // part, int(cached)]
    arguments = [work.model, str(package), *map(str, given)]
    code = "import sys; from pqcad_ao.bench.compile.contenders import export_package; export_package(*sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, *arguments], stdout=sys.stderr, check=False)
    if done.returncode:
        raise RuntimeError(f"the export ended with code {done.returncode}: see above")
    start = time.perf_counter()
    loaded = load_pt2(package)
    ready_s = time.perf_counter() - start

    def call(x_t: Tensor, timesteps: Tensor, *values: Tensor) -> Tensor:
        return loaded(x_t, timesteps[:1], **dict(zip(work.names, values, strict=True)))

    # what the package holds beside the packed weights is code and tables of the schedule: all of it counts
    backend = "pqcad, AOTInductor, one schedule"
    return Contender(call, package.stat().st_size, ops.arithmetic(), backend, loaded, ready_s)


@torch.no_grad()
def export_package(model: str, path: str, batch: str, conditioning: str, bits: str, steps: str, cached: str) -> None:
    """What :func:`build_pqcad_pt2` runs in a process of its own."""
    from pqcad_ao.cache import cache_
    from pqcad_ao.compile.package import export_pt2

    unet, scheduler = float_model(model)
    rows = torch.load(conditioning)
    quantize_fixed(unet, scheduler, rows, int(bits))
    given: dict[str, Any] = {"scheduler": scheduler, "num_inference_steps": int(steps), "conditioning": rows or None}
    if int(cached):
        cache_(unet, progress=False, **given)
    export_pt2(unet, path, batch_size=int(batch), min_sqnr_db=0.0, **given)


@dataclass(frozen=True)
class Row:
    """How a contender is built, the packages without which it is skipped, and the variables that its process gets.

    Attributes:
        part: of a walk's steps that it takes: 1, or 2 for half of them.
        walks_only: it differs from another row in its walk alone, so that its single steps are not timed.
    """

    build: Callable[[Workload], Contender]
    requires: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    part: int = 1
    walks_only: bool = False


# A processor that ends at AVX2, as far as PyTorch, oneDNN, MKL, Inductor's generated code and our kernels go
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",  # Inductor's vectors, too
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "TORCHINDUCTOR_CPP_MARCH": "x86-64-v3",
    "PQCAD_CPU_KERNELS": "avx2",
}


ROWS = {
    REFERENCE: Row(build_torch_eager_fp32),
    "torch_compile_fp32": Row(build_torch_compile_fp32),
    "torch_compile_bf16": Row(build_torch_compile_bf16),
    # bfloat16 beside the int8 products is the faster of the two on one processor and the slower on another
    "torchao_int8": Row(partial(build_torchao_int8, mixed=True), ("torchao",)),
    "torchao_int8_f32": Row(partial(build_torchao_int8, mixed=False), ("torchao",)),
    "openvino_fp32": Row(build_openvino_fp32, ("openvino",)),
    "openvino_bf16": Row(build_openvino_bf16, ("openvino",)),
    "openvino_int8": Row(partial(build_openvino_int8, mixed=True), ("openvino", "nncf")),
    "openvino_int8_f32": Row(partial(build_openvino_int8, mixed=False), ("openvino", "nncf")),
    "onnxruntime_int8": Row(build_onnxruntime_int8, ("onnx", "onnxruntime")),
    "ncnn_fp32": Row(partial(build_ncnn, int8=False), ("ncnn", "pnnx")),
    "ncnn_int8": Row(partial(build_ncnn, int8=True), ("ncnn", "pnnx")),
    "pqcad_w4a4": Row(build_pqcad_w4a4),
    "pqcad_w4a4_cache_full": Row(partial(build_pqcad_cached, shallow=False)),
    "pqcad_w4a4_cache_shallow": Row(partial(build_pqcad_cached, shallow=True)),
    "pqcad_w4a4_pt2": Row(partial(build_pqcad_pt2, bits=4)),
    # Winograd stays exact: two more bits of the activations cost next to no time
    "pqcad_w4a5_pt2": Row(partial(build_pqcad_pt2, bits=5)),
    "pqcad_w4a6_pt2": Row(partial(build_pqcad_pt2, bits=6)),
    # speed hangs on the number of steps, and not on whether the network was taught to need no more
    "pqcad_w4a6_pt2_half": Row(partial(build_pqcad_pt2, bits=6, part=2), part=2, walks_only=True),
    "pqcad_w4a6_pt2_cached": Row(partial(build_pqcad_pt2, bits=6, cached=True), walks_only=True),
    "pqcad_w4a6_pt2_half_cached": Row(partial(build_pqcad_pt2, bits=6, part=2, cached=True), part=2, walks_only=True),
    "torch_compile_fp32_avx2": Row(build_torch_compile_fp32, environment=AVX2),
    "pqcad_w4a4_avx2": Row(build_pqcad_w4a4, environment=AVX2),
    "pqcad_w4a4_pt2_avx2": Row(partial(build_pqcad_pt2, bits=4), environment=AVX2),
    "pqcad_w4a6_pt2_avx2": Row(partial(build_pqcad_pt2, bits=6), environment=AVX2),
}
