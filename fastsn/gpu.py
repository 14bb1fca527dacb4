"""Registration of the Triton kernels for tensors of a GPU, as csrc/register.cpp is that of C++ for CPU tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsn import ops
from fastsn.backends import triton

_KNOWN = 1024  # lists of arguments that are remembered
_known: dict[Any, bool] = {}  # sound lists, and whether the kernels serve them


class Kernel(NamedTuple):
    """Of an op: what checks its arguments, what serves the tensors that the kernel does not, and where among the
    arguments the weights and the scales are."""

    check: Callable[..., Any]
    plain: Callable[..., Any]
    weights_at: int = 0
    scales_at: int | None = None


KERNELS = {
    "power_iteration": Kernel(ops.check_iteration, ops.reference_power_iteration),
    "power_iteration_": Kernel(ops.check_iteration, ops.reference_power_iteration_),
    "rescale": Kernel(ops.check_rescale, ops.reference_rescale, scales_at=1),
    "rescale_backward": Kernel(ops.check_backward, ops.reference_rescale_backward, weights_at=2, scales_at=3),
}


def register() -> None:
    """Called once, by the package."""
    for name in KERNELS:
        ops.LIBRARY.impl(name, implementation(name, _served), "CUDA")  # type: ignore[no-untyped-call]


def _served(device: torch.device) -> bool:
    return triton(device.index).available


def implementation(name: str, served: Callable[[torch.device], bool]) -> Callable[..., Any]:
    """An op for the devices that ``served`` says: by its kernels, what has float64 in it by the reference."""
    kernel = KERNELS[name]

    def run(*arguments: Any) -> Any:
        weights = arguments[kernel.weights_at]
        if not weights or not served(weights[0].device):
            return kernel.plain(*arguments)
        key = (name, tuple([_signature(argument) for argument in arguments]))
        own = _known.get(key)
        if (
            own is None
        ):  # once known to be sound, arguments are not checked again; a kernel would read whatever is there
            kernel.check(*arguments)
            at = len(arguments) if kernel.scales_at is None else kernel.scales_at
            tensors = _tensors((*arguments[:at], *arguments[at + 1 :]))  # a scale is one number, and is brought over
            for x in tensors:
                if x.device != weights[0].device:
                    place = f"{weights[0].device} as weights[0]"
                    raise ValueError(f"all must be on {place}, got shape {list(x.shape)} on {x.device}")
            wide = isinstance(arguments[-1], list | tuple) and ops.DTYPE_CODES[torch.float64] in arguments[-1]
            own = not wide and all(x.dtype != torch.float64 for x in tensors)
            if len(_known) >= _KNOWN:
                _known.clear()
            _known[key] = own
        if not own:
            return kernel.plain(*arguments)
        return getattr(importlib.import_module("fastsn.kernels.launch"), name)(*arguments)

    return run


def _signature(argument: Any) -> Any:
    """All that the checks look at."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.dtype, argument.device, argument.layout
    if isinstance(argument, list | tuple):
        return tuple([_signature(x) if isinstance(x, Tensor) else x for x in argument])
    return argument


def _tensors(arguments: tuple[Any, ...]) -> list[Tensor]:
    lists = [argument if isinstance(argument, list | tuple) else (argument,) for argument in arguments]
    return [x for each in lists for x in each if isinstance(x, Tensor)]
