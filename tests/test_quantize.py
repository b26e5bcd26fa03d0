"""``quantize_``: what it computes, that it leaves a network alone when it fails, and torchao's way in."""

import copy
import json
import warnings
from statistics import median

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    IPNDMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from networks import SHAPE, TINY_TEXT_UNET, Plain, Small, cosine_scheduler, quick, sqnr
from torch import nn
from torch.fx import Interpreter
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import quantize_ as torchao_quantize_

import pqcad_ao
from pqcad_ao import PQCADConfig, plan, quantize_
from pqcad_ao.denoiser import timestep_group
from pqcad_ao.diffusion.calibration import calibration_set
from pqcad_ao.diffusion.layer_inputs import LayerInputs
from pqcad_ao.graph.capture import capture
from pqcad_ao.graph.operators import quantizable
from pqcad_ao.graph.plan import resolve
from pqcad_ao.learn.ptq import fit_grids, prepare
from pqcad_ao.nn.conv2d import QuantizedConv2d
from pqcad_ao.nn.layers import QuantizedLayer
from pqcad_ao.nn.linear import QuantizedLinear
from pqcad_ao.nn.timestep import Timestep
from pqcad_ao.prepare.fold import fold
from pqcad_ao.prepare.observe import input_forms, take_inputs, weight_quantizers


def _quantize(model: nn.Module, config: PQCADConfig | None = None, **options) -> nn.Module:
    defaults = {"scheduler": cosine_scheduler(), "sample_shape": SHAPE, "progress": False}
    quantize_(model, config or quick(), **{**defaults, **options})
    return model


def _inputs(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """x_t and timesteps from trajectories that calibration did not walk."""
    points = calibration_set(model, cosine_scheduler(), SHAPE, quick(seed=99))
    return points.x_t, points.timesteps


def _snapshot(model: nn.Module) -> dict:
    """Everything about a network that a failing call must leave alone."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "kinds": {name: type(module) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "identity": {name: id(p) for name, p in model.named_parameters()},
        "attributes": {name: set(vars(module)) for name, module in model.named_modules()},
        "config": str(getattr(model, "config", None)),
        "hooks": {
            name: [len(hooks) for key, hooks in vars(module).items() if "hooks" in key and isinstance(hooks, dict)]
            for name, module in model.named_modules()
        },
    }


def _assert_untouched(model: nn.Module, before: dict) -> None:
    after = _snapshot(model)
    states = before.pop("state"), after.pop("state")
    assert before == after
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=0, equal_nan=True)


# What it computes


@pytest.fixture(scope="module")
def prepared(_tiny_unet_prototype):
    """The tiny UNet's calibrated graph, its folded layers, and the calibration points."""
    unet, config = copy.deepcopy(_tiny_unet_prototype), quick()
    captured = capture(unet, SHAPE, {})
    resolved = resolve(captured, unet, config)
    inputs = LayerInputs(input_forms(resolved))
    points = calibration_set(unet, cosine_scheduler(), SHAPE, config, inputs=inputs)
    graph = prepare(captured, resolved, config, 1000)
    take_inputs(graph, inputs.values, timestep_group(points.timesteps, config.timestep_groups, 1000))
    fit_grids(graph, resolved, progress=False)
    return graph, fold(graph, unet, resolved, Timestep(config.timestep_groups, 1000)), points


def test_folded_weights_are_the_fake_quantized_ones(prepared, tiny_unet):
    graph, layers, _ = prepared
    quantizers = weight_quantizers(graph)
    assert quantizers.keys() == layers.keys()
    assert len(layers) == 49
    for fqn, (module, weight) in quantizers.items():
        assert torch.equal(weight, tiny_unet.get_submodule(fqn).weight)
        assert torch.equal(layers[fqn].dequantized_weight(), module(weight))
        assert torch.equal(layers[fqn].weight_scale, module.scale)


def test_folded_layers_compute_what_the_prepared_graph_computes(prepared):
    """Each layer on the inputs that it has in the graph, so that no rounding elsewhere can blur the comparison."""
    graph, layers, points = prepared
    compared = []

    class Compare(Interpreter):
        def run_node(self, node):
            output = super().run_node(node)
            if quantizable(node) is None:
                return output
            fqn = str(node.args[1].args[0].target) if node.args[1].op == "call_module" else ""
            fqn = fqn.removeprefix("unet.").removesuffix(".weight")
            if fqn in layers:
                source = node.args[0]
                raw = source.args[0] if source.op == "call_module" else source  # before its fake quantizer
                layer = layers[fqn]
                layer.timestep.call.group = points.timesteps[:8] * layer.timestep.groups // 1000
                torch.testing.assert_close(layer(self.env[raw]), output, rtol=1e-4, atol=1e-5)
                compared.append(fqn)
            return output

    with torch.no_grad():
        Compare(graph, garbage_collect_values=False).run(*next(points.batches(8)))
    assert sorted(compared) == sorted(layers)


def test_the_network_computes_what_the_prepared_graph_computes(prepared, quantized_unet):
    """``quantized_unet`` was made by ``quantize_`` from the same weights and configuration."""
    graph, layers, points = prepared
    for fqn, layer in layers.items():
        other = quantized_unet.get_submodule(fqn)
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in layer.state_dict().items())
    # a value on the edge of two integers may fall to the other side, after which that image departs
    with torch.no_grad():
        pairs = [
            (graph(x_t, timesteps, conditioning), quantized_unet(x_t, timesteps).sample)
            for x_t, timesteps, conditioning in points.batches(8)
        ]
    assert median(sqnr(*images) for batch in pairs for images in zip(*batch, strict=True)) > 80
    assert all(sqnr(*batch) > 15 for batch in pairs)


def test_the_layers_are_what_the_plan_says(quantized_unet):
    for row in plan(quantized_unet).quantized:
        layer = quantized_unet.get_submodule(row.fqn)
        assert isinstance(layer, QuantizedConv2d if row.kind == "conv2d" else QuantizedLinear)
        assert (layer.weight_bits, layer.activation_bits) == (row.weight_bits, row.activation_bits)
        assert layer.segments == tuple(row.segments)
        integers = layer.weight_integers()
        assert integers.min() >= -(2 ** (row.weight_bits - 1))
        assert integers.max() <= 2 ** (row.weight_bits - 1) - 1
        assert integers.unique().numel() > 2
    quantized = {name for name, module in quantized_unet.named_modules() if isinstance(module, QuantizedLayer)}
    assert quantized == {row.fqn for row in plan(quantized_unet).quantized}
    assert isinstance(quantized_unet, UNet2DModel)


def test_more_bits_are_closer_to_full_precision():
    reference = Small()
    x, t = _inputs(reference)
    quality = []
    for bits in (2, 4, 6, 8):
        config = quick(weight_bits=bits, activation_bits=bits, calibration_points=64)
        model = _quantize(copy.deepcopy(reference), config)
        with torch.no_grad():
            quality.append(sqnr(reference(x, t), model(x, t)))
    assert quality == sorted(quality)
    assert quality[-1] > 25
    assert quality[-1] - quality[0] > 15


def test_weights_only_in_eight_bits_is_nearly_exact():
    reference = Small()
    x, t = _inputs(reference)
    model = _quantize(copy.deepcopy(reference), quick(weight_bits=8, activation_bits=None))
    with torch.no_grad():
        assert sqnr(reference(x, t), model(x, t)) > 40


def test_weights_alone_are_rounded_without_a_walk():
    def stages(config: PQCADConfig) -> set[str]:
        found = set()
        _quantize(Small(), config, callback=lambda stage, done, total: found.add(stage))
        return found

    assert "trajectories" in stages(quick())
    assert "trajectories" not in stages(quick(activation_bits=None))
    assert "trajectories" in stages(quick(activation_bits=None, target_bits=5))


def test_calibration_sees_full_precision_inputs_only():
    """A layer's grid does not depend on how coarsely the layers before it are quantized."""
    model = Small()
    coarse = _quantize(copy.deepcopy(model), quick(overrides={"first": {"weight_bits": 2, "activation_bits": 2}}))
    fine = _quantize(copy.deepcopy(model))
    assert torch.equal(coarse.down.input_scale, fine.down.input_scale)
    assert not torch.equal(coarse.first.input_scale, fine.first.input_scale)


def test_the_seed_decides_everything():
    first, again, other = (_quantize(Small(), quick(seed=seed)).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


def test_the_global_random_state_is_left_alone():
    model = Small()
    state = torch.get_rng_state()
    _quantize(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_training_flags_and_gradients_survive():
    model = Small().train()
    model.norm.eval()
    model.norm.bias.requires_grad_(False)
    _quantize(model)
    assert model.training
    assert model.down.training
    assert not model.norm.training
    assert [p.requires_grad for p in model.norm.parameters()] == [True, False]
    assert all(p.grad is None for p in model.parameters())


def test_dropout_is_off_while_calibrating():
    class Dropping(Small):
        def middle(self, h):
            return super().middle(nn.functional.dropout(h, 0.5, self.training))

    evaluated, training = _quantize(Dropping()), _quantize(Dropping().train())
    assert all(torch.equal(value, training.state_dict()[name]) for name, value in evaluated.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_network_of_another_type(dtype):
    reference = Small().to(dtype)
    x, t = _inputs(reference)
    config = quick(weight_bits=8, activation_bits=8, calibration_points=64)
    model = _quantize(copy.deepcopy(reference), config)
    with torch.no_grad():
        output = model(x, t)
        assert output.dtype == x.dtype == dtype
        assert sqnr(reference(x, t), output) > 25
    assert model.down.weight_scale.dtype == model.down.input_scale.dtype == model.down.bias.dtype == torch.float32


@pytest.mark.parametrize("mode", ["ptq", "progressive"])
def test_half_precision_that_overflows_is_named(mode):
    reference = Small().half()
    torch.nn.init.constant_(reference.first.weight, 6e4)
    before = copy.deepcopy(reference.state_dict())
    with pytest.raises(FloatingPointError, match="float16 ends at 65504, which the network's activations may exceed"):
        _quantize(reference, quick(mode=mode))
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())


def test_callback_and_progress(capsys):
    calls = []
    _quantize(Small(), callback=lambda *args: calls.append(args))
    assert capsys.readouterr().err == ""
    assert [args for args in calls if args[0] == "trajectories"][-1] == ("trajectories", 6, 6)
    assert {args[0] for args in calls} == {"trajectories", "fit"}
    assert [args for args in calls if args[0] == "fit"] == [("fit", k, 10) for k in range(1, 11)]


def test_filter_fn_keeps_layers():
    model = _quantize(Small(), filter_fn=lambda module, fqn: not fqn.startswith("to_"))
    assert type(model.to_q) is nn.Linear
    assert plan(model)["to_q"].reason == "refused by filter_fn"
    assert isinstance(model.down, QuantizedConv2d)


def test_overrides_reach_the_layers():
    config = quick(overrides={"join": {"weight_bits": 6, "activation_bits": None}, "attention": {"weight_bits": 8}})
    model = _quantize(Small(), config)
    x, t = torch.randn(3, *SHAPE), torch.tensor([1, 500, 900])
    assert (model.join.weight_bits, model.join.activation_bits) == (6, None)
    assert (model.to_q.weight_bits, model.to_q.activation_bits) == (8, 4)
    with torch.no_grad():
        assert model(x, t).isfinite().all()


# Conditional networks


def test_a_text_conditional_unet():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**TINY_TEXT_UNET).eval()
    text = torch.randn(5, 7, 12)
    x, t = torch.randn(4, *SHAPE), torch.tensor([0, 300, 600, 999])
    with torch.no_grad():
        expected = unet(x, t, text[:4]).sample
        quantize_(
            unet,
            quick(weight_bits=8, activation_bits=8, calibration_points=40),
            scheduler=cosine_scheduler(),
            conditioning={"encoder_hidden_states": text},
            progress=False,
        )
        output = unet(x, t, encoder_hidden_states=text[:4]).sample
        assert sqnr(expected, output) > 15
        # the text still matters, each sample has its own, and one by one is the same
        assert not torch.equal(unet(x, t, text[1:]).sample, output)
        alone = torch.cat([unet(x[i : i + 1], t[i], text[i : i + 1]).sample for i in range(4)])
        assert sqnr(output, alone) > 40
        # attention may be computed in slices afterwards, and is not fused
        unet.set_attention_slice("max")
        torch.testing.assert_close(unet(x, t, text[:4]).sample, output)
    with pytest.raises(ValueError, match=r"packed weights with grids of their own are not fused"):
        unet.fuse_qkv_projections()


class Labelled(Plain):
    def build(self):
        self.embedding = nn.Embedding(3, 8)
        self.mid = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x, t, class_labels, added=None):
        h = self.first(x) + self.time(t[:, None] / 1000)[:, :, None, None]
        h = h + self.embedding(class_labels)[:, :, None, None]
        return self.last(self.mid(h) + added["shift"][:, None, None, None])


def test_nested_conditioning_reaches_every_trajectory():
    """Rows are used in turn: with one far-off label the first layer behind the embedding must have seen it."""
    model = Labelled()
    with torch.no_grad():
        model.embedding.weight[2] = 50.0
    nested = {"class_labels": torch.tensor([0, 1, 2]), "added": {"shift": torch.tensor([0.0, 1.0, 2.0])}}
    _quantize(model, conditioning=nested)
    grid = model.mid.input_scale * (model.mid.input_low + 15)
    assert grid.max() > 20


def test_conditioning_of_unequal_lengths_is_an_error():
    model = Labelled()
    before = _snapshot(model)
    with pytest.raises(ValueError, match=r"tensors of \[2, 3\] rows"):
        _quantize(model, conditioning={"class_labels": torch.arange(3), "added": {"shift": torch.zeros(2)}})
    _assert_untouched(model, before)


# Failing calls


def _nan_weight(model):
    model.down.weight.data[0, 0, 0, 0] = float("nan")


def _nan_while_calibrating(model):
    model.time.weight.data.fill_(1e38)  # finite, and overflows on the way


FAILURES = {
    "NaN weight": ({}, _nan_weight, FloatingPointError, "down.weight holds NaN or infinity"),
    "NaN while calibrating": (
        {},
        _nan_while_calibrating,
        FloatingPointError,
        r"check the network's weights and that the scheduler is .*v_prediction",
    ),
    "override": (
        {"config": quick(overrides={"nowhere.*": {"weight_bits": 8}})},
        None,
        ValueError,
        r"overrides\['nowhere.\*'\] is no role",
    ),
    "no shape": ({"sample_shape": None}, None, ValueError, "pass sample_shape"),
    "another process": ({"scheduler": IPNDMScheduler()}, None, ValueError, "a IPNDMScheduler: allowed are"),
    "filter_fn": (
        {"filter_fn": lambda module, fqn: False},
        None,
        ValueError,
        r"quantizes no layer of Small:\n(.|\n)*refused by filter_fn",
    ),
    "too many steps": ({"config": quick(calibration_steps=1001)}, None, ValueError, "num_inference_steps"),
    "callback": (
        {"callback": lambda stage, done, total: 1 / (done - total)},
        None,
        ZeroDivisionError,
        "division by zero",
    ),
    "unknown argument": ({"conditioning": {"text": torch.zeros(2, 3)}}, None, ValueError, "Small takes no text"),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_a_failing_call_leaves_the_network_as_it_was(failure):
    options, damage, error, message = failure
    model = Small().train()
    model.norm.eval()
    if damage is not None:
        damage(model)
    before, generator = _snapshot(model), torch.get_rng_state()
    with pytest.raises(error, match=message):
        _quantize(model, **options)
    _assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), generator)
    if damage is None:  # and a sound call still goes through
        _quantize(model)


def test_a_failing_unet_stays_a_plain_diffusers_model(tiny_unet, tmp_path):
    before = _snapshot(tiny_unet)
    with pytest.raises(ValueError, match="is no role"):
        quantize_(tiny_unet, quick(overrides={"x": {"weight_bits": 8}}), scheduler=cosine_scheduler())
    _assert_untouched(tiny_unet, before)
    tiny_unet.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_an_error_while_attaching_comes_before_any_change(monkeypatch):
    def fail(*args):
        raise OSError("no")

    monkeypatch.setattr("pqcad_ao.quantize.attach", fail)
    model = Small()
    before = _snapshot(model)
    with pytest.raises(OSError, match="no"):
        _quantize(model)
    _assert_untouched(model, before)


def test_a_failing_call_moves_the_network_back(monkeypatch):
    moved = []
    model = Small()
    monkeypatch.setattr(model, "to", lambda where: moved.append(torch.device(where)))
    with pytest.raises(ValueError, match="is no role"):
        _quantize(model, quick(overrides={"x": {"weight_bits": 8}}), device="cpu:0")
    assert moved == [torch.device("cpu:0"), torch.device("cpu")]


def test_a_foreign_config_is_an_error():
    from torchao.quantization import Int8WeightOnlyConfig

    with pytest.raises(TypeError, match="config is a Int8WeightOnlyConfig: write PQCADConfig"):
        quantize_(Small(), Int8WeightOnlyConfig(), sample_shape=SHAPE)


def test_a_network_on_the_meta_device_is_an_error():
    with torch.device("meta"):
        model = Small()
    with pytest.raises(ValueError, match="is on the meta device"):
        _quantize(model)


def test_quantizing_twice_is_an_error(quantized_unet):
    before = {name: value.clone() for name, value in quantized_unet.state_dict().items()}
    with pytest.raises(ValueError, match="this UNet2DModel is quantized already"):
        quantize_(quantized_unet, quick(), scheduler=cosine_scheduler())
    assert all(torch.equal(value, before[name]) for name, value in quantized_unet.state_dict().items())


def test_a_network_that_torchao_quantized_is_an_error():
    from torchao.quantization import Int8WeightOnlyConfig

    model = Small()
    torchao_quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, fqn: fqn == "to_q")
    with pytest.raises(ValueError, match="quantized by something else"):
        _quantize(model)


# The scheduler


def test_without_a_scheduler_there_is_a_warning():
    model = Small()
    with pytest.warns(UserWarning, match=r"no scheduler was given .* Pass scheduler=") as record:
        quantize_(model, quick(), sample_shape=SHAPE, progress=False)
    assert record[0].filename == __file__


def test_the_scheduler_saved_beside_a_unet_is_used(tiny_dir):
    found, given = (UNet2DModel.from_pretrained(tiny_dir / "unet") for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        quantize_(found, quick(), progress=False)
    quantize_(given, quick(), scheduler=cosine_scheduler(), progress=False)
    assert all(torch.equal(value, given.state_dict()[name]) for name, value in found.state_dict().items())


def test_a_foreign_scheduler_saved_beside_a_unet_is_an_error(tiny_unet, tmp_path):
    tiny_unet.save_pretrained(tmp_path / "unet")
    IPNDMScheduler().save_pretrained(tmp_path / "scheduler")
    unet = UNet2DModel.from_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match=r"names the class IPNDMScheduler: allowed are"):
        quantize_(unet, quick(), progress=False)


def test_ddpm_is_walked_with_ddim():
    first, second = Small(), Small()
    options = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False}
    state = torch.get_rng_state()
    _quantize(first, scheduler=DDPMScheduler(**options, timestep_spacing="trailing"))
    assert torch.equal(torch.get_rng_state(), state)
    _quantize(second)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


# torchao


def test_torchaos_quantize_gives_the_same_network(tiny_dir):
    ours, theirs = (UNet2DModel.from_pretrained(tiny_dir / "unet") for _ in range(2))
    quantize_(ours, quick(), progress=False)
    torchao_quantize_(theirs, quick(), filter_fn=pqcad_ao.is_root)
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert plan(theirs) == plan(ours)


def test_a_bare_torchao_call_says_what_to_write():
    model = Small()
    before = _snapshot(model)
    with pytest.raises(ValueError, match=r"a single Linear: .* Write pqcad_ao.quantize_\(unet, config\)"):
        torchao_quantize_(model, quick())
    _assert_untouched(model, before)


def test_a_config_survives_torchaos_json():
    config = quick(weight_bits=3, activation_bits=None, overrides={"attention": {"weight_bits": 8}}, seed=7)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
