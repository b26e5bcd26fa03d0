"""AOTInductor packages: a quantized network for a process without Python, written and compared with the network."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._inductor.package import package_aoti
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils._pytree import tree_map

from pqcad_ao import denoiser
from pqcad_ao.cached_unet import CachedUNet, ShallowStep, cut_at, network_and_plan
from pqcad_ao.compile.backend import Attention, chain_on_cpu, fuse
from pqcad_ao.compile.loaded import load_pt2
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
from pqcad_ao.diffusion.noise import process_of
from pqcad_ao.diffusion.process import check_counted, matching_sampler
from pqcad_ao.diffusion.schedule import steps_to_bind
from pqcad_ao.evaluate.sqnr import sqnr_db
from pqcad_ao.graph.capture import capture
from pqcad_ao.nn.state import required_state
from pqcad_ao.nn.timestep import Timestep
from pqcad_ao.passes.fold_timesteps import fold_timesteps
from pqcad_ao.passes.identities import drop_identities
from pqcad_ao.passes.join_linears import join_linears
from pqcad_ao.utils.checks import check_count, check_word
from pqcad_ao.utils.files import check_writable, write_whole
from pqcad_ao.utils.machine import COMPILED_FOR, cpu_flags
from pqcad_ao.utils.tracing import one_at_a_time


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
    compiled code and the ``pqcad::`` kernels; :func:`~pqcad_ao.compile.loaded.load_pt2` registers these, and no Python
    of this package runs between two steps. A process without Python needs the kernels' library (``pqcad_ao/ops/cpu/``
    and the operators' schemas) registered with the dispatcher before it loads the package.

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
    check_counted(timestep.span, "a package")
    if scheduler is not None:
        scheduler = matching_sampler(scheduler, timestep.num_train_timesteps, timestep.process)
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
        chain_on_cpu(program)
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
