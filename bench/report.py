"""Turn a pytest-benchmark JSON file into a small result file to commit: no host names, no paths, medians only.

python -m pytest bench/ --benchmark-only --benchmark-json=/tmp/raw.json
python bench/report.py /tmp/raw.json bench/results/<device>/<name>.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def reduced(raw: dict) -> dict:
    return {
        "machine": raw["machine_info"],
        "commit": raw["commit_info"]["id"][:12] + ("-dirty" if raw["commit_info"]["dirty"] else ""),
        "date": raw["datetime"][:10],
        "results": [
            {
                "case": b["name"].split("[")[0].removeprefix("test_"),
                "contestant": b["params"]["name"],
                "median_ms": round(b["stats"]["median"] * 1e3, 3),
                "iqr_ms": round(b["stats"]["iqr"] * 1e3, 3),
                "rounds": b["stats"]["rounds"],
                **{k: round(v, 3) for k, v in b["extra_info"].items()},
            }
            for b in raw["benchmarks"]
        ],
    }


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(reduced(json.loads(source.read_text())), indent=2) + "\n")
