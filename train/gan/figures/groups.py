"""Runs that differ in nothing but the seed, what such a group is called, its means and standard errors."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from gan.config import Norm
from gan.figures.runs import Run

Series = Mapping[tuple[str, str], Mapping[int, float]]  # {(quantity, of what): {step: value}}
_NORMS = {
    "none": "no normalization",
    "clip": "weight clipping",
    "orthonormal": "orthonormal",
    "sn_conv": "SN conv",
}
_SHORT = {"lr_g": "lr of G", "lr_d": "lr of D", "lr": "lr", "beta1": "β1", "beta2": "β2", "gradient_penalty": "penalty"}


@dataclass(frozen=True)
class Group:
    """Runs of several seeds. ``config``: what they have in common."""

    label: str
    config: dict[str, Any]
    runs: list[Run]


def groups(runs: Sequence[Run], unnamed: Iterable[str] = ()) -> list[Group]:
    """Those that differ in nothing but the seed, labelled by what differs among the groups beside ``unnamed``.

    Raises:
        ValueError: two runs are the same to the seed, so that one would count twice.
    """
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(json.dumps(_without_seed(run.config), sort_keys=True), []).append(run)
    for same in found.values():
        seeds: dict[int, Run] = {}
        for run in same:
            other = seeds.setdefault(run.config["seed"], run)
            if other is not run:
                raise ValueError(
                    f"runs of one config must differ in their seed, got seed {run.config['seed']} in {other.folder} "
                    f"and {run.folder}"
                )
    common = [_without_seed(same[0].config) for same in found.values()]
    labels = names(common, unnamed)
    made = [Group(*parts) for parts in zip(labels, common, found.values(), strict=True)]
    fields = differing(common)
    return sorted(made, key=lambda group: [order(field, group.config.get(field)) for field in fields])


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Fields that do not have one value in all of these, the norm first."""
    fields = dict.fromkeys(["norm", *(field for config in configs for field in config)])
    return [x for x in fields if any(config.get(x) != configs[0].get(x) for config in configs)]


def names(configs: Sequence[Mapping[str, Any]], unnamed: Iterable[str] = ()) -> list[str]:
    """What each is called among the others: its norm, and the fields in which they differ, but those ``unnamed``.

    A scale of 1 is left out where no config of that norm has another one, learning rates of both networks are one where
    they are the same everywhere.
    """
    fields = differing(configs)
    if "data_key" in fields:
        data, keys = ({config.get(x) for config in configs} for x in ("data", "data_key"))
        implied = ("channels", "classes", *(["data_key"] if len(data) == len(keys) else []))
        fields = [x for x in fields if x not in implied]
    fields = [x for x in fields if x not in unnamed and x != "norm"]
    if {"lr_g", "lr_d"} <= set(fields) and all(config["lr_g"] == config["lr_d"] for config in configs):
        fields = [{"lr_g": "lr"}.get(x, x) for x in fields if x != "lr_d"]
    with_norm = [] if "norm" in unnamed else ["norm"]
    scaled = {config["norm"] for config in configs if config.get("scale", 1) != 1}
    show_scale = "scale" not in unnamed and (len(configs) == 1 or "scale" in fields or bool(scaled))
    fields = [*with_norm, *(["scale"] if show_scale else []), *(x for x in fields if x != "scale")]
    return [
        ", ".join(_said(x, config) for x in fields if x != "scale" or config["norm"] in scaled) for config in configs
    ]


def _said(field: str, config: Mapping[str, Any]) -> str:
    value = config.get("lr_g" if field == "lr" else field)
    if field == "norm":
        return _NORMS.get(str(value), str(value).upper().replace("_", " "))
    name = _SHORT.get(field, field.replace("_", " "))
    if isinstance(value, bool):
        return name if value else f"no {name}"
    return f"{name} {number(value)}"


def number(value: Any) -> str:
    """As short as it is exact: 1.4, 500, 2e-4."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        small_or_large = value and not 1e-2 <= abs(value) < 1e5
        return np.format_float_scientific(value, trim="-", exp_digits=1) if small_or_large else f"{value:g}"
    return str(value)


def order(field: str, value: Any) -> tuple[int, float, str]:
    """A key that sorts the values of a field: norms as the config lists them, numbers, texts."""
    if field == "norm":
        known = get_args(Norm)
        return (0, known.index(value) if value in known else len(known), str(value))
    if isinstance(value, int | float):
        return (0, float(value), "")
    return (1, 0.0, str(value))


def mean_and_error(values: Sequence[float]) -> tuple[float, float, int]:
    """Mean, standard error s / sqrt(n) with s of n - 1 degrees of freedom (NaN of one value), n."""
    if len(values) == 1 or not all(math.isfinite(x) for x in values):
        return float(np.mean(values)), math.nan, len(values)
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5, len(values)


def over_seeds(found: Sequence[Group], of_run: Callable[[Run], Series]) -> list[tuple[Any, ...]]:
    """Rows (quantity, of, group, step, mean, standard error, seeds), panel by panel."""
    series = {group.label: [of_run(run) for run in group.runs] for group in found}
    panels = dict.fromkeys(panel for each in series.values() for values in each for panel in values)
    rows = []
    for panel in panels:
        for label, each in series.items():
            here = [values[panel] for values in each if panel in values]
            for step in sorted({step for values in here for step in values}):
                rows.append((*panel, label, step, *mean_and_error([x[step] for x in here if step in x])))
    return rows


def _without_seed(config: Mapping[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in config.items() if field != "seed"}
