"""The processes that share a run under torchrun; without it, this one alone."""

from torch import distributed as dist


def rank_and_world() -> tuple[int, int]:
    """This process and how many there are; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait_for_all() -> None:
    """Go on when every process has come this far."""
    if dist.is_initialized():
        dist.barrier()
