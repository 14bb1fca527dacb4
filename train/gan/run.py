"""The folder of a run: who may write there, what it says of itself, its log."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import fastsn
from gan.checkpoint import atomic_write
from gan.config import Config, Numbers, Runtime
from gan.data.store import Store
from gan.distributed import CommonError, LostPeer, ranks

_log = logging.getLogger("gan")


def claim(config: Config, store: Store, resume: bool, device: torch.device) -> None:
    """Make the folder of a run, or check that this run may continue there. Nothing in it is overwritten.

    Raises:
        ValueError: the folder holds something that is not a run, a run without ``resume``, or other numbers or data.
        OSError: the folder cannot be made or written.
    """
    if check_folder(config.folder, own := identity(config, store)):
        if not resume:
            raise ValueError(
                f"name must be free, got {config.folder}, which holds this run: pass --resume to continue it"
            )
        return
    runtime = {field.name: getattr(config, field.name) for field in dataclasses.fields(Runtime)}
    runtime["data"] = getattr(config, "data", None)
    runtime["compiled"] = config.compiled
    about = {"config": own, "runtime": runtime, "environment": environment(device)}
    atomic_write(config.folder / "config.json", (json.dumps(about, indent=2, default=str) + "\n").encode())


def check_folder(folder: Path, own: dict[str, Any]) -> bool:
    """Whether the folder holds the run of this identity already.

    Raises ValueError: it holds something that is not a run, or other numbers or data.
    """
    file = folder / "config.json"
    if file.is_file():
        held = {**defaults(), **_held(file)}
        changed = {k: (held.get(k), v) for k, v in own.items() if held.get(k) != v}
        changed |= {k: (v, None) for k, v in held.items() if k not in own}
        if changed:
            differences = ", ".join(f"{k}: {old!r} there, {new!r} here" for k, (old, new) in changed.items())
            raise ValueError(f"name must be free or hold this config, got {folder} with another ({differences})")
        return True
    if folder.exists() and (not folder.is_dir() or any(p.suffix != ".partial" for p in folder.iterdir())):
        raise ValueError(f"name must be free or hold a run, got {folder}, which holds something else")
    return False


def data_of(folder: Path) -> Path | None:
    """The data folder that a run was trained on; None where it was none. Raises ValueError for what is no run."""
    try:
        data = json.loads((folder / "config.json").read_text())["runtime"]["data"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"path must be the folder of a run, got {folder}, whose config.json is no run's") from error
    return Path(data) if data else None


def about(folder: Path) -> dict[str, dict[str, Any]]:
    """config.json: its config, runtime and environment. Raises ValueError for what is no run."""
    try:
        found: dict[str, dict[str, Any]] = json.loads((folder / "config.json").read_text())
        if not all(isinstance(part, dict) for part in (found["config"], *found.values())):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"run must be the folder of a run, got {folder}, whose config.json is no run's") from error
    return found


def identity(config: Config, store: Store) -> dict[str, Any]:
    """What decides the weights of a run: its numbers and its data."""
    shape = {"channels": store.channels, "classes": store.classes}
    return {**config.identity(), **shape, "data": store.name, "data_key": store.key}


def defaults() -> dict[str, Any]:
    """What a run from before a field was there has of it."""
    return {x.name: x.default for x in dataclasses.fields(Numbers)}


def _held(file: Path) -> dict[str, object]:
    try:
        return dict(json.loads(file.read_text())["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"name must be free or hold a run, got {file.parent}, whose config.json is no run's"
        ) from error


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor() or "cpu")


def environment(device: torch.device) -> dict[str, str | int | None]:
    """What a figure of this run has to name: device, versions, commit."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "processes": ranks().size,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastsn": fastsn.__version__,
        "commit": os.environ.get("FASTSN_COMMIT") or _commit(),
    }


def _commit() -> str | None:
    """As git says; None where this is no checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002
        """A line that cannot be written stops the run, as any other lost output does."""
        error = sys.exc_info()[1]
        reason = error.strerror if isinstance(error, OSError) else error
        raise OSError(f"cannot write {self.baseFilename}: {reason}") from error


@contextlib.contextmanager
def log_to(folder: Path, rank: int = 0) -> Iterator[None]:
    """Send the log, warnings included, to worker.log as well as to stderr, and an error's traceback to worker.log.

    Of other ranks than the first, only the traceback of what nobody else has, where they reach that folder.
    """
    handler = _LogFile(folder / "worker.log", delay=True)
    who = f" rank {rank}:" if rank else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s{who} %(message)s"))
    crash = logging.getLogger("gan.crash")
    crash.propagate = False
    loggers = [crash] if rank else [_log, crash, logging.getLogger("py.warnings")]
    logging.captureWarnings(not rank)
    for logger in loggers:
        logger.addHandler(handler)
    if not rank:
        _log.setLevel(logging.INFO)
    try:
        if not rank:
            _log.info("command: %s", " ".join(sys.argv))
        yield
    except SystemExit:  # as it was asked to
        raise
    except BaseException as error:
        theirs = isinstance(error, CommonError | LostPeer)
        if not rank or (folder.is_dir() and not theirs):
            with contextlib.suppress(OSError):  # a full disk has already been said
                crash.exception("stopped")
        raise
    finally:
        logging.captureWarnings(False)
        for logger in loggers:
            logger.removeHandler(handler)
        with contextlib.suppress(OSError):  # what could not be written has been said by handleError
            handler.close()
