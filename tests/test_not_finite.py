"""NaN and infinity are an error wherever integers would hide them, and a timestep is one of the network's own."""

import copy
import warnings

import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given
from hypothesis import strategies as st
from networks import SHAPE, Plain, cosine_scheduler, quick

from pqcad_ao import quantize_
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.ops import reference
from pqcad_ao.ops.cpu import loader

NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


def _kernels() -> list:
    """The reference's operators, and the CPU's own where there are kernels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [reference, *([torch.ops.pqcad] if loader.load() else [])]


def _norm_silu_quantize(operators, x, norm_groups, silu, upsample=1):
    channels = x.shape[1]
    grid = (torch.full((len(x), 1), 0.1), torch.full((len(x), 1), -8), [channels], 4, upsample)
    return operators.norm_silu_quantize([x[:, :3], x[:, 3:]], None, None, norm_groups, 1e-5, silu, *grid)


@given(
    value=st.sampled_from(NOT_FINITE),
    place=st.tuples(st.integers(0, 1), st.integers(0, 20), st.integers(0, 4), st.integers(0, 2)),
    norm_groups=st.sampled_from([0, 1, 3]),
    silu=st.booleans(),
    upsample=st.integers(1, 2),
)
def test_one_value_that_is_not_finite_is_an_error_of_every_kernel(value, place, norm_groups, silu, upsample):
    x = torch.randn(2, 21, 5, 3, generator=torch.Generator().manual_seed(0))
    for operators in _kernels():
        _norm_silu_quantize(operators, x, norm_groups, silu, upsample)
        broken = x.clone()
        broken[place] = value
        with pytest.raises(ValueError, match="NaN or infinity in what is quantized"):
            _norm_silu_quantize(operators, broken, norm_groups, silu, upsample)


@given(value=st.sampled_from(NOT_FINITE), place=st.tuples(st.integers(0, 1), st.integers(0, 3), st.integers(0, 36)))
def test_tokens_alike(value, place):
    x, grid = torch.ones(2, 4, 37), (torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64), [37], 4, -1)
    x[place] = value
    for operators in _kernels():
        with pytest.raises(ValueError, match="NaN or infinity in what is quantized"):
            operators.quantize(x, *grid)


@pytest.mark.parametrize("value", [-3.4e38, 65504.0, 3.4e38])
def test_what_is_finite_is_quantized_to_the_ends_of_the_grid(value):
    x, grid = torch.full((1, 4), value), (torch.ones(1, 1), torch.full((1, 1), -8), [4], 4, -1)
    for operators in _kernels():
        assert operators.quantize(x, *grid).unique().tolist() == [-8 if value < 0 else 7]


@torch.no_grad()
@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_forward_names_the_layer(quantized_unet, value):
    x_t = torch.zeros(2, *SHAPE)
    x_t[1, 0, 3, 3] = value
    with pytest.raises(FloatingPointError, match="NaN or infinity at the input of layer conv_in"):
        quantized_unet(x_t, 10)
    quantized_unet(torch.zeros(2, *SHAPE), 10)


def _overflowing(unet: UNet2DModel) -> UNet2DModel:
    """A network that float16 does not hold."""
    with torch.no_grad():
        unet.mid_block.resnets[0].norm1.weight.fill_(5e4)
    return unet.half()


@torch.no_grad()
def test_half_precision_that_overflows_in_a_norm_names_the_layer_that_reads_it(quantized_unet):
    message = r"at the input of layer mid_block\.resnets\.0\.conv1: float16 ends at 65504, take float32 or bfloat16"
    with pytest.raises(FloatingPointError, match=message):
        _overflowing(quantized_unet)(torch.randn(2, *SHAPE).half(), 10)


@torch.no_grad()
def test_a_compiled_network_says_so_too():
    network = Plain()
    quantize_(network, quick(), scheduler=cosine_scheduler(), sample_shape=SHAPE, progress=False)
    compiled = torch.compile(network, backend="pqcad", fullgraph=True)
    x_t = torch.zeros(2, *SHAPE)
    compiled(x_t, torch.tensor([10]))
    x_t[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity in what is quantized"):
        compiled(x_t, torch.tensor([10]))


def test_sampling_names_step_and_layer(quantized_unet, scheduler):
    broken = copy.deepcopy(quantized_unet)

    def break_down(module, args):
        if args[1].flatten()[0] < 500:
            module.conv_norm_out.weight.data.fill_(float("inf"))

    broken.register_forward_pre_hook(break_down)
    message = r"finite numbers in step 3 of 4 \(timestep 499\), .*at the input of layer conv_out: check the network's"
    with pytest.raises(FloatingPointError, match=message):
        sample(broken, scheduler, torch.randn(2, *SHAPE), 4)


def test_sampling_names_the_layer_of_a_network_that_is_not_quantized(tiny_unet, scheduler):
    with torch.no_grad():
        tiny_unet.mid_block.resnets[0].conv1.bias[2] = float("nan")
    message = r"in step 1 of 4 \(timestep 999\), first in the result of layer mid_block\.resnets\.0\.conv1: "
    with pytest.raises(FloatingPointError, match=message):
        sample(tiny_unet, scheduler, torch.randn(2, *SHAPE), 4)


def test_a_function_that_is_sampled_gets_the_step(scheduler):
    with pytest.raises(FloatingPointError, match=r"in step 1 of 4 \(timestep 999\): check the network's"):
        sample(lambda x_t, _: x_t / 0, scheduler, torch.randn(2, *SHAPE), 4)


def test_noise_that_is_not_finite_is_refused(quantized_unet, scheduler):
    with pytest.raises(FloatingPointError, match="noise that sampling starts from"):
        sample(quantized_unet, scheduler, torch.full((2, *SHAPE), float("nan")), 4)


@torch.no_grad()
@pytest.mark.parametrize("kind", [lambda t: t, lambda t: torch.tensor(t), lambda t: torch.tensor([3, t])])
@pytest.mark.parametrize("timestep", [-1, -0.5, 1000, 10**6, float("nan"), float("inf")])
def test_a_timestep_that_the_network_does_not_know_is_refused(quantized_unet, kind, timestep):
    with pytest.raises(ValueError, match=r"timestep .*: this network takes those from 0 to 999"):
        quantized_unet(torch.zeros(2, *SHAPE), kind(timestep))


@torch.no_grad()
@pytest.mark.parametrize(
    "timestep", [0, 999, 999.0, 946.42, torch.tensor(17.0), torch.tensor([0, 999], dtype=torch.int32)]
)
def test_timesteps_of_every_number_type_are_taken(quantized_unet, timestep):
    assert quantized_unet(torch.zeros(2, *SHAPE), timestep).sample.isfinite().all()
