"""Tiny digit runs: seconds long, every file of a real one."""

from __future__ import annotations

import contextlib
import csv
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import cifar10
import digits
from gan import cli, presets
from gan.config import Config

TINY: dict[str, Any] = {
    "steps": 10,
    "batch_size": 16,
    "width": 0.05,
    "image_size": 8,
    "latent": 8,
    "lr_g": 5e-3,  # so that ten steps show in the metrics
    "lr_d": 5e-3,
    "eval_every": 3,
    "sample_every": 5,
    "log_every": 4,
    "checkpoint_every": 4,
    "keep_checkpoints": 2,
    "device": "cpu",
}


def tiny(runs: Path, classifier_cache: Path, name: str, resume: bool = False, **changes: Any) -> Path:
    """Run it in this process; returns its folder."""
    share_classifier(classifier_cache, runs)
    digits.main(digits.Digits(name=name, runs=runs, **{**TINY, **changes}), resume=resume)
    return runs / name


def share_classifier(cache: Path, runs: Path) -> None:
    for file in cache.glob("digit-classifier-*.npz"):
        shutil.copy(file, runs)


def arguments(runs: Path, name: str, **changes: Any) -> list[str]:
    """The same as a command line."""
    fields = {**TINY, **changes, "name": name, "runs": runs}
    return [str(Path(digits.__file__)), *(x for k, v in fields.items() for x in (f"--{k.replace('_', '-')}", str(v)))]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads in this process, as OMP_NUM_THREADS gives another: torch adds in another order with another
    number of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rows(run: Path) -> list[list[str]]:
    """metrics.csv without the column of seconds."""
    with open(run / "metrics.csv", newline="") as file:
        return [[x for name, x in row.items() if name != "seconds"] for row in csv.DictReader(file)]


def config_made(monkeypatch: pytest.MonkeyPatch, *given: str, main: object = cifar10, table: object = None) -> Config:
    """The config that a command line makes."""
    found: list[Config] = []
    monkeypatch.setattr(main.recipe, "train", lambda config, *_: found.append(config))
    monkeypatch.setattr(main.recipe, "open_data", lambda _: None)
    table = presets.PRESETS if table is None else table
    cli.start(main.main, table, ["--name", "x", "--data", "d", *given], methods=presets.METHODS)
    return found[0]
