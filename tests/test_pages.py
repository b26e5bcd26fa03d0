"""Reports: what a run measured is on its page, what it did not is named there, and nothing is fetched from anywhere."""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pictures_and_tables import SUMMARY

from pqcad_ao.pages import charts, measured
from pqcad_ao.pages.pictures import side_by_side
from pqcad_ao.pages.report import write_report

RESULTS = Path(__file__).parents[1] / "bench" / "results"
VOID = {"meta", "img", "br", "link"}
PLAN = [
    {
        "fqn": "up.conv",
        "kind": "conv2d",
        "role": "skip_concat",
        "shape": [8, 16, 3, 3],
        "parameters": 1152,
        "weight_bits": 4,
        "activation_bits": None,
        "segments": [8, 8],
        "reason": "overrides['<glob>']",
        "sensitivity": 0.01,
    }
]
LOG = [
    {"update": k, "stage": "weights" if k < 5 else "activations", "bits": 8 if k < 3 else 4, "alpha": 1.0, "loss": 0.1}
    | {"momentum": None if k == 3 else 0.1}
    for k in range(10)
]
TRANSITIONS = [{"stage": "weights", "step": 3, "from_bits": 8, "to_bits": 4, "momentum": 0.1, "reason": "settled <b>"}]
RUN = {**SUMMARY, "plan": PLAN, "transitions": TRANSITIONS}
PICTURES = {"full": torch.zeros(10, 1, 4, 4), "between": torch.zeros(10, 1, 4, 4), "ours": torch.ones(10, 1, 4, 4)}


class Balanced(HTMLParser):
    """Raises where a tag is not closed, or another one is; keeps the headings and what is seen as text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[Any]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[Any]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if not {"style", "script"} & set(self.open):
            self.text += data


def written(folder: Path, result: dict[str, Any], **options: Any) -> tuple[str, Balanced]:
    write_report(folder / "report.html", result, **options)
    page = (folder / "report.html").read_text()
    return page, Balanced(page)


def test_a_page_holds_everything_and_fetches_nothing(tmp_path: Path):
    page, seen = written(tmp_path, RUN, pictures=PICTURES, log=LOG)
    assert not re.search(r"https?://|<link|@import|url\(|src=\"(?!data:)", page)
    expected = ["Pictures", "Quality", "Speed", "Size", "The network", "Learning", "Plan", "Not here", "Run"]
    assert seen.headings == expected
    for part in (
        "17.50 (16.00 to 19.00)",
        "512 pictures",
        "The machine was busy: other programs",
        "up.conv",
        "8+8",
        "8 → 4",
        "settled <b>",
        "multiplies <a> & <b>",
        "pqcad demo --out 'a <b>'",
        "overrides['<glob>']",
        "2.13.0",
        "not installed",
        "no compiler",
        "a processor",
        "3 layers: int8 products",
        "4.0 times as fast",
        "1/8.0",
    ):
        assert part in seen.text, part


def test_the_same_seeds_stand_side_by_side(tmp_path: Path):
    page, _ = written(tmp_path, RUN, pictures=PICTURES)
    seeds = page.split("<details>")[0]
    assert seeds.count("<img") == 8 * 3  # of ten pictures: the first of the titles, the last, and their difference
    assert page.count("<img") == 8 * 3 + 3  # and behind a click all of each title
    (first, *_) = side_by_side({"a": torch.zeros(1, 1, 2, 2), "b": torch.zeros(1, 1, 2, 2)}, 8)
    assert [title for title, _ in first] == ["a", "b", "the second less the first"]


def test_latents_are_no_pictures(tmp_path: Path):
    page, seen = written(tmp_path, RUN, pictures={"latents": torch.zeros(2, 4, 8, 8)})
    assert "<img" not in page
    assert "latents alone" in seen.text


@pytest.mark.parametrize("busy", [None, "other programs"])
def test_times_of_a_busy_machine_are_marked(tmp_path: Path, busy: str | None):
    result = {**{key: value for key, value in RUN.items() if key != "busy"}, **({"busy": busy} if busy else {})}
    page, seen = written(tmp_path, result)
    assert ('class="bars marked"' in page) == ("say little" in seen.text) == bool(busy)


@pytest.mark.parametrize("result", [{}, {"rows": []}, {"fid": None}, {"rows": [{"name": "a"}], "cpu": 1}])
def test_a_run_of_which_nothing_is_known_still_opens(tmp_path: Path, result: dict[str, Any]):
    _, seen = written(tmp_path, result)
    assert seen.headings == ["Not here"]
    for said in ("no pictures were kept", "no FID was measured", "nothing was timed", "no plan was kept"):
        assert said in seen.text


def _places(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested dictionaries and lists."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    below = [place for key, entry in entries for place in _places(entry, (*before, key))]
    return [*([before] if before else []), *below]


@settings(max_examples=60)
@given(place=st.sampled_from(_places(RUN)), put=st.sampled_from(["absent", None, "text", 3, [], {}]))
def test_a_run_of_another_version_still_opens(
    tmp_path_factory: pytest.TempPathFactory, place: tuple[Any, ...], put: Any
):
    result, (*path, last) = copy.deepcopy(RUN), place
    inner: Any = result
    for key in path:
        inner = inner[key]
    if put == "absent":
        del inner[last]
    else:
        inner[last] = put
    written(tmp_path_factory.mktemp("page"), result, pictures=PICTURES, log=LOG)


def test_what_cannot_be_read_is_named(tmp_path: Path):
    _, seen = written(tmp_path, {**RUN, "fid_ci": {}})
    assert "Quality" not in seen.headings
    assert "its part of the run is of another version" in seen.text


@pytest.mark.parametrize("name", ["quality-flow", "compile-ddpm-cifar10", "edge-ddpm-cifar10"])
def test_the_results_of_every_benchmark_make_a_page(tmp_path: Path, name: str):
    result = json.loads((RESULTS / f"{name}.json").read_text())
    page, seen = written(tmp_path, result)
    assert "another version" not in seen.text
    assert ("Quality" in seen.headings) == name.startswith("quality")
    assert ("Speed" in seen.headings) == (not name.startswith("quality"))
    assert page.count('class="bar ours"') >= 1


def test_one_network_measured_makes_a_page(tmp_path: Path):
    result = {
        "fid": 3.0,
        "fid_ci": [2.5, 3.5],
        "n": 2000,
        "precision": 0.9,
        "recall": None,
        "steps": 10,
        "model": "run",
    }
    _, seen = written(tmp_path, result)
    assert "3.00 (2.50 to 3.50)" in seen.text
    assert "precision" in seen.text
    assert "part of the real pictures" not in seen.text


@given(part=st.floats(0, 1), n=st.integers(1, 10**6))
def test_an_interval_holds_its_part(part: float, n: int):
    low, high = measured.interval(part, n)
    assert -1e-9 <= low <= part + 1e-9
    assert part - 1e-9 <= high <= 1 + 1e-9


def test_an_interval_is_wilsons():
    assert measured.interval(0.5, 100) == pytest.approx((0.404, 0.596), abs=1e-3)  # Wilson 1927; published tables


def test_bars_and_whiskers_stay_within():
    bars = [charts.Bar("a", 2.0, "2", 1.0, 5.0), charts.Bar("b", 4.0, "4")]
    assert charts.scale(bars) * 5.0 == 100
    assert charts.scale([]) == charts.scale([charts.Bar("a", 0.0, "0")]) == 0


def test_a_network_is_drawn_as_it_lies():
    names = (
        "conv_in",
        "down_blocks.0.a",
        "down_blocks.1.a",
        "mid_block.a",
        "up_blocks.0.a",
        "up_blocks.1.a",
        "conv_out",
    )
    drawn = charts.network([{**PLAN[0], "fqn": name} for name in names])
    assert drawn is not None
    bottoms = [layer["y"] + layer["height"] for layer in drawn["layers"]]
    levels = [round((bottom - charts.TALLEST) / charts.DEPTH) for bottom in bottoms]
    assert levels == [0, 0, 1, 2, 1, 0, 0]
    assert max(bottoms) <= drawn["height"]


def test_a_path_is_lifted_where_nothing_was_measured():
    assert charts.path([1.0, None, 2.0, 3.0]) == "M0 1.00M2 2.00L3 3.00"


def test_bits_are_drawn_as_stairs():
    assert charts.stairs([1.0, 1.0, 3.0, 3.0, 2.0]) == "M0 1.00H2V3.00H4V2.00H4"
