"""The CPU kernels against the reference kernel: every shape, every width, exact sums."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import convolutions, extremes, integers
from torch import Tensor

from pqcad_ao.ops import dispatch, reference
from pqcad_ao.ops.cpu import loader
from pqcad_ao.ops.dispatch import arithmetic
from pqcad_ao.ops.packing import pack

needs_kernels = pytest.mark.usefixtures("kernels")


@pytest.fixture(scope="module")
def kernels() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not loader.load():
            pytest.skip("no kernels for this machine, or no C++ compiler")


def _bound(expected: Tensor) -> float:
    """For sums of segments and addends that cancel: the last bits of the largest."""
    return 1e-5 * max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)


def _same(arguments, addend: Tensor | None = None) -> None:
    expected = reference.conv2d(*arguments, addend)
    output = torch.ops.pqcad.conv2d(*arguments, addend)
    assert output.shape == expected.shape
    assert output.dtype == expected.dtype
    assert output.stride() == expected.stride()
    # the sums are the same integers: what differs is the last bit of a scale's product
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=_bound(expected))


@needs_kernels
@settings(max_examples=60)
@given(convolutions(winograd=True))
def test_winograd_equals_the_reference(arguments):
    _same(arguments)


@needs_kernels
@settings(max_examples=60)
@given(convolutions(winograd=False))
def test_direct_convolution_equals_the_reference(arguments):
    _same(arguments)


@needs_kernels
@settings(max_examples=30)
@given(st.booleans().flatmap(lambda winograd: convolutions(winograd=winograd)))
def test_integer_sums_are_exact(arguments):
    """With scales of one and no bias the output is the sum itself."""
    x, packed, weight_scale, scale, _, weight_bits, segments, *rest = arguments
    ones = (torch.ones_like(weight_scale), torch.ones_like(scale), None)
    output = torch.ops.pqcad.conv2d(x, packed, *ones, weight_bits, segments, *rest)
    sums = reference.conv2d_accumulators(x, packed, weight_bits, segments, *rest[:5])
    assert torch.equal(output.double(), sum(part.double() for part in sums))


@needs_kernels
@settings(max_examples=15)
@given(st.booleans().flatmap(lambda winograd: convolutions(winograd=winograd, channels=300)))
def test_convolutions_of_more_channels_than_are_widened_at_once(arguments):
    _same(arguments)


@needs_kernels
@pytest.mark.parametrize(
    ("low", "high"), [(-63, 0), (0, 63), (-32, 31), (-17, 46), (-31, 0), (0, 31), (-16, 15), (-15, 0)]
)
@pytest.mark.parametrize("weights", ["lowest", "highest", "signs"])
def test_winograd_is_exact_at_the_extremes(low, high, weights):
    """The transformed values reach the ends of what eight bits hold, and no sum leaves its range."""
    arguments = extremes(low, high, weights)
    assert torch.equal(torch.ops.pqcad.conv2d(*arguments), reference.conv2d(*arguments))


@needs_kernels
@settings(max_examples=30)
@given(st.booleans().flatmap(lambda winograd: convolutions(winograd=winograd)), st.booleans(), st.booleans())
def test_addends_are_added(arguments, per_sample, last):
    shape = reference.conv2d(*arguments).shape
    addend = torch.randn(*shape[:2], *((1, 1) if per_sample else shape[2:]))
    _same(arguments, addend.contiguous(memory_format=torch.channels_last) if last else addend)


@needs_kernels
@settings(max_examples=40)
@given(
    st.integers(2, 8),
    st.lists(st.integers(1, 300), min_size=1, max_size=3),
    st.lists(st.integers(0, 9), min_size=1, max_size=3),
    st.integers(1, 150),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_linear_equals_the_reference(bits, segments, batch, out_features, bias, seed):
    generator = torch.Generator().manual_seed(seed)
    arguments = (
        integers(generator, 8, *batch, sum(segments)),
        pack(integers(generator, bits, out_features, sum(segments)), bits),
        torch.rand(out_features, generator=generator),
        torch.rand(batch[0], len(segments), generator=generator),
        torch.randn(out_features, generator=generator) if bias else None,
        bits,
        segments,
        torch.float32,
    )
    expected = reference.linear(*arguments)
    bound = _bound(expected)
    torch.testing.assert_close(torch.ops.pqcad.linear(*arguments), expected, rtol=1e-5, atol=bound)
    addend = torch.randn_like(expected)
    expected = reference.linear(*arguments, addend)
    torch.testing.assert_close(torch.ops.pqcad.linear(*arguments, addend), expected, rtol=1e-5, atol=bound)


@needs_kernels
@settings(max_examples=40)
@given(st.integers(2, 8), st.integers(1, 300), st.integers(0, 9), st.integers(1, 70), st.booleans(), st.integers(0, 99))
def test_weight_only_linear_equals_the_reference(bits, features, rows, out_features, bias, seed):
    """On whole numbers, of which a float32 sum is exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    arguments = (
        integers(generator, 6, rows, features).float(),
        pack(integers(generator, bits, out_features, features), bits),
        torch.ones(out_features),
        integers(generator, 8, out_features).float() if bias else None,
        bits,
    )
    assert torch.equal(torch.ops.pqcad.weight_only_linear(*arguments), reference.weight_only_linear(*arguments))


@needs_kernels
def test_a_rows_sums_are_exact_copies_in_every_batch():
    generator = torch.Generator().manual_seed(0)
    x, stored = torch.randn(7, 50, generator=generator), pack(integers(generator, 4, 40, 50), 4)
    rest = (stored, torch.rand(40, generator=generator), torch.randn(40, generator=generator), 4)
    together = torch.ops.pqcad.weight_only_linear(x, *rest)
    assert all(torch.equal(torch.ops.pqcad.weight_only_linear(row, *rest), together[i]) for i, row in enumerate(x))


@st.composite
def images(draw):
    """Arguments of ``pqcad::norm_silu_quantize``."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    groups = draw(st.integers(0, 4))
    channels = draw(st.lists(st.integers(1, 150), min_size=1, max_size=3))
    channels[-1] += -sum(channels) % max(groups, 1)
    # one wide: tokens
    batch, height, width = draw(st.integers(0, 5)), draw(st.sampled_from([1, 2, 5, 37, 40])), draw(st.integers(1, 6))
    xs = [3 * torch.randn(batch, c, height, width, generator=generator) + 1 for c in channels]
    if draw(st.booleans()):
        xs = [x.contiguous(memory_format=torch.channels_last) for x in xs]
    segments = draw(st.sampled_from([channels, [sum(channels)]]))
    bits = draw(st.integers(2, 8))
    affine = [torch.randn(sum(channels), generator=generator) for _ in range(2)] if draw(st.booleans()) else [None] * 2
    scale = torch.rand(batch, len(segments), generator=generator) * 0.3 + 0.02
    most = 1 if bits < 8 else -127  # integers are carried in int8
    low = torch.randint(-(2 ** (bits - 1)), most, (batch, len(segments)), generator=generator, dtype=torch.int16)
    upsample = draw(st.sampled_from([1, 1, 2, 3]))
    return (xs, *affine, groups, 1e-5, draw(st.booleans()), scale, low, segments, bits, upsample)


@needs_kernels
@settings(max_examples=60)
@given(images())
def test_quantizing_an_image_equals_the_reference(arguments):
    """Up to values that lie on a threshold, where the last bit of the norm decides: none of a thousand."""
    expected, output = (f(*arguments) for f in (reference.norm_silu_quantize, torch.ops.pqcad.norm_silu_quantize))
    assert output.shape == expected.shape
    assert output.stride() == expected.stride()
    moved = (output.int() - expected.int()).abs()
    assert not moved.numel() or (moved.max() <= 1 and moved.float().mean() <= 1e-3 + arguments[-1] ** 2 / moved.numel())


@needs_kernels
@settings(max_examples=30)
@given(images(), st.booleans())
def test_quantizing_equals_the_reference(arguments, tokens):
    xs, *_, scale, low, segments, bits, _ = arguments
    x = torch.cat(xs, 1)
    x, dim = (x.flatten(2).transpose(1, 2), -1) if tokens else (x, 1)
    grid = (scale, low, segments, bits, dim)
    output, expected = torch.ops.pqcad.quantize(x, *grid), reference.quantize(x, *grid)
    assert torch.equal(output, expected)
    assert output.stride() == expected.stride()


@needs_kernels
def test_silu_is_exact_far_below_a_step_of_any_grid():
    x = torch.cat([torch.linspace(-120, 120, 200_001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30])])
    x = x.view(1, 1, 1, -1)
    fine = torch.nn.functional.silu(x.double())
    for scale in (1e-2, 1e-1, 1.0):  # a fine grid near zero, a wide one far out
        grid = (torch.full((1, 1), scale), torch.full((1, 1), -64), [1], 7, 1)
        found = torch.ops.pqcad.norm_silu_quantize([x], None, None, 0, 0.0, True, *grid).double()
        exact = (fine / scale).clamp(-64, 63)
        assert ((found - exact).abs() <= 0.5 + 1e-4).all()


@needs_kernels
@settings(max_examples=30)
@given(
    st.tuples(st.integers(0, 3), st.integers(1, 3)),
    st.sampled_from([1, 5, 6, 17, 70]),
    st.sampled_from([1, 15, 16, 64, 130]),
    st.sampled_from([1, 9, 32, 40, 70]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_attention_equals_the_reference_of_rounded_factors(batch_and_heads, length, keys, channels, tokens_first, seed):
    """What is left is the rounding of the softmax to 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads = batch_and_heads

    def rows(count):
        if tokens_first:  # as projections leave them
            return torch.randn(batch, count, heads, channels, generator=generator).transpose(1, 2)
        return torch.randn(batch, heads, count, channels, generator=generator)

    query, key, value = rows(length), rows(keys), rows(keys)
    found = torch.ops.pqcad.attention(query, key, value, 0.3)
    assert found.stride() == reference.attention(query, key, value, 0.3).stride()
    query, key, value = (x.bfloat16().double() for x in (query * 0.3, key, value))
    expected = (query @ key.transpose(2, 3)).softmax(-1) @ value
    error = (found - expected).abs()
    assert not error.numel() or error.max() <= 2**-9 * value.abs().max() + 1e-5


@needs_kernels
@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_attention_does_not_hide_what_is_not_finite(position, broken):
    tensors = [torch.ones(1, 1, 3, 8) for _ in range(3)]
    tensors[position][0, 0, 1, 2] = broken
    hidden = position == 1 and broken < 0  # to a key of minus infinity nobody attends
    assert torch.ops.pqcad.attention(*tensors, 1.0).isfinite().all() == hidden


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 2, 4), (1, 2, 4, 9), (1, 3, 4, 8), (1, 2, 0, 8)])
def test_attention_of_shapes_that_do_not_go_together_is_refused(shape):
    query, key = torch.ones(1, 2, 4, 8), torch.ones(shape)
    with pytest.raises(ValueError, match=r"expected \(B, heads, L, D\)|attention to no key"):
        torch.ops.pqcad.attention(query, key, key, 1.0)


@needs_kernels
@settings(max_examples=10)
@given(convolutions(winograd=True), images())
def test_threads_do_not_change_a_bit(convolution, image):
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(
                (torch.ops.pqcad.conv2d(*convolution), torch.ops.pqcad.norm_silu_quantize(*image).to(torch.float32))
            )
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])


@needs_kernels
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_sums_of_many_pixels_are_exact_however_threads_share_them_out(size, threads):
    """Of many pixels each thread has its own, of fewer its own output channels: Winograd's with 2 threads and 7."""
    generator = torch.Generator().manual_seed(0)
    x, weight = integers(generator, 4, 2, 20, 41, 40), pack(integers(generator, 4, 70, 20 * size**2), 4)
    form = ([size] * 2, [1, 1], [size // 2] * 2, [1, 1], 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        output = torch.ops.pqcad.conv2d(
            x, weight, torch.ones(70), torch.ones(2, 2), None, 4, [13, 7], *form, torch.float32, 4
        )
    finally:
        torch.set_num_threads(before)
    assert torch.equal(output, sum(reference.conv2d_accumulators(x, weight, 4, [13, 7], *form)))


@needs_kernels
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("segments", [[20], [13, 7]])
def test_sums_that_are_written_past_the_cache_are_exact(size, threads, segments):
    """Whole registers of over a megabyte: both threads' have arrived when the operator returns."""
    generator = torch.Generator().manual_seed(0)
    x, weight = integers(generator, 4, 2, 20, 65, 67), pack(integers(generator, 4, 48, 20 * size**2), 4)
    form = ([size] * 2, [1, 1], [size // 2] * 2, [1, 1], 1)
    addend = integers(generator, 8, 2, 48, 65, 67).float()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        ones = torch.ones(48), torch.ones(2, len(segments))
        output = torch.ops.pqcad.conv2d(x, weight, *ones, None, 4, segments, *form, torch.float32, 4, addend)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(output, sum(reference.conv2d_accumulators(x, weight, 4, segments, *form)) + addend)


@needs_kernels
def test_results_of_other_types():
    (x, *rest) = [
        torch.zeros(1, 8, 4, 4, dtype=torch.int8),
        torch.zeros(4, 36, dtype=torch.uint8),
        *(torch.ones(4), torch.ones(1, 1), None, 4, [8], [3, 3], [1, 1], [1, 1], [1, 1], 1),
    ]
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.ops.pqcad.conv2d(x, *rest, dtype, 4).dtype == dtype


@needs_kernels
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(8, 4, 4, dtype=torch.int8)}, "dimensions"),
        ({1: torch.zeros(4, 35, dtype=torch.uint8)}, r"expected uint8 \(4, 36\)"),
        ({4: torch.ones(5)}, "bias has 5 values: expected 4"),
        ({5: 9}, "weight_bits=9"),
        ({0: torch.zeros(1, 8, 1, 1, dtype=torch.int8), 9: [0, 0]}, "leaves nothing"),
        ({14: torch.ones(1, 4, 2, 4)}, "addend has shape"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = [
        torch.zeros(1, 8, 4, 4, dtype=torch.int8),
        torch.zeros(4, 36, dtype=torch.uint8),
        *(torch.ones(4), torch.ones(1, 1), None, 4, [8], [3, 3], [1, 1], [1, 1], [1, 1], 1, torch.float32, 4, None),
    ]
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises((ValueError, IndexError), match=message):
        torch.ops.pqcad.conv2d(*arguments)


@needs_kernels
def test_what_is_multiplied_is_said(monkeypatch):
    monkeypatch.setattr(dispatch, "has_gpu_kernels", lambda device: False)
    assert f"8-bit multiply-accumulates ({loader.load()}, exact integers)" in arithmetic("cpu")
    assert "floating-point" in arithmetic("cuda")


@needs_kernels
@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (8, [0, 1], "stride=.*at least 1"),
        (11, 2, "groups=2: must divide 5 input"),
        (11, 0, "groups=0"),
        (7, [9, 9], "leaves nothing"),
        (14, torch.ones(3), "addend has 1 dimensions"),
        (14, torch.ones(1, 3, 1, 1), "addend has shape"),
    ],
)
def test_convolutions_that_cannot_be_are_refused(index, value, message):
    generator = torch.Generator().manual_seed(0)
    weight = pack(integers(generator, 4, 3, 5 * 9), 4)
    scales = torch.ones(3), torch.ones(2, 1)
    sizes = ([3, 3], [1, 1], [0, 0], [1, 1])
    arguments = [integers(generator, 4, 2, 5, 6, 6), weight, *scales, None, 4, [5], *sizes, 1, torch.float32, 5, None]
    with pytest.raises(ValueError, match=message):
        torch.ops.pqcad.conv2d(*arguments[:index], value, *arguments[index + 1 :])


@needs_kernels
def test_a_stride_beyond_the_input_leaves_nothing_either():
    arguments = (torch.ones(1, 4, 2, 2, dtype=torch.int8), pack(torch.ones(4, 36, dtype=torch.int8), 4))
    options = (torch.ones(4), torch.ones(1, 1), None, 4, [4], [3, 3], [2, 2], [0, 0], [1, 1], 1, torch.float32)
    with pytest.raises(ValueError, match="leaves nothing"):
        torch.ops.pqcad.conv2d(*arguments, *options)


@needs_kernels
def test_a_norm_of_other_channels_is_refused():
    grid = (torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int16), [8], 4, 1)
    with pytest.raises(ValueError, match="a norm's weight or bias has 4 values: expected 8"):
        torch.ops.pqcad.norm_silu_quantize([torch.ones(1, 8, 2, 2)], torch.ones(4), None, 2, 1e-5, False, *grid)


@needs_kernels
def test_a_product_over_nothing_is_refused():
    arguments = (torch.ones(2, 0, dtype=torch.int8), torch.ones(3, 0, dtype=torch.uint8), torch.ones(3))
    with pytest.raises(ValueError, match="no input channels"):
        torch.ops.pqcad.linear(*arguments, torch.ones(2, 0), None, 4, [], torch.float32)
