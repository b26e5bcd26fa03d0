"""Saving and loading through diffusers: the quantizer that ``from_pretrained`` finds."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from diffusers.utils import is_peft_available
from torch import Tensor, nn

from pqcad_ao.nn.layers import QuantizedLayer, check_saved
from pqcad_ao.nn.state import ATTRIBUTE, WEIGHTS, Method, QuantizedState, insert_layers, make_layers, state_from_dict
from pqcad_ao.utils.tensor_files import checksum, checksum_of, join_checksums


def attach(model: nn.Module, state: QuantizedState) -> None:
    """Make ``model`` remember how it was quantized, for ``plan(model)``, for the report and for saving."""
    if isinstance(model, ConfigMixin):
        quantization_config = PQCADQuantizationConfig(**state.to_dict())
        quantization_config.owner = _Owner(model)
        model.register_to_config(quantization_config=quantization_config)
        model.hf_quantizer = PQCADDiffusersQuantizer(quantization_config, pre_quantized=True)
        # diffusers refuses .to(dtype) where this is set; our layers keep their grids in float32 through any cast
        model.is_quantized = False
    setattr(model, ATTRIBUTE, state)


class PQCADQuantizationConfig(QuantizationConfigMixin):
    """What diffusers keeps under ``quantization_config`` in config.json."""

    def __init__(self, quant_method: str = Method.PQCAD.value, **values: Any) -> None:
        self.quant_method = Method(quant_method)
        self.weights = values.pop(WEIGHTS, None)  # checksum of those that config.json was written with
        self.values = values
        self.owner: _Owner | None = None

    def to_dict(self) -> dict[str, Any]:
        """For config.json; with the checksum of the weights that the network has now, which are saved with it."""
        model = None if self.owner is None else self.owner.model()
        tensors = {} if model is None else model.state_dict()
        known = bool(tensors) and not any(value.is_meta for value in tensors.values())
        return {**self.to_diff_dict(), **({WEIGHTS: checksum(tensors)} if known else {})}

    def to_diff_dict(self) -> dict[str, Any]:
        """For diffusers' repr."""
        return {"quant_method": self.quant_method.value, **self.values}


class _Owner:
    """The network that a configuration is of. It does not keep it alive, and is of the copy where both are copied."""

    def __init__(self, model: nn.Module | None) -> None:
        self.model: Callable[[], nn.Module | None] = (lambda: None) if model is None else weakref.ref(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Owner":
        return _Owner(memo.get(id(self.model()), self.model()))

    def __reduce__(self) -> tuple[type, tuple[None]]:
        return _Owner, (None,)


class PQCADDiffusersQuantizer(DiffusersQuantizer):
    """Lets ``from_pretrained`` rebuild a network that pqcad_ao quantized and saved."""

    requires_calibration = True  # only networks quantized before can be loaded: quantize_ does the rest

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.state = state_from_dict(self.quantization_config.to_dict())
        self.read: dict[str, str] = {}  # checksums of the tensors, as they are in the file
        insert_layers(model, make_layers(model, self.state), self.state.timestep)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        empty = [name for name, value in model.state_dict().items() if value.is_meta]
        if empty:
            raise ValueError(
                f"the checkpoint is damaged: it holds no {', '.join(empty[:3])}{' ...' if len(empty) > 3 else ''}"
            )
        if self.quantization_config.weights not in (None, join_checksums(self.read.values())):
            raise ValueError(
                "the checkpoint is damaged: the weights are not those that config.json was written with, by its "
                "checksum. They are of another save, or were changed"
            )
        attach(model, self.state)
        return model

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Whether a tensor is one of a quantized layer; diffusers asks for each, so each is looked at here."""
        owner = model.get_submodule(param_name.rpartition(".")[0])
        # state_dict still holds the saved type; param_value was cast to torch_dtype
        check_saved(param_name, state_dict[param_name], owner)
        self.read[param_name] = checksum_of(param_name, state_dict[param_name])
        return isinstance(owner, QuantizedLayer)

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
        # param_value was cast to torch_dtype, which would move the grid
        model.get_submodule(owner)._buffers[name] = state_dict[param_name].to(target_device)

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


# diffusers 0.42 finds quantizers in these two dictionaries (quantizers/auto.py); packages add themselves on import.
auto.AUTO_QUANTIZER_MAPPING[Method.PQCAD.value] = PQCADDiffusersQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.PQCAD.value] = PQCADQuantizationConfig
if is_peft_available():  # diffusers has imported it by now
    import pqcad_ao.nn.adapters  # noqa: F401  (LoRA on quantized layers)
