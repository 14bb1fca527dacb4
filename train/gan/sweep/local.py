"""Runs one after another on the slots of this machine."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import IO

from gan.loop import REQUEUE
from gan.sweep import state
from gan.sweep.plan import Run
from gan.sweep.process import Process
from gan.sweep.slots import Slot

POLL = 0.1  # seconds between looks at the processes
_log = logging.getLogger("gan")


class Pool:
    """Starts ``runs`` in their order, one a slot. One that ends as if asked to (the status REQUEUE) has its turn again
    after the others; one that crashes is left; a full disk ends the sweep, as it would end every run.

    SIGINT, SIGTERM and SIGUSR1 are passed on to the runs as "write a checkpoint and end"; a second signal kills them.
    """

    def __init__(self, runs: Sequence[Run], slots: Sequence[Slot]) -> None:
        self.waiting, self.slots = deque(runs), slots
        self.total, self.crashed = len(self.waiting), list[Run]()
        self.active: dict[str, Process] = {}  # by the slot's name
        self.signals = 0
        self.stopping = ""

    def run(self) -> None:
        """Until all have ended. Raises SystemExit: asked to stop; ValueError: runs crashed, or the disk is full."""
        with self._signals():
            try:
                while self.active or (self.waiting and not self.stopping):
                    self._look()
                    self._fill()
                    if self.active or self.waiting:
                        time.sleep(POLL)
            except BaseException:
                self._abandon()
                raise
        if self.signals:
            _log.info("stopped: the same command continues")
            raise SystemExit(REQUEUE)
        if self.stopping:
            raise ValueError(self.stopping)
        if self.crashed:
            names = ", ".join(r.name for r in self.crashed)
            raise ValueError(f"{len(self.crashed)} of {self.total} runs crashed (retry starts them again): {names}")

    def _fill(self) -> None:
        """Start runs on the slots that are free."""
        for slot in self.slots:
            if slot.name in self.active or self.stopping or not self.waiting:
                continue
            taken = slot.try_take()
            if taken is None:
                continue
            with taken:
                self._start_next(slot, taken)

    def _start_next(self, slot: Slot, taken: IO[str]) -> None:
        while self.waiting:
            run = self.waiting.popleft()
            own = state.lock(run.config)
            if own is None or state.is_done(run.config):
                _log.info("%s: %s", run.name, "another sweep runs it" if own is None else "done meanwhile")
                if own is not None:
                    own.close()
                continue
            with own:
                process = Process(run, slot.name, slot.device, slot.variables, [taken, own])
            self.active[slot.name] = process
            if self.stopping:  # by a signal that came meanwhile
                process.ask_to_stop()
            left = len(self.waiting)
            _log.info("%s: on %s, %d of %d wait", run.name, slot.name, left, self.total)
            return

    def _look(self) -> None:
        """What has ended meanwhile."""
        for slot, process in list(self.active.items()):
            status = process.ended()
            if status is None:
                continue
            del self.active[slot]
            run = process.run
            if status == 0:
                _log.info("%s: done in %.0f s", run.name, process.seconds)
            elif process.was_killed or state.was_asked_to_stop(status):
                _log.info("%s: stopped at step %d of %d", run.name, state.step_of(run.config), run.config.steps)
                if not self.stopping:
                    self.waiting.append(run)
            else:
                why = state.reason(run.config)
                _log.info("%s: crashed: %s", run.name, why)
                self.crashed.append(run)
                if os.strerror(errno.ENOSPC) in why:
                    self.stopping = self.stopping or f"runs must have room on the disk, got {run.name}: {why}"

    def _abandon(self) -> None:
        """The sweep itself has failed: its runs end with a checkpoint, of which there may be no record."""
        for process in self.active.values():
            process.ask_to_stop()
        for process in self.active.values():
            with contextlib.suppress(OSError):
                process.wait()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def handle(number: int, _: FrameType | None) -> None:
            self.signals += 1
            self.stopping = self.stopping or signal.Signals(number).name
            for process in self.active.values():
                process.ask_to_stop() if self.signals == 1 else process.kill()

        held = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in held.items():
                signal.signal(number, handler)
