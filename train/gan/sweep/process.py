"""The process of one run, and the record of how it went."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import IO

from gan.sweep import state
from gan.sweep.plan import Run
from gan.sweep.state import Record


class Process:
    """Of a run, which inherits ``locks``: open files whose locks it is to hold as long as it lives. It is in a session
    of its own, so that Ctrl-C in a terminal reaches the sweep alone, which passes it on."""

    def __init__(
        self, run: Run, where: str, device: str, variables: Mapping[str, str], locks: Sequence[IO[str]]
    ) -> None:
        self.run, self.was_killed = run, False
        self._started = time.time()
        self._record = Record(where, self._started)
        state.write_record(run.config, self._record)
        with open(state.log_file(run.config), "ab") as log:
            self._process = subprocess.Popen(
                [*run.arguments(), "--device", device],
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock.fileno() for lock in locks],
            )

    def ended(self) -> int | None:
        """Its status, once it has one, which is then recorded; below 0: the signal that killed it."""
        status = self._process.poll()
        if status is not None:
            self._close(status)
        return status

    def wait(self) -> int:
        """Until it has ended; its status. Safe in the handler of a signal that came during another ``wait``, unlike
        subprocess's, which would wait for its own lock."""
        found = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        assert found is not None  # only WNOHANG gives None
        status = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        self._process.poll()
        self._close(status)
        return status

    def ask_to_stop(self) -> None:
        """It writes a checkpoint and ends with the status REQUEUE."""
        self._process.terminate()

    def kill(self) -> None:
        """At once; it counts as stopped, not as crashed."""
        self.was_killed = True
        self._process.kill()

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.time() - self._started

    def _close(self, status: int) -> None:
        state.write_record(
            self.run.config, replace(self._record, ended=time.time(), status=None if self.was_killed else status)
        )
