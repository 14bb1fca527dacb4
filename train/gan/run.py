"""The folder of a run: who may write there, and every file in it but the checkpoints."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

import fastsn
from gan.checkpoint import atomic_write
from gan.config import Config

COLUMNS = ("step", "fid", "inception_score_mean", "inception_score_std", "seconds", "protocol")
_log = logging.getLogger("gan")


def claim(config: Config, resume: bool, device: torch.device) -> None:
    """Make the folder of a run, or check that this run may continue there. Nothing in it is overwritten.

    Raises:
        ValueError: the folder holds something that is not a run, a run without ``resume``, or another config.
        OSError: the folder cannot be made or written.
    """
    folder, file = config.folder, config.folder / "config.json"
    if file.is_file():
        held = _held_config(file)
        changed = {k: (held.get(k), v) for k, v in config.as_json().items() if held.get(k) != v}
        changed |= {k: (v, None) for k, v in held.items() if k not in config.as_json()}
        if changed:
            differences = ", ".join(f"{k}: {old!r} there, {new!r} here" for k, (old, new) in changed.items())
            raise ValueError(f"name must be free or hold this config, got {folder} with another ({differences})")
        if not resume:
            raise ValueError(f"name must be free, got {folder}, which holds this run: pass --resume to continue it")
        return
    if folder.exists() and (not folder.is_dir() or any(p.suffix != ".partial" for p in folder.iterdir())):
        raise ValueError(f"name must be free or hold a run, got {folder}, which holds something else")
    text = json.dumps({"config": config.as_json(), "environment": _environment(device)}, indent=2) + "\n"
    atomic_write(file, text.encode())


def _held_config(file: Path) -> dict[str, object]:
    try:
        held = json.loads(file.read_text())["config"]
        return dict(held)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"name must be free or hold a run, got {file.parent}, whose config.json is no run's"
        ) from error


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor() or "cpu")


def _environment(device: torch.device) -> dict[str, str | int | None]:
    """What a figure of this run has to name: device, versions, commit."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # not a git checkout
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastsn": fastsn.__version__,
        "commit": commit,
    }


class Outputs:
    """worker.log, metrics.csv, time.txt, sample/ and the TensorBoard events of a run, continued after ``step``."""

    def __init__(self, folder: Path, step: int, seconds: float) -> None:
        self.folder = folder
        self._started, self._before = time.perf_counter(), seconds
        self._drop_rows_after(step)
        (folder / "sample").mkdir(exist_ok=True)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    @property
    def seconds(self) -> float:
        """Wall time of the run so far, interruptions not counted."""
        return self._before + time.perf_counter() - self._started

    def _drop_rows_after(self, step: int) -> None:
        """Rows written after the checkpoint that the run continues from will be written again; a torn one goes too."""
        path = self.folder / "metrics.csv"
        old = path.read_text().splitlines() if path.exists() else []
        rows = [r for r in csv.DictReader(old) if None not in r.values() and int(r["step"]) <= step]
        out = io.StringIO()
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        atomic_write(path, out.getvalue().encode())

    def metrics(self, step: int, fid: float, mean: float, std: float, protocol: str) -> None:
        """One row of metrics.csv."""
        numbers = ",".join(f"{x:.12f}" for x in (fid, mean, std))
        self._append("metrics.csv", f"{step},{numbers},{self.seconds:.3f},{protocol}\n")

    def time(self, step: int, what: str) -> None:
        """One line of time.txt, as in the BSN repo."""
        self._append("time.txt", f"iter {step} {what}: {time.strftime('%Y-%m-%d %H:%M:%S')}\n")

    def sample(self, step: int, picture: Image.Image) -> None:
        """One picture in sample/."""
        data = io.BytesIO()
        picture.save(data, "png")
        atomic_write(self.folder / "sample" / f"step-{step:08d}.png", data.getbuffer())

    def scalars(self, step: int, values: Mapping[str, float | torch.Tensor]) -> None:
        """TensorBoard points."""
        with _naming(self.folder / "tensorboard"):
            for tag, value in values.items():
                self._board.add_scalar(tag, float(value), step)

    def flush(self) -> None:
        """Make the TensorBoard points durable; the other files are after every call."""
        with _naming(self.folder / "tensorboard"):
            self._board.flush()

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(OSError) if kind else _naming(self.folder / "tensorboard"):
            self._board.close()

    def _append(self, name: str, line: str) -> None:
        with _naming(self.folder / name), open(self.folder / name, "a") as file:
            file.write(line)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002
        """A line that cannot be written stops the run, as any other lost output does."""
        error = sys.exc_info()[1]
        reason = error.strerror if isinstance(error, OSError) else error
        raise OSError(f"cannot write {self.baseFilename}: {reason}") from error


@contextlib.contextmanager
def log_to(folder: Path) -> Iterator[None]:
    """Send the log, warnings included, to worker.log as well as to stderr, and an error's traceback to worker.log."""
    handler = _LogFile(folder / "worker.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    crash = logging.getLogger("gan.crash")
    crash.propagate = False
    loggers = (_log, crash, logging.getLogger("py.warnings"))
    logging.captureWarnings(True)
    for logger in loggers:
        logger.addHandler(handler)
    _log.setLevel(logging.INFO)
    try:
        _log.info("command: %s", " ".join(sys.argv))
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # a full disk has already been said
            crash.exception("stopped")
        raise
    finally:
        logging.captureWarnings(False)
        for logger in loggers:
            logger.removeHandler(handler)
        with contextlib.suppress(OSError):  # what could not be written has been said by handleError
            handler.close()
