"""AOTInductor packages: a quantized network for a process without Python."""

import json
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor, nn
from torch._inductor.package import package_aoti
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import AOTICompiledModel  # torch 2.11 to 2.14
from torch.fx import GraphModule
from torch.utils._pytree import tree_map

from pqcad_ao import denoiser
from pqcad_ao.cached_unet import CachedUNet, ShallowStep, cut_at, network_and_plan
from pqcad_ao.compile.backend import Attention, fuse
from pqcad_ao.config import MAX_BATCH
from pqcad_ao.denoiser import (
    Denoiser,
    check_conditioning,
    evaluation_mode,
    placement,
    predict,
    spread_rows,
    unguided,
)
from pqcad_ao.diffusion.cache_plan import CachePlan
from pqcad_ao.diffusion.cache_walk import Walk
from pqcad_ao.diffusion.correction import CorrectionTable
from pqcad_ao.diffusion.noise import process_of
from pqcad_ao.diffusion.process import matching_sampler, sampler_of
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.diffusion.schedule import steps_to_bind
from pqcad_ao.evaluate.sqnr import sqnr_db
from pqcad_ao.graph.capture import capture
from pqcad_ao.nn.state import required_state
from pqcad_ao.nn.timestep import Timestep, check_timesteps
from pqcad_ao.ops.cpu import loader
from pqcad_ao.passes.fold_timesteps import fold_timesteps
from pqcad_ao.passes.identities import drop_identities
from pqcad_ao.passes.join_linears import join_linears
from pqcad_ao.utils.checks import check_count, check_word
from pqcad_ao.utils.files import check_writable, write_whole
from pqcad_ao.utils.machine import COMPILED_FOR, cpu_flags, missing_features
from pqcad_ao.utils.tracing import one_at_a_time

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def export_pt2(
    unet: nn.Module,
    path: str | Path,
    *,
    scheduler=None,
    num_inference_steps: int | None = None,
    batch_size: int | None = None,
    conditioning: dict[str, Any] | None = None,
    sample_shape: tuple[int, int, int] | None = None,
    cache: CachePlan | Literal["own"] | None = "own",
    attention: Attention = "float32",
    min_sqnr_db: float = 25.0,
    seed: int = 0,
) -> Path:
    """Compile a quantized network ahead of time into an AOTInductor package.

    By default it takes batches of 1 to 63 at any timesteps. With ``num_inference_steps`` it is bound to that schedule
    and to ``batch_size``: what depends on the timestep alone becomes a table with a row for each step.

    The package holds machine code for this machine's processor and the packed weights. What it calls at each step is
    compiled code and the ``pqcad::`` kernels; :func:`load_pt2` registers these, and no Python of this package runs
    between two steps. A process without Python needs the kernels' library (``pqcad_ao/ops/cpu/`` and the
    operators' schemas) registered with the dispatcher before it loads the package.

    The package holds one program, ``model``; with a cache plan two, each with the weights that it reads:
    ``full(x_t, timesteps, conditioning) -> (prediction, feature)`` and ``shallow(x_t, timesteps, conditioning, feature,
    scale, shift) -> prediction``, of the outermost blocks alone. What is loaded walks the plan.

    Args:
        unet: a network on the CPU that ``quantize_`` has quantized, or a
            :class:`~pqcad_ao.cached_unet.CachedUNet` of one.
        path: of the .pt2; written whole or not at all.
        scheduler: of the process that the network was quantized for; travels along, so that the loaded package can
            sample.
        num_inference_steps: steps of the schedule to bind it to, those of the cache plan where there is one.
        batch_size: of every call then; 1 if None.
        conditioning: keyword arguments of ``unet.forward`` with a row for each sample; they become inputs. Guidance in
            it is not part of the package, which ``sample`` calls twice a step under it.
        sample_shape: (C, H, W), for networks whose config does not say it.
        cache: the plan to follow; ``"own"``: the one that ``cache_`` measured on the network, if any; None: none.
        attention: "bfloat16" lets attention in a float32 network multiply numbers of 8 bits, which is faster. A 4-bit
            quantizer behind it rounds some values to the other side, so that results depart from the network's as far
            as ``min_sqnr_db`` allows.
        min_sqnr_db: what the package must reach against the network, on the median image of a few noisy inputs.
        seed: of those.

    Raises:
        ValueError: the network is not quantized by pqcad_ao, or not on the CPU; conditioning is missing; the scheduler
            is foreign, of another process or number of training timesteps, or walks other timesteps than the network
            was distilled for or the cache plan was measured for.
        OSError: ``path`` cannot be written. RuntimeError: torch.export cannot capture the network, or the package
            departs from it; then nothing is written.

    Example:
        >>> export_pt2(quantized, "unet.pt2", scheduler=scheduler, num_inference_steps=4, batch_size=2).name
        'unet.pt2'
    """
    check_word("attention", attention, Attention)
    unet, plan = network_and_plan(unet, cache)
    state = required_state(unet)
    device, dtype = placement(unet)
    if device.type != "cpu":
        raise ValueError(f"the network is on {device}: export_pt2 compiles for the CPU, write unet.to('cpu')")
    trained, continuous = state.timestep.num_train_timesteps, state.timestep.continuous
    scheduler = _scheduler(scheduler, state.timestep, num_inference_steps, batch_size)
    if plan is not None and num_inference_steps is not None:
        plan.check(scheduler.timesteps.tolist())
    path = check_writable(path)
    conditioning = unguided(check_conditioning(unet, conditioning))
    shape = denoiser.sample_shape(unet, sample_shape)
    generator = torch.Generator().manual_seed(seed)
    count = 4 if num_inference_steps is None else batch_size or 1
    x_t = torch.randn(count, *shape, generator=generator).to(dtype)
    rows = spread_rows(conditioning, torch.arange(count), count)
    facts = {
        "sample_shape": list(shape),
        "num_train_timesteps": trained,
        "continuous": continuous,
        "dtype": str(dtype).removeprefix("torch."),
        "scheduler_config": None if scheduler is None else scheduler.to_json_string(),
        "timesteps": None if num_inference_steps is None else scheduler.timesteps.tolist(),
        "batch_size": None if num_inference_steps is None else count,
        "processor": sorted(COMPILED_FOR & cpu_flags()),
    }
    if state.correction is not None:
        facts["correction"] = state.correction.to_dict()
    if plan is not None:
        facts["cache"] = plan.to_dict()
    with torch.no_grad(), evaluation_mode(unet), tempfile.TemporaryDirectory() as folder:
        if num_inference_steps is None:
            programs = _any_schedule(unet, plan, x_t, rows, continuous, attention)
            checked = torch.tensor([0, trained // 3, 2 * trained // 3, trained - 1])
        else:
            programs = _one_schedule(unet, plan, x_t, rows, scheduler.timesteps, attention)
            # upwards: a distilled network warns of a walk that leaves out timesteps
            checked = scheduler.timesteps[:: max(1, num_inference_steps // 4)].flip(0)
        built = Path(folder) / "unet.pt2"
        _build(programs, built, facts)
        package = load_pt2(built)
        _check_parity(unet, package, checked.tolist(), [], x_t, rows, min_sqnr_db)
        walk = package.begin_walk()
        if plan is not None and walk is not None:
            cached = CachedUNet(unet, plan).begin_walk()
            _check_parity(cached, walk, plan.timesteps, plan.refresh, x_t, rows, min_sqnr_db)
        write_whole(path, built.read_bytes())
    return path


def _scheduler(scheduler: Any, timestep: Timestep, num_inference_steps: int | None, batch_size: int | None) -> Any:
    """The sampler that travels along, or None; bound to its steps where there are ``num_inference_steps``.

    Raises:
        ValueError: as :func:`export_pt2` for a scheduler, steps or batches that do not go together.
    """
    if scheduler is not None:
        scheduler = matching_sampler(scheduler, timestep.num_train_timesteps, continuous=timestep.continuous)
    if num_inference_steps is not None:
        if scheduler is None:
            raise ValueError("num_inference_steps binds the package to a schedule: pass the scheduler as well")
        steps_to_bind(scheduler, num_inference_steps, timestep.schedule)
        process_of(scheduler).set_timesteps(num_inference_steps)
    elif batch_size is not None:
        raise ValueError(
            f"batch_size={batch_size} without num_inference_steps: a package of any schedule takes any batch"
        )
    if batch_size is not None:
        check_count("batch_size", batch_size, most=MAX_BATCH)
    return scheduler


def _check_parity(
    network: Callable[..., Tensor],
    package: Callable[..., Tensor],
    timesteps: list[Any],
    passed: list[Any],
    x_t: Tensor,
    rows: dict[str, Any],
    min_sqnr_db: float,
) -> None:
    """Raises RuntimeError: the package departs from the network, on the median image of all calls that are looked at.

    Args:
        timesteps: of the calls, one after the other. passed: those of them that are made and not looked at.
    """
    reached: list[float] = []
    for timestep in timesteps:
        at = torch.as_tensor(timestep).repeat(len(x_t))
        expected, given = predict(network, x_t, at, rows), package(x_t, at, **rows)
        if timestep not in passed:
            reached += [sqnr_db(a, b) for a, b in zip(expected.float(), given.float(), strict=True)]
    if not reached:
        return
    median = sorted(reached)[len(reached) // 2]
    if not median >= min_sqnr_db:
        raise RuntimeError(
            f"the package departs from the network: {median:.1f} dB SQNR on the median image, {min_sqnr_db} dB "
            "are asked for. Nothing was written"
        )


@one_at_a_time
def _any_schedule(
    unet: nn.Module, plan: CachePlan | None, x_t: Tensor, rows: dict[str, Any], continuous: bool, attention: Attention
) -> dict[str, ExportedProgram]:
    """The fused network's programs, ``f(x_t, timesteps, conditioning, ...)`` with a dynamic batch."""
    graph = capture(unet, tuple(x_t.shape[1:]), rows, continuous=continuous).graph
    timesteps = torch.arange(len(x_t), dtype=torch.float32 if continuous else torch.int64)
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    programs = {}
    for name, (program, inputs, lines) in _parts(graph, plan, (x_t, timesteps, rows)).items():
        fuse(program, attention)
        dynamic = tree_map(lambda value: {0: batch} if isinstance(value, Tensor) else None, inputs)
        programs[name] = _exported(program, inputs, lines, dynamic_shapes=(*dynamic, *({} for _ in lines)))
    return programs


@one_at_a_time
def _one_schedule(
    unet: nn.Module, plan: CachePlan | None, x_t: Tensor, rows: dict[str, Any], timesteps: Tensor, attention: Attention
) -> dict[str, ExportedProgram]:
    """As :func:`_any_schedule` for one batch size; in the place of timesteps a (1,) index of ``timesteps``."""
    captured = (x_t, torch.zeros(len(x_t), dtype=timesteps.dtype), rows)
    graph = torch.export.export(Denoiser(unet), captured).module(check_guards=False)
    programs = {}
    for name, (program, (_, _, *more), lines) in _parts(graph, plan, captured).items():
        drop_identities(program)
        placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
        fold_timesteps(program, placeholders[1], timesteps)
        fuse(program, attention)
        join_linears(program)
        program = GraphModule(program, program.graph)  # with the parameters that are still read, and no others
        programs[name] = _exported(program, (x_t, torch.zeros(1, dtype=torch.int64), *more), lines)
    return programs


def _parts(
    graph: GraphModule, plan: CachePlan | None, inputs: tuple[Any, ...]
) -> dict[str, tuple[GraphModule, tuple[Any, ...], tuple[Tensor, ...]]]:
    """The programs of a captured network by name, inputs of each, and the line that its last input is corrected by."""
    if plan is None:
        return {"model": (graph, inputs, ())}
    cut = cut_at(graph, plan)
    _, feature = cut.full(*inputs)
    line = (torch.ones(1, cut.feature_shape[0], 1, 1), torch.zeros(1, cut.feature_shape[0], 1, 1))
    return {"full": (cut.full, inputs, ()), "shallow": (cut.shallow, (*inputs, feature.contiguous()), line)}


def _exported(
    program: GraphModule, inputs: tuple[Any, ...], lines: tuple[Tensor, ...], **options: Any
) -> ExportedProgram:
    return torch.export.export(ShallowStep(program) if lines else program, (*inputs, *lines), **options)


@one_at_a_time
def _build(programs: dict[str, ExportedProgram], path: Path, facts: dict[str, Any]) -> None:
    """Compile the programs into one package, in which each describes it."""
    options = {"aot_inductor.package": True, "aot_inductor.metadata": {"pqcad": json.dumps(facts)}}
    files: dict[str, Any] = {}
    for name, program in programs.items():
        args, kwargs = program.example_inputs or ((), {})
        files[name] = torch._inductor.aot_compile(program.module(check_guards=False), args, kwargs, options=options)
    package_aoti(str(path), files)


def _facts(path: Path) -> dict[str, Any]:
    """What the exporter wrote into a package, read before any of its code is loaded.

    Raises:
        ValueError, BadZipFile: it is no such package, or a part of it is not what its checksum says.
    """
    with ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} in it is not what was written")
        for name in archive.namelist():
            values = json.loads(archive.read(name)) if name.endswith("_metadata.json") else None
            if isinstance(values, dict) and "pqcad" in values:
                return json.loads(values["pqcad"])
    raise ValueError("the exporter's description is not in it")


def _program(path: Path, name: str) -> Callable[..., Any]:
    """A program of a package. ``torch.export.pt2_archive`` would first try this machine's compiler, for a second."""
    return AOTICompiledModel(torch._C._aoti.AOTIModelPackageLoader(str(path), name, False, 1, -1))


class PT2UNet:
    """A package that :func:`export_pt2` wrote, called as ``f(x_t, timestep, **conditioning) -> prediction``.

    Attributes:
        sample_shape: (C, H, W). dtype: of x_t. scheduler: the sampler that was exported along, or None.
        num_train_timesteps: that the network was trained with. continuous: whether timesteps are fractions of a flow.
        correction: that :meth:`sample` applies, or None. plan: the cache plan that it follows, or None.
        timesteps: the schedule that the package is bound to, or None. batch_size: of every call, or None: 1 to 63.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            facts = _facts(path)
            self.sample_shape, self.dtype = tuple(facts["sample_shape"]), DTYPES[facts["dtype"]]
            self.num_train_timesteps, self.continuous = facts["num_train_timesteps"], facts["continuous"]
            self.timesteps, self.batch_size, config = facts["timesteps"], facts["batch_size"], facts["scheduler_config"]
            given = facts.get("correction")
            self.correction = None if given is None else CorrectionTable.from_dict(given)
            self.scheduler = None if config is None else sampler_of(config)
            given = facts.get("cache")
            self.plan = None if given is None else CachePlan.from_dict(given)
            missing = missing_features(facts.get("processor", ()))
            if not missing:
                loader.load()
                programs = ("model",) if self.plan is None else ("full", "shallow")
                self._models = [_program(path, name) for name in programs]
        except (OSError, BadZipFile, zlib.error, RuntimeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no package that pqcad_ao.export_pt2 wrote, or is damaged: {error}") from error
        if missing:
            raise ValueError(f"{path} was compiled for a processor with {', '.join(missing)}: export it on this one")

    def __call__(self, x_t: Tensor, timestep: Tensor | int, **conditioning: Any) -> Tensor:
        """The network's raw prediction, (B, C, H, W), computed in full.

        Args:
            x_t: (B, C, H, W). timestep: one for all, or (B,).
        """
        computed = self._run(0, x_t, timestep, conditioning)
        return computed if self.plan is None else computed[0]

    def begin_walk(self) -> Walk | None:
        """The package for one walk through the schedule by its cache plan, called as itself; None: it has no plan."""
        if self.plan is None:
            return None
        return Walk(self.plan, partial(self._run, 0), partial(self._run, 1), declared=True)

    def _run(self, model: int, x_t: Tensor, timestep: Tensor | int, conditioning: dict[str, Any], *kept: Tensor) -> Any:
        sizes = range(1, MAX_BATCH + 1) if self.batch_size is None else [self.batch_size]
        if tuple(x_t.shape[1:]) != self.sample_shape or len(x_t) not in sizes:
            batch = f"1 to {MAX_BATCH}" if self.batch_size is None else self.batch_size
            expected = f"({batch}, {', '.join(map(str, self.sample_shape))})"
            raise ValueError(f"x_t has shape {tuple(x_t.shape)}: this package takes {expected}")
        timesteps = torch.as_tensor(timestep).reshape(-1)
        check_timesteps(timesteps, self.num_train_timesteps, continuous=self.continuous)
        timesteps = timesteps.to(torch.float32 if self.continuous else torch.int64)
        if self.timesteps is None:
            timesteps = timesteps.expand(len(x_t)).contiguous()
        else:
            asked = set(timesteps.tolist())
            if len(asked) != 1 or not asked <= set(self.timesteps):
                raise ValueError(
                    f"timestep {sorted(asked)}: this package is bound to one of {self.timesteps} at a time"
                )
            timesteps = torch.tensor([self.timesteps.index(asked.pop())])
        # compiled code reads memory as it lay in the example, whatever the strides are
        with torch.no_grad():
            return self._models[model](
                x_t.to(self.dtype).contiguous(), timesteps, conditioning, *(value.contiguous() for value in kept)
            )

    def sample(self, noise: Tensor, num_inference_steps: int | None = None, **options: Any) -> Tensor:
        """Images from ``noise`` (N, C, H, W) as :func:`~pqcad_ao.diffusion.sampling.sample` draws them.

        Args:
            num_inference_steps: None: as many as the schedule has that the package is bound to.

        Raises:
            ValueError: the package has no scheduler, or another number of steps or images a call than is asked for.
        """
        if self.scheduler is None:
            raise ValueError("this package was exported without a scheduler: write export_pt2(..., scheduler=...)")
        bound = None if self.timesteps is None else len(self.timesteps)
        steps = bound if num_inference_steps is None else num_inference_steps
        if steps is None or (bound is not None and steps != bound):
            raise ValueError(
                f"num_inference_steps={num_inference_steps}: this package samples in {bound or 'any number'}"
            )
        if self.batch_size is not None and len(noise) % self.batch_size:
            raise ValueError(f"{len(noise)} images: this package takes {self.batch_size} a call, give a multiple of it")
        options.setdefault("batch_size", self.batch_size or MAX_BATCH)
        options.setdefault("correction", self.correction)
        return sample(self, self.scheduler, noise, steps, **options)


def load_pt2(path: str | Path) -> PT2UNet:
    """Load a package that :func:`export_pt2` wrote, and the kernels that it calls.

    A package is machine code, which runs in this process with all its rights: load those that you or people you trust
    have made, and no others. That a package describes itself as one of :func:`export_pt2`, and is as it was written, is
    looked at before its code is loaded. It is a guard against mistakes, not against people, who can write that, too.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no package of this project, damaged, or was compiled for another processor.

    Example:
        >>> path = export_pt2(quantized, "unet.pt2", scheduler=scheduler, num_inference_steps=4, batch_size=2)
        >>> load_pt2(path).sample(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 1, 8, 8])
    """
    return PT2UNet(path)
