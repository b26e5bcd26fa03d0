"""Threads get the results that one thread gets."""

import copy
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import SHAPE, Plain, Small, cosine_scheduler, quick, sqnr
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent / "faults"))

from threads import SHARED, caller, in_threads, share, wrong_calls

from pqcad_ao import quantize_


class Broken(Plain):
    """A network in the middle of whose forward Dynamo gives up."""

    def middle(self, h: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return h


@pytest.fixture(params=[Small, Broken], ids=["one graph", "a break in its middle"])
def network(request) -> nn.Module:
    network = request.param()
    quantize_(network, quick(), scheduler=cosine_scheduler(), sample_shape=SHAPE, progress=False)
    return network


@torch.no_grad()
def test_threads_share_a_network(quantized_unet):
    assert wrong_calls(caller(lambda *inputs: quantized_unet(*inputs).sample), turns=10) == []


@torch.no_grad()
def test_threads_share_a_compiled_network(network):
    if not isinstance(network, Broken):  # one thread alone may ask for one graph: why, says threads._compiled
        caller(torch.compile(network, backend="pqcad", fullgraph=True))(0)
    assert wrong_calls(caller(torch.compile(network, backend="pqcad")), turns=50) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARED)
def test_threads_share_whatever_a_network_becomes(kind, tmp_path):
    assert share(kind, 2000, tmp_path) == []


@torch.no_grad()
@pytest.mark.parametrize("network", [Plain], indirect=True)
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # the group, gone on return
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_network_takes_its_timesteps_as_an_input(network, strict):
    x_t, timesteps = torch.randn(2, *SHAPE), torch.tensor([10, 999])
    exported = torch.export.export(network, (x_t, timesteps.flip(0)), strict=strict).module()
    assert torch.equal(exported(x_t, timesteps), network(x_t, timesteps))


@pytest.mark.parametrize("network", [Plain], indirect=True)
def test_threads_quantize_beside_each_other_and_beside_a_compilation(network):
    x_t, timestep = torch.randn(2, *SHAPE), torch.tensor([300, 300])
    networks = [Plain(seed) for seed in range(2)]

    @torch.no_grad()
    def work(index: int) -> Any:
        if index == 2:
            return torch.compile(network, backend="pqcad", fullgraph=True)(x_t, timestep)
        other = copy.deepcopy(networks[index])
        quantize_(other, quick(), scheduler=cosine_scheduler(), sample_shape=SHAPE, progress=False)
        return other.state_dict(), other(x_t, timestep)

    torch._dynamo.reset()
    alone, together = [work(index) for index in range(3)], in_threads(3, work)
    torch._dynamo.reset()
    for expected, found in zip(alone[:2], together[:2], strict=True):
        # while one of them exports, oneDNN is off for both: activations differ in the last bit
        assert all(torch.allclose(value, found[0][name], rtol=1e-5) for name, value in expected[0].items())
        assert sqnr(expected[1], found[1]) > 30
    assert torch.equal(together[2], alone[2])


def test_a_thread_that_is_outside_of_a_call_is_told_so(quantized_unet):
    """Another thread's call does not lend it a timestep."""
    layer, inside, done = quantized_unet.conv_in, threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        inside.set()
        done.wait(10)

    def work(index: int) -> Any:
        if index == 0:
            return quantized_unet(torch.zeros(2, *SHAPE), 10).sample
        inside.wait(10)
        try:
            return layer.timestep.current(2)
        finally:
            done.set()

    quantized_unet.mid_block.register_forward_pre_hook(wait)
    assert "called outside its network" in str(in_threads(2, work)[1])
