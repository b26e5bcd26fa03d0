"""Saving and loading: the same outputs bit for bit, small files, and clear errors for what is damaged or foreign."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMPipeline, UNet2DModel
from networks import SHAPE, TINY_UNET, Small, cosine_scheduler, quick, sqnr
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchao.core.config import config_to_dict
from torchao.quantization import Int8WeightOnlyConfig

from pqcad_ao import CADConfig, distill_, load_quantized, plan, quantize_, save_quantized
from pqcad_ao.config import config_from_json
from pqcad_ao.models import save_model
from pqcad_ao.nn.layers import QuantizedLayer
from pqcad_ao.ops.packing import packed_size

WEIGHTS = "diffusion_pytorch_model.safetensors"


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 300, 600, 999])


def _assert_same(first: nn.Module, second: nn.Module) -> None:
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert value.dtype == states[1][name].dtype
        assert torch.equal(value, states[1][name]), name
    assert plan(first) == plan(second)
    x, t = _inputs()
    dtype = next(first.parameters()).dtype
    with torch.no_grad():
        outputs = [model(x.to(dtype), t) for model in (first, second)]
    outputs = [output if isinstance(output, torch.Tensor) else output.sample for output in outputs]
    assert torch.equal(*outputs)


# diffusers


def test_from_pretrained_is_bit_for_bit(quantized_unet, saved):
    loaded = UNet2DModel.from_pretrained(saved)
    assert type(loaded) is UNet2DModel
    assert not loaded.training
    _assert_same(quantized_unet, loaded)


def test_a_fresh_process_needs_only_the_import(quantized_unet, saved, tmp_path):
    x, t = _inputs()
    with torch.no_grad():
        save_file({"x": x, "t": t, "expected": quantized_unet(x, t).sample}, tmp_path / "case.safetensors")
    script = """
import sys, torch
import pqcad_ao
from diffusers import UNet2DModel
from safetensors.torch import load_file
case = load_file(sys.argv[2])
with torch.no_grad():
    output = UNet2DModel.from_pretrained(sys.argv[1])(case["x"], case["t"]).sample
assert torch.equal(output, case["expected"]), (output - case["expected"]).abs().max()
"""
    command = [sys.executable, "-c", script, str(saved), str(tmp_path / "case.safetensors")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_loading_in_bfloat16_equals_casting(quantized_unet, saved):
    loaded = UNet2DModel.from_pretrained(saved, torch_dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    _assert_same(quantized_unet.to(torch.bfloat16), loaded)


@pytest.mark.parametrize(
    "options", [{}, {"variant": "w4"}, {"max_shard_size": "20KB"}], ids=["plain", "variant", "shards"]
)
def test_saving_what_was_loaded(quantized_unet, saved, tmp_path, options):
    UNet2DModel.from_pretrained(saved).save_pretrained(tmp_path, **options)
    options.pop("max_shard_size", None)
    _assert_same(quantized_unet, UNet2DModel.from_pretrained(tmp_path, **options))


def test_a_cast_network_loads_with_its_grids_in_float32(quantized_unet, tmp_path):
    quantized_unet.to(torch.bfloat16).save_pretrained(tmp_path)
    _assert_same(quantized_unet, UNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16))


def test_a_loaded_network_can_be_cast_and_copied(quantized_unet, saved):
    loaded = UNet2DModel.from_pretrained(saved)
    _assert_same(quantized_unet, copy.deepcopy(loaded))
    _assert_same(quantized_unet.to(torch.bfloat16), loaded.to(torch.bfloat16))


def test_the_config_says_how(quantized_unet, saved):
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "pqcad"
    assert config["format"] == 1
    assert config["timestep_groups"] == 4
    assert config["num_train_timesteps"] == 1000
    written = config_to_dict(quick())
    assert config["config"]["_data"].items() <= written["_data"].items()
    assert config_from_json(config["config"]) == config_from_json(written) == quick()
    assert config["plan"] == plan(quantized_unet).to_list()


def test_weights_are_packed_on_disk(quantized_unet, saved):
    tensors = load_file(saved / WEIGHTS)
    for row in plan(quantized_unet).quantized:
        weight = tensors[f"{row.fqn}.weight"]
        out_channels, reduction = row.shape[0], row.parameters // row.shape[0]
        assert weight.dtype == torch.uint8
        assert weight.numel() == -(-reduction * row.weight_bits // 8) * out_channels
        assert weight.shape[1] == packed_size(reduction, row.weight_bits)
    with safe_open(saved / WEIGHTS, "pt") as file:
        header = 8 + int.from_bytes((saved / WEIGHTS).read_bytes()[:8], "little")
        assert set(file.keys()) == set(quantized_unet.state_dict())
    stored = sum(value.numel() * value.element_size() for value in tensors.values())
    assert (saved / WEIGHTS).stat().st_size == header + stored


def test_pipelines_save_and_load(quantized_unet, scheduler, tmp_path):
    def images(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        options = {"batch_size": 2, "num_inference_steps": 3, "output_type": "np"}
        return pipeline(generator=torch.Generator().manual_seed(0), **options).images

    pipeline = DDIMPipeline(quantized_unet, scheduler)
    pipeline.save_pretrained(tmp_path)
    loaded = DDIMPipeline.from_pretrained(tmp_path)
    assert plan(loaded.unet) == plan(quantized_unet)
    assert (images(loaded) == images(pipeline)).all()


# Damaged and foreign folders


def _edit(change):
    """Damage config.json."""

    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        change(config, config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def _retensor(change):
    """Damage the weights."""

    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        _edit(lambda _, values: values.pop("weights"))(folder)

    return damage


def _truncate(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def _row(values, fqn="mid_block.resnets.0.conv1"):
    return next(row for row in values["plan"] if row["fqn"] == fqn)


DAMAGE = {
    "truncated": (_truncate, Exception, "(?i)safetensors|incomplete|unable to load"),
    "no safetensors": (lambda d: (d / WEIGHTS).write_bytes(b"hello" * 99), Exception, "(?i)safetensors|header|unable"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), OSError, "no file named diffusion_pytorch_model"),
    "missing scale": (
        _retensor(lambda t: t.pop("conv_in.weight_scale")),
        ValueError,
        "damaged: it holds no conv_in.weight_scale",
    ),
    "missing norm": (
        _retensor(lambda t: t.pop("conv_norm_out.weight")),
        ValueError,
        "damaged: it holds no conv_norm_out.weight",
    ),
    "shape": (
        _retensor(lambda t: t.update({"conv_in.weight": t["conv_in.weight"][:, 1:].contiguous()})),
        ValueError,
        r"conv_in.weight has shape \(8, 8\), the plan says \(8, 9\)",
    ),
    "type": (
        _retensor(lambda t: t.update({"conv_in.weight_scale": t["conv_in.weight_scale"].half()})),
        ValueError,
        r"conv_in.weight_scale is torch.float16, expected torch.float32",
    ),
    "newer format": (
        _edit(lambda c, q: q.update(format=2)),
        ValueError,
        "is of format 2; this pqcad_ao reads format 1",
    ),
    "no format": (_edit(lambda c, q: q.pop("format")), ValueError, "is of format None"),
    "unknown field": (_edit(lambda c, q: q.update(zzz=1)), ValueError, r"damaged: unknown fields \['zzz'\]"),
    "unknown row field": (_edit(lambda c, q: _row(q).update(zzz=1)), ValueError, "damaged: .*zzz"),
    "incomplete row": (_edit(lambda c, q: _row(q).pop("segments")), ValueError, "damaged: .*segments"),
    "bits out of range": (_edit(lambda c, q: _row(q).update(weight_bits=9)), ValueError, "weight_bits=9.*out of range"),
    "bits as text": (_edit(lambda c, q: _row(q).update(activation_bits="4")), ValueError, "'4'.*out of range"),
    "other bits": (
        _edit(lambda c, q: _row(q).update(weight_bits=5)),
        ValueError,
        r"mid_block.resnets.0.conv1.weight has shape \(16, 72\), .* says \(16, 90\)",
    ),
    "segments": (_edit(lambda c, q: _row(q).update(segments=[1, 2])), ValueError, r"into \[1, 2\]; the network has 16"),
    "no plan": (_edit(lambda c, q: q.update(plan=None)), ValueError, "damaged: .*NoneType"),
    "groups": (_edit(lambda c, q: q.update(timestep_groups=0)), ValueError, r"num_train_timesteps are \(0, 1000\)"),
    "config value": (_edit(lambda c, q: q["config"]["_data"].update(weight_bits=40)), ValueError, "weight_bits=40"),
    "config field": (_edit(lambda c, q: q["config"]["_data"].update(zzz=4)), ValueError, "zzz"),
    "config of torchao": (
        _edit(lambda c, q: q.update(config=config_to_dict(Int8WeightOnlyConfig()))),
        ValueError,
        "its config is a Int8WeightOnlyConfig, not a PQCADConfig",
    ),
    "another network": (
        _edit(lambda c, q: c.update(block_out_channels=[16, 32])),
        ValueError,
        r"has conv_in as conv2d \[8, 1, 3, 3\]; the network has a Conv2d \[16, 1, 3, 3\]",
    ),
    "another layer": (
        _edit(lambda c, q: _row(q).update(fqn="mid_block.nowhere")),
        ValueError,
        "quantizes mid_block.nowhere, which UNet2DModel does not have",
    ),
    "another method": (
        _edit(lambda c, q: q.update(quant_method="zzz")),
        ValueError,
        "Unknown quantization type, got zzz",
    ),
    "no quantization config": (_edit(lambda c, q: c.pop("quantization_config")), ValueError, "conv_in.weight"),
}


@pytest.mark.parametrize("case", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_an_error(saved, tmp_path, case):
    damage, error, message = case
    folder = shutil.copytree(saved, tmp_path / "damaged")
    damage(folder)
    with pytest.raises(error, match=message):
        UNet2DModel.from_pretrained(folder)


def test_a_full_precision_folder_still_loads(tiny_unet, tmp_path):
    tiny_unet.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert not any(isinstance(module, QuantizedLayer) for module in loaded.modules())
    assert torch.equal(loaded.conv_in.weight, tiny_unet.conv_in.weight)


# Any module


def test_save_and_load_of_a_plain_module(small, tmp_path):
    path = tmp_path / "new" / "model.safetensors"
    save_quantized(small, path)
    loaded = Small(seed=1)
    assert load_quantized(loaded, path) is loaded
    _assert_same(small, loaded)
    save_quantized(loaded, tmp_path / "again.safetensors")
    _assert_same(small, load_quantized(Small(seed=2), tmp_path / "again.safetensors"))


def test_tied_weights_that_stay_in_floating_point_are_saved(tmp_path):
    """safetensors refuses tensors that share memory."""

    class Tied(Small):
        def build(self):
            super().build()
            self.second = nn.GroupNorm(4, 16)
            self.second.weight = self.norm.weight

        def middle(self, h):
            return super().middle(self.second(torch.cat([h, -h], 1))[:, :8])

    model, loaded = Tied(), Tied(seed=1)
    quantize_(model, quick(), scheduler=cosine_scheduler(), sample_shape=SHAPE, progress=False)
    save_quantized(model, tmp_path / "tied.safetensors")
    load_quantized(loaded, tmp_path / "tied.safetensors")
    assert loaded.second.weight is loaded.norm.weight
    _assert_same(model, loaded)


def test_what_is_not_quantized_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="this Small is not quantized by pqcad_ao: call quantize_ first"):
        save_quantized(Small(), tmp_path / "x")


def _assert_untouched(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "_pqcad_state")
    assert not hasattr(model, "_pqcad_timestep")
    assert not model._forward_pre_hooks
    assert not any(isinstance(module, QuantizedLayer) for module in model.modules())


def _resave(change):
    def damage(path):
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata.pop("sha256")
        change(metadata, tensors)
        save_file(tensors, path, metadata=metadata)

    return damage


FILE_DAMAGE = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-50]), "is no safetensors file"),
    "no safetensors": (lambda p: p.write_bytes(b"hello"), "is no safetensors file"),
    "foreign": (_resave(lambda m, t: m.pop("pqcad")), "holds no pqcad: its header names format"),
    "no json": (_resave(lambda m, t: m.update(pqcad="{")), "is damaged: its header is no JSON"),
    "newer": (_resave(lambda m, t: m.update(pqcad=json.dumps({"format": 7}))), "is of format 7"),
    "missing": (_resave(lambda m, t: t.pop("norm.weight")), "does not fit this Small: .* norm.weight"),
    "missing grid": (_resave(lambda m, t: t.pop("join.input_low")), "does not fit this Small: .* join.input_low"),
    "unknown": (_resave(lambda m, t: t.update(zzz=torch.zeros(1))), "does not fit this Small: .* zzz"),
    "shape": (_resave(lambda m, t: t.update({"norm.bias": torch.zeros(3)})), "does not fit this Small: .* norm.bias"),
}


@pytest.mark.parametrize("case", FILE_DAMAGE.values(), ids=FILE_DAMAGE)
def test_a_damaged_file_is_an_error_and_leaves_the_module_as_it_was(small, tmp_path, case):
    damage, message = case
    save_quantized(small, tmp_path / "model.safetensors")
    damage(tmp_path / "model.safetensors")
    model = Small(seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_quantized(model, tmp_path / "model.safetensors")
    _assert_untouched(model, before)


def test_another_network_or_none_is_an_error(small, tmp_path):
    save_quantized(small, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="quantizes first, which Conv2d does not have"):
        load_quantized(nn.Conv2d(1, 1, 1), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="this Small is quantized already"):
        load_quantized(small, tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError):
        load_quantized(Small(), tmp_path / "nowhere.safetensors")


# what diffusers does with its models


def test_dequantize_gives_the_network_in_floating_point(quantized_unet, tmp_path):
    original = copy.deepcopy(quantized_unet)
    layers = {row.fqn: original.get_submodule(row.fqn) for row in plan(original).quantized}
    assert quantized_unet.dequantize() is quantized_unet
    for fqn, layer in layers.items():
        plain = quantized_unet.get_submodule(fqn)
        assert type(plain) in (nn.Conv2d, nn.Linear)
        assert torch.equal(plain.weight, layer.dequantized_weight())
        assert plain.bias is None or torch.equal(plain.bias, layer.bias)
    x, t = _inputs()
    with torch.no_grad():
        output, expected = quantized_unet(x, t).sample, original(x, t).sample
    assert sqnr(expected, output) > 5  # activations are not rounded any more
    assert len(plan(quantized_unet, quick()).quantized) == len(layers)  # it may be quantized again
    assert not quantized_unet._forward_pre_hooks
    assert not quantized_unet._forward_hooks
    quantized_unet.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert "quantization_config" not in loaded.config
    with torch.no_grad():
        assert torch.equal(loaded(x, t).sample, output)
    with pytest.raises(ValueError, match="first quantize"):
        quantized_unet.dequantize()


def test_parameters_are_counted_as_those_of_full_precision(tiny_unet, quantized_unet, saved):
    for unet in (quantized_unet, copy.deepcopy(quantized_unet), UNet2DModel.from_pretrained(saved)):
        assert unet.num_parameters() == tiny_unet.num_parameters()
        assert unet.num_parameters(only_trainable=True) < tiny_unet.num_parameters() / 10
    assert quantized_unet.dequantize().num_parameters() == tiny_unet.num_parameters()


def test_what_could_not_be_loaded_is_not_saved(quantized_unet, tmp_path):
    quantized_unet.conv_in = nn.Conv2d(1, 8, 3, padding=1)
    with pytest.raises(ValueError, match=r"could not be loaded, .* another network: conv_in\..* replace layers before"):
        quantized_unet.save_pretrained(tmp_path / "after")
    unet = UNet2DModel(**{**TINY_UNET, "out_channels": 2})
    unet.register_to_config(out_channels=1)
    quantize_(unet, quick(), scheduler=cosine_scheduler(), sample_shape=SHAPE, progress=False)
    with pytest.raises(ValueError, match=r"conv_out as conv2d \[2, 8, 3, 3\]; .* register_to_config"):
        unet.save_pretrained(tmp_path / "before")
    assert not list(tmp_path.rglob("*.safetensors"))
    unet.register_to_config(out_channels=2)
    unet.save_pretrained(tmp_path)
    _assert_same(unet, UNet2DModel.from_pretrained(tmp_path))


def test_what_a_file_of_an_own_network_could_not_be_loaded_from_is_not_saved(tmp_path):
    network, options = Small(), {"scheduler": cosine_scheduler(), "sample_shape": SHAPE, "progress": False}
    quantize_(network, quick(), **options)
    network.first = nn.Conv2d(1, 8, 3, padding=1)
    with pytest.raises(ValueError, match=r"first of this Small was quantized, and is a Conv2d now: replace layers bef"):
        save_quantized(network, tmp_path / "network.safetensors")
    with pytest.raises(ValueError, match="first of this Small was quantized, and is a Conv2d now"):
        distill_(network, Small(), cosine_scheduler(), CADConfig(steps=4), sample_shape=SHAPE, progress=False)
    assert not list(tmp_path.iterdir())


def test_what_changed_between_two_saves_is_saved(quantized_unet, tmp_path):
    quantized_unet.save_pretrained(tmp_path)
    quantized_unet.register_to_config(note="tuned")
    quantized_unet.conv_norm_out.weight.data *= 1.5
    quantized_unet.save_pretrained(tmp_path)
    _assert_same(quantized_unet, UNet2DModel.from_pretrained(tmp_path))


def test_a_full_precision_network_with_a_quantized_ones_config_is_named(quantized_unet, tmp_path):
    fresh = UNet2DModel.from_config(quantized_unet.config)
    fresh.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"in floating point, .*: delete quantization_config from config\.json"):
        UNet2DModel.from_pretrained(tmp_path / "plain")
    # each of the three ways that the message names
    file = tmp_path / "plain" / "config.json"
    config = {name: value for name, value in json.loads(file.read_text()).items() if name != "quantization_config"}
    file.write_text(json.dumps(config))
    save_model(fresh, cosine_scheduler(), tmp_path / "model")
    again = UNet2DModel.from_config({n: v for n, v in quantized_unet.config.items() if n != "quantization_config"})
    again.load_state_dict(fresh.state_dict())
    again.save_pretrained(tmp_path / "made")
    for place in (tmp_path / "plain", tmp_path / "model" / "unet", tmp_path / "made"):
        loaded = UNet2DModel.from_pretrained(place)
        assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_loading_does_not_quantize(tiny_dir, saved):
    with pytest.raises(ValueError, match=r"load it without quantization_config, then write quantize_\(unet"):
        UNet2DModel.from_pretrained(tiny_dir / "unet", quantization_config=quick())
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        assert plan(UNet2DModel.from_pretrained(saved, quantization_config=quick())).quantized
