"""Scores of a run, a checkpoint or a folder of images, against a data folder or another folder of images.

python train/evaluate.py runs/cifar10/bssn --protocol bsn                       # against the data it was trained on
python train/evaluate.py samples/ --data data/cifar10 --protocol modern
python train/evaluate.py samples/ --data other/images --protocol lite0
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from gan import cli, run, streams
from gan.data import sources
from gan.data.digits import digits
from gan.data.pixels import decode
from gan.data.store import Store, memory_store, open_store
from gan.metrics import protocols
from gan.metrics.evaluator import BATCH, Evaluator, Scores

CONFIG = "config.json"  # of a run's folder


def main(
    path: tyro.conf.Positional[Path],
    protocol: str,
    data: Path | None = None,
    inception_weights: Path | None = None,
    seed: int | None = None,
    batch_size: int = BATCH,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    cache: Path = Path("runs"),
) -> Scores:
    """Print the scores of the images in PATH.

    Args:
        path: The folder of a run, a checkpoint, or a folder of images.
        protocol: bsn, sngan, modern, digits or lite0.
        data: What to compare with: a data folder of prepare.py or a folder of images. Default: the run's own data.
        inception_weights: The weights of Inception; default FASTSN_INCEPTION or torch hub's cache.
        seed: Of the latent vectors; default: the run's, so that its last row of metrics.csv comes out again.
        batch_size: How many images at a time; does not change the scores beyond rounding.
        device: Where to compute.
        cache: A folder for the statistics of the reals.
    """
    row = protocols.find(protocol)
    if not path.exists():
        raise ValueError(f"path: expected a run, a checkpoint or a folder of images, got {path}, which is not there")
    reals: Store | None = None
    if path.is_file() or (path / CONFIG).exists():
        from gan.weights import load_generator

        generator, config = load_generator(path)
        generate = _from_latents(generator.to(device), config.latent, config.seed if seed is None else seed, device)
        data = data or run.data_of(path if path.is_dir() else path.parent.parent)
        if data is None and protocol == "digits":
            reals = digits(config.image_size)
    else:
        fakes = pictures(path)
        row = _for_all_of(fakes, row)
        generate = _from_store(fakes)
    if reals is None:
        if data is None:
            raise ValueError("data: expected a folder to compare with, got none")
        reals = open_store(data) if (data / "meta.json").exists() else pictures(data)
    scores = Evaluator(reals, row, torch.device(device), inception_weights, cache, batch_size)(generate)
    print(_text(scores, row))
    return scores


def pictures(folder: Path) -> Store:
    """A folder of images of one size, as they are: neither cropped nor resized."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in sources.SUFFIXES)
    if not found:
        raise ValueError(f"path: expected images ({' '.join(sources.SUFFIXES)}) in {folder}, got none")
    images: list[np.ndarray] = []
    for path in found:
        with sources.naming_member(folder, str(path.relative_to(folder))):
            images.append(decode(path.read_bytes(), background=255))
        height, width, _ = images[-1].shape
        if height != width or images[-1].shape != images[0].shape:
            raise ValueError(f"path: expected square images of one size, got {path} of {height} x {width} pixels")
    return memory_store(folder.resolve().name, np.stack(images))


def _for_all_of(fakes: Store, protocol: protocols.Protocol) -> protocols.Protocol:
    """The protocol, with all images of the folder where its name says how many there were."""
    if protocol.label(0) != protocol.name:
        protocol = dataclasses.replace(protocol, fakes=fakes.count, score_fakes=fakes.count)
    least = max(protocol.all_fakes, protocol.splits)
    if fakes.count < least:
        raise ValueError(
            f"path: expected at least {least} images for the protocol {protocol.name}, got {fakes.name} with "
            f"{fakes.count}"
        )
    return protocol


def _from_store(fakes: Store) -> Callable[[int, int], Tensor]:
    """Images in a random order, so that the splits of the score are alike though a folder may be sorted by class."""
    order = np.random.RandomState(0).permutation(fakes.count)
    return lambda first, count: torch.from_numpy(fakes.read(order[first : first + count])).permute(0, 3, 1, 2)


def _from_latents(generator: nn.Module, latent: int, seed: int, device: str) -> Callable[[int, int], Tensor]:
    """Those that training evaluates: z ~ N(0, I), each a function of the seed and its number, and every label equally
    often where the generator takes any."""

    def generate(first: int, count: int) -> Tensor:
        z = streams.numbered(seed, "evaluation", first, count, latent).to(device)
        labels = streams.numbered_labels(first, count, generator.classes) if generator.classes else None
        images: Tensor = generator(z, None if labels is None else labels.to(device))
        return images

    return generate


def _text(scores: Scores, protocol: protocols.Protocol) -> str:
    """A line for each figure."""
    counted = f"{scores.protocol}: {scores.reals} reals, {scores.fakes} fakes, network {scores.network or 'missing'}"
    if scores.missing:
        return f"{counted}\n{scores.missing}"
    lines = [counted, f"{protocol.distance}: {scores.fid:.4f}"]
    lines.append(f"{protocol.score}: {scores.inception_score_mean:.4f} ± {scores.inception_score_std:.4f}")
    if protocol.kid:
        lines.append(f"KID: {scores.kid_mean:.6f} ± {scores.kid_std:.6f}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.start(main)
