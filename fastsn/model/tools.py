"""Functions on all normalized weights of a model: measure (sigmas), warm_up, advance, fold."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from fastsn import checks, normalize, reference, views
from fastsn.layers import NormalizedLayer, load_post_hook
from fastsn.model import scopes
from fastsn.model.sites import Site, evaluate_chain, weights
from fastsn.parametrize import unshare_class
from fastsn.reference import Vectors
from fastsn.stored_vectors import WARM_UP_ITERATIONS

Module = TypeVar("Module", bound=nn.Module)


class Sigmas(NamedTuple):
    """Of one weight: sigma, which divides it, and the spectral norms of both reshapes."""

    sigma: float
    sigma_out: float
    sigma_in: float


@torch.no_grad()
def sigmas(model: nn.Module) -> dict[str, Sigmas]:
    r"""Every layer's spectral norms, :math:`u^H M v` with the stored vectors, which are not updated.

    Returns:
        {layer name: (sigma, sigma_out, sigma_in)}: sigma is what the weight is divided by; sigma_out is the norm of
        the cout x (cin·k·k) reshape, sigma_in of the cin x (cout·k·k) reshape. A reshape that the variant does not
        track ("sn", "ssn": `in`) is measured by 30 power iterations from a fixed start, which gives a lower
        bound. Tensors other than ``weight`` are named ``layer.tensor``, several norms on one tensor
        ``layer.0``, ``layer.1``. A model without fastsn layers gives an empty dict.

    Synchronizes with the device once. Raises ValueError for weights on the meta device.
    """
    found = weights(model)
    measured = [_measure(site, weight) for site, weight in found]
    rows = torch.stack([m.to(measured[0].device) for m in measured]).tolist() if measured else []
    return {site.name: Sigmas(*row) for (site, _), row in zip(found, rows, strict=True)}


def _measure(site: Site, weight: Tensor) -> Tensor:
    """(sigma, sigma_out, sigma_in)."""
    if weight.ndim == 1:
        norm: Tensor = torch.linalg.vector_norm(weight.to(reference.wide(weight.dtype)))
        return norm.expand(3)
    tracked, oik = site.norm.measure(weight), views.as_oik(weight, site.norm.dim)
    if oik.shape[2] == 1:  # both reshapes are one matrix, but for a transposition
        norms = [*tracked.values()] * 2
    else:
        norms = [tracked[view] if view in tracked else _measure_untracked(oik, view) for view in views.VIEWS]
    return torch.stack([torch.real(x) for x in (reference.mean_sigma(tracked), *norms)])


def _measure_untracked(oik: Tensor, view: str, iterations: int = 30) -> Tensor:
    """sigma of a view without stored vectors, iterated from a fixed start: a lower bound."""
    draw = torch.Generator("cpu").manual_seed(0)
    start = [torch.randn(n, generator=draw, device="cpu").to(oik.device) for n in views.vector_sizes(oik, view)]
    vectors: list[Vectors] = [{view: (start[0], start[1])}]
    with normalize.no_autocast(oik):
        return reference.sigmas([oik], reference.power_iteration([oik], vectors, iterations))[0][view]


@torch.no_grad()
def warm_up(model: Module, iterations: int = WARM_UP_ITERATIONS) -> Module:
    """Run ``iterations`` power iterations on u and v of every layer and store them, in any mode.

    For weights that did not come from training with these vectors: loaded without them, re-initialized, averaged,
    materialized from meta. Vectors that are unusable (non-finite, far from length 1) are redrawn first. Set a tensor
    ``scale`` that was on meta yourself, like the weights.

    Returns:
        The same model.

    Raises:
        ValueError: ``iterations`` < 1, a model without norms of fastsn, or a weight on the meta device.
    """
    iterations, found = checks.count(iterations, "iterations"), weights(model, vectors_too=False)
    checks.has_norms(found, "model")
    for site, _ in found:
        site.norm.warm_up(site.weight(), iterations)  # computed anew: it depends on preceding norms of the same tensor
    return model


@torch.no_grad()
def advance(model: Module, rounds: int = 1) -> Module:
    """Run ``rounds`` power iterations of every layer with its current weight and store u and v, in any mode.

    All layers in one call, and without waiting for the device: for training loops that store the vectors once after
    each optimizer step (Lin et al. 2021), their forwards in ``step(model, advance=False)``. Vectors that do not belong
    to the weight at all need ``warm_up``.

    Returns:
        The same model.

    Raises:
        ValueError: ``rounds`` < 1, a model without norms of fastsn, or a weight on the meta device.
    """
    rounds, found = checks.count(rounds, "rounds"), weights(model)
    checks.has_norms(found, "model")
    for depth in sorted({site.depth for site, _ in found}):
        # The input of a norm with preceding norms is computed anew, now that those have been updated.
        here = [(s.norm, s.weight() if depth else w) for s, w in found if s.depth == depth and s.norm.views]
        specs = [norm.spec(w)._replace(scale=1.0, dtype=w.dtype) for norm, w in here]
        for batch, _ in normalize.batches(specs):
            batch.iterate(rounds)
    return model


@torch.no_grad()
def fold(model: Module) -> Module:
    """Replace every weight by its W̄, in place: layers become plain torch layers, parametrizations are removed.

    Folded weights and outputs equal those of evaluation mode bit for bit, with one exception: under ``no_grad`` W̄ does
    not require grad but a folded Parameter does, and for weights that do, torch sums a Linear on a non-contiguous input
    of three or more dimensions in another order. ``fold(model).requires_grad_(False)`` has the bits of ``no_grad``.

    Weights get new Parameter objects, so weights tied to them keep their values and optimizers must be made anew;
    ``copy.deepcopy`` first to keep training.

    Returns:
        The same model (the same object even if it is itself a layer).

    Raises:
        TypeError: a user's subclass of a fastsn layer, which has no plain counterpart. The model is unchanged.
        ValueError: a model without norms of fastsn; a weight on the meta device. The model is unchanged.
    """
    found = [site for site, _ in weights(model)]
    checks.has_norms(found, "model")
    for site in found:
        if isinstance(site.owner, NormalizedLayer) and "variant" not in type(site.owner).__dict__:
            raise TypeError(f"model has {type(site.owner).__name__} at {site.name!r}, a subclass that cannot be folded")
    for owner, tensor in dict.fromkeys((site.owner, site.tensor) for site in found):
        if isinstance(owner, NormalizedLayer):
            _fold_layer(owner)
        else:
            _fold_parametrization(owner, tensor)
    scopes.unfuse(model)
    return model


def _fold_layer(layer: NormalizedLayer) -> None:
    norm = layer.spectral_norm
    weight, bias = norm.evaluate(layer.weight), getattr(layer, "bias", None)
    if layer.scale_bias and bias is not None:
        layer.bias = nn.Parameter(norm.scaled(bias), requires_grad=bias.requires_grad)
    layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    hooks = layer._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is load_post_hook]:
        del hooks[key]
    del layer.spectral_norm, layer.scale_bias
    layer.__class__ = layer.plain  # type: ignore[assignment]


def _fold_parametrization(module: nn.Module, tensor: str) -> None:
    chain: ParametrizationList = module.parametrizations[tensor]  # type: ignore[assignment, index]
    value, originals = evaluate_chain(chain, use_cache=False).clone(), list(chain.parameters(recurse=False))
    unshare_class(module)
    # Restore the original Parameter first, so that weights tied to it keep their values.
    parametrize.remove_parametrizations(module, tensor, leave_parametrized=not chain.is_tensor)
    delattr(module, tensor)
    if originals:
        module.register_parameter(tensor, nn.Parameter(value, any(p.requires_grad for p in originals)))
    else:
        module.register_buffer(tensor, value)
