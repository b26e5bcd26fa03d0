"""Integers of 2 to 8 bits packed into bytes along the last dimension: a little-endian bit stream."""

import torch
from torch import Tensor


def packed_size(length: int, bits: int) -> int:
    """Bytes that ``length`` values of ``bits`` bits take."""
    return -(-length * bits // 8)


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack signed integers.

    Args:
        values: (..., K) integers in [-2^(bits-1), 2^(bits-1) - 1].
        bits: 2 to 8.

    Returns:
        (..., ceil(K·bits/8)) uint8. Value k occupies bits k·bits to (k+1)·bits - 1 of the row, least significant first
        (at 4 bits: low nibble first), in two's complement; what is left over in the last byte is zero.

    Raises:
        ValueError: bits or a value out of range.
    """
    _check(bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if values.numel() and not (values.min() >= low and values.max() <= high):  # NaN included
        raise ValueError(f"{bits}-bit integers lie in [{low}, {high}]; given were {values.min()} to {values.max()}")
    length = values.shape[-1]
    if bits == 8:
        return values.to(torch.int8).view(torch.uint8)
    codes = values.to(torch.int32) & (2**bits - 1)
    if bits == 4:
        codes = torch.nn.functional.pad(codes, (0, length % 2))
        return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    shifts = torch.arange(bits, device=values.device, dtype=torch.int32)
    stream = (codes[..., None] >> shifts & 1).flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, 8 * packed_size(length, bits) - length * bits)).unflatten(-1, (-1, 8))
    return (stream << torch.arange(8, device=values.device, dtype=torch.int32)).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """Invert :func:`pack`: (..., ceil(length·bits/8)) uint8 to (..., length) int8."""
    _check(bits)
    if packed.dtype != torch.uint8 or packed.shape[-1] != packed_size(length, bits):
        raise ValueError(
            f"{length} values of {bits} bits are {packed_size(length, bits)} bytes of uint8; given were "
            f"{packed.shape[-1]} of {packed.dtype}"
        )
    if bits == 8:
        return packed.view(torch.int8)
    if bits == 4:
        low, high = packed << 4, packed & 0xF0  # both with their sign in the byte's top bit
        return (torch.stack((low, high), -1).flatten(-2)[..., :length].view(torch.int8)) >> 4
    stream = (
        packed[..., None].to(torch.int32) >> torch.arange(8, device=packed.device, dtype=torch.int32) & 1
    ).flatten(-2)
    codes = stream[..., : length * bits].unflatten(-1, (length, bits))
    codes = (codes << torch.arange(bits, device=packed.device, dtype=torch.int32)).sum(-1)
    return (codes - ((codes >> (bits - 1)) << bits)).to(torch.int8)


def _check(bits: int) -> None:
    if bits not in range(2, 9):
        raise ValueError(f"bits={bits}: allowed are 2 to 8")
