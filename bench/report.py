"""Result files, README's table and the picture, all made from a pytest-benchmark JSON.

python -m pytest bench/ --benchmark-only --benchmark-json=raw.json
python bench/report.py raw.json bench/results/<device>/<name>.json      # no host names, no paths, medians only
python bench/report.py --readme bench/results/<device>/<name>.json      # writes the table between README's markers
python bench/report.py --picture bench/results/<device>/<name>.json OUT.png
python bench/report.py --host-cost bench/results/<device>/<name>.json   # the same for the host's costs
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

README = Path(__file__).parent.parent / "README.md"


def reduced(raw: dict[str, Any]) -> dict[str, Any]:
    """What of a pytest-benchmark file is worth keeping: the figures of each file of tests, under its name."""
    results: dict[str, list[dict[str, Any]]] = {}
    for benchmark in raw["benchmarks"]:
        figures = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in benchmark["extra_info"].items()}
        results.setdefault(benchmark["name"].split("[")[0].removeprefix("test_"), []).append(figures)
    commit = raw["commit_info"]["id"][:12] + ("-dirty" if raw["commit_info"]["dirty"] else "")
    return {"machine": raw["machine_info"], "commit": commit, "date": raw["datetime"][:10], "results": results}


def by_workload(result: dict[str, Any], case: str = "forward_and_backward") -> dict[str, dict[str, dict[str, Any]]]:
    """{workload: {contestant: figures}} of a case, in the order of the file."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for figures in result["results"].get("normalization", []):
        if figures["case"] == case:
            found.setdefault(figures["workload"], {})[figures["contestant"]] = figures
    return found


def names(workloads: dict[str, dict[str, Any]]) -> list[str]:
    """Every contestant of any workload, once."""
    return list(dict.fromkeys(name for contestants in workloads.values() for name in contestants))


def table(result: dict[str, Any], name: str) -> str:
    """A result file as Markdown."""
    workloads = by_workload(result)
    anyone = {workload: next(iter(contestants.values())) for workload, contestants in workloads.items()}
    rows = [
        ["forward + backward, ms (x floor)", *workloads],
        ["---"] * (1 + len(workloads)),
        ["layers, MB", *(f"{x['layers']}, {x['weights_MB']:.3g}" for x in anyone.values())],
        *([who, *(_cell(found.get(who)) for found in workloads.values())] for who in names(workloads)),
        ["floor", *(_short(x["floor_ms"]) for x in anyone.values())],
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    steps = {figures["contestant"]: figures for figures in result["results"].get("training_step", [])}
    if steps:
        lines += ["", _training(steps)]
    demo = {(f["variant"], f["impl"]): f for f in result["results"].get("demo_step", [])}
    if demo:
        gains = ", ".join(
            f"{variant} {_short(demo[variant, 'reference']['step_ms'])} ms on the reference, "
            f"{_short(demo[variant, 'auto']['step_ms'])} with the kernels"
            for variant in ("sn", "bssn")
        )
        lines += ["", f"A step of `make demo`: {gains}."]
    lines += ["", "–: compiling takes minutes, or the result is wrong (it has to pass a check against float64 first)."]
    lines += ["", f"{provenance(result)}, {result['date']} (`{name}`)."]
    return "\n".join(lines)


def _training(steps: dict[str, dict[str, Any]]) -> str:
    """What normalization adds to each step without it."""
    batch = next(iter(steps.values()))["batch"]
    parts = []
    for plain in dict.fromkeys(figures["plain"] for figures in steps.values()):
        who = {name: figures for name, figures in steps.items() if figures["plain"] == plain and name != plain}
        costs = ", ".join(f"{name} {_short(figures['normalization_ms'])}" for name, figures in who.items())
        parts.append(f"{plain} {_short(steps[plain]['step_ms'])} ms, to which {costs} ms are added")
    return f"A whole training step of the CIFAR10 CNN, {batch} real and {batch} fake images: {'; '.join(parts)}."


def host_costs(result: dict[str, Any], name: str) -> str:
    """What the host spends on normalization, as Markdown: a row per contestant, a column per number of layers."""
    figures = result["results"]["host_cost"]
    layers = list(dict.fromkeys(x["layers"] for x in figures))
    rows: dict[str, list[str]] = {}
    for x in figures:
        less = x["times_less_than_torch_SN_eager"]
        cell = _short(x["cost_us"]) + (f" ({less:.1f}x less)" if less != 1 else "")
        rows.setdefault(x["contestant"], []).append(cell)
    rows["floor"] = [_short(next(x["floor_us"] for x in figures if x["layers"] == n)) for n in layers]
    lines = [["µs above a network without norms", *(f"{n} layers" for n in layers)], ["---"] * (len(layers) + 1)]
    lines += [[contestant, *cells] for contestant, cells in rows.items()]
    return "\n".join(
        [*(f"| {' | '.join(line)} |" for line in lines), "", f"{provenance(result)}, {result['date']} (`{name}`)."]
    )


def provenance(result: dict[str, Any]) -> str:
    """Where the figures are from."""
    machine, threads = result["machine"], result["machine"]["threads"]
    return (
        f"{machine.get('gpu') or machine['cpu']}, {threads} {'thread' if threads == 1 else 'threads'}, "
        f"torch {machine['torch']}; commit {result['commit']}"
    )


def _cell(figures: dict[str, Any] | None) -> str:
    return f"{_short(figures['interleaved_median_ms'])} ({_short(figures['times_floor'])}x)" if figures else "–"


def _short(x: float) -> str:
    """Two digits, more from 100 on."""
    return f"{x:.0f}" if x >= 10 else f"{x:.1f}" if x >= 1 else f"{x:.2g}"


def with_table(readme: str, text: str, part: str = "") -> str:
    """README with the table between its markers; ``part``: " host cost" for that of the host's costs."""
    begin, end = (f"<!-- bench/report.py{part} {edge} -->" for edge in ("begin", "end"))
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{text}\n{end}", readme, flags=re.DOTALL)


def _load(path: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(Path(path).read_text())
    return result


if __name__ == "__main__":
    if sys.argv[1] == "--readme":
        README.write_text(with_table(README.read_text(), table(_load(sys.argv[2]), Path(sys.argv[2]).as_posix())))
    elif sys.argv[1] == "--host-cost":
        text = host_costs(_load(sys.argv[2]), Path(sys.argv[2]).as_posix())
        README.write_text(with_table(README.read_text(), text, " host cost"))
    elif sys.argv[1] == "--picture":
        import picture

        picture.draw(_load(sys.argv[2]), Path(sys.argv[3]))
    else:
        source, target = sys.argv[1:]
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text(json.dumps(reduced(_load(source)), indent=1) + "\n")
