"""Runs as figures see them: found in folders, read."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gan import outputs, run
from gan.metrics import protocols

_log = logging.getLogger("gan")
SCORES = ("fid", "inception_score_mean")  # columns of metrics.csv


@dataclass(frozen=True)
class Run:
    """A folder that training has written. ``config``: what decides its weights; ``runtime``, ``environment``: how and
    where it was carried out."""

    folder: Path
    config: dict[str, Any]
    runtime: dict[str, Any]
    environment: dict[str, Any]

    @cached_property
    def metrics(self) -> list[dict[str, str]]:
        """The rows of metrics.csv. Raises FileNotFoundError or ValueError for a folder without any."""
        return outputs.read_metrics(self.folder)

    def scores(self, column: str) -> dict[int, float]:
        """A column of metrics.csv by step; NaN where it was none. Raises ValueError for what could not be computed."""
        missing = next((row for row in self.metrics if row["missing"]), None)
        if missing is not None:
            raise ValueError(
                f"{self.folder} must have scores, got none at step {missing['step']}: {missing['missing']}"
            )
        return {int(row["step"]): float(row[column] or math.nan) for row in self.metrics}

    @cached_property
    def _lines(self) -> list[dict[str, float]]:
        path = self.folder / "scalars.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def scalars(self, prefix: str) -> dict[str, dict[int, float]]:
        """Of scalars.jsonl, those whose tag starts with ``prefix``: {rest of the tag: {step: value}}."""
        found: dict[str, dict[int, float]] = {}
        for line in self._lines:
            for tag, value in line.items():
                if tag.startswith(prefix) and tag != "step":
                    found.setdefault(tag.removeprefix(prefix), {})[int(line["step"])] = value
        return found

    @property
    def step(self) -> int:
        """The last one that is written down: evaluated, or logged by a run that is never evaluated. 0: none."""
        if self.runtime.get("eval_every", 1):
            path = self.folder / "metrics.csv"
            return int(self.metrics[-1]["step"]) if path.is_file() and path.read_text().count("\n") > 1 else 0
        return int(self._lines[-1]["step"]) if self._lines else 0

    @property
    def sheet(self) -> Path:
        """The last picture of samples. Raises FileNotFoundError where there is none."""
        last = max((self.folder / "sample").glob("step-*.png"), default=None)
        if last is None:
            raise FileNotFoundError(f"{self.folder} must hold samples, found no picture in its folder sample")
        return last

    @property
    def weights(self) -> Path:
        """The last ones. Raises FileNotFoundError where there are none."""
        path = self.folder / "weights" / "last.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"{self.folder} must be the folder of a run that has saved weights, found none")
        return path


def read(folder: Path) -> Run:
    """The run of a folder; fields from after its time have their defaults. Raises ValueError for what is no run."""
    about = run.about(folder)
    return Run(folder, {**run.defaults(), **about["config"]}, about.get("runtime", {}), about.get("environment", {}))


def find(paths: Sequence[Path], unfinished: bool = False) -> list[Run]:
    """The runs in these folders, at any depth, each once, by name.

    ``unfinished``: take those that are not at their last step as far as they are, and leave those out that have not
    written a row yet; both are named in the log.

    Raises:
        ValueError: a path without a run; without ``unfinished``, a run that is not at its last step.
    """
    found: dict[Path, Run] = {}
    for path in paths:
        folders = sorted(_folders(path))
        if not folders:
            raise ValueError(f"run must be the folder of a run, or a folder that holds some, got {path} without any")
        found |= {folder.resolve(): read(folder) for folder in folders}
    runs = list(found.values())
    behind = [x for x in runs if x.step < x.config["steps"]]
    named = ", ".join(f"{x.folder} at step {x.step:,} of {x.config['steps']:,}" for x in behind)
    if behind and not unfinished:
        raise ValueError(f"runs must be at their last step (or pass --unfinished), got {named}")
    if behind:
        _log.info("not finished: %s", named)
    empty = [x for x in runs if not x.step]
    if empty:
        _log.info("left out, as nothing is written yet: %s", ", ".join(str(x.folder) for x in empty))
    if len(empty) == len(runs):
        raise ValueError(f"runs must have written something, got {len(runs)} without a row")
    return [x for x in runs if x.step]


def _folders(path: Path) -> Iterable[Path]:
    for here, below, files in os.walk(path, followlinks=True):
        if "config.json" in files:
            below.clear()
            yield Path(here)


def protocol(runs: Sequence[Run]) -> str:
    """The one that all scores are of, as metrics.csv names it. Raises ValueError where there are two, or two data sets
    or feature networks, since their scores cannot be compared."""
    first: tuple[dict[str, str], Run] | None = None
    for each in runs:
        for row in each.metrics:
            data = f"{each.config.get('data')} {each.config.get('data_key')}"
            own = {**{k: row[k] for k in ("protocol", "network", "reals")}, "data": data}
            if first is None:
                first = own, each
            unlike = next((k for k in own if own[k] != first[0][k]), None)
            if unlike:
                raise ValueError(
                    f"runs must be scored by one protocol, network and data set, got {unlike} {first[0][unlike]} in "
                    f"{first[1].folder} and {own[unlike]} in {each.folder}"
                )
    assert first is not None
    return first[0]["protocol"]


def score_names(label: str) -> dict[str, str]:
    """What the scores of a protocol are called, by column of metrics.csv: FID only where it is one."""
    row = protocols.PROTOCOLS.get(label.split("-")[0])
    return dict(zip(SCORES, (row.distance, row.score) if row else ("FID", "Inception Score"), strict=True))
