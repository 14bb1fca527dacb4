"""README's section on the digits, and its picture, from the CSVs beside this file.

python train/sweep.py table digits-scales --out train/results/digits/scales.csv    # digits-settings, digits-table-2
python train/figures.py against runs/digits-scales --out train/results/digits/scales-figure.png
python train/results/digits/report.py                                              # from what these have written
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from gan import figures
from gan.presets import METHODS
from gan.sweep import table
from gan.sweep.table import Group, Row

HERE = Path(__file__).parent
README = HERE.parents[2] / "README.md"
BEGIN, END = "<!-- train/results/digits/report.py begin -->", "<!-- train/results/digits/report.py end -->"
_NAMES = {"sn": "SSN", "ssn": "SSN", "bsn": "BSSN", "bssn": "BSSN"}


def main() -> None:
    """Write both."""
    figures.make("against", [HERE / "scales-figure.csv"], HERE / "scales-figure.png")
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{section()}\n{END}{rest.partition(END)[2]}")


def section() -> str:
    """The three tables as Markdown."""
    parts = []
    for name, made in (("scales", scales), ("settings", settings), ("table-2", table_2)):
        path = HERE / f"{name}.csv"
        if path.is_file():
            parts.append(f"{made(table.read(path))}\n\n{provenance(path)}")
    return "\n\n".join(parts)


def scales(rows: Sequence[Row]) -> str:
    """digit FID against scale."""
    found = table.groups(rows)
    columns = sorted({float(g.fields["scale"]) for g in found})
    lines = _head(["digit FID at scale", *(f"{x:g}" for x in columns)])
    for name in ("SSN", "BSSN"):
        own = {float(g.fields["scale"]): g for g in found if _NAMES[g.fields["norm"]] == name}
        lines.append(_line([name, *(_cell(own[x], "fid") for x in columns)]))
    return "\n".join(lines)


def settings(rows: Sequence[Row]) -> str:
    """digit FID under learning rates and setting A."""
    found = table.groups(rows)

    def setting(group: Group) -> str:
        of = group.fields
        if of["n_dis"] != "1":
            return "setting A: 1e-4, β2 0.9, n_dis 5"
        return f"lr of G {_short(of['lr_g'])}, of D {_short(of['lr_d'])}"

    lines = _head(["digit FID", "SN", "BSSN, scale 2"])
    for name in dict.fromkeys(setting(g) for g in found):
        own = {_NAMES[g.fields["norm"]]: g for g in found if setting(g) == name}
        lines.append(_line([name, *(_cell(own[method], "fid") for method in ("SSN", "BSSN"))]))
    return "\n".join(lines)


def table_2(rows: Sequence[Row]) -> str:
    """digit FID and score of the methods."""
    lines = _head(["method", "digit FID", "digit score"])
    for group in table.groups(rows):
        twice = ", twice the updates" if group.fields["steps"] == "2000" else ""
        scale = float(group.fields["scale"])
        scaled = f", scale {scale:g}" if scale != 1 else ""
        scores = [_cell(group, score) for score in ("fid", "inception_score_mean")]
        lines.append(_line([f"`{_method(group)}`{scaled}{twice}", *scores]))
    return "\n".join(lines)


def _method(group: Group) -> str:
    """Its name for --method."""
    own = {**group.fields, "gradient_penalty": float(group.fields["gradient_penalty"])}
    return next(
        name
        for name, row in METHODS.items()
        if row["gamma"] == "none" and all(own[x] == row[x] for x in ("norm", "loss", "gradient_penalty"))
    )


def _cell(group: Group, score: str) -> str:
    total = len(group.last) + len(group.missing)
    partly = f" ({len(group.last)} of {total} seeds)" if group.missing else ""
    return table.mean([run[score] for run in group.last]) + partly


def provenance(path: Path) -> str:
    """Where the runs of a table were trained."""
    told = json.loads(path.with_suffix(".json").read_text())
    runs = sum(x["runs"] for x in told["environments"])
    machines = _listed(told["environments"], lambda x: f"{x['device']}, torch {x['torch']}")
    commits = _listed(told["environments"], lambda x: str(x["commit"]))
    where = f"train/results/digits/{path.name}"
    return f"Grid `{told['grid']}`, {runs} runs: {machines}; commit {commits} ([`{path.name}`]({where}))."


def _listed(found: Sequence[dict[str, object]], text: Callable[[dict[str, object]], str]) -> str:
    return ", ".join(dict.fromkeys(text(x) for x in found))


def _short(rate: str) -> str:
    return f"{float(rate):.0e}".replace("e-0", "e-")


def _head(cells: Sequence[str]) -> list[str]:
    return [_line(cells), _line(["---"] * len(cells))]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
