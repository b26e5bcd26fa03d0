"""What each process of ``test_together.py`` runs: ``python together.py OUT DIES_AT CASE ...``, alone or of a group.

Learning is in float64: a 4-bit network is a step function, so one value that rounding moves over its threshold moves
others, and the loss by percents within a few updates (noise of 1e-7 on the weights does the same in one process).
Float64 rounds 2^29 times finer, and runs that learn the same stay together. Some updates are clipped and some are not,
so that the size of gradients counts, which Adam alone would not see.
"""

import copy
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, UNet2DModel
from networks import SHAPE, TINY_UNET, Small, cosine_scheduler
from torch import Tensor, nn
from torch import distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

from pqcad_ao import PQCADConfig, denoiser, quantize_
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.evaluate.features import FeatureClassifier, extract_features
from pqcad_ao.learn import progressive, training
from pqcad_ao.prepare import fake_quant
from pqcad_ao.prepare.observe import parts_of
from pqcad_ao.utils.files import digest
from pqcad_ao.utils.processes import of_all, part_of, rank_and_world, whole_of

CALIBRATION: dict[str, Any] = {
    "calibration_points": 24,
    "calibration_steps": 4,
    "calibration_batch_size": 3,
    "timestep_groups": 4,
}
LEARNING: dict[str, Any] = {
    **CALIBRATION,
    "learning_points": 24,
    "batch_size": 4,
    "iterations": 16,
    "weight_share": 0.5,
    "beta": 0.5,
    "window": 1,
    "patience": 1,
    "weight_ladder": [6],
    "activation_ladder": [8],
    "target_bits": 5.0,
}
SELECTIVE: dict[str, Any] = {
    "trainable": ["skip_concat", "attention", "norms"],
    "local_weight": 0.5,
    "sample_weights": "groups",
    "weight_tasks": 2,
    "weight_every": 4,
    "weight_validation": 0.3,
}


def in_float64() -> None:
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float, nn.Module.float = torch.Tensor.double, nn.Module.double  # type: ignore[method-assign]
    denoiser.cast_floats.__defaults__ = (torch.float64,)


def learned(mode: str, folder: Path, **more: Any) -> dict[str, Any]:
    network = Small()
    config = PQCADConfig(mode=mode, **LEARNING, **more)
    quantize_(network, config, scheduler=cosine_scheduler(), folder=folder, **options())
    state = network._pqcad_state
    return {"state": network.state_dict(), "log": [update.loss for update in state.log], "moves": state.transitions}


class Watch:
    """How many bytes a process has of quantized layers' weights while it learns.

    Attributes:
        kept: of its parts, their gradients and Adam's moments for them, the most after an update.
        whole: of the same in one process. largest: of the largest weight.
        gathered: of whole weights, gathered or quantized, the most at a time.
    """

    def __init__(self) -> None:
        self.kept = self.whole = self.largest = self.gathered = 0
        self._there: list[tuple[StorageWeakRef, int]] = []
        for owner, name in ((fake_quant, "whole_of"), (fake_quant.WeightFakeQuantize, "forward")):
            setattr(owner, name, self._seen(getattr(owner, name)))
        clip = training.Learner._clip

        def clipping(learner: training.Learner) -> None:
            clip(learner)
            self._count(learner)

        training.Learner._clip = clipping  # type: ignore[method-assign]

    def _seen(self, function: Any) -> Any:
        def seen(*args: Any) -> Tensor:
            found = function(*args)
            if getattr(args[0], "form", args) is None:  # a fake quantizer whose weight is not in parts yet
                return found
            storage = found.untyped_storage()
            there = [(ref, size) for ref, size in self._there if not ref.expired()]
            self._there = [(ref, size) for ref, size in there if ref.cdata != storage._cdata]
            self._there.append((StorageWeakRef(storage), storage.nbytes()))
            self.gathered = max(self.gathered, sum(size for _, size in self._there))
            return found

        return seen

    def _count(self, learner: training.Learner) -> None:
        parts = parts_of(learner.graph)
        kept = [tensor for part in parts for tensor in (part, part.grad, *learner.optimizer.state[part].values())]
        self.kept = max(self.kept, sum(t.untyped_storage().nbytes() for t in kept if t is not None and t.dim()))
        sizes = [8 * form.numel() for form in parts.values()]
        self.whole, self.largest = 4 * sum(sizes), max(sizes, default=0)


def divided() -> dict[str, Tensor]:
    """A tensor of a length that the processes do not divide, whole again, and what its part's gradient is, too."""
    values = torch.arange(7.0).view(7, 1)
    part = part_of(values, values).requires_grad_()
    whole = whole_of(part, values)
    (whole.square() * (1 + rank_and_world()[0])).sum().backward()
    return {"whole": whole.detach(), "gradient": whole_of(part.grad, values)}


def options() -> dict[str, Any]:
    return {"sample_shape": SHAPE, "progress": False}


def calibrated(folder: Path | None) -> nn.Module:
    network = Small()
    config = PQCADConfig(mode="ptq", target_bits=5.0, **CALIBRATION)
    quantize_(network, config, scheduler=cosine_scheduler(), folder=folder, **options())
    return network


def piped() -> dict[str, Any]:
    torch.manual_seed(0)
    pipeline = DDIMPipeline(UNet2DModel(**TINY_UNET).eval(), cosine_scheduler())
    quantize_(pipeline, PQCADConfig(mode="ptq", **CALIBRATION), progress=False)
    return {"state": pipeline.unet.state_dict()}


def evaluated() -> dict[str, Tensor]:
    noise = torch.randn(7, *SHAPE, generator=torch.Generator().manual_seed(0))
    images = sample(Small(), cosine_scheduler(), noise, 4, batch_size=2, share=rank_and_world())
    torch.manual_seed(0)
    network = FeatureClassifier(1, 8, (4, 4))
    return {"images": images, "features": extract_features(images, network, 2, share=rank_and_world())}


def main() -> None:
    out, dies_at, cases = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    training.CHECKPOINT_EVERY, training.LARGEST_GRADIENT = 2, 0.2
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    update = progressive._Run.update

    def dying(run: Any) -> Any:
        if len(run.log) == dies_at and run.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(run)

    progressive._Run.update = dying  # type: ignore[method-assign]
    work = Path(f"{out}-work")
    made: dict[str, Any] = {}
    if "calibrated" in cases:
        made["calibrated"] = copy.deepcopy(calibrated(work).state_dict())
        made["piped"] = piped()
        made["evaluated"] = evaluated()
    in_float64()
    if "progressive" in cases:
        made["progressive"] = learned("progressive", work / "progressive")
    if "fixed" in cases:
        made["fixed"] = learned("fixed", work / "fixed", **SELECTIVE)
    if "sharded" in cases:
        watch = Watch() if rank_and_world()[1] > 1 else None
        made["sharded"] = learned("progressive", work / "sharded", shard=True)
        # no weights of samples: in the gradient by a key's bias, which is zero, they measure rounding
        local = {name: SELECTIVE[name] for name in ("trainable", "local_weight")}
        made["sharded fixed"] = learned("fixed", work / "sharded-fixed", **local, shard=True)
        if watch is not None:
            made["watched"] = vars(watch) | {"_there": None}
            made["divided"] = divided()
    assert len({*of_all(digest(made))}) == 1, "the processes have learned different networks"
    if rank_and_world()[0] == 0:
        torch.save(made, out)


if __name__ == "__main__":
    main()
