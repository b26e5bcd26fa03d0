"""The options of ``pqcad bench compile`` and what they run."""

from functools import partial
from pathlib import Path
from typing import Any

from pqcad_ao.utils.options import COMMON, Device, Names, Shared, Whole, Wholes


def bench_compile(
    *,
    model: str = "demo",
    batches: Wholes | None = None,
    device: Device = "cpu",
    rounds: Whole = 7,
    iterations: Whole | None = None,
    rows: Names | None = None,
    walk: Whole | None = None,
    plot: Path | None = None,
    common: Shared = COMMON,
) -> dict[str, Any]:
    """One UNet step under torch.compile and its peers.

    For example, on the processor, and on a GPU beside the GPU's own contenders:
        pqcad bench compile --model ddpm-cifar10 --batches 1,8,32
        pqcad bench compile --model sd15 --device cuda

    Args:
        model: demo, ddpm-cifar10 or sd15 (random weights), or a folder with a diffusers UNet; demo@64: of 64x64 pixels.
        batches: sizes with commas between; 1,8 if not given, on a GPU 1,16,64,256.
        device: cpu, or cuda for the GPU's own contenders.
        rounds: turns of each contender.
        iterations: timed steps in a turn; 3 if not given, on a GPU 10.
        rows: names with commas between; all if not given. A name that is not there is answered with those that are.
        walk: time whole pictures in this many steps, half of them in rows for distilled networks, and not single steps.
        plot: a picture that receives a bar chart.

    Raises:
        ValueError: as the benchmark, or options that the chosen device does not have.
    """
    from pqcad_ao.bench.compile import cpu, drawing, gpu
    from pqcad_ao.utils.files import write_json

    asked = {"batches": batches, "iterations": iterations, "rows": rows}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    given |= {"rounds": rounds, "seed": common.seed}
    if device == "cpu":
        files = {"json_path": common.json, "plot_path": plot}
        result = cpu.bench_compile(model, threads=common.threads, walk=walk, **files, **given)
        print(drawing.table(result))
        return result
    if plot or common.threads or walk:
        raise ValueError("--plot, --threads and --walk belong to --device cpu")
    if common.json:
        given["kept"] = partial(write_json, common.json)
    result = gpu.bench_compile_gpu(model, device=device, **given)
    print(gpu.table(result))
    return result
