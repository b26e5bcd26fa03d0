"""Gradients pass through a quantized network: for guidance, and for adapters beside its layers."""

import pytest
import torch
from networks import SHAPE, Small, cosine_scheduler, quick
from torch import Tensor, nn

from pqcad_ao import quantize_
from pqcad_ao.nn.layers import QuantizedLayer
from pqcad_ao.nn.linear import QuantizedLinear
from pqcad_ao.nn.timestep import Timestep


def gradient(network, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """What a network predicts, and the gradient that x has of the sum of its squares."""
    x = x.clone().requires_grad_()
    output = network(x, t)
    (found,) = torch.autograd.grad(output.square().sum(), x)
    return output.detach(), found


def inputs(batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, *SHAPE, generator=generator), torch.arange(batch) * 200


def test_the_whole_network_passes_its_gradient_on():
    model = Small()
    x, t = inputs(5)
    _, expected = gradient(model, x, t)
    for activation_bits, least in ((8, 0.99), (4, 0.9)):
        quantized = Small()
        config = quick(weight_bits=8, activation_bits=activation_bits)
        quantize_(quantized, config, scheduler=cosine_scheduler(), sample_shape=SHAPE, progress=False)
        output, found = gradient(quantized, x, t)
        with torch.no_grad():
            assert torch.equal(output, quantized(x, t))  # the numbers are those without a gradient, to the bit
        cosine = torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), 0)
        assert cosine > least


def test_a_gradient_is_that_of_the_weights_within_the_grid(small):
    """Of one layer, against a convolution and autograd by hand."""
    layer = next(m for m in small.modules() if isinstance(m, QuantizedLayer) and m.kind == "conv2d" and m.groups == 1)
    x = torch.linspace(-30, 30, 2 * layer.in_channels * 36).view(2, layer.in_channels, 6, 6).requires_grad_()
    group = torch.tensor([0, 3])
    layer.timestep.call.group = group
    try:
        (found,) = torch.autograd.grad(layer(x).square().sum() / 2, x)
        with torch.no_grad():
            output = layer(x)
    finally:
        layer.timestep.call.group = None
    low, scale = layer.input_low[group], layer.input_scale[group]
    above = [  # the grid's lowest integer, by so many steps
        part / step.view(-1, 1, 1, 1) - start.view(-1, 1, 1, 1)
        for part, step, start in zip(x.split(layer.segments, 1), scale.unbind(1), low.unbind(1), strict=True)
    ]
    steps = torch.cat(above, 1)
    inside = (steps >= 0) & (steps <= 2**layer.activation_bits - 1)
    back = torch.nn.grad.conv2d_input(
        x.shape, layer.packed_weight(), output, layer.stride, layer.padding, layer.dilation, layer.groups
    )
    torch.testing.assert_close(found, torch.where(inside, back, 0))
    assert inside.any()
    assert not inside.all()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_gradients_are_the_eager_ones(small, backend):
    x, t = inputs(3)
    output, expected = gradient(small, x, t)
    torch._dynamo.reset()
    compiled_output, found = gradient(torch.compile(small, backend=backend, fullgraph=True), x, t)
    torch.testing.assert_close(compiled_output, output)
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_the_backend_keeps_gradients_and_says_what_they_cost(small):
    x, t = inputs(3)
    _, expected = gradient(small, x, t)
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match=r"gradients are recorded, and backend 'pqcad' fuses nothing"):
        _, found = gradient(torch.compile(small, backend="pqcad"), x, t)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_stands_beside_a_quantized_layer_learns(small):
    """As an adapter does: a layer whose output is added to that of a quantized one, and one in front of it."""
    first = next(module for module in small.modules() if isinstance(module, QuantizedLayer))
    before = nn.Conv2d(SHAPE[0], SHAPE[0], 1)
    x, t = inputs(4)
    small(before(x), t).square().sum().backward()
    assert first.activation_bits
    assert before.weight.grad.abs().sum() > 0


def test_a_layer_of_unquantized_activations_passes_gradients_on():
    """Whose operator on packed weights, which has no gradient, stands in where none is recorded."""
    generator = torch.Generator().manual_seed(0)
    layer = QuantizedLinear(6, 5, True, 4, None, [6], Timestep(1, 1000))
    layer.set_weight(torch.randint(-8, 8, (5, 6), generator=generator), torch.rand(5) + 0.1, torch.randn(5))
    x = torch.randn(3, 6, generator=generator, requires_grad=True)
    output = layer(x)
    output.sum().backward()
    torch.testing.assert_close(x.grad, layer.packed_weight().sum(0).expand(3, -1))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), output)


def test_exported_programs_hold_no_gradient(small):
    program = torch.export.export(small, inputs(2))
    assert not [node for node in program.graph.nodes if "detach" in str(node.target)]
