"""Writes a data folder from a source: several processes, progress, and after an interruption only what is missing.

Everything happens in OUT.partial, which becomes OUT by one rename when all of it is on the disk. A file of digests says
which chunks of the images are there: a digest is written after its chunk is on the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL
from tqdm import tqdm

from gan.data import store
from gan.data.chunks import Chunks
from gan.data.npy import header, naming, sync_folder, write_at
from gan.data.processes import results
from gan.data.sources import Source

log = logging.getLogger(__name__)


def write(source: Source, out: Path, workers: int) -> dict[str, Any]:
    """The content of meta.json. A set that is there already is left as it is."""
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    meta = _meta(source)
    if found := _there(out, meta):
        return found
    partial = out.with_name(f"{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with _alone(partial) as plan:
        _keep_only_what_continues(partial, plan, {"meta": meta, "version": source.version, "chunk": store.CHUNK})
        shape = (source.count, source.image_size, source.image_size, source.channels)
        digests = _fill(source, partial, header(shape), workers)
        meta["key"] = store.content_key(shape, digests, source.labels)
        if source.labels is not None:
            _save(partial / "labels.npy", lambda file: np.save(file, source.labels))
        _save(partial / "meta.json", lambda file: file.write(json.dumps(meta, indent=1).encode() + b"\n"))
        sync_folder(partial)
        partial.rename(out)
        sync_folder(out.parent)
    _remove_progress(out)
    return meta


def _meta(source: Source) -> dict[str, Any]:
    """All of meta.json but the key, which is known at the end."""
    versions = {"python": platform.python_version(), "numpy": np.__version__, "pillow": PIL.__version__}
    sizes = {"count": source.count, "image_size": source.image_size, "channels": source.channels}
    named = {"format": store.FORMAT, "name": source.name, **source.origin}
    return {**named, **sizes, "classes": list(source.classes), "versions": versions}


def _there(out: Path, meta: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier call has finished, if it is this set; another one is not written over."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / "meta.json").exists():
        raise ValueError(f"out: expected a new folder, got {out} with other files in it")
    found = store.read_meta(out)
    changed = [name for name in meta if name != "versions" and found.get(name) != meta[name]]
    if changed:
        name = changed[0]
        raise ValueError(
            f"out: expected a new folder or one with this set, got {out}, whose {name} is {found.get(name)}, not "
            f"{meta[name]}"
        )
    _remove_progress(out)
    log.info("%s is there already", out)
    return found


@contextlib.contextmanager
def _alone(partial: Path) -> Iterator[IO[str]]:
    """The file with the plan, locked as long as this process works on it."""
    with (partial / "plan.json").open("a+") as plan:
        try:
            fcntl.flock(plan, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"out: another process is writing {partial}") from error
        yield plan


def _keep_only_what_continues(partial: Path, plan: IO[str], wanted: dict[str, Any]) -> None:
    """A partial folder of anything else is begun anew."""
    text = json.dumps(wanted)
    plan.seek(0)
    if plan.read() == text and (partial / "images.npy").exists():
        return
    for old in partial.iterdir():
        if old.name != "plan.json":
            old.unlink()
    plan.truncate(0)
    with naming(partial / "plan.json"):
        plan.write(text)
        plan.flush()
        os.fsync(plan.fileno())


def _fill(source: Source, partial: Path, head: bytes, workers: int) -> list[bytes]:
    """Every chunk that is not there yet; the digests of all."""
    path, size = partial / "images.npy", len(head) + source.count * source.image_size**2 * source.channels
    with path.open("ab") as images, (partial / "digests").open("a+b") as known:
        with naming(path, f" (the images take {size / 1e9:.2f} GB)"):
            os.posix_fallocate(images.fileno(), 0, size)
        chunks = Chunks(source, path, len(head), store.CHUNK)
        write_at(path, head, 0)
        with naming(partial / "digests"):
            os.ftruncate(known.fileno(), chunks.count * store.DIGEST)
            stored = os.pread(known.fileno(), chunks.count * store.DIGEST, 0)
        digests = [stored[i : i + store.DIGEST] for i in range(0, len(stored), store.DIGEST)]
        missing = [i for i, digest in enumerate(digests) if not any(digest)]
        total, left = source.count, sum(len(chunks.images(i)) for i in missing)
        if left < total:
            log.info("continuing %s: %d of %d images are there", partial, total - left, total)
        with tqdm(total=total, initial=total - left, unit="image", disable=None) as bar:
            for i, digest in results(chunks.make, missing, workers if source.parallel else 1):
                with naming(path):
                    os.fdatasync(images.fileno())
                digests[i] = digest
                write_at(partial / "digests", digest, i * store.DIGEST)
                bar.update(len(chunks.images(i)))
    return digests


def _save(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    with path.open("wb") as file, naming(path):
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _remove_progress(out: Path) -> None:
    for left in ("plan.json", "digests"):
        (out / left).unlink(missing_ok=True)
