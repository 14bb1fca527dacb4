"""Builds the C++ kernels where torch and a compiler are at hand; without them the package installs all the same.

Everything else about the package is in pyproject.toml. Environment: FASTSN_WERROR=1 makes warnings errors (CI),
FASTSN_SANITIZE=address,undefined builds with sanitizers (make sanitize).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.sdist import sdist

SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))
# Read by fastsn/backends.py: only the build knows why it came to nothing.
REASON = "_C_missing.txt"


class SourceDistribution(sdist):
    """With the C++ sources, also where there is no torch and so no extension that would name them."""

    def add_defaults(self) -> None:
        """setuptools' own choice and csrc/."""
        super().add_defaults()
        self.filelist.extend([*SOURCES, *HEADERS])


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


def extension() -> dict[str, Any]:
    """The arguments of setup(): the kernels, unless torch is missing."""
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except (ImportError, OSError) as error:
        print(f"fastsn: no C++ kernels, torch cannot be imported here: {error}", file=sys.stderr)
        return {"cmdclass": {"sdist": SourceDistribution}}

    class Build(BuildExtension):
        """A build that fails leaves behind why, and lets the installation go on."""

        def run(self) -> None:
            """Build, and copy into the sources where that was asked for."""
            homes = [Path(self.build_lib) / "fastsn"]
            if self.inplace or self.editable_mode:
                homes.append(Path("fastsn"))
            for old in (path for home in homes for path in home.glob("_C_*")):
                old.unlink()  # of an earlier build, which must not pass for this one
            try:
                super().run()
            except Exception as error:
                if os.environ.get("FASTSN_WERROR") == "1":
                    raise
                reason = homes[-1] / REASON
                reason.parent.mkdir(parents=True, exist_ok=True)
                reason.write_text(f"building them failed: {' '.join(str(error).split())[:500]}\n")
                print(f"fastsn: no C++ kernels, {reason.read_text()}", file=sys.stderr)
                self.extensions = []

    # The name says which torch it belongs to: torch's C++ interface changes with every minor version. Python's own
    # interface is not used, so one file serves all versions of Python.
    major, minor = torch.__version__.split(".")[:2]
    kernels = CppExtension(
        f"fastsn._C_torch{major}_{minor}",
        SOURCES,
        extra_compile_args=flags(),
        extra_link_args=sanitizers(),
        py_limited_api=True,
        depends=HEADERS,
    )
    return {
        "ext_modules": [kernels],
        "cmdclass": {"build_ext": Build, "sdist": SourceDistribution},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension())
