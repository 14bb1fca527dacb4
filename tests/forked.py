"""Processes that find torch imported already: the import alone takes seconds of each. A server imports it once and
forks them, where forking is safe; elsewhere they are new ones."""

from __future__ import annotations

import os
import resource
import runpy
import sys
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp


def context() -> Any:
    """Of multiprocessing."""
    if sys.platform != "linux":
        return mp.get_context("spawn")
    found = mp.get_context("forkserver")
    # Every optimizer imports the first, when it is made.
    found.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp"])
    return found


def _run(arguments: list[str], errors: Path, largest_file: int | None) -> None:
    for number, path in ((1, os.devnull), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")


def script(arguments: list[str], errors: Path, largest_file: int | None = None) -> Any:
    """A started process in which a script runs with its arguments, as python runs it: ``pid``, ``exitcode`` (None
    before its end, -N after signal N), ``join``, ``kill``. What it writes to standard error goes to a file."""
    process = context().Process(target=_run, args=(arguments, errors, largest_file))
    process.start()
    return process
