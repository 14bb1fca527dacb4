"""When things happen in a run, and nothing else."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from types import FrameType

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from gan import checkpoint, probes, run
from gan.captured import graph_for
from gan.config import Config
from gan.data import picks
from gan.data.batches import Batches
from gan.data.store import Store
from gan.devices import pick_device
from gan.distributed import LostPeer, ranks
from gan.metrics.evaluator import BATCH, Evaluator
from gan.outputs import Outputs
from gan.recorder import Recorder
from gan.training import Training

REQUEUE = 75  # exit status (EX_TEMPFAIL) of a run that was asked to stop and has written a checkpoint
_log = logging.getLogger("gan")
_PICKS = {"with_replacement": picks.with_replacement, "by_epochs": picks.by_epochs}


def train(config: Config, store: Store, resume: bool) -> None:
    """Train to the last step, with ``resume`` from the newest whole checkpoint, or from the start where there is none.

    All ranks of a run call it; the first one writes. SIGTERM and SIGUSR1 end it after the step that is running, with a
    checkpoint and the exit status ``REQUEUE``.
    """
    here = ranks()
    with here.together():
        device = pick_device(config.device)
        check_data(config, store)
        check_ranks(config, here.size)
        graph = graph_for(config, device, here.size)
        training = Training(config, store.channels, store.classes, device, graph)
    evaluator = None
    if config.eval_every:  # before the folder is claimed: what cannot be scored as it is asked for leaves none
        evaluator = Evaluator(store, config.protocol, device, config.inception_weights, config.runs, BATCH)
    here.of_first(lambda: run.claim(config, store, resume, device))
    with run.log_to(config.folder, here.rank):
        state = here.of_first(lambda: checkpoint.newest(config.folder / "checkpoint")) if resume else None
        if state is not None:
            with here.together():
                training.load(state)
        if training.step >= config.steps:
            _log.info("%s is complete at step %d", config.folder, training.step)
            return
        seconds = state["seconds"] if state else 0.0
        with Outputs(config.folder, training.step, seconds) if here.first else contextlib.nullcontext() as outputs:
            _Loop(config, store, training, evaluator, outputs, device).run()


def check_data(config: Config, store: Store) -> None:
    """Raises ValueError for data that this run cannot take."""
    store.require(image_size=config.image_size, channels=store.channels, labels=config.conditional != "none")
    if config.batch_size > store.count:
        raise ValueError(
            f"batch_size must be at most the {store.count} images of {store.name}, got {config.batch_size}"
        )


def check_ranks(config: Config, size: int) -> None:
    """Raises ValueError for batches, or groups of batch norms, that so many processes cannot divide among them."""
    for field in ("batch_size", "batch_size_g"):
        if getattr(config, field) % size:
            raise ValueError(f"{field} must be a multiple of the {size} processes, got {getattr(config, field)}")
    if config.bn_groups % size and size % config.bn_groups:
        raise ValueError(f"bn_groups must be a multiple or a divisor of the {size} processes, got {config.bn_groups}")


class _Loop:
    """One run, from the step that it is at. ``outputs``: the first rank's."""

    def __init__(
        self,
        config: Config,
        store: Store,
        training: Training,
        evaluator: Evaluator | None,
        outputs: Outputs | None,
        device: torch.device,
    ) -> None:
        self.config, self.store, self.training = config, store, training
        self.evaluator, self.outputs, self.device = evaluator, outputs, device
        self.ranks, self.phases, self.asked_to_stop = training.ranks, training.phases, ""
        self.bar = tqdm(
            total=config.steps,
            initial=training.step,
            unit="it",
            desc=config.name,
            mininterval=0.5,
            disable=outputs is None,
        )
        self.recorder = None if outputs is None else Recorder(config, store, training, outputs, self.bar)

    def run(self) -> None:
        config, training = self.config, self.training
        draws = training.step * config.n_dis
        batches = Batches(self.store, self._picks, self.device, config.resident_gb, workers=config.workers, start=draws)
        with logging_redirect_tqdm(), self.bar, contextlib.closing(batches), self._signals():
            if self.recorder and training.step == 0:
                self.recorder.reals()
            while training.step < config.steps:
                self._one_step(batches)
                if self.ranks.any(bool(self.asked_to_stop)):
                    self._checkpoint()
                    why = self.asked_to_stop or "a signal to another process"
                    _log.info("stopped by %s at step %d; --resume continues", why, training.step)
                    raise SystemExit(REQUEUE)

    def _picks(self, draw: int) -> np.ndarray:
        """This rank's part of a batch."""
        config = self.config
        picked = _PICKS[config.picks](config.seed, draw, config.batch_size, self.store.count)
        return picked[self.ranks.share(config.batch_size)]

    def _one_step(self, batches: Batches) -> None:
        config, step = self.config, self.training.step + 1
        with self._noting_time(step), self.phases("step"):
            scalars = self.training.advance(iter(batches.next, None))
            self.bar.update()
            if self._due(config.log_every):
                with self.phases("log"):
                    self._log_scalars(scalars)
            if self._due(config.lockstep_every):
                with self.phases("lockstep"):
                    self.ranks.check_lockstep(self.training.tensors())
            if self.recorder and self._due(config.sample_every):
                with self.phases("sample"):
                    self.recorder.sample()
            if self.evaluator and self._due(config.eval_every):
                with self.phases("evaluation"):
                    self._evaluate(self.evaluator)
            if self._due(config.checkpoint_every):
                self._checkpoint()

    def _due(self, every: int) -> bool:
        return self.training.step % every == 0 or self.training.step == self.config.steps

    @contextlib.contextmanager
    def _noting_time(self, step: int) -> Iterator[None]:
        """Of the first, the last and each 1,000th step, in time.txt."""
        noted = self.outputs if step in (1, self.config.steps) or step % 1000 == 0 else None
        if noted:
            noted.time(step, "starts")
        yield
        if noted:
            noted.time(step, "ends")

    def _log_scalars(self, scalars: dict[str, Tensor]) -> None:
        """Means over the ranks; the first rank's times."""
        self.ranks.mean_(scalars.values())
        scalars |= probes.measured(self.training, self.config)
        seconds = self.phases.taken()
        if self.recorder:
            self.recorder.scalars(scalars, seconds)

    def _evaluate(self, evaluator: Evaluator) -> None:
        scores = evaluator(lambda first, count: self.training.images("evaluation", first, count))
        if self.recorder:
            self.recorder.scores(scores)

    def _checkpoint(self) -> None:
        if self.recorder:
            with self.phases("checkpoint"):
                self.recorder.checkpoint()

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
        except LostPeer:
            held.clear()  # torchrun sends SIGTERM now, and what is to be said takes a moment
            raise
        finally:
            for number, handler in held.items():
                signal.signal(number, handler)
