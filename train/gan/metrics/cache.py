"""Arrays that cost a while to compute, kept in npz files."""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gan import checkpoint

_log = logging.getLogger("gan")


def read(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a file; None where there is none, or a damaged one."""
    if not path.exists():
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes())) as file:  # np.load leaves a damaged file open
            return dict(file)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        _log.warning("%s is damaged and computed again (%s)", path, error)
        return None


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """A file that cannot be written is a warning, since everything is there without it."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    try:
        checkpoint.atomic_write(path, buffer.getbuffer())
    except OSError as error:
        _log.warning("%s; it will be computed again", error)


def remember(path: Path, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What ``compute`` gives, from the file if it has been computed before."""
    arrays = read(path)
    if arrays is None:
        arrays = compute()
        write(path, arrays)
    return arrays
