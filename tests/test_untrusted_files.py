"""Files from strangers: reading a model runs none of their code and looks up none of their names."""

import copy
import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from networks import SHAPE, Small, cosine_scheduler, quick
from safetensors import safe_open
from safetensors.torch import save_file
from torchao.core.config import ALLOWED_AO_MODULES, config_from_dict, config_to_dict

import pqcad_ao.config
from pqcad_ao import PQCADConfig, load_quantized, quantize_, save_quantized
from pqcad_ao.models import load_model, save_model

EVIL = {"_type": "import_module", "_version": 1, "_data": {"name": "evil"}}


@pytest.fixture
def evil(tmp_path, monkeypatch) -> Path:
    """A module on the path that leaves a file when it is imported."""
    (tmp_path / "evil.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    return tmp_path / "ran"


@pytest.fixture
def folder(quantized_unet, tmp_path) -> Path:
    save_model(quantized_unet, cosine_scheduler(), tmp_path / "model")
    return tmp_path / "model"


def _edit_config(folder: Path, change) -> None:
    file = folder / "unet" / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


HIDDEN = {
    "itself": lambda values: EVIL,
    "as a value": lambda values: {**values, "_data": {**values["_data"], "mode": EVIL}},
    "in a list": lambda values: {**values, "_data": {**values["_data"], "weight_ladder": [EVIL]}},
    "in an override": lambda values: {**values, "_data": {**values["_data"], "overrides": {"stem": EVIL}}},
}


@pytest.mark.parametrize("hide", HIDDEN.values(), ids=HIDDEN)
def test_a_configuration_calls_nothing_by_name(hide, folder, evil):
    def change(config):
        quantization = config["quantization_config"]
        quantization["config"] = hide(quantization["config"])

    _edit_config(folder, change)
    with pytest.raises(ValueError, match="config"):
        UNet2DModel.from_pretrained(folder / "unet")
    with pytest.raises(ValueError, match="config"):
        load_model(folder)
    assert not evil.exists()


@pytest.mark.parametrize("hide", HIDDEN.values(), ids=HIDDEN)
def test_a_file_of_any_module_calls_nothing_by_name(hide, tmp_path, evil):
    model = Small()
    quantize_(model, quick(), scheduler=cosine_scheduler(), sample_shape=SHAPE, progress=False)
    path = tmp_path / "small.safetensors"
    save_quantized(model, path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata.pop("sha256")
    header = json.loads(metadata["pqcad"])
    header["config"] = hide(header["config"])
    save_file(tensors, path, {**metadata, "pqcad": json.dumps(header)})
    with pytest.raises(ValueError, match="config"):
        load_quantized(Small(), path)
    assert not evil.exists()


@pytest.mark.parametrize("change", [{"_version": 2}, {"_data": []}, {"more": 1}], ids=str)
def test_a_configuration_of_another_form_is_refused(change):
    with pytest.raises(ValueError, match="its config"):
        pqcad_ao.config.config_from_json({**config_to_dict(PQCADConfig()), **change})


def test_torchao_finds_no_other_names_of_this_package():
    """Its own config_from_dict calls what the modules on its list hold; the package itself must not stand there."""
    assert {name for name in ALLOWED_AO_MODULES if name.startswith("pqcad_ao")} == {"pqcad_ao.config"}
    for name in ("import_module", "load_pt2", "compress"):
        with pytest.raises(ValueError, match=f"Failed to find class {name}"):
            config_from_dict({"_type": name, "_version": 1, "_data": {}})
    called = {name: value for name, value in vars(pqcad_ao.config).items() if callable(value)}
    words = {name for name, value in called.items() if value.__module__ == "typing"}
    assert called.keys() - words - {"__loader__"} == {
        "PQCADConfig",
        "CADConfig",
        "CacheConfig",
        "Correction",
        "config_from_json",
    }


def test_a_folder_of_another_quantizer_is_left_to_its_own_loader(folder):
    """torchao's rebuilds its configuration by name, as above."""
    _edit_config(
        folder, lambda config: config.update(quantization_config={"quant_method": "torchao", "quant_type": {}})
    )
    with pytest.raises(ValueError, match=r"config\.json .*'torchao': load_model reads"):
        load_model(folder)


class _Touches:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["shard.bin", "shard.safetensors", "../shard.bin"])
def test_weights_that_are_pickles_are_not_unpickled(name, tiny_dir, tmp_path):
    folder, ran = shutil.copytree(tiny_dir, tmp_path / "model"), tmp_path / "ran"
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"conv_in.weight": _Touches(ran)}, folder / "unet" / name)
    index = {"metadata": {}, "weight_map": {"conv_in.weight": name}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="unet cannot be read"):
        load_model(folder)
    assert not ran.exists()
    pickle.loads(pickle.dumps(_Touches(ran)))
    assert ran.exists()


def test_a_class_that_is_no_unet_is_not_made(folder):
    original = json.loads((folder / "unet" / "config.json").read_text())
    for name in ("AutoencoderKL", ["evil", "Evil"], {"a": 1}, None, 7):
        changed = copy.deepcopy(original) | {"_class_name": name, "auto_map": {"AutoModel": "evil.Evil"}}
        (folder / "unet" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"config\.json names the class"):
            load_model(folder)
