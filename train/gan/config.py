"""What a run is: every number that its result depends on, written to config.json and compared on --resume."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Config:
    """A run with the CNN of the BSN paper; recipes set the defaults that suit their data.

    One step is n_dis discriminator steps and one generator step.
    """

    name: str
    """Folder of the run below --runs."""
    variant: Literal["sn", "ssn", "bsn", "bssn"] = "sn"
    """How the discriminator's weights are normalised."""
    scale: float = 1.0
    """The constant c of ssn and bssn."""
    u_schedule: Literal["per_forward", "per_d_step"] = "per_forward"
    """When u and v are stored: at every forward of the discriminator (torch, Chainer), or once after each of its
    steps, from the updated weights (the BSN authors)."""
    seed: int = 0
    """Fixes initial weights, batches, z and evaluation."""
    steps: int = 100_000
    """Generator steps."""
    batch_size: int = 64
    """Images, and fakes, per discriminator step."""
    n_dis: int = 1
    """Discriminator steps per generator step."""
    lr_g: float = 1e-4
    lr_d: float = 1e-4
    beta1: float = 0.5
    beta2: float = 0.999
    latent: int = 128
    """Length of z."""
    width: float = 1.0
    """Factor on every channel count of both networks."""
    image_size: int = 32
    """Pixels a side; a multiple of 8."""
    eval_every: int = 10_000
    """Steps between rows of metrics.csv; there is one after the last step too."""
    eval_fakes: int = 10_000
    """Generated images per evaluation."""
    sample_every: int = 200
    """Steps between sample grids."""
    log_every: int = 100
    """Steps between TensorBoard points."""
    checkpoint_every: int = 10_000
    """Steps between checkpoints; there is one after the last step too."""
    keep_checkpoints: int = 5
    """How many of the newest checkpoints stay."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a CUDA device if there is one."""
    runs: Path = Path("runs")
    """Parent of all run folders."""

    def __post_init__(self) -> None:
        _require(self.batch_size >= 2, "batch_size", "at least 2 (batch norm)", self.batch_size)
        for field in ("steps", "n_dis", "latent", "eval_every", "sample_every", "log_every"):
            _require(getattr(self, field) >= 1, field, "at least 1", getattr(self, field))
        for field in ("checkpoint_every", "keep_checkpoints"):
            _require(getattr(self, field) >= 1, field, "at least 1", getattr(self, field))
        for field in ("lr_g", "lr_d", "width", "scale"):
            value = getattr(self, field)
            _require(0 < value < float("inf"), field, "finite and positive", value)
        for field in ("beta1", "beta2"):
            _require(0 <= getattr(self, field) < 1, field, "in [0, 1)", getattr(self, field))
        _require(self.image_size >= 8 and self.image_size % 8 == 0, "image_size", "a multiple of 8", self.image_size)
        _require(self.eval_fakes >= 100, "eval_fakes", "at least 100 (ten splits of ten)", self.eval_fakes)
        parts = Path(self.name).parts
        below = bool(parts) and ".." not in parts and not Path(self.name).is_absolute()
        _require(below, "name", "a folder name below runs", self.name)
        _require(0 <= self.seed < 2**63, "seed", "in [0, 2^63)", self.seed)

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return self.runs / self.name

    def as_json(self) -> dict[str, Any]:
        """What decides the result, as plain values: everything but where it is written."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("runs", "name")}
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain


def _require(holds: bool, field: str, expected: str, came: object) -> None:
    if not holds:
        raise ValueError(f"{field} must be {expected}, got {came!r}")
