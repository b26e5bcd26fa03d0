"""Packages that ``export_pt2`` wrote: what they say of themselves, and how they are called."""

import json
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor
from torch.export.pt2_archive._package import AOTICompiledModel  # torch 2.11 to 2.14

from pqcad_ao.config import MAX_BATCH
from pqcad_ao.diffusion.cache_plan import CachePlan
from pqcad_ao.diffusion.cache_walk import Walk
from pqcad_ao.diffusion.correction import CorrectionTable
from pqcad_ao.diffusion.process import sampler_of
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.nn.timestep import check_timesteps
from pqcad_ao.ops.cpu import loader
from pqcad_ao.utils.machine import missing_features

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def _facts(path: Path) -> dict[str, Any]:
    """What the exporter wrote into a package, read before any of its code is loaded.

    Raises:
        ValueError, BadZipFile: it is no such package, or a part of it is not what its checksum says.
    """
    with ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} in it is not what was written")
        for name in archive.namelist():
            values = json.loads(archive.read(name)) if name.endswith("_metadata.json") else None
            if isinstance(values, dict) and "pqcad" in values:
                return json.loads(values["pqcad"])
    raise ValueError("the exporter's description is not in it")


def _program(path: Path, name: str) -> Callable[..., Any]:
    """A program of a package. ``torch.export.pt2_archive`` would first try this machine's compiler, for a second."""
    return AOTICompiledModel(torch._C._aoti.AOTIModelPackageLoader(str(path), name, False, 1, -1))


class PT2UNet:
    """A package that ``export_pt2`` wrote, called as ``f(x_t, timestep, **conditioning) -> prediction``.

    Attributes:
        sample_shape: (C, H, W). dtype: of x_t. scheduler: the sampler that was exported along, or None.
        num_train_timesteps: that the network was trained with. continuous: whether timesteps are fractions of a flow.
        correction: that :meth:`sample` applies, or None. plan: the cache plan that it follows, or None.
        timesteps: the schedule that the package is bound to, or None. batch_size: of every call, or None: 1 to 63.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            facts = _facts(path)
            self.sample_shape, self.dtype = tuple(facts["sample_shape"]), DTYPES[facts["dtype"]]
            self.num_train_timesteps, self.continuous = facts["num_train_timesteps"], facts["continuous"]
            self.timesteps, self.batch_size, config = facts["timesteps"], facts["batch_size"], facts["scheduler_config"]
            given = facts.get("correction")
            self.correction = None if given is None else CorrectionTable.from_dict(given)
            self.scheduler = None if config is None else sampler_of(config)
            given = facts.get("cache")
            self.plan = None if given is None else CachePlan.from_dict(given)
            missing = missing_features(facts.get("processor", ()))
            if not missing:
                loader.load()
                programs = ("model",) if self.plan is None else ("full", "shallow")
                self._models = [_program(path, name) for name in programs]
        except (OSError, BadZipFile, zlib.error, RuntimeError, KeyError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]  # PyTorch lists every file of the package behind it
            raise ValueError(f"{path} is no package that pqcad_ao.export_pt2 wrote, or is damaged: {reason}") from error
        if missing:
            raise ValueError(f"{path} was compiled for a processor with {', '.join(missing)}: export it on this one")

    def __call__(self, x_t: Tensor, timestep: Tensor | int, **conditioning: Any) -> Tensor:
        """The network's raw prediction, (B, C, H, W), computed in full.

        Args:
            x_t: (B, C, H, W). timestep: one for all, or (B,).
        """
        computed = self._run(0, x_t, timestep, conditioning)
        return computed if self.plan is None else computed[0]

    def begin_walk(self) -> Walk | None:
        """The package for one walk through the schedule by its cache plan, called as itself; None: it has no plan."""
        if self.plan is None:
            return None
        return Walk(self.plan, partial(self._run, 0), partial(self._run, 1), declared=True)

    def _run(self, model: int, x_t: Tensor, timestep: Tensor | int, conditioning: dict[str, Any], *kept: Tensor) -> Any:
        sizes = range(1, MAX_BATCH + 1) if self.batch_size is None else [self.batch_size]
        if tuple(x_t.shape[1:]) != self.sample_shape or len(x_t) not in sizes:
            batch = f"1 to {MAX_BATCH}" if self.batch_size is None else self.batch_size
            expected = f"({batch}, {', '.join(map(str, self.sample_shape))})"
            raise ValueError(f"x_t has shape {tuple(x_t.shape)}: this package takes {expected}")
        timesteps = torch.as_tensor(timestep).reshape(-1)
        check_timesteps(timesteps, self.num_train_timesteps, continuous=self.continuous)
        timesteps = timesteps.to(torch.float32 if self.continuous else torch.int64)
        if self.timesteps is None:
            timesteps = timesteps.expand(len(x_t)).contiguous()
        else:
            asked = set(timesteps.tolist())
            if len(asked) != 1 or not asked <= set(self.timesteps):
                raise ValueError(
                    f"timestep {sorted(asked)}: this package is bound to one of {self.timesteps} at a time"
                )
            timesteps = torch.tensor([self.timesteps.index(asked.pop())])
        # compiled code reads memory as it lay in the example, whatever the strides are
        with torch.no_grad():
            return self._models[model](
                x_t.to(self.dtype).contiguous(), timesteps, conditioning, *(value.contiguous() for value in kept)
            )

    def sample(self, noise: Tensor, num_inference_steps: int | None = None, **options: Any) -> Tensor:
        """Images from ``noise`` (N, C, H, W) as :func:`~pqcad_ao.diffusion.sampling.sample` draws them.

        Args:
            num_inference_steps: None: as many as the schedule has that the package is bound to.

        Raises:
            ValueError: the package has no scheduler, or another number of steps or images a call than is asked for.
        """
        if self.scheduler is None:
            raise ValueError("this package was exported without a scheduler: write export_pt2(..., scheduler=...)")
        bound = None if self.timesteps is None else len(self.timesteps)
        steps = bound if num_inference_steps is None else num_inference_steps
        if steps is None or (bound is not None and steps != bound):
            raise ValueError(
                f"num_inference_steps={num_inference_steps}: this package samples in {bound or 'any number'}"
            )
        if self.batch_size is not None and len(noise) % self.batch_size:
            raise ValueError(f"{len(noise)} images: this package takes {self.batch_size} a call, give a multiple of it")
        options.setdefault("batch_size", self.batch_size or MAX_BATCH)
        options.setdefault("correction", self.correction)
        return sample(self, self.scheduler, noise, steps, **options)


def load_pt2(path: str | Path) -> PT2UNet:
    """Load a package that ``export_pt2`` wrote, and the kernels that it calls.

    A package is machine code, which runs in this process with all its rights: load those that you or people you trust
    have made, and no others. That a package describes itself as one of ``export_pt2``, and is as it was written, is
    looked at before its code is loaded. It is a guard against mistakes, not against people, who can write that, too.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no package of this project, damaged, or was compiled for another processor.

    Example:
        >>> path = export_pt2(quantized, "unet.pt2", scheduler=scheduler, num_inference_steps=4, batch_size=2)
        >>> load_pt2(path).sample(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 1, 8, 8])
    """
    return PT2UNet(path)
