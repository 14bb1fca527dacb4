"""Scores of a run, a checkpoint or a folder of images, against a data folder or another folder of images.

python train/evaluate.py runs/cifar10/bssn --protocol bsn                       # against the data it was trained on
python train/evaluate.py samples/ --data data/cifar10 --protocol modern
python train/evaluate.py samples/ --data other/images --protocol lite0
python train/evaluate.py runs/imagenet/sn --protocol modern --intra --out intra.csv   # FID of each class, and the mean

torchrun --nproc_per_node 8 train/evaluate.py ...  shares the work among as many processes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from gan import checkpoint, cli, run, streams, weights
from gan.data import loose
from gan.data.digits import digits
from gan.data.store import Store, open_store, read_meta
from gan.distributed import ranks
from gan.labels import chosen
from gan.metrics import protocols
from gan.metrics.evaluator import BATCH, Evaluator, Scores
from gan.metrics.intra import ByClass, OfClass, by_class, intra_fid
from gan.metrics.judge import Images, images_of

CONFIG, META = "config.json", "meta.json"  # of the folder of a run, of data


def main(
    path: tyro.conf.Positional[Path],
    protocol: str,
    data: Path | None = None,
    inception_weights: Path | None = None,
    seed: int | None = None,
    batch_size: int = BATCH,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    cache: Path = Path("runs"),
    intra: bool = False,
    intra_fakes: int = 5_000,
    classes: tuple[int, ...] = (),
    out: Path | None = None,
) -> Scores | list[OfClass]:
    """Print the scores of the images in PATH, or with --intra their intra-FID.

    Args:
        path: The folder of a run, a checkpoint, or a folder of images.
        protocol: bsn, sngan, modern, digits or lite0.
        data: What to compare with: a data folder of prepare.py or a folder of images. Default: the run's own data.
        inception_weights: The weights of Inception; default FASTSN_INCEPTION or torch hub's cache.
        seed: Of the latent vectors; default: the run's, so that its last row of metrics.csv comes out again.
        batch_size: How many images at a time; does not change the scores beyond rounding.
        device: Where to compute.
        cache: A folder for the statistics of the reals.
        intra: FID of each class alone, and their mean, by the network and the pixels of the protocol: of a conditional
            generator, or of a folder with class folders, called as the classes of the data or by their labels.
        intra_fakes: How many fakes of each class; of a folder, all that it has.
        classes: Labels of the classes for --intra; default: all.
        out: A .csv file for a row of each class of --intra: label, reals, fakes, fid.
    """
    row = protocols.find(protocol)
    if (classes or out) and not intra:
        raise ValueError(f"{'classes' if classes else 'out'}: expected only with --intra")
    with ranks().together():
        if not path.exists():
            raise ValueError(
                f"path: expected a run, a checkpoint or a folder of images, got {path}, which is not there"
            )
        trained = weights.load(path, device) if path.is_file() or (path / CONFIG).exists() else None
        if trained is not None:
            seed = trained.config.seed if seed is None else seed
            data = data or run.data_of(path if path.is_dir() else path.parent.parent)
        if intra:
            reals = _reals_with_labels(data, trained, protocol)
            labels = chosen(classes, reals.classes)
            row = dataclasses.replace(row, reals=None, kid=False)  # all that a class has
            if trained is not None:
                of_label = _from_labels(_conditional(trained, path, reals), seed, intra_fakes)
            else:
                names = _class_names(data)
                of_label = by_class(loose.labelled(path, loose.label_of(path, names), len(names)))
        elif trained is not None:
            generate = _from_latents(trained, seed)
            reals = _reals(data, trained, protocol)
        else:
            fakes = loose.pictures(path)
            row = _for_all_of(fakes, row)
            generate = _from_store(fakes)
            reals = _reals(data, trained, protocol)
    evaluator = Evaluator(reals, row, torch.device(device), inception_weights, cache, batch_size)
    if intra:
        return _intra(evaluator, of_label, labels, out)
    scores = evaluator(generate)
    _say(_text(scores, row))
    return scores


def _reals(data: Path | None, trained: weights.Trained | None, protocol: str) -> Store:
    """What to compare with."""
    if data is not None:
        return open_store(data) if (data / META).exists() else loose.pictures(data)
    if trained is not None and protocol == "digits":
        return digits(trained.config.image_size)
    raise ValueError("data: expected a folder to compare with, got none")


def _reals_with_labels(data: Path | None, trained: weights.Trained | None, protocol: str) -> Store:
    """The same for intra-FID: a folder of images has class folders."""
    if data is not None and not (data / META).exists():
        names = loose.class_folders(data, "data")
        return loose.labelled(data, {name: label for label, name in enumerate(names)}, len(names))
    reals = _reals(data, trained, protocol)
    if reals.labels is None:
        raise ValueError(f"data: expected images with labels for --intra, got {reals.name} without")
    return reals


def _class_names(data: Path) -> list[str]:
    """Of a folder of prepare.py, or of images in class folders."""
    if (data / META).exists():
        return list(read_meta(data)["classes"])
    return loose.class_folders(data, "data")


def _conditional(trained: weights.Trained, path: Path, reals: Store) -> weights.Trained:
    """A generator of the classes of the reals."""
    if not trained.conditional:
        raise ValueError(f"intra: expected a generator that takes labels, got {path} with conditional 'none'")
    if trained.classes != reals.classes:
        raise ValueError(
            f"data: expected {trained.classes} classes, as the generator has, got {reals.name} with {reals.classes}"
        )
    return trained


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


def _from_store(fakes: Store) -> Images:
    """Images in a random order, so that the splits of the score are alike though a folder may be sorted by class."""
    order = np.random.RandomState(0).permutation(fakes.count)
    return images_of(fakes, order)


def _from_latents(trained: weights.Trained, seed: int) -> Images:
    """Those that training evaluates: z ~ N(0, I), each a function of the seed and its number, every class in turn."""

    def generate(first: int, count: int) -> Tensor:
        z = streams.numbered(seed, "evaluation", first, count, trained.config.latent)
        return trained.images(z, trained.numbered_labels(first, count))

    return generate


def _from_labels(trained: weights.Trained, seed: int, count: int) -> ByClass:
    """``count`` fakes of each class, of other z for each: a function of the seed, the label, and the number in it."""

    def generate(label: int, first: int, number: int) -> Tensor:
        z = streams.numbered(seed, "intra", label * count + first, number, trained.config.latent)
        return trained.images(z, torch.full((number,), label))

    return lambda label: (count, functools.partial(generate, label))


def _intra(evaluator: Evaluator, fakes: ByClass, labels: Sequence[int], out: Path | None) -> list[OfClass]:
    """Print the intra-FID, and write that of each class."""
    counted = f"intra, {evaluator.protocol.name}: {len(labels)} classes"
    if evaluator.missing:
        _say(f"{counted}, network missing\n{evaluator.missing}")
        return []
    found = intra_fid(evaluator, fakes, labels)
    mean = math.fsum(x.fid for x in found) / len(found)
    _say(f"{counted}, network {evaluator.network.checksum}\nintra-{evaluator.protocol.distance}: {mean:.4f}")
    if out is not None:
        rows = [OfClass._fields, *found]
        text = "".join(",".join(map(str, row)) + "\n" for row in rows)
        ranks().of_first(lambda: checkpoint.atomic_write(out, text.encode()))
    return found


def _say(text: str) -> None:
    """Print once, however many processes there are."""
    if ranks().first:
        print(text)


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
