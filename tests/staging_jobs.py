"""What the ranks of test_staging do. Every job runs on each rank at once, ``rank`` first; folders are one for each."""

from __future__ import annotations

import os
import shutil
import time
from collections import namedtuple
from pathlib import Path
from unittest import mock

from gan import recipe
from gan.data.staging import staged
from gan.distributed import CommonError

Places = namedtuple("Places", ["data", "stage"])


def opened(rank: int, data: list[Path], stage: list[Path]) -> str:
    """The key of what a recipe reads, or what it is refused for."""
    try:
        return recipe.open_data(Places(data[rank], stage[rank])).key
    except CommonError as error:
        return str(error)


def opened_with_a_full_disk(rank: int, data: list[Path], stage: list[Path], full: int) -> str:
    free = namedtuple("Usage", ["free"])(100 if rank == full else 10**9)
    with mock.patch.object(shutil, "disk_usage", return_value=free):
        return opened(rank, data, stage)


def slowly_staged(_: int, data: Path, stage: Path) -> tuple[str, int]:
    """The copy, and how many bytes this process has copied; no rank waits for another but by the lock."""
    sent: list[int] = []

    def slow(*args: int, whole=os.sendfile) -> int:
        time.sleep(0.2)
        sent.append(whole(*args))
        return sent[-1]

    with mock.patch.object(os, "sendfile", slow):
        return str(staged(data, stage)), sum(sent)
