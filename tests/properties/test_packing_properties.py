"""What must hold for every packing of small integers into bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pqcad_ao.ops.packing import pack, packed_size, unpack


@st.composite
def integers(draw):
    """A bit width, and int8 integers (..., K) of that width with its extremes among them; K may be zero."""
    bits, length = draw(st.integers(2, 8)), draw(st.integers(0, 33))
    batch = draw(st.lists(st.integers(1, 3), max_size=2))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randint(low, high + 1, (*batch, length), generator=generator, dtype=torch.int8)
    if length > 1:
        values[..., 0], values[..., -1] = low, high
    return bits, values


def _rows(values):
    return values.flatten(0, -2) if values.dim() > 1 else values[None]


@given(integers())
def test_round_trip(case):
    bits, values = case
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*values.shape[:-1], packed_size(values.shape[-1], bits))
    unpacked = unpack(packed, bits, values.shape[-1])
    assert unpacked.dtype == torch.int8
    assert torch.equal(unpacked, values)


@given(integers())
def test_the_bytes_are_a_little_endian_bit_stream(case):
    bits, values = case
    values = _rows(values)
    for row, expected in zip(pack(values, bits).tolist(), values.tolist(), strict=True):
        stream = sum(byte << (8 * place) for place, byte in enumerate(row))
        for k, value in enumerate(expected):
            assert (stream >> (k * bits)) & (2**bits - 1) == value % 2**bits
        assert stream >> (len(expected) * bits) == 0  # what is left over is zero


@given(st.integers(0, 10_000), st.integers(2, 8))
def test_size_is_the_bits_rounded_up_to_bytes(length, bits):
    size = packed_size(length, bits)
    assert 8 * size >= length * bits
    assert 8 * (size - 1) < length * bits or size == 0


@given(integers())
def test_rows_are_packed_one_by_one(case):
    bits, values = case
    values = _rows(values)
    packed = pack(values, bits)
    for row in range(len(values)):
        assert torch.equal(pack(values[row], bits), packed[row])


def test_four_bits_pack_low_nibble_first():
    values = torch.tensor([1, 2, -1, -8, 7], dtype=torch.int8)
    assert pack(values, 4).tolist() == [0x21, 0x8F, 0x07]


@pytest.mark.parametrize(
    ("bits", "values", "expected"),
    [
        (2, [1, -2, -1, 0, 1], [0b00111001, 0b01]),
        (3, [1, -1, -4], [0b00111001, 0b1]),
        (8, [-128, 127, -1], [128, 127, 255]),
    ],
)
def test_bytes_of_other_widths(bits, values, expected):
    assert pack(torch.tensor(values), bits).tolist() == expected


@given(st.integers(2, 8), st.integers(1, 5), st.booleans(), st.sampled_from([torch.int8, torch.int32, torch.float32]))
def test_a_value_out_of_range_is_an_error(bits, length, above, dtype):
    values = torch.zeros(length, dtype=torch.int32)
    values[-1] = 2 ** (bits - 1) if above else -(2 ** (bits - 1)) - 1
    if dtype == torch.int8 and bits == 8:
        dtype = torch.int16  # int8 cannot hold it
    with pytest.raises(ValueError, match=f"{bits}-bit integers lie in"):
        pack(values.to(dtype), bits)


def test_nan_is_out_of_range():
    with pytest.raises(ValueError, match="4-bit integers lie in"):
        pack(torch.tensor([0.0, float("nan")]), 4)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_bits_out_of_range_are_an_error(bits):
    with pytest.raises(ValueError, match="allowed are 2 to 8"):
        pack(torch.zeros(2, dtype=torch.int8), bits)
    with pytest.raises(ValueError, match="allowed are 2 to 8"):
        unpack(torch.zeros(2, dtype=torch.uint8), bits, 2)


def test_unpacking_checks_size_and_type():
    packed = pack(torch.zeros(5, dtype=torch.int8), 4)
    with pytest.raises(ValueError, match="7 values of 4 bits are 4 bytes"):
        unpack(packed, 4, 7)
    with pytest.raises(ValueError, match=r"given were 3 of torch\.int8"):
        unpack(packed.view(torch.int8), 4, 5)
