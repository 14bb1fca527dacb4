"""The Triton kernels in their interpreter, as the kernels of CPU tensors: all that can be run of them without a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from fastsn import tensor_lists
from fastsn.ops import cuda as gpu
from fastsn.triton import plan, power_iteration, rescale, settings

# Tiles so small that weights of a test have several blocks, columns, chunks and groups.
SMALL = settings.Settings(
    elements=32,
    warps=8,
    rows=4,
    many_blocks=8,
    last_tiles=6,
    group=2,
    columns=32,
    vector=64,
    chunk=256,
)


if triton.__version__.startswith(("3.5", "3.6")):  # newer ones do it themselves (triton pull request 9172)
    _patch = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
        """Bounds of loops are arrays of one element, of which int() makes no number from NumPy 2.4 on."""
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_lang_tensor


def _patch_once_per_launch() -> None:
    """Every function that a kernel calls patches Triton's language anew: a third of a launch's time."""
    patch, patched = interpreter._patch_lang, set()

    def once(fn: Any) -> Any:
        modules = {id(x) for x in fn.__globals__.values() if x is tl or x is tl.core}
        if modules <= patched:
            return interpreter._LangPatchScope()
        scope = patch(fn)
        if not patched:  # of the launch itself, which ends with this
            restore = scope.restore

            def ended() -> None:
                patched.clear()
                restore()

            scope.restore = ended
        patched.update(modules)
        return scope

    interpreter._patch_lang = once


def _know_dtypes() -> None:
    """Triton makes a table of all for every question."""
    ask, known = interpreter._get_np_dtype, {}

    def numpys(dtype: Any) -> Any:
        name = str(dtype.scalar)
        if name not in known:
            known[name] = ask(dtype.scalar)
        return known[name]

    interpreter._get_np_dtype = numpys


# Half the time of all that runs on the interpreter.
if hasattr(interpreter, "_LangPatchScope"):  # Triton 3.6
    _patch_once_per_launch()
if hasattr(interpreter, "_get_np_dtype"):
    _know_dtypes()


@contextmanager
def kernels(own: settings.Settings = SMALL) -> Iterator[None]:
    """In the place of the C++ kernels, with these settings."""
    with _in_place(own, _quiet):
        yield


@contextmanager
def launches_replaced() -> Iterator[None]:
    """The same with the default settings and launches that do nothing: results are left as they were allocated,
    everything else is done."""
    launched = {power_iteration: ("iterate", "reduce"), rescale: ("rescale", "inner_products", "gradient")}
    with ExitStack() as stack:
        for module, names in launched.items():
            for name in names:
                stack.enter_context(mock.patch.object(module, name, _NoLaunch()))
        stack.enter_context(_in_place(settings.DEFAULT, lambda launch: launch))
        yield


class _NoLaunch:
    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *_, **__: None


@contextmanager
def _in_place(own: settings.Settings, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    before = settings._known.get(torch.device("cpu"))
    settings.use(own, torch.device("cpu"))
    launch = around(plan.Kernel.launch)
    served, launched = (
        mock.patch.object(gpu, "_served", return_value=True),
        mock.patch.object(plan.Kernel, "launch", launch),
    )
    try:
        with served, launched, _called():
            yield
    finally:
        settings.use(before or settings.DEFAULT, torch.device("cpu"))


@contextmanager
def _called() -> Iterator[None]:
    """Calls for CPU tensors go the way of those for tensors of a GPU: through C++, if it has been built."""
    library = torch.library.Library("fastsn", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are overridden
        if tensor_lists.are_built():
            torch.ops.fastsn._take_cpu_calls(True)
        else:
            for name in gpu.KERNELS:
                library.impl(name, gpu.implementation(name), "CPU")
    try:
        yield
    finally:
        library._destroy()
        if tensor_lists.are_built():
            torch.ops.fastsn._take_cpu_calls(False)


def _quiet(launch: Callable[..., Any]) -> Callable[..., Any]:
    def quiet(*arguments: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numpy: lanes that are not used, scalars that are arrays
            return launch(*arguments)

    return quiet
