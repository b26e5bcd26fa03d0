"""How a network is called: its signature, sample shape, conditioning, device and type."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pqcad_ao.utils.checks import is_whole

EXTRA_CHANNELS = "extra_channels"  # of the conditioning: what a network takes beside x_t in its first argument
# Of the conditioning: positions of tokens (tokens, axes), the same for every sample, as Flux takes them.
WITHOUT_ROWS = ("img_ids", "txt_ids")

# Of the conditioning, for guidance: how strong it is, and what of the conditioning is otherwise in the other call.
GUIDANCE_SCALE, NEGATIVE = "guidance_scale", "negative"
GUIDED_AGAIN = (
    "this network was distilled with guidance='baked': one call of it does what guidance of {:g} does, and it is "
    "guided again. Leave guidance_scale and negative out of the conditioning; in a pipeline write guidance_scale=1"
)


def with_rows(conditioning: dict[str, Any]) -> dict[str, Any]:
    """What of a conditioning has a row for each sample."""
    return {name: value for name, value in conditioning.items() if name not in WITHOUT_ROWS}


def take_rows(conditioning: dict[str, Any], rows: Any) -> dict[str, Any]:
    """The chosen rows of every tensor in a (nested) conditioning dictionary; all of what has no rows."""
    taken = tree_map(lambda value: value[rows] if isinstance(value, Tensor) else value, with_rows(conditioning))
    return {name: taken.get(name, value) for name, value in conditioning.items()}


def unguided(conditioning: dict[str, Any]) -> dict[str, Any]:
    """The conditioning of a network's one call for the prompt."""
    return {name: value for name, value in conditioning.items() if name not in (GUIDANCE_SCALE, NEGATIVE)}


def guided(network: Callable[..., Tensor], x_t: Tensor, timesteps: Any, conditioning: dict[str, Any]) -> Tensor:
    """``network(x_t, timesteps, conditioning)``, under guidance where the conditioning says so.

    Classifier-free guidance (Ho & Salimans 2022, eq. 6) as diffusers' pipelines write it: the negative's prediction,
    and ``guidance_scale`` times the prompt's difference from it.
    """
    prompt = unguided(conditioning)
    prediction = network(x_t, timesteps, prompt)
    if GUIDANCE_SCALE not in conditioning:
        return prediction
    negative = network(x_t, timesteps, {**prompt, **conditioning[NEGATIVE]})
    return negative + conditioning[GUIDANCE_SCALE] * (prediction - negative)


def guided_at_once(
    network: Callable[..., Tensor], x_t: Tensor, timesteps: Tensor, conditioning: dict[str, Any]
) -> Tensor:
    """As :func:`guided`, by one call with a batch of twice the size: first the prompts', then the negatives'.

    Args:
        timesteps: (B,).
    """
    prompt = unguided(conditioning)
    if GUIDANCE_SCALE not in conditioning:
        return network(x_t, timesteps, prompt)
    pairs = with_rows(prompt), with_rows({**prompt, **conditioning[NEGATIVE]})
    both = tree_map(lambda own, other: torch.cat([own, other]) if isinstance(own, Tensor) else own, *pairs)
    twice = network(x_t.repeat(2, *[1] * (x_t.dim() - 1)), timesteps.repeat(2), {**prompt, **both})
    prediction, negative = twice[: len(x_t)], twice[len(x_t) :]
    return negative + conditioning[GUIDANCE_SCALE] * (prediction - negative)


def in_one_call(conditioning: dict[str, Any], negative: Tensor) -> dict[str, Any]:
    """What a network is given in one of guidance's two calls: in each row the negative's (N,) or the prompt's."""
    prompt = unguided(conditioning)
    if GUIDANCE_SCALE not in conditioning:
        return prompt

    def choose(other: Any, own: Any) -> Any:
        if not isinstance(own, Tensor):
            return own
        return torch.where(negative.to(own.device).view(-1, *[1] * (own.dim() - 1)), other, own)

    return prompt | tree_map(choose, with_rows({**prompt, **conditioning[NEGATIVE]}), with_rows(prompt))


def cast_floats(values: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Every floating-point tensor of a nested value in ``dtype``."""
    return tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, values)


TIME_SCALE = "_pqcad_time_scale"  # attribute of a network that was given one
# Networks that diffusers' pipelines call with a timestep times this.
TIME_SCALES = dict.fromkeys(
    (
        "AuraFlowTransformer2DModel",
        "ChromaTransformer2DModel",
        "Flux2Transformer2DModel",
        "FluxTransformer2DModel",
        "Krea2Transformer2DModel",
        "LongCatAudioDiTTransformer",
        "LongCatImageTransformer2DModel",
        "NucleusMoEImageTransformer2DModel",
        "OvisImageTransformer2DModel",
        "PRXTransformer2DModel",
        "QwenImage21Transformer2DModel",
        "QwenImageTransformer2DModel",
    ),
    1 / 1000,
)


def time_scale(network: Callable[..., Any]) -> float:
    """What a network is called with, a timestep of its scheduler times this: as given, or as diffusers has it, or 1."""
    network = getattr(network, "_orig_mod", network)  # what torch.compile wraps
    return getattr(network, TIME_SCALE, TIME_SCALES.get(type(network).__name__, 1.0))


def set_time_scale(network: nn.Module, given: float | None) -> None:
    """Let a network be called with a timestep times this; None changes nothing.

    Raises:
        ValueError: it is not a number from above 0 to 1.
    """
    if given is None:
        return
    if not isinstance(given, (int, float)) or isinstance(given, bool) or not 0 < given <= 1:
        raise ValueError(
            f"time_scale={given!r}: allowed are numbers above 0, up to 1: 1 for a network that is called with its "
            "scheduler's timesteps, 1 / 1000 for one that is called with a time from 0 to 1"
        )
    setattr(network, TIME_SCALE, float(given))


def timestep_position(network: Callable[..., Any]) -> int:
    """Which argument of a network's forward is its timestep: the one of that name, or else the second."""
    forward = network.forward if isinstance(network, nn.Module) else network
    names = list(inspect.signature(forward).parameters)
    return names.index("timestep") if "timestep" in names else 1


# Of a noise process: T where timesteps are counted from 0 on and are below T, or the least and the greatest of them.
Span: TypeAlias = int | tuple[float, float]


def extent(span: Span) -> float:
    """The length of a span of timesteps."""
    return span if isinstance(span, int) else span[1] - span[0]


def timestep_group(timesteps: Tensor, groups: int, span: Span) -> Tensor:
    """The group of each timestep: ``groups`` intervals of equal length that tile the span.

    Timesteps outside are counted to the nearest group. Shapes (B,) to (B,) int64.
    """
    if isinstance(span, int):
        return timesteps.to(torch.int64).clamp(0, span - 1) * groups // span
    low, high = span
    return ((timesteps - low) * (groups / (high - low))).clamp(0, groups - 1).to(torch.int64)


def predict(
    unet: Callable[..., Any], x_t: Tensor, timestep: Tensor | int, conditioning: dict[str, Any] | None = None
) -> Tensor:
    """The network's raw prediction as a tensor, whatever wrapping its output has.

    Args:
        x_t: (B, C, H, W). timestep: of its scheduler, int, 0-d or (B,); the network is called with (B,) of it,
            times its :func:`time_scale`. conditioning: further keyword arguments of ``unet.forward``.
            ``extra_channels`` in it (B, E, H, W) follow the sample's channels in the network's first argument, as the
            mask and the masked picture do in inpainting. With a ``guidance_scale`` and a ``negative`` in it, a
            dictionary alike, the prediction is :func:`guided`.

    Returns:
        (B, C, H, W): of a network that predicts more, such as a variance, the first C channels.
    """
    call = partial(_call, unet, timestep_position(unet), time_scale(unet))
    # one for each sample: there are networks that look into a vector of them
    timesteps = torch.as_tensor(timestep, device=x_t.device).expand(len(x_t))
    return guided(call, x_t, timesteps, conditioning or {})


def _call(
    unet: Callable[..., Any],
    position: int,
    scale: float,
    x_t: Tensor,
    timestep: Tensor | float,
    conditioning: dict[str, Any],
) -> Tensor:
    if scale != 1:
        timestep = timestep / (1 / scale)  # to the last bit as diffusers' pipelines divide by 1000
    keywords = {name: value for name, value in conditioning.items() if name != EXTRA_CHANNELS}
    sample = x_t
    if EXTRA_CHANNELS in conditioning:
        sample = torch.cat([x_t, conditioning[EXTRA_CHANNELS].to(x_t.dtype)], 1)
    # a transformer takes text before its timestep
    output = unet(sample, timestep, **keywords) if position == 1 else unet(sample, timestep=timestep, **keywords)
    if not isinstance(output, Tensor):
        output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the network returns a {type(output).__name__}: expected is a tensor, a tuple that begins with one, or an "
            "object with one as its sample"
        )
    return output if output.shape[1] == x_t.shape[1] else output[:, : x_t.shape[1]]


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put every module of ``model`` into evaluation mode, and each back to what it was on leaving."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training


class Denoiser(nn.Module):
    """``f(x_t, timesteps, *conditioning) -> prediction`` around a network that may wrap its output.

    With a ``guidance_scale`` and a ``negative`` in its conditioning it is guided, in one call of the network.

    Args:
        to_kwargs: makes keyword arguments of ``unet.forward`` of the conditioning; by default that is one dictionary.
    """

    def __init__(self, unet: nn.Module, to_kwargs: Callable[..., dict[str, Any]] = dict) -> None:
        super().__init__()
        self.unet, self.to_kwargs = unet, to_kwargs
        self.position, self.scale = timestep_position(unet), time_scale(unet)

    def forward(self, x_t: Tensor, timesteps: Tensor, *conditioning: Any) -> Tensor:
        call = partial(_call, self.unet, self.position, self.scale)
        return guided_at_once(call, x_t, timesteps, self.to_kwargs(*conditioning))


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a network's inputs belong: device and type of its first floating-point parameter."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return parameter.device, parameter.dtype


def predict_float32(network: nn.Module, x_t: Tensor, timesteps: Tensor, conditioning: dict[str, Any]) -> Tensor:
    """A network's prediction for float32 inputs, computed in its own type and given back in float32."""
    _, dtype = placement(network)
    return predict(network, x_t.to(dtype), timesteps, cast_floats(conditioning, dtype)).float()


def sample_shape(model: nn.Module, given: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The shape of one sample that a network denoises: as given, or (C, H, W) from a diffusers config.

    Where a network takes more channels than it predicts (a mask beside the sample) or predicts more than it takes (a
    variance beside the mean), the smaller number is the sample's.

    Raises:
        ValueError: neither is there.
    """
    if given is not None:
        if len(given) < 2 or not all(is_whole(size) for size in given):
            raise ValueError(
                f"sample_shape={tuple(given)}: write (channels, height, width), of packed tokens (tokens, channels)"
            )
        return tuple(given)
    config = getattr(model, "config", None)
    in_channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
    if in_channels is None or size is None:
        raise ValueError(
            f"{type(model).__name__} does not say what it denoises (no config with in_channels and sample_size): "
            "pass sample_shape=(channels, height, width), of packed tokens (tokens, channels)"
        )
    height, width = (size, size) if isinstance(size, int) else size
    return min(in_channels, getattr(config, "out_channels", None) or in_channels), height, width


def check_conditioning(model: nn.Module, conditioning: dict[str, Any] | None) -> dict[str, Any]:
    """The conditioning on the network's device; what a network needs and did not get is an error that names it.

    Args:
        conditioning: keyword arguments of ``model.forward``, tensors with rows to draw from, but ``WITHOUT_ROWS``; for
            guidance also ``guidance_scale`` and ``negative``.

    Raises:
        ValueError: missing, empty, of unequal lengths, or of a name that ``forward`` does not have; one of guidance's
            two without the other, or a negative whose tensors have other shapes. TypeError: not a dictionary.
    """
    if not isinstance(conditioning, (dict, type(None))):
        raise TypeError(
            f"conditioning is a {type(conditioning).__name__}: write {{'name of forward's argument': tensor}}"
        )
    config = getattr(model, "config", None)
    needed = _required(model)
    if getattr(config, "encoder_hid_dim_type", None) == "image_proj":  # it makes them of image_embeds by itself
        needed = [name for name in needed if name != "encoder_hidden_states"]
        conditioning = {"encoder_hidden_states": None, **(conditioning or {})}
    conditioning = conditioning or {}
    if getattr(config, "class_embed_type", None) is not None or getattr(config, "num_class_embeds", None) is not None:
        needed.append("class_labels")
    if getattr(config, "addition_embed_type", None) is not None:
        needed.append("added_cond_kwargs")
    _check_extra_channels(model, conditioning)
    _check_guidance(conditioning)
    for name in needed:
        if conditioning.get(name) is None:
            raise ValueError(
                f"{type(model).__name__} is conditional and conditioning has no {name!r}: pass "
                f"conditioning={{{name!r}: tensor with rows to draw from}}"
            )
    tensors = [leaf for leaf in tree_leaves(with_rows(conditioning)) if isinstance(leaf, Tensor)]
    lengths = {leaf.shape[0] if leaf.dim() else 0 for leaf in tensors}
    if len(lengths) > 1 or 0 in lengths:
        raise ValueError(
            f"conditioning holds tensors of {sorted(lengths)} rows; give each the same number, at least one"
        )
    _check_names(model, conditioning)
    device, _ = placement(model)
    return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, conditioning)


def _check_names(model: nn.Module, conditioning: dict[str, Any]) -> None:
    """Raises ValueError: the conditioning holds what the network's forward does not take."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    position = timestep_position(model)
    allowed = [parameter.name for number, parameter in enumerate(parameters) if number not in (0, position)]
    foreign = sorted(conditioning.keys() - {*allowed, EXTRA_CHANNELS, GUIDANCE_SCALE, NEGATIVE})
    if foreign:
        raise ValueError(
            f"{type(model).__name__} takes no {', '.join(foreign)}: allowed in conditioning are "
            f"{', '.join(allowed) or 'none'}"
        )


def _check_guidance(conditioning: dict[str, Any]) -> None:
    """Raises ValueError: guidance is not said in full, or the negative is of another form than the prompt."""
    scale, negative = conditioning.get(GUIDANCE_SCALE), conditioning.get(NEGATIVE)
    if scale is None and negative is None:
        return
    if not isinstance(scale, (int, float)) or not isinstance(negative, dict):
        raise ValueError(
            f"guidance wants {GUIDANCE_SCALE}=number and {NEGATIVE}={{...}}, what of the conditioning is otherwise "
            f"without the prompt; conditioning has {GUIDANCE_SCALE}={scale!r} and a {type(negative).__name__}"
        )
    for name, value in negative.items():
        forms = [
            [v.shape for v in tree_leaves(each) if isinstance(v, Tensor)] for each in (value, conditioning.get(name))
        ]
        if forms[0] != forms[1]:
            raise ValueError(
                f"{NEGATIVE}[{name!r}] is of {list(map(list, forms[0]))} and conditioning[{name!r}] of "
                f"{list(map(list, forms[1]))}: give both the same shape, a row for a row"
            )


def _required(model: nn.Module) -> list[str]:
    """The arguments of a network's forward, beside sample and timestep, that have no default."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    position = timestep_position(model)
    return [
        parameter.name
        for number, parameter in enumerate(parameters)
        if number not in (0, position)
        and parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


def _check_extra_channels(model: nn.Module, conditioning: dict[str, Any]) -> None:
    """Raises ValueError: the network takes more channels than it predicts, and the conditioning does not hold them."""
    config = getattr(model, "config", None)
    taken, predicted = getattr(config, "in_channels", None), getattr(config, "out_channels", None)
    if taken is None or predicted is None or taken <= predicted:
        return
    extra, channels = conditioning.get(EXTRA_CHANNELS), taken - predicted
    if not isinstance(extra, Tensor) or extra.dim() != 4 or extra.shape[1] != channels:
        given = tuple(extra.shape) if isinstance(extra, Tensor) else extra
        raise ValueError(
            f"{type(model).__name__} takes {channels} channels beside the sample's and conditioning has "
            f"{EXTRA_CHANNELS}={given}: pass conditioning={{{EXTRA_CHANNELS!r}: tensor}} of (rows, {channels}, "
            "height, width), for inpainting mask and masked picture"
        )


def conditioning_rows(conditioning: dict[str, Any]) -> int:
    """How many samples a (nested) conditioning describes; 1 where it holds no tensor."""
    return next((leaf.shape[0] for leaf in tree_leaves(with_rows(conditioning)) if isinstance(leaf, Tensor)), 1)


def spread_rows(conditioning: dict[str, Any], numbers: Tensor, count: int) -> dict[str, Any]:
    """The conditioning of some of ``count`` samples, by their numbers (B,).

    Every row in turn; where there are more rows than samples, such as a class for each, rows spread evenly over all.
    """
    rows = conditioning_rows(conditioning)
    return take_rows(conditioning, numbers % rows if rows <= count else numbers * rows // count)
