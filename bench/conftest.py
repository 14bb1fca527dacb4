"""What every result file says of the machine, and no more: no host name, no path."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

import fastsn


def pytest_benchmark_update_machine_info(config: object, machine_info: dict[str, Any]) -> None:  # noqa: ARG001
    cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), ":")
    backend = fastsn.backends()["cpp"]
    machine_info.clear()
    machine_info |= {
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
        machine_info |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "driver": torch._C._cuda_getDriverVersion(),
            "triton": fastsn.backends()["triton"].detail,
        }
