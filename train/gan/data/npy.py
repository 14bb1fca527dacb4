"""The rows of a .npy file, read where they lie: no memory map, so that a dead disk is an OSError and not a signal."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np


@contextlib.contextmanager
def naming(path: Path, note: str = "") -> Iterator[None]:
    """Calls on a file descriptor do not say which file failed: this does, with a note on what was wanted."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, f"{error.strerror}{note}", str(path)) from error


def write_at(path: Path, content: bytes, at: int) -> None:
    """Into a file that is there."""
    view = memoryview(content)
    with path.open("r+b", buffering=0) as file, naming(path):
        while len(view):
            written = os.pwrite(file.fileno(), view, at)
            view, at = view[written:], at + written


def read_at(fd: int, view: memoryview, at: int) -> None:
    """All that fits into ``view``."""
    while len(view) > 0:
        got = os.preadv(fd, [view], at)
        if got == 0:
            raise OSError(errno.EIO, f"the file has become shorter: it ends before byte {at}")
        view, at = view[got:], at + got


def sync_folder(folder: Path) -> None:
    """The names of the files in it."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(fd)
    finally:
        os.close(fd)


def header(shape: tuple[int, ...]) -> bytes:
    """What stands before the bytes of a uint8 array of this shape."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


class ImagesFile:
    """A .npy of uint8 (N, S, S, C). Any number of threads may read at once."""

    def __init__(self, path: Path, argument: str) -> None:
        """``argument`` is what messages call the file."""
        self.path = path
        self.fd = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.fd)
        self.shape, self.offset = _read_header(path, argument)
        self.row = int(np.prod(self.shape[1:]))
        expected, found = self.offset + self.shape[0] * self.row, os.fstat(self.fd).st_size
        if found != expected:
            raise ValueError(f"{argument}: expected {path} of {expected} bytes, as its header says, got {found}")

    def read_into(self, index: np.ndarray, out: np.ndarray) -> None:
        """Images ``index`` into ``out``, uint8 (len(index), S, S, C), contiguous. Neighbours come by one call."""
        if len(index) == 0:
            return
        view = memoryview(out.reshape(-1))
        starts = np.flatnonzero(np.diff(index, prepend=index[:1] - 2) != 1)
        with naming(self.path):
            for first, last in zip(starts, [*starts[1:], len(index)], strict=True):
                part = view[first * self.row : last * self.row]
                read_at(self.fd, part, self.offset + int(index[first]) * self.row)


def _read_header(path: Path, argument: str) -> tuple[tuple[int, ...], int]:
    """Shape, and where the data begins."""
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_columns, dtype = read(file)
        except ValueError as error:
            raise ValueError(f"{argument}: expected {path} to be a .npy file, got something else: {error}") from error
        square = len(shape) == 4 and shape[1] == shape[2] and shape[3] in (1, 3) and min(shape) > 0
        if dtype != np.uint8 or not square or by_columns:
            order = ", by columns" if by_columns else ""
            raise ValueError(
                f"{argument}: expected {path} to be uint8 of shape (N, S, S, 3) or (N, S, S, 1), got {dtype} of shape "
                f"{shape}{order}"
            )
        return shape, file.tell()
