"""``pqcad_ao.plan(unet)``: what quantizing does, or did, to every layer of a network."""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

from torch import nn

from pqcad_ao.config import PQCADConfig
from pqcad_ao.denoiser import cast_floats, check_conditioning, sample_shape, set_time_scale
from pqcad_ao.graph.capture import Capture, capture
from pqcad_ao.graph.plan import Plan, resolve
from pqcad_ao.graph.suitable import check_suitable
from pqcad_ao.learn.selective import check_selection
from pqcad_ao.learn.sensitivity import spare_bits
from pqcad_ao.learn.stages import policies
from pqcad_ao.learn.training import to_learn
from pqcad_ao.nn.state import quantized_state


def plan(
    model: nn.Module,
    config: PQCADConfig | None = None,
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    sample_shape: tuple[int, ...] | None = None,
    conditioning: dict[str, Any] | None = None,
    time_scale: float | None = None,
) -> Plan:
    """What was done to a quantized network, or what :func:`quantize_` would do to a full-precision one.

    Which layers ``target_bits`` raises is known when :func:`quantize_` has measured them; until then the plan says
    what may be spent.

    Args: as for :func:`quantize_`; a quantized network needs none.

    Raises:
        ValueError: a config for a network that is quantized already, or bits above ``target_bits``.

    Example:
        >>> for row in plan(unet, PQCADConfig(overrides={"head": {"weight_bits": 4}})).rows[-2:]:
        ...     print(row.fqn, row.role, row.weight_bits, row.activation_bits)
        up_blocks.1.resnets.1.conv_shortcut shortcut 4 6
        conv_out head 4 8
    """
    state = quantized_state(model)
    if state is not None:
        if config is not None:
            raise ValueError("the network is quantized already, no other bits can be planned for it: give no config")
        return state.plan
    check_suitable(model)
    config = config or PQCADConfig()
    set_time_scale(model, time_scale)
    return _resolve(_capture(model, sample_shape, conditioning), model, config, filter_fn)


def planned(
    model: nn.Module,
    config: PQCADConfig,
    filter_fn: Callable[[nn.Module, str], bool] | None,
    shape: tuple[int, ...],
    conditioning: dict[str, Any],
) -> tuple[Capture, Plan]:
    """The graph that will be quantized, and its plan; raises all that can be known before any work is done."""
    check_suitable(model)
    # learning trains the graph, which shares its parameters with what it is captured from
    subject = to_learn(model) if config.learns else model
    captured = capture(subject, shape, cast_floats(conditioning) if config.learns else conditioning)
    resolved = _resolve(captured, model, config, filter_fn)
    if not resolved.quantized:
        raise ValueError(f"the plan quantizes no layer of {type(model).__name__}:\n{resolved}")
    check_selection(config, resolved)
    if config.learns:
        policies(config, resolved)
    return captured, resolved


def _resolve(
    captured: Capture, model: nn.Module, config: PQCADConfig, filter_fn: Callable[[nn.Module, str], bool] | None
) -> Plan:
    resolved = resolve(captured, model, config, filter_fn)
    if config.target_bits is not None:
        spare_bits(resolved, config.target_bits)
    return replace(resolved, target_bits=config.target_bits)


def _capture(model: nn.Module, shape: tuple[int, ...] | None, conditioning: dict[str, Any] | None) -> Capture:
    return capture(model, sample_shape(model, shape), check_conditioning(model, conditioning))


class _CalledAsItsFunction(ModuleType):
    """``pqcad_ao.plan`` names this module and its function; a module of this class answers to both."""

    __call__ = staticmethod(plan)


sys.modules[__name__].__class__ = _CalledAsItsFunction
