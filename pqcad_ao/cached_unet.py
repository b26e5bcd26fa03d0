"""The network that follows its cache plan while it samples."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from diffusers import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_flatten

from pqcad_ao.denoiser import placement, set_time_scale, time_scale
from pqcad_ao.diffusion.cache_plan import CachePlan, cache_plan, corrected_feature
from pqcad_ao.diffusion.cache_walk import ThreadsWalk, Walk
from pqcad_ao.graph.capture import capture
from pqcad_ao.passes.cache_split import CacheSplit, cache_split


class ShallowStep(nn.Module):
    """The shallow program of a cut, which corrects the feature first.

    Called as ``f(x_t, timesteps, conditioning, feature, scale, shift) -> prediction``.
    """

    def __init__(self, program: GraphModule) -> None:
        super().__init__()
        self.program = program

    def forward(
        self,
        x_t: Tensor,
        timesteps: Tensor,
        conditioning: dict[str, Any],
        feature: Tensor,
        scale: Tensor,
        shift: Tensor,
    ) -> Tensor:
        return self.program(x_t, timesteps, conditioning, corrected_feature(feature, scale, shift))


class CachedUNet(nn.Module):
    """A network that follows its cache plan, called as the network itself is, by pipelines as well.

    At the plan's timesteps it is computed in full and keeps its deep feature; at others it takes that feature, where it
    is of the same pictures' walk (:class:`~pqcad_ao.diffusion.cache_walk.Walk`). ``diffusion.sampling.sample`` begins a
    walk for each batch. Where a pipeline calls it, each thread is on one walk at a time, and a feature is taken where
    x_t is seen to come from the calls before; of samplers that clip or draw noise that cannot be seen, and
    :meth:`one_walk` says it. The network must stay as it is: after layers or adapters were changed, or it was
    taught, make another one.

    Args:
        unet: on which :func:`~pqcad_ao.cache.cache_` has measured a plan. plan: another one; None: the network's own.

    Raises:
        ValueError: the network has no plan.

    Example:
        >>> from pqcad_ao.diffusion.sampling import sample
        >>> config = CacheConfig(points=4)  # of a length for an example
        >>> kept = cache_(quantized, config, scheduler=scheduler, num_inference_steps=4, progress=False)
        >>> images = sample(CachedUNet(quantized), scheduler, torch.randn(2, 1, 8, 8), 4)
        >>> images.shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, unet: nn.Module, plan: CachePlan | None = None) -> None:
        super().__init__()
        plan = cache_plan(unet) if plan is None else plan
        if plan is None:
            raise ValueError(f"this {type(unet).__name__} has no cache plan: call cache_(unet, scheduler=...) first")
        self.unet, self.plan = unet, plan
        self._options: dict[str, Any] | None = None  # of torch.compile
        self._programs: dict[Any, tuple[Callable[..., Any], Callable[..., Any]]] = {}
        self._calls = ThreadsWalk()
        set_time_scale(self, time_scale(unet))

    def forward(
        self, sample: Tensor, timestep: Tensor | float, *args: Any, return_dict: bool = True, **kwargs: Any
    ) -> Any:
        """As the network's own."""
        names = [name for name in inspect.signature(self.unet.forward).parameters][2:]
        conditioning = dict(zip(names, args, strict=False)) | kwargs
        walk = self._calls.walk = self._calls.walk or self._walk()
        prediction = walk(sample, timestep, **conditioning)
        if not isinstance(self.unet, ModelMixin):
            return prediction
        return UNet2DOutput(sample=prediction) if return_dict else (prediction,)

    def begin_walk(self) -> Walk:
        """The network for one walk through the schedule, beside others that are under way."""
        return self._walk(declared=True)

    @contextmanager
    def one_walk(self) -> Iterator[None]:
        """All calls of this thread in the ``with`` block are of one walk through the schedule, such as a pipeline's.

        Example:
            >>> from diffusers import DDIMPipeline
            >>> pipeline = DDIMPipeline(unet, scheduler)
            >>> kept = cache_(unet, CacheConfig(points=4), scheduler=scheduler, num_inference_steps=4, progress=False)
            >>> pipeline.unet = CachedUNet(unet)
            >>> with pipeline.unet.one_walk():
            ...     images = pipeline(num_inference_steps=4).images
        """
        self._calls.walk = self.begin_walk()
        try:
            yield
        finally:
            self.forget()

    def _walk(self, *, declared: bool = False) -> Walk:
        walk = Walk(self.plan, self._full, self._shallow, time_scale(self), declared=declared)
        set_time_scale(walk, time_scale(self))  # type: ignore[arg-type]
        return walk

    def forget(self) -> None:
        """Drop the features that are kept in this thread: what is called next begins a walk."""
        self._calls.walk = None

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile both programs, each by itself; arguments as for ``torch.compile``, such as ``backend="pqcad"``."""
        if args:
            raise TypeError("write compile's arguments by their names, such as backend='pqcad'")
        self._options = options
        self._programs.clear()

    def _full(self, x_t: Tensor, timesteps: Tensor, conditioning: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return self._run(0, x_t, timesteps, conditioning)

    def _shallow(self, x_t: Tensor, timesteps: Tensor, conditioning: dict[str, Any], *feature: Tensor) -> Tensor:
        return self._run(1, x_t, timesteps, conditioning, *feature)

    def _run(self, which: int, x_t: Tensor, timesteps: Tensor, conditioning: dict[str, Any], *feature: Tensor) -> Any:
        """One of both programs, made for inputs of this form, where the network is and in its type."""
        given = {name: value for name, value in sorted(conditioning.items()) if value is not None}
        values, spec = tree_flatten(given)
        form = tuple((v.shape[1:], v.dtype) if isinstance(v, Tensor) else v for v in values)
        place = placement(self.unet)
        key = (place, tuple(x_t.shape[1:]), str(spec), form)
        if key not in self._programs:
            # those of another place hold weights that are no longer the network's
            self._programs = {known: both for known, both in self._programs.items() if known[0] == place}
            continuous = isinstance(self.plan.timesteps[0], float)
            captured = capture(self.unet, tuple(x_t.shape[1:]), given, continuous=continuous)
            cut = cut_at(captured.graph, self.plan)
            programs: tuple[Any, Any] = cut.full, ShallowStep(cut.shallow)
            if self._options is not None:
                programs = torch.compile(programs[0], **self._options), torch.compile(programs[1], **self._options)
            self._programs[key] = programs
        return self._programs[key][which](x_t, timesteps, given, *feature)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("unet"), name)  # config, dtype and what else pipelines ask for

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_programs": {}}  # made anew, of the copy's network


def cut_at(graph: GraphModule, plan: CachePlan) -> CacheSplit:
    """A captured network, cut where its plan says.

    Raises:
        ValueError: the graph has no such branch, or another feature than the plan was measured on.
    """
    cut = cache_split(graph, plan.branch)
    if cut.feature_shape[0] != plan.scale.shape[1]:
        raise ValueError(
            f"the cache plan was measured on a feature of {plan.scale.shape[1]} channels, and this network's has "
            f"{cut.feature_shape[0]}: call cache_ on this network"
        )
    return cut


def network_and_plan(unet: nn.Module, cache: CachePlan | Literal["own"] | None) -> tuple[nn.Module, CachePlan | None]:
    """The network that an export is given, and the plan that its program is to follow.

    Raises:
        ValueError: ``cache`` is neither a plan nor ``"own"`` nor None.
    """
    if cache is not None and cache != "own" and not isinstance(cache, CachePlan):
        raise ValueError(
            f"cache={cache!r}: allowed are 'own', the plan that the network carries, a CachePlan, and None"
        )
    plan = cache if isinstance(cache, CachePlan) else None
    if isinstance(unet, CachedUNet):
        return unet.unet, unet.plan if cache == "own" else plan
    return unet, cache_plan(unet) if cache == "own" else plan
