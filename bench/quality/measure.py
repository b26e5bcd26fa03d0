"""How good the pictures are, row by row: FID, KID, precision and recall of full precision and of every way to quantize.

One sampler, one feature pipeline, the same noise for every row of a seed. Each row is learned and sampled once for a
seed and kept under the work folder, so that a run that was cut short goes on and another one can add rows.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pqcad_ao.bench.quality.rows import DEFAULT_ROWS, ROWS
from pqcad_ao.cache import cache_
from pqcad_ao.cached_unet import CachedUNet
from pqcad_ao.config import CacheConfig, CADConfig, Correction, PQCADConfig
from pqcad_ao.correct import correct_
from pqcad_ao.data import to_uint8
from pqcad_ao.denoiser import placement, sample_shape
from pqcad_ao.diffusion.process import settings_of
from pqcad_ao.diffusion.recording import record_calls
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.distill import check_distillation, distill_
from pqcad_ao.evaluate.features import RealFeatures, embedded_features
from pqcad_ao.evaluate.fid import image_quality
from pqcad_ao.evaluate.power import power_by_band
from pqcad_ao.evaluate.sqnr import trajectory_sqnr
from pqcad_ao.graph.capture import capture
from pqcad_ao.graph.work import multiply_adds
from pqcad_ao.models import load_model, save_model
from pqcad_ao.nn.state import quantized_state
from pqcad_ao.plan import plan
from pqcad_ao.quantize import quantize_
from pqcad_ao.utils.checks import check_count
from pqcad_ao.utils.files import digest, read_json, write_json
from pqcad_ao.utils.machine import check_device, cpu, describe, peak_rss_bytes, reset_peak_rss
from pqcad_ao.utils.tensor_files import write_tensors

CPU_BATCH, GPU_BATCH = 32, 512  # on a CPU more do not stay in the cache, and take longer for each image
TRAJECTORIES = 16  # images whose trajectories carry the SQNR
BOOTSTRAP = 200
DRAWN = 16  # images of each row that are kept, to be looked at
METHOD = 2  # of learning and sampling; counted up where what an older one left in a work folder no longer compares


def bench_quality(
    model: str = "demo",
    *,
    rows: list[str] | None = None,
    steps: int = 20,
    n: int = 2000,
    seeds: list[int] | None = None,
    work: str | Path = "quality-work",
    device: torch.device | str = "cpu",
    threads: int | None = None,
    features: tuple[nn.Module, RealFeatures] | None = None,
    options: dict[str, Any] | None = None,
    cad_options: dict[str, Any] | None = None,
    compiled: bool = False,
    progress: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure rows for seeds.

    Args:
        model: as for :func:`~pqcad_ao.models.load_model`.
        rows: names of ``ROWS``; ``DEFAULT_ROWS`` if None. steps: of the sampler. n: images behind each FID.
        seeds: of learning and of the noise alike; [0] if None.
        work: folder with what every row and seed leaves behind.
        device: where networks learn and sample.
        features: feature network and real statistics; the embedded ones if None.
        options, cad_options: further options of every row's :class:`PQCADConfig` and :class:`CADConfig`.
        compiled: sample through ``torch.compile``, quantized networks with ``backend="pqcad"``: for many images.
        say: receives a line for each result.

    Returns:
        ``rows``, one for each name and seed (name, title, fid, fid_ci, kid, precision, recall, ``power`` of
        :func:`~pqcad_ao.evaluate.power.power_by_band`, n, steps, seed, sqnr_db, the device, processor and threads that
        it was sampled on, and what making its network took); this run's
        versions, threads and processor; and ``pictures``, each row's title to its first images of the first seed.

    Raises:
        ValueError: a row that does not exist, sizes out of range, or steps or a scheduler that cannot be distilled.
    """
    rows, seeds = rows or DEFAULT_ROWS, [0] if seeds is None else seeds
    _check(rows, seeds, steps, n)
    if threads is not None:
        torch.set_num_threads(threads)
    network, real = features or embedded_features()
    place = check_device(device)
    teacher, scheduler = load_model(model)
    network = network.to(place)
    bench = _Bench(teacher.to(place), scheduler, steps, Path(work), options or {}, cad_options or {}, progress)
    sampling = _Sampling(n, compiled, network, real, progress)
    for name in rows:
        if (cad := bench.settings(name, seeds[0])[1]) is not None:  # before hours of work on other rows
            check_distillation(teacher, scheduler, cad)
    measured, pictures = [], {}
    for seed in seeds:
        for name in rows:
            result, drawn = sampling.result(bench, name, seed)
            if seed == seeds[0]:
                row = ROWS[name]
                title = f"{row.title}: {steps // row.part} steps, FID {result['fid']:.2f}"
                pictures[title] = load_file(drawn)["images"]
            measured.append(result)
            say(f"{name} seed {seed}: FID {result['fid']:.3f}, {result['n']} images, {result['steps']} steps")
    return {"rows": measured, "model": model, "pictures": pictures, **describe(torch.get_num_threads())}


def _check(rows: list[str], seeds: list[int], steps: int, n: int) -> None:
    """Raises ValueError: rows or counts of :func:`bench_quality` that there are not."""
    unknown = [name for name in rows if name not in ROWS]
    if unknown:
        raise ValueError(f"rows {', '.join(unknown)}: allowed are {', '.join(ROWS)}")
    check_count("n", n, 2)
    check_count("steps", steps)
    if not seeds:
        raise ValueError("seeds=[]: give at least one")
    parts = max(ROWS[name].part for name in rows)
    if steps % parts:
        raise ValueError(f"steps={steps}: these rows take 1/{parts} of them, give a multiple of {parts}")


@dataclass
class _Bench:
    """The rows' networks, as they were left in their folders or made now."""

    teacher: nn.Module
    scheduler: Any
    steps: int
    work: Path
    options: dict[str, Any]
    cad_options: dict[str, Any]
    progress: bool

    def settings(self, name: str, seed: int) -> tuple[PQCADConfig | None, CADConfig | None]:
        row = ROWS[name]
        # the steps that it will take, or takes since it was distilled
        walked = {"calibration_steps": self.steps // (ROWS[row.base].part if row.base else 1)}
        cad = None if row.cad is None else CADConfig(seed=seed, **{"steps": self.steps, **row.cad, **self.cad_options})
        return row.config(seed, {**walked, **self.options}), cad

    def home(self, name: str, seed: int) -> Path:
        """The folder of a row and seed, named by all that its network depends on."""
        base, settings = ROWS[name].base, self.settings(name, seed)
        key = digest(METHOD, settings[0], settings_of(self.scheduler), self.teacher.state_dict())
        if base is not None:
            row = ROWS[name]
            key = digest(settings, self.home(base, seed).name, *(o for o in (row.cache, row.correct) if o is not None))
        return self.work / f"{name}-{key[:8]}-seed{seed}"

    def network(self, name: str, seed: int) -> tuple[nn.Module, Any, dict[str, Any]]:
        """A row's network on the teacher's device, its sampler, and what making it took."""
        row, home, (config, cad) = ROWS[name], self.home(name, seed), self.settings(name, seed)
        home.mkdir(parents=True, exist_ok=True)
        unet, sampler = self.teacher, self.scheduler
        facts: dict[str, Any] = {}
        if row.base is not None:
            unet, sampler, facts = self.network(row.base, seed)
        if config is None and cad is None and row.correct is None:
            return unet, sampler, facts
        device, made = placement(self.teacher)[0], home / "made.json"
        if made.is_file():
            unet, sampler = load_model(home / "model")
            return unet.to(device), sampler, read_json(made)
        resumed, before = (home / "learning").exists(), facts.get("seconds", 0.0)
        reset_peak_rss()
        unet, begin = copy.deepcopy(unet), time.perf_counter()
        keeps: dict[str, Any] = {"folder": home / "learning", "progress": self.progress}
        if config is not None:
            quantize_(unet, config, scheduler=sampler, **keeps)
        if cad is not None:
            sampler = distill_(unet, self.teacher, sampler, cad, **keeps)
        if row.correct is not None:
            correct_(
                unet,
                Correction(seed=seed, **row.correct),
                reference=self.teacher,
                scheduler=sampler,
                num_inference_steps=self.steps // row.part,
                progress=self.progress,
            )
        state = quantized_state(unet)
        updates = (config.iterations if config is not None and config.learns else 0) + (
            cad.iterations * len(cad.runs) if cad is not None else 0
        )
        facts = {
            # with those of the network it started from; unknown where this process made the last part alone
            "seconds": None if resumed or before is None else before + time.perf_counter() - begin,
            "peak_rss_bytes": peak_rss_bytes(),
            "average_bits": plan(unet).average_bits if state else 32.0,
            "iterations": updates,
            "transitions": state.transitions if state else [],
            **(_learned(state, self.teacher) if config is not None else {}),
        }
        save_model(unet, sampler, home / "model")
        write_json(made, facts)
        return unet, sampler, facts

    @cached_property
    def macs(self) -> int:
        """Multiply-adds of a sample in a step of the teacher, which are those of every row's network."""
        return multiply_adds(capture(self.teacher, sample_shape(self.teacher), {}).graph)

    def cached(self, unet: nn.Module, scheduler: Any, steps: int, config: CacheConfig) -> CachedUNet:
        """A row's network, which keeps features between steps from now on."""
        reference = None if unet is self.teacher else self.teacher
        unet = copy.deepcopy(unet)
        given: dict[str, Any] = {"scheduler": scheduler, "num_inference_steps": steps, "reference": reference}
        cache_(unet, config, progress=self.progress, **given)
        return CachedUNet(unet)


def _learned(state: Any, teacher: nn.Module) -> dict[str, Any]:
    """What quantizing trained, as a part of the network's parameters, and the bytes of Adam's moments, 0 without; and
    the mean cosine between tasks' gradients at the start and at the end, where samples' weights were learned."""
    trained = state.facts.get("trained_parameters", 0)
    whole = sum(parameter.numel() for parameter in teacher.parameters())
    found = {"trained_share": trained / whole, "adam_bytes": state.facts.get("adam_bytes", 0)}
    return found | {name: value for name, value in state.facts.items() if name == "task_cosine"}


@dataclass
class _Sampling:
    """How every row is sampled, and what its pictures are compared with."""

    n: int
    compiled: bool
    network: nn.Module
    real: RealFeatures
    progress: bool

    @cached_property
    def key(self) -> str:
        """What the features depend on, for the names of files."""
        return digest(self.network.state_dict(), self.real.mean, self.real.cov)[:8]

    def result(self, bench: _Bench, name: str, seed: int) -> tuple[dict[str, Any], Path]:
        """A row of the result and the file of its first pictures, as they were left in its folder or made now."""
        steps = bench.steps // ROWS[name].part
        kind = f"steps{steps}-n{self.n}{'-compiled' if self.compiled else ''}-{self.key}"
        file = bench.home(name, seed) / f"{kind}.json"
        drawn = file.with_suffix(".safetensors")  # written first
        if file.is_file():
            return read_json(file), drawn
        result, images = self.measure(bench, name, seed, steps)
        write_tensors(drawn, {"images": to_uint8(images[:DRAWN])})
        write_json(file, result)
        return result, drawn

    def measure(self, bench: _Bench, name: str, seed: int, steps: int) -> tuple[dict[str, Any], Tensor]:
        """Make a row's network and sample it; the row of the result and all images."""
        row = ROWS[name]
        unet, scheduler, made = bench.network(name, seed)
        if row.solver is not None:
            scheduler = getattr(diffusers, row.solver).from_config(scheduler.config)
        macs = float(bench.macs)
        if row.cache is not None:
            unet = bench.cached(unet, scheduler, steps, CacheConfig(seed=seed, **row.cache))
            macs = unet.plan.mean_macs
        images, sqnr = images_of(bench.teacher, unet, scheduler, steps, self.n, seed, self.compiled, self.progress)
        quality = image_quality(images, self.network, self.real, seed=seed, bootstrap=BOOTSTRAP)
        result = {
            "name": name,
            "title": row.title,
            **quality,
            "power": power_by_band(images),
            "steps": steps,
            "seed": seed,
            "sampled": "compiled" if self.compiled else "eager",
            "cpu": cpu()["name"],
            "threads": torch.get_num_threads(),
            "device": str(placement(bench.teacher)[0]),
            "sqnr_db": sqnr if row.part == 1 else None,  # a distilled step is another function by design
            "gmacs_per_step": macs / 1e9,
            **made,
        }
        return result, images


def images_of(
    teacher: nn.Module, unet: nn.Module, scheduler, steps: int, n: int, seed: int, compiled: bool, progress: bool
) -> tuple[Tensor, float | None]:
    """``n`` images of a row's network, and its SQNR against the teacher on trajectories; None for the teacher."""
    shape = sample_shape(teacher)
    device, _ = placement(teacher)
    noise = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed)).to(device)
    runs: Any = unet
    if compiled:
        torch.compiler.reset()  # networks of one class share their code, and so its limit of recompilations
        backend = "pqcad" if quantized_state(unet) else "inductor"
        if isinstance(unet, CachedUNet):
            unet.compile(backend=backend, dynamic=False)
        else:
            runs = torch.compile(unet, backend=backend, dynamic=False)
    batch = CPU_BATCH if device.type == "cpu" else GPU_BATCH
    images = sample(runs, scheduler, noise, steps, batch_size=batch, progress=progress).cpu()
    if unet is teacher:
        return images, None
    calls = record_calls(teacher, scheduler, noise[:TRAJECTORIES], steps)
    points = [(call.x_t, call.timesteps) for call in calls]
    if isinstance(unet, CachedUNet):
        return images, None  # what it answers hangs on the way, and not on a point alone
    return images, trajectory_sqnr(teacher, unet, points)["sqnr_db"]
