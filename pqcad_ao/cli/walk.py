"""Commands that measure how a network samples, and save it with what they found: cache and correct."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from pqcad_ao.cli.commands import Conditioning, Model, Steps, check_writable, conditioned, following, steps_of
from pqcad_ao.config import CacheConfig, Correction
from pqcad_ao.utils.options import COMMON, NONE_GIVEN, Count, Device, Flag, Shared, options

if TYPE_CHECKING:
    from torch import nn

    Keeping = dict[str, Any]
    Correcting = dict[str, Any]
else:  # made at run time, where no type checker looks
    Keeping = options(CacheConfig, "Keeping features (CacheConfig)")
    Correcting = options(Correction, "Correcting (Correction)", size=(Count, Parameter()))


def opened(model: str, steps: int | None, device: str, conditioning: Path | None) -> "tuple[nn.Module, dict[str, Any]]":
    """A network, and how it is sampled: scheduler, steps and conditioning."""
    from pqcad_ao.models import load_model

    unet, scheduler = load_model(model)
    unet.to(device)
    given = conditioned(unet, model, conditioning)
    return unet, {"scheduler": scheduler, "num_inference_steps": steps or steps_of(unet), "conditioning": given}


def cache(
    *,
    model: Model,
    out: Path,
    reference: str | None = None,
    steps: Steps = None,
    dry_run: Flag = False,
    conditioning: Conditioning = None,
    device: Device = "cpu",
    keeping: Annotated[Keeping, Parameter(name="*")] = NONE_GIVEN,
    common: Shared = COMMON,
) -> dict[str, Any]:
    """Measure at which sampling steps a network may keep its deep feature from the step before, and save it with that.

    For example, a network in full precision; a compressed one, corrected towards its teacher, and what that comes to:
        pqcad cache --model demo --out kept
        pqcad cache --model run --reference demo --out kept --schedule optimal
        pqcad cache --model run --reference demo --out kept --interval 3 --dry-run

    `pqcad sample` and `pqcad eval` follow the plan from then on.

    Args:
        out: folder that receives unet/ and scheduler/.
        reference: the full-precision network that --model was made from, towards whose feature the kept one is
            corrected.
        dry_run: print what a step costs, and about how many minutes the measuring would take; write nothing.
    """
    from pqcad_ao.cache import cache_
    from pqcad_ao.cli.forecast import forecast_cache
    from pqcad_ao.models import load_network, save_model

    config = CacheConfig(**keeping, seed=common.seed)
    if not dry_run:
        check_writable(out)
    unet, walked = opened(model, steps, device, conditioning)
    full = None if reference is None else load_network(reference).to(device)
    steps = walked["num_inference_steps"]
    if dry_run:
        return forecast_cache(unet, full, config, steps, walked["conditioning"])
    kept = cache_(unet, config, reference=full, **walked)
    save_model(unet, walked["scheduler"], out)
    print(f"{kept}\n{out}: samples in {steps} steps, {len(kept.refresh)} of them in full")
    macs = {"full_macs": kept.full_macs, "shallow_macs": kept.shallow_macs, "mean_macs": kept.mean_macs}
    return {"out": str(out), "steps": steps, "refresh": kept.refresh, "staleness": kept.staleness, **macs}


def correct(
    *,
    model: Model,
    reference: str,
    out: Path,
    steps: Steps = None,
    dry_run: Flag = False,
    conditioning: Conditioning = None,
    device: Device = "cpu",
    correcting: Annotated[Correcting, Parameter(name="*")] = NONE_GIVEN,
    common: Shared = COMMON,
) -> dict[str, Any]:
    """Fit, in closed form, what corrects a quantized network's sampling at each step, and save it with that.

    For example, a filter for each step; one factor for each, as PTQD has it, and how long that takes:
        pqcad correct --model run --reference demo --out corrected
        pqcad correct --model run --reference demo --out corrected --kind ptqd --dry-run

    Of a folder that `pqcad cache` wrote it is fitted with features kept. `pqcad sample`, `eval` and `export` apply it.

    Args:
        reference: the full-precision network that --model was made from.
        out: folder that receives unet/ and scheduler/.
        dry_run: print about how many minutes the fit would take; write nothing.
    """
    from pqcad_ao.cli.forecast import forecast_correction
    from pqcad_ao.correct import correct_
    from pqcad_ao.models import load_network, save_model

    config = Correction(**correcting, seed=common.seed)
    if not dry_run:
        check_writable(out)
    unet, walked = opened(model, steps, device, conditioning)
    full = load_network(reference).to(device)
    steps = walked["num_inference_steps"]
    if dry_run:
        return forecast_correction(unet, full, config, steps, walked["conditioning"])
    table = correct_(following(unet), config, reference=full, **walked)
    save_model(unet, walked["scheduler"], out)
    gains = table.filters.sum((2, 3))
    shown = f"{config.width}x{config.width}, means multiplied by {gains.min():.3f} to {gains.max():.3f}"
    print(f"{out}: {table.kind} of the {table.where} in {steps} steps, {shown}")
    found = {"kind": table.kind, "where": table.where, "timesteps": table.timesteps, "cached": table.cached}
    return {"out": str(out), "steps": steps, **found, "gains": gains.tolist(), "bias": table.bias.tolist()}
