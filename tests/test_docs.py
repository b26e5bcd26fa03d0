"""The documents: links lead somewhere, files and options that they name exist, and the README's examples run."""

import ast
import copy
import importlib
import json
import re
from itertools import chain
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from pipelines import TEXT

from pqcad_ao import plan
from pqcad_ao.cli.command import app

ROOT = Path(__file__).parents[1]
SKIPPED = {".venv", ".git", ".pytest_cache", "build", "shared"}
DOCUMENTS = sorted(path for path in ROOT.rglob("*.md") if not SKIPPED & set(path.relative_to(ROOT).parts[:-1]))
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
# where a file that is named without its whole path may stand
PLACES = ("", "pqcad_ao", "recipes")


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run_page(path: Path) -> None:
    """Run a page's Python blocks as one program; what fails names the page and the line in it."""
    text = path.read_text()
    lines = [""] * len(text.splitlines())
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        first = text.count("\n", 0, block.start(1))
        code = block[1].splitlines()
        lines[first : first + len(code)] = code
    exec(compile("\n".join(lines), str(path), "exec"), {"__name__": "__main__"})


def _prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def _anchors(text: str) -> set[str]:
    """A document's headings as GitHub makes anchors of them."""
    headings = re.findall(r"^#+ (.+)$", _prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str):
    path = ROOT / name
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", _prose(path.read_text())):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        if not target.exists() or (anchor and anchor not in _anchors(target.read_text())):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_named_exist(name: str):
    named = re.findall(r"`([\w.]+(?:/[\w.]+)+\.(?:py|cpp|h|yaml|swift|kt|json))`", _prose((ROOT / name).read_text()))
    places = [ROOT / place for place in PLACES]
    missing = [file for file in named if not any((place / file).exists() for place in (*places, (ROOT / name).parent))]
    assert missing == []


@pytest.mark.parametrize("name", NAMES)
def test_examples_import_what_is_there(name: str):
    for block in _blocks((ROOT / name).read_text(), "py(?:thon)?"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def _options() -> dict[str, set[str]]:
    """Every command, such as ``bench quality``, to the names of its options."""
    commands = {name: app[name] for name in app if not name.startswith("-") and name != "bench"}
    commands |= {f"bench {name}": app["bench"][name] for name in app["bench"] if not name.startswith("-")}
    return {
        name: {flag for argument in command.assemble_argument_collection() for flag in argument.names}
        for name, command in commands.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_commands_take_the_options_they_are_shown_with(name: str):
    options = _options()
    wrong = []
    for block in _blocks((ROOT / name).read_text(), ""):
        for line in re.findall(r"^pqcad (.+(?:\n {5,}.+)*)", block, re.MULTILINE):
            words = line.partition("#")[0].split()
            command = " ".join(words[:2]) if words[0] == "bench" else words[0]
            shown = set(re.findall(r"--[a-z][a-z.-]*(?<!\.)", line.partition("#")[0]))
            wrong += [f"{command} {option}" for option in shown if option not in options.get(command, ())]
    assert wrong == []


def test_the_readme_is_short_and_every_document_is_reached_from_it():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    documents = [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")]
    assert len(documents) >= 4
    assert [name for name in chain(documents, ["CONTRIBUTING.md"]) if f"({name})" not in text] == []


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run_page(ROOT / "docs" / "tutorial.md")


def test_the_notebook_shows_what_it_gave_and_no_complaints():
    notebook = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())
    stored = [out for cell in notebook["cells"] for out in cell.get("outputs", [])]
    assert stored
    assert [out for out in stored if out.get("name") == "stderr"] == []  # what the machine of that run complained of


@pytest.mark.slow
def test_the_notebook_runs():
    nbclient = pytest.importorskip("nbclient", reason="a notebook needs the extra docs")
    import nbformat

    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=500).execute()
    drawn = [out for cell in notebook.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(drawn) == 3


@pytest.mark.slow
def test_what_runs_where_is_what_the_code_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    support = importlib.import_module("support")
    assert support.PAGE.read_text().partition(support.MARK)[2] == "\n" + support.page()


@pytest.mark.slow
def test_getting_started_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run_page(ROOT / "docs" / "getting-started.md")


@pytest.mark.slow
def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run_page(ROOT / "README.md")
    assert {"picture.png", "my-model", "unet.pt2", "unet.pte", "run"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_the_readmes_stable_diffusion_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a tiny one in the place of that which would be downloaded, and an adapter of its own."""
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    pipeline = TEXT["sd"](tmp_path)
    adapted = copy.deepcopy(pipeline.unet)
    adapted.add_adapter(peft.LoraConfig(target_modules=["to_q"]))
    StableDiffusionPipeline.save_lora_weights("my-style", peft.get_peft_model_state_dict(adapted))
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", lambda name: pipeline)
    (block,) = (each for each in _blocks((ROOT / "README.md").read_text(), "py") if "StableDiffusion" in each)
    exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "lighthouse.png").is_file()
    assert plan(pipeline.unet).quantized
    assert pipeline.get_active_adapters()
