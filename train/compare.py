"""Compare finished runs in one picture and one table.

python train/compare.py runs/digits/sn runs/digits/bssn --out runs/digits/compare.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from gan import cli, pictures


def main(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    out: Path,
    fid_name: str = "digit FID",
    score_name: str = "digit score",
) -> None:
    """Write ``out``: last samples, FID and score, and every layer's sigma of each run; print their last figures.

    Digit FID and digit score use a small digit classifier: not comparable with figures that come from Inception.
    """
    pictures.compare(list(runs), out, fid_name, score_name)
    print(pictures.table(list(runs), fid_name, score_name))
    print(f"\n{pictures.over_seeds(list(runs), fid_name, score_name)}")
    print(f"picture: {out}")


if __name__ == "__main__":
    cli.start(main)
