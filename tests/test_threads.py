"""Threads, and processes that are forked or spawned, get the results that one thread gets."""

import copy
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import SHAPE, Plain, Small, cosine_scheduler, quick, sqnr
from torch import Tensor, nn

from pqcad_ao import quantize_

TIMESTEPS = [10, 300, 510, 999]  # of four timestep groups


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What ``work(0)`` ... ``work(count - 1)`` return or raise, begun at once in a thread each."""
    results: list[Any] = [None] * count
    start = threading.Barrier(count)

    def run(index: int) -> None:
        start.wait()
        try:
            results[index] = work(index)
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def wrong_calls(network: Callable[..., Any], x_t: Tensor, turns: int) -> list[Any]:
    """Results of 8 threads that share a network and mix timesteps, and are not the ones of one thread alone."""
    expected = [network(x_t, torch.tensor([t, t])) for t in TIMESTEPS]

    @torch.no_grad()
    def work(index: int) -> list[Any]:
        wrong = []
        for turn in range(index, index + turns):
            timestep = torch.tensor(TIMESTEPS[turn % 4]).repeat(2)
            output = network(x_t, timestep)
            wrong += [] if torch.equal(output[0], expected[turn % 4][0]) else [(index, turn)]
        return wrong

    return [wrong for wrong in in_threads(8, work) if wrong]


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
    assert wrong_calls(lambda *inputs: quantized_unet(*inputs).sample, torch.randn(2, *SHAPE), turns=10) == []


@torch.no_grad()
def test_threads_share_a_compiled_network(network):
    compiled = torch.compile(network, backend="pqcad", fullgraph=not isinstance(network, Broken))
    assert wrong_calls(compiled, torch.randn(2, *SHAPE), turns=50) == []


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


# ----------------------------------------------------------------------------------------------------- processes


IN_PROCESSES = """
import multiprocessing, sys
import torch
from torch.utils.data import DataLoader, Dataset
from pqcad_ao.ops import arithmetic

torch.set_num_threads(2)
x = torch.randn(2, 64, 64, 64, generator=torch.Generator().manual_seed(0))
grid = (torch.full((2, 1), 0.1), torch.full((2, 1), -8), [64], 4, 1)


def total():  # in several threads, where the process has them
    return int(torch.ops.pqcad.quantize(x, *grid).sum())


def put(results):
    results.put(total())


class Rows(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return total()


if __name__ == "__main__":
    here = [total()]
    if sys.argv[1] == "DataLoader":
        there = [int(value) for value in DataLoader(Rows(), num_workers=2, timeout=60)]
        here = here * 2
    else:
        context = multiprocessing.get_context(sys.argv[1])
        results = context.Queue()
        process = context.Process(target=put, args=(results,), daemon=True)
        process.start()
        there = [results.get(timeout=60)]
    print(here == there, arithmetic())
"""


@pytest.mark.parametrize(
    "start", ["fork", pytest.param("spawn", marks=pytest.mark.slow), pytest.param("DataLoader", marks=pytest.mark.slow)]
)
def test_a_process_begun_after_the_kernels_ran_gets_the_same(tmp_path, start):
    """Forked children inherit a pool of threads without its threads, for which they would wait."""
    script = tmp_path / "script.py"
    script.write_text(IN_PROCESSES)
    command, environment = [sys.executable, str(script), start], {**os.environ, "OMP_NUM_THREADS": "2"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert result.stdout.startswith("True"), result.stdout + result.stderr
