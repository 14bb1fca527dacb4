"""Result files and README: a pytest-benchmark JSON becomes a small file to commit, and that file README's table.

python -m pytest bench/ --benchmark-only --benchmark-json=raw.json
python bench/report.py raw.json bench/results/<device>/<name>.json      # no host names, no paths, medians only
python bench/report.py --readme bench/results/<device>/<name>.json      # writes the table between README's markers
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- bench/report.py begin -->", "<!-- bench/report.py end -->"


def reduced(raw: dict[str, Any]) -> dict[str, Any]:
    """What of a pytest-benchmark file is worth keeping."""
    return {
        "machine": raw["machine_info"],
        "commit": raw["commit_info"]["id"][:12] + ("-dirty" if raw["commit_info"]["dirty"] else ""),
        "date": raw["datetime"][:10],
        "results": [
            {
                "case": b["name"].split("[")[0].removeprefix("test_"),
                "contestant": b["params"]["name"],
                **{k: round(v, 3) for k, v in b["extra_info"].items()},
            }
            for b in raw["benchmarks"]
        ],
    }


def table(result: dict[str, Any], name: str) -> str:
    """A result file as Markdown."""
    machine, weights = result["machine"], result["results"][0]["weights_MB"]
    lines = ["| contestant | median ms | x torch SN | x floor |", "|---|---|---|---|"]
    for r in result["results"]:
        numbers = f"{r['interleaved_median_ms']:.1f} | {r['times_torch_SN']:.1f} | {r['times_floor']:.0f}"
        lines.append(f"| {r['contestant']} | {numbers} |")
    lines += [
        "",
        f"Forward + backward of the normalisation alone, {weights:.1f} MB of weights.",
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}; commit {result['commit']}, "
        f"{result['date']} (`{name}`).",
    ]
    return "\n".join(lines)


def with_table(readme: str, text: str) -> str:
    """README with the table between its markers."""
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{text}\n{END}", readme, flags=re.DOTALL)


if __name__ == "__main__":
    if sys.argv[1] == "--readme":
        path = Path(sys.argv[2])
        README.write_text(with_table(README.read_text(), table(json.loads(path.read_text()), path.as_posix())))
    else:
        source, target = map(Path, sys.argv[1:])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(reduced(json.loads(source.read_text())), indent=2) + "\n")
