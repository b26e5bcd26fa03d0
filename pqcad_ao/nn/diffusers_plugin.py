"""Saving and loading through diffusers: the quantizer that ``from_pretrained`` finds."""

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from pqcad_ao.nn.layers import QuantizedLayer
from pqcad_ao.nn.state import ATTRIBUTE, Method, QuantizedState, insert_layers, make_layers, state_from_dict


def attach(model: nn.Module, state: QuantizedState) -> None:
    """Make ``model`` remember how it was quantized, for ``plan(model)``, for the report and for saving."""
    if isinstance(model, ConfigMixin):
        quantization_config = PQCADQuantizationConfig(**state.to_dict())
        model.register_to_config(quantization_config=quantization_config)
        model.hf_quantizer = PQCADDiffusersQuantizer(quantization_config, pre_quantized=True)
        # diffusers refuses .to(dtype) where this is set; our layers keep their grids in float32 through any cast
        model.is_quantized = False
    setattr(model, ATTRIBUTE, state)


class PQCADQuantizationConfig(QuantizationConfigMixin):
    """What diffusers keeps under ``quantization_config`` in config.json."""

    def __init__(self, quant_method: str = Method.PQCAD.value, **values: Any) -> None:
        self.quant_method = Method(quant_method)
        self.values = values

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method.value, **self.values}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()  # diffusers' repr asks for it, its base class does not have it


class PQCADDiffusersQuantizer(DiffusersQuantizer):
    """Lets ``from_pretrained`` rebuild a network that pqcad_ao quantized and saved."""

    requires_calibration = True  # only networks quantized before can be loaded: quantize_ does the rest

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.state = state_from_dict(self.quantization_config.to_dict())
        insert_layers(model, make_layers(model, self.state), self.state.timestep)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        empty = [name for name, value in model.state_dict().items() if value.is_meta]
        if empty:
            raise ValueError(
                f"the checkpoint is damaged: it holds no {', '.join(empty[:3])}{' ...' if len(empty) > 3 else ''}"
            )
        attach(model, self.state)
        return model

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        owner, _, _ = param_name.rpartition(".")
        return isinstance(model.get_submodule(owner), QuantizedLayer)

    def check_quantized_param_shape(self, param_name: str, current: Tensor | torch.Size, loaded: Tensor) -> bool:
        raise ValueError(
            f"the checkpoint is damaged: {param_name} has shape {tuple(loaded.shape)}, the plan in config.json says "
            f"{tuple(getattr(current, 'shape', current))}"
        )

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        owner, _, name = param_name.rpartition(".")
        # state_dict still holds the saved type; param_value was cast to torch_dtype, which would move the grid
        value = state_dict[param_name]
        layer = model.get_submodule(owner)
        if value.dtype != layer._buffers[name].dtype:
            raise ValueError(
                f"the checkpoint is damaged: {param_name} is {value.dtype}, expected {layer._buffers[name].dtype}"
            )
        layer._buffers[name] = value.to(target_device)

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


# diffusers 0.42 finds quantizers in these two dictionaries (quantizers/auto.py); packages add themselves on import.
auto.AUTO_QUANTIZER_MAPPING[Method.PQCAD.value] = PQCADDiffusersQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.PQCAD.value] = PQCADQuantizationConfig
