"""Train the feature network of FID and KID: ``python -m pqcad_ao.recipes.train_classifier --data DIR --out DIR``.

Cross-entropy and AdamW, a linear warm-up and a linear decay; no augmentation, so that the features keep position and
facing. A few minutes on one CPU thread. Afterwards it writes the features' statistics.
"""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn.functional import cross_entropy

from pqcad_ao.data import load_images, to_unit
from pqcad_ao.evaluate.features import FeatureClassifier, RealFeatures, extract_features
from pqcad_ao.recipes.settings import load_settings
from pqcad_ao.utils.progress import tqdm


def lr_at(step: int, steps: int, train: DictConfig) -> float:
    """Linear warm-up over the first ``train.warmup`` of the steps, then linear to zero."""
    warmup = train.warmup * steps
    return train.lr * min((step + 1) / warmup if warmup else 1.0, (steps - step) / max(1.0, steps - warmup))


def train(
    config: DictConfig, images: Tensor, labels: Tensor, *, device: str = "cpu"
) -> tuple[FeatureClassifier, list[float]]:
    """Train a classifier; returns it in ``eval`` mode, and the loss of every step.

    Args:
        config: as in ``configs/classifier_fashion_mnist.yaml``.
        images: (N, C, H, W) uint8. labels: (N,) int64.

    Raises:
        ValueError: fewer images than one batch takes.
        FloatingPointError: the loss is not finite.
    """
    options = config.train
    torch.manual_seed(options.seed)
    architecture: Any = OmegaConf.to_container(config.network)
    network: Any = FeatureClassifier(**architecture)
    network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.lr, weight_decay=options.weight_decay, fused=True)
    batches = len(images) // options.batch_size  # of whole size: a small last one would upset the batch statistics
    if not batches:
        raise ValueError(f"{len(images)} images do not fill a batch; lower train.batch_size (now {options.batch_size})")
    total = options.epochs * batches
    generator = torch.Generator().manual_seed(options.seed)
    losses: list[Tensor] = []
    network.train()
    bar = tqdm(total=total, desc="classifier", mininterval=5)
    for epoch in range(options.epochs):
        order = torch.randperm(len(images), generator=generator)
        for rows in order.split(options.batch_size)[:batches]:
            for group in optimizer.param_groups:
                group["lr"] = lr_at(len(losses), total, options)
            x = to_unit(images[rows].to(device)).contiguous(memory_format=torch.channels_last)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=options.bf16):
                logits = network(x)
            loss = cross_entropy(logits.float(), labels[rows].to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            bar.update()
        recent = torch.stack(losses[-batches:]).mean().item()  # one synchronisation an epoch
        if not math.isfinite(recent):
            raise FloatingPointError(f"the loss is {recent} in epoch {epoch + 1}; lower train.lr (now {options.lr})")
        bar.set_postfix(loss=f"{recent:.4f}")
    bar.close()
    return network.to(memory_format=torch.contiguous_format).eval(), torch.stack(losses).tolist()


@torch.no_grad()
def accuracy(network: FeatureClassifier, features: Tensor, labels: Tensor) -> float:
    """Part of the (N, d) features that the network's last layer sorts into their class."""
    return (network.head(features).argmax(1) == labels).double().mean().item()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder with idx.gz files, CIFAR-10's binary batches, or images")
    parser.add_argument("--out", required=True, help="where the classifier and the feature statistics go")
    parser.add_argument("--config", default="classifier_fashion_mnist", help="a name in recipes/configs or a YAML file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("overrides", nargs="*", help="such as train.epochs=1 train.bf16=false")
    args = parser.parse_args(argv)
    config = load_settings(args.config, args.overrides)
    sets = {}
    for split in ("train", "test"):
        images, labels = load_images(
            args.data, split, image_size=config.network.image_size, channels=config.network.in_channels
        )
        if labels is None:
            raise ValueError(f"the images in {args.data} have no labels; a classifier needs one folder per class")
        sets[split] = images, labels

    network, _ = train(config, *sets["train"], device=args.device)
    network = network.cpu()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    measured = {}
    for split, (images, labels) in sets.items():
        features = extract_features(images, network)
        measured[f"{split}_accuracy"] = round(accuracy(network, features, labels), 4)
        kept = features if split == "test" else features[: config.features.subset]
        dataclasses.replace(RealFeatures.from_features(features), features=kept.half()).save(
            out / f"features_{split}.safetensors", {"accuracy": measured[f"{split}_accuracy"]}
        )
    network.save(out / "classifier.safetensors", measured | {"seed": config.train.seed})
    print(", ".join(f"{name} {value:.4f}" for name, value in measured.items()))


if __name__ == "__main__":
    main()
