"""The test suite on several versions of Python and torch, each in an environment of its own under build/matrix/.

python .ci/matrix.py [PYTHON-TORCH ...]    # all, or those named like 3.10-2.10.0; needs each python3.X on the PATH

It tests the commit that is checked out, with kernels that each environment builds for itself. What came of it is in
bench/results/matrix.json and README's table after each. An environment is made once, and again when its requirements
change.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "bench/results/matrix.json"
BEGIN, END = "<!-- .ci/matrix.py begin -->", "<!-- .ci/matrix.py end -->"
# Python, torch, and whether torch's own Triton is taken instead of the pin, which later versions of torch refuse.
STACKS = [("3.10", "2.10.0", False), ("3.12", "2.11.0", False), ("3.11", "2.13.0", False), ("3.13", "2.14.1", True)]
VERSIONS = """
import importlib.metadata, json, platform, torch, fastsn
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__}
    | {name: importlib.metadata.version(name) for name in ("triton", "numpy")}
    | {"kernels": fastsn.backends()["cpp"].detail}))
"""


def requirements(torch: str, own_triton: bool) -> str:
    """Those of .ci/requirements.txt with another torch."""
    pins = (ROOT / ".ci/requirements.txt").read_text()
    pins = re.sub("^torch==.*", f"torch=={torch}", pins, flags=re.MULTILINE)
    return re.sub("^triton==.*\n", "", pins, flags=re.MULTILINE) if own_triton else pins


def interpreter(version: str) -> str:
    """python3.X of the PATH, or of pyenv, whose shims know only the versions that were chosen."""
    versions = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for found in [*sorted(versions.glob(f"{version}.*/bin/python")), shutil.which(f"python{version}")]:
        if found and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0:
            return str(found)
    sys.exit(f"no python{version} on the PATH or in {versions}")


def environment(home: Path, version: str, wanted: str) -> Path:
    """The Python of an environment with these requirements; made if it is not there yet."""
    python, installed = home / "venv/bin/python", home / "installed.txt"
    if not installed.exists() or installed.read_text() != wanted:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        subprocess.run([interpreter(version), "-m", "venv", home / "venv"], check=True)
        (home / "requirements.txt").write_text(wanted)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
        subprocess.run([*pip, "-r", home / "requirements.txt"], check=True)
        (home / "requirements.txt").rename(installed)
    return python


def sources(home: Path, commit: str) -> Path:
    """The files of the commit, in a clone that keeps what was built."""
    clone = home / "src"
    if not clone.exists():
        subprocess.run(["git", "clone", "--quiet", "--shared", "--no-checkout", ROOT, clone], check=True)
    subprocess.run(["git", "-C", clone, "checkout", "--quiet", "--force", "--detach", commit], check=True)
    return clone


def tested(python: Path, clone: Path, commit: str) -> dict[str, Any]:
    """What the suite says on the kernels that are built here."""
    variables = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}", "OMP_WAIT_POLICY": "passive"}
    variables |= {"PYTHONPATH": str(clone), "FASTSN_WERROR": "1"}
    subprocess.run([python, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=clone, env=variables, check=True)
    versions = subprocess.run([python, "-c", VERSIONS], cwd=clone, env=variables, check=True, capture_output=True)
    report, start = clone.parent / "report.xml", time.monotonic()
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-p", "no:benchmark", "-n", "2", "--dist", "loadfile", f"--junitxml={report}"]
    subprocess.run(command, cwd=clone, env=variables, check=False)
    seconds = round(time.monotonic() - start)
    return {**json.loads(versions.stdout), **counted(report), "seconds": seconds, "commit": commit[:12]}


def counted(report: Path) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, and the names of those that failed."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    bad = {f"{x.get('classname')}::{x.get('name')}" for x in cases if {"failure", "error"} & {y.tag for y in x}}
    skipped = sum(any(y.tag == "skipped" for y in x) for x in cases)
    passed = len({(x.get("classname"), x.get("name")) for x in cases}) - len(bad) - skipped
    return {"passed": passed, "failed": len(bad), "skipped": skipped, "failures": sorted(bad)}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = [["Python", "torch", "Triton", "passed", "failed", "skipped", "commit, date"], ["---"] * 7]
    for x in results.values():
        counts = [str(x[name]) for name in ("passed", "failed", "skipped")]
        rows.append([x["python"], x["torch"], x["triton"], *counts, f"{x['commit']}, {x['date']}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def with_table(readme: str, text: str) -> str:
    """README with the table between its markers."""
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{text}\n{END}", readme, flags=re.DOTALL)


def main(chosen: list[str]) -> None:
    """Every stack, or the chosen ones, one after the other."""
    names = {f"{version}-{torch}": (version, torch, own) for version, torch, own in STACKS}
    if unknown := set(chosen) - set(names):
        sys.exit(f"no stack {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True)
    failed = False
    for name in chosen or names:
        version, torch, own = names[name]
        home = ROOT / "build/matrix" / name
        python = environment(home, version, requirements(torch, own))
        result = tested(python, sources(home, commit.stdout.strip()), commit.stdout.strip())
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results[name] = {**result, "date": time.strftime("%Y-%m-%d")}
        ordered = {name: results[name] for name in names if name in results}
        RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
        README.write_text(with_table(README.read_text(), table(ordered)))
        failed |= result["failed"] > 0
    sys.exit(failed)


if __name__ == "__main__":
    main(sys.argv[1:])
