"""Figures of the papers from runs: a picture, and the numbers behind it as CSV.

    python train/figures.py curves    runs/grid                  --out curves.png      # writes curves.csv, too
    python train/figures.py against   runs/grid --field n_dis    --out n_dis.png
    python train/figures.py gradients runs/a runs/b              --out gradients.png   # trained with --log-gradients
    python train/figures.py curves    curves.csv                 --out again.png       # the picture from its numbers

A run is the folder of one, or a folder that holds some at any depth, as that of a sweep. Runs that differ in nothing
but the seed become a mean with its standard error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from gan import cli, figures

Runs = Annotated[tuple[Path, ...], tyro.conf.Positional]


def curves(runs: Runs, out: Path, unfinished: bool = False) -> None:
    """FID and score over generator steps."""
    figures.make("curves", runs, out, unfinished)


def against(runs: Runs, out: Path, field: str = "scale", unfinished: bool = False) -> None:
    """Last and best FID and score against a field of the configuration: scale, n_dis, lr_g, ..."""
    figures.make("against", runs, out, unfinished, field=field)


def settings(runs: Runs, out: Path, unfinished: bool = False) -> None:
    """Last and best FID and score under each setting of learning rates, beta1, beta2 and n_dis."""
    figures.make("settings", runs, out, unfinished)


def gradients(runs: Runs, out: Path, unfinished: bool = False) -> None:
    """Norm of dL/dW of each layer of D, and slopes, beside FID and score; needs --log-gradients."""
    figures.make("gradients", runs, out, unfinished)


def variances(runs: Runs, out: Path, unfinished: bool = False) -> None:
    """Variance of each layer's normalized weight beside 1/max(m, n); needs --log-variances."""
    figures.make("variances", runs, out, unfinished)


def sigmas(runs: Runs, out: Path, unfinished: bool = False) -> None:
    """The sigma that each layer's weight is divided by."""
    figures.make("sigmas", runs, out, unfinished)


def spectra(runs: Runs, out: Path, unfinished: bool = False) -> None:
    """Squared singular values of each layer of the trained discriminator."""
    figures.make("spectra", runs, out, unfinished)


def seconds(runs: Runs, out: Path, unfinished: bool = False) -> None:
    """Seconds per 100 generator steps; logging, samples and evaluation are not counted."""
    figures.make("seconds", runs, out, unfinished)


def samples(runs: Runs, out: Path, unfinished: bool = False) -> None:
    """The last sample sheets side by side."""
    figures.make("samples", runs, out, unfinished)


COMMANDS = (curves, against, settings, gradients, variances, sigmas, spectra, seconds, samples)


def main(args: list[str] | None = None) -> None:
    """The command line. A mistake of the user ends in one line and status 1. --unfinished takes runs as far as they
    are."""
    commands = {command.__name__: cli.later(command) for command in COMMANDS}
    config = (tyro.conf.FlagCreatePairsOff,)
    cli.parse_and_call(lambda given: tyro.extras.subcommand_cli_from_dict(commands, args=given, config=config), args)


if __name__ == "__main__":
    main()
