"""A quantized network as a .pte: what it computes, what the file says about itself, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from networks import SHAPE, Plain, Small, cosine_scheduler, quick, sqnr
from torch import nn

from pqcad_ao import edge, quantize_
from pqcad_ao.edge import ParityError, PTEReport, PTESampler, export_fp32_pte, export_pte
from pqcad_ao.sampling import sample

pytest.importorskip("executorch.exir", reason="executorch is not installed: pip install pqcad_ao[edge]")

STEPS = 3


class Conditional(Plain):
    """Reads a text of two tokens, a scale inside a nested dictionary, and a class through a layer of weights alone."""

    def build(self):
        self.text, self.label = nn.Linear(6, 8), nn.Linear(4, 8)

    def forward(self, x, t, text, extra):
        t = torch.as_tensor(t, device=x.device).reshape(-1, 1).to(x.dtype) / 1000
        h = self.first(x) + (self.time(t) + self.label(extra["label"]))[:, :, None, None]
        return self.last(torch.nn.functional.silu(h * (1 + self.text(text).mean(1)[:, :, None, None])))


def conditioning(rows: int) -> dict:
    generator = torch.Generator().manual_seed(rows)
    text, label = torch.randn(rows, 2, 6, generator=generator), torch.randn(rows, 4, generator=generator)
    return {"text": text, "extra": {"label": label, "unused": None}}


def noise(count: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(count))


def quantize(model: nn.Module, **options) -> nn.Module:
    quantize_(model, quick(), scheduler=cosine_scheduler(), progress=False, **options)
    return model


@pytest.fixture(scope="module")
def small() -> Small:
    return quantize(Small(), sample_shape=SHAPE)


def export(unet: nn.Module, path: Path, **options) -> PTEReport:
    defaults = {"scheduler": cosine_scheduler(), "num_inference_steps": STEPS, "progress": False}
    return export_pte(unet, path, **{**defaults, "sample_shape": SHAPE, **options})


@pytest.fixture(scope="module")
def exported(small, tmp_path_factory) -> PTEReport:
    """Two images in one call."""
    return export(small, tmp_path_factory.mktemp("pte") / "small.pte", batch_size=2)


def test_program_predicts_what_the_network_predicts(small, exported):
    sampler = PTESampler(exported.path)
    assert sampler.timesteps.tolist() == [999, 666, 332]
    assert (sampler.sample_shape, sampler.batch_size, sampler.conditioning) == (SHAPE, 2, [])
    x_t = noise(2)
    for index, timestep in enumerate(sampler.timesteps):
        with torch.no_grad():
            assert sqnr(small(x_t, timestep.expand(2)), sampler.predict(x_t, index)) > 60


def test_sampler_fills_up_its_last_call(small, exported):
    eager = sample(small, cosine_scheduler(), noise(5), STEPS)
    images = PTESampler(exported.path).sample(noise(5))
    assert images.shape == (5, *SHAPE)
    assert sqnr(eager, images) > 60


def test_sampler_outlives_the_file_and_the_report(small, exported, tmp_path):
    path = tmp_path / "copy.pte"
    path.write_bytes(exported.path.read_bytes())
    sampler = PTESampler(path)
    path.unlink()
    first = sampler.predict(noise(2), 0)
    sampler.predict(noise(2) + 1, 1)
    assert torch.equal(first, sampler.predict(noise(2), 0)), "a later call does not write into an earlier prediction"


def test_file_holds_all_that_a_sampler_needs(exported):
    sampler = PTESampler(exported.path)
    values = {name: sampler._constant(name) for name in sampler._program.method_names - {"forward"}}
    scheduler = cosine_scheduler()
    assert json.loads(values["scheduler_config"])["beta_schedule"] == "squaredcos_cap_v2"
    assert (values["prediction_type"], values["clip_sample"]) == ("v_prediction", False)
    scheduler.set_timesteps(STEPS)
    x_t, v = noise(1), noise(1) / 2
    for t, a, a_prev in zip(scheduler.timesteps, values["alphas_cumprod"], values["alphas_cumprod_prev"], strict=True):
        x_0, epsilon = a.sqrt() * x_t - (1 - a).sqrt() * v, a.sqrt() * v + (1 - a).sqrt() * x_t
        by_hand = a_prev.sqrt() * x_0 + (1 - a_prev).sqrt() * epsilon
        assert torch.allclose(by_hand, scheduler.step(v, t, x_t).prev_sample, atol=1e-5)


def test_conditioning_becomes_inputs_of_the_program(tmp_path):
    unet = quantize(Conditional(), sample_shape=SHAPE, conditioning=conditioning(3))
    report = export(unet, tmp_path / "c.pte", batch_size=2, conditioning=conditioning(3))
    assert report.arithmetic["label"] == "W4: float32 products of the dequantized weights", "it reads no timestep"
    sampler = PTESampler(tmp_path / "c.pte")
    assert sampler.conditioning == ["['text']", "['extra']['label']"]
    given = conditioning(3)
    eager = sample(unet, cosine_scheduler(), noise(3), STEPS, conditioning=given)
    assert sqnr(eager, sampler.sample(noise(3), given)) > 60
    with pytest.raises(ValueError, match=r"this program takes .*label"):
        sampler.predict(noise(2), 0, {"text": given["text"][:2]})


def test_baseline_is_the_network(tmp_path):
    from executorch.runtime import Runtime

    unet = Small().train()
    report = export_fp32_pte(unet, tmp_path / "fp32.pte", batch_size=2, sample_shape=SHAPE)
    assert unet.training
    assert (report.bytes, report.sqnr_db, report.arithmetic) == ((tmp_path / "fp32.pte").stat().st_size, {}, {})
    program = Runtime.get().load_program((tmp_path / "fp32.pte").read_bytes())
    (output,) = program.load_method("forward").execute([noise(2), torch.tensor([3, 500])])
    with torch.no_grad():
        assert sqnr(unet(noise(2), torch.tensor([3, 500])), output) > 100
    with pytest.raises(ValueError, match=r"not one that pqcad_ao\.export_pte wrote"):
        PTESampler(tmp_path / "fp32.pte")


def test_program_of_another_function_is_not_written(small, tmp_path, monkeypatch):
    path = tmp_path / "small.pte"
    path.write_text("older")
    rewrite = edge._rewrite

    def wrong(*args):
        graph, arithmetic = rewrite(*args)
        graph.down_weight_0 = graph.down_weight_0.roll(1, 0)
        return graph, arithmetic

    small.train()
    monkeypatch.setattr(edge, "_rewrite", wrong)
    with pytest.raises(ParityError, match=r"dB for .* at timestep \d+, .* 3 of 3 timesteps are below"):
        export(small, path)
    assert small.training
    small.eval()
    assert [file.name for file in tmp_path.iterdir()] == ["small.pte"]
    assert path.read_text() == "older"


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "small.pte"
    path.write_text("older")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(edge.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        edge._write(path, b"newer")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["older"]
