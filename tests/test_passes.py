"""Graph passes: a graph goes in, a graph comes out, and what it computes is what the pass says."""

import pytest
import torch
from networks import SHAPE, Small, quick

from pqcad_ao.graph.capture import capture
from pqcad_ao.graph.plan import Plan, resolve
from pqcad_ao.nn.timestep import timestep_group
from pqcad_ao.passes.insert_activations import insert_activations
from pqcad_ao.prepare.annotate import PQCADQuantizer, insert_fake_quantizers
from pqcad_ao.prepare.fake_quant import ActivationFakeQuantize, WeightFakeQuantize
from pqcad_ao.prepare.observe import fit_weights


@pytest.fixture(params=["alone", "after the weights"])
def inserted(request):
    """A plain module, and its graph with activation fake quantizers; the weights' are there first, or not at all."""
    model = Small()
    captured = capture(model, SHAPE, {})
    resolved, graph = resolve(captured, model, quick()), captured.graph
    if request.param == "after the weights":
        graph = insert_fake_quantizers(graph, PQCADQuantizer(resolved, "weights"))
    graph = insert_activations(graph, PQCADQuantizer(resolved, "activations", groups=4), 1000)
    for module in _fake_quantizers(graph, WeightFakeQuantize):
        module.disable_fake_quant()
    return model, graph


def _fake_quantizers(graph, kind) -> list:
    return [module for module in graph.modules() if isinstance(module, kind)]


def test_each_activation_gets_its_timestep_group(inserted, request):
    _, graph = inserted
    modules = dict(graph.named_modules())
    (group,) = (node for node in graph.graph.nodes if node.target is timestep_group)
    assert group.args[0].op == "placeholder"
    assert group.args[1:] == (4, 1000)
    activations = [
        node
        for node in graph.graph.nodes
        if node.op == "call_module" and isinstance(modules[node.target], ActivationFakeQuantize)
    ]
    assert len(activations) == 10
    assert all(node.args[1] is group for node in activations)
    weights = [
        node
        for node in graph.graph.nodes
        if node.op == "call_module" and isinstance(modules[node.target], WeightFakeQuantize)
    ]
    assert len(weights) == (11 if request.node.callspec.params["inserted"] == "after the weights" else 0)
    assert all(len(node.args) == 1 for node in weights)


def test_the_inputs_stay_together_and_in_order(inserted):
    _, graph = inserted
    nodes = list(graph.graph.nodes)
    places = [place for place, node in enumerate(nodes) if node.op == "placeholder"]
    assert places == list(range(places[0], places[0] + len(places)))
    assert [tuple(nodes[place].meta["val"].shape[1:]) for place in places] == [SHAPE, ()]
    graph.graph.lint()


@torch.no_grad()
def test_nothing_changes_while_quantization_is_off(inserted):
    model, graph = inserted
    for module in _fake_quantizers(graph, (ActivationFakeQuantize, WeightFakeQuantize)):
        module.disable_fake_quant()
        module.disable_observer()
    x, t = torch.randn(5, *SHAPE), torch.tensor([0, 250, 500, 750, 999])
    assert torch.equal(graph(x, t, {}), model(x, t))


@torch.no_grad()
def test_each_sample_is_quantized_on_its_own_timesteps_grid(inserted):
    _, graph = inserted
    for module in _fake_quantizers(graph, ActivationFakeQuantize):
        module.disable_observer()
        module.scale.data = torch.tensor([0.01, 0.1, 1.0, 10.0])[:, None].expand(-1, len(module.segments)).clone()
    x = torch.randn(1, *SHAPE).expand(4, -1, -1, -1)
    t = torch.tensor([0, 250, 500, 999])
    mixed = graph(x, t, {})
    for row in range(4):
        torch.testing.assert_close(graph(x[:1], t[row : row + 1], {})[0], mixed[row], rtol=1e-4, atol=1e-5)
    assert len({tuple(image.flatten().tolist()) for image in mixed}) == 4


def test_weights_that_are_quantized_stay_quantized():
    """Stage two's graph is stage one's with the activations' fake quantizers added."""
    model = Small()
    captured = capture(model, SHAPE, {})
    resolved = resolve(captured, model, quick())
    graph = insert_fake_quantizers(captured.graph, PQCADQuantizer(resolved, "weights"))
    fit_weights(graph, {row.fqn: row.weight_bits for row in resolved.quantized})
    x, t = torch.randn(5, *SHAPE), torch.tensor([0, 250, 500, 750, 999])
    before = graph(x, t, {})
    assert not torch.equal(before, model(x, t))
    graph = insert_activations(graph, PQCADQuantizer(resolved, "activations", groups=4), 1000)
    for module in _fake_quantizers(graph, ActivationFakeQuantize):
        module.disable_fake_quant()
    assert torch.equal(graph(x, t, {}), before)


def test_a_side_that_is_none_is_named():
    with pytest.raises(ValueError, match="side='both': allowed are 'weights', 'activations'"):
        PQCADQuantizer(Plan(), "both")


def test_the_quantizer_annotates_exactly_the_plan():
    model = Small()
    captured = capture(model, SHAPE, {})
    resolved = resolve(captured, model, quick(overrides={"time": {"weight_bits": None}}))
    quantizer = PQCADQuantizer(resolved, "weights")
    annotated = {
        node.args[1].target.removesuffix(".weight").removeprefix("unet.")
        for node in quantizer.annotate(captured.graph).graph.nodes
        if "quantization_annotation" in node.meta
    }
    assert annotated == {row.fqn for row in resolved.quantized} == set(quantizer.rows)
    assert "time" not in annotated
    quantizer.validate(captured.graph)
    del next(node for node in captured.graph.graph.nodes if "quantization_annotation" in node.meta).meta[
        "quantization_annotation"
    ]
    with pytest.raises(ValueError, match="layers that the graph does not have: first"):
        quantizer.validate(captured.graph)
