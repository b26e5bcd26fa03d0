"""Classifier-free guidance: its two calls while a network is calibrated and while it is distilled."""

import copy
import warnings

import pytest
import torch
from networks import SHAPE, Small, cosine_scheduler, quick
from pipelines import CALLS, PROMPTS, TEXT, dit
from torch import Tensor

from pqcad_ao import CADConfig, distill_, load_quantized, quantize_, save_quantized
from pqcad_ao.denoiser import check_conditioning, predict, unguided
from pqcad_ao.diffusion.calibration import calibration_set
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.diffusion.solvers import ddim
from pqcad_ao.diffusion.trajectories import checked_trajectories
from pqcad_ao.learn.halving import _Halving
from pqcad_ao.pipeline import conditioning_of

SCALE = 3.0


class Labelled(Small):
    """A network that is called with a class, of which 0 is none."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return super().forward(x + 0.3 * labels.view(-1, 1, 1, 1), t)


def guidance(rows: int = 4, scale: float = SCALE) -> dict:
    labels = 1 + torch.arange(rows) % 2
    return {"labels": labels, "guidance_scale": scale, "negative": {"labels": torch.zeros_like(labels)}}


def test_a_guided_prediction_is_the_pipelines_formula():
    network, x, t = Labelled(), torch.randn(4, *SHAPE), torch.tensor([1, 200, 500, 900])
    given = guidance()
    prompt, negative = network(x, t, given["labels"]), network(x, t, torch.zeros(4))
    assert torch.equal(predict(network, x, t, given), negative + SCALE * (prompt - negative))
    torch.testing.assert_close(predict(network, x, t, {**given, "guidance_scale": 1.0}), prompt)


def test_guided_samples_are_those_of_diffusers():
    pipeline, labels = dit(), torch.tensor([3, 7])
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(2)])
    pipeline.set_progress_bar_config(disable=True)
    seen: list[Tensor] = []
    pipeline.vae.decode = lambda latents: seen.append(latents) or copy.copy(DECODED)
    pipeline(
        class_labels=labels.tolist(),
        guidance_scale=SCALE,
        num_inference_steps=4,
        generator=[torch.Generator().manual_seed(n) for n in range(2)],
        output_type="np",
    )
    negative = {"class_labels": torch.full((2,), 1000)}
    conditioning = {"class_labels": labels, "guidance_scale": SCALE, "negative": negative}
    latents = sample(pipeline.transformer, pipeline.scheduler, noise, 4, conditioning=conditioning)
    torch.testing.assert_close(latents / pipeline.vae.config.scaling_factor, seen[0], rtol=1e-4, atol=1e-5)


class _Decoded:
    sample = torch.zeros(2, 3, 8, 8)


DECODED = _Decoded()


def test_calibration_sees_both_calls_of_the_guided_walk():
    network, config = Labelled(), quick(mode="fixed", learning_points=64)
    points = calibration_set(network, cosine_scheduler(), SHAPE, config, guidance())
    assert points.conditioning.keys() == {"labels"}
    counts = torch.bincount(points.conditioning["labels"])
    assert len(counts) == 3
    assert 20 < counts[0] < 44
    plain = calibration_set(network, cosine_scheduler(), SHAPE, config, {"labels": guidance()["labels"]})
    first = points.timesteps == points.timesteps.max()
    assert torch.equal(points.x_t[first], plain.x_t[first])  # noise
    assert not torch.allclose(points.x_t[~first], plain.x_t[~first])
    quantize_(
        network, quick(), scheduler=cosine_scheduler(), sample_shape=SHAPE, conditioning=guidance(), progress=False
    )
    x, t = torch.randn(4, *SHAPE), torch.tensor([1, 200, 500, 900])
    assert predict(network, x, t, guidance()).isfinite().all()


def test_distillation_walks_and_teaches_guided_steps():
    reference, scheduler = Labelled(), cosine_scheduler()
    options = {"steps": 4, "iterations": 30, "batch_size": 8, "points": 16, "generation_batch_size": 8, "seed": 3}
    config = CADConfig(**options, reference_solver="ddim", reference_substeps=1, learning_rate=1e-3)
    keeps = {"folder": None, "callback": None, "progress": False}
    drawn = checked_trajectories(reference, scheduler, SHAPE, config, guidance(), images=None, **keeps)
    noise = torch.from_numpy(drawn.drawn[:, 0])
    expected = sample(reference, scheduler, noise, 4, conditioning=drawn.rows(torch.arange(16))[1])
    torch.testing.assert_close(torch.from_numpy(drawn.drawn[:, -1]), expected, rtol=1e-4, atol=1e-4)

    student = copy.deepcopy(reference)
    sampler = distill_(
        student, reference, scheduler, config, conditioning=guidance(), sample_shape=SHAPE, progress=False
    )
    noise = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(9))
    finely = sample(reference, scheduler, noise, 4, conditioning=guidance(32))

    def error(network) -> float:
        return float((sample(network, sampler, noise, 2, conditioning=guidance(32)) - finely).square().mean())

    assert error(student) < 0.8 * error(reference)


@pytest.mark.parametrize("mode", ["kept", "baked"])
def test_guidance_is_kept_or_baked_into_one_call(mode):
    reference, options = Labelled(), {"steps": 4, "iterations": 1, "batch_size": 8, "points": 8, "renoised": True}
    config = CADConfig(**options, reference_solver="ddim", reference_substeps=1, teacher_weight=1.0, guidance=mode)
    keeps = {"folder": None, "callback": None, "progress": False}
    pictures = checked_trajectories(reference, cosine_scheduler(), SHAPE, config, guidance(), images=None, **keeps)
    run = _Halving(copy.deepcopy(reference), reference, cosine_scheduler(), pictures, config, 0, SHAPE)
    x_t, step, end, rows = run._batch(0)
    with torch.no_grad():
        walked = ddim(lambda x, t: predict(reference, x, t, rows), run.schedule, x_t, step, 2)
    torch.testing.assert_close(end, walked, rtol=1e-4, atol=1e-4)
    forward, seen = run.forward, []

    def counted(x: Tensor, t: Tensor, given: dict) -> Tensor:
        seen.append(given["labels"])
        return forward(x, t, given)

    run.forward = counted
    update = run.update()
    assert update.teacher == pytest.approx(update.reference, rel=1e-3), "the student as it was is guided, too"
    assert [bool((labels == 0).all()) for labels in seen] == {"kept": [False, True], "baked": [False]}[mode]


@pytest.mark.slow
def test_a_student_lands_in_one_call_where_guidance_does():
    reference, scheduler = Labelled(), cosine_scheduler()
    options = {"steps": 4, "halvings": 2, "iterations": 200, "batch_size": 16, "points": 64, "teacher_weight": 0.5}
    config = CADConfig(**options, reference_solver="ddim", reference_substeps=1, learning_rate=2e-3, guidance="baked")
    student, given = copy.deepcopy(reference), guidance(32)
    distill_(student, reference, scheduler, config, conditioning=guidance(), sample_shape=SHAPE, progress=False)
    noise = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(9))
    expected = sample(reference, scheduler, noise, 4, conditioning=given)

    def error(network, conditioning: dict) -> float:
        return float((sample(network, scheduler, noise, 1, conditioning=conditioning) - expected).square().mean())

    own = unguided(given)
    assert error(student, own) < 0.5 * min(error(reference, own), error(reference, given))


def test_a_quantized_student_remembers_that_guidance_is_baked_in(tmp_path):
    reference, scheduler = Labelled(), cosine_scheduler()
    student, options = copy.deepcopy(reference), {"sample_shape": SHAPE, "progress": False}
    quantize_(student, quick(), scheduler=scheduler, conditioning=guidance(), **options)
    length = {"steps": 4, "iterations": 1, "batch_size": 4, "points": 4, "teacher_weight": 1.0}
    baked, kept = (CADConfig(**length, guidance=mode) for mode in ("baked", "kept"))
    distill_(student, reference, scheduler, baked, conditioning=guidance(), **options)
    with pytest.raises(ValueError, match=r"does what guidance of 3 does, .* write CADConfig\(guidance='baked'\)"):
        distill_(student, reference, scheduler, kept, conditioning=guidance(), **options)
    save_quantized(student, tmp_path / "network.safetensors")
    loaded, noise = load_quantized(reference, tmp_path / "network.safetensors"), torch.randn(2, *SHAPE)
    assert loaded._pqcad_timestep.guidance == SCALE
    with pytest.warns(UserWarning, match=r"guidance of 3 does, and it is guided again\. .* write guidance_scale=1"):
        sample(loaded, scheduler, noise, 2, conditioning=guidance(2))
    own = guidance(2)["labels"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(loaded, scheduler, noise, 2, conditioning={"labels": own})
        loaded(noise[:1].repeat(2, 1, 1, 1), 999, own)  # two prompts, one noise
    with pytest.warns(UserWarning, match="guided again"):  # as pipelines call it under guidance
        loaded(noise[:1].repeat(2, 1, 1, 1), 499, own)


def test_a_student_that_does_without_is_not_guided_when_it_teaches():
    reference, scheduler = Labelled(), cosine_scheduler()
    student, options = copy.deepcopy(reference), {"sample_shape": SHAPE, "progress": False}
    quantize_(student, quick(), scheduler=scheduler, conditioning=guidance(), **options)
    student._pqcad_timestep.guidance = SCALE
    config = CADConfig(steps=4, iterations=1, batch_size=4, points=4, teacher_weight=1.0, guidance="baked")
    keeps = {"folder": None, "callback": None, "progress": False}
    pictures = checked_trajectories(reference, scheduler, SHAPE, config, guidance(), images=None, **keeps)
    run, taught = _Halving(student, reference, scheduler, pictures, config, 0, SHAPE), []
    run._walked = lambda teacher, x_t, step, given: taught.append(given) or x_t
    run.update()
    assert [given.keys() for given in taught] == [{"labels"}]


def test_baking_wants_guidance():
    with pytest.raises(ValueError, match=r"guidance='baked' without guidance in the conditioning"):
        distill_(Small(), Small(), cosine_scheduler(), CADConfig(guidance="baked"), sample_shape=SHAPE)
    with pytest.raises(ValueError, match=r"guidance='both': allowed are 'kept', 'baked'"):
        CADConfig(guidance="both")


def test_half_of_it_is_an_error():
    network, given = Labelled(), guidance()
    for name in ("guidance_scale", "negative"):
        part = {key: value for key, value in given.items() if key != name}
        with pytest.raises(ValueError, match=r"guidance wants guidance_scale=number and negative=\{\.\.\.\}"):
            check_conditioning(network, part)
    with pytest.raises(
        ValueError, match=r"negative\['labels'\] is of \[\[1\]\] and conditioning\['labels'\] of \[\[4\]\]"
    ):
        check_conditioning(network, {**given, "negative": {"labels": torch.zeros(1)}})


@pytest.mark.parametrize("name", [name for name in TEXT if name != "flux"])  # which is told the scale in one call
def test_a_pipelines_prompts_with_their_guidance(name, tmp_path):
    pytest.importorskip("transformers")
    pipeline = TEXT[name](tmp_path)
    conditioning = conditioning_of(pipeline, PROMPTS, {"guidance_scale": SCALE, **CALLS[name]})
    assert conditioning["guidance_scale"] == SCALE
    negative = conditioning["negative"]["encoder_hidden_states"]
    assert torch.equal(negative, negative[:1].expand_as(negative))
    assert len(conditioning["encoder_hidden_states"].unique(dim=0)) == len(PROMPTS)
    alone = conditioning_of(pipeline, PROMPTS, {"guidance_scale": 1.0, **CALLS[name]})
    torch.testing.assert_close(alone["encoder_hidden_states"], conditioning["encoder_hidden_states"])
    assert "negative" not in alone
