"""What every result file says of the machine and of the code, and no more: no host name, no path."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import fastsn


def write(out: Path, results: Any) -> None:
    """The results so far, whole at any moment, with machine, commit and date."""
    found = {"machine": machine(), "commit": commit(), "date": time.strftime("%Y-%m-%d"), "results": results}
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(out)


def machine() -> dict[str, Any]:
    cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), ":")
    backend = fastsn.backends()["cpp"]
    found = {
        "cpu": cpu.split(":")[1].strip(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastsn": backend.detail if backend.available else "no C++ kernels",  # the reason may hold a path
    }
    if torch.cuda.is_available():
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "driver": _driver(),
            "triton": fastsn.backends()["triton"].detail,
        }
    return found


@lru_cache
def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


def commit() -> str:
    """As FASTSN_COMMIT says, for machines without git: ``git describe --always --dirty``; empty where it is not set."""
    return os.environ.get("FASTSN_COMMIT", "")
