"""What every recipe's command line shares: arguments from types, errors as one line, the log file."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator

import torch

from gan import run
from gan.config import Config


def start(main: Callable[..., None]) -> None:
    """Call ``main`` with the command line. A mistake of the user or a fault of a disk ends in one line and status 1."""
    import tyro  # only a command line needs it, so that recipes can be imported where it is not installed

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        tyro.cli(main, config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


@contextlib.contextmanager
def worker(config: Config, resume: bool, device: torch.device) -> Iterator[None]:
    """Claim the run's folder and log to its worker.log; an error ends up there too."""
    run.claim(config, resume, device)
    with run.log_to(config.folder):
        yield
