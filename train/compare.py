"""Compare finished runs in one picture and one table.

python train/compare.py runs/digits/sn runs/digits/bssn --out runs/digits/compare.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from gan import cli
from gan.figures import comparison
from gan.figures import runs as folders


def main(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    out: Path,
) -> None:
    """Write ``out``: last samples, FID and score, and every layer's sigma of each run; print their last figures.

    Scores have the names of their protocol: digit FID and digit score, of a small digit classifier, are not comparable
    with figures that come from Inception.
    """
    found = [folders.read(folder) for folder in runs]
    comparison.compare(found, out)
    print(comparison.table(found))
    print(f"\n{comparison.over_seeds(found)}")
    print(f"picture: {out}")


if __name__ == "__main__":
    cli.start(main)
