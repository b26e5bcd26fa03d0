"""A saved model's card says what it is, and a model on the hub is the model that was put there."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DConditionModel, UNet2DModel
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from networks import TINY_TEXT_UNET, TINY_UNET, cosine_scheduler

from pqcad_ao.models import load_model, push_to_hub, save_model
from pqcad_ao.nn.state import quantized_state
from pqcad_ao.pages.card import check_replaceable, write_card

QUALITY = {"fid": 2.934, "fid_ci": [2.62, 3.26], "n": 2000, "precision": 0.867, "recall": 0.846, "steps": 4}


def read(folder: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text of a folder's card, as the hub reads them."""
    card = ModelCard.load(folder / "README.md")
    return card.data.to_dict(), card.text


def code(text: str) -> str:
    return text.partition("```python\n")[2].partition("```")[0]


def test_the_card_of_a_quantized_network(quantized_unet: UNet2DModel, scheduler: DDIMScheduler, tmp_path: Path):
    state = quantized_state(quantized_unet)
    assert state is not None
    state.timestep.schedule = [999, 749, 499, 249]
    weights = save_model(quantized_unet, scheduler, tmp_path, quality=QUALITY)
    data, text = read(tmp_path)
    assert data == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusers", "pqcad_ao"],
    }
    for said in (
        "in W4A4, 4 steps",
        state.plan.summary(),
        f"{weights.stat().st_size:,} bytes",
        "999, 749, 499, 249",
        "FID 2.93 (2.62 to 3.26, 95 %), precision 0.867, recall 0.846; 2,000 pictures in 4 steps",
        "not known: that of what it was made from",
        "| stem | 1 | 8 | 8 |",
        "PQCADConfig(weight_bits=4",
    ):
        assert said in text, said


def test_a_card_says_how_to_load_and_run_it(
    quantized_unet: UNet2DModel, scheduler: DDIMScheduler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    save_model(quantized_unet, scheduler, "model")
    _, text = read(Path("model"))
    said: dict[str, Any] = {}
    exec(code(text).replace("path/to/this/folder", "model").replace("=20", "=2"), said)
    assert Path("picture.png").stat().st_size
    assert quantized_state(said["pipeline"].unet) is not None


def test_a_card_of_a_conditional_network_loads_it(tmp_path: Path):
    unet = UNet2DConditionModel(**TINY_TEXT_UNET)
    save_model(unet, cosine_scheduler(), tmp_path)
    data, text = read(tmp_path)
    assert data["pipeline_tag"] == "text-to-image"
    said: dict[str, Any] = {}
    exec(code(text).replace("path/to/this/folder", str(tmp_path)), said)
    assert torch.equal(said["unet"].conv_in.weight, unet.conv_in.weight)


def test_a_full_precision_network_has_a_card_without_bits(
    tiny_unet: UNet2DModel, quantized_unet: UNet2DModel, scheduler: DDIMScheduler, tmp_path: Path
):
    save_model(quantized_unet, scheduler, tmp_path)
    save_model(tiny_unet, scheduler, tmp_path)
    data, text = read(tmp_path)
    assert data["tags"] == ["diffusers"]
    assert "full precision" in text
    assert "W4A4" not in text
    assert "import pqcad_ao" not in text


def test_licence_and_base_model_are_handed_on(
    quantized_unet: UNet2DModel, scheduler: DDIMScheduler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    quantized_unet.register_to_config(_name_or_path="somebody/teacher")  # read from a hub
    save_model(quantized_unet, scheduler, "a")
    assert read(Path("a"))[0]["base_model"] == "somebody/teacher"
    card = Path("a/README.md")
    card.write_text(card.read_text().replace("---\n", "---\nlicense: cc-by-4.0\n", 1))
    save_model(*load_model("a"), "b")
    save_model(*load_model("b"), "b")
    assert read(Path("b"))[0] == {**read(Path("a"))[0], "license": "cc-by-4.0"}
    assert "| licence | cc-by-4.0 |" in read(Path("b"))[1]


def test_a_model_without_a_card_gets_one_when_it_is_saved_again(
    quantized_unet: UNet2DModel, scheduler: DDIMScheduler, tmp_path: Path
):
    save_model(quantized_unet, scheduler, tmp_path)
    (tmp_path / "README.md").unlink()
    save_model(*load_model(tmp_path), tmp_path / "again")
    assert not {"license", "base_model"} & set(read(tmp_path / "again")[0])


@pytest.mark.parametrize("name", ["demo", "demo-w4a6"])
def test_the_licence_of_the_embedded_networks_is_known(name: str, tmp_path: Path):
    save_model(*load_model(name), tmp_path)
    assert read(tmp_path)[0]["license"] == "mit"


@pytest.mark.parametrize("text", ["a readme", "---\nlicense: [\n---\n", "---\nlicense: 3\n---\n", "\xff"])
def test_somebodys_readme_stays_and_is_no_card(
    text: str, quantized_unet: UNet2DModel, scheduler: DDIMScheduler, tmp_path: Path
):
    (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
    save_model(quantized_unet, scheduler, tmp_path)
    assert (tmp_path / "README.md").read_bytes() == text.encode("latin-1")
    with pytest.raises(ValueError, match="was not written by pqcad_ao"):
        check_replaceable(tmp_path)
    assert not (tmp_path / ".saved").exists()
    save_model(*load_model(tmp_path), tmp_path / "again")
    assert "license" not in read(tmp_path / "again")[0]


@settings(max_examples=40)
@given(text=st.text(max_size=80) | st.text("license:[]{}&*!|>- \n'\"", max_size=40))
@example(text="license: " + "[" * 5000)
@example(text="license: mit\nlicense: mit")
def test_whatever_stands_in_a_readme_the_card_is_written(tmp_path_factory: pytest.TempPathFactory, text: str):
    teacher, folder = tmp_path_factory.mktemp("teacher"), tmp_path_factory.mktemp("model")
    (teacher / "README.md").write_text(f"---\n{text}\n---\n", encoding="utf-8", errors="replace")
    unet = UNet2DModel(**TINY_UNET)
    unet.register_to_config(_name_or_path=str(teacher))
    cosine_scheduler().save_pretrained(folder / "scheduler")
    write_card(unet, folder)
    assert read(folder)[0]["library_name"] == "diffusers"


def test_a_quality_without_a_number_of_pictures_is_refused(
    quantized_unet: UNet2DModel, scheduler: DDIMScheduler, tmp_path: Path
):
    with pytest.raises(ValueError, match=r"quality has fid: give what image_quality returns, fid, n"):
        save_model(quantized_unet, scheduler, tmp_path, quality={"fid": 3.0})
    assert list(tmp_path.iterdir()) == []


class Hub(ThreadingHTTPServer):
    """The part of the hub's HTTP interface that one commit of small files takes; keeps what was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files: dict[str, bytes] = {}
        self.made: list[dict[str, Any]] = []
        self.refused = False
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.commit = f"{self.address}/owner/name/commit/{'0' * 40}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.refused:
            return self._answer({"error": "not yours"}, 403)
        if self.path == "/api/repos/create":
            self.server.made.append(json.loads(sent))
            return self._answer({"url": f"{self.server.address}/owner/name"})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(sent)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self._answer({"files": files})
        if "/commit/" in self.path:
            for line in map(json.loads, sent.decode().splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self._answer({"success": True, "commitOid": "0" * 40, "commitUrl": self.server.commit})
        return self._answer({})

    def do_GET(self) -> None:
        self._answer({"id": "owner/name", "sha": "0" * 40, "siblings": []})

    def _answer(self, values: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    yield server
    server.shutdown()
    server.server_close()


def test_what_is_pushed_is_what_is_loaded(
    quantized_unet: UNet2DModel, scheduler: DDIMScheduler, hub: Hub, tmp_path: Path
):
    address = push_to_hub(quantized_unet, scheduler, "owner/name", quality=QUALITY, private=True, token="hf_x")
    assert address == hub.commit
    (made,) = hub.made
    assert (made["organization"], made["name"]) == ("owner", "name")
    for name, content in hub.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert 'from_pretrained("owner/name")' in read(tmp_path)[1]
    x_t, again = torch.randn(2, 1, 8, 8), DDIMPipeline.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again.unet(x_t, 500).sample, quantized_unet(x_t, 500).sample)


def test_a_hub_that_refuses_is_an_error_that_names_the_model(
    quantized_unet: UNet2DModel, scheduler: DDIMScheduler, hub: Hub
):
    hub.refused = True
    with pytest.raises(OSError, match="owner/name cannot be written on http://127"):
        push_to_hub(quantized_unet, scheduler, "owner/name", token="hf_x")
    assert hub.files == {}


def test_a_name_that_no_repository_has_is_refused_before_anything_is_sent(
    quantized_unet: UNet2DModel, scheduler: DDIMScheduler, hub: Hub
):
    with pytest.raises(ValueError, match="a b/c"):
        push_to_hub(quantized_unet, scheduler, "a b/c", token="hf_x")
    assert hub.made == []
