"""The norms of a model, grouped for calls of the ops, and cached until the model changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from fastsn import checks, normalize, torch_private
from fastsn.model.sites import Site, weights
from fastsn.norm import SpectralNorm, changes
from fastsn.normalize import Batch
from fastsn.reference import Vectors


class Group:
    """Norms with equally many preceding norms on their tensor and equally many power iterations.

    Args:
        norms: the norms, of weights with at least two dimensions.
        weights: per norm its weight if that is a Parameter or buffer; else its Site, as a parametrization or hook
            computes the weight anew for each call.
        rounds: power iterations per call.
        vectors: per norm (u, v) by view, to use instead of the stored ones.
    """

    def __init__(
        self,
        norms: Sequence[SpectralNorm],
        weights: Sequence[Tensor | Site],
        rounds: int,
        vectors: Sequence[Vectors] | None = None,
    ) -> None:
        self.norms, self.rounds = norms, rounds
        self._weights, self._vectors = weights, vectors
        self._batches = self._make_batches() if all(isinstance(x, Tensor) for x in weights) else None

    def batches(self) -> list[tuple[Batch, Sequence[SpectralNorm]]]:
        """The batches to normalize, each with its norms."""
        return self._make_batches() if self._batches is None else self._batches

    def subset(self, positions: Sequence[int], vectors: Mapping[int, Vectors] | None = None) -> Group:
        """The norms at these indices; with ``vectors`` by index, they use those and do not iterate."""
        norms, weights = [self.norms[i] for i in positions], [self._weights[i] for i in positions]
        if vectors is None:
            return Group(norms, weights, self.rounds)
        return Group(norms, weights, 0, [vectors[i] for i in positions])

    def _make_batches(self) -> list[tuple[Batch, Sequence[SpectralNorm]]]:
        weights = [x if isinstance(x, Tensor) else x.weight() for x in self._weights]
        specs = [norm.spec(weight) for norm, weight in zip(self.norms, weights, strict=True)]
        if self._vectors is not None:
            specs = [spec._replace(vectors=own) for spec, own in zip(specs, self._vectors, strict=True)]
        return [(batch, [self.norms[i] for i in positions]) for batch, positions in normalize.batches(specs)]


def groups(model: nn.Module) -> Sequence[Group]:
    """The groups of a model in the order of their calls, cached on the model.

    Raises TypeError or ValueError for a model without norms of fastsn and for weights that cannot be normalized.
    """
    if torch.compiler.is_compiling() or not isinstance(model, nn.Module):
        return _groups(_weights(model))
    plan: _Plan | None = model.__dict__.get(_KEY)
    if plan is None or not plan.is_valid(model):
        try:
            plan = _Plan(model)
        except (TypeError, ValueError):
            forget(model)  # it may refer to norms that have been removed
            raise
        if plan.is_cacheable(model):
            model.__dict__[_KEY] = plan
    return plan.groups


def forget(model: nn.Module) -> None:
    """Drop the plan of a model."""
    model.__dict__.pop(_KEY, None)


_KEY = "_fastsn_plan"  # in the __dict__ of a model
_settings = itemgetter("training", "n_power_iterations", "dim", "impl", "follows_autocast", "v_first")


def _weights(model: nn.Module) -> list[tuple[Site, Tensor]]:
    found = weights(model)
    checks.has_norms(found, "model")
    return [(site, weight) for site, weight in found if site.norm.views]


def _groups(found: Sequence[tuple[Site, Tensor]]) -> list[Group]:
    together: dict[tuple[int, int], list[tuple[SpectralNorm, Tensor | Site]]] = {}
    for site, weight in found:
        source = weight if _is_stored(site, weight) else site
        together.setdefault((site.depth, site.norm.rounds()), []).append((site.norm, source))
    ordered = sorted(together.items(), key=lambda entry: entry[0])
    return [Group([norm for norm, _ in own], [x for _, x in own], rounds) for (_, rounds), own in ordered]


def _is_stored(site: Site, weight: Tensor) -> bool:
    """Whether the weight is a Parameter or buffer, not computed by a parametrization or a hook."""
    if site.chain is not None and site.position != 0:
        return False
    holder, name = _holder(site)
    return weight is holder._parameters.get(name) or weight is holder._buffers.get(name)


def _holder(site: Site) -> tuple[nn.Module, str]:
    """The module that stores the weight, and the name there."""
    return (site.owner, site.tensor) if site.chain is None else (site.chain, "original")


class _Plan:
    """The groups of a model, and everything that they depend on.

    Cached in the ``__dict__`` of the model. References modules and tensors of the model but not the model itself: that
    cycle would delay freeing it until the garbage collector runs. Not copied or pickled with the model.
    """

    def __init__(self, model: nn.Module) -> None:
        found = _weights(model)
        self.groups = _groups(found)
        modules = [module for module in model.modules() if module is not model]
        stored = [(_holder(site), weight) for site, weight in found if _is_stored(site, weight)]
        # What is_valid looks at, at every call: __dict__, as attributes of an nn.Module take twice as long.
        self._norms = [site.norm.__dict__ for site, _ in found]
        self._members = [(module.__dict__, "_modules") for module in modules if not isinstance(module, SpectralNorm)]
        self._members += [(norm, "_buffers") for norm in self._norms]
        self._members += [(norm, "_parameters") for norm in self._norms if norm["_parameters"]]  # learnable scales
        self._weights = [weight for _, weight in stored]
        self._stored = [
            (None if holder is model else holder.__dict__, kind, name)
            for (holder, name), weight in stored
            for kind in ("_parameters", "_buffers")[: 1 if isinstance(weight, nn.Parameter) else 2]
        ]
        self._devices = list({weight.device.type for _, weight in found})
        self._changes, self._settings = changes.count, self._settings_now()
        self._state, self._layouts = self._state_of(model), self._layouts_now()
        self._references = [module for module in modules if isinstance(module, SpectralNorm)]  # others are in the state
        self._owners = [site.owner for site, weight in found if not _is_stored(site, weight)]

    def is_cacheable(self, model: nn.Module) -> bool:
        """Not for weights that ``functional_call`` or transforms substitute, which differ in each call and may hold a
        graph; nor while TorchScript traces, which must see the ops of the schema; nor for a model that is itself a
        layer with a computed weight: its Site would be a reference cycle."""
        given = torch_private.transforms_active() or any(weight.grad_fn is not None for weight in self._weights)
        traced = torch_private.tracing_state() is not None
        return not (given or traced or any(owner is model for owner in self._owners))

    def is_valid(self, model: nn.Module) -> bool:
        """Whether nothing has changed."""
        count = changes.count  # read before the settings, which another thread may change
        if self._changes != count:  # of some norm, maybe in another model
            if not _same(self._settings, self._settings_now()):
                return False
            self._changes = count
        return _same(self._state, self._state_of(model)) and self._layouts == self._layouts_now()

    def _settings_now(self) -> list[object]:
        return [x for norm in self._norms for x in (*_settings(norm), norm.get("scale"))]

    def _state_of(self, model: nn.Module) -> list[object]:
        """Everything else that the groups depend on, to be compared by identity in one pass."""
        state: list[object] = [torch_private.transforms_active(), torch_private.parametrizations_are_cached()]
        state.append(torch_private.tracing_state() is None)  # tracing: specs are made anew, as they refuse some exports
        if torch_private.any_autocast():
            on = [device for device in self._devices if normalize.autocast_is_on(device)]
            state += [x for device in on for x in (device, torch.get_autocast_dtype(device))]
        own = model.__dict__
        state += own["_modules"].values()
        state += chain.from_iterable([owner[kind].values() for owner, kind in self._members])
        state += [(holder or own)[kind].get(name) for holder, kind, name in self._stored]
        return state

    def _layouts_now(self) -> list[object]:
        """What ``.data`` and ``.to()`` change in place. To be compared by ==, which is safe here and faster."""
        weights = self._weights
        return [*[w.dtype for w in weights], *[w.is_cpu for w in weights], *[w.get_device() for w in weights]]

    def __deepcopy__(self, _: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def _same(before: list[object], now: list[object]) -> bool:
    """By identity: comparing the values of tensors would wait for the device."""
    return len(before) == len(now) and all(map(is_, before, now))
