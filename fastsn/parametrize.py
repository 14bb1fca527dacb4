"""The drop-in for ``torch.nn.utils.parametrizations.spectral_norm``."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm as TorchNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm as TorchHook

from fastsn import checks, views
from fastsn.initialization import patch_initialization
from fastsn.model.sites import evaluate_chain, sites_of
from fastsn.norm import SpectralNorm
from fastsn.tensor_property import install_fast_property

SPECTRAL_NORMS = (SpectralNorm, TorchNorm)

Module = TypeVar("Module", bound=nn.Module)


def spectral_norm(
    module: Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    variant: str = "sn",
    scale: float | Tensor = 1.0,
    impl: str = "auto",
) -> Module:
    r"""Normalize a tensor of a module by a parametrization: :math:`\bar W = c\,W / \mathrm{mean}_{views}(\sigma)`.

    With the default variant this is torch's ``parametrizations.spectral_norm``: same arguments, same random draws, same
    numbers, same state-dict keys (``parametrizations.weight.original``, ``parametrizations.weight.0._u``, ``._v``), so
    checkpoints load in both directions. "bsn" and "bssn" add ``._u_in``, ``._v_in`` for weights with kernel positions,
    a tensor ``scale`` adds ``.scale``. On purpose different from torch: u and v stay float32 in half-precision modules
    and under autocast, the weight of a Linear or convolution comes out in the autocast dtype, and a zero, tiny or
    non-finite weight neither spoils u and v nor (if zero) turns into NaN.

    Args:
        module: the module that owns the tensor; changed in place.
        name: a parameter or buffer of it with at least one dimension; any real or complex floating dtype.
        n_power_iterations: power iterations per access in training mode.
        eps: floor of the norm of a 1-D tensor; others need none, see ``SpectralNorm``.
        dim: dimension of output channels; by default 1 for ConvTranspose1-3d and 0 for everything else.
        variant: "sn", "ssn", "bsn" or "bssn".
        scale: c, for "ssn" and "bssn": a float, a tensor of one element or a (learnable, shareable) Parameter.
        impl: "auto", "reference", "cpp" or "triton", see ``fastsn.backends``. The reference has torch's bits on
            contiguous float32 weights; the kernels sum in another order.

    A grouped convolution is measured as torch does: by the weight tensor as it is stored, (O, I / groups, ...).

    Returns:
        The same module.

    Raises:
        ValueError: no tensor ``name``, or a lazy or empty one, or one that torch's old hook makes;
            n_power_iterations < 1; unknown variant; a bad scale.
        IndexError: ``dim`` out of range.
        TypeError: a weight that is not floating point or complex, or that is a sharded DTensor.

    Example::

        >>> layer = fastsn.spectral_norm(nn.Conv2d(3, 64, 3), variant="bssn", scale=1.4)

    Source: Miyato et al., ICLR 2018 (SN); Lin, Sekar, Fanti, NeurIPS 2021 (SSN, BSN, BSSN).
    """
    checks.module(module, "module")
    weight = _tensor(module, name)
    checks.weight(weight, f"{type(module).__name__}.{name}")
    dim = views.output_dim(module) if dim is None else dim
    norm = SpectralNorm(
        weight,
        n_power_iterations,
        dim,
        eps,
        variant=variant,
        scale=scale,
        impl=impl,
        follows_autocast=follows_autocast(module, name),
    )
    unshare_class(module)
    # register_parametrization calls the norm once and raises if the dtype changes.
    with torch.autocast(weight.device.type if weight.device.type != "meta" else "cpu", enabled=False):
        parametrize.register_parametrization(module, name, norm)
    adapt(module, name)
    return module


def _tensor(module: nn.Module, name: str) -> Tensor:
    """The tensor to normalize. Raises or warns, with the remedy, if it is already normalized."""
    kind = type(module).__name__
    chains = list(module.values()) if isinstance(module, nn.ModuleDict) else [module]
    if chains and all(isinstance(chain, ParametrizationList | SpectralNorm) for chain in chains):
        raise ValueError(
            f"module must be a layer, got a {kind} that belongs to a norm, as model.modules() gives them too: "
            "call fastsn.convert(model, variant) for all layers of a model"
        )
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, TorchHook) and name in (hook.name, f"{hook.name}_orig"):
            raise ValueError(
                f"{kind}.{name} has a norm of torch.nn.utils.spectral_norm already: call fastsn.convert(module), which "
                "makes it fastsn's"
            )
    if any(site.tensor == name for site in sites_of(module, "", SPECTRAL_NORMS)):
        warnings.warn(
            f"{kind}.{name} has a spectral norm already, this one comes on top; fastsn.convert(module, variant) "
            "changes the one that is there",
            stacklevel=3,
        )
    weight = getattr(module, name, None) if isinstance(name, str) else None
    if not isinstance(weight, Tensor) or name in module.__dict__:
        hooked = ", a tensor that a hook makes" if isinstance(weight, Tensor) else ""
        raise ValueError(
            f"name must be a parameter or buffer of {kind}, got {name!r}{hooked}; it has "
            + (", ".join([n for n, _ in module.named_parameters(recurse=False)]) or "no parameters")
        )
    return weight


def unshare_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own. Copies of it share its class, and torch adds and deletes the
    properties of parametrized tensors there, which would affect them all."""
    if parametrize.is_parametrized(module):
        shared = type(module)
        module.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))


def chain_of(module: nn.Module, tensor: str) -> ParametrizationList:
    """The parametrizations of a parametrized tensor."""
    chain = module.get_submodule(f"parametrizations.{tensor}")
    assert isinstance(chain, ParametrizationList)
    return chain


def adapt(module: nn.Module, tensor: str) -> None:
    """Adapt a module to a SpectralNorm among the parametrizations of a tensor: warm-up of vectors that a checkpoint
    lacks, initialization in place, and fast access. Does nothing the second time."""
    chain = chain_of(module, tensor)
    if _load_post_hook not in chain._load_state_dict_post_hooks.values():
        chain.register_load_state_dict_post_hook(_load_post_hook)  # type: ignore[no-untyped-call]
    patch_initialization(module)
    install_fast_property(module, tensor)


def _load_post_hook(chain: Any, keys: Any) -> None:
    for position, part in enumerate(chain):
        if isinstance(part, SpectralNorm):
            part.warm_up_missing(partial(evaluate_chain, chain, position), keys.missing_keys)


def follows_autocast(module: nn.Module, name: str) -> bool:
    """Whether autocast casts this tensor at every access anyway, so that a norm may return it cast."""
    return name == "weight" and isinstance(module, nn.Linear | _ConvNd)
