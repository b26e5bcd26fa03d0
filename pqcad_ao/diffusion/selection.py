"""Which points of C_QC fit the activation grids: the first ones of each timestep group, or one of each cluster.

The clusters are those of Q&C's TAP (arXiv 2503.02508): a spectral clustering of an affinity that mixes the cosine of
two points with how near their timesteps are. The kernel's bandwidth, which timesteps as whole numbers need, the bound
on the pool, and what is done with duplicates are ours.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

POOL = 512  # points of a group that are looked at
ROUNDS, STARTS = 50, 4  # of k-means
NEAR = 0.25  # of a group's range: the bandwidth of what nearness in time counts


def affinity(x_t: Tensor, timesteps: Tensor, alpha: float, bandwidth: float) -> Tensor:
    """A_ij = α max(cos(x_i, x_j), 0) + (1 − α) exp(−|t_i − t_j| / h), of points without their means.

    Args:
        x_t: (N, ...). timesteps: (N,). alpha: α, from 0 to 1. bandwidth: h.

    Returns:
        (N, N) float64.
    """
    points = x_t.double().flatten(1)
    unit = F.normalize(points - points.mean(1, keepdim=True), dim=1)
    t = timesteps.double()
    near = (-(t[:, None] - t[None]).abs() / bandwidth).exp()
    return alpha * (unit @ unit.T).clamp_min(0) + (1 - alpha) * near


def clusters(A: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The cluster (N,) int64 of each point: k-means over the leading eigenvectors of D^-1/2 A D^-1/2.

    Args:
        A: (N, N) affinity. count: of clusters, at most N; some may stay empty.
    """
    root = A.sum(1).clamp_min(torch.finfo(A.dtype).tiny).rsqrt()
    _, vectors = torch.linalg.eigh(root[:, None] * A * root)
    embedded = F.normalize(vectors[:, -count:], dim=1)
    found = [_k_means(embedded, count, generator) for _ in range(STARTS)]
    return min(found, key=lambda one: one[1])[0]


def _k_means(rows: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """The cluster of each row (N, D), and the sum of squared distances to the centres (k-means++, Lloyd)."""
    centres = rows[torch.randint(len(rows), (1,), generator=generator)]
    while len(centres) < count:
        distance = _squared(rows, centres).amin(1)
        chances = distance if distance.sum() > 0 else torch.ones_like(distance)
        centres = torch.cat([centres, rows[torch.multinomial(chances, 1, generator=generator)]])
    for _ in range(ROUNDS):
        distance, cluster = _squared(rows, centres).min(1)
        moved = centres.clone()
        for number in range(count):
            here = rows[cluster == number]
            # an empty one begins anew where the centres are farthest
            moved[number] = here.mean(0) if len(here) else rows[distance.argmax()]
        if torch.equal(moved, centres):
            break
        centres = moved
    distance, cluster = _squared(rows, centres).min(1)
    return cluster, float(distance.sum())


def _squared(rows: Tensor, centres: Tensor) -> Tensor:
    return (rows[:, None] - centres[None]).square().sum(2)


def one_of_each(x_t: Tensor, timesteps: Tensor, count: int, *, alpha: float, bandwidth: float, seed: int) -> Tensor:
    """The numbers of ``count`` points, one drawn from each of as many clusters, falling short of none: rising, int64.

    No point is taken twice, and no duplicate of one while distinct ones are left. The choice is the same on any number
    of threads.

    Args:
        x_t, timesteps: of the pool, at least ``count`` points. alpha, bandwidth: as for :func:`affinity`.
    """
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randperm(len(x_t), generator=generator)[:POOL].sort().values
    x_t, timesteps = x_t[pool].cpu(), timesteps[pool].cpu()
    # of equal pictures the first stands for all
    _, twins = x_t.flatten(1).unique(dim=0, return_inverse=True)
    first = torch.full((int(twins.max()) + 1,), len(pool)).scatter_reduce(0, twins, torch.arange(len(pool)), "amin")
    distinct = first.sort().values
    if len(distinct) > count:
        with _one_thread():
            A = affinity(x_t[distinct], timesteps[distinct], alpha, bandwidth)
            cluster = clusters(A, count, generator)
        drawn = [_drawn(distinct[cluster == number], generator) for number in cluster.unique().tolist()]
        taken = torch.stack(drawn)
    else:
        taken = distinct
    for others in (distinct, torch.arange(len(pool))):  # where clusters, or distinct points, are fewer
        left = others[~torch.isin(others, taken)]
        order = torch.randperm(len(left), generator=generator)
        taken = torch.cat([taken, left[order][: count - len(taken)]])
    return pool[taken].sort().values


def _drawn(values: Tensor, generator: torch.Generator) -> Tensor:
    return values[torch.randint(len(values), (), generator=generator)]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order: the last bits of an eigenvector hang on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
