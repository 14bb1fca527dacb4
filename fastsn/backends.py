"""Which implementations exist here, and why not: the reference, the C++ kernels for CPU tensors, Triton."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

NAMES = ("auto", "reference", "cpp", "triton")

_KERNEL_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Backend(NamedTuple):
    """Whether an implementation can be used, and what it is or why it cannot."""

    available: bool
    detail: str


def backends() -> dict[str, Backend]:
    """The implementations of the kernels: {"reference" | "cpp" | "triton": (available, detail)}.

    ``detail`` says what there is (the C++ kernels name the instruction set in use), or why there is nothing.
    """
    return dict(_FOUND)


def chosen(impl: str, weight: Tensor) -> str:
    """The implementation that serves a weight: "reference" or "cpp".

    "auto" takes the kernels of the weight's device, and the reference where there are none: complex weights, other
    devices, and inside torch.func's transforms and forward-mode differentiation, which see through the reference but
    not into kernels.

    Raises:
        ValueError: an unknown ``impl``, or one for other devices than the weight's.
        TypeError: a dtype that the kernels asked for do not have.
        RuntimeError: an implementation asked for that is not there, with the reason; kernels inside a transform.
    """
    if impl == "auto":
        served = _CPP.available and weight.device.type == "cpu" and weight.dtype in _KERNEL_DTYPES
        return "cpp" if served and not transformed() else "reference"
    if impl == "reference":
        return impl
    available(impl)
    if weight.device.type != "cpu":
        raise ValueError(f"impl={impl!r} needs weights on cpu, got one on {weight.device}")
    if weight.dtype not in _KERNEL_DTYPES:
        raise TypeError(f"impl={impl!r} needs float32, float64, float16 or bfloat16 weights, got {weight.dtype}")
    if transformed():
        raise RuntimeError(
            f"impl={impl!r} does not work inside torch.func transforms or forward-mode differentiation: use 'auto'"
        )
    return impl


def available(impl: str) -> str:
    """``impl`` if it can be used; ValueError if there is no such thing, RuntimeError with the reason if it is missing.
    "auto" always can."""
    if impl not in NAMES:
        raise ValueError(f"impl must be one of {', '.join(map(repr, NAMES))}, got {impl!r}")
    if impl != "auto" and not _FOUND[impl].available:
        raise RuntimeError(f"impl={impl!r} is not available: {_FOUND[impl].detail}")
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
_FOUND = {
    "reference": Backend(True, "plain torch, any device and dtype"),
    "cpp": _CPP,
    "triton": Backend(False, "this version of fastsn has no Triton kernels yet"),
}
