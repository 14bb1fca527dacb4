"""Checkpoints that are whole or absent: written aside, made durable, then renamed."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch

_log = logging.getLogger("gan")
_NAME = re.compile(r"step-(\d+)\.pt")


def atomic_write(path: Path, data: bytes | memoryview) -> None:
    """Replace ``path`` by ``data`` so that every reader, after a crash too, sees the old file or the new one.

    Raises:
        OSError: naming the file and the reason (disk full, read-only folder, ...); the old file is as it was.
    """
    aside = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, survives a crash of the machine
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}; what was there before is intact") from error


def save(path: Path, state: dict[str, Any]) -> None:
    """torch.save, atomically. Raises OSError as ``atomic_write`` does."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic_write(path, buffer.getbuffer())


def try_load(path: Path) -> dict[str, Any] | None:
    """What ``save`` wrote, on the CPU; None, with a warning that names the file, if it is damaged.

    Raises:
        OSError: the file cannot be read at all.
    """
    data = io.BytesIO(path.read_bytes())
    try:
        state: dict[str, Any] = torch.load(data, map_location="cpu", weights_only=True)
        return state
    except Exception as error:  # torch, its zip reader and pickle each have their own errors for damaged data
        _log.warning("%s is damaged and ignored (%s)", path, [*str(error).splitlines(), type(error).__name__][0])
        return None


def of_step(folder: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return folder / f"step-{step:08d}.pt"


def newest(folder: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint, or None if there are none. Damaged ones are named in the log and passed over.

    Raises:
        ValueError: there are checkpoints, and all are damaged: nobody wants the run to start again at step 0 unasked.
    """
    paths = sorted(_checkpoints(folder), reverse=True)
    for path in paths:
        state = try_load(path)
        if state is not None:
            _log.info("continuing from %s", path)
            return state
    if paths:
        raise ValueError(f"{folder} must hold a whole checkpoint, got {len(paths)} damaged: delete them to start again")
    return None


def prune(folder: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest."""
    for path in sorted(_checkpoints(folder))[:-keep]:
        path.unlink()


def _checkpoints(folder: Path) -> list[Path]:
    return [p for p in folder.glob("step-*.pt") if _NAME.fullmatch(p.name)] if folder.is_dir() else []
