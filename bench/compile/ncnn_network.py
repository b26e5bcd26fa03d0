"""A UNet in ncnn: converted by pnnx, calibrated, and called. Checked with ncnn and pnnx 2026.10.20."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pqcad_ao.bench.compile.ncnn_files import CALIBRATED, Layer


def convert(step: nn.Module, example: tuple[Tensor, ...], folder: Path) -> tuple[Path, Path]:
    """pnnx's ``.param`` and ``.bin`` of one image's step, in float32.

    Args:
        example: inputs of the step. folder: for the files, and for others that pnnx leaves.

    Raises:
        subprocess.CalledProcessError: pnnx says why on standard error.
    """
    import pnnx

    inputs = images(example)[0]
    torch.jit.trace(step, inputs, check_trace=False).save(folder / "unet.pt")
    shapes = ",".join(str(list(value.shape)).replace(" ", "") for value in inputs)
    command = [pnnx.EXEC_PATH, "unet.pt", f"inputshape={shapes}", "fp16=0"]
    subprocess.run(command, cwd=folder, stdout=sys.stderr, check=True)
    return folder / "unet.ncnn.param", folder / "unet.ncnn.bin"


def images(batch: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """A batch's inputs image by image, with float timesteps: ncnn knows neither batches nor integers."""
    return [tuple(value[index : index + 1].float() for value in batch) for index in range(len(batch[0]))]


class NcnnNetwork:
    """A loaded network, called with a batch's inputs: image by image, since ncnn has no batches.

    Raises:
        RuntimeError: ncnn does not load the files, which it explains on standard error, or cannot run them.
    """

    def __init__(self, param: Path, weights: Path, threads: int) -> None:
        import ncnn

        self.net = ncnn.Net()
        self.net.opt.num_threads = threads
        # float32 where no weight has 8 bits: half precision brought nothing on a processor that has it
        self.net.opt.use_fp16_packed = self.net.opt.use_fp16_storage = self.net.opt.use_fp16_arithmetic = False
        if self.net.load_param(str(param)) or self.net.load_model(str(weights)):
            raise RuntimeError(f"ncnn does not load {param.name} and {weights.name}")

    def __call__(self, *batch: Tensor) -> Tensor:
        outputs = [self._extract(self._begin(inputs), "out0") for inputs in images(batch)]
        return torch.stack([torch.from_numpy(output) for output in outputs])

    def largest_inputs(self, layers: Sequence[Layer], batches: Sequence[tuple[Tensor, ...]]) -> dict[str, float]:
        """The largest magnitude in the input of each layer that is calibrated, by the layer's name."""
        names = {layer.name: layer.inputs[0] for layer in layers if layer.kind in CALIBRATED}
        largest = dict.fromkeys(names, 0.0)
        for inputs in (inputs for batch in batches for inputs in images(batch)):
            running = self._begin(inputs)
            for name, blob in names.items():
                largest[name] = max(largest[name], float(np.abs(self._extract(running, blob)).max()))
        return largest

    def _begin(self, inputs: tuple[Tensor, ...]):
        """An extractor, which runs as much of the network as is asked of it."""
        import ncnn

        extractor = self.net.create_extractor()
        for index, value in enumerate(inputs):
            dense = np.atleast_1d(value[0].numpy()).copy()  # ncnn wants dense rows and planes
            # a Mat only points to what it was made of, which has to live until it is cloned: hence the name
            extractor.input(f"in{index}", ncnn.Mat(dense).clone())
        return extractor

    def _extract(self, extractor, blob: str) -> np.ndarray:
        code, value = extractor.extract(blob)
        if code:
            raise RuntimeError(f"ncnn answers {code} when asked for {blob}")
        return np.array(value)
