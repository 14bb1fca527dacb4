"""convert_state_dict: converts checkpoints between implementations of spectral normalization."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastsn.interop import state_dict_layouts as layouts
from fastsn.interop.state_dict_entries import convert_entry
from fastsn.interop.state_dict_layouts import LAYOUTS, Entry

# Keys of the version of torch's hook in the metadata of a module. Without it, loading recomputes v.
_HOOK, _VERSION = "spectral_norm", ".version"


@torch.no_grad()
def convert_state_dict(state: Mapping[str, Tensor], to: str) -> OrderedDict[str, Tensor]:
    r"""A state dict with every spectral norm in it stored as another implementation stores it.

    ================ ==================================================================================================
    ``to``           keys of a normalized tensor, behind the module's prefix
    ================ ==================================================================================================
    ``"torch"``      ``parametrizations.weight.original``, ``.0._u``, ``.0._v``: torch's parametrization,
                     ``fastsn.spectral_norm`` (the latter also ``.0._u_in``, ``.0._v_in``, ``.0.scale``)
    ``"torch_hook"`` ``weight_orig``, ``weight_u``, ``weight_v``, and a version in the metadata:
                     ``torch.nn.utils.spectral_norm``
    ``"fastsn"``     ``weight``, ``spectral_norm._u``, ``._v`` (``._u_in``, ``._v_in``, ``.scale``): fastsn's layers
    ``"biggan"``     ``weight``, ``u0``, ``sv0``: BigGAN-PyTorch
    ``"mimicry"``    ``weight``, ``sn_u``, ``sn_sigma``: torch_mimicry
    ================ ==================================================================================================

    The layout is detected per tensor, so a state may mix them. All other keys, and norms already in the layout ``to``,
    are unchanged and keep their order. The input is not modified; unchanged tensors are shared with it, not copied.

    - A missing v is :math:`M^H u / \|M^H u\|` with u kept, a missing u is :math:`M v / \|M v\|`, a missing sigma is
      :math:`u^H M v`. Where u and v both are missing (and other keys show that there was a norm), they come from 15
      power iterations from a fixed start. ``parametrizations.weight.original`` alone may belong to
      any parametrization and is left alone.
    - The dimension of output channels is the one whose sizes u and v have; among several, the one for which u and v
      belong to each other; with u alone, the first.
    - To "fastsn", u and v in half precision become float32.
    - BigGAN and mimicry normalize u at every use; here it is normalized if they did not. They also iterate
      in evaluation without storing it, so their sigma is half a power iteration ahead until u has converged. Further
      singular values of BigGAN (``u1``, ``sv1``, ...) are only logged there and are not carried over.
    - A scale that is a number is in no state dict, nor is the variant: the new module has to be built with them.
    - Which of u and v is updated first is in no state dict either, and no tensor depends on it: the new module goes on
      in its own order (torch's hook: v; torch's parametrization and fastsn: u, but v where ``fastsn.convert`` made the
      module from one with torch's hook).

    Args:
        state: a state dict; that of a model in DDP (``module.``) or compiled (``_orig_mod.``) too.
        to: "torch", "torch_hook", "fastsn", "biggan" or "mimicry".

    Returns:
        An OrderedDict, with ``_metadata`` where ``state`` has it or "torch_hook" needs it.

    Raises:
        TypeError: ``state`` is not a mapping of str to tensors (``_extra_state`` may be anything), or a weight cannot
            have a norm.
        ValueError: unknown ``to``; no spectral norm in ``state``; u or v without its weight, or of a wrong size; or
            ``to`` cannot store what is in ``state``: u_in and v_in, a scale, a tensor not named ``weight``, output
            channels that are not dimension 0, a complex weight, another parametrization of the same tensor (one
            without tensors, behind the norm, leaves no trace and cannot be seen), or a key that is taken.

    Example::

        >>> state = torch.load("G.pth")
        >>> model.load_state_dict(fastsn.convert_state_dict(state, to="fastsn"))
    """
    target = layouts.get(to)
    _check(state)
    metadata: Mapping[str, Any] | None = getattr(state, "_metadata", None)
    entries = layouts.find(state, _hooked(metadata or {}))
    if not entries:
        known = "; ".join(f"{row.name}: {', '.join(row.tensors.values())}" for row in LAYOUTS.values())
        raise ValueError(f"state must have a spectral norm in it ({known}), got the keys {[*state][:5]} ...")
    converted: dict[str, dict[str, Tensor]] = {}
    for entry in entries:
        converted |= convert_entry(entry, state, target)
    result: OrderedDict[str, Tensor] = OrderedDict()
    for key, value in state.items():
        for name, tensor in converted.get(key, {key: value}).items():
            if name in result:
                raise ValueError(f"{name!r} must be free to be written as {to!r}, but is in state already")
            result[name] = tensor
    if metadata is not None or to == "torch_hook":
        result._metadata = _metadata(metadata or {}, state, result, entries, to)  # type: ignore[attr-defined]
    return result


def _check(state: object) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a mapping of str to tensors, got {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(key, str):
            raise TypeError(f"state must be a mapping of str to tensors, got the key {key!r}")
        if not isinstance(value, Tensor) and not key.endswith("_extra_state"):
            raise TypeError(f"state must be a mapping of str to tensors, got {type(value).__name__} for {key!r}")


def _hooked(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(prefix, tensor) of every norm in the metadata of torch's hook."""
    return [
        (path and f"{path}.", name.removesuffix(_VERSION))
        for path, facts in metadata.items()
        for name in facts.get(_HOOK, {})
    ]


def _metadata(
    old: Mapping[str, Any], before: Iterable[str], after: Iterable[str], entries: list[Entry], to: str
) -> OrderedDict[str, Any]:
    """The metadata without modules that no longer exist, and with the hook's version exactly where the hook is."""
    gone = _modules(before) - _modules(after)
    result = OrderedDict((path, dict(facts)) for path, facts in old.items() if path not in gone)
    for facts in result.values():
        facts.pop(_HOOK, None)
    if to == "torch_hook":
        for entry in entries:
            result.setdefault(entry.prefix[:-1], {}).setdefault(_HOOK, {})[entry.tensor + _VERSION] = 1
    return result


def _modules(keys: Iterable[str]) -> set[str]:
    """The paths of all modules that contain these keys."""
    return {key[:i] for key in keys for i, letter in enumerate(key) if letter == "."}
