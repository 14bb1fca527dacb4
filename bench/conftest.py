"""What pytest-benchmark writes of the machine and of the code is ours."""

from __future__ import annotations

from typing import Any

import machine


def pytest_benchmark_update_machine_info(config: object, machine_info: dict[str, Any]) -> None:  # noqa: ARG001
    machine_info.clear()
    machine_info |= machine.machine()


def pytest_benchmark_update_commit_info(config: object, commit_info: dict[str, Any]) -> None:  # noqa: ARG001
    if machine.commit():
        commit_info |= {"id": machine.commit().removesuffix("-dirty"), "dirty": machine.commit().endswith("-dirty")}
