"""Which implementations exist here, and why not: the reference, the C++ kernels for CPU tensors, Triton."""

from __future__ import annotations

import importlib.metadata
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

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
    devices, and inside torch.func's transforms and forward-mode differentiation, which see through the reference but
    not into kernels.

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
        served = kernels is not None and weight.dtype in _DTYPES[kernels] and not transformed()
        return kernels if kernels is not None and served and served_by(kernels, device).available else "reference"
    available(impl)
    if _DEVICES.get(device.type) != impl:
        wanted = next(name for name, kernels in _DEVICES.items() if kernels == impl)
        raise ValueError(f"impl={impl!r} needs weights on {wanted}, got one on {device}")
    if not served_by(impl, device).available:
        raise RuntimeError(f"impl={impl!r} does not serve {device}: {served_by(impl, device).detail}")
    if weight.dtype not in _DTYPES[impl]:
        kinds = [str(dtype).removeprefix("torch.") for dtype in _DTYPES[impl]]
        raise TypeError(f"impl={impl!r} needs {', '.join(kinds[:-1])} or {kinds[-1]} weights, got {weight.dtype}")
    if transformed():
        raise RuntimeError(
            f"impl={impl!r} does not work inside torch.func transforms or forward-mode differentiation: use 'auto'"
        )
    return impl


def served_by(impl: str, device: torch.device) -> Backend:
    """Whether kernels can serve a device of their kind."""
    return _CPP if impl == "cpp" else triton(device.index or 0)


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
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def _load_cpp() -> Backend:
    """Load the extension that setup.py built for this version of torch."""
    folder = Path(__file__).parent
    ours = "_C_torch" + "_".join(torch.__version__.split(".")[:2]) + "."
    files = sorted(folder.glob("_C_torch*"))
    for path in (path for path in files if path.name.startswith(ours)):
        try:
            torch.ops.load_library(path)  # type: ignore[no-untyped-call]
        except (OSError, RuntimeError) as error:
            return Backend(False, f"{path.name} cannot be loaded: {error}")
        return Backend(True, f"C++ kernels, {torch.ops.fastsn._instruction_set()}")
    if files:
        return Backend(False, f"built for another torch ({files[0].name}), this is {torch.__version__}: install again")
    reason = folder / "_C_missing.txt"
    if reason.exists():
        return Backend(False, reason.read_text().strip())
    return Backend(False, "not built, torch was missing at the build: install with pip's --no-build-isolation")


_CPP = _load_cpp()
_REFERENCE = Backend(True, "plain torch, any device and dtype")
