"""What a run writes down as it goes on: pictures, scalars, scores, weights, checkpoints. The first rank's alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gan import checkpoint, pictures, run, weights
from gan.config import Config
from gan.data.images import to_uint8
from gan.data.picks import with_replacement
from gan.data.store import Store
from gan.devices import peak_memory
from gan.metrics.evaluator import Scores
from gan.outputs import Outputs
from gan.training import Training

_log = logging.getLogger("gan")
_GRID = 10  # pictures a side
_OF_A_STEP = ("data", "discriminator", "generator", "reduction", "step")  # phases


class Recorder:
    """Of a training whose files are ``outputs``."""

    def __init__(self, config: Config, store: Store, training: Training, outputs: Outputs, bar: tqdm[Any]) -> None:
        self.config, self.store, self.training, self.outputs, self.bar = config, store, training, outputs, bar
        self.about = run.identity(config, store)
        self._last = training.step  # that scalars were written of

    def reals(self) -> None:
        """reals.png."""
        index = with_replacement(self.config.seed, 0, min(self.store.count, _GRID * _GRID), self.store.count)
        images = torch.from_numpy(self.store.read(index)).permute(0, 3, 1, 2)
        self.outputs.picture("reals.png", pictures.grid(images, _GRID))

    def sample(self) -> None:
        """A grid of the same z every time."""
        images = to_uint8(self.training.images("sample", 0, _GRID * _GRID))
        self.outputs.sample(self.training.step, pictures.grid(images, _GRID))

    def scalars(self, scalars: Mapping[str, Tensor], seconds: Mapping[str, float]) -> None:
        """Losses and probes, sigmas, the time of each phase since the last call, throughput, memory."""
        step, total = self.training.step, sum(seconds.values())
        shares = {f"time/{name}_percent": 100 * taken / total for name, taken in seconds.items()}
        images = (step - self._last) * self.config.n_dis * self.config.batch_size
        rate = images / max(sum(seconds.get(name, 0.0) for name in _OF_A_STEP), 1e-9)
        self._last = step
        measured = {
            "images_per_s_per_process": rate / self.training.ranks.size,
            "memory/peak_gb": peak_memory(self.training.device),
        }
        self.outputs.scalars(step, {**scalars, **self.training.norm.sigmas(), **shares, **measured})
        shown = {name: f"{float(scalars[f'loss/{name}']):.3f}" for name in ("d", "g")}
        data = shares.get("time/data_percent", 0.0)
        self.bar.set_postfix(**shown, images_per_s=f"{rate:.0f}", data=f"{data:.0f}%")

    def scores(self, scores: Scores) -> None:
        """A row of metrics.csv, and the weights that it is of."""
        training, folder = self.training, self.config.folder / "weights"
        best = self.outputs.metrics(training.step, scores._asdict(), "raw" if training.average is None else "average")
        weights.save(folder / "last.safetensors", training, self.about)
        if best:
            weights.save(folder / "best.safetensors", training, self.about)
        what = scores.missing or f"FID {scores.fid:.3f}, score {scores.inception_score_mean:.3f}"
        _log.info("step %d: %s (%s)", training.step, what, scores.protocol)

    def checkpoint(self) -> None:
        """All that --resume needs."""
        folder = self.config.folder / "checkpoint"
        self.outputs.flush()
        weights.save(self.config.folder / "weights" / "last.safetensors", self.training, self.about)
        state = {**self.training.state(), "seconds": self.outputs.seconds}
        checkpoint.save(checkpoint.of_step(folder, self.training.step), state)
        checkpoint.prune(folder, self.config.keep_checkpoints)
