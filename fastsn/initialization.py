"""Initialization of parametrized modules: values that ``model.apply(fn)`` or ``reset_parameters`` write in place into
a normalized tensor are stored in the original. Without this they would be lost, as under torch's parametrization,
because a parametrization computes a new tensor at each access."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from fastsn import torch_private
from fastsn.model.sites import evaluate_chain, sites_of
from fastsn.norm import SpectralNorm


def patch_initialization(module: nn.Module) -> None:
    """Wrap ``apply`` and ``reset_parameters`` of a parametrized module, on its class, which only copies of the module
    share. An ``apply`` that a subclass overrides is not wrapped."""
    kind: Any = type(module)
    if "_stores_writes" in kind.__dict__:
        return
    kind._stores_writes = True
    if kind.apply is nn.Module.apply:
        kind.apply = _storing_writes(kind.apply)
    if hasattr(kind, "reset_parameters"):
        kind.reset_parameters = _storing_writes(kind.reset_parameters)


def _storing_writes(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _writable_weights(self):
            return method(self, *args, **kwargs)

    return wrapped


@contextmanager
def _writable_weights(module: nn.Module) -> Iterator[None]:
    """Within the block every access to a normalized tensor returns the same W̄. At the end, in-place changes of it are
    stored in the original, and u and v of changed weights are warmed up."""
    # Nested blocks do nothing: the outermost one replaces forward.
    chains = _normalized_chains(module).items()
    writable = {tensor: _WritableWeight(chain) for tensor, chain in chains if "forward" not in chain.__dict__}
    for weight in writable.values():
        weight.chain.forward = weight  # type: ignore[method-assign]
    try:
        yield
    finally:
        for weight in writable.values():
            del weight.chain.forward
    for tensor, weight in writable.items():
        if _normalized_chains(module).get(tensor) is weight.chain:  # not removed within the block
            with torch.no_grad():
                weight.store_changes(module, tensor)


class _WritableWeight:
    """Replaces the forward of a ParametrizationList: computes W̄ at the first call, returns the same tensor at later
    ones, and detects whether it was written to."""

    def __init__(self, chain: ParametrizationList) -> None:
        self.chain = chain
        self._value = self._before = torch.empty(0)
        self._originals = {x: _version(x) for x in chain.parameters(recurse=False)}
        norms = [part for part in chain if isinstance(part, SpectralNorm)]
        # reset_parameters of torch's recurrent layers also draws the parameters of submodules: learnable scales.
        self._scales = {x: (_version(x), x.detach().clone()) for norm in norms for x in norm.parameters()}

    def __call__(self) -> Tensor:
        if not self._value.numel():
            if not _has_values(self.chain):
                return type(self.chain).forward(self.chain)
            with torch.no_grad():
                self._before = evaluate_chain(self.chain, use_cache=False).detach().clone()
            self._value = self._before.clone().requires_grad_(any(x.requires_grad for x in self._originals))
        return self._value

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        chain = memo[id(self.chain)]  # a copy made within the block gets the original forward
        return type(chain).forward.__get__(chain)

    def store_changes(self, module: nn.Module, tensor: str) -> None:
        """Called at the end of the block: store in-place changes, restore scales, warm up u and v."""
        for scale, (version, value) in self._scales.items():
            if _version(scale) != version:
                scale.copy_(value)
        written = bool(self._value.numel()) and not _equal(self._value, self._before)
        if written:
            self._assign(module, tensor)
        changed = written or any(_version(x) != version for x, version in self._originals.items())
        if changed and _has_values(self.chain):
            for position, part in enumerate(self.chain):
                if isinstance(part, SpectralNorm):
                    part.warm_up(evaluate_chain(self.chain, position, use_cache=False))

    def _assign(self, module: nn.Module, tensor: str) -> None:
        if len(self.chain) == 1:
            self.chain.original.copy_(self._value)
            return
        try:
            setattr(module, tensor, self._value.detach())  # through the right_inverse of each parametrization
        except (NotImplementedError, RuntimeError) as error:
            where = f"{type(module).__name__}.{tensor}"
            raise RuntimeError(f"{where} cannot be initialized by what it is to become: {error}") from error


def _normalized_chains(module: nn.Module) -> dict[str, ParametrizationList]:
    """Tensor name -> its parametrizations, where one of them is a SpectralNorm."""
    found = sites_of(module, "")
    return {site.tensor: site.chain for site in found if site.chain is not None and site.position is not None}


def _has_values(chain: ParametrizationList) -> bool:
    stored = [*chain.parameters(), *chain.buffers()]
    return not any(x.is_meta or torch_private.is_sharded(x) for x in stored)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether all values are equal, NaN included."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
