"""A pipeline of diffusers in place of its network: C_QC is what the pipeline hands to its network while it draws.

Nothing here knows a pipeline's kind. It is called as its users call it, with their prompts, and what its network is
given is recorded: the trajectories of its own scheduler, under guidance the rows of either prompt, and whatever
conditioning it makes of them.
"""

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from pqcad_ao.config import PQCADConfig
from pqcad_ao.denoiser import (
    EXTRA_CHANNELS,
    GUIDANCE_SCALE,
    NEGATIVE,
    evaluation_mode,
    placement,
    take_rows,
    time_scale,
    timestep_position,
    with_rows,
)
from pqcad_ao.diffusion.calibration import CalibrationSet, assign_trajectories, draw_steps, points_at
from pqcad_ao.diffusion.layer_inputs import LayerInputs
from pqcad_ao.diffusion.process import span_of
from pqcad_ao.utils.files import digest
from pqcad_ao.utils.processes import fill_in, in_turn, of_all, rank_and_world
from pqcad_ao.utils.progress import tqdm
from pqcad_ao.utils.tensor_files import read_tensors, write_tensors

NETWORKS = ("unet", "transformer")  # what pipelines call the component that denoises
PROBED = 2  # pictures of the call that shows how the network is called


def network_of(pipeline: DiffusionPipeline) -> nn.Module:
    """The network of a pipeline that denoises.

    Raises:
        ValueError: the pipeline has none, or several.
    """
    found = [name for name in pipeline.components if name.startswith(NETWORKS) and getattr(pipeline, name) is not None]
    if len(found) == 1:
        return getattr(pipeline, found[0])
    held = f"several networks, {' and '.join(found)}" if found else "neither a unet nor a transformer"
    raise ValueError(
        f"{type(pipeline).__name__} has {held} (its components: {', '.join(sorted(pipeline.components))}): hand over "
        "the network that is to be quantized, with conditioning={'name of forward's argument': tensor of some rows}"
    )


def conditioning_of(
    pipeline: DiffusionPipeline, prompts: list[str], call: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What a pipeline makes of prompts, a row for each, as the ``conditioning`` of ``distill_`` and ``quantize_``.

    Under guidance (``call={"guidance_scale": ...}``, or what the pipeline does by itself) with ``guidance_scale`` and
    ``negative``: of the rows that such pipelines hand over, the first half is that of the negative prompts.

    Raises:
        ValueError: as :class:`PipelineWalk`.
    """
    walk = PipelineWalk(pipeline, prompts, call, PQCADConfig())
    made = next(walk._calls(range(len(prompts)), probe=True))
    if len(made) == len(prompts):
        return made.conditioning
    negative, own = (take_rows(made.conditioning, rows) for rows in (slice(len(prompts)), slice(len(prompts), None)))
    scale = (call or {}).get(GUIDANCE_SCALE, walk.allowed[GUIDANCE_SCALE].default)
    return {**own, GUIDANCE_SCALE: scale, NEGATIVE: negative}


class PipelineWalk:
    """A pipeline and its prompts, as a source of C_QC.

    Args:
        prompts: what is drawn, each as often as the next, in an order that ``config.seed`` shuffles; None where the
            pipeline takes none.
        call: further arguments of the pipeline's call, such as ``guidance_scale``. A list with as many entries as there
            are prompts goes along with them; where there are no prompts, such as ``class_labels``.

    Attributes:
        network: that denoises. shape: of a sample. conditioning: some rows, as the pipeline makes them.
        scheduler: the pipeline's.

    Raises:
        ValueError: no network, no prompts for a pipeline that takes them, an argument that its call does not have,
            conditioning without a row for each sample, a scheduler with another scale of time.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, prompts: list[str] | None, call: dict[str, Any] | None, config: PQCADConfig
    ) -> None:
        self.pipeline, self.network, self.config = pipeline, network_of(pipeline), config
        self.allowed = inspect.signature(pipeline.__call__).parameters
        self.call = _checked(pipeline, self.allowed, prompts, call or {})
        lists = [value for value in self.call.values() if isinstance(value, list)]
        self.length = len(prompts) if prompts else max(map(len, lists), default=0)
        self.scheduler = pipeline.scheduler
        first = next(self._calls(range(PROBED), probe=True))
        _check_times(self.scheduler)
        _check_rows(pipeline, first)
        self.shape, self.conditioning, self._first = tuple(first.x_t.shape[1:]), first.conditioning, first
        # pictures of a call
        self.batch = max(1, config.calibration_batch_size * PROBED // len(first))

    def points(
        self,
        *,
        inputs: LayerInputs | None = None,
        folder: str | Path | None = None,
        callback: Callable[[str, int, int], None] | None = None,
        progress: bool = False,
    ) -> CalibrationSet:
        """C_QC as :func:`~pqcad_ao.diffusion.calibration.calibration_set` draws it, from the pipeline's own walks.

        What the network is given for one picture under guidance are two trajectories, of either prompt. Of several
        processes each draws some batches of pictures, and all get all points.

        Args:
            inputs: is given what layers are called with at each point, in the walk's own calls.
            folder: keeps the points of each batch of pictures, and those inputs; a batch that is there is not walked
                again.
            callback: called as ``callback("trajectories", done, total)``, of pictures.

        Raises:
            FloatingPointError: a trajectory leaves the finite numbers. ValueError: a file in ``folder`` is damaged.
        """
        inputs, draw, (rank, world) = inputs or LayerInputs({}), self._draw(), rank_and_world()
        inputs.hold(len(draw.step))
        kept: list[tuple[CalibrationSet, Tensor]] = []
        with tqdm(total=draw.pictures, desc="trajectories", disable=not progress, leave=False) as bar:
            for number, first in enumerate(range(0, draw.pictures, self.batch)):
                pictures = range(first, min(first + self.batch, draw.pictures))
                if number % world == rank:
                    kept.append(self._batch(pictures, draw, inputs, folder))
                bar.update(len(pictures))
                if callback is not None:
                    callback("trajectories", pictures.stop, draw.pictures)
        if world > 1:
            brought = in_turn(of_all([(part.on(torch.device("cpu")), numbers) for part, numbers in kept]))
            kept = [(part.on(placement(self.network)[0]), numbers) for part, numbers in brought]
            for values in inputs.values.values():
                fill_in(values)
        points = _joined(
            [part for part, _ in kept]
        )  # in the order of the walks, of which the first would stand for all
        order = torch.randperm(len(points), generator=torch.Generator().manual_seed(self.config.seed))
        inputs.choose(torch.cat([numbers for _, numbers in kept])[order])
        return points[order]

    def _batch(
        self, pictures: range, draw: "_Draw", inputs: LayerInputs, folder: str | Path | None
    ) -> tuple[CalibrationSet, Tensor]:
        """The points of some pictures, and which ones of the draw they are."""
        file = None if folder is None else self._file(Path(folder), pictures, inputs)
        if file is not None and file.is_file():
            return self._read(file, pictures, draw, inputs)

        def look(step: int, rows: range) -> None:
            inputs.expect([draw.at(step, pictures, rows)])

        with inputs.watched(self.network):
            found, numbers = draw.kept(list(self._calls(pictures, look)), pictures)
        if file is not None:
            self._write(file, found, numbers, inputs)
        return found, numbers

    def _draw(self) -> "_Draw":
        """Which point is taken at which timestep that the pipeline visits, from which trajectory."""
        calls = list(self._calls(range(PROBED), dry=True))
        visited, rows = [float(call.timesteps[0]) for call in calls], len(calls[0]) // PROBED
        generator = torch.Generator().manual_seed(self.config.seed)
        step, trajectories = draw_steps(torch.tensor(visited), span_of(self.scheduler), self.config, generator)
        pictures = -(-trajectories // rows)
        if self.config.learns or self.config.clusters:  # of a batch at least; otherwise nobody looks at the others
            pictures = max(self.batch, pictures)
        return _Draw(step, assign_trajectories(step, pictures * rows, generator), visited, rows, pictures)

    def _calls(
        self,
        pictures: range,
        look: Callable[[int, range], None] | None = None,
        *,
        probe: bool = False,
        dry: bool = False,
    ) -> Iterator[CalibrationSet]:
        """What the network is given at each timestep while the pipeline draws the pictures of these numbers.

        Args:
            look: called as ``look(step, rows)`` before each call, with the rows that it has of all at this timestep.
            probe: the first call alone, in which the network computes nothing.
            dry: the network computes its first call, and gives the same answer to all: no schedule depends on it.
        """
        # some call their network for each prompt by itself, and solvers of higher order more than once
        steps: list[list[CalibrationSet]] = []

        def record(network: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            call = self._recorded(args, kwargs)
            if not steps or float(steps[-1][0].timesteps[0]) != float(call.timesteps[0]):
                steps.append([])
            done = sum(map(len, steps[-1]))
            steps[-1].append(call)
            if look is not None:
                look(len(steps) - 1, range(done, done + len(call)))
            if probe:
                raise _Seen

        handle = self.network.register_forward_pre_hook(record, prepend=True, with_kwargs=True)
        try:
            with evaluation_mode(self.network), _without_bar(self.pipeline), _answering_once(self.network, dry):
                self.pipeline(**self._arguments(pictures))
        except _Seen:
            pass
        finally:
            handle.remove()
        for together in steps:
            yield _joined(together)

    def _arguments(self, pictures: range) -> dict[str, Any]:
        """Of the pipeline's call for these pictures; each has noise of its own, whatever batch it is drawn in."""
        seed = self.config.seed
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(seed)).tolist()
        given = {
            name: [value[order[number % self.length]] for number in pictures]
            if isinstance(value, list) and len(value) == self.length
            else value
            for name, value in self.call.items()
        }
        generators = [torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63) for number in pictures]
        usual = {
            "num_inference_steps": self.config.calibration_steps,
            "generator": generators,
            "output_type": "latent",
            **({} if self.length else {"batch_size": len(pictures)}),
        }
        return {name: value for name, value in usual.items() if name in self.allowed} | given

    def _recorded(self, args: tuple, kwargs: dict[str, Any]) -> CalibrationSet:
        """A call of the network, its arguments by name."""
        names = list(inspect.signature(self.network.forward).parameters)
        given = dict(zip(names, args, strict=False)) | kwargs
        x_t, timesteps = given.pop(names[0]), given.pop(names[timestep_position(self.network)])
        conditioning = {name: value for name, value in given.items() if value is not None and name != "return_dict"}
        channels = min(x_t.shape[1], getattr(self.network.config, "out_channels", None) or x_t.shape[1])
        if channels < x_t.shape[1]:  # a mask beside the sample
            conditioning[EXTRA_CHANNELS] = x_t[:, channels:]
        timesteps = torch.as_tensor(timesteps, device=x_t.device).reshape(-1).expand(len(x_t))
        if time_scale(self.network) != 1:
            timesteps = timesteps * (1 / time_scale(self.network))
        return CalibrationSet(x_t[:, :channels].clone(), timesteps, conditioning)

    def _file(self, folder: Path, pictures: range, inputs: LayerInputs) -> Path:
        """That keeps the points of a batch of pictures, named by all that they depend on."""
        scheduler = (
            repr(sorted(self.pipeline.scheduler.config.items(), key=str)),
            type(self.pipeline.scheduler).__name__,
        )
        drawn = (
            self.network.state_dict(),
            scheduler,
            self.call,
            self.conditioning,
            self.config,
            *inputs.layers.items(),
        )
        return folder / f"c_qc-{digest(*drawn, pictures.start, pictures.stop)}.safetensors"

    def _write(self, file: Path, found: CalibrationSet, numbers: Tensor, inputs: LayerInputs) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {str(number): leaf.cpu().contiguous() for number, leaf in enumerate(_tensors(found))}
        tensors |= {fqn: values[numbers] for fqn, values in inputs.values.items()}
        write_tensors(file, tensors, {"points": json.dumps(numbers.tolist())})

    def _read(self, file: Path, pictures: range, draw: "_Draw", inputs: LayerInputs) -> tuple[CalibrationSet, Tensor]:
        """As :meth:`_write` was given it. Raises ValueError: the file is damaged."""
        try:
            tensors, points = read_tensors(file, "points")
            numbers = draw.checked(points, pictures)
            device, _ = placement(self.network)
            like = _tensors(self._first)
            if len(tensors) != len(like) + len(inputs.values):
                raise ValueError(f"it holds {len(tensors)} tensors")
            x_t, timesteps, *rest = [tensors[str(number)].to(device) for number in range(len(like))]
            for value, one in zip([x_t, timesteps, *rest], like, strict=True):
                _check_like(value, one, len(numbers))
                if not value.isfinite().all():
                    raise ValueError("it holds NaN or infinity")
            if timesteps.tolist() != [draw.visited[step] for step in draw.step[numbers].tolist()]:
                raise ValueError("its points are at other timesteps")
            for fqn, values in inputs.values.items():
                _check_like(tensors[fqn], values, len(numbers))
                values[numbers] = tensors[fqn]
        except (ValueError, TypeError, KeyError) as error:  # the last of tensors that are not there
            raise ValueError(f"{file} is damaged ({error}): delete it, and it is made again") from error
        leaves, form = tree_flatten(self.conditioning)
        conditioning = tree_unflatten([rest.pop(0) if isinstance(leaf, Tensor) else leaf for leaf in leaves], form)
        return CalibrationSet(x_t, timesteps, conditioning), numbers


def _check_like(value: Tensor, like: Tensor, count: int) -> None:
    """Raises ValueError: a tensor of a file is not one of ``count`` rows such as another's."""
    if value.shape != (count, *like.shape[1:]) or value.dtype != like.dtype:
        raise ValueError(f"it holds {value.dtype} {tuple(value.shape)} in place of {count} {like.dtype} rows")


@dataclass(frozen=True)
class _Draw:
    """Where each point of a set is taken.

    Attributes:
        step, trajectory: (N,) int64, of each point: at which step, and from which trajectory.
        visited: the timestep of each step. rows: trajectories of a picture. pictures: how many are drawn.
    """

    step: Tensor
    trajectory: Tensor
    visited: list[float]
    rows: int
    pictures: int

    def at(self, step: int, pictures: range, rows: range) -> tuple[Tensor, Tensor]:
        """Which of some rows, of all that the network is given for some pictures at a step, are which points."""
        first = pictures.start * self.rows + rows.start
        end = pictures.start * self.rows + min(rows.stop, len(pictures) * self.rows)  # some solvers call again
        return points_at(self.step, self.trajectory, step, range(first, end))

    def kept(self, calls: list[CalibrationSet], pictures: range) -> tuple[CalibrationSet, Tensor]:
        """The points among the calls for a batch of pictures, and their numbers."""
        found, numbered = [], []
        for step, call in enumerate(calls):
            if not call.x_t.isfinite().all():
                raise FloatingPointError(
                    f"the pipeline left the finite numbers before its step {step + 1} (timestep "
                    f"{call.timesteps[0]:g}): float16 ends at 65504, give it in float32 or bfloat16; or "
                    "look at its weights and its scheduler"
                )
            rows, numbers = self.at(step, pictures, range(len(call)))
            found.append(call[rows.to(call.x_t.device)])
            numbered.append(numbers)
        return _joined(found), torch.cat(numbered)

    def checked(self, numbers: Any, pictures: range) -> Tensor:
        """The numbers of points, as a file says. Raises ValueError, TypeError: they are not those of some pictures."""
        picture = self.trajectory // self.rows
        own = ((picture >= pictures.start) & (picture < pictures.stop)).nonzero().flatten().tolist()
        if not isinstance(numbers, list) or len({*numbers}) < len(numbers) or not {*numbers} <= {*own}:
            raise ValueError("its points are of other pictures")
        return torch.tensor(numbers, dtype=torch.int64)


class _Seen(Exception):
    """The network was called; no error, it ends the pipeline's call."""


@contextmanager
def _answering_once(network: nn.Module, dry: bool) -> Iterator[None]:
    """Let a network, if ``dry``, compute one answer for each shape of sample, and give it again to all others."""
    if not dry:
        yield
        return
    own, forward, answers = network.__dict__.get("forward"), network.forward, {}

    @wraps(forward)
    def answer(*args: Any, **kwargs: Any) -> Any:
        shapes = tuple(leaf.shape for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if shapes not in answers:
            answers[shapes] = forward(*args, **kwargs)
        return answers[shapes]

    network.forward = answer
    try:
        yield
    finally:
        del network.forward
        if own is not None:
            network.forward = own


@contextmanager
def _without_bar(pipeline: DiffusionPipeline) -> Iterator[None]:
    shown = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**{**shown, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**shown)


def _tensors(points: CalibrationSet) -> list[Tensor]:
    return [
        leaf for leaf in tree_leaves((points.x_t, points.timesteps, points.conditioning)) if isinstance(leaf, Tensor)
    ]


def _joined(parts: list[CalibrationSet]) -> CalibrationSet:
    """Their rows one behind the other."""
    if len(parts) == 1:
        return parts[0]
    leaves, form = zip(*(tree_flatten(with_rows(part.conditioning)) for part in parts), strict=True)
    conditioning = [torch.cat(each) if isinstance(each[0], Tensor) else each[0] for each in zip(*leaves, strict=True)]
    return CalibrationSet(
        torch.cat([part.x_t for part in parts]),
        torch.cat([part.timesteps for part in parts]),
        parts[0].conditioning | tree_unflatten(conditioning, form[0]),
    )


def _checked(
    pipeline: DiffusionPipeline, allowed: Any, prompts: list[str] | None, call: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a pipeline's call, the prompts among them; errors as :class:`PipelineWalk`."""
    kind = type(pipeline).__name__
    unknown = [name for name in call if name not in allowed]
    if unknown:
        raise ValueError(f"{kind} is not called with {', '.join(unknown)}: allowed in call are {', '.join(allowed)}")
    if prompts is None:
        missing = "prompt" in allowed and not any(name.startswith("prompt") for name in call)
        if missing:
            raise ValueError(
                f"{kind} draws what prompts say and has none: pass prompts=[...], a few dozen as its users write them"
            )
        return call
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts is {prompts!r}: write a list of strings")
    if "prompt" not in allowed:
        raise ValueError(f"{kind} takes no prompts: leave them out, or hand over in call what it takes")
    return {"prompt": list(prompts), **call}


def _check_times(scheduler: Any) -> None:
    """Raises ValueError: what a scheduler has for timesteps, once it has some, are not those that groups divide."""
    first, last, trained = float(scheduler.timesteps[0]), float(scheduler.timesteps[-1]), span_of(scheduler)
    if isinstance(trained, int) and not 0 <= last <= first <= trained:
        raise ValueError(
            f"{type(scheduler).__name__} calls its network with timesteps from {first:.3g} to {last:.3g}: networks are "
            f"quantized that are called with those from {trained} to 0, for groups of which scales are fitted"
        )


def _check_rows(pipeline: DiffusionPipeline, call: CalibrationSet) -> None:
    """Raises ValueError: a pipeline's network is not one with a row of conditioning for each sample."""
    kind = type(pipeline).__name__
    for name, value in with_rows(call.conditioning).items():
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor) and (not leaf.dim() or len(leaf) != len(call)):
                raise ValueError(
                    f"{kind} hands over {name} of {tuple(leaf.shape)} to a batch of {len(call)} samples: networks are "
                    "quantized whose conditioning has a row for each"
                )
