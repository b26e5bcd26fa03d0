"""A convolution as a linear over every place of the image, which XNNPACK can multiply with weights of four bits.

XNNPACK's convolutions read weights of a byte each; its linears also read two weights a byte. With stride 1 the rows
that a kernel covers are laid beside each other as channels (on the way in), and each of its columns is a linear of its
own, whose results are shifted and added (on the way out): fewer numbers move than in im2col. Everything is written on
(B, C, H, W) tensors except the linears, so that nothing has to be transposed in XNNPACK's channels-last layout.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class ShiftedConv:
    """Geometry of an ungrouped convolution of (B, ``channels``, *``image``)."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    image: tuple[int, int]

    @property
    def steps(self) -> bool:
        """Whether the kernel leaves places out: then every place of the kernel becomes channels (im2col)."""
        return self.stride != (1, 1)

    @property
    def output(self) -> tuple[int, int]:
        """Height and width of the result."""
        height, width = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                self.image, self.padding, self.dilation, self.kernel_size, self.stride, strict=True
            )
        )
        return height, width

    @property
    def places(self) -> tuple[int, int]:
        """Height and width of what the linear sees: the columns are not shifted yet."""
        return self.output if self.steps else (self.output[0], self.image[1])

    def weights(self, weight: Tensor) -> list[Tensor]:
        """For every column the linear's (outputs, inputs) weight, of the convolution's (O, I, kh, kw)."""
        if self.steps:
            return [weight.permute(0, 2, 3, 1).flatten(1)]
        return list(weight.permute(3, 0, 2, 1).flatten(2))

    def inputs(self, channels: int) -> int:
        """The linear's inputs for that many channels."""
        return channels * self.kernel_size[0] * (self.kernel_size[1] if self.steps else 1)

    def shifts(self) -> list[int]:
        """For each column of the kernel, where its result for the output's first place lies."""
        return [0] if self.steps else [j * self.dilation[1] - self.padding[1] for j in range(self.kernel_size[1])]

    def unshifted(self) -> int | None:
        """A column whose results are all used where they are, so that a bias may be added there."""
        covering = [j for j, shift in enumerate(self.shifts()) if shift == 0 and self.places[1] == self.output[1]]
        return covering[0] if covering else None

    def gather(self, values: Tensor, channels: int) -> list[Tensor]:
        """(B, C, H, W) to the linear's inputs as channels: (B, ..., *places) that are to lie beside each other."""
        if self.steps:
            return [self._places_of_windows(values, channels)]
        top, (height, _) = self.padding[0], self.places
        padded = aten.constant_pad_nd.default(values, [0, 0, top, top]) if top else values
        starts = [i * self.dilation[0] for i in range(self.kernel_size[0])]
        return [
            values if (start, height) == (top, self.image[0]) else aten.slice.Tensor(padded, 2, start, start + height)
            for start in starts
        ]

    def _places_of_windows(self, values: Tensor, channels: int) -> Tensor:
        """(B, C, H, W) to (B, kh · kw · C, *output): every place of a window as channels of its own (im2col).

        In channels-last layout as many rows as a stride takes lie behind each other, and so do columns: a stride is the
        first part of them.
        """
        (down, across), (height, width), (top, left) = self.stride, self.kernel_size, self.padding
        taps_down, taps_across = (
            [i * d for i in range(k)] for k, d in zip(self.kernel_size, self.dilation, strict=True)
        )
        # of both, as many whole strides as the last window reaches into
        rows = (self.output[0] + taps_down[-1] // down) * down
        columns = (self.output[1] + taps_across[-1] // across) * across
        missing = [left, columns - left - self.image[1], top, rows - top - self.image[0]]
        if min(missing) < 0:
            values = aten.slice.Tensor(aten.slice.Tensor(values, 2, 0, rows - top), 3, 0, columns - left)
        if max(missing) > 0:
            values = aten.constant_pad_nd.default(values, [max(count, 0) for count in missing])
        row = columns * channels
        image = aten.reshape.default(aten.permute.default(values, [0, 2, 3, 1]), [-1, rows // down, down * row])
        parts = []
        for i in taps_down:
            part = aten.slice.Tensor(image, 1, i // down, i // down + self.output[0])
            part = aten.slice.Tensor(part, 2, i % down * row, (i % down + 1) * row)
            part = aten.reshape.default(part, [-1, columns // across, across * channels])
            for j in taps_across:
                window = aten.slice.Tensor(part, 1, j // across, j // across + self.output[1])
                parts.append(aten.slice.Tensor(window, 2, j % across * channels, (j % across + 1) * channels))
        return to_image(torch.cat(parts, 2), height * width * channels, self.output)

    def scatter(self, results: list[Tensor]) -> Tensor:
        """(B, O, *places) of every column to (B, O, *output)."""
        width, wanted = self.places[1], self.output[1]
        total: Tensor | None = None
        for part, shift in zip(results, self.shifts(), strict=True):
            start, stop = max(shift, 0), min(shift + wanted, width)
            if start >= stop:
                continue  # it lies in the padding altogether
            if (start, stop) != (0, width):
                part = aten.slice.Tensor(part, 3, start, stop)
            if stop - start < wanted:
                part = aten.constant_pad_nd.default(part, [start - shift, wanted - (stop - shift)])
            total = part if total is None else total + part
        if total is None:
            raise NotImplementedError(f"a {self.kernel_size} kernel that meets nothing but the padding of {self.image}")
        return total


def to_tokens(values: Tensor, inputs: int, places: tuple[int, int]) -> Tensor:
    """(B, K, H, W) to (B, H · W, K); free where :func:`pqcad_ao.edge.lower.without_transposes` applies."""
    return aten.permute.default(aten.reshape.default(values, [-1, inputs, places[0] * places[1]]), [0, 2, 1])


def to_image(tokens: Tensor, outputs: int, places: tuple[int, int]) -> Tensor:
    """(B, H · W, N) to (B, N, H, W), in channels-last layout."""
    image = aten.permute.default(aten.reshape.default(tokens, [-1, *places, outputs]), [0, 3, 1, 2])
    return aten._to_copy.default(image, memory_format=torch.channels_last)
