"""ExecuTorch: exported programs to a .pte whose methods run in the stock XNNPACK delegate."""

import copy
import operator
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_flatten

from pqcad_ao.graph.arguments import bind
from pqcad_ao.utils.tracing import one_at_a_time

# Of a file's segments, of which each weight and each vector of scales is one: as XNNPACK asks for, where ExecuTorch
# takes 128.
ALIGNMENT = 16
NAME = 16  # hexadecimal digits by which XNNPACK finds its weights


@one_at_a_time
def lower(module: nn.Module, inputs: tuple[Any, ...], *, stock: bool = False) -> tuple[bytes, Counter[str]]:
    """An ExecuTorch program with the method ``forward``, and the calls that it makes, by name.

    Args:
        inputs: to export ``module`` with. stock: exactly as ExecuTorch's own recipe for XNNPACK does it.
    """
    edge = _to_edge({"forward": torch.export.export(module, inputs)}, stock)
    calls = calls_of(edge.exported_program("forward"))
    return edge.to_executorch().buffer, calls


def lower_sampler(
    networks: dict[str, ExportedProgram], images: dict[str, ExportedProgram], constants: dict[str, Any]
) -> tuple[bytes, Counter[str]]:
    """A program with the methods ``step``, ``unet`` and ``image``, and the calls that ``step`` makes, by name.

    A network is lowered once; each of its methods is what is left when the other's input and output are taken away.
    Both name the same delegated data, which the file holds once, and so does another network that has equal weights.

    Args:
        networks: ``f(x_t, step, timestep, *tensors) -> (x_{t-1}, prediction, *more)``, see
            :func:`pqcad_ao.passes.sampling_step.add_sampling_step`, by what their methods' names end in; that of ""
            is there. ``step`` returns more, ``unet`` does not.
        images: ``f(x_0)``, by what its method's name ends in. constants: further methods that return a constant each.
    """
    from executorch.exir import EdgeProgramManager, ExecutorchBackendConfig

    both = {f"both{ending}": exported for ending, exported in networks.items()}
    lowered = _to_edge({**both, **{f"image{ending}": exported for ending, exported in images.items()}})
    programs = {f"image{ending}": lowered.exported_program(f"image{ending}") for ending in images}
    for ending in networks:
        whole = lowered.exported_program(f"both{ending}")
        _, _, *more = range(len(whole.graph_signature.output_specs))
        programs[f"step{ending}"] = _only(whole, "step", "timestep", [0, *more])
        programs[f"unet{ending}"] = _only(whole, "timestep", "step", [1])
    calls = calls_of(programs["step"])  # what follows rewrites the graphs
    config = ExecutorchBackendConfig(segment_alignment=ALIGNMENT)
    return EdgeProgramManager(programs, constants, lowered.compile_config).to_executorch(config).buffer, calls


def _to_edge(programs: dict[str, ExportedProgram], stock: bool = False) -> Any:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.exir.backend.utils import is_same_node

    for program in programs.values():
        for node in program.graph.nodes:
            node.meta.pop("from_node", None)  # provenance, copied deeply by each of ExecuTorch's passes
    with ExitStack() as changes:
        if not stock:
            changes.enter_context(without_transposes())
            changes.enter_context(with_short_names())
        partitioner = XnnpackPartitioner() if stock else layered_partitioner()
        try:
            return to_edge_transform_and_lower(programs, partitioner=[partitioner])
        finally:
            is_same_node.cache_clear()  # unbounded (executorch 1.4, 1.5): with each node it keeps that node's graph


def calls_of(program: ExportedProgram) -> Counter[str]:
    """The calls that a lowered method makes, by name."""
    calls: Counter[str] = Counter()
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            calls[getattr(node.target, "_name", None) or node.target.__name__] += 1
    return calls


def _only(program: ExportedProgram, kept: str, dropped: str, outputs: list[int]) -> ExportedProgram:
    """A copy of a lowered ``f(x_t, step, timestep, *tensors)`` without one of its two ways to name a step."""
    graph_module = copy.deepcopy(program.graph_module)
    graph = graph_module.graph
    inputs = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    (chosen,) = inputs["step"].users  # step + index of timestep
    by_timestep = next(node for node in chosen.all_input_nodes if node is not inputs["step"])
    chosen.replace_all_uses_with(inputs["step"] if kept == "step" else by_timestep)
    graph.erase_node(chosen)
    result = next(node for node in graph.nodes if node.op == "output")
    result.args = (tuple(result.args[0][output] for output in outputs),)
    graph.eliminate_dead_code()
    graph.erase_node(inputs[dropped])
    graph_module.recompile()
    signature = copy.deepcopy(program.graph_signature)
    signature.input_specs = [spec for spec in signature.input_specs if spec.arg.name != dropped]
    signature.output_specs = [signature.output_specs[output] for output in outputs]
    (call,) = copy.deepcopy(program.module_call_graph[:1])
    tensors = [spec for spec in signature.input_specs if spec.kind is InputKind.USER_INPUT][2:]
    call.signature.in_spec = tree_flatten(((0, 0, *(0 for _ in tensors)), {}))[1]
    call.signature.out_spec = tree_flatten(0 if len(outputs) == 1 else tuple(outputs))[1]
    call.signature.forward_arg_names = None
    return ExportedProgram(
        root=graph_module,
        graph=graph,
        graph_signature=signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=[call],
        constants=program.constants,
        verifiers=[program.verifier],
    )


def layered_partitioner():
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


@contextmanager
def without_transposes() -> Iterator[None]:
    """Let XNNPACK's passes end with one that turns pairs of transposes that undo each other into plain reshapes.

    Its linears want (..., C) and its convolutions (N, H, W, C) tagged as channels-last: the same memory. ExecuTorch 1.4
    writes two transposes between them, and takes no passes of others.
    """
    from executorch.backends.xnnpack import _passes, xnnpack_preprocess
    from executorch.backends.xnnpack._passes.channels_last_tagged_reshape_pass import ChannelsLastTaggedReshapePass
    from executorch.backends.xnnpack._passes.xnnpack_pass import XNNPACKPass
    from executorch.exir.dialects._ops import ops
    from executorch.exir.pass_base import PassResult

    aten, tagged = ops.edge.aten, ChannelsLastTaggedReshapePass.is_nhwc_node
    moves = (aten._to_copy.default, aten.permute_copy.default, aten.view_copy.default)

    class SameMemory(XNNPACKPass):
        def call(self, graph_module: GraphModule) -> PassResult:
            for last in list(graph_module.graph.nodes):
                if last.target in moves and _moves_one_number(last):
                    last.replace_all_uses_with(bind(last)["input"])
                    continue
                source = _same_memory(last, moves, tagged)
                if source is None:
                    continue
                with graph_module.graph.inserting_before(last):
                    shape = list(last.meta["val"].shape)
                    reshaped = graph_module.graph.call_function(aten.view_copy.default, (source, shape))
                # without a tag the meta must not have the key: the visitors look for it alone
                reshaped.meta = {k: v for k, v in last.meta.items() if k != ChannelsLastTaggedReshapePass.XNN_NHWC_NODE}
                if tagged(last):
                    ChannelsLastTaggedReshapePass.mark_as_nhwc_node(reshaped)
                last.replace_all_uses_with(reshaped)
            graph_module.graph.eliminate_dead_code()
            graph_module.recompile()
            return PassResult(graph_module, True)

    class Manager(_passes.XNNPACKPassManager):
        passes: list[Any]

        def __init__(self, exported_program: ExportedProgram, passes: Any = None) -> None:
            super().__init__(exported_program, passes)
            if not passes:
                self.passes = [*self.passes, SameMemory]

    with patch.object(xnnpack_preprocess, "XNNPACKPassManager", Manager):
        yield


def _moves_one_number(move: Node) -> bool:
    """Whether a move comes to nothing since it is of one number, in four dimensions, which lies alike in every layout.

    What a call returns is left as it is: XNNPACK returns neither what it was given nor a value twice.
    """
    alike = all("val" in n.meta and tuple(n.meta["val"].shape) == (1, 1, 1, 1) for n in (move, bind(move)["input"]))
    return alike and all(user.op != "output" for user in move.users)


def _same_memory(last: Node, moves: tuple[Any, ...], tagged: Any) -> Node | None:
    """What lies in memory exactly as ``last`` does, if that is the end of a chain of moves that come to nothing."""
    _, permuted, reshaped = moves
    if last.target not in moves or any(user.target in moves and len(last.users) == 1 for user in last.users):
        return None
    chain = [last]
    # a tagged reshape is one of ours: it keeps memory as it lies, not values where they are
    while (before := bind(chain[-1])["input"]).target in moves and not (before.target is reshaped and tagged(before)):
        chain.append(before)
    # the longest part that undoes itself
    for length in range(len(chain), 1, -1):
        part = chain[:length]
        source = bind(part[-1])["input"]
        if "val" not in source.meta or not any(node.target is not reshaped for node in part):
            continue
        shape = tuple(source.meta["val"].shape)
        if tagged(source) and len(shape) != 4:
            continue
        value = torch.arange(source.meta["val"].numel())
        value = _as_tagged(value, shape) if tagged(source) else value.view(shape)
        for node in reversed(part):
            if node.target is permuted:
                value = value.permute(bind(node)["dims"])
            elif node.target is reshaped:
                value = value.reshape(bind(node)["size"])
        lying = value.permute(0, 2, 3, 1) if tagged(last) else value
        if lying.reshape(-1).equal(torch.arange(value.numel())):
            return source
    return None


@contextmanager
def with_short_names() -> Iterator[None]:
    """Let XNNPACK name its weights by fewer digits of their digest, and not number its nodes.

    ExecuTorch 1.4 names each by 64 or 70 characters, which stand in the file twice. Different weights of equal names
    are refused.
    """
    from executorch.backends.xnnpack import xnnpack_preprocess

    def short(name: str) -> str:
        return name.removeprefix("scale_")[:NAME]

    class NamedDataStore(xnnpack_preprocess.NamedDataStore):
        def add_named_data(self, key: str, *args: Any, **options: Any) -> None:
            super().add_named_data(short(key), *args, **options)

    def serialize(graph: Any, data: bytearray) -> bytes:
        for constant in graph.constant_data:
            constant.named_key = short(constant.named_key)
        for node in graph.xnodes:
            node.debug_handle = 0  # of a graph that is not in the file; zeros take no bytes
        return whole(graph, data)

    whole = xnnpack_preprocess.serialize_xnnpack_binary
    with (
        patch.object(xnnpack_preprocess, "NamedDataStore", NamedDataStore),
        patch.object(xnnpack_preprocess, "serialize_xnnpack_binary", serialize),
    ):
        yield


def _as_tagged(memory: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """(N, C, H, W) values that lie in channels-last order."""
    batch, channels, height, width = shape
    return memory.view(batch, height, width, channels).permute(0, 3, 1, 2)
