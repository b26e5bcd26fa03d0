"""What diffusers makes out of a denoiser's weights: of a quantized one's, out of those that its integers stand for."""

import copy
from collections.abc import Callable
from typing import Any

from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    ControlNetXSAdapter,
    FluxControlNetModel,
    SD3ControlNetModel,
    SparseControlNetModel,
    UNetControlNetXSModel,
    UNetMotionModel,
)

from pqcad_ao.nn.state import ATTRIBUTE

MAKERS: dict[Any, str] = {  # diffusers 0.42: classes, and which of their methods copies a network's weights
    ControlNetModel: "from_unet",
    ControlNetUnionModel: "from_unet",
    ControlNetXSAdapter: "from_unet",
    SparseControlNetModel: "from_unet",
    UNetControlNetXSModel: "from_unet",
    UNetMotionModel: "from_unet2d",
    SD3ControlNetModel: "from_transformer",
    FluxControlNetModel: "from_transformer",
}


def _in_floating_point(value: Any) -> Any:
    return copy.deepcopy(value).dequantize() if hasattr(value, ATTRIBUTE) else value


def _of_floating_point(make: Callable[..., Any]) -> Any:
    def made(cls: Any, *args: Any, **kwargs: Any) -> Any:
        values = {name: _in_floating_point(value) for name, value in kwargs.items()}
        return make(cls, *map(_in_floating_point, args), **values)

    made.__doc__ = make.__doc__
    return classmethod(made)


for _kind, _name in MAKERS.items():
    setattr(_kind, _name, _of_floating_point(getattr(_kind, _name).__func__))
