"""A data folder copied to a disk of this machine, once for all processes that read it there."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from gan.data.npy import naming, sync_folder
from gan.data.store import read_meta

log = logging.getLogger(__name__)
BLOCK = 1 << 26  # bytes that are copied between two movements of the bar


def staged(data: Path, stage: Path | None) -> Path:
    """``data``, or with ``stage``, a folder, the copy of it there: <name>-<key>, made by the first process that asks.

    Others wait, those of other jobs on the same machine too. A copy that is there already is used again.

    Raises:
        ValueError: ``data`` is no data folder, or there is not enough room.
    """
    if stage is None:
        return data
    copy = stage / f"{data.resolve().name}-{read_meta(data)['key']}"
    stage.mkdir(parents=True, exist_ok=True)
    with _alone(copy.with_name(f"{copy.name}.lock")):
        if not _same(data, copy):
            _copy(data, copy)
    return copy


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; the end of a process, of whatever kind, lets the next one in."""
    with path.open("w") as file:
        with naming(path):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _files(data: Path) -> list[Path]:
    """Those that prepare.py writes."""
    return [data / name for name in ("images.npy", "labels.npy", "meta.json") if (data / name).exists()]


def _same(data: Path, copy: Path) -> bool:
    """Whether the copy is whole: as meta.json is what it is, and holds a checksum, sizes are enough."""
    meta = copy / "meta.json"
    if not meta.exists() or meta.read_bytes() != (data / "meta.json").read_bytes():
        return False
    return [(x.name, x.stat().st_size) for x in _files(data)] == [(x.name, x.stat().st_size) for x in _files(copy)]


def _copy(data: Path, copy: Path) -> None:
    partial = copy.with_name(f"{copy.name}.partial")
    for left in (partial, copy):
        if left.exists():
            shutil.rmtree(left)
    size, free = sum(path.stat().st_size for path in _files(data)), shutil.disk_usage(copy.parent).free
    if free < size:
        raise ValueError(
            f"stage: expected {size / 1e9:.2f} GB free in {copy.parent} for a copy of {data}, got {free / 1e9:.2f} GB"
        )
    log.info("copying %s to %s", data, copy)
    partial.mkdir()
    try:
        with tqdm(total=size, unit="B", unit_scale=True, desc="stage", disable=None) as bar:
            for path in _files(data):
                for count in _copied(path, partial / path.name):
                    bar.update(count)
        sync_folder(partial)
        partial.rename(copy)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(copy.parent)


def _copied(source: Path, target: Path) -> Iterator[int]:
    """Copy a file inside the kernel; the bytes of each step."""
    with source.open("rb") as read, target.open("xb") as write:
        try:
            while count := os.sendfile(write.fileno(), read.fileno(), None, BLOCK):
                yield count
            os.fsync(write.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(source), None, str(target)) from error
