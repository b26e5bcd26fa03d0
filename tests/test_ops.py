"""The ``pqcad::`` operators against arithmetic in 64-bit integers, and against what torch.library demands of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pqcad_ao.ops import dispatch
from pqcad_ao.ops.packing import pack, unpack
from pqcad_ao.ops.reference import conv2d_accumulators, exact_dtype, linear_accumulators, unpack_conv_weight


def _integers(generator: torch.Generator, bits: int, *shape: int) -> Tensor:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8)


def _pack_conv(weight: Tensor, bits: int) -> Tensor:
    return pack(weight.permute(0, 2, 3, 1).flatten(1), bits)


def brute_force_conv2d(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> Tensor:
    """Convolution of int64 tensors, one kernel position at a time."""
    x, weight = x.long(), weight.long()
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    height = (x.shape[2] - dilation[0] * (weight.shape[2] - 1) - 1) // stride[0] + 1
    width = (x.shape[3] - dilation[1] * (weight.shape[3] - 1) - 1) // stride[1] + 1
    total = torch.zeros(x.shape[0], weight.shape[0], height, width, dtype=torch.int64)
    for group, (part, filters) in enumerate(zip(x.chunk(groups, 1), weight.chunk(groups, 0), strict=True)):
        rows = slice(group * len(filters), (group + 1) * len(filters))
        for i in range(weight.shape[2]):
            for j in range(weight.shape[3]):
                top, left = i * dilation[0], j * dilation[1]
                window = part[
                    :, :, top : top + stride[0] * height : stride[0], left : left + stride[1] * width : stride[1]
                ]
                total[:, rows] += (window[:, None] * filters[None, :, :, i, j, None, None]).sum(2)
    return total


@st.composite
def convolutions(draw):
    """Input, weight and geometry of a convolution that has an output."""
    bits, groups = draw(st.integers(2, 8)), draw(st.sampled_from([1, 1, 1, 2]))
    parts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)) if groups == 1 else [2 * draw(st.integers(1, 3))]
    kernel = [draw(st.integers(1, 3)), draw(st.integers(1, 3))]
    geometry = [[draw(st.integers(least, 2)) for _ in range(2)] for least in (1, 0, 1)]  # stride, padding, dilation
    size = [draw(st.integers(1, 5)) + d * (k - 1) for d, k in zip(geometry[2], kernel, strict=True)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = _integers(generator, 8, draw(st.integers(0, 3)), sum(parts), *size)
    weight = _integers(generator, bits, groups * draw(st.integers(1, 3)), sum(parts) // groups, *kernel)
    return x, weight, bits, parts, kernel, *geometry, groups


@given(convolutions())
def test_conv2d_accumulators_equal_64_bit_integers(case):
    x, weight, bits, segments, kernel, stride, padding, dilation, groups = case
    sums = conv2d_accumulators(x, _pack_conv(weight, bits), bits, segments, kernel, stride, padding, dilation, groups)
    if groups > 1:
        assert torch.equal(sums[0].long(), brute_force_conv2d(x, weight, stride, padding, dilation, groups))
        return
    assert len(sums) == len(segments)
    for total, part, rows in zip(sums, x.split(segments, 1), weight.split(segments, 1), strict=True):
        assert torch.equal(total.long(), brute_force_conv2d(part, rows, stride, padding, dilation, 1))


@given(
    st.integers(2, 8),
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.lists(st.integers(0, 4), min_size=1, max_size=3),
    st.integers(1, 5),
    st.integers(0, 2**31),
)
def test_linear_accumulators_equal_64_bit_integers(bits, segments, batch, out_features, seed):
    generator = torch.Generator().manual_seed(seed)
    x = _integers(generator, 8, *batch, sum(segments))
    weight = _integers(generator, bits, out_features, sum(segments))
    sums = linear_accumulators(x, pack(weight, bits), bits, segments)
    for total, part, rows in zip(sums, x.split(segments, -1), weight.split(segments, -1), strict=True):
        expected = (part.long()[..., None, :] * rows.long()).sum(-1)
        assert torch.equal(total.long(), expected)


@given(st.integers(2, 8), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 3))
def test_conv_weights_unpack_to_their_own_order(bits, out_channels, in_channels, height, width):
    generator = torch.Generator().manual_seed(bits)
    weight = _integers(generator, bits, out_channels, in_channels, height, width)
    assert torch.equal(unpack_conv_weight(_pack_conv(weight, bits), bits, in_channels, [height, width]), weight)


def test_the_last_reduction_that_float32_holds():
    assert exact_dtype(8, 1024) == torch.float32
    assert exact_dtype(8, 1025) == torch.float64
    assert exact_dtype(4, 16384) == torch.float32
    assert exact_dtype(4, 16385) == torch.float64


@pytest.mark.parametrize("reduction", [1023, 1024, 1025, 4097])
def test_the_largest_sums_are_exact(reduction):
    """All at their extremes but one, so that the sum is odd and float32 could not hold it above 2^24."""
    x = torch.full((1, reduction), -128, dtype=torch.int8)
    weight = torch.full((2, reduction), -128, dtype=torch.int8)
    x[0, 0], weight[1] = 1, 127
    weight[:, 0] = 1
    (sums,) = linear_accumulators(x, pack(weight, 8), 8, [reduction])
    assert sums.long().tolist() == [[1 + (reduction - 1) * 16384, 1 - (reduction - 1) * 128 * 127]]


def _conv2d_arguments(
    segments=(5,), kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, bits=4, batch=2, **options
):
    generator = torch.Generator().manual_seed(0)
    channels, out_channels = sum(segments), 4
    weight = _integers(generator, bits, out_channels, channels // groups, *kernel)
    bias = torch.randn(out_channels, generator=generator) if options.get("bias", True) else None
    return (
        _integers(generator, 8, batch, channels, 6, 7),
        _pack_conv(weight, bits),
        torch.rand(out_channels, generator=generator) + 0.1,
        torch.rand(batch, len(segments), generator=generator) + 0.1,
        bias,
        bits,
        list(segments),
        list(kernel),
        list(stride),
        list(padding),
        list(dilation),
        groups,
        options.get("dtype", torch.float32),
    )


def _linear_arguments(segments=(7,), shape=(2,), bits=4, bias=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    weight = _integers(generator, bits, 3, sum(segments))
    return (
        _integers(generator, 8, *shape, sum(segments)),
        pack(weight, bits),
        torch.rand(3, generator=generator) + 0.1,
        torch.rand(shape[0], len(segments), generator=generator) + 0.1,
        torch.randn(3, generator=generator) if bias else None,
        bits,
        list(segments),
        dtype,
    )


CONVOLUTIONS = {
    "plain": {},
    "strided": {"stride": (2, 1), "padding": (0, 2)},
    "dilated": {"dilation": (2, 1), "kernel": (2, 3), "padding": (0, 1)},
    "grouped": {"groups": 2, "segments": (4,)},
    "segments": {"segments": (3, 1, 4)},
    "w8": {"bits": 8, "kernel": (1, 1), "padding": (0, 0)},
    "w3": {"bits": 3, "bias": False},
    "empty": {"batch": 0},
    "bf16": {"dtype": torch.bfloat16, "segments": (2, 3)},
}
LINEARS = {
    "plain": {},
    "tokens": {"shape": (2, 5)},
    "segments": {"segments": (4, 3), "shape": (3, 2, 2)},
    "w5": {"bits": 5, "bias": False},
    "empty": {"shape": (0, 4)},
    "bf16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_opcheck_conv2d(options):
    torch.library.opcheck(torch.ops.pqcad.conv2d.default, _conv2d_arguments(**options))


@pytest.mark.parametrize("options", LINEARS.values(), ids=LINEARS)
def test_opcheck_linear(options):
    torch.library.opcheck(torch.ops.pqcad.linear.default, _linear_arguments(**options))


def _weight_only_arguments(shape=(2,), features=7, bits=4, bias=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(*shape, features, generator=generator).to(dtype),
        pack(_integers(generator, bits, 3, features), bits),
        torch.rand(3, generator=generator) + 0.1,
        torch.randn(3, generator=generator) if bias else None,
        bits,
    )


WEIGHT_ONLY = {
    "plain": {},
    "one vector": {"shape": ()},
    "tokens": {"shape": (2, 5), "bias": False},
    "w3": {"bits": 3, "features": 20},
    "empty": {"shape": (0,)},
    "bf16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("options", WEIGHT_ONLY.values(), ids=WEIGHT_ONLY)
def test_opcheck_weight_only_linear(options):
    torch.library.opcheck(torch.ops.pqcad.weight_only_linear.default, _weight_only_arguments(**options))


@pytest.mark.parametrize("options", WEIGHT_ONLY.values(), ids=WEIGHT_ONLY)
def test_weight_only_linear_is_the_product_with_dequantized_weights(options):
    x, packed, weight_scale, bias, bits = arguments = _weight_only_arguments(**options)
    weight = unpack(packed, bits, x.shape[-1]).double() * weight_scale[:, None]
    expected = F.linear(x.double(), weight, None if bias is None else bias.double())
    output = torch.ops.pqcad.weight_only_linear(*arguments)
    assert output.dtype == x.dtype
    tolerance = 3e-2 if x.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(2, 4, 6, 7), (2, 4, 1, 1)])
def test_opcheck_addends(shape):
    addend = torch.randn(shape)
    torch.library.opcheck(torch.ops.pqcad.conv2d.default, _conv2d_arguments(), {"input_bits": 8, "addend": addend})
    torch.library.opcheck(
        torch.ops.pqcad.linear.default, _linear_arguments(shape=(2, 5)), {"addend": torch.randn(2, 5, 3)}
    )


@pytest.mark.parametrize(("shape", "dim"), [((2, 5, 3, 4), 1), ((2, 3, 4, 5), -1), ((3, 5), -1), ((0, 2, 5), -1)])
@pytest.mark.parametrize("segments", [[5], [2, 3]])
def test_opcheck_quantize(shape, dim, segments):
    grid = (torch.rand(shape[0], len(segments)) + 0.1, torch.full((shape[0], len(segments)), -3, dtype=torch.int16))
    arguments = (torch.randn(shape), *grid, segments, 4, dim)
    torch.library.opcheck(torch.ops.pqcad.quantize.default, arguments)


@pytest.mark.parametrize(("groups", "silu", "upsample"), [(0, False, 1), (2, True, 1), (4, True, 2)])
@pytest.mark.parametrize("channels", [[8], [3, 5]])
def test_opcheck_norm_silu_quantize(groups, silu, upsample, channels):
    grid = (torch.rand(2, 1) + 0.1, torch.full((2, 1), -3, dtype=torch.int16), [8], 4, upsample)
    inputs = [torch.randn(2, count, 3, 4) for count in channels]
    arguments = (inputs, torch.randn(8), torch.randn(8), groups, 1e-5, silu, *grid)
    torch.library.opcheck(torch.ops.pqcad.norm_silu_quantize.default, arguments)


def test_opcheck_attention():
    query, key, value = (torch.randn(2, count, 3, 8).transpose(1, 2) for count in (5, 4, 4))
    torch.library.opcheck(torch.ops.pqcad.attention.default, (query, key, value, 0.5))


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_conv2d_is_the_convolution_of_dequantized_values(options):
    x, packed, weight_scale, scale, bias, bits, segments, kernel, *geometry, groups, dtype = arguments = (
        _conv2d_arguments(**options)
    )
    weight = unpack_conv_weight(packed, bits, x.shape[1] // groups, kernel).double() * weight_scale[:, None, None, None]
    values = x.double() * scale.double().repeat_interleave(torch.tensor(segments), 1)[:, :, None, None]
    expected = F.conv2d(values, weight, None if bias is None else bias.double(), *geometry, groups)
    output = torch.ops.pqcad.conv2d(*arguments)
    assert output.dtype == dtype
    assert output.shape == expected.shape
    assert output.is_contiguous(memory_format=torch.channels_last)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", LINEARS.values(), ids=LINEARS)
def test_linear_is_the_product_of_dequantized_values(options):
    x, packed, weight_scale, scale, bias, bits, segments, dtype = arguments = _linear_arguments(**options)
    integers = linear_accumulators(torch.eye(x.shape[-1], dtype=torch.int8), packed, bits, [x.shape[-1]])[0]
    weight = integers.T.double() * weight_scale[:, None]
    factors = scale.double().repeat_interleave(torch.tensor(segments), 1)
    values = x.double() * factors.view(x.shape[0], *[1] * (x.dim() - 2), x.shape[-1])
    expected = F.linear(values, weight, None if bias is None else bias.double())
    output = torch.ops.pqcad.linear(*arguments)
    assert output.dtype == dtype
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


def test_autocast_does_not_round_the_sums():
    conv, linear = _conv2d_arguments(segments=(40,)), _linear_arguments(segments=(400,))
    plain = torch.ops.pqcad.conv2d(*conv), torch.ops.pqcad.linear(*linear)
    with torch.autocast("cpu", torch.bfloat16):
        cast = torch.ops.pqcad.conv2d(*conv), torch.ops.pqcad.linear(*linear)
    for expected, output in zip(plain, cast, strict=True):
        assert torch.equal(output, expected)


def test_the_inputs_layout_does_not_matter():
    x, *rest = _conv2d_arguments(segments=(3, 5))
    expected = torch.ops.pqcad.conv2d(x, *rest)
    for other in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        output = torch.ops.pqcad.conv2d(other, *rest)
        assert torch.equal(output, expected)
        assert output.is_contiguous(memory_format=torch.channels_last)
    x, *rest = _linear_arguments(shape=(4, 6))
    expected = torch.ops.pqcad.linear(x, *rest)
    assert torch.equal(torch.ops.pqcad.linear(x.transpose(0, 1).contiguous().transpose(0, 1), *rest), expected)


@settings(max_examples=10)
@given(st.integers(1, 5), st.permutations(range(5)))
def test_samples_do_not_touch_each_other(batch, order):
    arguments = list(_conv2d_arguments(segments=(3, 2), batch=5))
    expected = torch.ops.pqcad.conv2d(*arguments)
    rows = torch.tensor(order[:batch])
    arguments[0], arguments[3] = arguments[0][rows], arguments[3][rows]
    assert torch.equal(torch.ops.pqcad.conv2d(*arguments), expected[rows])


def test_unquantized_input_is_an_error():
    x, *rest = _conv2d_arguments()
    with pytest.raises(ValueError, match=r"(?i)input is .*float.* take int8"):
        torch.ops.pqcad.conv2d(x.float(), *rest)
    x, *rest = _linear_arguments()
    with pytest.raises(ValueError, match=r"(?i)input is .*int.* take int8"):
        torch.ops.pqcad.linear(x.int(), *rest)


def test_segments_and_scales_must_fit_the_input():
    arguments = list(_conv2d_arguments(segments=(3, 2)))
    arguments[6] = [3, 3]
    with pytest.raises(ValueError, match="sum to 6, the input has 5"):
        torch.ops.pqcad.conv2d(*arguments)
    arguments = list(_conv2d_arguments(segments=(3, 2)))
    arguments[3] = arguments[3][:, :1]
    with pytest.raises(ValueError, match=r"expected \(batch, segments\) = \(2, 2\)"):
        torch.ops.pqcad.conv2d(*arguments)
    arguments = list(_conv2d_arguments(segments=(2, 2), groups=1))
    arguments[11] = 2
    arguments[1] = arguments[1][:, : 3 * 3]
    with pytest.raises(ValueError, match="one segment"):
        torch.ops.pqcad.conv2d(*arguments)


def test_tensors_of_two_devices_are_an_error():
    with pytest.raises(ValueError, match="tensors on cpu and meta: move"):
        dispatch._check_devices(torch.ones(1), [torch.ones(1, device="meta"), 3], None)


def test_a_weight_of_another_size_is_an_error():
    x, weight, *rest = _linear_arguments()
    with pytest.raises(ValueError, match=r"7 values of 4 bits are 4 bytes|expected uint8 \(.*, 4\)"):
        torch.ops.pqcad.linear(x, weight[:, :-1], *rest)
