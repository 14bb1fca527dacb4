"""When things happen in a run, and nothing else."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from gan import checkpoint, pictures, probes, run, weights
from gan.config import Config
from gan.data.batches import Batches
from gan.data.images import to_uint8
from gan.data.picks import with_replacement
from gan.data.store import Store
from gan.metrics.evaluator import BATCH, Evaluator
from gan.outputs import Outputs
from gan.training import Training

REQUEUE = 75  # exit status (EX_TEMPFAIL) of a run that was asked to stop and has written a checkpoint
_log = logging.getLogger("gan")
_GRID = 10


def pick_device(name: str) -> torch.device:
    """The device of a config. Raises ValueError for "cuda" without one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be 'auto' or 'cpu' on a machine without CUDA, got 'cuda'")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def train(config: Config, store: Store, resume: bool) -> None:
    """Train to the last step, with ``resume`` from the newest whole checkpoint, or from the start where there is none.

    SIGTERM and SIGUSR1 end it after the step that is running, with a checkpoint and the exit status ``REQUEUE``.
    """
    device = pick_device(config.device)
    check_data(config, store)
    training = Training(config, store.channels, store.classes, device)
    evaluator = None
    if config.eval_every:  # before the folder is claimed: what cannot be scored as it is asked for leaves none
        evaluator = Evaluator(store, config.protocol, device, config.inception_weights, config.runs, BATCH)
    run.claim(config, store, resume, device)
    with run.log_to(config.folder):
        state = checkpoint.newest(config.folder / "checkpoint") if resume else None
        if state is not None:
            training.load(state)
        if training.step >= config.steps:
            _log.info("%s is complete at step %d", config.folder, training.step)
            return
        with Outputs(config.folder, training.step, state["seconds"] if state else 0.0) as outputs:
            _Loop(config, store, training, evaluator, outputs, device).run()


def check_data(config: Config, store: Store) -> None:
    """Raises ValueError for data that this run cannot take."""
    store.require(image_size=config.image_size, channels=store.channels)
    if config.batch_size > store.count:
        raise ValueError(
            f"batch_size must be at most the {store.count} images of {store.name}, got {config.batch_size}"
        )


class _Loop:
    """One run, from the step that it is at."""

    def __init__(
        self,
        config: Config,
        store: Store,
        training: Training,
        evaluator: Evaluator | None,
        outputs: Outputs,
        device: torch.device,
    ) -> None:
        self.config, self.store, self.training = config, store, training
        self.evaluator, self.outputs, self.device = evaluator, outputs, device
        self.phases, self.asked_to_stop = probes.Phases(), ""
        self.about = run.identity(config, store)

    def run(self) -> None:
        config, training = self.config, self.training
        draws = training.step * config.n_dis
        batches = Batches(self.store, self._picks, self.device, config.resident_gb, workers=config.workers, start=draws)
        bar = tqdm(total=config.steps, initial=training.step, unit="it", desc=config.name, mininterval=0.5)
        with logging_redirect_tqdm(), bar, contextlib.closing(batches), self._signals():
            if training.step == 0:
                self._reals()
            while training.step < config.steps:
                self._one_step(self._timed(batches), bar)
                if self.asked_to_stop:
                    self._checkpoint()
                    _log.info("stopped by %s at step %d; --resume continues", self.asked_to_stop, training.step)
                    raise SystemExit(REQUEUE)

    def _picks(self, draw: int) -> Any:
        return with_replacement(self.config.seed, draw, self.config.batch_size, self.store.count)

    def _timed(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor | None]]:
        while True:
            with self.phases("data"):
                batch = batches.next()
            yield batch

    def _one_step(self, batches: Iterator[tuple[Tensor, Tensor | None]], bar: tqdm[Any]) -> None:
        config, step = self.config, self.training.step + 1
        timed = step in (1, config.steps) or step % 1000 == 0
        if timed:
            self.outputs.time(step, "starts")
        with self.phases("step"):
            scalars = self.training.advance(batches)
        bar.update()
        if self._due(config.log_every):
            with self.phases("log"):
                self._log_scalars(scalars, bar)
        if self._due(config.sample_every):
            with self.phases("sample"):
                images = to_uint8(self.training.images("sample", 0, _GRID * _GRID))
                self.outputs.sample(step, pictures.grid(images, _GRID))
        if self.evaluator is not None and self._due(config.eval_every):
            with self.phases("evaluation"):
                self._evaluate(self.evaluator)
        if self._due(config.checkpoint_every):
            with self.phases("checkpoint"):
                self._checkpoint()
        if timed:
            self.outputs.time(step, "ends")

    def _due(self, every: int) -> bool:
        return self.training.step % every == 0 or self.training.step == self.config.steps

    def _log_scalars(self, scalars: dict[str, Tensor], bar: tqdm[Any]) -> None:
        probed = {**probes.slopes(self.training), **self.training.norm.sigmas(), **self.phases.taken()}
        self.outputs.scalars(self.training.step, {**scalars, **probed})
        rate = bar.format_dict["rate"] or 0.0
        images = rate * self.config.n_dis * self.config.batch_size
        shown = {name: f"{float(scalars[f'loss/{name}']):.3f}" for name in ("d", "g")}
        bar.set_postfix(**shown, images_per_s=f"{images:.0f}", data=f"{probed.get('time/data_percent', 0):.0f}%")

    def _reals(self) -> None:
        index = with_replacement(self.config.seed, 0, min(self.store.count, _GRID * _GRID), self.store.count)
        images = torch.from_numpy(self.store.read(index)).permute(0, 3, 1, 2)
        self.outputs.picture("reals.png", pictures.grid(images, _GRID))

    def _evaluate(self, evaluator: Evaluator) -> None:
        training, folder = self.training, self.config.folder / "weights"
        scores = evaluator(lambda first, count: training.images("evaluation", first, count))
        best = self.outputs.metrics(training.step, scores._asdict(), "raw" if training.average is None else "average")
        weights.save(folder / "last.safetensors", training, self.about)
        if best:
            weights.save(folder / "best.safetensors", training, self.about)
        what = scores.missing or f"FID {scores.fid:.3f}, score {scores.inception_score_mean:.3f}"
        _log.info("step %d: %s (%s)", training.step, what, scores.protocol)

    def _checkpoint(self) -> None:
        folder = self.config.folder / "checkpoint"
        self.outputs.flush()
        weights.save(self.config.folder / "weights" / "last.safetensors", self.training, self.about)
        state = {**self.training.state(), "seconds": self.outputs.seconds}
        checkpoint.save(checkpoint.of_step(folder, self.training.step), state)
        checkpoint.prune(folder, self.config.keep_checkpoints)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGUSR1, where this thread may ask for them, are remembered."""

        def remember(number: int, _: FrameType | None) -> None:
            self.asked_to_stop = signal.Signals(number).name

        held = {}
        with contextlib.suppress(ValueError):  # not the main thread
            held = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in held.items():
                signal.signal(number, handler)
