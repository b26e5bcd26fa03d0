"""What every run that trains a fake-quantized graph shares: Adam over weights and scales, checkpoints, the loop."""

import copy
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.fx import GraphModule
from torch.nn.parallel import DistributedDataParallel

from pqcad_ao.passes.recompute import recompute_weights
from pqcad_ao.prepare.observe import parts_of
from pqcad_ao.utils.fields import entries
from pqcad_ao.utils.files import whole_file
from pqcad_ao.utils.processes import fill_in, mean_of_all, of_all, part_of, rank_and_world, to_first, whole_of
from pqcad_ao.utils.progress import tqdm
from pqcad_ao.utils.runs import only_run_in
from pqcad_ao.utils.tensor_files import read_tensors, write_tensors

KIND = "pqcad_learning"  # of the checkpoints, as their metadata names it
CHECKPOINT_EVERY = 50  # updates
WARMUP = 0.05  # part of the updates over which the learning rates rise
LARGEST_GRADIENT = 1.0  # norm to which all gradients together are clipped
SMALLEST_SCALE = 1e-8


def to_learn(network: nn.Module) -> nn.Module:
    """A copy to learn on: in float32, and channels last for fast convolutions.

    A network that is frozen as a whole, as teachers are, learns; single frozen parameters, such as fixed Fourier
    features, do not.
    """
    copied = copy.deepcopy(network).float()
    copied.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks this argument
    if not any(parameter.requires_grad for parameter in copied.parameters()):
        for parameter in copied.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    return copied


def data_parallel(graph: GraphModule) -> Callable[..., Any]:
    """A graph to call; of several processes, each with a part of the batch, gradients become the mean over all.

    Where weights are in parts, :class:`Learner` sees to that.
    """
    if rank_and_world()[1] == 1:
        return graph
    if parts_of(graph):
        return recompute_weights(graph)
    # some parameters (the next width's scales) take no part in a forward; as views, gradients are there once
    return DistributedDataParallel(graph, find_unused_parameters=True, gradient_as_bucket_view=True)


class Learner:
    """Adam on a graph's parameters, with rates that rise shortly and fall to zero.

    Parameters that do not learn require no gradient from here on: nothing would clear it, and it would count in the
    norm that is clipped.

    Of several processes, whose gradients are the same, each keeps the moments of some parameters and moves them; the
    scales, of which there are few, all move. Of weights in parts each moves its own part. A checkpoint holds all of it
    whole, whatever the number of processes.

    Args:
        graph: the fake-quantized graph, whose parameters must be its own. parameters: of it, that learn at
            ``learning_rate``; those that were frozen before stay so.
        scale_learning_rate: of the scales, as a part of their own size.
        iterations: updates in all.
    """

    def __init__(
        self,
        graph: GraphModule,
        parameters: Iterable[nn.Parameter],
        learning_rate: float,
        scale_learning_rate: float,
        iterations: int,
    ) -> None:
        self.graph, self.iterations = graph, iterations
        self.learning_rate, self.scale_learning_rate = learning_rate, scale_learning_rate
        learning = {parameter: parameter.requires_grad for parameter in parameters}
        self.rank, self.world = rank_and_world()
        self.parts = parts_of(graph)
        whole = [parameter for parameter in learning if parameter not in self.parts]
        by_size = sorted(whole, key=lambda parameter: parameter.numel(), reverse=True)
        self.mover = {parameter: number % self.world for number, parameter in enumerate(by_size)}
        self.optimizer = torch.optim.Adam([p for p in learning if self.mover.get(p, self.rank) == self.rank], lr=0.0)
        graph.requires_grad_(False)
        for parameter, learns in learning.items():
            parameter.requires_grad_(learns)

    @property
    def facts(self) -> dict[str, int]:
        """How many of the network's parameters learn, and the bytes of Adam's moments for them and all scales.

        Of several processes, of all moments together.
        """
        network = [p for name, p in self.graph.named_parameters() if name.startswith("unet.") and p.requires_grad]
        scales = [group["scale"] for group in self.optimizer.param_groups if "scale" in group]
        learning = [p for p in (*self.mover, *self.parts, *scales) if p.requires_grad]
        trained, moved = (sum(self.parts.get(p, p).numel() for p in found) for found in (network, learning))
        return {"trained_parameters": trained, "adam_bytes": 8 * moved}

    def add_scales(self, quantizers: Iterable[Any]) -> None:
        """Scales learn at a rate relative to their own size, so each is a group."""
        for module in quantizers:
            for scale in (module.scale, module.next_scale):
                scale.requires_grad_(True)
                self.optimizer.add_param_group({"params": [scale], "scale": scale})

    def forget(self, scale: nn.Parameter) -> None:
        """Drop a scale's moments."""
        self.optimizer.state.pop(scale, None)

    def step(self, loss: Tensor, number: int, pace: float = 1.0) -> None:
        """One update, the ``number``-th; ``pace`` multiplies every rate."""
        # Adam's first updates are of full size whatever the gradients' is, and undo what calibration found
        pace *= min((number + 1) / (WARMUP * self.iterations + 1), 1) * (1 - number / self.iterations)
        scales = [group for group in self.optimizer.param_groups if "scale" in group]
        with torch.no_grad():  # all in one list: on a GPU each number would be a synchronisation of its own
            sizes = torch.stack([group["scale"].mean() for group in scales]).tolist() if scales else []
        for group in self.optimizer.param_groups:
            group["lr"] = pace * self.learning_rate
        for group, size in zip(scales, sizes, strict=True):
            group["lr"] = pace * self.scale_learning_rate * size
        loss.backward()
        self._clip()
        self.optimizer.step()
        self.graph.zero_grad()
        if self.world > 1:
            self._exchange()
        with torch.no_grad():
            for group in scales:
                group["scale"].clamp_(min=SMALLEST_SCALE)

    @torch.no_grad()
    def _clip(self) -> None:
        """Clip the norm of all gradients together; beside weights in parts, average the others' gradients first."""
        # in the order of names, which a resumed run shares: the norm of all depends on the order in its last bit
        found = {parameter: parameter.grad for parameter in self.graph.parameters() if parameter.grad is not None}
        if not self.parts:
            nn.utils.clip_grad_norm_(found, LARGEST_GRADIENT)
            return
        whole = [gradient for parameter, gradient in found.items() if parameter not in self.parts]
        mean = mean_of_all(torch.cat([gradient.reshape(-1) for gradient in whole]))
        for gradient, values in zip(whole, mean.split([gradient.numel() for gradient in whole]), strict=True):
            gradient.copy_(values.view(gradient.shape))
        parts = [gradient for parameter, gradient in found.items() if parameter in self.parts]
        square = nn.utils.get_total_norm(parts).square()
        norm = (fill_in(square) + mean.square().sum()).sqrt()
        nn.utils.clip_grads_with_norm_(found, LARGEST_GRADIENT, norm)

    @torch.no_grad()
    def _exchange(self) -> None:
        """Every process takes over the parameters that another one has moved."""
        for rank in range(self.world):
            moved = [p for p, mover in self.mover.items() if mover == rank and p.requires_grad]
            if not moved:
                continue
            values = torch.cat([parameter.reshape(-1) for parameter in moved])
            dist.broadcast(values, rank)
            for parameter, value in zip(moved, values.split([p.numel() for p in moved]), strict=True):
                parameter.copy_(value.view(parameter.shape))

    @torch.no_grad()
    def save(self, path: Path, header: dict[str, Any], more: dict[str, Tensor] | None = None) -> None:
        """Write graph, moments, ``more`` tensors of the run and the header, whole or not at all.

        Of several processes, which all call this, the first one does, with everyone's moments.
        """
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.graph.named_parameters()}
        forms = self._forms()
        tensors: dict[str, Tensor] = {f"run.{name}": value.contiguous() for name, value in (more or {}).items()}
        moments: dict[str, Tensor] = {}
        for parameter, state in self.optimizer.state.items():
            kept = tensors if parameter in self.parts else moments  # the first one has all of what was in parts
            for entry, value in state.items():
                kept[f"adam.{entry}.{names[parameter]}"] = self._whole(value, forms.get(names[parameter])).contiguous()
        if self.world > 1:
            moments = to_first(moments)
        for name, value in self.graph.state_dict().items():  # cloned: a module may be there under two names
            found = self._whole(value.detach(), forms.get(name))
            if self.rank == 0:
                tensors[f"graph.{name}"] = found.clone(memory_format=torch.contiguous_format)
        if self.rank == 0:
            write_tensors(path, {**tensors, **moments}, {KIND: json.dumps(header)})

    def _forms(self) -> dict[str, Tensor]:
        """Of the weights in parts, by name."""
        named = self.graph.named_parameters(remove_duplicate=False)
        return {name: self.parts[parameter] for name, parameter in named if parameter in self.parts}

    def _whole(self, value: Tensor, form: Tensor | None) -> Tensor:
        """A parameter's value or moment; where it is a part of this form, the whole on the first one's CPU."""
        if form is None or not value.dim():  # Adam's count of updates
            return value
        whole = whole_of(value, form)
        return whole.cpu() if self.rank == 0 else whole.new_empty(0)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :func:`read_checkpoint` found."""
        forms, parameters = self._forms(), dict(self.graph.named_parameters())

        def mine(name: str, value: Tensor) -> Tensor:
            return part_of(value, forms[name]) if name in forms and value.dim() else value

        graph = {name.removeprefix("graph."): value for name, value in tensors.items() if name.startswith("graph.")}
        self.graph.load_state_dict({name: mine(name, value) for name, value in graph.items()})
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "adam":
                entry, _, parameter = rest.partition(".")
                found = parameters[parameter]
                place = found.device if entry != "step" else value.device  # Adam counts on the CPU
                if self.mover.get(found, self.rank) == self.rank:
                    self.optimizer.state[found][entry] = mine(parameter, value).to(place)


def more_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The run's own tensors in a checkpoint, as :meth:`Learner.save` was given them."""
    return {name.removeprefix("run."): value for name, value in tensors.items() if name.startswith("run.")}


def read_checkpoint(path: Path, key: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file that :meth:`Learner.save` wrote.

    Raises:
        ValueError: the file is damaged, or of another run than the one that ``key`` names.
    """
    tensors, header = read_tensors(path, KIND)
    if not isinstance(header, dict) or not all(value.isfinite().all() for value in tensors.values()):
        raise ValueError(f"{path} is damaged: it holds NaN or infinity, or no run. Delete it to begin anew")
    if header.get("key") != key:
        raise ValueError(
            f"{path} is of another run (another network, configuration or calibration set): give another folder, "
            "or delete it"
        )
    return header, tensors


def train_loop(
    run: Any,
    iterations: int,
    *,
    folder: str | Path | None = None,
    describe: Callable[[Any], dict[str, Any]],
    title: str,
    callback: Callable[[str, int, int], None] | None = None,
    progress: bool = False,
    write: bool = True,
) -> None:
    """Let a run make its updates.

    Args:
        run: has ``log`` (its updates so far, dataclasses with a ``stage``), ``update()``, ``save(path)`` and
            ``load(path)``.
        iterations: updates in all.
        folder: receives ``log.jsonl``, a line for each update, and every so often ``checkpoint.safetensors``. A run
            that finds its own checkpoint there goes on from it, to the same result. Where an update fails, the one
            that stays there is the last with which an update succeeded.
        describe: what the progress bar shows of an update. title: of the bar.
        callback: called as ``callback(stage, done, total)``.
        write: whether this process writes to the folder; one that does not still reads from it.
    """
    with only_run_in(folder if write else None):
        _train(run, iterations, folder, describe, title, callback, progress, write)


def _train(
    run: Any,
    iterations: int,
    folder: str | Path | None,
    describe: Callable[[Any], dict[str, Any]],
    title: str,
    callback: Callable[[str, int, int], None] | None,
    progress: bool,
    write: bool,
) -> None:
    """As :func:`train_loop`, in a folder that is this run's."""
    kept = None if folder is None else _Folder(Path(folder), run, write)
    bar = tqdm(total=iterations, initial=len(run.log), desc=title, disable=not progress)
    try:
        while len(run.log) < iterations:
            try:
                with torch.enable_grad():  # whatever the caller's mode
                    update = run.update()
            except FloatingPointError:
                if kept is not None:
                    kept.step_back()
                raise
            if kept is not None:
                kept.add(update, last=len(run.log) >= iterations)
            if callback is not None:
                callback(update.stage, len(run.log), iterations)
            bar.set_postfix(**describe(update))
            bar.update()
        if kept is not None:
            kept.finish()
    finally:
        bar.close()
        if kept is not None:
            kept.close()


class _Folder:
    """What a run leaves in a folder: its log, its last checkpoint, and the one before that as long as it may be needed.

    Args:
        folder, run, write: of :func:`train_loop`. The run goes on from the checkpoint that it finds, or leaves one.
    """

    def __init__(self, folder: Path, run: Any, write: bool) -> None:
        self.run = run
        self.checkpoint = folder / "checkpoint.safetensors"
        self.before = folder / "checkpoint-before.safetensors"
        folder.mkdir(parents=True, exist_ok=True)
        found = of_all(self.checkpoint.is_file())
        if len({*found}) > 1:
            raise ValueError(f"{folder} is not the same for all processes: give a folder that they share")
        if found[0]:
            self._load()
        else:
            self.before.unlink(missing_ok=True)  # of a run whose checkpoint was deleted
            run.save(self.checkpoint)
        # updates behind the checkpoint that was written last, as long as the one before it is there
        self.saved = len(run.log) if self.before.is_file() else None
        self.log = (folder / "log.jsonl").open("w") if write else None
        if self.log is not None:
            self.log.writelines(json.dumps(entries(update)) + "\n" for update in run.log)

    def _load(self) -> None:
        try:
            self.run.load(self.checkpoint)
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, ValueError) as error:
            if str(self.checkpoint) in str(error):
                raise
            # of entries that it lacks, or that cannot be
            raise ValueError(f"{self.checkpoint} is damaged ({error!r}). Delete it to begin anew") from error

    def add(self, update: Any, last: bool) -> None:
        """Log an update that succeeded, and every so often write a checkpoint."""
        if self.log is not None:
            self.log.write(json.dumps(entries(update)) + "\n")
            self.log.flush()
        if len(self.run.log) % CHECKPOINT_EVERY == 0 or last:
            if self.log is not None:
                with whole_file(self.before) as unfinished:
                    shutil.copyfile(self.checkpoint, unfinished)
            self.run.save(self.checkpoint)
            self.saved = len(self.run.log)

    def step_back(self) -> None:
        """After an update that failed, a checkpoint with which none has succeeded gives way to the one before."""
        if self.log is not None and self.saved == len(self.run.log):
            self.before.replace(self.checkpoint)

    def finish(self) -> None:
        if self.log is not None:
            self.before.unlink(missing_ok=True)

    def close(self) -> None:
        if self.log is not None:
            self.log.close()
