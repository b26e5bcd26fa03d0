"""Arguments of a call have one name each, however the call was written."""

import operator

import pytest
import torch
from torch.fx import Graph
from torch.nn import functional as F

import pqcad_ao.ops  # noqa: F401  (registers the operators)
from pqcad_ao.graph.arguments import bind

aten = torch.ops.aten


@pytest.fixture
def graph() -> Graph:
    graph = Graph()
    for name in ("x", "y"):
        graph.placeholder(name)
    return graph


def test_defaults_are_filled_in_and_what_is_given_wins(graph):
    x, y = graph.nodes
    assert bind(graph.call_function(aten.conv2d.default, (x, y))) == {
        "input": x,
        "weight": y,
        "bias": None,
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
        "groups": 1,
    }
    assert bind(graph.call_function(aten.conv2d.padding, (x, y, None, [2, 2], "same")))["padding"] == "same"
    layer = graph.call_function(torch.ops.pqcad.linear, (x, y, y, y, None, 4, [3], torch.float32), {"addend": x})
    assert (bind(layer)["weight_bits"], bind(layer)["addend"]) == (4, x)


@pytest.mark.parametrize("target", [operator.add, torch.add, aten.add.Tensor, "add"])
def test_every_way_to_write_a_sum(graph, target):
    x, y = graph.nodes
    call = graph.call_method if isinstance(target, str) else graph.call_function
    assert bind(call(target, (x, y))) == {"input": x, "other": y, "alpha": 1}


@pytest.mark.parametrize("target", [torch.conv2d, F.conv2d, torch.conv1d, F.conv_transpose2d, F.group_norm, F.linear])
def test_functions_written_in_python_and_in_c(graph, target):
    x, y = graph.nodes
    found = bind(graph.call_function(target, (x,), {"num_groups" if target is F.group_norm else "weight": y}))
    assert found["input"] is x
    assert found["bias"] is None


def test_self_is_the_input_and_keywords_of_python_are_names(graph):
    x, _ = graph.nodes
    assert bind(graph.call_function(aten.silu.default, (), {"self": x})) == {"input": x}
    assert bind(graph.call_function(getattr(aten.random_, "from"), (x, 0, 3)))["from_"] == 0
    assert bind(graph.call_function(operator.truediv, (x, 2))) == {"input": x, "other": 2}


def test_what_has_no_names_is_an_error(graph):
    x, _ = graph.nodes
    for node in (graph.call_method("no_such_method", (x,)), graph.call_function(aten.conv2d.default, (x,)), x):
        with pytest.raises(TypeError, match="have no names that are known"):
            bind(node)
