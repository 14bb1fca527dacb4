"""Images per second from a data folder: cold and warm, beside raw reads of the same file.

python bench/store_throughput.py --out bench/results/<device>/store.json [--folder FOLDER] [--images N]

Writes a set of N images of 64 x 64 into FOLDER, or where the system has its temporary files; each figure is the median
of three. Cold: the kernel was told to forget the file's pages, but not the disk and the host, which may cache too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from machine import commit, machine

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))
from gan.data import picks
from gan.data.batches import Batches
from gan.data.sources import Npy
from gan.data.store import Store, open_store
from gan.data.writer import write

BATCH, BATCHES, ROUNDS = 64, 300, 3


def forget(path: Path) -> None:
    """Out of the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def sequential(path: Path) -> int:
    """The whole file in pieces of 4 MB; how many images that were."""
    with path.open("rb", buffering=0) as file:
        buffer, count = bytearray(1 << 22), 0
        while got := file.readinto(buffer):
            count += got
    return count // (64 * 64 * 3)


def raw_random(path: Path, threads: int) -> int:
    """One pread an image, by threads that do nothing else."""
    row, fd = 64 * 64 * 3, os.open(path, os.O_RDONLY)
    count = (os.fstat(fd).st_size - 128) // row
    index = np.random.default_rng(0).integers(count, size=BATCH * BATCHES)
    with ThreadPoolExecutor(threads) as pool:
        list(
            pool.map(lambda part: [os.pread(fd, row, 128 + int(i) * row) for i in part], np.array_split(index, threads))
        )
    os.close(fd)
    return len(index)


def mapped(path: Path) -> int:
    """The same from a memory map, batch after batch."""
    images = np.load(path, mmap_mode="r")
    index = np.random.default_rng(0).integers(len(images), size=(BATCHES, BATCH))
    for part in index:
        images[part].sum()
    return index.size


def batches(store: Store, workers: int, resident: Batches | None = None) -> int:
    """What training gets; nothing is trained."""
    device, draw = torch.device("cpu"), partial(picks.with_replacement, 0, batch_size=BATCH, count=store.count)
    found = resident or Batches(store, draw, device, 0.0, workers)
    for _ in range(BATCHES):
        found.next()
    if resident is None:
        found.close()
    return BATCH * BATCHES


def rate(work: Callable[[], int], prepared: Callable[[], None]) -> float:
    """Images per second, the median."""
    rates = []
    for _ in range(ROUNDS):
        prepared()
        start = time.perf_counter()
        rates.append(work() / (time.perf_counter() - start))
    return float(f"{statistics.median(rates):.4g}")


def measured(folder: Path, count: int) -> dict[str, dict[str, float]]:
    """{what: {cold or warm: images per second}}."""
    rng = np.random.default_rng(0)
    made = np.lib.format.open_memmap(folder / "made.npy", "w+", np.uint8, (count, 64, 64, 3))
    for i in range(0, count, 1000):
        made[i : i + 1000] = rng.integers(0, 256, made[i : i + 1000].shape, dtype=np.uint8)
    made.flush()
    write(Npy(folder / "made.npy"), folder / "data", 1)
    (folder / "made.npy").unlink()
    store, path = open_store(folder / "data"), folder / "data/images.npy"
    draw = partial(picks.with_replacement, 0, batch_size=BATCH, count=count)
    works: dict[str, Callable[[], int]] = {
        "raw, sequential": lambda: sequential(path),
        "raw, random, 1 thread": lambda: raw_random(path, 1),
        "raw, random, 8 threads": lambda: raw_random(path, 8),
        "memory map, random": lambda: mapped(path),
        "batches from the disk, 1 thread": lambda: batches(store, 1),
        "batches from the disk, 8 threads": lambda: batches(store, 8),
    }
    found = {}
    for name, work in works.items():
        cold = rate(work, lambda: forget(path))
        sequential(path)
        found[name] = {"cold": cold, "warm": rate(work, lambda: None)}
    resident = Batches(store, draw, torch.device("cpu"))
    found["batches, resident"] = {"warm": rate(lambda: batches(store, 1, resident), lambda: None)}
    return found


def main() -> None:
    """Measure, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--images", type=int, default=100_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rates = measured(Path(folder), args.images)
    sizes = {"images": args.images, "image_size": 64, "batch_size": BATCH, "batches": BATCHES, "rounds": ROUNDS}
    result = {"machine": machine(), "commit": commit(), "date": time.strftime("%Y-%m-%d"), **sizes}
    args.out.write_text(json.dumps({**result, "images_per_s": rates}, indent=1) + "\n")
    print(json.dumps(rates, indent=1))


if __name__ == "__main__":
    main()
