"""Progressive quantization, then distillation: ``python -m pqcad_ao.recipes.cad --model M --out DIR``.

On several processes: ``torchrun --nproc-per-node K -m pqcad_ao.recipes.cad ...``. Every process has the whole network
and a share of each batch and of all that is drawn and measured, so K processes learn what one does, up to the order of
floating-point sums. What is killed goes on with the same command and the same ``--out``.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import App

from pqcad_ao.config import CADConfig, PQCADConfig
from pqcad_ao.data import some_images
from pqcad_ao.denoiser import sample_shape
from pqcad_ao.distill import compress
from pqcad_ao.models import load_model, save_model
from pqcad_ao.nn.state import quantized_state
from pqcad_ao.utils.options import NONE_GIVEN, WRITTEN, command_line, options
from pqcad_ao.utils.processes import process_group

if TYPE_CHECKING:
    Quantizing = dict[str, Any]
    Distilling = dict[str, Any]
else:  # made at run time, where no type checker looks
    Quantizing = options(PQCADConfig, "Quantizing (PQCADConfig)", without=(), **WRITTEN)
    Distilling = options(CADConfig, "Distilling (CADConfig)", without=())


def run(
    *,
    model: str,
    out: Path,
    data: Path | None = None,
    device: str = "cpu",
    pq: Quantizing = NONE_GIVEN,
    cad: Distilling = NONE_GIVEN,
) -> None:
    """Progressive quantization, then distillation, on one process or, under torchrun, on several.

    Args:
        model: demo, or a folder with a full-precision diffusers UNet.
        out: folder that receives unet/ and scheduler/; keeps the work in work/.
        data: folder with real pictures for up to half of C_DC; none are needed.
        device: cpu, or cuda: a GPU for each process.
    """
    config, halving = PQCADConfig(**pq), CADConfig(**cad)
    with process_group(device) as (rank, place):
        teacher, scheduler = load_model(model)
        images = None
        if data is not None:
            images = some_images(data, sample_shape(teacher), halving.points, halving.seed)
        teacher.to(place)
        student, sampler = compress(teacher, scheduler, config, halving, images=images, folder=out / "work")
        if rank == 0:
            save_model(student, sampler, out)
            state = quantized_state(student)
            schedule = state.timestep.schedule if state else None
            print(f"{out}: {len(schedule or [])} steps, {state.plan.summary() if state else ''}")


def main(argv: list[str] | None = None) -> int:
    app = App(name="python -m pqcad_ao.recipes.cad", help_format="plaintext", version_flags=[])
    app.default(run)
    command, bound = command_line(app, sys.argv[1:] if argv is None else argv)
    try:
        command(*bound.args, **bound.kwargs)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
