"""LoRA on a quantized network: adapters are added, learn, are saved, and load again."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from networks import SHAPE, TINY_TEXT_UNET, Plain, cosine_scheduler, quick
from torch import nn

from pqcad_ao import quantize_
from pqcad_ao.graph.suitable import check_suitable
from pqcad_ao.nn.layers import QuantizedLayer

peft = pytest.importorskip("peft")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv_shortcut"]


def lora(**options) -> "peft.LoraConfig":
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": TARGETS, **options})


@pytest.fixture(scope="module")
def _unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**TINY_TEXT_UNET).eval()
    conditioning = {"encoder_hidden_states": torch.randn(3, 4, 12)}
    quantize_(unet, quick(), scheduler=cosine_scheduler(), conditioning=conditioning, progress=False)
    return unet


@pytest.fixture
def unet(_unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A quantized text-conditional UNet."""
    return copy.deepcopy(_unet)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, *SHAPE, generator=generator), torch.tensor([10, 900]), torch.ones(2, 4, 12)


def adapters(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in network.named_parameters() if "lora_" in name}


def stir(network: nn.Module) -> None:
    """Give every adapter numbers; peft begins with a product of zero."""
    generator = torch.Generator().manual_seed(2)
    for value in adapters(network).values():
        value.data = 0.1 * torch.randn(value.shape, generator=generator)


def test_an_adapter_stands_beside_every_layer_and_begins_with_nothing(unet):
    expected = unet(*inputs()).sample
    aimed = [name for name, module in unet.named_modules() if name.endswith(tuple("." + name for name in TARGETS))]
    assert {type(unet.get_submodule(name)).__name__ for name in aimed} >= {"QuantizedLinear", "QuantizedConv2d"}
    unet.add_adapter(lora())
    wrapped = [unet.get_submodule(name) for name in aimed]
    assert all(isinstance(layer.base_layer, (QuantizedLayer, nn.Conv2d, nn.Linear)) for layer in wrapped)
    assert torch.equal(unet(*inputs()).sample, expected)
    stir(unet)
    assert not torch.equal(unet(*inputs()).sample, expected)
    unet.disable_adapters()
    assert torch.equal(unet(*inputs()).sample, expected)


def test_a_layer_with_an_adapter_is_the_sum_of_both(unet):
    unet.add_adapter(lora())
    stir(unet)
    for name, module in unet.named_modules():
        base = getattr(module, "base_layer", None)
        if not isinstance(base, QuantizedLayer):
            continue
        x = torch.randn(2, base.in_channels, 6, 6) if base.kind == "conv2d" else torch.randn(2, 5, base.in_features)
        base.timestep.call.group = torch.tensor([0, 3])
        try:
            down, up = module.lora_A["default"], module.lora_B["default"]
            assert torch.equal(module(x), base(x) + 2 * up(down(x))), name  # alpha / r
        finally:
            base.timestep.call.group = None


def test_adapters_learn_to_undo_what_quantizing_did(unet):
    """And nothing else does: the packed network stays what it was."""
    x, t, text = inputs()
    torch.manual_seed(0)
    target = UNet2DConditionModel(**TINY_TEXT_UNET).eval()(x, t, text).sample.detach()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    unet.add_adapter(lora())
    stir(unet)
    learning = list(adapters(unet).values())
    assert {id(p) for p in unet.parameters() if p.requires_grad} == {id(p) for p in learning}
    optimizer = torch.optim.Adam(learning, 1e-2)
    losses = []
    for _ in range(30):
        loss = (unet(x, t, text).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(value.grad.isfinite().all() for value in learning)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
    after = unet.state_dict()
    assert all(torch.equal(value, after[_beside(name, after)]) for name, value in before.items())


def _beside(name: str, state: dict[str, torch.Tensor]) -> str:
    """The name of a layer's tensor once an adapter stands beside the layer."""
    owner, _, tensor = name.rpartition(".")
    return name if name in state else f"{owner}.base_layer.{tensor}"


def test_adapters_are_saved_and_load_on_a_quantized_network(unet, tmp_path):
    other = copy.deepcopy(unet)
    unet.add_adapter(lora(), adapter_name="style")
    stir(unet)
    unet.save_lora_adapter(tmp_path, adapter_name="style")
    other.load_lora_adapter(tmp_path, prefix=None, adapter_name="style", use_safetensors=True)
    assert adapters(unet).keys() == adapters(other).keys()
    assert torch.equal(other(*inputs()).sample, unet(*inputs()).sample)


def test_an_adapter_of_floating_point_is_refused_until_it_is_merged():
    unet = UNet2DConditionModel(**TINY_TEXT_UNET)
    unet.add_adapter(lora())
    given = {"conditioning": {"encoder_hidden_states": torch.randn(3, 4, 12)}}
    with pytest.raises(ValueError, match=r"conv1 has an adapter that is not merged .*: call fuse_lora\(\)"):
        quantize_(unet, quick(), scheduler=cosine_scheduler(), **given)
    unet.fuse_lora()
    unet.unload_lora()
    check_suitable(unet)


def test_several_adapters_are_switched_and_removed(unet):
    expected = unet(*inputs()).sample
    for name in ("one", "two"):
        unet.add_adapter(lora(), adapter_name=name)
    stir(unet)
    outputs = []
    for chosen in ("one", "two", ["one", "two"]):
        unet.set_adapters(chosen)
        outputs.append(unet(*inputs()).sample)
    assert all(not torch.equal(output, expected) for output in outputs)
    assert not torch.equal(outputs[0], outputs[1])
    unet.delete_adapters(["one", "two"])
    assert torch.equal(unet(*inputs()).sample, expected)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "pqcad"])
def test_compiled_with_an_adapter_it_is_what_it_is_eager(unet, backend):
    unet.add_adapter(lora())
    stir(unet)
    unet.requires_grad_(False)
    with torch.no_grad():
        expected = unet(*inputs()).sample
        torch._dynamo.reset()
        output = torch.compile(unet, backend=backend)(*inputs()).sample
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)


def test_other_convolutions_take_adapters_or_say_that_peft_has_none():
    class Rows(Plain):
        def build(self) -> None:
            self.row, self.up = nn.Conv1d(8, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 1)
            self.norm = nn.GroupNorm(2, 8)

        def middle(self, h):
            return self.norm(self.up(self.row(h.flatten(2)).reshape(h.shape)))

    network = Rows()
    quantize_(network, quick(), scheduler=cosine_scheduler(), sample_shape=SHAPE, progress=False)
    x, t, _ = inputs()
    expected = network(x, t)
    with pytest.raises(ValueError, match=r"up is a conv_transpose2d, of which peft has no LoRA: leave it out"):
        peft.inject_adapter_in_model(lora(target_modules=["up"]), copy.deepcopy(network))
    peft.inject_adapter_in_model(lora(target_modules=["row"]), network)
    assert torch.equal(network(x, t), expected)
    stir(network)
    assert not torch.equal(network(x, t), expected)


def test_what_needs_the_floating_point_weight_is_an_error(unet):
    with pytest.raises(ValueError, match="variant"):
        copy.deepcopy(unet).add_adapter(lora(use_dora=True))
    unet.add_adapter(lora())
    with pytest.raises(ValueError, match=r"could not be loaded, .* Save adapters with save_lora_adapter"):
        unet.save_pretrained("nowhere")
    with pytest.raises(ValueError, match=r"holds packed integers, no adapter can be merged into it: leave it beside"):
        unet.fuse_lora()
