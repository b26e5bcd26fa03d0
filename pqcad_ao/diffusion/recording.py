"""What a network is called with, and answers, while it samples."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pqcad_ao.denoiser import predict
from pqcad_ao.diffusion.sampling import sample


@dataclass(frozen=True)
class NetworkCall:
    """One call of a network.

    Attributes:
        x_t: (B, C, H, W). timesteps: (B,). conditioning: its other keyword arguments, with B rows.
        prediction: (B, C, H, W).
    """

    x_t: Tensor
    timesteps: Tensor
    conditioning: dict[str, Any]
    prediction: Tensor


class Recorder:
    """A network that keeps its calls, called as ``f(x_t, timesteps, **conditioning) -> prediction``.

    Args:
        most: calls to keep, the first ones; None: all.
    """

    def __init__(self, unet: Callable[..., Any], most: int | None = None) -> None:
        self.unet, self.most = unet, most
        self.calls: list[NetworkCall] = []

    def __call__(self, x_t: Tensor, timesteps: Tensor, **conditioning: Any) -> Tensor:
        prediction = predict(self.unet, x_t, timesteps, conditioning)
        if self.most is None or len(self.calls) < self.most:
            self.calls.append(NetworkCall(x_t.clone(), timesteps, conditioning, prediction.clone()))
        return prediction


def record_calls(
    unet: Callable[..., Any], scheduler: Any, noise: Tensor, num_inference_steps: int, **options: Any
) -> list[NetworkCall]:
    """Every call of ``unet`` while :func:`~pqcad_ao.diffusion.sampling.sample`, with its options, draws images.

    The calls of the first ``batch_size`` images come first, from noise to image; then those of the next.
    """
    recorder = Recorder(unet)
    sample(recorder, scheduler, noise, num_inference_steps, **options)
    return recorder.calls
