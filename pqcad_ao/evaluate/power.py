"""The power of images by frequency: whoever learns by squared error draws too plainly, which FID is slow to see."""

import torch
from torch import Tensor

BORDERS = (1 / 16, 1 / 8, 1 / 4)  # cycles a pixel, between one band and the next


def power_by_band(images: Tensor) -> list[float]:
    """The mean power of images (N, C, H, W) in each octave of frequency, from coarse to fine.

    The bands are up to 1/16, 1/8, 1/4 cycles a pixel, and above. Together they are the variance of an image's pixels,
    the mean over images and channels: an image's brightness is in none.

    Example:
        >>> rows = torch.arange(32.0)
        >>> wave = torch.cos(2 * torch.pi * 3 / 32 * rows).expand(1, 1, 32, 32)  # 3 cycles in 32 pixels, of power 1/2
        >>> [round(power, 6) for power in power_by_band(wave)]
        [0.0, 0.5, 0.0, 0.0]
    """
    height, width = images.shape[-2:]
    spectrum = torch.fft.fft2(images.double()).abs().square().mean((0, 1)) / (height * width) ** 2
    spectrum[0, 0] = 0
    vertical, horizontal = (torch.fft.fftfreq(size, dtype=torch.float64) for size in (height, width))
    frequency = torch.hypot(vertical[:, None], horizontal[None])
    band = torch.bucketize(frequency, torch.tensor(BORDERS, dtype=torch.float64))
    return torch.zeros(len(BORDERS) + 1, dtype=torch.float64).index_add_(0, band.flatten(), spectrum.flatten()).tolist()
