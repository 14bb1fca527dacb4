"""Where a run of a grid stands: its own files, and the record and the lock of whoever started it.

Below <runs>/<grid>/.sweep/ there are, for each run, NAME.json (the last start and how it ended), NAME.lock (locked as
long as the run's process lives, whatever has become of the sweep) and NAME.log (what it wrote to the terminal).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import signal
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import IO

from gan import checkpoint
from gan.config import Config
from gan.loop import REQUEUE

# How a run ends that was asked to: as it should, or before it was ready to hear.
_ASKED = (REQUEUE, *(-x for x in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)))


class State(Enum):
    """Of a run, in words."""

    NEW = "new"
    SUBMITTED = "submitted"
    RUNNING = "running"
    STOPPED = "stopped"
    """It has begun and not ended, or ended when it was asked to: it continues when it is started again."""
    CRASHED = "crashed"
    DONE = "done"


@dataclass(frozen=True)
class Record:
    """The last start of a run. ``where``: a slot, or a job of Slurm; times are seconds since 1970, None where it has
    not started, or nobody saw it end; status: as the process ended."""

    where: str
    started: float | None = None
    ended: float | None = None
    status: int | None = None


def _beside(config: Config, suffix: str) -> Path:
    return config.folder.with_name(".sweep") / f"{config.folder.name}{suffix}"


def log_file(config: Config) -> Path:
    """What the run writes to the terminal, of all its starts."""
    return _beside(config, ".log")


def record(config: Config) -> Record | None:
    """Of the last start, if there was one."""
    try:
        return Record(**json.loads(_beside(config, ".json").read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        path = _beside(config, ".json")
        raise ValueError(f"{path} must be a record of a run, got something else: delete it ({error})") from error


def write_record(config: Config, new: Record) -> None:
    """Replace it."""
    checkpoint.atomic_write(_beside(config, ".json"), json.dumps(asdict(new)).encode())


def try_lock(path: Path) -> IO[str] | None:
    """An open file whose lock belongs to this process and to those that inherit the file, until the last of them closes
    it or ends; None where others have it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a")  # noqa: SIM115 - whoever calls closes it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def lock(config: Config) -> IO[str] | None:
    """Of the run, as ``try_lock``."""
    return try_lock(_beside(config, ".lock"))


def is_done(config: Config) -> bool:
    """Whether the last step and all that belongs to it are on the disk."""
    if checkpoint.of_step(config.folder / "checkpoint", config.steps).is_file():
        return True
    with contextlib.suppress(FileNotFoundError):  # checkpoints take much room, and may have been deleted
        return f"iter {config.steps} ends:" in (config.folder / "time.txt").read_text()
    return False


def step_of(config: Config) -> int:
    """Of the last line of scalars, 0 where there is none."""
    path = config.folder / "scalars.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    steps = [json.loads(line)["step"] for line in lines[-2:] if line.endswith("}")]
    return int(steps[-1]) if steps else 0


def state(config: Config) -> State:
    """As the files say: for a job of Slurm that waits, ``STOPPED`` or ``NEW``."""
    if is_done(config):
        return State.DONE
    last = record(config)
    held = lock(config) if last else None
    if last and held is None:
        return State.RUNNING
    if held:
        held.close()
    if last and last.status not in (None, 0) and not was_asked_to_stop(last.status):
        return State.CRASHED
    begun = (last and last.started) or (config.folder / "config.json").is_file()
    return State.STOPPED if begun else State.NEW


def was_asked_to_stop(status: int) -> bool:
    """Whether a process that ended so goes on where it stopped when it is started again."""
    return status in _ASKED


def reason(config: Config) -> str:
    """Why a run has crashed, in one line: its own last word, or the signal that ended it."""
    last = record(config)
    status = last.status if last else None
    if status is not None and status < 0:
        return f"killed by {signal.Signals(-status).name}"
    path = log_file(config)
    lines = path.read_text(errors="replace").replace("\r", "\n").splitlines() if path.is_file() else []
    words = [line.strip() for line in lines if re.match(r"(error:|\w*(Error|Exception)\b)", line)]
    return words[-1] if words else f"status {status}, see {path}"
