"""What normalization adds to a training step, by contestant and by how the step runs: python bench/training_step.py
--out OUT.json

The CNN discriminator of CIFAR10 on real and fake images, hinge loss, backward, Adam (bench/discriminator.py): eager,
compiled, compiled with the compiler's CUDA graphs, and the whole step in one CUDA graph, with variants of precision and
layout. Those of a group take turns; each is compared with no normalization in the same round, after a check of what it
computes. Then normalization alone: forward and backward of all weights. What is worth knowing first comes first, and
the file has every group that is done. What raises has its error in the file instead of figures, and what follows its
group is measured in a process of its own: a capture that failed, or a kernel, may have left this one unable to go on.
Without a GPU: eager and compiled; --width 4 makes the network small.

Of every row: wall_ms, the median until the results are there; on a GPU host_ms, until the call returns; device_ms and
kernels, the time of all kernels and copies and how many they are. normalization_ms is the median of the differences to
no normalization; times_less_than_torch_SN that of torch's SN divided by it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import comparison
import measure
import torch
from contestants import BASELINE
from discriminator import NORMALIZATIONS, ON_A_GPU, PLAIN, TORCH, Loss, Setting, capture, check_same, prepared
from machine import write
from measure import DEVICE, Step
from torch import Tensor
from workloads import CIFAR10, SMALL_CONVS, Workload, cifar10_cnn

TARGETED = (PLAIN, TORCH, "fastsn BSSN in a step", "fastsn BSSN fused")
FEW = (PLAIN, TORCH, "fastsn BSSN in a step")
OTHERS = (PLAIN, TORCH, *(name for name in NORMALIZATIONS if name not in TARGETED))


# What differs from float32, with TF32 where torch uses it by default, in torch's default layout.
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "bfloat16": {"bfloat16": True},
    "channels_last": {"layout": torch.channels_last},
}


class Group(NamedTuple):
    """Who takes turns, in which mode and variant."""

    mode: str
    contestants: tuple[str, ...]
    variant: str = ""


FIRST = [Group("captured", TARGETED), Group("eager", tuple(NORMALIZATIONS)), Group("compiled", TARGETED)]
REST = [
    *(Group(mode, FEW, variant) for variant in list(VARIANTS)[1:] for mode in ("captured", "eager")),
    Group("captured", OTHERS),
    Group("compiled, reduce-overhead", FEW),
    Group("compiled", tuple(name for name in OTHERS if name != "composed BSSN")),
]
# Normalization alone: whom bench/contestants.py has, and whether it is captured.
ALONE = [
    (name, captured)
    for name in (BASELINE, "fastsn BSSN whole model", "torch SN compiled")
    for captured in (False, True)
]

Figures = dict[str, Any]
WRONG = "AssertionError"  # the error of what runs, and computes something else


def compared(
    makers: Mapping[str, Callable[[], Step]], seconds: float
) -> tuple[dict[str, Figures], dict[str, list[float]]]:
    """The figures of all that can be made, or the error, and the seconds of every round."""
    steps: dict[str, Step] = {}
    found: dict[str, Figures] = {}
    for name, make in makers.items():
        try:
            steps[name] = make()
        except Exception as error:
            found[name] = _failed(error)
    try:
        times = measure.interleaved(steps, seconds if steps else 0.0)
        for name, step in steps.items():
            found[name] = {"wall_ms": 1e3 * statistics.median(times[name]), "rounds": len(times[name])}
            if DEVICE.type == "cuda":
                found[name]["host_ms"] = 1e3 * measure.host_seconds(step)
                device, found[name]["kernels"] = measure.on_the_device(step)
                found[name]["device_ms"] = 1e3 * device
    except Exception as error:  # of one of them; whose it is, its text has to say
        return {**found, **{name: _failed(error) for name in steps}}, {}
    return {name: found[name] for name in makers}, times


def _failed(error: Exception) -> Figures:
    return {"error": measure.in_a_line(error)}


def steps_of(
    group: Group, setting: Setting, seconds: float, make: Callable[[str, str, Setting], Step] = prepared
) -> list[Figures]:
    """A row for each contestant."""
    setting = setting._replace(**VARIANTS[group.variant])
    makers = {name: partial(make, name, group.mode, setting) for name in group.contestants}
    found, times = compared(makers, seconds)
    added = {
        name: 1e3 * statistics.median(a - b for a, b in zip(times[name], times[PLAIN], strict=True))
        for name in times
        if PLAIN in times
    }
    for name, cost in added.items():
        found[name] |= {"normalization_ms": cost, "percent_of_plain": 100 * cost / found[PLAIN]["wall_ms"]}
        if TORCH in added and cost > 0:
            found[name]["times_less_than_torch_SN"] = added[TORCH] / cost
    what = {"mode": group.mode, "precision": setting.precision, "layout": str(setting.layout).split(".")[-1]}
    what |= {"batch": setting.batch, "width": setting.width}
    return [{"contestant": name, **what, **figures} for name, figures in found.items()]


def alone(workload: Workload, seconds: float) -> list[Figures]:
    """Forward and backward of all weights of a workload: a row for each contestant, eager and captured."""
    makers = {
        f"{name}, captured" if captured else name: partial(_alone, workload, name, captured)
        for name, captured in ALONE
        if (DEVICE.type == "cuda" or not captured) and (workload.compiled or "compiled" not in name)
    }
    found, _ = compared(makers, seconds)
    for figures in found.values():
        for name in (BASELINE, "torch SN compiled"):
            if "wall_ms" in figures and "wall_ms" in found.get(name, {}):
                figures[f"times_less_than_{name.replace(' ', '_')}"] = found[name]["wall_ms"] / figures["wall_ms"]
    return [{"contestant": name, "workload": workload.name, **figures} for name, figures in found.items()]


def _alone(workload: Workload, name: str, captured: bool) -> Loss:
    layers, forward = comparison.ready(workload, name)  # raises AssertionError if the contestant is wrong
    originals = [layer.parametrizations.weight.original for layer in layers]
    gradients = [torch.randn(w.shape).to(DEVICE) for w in originals]

    def step() -> Tensor:
        """The gradient of a weight, by which a capture is checked."""
        for weight in originals:
            weight.grad = None
        torch.autograd.backward(forward(), gradients)
        return originals[len(originals) // 2].grad

    if not captured:
        return step
    replay = capture(step)
    check_same(replay, step, [], list(layers.buffers()))
    return replay


def groups(setting: Setting, seconds: float) -> list[tuple[str, str, Callable[[], list[Figures]]]]:
    """The name of each, where its rows go, and what measures it, in the order of what is worth knowing first."""
    workloads = [CIFAR10, SMALL_CONVS]
    if setting.width != Setting().width:
        workloads = [Workload(f"CIFAR10 CNN, width {setting.width}", cifar10_cnn(setting.width), "a rehearsal")]

    def of(chosen: list[Group]) -> list[tuple[str, str, Callable[[], list[Figures]]]]:
        return [
            (f"{group.mode} {group.variant}".rstrip(), "steps", partial(steps_of, group, setting, seconds))
            for group in chosen
            if DEVICE.type == "cuda" or group.mode not in ON_A_GPU
        ]

    weights = [(f"alone, {each.name}", "normalization_alone", partial(alone, each, seconds)) for each in workloads]
    return [*of(FIRST[:2]), *weights, *of([*FIRST[2:], *REST])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=3.0, help="of the turns of each group")
    parser.add_argument("--batch", type=int, default=Setting().batch)
    parser.add_argument("--width", type=int, default=Setting().width)
    parser.add_argument("--go-on", action="store_true", help="after the groups that are in OUT.json")
    arguments = parser.parse_args()
    if DEVICE.type == "cpu":
        print(f"without a GPU no {' and no '.join(ON_A_GPU)} steps", flush=True)
    results: dict[str, list[Any]] = {"steps": [], "normalization_alone": [], "groups": []}
    if arguments.go_on:
        results = json.loads(arguments.out.read_text())["results"]
    planned = groups(Setting(arguments.batch, arguments.width), arguments.seconds)
    for name, kind, measured in planned[len(results["groups"]) :]:
        begin = time.monotonic()
        rows = [{k: _short(v) for k, v in row.items()} for row in measured()]
        results[kind] += rows
        results["groups"].append(name)
        write(arguments.out, results)
        print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
        for row in rows:
            said = [f"{k} {v}" for k, v in row.items() if isinstance(v, float) or k == "error"]
            print(f"  {row['contestant']}: {', '.join(said)}", flush=True)
        if any(not row.get("error", WRONG).startswith(WRONG) for row in rows):
            go_on = [] if arguments.go_on else ["--go-on"]
            os.execv(sys.executable, [sys.executable, __file__, *sys.argv[1:], *go_on])
        torch.compiler.reset()
        gc.collect()


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; what has been measured is in the file")
