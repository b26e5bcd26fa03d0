"""Files that are whole and say what cannot be: every number of a quantized network is looked at when it is loaded."""

import copy
import json
import resource
import shutil

import pytest
import torch
from diffusers import UNet2DModel
from networks import Small
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pqcad_ao import load_quantized, save_quantized
from pqcad_ao.nn.layers import low_range
from pqcad_ao.prepare.grids import activation_lows
from pqcad_ao.utils.tensor_files import write_tensors

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def written(_small_prototype, tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "small.safetensors"
    save_quantized(_small_prototype, path)
    return path


class Folder:
    """A folder of diffusers layout: its header is in config.json."""

    layer, norm = "mid_block.resnets.0.conv1", "conv_norm_out"

    def __init__(self, saved, written, tmp_path) -> None:
        self.path = shutil.copytree(saved, tmp_path / "folder")

    def change(self, values=None, tensors=None) -> None:
        config = json.loads((self.path / "config.json").read_text())
        config["quantization_config"].pop("weights")
        if values is not None:
            values(config["quantization_config"])
        (self.path / "config.json").write_text(json.dumps(config))
        if tensors is not None:
            held = load_file(self.path / WEIGHTS)
            tensors(held)
            save_file(held, self.path / WEIGHTS, {"format": "pt"})

    def load(self) -> None:
        UNet2DModel.from_pretrained(self.path)


class File:
    """A file of any other module."""

    layer, norm = "join", "norm"

    def __init__(self, saved, written, tmp_path) -> None:
        self.path = shutil.copy(written, tmp_path / "file.safetensors")

    def change(self, values=None, tensors=None) -> None:
        with safe_open(self.path, "pt") as file:
            header, held = json.loads(file.metadata()["pqcad"]), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
        if values is not None:
            values(header)
        if tensors is not None:
            tensors(held)
        save_file(held, self.path, {"pqcad": json.dumps(header)})

    def load(self) -> None:
        load_quantized(Small(seed=1), self.path)


@pytest.fixture(params=[Folder, File])
def place(request, saved, written, tmp_path):
    return request.param(saved, written, tmp_path)


def _with(index: int, value: float):
    def change(tensor):
        tensor.flatten()[index] = value
        return tensor

    return change


TENSORS = {
    "NaN scale": ("weight_scale", _with(3, float("nan")), "weight_scale holds nan, expected are positive"),
    "zero scale": ("weight_scale", _with(0, 0.0), "weight_scale holds 0, expected are positive"),
    "negative scale": ("weight_scale", _with(1, -0.5), "weight_scale holds -0.5, expected are positive"),
    "infinite grid": ("input_scale", _with(2, float("inf")), "input_scale holds inf, expected are positive"),
    "grid without inverse": ("input_scale", _with(2, 1e-45), "input_scale holds 1.*e-45, expected are positive"),
    "low above int8": ("input_low", _with(2, 3000), r"input_low holds 3000, expected are whole numbers from -\d+ to 0"),
    "low of another type": ("input_low", lambda t: t.int(), "input_low is torch.int32, expected torch.int16"),
    "infinite bias": ("bias", _with(0, float("-inf")), "bias holds -inf, expected are finite numbers"),
    "float weights": ("weight", lambda t: t.float(), "weight is torch.float32, expected torch.uint8"),
    "complex weights": ("weight", lambda t: t.to(torch.complex64), "weight is torch.complex64, expected torch.uint8"),
}


@pytest.mark.parametrize("case", TENSORS.values(), ids=TENSORS)
def test_a_layer_that_cannot_be_is_refused(case, place):
    name, damage, message = case
    full = f"{place.layer}.{name}"
    place.change(tensors=lambda held: held.update({full: damage(held[full])}))
    with pytest.raises(ValueError, match=rf"damaged: {full.removesuffix(name)}{message}"):
        place.load()


OTHERS = {
    "NaN": (_with(0, float("nan")), "holds NaN or infinity"),
    "infinite": (_with(1, float("inf")), "holds NaN or infinity"),
    "int8": (lambda t: t.to(torch.int8), "is torch.int8, expected torch.float32"),
    "complex": (lambda t: t.to(torch.complex64), "is torch.complex64, expected torch.float32"),
}


@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS)
def test_what_is_not_quantized_is_looked_at_as_well(case, place):
    damage, message = case
    full = f"{place.norm}.weight"
    place.change(tensors=lambda held: held.update({full: damage(held[full])}))
    with pytest.raises(ValueError, match=f"damaged: {full} {message}"):
        place.load()


def _quantized(values):
    return next(row for row in values["plan"] if row["weight_bits"] is not None)


def _row(values, **changes):
    _quantized(values).update(changes)


HEADERS = {
    "standing schedule": (lambda v: v.update(schedule=[999, 999]), r"schedule is \[999, 999\], expected are falling"),
    "rising schedule": (lambda v: v.update(schedule=[1, 500]), "expected are falling timesteps from 999 to 0"),
    "schedule of True": (lambda v: v.update(schedule=[True]), "expected are falling"),
    "empty schedule": (lambda v: v.update(schedule=[]), "expected are falling"),
    "schedule of a word": (lambda v: v.update(schedule="31"), "expected are falling"),
    "schedule beyond": (lambda v: v.update(schedule=[1000, 3]), "expected are falling"),
    "a row twice": (lambda v: v["plan"].append(copy.deepcopy(_quantized(v))), "its plan has 2 rows for"),
    "far too many timesteps": (lambda v: v.update(num_train_timesteps=2**70), "num_train_timesteps are"),
    "bits with a fraction": (lambda v: _row(v, weight_bits=4.0), "out of range"),
    "bits of True": (lambda v: _row(v, activation_bits=True), "out of range"),
    "a reason of numbers": (lambda v: _row(v, reason=7), "out of range"),
    "other parameters": (lambda v: _row(v, parameters=1), "out of range"),
    "a shape of a word": (lambda v: _row(v, shape="ab"), "out of range"),
    "a sensitivity in words": (lambda v: _row(v, sensitivity="much"), "out of range"),
    "transitions": (lambda v: v.update(transitions=[3]), "transitions is"),
    "no transitions": (lambda v: v.update(transitions=None), "TypeError"),
}


@pytest.mark.parametrize("case", HEADERS.values(), ids=HEADERS)
def test_a_header_that_cannot_be_is_refused(case, place):
    damage, message = case
    place.change(values=damage)
    with pytest.raises(ValueError, match=f"quantization config is damaged: .*{message}|damaged: {message}"):
        place.load()


@pytest.mark.parametrize("header", ["7", "null", "[1]", '"a"', "true"])
def test_a_header_that_is_no_object_is_refused(header, tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, {"pqcad": header})
    with pytest.raises(ValueError, match=r"a\.safetensors: its quantization config is damaged"):
        load_quantized(Small(), tmp_path / "a.safetensors")


def test_a_header_takes_no_memory_before_it_is_found_to_fit(place):
    """A network of so many timestep groups would take gigabytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    place.change(values=lambda v: v.update(timestep_groups=10**6))
    with pytest.raises(ValueError, match=r"input_(low|scale)"):
        place.load()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_grid_that_is_fitted_may_be_loaded(bits):
    """Starts of narrower grids are tried, too; of 8 bits there is one."""
    least, most = low_range(bits)
    widths = [bits] if bits == 8 else range(2, bits + 1)
    lows = torch.cat([activation_lows(width) for width in widths])
    assert lows.min() == least
    assert lows.max() == most


# A bit that flips where every value is as good as another


@pytest.mark.parametrize("at", [0.01, 0.3, 0.6, 0.999])
def test_a_flipped_bit_is_said(at, saved, written, tmp_path):
    folder, file = Folder(saved, written, tmp_path), File(saved, written, tmp_path)
    for path in (folder.path / WEIGHTS, file.path):
        content = bytearray(path.read_bytes())
        header = 8 + int.from_bytes(content[:8], "little")
        content[header + int(at * (len(content) - header))] ^= 4
        path.write_bytes(content)
    for place in (folder, file):
        with pytest.raises(ValueError, match="damaged"):
            place.load()


def test_weights_of_another_save_are_said(saved, quantized_unet, tmp_path):
    """As a kill leaves them between config.json and weights."""
    with torch.no_grad():
        quantized_unet.conv_norm_out.weight.mul_(2)
    quantized_unet.save_pretrained(tmp_path)
    shutil.copy(saved / WEIGHTS, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"the weights are not those that config\.json was written with"):
        UNet2DModel.from_pretrained(tmp_path)


def test_a_network_that_changes_is_saved_with_what_it_has_then(quantized_unet, tmp_path):
    """Also a copy, whose configuration is of the copy, and after a first save, which diffusers remembers."""
    copied = copy.deepcopy(quantized_unet)
    for number, model in enumerate([quantized_unet, copied, quantized_unet, copy.deepcopy(copied)]):
        with torch.no_grad():
            model.conv_norm_out.weight.add_(1 + number)
        model.save_pretrained(tmp_path / str(number))
        loaded = UNet2DModel.from_pretrained(tmp_path / str(number))
        assert torch.equal(loaded.conv_norm_out.weight, model.conv_norm_out.weight)
        assert json.loads((tmp_path / str(number) / "config.json").read_text())["quantization_config"]["weights"]


def test_a_network_that_was_pickled_still_saves(quantized_unet, tmp_path):
    torch.save(quantized_unet, tmp_path / "all.pt")
    torch.load(tmp_path / "all.pt", weights_only=False).save_pretrained(tmp_path)
    assert torch.equal(UNet2DModel.from_pretrained(tmp_path).conv_in.weight, quantized_unet.conv_in.weight)
