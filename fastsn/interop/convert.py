"""convert: replaces torch's spectral norms, changes variants, and normalizes plain models."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from fastsn import checks, variants
from fastsn.interop.adapters import Adapter, Layer, Parametrization, PlainLayer
from fastsn.interop.torch_hook import Hook, hooks_of
from fastsn.model.sites import sites_of
from fastsn.norm import SpectralNorm
from fastsn.parametrize import SPECTRAL_NORMS

Module = TypeVar("Module", bound=nn.Module)
Skip: TypeAlias = str | Iterable[str] | Callable[[str, nn.Module], bool]

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

_log = logging.getLogger("fastsn")


def convert(
    model: Module,
    variant: str | None = None,
    scale: float | Tensor | None = None,
    *,
    skip: Skip | None = None,
    order: str | None = None,
) -> Module:
    r"""Replace every spectral norm of a model by fastsn's, in place; training continues from the same state.

    Norms of ``torch.nn.utils.parametrizations.spectral_norm`` and of the older ``torch.nn.utils.spectral_norm`` become
    parametrizations by ``fastsn.SpectralNorm``, at the same position among others. Kept: the Parameters (an optimizer
    and tied weights stay valid), u and v (the same tensors; in half precision they are widened to float32),
    n_power_iterations, eps, dim, which of u and v is updated first, training modes, and all other hooks and
    parametrizations. With variant "sn" no vector changes, nothing is drawn, and results, also of further
    training, equal torch's within rounding. "bsn" and "bssn" draw and warm up the second
    view of convolutions (so convert before wrapping in DistributedDataParallel, which lists the buffers).

    Args:
        model: any module, also compiled or wrapped.
        variant: of all norms, also existing ones of fastsn: "sn", "ssn", "bsn" or "bssn". None: torch's become "sn",
            fastsn's are left alone. In a model without any spectral norm a variant is given to
            the weight of every Linear, Conv1-3d and ConvTranspose1-3d.
        scale: c of "ssn" and "bssn": a float, a tensor, or a Parameter, which is then shared by all norms (and has to
            be given to the optimizer). None: as it is, 1 where there was none.
        skip: modules to leave unchanged, with everything in them: a name, several names, or a function
            (name, module) -> bool.
        order: which of u and v a power iteration updates first. None: as it was, which is v in the old hook and u in
            torch's parametrization; a norm that is new starts with u. "torch": u, as torch's parametrization, in every
            norm that is not skipped; training that goes on from the old hook then differs by half an iteration at
            first, and no longer once u and v have converged.

    Left alone as well: ScriptModules and quantized modules, subclasses of torch's and fastsn's classes, norms outside
    any chain of parametrizations, a tensor that more than one old hook makes or whose weight is complex under the old
    hook (where torch is wrong), and weights that are no parameter because a hook makes them (the old weight_norm).
    ``logging.getLogger("fastsn")`` says at level INFO what was done with each tensor, and why not.

    The keys of the state dict become those of torch's parametrization. A model that had the old hook still loads its
    old checkpoints, ``strict=True`` too ("bsn" and "bssn" miss the vectors of the second view, which are warmed up
    with a warning). The order of ``parameters()`` may change: load an optimizer's state before
    converting.

    Updates of u and v: the old hook iterates once per forward of the module, a parametrization, torch's or fastsn's,
    once per access to the tensor. These are the same if the module's forward reads the tensor once, as in torch's
    Linear, convolution and embedding layers. A module that reads it several times in a forward, or whose tensor is
    read by others, iterates more often than before. Under ``fastsn.fuse`` and ``fastsn.step`` a norm iterates once per
    forward of the fused model, or once per block. Vectors that are already zero or non-finite stay so until
    ``fastsn.warm_up``.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is not a module; a sharded DTensor weight; a ``scale`` or ``skip`` of another kind.
        ValueError: no spectral norm in the model and no variant; nothing that a variant could be given to; an unknown
            variant or order; a bad scale; a name in ``skip`` that no module has; a lazy or empty weight.

    Whatever is raised, the model is unchanged.

    Example::

        >>> D = fastsn.convert(D)                              # torch's spectral norms, faster
        >>> D = fastsn.convert(D, "bssn", scale=1.4)           # another variant, or a model without any
        >>> D = fastsn.convert(D, "sn", skip=["head", "embed"])
    """
    checks.module(model, "model")
    row = variants.get("sn" if variant is None else variant)
    if scale is not None:
        checks.scale(scale, row)
    if not (order is None or (isinstance(order, str) and order == "torch")):
        raise ValueError(f"order must be None (as it is) or 'torch' (u before v), got {order!r}")
    ready, left_alone = _plan(model, _Wanted(variant, scale, order), _skipped(model, skip))
    for adapter, norm in ready:
        adapter.put(norm)
        _log.info("converted %s: %s, now %r", adapter.where, adapter.kind, norm.variant)
    for line in left_alone:
        _log.info("left alone %s", line)
    return model


class _Wanted(NamedTuple):
    """The arguments of ``convert`` that say what a norm becomes."""

    variant: str | None
    scale: float | Tensor | None
    order: str | None

    def satisfied_by(self, norm: nn.Module | None) -> str | None:
        """Why a norm needs no conversion; None if it does."""
        if not isinstance(norm, SpectralNorm) or (self.order is not None and norm.v_first):
            return None
        if self.variant is None:
            return "it is fastsn's"
        return f"it is {self.variant!r}" if self.variant == norm.variant and self.scale is None else None

    def arguments(self, norm: nn.Module | None) -> dict[str, Any]:
        """The arguments of the SpectralNorm that replaces ``norm``."""
        ours = norm if isinstance(norm, SpectralNorm) else None
        row = variants.get(self.variant or (ours.variant if ours is not None else "sn"))
        scale = ours.scale if ours is not None and row.free_scale else 1.0
        if self.variant is not None and self.scale is not None:
            scale = self.scale
        chosen = {"variant": row.name, "scale": scale}
        return chosen if self.order is None else {**chosen, "v_first": False}


def _plan(
    model: nn.Module, wanted: _Wanted, skipped: set[nn.Module]
) -> tuple[list[tuple[Adapter, SpectralNorm]], list[str]]:
    """The tensors to convert with their new norms, and log lines about others. Everything that can fail is done here,
    so that an error leaves the model unchanged."""
    found = _find(model, wanted.variant)
    weights: list[tuple[Adapter, Tensor]] = []
    for adapter in found.adapters:
        why = "skip" if skipped & adapter.modules() else adapter.obstacle() or wanted.satisfied_by(adapter.norm)
        if why:
            found.left_alone.append(f"{adapter.where}: {why}")
        else:
            with _named(adapter):
                weights.append((adapter, checks.weight(adapter.weight(), "the weight")))
    made: dict[nn.Module, SpectralNorm] = {}
    # Only after all weights are checked: drawing vectors changes the random state.
    return [(adapter, _norm(adapter, weight, wanted, made)) for adapter, weight in weights], found.left_alone


class _Found(NamedTuple):
    """Tensors that may be converted, and log lines about those that cannot."""

    adapters: list[Adapter]
    left_alone: list[str]


def _find(model: nn.Module, variant: str | None) -> _Found:
    """All norms; or, if there are none, the plain layers to normalize."""
    scripts: list[str] = []
    modules = list(_open_modules(model, scripts))
    found = _norms(modules)
    if not (found.adapters or found.left_alone):
        if variant is None:
            raise ValueError(
                "model must have a spectral norm, got one without: pass variant= to normalize all of its Linear, "
                "convolution and transposed convolution layers"
            )
        quantized = [module for _, module in modules if callable(getattr(type(module), "weight", None))]
        plain = [(path, module) for path, module in modules if isinstance(module, _PLAIN) or module in quantized]
        found = _Found([PlainLayer(path, module) for path, module in plain], [])
        if not plain:
            raise ValueError("model must have a spectral norm or a Linear or convolution layer, got one without")
    found.left_alone.extend(f"{name or type(model).__name__}: a ScriptModule cannot be changed" for name in scripts)
    return found


def _open_modules(model: nn.Module, scripts: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """``named_modules`` without the inside of ScriptModules, whose names go to ``scripts``."""
    closed: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and module not in closed:
            closed.update(module.modules())
            scripts.append(name)
        if module not in closed:
            yield name, module


def _norms(modules: list[tuple[str, nn.Module]]) -> _Found:
    found, owned = _Found([], []), set[nn.Module | None]()
    for path, module in modules:
        adapters: list[Adapter] = [Hook(path, module, key, hook) for key, hook in hooks_of(module).items()]
        for site in sites_of(module, path, SPECTRAL_NORMS):
            adapters.append((Layer if site.position is None else Parametrization)(path, site))
        owned.update(adapter.norm for adapter in adapters)
        found.adapters.extend(adapters)
        if isinstance(module, SPECTRAL_NORMS) and module not in owned:
            found.left_alone.append(f"{path or type(module).__name__}: a norm that is no parametrization of a tensor")
    return found


def _norm(adapter: Adapter, weight: Tensor, wanted: _Wanted, made: dict[nn.Module, SpectralNorm]) -> SpectralNorm:
    """The new norm of a tensor. Tensors that share a norm share the new one."""
    settings, old = adapter.settings(), adapter.norm
    if old is not None and old in made:
        made[old].follows_autocast &= settings["follows_autocast"]
        return made[old]
    with _named(adapter):
        norm = SpectralNorm(weight, **settings | wanted.arguments(old))
    if old is not None:
        made[old] = norm
    return norm


@contextmanager
def _named(adapter: Adapter) -> Iterator[None]:
    try:
        yield
    except (IndexError, TypeError, ValueError) as error:
        where = f"{adapter.where!r} of a {type(adapter.owner).__name__}"
        raise type(error)(f"model cannot be converted because of {where}: {error}") from error


def _skipped(model: nn.Module, skip: Skip | None) -> set[nn.Module]:
    """Every module that ``skip`` selects, with its submodules."""
    if skip is None:
        return set()
    modules = list(model.named_modules(remove_duplicate=False))  # a shared module has several names
    if isinstance(skip, str):
        skip = [skip]
    if callable(skip) and not isinstance(skip, type | nn.Module):
        roots = [module for name, module in modules if skip(name, module)]
    elif isinstance(skip, Iterable) and not isinstance(skip, type | nn.Module):
        by_name = dict(modules)
        roots = []
        for name in skip:
            if not isinstance(name, str):
                raise TypeError(f"skip must hold names of modules, got {name!r}")
            if name not in by_name:
                near = ", ".join(map(repr, get_close_matches(name, by_name, cutoff=0.4))) or "none"
                raise ValueError(f"skip must name modules of the model, got {name!r}; names near it: {near}")
            roots.append(by_name[name])
    else:
        raise TypeError(f"skip must be a name, names or a function (name, module) -> bool, got {skip!r}")
    return {inner for root in roots for inner in root.modules()}
