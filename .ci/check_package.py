"""Builds an sdist and a wheel, isolated, and installs the sdist in new environments in the ways that users do.

python .ci/check_package.py      # in the environment of the Makefile; leaves dist/ behind
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Whatever else the builder's environment is set to: a build that fails is what some of these are about.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("FASTSN_WERROR", "PYTHONPATH")}
USE = """
import warnings
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    import torch, fastsn
    from pathlib import Path
    assert Path(fastsn.__file__).is_relative_to({home!r}), fastsn.__file__
    layer = fastsn.BSSNConv2d(3, 4, 3, scale=1.2)
    layer(torch.randn(1, 3, 5, 5)).sum().backward()
there, detail = fastsn.backends()["cpp"]
print(there, detail, *(warning.message for warning in found), sep="\\n")
"""


class Environment:
    """A new virtual environment, with or without the torch of the builder."""

    def __init__(self, home: Path) -> None:
        self.home = home
        venv.create(home, with_pip=True)
        # Packages come from a folder in the place of an index. The cache is pip's usual one, but shared only here.
        self.variables = ENVIRONMENT | {
            "PATH": f"{home / 'bin'}{os.pathsep}{ENVIRONMENT['PATH']}",
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(home.parent / "index"),
            "PIP_CACHE_DIR": str(home.parent / "cache"),
        }

    def borrow_torch(self) -> None:
        """A plain path runs no hook of the editable fastsn that lies beside it."""
        (site,) = self.home.glob("lib/python*/site-packages")
        (site / "torch_of_the_builder.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    def run(self, command: str, **more: str) -> str:
        """A line of a shell, as a user would type it. Returns what it printed."""
        print(f"{self.home.name}: {command}", flush=True)
        variables = self.variables | more
        result = subprocess.run(
            command, shell=True, cwd=self.home, env=variables, stdout=subprocess.PIPE, text=True, check=False
        )
        if result.returncode:
            sys.exit(result.stdout)
        return result.stdout

    def expect(self, there: bool, reason: str) -> str:
        """fastsn works, and says whether it has its kernels, or once why not. Returns what it says."""
        (self.home / "use.py").write_text(USE.format(home=str(self.home)))
        found, detail, *said = self.run("python use.py").splitlines()
        said = [line for line in said if "fastsn" in line]
        if (
            found != str(there)
            or reason not in detail
            or len(said) != (not there)
            or any(detail not in s for s in said)
        ):
            sys.exit(
                f"expected {there}, {reason!r} and {'no' if there else 'one'} warning, got {found}, {detail}, {said}"
            )
        print(f"{self.home.name}: {detail}", flush=True)
        return detail


def names(folder: str, *suffixes: str) -> set[str]:
    """The files of the sources with one of these endings."""
    return {str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("*") if p.suffix in suffixes}


def check(what: str, found: set[str], wanted: set[str], unwanted: tuple[str, ...]) -> None:
    """Stops with what is missing or should not be there."""
    missing = wanted - found
    extra = {name for name in found if name.startswith(unwanted)}
    if missing or extra:
        sys.exit(f"{what}: missing {sorted(missing)}, unwanted {sorted(extra)}")


def built() -> tuple[Path, Path]:
    """The sdist and a wheel without kernels, once both have been looked into."""
    dist = ROOT / "dist"
    for old in dist.glob("fastsn-*"):
        old.unlink()
    subprocess.run([sys.executable, "-m", "build", "--outdir", dist, ROOT], env=ENVIRONMENT, check=True)
    (archive,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    code = names("fastsn", ".py", ".typed")
    with tarfile.open(archive) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    sources = names("csrc", ".cpp", ".h") | {"setup.py", "pyproject.toml", "README.md", "LICENSE"}
    check(archive.name, inside, code | sources, ("fastsn/_C_", "runs/", ".venv", "build/"))
    with zipfile.ZipFile(wheel) as file:
        inside = set(file.namelist())
    top = {name.split("/")[0] for name in inside}
    if not {"fastsn"} <= top or any(not name.startswith("fastsn") for name in top):
        sys.exit(f"{wheel.name}: unwanted {sorted(top)}")
    # `build` isolates with an interpreter of its own, which has no torch.
    check(wheel.name, inside, code | {"fastsn/_C_missing.txt"}, ("fastsn/_C_torch",))
    if not wheel.name.endswith("-py3-none-any.whl"):
        sys.exit(f"{wheel.name} has no kernels and should be for any platform")
    print(f"{archive.name} and {wheel.name} are complete")
    return archive, wheel


def main() -> None:
    """Build, look inside, install, use."""
    archive, pure = built()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder).resolve()
        index = home / "index"
        index.mkdir()
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", index, "setuptools>=77"]
        subprocess.run(download, env=ENVIRONMENT, check=True)
        shutil.copy(archive, index)

        # What was installed before torch has no kernels; pip's cache hands the same out again, although torch could be
        # found now; the line that the warning gives repairs it.
        late = Environment(home / "late")
        late.run("pip install -q --no-deps fastsn")
        late.borrow_torch()
        late.expect(False, "torch was missing at the build")
        late.run("pip install -q --no-deps --force-reinstall fastsn")
        line = re.search("pip install .*", late.expect(False, "torch was missing at the build"))
        assert line
        late.run(line[0])
        late.expect(True, "C++ kernels")

        # The usual way: torch is there, and pip isolates. By way of a wheel, as pip install does it, and as others may.
        usual = Environment(home / "usual")
        usual.borrow_torch()
        usual.run(f"pip wheel -q --no-deps -w {home}/wheels {archive}")
        usual.run(f"pip install -q --no-deps --no-index {home}/wheels/*.whl")
        usual.expect(True, "C++ kernels")
        usual.run(f"pip install -q --no-deps --no-index --force-reinstall {pure}")
        usual.expect(False, "torch was missing at the build")

        without = Environment(home / "no-compiler")
        without.borrow_torch()
        without.run("pip install -q 'setuptools>=77'")
        install = f"pip install -q --force-reinstall --no-cache-dir --no-deps --no-build-isolation {archive}"
        without.run(install, CXX="/bin/false", CC="/bin/false")
        without.expect(False, "building them failed")
        without.run(install, CXX="no-such-compiler")
        without.expect(False, "no C++ compiler, no-such-compiler is not on the PATH")


if __name__ == "__main__":
    main()
