"""The timestep of the running batch: how it reaches the quantized layers of a network that is called."""

import inspect
import threading
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from pqcad_ao.denoiser import GUIDED_AGAIN, Span, extent, set_time_scale, timestep_group, timestep_position
from pqcad_ao.diffusion.noise import EDM, RectifiedFlow, VariancePreserving

ATTRIBUTE = "_pqcad_timestep"  # of a quantized network
LOOKED_AT = 2  # first calls of a network
ROUNDING = 2**-7  # relative, of timesteps that pipelines hand over in bfloat16


class Call:
    """What belongs to one call of a network.

    Attributes:
        group: (B,) int64, the timestep group of each sample; None outside of a call.
        visited: the timestep of the last call, where the network was distilled for a schedule.
    """

    def __init__(self) -> None:
        self.group: Tensor | None = None
        self.visited: float | None = None


class _Calls(threading.local):
    """Each thread's :class:`Call`.

    Dynamo (torch 2.13) looks up what a thread-local object holds in every thread anew, but loses what is written to
    the thread-local object itself, and it does not trace a ``contextvars.ContextVar``: so what changes is inside.
    """

    def __init__(self) -> None:
        self.running = Call()

    def __reduce__(self) -> tuple[type["_Calls"], tuple[()]]:
        return _Calls, ()  # a copy of a network is not being called


class Timestep:
    """Which timestep group each sample of the running batch belongs to.

    A network's quantized layers share one; :func:`bind_timestep` sets the group of its ``call`` when the network is
    called and :func:`release_timestep` clears it when the network returns. Threads may share a network.
    """

    def __init__(
        self,
        groups: int,
        num_train_timesteps: int,
        *,
        continuous: bool = False,
        time_scale: float = 1.0,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        self.groups, self.num_train_timesteps = groups, num_train_timesteps
        self.continuous = continuous  # timesteps are fractions up to T, and not whole numbers up to T - 1
        self.bounds = bounds  # least and greatest timestep of EDM's process; None of others, whose are from 0 to T
        self.time_scale = time_scale  # what the network is called with, a training timestep times this
        self.position = 1  # of the timestep among the arguments of the network's forward
        self.schedule: list | None = None  # the timesteps that the network was distilled for
        self.clip: float | None = None  # range of x_0 in the sampler it was calibrated on, 0 of none; None: unknown
        self.guidance: float | None = None  # scale of the guidance that one call of it does the work of
        self.looked_at = 0  # calls, by :func:`check_scale`
        self._calls = _Calls()

    @property
    def span(self) -> Span:
        """Of the timesteps that the groups divide."""
        return self.num_train_timesteps if self.bounds is None else self.bounds

    @property
    def process(self) -> str:
        """The noise process that the network was quantized for, as errors say it."""
        if self.bounds is not None:
            return EDM.name
        return RectifiedFlow.name if self.continuous else VariancePreserving.name

    @property
    def call(self) -> Call:
        """The call that this thread makes."""
        return self._calls.running

    def current(self, batch: int) -> Tensor:
        """(B,) int64.

        Raises:
            RuntimeError: outside the network's forward. ValueError: for another batch.
        """
        group = self.call.group
        if group is None:
            raise RuntimeError(
                "a quantized layer was called outside its network: its activation scales depend on the timestep, which "
                "reaches it through the network's forward(sample, timestep)"
            )
        if group.shape[0] != batch:
            raise ValueError(f"a quantized layer got a batch of {batch}, the network one of {group.shape[0]} samples")
        return group


def check_timesteps(
    timesteps: Tensor, num_train_timesteps: int, *, continuous: bool = False, time_scale: float = 1.0
) -> None:
    """Raise ValueError where a timestep lies outside of [0, num_train_timesteps), of a continuous process beyond it.

    Fractions are taken: samplers such as Euler's stop between two training timesteps.

    Args:
        time_scale: in the error's words the network is called with a timestep times this.
    """
    most = num_train_timesteps if continuous else num_train_timesteps - 1
    sound = (timesteps >= 0) & (timesteps < num_train_timesteps + continuous)
    if not sound.all():
        raise ValueError(
            f"timestep {time_scale * timesteps[~sound][0].item():g}: this network takes those from 0 to "
            f"{time_scale * most:g}, which it was trained with"
        )


def check_bounds(bounds: tuple[float, float], timesteps: Tensor) -> None:
    """Warn where a network is called with timesteps outside of those that it was calibrated at, by more than rounding.

    It is no error: a sampler may begin with more noise than the one of the calibration.
    """
    low, high = bounds
    room = ROUNDING * extent(bounds)
    outside = timesteps[~((timesteps >= low - room) & (timesteps <= high + room))]
    if len(outside):
        warnings.warn(
            f"this network was calibrated at timesteps ln(sigma) / 4 from {low:.3g} to {high:.3g} and is called with "
            f"{outside[0].item():.3g}: its layers take the scales of the nearest group. Sample with the scheduler, of "
            "the same sigma_min and sigma_max, that quantize_ was given",
            stacklevel=4,
        )


def check_scale(state: Timestep, timesteps: Tensor) -> None:
    """Warn, once, where a network that counts its timesteps is called with a time from 0 to 1 from the start."""
    if state.looked_at >= LOOKED_AT:
        return
    below = timesteps.is_floating_point() and bool(((timesteps > 0) & (timesteps <= 1)).all())
    state.looked_at = state.looked_at + 1 if below else LOOKED_AT
    if below and state.looked_at == LOOKED_AT:
        warnings.warn(
            f"this network was calibrated at timesteps from 0 to {state.num_train_timesteps} and is called with "
            f"{timesteps[0].item():g}: all its layers take the scales of the first group. If it is called with a time "
            f"from 0 to 1, write quantize_(..., time_scale=1 / {state.num_train_timesteps})",
            stacklevel=4,
        )


def check_schedule(state: Timestep, timesteps: list) -> None:
    """Warn where a network that was distilled for a schedule is asked for other timesteps, or walks past some."""
    schedule, asked = state.schedule or [], sorted({_in_schedule(state, t) for t in timesteps})
    wrong = [f"is asked for {t:g}" for t in asked if t not in schedule][:1]
    if not wrong and len(asked) == 1:
        before, now = state.call.visited, asked[0]
        # downwards, as samplers walk: a new walk begins above
        if (
            before is not None
            and before in schedule
            and now < before
            and schedule.index(now) > schedule.index(before) + 1
        ):
            wrong = [f"goes from {before:g} to {now:g}"]
        state.call.visited = now
    if wrong:
        warnings.warn(
            f"this network was distilled for {len(schedule)} timesteps, {schedule[0]:g} to {schedule[-1]:g}, and "
            f"{wrong[0]}: sample with num_inference_steps={len(schedule)} and the scheduler it was saved with",
            stacklevel=3,
        )


def check_unguided(state: Timestep, timesteps: Tensor, sample: Tensor) -> None:
    """Warn where a pipeline guides a network that was taught to do without: both halves of its batch are one sample.

    It is looked at where a walk ends, for it may begin with one noise for several prompts.
    """
    half, schedule = len(sample) // 2, state.schedule or [0]
    at_end = _in_schedule(state, timesteps[0].item()) == schedule[-1]
    if at_end and half and len(sample) == 2 * half and torch.equal(sample[:half], sample[half:]):
        warnings.warn(GUIDED_AGAIN.format(state.guidance), stacklevel=3)


def _in_schedule(state: Timestep, timestep: float) -> float:
    """The timestep of a schedule that a rounded one stands for; where timesteps are counted, none is rounded."""
    nearest = min(state.schedule or [timestep], key=lambda known: abs(known - timestep))
    return nearest if state.continuous and abs(nearest - timestep) <= ROUNDING * nearest else timestep


def _call_argument(module: nn.Module, args: tuple, kwargs: dict[str, Any], position: int) -> Any:
    if len(args) > position:
        return args[position]
    name = list(inspect.signature(module.forward).parameters)[position]
    if name not in kwargs:
        raise TypeError(
            f"{type(module).__name__} is quantized and was called without {name!r}: call it as f(x_t, timestep)"
        )
    return kwargs[name]


def _check_called_with(state: Timestep, timesteps: Tensor) -> None:
    if state.bounds is not None:
        check_bounds(state.bounds, timesteps)
        return
    # a time just below 1 is 1 in bfloat16
    continuous = state.continuous or state.time_scale != 1
    check_timesteps(timesteps, state.num_train_timesteps, continuous=continuous, time_scale=state.time_scale)
    check_scale(state, timesteps)


def bind_timestep(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a quantized network: a scalar or per-sample timestep becomes a group for each sample."""
    sample = _call_argument(module, args, kwargs, 0)
    timesteps = _call_argument(module, args, kwargs, module._pqcad_timestep.position)
    if isinstance(timesteps, (int, float)):  # torch.full takes a symbolic number; as_tensor would recompile for each
        timesteps = torch.full((1,), timesteps)
    timesteps = torch.as_tensor(timesteps).reshape(-1)
    if timesteps.is_floating_point():
        timesteps = timesteps.float()  # which tells 1000 from 1001
    state = module._pqcad_timestep
    if state.time_scale != 1:
        timesteps = timesteps * (1 / state.time_scale)
        if not state.continuous and state.bounds is None:
            timesteps = timesteps.round()  # a whole number, but for what was lost when it was divided
    # one that is on a GPU would have to be waited for at every step; pqcad_ao's own sampler looks before it starts
    if timesteps.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_called_with(state, timesteps)
        if state.schedule is not None:
            check_schedule(state, timesteps.tolist())
        if state.guidance is not None:
            check_unguided(state, timesteps, sample)
    timesteps = timesteps.to(sample.device)
    if timesteps.shape[0] != 1 and timesteps.shape[0] != sample.shape[0]:
        raise ValueError(
            f"{timesteps.shape[0]} timesteps for a batch of {sample.shape[0]}: give one for all, or one for each sample"
        )
    timesteps = timesteps.expand(sample.shape[0])
    state.call.group = timestep_group(timesteps, state.groups, state.span)


def release_timestep(module: Any, args: tuple, output: Any) -> None:
    """Forward hook: no group outlives the call that set it, a call that raised included."""
    module._pqcad_timestep.call.group = None


def install_timestep(module: nn.Module, timestep: Timestep) -> None:
    """Make ``module`` hand its timestep to the quantized layers that hold ``timestep``."""
    setattr(module, ATTRIBUTE, timestep)
    timestep.position = timestep_position(module)
    set_time_scale(module, timestep.time_scale)
    for fqn, layer in module.named_modules():
        if getattr(layer, "timestep", None) is timestep:
            layer.fqn = fqn
    module.register_forward_pre_hook(bind_timestep, with_kwargs=True)
    module.register_forward_hook(release_timestep, always_call=True)


def uninstall_timestep(module: nn.Module) -> None:
    """Invert :func:`install_timestep`, of a network that has no quantized layers any more."""
    delattr(module, ATTRIBUTE)
    # not by their handles, which a copy of the network does not share
    hooks: list[tuple[Any, Any, Any]] = [
        (bind_timestep, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (release_timestep, module._forward_hooks, module._forward_hooks_always_called),
    ]
    for ours, registered, options in hooks:
        for key in [key for key, hook in registered.items() if hook is ours]:
            del registered[key], options[key]
