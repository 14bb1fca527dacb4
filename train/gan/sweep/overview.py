"""Where all runs of a grid stand, and how long those that are left will take."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from gan.captured import EAGER_STEPS, graph_for
from gan.devices import pick_device
from gan.outputs import read_metrics
from gan.sweep import slurm, state
from gan.sweep.plan import Run
from gan.sweep.state import State
from gan.training import Training

# What changes no speed.
_AS_QUICK = {"seed", "scale", "lr_g", "lr_d", "beta1", "beta2", "steps", "decay_from", "picks"}


def states(runs: Sequence[Run]) -> list[State]:
    """Of each, with jobs of Slurm that wait told from runs that have not begun or have stopped."""
    found = [state.state(run.config) for run in runs]
    open_ = (State.NEW, State.STOPPED)
    records = [state.record(r.config) if s in open_ else None for r, s in zip(runs, found, strict=True)]
    waiting = slurm.alive({x.where for x in records if x})
    return [State.SUBMITTED if r and r.where in waiting else s for r, s in zip(records, found, strict=True)]


def to_start(runs: Sequence[Run], again: bool = False) -> list[Run]:
    """Those that are to be started; with ``again`` those that have crashed, and no others."""
    wanted = (State.CRASHED,) if again else (State.NEW, State.STOPPED)
    return [r for r, s in zip(runs, states(runs), strict=True) if s in wanted]


def status(runs: Sequence[Run]) -> str:
    """How many runs are in which state, and a line for each that runs, has stopped or has crashed."""
    found = states(runs)
    counts = Counter(found)
    lines = [f"{len(runs)} runs: " + ", ".join(f"{counts[s]} {s.value}" for s in State if counts[s])]
    for run, own in zip(runs, found, strict=True):
        last = state.record(run.config)
        where = f" on {last.where}" if last and own is State.RUNNING else ""
        if own in (State.RUNNING, State.STOPPED):
            lines.append(f"{own.value:<10}{run.name}{where}: step {state.step_of(run.config)} of {run.config.steps}")
        elif own is State.SUBMITTED and last:
            lines.append(f"{own.value:<10}{run.name}: {last.where}")
        elif own is State.CRASHED and last and last.ended:
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(last.ended))
            lines.append(f"{own.value:<10}{run.name}, {when}: {state.reason(run.config)}")
    return "\n".join(lines)


def plan(entries: int, runs: Sequence[Run], slots: int, measure: bool, device: str) -> str:
    """Runs, steps and hours: by the speed of runs of this grid that have been evaluated, or, with ``measure``, of some
    steps that are timed now on ``device`` (evaluation not counted)."""
    left = [r for r, s in zip(runs, states(runs), strict=True) if s is not State.DONE]
    steps = {r.name: r.config.steps - min(r.config.steps, state.step_of(r.config)) for r in left}
    lines = [
        f"{entries} runs, {len(runs)} of them unique, {len(runs) - len(left)} done",
        f"{sum(r.config.steps for r in runs):,} steps in all, {sum(steps.values()):,} left",
    ]
    speeds = _measured(runs)
    if measure:
        speeds |= {key: _timed(r, device) for key, r in {_key(r): r for r in left}.items() if key not in speeds}
    known = [r for r in left if _key(r) in speeds]
    if known:
        hours = sum(steps[r.name] * speeds[_key(r)] for r in known) / 3600
        of = "" if len(known) == len(left) else f" for {len(known)} of the {len(left)} runs that are left"
        lines.append(f"about {hours / slots:.2f} hours on {slots} slot{'s' * (slots > 1)}{of}")
    if len(known) < len(left):
        lines.append(f"no speed is known of {len(left) - len(known)} runs: --measure times some steps of them here")
    return "\n".join(lines)


def _key(run: Run) -> str:
    fields: dict[str, Any] = {k: v for k, v in run.config.identity().items() if k not in _AS_QUICK}
    return json.dumps([run.recipe, fields, run.config.cuda_graph], sort_keys=True)


def _measured(runs: Sequence[Run]) -> dict[str, float]:
    """Seconds a step, evaluation included, by key."""
    found: dict[str, list[float]] = {}
    for run in runs:
        with contextlib.suppress(FileNotFoundError, ValueError):  # not begun, not evaluated yet
            rows = read_metrics(run.folder)
            found.setdefault(_key(run), []).append(float(rows[-1]["seconds"]) / int(rows[-1]["step"]))
    return {key: statistics.median(values) for key, values in found.items()}


def _timed(run: Run, device: str, warm_up: int = EAGER_STEPS + 1, count: int = 3) -> float:
    """Seconds a step, of random images."""
    config, place = run.config, pick_device("cuda" if device.startswith("cuda") else device)
    channels, classes = (1 if run.data is None else 3), (1000 if config.conditional != "none" else 0)
    training = Training(config, channels, classes, place, graph_for(config, place, 1))
    shape = (config.batch_size, channels, config.image_size, config.image_size)
    images = torch.randint(256, shape, dtype=torch.uint8, device=place)
    labels = torch.zeros(config.batch_size, dtype=torch.int64, device=place) if classes else None

    def steps(number: int) -> float:
        begun = time.perf_counter()
        for _ in range(number):
            training.advance(iter([(images, labels)] * config.n_dis))
        float(training.last[2].sum())  # waits for the device
        return (time.perf_counter() - begun) / number

    steps(warm_up)
    return steps(count)
