"""Saving and loading through diffusers: the quantizer that ``from_pretrained`` finds."""

import inspect
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from diffusers.utils import is_peft_available
from torch import Tensor, nn

import pqcad_ao.nn.from_unet  # (ControlNets of a quantized UNet)
from pqcad_ao.config import PQCADConfig
from pqcad_ao.denoiser import placement
from pqcad_ao.nn.layers import QuantizedLayer, check_saved
from pqcad_ao.nn.state import ATTRIBUTE, WEIGHTS, Method, QuantizedState, insert_layers, make_layers, state_from_dict
from pqcad_ao.nn.timestep import uninstall_timestep
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
        for name, function in INSTEAD.items():
            if hasattr(model, name):
                setattr(model, name, partial(function, model))
    setattr(model, ATTRIBUTE, state)


def _num_parameters(model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """As diffusers counts them, with those of the quantized layers, which are buffers."""
    kind: Any = type(model)
    counted = kind.num_parameters(model, only_trainable, exclude_embeddings)
    layers = [] if only_trainable else [m for m in model.modules() if isinstance(m, QuantizedLayer)]
    return counted + sum(len(m.weight) * m.reduction + (0 if m.bias is None else len(m.bias)) for m in layers)


def _fuse_qkv_projections(model: nn.Module) -> None:
    raise ValueError(
        f"this {type(model).__name__} is quantized, and packed weights with grids of their own are not fused: leave "
        'fuse_qkv_projections out, torch.compile(unet, backend="pqcad") quantizes the input of all three once'
    )


INSTEAD: dict[str, Callable] = {"num_parameters": _num_parameters, "fuse_qkv_projections": _fuse_qkv_projections}


def skeleton_of(model: Any) -> Any:
    """The full-precision network that a diffusers network's configuration makes, on the meta device."""
    taken = inspect.signature(type(model).__init__).parameters
    config = {name: value for name, value in model.config.items() if name in taken}
    with torch.device("meta"):
        return type(model).from_config(config)


def check_loadable(model: Any, state: QuantizedState | None) -> None:
    """Look whether a diffusers network, with the state of a quantized one, is what it will be loaded as.

    Raises:
        ValueError: it has other tensors than its configuration and its plan make. In full precision it may have more,
            such as fused projections.
    """
    skeleton = skeleton_of(model)
    try:
        for fqn, layer in ({} if state is None else make_layers(skeleton, state)).items():
            skeleton.set_submodule(fqn, layer)
        own, made = ({name: v.shape for name, v in net.state_dict().items()} for net in (model, skeleton))
        names = made.keys() if state is None else own.keys() | made.keys()
        wrong = sorted(name for name in names if own.get(name) != made.get(name))
    except ValueError as error:
        wrong = [str(error)]
    if wrong:
        raise ValueError(
            f"what was saved of this {type(model).__name__} could not be loaded, its configuration makes another "
            f"network: {wrong[0]}. Save adapters with save_lora_adapter and remove them with unload_lora; replace "
            "layers before quantize_, and write what they change with register_to_config(in_channels=...)"
        )


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

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise ValueError(
                "pqcad_ao calibrates a network on its own sampling, which loading knows nothing of: load it without "
                "quantization_config, then write quantize_(unet, PQCADConfig(), scheduler=...) or "
                "quantize_(pipeline, PQCADConfig(), prompts=[...])"
            )
        super().__init__(quantization_config, **kwargs)

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
        fqn, _, name = param_name.rpartition(".")
        owner = model.get_submodule(fqn)
        whole = name == "weight" and state_dict[param_name].is_floating_point()
        if isinstance(owner, QuantizedLayer) and whole and f"{fqn}.weight_scale" not in state_dict:
            raise ValueError(
                "config.json says that pqcad_ao quantized the network, and its weights are in floating point, as those "
                "of one that from_config(quantized.config) made: delete quantization_config from config.json, and it "
                "loads as what it is. diffusers asks nobody before it saves such a network: save it with save_model, "
                "or make it of a configuration without that entry"
            )
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
        """Whether the network can be saved; diffusers asks before it does. Raises as :func:`check_loadable`."""
        owner = self.quantization_config.owner
        model: Any = None if owner is None else owner.model()
        if model is not None:
            check_loadable(model, model._pqcad_state)
            # anew, since saving before has put what it was then into the configuration
            model.register_to_config(quantization_config=self.quantization_config)
        return True

    def _dequantize(self, model: Any) -> nn.Module:
        """The network in floating point, on the weights that its integers stand for; ``model.dequantize()``.

        Raises:
            ValueError: as :func:`check_loadable`.
        """
        state = model._pqcad_state
        check_loadable(model, state)
        skeleton, (_, dtype) = skeleton_of(model), placement(model)
        for row in state.plan.quantized:
            layer, original = model.get_submodule(row.fqn), skeleton.get_submodule(row.fqn)
            original.to_empty(device=layer.weight.device).to(dtype).train(layer.training)
            with torch.no_grad():
                original.weight.copy_(layer.dequantized_weight())
                if layer.bias is not None:
                    original.bias.copy_(layer.bias)
            model.set_submodule(row.fqn, original)
        uninstall_timestep(model)
        for name in (ATTRIBUTE, *(name for name in INSTEAD if name in vars(model))):
            delattr(model, name)
        model._internal_dict = FrozenDict({n: v for n, v in model.config.items() if n != "quantization_config"})
        return model

    @property
    def is_trainable(self) -> bool:
        return False


# diffusers 0.42 finds quantizers in these two dictionaries (quantizers/auto.py); packages add themselves on import.
auto.AUTO_QUANTIZER_MAPPING[Method.PQCAD.value] = PQCADDiffusersQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.PQCAD.value] = PQCADQuantizationConfig
# PipelineQuantizationConfig takes instances of the classes there alone; the quantizer then says what to write instead
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[PQCADConfig.__name__] = PQCADConfig
if is_peft_available():  # diffusers has imported it by now
    import pqcad_ao.nn.adapters  # noqa: F401  (LoRA on quantized layers)
