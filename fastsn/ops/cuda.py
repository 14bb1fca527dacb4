"""Registration of the Triton kernels for tensors of a GPU, as csrc/register.cpp is that of C++ for CPU tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsn.backends import triton
from fastsn.ops import checks, fallback
from fastsn.ops.schema import DTYPE_CODES, LIBRARY
from fastsn.tensor_lists import are_built, identify, repeatable

_KNOWN = 1024  # kinds of calls that are remembered
_ELEMENTS, _POSITIONS = 1 << 31, 2048  # beyond which the reference serves
_prepared: dict[Any, Any] = {}  # what serves them: Prepared of fastsn/triton/plan.py


class OpSpec(NamedTuple):
    """Of an op: what checks its arguments, what serves the tensors that the kernel does not, and where among the
    arguments the weights and the scales are."""

    check: Callable[..., Any]
    plain: Callable[..., Any]
    weights_at: int = 0
    scales_at: int | None = None


class _Plain(NamedTuple):
    """In the place of a Prepared."""

    run: Callable[..., Any]
    again: None = None


KERNELS = {
    "power_iteration": OpSpec(checks.check_iteration, fallback.power_iteration),
    "power_iteration_": OpSpec(checks.check_iteration, fallback.power_iteration_),
    "rescale": OpSpec(checks.check_rescale, fallback.rescale, scales_at=1),
    "rescale_backward": OpSpec(checks.check_backward, fallback.rescale_backward, weights_at=2, scales_at=3),
}


def register() -> None:
    """Called once, by the package. Where C++ has been built, calls come there first (csrc/triton_calls.cpp)."""
    if not are_built():
        for name in KERNELS:
            LIBRARY.impl(name, implementation(name), "CUDA")  # type: ignore[no-untyped-call]
        return
    for name in KERNELS:
        LIBRARY.impl(f"_run_{name}", implementation(name), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    LIBRARY.impl("_launch", _launch, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


def _served(device: torch.device) -> bool:
    return device.type == "cuda" and triton(device.index).available


def implementation(name: str) -> Callable[..., Any]:
    """An op for tensors of any device: by its kernels where they serve, what has float64 in it by the reference."""
    kernel = KERNELS[name]

    def run(*arguments: Any) -> Any:
        weights = arguments[kernel.weights_at]
        if not weights or not _served(weights[0].device):
            return kernel.plain(*arguments)
        try:
            kind, places = identify(name, arguments)
        except RuntimeError:  # no strides, or no storage
            kernel.check(*arguments)
            raise
        with _on(weights[0].device):
            ready = _prepared.get(kind)
            if ready is None:
                ready = _prepare(name, arguments)
                if len(_prepared) >= _KNOWN:
                    _prepared.clear()
                _prepared[kind] = ready
                if ready.again is not None:
                    repeatable(kind)
            return ready.run(places, *arguments)

    return run


def _launch(
    kind: int,
    places: int,
    places_of_results: int,
    addresses: Sequence[int] | None,
    sigma: Tensor | None,
    vectors: Tensor | None,
    grad_sigma: Tensor | None,
) -> Sequence[Tensor] | None:
    """What C++ asks for: a call as it was prepared; None if it was not, or for other places without ``addresses``."""
    ready = _prepared.get(kind)
    if ready is None or ready.again is None:
        return None
    with _on(ready.device):
        return ready.again(places, places_of_results, addresses, sigma, vectors, grad_sigma)  # type: ignore[no-any-return]


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to the current device."""
    if device.type == "cuda" and torch.cuda.current_device() != device.index:
        return torch.cuda.device(device)
    return nullcontext()


def _prepare(name: str, arguments: tuple[Any, ...]) -> Any:
    """What serves arguments like these, once they are known to be sound: a kernel would read whatever is there."""
    kernel = KERNELS[name]
    kernel.check(*arguments)
    device = arguments[kernel.weights_at][0].device
    at = len(arguments) if kernel.scales_at is None else kernel.scales_at
    tensors = _tensors((*arguments[:at], *arguments[at + 1 :]))  # a scale is one number, and is brought over
    for x in tensors:
        if x.device != device:
            raise ValueError(f"all must be on {device} as weights[0], got shape {list(x.shape)} on {x.device}")
    wide = isinstance(arguments[-1], list | tuple) and DTYPE_CODES[torch.float64] in arguments[-1]
    wide = wide or any(x.dtype == torch.float64 for x in tensors)
    if wide or any(_too_large(w) for w in arguments[kernel.weights_at]):
        return _Plain(lambda _, *arguments: kernel.plain(*arguments))
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a step must have run once, as it is, before it is captured into a CUDA graph")
    launch = importlib.import_module("fastsn.triton.launch")
    on_change = importlib.import_module("fastsn.triton.settings").on_change
    if _prepared.clear not in on_change:
        on_change.append(_prepared.clear)
    return launch.prepared(name, arguments)


def _too_large(weight: Tensor) -> bool:
    """Kernels count the elements of a row in 32 bits, and go through all positions of a kernel at once."""
    return weight.numel() >= _ELEMENTS or weight.numel() // (weight.shape[0] * weight.shape[1]) > _POSITIONS


def _tensors(arguments: tuple[Any, ...]) -> list[Tensor]:
    lists = [argument if isinstance(argument, list | tuple) else (argument,) for argument in arguments]
    return [x for each in lists for x in each if isinstance(x, Tensor)]
