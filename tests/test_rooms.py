"""The rooms of the house stand in the order of the data flow, and each imports only from those before it."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# In the order of the data flow. A room is a folder or one file of the library, "pqcad_ao" its face (``__init__``); what
# ``pyproject.toml`` maps into the package from beside it is a room, too. Nothing of the library stands behind
# ``bench`` and ``recipes`` but the command line, which offers them both.
ROOMS = [
    "utils",
    "config",
    "data",
    "denoiser",
    "graph",
    "diffusion",
    "ops",
    "nn",
    "prepare",
    "passes",
    "learn",
    "plan",
    "pipeline",
    "quantize",
    "distill",
    "cached_unet",
    "cache",
    "correct",
    "evaluate",
    "compile",
    "edge",
    "pages",
    "models",
    "registered",
    "pqcad_ao",
    "bench",
    "recipes",
    "cli",
]
BESIDE = ("passes", "bench", "recipes")  # folders that are imported as pqcad_ao's


def _modules() -> dict[str, Path]:
    """Every file by the name under which it is imported."""
    files = {path.relative_to(ROOT): path for path in (ROOT / "pqcad_ao").rglob("*.py")}
    for folder in BESIDE:
        files |= {"pqcad_ao" / path.relative_to(ROOT): path for path in (ROOT / folder).rglob("*.py")}
    return {".".join(name.with_suffix("").parts).removesuffix(".__init__"): path for name, path in files.items()}


MODULES = _modules()


def _imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and module of every import of our own, inside functions and under ``TYPE_CHECKING``, too.

    ``resources.files("pqcad_ao.room")``, which reads another room's data, counts as well.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are written in full"
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [path if path in MODULES else node.module or "" for path in paths]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("files", "resources.files"):
            package = ast.literal_eval(node.args[0])
            names = [package] if package != "pqcad_ao" else []  # the whole package's folder is no room
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "pqcad_ao")


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_every_room_has_its_place():
    assert {_room(module) for module in MODULES} == set(ROOMS)
    assert len(ROOMS) == len(set(ROOMS))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_room_imports_only_from_those_before_it(module: str):
    place = ROOMS.index(_room(module))
    upward = [
        f"line {line} imports {name}"
        for line, name in _imported(ast.parse(MODULES[module].read_text()))
        if ROOMS.index(_room(name)) > place
    ]
    assert upward == []


def test_no_files_import_each_other_in_a_circle():
    arrows = {
        module: {name for _, name in _imported(ast.parse(path.read_text())) if name != module}
        for module, path in MODULES.items()
    }
    assert set().union(*arrows.values()) <= MODULES.keys()
    TopologicalSorter(arrows).prepare()  # raises CycleError, which names them
