"""Runs of a sweep whose process is a few lines: they last as long as a test wants, and end as it wants."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gan import checkpoint
from gan.sweep.plan import Run
from gan.sweep.slots import Slot

# Arguments: the run's folder, its last checkpoint, a journal, seconds, how it ends. What Process adds is ignored.
PROCESS = """
import errno, json, os, signal, sys, time
folder, last, journal, seconds, how = sys.argv[1:6]
asked = []
signal.signal(signal.SIGTERM, signal.SIG_IGN if how == "deaf" else lambda *_: asked.append(1))
def note(what):
    line = json.dumps([what, os.path.basename(folder), os.environ["SLOT"], time.monotonic(), os.getpid()])
    file = os.open(journal, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
    os.write(file, (line + "\\n").encode())
def end(status, *words):
    note("ends")
    print(*words, file=sys.stderr)
    sys.exit(status)
os.makedirs(os.path.dirname(last), exist_ok=True)
open(os.path.join(folder, "config.json"), "w").write('{"config": {}}')
note("starts")
until = time.monotonic() + float(seconds)
while time.monotonic() < until:
    if asked: end(75)
    time.sleep(0.002)
if how == "crash": end(1, "error: lr_g must be finite, got nan")
if how == "full": end(1, f"error: cannot write here: {os.strerror(errno.ENOSPC)}")
if how == "killed": os.kill(os.getpid(), signal.SIGKILL)
if how == "asked once" and not os.path.exists(last + ".once"):
    open(last + ".once", "w")
    end(75)
open(last, "w")
end(0)
"""


class Stub(Run):
    """``seconds`` and ``how`` are fields of its own."""

    def arguments(self) -> list[str]:
        last = checkpoint.of_step(self.folder / "checkpoint", self.config.steps)
        given = [str(self.folder), str(last), str(self.folder.parent / "journal"), self.fields["seconds"]]
        return [sys.executable, "-S", "-E", "-c", PROCESS, *map(str, given), self.fields.get("how", "")]


def stubs(parent: Path, fields: Sequence[Mapping[str, Any]]) -> list[Run]:
    """Of the grid "grid", named run-0, run-1, ..."""
    from digits import Digits

    made = []
    for i, own in enumerate(fields):
        config = Digits(name=f"grid/run-{i}", runs=parent, steps=3)
        made.append(Stub(f"run-{i}", "digits", own, config, None))
    return made


def slots(count: int) -> list[Slot]:
    return [Slot(f"cpu:{i}", "cpu", {"SLOT": str(i)}) for i in range(count)]


def journal(parent: Path) -> list[list[Any]]:
    """[what, run, slot, time, process], in the order of time."""
    path = parent / "grid" / "journal"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def started(parent: Path) -> list[str]:
    """Names of runs, as often as they were started."""
    return [line[1] for line in journal(parent) if line[0] == "starts"]
