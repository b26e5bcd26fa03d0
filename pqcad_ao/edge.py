"""ExecuTorch: one sampling step of a quantized network as a .pte for the stock XNNPACK runtime, and its sampler."""

import copy
import json
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import DDIMScheduler
from tabulate import tabulate
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten
from tqdm.auto import tqdm

from pqcad_ao import capture
from pqcad_ao.calibration import matching_ddim
from pqcad_ao.files import check_writable, write_whole
from pqcad_ao.nn import QuantizedLayer
from pqcad_ao.passes.attention import decompose_attention
from pqcad_ao.passes.fold_constants import fold_constants
from pqcad_ao.passes.fold_timesteps import fold_timesteps
from pqcad_ao.passes.group_norm import decompose_group_norm
from pqcad_ao.passes.identities import drop_identities
from pqcad_ao.passes.to_xnnpack import to_xnnpack
from pqcad_ao.sampling import evaluation_mode, predict, sample, take_rows
from pqcad_ao.serialization import quantized_state

FORMAT = 1
FLOOR_DB = 10.0  # what all images of a step together must reach, however their roundings fell
ROUNDING_MARGIN_DB = 10.0  # how far two samples of the same roundings may lie apart


class ParityError(RuntimeError):
    """The lowered program does not compute what the network computes."""


@dataclass
class PTEReport:
    """What an export wrote and what was measured on it.

    Attributes:
        path: of the file. bytes: its size.
        delegates: calls of XNNPACK in one step. portable: operators that stayed outside, with their number.
        sqnr_db: timestep to the signal-to-noise ratio of the program's predictions against the network's.
        rounding_db: the network's own at its worst step when its activations move in their last bit; measured where the
            program fell below what was asked for, else None.
        arithmetic: layer to what it runs in.
    """

    path: Path
    bytes: int
    delegates: int
    portable: dict[str, int]
    sqnr_db: dict[int, float] = field(default_factory=dict)
    rounding_db: float | None = None
    arithmetic: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [("file", f"{self.path}, {self.bytes:,} bytes"), ("XNNPACK calls per step", self.delegates)]
        portable = ", ".join(f"{count} {name}" for name, count in sorted(self.portable.items()))
        rows.append(("operators outside", portable or "none"))
        if self.sqnr_db:
            worst = min(self.sqnr_db, key=self.sqnr_db.__getitem__)
            middle = median(self.sqnr_db.values())
            text = f"{self.sqnr_db[worst]:.1f} dB at worst (timestep {worst}), median {middle:.1f} dB"
            rows.append(("against the network", text))
        if self.rounding_db is not None:
            rows.append(("float32 rounding alone", f"{self.rounding_db:.1f} dB at worst"))
        for text, count in Counter(self.arithmetic.values()).most_common():
            rows.append((f"{count} layer{'s' if count > 1 else ''}", text))
        return tabulate(rows, tablefmt="plain")


class _Step(nn.Module):
    """``f(x_t, timesteps, tensors) -> prediction``, where tensors are the leaves of the conditioning."""

    def __init__(self, unet: nn.Module, rebuild: Callable[[tuple[Tensor, ...]], dict[str, Any]]) -> None:
        super().__init__()
        self.unet, self.rebuild = unet, rebuild

    def forward(self, x_t: Tensor, timesteps: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        return predict(self.unet, x_t, timesteps, self.rebuild(tensors))


@dataclass
class _Record:
    """One call of the network on a trajectory: its step's index, inputs and prediction."""

    index: int
    x_t: Tensor
    conditioning: dict[str, Any]
    prediction: Tensor


def export_pte(
    unet: nn.Module,
    path: str | Path,
    *,
    scheduler,
    num_inference_steps: int = 20,
    batch_size: int = 1,
    conditioning: dict[str, Any] | None = None,
    sample_shape: tuple[int, int, int] | None = None,
    min_sqnr_db: float = 25.0,
    trajectories: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> PTEReport:
    """Write a quantized network as an ExecuTorch program for the stock XNNPACK runtime.

    The program's method is ``forward(x_t, step, *conditioning) -> prediction`` with x_t (batch_size, C, H, W) float32
    and step a (1,) int64 index into the schedule, the DDIM timesteps of ``scheduler`` at ``num_inference_steps``. What
    depends on the timestep alone is a table in the file. The program is compared with the network on the network's own
    trajectories, at every step, before anything is written under ``path``.

    Args:
        unet: a float32 network on the CPU that ``quantize_`` has quantized.
        path: of the .pte.
        scheduler: of the DDPM/DDIM family.
        conditioning: keyword arguments of ``unet.forward`` with a row for each sample; its tensors become inputs.
        sample_shape: (C, H, W), for networks whose config does not say it.
        min_sqnr_db: what the program must reach at every step on the median image of the trajectories, unless float32
            rounding alone moves the network by more.
        trajectories: how many are walked for the comparison. seed: of their noise.
        progress: show bars.

    Raises:
        ImportError: executorch is not installed.
        ValueError: the network is not quantized by pqcad_ao, not float32 or not on the CPU; conditioning is missing;
            the scheduler is foreign or of another number of training timesteps.
        OSError: ``path`` cannot be written; said before the work begins.
        ParityError: the program departs from the network; says where and by how much, and nothing is written.
    """
    _require_executorch()
    _check_network(unet)
    trained = quantized_state(unet).timestep.num_train_timesteps
    scheduler = matching_ddim(scheduler, trained)
    _check_counts(num_inference_steps=num_inference_steps, batch_size=batch_size, trajectories=trajectories)
    if num_inference_steps > trained:
        raise ValueError(f"num_inference_steps={num_inference_steps}: the scheduler has {trained} timesteps")
    conditioning = capture.check_conditioning(unet, conditioning)
    shape = capture.sample_shape(unet, sample_shape)
    path = check_writable(path)
    unet = _contiguous(unet)
    stages = tqdm(total=4, desc="recording trajectories", disable=not progress, leave=False)
    with evaluation_mode(unet), torch.no_grad(), stages as bar:
        noise = torch.randn(trajectories, *shape, generator=torch.Generator().manual_seed(seed))
        records = _record(unet, scheduler, noise, num_inference_steps, conditioning, batch_size, progress)
        bar.update()
        bar.set_description("capturing")
        graph, inputs, names = _capture(unet, shape, batch_size, conditioning)
        schedule = _metadata(scheduler, num_inference_steps, batch_size, shape, names)
        graph, arithmetic = _rewrite(graph, unet, schedule["timesteps"])
        bar.update()
        bar.set_description("lowering")
        exported = torch.export.export(graph, (inputs[0], torch.tensor([0]), inputs[2]))
        program, calls = _lower(exported, schedule, partitioner=_partitioner())
        bar.update()
        bar.set_description("comparing")
        sqnr_db, rounding_db = _parity(program, unet, records, schedule["timesteps"], batch_size, min_sqnr_db)
        bar.update()
    write_whole(path, program)
    delegates = calls.pop("executorch_call_delegate", 0)
    return PTEReport(path, len(program), delegates, dict(calls), sqnr_db, rounding_db, arithmetic)


def _contiguous(unet: nn.Module) -> nn.Module:
    """The network itself, or where weights are in channels-last layout, which XNNPACK's passes refuse, a copy."""
    if all(parameter.is_contiguous() for parameter in unet.parameters()):
        return unet
    return copy.deepcopy(unet).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def export_fp32_pte(
    unet: nn.Module,
    path: str | Path,
    *,
    batch_size: int = 1,
    conditioning: dict[str, Any] | None = None,
    sample_shape: tuple[int, int, int] | None = None,
) -> PTEReport:
    """Write a network that is not quantized the way ExecuTorch's own recipe does: the baseline for size and latency.

    The program's method is ``forward(x_t, timesteps, *conditioning) -> prediction`` with (batch_size,) int64 timesteps.
    Arguments and errors as for :func:`export_pte`.
    """
    _require_executorch()
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    if quantized_state(unet) is not None:
        raise ValueError(f"this {type(unet).__name__} is quantized: write export_pte(unet, path, scheduler=...)")
    _check_float(unet)
    _check_counts(batch_size=batch_size)
    conditioning = capture.check_conditioning(unet, conditioning)
    shape = capture.sample_shape(unet, sample_shape)
    path = check_writable(path)
    unet = _contiguous(unet)
    with evaluation_mode(unet), torch.no_grad():
        step, inputs, _ = _step(unet, shape, batch_size, conditioning)
        program, calls = _lower(torch.export.export(step, inputs), {}, partitioner=XnnpackPartitioner())
    write_whole(path, program)
    delegates = calls.pop("executorch_call_delegate", 0)
    return PTEReport(path, len(program), delegates, dict(calls))


class PTESampler:
    """Samples from a .pte that :func:`export_pte` wrote, in ExecuTorch's Python runtime.

    Attributes:
        timesteps: (S,) int64, the schedule. sample_shape: (C, H, W). batch_size: of one call.
        conditioning: the names of the tensors that a call takes besides x_t, as ``keystr`` writes them.
        scheduler: the DDIM sampler.

    Raises:
        ImportError: executorch is not installed. OSError: no such file.
        ValueError: the file is damaged, or not one of :func:`export_pte`.
    """

    def __init__(self, path: str | Path) -> None:
        _require_executorch()
        from executorch.runtime import Runtime

        # the runtime reads weights from these bytes as long as the method lives, and does not keep them alive itself
        self._bytes = Path(path).read_bytes()
        try:
            self._program = Runtime.get().load_program(self._bytes)
        except RuntimeError as error:
            raise ValueError(f"{path} is no ExecuTorch program, or is damaged: {error}") from error
        if "pqcad_format" not in self._program.method_names:
            raise ValueError(f"{path} is an ExecuTorch program, but not one that pqcad_ao.export_pte wrote")
        version = self._constant("pqcad_format")
        if version != FORMAT:
            raise ValueError(f"{path} is of format {version}; this pqcad_ao reads format {FORMAT}")
        self.timesteps = self._constant("timesteps").clone()
        self.sample_shape = tuple(self._constant("sample_shape").tolist())
        self.batch_size = self._constant("batch_size")
        self.conditioning = json.loads(self._constant("conditioning"))
        self.scheduler = DDIMScheduler.from_config(json.loads(self._constant("scheduler_config")))
        self._method = self._program.load_method("forward")

    def _constant(self, name: str) -> Any:
        return self._program.load_method(name).execute([])[0]

    def predict(self, x_t: Tensor, step_index: int, conditioning: dict[str, Any] | None = None) -> Tensor:
        """The network's raw prediction.

        Args:
            x_t: (batch_size, C, H, W) float32. step_index: of ``timesteps``. conditioning: with batch_size rows.
        """
        expected = (self.batch_size, *self.sample_shape)
        if tuple(x_t.shape) != expected:
            raise ValueError(f"x_t has shape {tuple(x_t.shape)}: this program was exported for {expected}")
        if not 0 <= step_index < len(self.timesteps):
            raise ValueError(f"step_index={step_index}: this program has steps 0 to {len(self.timesteps) - 1}")
        given, _ = _tensors(conditioning or {})
        if sorted(given) != sorted(self.conditioning):
            raise ValueError(f"conditioning has {sorted(given)}: this program takes {sorted(self.conditioning)}")
        inputs = [x_t.float().contiguous(), torch.tensor([step_index])]
        inputs += [given[name].contiguous() for name in self.conditioning]
        return self._method.execute(inputs)[0].clone()

    def sample(self, noise: Tensor, conditioning: dict[str, Any] | None = None, *, progress: bool = False) -> Tensor:
        """Walk the schedule from ``noise`` (N, C, H, W) to images in [-1, 1], as ``pqcad_ao.sampling.sample`` does.

        Any N will do: the last call of a step is filled up with copies of its last image.
        """
        if noise.dim() != 4 or tuple(noise.shape[1:]) != self.sample_shape:
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}: expected (N, {', '.join(map(str, self.sample_shape))})"
            )
        index = 0

        def follow(first: int, step: int, timestep: Tensor, x_t: Tensor) -> None:
            nonlocal index
            index = step

        def unet(x_t: Tensor, timestep: Tensor, **chosen: Any) -> Tensor:
            rows = _rows(len(x_t), self.batch_size)
            return self.predict(x_t[rows], index, take_rows(chosen, rows))[: len(x_t)]

        return sample(
            unet,
            self.scheduler,
            noise,
            len(self.timesteps),
            conditioning=conditioning,
            batch_size=self.batch_size,
            callback=follow,
            progress=progress,
        )


def _require_executorch() -> None:
    try:
        import executorch.exir  # noqa: F401
    except ImportError as error:
        raise ImportError(f"this needs executorch: pip install pqcad_ao[edge] ({error})") from error


def _check_network(unet: nn.Module) -> None:
    if quantized_state(unet) is None:
        foreign = getattr(unet, "is_quantized", False) or any(type(p) is not nn.Parameter for p in unet.parameters())
        if foreign:
            raise ValueError(
                f"this {type(unet).__name__} was quantized by something else: load it in full precision and call "
                "quantize_"
            )
        raise ValueError(
            f"this {type(unet).__name__} is not quantized: call quantize_ first, or export_fp32_pte for the baseline"
        )
    _check_float(unet)


def _check_float(unet: nn.Module) -> None:
    for name, parameter in unet.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise ValueError(
                f"{name} is {parameter.dtype} on {parameter.device}: export takes float32 on the CPU, write "
                "unet.to('cpu', torch.float32)"
            )


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: allowed are whole numbers from 1")


def _rows(count: int, size: int) -> Tensor:
    """Indices 0 ... count-1, filled up to ``size`` with the last one."""
    return torch.arange(size).clamp_max(count - 1)


def _tensors(conditioning: dict[str, Any]) -> tuple[dict[str, Tensor], Callable[[tuple[Tensor, ...]], dict[str, Any]]]:
    """The tensors of a (nested) conditioning by name, and what rebuilds it around others."""
    leaves, spec = tree_flatten_with_path(conditioning)
    places = [place for place, (_, leaf) in enumerate(leaves) if isinstance(leaf, Tensor)]

    def rebuild(tensors: tuple[Tensor, ...]) -> dict[str, Any]:
        values = [leaf for _, leaf in leaves]
        for place, tensor in zip(places, tensors, strict=True):
            values[place] = tensor
        return tree_unflatten(values, spec)

    return {keystr(leaves[place][0]): leaves[place][1] for place in places}, rebuild


def _step(
    unet: nn.Module, shape: tuple[int, int, int], batch_size: int, conditioning: dict[str, Any]
) -> tuple[_Step, tuple[Any, ...], list[str]]:
    """The network as a function of tensors, inputs to export it with, and its conditioning's names."""
    tensors, rebuild = _tensors(conditioning)
    tensors = {name: value[torch.arange(batch_size) % len(value)] for name, value in tensors.items()}
    inputs = (torch.zeros(batch_size, *shape), torch.ones(batch_size, dtype=torch.int64), tuple(tensors.values()))
    return _Step(unet, rebuild), inputs, list(tensors)


def _capture(
    unet: nn.Module, shape: tuple[int, int, int], batch_size: int, conditioning: dict[str, Any]
) -> tuple[GraphModule, tuple[Any, ...], list[str]]:
    """The network's graph for one batch size, the inputs it was captured with, and its conditioning's names.

    Raises:
        RuntimeError: torch.export cannot capture it; the cause is chained.
    """
    step, inputs, names = _step(unet, shape, batch_size, conditioning)
    try:
        return torch.export.export(step, inputs).module(check_guards=False), inputs, names
    except Exception as error:
        raise RuntimeError(
            f"torch.export cannot capture {type(unet).__name__} called as f(x_t {tuple(inputs[0].shape)}, timesteps "
            f"({batch_size},), {', '.join(names) or 'no conditioning'}): {str(error).splitlines()[0]}"
        ) from error


def _metadata(
    scheduler: DDIMScheduler, steps: int, batch_size: int, shape: tuple[int, int, int], names: list[str]
) -> dict[str, Any]:
    """Constant methods of the program: all that a sampler needs, for one without Python as well.

    ``alphas_cumprod_prev`` belongs to the timestep that a DDIM step leads to.
    """
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.to(torch.int64)
    previous = timesteps - scheduler.config.num_train_timesteps // steps
    alphas = scheduler.alphas_cumprod
    led_to = torch.where(previous >= 0, alphas[previous.clamp_min(0)], scheduler.final_alpha_cumprod)
    return {
        "pqcad_format": FORMAT,
        "timesteps": timesteps,
        "batch_size": batch_size,
        "sample_shape": torch.tensor(shape),
        "conditioning": json.dumps(names),
        "alphas_cumprod": alphas[timesteps].float(),
        "alphas_cumprod_prev": led_to.float(),
        "init_noise_sigma": float(scheduler.init_noise_sigma),
        "prediction_type": scheduler.config.prediction_type,
        "clip_sample": bool(scheduler.config.clip_sample),
        "clip_sample_range": float(scheduler.config.clip_sample_range),
        "scheduler_config": scheduler.to_json_string(),
    }


def _record(
    unet: nn.Module,
    scheduler: DDIMScheduler,
    noise: Tensor,
    steps: int,
    conditioning: dict[str, Any],
    batch_size: int,
    progress: bool,
) -> list[_Record]:
    """Every call of the network while it samples from ``noise``."""
    records: list[_Record] = []
    index = 0

    def follow(first: int, step: int, timestep: Tensor, x_t: Tensor) -> None:
        nonlocal index
        index = step

    def recorded(x_t: Tensor, timestep: Tensor, **chosen: Any) -> Tensor:
        prediction = predict(unet, x_t, timestep, chosen)
        records.append(_Record(index, x_t.clone(), chosen, prediction.clone()))
        return prediction

    tensors, _ = _tensors(conditioning)
    length = next((len(value) for value in tensors.values()), 1)
    chosen = take_rows(conditioning, torch.arange(len(noise)) % length)
    options = {"conditioning": chosen, "batch_size": batch_size, "callback": follow, "progress": progress}
    sample(recorded, scheduler, noise, steps, **options)
    return records


def _rewrite(graph: GraphModule, unet: nn.Module, schedule: Tensor) -> tuple[GraphModule, dict[str, str]]:
    """Run the passes over a captured network: what to lower, and each quantized layer's arithmetic in it."""
    timesteps = [node for node in graph.graph.nodes if node.op == "placeholder"][1]
    drop_identities(graph)
    weight_only = _weight_only_products(graph, unet)
    fold_constants(graph)
    arithmetic = to_xnnpack(graph)
    fold_timesteps(graph, timesteps, schedule)
    decompose_group_norm(graph)
    decompose_attention(graph)
    left = set(graph.graph.nodes)
    for fqn, (bits, product) in weight_only.items():
        text = "float32 products of the dequantized weights" if product in left else f"a table of {len(schedule)} rows"
        arithmetic[fqn] = f"W{bits}: {text}"
    return GraphModule(graph, graph.graph), arithmetic  # with the parameters that are still read, and no others


def _weight_only_products(graph: GraphModule, unet: nn.Module) -> dict[str, tuple[int, Node]]:
    """For each layer that quantizes its weights alone: their bits and the node that multiplies by them."""
    products = (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default)
    readers = {str(node.target): node for node in graph.graph.nodes if node.op == "get_attr"}
    found = {}
    for fqn, layer in unet.named_modules():
        if isinstance(layer, QuantizedLayer) and layer.activation_bits is None:
            node = readers[f"unet.{fqn}.weight_scale"]
            while node.target not in products:
                node = next(iter(node.users))
            found[fqn] = (layer.weight_bits, node)
    return found


def _lower(exported: ExportedProgram, constants: dict[str, Any], *, partitioner: Any) -> tuple[bytes, Counter[str]]:
    """An ExecuTorch program and the calls that its method makes, by name."""
    from executorch.exir import to_edge_transform_and_lower

    for node in exported.graph.nodes:
        node.meta.pop("from_node", None)  # provenance, copied deeply by each of ExecuTorch's passes
    edge = to_edge_transform_and_lower(exported, partitioner=[partitioner], constant_methods=constants)
    calls: Counter[str] = Counter()
    for node in edge.exported_program().graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            calls[getattr(node.target, "_name", None) or node.target.__name__] += 1
    return edge.to_executorch().buffer, calls


def _partitioner():
    """XNNPACK's partitioner with another way to put supported nodes into calls.

    The stock one (executorch 1.4) tries to merge every pair of nodes, which takes minutes here. Ours makes one call of
    all supported nodes that have equally many changes from XNNPACK to other operators behind them: linear in the
    number of nodes, and without cycles, since an edge never leads to a smaller number.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from torch.fx.passes.infra.partitioner import Partition

    class LayeredPartitioner(XnnpackPartitioner):
        def ops_to_not_decompose(self, ep: ExportedProgram):
            # with a check for each node, as in the stock one, the program is decomposed once more
            return [torch.ops.aten.linear.default], None

        def generate_partitions(self, ep: ExportedProgram) -> list[Partition]:
            for node in ep.graph.nodes:
                node.meta.pop("from_node", None)  # provenance, copied deeply by each of XNNPACK's passes
            members: dict[int, list[Node]] = {}
            for node, layer in layers_of_calls(ep.graph, self.get_matched_nodes_from_configs(ep)).items():
                members.setdefault(layer, []).append(node)
            return [Partition(id=layer, nodes=nodes) for layer, nodes in members.items()]

    return LayeredPartitioner()


def layers_of_calls(graph: Graph, groups: list[list[Node]]) -> dict[Node, int]:
    """For each node of ``groups``, nodes that must be together, the number of the call it goes into."""
    group_of = {node: index for index, group in enumerate(groups) for node in group}
    of_group, of_node = [0] * len(groups), dict.fromkeys(graph.nodes, 0)
    changed = True
    while changed:  # a group's members may lie far apart: until nothing moves
        changed = False
        for node in graph.nodes:
            ends_call = node not in group_of
            layer = max(
                (of_node[s] + (ends_call and s in group_of and s.op != "placeholder") for s in node.all_input_nodes),
                default=0,
            )
            if node in group_of:
                of_group[group_of[node]] = layer = max(layer, of_group[group_of[node]])
            if layer > len(of_node):
                raise ValueError(f"{node.name} must be in one call with nodes that read it through another operator")
            if layer != of_node[node]:
                of_node[node], changed = layer, True
    return {node: of_group[index] for node, index in group_of.items()}


def _parity(
    program: bytes, unet: nn.Module, records: list[_Record], timesteps: Tensor, batch_size: int, min_sqnr_db: float
) -> tuple[dict[int, float], float | None]:
    """Compare the program with the recorded predictions, step by step.

    The two sum in another order, so that now and then a value on a threshold of the 4-bit grid falls to its other side;
    that one image then departs by as much as quantization noise does. A program that computes something else departs on
    every image: the bound is on a step's median image, and on all of them together only as far as ``FLOOR_DB``. In a
    network of many layers every image has such a value. Where the bounds are not met, they are lowered to
    ``ROUNDING_MARGIN_DB`` below what the network itself reaches when its activations move in their last bit.

    Returns:
        timestep to the program's SQNR on all images together, and the network's own at its worst step, if measured.

    Raises:
        ParityError: a step is below its bound, or not a number.
    """
    from executorch.runtime import Runtime

    loaded = Runtime.get().load_program(program)
    method = loaded.load_method("forward")

    def run(record: _Record) -> Tensor:
        rows = _rows(len(record.x_t), batch_size)
        tensors, _ = _tensors(take_rows(record.conditioning, rows))
        inputs = [record.x_t[rows], torch.tensor([record.index]), *(value.contiguous() for value in tensors.values())]
        return method.execute(inputs)[0][: len(record.x_t)]

    def run_moved(record: _Record) -> Tensor:
        with _moved_in_the_last_bit(unet):
            return predict(unet, record.x_t, timesteps[record.index], record.conditioning)

    bounds = (min_sqnr_db, min(min_sqnr_db, FLOOR_DB))
    reached = _sqnr_db(run, records, len(timesteps))
    own = None
    if any(_below(both, bounds) for both in reached):
        own = [min(column) for column in zip(*_sqnr_db(run_moved, records, len(timesteps)), strict=True)]
        bounds = tuple(min(bound, value - ROUNDING_MARGIN_DB) for bound, value in zip(bounds, own, strict=True))
    failed = [(both, int(t)) for both, t in zip(reached, timesteps, strict=True) if _below(both, bounds)]
    if failed:
        (typical, together), t = min(failed)
        raise ParityError(
            f"the lowered program departs from the network: {typical:.1f} dB for the median image and "
            f"{together:.1f} dB for all at timestep {t}, where {bounds[0]:.3g} and {bounds[1]:.3g} dB are asked for; "
            f"{len(failed)} of {len(timesteps)} timesteps are below. Nothing was written"
        )
    return {int(t): together for (_, together), t in zip(reached, timesteps, strict=True)}, own and own[1]


def _below(both: tuple[float, float], bounds: tuple[float, ...]) -> bool:
    return any(value < bound for value, bound in zip(both, bounds, strict=True))


def _sqnr_db(run: Callable[[_Record], Tensor], records: list[_Record], steps: int) -> list[tuple[float, float]]:
    """For each step, the median image's signal-to-noise ratio in dB and that of all images together."""
    pairs: list[list[tuple[float, float]]] = [[] for _ in range(steps)]
    for record in records:
        reference = record.prediction.double().flatten(1)
        noise = run(record).double().flatten(1) - reference
        pairs[record.index] += zip(reference.square().sum(1).tolist(), noise.square().sum(1).tolist(), strict=True)
    return [
        (median(_decibels(*pair) for pair in step), _decibels(*map(sum, zip(*step, strict=True)))) for step in pairs
    ]


def _decibels(signal: float, noise: float) -> float:
    if not math.isfinite(noise):
        return -math.inf
    return 10 * math.log10(signal / noise) if noise > 0 else math.inf


@contextmanager
def _moved_in_the_last_bit(unet: nn.Module) -> Iterator[None]:
    """Move what every quantized layer reads by as much as summing it in another order would."""
    generator = torch.Generator().manual_seed(0)

    def move(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        ulp = torch.finfo(x.dtype).eps * x.square().mean().sqrt()
        return (x + ulp * torch.randn(x.shape, generator=generator), *args[1:])

    layers = [m for m in unet.modules() if isinstance(m, QuantizedLayer) and m.activation_bits is not None]
    handles = [layer.register_forward_pre_hook(move) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
