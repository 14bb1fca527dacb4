"""Scores of a grid's runs: a row for every evaluation, and a table of means over seeds."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gan import checkpoint
from gan.figures.groups import mean_and_error
from gan.metrics.protocols import PROTOCOLS
from gan.outputs import read_metrics
from gan.sweep import overview
from gan.sweep.grid import Grid
from gan.sweep.plan import Run
from gan.sweep.state import State

Row = dict[str, str]
_SCORES = ("step", "fid", "inception_score_mean", "kid_mean", "seconds", "protocol", "network", "weights")


def rows(runs: Sequence[Run]) -> list[Row]:
    """Of each run the fields in which the runs differ, and for a run that is done each row of its metrics.csv; one
    without scores for a run that is not.

    Raises ValueError: runs were scored by different protocols or networks.
    """
    fields = {run.name: {"recipe": run.recipe, **run.config.identity()} for run in runs}
    differ = [f for f in next(iter(fields.values())) if len({str(x.get(f)) for x in fields.values()}) > 1]
    columns = [f for f in differ if f != "seed"]
    found = []
    for run, state in zip(runs, overview.states(runs), strict=True):
        own = {"run": run.name, "state": state.value} | {f: str(fields[run.name][f]) for f in columns}
        own["seed"] = str(run.config.seed)
        scores = read_metrics(run.folder) if state is State.DONE else [dict.fromkeys(_SCORES, "")]
        found += [own | {column: score[column] for column in _SCORES} for score in scores]
    _check_alike(found)
    return found


def _check_alike(found: Sequence[Row]) -> None:
    for column in ("protocol", "network"):
        first = {row[column]: row["run"] for row in reversed(found) if row[column]}
        if len(first) > 1:
            told = ", ".join(f"{value} ({run})" for value, run in first.items())
            raise ValueError(f"runs of one table must be scored by one {column}, got {told}")


def write(path: Path, found: Sequence[Row], told: Mapping[str, Any]) -> None:
    """The rows as CSV, and beside it what ``about`` says as JSON."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    checkpoint.atomic_write(path, out.getvalue().encode())
    checkpoint.atomic_write(path.with_suffix(".json"), (json.dumps(told, indent=2) + "\n").encode())


def about(name: str, grid: Grid, runs: Sequence[Run]) -> dict[str, Any]:
    """What the runs of a table have in common, and where they were trained: {environment: how many of them}."""
    configs = [run.config.identity() for run in runs]
    common = {field: x for field, x in configs[0].items() if all(c[field] == x for c in configs)}
    files = [run.folder / "config.json" for run in runs]
    found = [json.dumps(json.loads(file.read_text())["environment"]) for file in files if file.is_file()]
    environments = [{"runs": count, **json.loads(text)} for text, count in Counter(found).items()]
    return {"grid": name, "about": grid.about, "config": common, "environments": environments}


def read(path: Path) -> list[Row]:
    """What ``write`` wrote."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class Group(NamedTuple):
    """Runs that differ in nothing but the seed. ``last``, ``best``: of each run that is done, {score: value}; missing:
    the states of the others."""

    fields: dict[str, str]
    last: list[dict[str, float]]
    best: list[dict[str, float]]
    missing: list[str]


_BETTER: dict[str, Callable[[Any], float]] = {"fid": min, "inception_score_mean": max}


def groups(found: Sequence[Row]) -> list[Group]:
    """In the order of their first rows."""
    made: dict[tuple[tuple[str, str], ...], dict[str, list[Row]]] = {}
    names = [c for c in found[0] if c not in ("run", "state", "seed", *_SCORES)]
    for row in found:
        made.setdefault(tuple((c, row[c]) for c in names), {}).setdefault(row["run"], []).append(row)
    result = []
    for fields, by_run in made.items():
        done = [of_run for of_run in by_run.values() if of_run[0]["step"]]
        last = [{score: _number(of_run[-1][score]) for score in _BETTER} for of_run in done]
        best = [{score: _best(score, [_number(row[score]) for row in of_run]) for score in _BETTER} for of_run in done]
        missing = [of_run[0]["state"] for of_run in by_run.values() if not of_run[0]["step"]]
        result.append(Group(dict(fields), last, best, missing))
    return result


def _number(cell: str) -> float:
    return float(cell) if cell else math.nan


def _best(score: str, values: Sequence[float]) -> float:
    finite = [x for x in values if not math.isnan(x)]
    return _BETTER[score](finite) if finite else math.nan


def mean(values: Sequence[float]) -> str:
    """Mean ± standard error of those that are numbers, with how many are none (their images had no finite features)."""
    finite = [x for x in values if not math.isnan(x)]
    if not finite:
        return "–"
    middle, error, count = mean_and_error(finite)
    text = f"{middle:.2f}" + (f" ± {error:.2f}" if count > 1 else "")
    return text + (f" ({len(values) - len(finite)} not finite)" if len(finite) < len(values) else "")


def markdown(found: Sequence[Row]) -> str:
    """The table of means ± standard errors over seeds; of runs that are missing, how many and why."""
    distance, score = _names(found)
    fields = list(groups(found)[0].fields)
    heads = [*fields, "seeds", f"{distance}, last", f"{distance}, best", f"{score}, last", f"{score}, best"]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    for group in groups(found):
        total = len(group.last) + len(group.missing)
        why = ", ".join(f"{group.missing.count(x)} {x}" for x in dict.fromkeys(group.missing))
        seeds = f"{total}" if not group.missing else f"{len(group.last)} of {total} ({why})"
        cells = [mean([run[name] for run in of]) if of else "–" for name in _BETTER for of in (group.last, group.best)]
        lines.append("| " + " | ".join([*(group.fields[f] for f in fields), seeds, *cells]) + " |")
    return "\n".join(lines)


def _names(found: Sequence[Row]) -> tuple[str, str]:
    label = next((row["protocol"] for row in found if row["protocol"]), "")
    protocol = PROTOCOLS.get(label.split("-")[0])
    return (protocol.distance, protocol.score) if protocol else ("FID", "Inception Score")
