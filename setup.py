"""Builds the C++ kernels where torch and a compiler are at hand; without them the package installs all the same, and
says why it has none.

Everything else about the package is in pyproject.toml. Environment: FASTSN_WERROR=1 makes warnings and a build that
fails errors (CI), FASTSN_SANITIZE=address,undefined builds with sanitizers (make sanitize).

Why torch is no build requirement: kernels fit one minor version of torch, pip would build them with the newest (some
GB), and no hook of a build backend is told which one the package will meet. What does work is looking behind pip's
isolation, see `unhide`. uv and `python -m build` isolate with an interpreter of their own, from which the user's torch
cannot be found: there the wheel is a pure one.

Why torch's stable ABI is not used, which would make one library do for all versions: up to torch 2.14 it has no header
for autograd functions, dispatch guards and inference mode. rescale's rule of differentiation (csrc/register.cpp) would
have to move to Python, at ten times the cost of a small layer.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))
# Read by fastsn/backends.py: only the build knows why it came to nothing.
REASON = "_C_missing.txt"


def unhide() -> None:
    """Let the user's torch be imported in an isolated build of pip, which runs on the interpreter that the package is
    for and hides the packages of it by a path of its own."""
    ask = [sys.executable, "-E", "-c", "import sys; print(*sys.path[1:], sep='\\n')"]
    found = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.splitlines()
    sys.path += [path for path in found if path not in sys.path]


def flags() -> list[str]:
    """Nothing here may depend on the machine that builds: instruction sets are chosen in the source, at run time."""
    found = ["-O1" if sanitizers() else "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wextra"]
    # For the compiler only: at::parallel_for is a template, and its threads are to be those of torch's own OpenMP.
    found += ["-fopenmp"] if sys.platform == "linux" else []
    found += ["-Wno-unused-parameter", "-Wno-psabi"]  # torch's headers; vectors that never leave a function
    if os.environ.get("FASTSN_WERROR") == "1":
        found.append("-Werror")
    return found + (sanitizers() or ["-g0"])


def sanitizers() -> list[str]:
    """What both the compiler and the linker have to be told."""
    names = os.environ.get("FASTSN_SANITIZE")
    return [f"-fsanitize={names}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-g"] if names else []


def kernels() -> tuple[Extension, type[build_ext]]:
    """The extension, and the command that builds it.

    Raises:
        ImportError, OSError: torch cannot be imported.
        FileNotFoundError: there is no compiler.
    """
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler

    compiler = shlex.split(get_cxx_compiler())[0]
    if shutil.which(compiler) is None:
        raise FileNotFoundError(f"no C++ compiler, {compiler} is not on the PATH")
    # The name says which torch it belongs to: torch's C++ interface changes with every minor version, and a wheel may
    # hold several (make wheel). Python's own interface is not used, so one file serves all versions of Python.
    major, minor = torch.__version__.split(".")[:2]
    extension = CppExtension(
        f"fastsn._C_torch{major}_{minor}",
        SOURCES,
        extra_compile_args=flags(),
        extra_link_args=sanitizers(),
        py_limited_api=True,
        depends=HEADERS,
    )
    return extension, BuildExtension


def arguments() -> dict[str, Any]:
    """The arguments of setup(): the kernels, or something in their place that fails for the reason that they would."""
    problem = ""
    extension, command = Extension("fastsn._C", []), build_ext
    try:
        extension, command = kernels()
    except FileNotFoundError as error:
        problem = str(error)
    except (ImportError, OSError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        problem = f"torch {'was missing' if missing else 'could not be imported'} at the build: {error}"

    class Build(command):  # type: ignore[misc,valid-type]
        """A build that fails leaves behind why, and lets the installation go on: with a wheel for any platform."""

        def run(self) -> None:
            """Build, and copy into the sources where that was asked for."""
            homes = [Path(self.build_lib) / "fastsn"]
            if self.inplace or self.editable_mode:
                homes.append(Path("fastsn"))
            for old in (path for home in homes for path in home.glob("_C_*")):
                old.unlink()  # of an earlier build, which must not pass for this one
            try:
                if problem:
                    raise RuntimeError(problem)
                super().run()
            except Exception as error:
                if os.environ.get("FASTSN_WERROR") == "1":
                    raise
                reason = homes[-1] / REASON
                reason.parent.mkdir(parents=True, exist_ok=True)
                reason.write_text((problem or f"building them failed: {' '.join(str(error).split())[:500]}") + "\n")
                print(f"fastsn: no C++ kernels, {reason.read_text()}", file=sys.stderr)
                self.extensions = self.distribution.ext_modules = []
                wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
                if wheel:
                    wheel.root_is_pure = True

    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if importlib.util.find_spec("torch") is None:
    unhide()
setup(**arguments())
