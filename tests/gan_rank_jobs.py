"""What the ranks of test_training_over_ranks do, and one process in their place."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gan import loop, probes
from gan.config import Config
from gan.data.store import memory_store
from gan.distributed import CommonError, ranks
from gan.training import Training
from rank_jobs import digest

CPU = torch.device("cpu")
TINY = {"batch_size": 8, "bn_groups": 2, "width": 0.05, "image_size": 8, "latent": 5, "lr_g": 2e-4, "lr_d": 2e-4}


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def batches(config: Config, classes: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """This rank's part of batches that are the same whatever the number of ranks."""
    draw, part = torch.Generator().manual_seed(1), ranks().share(config.batch_size)
    shape = (config.batch_size, 3, config.image_size, config.image_size)
    while True:
        images = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
        labels = torch.randint(classes, shape[:1], generator=draw) if classes else None
        yield images[part], None if labels is None else labels[part]


def flat(state: Any, name: str = "") -> dict[str, Any]:
    """A nested state as {path: leaf}."""
    if isinstance(state, dict | list):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {path: x for key, value in items for path, x in flat(value, f"{name}/{key}").items()}
    return {name: state}


def stepped(rank: int, changes: dict[str, Any], classes: int, path: Path, steps: int) -> tuple[list[float], str]:
    """Losses of every step, means over the ranks, and the bits of the end; ``path`` becomes the first rank's state."""
    with in_float64():
        config = Config(name="x", steps=steps, **{**TINY, **changes})
        training, losses = Training(config, 3, classes, CPU), []
        given = batches(config, classes)
        for _ in range(steps):
            scalars = training.advance(given)
            ranks().mean_(scalars.values())
            losses += [float(x) for _, x in sorted(scalars.items())]
        if rank == 0:
            torch.save(flat(training.state()), path)
        return losses, digest(x for x in flat(training.state()).values() if isinstance(x, Tensor))


def measured(_: int, changes: dict[str, Any], steps: int) -> dict[str, float]:
    """All probes after some steps."""
    with in_float64():
        config = Config(name="x", steps=steps, log_gradients=True, log_variances=True, **{**TINY, **changes})
        training = Training(config, 3, 0, CPU)
        given = batches(config, 0)
        for _ in range(steps):
            training.advance(given)
        return {tag: float(value) for tag, value in probes.measured(training, config).items()}


def run_until(rank: int, changes: dict[str, Any], runs: Path, stop: int) -> int | str | None:
    """A whole run on random images, resumed where there is one; one rank is asked to stop at step ``stop``. The exit
    status, the error, or None where it came to its end."""
    images = np.random.RandomState(0).randint(0, 256, (50, 8, 8, 3)).astype(np.uint8)
    advance = Training.advance

    def advance_and_stop(self: Training, given: Iterator[tuple[Tensor, Tensor | None]]) -> dict[str, Tensor]:
        scalars = advance(self, given)
        if self.step == stop and rank == ranks().size - 1:
            signal.raise_signal(signal.SIGUSR1)
        return scalars

    Training.advance = advance_and_stop  # type: ignore[method-assign]
    try:
        with in_float64():
            loop.train(Config(name="x", runs=runs, **{**TINY, **changes}), memory_store("noise", images), resume=True)
        return None
    except SystemExit as ended:
        return ended.code
    except CommonError as error:
        return str(error)
    finally:
        Training.advance = advance  # type: ignore[method-assign]


def planted(rank: int, tensor: str) -> str:
    """The error of the lockstep check when one rank has another value in one tensor."""
    training = Training(Config(name="x", **TINY), 3, 0, CPU)
    training.ranks.check_lockstep(training.tensors())
    if rank == 1:
        dict(training.tensors())[tensor].view(-1)[0] += 1e-3
    try:
        training.ranks.check_lockstep(training.tensors())
    except CommonError as error:
        return str(error)
    return ""


def together(rank: int, failing: list[int], same: bool) -> str:
    """The error that every rank has of those that fail."""
    try:
        with ranks().together():
            if rank in failing:
                raise OSError("no disk" if same else f"no disk {rank}")
    except CommonError as error:
        return str(error)
    return ""


def of_first(rank: int, fails: bool) -> str | dict[str, int]:
    """What the first rank gives, or its error."""

    def work() -> dict[str, int]:
        if fails:
            raise ValueError("bad")
        return {"rank": rank}

    try:
        return ranks().of_first(work)
    except CommonError as error:
        return str(error)


def unlike(rank: int) -> str:
    """The error for configurations that are not the same."""
    try:
        ranks().same("the configuration", {"seed": 0, "steps": 10 + rank})
    except CommonError as error:
        return str(error)
    return ""


def group_means(rank: int, groups: int) -> list[float]:
    """Mean over the group of this rank's number, and the derivative of a sum that weighs the means by rank + 1."""
    from gan.group_mean import mean_of_group

    x = torch.tensor([float(rank)], dtype=torch.float64, requires_grad=True)
    mean = mean_of_group(x, groups)
    (mean * (rank + 1)).sum().backward()
    return [mean.item(), x.grad.item()]


def command(rank: int, arguments: list[list[str]]) -> str | int | None:
    """train/imagenet.py with this rank's arguments: what it exits with, a status or a line for stderr."""
    import imagenet
    from gan import cli
    from gan.presets import IMAGENET

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks().size)}
    try:
        cli.start(imagenet.main, IMAGENET, arguments[rank])
    except SystemExit as ended:
        return ended.code
    finally:
        del os.environ["RANK"], os.environ["WORLD_SIZE"]
    return 0
