"""LoRA beside quantized layers: the adapters that peft puts there, imported only where peft is."""

from typing import Any

from peft.tuners.lora import Linear, LoraModel
from torch import nn

from pqcad_ao.nn.conv2d import QuantizedConv2d
from pqcad_ao.nn.layers import QuantizedLayer
from pqcad_ao.nn.linear import QuantizedLinear

CONVOLUTIONS: dict[str, Any] = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d}  # those whose adapters peft knows


class LoraQuantizedLinear(Linear):
    """A quantized linear layer, to whose result adapters in floating point add theirs (Hu et al. 2021, eq. 3)."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        layer: Any = module
        return layer.in_features, layer.out_features

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        return {(): None}  # the others compute with the weight, which is packed

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            f"{self.get_base_layer().fqn} holds packed integers, no adapter can be merged into it: leave it beside "
            "the quantized layer, or fuse it into the full-precision network and quantize that"
        )


class LoraQuantizedConv(LoraQuantizedLinear):
    """A quantized convolution with adapters: a convolution of its shape to the rank, and one by one from there."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        layer: Any = module
        if layer.kind not in CONVOLUTIONS:
            raise ValueError(
                f"{layer.fqn} is a {layer.kind}, of which peft has no LoRA: leave it out of target_modules"
            )
        return layer.in_channels, layer.out_channels

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        layer: Any = self.get_base_layer()
        convolution = CONVOLUTIONS[layer.kind]
        # an image of height one stands for what Conv1d takes
        first = 1 if convolution is nn.Conv1d else 0
        window = [numbers[first:] for numbers in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)]
        self.lora_A[adapter_name] = convolution(self.in_features, r, *window, bias=False)
        self.lora_B[adapter_name] = convolution(
            r, self.out_features, 1, groups=layer.groups, bias=self.lora_bias[adapter_name]
        )
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)


LAYERS: dict[type[QuantizedLayer], type[LoraQuantizedLinear]] = {
    QuantizedLinear: LoraQuantizedLinear,
    QuantizedConv2d: LoraQuantizedConv,
}
_create = LoraModel._create_new_module


def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
    lora_config._register_custom_module(LAYERS)
    return _create(lora_config, adapter_name, target, **kwargs)


# peft 0.21 asks each LoraConfig, and nothing else, about layers that it does not know; diffusers makes the one of
# load_lora_weights itself
setattr(LoraModel, "_create_new_module", staticmethod(_create_new_module))  # noqa: B010 (mypy)
