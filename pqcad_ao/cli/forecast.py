"""What ``--dry-run`` says: plan, bytes before and after, what a step costs, and minutes by what a few calls take."""

import copy
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pqcad_ao.config import CacheConfig, CADConfig, Correction, PQCADConfig
from pqcad_ao.correct import SUBSTEPS
from pqcad_ao.denoiser import Span, placement, predict_float32, sample_shape, spread_rows, unguided
from pqcad_ao.diffusion.cache_plan import uniform_starts
from pqcad_ao.diffusion.calibration import CalibrationSet, draw_steps
from pqcad_ao.diffusion.noise import Sampler, process_of
from pqcad_ao.diffusion.process import as_sampler, span_of
from pqcad_ao.distill import check_distillation
from pqcad_ao.graph.capture import Capture, capture
from pqcad_ao.graph.plan import Plan
from pqcad_ao.learn.progressive import learn
from pqcad_ao.learn.ptq import calibrate, prepare
from pqcad_ao.learn.sensitivity import POINTS, spare_bits
from pqcad_ao.nn.state import QuantizedState, insert_layers, make_layers, required_state
from pqcad_ao.nn.timestep import Timestep
from pqcad_ao.passes.cache_split import cache_split
from pqcad_ao.plan import planned
from pqcad_ao.prepare.annotate import PQCADQuantizer, insert_fake_quantizers
from pqcad_ao.utils.load import busy

ROWS = 8  # of the calls that are timed
UPDATES = 3  # that are made; the first is not timed


def forecast(
    unet: nn.Module, scheduler: Any, config: PQCADConfig, cad: CADConfig | None, conditioning: dict[str, Any]
) -> dict[str, Any]:
    """Print what ``quantize_``, or ``compress`` where there is a ``cad``, would come to; the network stays as it is.

    Raises: what they say before any work is done.
    """
    disturbed = busy()
    if cad is not None:
        check_distillation(unet, scheduler, cad, conditioning=conditioning)
        config = replace(config, calibration_steps=cad.steps)
    captured, resolved = planned(unet, config, None, sample_shape(unet), conditioning)
    sampler = as_sampler(scheduler)
    before, after = weight_bytes(unet), _quantized_bytes(unet, config, resolved, sampler.config.num_train_timesteps)
    seconds = _seconds(unet, sampler, captured, resolved, config, cad, conditioning)
    print(f"{resolved}\nweights: {before:,} bytes now, {after:,} afterwards")
    print(f"expected: {seconds / 60:.1f} minutes, an estimate from a call and two updates that were timed just now")
    if disturbed is not None:
        print(f"note: {disturbed}")
    found = {"bytes_before": before, "bytes_after": after, "expected_seconds": seconds}
    return {**found, "summary": resolved.summary(), "rows": resolved.to_list()}


def forecast_cache(
    unet: nn.Module, reference: nn.Module | None, config: CacheConfig, steps: int, conditioning: dict[str, Any]
) -> dict[str, Any]:
    """Print what steps would cost with features kept, and how long ``cache_`` would take; the network stays as it is.

    Raises: ValueError: the network has no such branch.
    """
    disturbed = busy()
    cut = cache_split(capture(unet, sample_shape(unet), conditioning).graph, config.branch)
    full = len(uniform_starts(steps, config.interval))
    mean = (full * cut.full_macs + (steps - full) * cut.shallow_macs) / steps
    walked = full + (steps - full) * cut.shallow_macs / cut.full_macs + steps * (config.schedule == "optimal")
    row = _seconds_of_a_row(unet, conditioning)
    target = row if reference is None else _seconds_of_a_row(reference, conditioning)
    seconds = config.points * (walked * row + (steps - full) * target)
    print(
        f"{steps} steps, {full} of them in full\n{cut.full_macs / 1e6:.4g} million multiply-adds in full, "
        f"{cut.shallow_macs / cut.full_macs:.1%} of them with a feature that is kept, {mean / cut.full_macs:.1%} in an "
        "average step"
    )
    macs = {"full_macs": cut.full_macs, "shallow_macs": cut.shallow_macs, "mean_macs": mean}
    return {"steps": steps, **macs, "expected_seconds": _expected(seconds, disturbed)}


def forecast_correction(
    unet: nn.Module, reference: nn.Module, config: Correction, steps: int, conditioning: dict[str, Any]
) -> dict[str, Any]:
    """Print how long ``correct_`` would take; the network stays as it is.

    Raises: ValueError: the network is not quantized.
    """
    disturbed = busy()
    distilled = required_state(unet).timestep.schedule is not None
    theirs = _seconds_of_a_row(reference, conditioning) * (SUBSTEPS if distilled else 1)
    seconds = config.points * steps * (_seconds_of_a_row(unet, conditioning) + theirs)
    return {"steps": steps, "expected_seconds": _expected(seconds, disturbed)}


def _expected(seconds: float, disturbed: str | None) -> float:
    """Print minutes by what was timed just now, and what disturbed that."""
    print(f"expected: {seconds / 60:.1f} minutes, an estimate from a call that was timed just now")
    if disturbed is not None:
        print(f"note: {disturbed}")
    return seconds


def weight_bytes(network: nn.Module) -> int:
    """Bytes of what a network saves."""
    return sum(tensor.nbytes for tensor in network.state_dict().values())


def _quantized_bytes(unet: nn.Module, config: PQCADConfig, resolved: Plan, num_train_timesteps: int) -> int:
    skeleton = copy.deepcopy(unet).to("meta")
    timestep = Timestep(config.timestep_groups, num_train_timesteps)
    insert_layers(skeleton, make_layers(skeleton, QuantizedState(config, resolved, timestep)), timestep)
    spare = 0 if config.target_bits is None else spare_bits(resolved, config.target_bits)  # whose layers are not known
    return weight_bytes(skeleton) + int(spare / 8)


def _seconds(
    unet: nn.Module,
    sampler: Sampler,
    captured: Capture,
    resolved: Plan,
    config: PQCADConfig,
    cad: CADConfig | None,
    conditioning: dict[str, Any],
) -> float:
    """Seconds of the whole run: rows that the network is called with, and updates, each times what one takes here."""
    process_of(sampler).set_timesteps(config.calibration_steps)
    span, generator = span_of(sampler), torch.Generator().manual_seed(config.seed)
    points = _points(unet, sampler, conditioning, max(ROWS, config.batch_size), generator)
    row = _seconds_of_a_row(unet, conditioning)
    _, trajectories = draw_steps(sampler.timesteps, span, config, generator)
    rows = trajectories * config.calibration_steps
    if config.learns or config.target_bits is not None:
        rows += len(resolved.quantized) * POINTS
    if config.learns:
        once, update = _seconds_of_learning(captured, resolved, points, config, span)
    else:
        once, update = _seconds_of_calibrating(captured, resolved, points, config, span), 0.0
    seconds = once + config.iterations * update
    if cad is not None:
        if not config.learns:
            # an update calls the network forwards, and backwards at about twice the price
            update = 3 * row * config.batch_size
        halvings, jump = len(cad.runs), cad.runs[0][0] // cad.runs[0][1]
        anew = 1 if cad.reference_solver == "ddim" else 2
        walked = 2 * (cad.teacher_weight > 0) + jump * anew * cad.substeps * cad.renoised
        rows += cad.points * cad.steps * (1 if cad.renoised else cad.substeps)
        rows += halvings * cad.iterations * cad.batch_size * walked
        seconds += halvings * cad.iterations * update * cad.batch_size / config.batch_size
    return seconds + rows * row


def _points(
    unet: nn.Module, sampler: Sampler, conditioning: dict[str, Any], count: int, generator: torch.Generator
) -> CalibrationSet:
    """Noise in place of C_QC, which takes as long."""
    device, _ = placement(unet)
    x_t = torch.randn(count, *sample_shape(unet), generator=generator).to(device)
    timesteps = sampler.timesteps[torch.randint(len(sampler.timesteps), (count,), generator=generator)].to(device)
    return CalibrationSet(x_t, timesteps, unguided(spread_rows(conditioning, torch.arange(count), count)))


@torch.no_grad()
def _seconds_of_a_row(unet: nn.Module, conditioning: dict[str, Any]) -> float:
    device, _ = placement(unet)
    x_t = torch.randn(ROWS, *sample_shape(unet), generator=torch.Generator().manual_seed(0)).to(device)
    guided, timesteps = spread_rows(conditioning, torch.arange(ROWS), ROWS), torch.full((ROWS,), 1, device=device)

    def call() -> Tensor:
        return predict_float32(unet, x_t, timesteps, guided).cpu()

    call()
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) / ROWS


def _seconds_of_learning(
    captured: Capture, resolved: Plan, points: CalibrationSet, config: PQCADConfig, span: Span
) -> tuple[float, float]:
    """What is done once, and an update on both sides."""
    graph = insert_fake_quantizers(captured.graph, PQCADQuantizer(resolved, "weights"))
    few = replace(config, mode="fixed", iterations=UPDATES, weight_ladder=[], activation_ladder=[])
    times = [time.perf_counter()]
    learn(graph, resolved, points, few, span, callback=lambda *_: times.append(time.perf_counter()))
    update = (times[-1] - times[1]) / (UPDATES - 1)
    return times[1] - times[0] - update, update


def _seconds_of_calibrating(
    captured: Capture, resolved: Plan, points: CalibrationSet, config: PQCADConfig, span: Span
) -> float:
    begin = time.perf_counter()
    calibrate(prepare(captured, resolved, config, span), resolved, points, config, progress=False)
    return time.perf_counter() - begin
