import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from pqcad_ao.pages.pictures import grid, save_grid, save_samples
from pqcad_ao.pages.text import text_report
from pqcad_ao.utils.files import finite, write_json

SUMMARY = {
    "steps": {"full": 20},
    "fid": {"fp_full": 1.25, "ptq_full": 17.5},
    "fid_ci": {"fp_full": [1.0, 1.5], "ptq_full": [16.0, 19.0]},
    "fid_n": 512,
    "bytes": {"fp32_checkpoint": 8000, "checkpoint": 1000, "fp32_pte": 9000, "pte": 3000, "resident_weights": 1600},
    "latency_ms": {"fp32_eager": 10.0, "pte": 2.5},
    "latency_batch": 1,
    "threads": 2,
    "sqnr_db": {"ptq_step": 5.8, "pte_vs_eager": float("inf")},
    "arithmetic": "multiplies <a> & <b>",
    "pte_arithmetic": {"int8 products": 3},
    "plan_summary": "1 of 1 layers quantized",
    "command": "pqcad demo --out 'a <b>'",
    "versions": {"torch": "2.13.0", "openvino": None},
    "cpu": {"name": "a processor", "cores": 2, "features": ["avx2"]},
    "seed": 0,
    "stages_s": {"quantize": 3.0},
    "busy": "other programs kept 1.9 of 2 cores busy",
    "skipped": {"latency_ms.fp32_compile": "no compiler"},
}


def test_grid_puts_each_image_in_its_place():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 2, 3).contiguous()
    picture = grid(images, columns=3)
    assert picture.shape == (1, 2 * 3 + 1, 3 * 4 + 1)
    for index in range(5):
        top, left = index // 3 * 3 + 1, index % 3 * 4 + 1
        assert (picture[0, top : top + 2, left : left + 3] == index).all()
    assert (picture[0, 4:6, 9:12] == 255).all()  # the place that a short last row leaves


def test_grid_of_floats_is_that_of_their_levels():
    levels = torch.randint(256, (4, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(grid(levels.float() / 127.5 - 1, 2), grid(levels, 2))


def test_grid_refuses_no_images():
    with pytest.raises(ValueError, match="at least 1"):
        grid(torch.empty(0, 1, 2, 2), 2)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_save_grid_writes_a_picture(tmp_path: Path, channels: int, mode: str):
    path = tmp_path / "new" / "grid.png"
    save_grid(torch.zeros(4, channels, 8, 8), path, columns=2)
    with Image.open(path) as picture:
        assert (picture.mode, picture.size) == (mode, (19, 19))


@pytest.mark.parametrize("channels", [1, 3])
def test_save_samples_draws_every_panel(tmp_path: Path, channels: int):
    light, dark = torch.ones(4, channels, 8, 8), -torch.ones(4, channels, 8, 8)
    save_samples({"light": light, "dark": dark}, tmp_path / "samples.png", columns=2)
    with Image.open(tmp_path / "samples.png") as picture:
        pixels = torch.tensor(list(picture.convert("L").getdata())).view(picture.height, picture.width)
    half = picture.width // 2
    assert (pixels[:, :half] < 128).float().mean() < 0.05 < 0.5 < (pixels[:, half:] < 128).float().mean()


def test_save_samples_begins_a_line_where_one_is_full(tmp_path: Path):
    panels = {name: torch.full((1, 1, 8, 8), level) for name, level in zip("abc", (-1.0, 1.0, -1.0), strict=True)}
    save_samples(panels, tmp_path / "samples.png", side=2.0, across=2)
    with Image.open(tmp_path / "samples.png") as picture:
        dark = torch.tensor(list(picture.convert("L").getdata())).view(picture.height, picture.width) < 128
    top, half = picture.height // 2, picture.width // 2
    for line in (dark[:top], dark[top:]):  # the second grid is white, the fourth is not there
        assert line[:, half:].float().mean() < 0.05 < 0.3 < line[:, :half].float().mean()


def test_json_is_strict(tmp_path: Path):
    values = {"a": [float("inf"), 1.0], "b": {3: float("nan")}, "c": (None, True, "x")}
    assert finite(values) == {"a": [None, 1.0], "b": {"3": None}, "c": [None, True, "x"]}
    write_json(tmp_path / "new" / "x.json", values)
    refuse = pytest.fail
    assert json.loads((tmp_path / "new" / "x.json").read_text(), parse_constant=refuse)["b"] == {"3": None}


def test_text_report_states_what_was_measured():
    text = text_report(SUMMARY)
    for part in ("17.50", "16.00 to 19.00", "512", "1/8.0", "1/3.0", "1/5.0", "batch 1, 2 threads", "2.50", "equal"):
        assert part in text, part
