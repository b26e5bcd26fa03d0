"""Which layers suffer most from quantization, and what a budget of bits buys."""

import pytest
import torch
from networks import SHAPE, Small, cosine_scheduler, quick

from pqcad_ao import plan, quantize_
from pqcad_ao.diffusion.calibration import calibration_set
from pqcad_ao.graph.capture import capture
from pqcad_ao.graph.plan import resolve
from pqcad_ao.learn.sensitivity import perturbation_loss, sensitive, spend_bits


@pytest.fixture(scope="module")
def measured():
    model, config = Small(), quick(target_bits=8)
    captured = capture(model, SHAPE, {})
    resolved = resolve(captured, model, config)
    points = calibration_set(model, cosine_scheduler(), SHAPE, config)
    return resolved, sensitive(captured, resolved, points, config, 1000)


def test_perturbation_loss_is_relative_power():
    reference = torch.randn(4, 1, 8, 8)
    assert perturbation_loss(reference, reference) == 0
    assert perturbation_loss(torch.zeros_like(reference), reference) == pytest.approx(1.0)
    assert perturbation_loss(3 * 1.1 * reference, 3 * reference) == pytest.approx(0.01, rel=1e-4)


def test_a_layer_that_alone_matters_is_the_most_sensitive():
    model = Small()
    with torch.no_grad():
        model.shortcut.weight.mul_(20)  # drowns its branch
    quantize_(model, quick(target_bits=4.2), scheduler=cosine_scheduler(), sample_shape=SHAPE, progress=False)
    rows = {row.fqn: row.sensitivity for row in plan(model).quantized if row.weight_bits < 8 or row.fqn == "shortcut"}
    assert max(rows, key=rows.get) == "shortcut"
    assert "sensitivity" in str(plan(model))


def test_sensitivity_is_measured_for_every_quantized_layer(measured):
    before, after = measured
    assert [row.fqn for row in after] == [row.fqn for row in before]
    assert all((row.sensitivity is not None) == row.quantized for row in after)
    assert all(row.sensitivity > 0 for row in after.quantized if row.fqn != "time")
    assert after["time"].sensitivity == 0, "one weight for each channel, and its input in floating point: exact"


def test_a_large_budget_raises_every_layer_that_gains(measured):
    before, after = measured
    for row in after.quantized:
        if row.weight_bits != before[row.fqn].weight_bits:
            assert "raised from W4A4" in row.reason
            assert row.activation_bits is None or row.activation_bits >= row.weight_bits
    assert after.average_bits > 7


LOSSES = {
    "first": {8: 0.01},
    "time": {4: 0.001, 6: 0.001, 8: 0.001},
    "down": {4: 0.10, 6: 0.02, 8: 0.01},
    "to_q": {4: 0.001, 6: 0.0005, 8: 0.0004},
    "to_k": {4: 0.001, 6: 0.0005, 8: 0.0004},
    "to_v": {4: 0.001, 6: 0.0005, 8: 0.0004},
    "to_out": {4: 0.001, 6: 0.0005, 8: 0.0004},
    "up": {4: 0.002, 6: 0.001, 8: 0.001},
    "join": {4: 0.002, 6: 0.001, 8: 0.001},
    "shortcut": {4: 0.2, 6: 0.1, 8: 0.0},
    "last": {8: 0.01},
}


def resolved(**options):
    model = Small()
    return resolve(capture(model, SHAPE, {}), model, quick(**options))


def test_bits_go_where_a_stored_bit_buys_most():
    start = resolved()
    weights = sum(row.parameters for row in start.quantized)
    shortcut, down = start["shortcut"].parameters, start["down"].parameters
    enough = start.average_bits + (4 * shortcut + 2 * down) / weights
    spent = spend_bits(start, LOSSES, enough + 1e-9)
    assert (spent["shortcut"].weight_bits, spent["shortcut"].activation_bits) == (8, 8)
    assert spent["down"].weight_bits == 6
    assert spent.average_bits <= enough + 1e-9
    assert spent["time"].weight_bits == 4, "nothing is given where nothing is gained"
    assert start["shortcut"].weight_bits == 4, "the plan that went in is as it was"


def test_a_budget_is_never_exceeded():
    start = resolved()
    for target in (start.average_bits, 4.2, 4.5, 5.0, 6.0, 8.0):
        assert start.average_bits <= spend_bits(start, LOSSES, target).average_bits <= target


def test_what_the_user_asked_for_is_kept():
    spent = spend_bits(resolved(overrides={"shortcut": {"weight_bits": 4}}), LOSSES, 8)
    assert spent["shortcut"].weight_bits == 4


def test_a_budget_below_the_plan_is_an_error():
    with pytest.raises(ValueError, match=r"target_bits=4: the plan takes 4\.\d+ bits on average already"):
        spend_bits(resolved(), LOSSES, 4)


def test_a_plan_says_what_may_yet_be_spent():
    planned = plan(Small(), quick(target_bits=5), sample_shape=SHAPE)
    assert planned.average_bits < 5
    assert "the layers measured most sensitive get more, up to 5 on average" in str(planned)
    assert "measured most sensitive" not in str(plan(Small(), quick(), sample_shape=SHAPE))
    with pytest.raises(ValueError, match=r"target_bits=2: the plan takes 4\.\d+ bits on average already"):
        plan(Small(), quick(target_bits=2), sample_shape=SHAPE)
