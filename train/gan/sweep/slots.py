"""Slots of this machine, each for one run at a time: a GPU, or an equal part of the CPU's cores."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gan.sweep.state import try_lock


@dataclass(frozen=True)
class Slot:
    """``device`` and ``variables``, of the environment, are for the run."""

    name: str
    device: str
    variables: dict[str, str]

    def try_take(self) -> IO[str] | None:
        """Its lock, which all sweeps of this user on this machine share, and which the run is to inherit: a slot is
        free when its run has ended, not when the sweep has. None where another run has it."""
        folder = Path(tempfile.gettempdir()) / f"fastsn-slots-{os.getuid()}"
        return try_lock(folder / f"{self.name.replace(':', '-')}.lock")


def parse(given: Sequence[str]) -> list[Slot]:
    """From "cpu:2", for two slots of half of the cores each, or from numbers of GPUs.

    Raises ValueError: another form, more slots than cores, a GPU that is not there or is named twice.
    """
    if not given:
        raise ValueError("slots must be cpu:N or numbers of GPUs, got none")
    found = [slot for text in given for slot in (_of_cpu(text) if text.startswith("cpu") else [_of_gpu(text)])]
    names = [slot.name for slot in found]
    twice = sorted({x for x in names if names.count(x) > 1})
    if twice:
        raise ValueError(f"slots must each be named once, got {', '.join(twice)} more than once")
    return found


def _of_cpu(text: str) -> list[Slot]:
    cores = len(os.sched_getaffinity(0))
    match = re.fullmatch(r"cpu:(\d+)", text)
    count = int(match[1]) if match else 0
    if not 1 <= count <= cores:
        raise ValueError(f"slots must be cpu:N with N from 1 to the {cores} cores, or numbers of GPUs, got {text!r}")
    # Threads that wait for another must not spin on a core that a run beside this one needs.
    variables = {"OMP_NUM_THREADS": str(cores // count), "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
    return [Slot(f"cpu:{i}", "cpu", variables) for i in range(count)]


def _of_gpu(text: str) -> Slot:
    import torch

    count = torch.cuda.device_count()
    if not text.isdecimal() or int(text) >= count:
        raise ValueError(f"slots must be cpu:N or numbers of this machine's {count} GPUs, from 0, got {text!r}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    own = visible[int(text)].strip() if visible != [""] else text
    return Slot(f"cuda:{own}", "cuda", {"CUDA_VISIBLE_DEVICES": own})


def default() -> list[str]:
    """Every GPU, or where there is none the whole CPU for one run."""
    import torch

    return [str(i) for i in range(torch.cuda.device_count())] or ["cpu:1"]
