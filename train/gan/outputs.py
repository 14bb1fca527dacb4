"""The files of a run that grow: metrics.csv, time.txt, scalars.jsonl, TensorBoard events, pictures."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from gan.checkpoint import atomic_write

COLUMNS = (
    *("step", "fid", "inception_score_mean", "inception_score_std", "kid_mean", "kid_std"),
    *("seconds", "protocol", "network", "weights", "reals", "fakes", "missing"),
)


def read_metrics(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv. Raises FileNotFoundError or ValueError for a folder without any."""
    path = folder / "metrics.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} must be the folder of a run with a metrics.csv, found none")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{folder} must have been evaluated at least once, found no row in metrics.csv")
    return rows


class Outputs:
    """metrics.csv, time.txt, scalars.jsonl, sample/ and the TensorBoard events of a run, continued after ``step``."""

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
        rows = [row for row in self._rows() if None not in row.values() and int(row["step"]) <= step]
        out = io.StringIO()
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        atomic_write(self.folder / "metrics.csv", out.getvalue().encode())
        path = self.folder / "scalars.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
        atomic_write(path, "".join(whole).encode())

    def _rows(self) -> list[dict[str, str]]:
        path = self.folder / "metrics.csv"
        return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []

    def metrics(self, step: int, scores: Mapping[str, Any], weights: str) -> bool:
        """One row of metrics.csv; returns whether its FID is the best yet."""
        best = min((float(row["fid"]) for row in self._rows() if row["fid"]), default=float("inf"))
        row = {**scores, "step": step, "seconds": f"{self.seconds:.3f}", "weights": weights}
        cells = {k: ("" if v != v else f"{v:.12f}") if isinstance(v, float) else v for k, v in row.items()}
        out = io.StringIO()
        csv.DictWriter(out, COLUMNS, lineterminator="\n").writerow(cells)
        self._append("metrics.csv", out.getvalue())
        return bool(scores["fid"] < best)

    def time(self, step: int, what: str) -> None:
        """One line of time.txt, as in the BSN repo."""
        self._append("time.txt", f"iter {step} {what}: {time.strftime('%Y-%m-%d %H:%M:%S')}\n")

    def sample(self, step: int, picture: Image.Image) -> None:
        """One picture in sample/."""
        self.picture(f"sample/step-{step:08d}.png", picture)

    def picture(self, name: str, picture: Image.Image) -> None:
        """One picture in the run's folder."""
        data = io.BytesIO()
        picture.save(data, "png")
        atomic_write(self.folder / name, data.getbuffer())

    def scalars(self, step: int, values: Mapping[str, float | torch.Tensor]) -> None:
        """A line of scalars.jsonl, and TensorBoard points."""
        numbers = {tag: float(value) for tag, value in values.items()}
        self._append("scalars.jsonl", json.dumps({"step": step, **numbers}) + "\n")
        with _naming(self.folder / "tensorboard"):
            for tag, value in numbers.items():
                self._board.add_scalar(tag, value, step)

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
