"""Processes that stay: each is a rank of a gloo group on this machine and runs the functions that a test gives it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import forked

PATIENCE = 60  # seconds for a job; a collective that not all ranks enter gives up before


def _serve(rank: int, size: int, store: str, jobs: Any, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=20)
    )
    for function, args in iter(jobs.get, None):
        try:
            torch.manual_seed(0)
            results.put((rank, True, function(rank, *args)))
        except Exception:
            results.put((rank, False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """``ranks(function, *args)`` is [function(0, *args), function(1, *args), ...], each from its own process.

    Functions lie in a module (rank_jobs) and return numbers, texts and containers of them: a tensor would have to
    outlive its process.
    """

    def __init__(self, size: int, folder: Path) -> None:
        context = forked.context()
        self._jobs, self._results = [context.SimpleQueue() for _ in range(size)], context.Queue()
        self._processes = [
            context.Process(target=_serve, args=(r, size, str(folder / "store"), self._jobs[r], self._results))
            for r in range(size)
        ]
        for process in self._processes:
            process.start()

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        for jobs in self._jobs:
            jobs.put((function, args))
        found = sorted((self._results.get(timeout=PATIENCE) for _ in self._processes), key=lambda result: result[0])
        errors = [f"rank {rank}: {value}" for rank, succeeded, value in found if not succeeded]
        assert not errors, "\n".join(errors)
        return [value for _, _, value in found]

    def close(self) -> None:
        """Ends the processes, those that hang too."""
        for jobs in self._jobs:
            jobs.put(None)
        for process in self._processes:
            process.join(5)
            process.kill()
            process.join()


@contextmanager
def started(size: int, folder: Path) -> Iterator[Ranks]:
    """Ranks for the length of a block."""
    ranks = Ranks(size, folder)
    try:
        yield ranks
    finally:
        ranks.close()
