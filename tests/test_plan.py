"""The plan: every convolution and linear of a network stands in it, with role, bits and a reason that is true."""

import copy
import json
from collections import Counter

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from networks import SHAPE, TINY_TEXT_UNET, Plain, Small, cosine_scheduler, quick
from torch import nn
from torch.nn import functional as F

from pqcad_ao import PQCADConfig, plan, quantize_
from pqcad_ao.config import ROLES
from pqcad_ao.denoiser import check_conditioning
from pqcad_ao.graph.capture import capture
from pqcad_ao.graph.plan import Plan, resolve
from pqcad_ao.models import load_model


@pytest.fixture(scope="module")
def tiny(_tiny_unet_prototype):
    """The tiny UNet and its capture, which resolving a plan does not change."""
    unet = copy.deepcopy(_tiny_unet_prototype)
    return capture(unet, SHAPE, {}), unet


def _resolve(tiny, filter_fn=None, **options) -> Plan:
    return resolve(*tiny, PQCADConfig(**options), filter_fn)


def _weights(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that a plan must name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))}


def _check_complete(rows: Plan, model: nn.Module) -> None:
    named = [row.fqn for row in rows if row.parameters]
    assert set(named) == set(_weights(model))
    for row in rows:
        assert row.role in ROLES
        assert row.reason
        if row.parameters:
            assert row.shape == list(model.get_submodule(row.fqn).weight.shape)
            assert row.parameters == model.get_submodule(row.fqn).weight.numel()
        if row.quantized:
            assert len(row.segments) >= 1


# UNet2DModel


def test_roles_of_a_unet(tiny):
    rows = _resolve(tiny)
    _check_complete(rows, tiny[1])
    expected = {
        "conv_in": "stem",
        "conv_out": "head",
        "time_embedding.linear_1": "time_embedding",
        "time_embedding.linear_2": "time_embedding",
        "down_blocks.0.resnets.0.time_emb_proj": "time_projection",
        "mid_block.resnets.1.time_emb_proj": "time_projection",
        "down_blocks.1.attentions.0.to_q": "attention",
        "down_blocks.1.attentions.0.to_v": "attention",
        "mid_block.attentions.0.to_out.0": "attention",
        "mid_block.attentions.0.scaled_dot_product_attention": "attention",
        "down_blocks.0.downsamplers.0.conv": "resample",
        "up_blocks.0.upsamplers.0.conv": "resample",
        "down_blocks.1.resnets.0.conv_shortcut": "shortcut",
        "up_blocks.0.resnets.0.conv_shortcut": "shortcut",
        "up_blocks.0.resnets.0.conv1": "skip_concat",
        "up_blocks.1.resnets.1.conv1": "skip_concat",
        "down_blocks.0.resnets.0.conv1": "body",
        "up_blocks.0.resnets.0.conv2": "body",
    }
    assert {fqn: rows[fqn].role for fqn in expected} == expected


def test_skip_concatenations_are_split_where_the_tensors_meet(tiny):
    split = {row.fqn: row.segments for row in _resolve(tiny) if len(row.segments) > 1}
    assert split == {
        f"up_blocks.{block}.resnets.{resnet}.{layer}": segments
        for (block, resnet), segments in {
            (0, 0): [16, 16],
            (0, 1): [16, 8],
            (1, 0): [16, 8],
            (1, 1): [8, 8],
        }.items()
        for layer in ("conv1", "conv_shortcut")
    }


def test_default_bits(tiny):
    for row in _resolve(tiny):
        expected = {
            "stem": (8, 8),
            "head": (8, 8),
            "time_embedding": (None, None),
            "time_projection": (4, None),
        }.get(row.role, (4, 6))
        assert (row.weight_bits, row.activation_bits) == (expected if row.parameters else (None, None)), row.fqn


def test_weights_only(tiny):
    rows = _resolve(tiny, weight_bits=3, activation_bits=None)
    assert {row.activation_bits for row in rows} == {None}
    assert rows["conv_in"].weight_bits == 8
    assert rows["up_blocks.0.resnets.0.conv1"].weight_bits == 3
    assert all(len(row.segments) <= 1 for row in rows)  # with no activation scale there is nothing to split


def test_an_override_by_role(tiny):
    rows = _resolve(tiny, overrides={"attention": {"weight_bits": 8}, "shortcut": {"activation_bits": None}})
    assert (rows["mid_block.attentions.0.to_q"].weight_bits, rows["mid_block.attentions.0.to_q"].activation_bits) == (
        8,
        6,
    )
    assert rows["mid_block.attentions.0.to_q"].reason == "overrides['attention']"
    shortcut = rows["up_blocks.0.resnets.0.conv_shortcut"]
    assert (shortcut.weight_bits, shortcut.activation_bits, shortcut.segments) == (4, None, [32])
    assert rows["mid_block.resnets.0.conv1"].reason == "body"


def test_a_glob_wins_over_a_role_and_the_last_glob_over_the_first(tiny):
    overrides = {
        "mid_block.*": {"weight_bits": 6},
        "body": {"weight_bits": 8},
        "mid_block.resnets.0.*": {"weight_bits": 5, "activation_bits": 7},
    }
    rows = _resolve(tiny, overrides=overrides)
    assert rows["mid_block.resnets.1.conv1"].weight_bits == 6
    assert (rows["mid_block.resnets.0.conv1"].weight_bits, rows["mid_block.resnets.0.conv1"].activation_bits) == (5, 7)
    assert rows["down_blocks.0.resnets.0.conv1"].weight_bits == 8


def test_an_override_to_floating_point_takes_both_sides(tiny):
    rows = _resolve(tiny, overrides={"conv_in": {"weight_bits": None}})
    assert (rows["conv_in"].weight_bits, rows["conv_in"].activation_bits) == (None, None)


def test_activation_bits_alone_on_a_floating_point_layer_are_explained(tiny):
    row = _resolve(tiny, overrides={"time_embedding": {"activation_bits": 8}})["time_embedding.linear_1"]
    assert not row.quantized
    assert "only together with weight_bits" in row.reason


def test_an_override_that_matches_nothing_is_an_error(tiny):
    with pytest.raises(ValueError, match=r"overrides\['attn'\] is no role \(stem, head, .*named like 'time_embedding"):
        _resolve(tiny, overrides={"attn": {"weight_bits": 8}})


def test_filter_fn_leaves_layers_in_floating_point_and_says_so(tiny):
    rows = _resolve(tiny, lambda module, fqn: isinstance(module, nn.Conv2d) and not fqn.startswith("up_"))
    for row in rows:
        module = tiny[1].get_submodule(row.fqn) if row.parameters else None
        if isinstance(module, nn.Conv2d) and not row.fqn.startswith("up_"):
            assert row.quantized
        elif module is not None:
            assert row.reason == "refused by filter_fn"
            assert not row.quantized


def test_the_table_and_its_sum(tiny):
    rows = _resolve(tiny)
    text = str(rows)
    for row in rows:
        assert any(line.startswith(f"{row.fqn} ") and row.reason in line for line in text.splitlines())
    bits = Counter()
    for row in rows:
        bits[row.weight_bits or 32] += row.parameters
    total = sum(bits.values())
    weights = sum(row.parameters for row in rows.quantized)
    mean = sum(row.weight_bits * row.parameters for row in rows.quantized) / weights
    assert mean == rows.average_bits
    assert f"{len(rows.quantized)} of {len(_weights(tiny[1]))} layers quantized; {total:,} weights" in rows.summary()
    assert f"{mean:.2f} bits on average where quantized" in rows.summary()


def test_a_plan_survives_json(tiny):
    rows = _resolve(tiny)
    assert Plan.from_list(json.loads(json.dumps(rows.to_list()))) == rows


def test_an_unknown_layer_is_a_key_error(tiny):
    with pytest.raises(KeyError, match="nowhere"):
        _resolve(tiny)["nowhere"]


def test_plan_of_a_quantized_network_is_what_was_done(quantized_unet, tiny):
    assert plan(quantized_unet) == resolve(*tiny, quick())


def test_planning_changes_nothing(tiny_unet):
    tiny_unet.train()
    tiny_unet.mid_block.eval()
    before = {name: value.clone() for name, value in tiny_unet.state_dict().items()}
    flags = {name: module.training for name, module in tiny_unet.named_modules()}
    attributes, state = set(vars(tiny_unet)), torch.get_rng_state()
    plan(tiny_unet)
    assert all(torch.equal(value, before[name]) for name, value in tiny_unet.state_dict().items())
    assert {name: module.training for name, module in tiny_unet.named_modules()} == flags
    assert set(vars(tiny_unet)) == attributes
    assert torch.equal(torch.get_rng_state(), state)


# Conditional networks


def test_a_class_conditional_unet(tiny_unet):
    unet = UNet2DModel.from_config(tiny_unet.config, num_class_embeds=10)
    rows = plan(unet, conditioning={"class_labels": torch.arange(10)})
    _check_complete(rows, unet)
    assert rows["time_embedding.linear_1"].reason.startswith("depends on the timestep alone")
    projection = rows["mid_block.resnets.0.time_emb_proj"]
    assert projection.role == "time_projection"
    assert projection.reason == "depends on timestep and conditioning, not on the image"


def test_a_text_conditional_unet():
    unet = UNet2DConditionModel(**TINY_TEXT_UNET)
    rows = plan(unet, conditioning={"encoder_hidden_states": torch.randn(2, 5, 12)})
    _check_complete(rows, unet)
    block = "down_blocks.1.attentions.0.transformer_blocks.0"
    for layer in ("attn1.to_q", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"):
        assert rows[f"{block}.{layer}"].role == "attention"
        assert rows[f"{block}.{layer}"].activation_bits == 6
    assert rows[f"{block}.ff.net.2"].role == "body"
    assert rows["up_blocks.0.resnets.0.conv1"].segments == [16, 16]
    assert rows["conv_in"].role == "stem"
    assert rows["conv_out"].role == "head"
    assert rows["time_embedding.linear_2"].role == "time_embedding"


def test_conditioning_is_checked(tiny_unet):
    unet = UNet2DModel.from_config(tiny_unet.config, num_class_embeds=10)
    with pytest.raises(ValueError, match=r"conditional and conditioning has no 'class_labels': pass conditioning="):
        plan(unet)
    with pytest.raises(ValueError, match=r"tensors of \[3, 4\] rows"):
        check_conditioning(unet, {"class_labels": torch.arange(3), "other": {"nested": torch.zeros(4, 2)}})
    with pytest.raises(ValueError, match="at least one"):
        check_conditioning(unet, {"class_labels": torch.arange(0)})
    with pytest.raises(ValueError, match="at least one"):
        check_conditioning(unet, {"class_labels": torch.tensor(3)})
    with pytest.raises(TypeError, match="conditioning is a Tensor"):
        check_conditioning(unet, torch.arange(3))


# Any module f(x, t)


def test_a_plain_module():
    model = Small()
    rows = plan(model, sample_shape=SHAPE)
    _check_complete(rows, model)
    roles = {row.fqn: row.role for row in rows}
    assert roles == {
        "first": "stem",
        "time": "time_projection",
        "down": "resample",
        "to_q": "attention",
        "to_k": "attention",
        "to_v": "attention",
        "scaled_dot_product_attention": "attention",
        "to_out": "attention",
        "up": "resample",
        "join": "skip_concat",
        "shortcut": "shortcut",
        "last": "head",
    }
    assert rows["join"].segments == rows["shortcut"].segments == [8, 8]


class Volume(Plain):
    def build(self):
        self.layer = nn.Conv3d(8, 8, 1)

    def middle(self, h):
        return self.layer(h[:, :, None])[:, :, 0]


class Reflecting(Plain):
    def build(self):
        self.layer = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")

    def middle(self, h):
        return self.layer(h)


class EvenSame(Reflecting):
    def build(self):
        self.layer = nn.Conv2d(8, 8, 2, padding="same")


class Twice(Plain):
    def build(self):
        self.layer = nn.Conv2d(8, 8, 1)

    def middle(self, h):
        return self.layer(F.relu(self.layer(h)))


class Functional(Twice):
    def middle(self, h):
        return F.conv2d(h, self.layer.weight)


class WeightReadElsewhere(Twice):
    def middle(self, h):
        return self.layer(h) * self.layer.weight.norm()


class Tied(Plain):
    def build(self):
        self.layer, self.other = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.other.weight = self.layer.weight

    def middle(self, h):
        return self.other(F.relu(self.layer(h)))


class TwoNames(Twice):
    def build(self):
        self.alias = self.layer = nn.Conv2d(8, 8, 1)

    def middle(self, h):
        return self.layer(h)


class WeightNorm(TwoNames):
    def build(self):
        self.layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))


class LowRank(nn.Linear):
    """As adapters do it: a Linear that computes more than a linear."""

    def __init__(self):
        super().__init__(8, 8)
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return super().forward(x) + self.inner(x)


class Adapted(Plain):
    def build(self):
        self.layer = LowRank()

    def middle(self, h):
        return self.layer(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FoldedBatch(Plain):
    def build(self):
        self.layer = nn.Linear(8, 8)

    def middle(self, h):
        tokens = h.permute(0, 2, 3, 1)
        return self.layer(tokens.reshape(-1, 8)).reshape(tokens.shape).permute(0, 3, 1, 2)


UNSUPPORTED = {
    Volume: "no quantized form of this operator",
    Reflecting: "padding_mode='reflect' is not zeros",
    EvenSame: "padding='same' with an even kernel is not symmetric",
    Twice: "called 2 times in one step: one scale would not do",
    Functional: "its weight is read in the forward of Functional",
    WeightReadElsewhere: "its weight is read in the forward of WeightReadElsewhere, layer",
    Tied: "its weight is read in the forward of layer, other",
    TwoNames: "one module under 2 names: alias, layer",
    WeightNorm: "its weight belongs to no Conv2d module",
    Adapted: "LowRank overrides Linear.forward",
    FoldedBatch: "its first dimension is not the batch",
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("network", UNSUPPORTED, ids=lambda network: network.__name__)
def test_what_cannot_be_quantized_stays_with_its_reason(network):
    model = network()
    rows = plan(model, sample_shape=SHAPE)
    row = rows["layer"]
    assert row.reason == UNSUPPORTED[network]
    assert (row.weight_bits, row.activation_bits) == (None, None)
    others = [other for other in rows if other.fqn in ("first", "last", "layer.inner")]
    assert len(others) >= 2
    assert all(other.quantized for other in others)


class Attention(Plain):
    """torch's attention hands its layers' weights to a function and never calls them."""

    def build(self):
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True)

    def middle(self, h):
        tokens = h.flatten(2).transpose(1, 2)
        return self.layer(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).reshape(h.shape)


class BatchNorm(Plain):
    def build(self):
        self.layer, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.norm.running_var.fill_(9.0)
        self.norm.running_mean.fill_(1.0)

    def middle(self, h):
        return self.norm(self.layer(h))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("network", [*UNSUPPORTED, Attention, BatchNorm], ids=lambda network: network.__name__)
def test_networks_with_such_layers_are_quantized_around_them(network):
    """In 8 bits the outputs stay close: what the plan calls float is computed as before."""
    model = network()
    x, t = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 500, 900])
    with torch.no_grad():
        expected = model(x, t)
        config = quick(weight_bits=8, activation_bits=8, calibration_points=64)
        quantize_(model, config, scheduler=cosine_scheduler(), sample_shape=SHAPE, progress=False)
        error = (model(x, t) - expected).norm() / expected.norm()
    assert error < 0.1


def test_batch_norm_is_not_merged_into_its_convolution():
    rows = plan(BatchNorm(), sample_shape=SHAPE)
    assert (rows["layer"].weight_bits, rows["layer"].activation_bits) == (4, 6)


def test_torch_attention_stays_in_floating_point():
    rows = plan(Attention(), sample_shape=SHAPE)
    assert not rows["layer"].quantized
    assert rows["layer.out_proj"].reason == "its weight is read in the forward of layer"


def test_a_network_without_layers_or_shape_is_an_error():
    class Nothing(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))

        def forward(self, x, t):
            return x * self.gain

    with pytest.raises(ValueError, match="Nothing has no convolution and no linear layer"):
        plan(Nothing(), sample_shape=SHAPE)
    with pytest.raises(ValueError, match=r"pass sample_shape=\(channels, height, width\)"):
        plan(Nothing())
    with pytest.raises(ValueError, match=r"write \(channels, height, width\)"):
        plan(Nothing(), sample_shape=(8,))


def test_an_adapter_that_is_not_merged_is_an_error():
    """A class as peft's, which is not installed here: a layer with a side path that can be merged or switched off."""

    class Adapted(nn.Module):
        def __init__(self, base_layer: nn.Conv2d) -> None:
            super().__init__()
            self.base_layer, self.side = base_layer, nn.Conv2d(8, 8, 1)
            self.merged, self.disable_adapters = False, False

        def forward(self, x):
            h = self.base_layer(x)
            return h if self.merged or self.disable_adapters else h + self.side(x)

    class WithAdapter(Plain):
        def build(self):
            self.layer = Adapted(nn.Conv2d(8, 8, 3, padding=1))

        def middle(self, h):
            return self.layer(h)

    model = WithAdapter()
    assert plan(model, sample_shape=SHAPE)["layer.side"].quantized  # anyone's own class may look like that
    Adapted.__module__ = "peft.tuners.lora.layer"
    with pytest.raises(ValueError, match=r"layer has an adapter that is not merged .* call fuse_lora\(\)"):
        plan(model, sample_shape=SHAPE)
    for word in ("merged", "disable_adapters"):
        setattr(model.layer, word, True)
        rows = plan(model, sample_shape=SHAPE)
        assert "layer.base_layer" in {row.fqn for row in rows.quantized}
        assert "layer.side" not in {row.fqn for row in rows}
        setattr(model.layer, word, False)


def test_a_network_that_cannot_be_exported_is_an_error_and_stays_as_it_was():
    class Branching(Plain):
        def middle(self, h):
            return h if h.sum() > 0 else -h

    model = Branching().train()
    with pytest.raises(RuntimeError, match=r"torch.export cannot capture Branching called as f\(x_t \(3, 1, 8, 8\)"):
        plan(model, sample_shape=SHAPE)
    assert all(module.training for module in model.modules())


@pytest.mark.slow
def test_every_layer_of_the_published_cifar10_configuration():
    """35.7 M parameters of random values; export alone takes a minute."""
    unet, _ = load_model("ddpm-cifar10")
    rows = plan(unet)
    _check_complete(rows, unet)
    assert sum(p.numel() for p in unet.parameters()) == 35_746_307
    roles = Counter(row.role for row in rows if row.parameters)
    assert roles["stem"] == roles["head"] == 1
    assert roles["time_embedding"] == 2
    assert roles["resample"] == 6
    assert roles["skip_concat"] == 12
    assert all(row.quantized for row in rows if row.parameters and row.role != "time_embedding")
