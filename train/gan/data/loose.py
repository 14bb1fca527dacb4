"""Folders of images of one size, as they are: neither cropped nor resized."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gan.data import sources
from gan.data.pixels import decode
from gan.data.store import Store, memory_store


def pictures(folder: Path) -> Store:
    """All images of a folder, by their paths in order."""
    images: list[np.ndarray] = []
    for path in _found(folder):
        with sources.naming_member(folder, str(path.relative_to(folder))):
            images.append(decode(path.read_bytes(), background=255))
        height, width, _ = images[-1].shape
        if height != width or images[-1].shape != images[0].shape:
            raise ValueError(f"path: expected square images of one size, got {path} of {height} x {width} pixels")
    return memory_store(folder.resolve().name, np.stack(images))


def class_folders(folder: Path, argument: str) -> list[str]:
    """The names of the folders in which the images lie, in order. ``argument``: what an error calls the folder."""
    inside = [path.relative_to(folder).parts for path in _found(folder)]
    beside = [parts[0] for parts in inside if len(parts) == 1]
    if beside:
        raise ValueError(f"{argument}: expected the images of {folder} in class folders, got {beside[0]} in none")
    return sorted({parts[0] for parts in inside})


def label_of(folder: Path, names: Sequence[str]) -> dict[str, int]:
    """The labels of class folders that are called as their classes, names[label], or by their labels.

    Raises:
        ValueError: folders are called otherwise, or the two ways disagree.
    """
    folders = class_folders(folder, "path")
    both = ({name: i for i, name in enumerate(names)}, {str(i): i for i in range(len(names))})
    ways = [{name: way[name] for name in folders} for way in both if way.keys() >= set(folders)]
    if not ways or any(way != ways[0] for way in ways):
        raise ValueError(
            f"path: expected class folders called {_some(names)}, as the classes of the data, or by labels from 0 to "
            f"{len(names) - 1}, got {_some(folders)}"
        )
    return ways[0]


def labelled(folder: Path, labels: Mapping[str, int], classes: int) -> Store:
    """``pictures`` with the labels of their class folders."""
    of_images = [labels[path.relative_to(folder).parts[0]] for path in _found(folder)]
    return dataclasses.replace(pictures(folder), labels=np.array(of_images, np.int64), classes=classes)


def _found(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in sources.SUFFIXES)
    if not found:
        raise ValueError(f"path: expected images ({' '.join(sources.SUFFIXES)}) in {folder}, got none")
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names if len(names) < 6 else [*names[:3], "...", names[-1]])
