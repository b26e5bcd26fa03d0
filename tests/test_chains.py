"""Chains of ``pqcad::`` operators: they compute what their calls compute one by one, bit for bit."""

import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import SHAPE
from torch import Tensor
from torch.fx import Graph, GraphModule

from pqcad_ao.compile.backend import fuse
from pqcad_ao.denoiser import Denoiser
from pqcad_ao.ops import chain
from pqcad_ao.ops.cpu import loader
from pqcad_ao.ops.packing import pack
from pqcad_ao.passes.chains import NAMES, gather_chains
from pqcad_ao.passes.identities import drop_identities

WAYS = {"kernel": torch.ops.pqcad.chain, "reference": chain.run}


def _grid(low: int = -3, scale: float = 0.1, segments: int = 1) -> tuple[Tensor, Tensor]:
    return torch.full((2, segments), scale), torch.full((2, segments), low, dtype=torch.int16)


def _weights(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
    return pack(integers, 4), torch.rand(rows, generator=generator) + 0.1, torch.randn(rows, generator=generator)


def _every_operator() -> tuple[list[Tensor], str, list[int]]:
    """A norm, a convolution with an addend, tokens, a linear layer, attention, and a time projection in bfloat16."""
    torch.manual_seed(0)
    image, heads, embedding = torch.randn(2, 4, 5, 5), torch.randn(2, 1, 3, 8), torch.randn(2, 6).bfloat16()
    inputs = [image, *_grid(), *_weights(8, 36), heads, embedding, *_weights(8, 6), *_weights(5, 8), torch.ones(4)]
    scale, low, conv, linear, fifth = 1, 2, (3, 4), (8, 9, 10), (11, 12)
    first = len(inputs)
    calls = [
        ("norm_silu_quantize", ([0], 14, None, 2, 1e-5, True, scale, low, [4], 6, 1)),
        ("weight_only_linear", (7, *linear, 4)),
        ("conv2d", (first, *conv, scale, 5, 4, [4], [3, 3], [1, 1], [1, 1], [1, 1], 1, torch.float32, 6, None)),
        ("conv2d", (first, *conv, scale, None, 4, [4], [3, 3], [2, 1], [1, 1], [1, 1], 1, torch.bfloat16, 6, None)),
        ("attention", (6, 6, 6, 0.3)),
        ("quantize", (first + 2, scale, low, [8], 4, 1)),
        ("quantize", (first + 1, scale, low, [8], 8, -1)),
        ("linear", (first + 6, *fifth, scale, None, 4, [8], torch.float16, None)),
    ]
    results = [first + n for n in (1, 3, 4, 5, 7)]
    return inputs, chain.write(calls, first, results), results


def test_opcheck_chain():
    torch.library.opcheck(torch.ops.pqcad.chain.default, _every_operator())


def test_a_chain_is_its_calls():
    """Read by the kernel and by Python alike: every operator, type, list and None."""
    inputs, program, results = _every_operator()
    expected = chain.run(inputs, program, results)
    for found, alone in zip(torch.ops.pqcad.chain(inputs, program, results), expected, strict=True):
        assert (found.dtype, found.stride()) == (alone.dtype, alone.stride())
        assert torch.equal(found, alone)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@settings(max_examples=20)
@given(st.data())
def test_values_live_as_long_as_they_are_read(way, data):
    """Layers of (2, 8) that read what any of them before has made, in a chain and one by one."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 8), *_grid(), *_weights(8, 8)]
    calls, made = [], [0]
    for _ in range(data.draw(st.integers(1, 6), "layers")):
        first, source = len(inputs) + len(calls), data.draw(st.sampled_from(made), "source")
        addend = data.draw(st.sampled_from([None, *made]), "addend")
        calls.append(("quantize", (source, 1, 2, [8], 4, 1)))
        calls.append(("linear", (first, 3, 4, 1, 5, 4, [8], torch.float32, addend)))
        made.append(first + 1)
    results = data.draw(st.lists(st.sampled_from(made[1:]), min_size=1, unique=True), "results")
    values = list(inputs)
    for name, arguments in calls:
        row = [None if value is None else values[value] for value in arguments[:1]]
        if name == "quantize":
            values.append(torch.ops.pqcad.quantize(*row, *inputs[1:3], [8], 4, 1))
        else:
            added = None if arguments[-1] is None else values[arguments[-1]]
            layer = (*inputs[3:5], inputs[1], inputs[5], 4, [8], torch.float32, added)
            values.append(torch.ops.pqcad.linear(*row, *layer))
    found = way(inputs, chain.write(calls, len(inputs), results), results)
    for index, value in zip(results, found, strict=True):
        assert torch.equal(value, values[index])


@given(st.sampled_from([0.1, 0.2]), st.sampled_from([-3, -2]), st.booleans())
def test_one_norm_of_equal_grids(scale, low, in_a_view):
    """What reads the same image on a grid of the same numbers is not computed again, and memory is not shared."""
    torch.manual_seed(0)
    other = _grid(low, scale)
    if in_a_view:
        other = tuple(torch.stack([values, values + 1])[0] for values in other)
    inputs = [torch.randn(2, 4, 3, 3), *_grid(), *other]
    calls = [("norm_silu_quantize", ([0], None, None, 2, 1e-5, False, s, s + 1, [4], 4, 1)) for s in (1, 3)]
    results = [5, 6]
    one, two = torch.ops.pqcad.chain(inputs, chain.write(calls, 5, results), results)
    assert one.data_ptr() != two.data_ptr()
    for found, grid in ((one, inputs[1:3]), (two, inputs[3:5])):
        alone = torch.ops.pqcad.norm_silu_quantize(inputs[:1], None, None, 2, 1e-5, False, *grid, [4], 4, 1)
        assert torch.equal(found, alone)


DAMAGED = [("9", "operator 9"), ("3 5 0 0", "no value 5"), ("3 0", "ends"), ("x", "no number")]


@pytest.mark.parametrize(("program", "said"), DAMAGED)
def test_a_damaged_program_is_refused(program, said):
    if not loader.load():
        pytest.skip("no kernels for this machine, or no C++ compiler")
    with pytest.raises(ValueError, match=said):
        torch.ops.pqcad.chain([torch.ones(1)], program, [])


TARGETS = set(NAMES)


@pytest.mark.slow
@torch.no_grad()
def test_a_network_has_few_chains(quantized_unet):
    inputs = (torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.tensor([500, 20]), {})
    graph = torch.export.export(Denoiser(quantized_unet), inputs).module(check_guards=False)
    drop_identities(graph)
    fuse(graph)
    before, calls = graph(*inputs), _count(graph, TARGETS)
    gone = gather_chains(graph)
    chains, left = _count(graph, {torch.ops.pqcad.chain.default}), _count(graph, TARGETS)
    assert calls - gone == chains + left
    assert chains + left <= calls // 3
    assert torch.equal(graph(*inputs), before)


def _count(graph: GraphModule, targets: set) -> int:
    return sum(node.target in targets for node in graph.graph.nodes)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_graph_that_changes_tensors_in_place_stays(in_place):
    graph = Graph()
    x, scale, low = (graph.placeholder(name) for name in ("x", "scale", "low"))
    first, second = (graph.call_function(torch.ops.pqcad.quantize, (x, scale, low, [8], bits, 1)) for bits in (4, 6))
    if in_place:
        graph.call_function(operator.iadd, (x, 1))
    graph.output((first, second))
    assert gather_chains(GraphModule({}, graph)) == (0 if in_place else 1)
