"""Which implementations exist here, and why not: the reference, the C++ kernels for CPU tensors, Triton."""

from __future__ import annotations

import importlib.metadata
import re
import warnings
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastsn import origin, torch_private

NAMES = ("auto", "reference", "cpp", "triton")

_DEVICES = {"cpu": "cpp", "cuda": "triton"}
_DTYPES = {
    "cpp": (torch.float32, torch.float64, torch.float16, torch.bfloat16),
    "triton": (torch.float32, torch.float16, torch.bfloat16),  # nothing is gained in float64
}
_OLDEST_TRITON = (3, 5)
_OLDEST_GPU = (7, 0)


class Backend(NamedTuple):
    """Whether an implementation can be used, and what it is or why it cannot."""

    available: bool
    detail: str


def backends() -> dict[str, Backend]:
    """The implementations of the kernels: {"reference" | "cpp" | "triton": (available, detail)}.

    ``detail`` says what there is (the C++ kernels name the instruction set in use), or why there is nothing.
    """
    return {"reference": _REFERENCE, "cpp": _CPP, "triton": _any_gpu()}


def chosen(impl: str, weight: Tensor) -> str:
    """The implementation that serves a weight: "reference", "cpp" or "triton".

    "auto" takes the kernels of the weight's device, and the reference where there are none: complex weights, other
    devices, AMD's GPUs (the Triton kernels compile for them, but have not been tested), and inside torch.func's
    transforms and forward-mode differentiation, which see through the reference but not into kernels. Where it takes
    the reference because the C++ kernels are missing, it warns, once per process.

    Raises:
        ValueError: an unknown ``impl``, or one for other devices than the weight's.
        TypeError: a dtype that the kernels asked for do not have.
        RuntimeError: an implementation asked for that is not there, with the reason; kernels inside a transform.
    """
    if impl == "reference":
        return impl
    device = weight.device
    if impl == "auto":
        kernels = _DEVICES.get(device.type)
        if kernels is None or weight.dtype not in _DTYPES[kernels] or transformed():
            return "reference"
        if kernels == "triton" and torch.version.hip is not None:
            return "reference"  # see fastsn/triton/shared.py, last_to_arrive
        if _serves(kernels, device.index or 0):
            return kernels
        if kernels == "cpp":
            _warn_once()
        return "reference"
    available(impl)
    if _DEVICES.get(device.type) != impl:
        wanted = next(name for name, kernels in _DEVICES.items() if kernels == impl)
        raise ValueError(f"impl={impl!r} needs weights on {wanted}, got one on {device}")
    if not _serves(impl, device.index or 0):
        raise RuntimeError(f"impl={impl!r} does not serve {device}: {served_by(impl, device.index or 0).detail}")
    if weight.dtype not in _DTYPES[impl]:
        kinds = [str(dtype).removeprefix("torch.") for dtype in _DTYPES[impl]]
        raise TypeError(f"impl={impl!r} needs {', '.join(kinds[:-1])} or {kinds[-1]} weights, got {weight.dtype}")
    if transformed():
        raise RuntimeError(
            f"impl={impl!r} does not work inside torch.func transforms or forward-mode differentiation: use 'auto'"
        )
    return impl


def _warn_once() -> None:
    """That there are no C++ kernels. Not while a graph is traced, which cannot hold a warning."""
    global _warned
    if not _warned and not torch.compiler.is_compiling():
        _warned = True
        warnings.warn(
            f"fastsn has no C++ kernels, weights on the CPU are normalized by the slower reference: {_CPP.detail}. "
            'impl="reference" asks for it without this warning',
            stacklevel=2,
        )


def served_by(impl: str, index: int) -> Backend:
    """Whether kernels can serve the device of their kind that has this number."""
    return _CPP if impl == "cpp" else triton(index)


@torch_private.constant_in_graphs
def _serves(impl: str, index: int) -> bool:
    """The same in a word. A graph that is traced takes the answer, and does not see how Triton is looked for."""
    return served_by(impl, index).available


@cache
def triton(index: int) -> Backend:
    """Whether the Triton kernels serve a GPU. Asked for only once there is one: it starts CUDA."""
    problem = _no_triton()
    if problem:
        return Backend(False, problem)
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    if torch.version.hip is None and capability < _OLDEST_GPU:
        return Backend(False, f"{name} has compute capability {_dotted(capability)}, {_dotted(_OLDEST_GPU)} is needed")
    return Backend(True, f"Triton {importlib.metadata.version('triton')} kernels, {name}")


def _any_gpu() -> Backend:
    if not torch.cuda.is_available():
        return Backend(False, "; ".join(filter(None, ("torch finds no GPU", _no_triton()))))
    return triton(torch.cuda.current_device())


def _no_triton() -> str:
    """What is wrong with Triton; empty if nothing is."""
    needed = f"{_dotted(_OLDEST_TRITON)} is needed"
    try:
        found = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return f"Triton is not installed, {needed}"
    old = tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < _OLDEST_TRITON
    return f"Triton {found} is too old, {needed}" if old else ""


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def available(impl: str) -> str:
    """``impl`` if it can be used; ValueError if there is no such thing, RuntimeError with the reason if it is missing.
    "auto" always can."""
    if impl not in NAMES:
        raise ValueError(f"impl must be one of {', '.join(map(repr, NAMES))}, got {impl!r}")
    if impl in _DEVICES.values() and not backends()[impl].available:
        raise RuntimeError(f"impl={impl!r} is not available: {backends()[impl].detail}")
    return impl


def transformed() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, ...) or forward-mode differentiation is running."""
    return not torch.compiler.is_compiling() and torch_private.transforms_active()


def _load_cpp() -> Backend:
    """Load the extension that was built for this version of torch: an installation may hold several."""
    folder = Path(__file__).parent
    ours = "_C_torch" + "_".join(torch.__version__.split(".")[:2]) + "."
    files = sorted(path.name for path in folder.glob("_C_torch*"))
    try:
        for name in (name for name in files if name.startswith(ours)):
            torch.ops.load_library(folder / name)  # type: ignore[no-untyped-call]
            return Backend(True, f"C++ kernels, {torch.ops.fastsn._instruction_set()}")
    except (OSError, RuntimeError) as error:
        return _missing(f"{name} cannot be loaded: {error}")
    if files:
        return _missing(f"built for another torch ({', '.join(files)}), this is {torch.__version__}")
    reason = folder / "_C_missing.txt"
    return _missing(reason.read_text().strip() if reason.exists() else "not built")


def _missing(reason: str) -> Backend:
    return Backend(False, f"{reason.rstrip('.')}. To build them, with a C++ compiler at hand: {origin.reinstall()}")


_CPP = _load_cpp()
_warned = False
_REFERENCE = Backend(True, "plain torch, any device and dtype")
