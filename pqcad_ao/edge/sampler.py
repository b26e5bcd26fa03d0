"""Samples from a .pte in ExecuTorch's Python runtime."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

from pqcad_ao.denoiser import take_rows
from pqcad_ao.diffusion.cache_plan import are_sources
from pqcad_ao.diffusion.process import sampler_of
from pqcad_ao.edge.seal import is_sealed
from pqcad_ao.edge.sizes import ending, shared_out
from pqcad_ao.utils.checks import is_whole
from pqcad_ao.utils.progress import tqdm

FORMAT = 4  # of the methods and constants that a .pte of ours has


class PTESampler:
    """Samples from a .pte that :func:`export_pte` wrote, in ExecuTorch's Python runtime.

    Attributes:
        timesteps: (S,), the schedule. sample_shape: (C, H, W).
        batch_sizes: of a call, those that the file has methods for. batch_size: the first of them.
        conditioning: the names of the tensors that a call takes besides x_t, as ``keystr`` writes them.
        scheduler: the sampler, DDIM or a flow's Euler.
        sources: for each step the one whose deep feature it takes, its own where it is computed in full; None: the
            program has no cache plan, and every step is computed in full.

    Raises:
        ImportError: executorch is not installed. OSError: no such file.
        ValueError: the file is damaged, or not one of :func:`export_pte`.

    Example:
        >>> report = export_pte(quantized, "unet.pte", scheduler=scheduler, num_inference_steps=4, progress=False)
        >>> sampler = PTESampler(report.path)
        >>> sampler.timesteps
        tensor([999, 749, 499, 249])
        >>> sampler.sample(torch.randn(3, 1, 8, 8)).shape
        torch.Size([3, 1, 8, 8])
    """

    def __init__(self, path: str | Path) -> None:
        require_executorch()
        from executorch.runtime import Runtime, Verification

        # the runtime reads weights from these bytes as long as the method lives, and does not keep them alive itself
        self._bytes = Path(path).read_bytes()
        sealed = is_sealed(self._bytes)
        if sealed is False:
            raise ValueError(f"{path} is damaged: what it holds is not what was written, by its checksum")
        try:
            self._program = Runtime.get().load_program(self._bytes, verification=Verification.InternalConsistency)
        except (RuntimeError, ValueError) as error:  # the latter of methods' names that are no text
            raise ValueError(f"{path} is no ExecuTorch program, or is damaged: {error}") from error
        if sealed is None and "checksum" in self._program.method_names:
            raise ValueError(f"{path} is damaged: its checksum is no longer there")
        if "pqcad_format" not in self._program.method_names:
            raise ValueError(f"{path} is an ExecuTorch program, but not one that pqcad_ao.export_pte wrote")
        self._methods: dict[str, Any] = {}  # loaded when first called: each takes memory
        try:
            self._read_constants()
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    def _read_constants(self) -> None:
        version = self._constant("pqcad_format")
        if version != FORMAT:
            raise ValueError(f"it is of format {version}; this pqcad_ao reads format {FORMAT}")
        self.timesteps = self._constant("timesteps").clone()
        self.sample_shape = tuple(self._constant("sample_shape").tolist())
        self.batch_size = self._constant("batch_size")
        several = "batch_sizes" in self._program.method_names
        self.batch_sizes = self._constant("batch_sizes").tolist() if several else [self.batch_size]
        self.conditioning = json.loads(self._constant("conditioning"))
        self.scheduler = sampler_of(self._constant("scheduler_config"))
        cached = {"cache_sources", "step_cached", "unet_cached"} & self._program.method_names
        self.sources = self._constant("cache_sources").tolist() if cached else None
        if self.sources is not None and not are_sources(self.sources, len(self.timesteps)):
            raise ValueError(f"cache_sources says {self.sources} for {len(self.timesteps)} timesteps")
        counts = (*self.batch_sizes, *self.sample_shape, len(self.timesteps))
        if len(self.sample_shape) != 3 or not all(is_whole(count, most=2**20) for count in counts):
            raise ValueError(f"batch_size, sample_shape and timesteps say {counts}")
        if self.batch_sizes[:1] != [self.batch_size] or len(set(self.batch_sizes)) < len(self.batch_sizes):
            raise ValueError(f"batch_sizes says {self.batch_sizes}, and batch_size {self.batch_size}")

    def _method(self, name: str, size: int) -> Any:
        name += ending(self.batch_sizes, size)
        if name not in self._methods:
            self._methods[name] = self._program.load_method(name)
        return self._methods[name]

    def _constant(self, name: str) -> Any:
        return self._program.load_method(name).execute([])[0]

    def predict(self, x_t: Tensor, step_index: int, conditioning: dict[str, Any] | None = None) -> Tensor:
        """The network's raw prediction, of the method ``unet``.

        Args:
            x_t: (B, C, H, W) float32, B of ``batch_sizes``. step_index: of ``timesteps``. conditioning: with B rows.
        """
        inputs = self._inputs(x_t, step_index, conditioning)
        inputs[1] = self.timesteps[step_index : step_index + 1].clone()
        return self._method("unet", len(x_t)).execute(inputs)[0].clone()

    def step(self, x_t: Tensor, step_index: int, conditioning: dict[str, Any] | None = None) -> Tensor:
        """x_{t-1}, of the method ``step``, which computes in full; arguments as for :meth:`predict`."""
        inputs = self._inputs(x_t, step_index, conditioning)
        return self._method("step", len(x_t)).execute(inputs)[0].clone()

    def advance(
        self,
        x_t: Tensor,
        step_index: int,
        feature: Tensor | None = None,
        conditioning: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One step of a walk as the cache plan says: x_{t-1}, and the deep feature to give to the next one.

        Args:
            feature: what the step before returned, of these very pictures; None: the step is computed in full.
        """
        inputs, refreshes = self._inputs(x_t, step_index, conditioning), True
        if self.sources is not None:
            refreshes = self.sources[step_index] == step_index
            if not refreshes and feature is not None:
                cached = self._method("step_cached", len(x_t))
                return cached.execute([*inputs, feature.contiguous()])[0].clone(), feature
        x_next, *kept = self._method("step", len(x_t)).execute(inputs)
        return x_next.clone(), kept[0].clone() if kept and refreshes else None

    def _inputs(self, x_t: Tensor, step_index: int, conditioning: dict[str, Any] | None) -> list[Tensor]:
        expected = [(size, *self.sample_shape) for size in self.batch_sizes]
        if tuple(x_t.shape) not in expected:
            allowed = " and ".join(map(str, expected))
            raise ValueError(f"x_t has shape {tuple(x_t.shape)}: this program was exported for {allowed}")
        if not 0 <= step_index < len(self.timesteps):
            raise ValueError(f"step_index={step_index}: this program has steps 0 to {len(self.timesteps) - 1}")
        given, _ = tensors_of(conditioning or {})
        if sorted(given) != sorted(self.conditioning):
            raise ValueError(f"conditioning has {sorted(given)}: this program takes {sorted(self.conditioning)}")
        # the runtime reads memory as it lies, whatever the strides are
        inputs = [x_t.float().contiguous(), torch.tensor([step_index])]
        return inputs + [given[name].contiguous() for name in self.conditioning]

    def sample(self, noise: Tensor, conditioning: dict[str, Any] | None = None, *, progress: bool = False) -> Tensor:
        """Walk the schedule from ``noise`` (N, C, H, W) to images in [-1, 1], as ``diffusion.sampling.sample`` does.

        With a cache plan in the file, steps take a deep feature as it says.
        Any N will do: images go into calls of the largest batch size that the file has, as many as fill them, then of
        the next one, and a last call of the smallest is filled up with copies of its last image. What a network's
        integers hide, XNNPACK hides, too: NaN or infinity inside of a step may leave finite images.

        Raises:
            FloatingPointError: NaN or infinity in the noise, or in x_t after a step.
        """
        if noise.dim() != 4 or tuple(noise.shape[1:]) != self.sample_shape:
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}: expected (N, {', '.join(map(str, self.sample_shape))})"
            )
        if not noise.isfinite().all():
            raise FloatingPointError("the noise that sampling starts from holds NaN or infinity")
        images = torch.empty_like(noise)
        calls = shared_out(len(noise), self.batch_sizes)
        groups = torch.arange(len(noise)).split([count for count, _ in calls])
        bar = tqdm(total=len(calls) * len(self.timesteps), desc="sampling", disable=not progress, leave=False)
        with bar:
            for group, (count, size) in zip(groups, calls, strict=True):
                rows = group[rows_of(count, size)]
                x_t = noise[rows]
                chosen, feature = take_rows(conditioning or {}, rows), None
                for index in range(len(self.timesteps)):
                    x_t, feature = self.advance(x_t, index, feature, chosen)
                    if not x_t.isfinite().all():
                        raise FloatingPointError(
                            f"the program left the finite numbers in step {index + 1} of {len(self.timesteps)} "
                            f"(timestep {int(self.timesteps[index])})"
                        )
                    bar.update()
                images[group] = x_t[:count]
        return images


def rows_of(count: int, size: int) -> Tensor:
    """Indices 0 ... count-1, filled up to ``size`` with the last one."""
    return torch.arange(size).clamp_max(count - 1)


def tensors_of(
    conditioning: dict[str, Any],
) -> tuple[dict[str, Tensor], Callable[[tuple[Tensor, ...]], dict[str, Any]]]:
    """The tensors of a (nested) conditioning by name, and what rebuilds it around others."""
    leaves, spec = tree_flatten_with_path(conditioning)
    places = [place for place, (_, leaf) in enumerate(leaves) if isinstance(leaf, Tensor)]

    def rebuild(tensors: tuple[Tensor, ...]) -> dict[str, Any]:
        values = [leaf for _, leaf in leaves]
        for place, tensor in zip(places, tensors, strict=True):
            values[place] = tensor
        return tree_unflatten(values, spec)

    return {keystr(leaves[place][0]): leaves[place][1] for place in places}, rebuild


def require_executorch() -> None:
    try:
        import executorch.exir  # noqa: F401
    except ImportError as error:
        raise ImportError(f"this needs executorch: pip install pqcad_ao[edge] ({error})") from error
