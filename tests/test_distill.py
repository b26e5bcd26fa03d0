"""Distillation: what it learns from, what it remembers, what it refuses, and that a kill changes nothing."""

import copy
import json
import warnings

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from networks import SHAPE, TINY_UNET, Small, cosine_scheduler, quick, sqnr
from torch import nn

from pqcad_ao import CADConfig, PQCADConfig, compress, distill_, plan, quantize_
from pqcad_ao.denoiser import predict_float32
from pqcad_ao.diffusion import trajectories
from pqcad_ao.diffusion.ddim import DDIMSchedule
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.diffusion.schedule import teachable, timesteps_of
from pqcad_ao.diffusion.solvers import SOLVERS, unipc
from pqcad_ao.diffusion.trajectories import draw_trajectories
from pqcad_ao.learn import halving as engine
from pqcad_ao.learn import training
from pqcad_ao.learn.unfold import unfold
from pqcad_ao.models import load_model, save_model
from pqcad_ao.nn.files import load_quantized, save_quantized
from pqcad_ao.nn.layers import QuantizedLayer
from pqcad_ao.nn.state import quantized_state

TINY = {"steps": 4, "iterations": 20, "batch_size": 4, "points": 12, "generation_batch_size": 5}
PAPER = {"reference_solver": "ddim", "reference_substeps": 1, "renoised": True, "learning_rate": 2e-4}


def config(**options) -> CADConfig:
    return CADConfig(**{**TINY, **options})


@pytest.fixture(autouse=True)
def untrained(monkeypatch):
    """Networks of random weights denoise nothing; the check has its own tests."""
    monkeypatch.setattr(trajectories, "FARTHEST", float("inf"))


def student_of(reference: nn.Module, **options) -> nn.Module:
    student = copy.deepcopy(reference)
    shape = None if hasattr(student, "config") else SHAPE
    quantize_(student, quick(**options), scheduler=cosine_scheduler(), sample_shape=shape, progress=False)
    return student


def distill(student: nn.Module, reference: nn.Module, settings: CADConfig | None = None, **options) -> DDIMScheduler:
    options = {"scheduler": cosine_scheduler(), "progress": False, **options}
    shape = None if hasattr(student, "config") else SHAPE
    return distill_(student, reference, config=settings or config(), sample_shape=shape, **options)


def losses(student: nn.Module) -> list[float]:
    return [update.loss for update in quantized_state(student).distilled]


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


# ------------------------------------------------------------------------------------------------ what it learns


def test_unfolding_inverts_folding():
    reference = Small()
    student = student_of(reference)
    graph, _ = unfold(student, reference, SHAPE, {})
    x_t, timesteps = torch.randn(8, *SHAPE), torch.arange(8) * 120
    with torch.no_grad():
        assert sqnr(student(x_t, timesteps), graph(x_t, timesteps, {})) > 60


GOLDEN = [0.0376, 0.03639, 0.03312, 0.02987, 0.02744]  # means of four updates each


def test_golden_losses():
    reference = Small()
    student = student_of(reference)
    before = {row.fqn: (row.weight_bits, row.activation_bits) for row in plan(student).quantized}
    scales = {name: value.clone() for name, value in student.state_dict().items() if name.endswith("_scale")}
    distill(student, reference, config(**{**PAPER, "learning_rate": 5e-4}))
    state = student.state_dict()
    assert {name.rpartition(".")[2] for name in scales} == {"weight_scale", "input_scale"}
    assert all((state[name] != value).any() for name, value in scales.items()), "scales learn, too"
    found = losses(student)
    assert len(found) == 20
    means = [sum(found[first : first + 4]) / 4 for first in range(0, 20, 4)]
    assert means == pytest.approx(GOLDEN, rel=0.05)
    # it is still quantized, as its plan says
    assert {row.fqn: (row.weight_bits, row.activation_bits) for row in plan(student).quantized} == before
    assert all(isinstance(student.get_submodule(fqn), QuantizedLayer) for fqn in before)
    assert student.first.weight.dtype == torch.uint8


def sampler_of(prediction_type: str) -> DDIMScheduler:
    """Of betas that leave some signal at the first timestep, so that every kind of prediction is allowed."""
    return DDIMScheduler(
        beta_schedule="linear", prediction_type=prediction_type, timestep_spacing="trailing", clip_sample=False
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_networks_of_every_prediction_are_taught(prediction_type):
    reference, scheduler = Small(), sampler_of(prediction_type)
    student = copy.deepcopy(reference)
    quantize_(student, quick(), scheduler=scheduler, sample_shape=SHAPE, progress=False)
    untaught = copy.deepcopy(student)
    sampler = distill(student, reference, config(iterations=40, learning_rate=1e-3), scheduler=scheduler)
    assert sampler.config.prediction_type == prediction_type
    noise = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(5))
    wanted, flow = noise, DDIMSchedule.of(sampler, 4, substeps=2)
    for step in (0, 4):
        with torch.no_grad():
            wanted = unipc(reference, flow, wanted, torch.full((16,), step), 4)
    misses = [(sample(network, sampler, noise, 2) - wanted).square().mean() for network in (untaught, student)]
    assert misses[1] < 0.9 * misses[0]


def halving(reference: nn.Module, scheduler=None, student=None, number=0, **options) -> engine._Halving:
    """A halving, and no update made yet."""
    scheduler, settings = scheduler or cosine_scheduler(), config(**options)
    return engine._Halving(
        copy.deepcopy(reference) if student is None else student,
        reference,
        scheduler,
        draw_trajectories(reference, scheduler, SHAPE, settings, {}),
        settings,
        number,
        SHAPE,
    )


def loss_of_an_error(run: engine._Halving, step: int, error: float = 0.1) -> float:
    """The loss where all of a batch is at one step, and what the network says is off by ``error``."""
    x_t, steps, _, _ = run._batch(0)
    steps = torch.full_like(steps, step)
    end = run._flow(x_t, steps, {})
    run._batch = lambda number: (x_t, steps, end, {})
    v = run._target(end, x_t, steps)
    alpha, sigma = run.schedule.alpha_sigma(steps, x_t)
    x_0, noise = alpha * x_t - sigma * v, alpha * v + sigma * x_t
    right = {"epsilon": noise, "sample": x_0, "v_prediction": v}[run.schedule.prediction_type]
    graph = run.graph
    run.forward = lambda *given: 0 * graph(*given) + right + error
    run.first = None
    found = run.update().loss
    del run._batch, run.log[:]
    return found


def test_no_timestep_is_all_that_an_epsilon_network_learns():
    scheduler = sampler_of("epsilon")
    run = halving(Small(), scheduler, steps=20)
    errors = [loss_of_an_error(run, step) for step in range(0, 20, 2)]
    assert max(errors) < 0.4 * sum(errors)
    assert min(errors) > 0
    alpha = run.schedule.alphas[0:20:2]
    assert float(1 / alpha[0] ** 2 / (1 / alpha**2).sum()) > 0.8  # what it would be of v's plain error


def test_x_space_weighs_by_the_truncated_signal_to_noise_ratio():
    v, x = (halving(Small(), steps=10, space=space) for space in ("v", "x"))
    for step in range(0, 10, 2):
        alpha, sigma = float(v.schedule.alphas[step]), float(v.schedule.sigmas[step])
        error = loss_of_an_error(v, step)
        assert error == pytest.approx(0.01, rel=1e-3)
        # of x_0: sigma times v's, weighed by max(SNR, 1)
        assert loss_of_an_error(x, step) == pytest.approx(max((alpha / sigma) ** 2, 1) * sigma**2 * error, rel=1e-3)


def sampled(network, scheduler, x_t: torch.Tensor, step: torch.Tensor, steps: int, jumps: int) -> torch.Tensor:
    """Where diffusers' sampler of ``steps`` leads each sample from its own ``step`` in ``jumps`` of them."""
    scheduler.set_timesteps(steps)
    ends = []
    for row, at in zip(x_t.split(1), step.tolist(), strict=True):
        for t in scheduler.timesteps[at : at + jumps]:
            with torch.no_grad():
                row = scheduler.step(network(row, t.reshape(1)), t, row).prev_sample
        ends.append(row)
    return torch.cat(ends)


@pytest.mark.parametrize("renoised", [True, False])
def test_the_second_halving_aims_where_all_the_exact_steps_lead(renoised):
    reference, scheduler = Small(), cosine_scheduler()
    settings = {**PAPER, "number": 1, "halvings": 2, "steps": 8, "teacher_weight": 0.5, "renoised": renoised}
    run, teacher = halving(reference, **settings), halving(reference).graph
    x_t, step, end, _ = run._batch(0)
    assert set(step.tolist()) == {0, 2}  # of the four steps that the student takes before it
    wanted = sampled(reference, scheduler, x_t, 2 * step, 8, 4)
    torch.testing.assert_close(end, wanted, rtol=1e-3, atol=1e-4)
    own = sampled(lambda x, t: teacher(x, t, {}), scheduler, x_t, step, 4, 2)
    torch.testing.assert_close(run._walked(run.teacher, x_t, step, {}), own, rtol=1e-3, atol=1e-4)
    for arrived in (wanted, own):
        v = run._target(arrived, x_t, step)
        torch.testing.assert_close(run.schedule.ddim_step(v, x_t, step, 2), arrived, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip", [True, False])
def test_ddim_without_substeps_is_the_samplers_own_walk_to_the_bit(prediction_type, clip):
    reference = Small()
    scheduler = DDIMScheduler.from_config(sampler_of(prediction_type).config, clip_sample=clip)
    run = halving(reference, scheduler, **PAPER)
    x_t, step, end, _ = run._batch(0)
    schedule, x = DDIMSchedule.of(scheduler, 4), x_t
    for at in (step, step + 1):
        x = schedule.ddim_step(predict_float32(reference, x, schedule.timesteps[at], {}), x, at)
    assert torch.equal(end, x)
    expected = schedule.velocity(schedule.target_x_0(x, x_t, step, 2), x_t, step)
    assert torch.equal(run._target(end, x_t, step), expected)


RUNS = [(0, False, 2), (1, False, 2), (0, True, 4)]  # number, direct, jump


@pytest.mark.parametrize(("number", "direct", "jump"), RUNS)
def test_the_reference_walks_the_flow_over_each_of_the_students_steps(monkeypatch, number, direct, jump):
    options = {"steps": 8, "halvings": 2, "direct": direct, "reference_substeps": 5, "renoised": True}
    run, asked = halving(Small(), number=number, **options), []
    solve = SOLVERS["unipc"]
    monkeypatch.setitem(SOLVERS, "unipc", lambda *given: asked.append(given[1:]) or solve(*given))
    x_t, step, _, _ = run._batch(0)
    assert set(step.tolist()) <= set(range(0, 8 // 2**number, jump))
    ((schedule, start, at, stride),) = asked
    assert torch.equal(start, x_t)
    assert len(schedule.timesteps) == 81  # ten substeps, as it starts anew
    assert stride == jump * 10 * 2**number
    assert torch.equal(schedule.timesteps[at], run.schedule.timesteps[step])
    assert torch.equal(schedule.timesteps[at + stride], run.schedule.timesteps[step + jump])


@pytest.mark.parametrize(("number", "direct", "jump"), RUNS)
def test_the_ways_of_the_pictures_are_the_flow_and_no_update_walks_it(monkeypatch, number, direct, jump):
    options = {"steps": 8, "halvings": 2, "direct": direct, "reference_substeps": 5}
    reference, scheduler = Small(), cosine_scheduler()
    run = halving(reference, number=number, **options)
    noise = torch.stack([trajectories.noise_of(SHAPE, 0, row) for row in range(12)])
    flow, met = DDIMSchedule.of(scheduler, 8, substeps=5), [noise]
    start = torch.zeros(12, dtype=torch.int64)
    with torch.no_grad():
        unipc(reference, flow, noise, start, 40, lambda taken, x: met.append(x))
    x_t, step, end, _ = run._batch(0)
    monkeypatch.setattr(run, "_flow", lambda *given: pytest.fail("it walked"))
    rows = run._batch(0)[0]
    assert torch.equal(rows, x_t)
    finer = 40 * jump // 8 * 2**number  # of the flow's steps in one of the student's
    for row, at, arrived in zip(x_t, (step // jump * finer).tolist(), end, strict=True):
        (picture,) = [number for number in range(12) if torch.allclose(met[at][number], row, atol=1e-5)]
        torch.testing.assert_close(arrived, met[at + finer][picture], rtol=1e-4, atol=1e-5)


def test_real_pictures_are_walked_from_and_drawn_ones_are_not(monkeypatch):
    reference, scheduler = Small(), cosine_scheduler()
    real = torch.rand(4, *SHAPE) * 2 - 1
    mixed = draw_trajectories(reference, scheduler, SHAPE, config(points=4), {}, images=real)
    run = engine._Halving(Small(), reference, scheduler, mixed, config(points=4, batch_size=16), 0, SHAPE)
    walked, original = [], run._flow
    monkeypatch.setattr(run, "_flow", lambda x_t, *given: walked.append(x_t) or original(x_t, *given))
    x_t, step, end, _ = run._batch(0)
    torch.testing.assert_close(end, original(x_t, step, {}), rtol=0.05, atol=0.02)  # the way's is of the second order
    ((started),) = walked
    assert 0 < len(started) < 16
    on_a_way = torch.from_numpy(mixed.drawn).flatten(0, 1)
    for row in started:
        assert not any(torch.equal(row, other) for other in on_a_way)


@pytest.mark.parametrize("renoised", [True, False])
def test_injected_noise_is_on_top_and_the_target_leads_back(renoised):
    plain, noisy = (halving(Small(), batch_size=32, noise_injection=sigma, renoised=renoised) for sigma in (0.0, 0.2))
    (x_t, step, end, _), (moved, same, back, _) = plain._batch(0), noisy._batch(0)
    assert torch.equal(step, same)
    assert torch.equal(end, back)
    assert float((moved - x_t).std()) == pytest.approx(0.2, rel=0.1)
    found = noisy.schedule.ddim_step(noisy._target(back, moved, step), moved, step, 2)
    torch.testing.assert_close(found, end, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("batch_size", [3, 4, 7])
def test_every_step_is_learned_equally_often(batch_size):
    run = halving(Small(), steps=20, batch_size=batch_size)
    met = torch.cat([run._batch(number)[1] for number in range(10)])
    counts = met.bincount(minlength=20)[::2]
    assert counts.tolist() == [batch_size] * 10


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_target_is_where_the_full_precision_jumps_end(prediction_type):
    """A student that is the reference itself, asked for one jump, misses by what a longer step misses alone."""
    reference, scheduler = Small(), sampler_of(prediction_type)
    schedule, velocities = DDIMSchedule.of(scheduler, 4), DDIMSchedule.of(sampler_of("v_prediction"), 4)
    run = halving(reference, scheduler, **PAPER)
    x_t, step, arrived, _ = run._batch(3)
    assert step.tolist().count(0) == step.tolist().count(2) == 2  # balanced over the student's two steps
    with torch.no_grad():
        target = run._target(arrived, x_t, step)
        middle = schedule.ddim_step(reference(x_t, schedule.timesteps[step]), x_t, step)
        end = schedule.ddim_step(reference(middle, schedule.timesteps[step + 1]), middle, step + 1)
        x_0 = x_t * schedule.alpha_sigma(step, x_t)[0] - target * schedule.alpha_sigma(step, x_t)[1]
        torch.testing.assert_close(velocities.ddim_step(target, x_t, step, 2), end, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(schedule.target_x_0(end, x_t, step, 2), x_0, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"teacher_weight": 1.0, "reference_weight": 0.0},
        {"teacher_weight": 0.5},
        {"space": "x"},
        {"noise_injection": 0.1},
        {"renoised": True},
    ],
    ids=str,
)
def test_every_term_learns(options):
    reference = Small()
    student = student_of(reference)
    before = copy.deepcopy(student)
    distill(student, reference, config(**options))
    log = quantized_state(student).distilled
    assert (log[0].teacher is not None) == bool(options.get("teacher_weight"))
    assert (log[0].reference is not None) == bool(options.get("reference_weight", 1.0))
    assert all(update.loss > 0 for update in log)
    assert not same_weights(student, before)
    plain = copy.deepcopy(before)
    distill(plain, reference)
    assert losses(plain)[0] != pytest.approx(log[0].loss, rel=1e-3)  # the option changed what is learned


def test_a_full_precision_student_is_distilled_as_it_is(tiny_unet):
    student = copy.deepcopy(tiny_unet)
    distill(student, tiny_unet, config(learning_rate=1e-3))
    assert quantized_state(student) is None
    assert not same_weights(student, tiny_unet)
    schedule, missed = DDIMSchedule.of(cosine_scheduler(), 4), []
    x_t, step = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 2] * 4)
    with torch.no_grad():
        for unet in (tiny_unet, student):  # one jump of each against two of the teacher's
            x, at = schedule.ddim_step(tiny_unet(x_t, schedule.timesteps[step]).sample, x_t, step), step + 1
            end = schedule.ddim_step(tiny_unet(x, schedule.timesteps[at]).sample, x, at)
            one = schedule.ddim_step(unet(x_t, schedule.timesteps[step]).sample, x_t, step, 2)
            missed.append(float((one - end).square().mean()))
    assert missed[1] < 0.9 * missed[0]


def test_a_reference_in_bfloat16_teaches_as_well():
    reference = Small()
    student = student_of(reference)
    distill(student, reference.bfloat16(), config(iterations=2))
    assert all(0 < loss < 1 for loss in losses(student))


def test_conditioning_reaches_teacher_and_student():
    torch.manual_seed(0)
    plain = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    reference = UNet2DModel(**{**TINY_UNET, **plain}, num_class_embeds=3).eval()
    labels = {"class_labels": torch.tensor([0, 1, 2])}
    student = copy.deepcopy(reference)
    quantize_(student, quick(), scheduler=cosine_scheduler(), conditioning=labels, progress=False)
    distill(student, reference, config(renoised=True, teacher_weight=0.5), conditioning=labels)
    x_t, t = torch.randn(1, *SHAPE).expand(3, -1, -1, -1), torch.full((3,), 999)
    first, second, _ = student(x_t, t, class_labels=labels["class_labels"]).sample
    assert not torch.equal(first, second)


def test_frozen_networks_learn_all_the_same(tiny_unet):
    """A teacher is frozen by habit, and a student copied from it is too."""
    reference = Small().requires_grad_(False)
    student = student_of(reference)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with torch.no_grad():
        distill(student, reference)
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert {"norm.weight", "first.bias"} <= moved
    expected = student_of(Small())
    distill(expected, Small())
    assert same_weights(student, expected)
    plain = copy.deepcopy(reference)
    distill(plain, reference)
    assert not same_weights(plain, reference)


def test_a_bfloat16_network_with_conditioning_is_distilled():
    class Conditional(Small):
        def forward(self, x, t, text):
            return super().forward(x + text[:, :1, None, None], t)

    reference = Conditional().to(torch.bfloat16)
    student, text = copy.deepcopy(reference), torch.randn(5, 2).bfloat16()
    given = {"scheduler": cosine_scheduler(), "sample_shape": SHAPE, "conditioning": {"text": text}, "progress": False}
    quantize_(student, quick(), **given)
    sampler = distill_(student, reference, config=config(iterations=2, teacher_weight=0.5), **given)
    assert len(losses(student)) == 2
    noise = torch.randn(2, *SHAPE).to(torch.bfloat16)
    assert sample(student, sampler, noise, 2, conditioning={"text": text[:2]}).isfinite().all()


# ------------------------------------------------------------------------------------------------ what it remembers


@pytest.mark.parametrize(
    "spacing", ["leading", *(pytest.param(word, marks=pytest.mark.slow) for word in ("trailing", "linspace"))]
)
def test_the_saved_scheduler_walks_the_students_timesteps(tiny_unet, tmp_path, spacing):
    scheduler = DDIMScheduler.from_config(cosine_scheduler().config, timestep_spacing=spacing)
    student = student_of(tiny_unet)
    sampler = distill(student, tiny_unet, scheduler=scheduler)
    save_model(student, sampler, tmp_path)
    facts = json.loads((tmp_path / "pqcad.json").read_text())
    assert facts["timesteps"] == timesteps_of(sampler, 2)
    assert 4 <= facts["average_bits"] < 8
    pipeline = DDIMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    visited = []
    hook = pipeline.unet.register_forward_pre_hook(lambda module, args: visited.append(int(args[1])))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipeline(batch_size=1, num_inference_steps=2)
    assert visited == [999, 499] == timesteps_of(teachable(scheduler, 4, 1), 4)[::2]
    for other in (3, 4):
        with pytest.warns(UserWarning, match="distilled for 2 timesteps.*sample with num_inference_steps=2"):
            pipeline(batch_size=1, num_inference_steps=other)
    hook.remove()
    loaded, found = load_model(tmp_path)
    with pytest.warns(UserWarning, match=r"distilled for the timesteps .* use num_inference_steps=2"):
        sample(loaded, found, torch.randn(1, *SHAPE), 3)
    save_model(tiny_unet, scheduler, tmp_path)  # what is said of the network that was here goes with it
    assert not (tmp_path / "pqcad.json").exists()


def test_fewer_steps_than_it_was_distilled_for_are_warned_about(tiny_unet, tmp_path):
    student = student_of(tiny_unet)
    sampler = distill(student, tiny_unet, config(steps=8, iterations=1))
    pipeline = DDIMPipeline(student, sampler)
    pipeline.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(2):  # a walk that begins anew is none that goes back
            pipeline(batch_size=1, num_inference_steps=4)
    with pytest.warns(UserWarning, match="distilled for 4 timesteps.*goes from 999 to 499"):
        pipeline(batch_size=1, num_inference_steps=2)


def test_a_plain_module_remembers_its_schedule(tmp_path):
    reference = Small()
    student = student_of(reference)
    distill(student, reference)
    save_quantized(student, tmp_path / "student.safetensors")
    loaded = load_quantized(Small(seed=1), tmp_path / "student.safetensors")
    assert quantized_state(loaded).timestep.schedule == [999, 499]


def test_two_halvings_leave_a_quarter_of_the_steps():
    reference = Small()
    student = student_of(reference)
    sampler = distill(student, reference, config(halvings=2, iterations=6))
    assert quantized_state(student).timestep.schedule == [999]
    assert [update.stage for update in quantized_state(student).distilled] == ["halving 1"] * 6 + ["halving 2"] * 6
    assert sample(student, sampler, torch.randn(2, *SHAPE), 1).isfinite().all()


def test_both_halvings_can_be_taught_at_once():
    reference = Small()
    student = student_of(reference)
    settings = config(halvings=2, direct=True, iterations=6, teacher_weight=0.5)
    sampler = distill(student, reference, settings)
    assert quantized_state(student).timestep.schedule == [999]
    assert [update.stage for update in quantized_state(student).distilled] == ["2 halvings at once"] * 6
    assert sample(student, sampler, torch.randn(2, *SHAPE), 1).isfinite().all()
    one, other = student_of(reference), student_of(reference)  # of a single halving there is nothing to join
    distill(one, reference, config(iterations=2))
    distill(other, reference, config(iterations=2, direct=True))
    assert losses(one) == losses(other)


def test_compress_quantizes_and_distills(tiny_unet):
    before = copy.deepcopy(tiny_unet)
    pq = PQCADConfig(activation_bits=4, mode="ptq", calibration_points=16, timestep_groups=4)
    student, sampler = compress(tiny_unet, cosine_scheduler(), pq, config(iterations=4), progress=False)
    assert same_weights(tiny_unet, before)
    assert plan(student).quantized
    assert quantized_state(student).config.calibration_steps == 4
    assert sample(student, sampler, torch.randn(2, *SHAPE), 2).isfinite().all()


def test_compress_finds_out_what_does_not_fit_before_it_learns(tiny_unet, monkeypatch, tmp_path):
    monkeypatch.setattr("pqcad_ao.distill.quantize_", lambda *args, **options: pytest.fail("it began to quantize"))
    monkeypatch.setattr(trajectories, "FARTHEST", 0.0)
    for folder in (None, tmp_path):
        with pytest.raises(ValueError, match="it has other betas or another prediction_type"):
            compress(tiny_unet, cosine_scheduler(), quick(), config(), folder=folder, progress=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'device'"):
        compress(tiny_unet, cosine_scheduler(), quick(), config(), device="cpu")


def test_compress_leaves_out_what_a_filter_refuses(tiny_unet):
    refused = lambda module, fqn: fqn != "conv_in"  # noqa: E731
    student, _ = compress(
        tiny_unet, cosine_scheduler(), quick(), config(iterations=2), filter_fn=refused, progress=False
    )
    assert plan(student)["conv_in"].reason == "refused by filter_fn"
    assert isinstance(student.conv_in, nn.Conv2d)


# ------------------------------------------------------------------------------------------------ C_DC, and kills


# updates after a checkpoint, in either halving
@pytest.mark.parametrize("killed_at", [16, pytest.param(6, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, monkeypatch, killed_at):
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 4)
    reference = Small()
    settings = config(halvings=2, iterations=10, teacher_weight=0.5)
    undisturbed = student_of(reference)
    distill(undisturbed, reference, settings, folder=tmp_path / "undisturbed")
    original, made = engine._Halving.update, []

    def update(self):
        if len(made) == killed_at:
            raise KeyboardInterrupt
        made.append(1)
        return original(self)

    student = student_of(reference)
    before = copy.deepcopy(student)
    with monkeypatch.context() as patch:
        patch.setattr(engine._Halving, "update", update)
        with pytest.raises(KeyboardInterrupt):
            distill(student, reference, settings, folder=tmp_path / "killed")
    assert same_weights(student, before)
    assert quantized_state(student).timestep.schedule is None
    distill(student, reference, settings, folder=tmp_path / "killed")
    assert same_weights(student, undisturbed)
    assert losses(student) == losses(undisturbed)


@pytest.mark.parametrize("quantized", [True, False])
def test_layers_in_float_do_not_tell_a_resumed_run_from_another(tiny_unet, tmp_path, monkeypatch, quantized):
    """All of them learn here; a gradient that outlived its update would count in the next one's clipping."""
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 1)
    monkeypatch.setattr(training, "LARGEST_GRADIENT", 0.1)
    settings, original, kills = config(iterations=6), engine._Halving.update, []
    undisturbed = student_of(tiny_unet) if quantized else copy.deepcopy(tiny_unet)
    killed = copy.deepcopy(undisturbed)

    def update(self):
        if kills and len(self.log) == kills[0]:
            kills.pop(0)
            raise KeyboardInterrupt
        entry = original(self)
        assert all(parameter.grad is None for parameter in self.graph.parameters())
        return entry

    monkeypatch.setattr(engine._Halving, "update", update)
    distill(undisturbed, tiny_unet, settings)
    kills += [3]
    with pytest.raises(KeyboardInterrupt):
        distill(killed, tiny_unet, settings, folder=tmp_path)
    distill(killed, tiny_unet, settings, folder=tmp_path)
    assert same_weights(killed, undisturbed)


def test_another_runs_folder_is_refused(tmp_path):
    reference = Small()
    distill(student_of(reference), reference, config(iterations=2), folder=tmp_path)
    with pytest.raises(ValueError, match="is of another run"):
        distill(student_of(reference), reference, config(iterations=3), folder=tmp_path)
    with pytest.raises(ValueError, match="is of another run"):
        distill(student_of(reference), Small(seed=5), config(iterations=2), folder=tmp_path)
    with pytest.raises(ValueError, match="is of another run"):
        distill(student_of(reference), reference, config(iterations=2), images=torch.zeros(2, *SHAPE), folder=tmp_path)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 5}, "steps=5 cannot be halved 1 times"),
        ({"steps": 6, "halvings": 2}, "steps=6 cannot be halved 2 times: give a multiple of 4"),
        ({"iterations": 0}, "iterations=0"),
        ({"batch_size": 64}, "batch_size=64: allowed are whole numbers from 1 to 63"),
        ({"noise_injection": 1.5}, "noise_injection=1.5"),
        ({"reference_weight": 0.0}, "leave nothing to learn from"),
        ({"space": "epsilon"}, "space='epsilon'"),
        ({"seed": -1}, "seed=-1"),
        ({"check_betas": "no"}, "check_betas='no': write True or False"),
        ({"direct": 1}, "direct=1: write True or False"),
        ({"renoised": None}, "renoised=None: write True or False"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        CADConfig(**options)


def test_bad_networks():
    reference = Small()
    student = student_of(reference)
    with pytest.raises(ValueError, match="the reference is quantized"):
        distill(student, copy.deepcopy(student))
    with pytest.raises(ValueError, match="student and reference are one network"):
        distill(reference, reference)
    other = Small()
    other.first = nn.Conv2d(1, 8, 3, padding=1, bias=False)
    with pytest.raises(ValueError, match=r"another structure than the network: first\.bias"):
        distill(student, other)
    with pytest.raises(ValueError, match=r"another structure than the network: first\.bias"):
        distill(Small(), other)
    with pytest.raises(ValueError, match=r"images were given together with conditioning \(text\)"):
        distill(student, reference, images=torch.zeros(2, *SHAPE), conditioning={"text": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"images has shape \(0, 1, 8, 8\)"):
        distill(student, reference, images=torch.zeros(0, *SHAPE))
    for wrong in (torch.full((2, *SHAPE), 255, dtype=torch.uint8), torch.full((2, *SHAPE), torch.nan)):
        with pytest.raises(ValueError, match="give floating point numbers from -1 to 1"):
            distill(student, reference, images=wrong)
    with pytest.raises(ValueError, match="thresholding=True"):
        distill(student, reference, scheduler=DDIMScheduler(timestep_spacing="trailing", thresholding=True))
    with pytest.raises(ValueError, match="move both to one device"):
        distill(student, copy.deepcopy(reference).to("meta"))
    with pytest.raises(ValueError, match="500 training timesteps, the student was quantized for 1000"):
        distill(student, reference, scheduler=DDIMScheduler(num_train_timesteps=500, timestep_spacing="trailing"))


def test_what_cannot_be_distilled_is_said_before_anything_is_quantized(monkeypatch, tiny_unet):
    monkeypatch.setattr("pqcad_ao.distill.quantize_", lambda *args, **options: pytest.fail("the work began"))
    with pytest.raises(ValueError, match="DDPMScheduler draws noise"):
        compress(tiny_unet, DDPMScheduler(), cad=config(), progress=False)
    with pytest.raises(ValueError, match="images has shape"):
        compress(tiny_unet, cosine_scheduler(), cad=config(), images=torch.zeros(2, 3, 8, 8), progress=False)


class Exploding(Small):
    """Finite where the sampler's own steps and the pictures' noise are, and nowhere between."""

    def forward(self, x, t):
        between = (t + 1) % 250 != 0
        return super().forward(x, t) / torch.where(between, 0.0, 1.0).view(-1, 1, 1, 1)


def test_a_flow_that_leaves_the_finite_numbers_is_named():
    reference = Exploding()
    student = student_of(reference)
    before = copy.deepcopy(student)
    for settings, at in ((config(), "drawing C_DC"), (config(renoised=True), "walking its flow")):
        with pytest.raises(FloatingPointError, match=f"left the finite numbers while {at}: check the network's"):
            distill(student, reference, settings)
        assert same_weights(student, before)


def test_a_diverging_run_stops():
    reference = Small()
    with pytest.raises(FloatingPointError, match="distillation diverged in halving 1, update"):
        distill(student_of(reference), reference, config(learning_rate=1.0))
