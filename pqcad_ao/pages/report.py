"""The report of a run: one HTML file with everything in it, from the dictionary that the run returns."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from markupsafe import Markup
from torch import Tensor

from pqcad_ao.pages import charts, measured
from pqcad_ao.pages.environment import environment
from pqcad_ao.pages.pictures import grid, png, side_by_side
from pqcad_ao.utils.files import write_whole

# what comes of entries that are missing, or are not what this version writes there
OF_ANOTHER_VERSION = (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError, OverflowError)
LARGE = 8  # seeds that are shown large
ABSENT = {
    "pictures": "no pictures were kept, or latents alone",
    "quality": "no FID was measured",
    "size": "no sizes were measured",
    "speed": "nothing was timed",
    "network": "no plan was kept",
    "plan": "no plan was kept",
    "learning": "nothing was learned, or no log was kept",
    "run": "nothing says what this was run on",
}


def write_report(
    path: str | Path,
    result: Mapping[str, Any],
    *,
    pictures: Mapping[str, Tensor] | None = None,
    shown: Sequence[str] = (),
    log: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write a run's report: one file, nothing fetched from anywhere, readable wide and narrow, in light and in dark.

    What the run did not measure, or kept in another form than this version does, is named on the page as not there.

    Args:
        path: of the HTML file.
        result: what ``pqcad demo``, ``compress``, ``eval`` or ``bench`` returns, and writes with ``--json``.
        pictures: title to (N, C, H, W) images, uint8 or in [-1, 1]; the same place in each started from the same noise.
        shown: the titles to be put side by side, the reference first; if empty, the first and the last of
            ``pictures``. Their difference is that of the first two.
        log: a dictionary for each update of learning, as the lines of ``log.jsonl``.

    Raises:
        OSError: ``path`` cannot be written.
    """
    pictures = pictures or {}
    shown = list(shown) or list(dict.fromkeys([*list(pictures)[:1], *list(pictures)[-1:]]))
    rows = measured.plan_rows
    sections: dict[str, Callable[[], Any]] = {
        "pictures": lambda: _pictures(pictures, shown),
        "quality": lambda: measured.quality(result),
        "speed": lambda: measured.speed(result),
        "size": lambda: measured.sizes(result),
        "network": lambda: charts.network(rows(result)),
        "learning": lambda: charts.learning(log, result.get("transitions", [])),
        "plan": lambda: rows(result),
        "run": lambda: measured.facts(result),
    }
    templates, heading = environment(), measured.heading(result)
    found, missing = dict.fromkeys(sections, ""), {}
    for name, build in sections.items():
        try:
            value = build()
            if value:
                given = {name: value, "scale": charts.scale, **heading}
                found[name] = Markup(templates.get_template(f"{name}.html").render(given))
            else:
                missing[name] = ABSENT[name]
        except (*OF_ANOTHER_VERSION, TemplateError) as error:
            missing[name] = f"its part of the run is of another version, or damaged ({type(error).__name__}: {error})"
    missing |= {f"not measured: {name}": reason for name, reason in measured.skipped(result).items()}
    run = found.pop("run")
    page = templates.get_template("report.html").render(sections=found.values(), run=run, missing=missing, **heading)
    write_whole(Path(path), page.encode())


def _pictures(pictures: Mapping[str, Tensor], shown: Sequence[str]) -> dict[str, Any] | None:
    """The first seeds one by one, large; and every title's pictures as one grid."""
    if not all(images.shape[1] in (1, 3) for images in pictures.values()) or not pictures:
        return None
    columns = {title: pictures[title] for title in shown}
    return {
        "seeds": side_by_side(columns, LARGE),
        "grids": [(title, png(grid(images, LARGE))) for title, images in pictures.items()],
    }
