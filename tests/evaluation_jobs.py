"""What the ranks of test_evaluate_distributed do. Every job runs on each rank at once, ``rank`` first."""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import evaluate
from gan.data.store import Store, memory_store
from gan.distributed import CommonError
from gan.metrics import cache, digits, features
from gan.metrics import protocols as rows
from gan.metrics.intra import intra_fid
from gan.metrics.judge import Images
from gan.metrics.protocols import Protocol
from small_evaluations import IMAGES, STORE, Tiny, evaluator, small


def fakes(first: int, count: int) -> torch.Tensor:
    """A function of the number, in [-1, 1]. No eigenvalue of their covariance is 0: its root would be rounding."""
    numbers = torch.arange(first, first + count, dtype=torch.float64)[:, None, None, None]
    return torch.sin(numbers * (1 + torch.arange(48).view(3, 4, 4)) ** 2).float()


def scored(_: int, folder: Path, protocol: Protocol, batch_size: int) -> dict[str, Any]:
    """Two evaluations with a cache in between: the scores, which fakes were asked for, how many images this rank's
    network saw at each of them, how often this rank wrote a file."""
    asked: list[int] = []
    seen, found, written = [], [], []

    def generate(first: int, count: int) -> torch.Tensor:
        asked.append(first)
        return fakes(first, count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "KID_SUBSET_SIZE", 15)
        write = cache.write
        patch.setattr(cache, "write", lambda path, arrays: (written.append(path.name), write(path, arrays)))
        torch.manual_seed(0)
        network = Tiny()
        for _ in range(2):
            found.append(tuple(evaluator(folder, protocol, network=network, batch_size=batch_size)(generate)))
            seen.append(sum(map(len, network.seen)))
            network.seen.clear()
    return {"found": found, "asked": asked, "seen": seen, "written": written}


def not_finite(_: int, folder: Path, protocol: Protocol, bad: tuple[int, ...]) -> tuple[str, str]:
    """What is missing where the batches of the fakes ``bad`` are not finite, and afterwards where all are."""

    def generate(first: int, count: int) -> torch.Tensor:
        return fakes(first, count) / (first not in bad)

    judge = evaluator(folder, protocol, network=Tiny(), batch_size=9)
    return judge(generate).missing, judge(fakes).missing


def broken_disk(rank: int, folder: Path, protocol: Protocol) -> str:
    """The error of every rank where one cannot read its fakes."""

    def generate(first: int, count: int) -> torch.Tensor:
        if rank == 1:
            raise OSError("the disk is gone")
        return fakes(first, count)

    with pytest.raises(CommonError) as error:
        evaluator(folder, protocol, network=Tiny(), batch_size=9)(generate)
    return str(error.value)


def inception(rank: int, folder: Path, protocol: Protocol, on_one: str) -> tuple[str, int]:
    """What is missing, or the error, and how many warnings this rank has logged, where rank 1 has the network not at
    all ("missing"), a broken one, or another one."""
    warnings: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = warnings.append  # type: ignore[method-assign]

    def load(*_: Any) -> features.Network:
        if rank == 1 and on_one == "missing":
            raise features.MissingNetwork("no weights here")
        if rank == 1 and on_one == "broken":
            raise ValueError("inception-weights: expected others")
        torch.manual_seed(rank)
        return features.with_checksum(Tiny())

    logging.getLogger("gan").addHandler(handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(features, "inception", load)
            found = evaluator(folder, protocol)(fakes).missing
    except CommonError as error:
        found = str(error)
    finally:
        logging.getLogger("gan").removeHandler(handler)
    return found, len(warnings)


def classifier(rank: int, folder: Path) -> tuple[str, int]:
    """Checksum of the digit classifier, and how often this rank has trained one; its folder is its own."""
    trained = []

    def train(store: Any, scale: Any) -> tuple[digits.DigitClassifier, float]:
        trained.append(store)
        torch.manual_seed(rank)
        return digits.DigitClassifier(scale), 1.0

    store = memory_store("digits", np.zeros((10, 8, 8, 1), np.uint8), np.arange(10))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "train_digit_classifier", train)
        networks = [digits.digit_classifier(store, (127.5, 127.5), folder / str(rank)) for _ in range(2)]
    assert networks[0].checksum == networks[1].checksum
    return networks[0].checksum, len(trained)


def damaged(_: int, folder: Path, protocol: Protocol) -> tuple[float, float, int]:
    """Distances with a cache and after it was damaged, and how many images this rank saw for the second."""
    torch.manual_seed(0)
    network = Tiny()
    first = evaluator(folder, protocol, STORE, network)(fakes)
    torch.distributed.barrier()
    for path in folder.glob("reals-*.npz"):
        path.write_bytes(b"damaged")
    torch.distributed.barrier()
    network.seen.clear()
    again = evaluator(folder, protocol, STORE, network)(fakes)
    return first.fid, again.fid, sum(map(len, network.seen))


def labelled_store() -> Store:
    """Ten, fourteen and sixteen images of three classes."""
    return memory_store("noise", IMAGES, np.repeat([0, 1, 2], [10, 14, 16]))


def intra(_: int, folder: Path, batch_size: int, bad: int | None) -> Any:
    """The distance of each class from some fakes, and how many images this rank's network saw; or the error where the
    fakes of class ``bad`` are not finite in the second batch."""

    def of_label(label: int) -> tuple[int, Images]:
        def generate(first: int, count: int) -> torch.Tensor:
            return fakes(100 * label + first, count) / (label != bad or first != batch_size)

        return 12, generate

    torch.manual_seed(0)
    network = Tiny()
    judge = evaluator(folder, small(), labelled_store(), network, batch_size)
    try:
        return [tuple(row) for row in intra_fid(judge, of_label, range(3))], sum(map(len, network.seen))
    except ValueError as error:
        return str(error)


def evaluated(_: int, data: Path, cache_folder: Path, out: Path) -> tuple[str, Any, Any]:
    """What evaluate.py prints and gives for a folder of images against itself: scores, then those of each class."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(features, "lite0", lambda _: features.with_checksum(Tiny()))
        options: dict[str, Any] = {"device": "cpu", "cache": cache_folder, "batch_size": 9}
        scores = evaluate.main(data, "lite0", data, **options)
        rows = evaluate.main(data, "lite0", data, intra=True, out=out, **options)
    return said.getvalue(), scores[:7], [tuple(row) for row in rows]
