"""The two files of an ncnn network: read, given 8-bit weights and scales, written.

The layers and their options stand in ``.param``, as text, their weights in ``.bin``, one after another. ncnn's programs
``ncnn2table`` and ``ncnn2int8`` quantize such a network; its Python package has neither, so what they do is done here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAGIC = "7767517"
FLOAT32, INT8 = 0, 0x000D4B38  # tags before weights
INT8_SCALES = {"Convolution": 8, "InnerProduct": 8, "MultiHeadAttention": 18}  # the option that says they are there
CALIBRATED = ("Convolution", "InnerProduct")  # their inputs have one scale; attention measures its own at each step


@dataclass
class Layer:
    """A line of ``.param`` with what ``.bin`` holds for it.

    Attributes:
        options: by their numbers, as text.
        weights: float32 or int8 behind a tag that says which, or plain float32.
        tagged: which of the weights have a tag.
    """

    kind: str
    name: str
    inputs: list[str]
    outputs: list[str]
    options: dict[int, str]
    weights: list[np.ndarray]
    tagged: list[bool]

    def option(self, number: int, default: int = 0) -> int:
        return int(self.options.get(number, default))


def _of_convolution(layer: Layer) -> list[tuple[int, bool]]:
    return [(layer.option(6), True), *[(layer.option(0), False)] * layer.option(5)]


def _of_inner_product(layer: Layer) -> list[tuple[int, bool]]:
    return [(layer.option(2), True), *[(layer.option(0), False)] * layer.option(1)]


def _of_attention(layer: Layer) -> list[tuple[int, bool]]:
    width, size = layer.option(0), layer.option(2)
    keys, values = layer.option(3, width), layer.option(4, width)
    projections = [(size, width), (width * keys, width), (width * values, width), (size, size // width)]
    return [piece for weight, bias in projections for piece in ((weight, True), (bias, False))]


def _of_constant(layer: Layer) -> list[tuple[int, bool]]:
    return [(math.prod(layer.option(axis) or 1 for axis in (0, 1, 2, 11)), layer.option(21, 1) == 0)]


# by kind: how many numbers of each weight, in their order, and whether a tag stands before them
PIECES: dict[str, Callable[[Layer], list[tuple[int, bool]]]] = {
    "Convolution": _of_convolution,
    "InnerProduct": _of_inner_product,
    "MultiHeadAttention": _of_attention,
    "MemoryData": _of_constant,
    "GroupNorm": lambda layer: [(layer.option(1), False)] * 2 * layer.option(3, 1),
    "LayerNorm": lambda layer: [(layer.option(0), False)] * 2 * layer.option(2, 1),
}


def read(param: Path, weights: Path) -> list[Layer]:
    """The layers of a float32 network.

    Raises:
        ValueError: weights of another type, or a layer whose weights are not known here.
    """
    given = weights.read_bytes()
    at = 0
    layers: list[Layer] = []

    def take(count: int) -> np.ndarray:
        nonlocal at
        if at + 4 * count > len(given):
            raise ValueError(f"{weights.name} ends within the weights of {layers[-1].name}")
        at += 4 * count
        return np.frombuffer(given, "<f4", count, at - 4 * count)

    for line in param.read_text().splitlines()[2:]:
        kind, name, taken, made, *rest = line.split()
        first, second = int(taken), int(taken) + int(made)
        options = dict(text.split("=", 1) for text in rest[second:])
        numbered = {int(number): value for number, value in options.items()}
        layers.append(Layer(kind, name, rest[:first], rest[first:second], numbered, [], []))
        for count, tagged in PIECES.get(kind, lambda _: [])(layers[-1]):
            if tagged and (tag := int(take(1).view("<u4")[0])) != FLOAT32:
                raise ValueError(f"the weights of {name} are tagged {tag:#x}: only float32 ones are read")
            layers[-1].weights.append(take(count))
            layers[-1].tagged.append(tagged)
    if at != len(given):
        kinds = ", ".join(sorted({layer.kind for layer in layers} - PIECES.keys()))
        raise ValueError(f"{len(given) - at} bytes of {weights.name} are left: one of {kinds} has weights, too")
    return layers


def write(layers: Sequence[Layer], param: Path, weights: Path) -> None:
    """Write the layers as ncnn loads them."""
    blobs = sum(len(layer.outputs) for layer in layers)
    lines = [MAGIC, f"{len(layers)} {blobs}"]
    with weights.open("wb") as file:
        for layer in layers:
            options = [f"{number}={value}" for number, value in layer.options.items()]
            counts = [str(len(layer.inputs)), str(len(layer.outputs))]
            lines.append(" ".join([layer.kind, layer.name, *counts, *layer.inputs, *layer.outputs, *options]))
            for weight, tagged in zip(layer.weights, layer.tagged, strict=True):
                if tagged:
                    file.write(np.uint32(INT8 if weight.dtype == np.int8 else FLOAT32).tobytes())
                file.write(weight.tobytes() + bytes(-weight.nbytes % 4))
    param.write_text("\n".join(lines) + "\n")


def quantize(layers: Sequence[Layer], largest: dict[str, float]) -> None:
    """Give the layers 8-bit weights and scales, in place, as ``ncnn2int8`` does after ``ncnn2table``.

    A weight has a scale for each output, an input one for all of it. Where the products go through Winograd's F(4×4,
    3×3), whose sums have 16 bits, ncnn takes weights from -31 to 31.

    Args:
        largest: magnitude of a calibrated layer's input, by the layer's name.
    """
    for layer in layers:
        if layer.kind not in INT8_SCALES:
            continue
        most, scales = 31 if _by_winograd(layer) else 127, []
        for index in np.flatnonzero(layer.tagged):
            # attention's last projection has one scale for all its outputs
            rows = 1 if layer.kind == "MultiHeadAttention" and index == 6 else layer.option(0)
            layer.weights[index], scale = _in_8_bits(layer.weights[index].reshape(rows, -1), most)
            scales.append(scale)
        if layer.kind in CALIBRATED:
            scales.append(np.array([127 / (largest[layer.name] or 127)], np.float32))
        layer.weights += scales
        layer.tagged += [False] * len(scales)
        layer.options[INT8_SCALES[layer.kind]] = "2"


def _in_8_bits(weight: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The weight (rows, numbers) from ``-most`` to ``most``, and the scale of each row that took it there."""
    magnitude = np.abs(weight).max(axis=1)
    scale = np.divide(most, magnitude, out=np.ones_like(magnitude), where=magnitude > 0)
    return np.rint(weight * scale[:, None]).astype(np.int8), scale


def _by_winograd(layer: Layer) -> bool:
    kernel, dilation, stride = layer.option(1), layer.option(2, 1), layer.option(3, 1)
    same = layer.option(11, kernel), layer.option(12, dilation), layer.option(13, stride)
    return layer.kind == "Convolution" and (kernel, dilation, stride) == (3, 1, 1) == same
