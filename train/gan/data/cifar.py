"""CIFAR's pickles, which are read without running what a pickle may ask for."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import IO, Any

import numpy as np

from gan.data.sources import naming_member

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# All that an array needs; Python 2 and later NumPys have one of them in different modules.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which CIFAR's files do not hold")
        return _ALLOWED[module, name]


def batch(archive: Path, member: str, file: IO[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """data uint8 (n, 3072) and labels int64 (n,) of one member."""
    with naming_member(archive, member):
        held = _Unpickler(file, encoding="bytes").load()
        if not isinstance(held, dict):
            raise ValueError(f"expected a dict, got a {type(held).__name__}")
        data, labels = held.get(b"data"), held.get(b"labels")
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,):
            raise ValueError("expected data as uint8 of shape (n, 3072)")
        known = isinstance(labels, list) and all(type(label) is int and 0 <= label < 10 for label in labels)
        if not known or len(labels) != len(data):
            raise ValueError(f"expected labels as {len(data)} whole numbers from 0 to 9")
        return data, np.array(labels, np.int64)
