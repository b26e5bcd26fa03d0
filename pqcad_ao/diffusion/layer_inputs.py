"""What is kept of each layer's inputs, to fit grids to, while the full-precision network is walked."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Values kept of each of them, layer and segment: those at either end one by one, for a handful decides how far a
# grid of six or eight bits should reach, and a random draw misses them; and some between, which stand for all others.
_EXTREMES, _INNER = 24, 168
_BLOCK = 256  # values whose highest is found at once


def stratified(values: Tensor) -> tuple[Tensor, Tensor]:
    """A small sample of each row with all of its extremes, and how many values each of the sample stands for.

    Args:
        values: (B, N).

    Returns:
        (B, n) values and (n,) weights, n the same for every N: short rows are filled up with zeros of weight zero.
    """
    count, size = values.shape[1], 2 * _EXTREMES + _INNER
    if count <= size:
        weights = torch.ones(count, device=values.device)
        return nn.functional.pad(values, (0, size - count)), nn.functional.pad(weights, (0, size - count))
    high, low = highest(values, _EXTREMES), -highest(-values, _EXTREMES)
    inner = values[:, torch.arange(_INNER, device=values.device) * (count - 1) // (_INNER - 1)]
    inner = torch.minimum(torch.maximum(inner, low[:, -1:]), high[:, -1:])  # the extremes are there already
    alone = torch.ones(_EXTREMES, device=values.device)
    others = torch.full((_INNER,), (count - 2 * _EXTREMES) / _INNER, device=values.device)
    return torch.cat([low, inner, high], 1), torch.cat([alone, others, alone])


def highest(values: Tensor, count: int) -> Tensor:
    """The ``count`` highest of each row (B, N), in falling order: (B, count), a tenth of ``topk``'s time for long rows.

    Each of them is in one of as many blocks, those with the highest maxima.
    """
    blocks = values[:, : values.shape[1] // _BLOCK * _BLOCK].unflatten(1, (-1, _BLOCK))
    if blocks.shape[1] <= 4 * count:
        return values.topk(count).values
    best = blocks.amax(2).topk(count).indices[:, :, None].expand(-1, -1, _BLOCK)
    rest = values[:, blocks.shape[1] * _BLOCK :]
    return torch.cat([blocks.gather(1, best).flatten(1), rest], 1).topk(count).values


_KEPT = 2 * _EXTREMES + _INNER


def sample_of(x: Tensor, segments: list[int], channel_dim: int) -> Tensor:
    """Some values of each row and segment of a layer's input, and how many each stands for, as :func:`stratified`.

    Args:
        x: (B, ...). segments: its channels, which lie in ``channel_dim``, in groups.

    Returns:
        (B, segments, 2, n) float32 on the CPU.
    """
    parts = [stratified(part.flatten(1)) for part in x.detach().float().split(segments, channel_dim)]
    return torch.stack([torch.stack([v, weights.expand_as(v)], 1) for v, weights in parts], 1).cpu()


class LayerInputs:
    """A sample of what layers are given at the points of a calibration set, taken in the calls that walk to them.

    A walk predicts at its points anyway: what its network's layers are given then need not be computed once more. A
    layer of a plan is a module that is called once, with what the captured graph gives to its operator.

    Args:
        layers: by name, each with the segments of its input and the dimension in which its channels lie.

    Attributes:
        values: for each layer (N, segments, 2, n) of N points, as :func:`sample_of`; zero where none was seen yet.
    """

    def __init__(self, layers: Mapping[str, tuple[list[int], int]]) -> None:
        self.layers = layers
        self.values: dict[str, Tensor] = {}
        self._expected: list[tuple[Tensor, Tensor]] = []
        self._rows = self._points = torch.empty(0, dtype=torch.int64)

    def hold(self, count: int) -> dict[str, Tensor]:
        """Make room for ``count`` points, as tensors to keep in a file."""
        self.values = {fqn: torch.zeros(count, len(parts), 2, _KEPT) for fqn, (parts, _) in self.layers.items()}
        return {f"inputs.{fqn}": values for fqn, values in self.values.items()}

    def choose(self, points: Tensor) -> None:
        """Keep some points, in another order."""
        self.values = {fqn: values[points] for fqn, values in self.values.items()}

    def expect(self, calls: list[tuple[Tensor, Tensor]]) -> None:
        """Say of the network's next calls which of their rows are which points: (n,) int64 each. More are not kept."""
        self._expected = calls

    @contextmanager
    def watched(self, network: nn.Module) -> Iterator[None]:
        """Look at a network's calls meanwhile, also where parts of it are compiled."""
        if not self.layers:
            yield
            return
        handles = [network.register_forward_pre_hook(self._begin)]
        for fqn in self.layers:
            look = partial(self._look, fqn)
            handles.append(network.get_submodule(fqn).register_forward_pre_hook(look, with_kwargs=True))
        try:
            with torch.compiler.set_stance("force_eager"):  # compiled code knows of no hook that came after it
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, network: nn.Module, args: Any) -> None:
        none = torch.empty(0, dtype=torch.int64)
        self._rows, self._points = self._expected.pop(0) if self._expected else (none, none)

    def _look(self, fqn: str, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if len(self._rows):
            x = args[0] if args else kwargs["input"]
            self.values[fqn][self._points] = sample_of(x[self._rows], *self.layers[fqn])
