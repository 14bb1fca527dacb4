"""Train all runs of a table or figure: grids by name, from train/grids.

    python train/sweep.py plan   bsn-cnn --data data                  # runs, steps, hours
    python train/sweep.py run    bsn-cnn --data data --slots 0 1 2 3  # GPUs; or cpu:2: two runs on halves of the cores
    python train/sweep.py run    bsn-cnn --data data --slurm --slurm-options slurm_partition=gpu timeout_min=720
    python train/sweep.py status bsn-cnn                              # which are done, run, wait, have crashed, and why
    python train/sweep.py retry  bsn-cnn --data data --slots 0        # those that have crashed, and no others
    python train/sweep.py table  bsn-cnn --out scores.csv             # means and standard errors over seeds

Runs are in runs/<grid>/. The same line again starts what is left: a run that is done never again, one that was stopped
from its checkpoint. --only takes patterns of names, such as "cifar10,*seed-0".
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import tyro

from gan import cli
from gan.sweep import grid as grids
from gan.sweep import local, overview, slots, slurm
from gan.sweep import plan as planning
from gan.sweep import table as tables

_log = logging.getLogger("gan")


@dataclass(frozen=True)
class Chosen:
    """Runs of a grid."""

    grid: tyro.conf.Positional[str]
    data: Path = Path("data")
    """The folder of data folders that are called as the recipes, or one data folder."""
    runs: Path = Path("runs")
    """The runs are in <runs>/<grid>/."""
    only: tuple[str, ...] = ()
    """Patterns of names of runs; by default all."""

    def planned(self) -> list[planning.Run]:
        """Each of them once."""
        return planning.runs(self.grid, grids.find(self.grid), self.runs, self.data, self.only)


@dataclass(frozen=True)
class Started(Chosen):
    """Runs of a grid, and on what they are started."""

    slots: tuple[str, ...] = ()
    """Numbers of GPUs, or cpu:N for N equal parts of the cores; by default each GPU, or all of the CPU."""
    slurm: bool = False
    """As an array of jobs of Slurm."""
    slurm_options: tuple[str, ...] = ()
    """KEY=VALUE of submitit's AutoExecutor, as timeout_min=720 or slurm_partition=gpu."""

    def start(self, again: bool) -> None:
        """Those that are not done, or with ``again`` those that have crashed."""
        if self.slurm and self.slots:
            raise ValueError(f"slots must not be given with --slurm, got {' '.join(self.slots)}")
        if self.slurm_options and not self.slurm:
            raise ValueError(f"slurm-options must be given with --slurm, got {' '.join(self.slurm_options)}")
        options = slurm.options(self.slurm_options)
        places = [] if self.slurm else slots.parse(self.slots or slots.default())
        planned = self.planned()
        chosen = overview.to_start(planned, again)
        planning.check(chosen)
        _log.info("%d runs: %d to start", len(planned), len(chosen))
        if not chosen:
            print(overview.status(planned))
        elif self.slurm:
            jobs = slurm.submit(chosen, self.runs / self.grid / ".sweep" / "submitit", options)
            print("\n".join(f"{r.name}: job {job.job_id}" for r, job in zip(chosen, jobs, strict=True)))
        else:
            local.Pool(chosen, places).run()


def plan(chosen: Chosen, slots: int = 1, measure: bool = False, device: str = "auto") -> None:
    """How many runs and steps, and how many hours on so many slots, by the speed of runs that are there; --measure
    times some steps of the others."""
    grid = grids.find(chosen.grid)
    print(grid.about)
    print(overview.plan(len(grid.entries), chosen.planned(), slots, measure, device))


def run(started: Started) -> None:
    """Start what is not done and has not crashed."""
    started.start(again=False)


def retry(started: Started) -> None:
    """Start those that have crashed, from their newest checkpoints, and no others."""
    started.start(again=True)


def status(chosen: Chosen) -> None:
    """Where every run stands."""
    print(overview.status(chosen.planned()))


def table(chosen: Chosen, out: Path | None = None) -> None:
    """Mean ± standard error over seeds of the last and the best evaluation of each run. --out: every evaluation as CSV,
    and beside it what the runs have in common and where they were trained as JSON."""
    planned = chosen.planned()
    found = tables.rows(planned)
    if out is not None:
        tables.write(out, found, tables.about(chosen.grid, grids.find(chosen.grid), planned))
    print(tables.markdown(found))


def main(args: list[str] | None = None) -> None:
    """The command line. A mistake of the user ends in one line and status 1; asked to stop, with status 75."""
    commands = {command.__name__: cli.later(command) for command in (plan, run, retry, status, table)}
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    cli.parse_and_call(lambda given: tyro.extras.subcommand_cli_from_dict(commands, args=given, config=config), args)


if __name__ == "__main__":
    main()
