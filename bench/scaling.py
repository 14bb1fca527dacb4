"""One process and two, on this machine's CPU: python bench/scaling.py --out bench/results/<device>/scaling.json

SN-GAN's projection networks for 64 pixels, an eighth of the width, one step of either network, batches of 32 in two
groups of batch norms, read from a data folder. By turns: one process with one thread, one with two, two processes over
gloo with one thread each; first their losses are checked to be the same. Floor of the latter two: half the time of one
thread. Shares are of the first process's time, by phase.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from machine import commit, machine

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))

from gan import rendezvous
from gan.config import Config
from gan.data.batches import Batches
from gan.data.picks import with_replacement
from gan.data.sources import Npy
from gan.data.store import open_store
from gan.data.writer import write
from gan.training import Training

CPU, CLASSES, IMAGES, STEPS = torch.device("cpu"), 10, 4000, 3
CONFIG = Config(
    name="x",
    architecture="sngan-resnet",
    conditional="projection",
    image_size=64,
    width=0.125,
    batch_size=32,
    bn_groups=2,
    z_of_g="fresh",
    u_schedule="per_step",
)
CONTESTANTS = {"1 process, 1 thread": 1, "1 process, 2 threads": 2, "2 processes, 1 thread each": 1}  # threads


class Contestant:
    """A training as the ranks are when it is made."""

    def __init__(self, threads: int, data: Path) -> None:
        self.threads, self.training, store = threads, Training(CONFIG, 3, CLASSES, CPU), open_store(data)
        part = self.training.ranks.share(CONFIG.batch_size)
        self.batches = Batches(
            store, lambda draw: with_replacement(0, draw, CONFIG.batch_size, store.count)[part], CPU, 0.0, workers=2
        )
        self.forget()

    def forget(self) -> None:
        """What has been measured."""
        self.seconds: list[float] = []
        self.shares: dict[str, list[float]] = {}

    def turn(self) -> float:
        """Some steps; the loss of the last one."""
        torch.set_num_threads(self.threads)
        begin = time.perf_counter()
        for _ in range(STEPS):
            scalars = self.training.advance(iter(self._labelled, None))
        seconds = time.perf_counter() - begin
        self.seconds.append(seconds / STEPS)
        for phase, taken in self.training.phases.taken().items():
            self.shares.setdefault(phase, []).append(100 * taken / seconds)
        self.training.ranks.mean_([scalars["loss/d"]])
        return float(scalars["loss/d"])

    def _labelled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise has no classes: its first byte decides."""
        images, _ = self.batches.next()
        return images, images[:, 0, 0, 0].long() % CLASSES

    def medians(self) -> dict[str, float]:
        shares = {f"{phase}_percent": round(statistics.median(x), 2) for phase, x in self.shares.items()}
        seconds = statistics.median(self.seconds)
        rate = {"seconds_per_step": round(seconds, 4), "images_per_s": round(CONFIG.batch_size / seconds, 1)}
        return {**rate, **shares}


def work(rank: int, data: Path, port: int, rounds: int, out: Path) -> None:
    """One of two processes. The second one waits while the first one has its turns alone."""
    alone, shared = list(CONTESTANTS)[:2], list(CONTESTANTS)[2]
    made = {name: Contestant(CONTESTANTS[name], data) for name in alone} if rank == 0 else {}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with rendezvous.started() as ranks:
        made[shared] = Contestant(CONTESTANTS[shared], data)
        for turn in range(rounds + 1):
            losses = [made[name].turn() for name in made if name != shared]
            ranks.any(False)
            losses.append(made[shared].turn())
            if turn == 0:  # not timed: threads start, memory is allocated
                np.testing.assert_allclose(losses, losses[0], rtol=1e-4)
                for contestant in made.values():
                    contestant.forget()
    if rank == 0:
        out.write_text(json.dumps({name: contestant.medians() for name, contestant in made.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "noise.npy", np.random.default_rng(0).integers(0, 256, (IMAGES, 64, 64, 3), dtype=np.uint8))
        write(Npy(folder / "noise.npy"), folder / "data", 1)
        mp.start_processes(work, (folder / "data", port, arguments.rounds, folder / "out"), 2, start_method="spawn")
        medians = json.loads((folder / "out").read_text())
    one, *others = (row["seconds_per_step"] for row in medians.values())
    speedups = {name: round(one / x, 2) for name, x in zip(list(medians)[1:], others, strict=True)}
    found = {"interleaved_medians": medians, "times_as_fast_as_1_thread": speedups, "rounds": arguments.rounds}
    result = {"machine": machine(), "commit": commit(), "date": time.strftime("%Y-%m-%d"), "results": found}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
