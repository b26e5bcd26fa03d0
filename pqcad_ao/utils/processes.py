"""The processes that share a run under torchrun; without it, this one alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from pqcad_ao.utils.machine import check_device


@contextmanager
def process_group(device: str) -> Iterator[tuple[int, torch.device]]:
    """This process's rank and device; under torchrun, the group of all is there meanwhile.

    Args:
        device: ``"cuda"``: a GPU for each process.

    Raises:
        ValueError: no such device here.
    """
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    place = check_device(f"cuda:{local}" if device == "cuda" else device)
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield rank, place
        return
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    try:
        yield rank, place
    finally:
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """This process and how many there are; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait_for_all() -> None:
    """Go on when every process has come this far."""
    if dist.is_initialized():
        dist.barrier()


def of_all(mine: Any) -> list[Any]:
    """What each process brings, by rank. Tensors in it must be on the CPU: a GPU has another number elsewhere."""
    _, world = rank_and_world()
    if world == 1:
        return [mine]
    brought: list[Any] = [None] * world
    dist.all_gather_object(brought, mine)
    return brought


def to_first(mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """What all bring, in the first process and on its CPU; nothing in the others."""
    rank, world = rank_and_world()
    brought: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object({name: value.cpu() for name, value in mine.items()}, brought)
    return {name: value for part in brought or [] for name, value in part.items()}


def in_turn(parts: list[list[Any]]) -> list[Any]:
    """What the processes brought of things that went to them in turn, in the order of these things."""
    longest = max(map(len, parts))
    return [part[number] for number in range(longest) for part in parts if number < len(part)]


def fill_in(values: Tensor) -> Tensor:
    """Rows that one process has worked out and that are zero in the others: all of them, in each. In place."""
    if rank_and_world()[1] > 1:
        dist.all_reduce(values)
    return values


def rows_of_all(batches: list[Tensor], device: torch.device) -> Tensor:
    """The rows of batches that went to the processes in turn, from those that this one worked out."""
    if rank_and_world()[1] == 1:
        return torch.cat(batches)
    return torch.cat(in_turn(of_all([batch.cpu() for batch in batches]))).to(device)


def rows_by_rank(values: Tensor) -> Tensor:
    """Every process's rows, as many in each, in the order of ranks."""
    _, world = rank_and_world()
    if world == 1:
        return values
    parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(world)]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def part_of(whole: Tensor, form: Tensor) -> Tensor:
    """This process's part of a tensor: as many of its values as each other's, in order, zeros behind the last.

    Args:
        form: of its shape, on any device; the values are taken in the order in which this one has them in memory.
    """
    rank, world = rank_and_world()
    length = -(-whole.numel() // world)
    values = whole.permute(_order(form)).flatten()[rank * length : (rank + 1) * length]
    return torch.cat([values, values.new_zeros(length - len(values))])


def whole_of(part: Tensor, form: Tensor) -> Tensor:
    """The tensor, in memory like ``form``, of which the processes have parts; its gradient becomes that of the part.

    What each process finds for the whole is averaged, for each has an equal part of a batch. All call this alike.
    """
    return _Whole.apply(part, form)


def _order(form: Tensor) -> list[int]:
    return sorted(range(form.dim()), key=form.stride, reverse=True)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, form: Tensor) -> Tensor:
        _, world = rank_and_world()
        ctx.order = order = _order(form)
        values = part.new_empty(world * len(part))
        dist.all_gather_into_tensor(values, part.contiguous())
        whole = values[: form.numel()].view([form.shape[dim] for dim in order])
        return whole.permute([order.index(dim) for dim in range(form.dim())])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        _, world = rank_and_world()
        length = -(-gradient.numel() // world)
        values = gradient.permute(ctx.order).flatten()
        values = torch.nn.functional.pad(values, (0, world * length - len(values)))
        part = values.new_empty(length)
        dist.reduce_scatter_tensor(part, values)  # the sum: gloo has no mean
        return part.div_(world), None


def mean_of_all(values: Tensor) -> Tensor:
    """The mean over all processes, the same bits in each."""
    return fill_in(values.clone()) / rank_and_world()[1]


def check_share(batch_size: int) -> None:
    """Raises ValueError: the processes cannot take equal parts of a batch, as a mean over them needs."""
    _, world = rank_and_world()
    if batch_size % world:
        raise ValueError(f"batch_size={batch_size} cannot be shared by {world} processes: give a multiple")


LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "timed out")


@contextmanager
def naming_the_lost(folder: Any) -> Iterator[None]:
    """Say in an error of the process group that another process ended, or did not come, and how the run goes on."""
    try:
        yield
    except RuntimeError as error:
        rank, world = rank_and_world()
        lost = isinstance(error, dist.DistError) or any(sign in str(error) for sign in LOST)
        if world == 1 or not lost:
            raise
        left = "Nothing was kept, for no folder was given" if folder is None else f"{folder} keeps what was done"
        raise ConnectionError(
            f"process {rank} of {world} waited in vain for another one, which ended, hangs, or did not make this call "
            f"({str(error).splitlines()[0]}). {left}: start all processes anew, with the same call"
        ) from error
