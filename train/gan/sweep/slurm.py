"""Runs as jobs of Slurm, one array for all of them, through submitit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gan.sweep import state
from gan.sweep.plan import TRAIN, Run
from gan.sweep.process import Process
from gan.sweep.state import Record

_DEFAULTS: dict[str, Any] = {"timeout_min": 1440, "gpus_per_node": 1, "cpus_per_task": 8}
_REQUEUES = 10_000  # a run goes on from its checkpoint as often as its time is up


class Job:
    """What runs on a node. When its time is nearly up, or when it is preempted, submitit calls ``checkpoint`` and puts
    what that gives back into the queue."""

    def __init__(self, run: Run, device: str) -> None:
        self.run, self.device = run, device
        self._process: Process | None = None

    def __call__(self) -> int:
        """The status of the run. Raises RuntimeError: it has crashed, or another process has the run."""
        from submitit import JobEnvironment

        held = state.lock(self.run.config)
        if held is None:
            raise RuntimeError(f"{self.run.name} is running already")
        with held:
            self._process = Process(self.run, _where(JobEnvironment().job_id), self.device, {}, [held])
        status = self._process.wait()
        if status and not state.was_asked_to_stop(status):
            raise RuntimeError(f"{self.run.name} crashed: {state.reason(self.run.config)}")
        return status

    def checkpoint(self) -> Any:
        """The run writes a checkpoint and ends; the same job once more. Called by a signal's handler."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.ask_to_stop()
            self._process.wait()
        return DelayedSubmission(Job(self.run, self.device))


def options(given: Sequence[str]) -> dict[str, Any]:
    """From KEY=VALUE, of the parameters of submitit's AutoExecutor; whole numbers become ones."""
    found = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise ValueError(f"slurm-options must be KEY=VALUE, got {text!r}")
        found[key] = int(value) if value.isdecimal() else value
    return found


def submit(
    runs: Sequence[Run], folder: Path, given: Mapping[str, Any], device: str = "auto", cluster: str = "slurm"
) -> list[Any]:
    """Submit all of them as one array; returns submitit's jobs. ``folder``: for submitit's own files. ``given``: of
    ``options``. The record of each run then has the number of its job.

    Raises ValueError: submitit is not installed, there is no Slurm here, or an option is unknown.
    """
    try:
        import submitit
    except ImportError as error:
        raise ValueError("slurm needs submitit: pip install 'fastsn[slurm]'") from error
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster, slurm_max_num_timeout=_REQUEUES)
        python_path = f"export PYTHONPATH={TRAIN}:$PYTHONPATH"
        executor.update_parameters(name=folder.parent.parent.name, slurm_setup=[python_path], **{**_DEFAULTS, **given})
        with executor.batch():
            jobs = [executor.submit(Job(run, device)) for run in runs]
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        raise ValueError(f"slurm: {' '.join(str(error).split())}") from error
    for run, job in zip(runs, jobs, strict=True):
        _note(run, _where(job.job_id))
    return jobs


def _where(job_id: str) -> str:
    return f"job {job_id}"


def _note(run: Run, where: str) -> None:
    """That the run has been submitted, unless its job has begun meanwhile."""
    held = state.lock(run.config)
    if held is None:
        return
    with held:
        last = state.record(run.config)
        if last is None or last.where != where:
            state.write_record(run.config, Record(where))


def alive(wheres: Iterable[str]) -> set[str]:
    """Those of them that are jobs of Slurm which wait or run, as sacct says; all of them where it does not say."""
    jobs = {where: where.removeprefix("job ") for where in wheres if where.startswith("job ")}
    if not jobs:
        return set()
    from submitit.slurm.slurm import SlurmInfoWatcher

    watcher = SlurmInfoWatcher()
    for job in jobs.values():
        watcher.register_job(job)
    watcher.update()
    return {where for where, job in jobs.items() if not watcher.is_done(job, mode="cache")}
