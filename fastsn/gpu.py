"""Registration of the Triton kernels for tensors of a GPU, as csrc/register.cpp is that of C++ for CPU tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsn import ops
from fastsn.backends import triton

_CHECKED = 1024  # lists of arguments that are remembered as sound
_checked: dict[Any, None] = {}


def register() -> None:
    """Called once, by the package."""
    _register("power_iteration", ops.check_iteration, ops.reference_power_iteration)
    _register("power_iteration_", ops.check_iteration, ops.reference_power_iteration_)
    _register("rescale", ops.check_rescale, ops.reference_rescale, scales_at=1)
    _register("rescale_backward", ops.check_backward, ops.reference_rescale_backward, weights_at=2, scales_at=3)


def _register(
    name: str, check: Callable[..., Any], plain: Callable[..., Any], weights_at: int = 0, scales_at: int | None = None
) -> None:
    """``plain`` serves what the kernels do not: float64, GPUs that are too old, machines without Triton."""

    def run(*arguments: Any) -> Any:
        weights = arguments[weights_at]
        if not weights or weights[0].dtype == torch.float64 or not triton(weights[0].device.index).available:
            return plain(*arguments)
        return call(name, check, weights[0].device, scales_at, arguments)

    ops.LIBRARY.impl(name, run, "CUDA")  # type: ignore[no-untyped-call]


def call(
    name: str, check: Callable[..., Any], device: torch.device, scales_at: int | None, arguments: tuple[Any, ...]
) -> Any:
    """The kernels of an op, once the arguments are known to be sound: a kernel would read whatever is there."""
    key = (name, tuple([_signature(argument) for argument in arguments]))
    if key not in _checked:
        check(*arguments)
        _same_device(arguments[:scales_at], device)
        _same_device(arguments[(scales_at or len(arguments)) + 1 :], device)
        if len(_checked) >= _CHECKED:
            _checked.clear()
        _checked[key] = None
    return getattr(importlib.import_module("fastsn.kernels.launch"), name)(*arguments)


def _signature(argument: Any) -> Any:
    """All that the checks look at."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.dtype, argument.device, argument.layout
    if isinstance(argument, list | tuple):
        return tuple([_signature(x) if isinstance(x, Tensor) else x for x in argument])
    return argument


def _same_device(arguments: tuple[Any, ...], device: torch.device) -> None:
    """Not asked of scales: a scale is one number, and is brought over."""
    for argument in arguments:
        for x in argument if isinstance(argument, list | tuple) else (argument,):
            if isinstance(x, Tensor) and x.device != device:
                raise ValueError(
                    f"all tensors must be on {device} as weights[0], got shape {list(x.shape)} on {x.device}"
                )
