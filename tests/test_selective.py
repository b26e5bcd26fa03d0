"""Selective finetuning: which layers learn, local losses, and time projections in closed form."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import SHAPE, Plain, Small, cosine_scheduler
from test_progressive import TINY, config, learned, prepared, quantize, same_weights
from torch import nn

from pqcad_ao import CADConfig, PQCADConfig, distill_, plan
from pqcad_ao.diffusion import trajectories
from pqcad_ao.graph.capture import capture
from pqcad_ao.graph.plan import PlanRow, resolve
from pqcad_ao.learn import progressive as engine
from pqcad_ao.learn import sensitivity, time_projections, training
from pqcad_ao.learn.selective import choose, local_loss, norms_before
from pqcad_ao.learn.time_projections import fit_time_projections, rounded
from pqcad_ao.nn.state import quantized_state
from pqcad_ao.passes.expose import expose, inputs_alone
from pqcad_ao.prepare.fake_quant import quantize as on_grid
from pqcad_ao.prepare.observe import fit_weights, weight_quantizers

SHORT = {"iterations": 12, "window": 1, "weight_ladder": [], "activation_ladder": []}


def rows(sensitivities: list[float]) -> list[PlanRow]:
    """Layers of one parameter, and of two in every third."""
    roles = ("body", "attention", "time_projection")
    return [
        PlanRow(f"block.{i}", "linear", roles[i % 3], [1], 1 + i % 3 // 2, 4, 4, [1], "", value)
        for i, value in enumerate(sensitivities)
    ]


# Which layers


@settings(max_examples=40)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=40),
    st.floats(0.01, 1),
    st.floats(0.01, 1),
)
def test_sensitive_layers_are_as_many_as_the_share_says_and_more_with_a_larger_one(values, one, other):
    smaller, larger = sorted((one, other))
    few, many = (set(choose(["sensitive"], rows(values), share)) for share in (smaller, larger))
    assert few <= many
    assert smaller * len(values) - 1e-6 <= len(few) < smaller * len(values) + 1
    worth = {row.fqn: row.sensitivity / row.parameters for row in rows(values)}
    assert all(worth[inside] >= worth[outside] for inside in few for outside in worth.keys() - few)
    assert choose(["sensitive"], rows(values), smaller) == choose(["sensitive"], rows(values), smaller)


def test_a_layer_is_as_sensitive_as_each_of_its_parameters():
    assert list(choose(["sensitive"], rows([0.5, 0.1, 0.9]), 0.3)) == ["block.0"]  # 0.9 is of twice as many


def test_words_roles_and_globs_are_united_in_the_plans_order():
    chosen = choose(["block.1*", "time", "sensitive"], rows([0.1, 0.9, 0.2, 0.3]), 0.25)
    assert chosen == {"block.1": "block.1*, sensitive", "block.2": "time"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attenton"], "'attenton' names no quantized layer; allowed are 'time', 'sensitive', 'norms', the roles"),
        (["time", "stem"], "'stem' names no quantized layer"),
        (["norms"], "chooses no layer"),
    ],
)
def test_words_that_choose_nothing_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        choose(words, rows([0.1, 0.2, 0.3]), 0.1)


@pytest.mark.slow
def test_a_network_without_what_is_named_is_refused_before_the_work(monkeypatch):
    monkeypatch.setattr("pqcad_ao.quantize.calibration_set", lambda *args, **options: pytest.fail("the work began"))
    with pytest.raises(ValueError, match="'attention' names no quantized layer"):
        quantize(Plain(), config(trainable=["attention"]))
    with pytest.raises(ValueError, match="time_rounding=True finds no quantized linear"):
        quantize(Small(), config(mode="fixed", trainable=["attention"], time_rounding=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainable": []}, "trainable"),
        ({"trainable": "time"}, "trainable"),
        ({"trainable": [3]}, "trainable"),
        ({"sensitive_share": 0}, "sensitive_share"),
        ({"sensitive_share": 1.1}, "sensitive_share"),
        ({"local_weight": -1}, "local_weight"),
        ({"global_weight": 0}, "leave nothing to learn from"),
        ({"time_rounding": True}, "time_rounding=True with mode='progressive'"),
        ({"mode": "ptq", "trainable": ["time"], "local_weight": 1.0}, "trainable and local_weight: mode='ptq' learns"),
    ],
)
def test_bad_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        PQCADConfig(**options)


@pytest.mark.slow
def test_norms_are_those_right_before_a_layer():
    graph = capture(Small(), SHAPE, {}).graph
    assert norms_before(graph, ["join"]) == {"unet.norm.weight", "unet.norm.bias"}
    assert norms_before(graph, ["shortcut", "last", "to_q"]) == set()


# What is shown of a graph


def test_an_exposed_graph_predicts_the_same_bits_and_shows_the_layers_own_outputs():
    model, seen = Small(), {}
    graph, x_t, timesteps = capture(model, SHAPE, {}).graph, torch.randn(3, *SHAPE), torch.tensor([9, 500, 999])
    for name in ("join", "to_q"):
        model.get_submodule(name).register_forward_hook(lambda _, args, y, name=name: seen.update({name: (*args, y)}))
    prediction, outputs = expose(graph, ["join", "to_q"])(x_t, timesteps, {})
    assert torch.equal(prediction, model(x_t, timesteps))
    assert all(torch.equal(y, seen[name][-1]) for y, name in zip(outputs, ("join", "to_q"), strict=True))
    (given_to_join,) = inputs_alone(graph, ["join"])(x_t, timesteps, {})
    assert torch.equal(given_to_join, seen["join"][0])
    assert len(inputs_alone(graph, ["time"]).graph.nodes) < 10
    with pytest.raises(ValueError, match="no layer nowhere"):
        expose(graph, ["nowhere"])


@settings(max_examples=25)
@given(st.integers(0, 2**16), st.floats(0.25, 4.0), st.floats(0.0, 1.0))
def test_the_local_loss_is_zero_for_equal_outputs_alone_and_knows_no_unit(seed, factor, error):
    generator = torch.Generator().manual_seed(seed)
    references = [torch.randn(2, 3, 4, generator=generator), torch.randn(2, 5, generator=generator)]
    outputs = [references[0] + error * torch.randn(2, 3, 4, generator=generator), references[1].clone()]
    loss = local_loss(outputs, references)
    assert (loss == 0) == all(torch.equal(y, r) for y, r in zip(outputs, references, strict=True))
    scaled = local_loss([factor * outputs[0], outputs[1]], [factor * references[0], references[1]])
    torch.testing.assert_close(scaled, loss, rtol=1e-4, atol=1e-9)


def test_a_silent_layer_divides_nothing_by_zero():
    silent = torch.zeros(2, 3)
    assert local_loss([silent], [silent]) == 0
    assert local_loss([silent + 1], [silent]) == 1


# Time projections


@settings(max_examples=25)
@given(st.integers(0, 2**16), st.integers(1, 12), st.integers(2, 4))
def test_no_row_is_rounded_worse_than_to_the_nearest(seed, inputs, bits):
    generator = torch.Generator().manual_seed(seed)
    s = torch.randn(20, 3, generator=generator).double() @ torch.randn(3, inputs, generator=generator).double()
    W, scale = torch.randn(5, inputs, generator=generator).double(), torch.full((5, 1), 0.3).double()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    H = (s - s.mean(0)).T @ (s - s.mean(0)) / len(s)
    found = rounded(W, scale, H, low, high)

    def lost(integers):
        delta = W - integers * scale
        return ((delta @ H) * delta).sum(1)

    assert (lost(found) <= lost(on_grid(W, scale, low, high))).all()
    assert torch.equal(found, found.round().clamp(low, high))


class Grid(nn.Module):
    """Rounds a weight with a step for each row, as a weight's quantizer does."""

    def __init__(self, scale: torch.Tensor) -> None:
        super().__init__()
        self.scale, self.quant_min, self.quant_max = scale, -4, 3

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return on_grid(weight, self.scale[:, None], self.quant_min, self.quant_max) * self.scale[:, None]

    def whole(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    kept = whole


@settings(max_examples=15)
@given(st.integers(0, 2**16), st.integers(1, 8), st.integers(1, 5))
def test_the_bias_takes_all_of_the_mean_error(seed, inputs, outputs):
    """Of a projection's whole fit, with its inputs and its grid given by hand."""
    generator = torch.Generator().manual_seed(seed)
    layer, s = nn.Linear(inputs, outputs).double(), torch.randn(9, inputs, generator=generator).double() + 0.5
    layer.weight.data = torch.randn(outputs, inputs, generator=generator).double()
    graph, before = nn.ModuleDict({"unet": nn.ModuleDict({"time": layer})}), copy.deepcopy(layer)
    grid = Grid(0.1 + torch.rand(outputs, generator=generator))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time_projections, "_inputs", lambda *_: [s])
        patch.setattr(time_projections, "weight_quantizers", lambda _: {"time": (grid, layer.weight)})
        fit_time_projections(graph, ["time"], None, 4)
    assert torch.equal(layer.weight, grid(layer.weight))
    assert (layer(s) - before(s)).mean(0).abs().max() < 1e-9


@pytest.mark.slow
def test_the_mean_error_over_timesteps_becomes_zero(tiny_unet):
    chosen = config(mode="fixed", learning_points=24)
    graph, resolved, points = prepared(tiny_unet, chosen)
    names = [row.fqn for row in resolved.quantized if row.role == "time_projection"]
    layers, before = weight_quantizers(graph), copy.deepcopy(graph)
    fit_weights(graph, {row.fqn: row.weight_bits for row in resolved.quantized})
    nearest = {name: layers[name][0](layers[name][1]).detach().double() for name in names}
    fit_time_projections(graph, names, points, 8)
    timesteps = points.timesteps.unique()
    given = inputs_alone(before, names)(points.x_t[: len(timesteps)], timesteps, {})
    for name, s in zip(names, given, strict=True):
        module, weight = layers[name]
        W, bias = (before.get_parameter(f"unet.{name}.{side}").double() for side in ("weight", "bias"))
        learned_bias = graph.get_parameter(f"unet.{name}.bias").double()
        s, Q = s.double(), module(weight).detach().double()
        error = s @ (Q - W).T + learned_bias - bias
        assert error.mean(0).abs().max() < 1e-6 * (s @ W.T).abs().max()
        plain = s @ (nearest[name] - W).T
        assert (error.square().mean(0) <= (plain - plain.mean(0)).square().mean(0) + 1e-12).all()


# Learning


@pytest.fixture(scope="module")
def everything():
    return learned(Small(), config(**SHORT))[0]


def test_naming_every_layer_is_naming_none(everything):
    named = learned(Small(), config(**SHORT, trainable=["*", "norms"]))[0]
    assert named.log == everything.log
    assert all(torch.equal(v, named.graph.state_dict()[name]) for name, v in everything.graph.state_dict().items())


@pytest.mark.slow
def test_what_is_not_chosen_stays_as_it_was_and_is_no_part_of_adam(everything):
    model = Small()
    chosen = config(**SHORT, trainable=["time", "join", "norms"], local_weight=1.0)
    result, _, _ = learned(model, chosen)
    assert result.trained == {"time": "time", "join": "join"}
    before = dict(model.named_parameters())
    for name, parameter in result.graph.named_parameters():
        if name.startswith("unet."):
            fqn = name.removeprefix("unet.")
            learns = fqn.split(".")[0] in ("time", "join", "norm")
            assert torch.equal(parameter, before[fqn]) != learns, fqn
    trained = sum(
        before[f"{layer}.{side}"].numel() for layer in ("time", "join", "norm") for side in ("weight", "bias")
    )
    assert result.facts["trained_parameters"] == trained
    assert result.facts["adam_bytes"] < everything.facts["adam_bytes"]
    assert all(update.local > 0 for update in result.log)
    alone = learned(model, config(**SHORT, trainable=["time", "join", "norms"]))[0]
    assert not torch.equal(alone.graph.state_dict()["unet.join.weight"], result.graph.state_dict()["unet.join.weight"])


@pytest.mark.slow
def test_the_plan_says_who_learned(tiny_unet):
    tuned = quantize(copy.deepcopy(tiny_unet), PQCADConfig.quest(**{**TINY, **SHORT}))
    reasons = [row.reason for row in plan(tuned).quantized]
    assert any("; trained: time" in reason for reason in reasons)
    assert any("; trained: attention" in reason for reason in reasons)
    assert any("sensitive" in reason for reason in reasons)
    facts = quantized_state(tuned).facts
    assert 0 < facts["trained_parameters"] < sum(p.numel() for p in tiny_unet.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fixed", "progressive"])
def test_a_killed_run_goes_on_with_the_layers_it_chose(tmp_path, monkeypatch, mode):
    """Another number of threads changes a sensitivity's last bits, and with them, here, who is sensitive."""
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 3)
    chosen = config(**{**SHORT, "iterations": 14}, mode=mode, trainable=["sensitive"], local_weight=0.5)
    chosen.sensitive_share = 0.3
    whole = quantize(Small(), chosen)
    original, layer_sensitivity = engine._Run.update, sensitivity.layer_sensitivity

    def update(self):
        if len(self.log) == 7:
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(engine._Run, "update", update)
        with pytest.raises(KeyboardInterrupt):
            quantize(Small(), chosen, folder=tmp_path)

    def turned(*args, **options):
        found = layer_sensitivity(*args, **options)
        return {fqn: {bits: 1 / (1 + loss) for bits, loss in losses.items()} for fqn, losses in found.items()}

    monkeypatch.setattr(sensitivity, "layer_sensitivity", turned)
    again = quantize(Small(), chosen, folder=tmp_path)
    assert same_weights(again, whole)
    trained = [[row.fqn for row in plan(model).quantized if "trained" in row.reason] for model in (again, whole)]
    assert trained[0] == trained[1] != []
    assert quantized_state(again).log == quantized_state(whole).log


@pytest.mark.slow
def test_a_part_of_a_student_is_distilled(tiny_unet, quantized_unet, monkeypatch):
    monkeypatch.setattr(trajectories, "FARTHEST", float("inf"))  # random weights denoise nothing
    cad = CADConfig(steps=4, iterations=4, batch_size=4, points=4, trainable=["up_blocks.*"])
    before = copy.deepcopy(quantized_unet.state_dict())
    distill_(quantized_unet, tiny_unet, cosine_scheduler(), cad, progress=False)
    changed = {name for name, value in quantized_unet.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("up_blocks.") or "input_" in name for name in changed)
    with pytest.raises(ValueError, match="no sensitivity was measured"):
        distill_(quantized_unet, tiny_unet, cosine_scheduler(), replace(cad, trainable=["sensitive"]), progress=False)
    plain = copy.deepcopy(tiny_unet)
    distill_(plain, tiny_unet, cosine_scheduler(), replace(cad, trainable=["attention"]), progress=False)
    moved = [
        n for (n, p), q in zip(plain.named_parameters(), tiny_unet.parameters(), strict=True) if not torch.equal(p, q)
    ]
    assert moved
    roles = {row.fqn: row.role for row in resolve(capture(tiny_unet, SHAPE, {}), tiny_unet, PQCADConfig())}
    assert {roles[name.rpartition(".")[0]] for name in moved} == {"attention"}
