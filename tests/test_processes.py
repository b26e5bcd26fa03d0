"""What processes that share a run say when they do not fit together; that they do is in ``test_together.py``."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import SHAPE, Small, cosine_scheduler, quick
from torch import distributed as dist

from pqcad_ao import CADConfig, PQCADConfig, distill_, quantize_
from pqcad_ao.utils import processes, runs
from pqcad_ao.utils.processes import in_turn, naming_the_lost
from pqcad_ao.utils.runs import shared_run


@pytest.fixture
def second_of_two(monkeypatch):
    """This process as one of two, of which the other brings what the test appends to the list."""
    others: list = []
    for module in (processes, runs):
        monkeypatch.setattr(module, "rank_and_world", lambda: (1, 2))
    monkeypatch.setattr(runs, "of_all", lambda mine: [others.pop(0) if others else mine, mine])
    monkeypatch.setattr(runs, "wait_for_all", lambda: None)
    return others


@given(st.lists(st.integers(), max_size=20), st.integers(1, 6))
def test_what_went_round_in_turn_comes_back_in_order(things, world):
    assert in_turn([things[rank::world] for rank in range(world)]) == things


def test_processes_that_were_given_different_things_are_told(second_of_two, tmp_path):
    second_of_two.append("another digest")
    with (
        pytest.raises(ValueError, match="the 2 processes were given different networks, settings or data: load the"),
        shared_run(tmp_path, torch.zeros(3)),
    ):
        pass


def test_a_folder_that_not_all_processes_see_is_named(second_of_two, tmp_path):
    # the first process holds a folder by a file in it, which this one does not find
    with pytest.raises(ValueError, match=rf"{tmp_path} is not the same for all processes"), shared_run(tmp_path):
        pass
    (tmp_path / runs.LOCK).touch()
    with shared_run(tmp_path):
        pass


@pytest.mark.parametrize(
    "error",
    [
        dist.DistBackendError("watchdog"),
        RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"),
        RuntimeError("[/pytorch/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 60000ms for recv operation"),
    ],
)
def test_a_process_that_is_lost_is_named(second_of_two, error):
    with (
        pytest.raises(ConnectionError, match=r"process 1 of 2 waited in vain .* work keeps what"),
        naming_the_lost("work"),
    ):
        raise error


def test_other_errors_stay_what_they_are(second_of_two):
    with pytest.raises(RuntimeError, match=r"^out of memory$"), naming_the_lost(None):
        raise RuntimeError("out of memory")


def test_a_batch_that_cannot_be_shared_is_refused(second_of_two):
    config = quick(mode="fixed", batch_size=5)
    with pytest.raises(ValueError, match="batch_size=5 cannot be shared by 2 processes: give a multiple"):
        quantize_(Small(), config, scheduler=cosine_scheduler(), sample_shape=SHAPE)


def test_parts_are_of_the_weights_of_quantized_layers_that_learn():
    with pytest.raises(ValueError, match=r"shard=True divides .*, and the student is in full precision: quantize_ it"):
        distill_(Small(), Small(), cosine_scheduler(), CADConfig(steps=4, shard=True), sample_shape=SHAPE)
    with pytest.raises(ValueError, match="shard: mode='ptq' learns nothing"):
        PQCADConfig(mode="ptq", shard=True)
    for kind in (PQCADConfig, CADConfig):
        with pytest.raises(TypeError, match="shard=2: write True or False"):
            kind(shard=2)
