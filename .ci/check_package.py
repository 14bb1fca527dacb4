"""Builds an sdist, a wheel from that sdist, and uses the wheel in a new environment away from the sources.

python .ci/check_package.py      # in the environment of the Makefile; leaves dist/ behind
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
USE = """
import torch, fastsn
from pathlib import Path
assert Path(fastsn.__file__).is_relative_to({environment!r}), fastsn.__file__
assert fastsn.backends()["cpp"].available, fastsn.backends()["cpp"]
layer = fastsn.BSSNConv2d(3, 4, 3, scale=1.2, impl="cpp")
layer(torch.randn(1, 3, 5, 5)).sum().backward()
print(fastsn.__version__, fastsn.backends()["cpp"].detail)
"""


def names(folder: str, *suffixes: str) -> set[str]:
    """The files of the sources with one of these endings."""
    return {f"{folder}/{p.name}" for p in (ROOT / folder).iterdir() if p.suffix in suffixes}


def check(what: str, found: set[str], wanted: set[str], unwanted: tuple[str, ...]) -> None:
    """Stops with what is missing or should not be there."""
    missing = wanted - found
    extra = {name for name in found if name.startswith(unwanted)}
    if missing or extra:
        sys.exit(f"{what}: missing {sorted(missing)}, unwanted {sorted(extra)}")


def main() -> None:
    """Build, look inside, install, use."""
    dist = ROOT / "dist"
    for old in dist.glob("fastsn-*"):
        old.unlink()
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, ROOT], check=True)
    (archive,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")

    code = names("fastsn", ".py", ".typed") | names("fastsn/kernels", ".py") | {"fastsn/py.typed"}
    with tarfile.open(archive) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    sources = names("csrc", ".cpp", ".h") | {"setup.py", "pyproject.toml", "README.md", "LICENSE"}
    check(archive.name, inside, code | sources, ("fastsn/_C_", "runs/", ".venv", "build/"))
    with zipfile.ZipFile(wheel) as file:
        inside = set(file.namelist())
    (library,) = (name for name in inside if name.startswith("fastsn/_C_torch"))
    top = {name.split("/")[0] for name in inside}
    if not {"fastsn"} <= top or any(not name.startswith("fastsn") for name in top):
        sys.exit(f"{wheel.name}: unwanted {sorted(top)}")
    check(wheel.name, inside, code, ("fastsn/_C_missing",))
    print(f"{archive.name} and {wheel.name} with {library} are complete")

    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder).resolve() / "environment"
        venv.create(environment, with_pip=True)
        python = environment / "bin" / "python"
        # torch is borrowed; a plain path runs no hook of the editable fastsn that lies beside it.
        (site,) = environment.glob("lib/python*/site-packages")
        (site / "torch_of_the_builder.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], cwd=folder, check=True)
        subprocess.run([python, "-c", USE.format(environment=str(environment))], cwd=folder, check=True)


if __name__ == "__main__":
    main()
