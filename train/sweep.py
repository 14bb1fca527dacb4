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
from collections.abc import Sequence
from pathlib import Path

import tyro

from gan import cli
from gan.sweep import grid as grids
from gan.sweep import local, overview, slots, slurm
from gan.sweep import plan as planning
from gan.sweep import table as tables

_log = logging.getLogger("gan")
Name = tyro.conf.Positional[str]
Only = tuple[str, ...]


def plan(
    grid: Name,
    data: Path = Path("data"),
    runs: Path = Path("runs"),
    only: Only = (),
    slots: int = 1,
    measure: bool = False,
    device: str = "auto",
) -> None:
    """How many runs and steps, and how many hours on so many slots, by the speed of runs that are there; --measure
    times some steps of the others."""
    found = planning.runs(grid, grids.find(grid), runs, data, only)
    print(grids.find(grid).about)
    print(overview.plan(len(grids.find(grid).entries), found, slots, measure, device))


def run(
    grid: Name,
    data: Path = Path("data"),
    runs: Path = Path("runs"),
    only: Only = (),
    slots: tuple[str, ...] = (),
    slurm: bool = False,
    slurm_options: tuple[str, ...] = (),
) -> None:
    """Start what is not done. --slots: numbers of GPUs, or cpu:N; by default each GPU, or all of the CPU. --data: the
    folder of data folders called as the recipes, or one data folder."""
    _start(planning.runs(grid, grids.find(grid), runs, data, only), slots, slurm, slurm_options, again=False)


def retry(
    grid: Name,
    data: Path = Path("data"),
    runs: Path = Path("runs"),
    only: Only = (),
    slots: tuple[str, ...] = (),
    slurm: bool = False,
    slurm_options: tuple[str, ...] = (),
) -> None:
    """Start those that have crashed, from their newest checkpoints, and no others."""
    _start(planning.runs(grid, grids.find(grid), runs, data, only), slots, slurm, slurm_options, again=True)


def status(grid: Name, data: Path = Path("data"), runs: Path = Path("runs"), only: Only = ()) -> None:
    """Where every run stands."""
    print(overview.status(planning.runs(grid, grids.find(grid), runs, data, only)))


def table(
    grid: Name, data: Path = Path("data"), runs: Path = Path("runs"), only: Only = (), out: Path | None = None
) -> None:
    """Mean ± standard error over seeds of the last and the best evaluation of each run. --out: every evaluation as CSV,
    and beside it what the runs have in common and where they were trained as JSON."""
    planned = planning.runs(grid, grids.find(grid), runs, data, only)
    found = tables.rows(planned)
    if out is not None:
        tables.write(out, found, tables.about(grid, grids.find(grid), planned))
    print(tables.markdown(found))


def _start(
    found: Sequence[planning.Run], given: Sequence[str], to_slurm: bool, options: Sequence[str], again: bool
) -> None:
    if to_slurm and given:
        raise ValueError(f"slots must not be given with --slurm, got {' '.join(given)}")
    if options and not to_slurm:
        raise ValueError(f"slurm-options must be given with --slurm, got {' '.join(options)}")
    places = [] if to_slurm else slots.parse(given or slots.default())
    chosen = overview.to_start(found, again)
    planning.check(chosen)
    _log.info("%d runs: %d to start", len(found), len(chosen))
    if not chosen:
        print(overview.status(found))
    elif to_slurm:
        folder = found[0].folder.parent / ".sweep" / "submitit"
        jobs = slurm.submit(chosen, folder, slurm.options(options))
        print("\n".join(f"{r.name}: job {job.job_id}" for r, job in zip(chosen, jobs, strict=True)))
    else:
        local.Pool(chosen, places).run()


def main(args: list[str] | None = None) -> None:
    """The command line. A mistake of the user ends in one line and status 1; asked to stop, with status 75."""
    commands = {command.__name__: cli.later(command) for command in (plan, run, retry, status, table)}
    config = (tyro.conf.FlagCreatePairsOff,)
    cli.parse_and_call(lambda given: tyro.extras.subcommand_cli_from_dict(commands, args=given, config=config), args)


if __name__ == "__main__":
    main()
