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
    """What ``save`` wrote, on the CPU; None, with a warning that names the file, if it is damaged."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state
    except OSError:
        raise
    except Exception as error:  # torch, zipfile and pickle each have their own errors for a damaged file
        _log.warning("%s is damaged and ignored (%s)", path, [*str(error).splitlines(), type(error).__name__][0])
        return None


def of_step(folder: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return folder / f"step-{step:08d}.pt"


def newest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, or None. Damaged ones are named in the log and passed over."""
    for path in sorted(_checkpoints(folder), reverse=True):
        state = try_load(path)
        if state is not None:
            _log.info("continuing from %s", path)
            return state
    return None


def prune(folder: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest."""
    for path in sorted(_checkpoints(folder))[:-keep]:
        path.unlink()


def _checkpoints(folder: Path) -> list[Path]:
    return [p for p in folder.glob("step-*.pt") if _NAME.fullmatch(p.name)] if folder.is_dir() else []
