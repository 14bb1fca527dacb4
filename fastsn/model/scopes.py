"""All weights of a model at once, for a block of code (``step``) or for each forward of the model (``fuse``)."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from fastsn import checks, plan, recomputation, weight_cache
from fastsn.model.sites import sites
from fastsn.norm import SpectralNorm
from fastsn.plan import Group
from fastsn.weight_cache import CachedWeights, CacheEntry

Module = TypeVar("Module", bound=nn.Module)


class step:
    """Normalize every weight of a model once for a block of code; all uses in the block get the same W̄.

    ::

        with fastsn.step(D):                       # one power iteration per layer
            loss = hinge(D(real), D(fake)) + penalty(D)
        loss.backward()
        with fastsn.step(D, advance=False):        # the generator's step: D's vectors stay as they are
            loss = -D(G(z)).mean()

    In training mode u and v are iterated once at the start; ``advance=False`` uses the iterated vectors without storing
    them. In evaluation mode the stored vectors are used. If a weight or scale changes inside the block, W̄ is computed
    again with the block's vectors (changes through ``.data`` and by fused optimizers are not detected: end the block
    before ``optimizer.step()``). All uses share one graph, so call ``backward`` once, or with ``retain_graph=True``. Of
    nested steps the innermost is used. An exception ends the step.

    Activation checkpointing: a region that backward recomputes inside the block uses the vectors of the step. For
    regions that are recomputed after the block see ``fastsn.recompute``.

    Threads: a step applies to the thread that entered it, and to threads that have entered none, such as those of
    ``DataParallel`` and of ``backward``.

    Raises:
        ValueError: a model without norms of fastsn; a weight on the meta device. No vector is changed.
        TypeError: ``advance`` is no bool; a sharded DTensor: enter the step where the weights are gathered. No vector
            is changed.
        RuntimeError: the same step object is entered twice.
    """

    def __init__(self, model: nn.Module, advance: bool = True) -> None:
        self._model, self._advance = model, checks.flag(advance, "advance")
        self._release: Callable[[], None] | None = None

    def __enter__(self) -> None:
        if self._release is not None:
            raise RuntimeError("a step can be entered once, got a second time: call fastsn.step(model) for each block")
        self._release = _open(self._model, self._advance, fused=False)

    def __exit__(self, *_: object) -> None:
        assert self._release is not None
        try:
            self._release()
        except KeyboardInterrupt:  # in the middle of it
            self._release()
            raise


def fuse(model: Module) -> Module:
    """Make each forward of the model normalize all of its weights in one call, as inside a ``step``.

    ::

        D = fastsn.fuse(fastsn.convert(D))         # the training loop stays as it is
        loss = hinge(D(real), D(fake))             # one power iteration per layer and forward

    In training mode u and v advance once per forward of the model, also those of layers that the forward uses several
    times or not at all. Layers that are called on their own normalize as before. Inside a ``step``, and inside the
    forward of a larger fused model, the weights of that are used. ``model.forward(x)`` bypasses hooks, as in torch.
    The class, the parameters and the state dict stay; copies, pickles and replicas are fused too; ``fold`` undoes it.

    Returns:
        The same model. A model that is fused already is left as it is.

    Raises:
        ValueError: a model without norms of fastsn.
        TypeError, from the forward: a sharded DTensor (fuse the parts that FSDP unshards as a whole).
    """
    checks.has_norms(sites(model), "model")
    if _enter not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_enter)
        model.register_forward_hook(_leave, always_call=True)
    return model


def unfuse(model: nn.Module) -> None:
    """Undo ``fuse`` for the model and all its modules, and drop their plans."""
    for module in model.modules():
        plan.forget(module)
        for hooks, ours in ((module._forward_pre_hooks, _enter), (module._forward_hooks, _leave)):
            for key in [key for key, hook in hooks.items() if hook is ours]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)


class _Forward(NamedTuple):
    """A running forward of a fused model, the function that ends it, and its stack frame (None while compiling)."""

    model: nn.Module
    release: Callable[[], None]
    call: FrameType | None


class _Entered(threading.local):
    """The running forwards of fused models in this thread, outermost first."""

    def __init__(self) -> None:
        self.stack: list[_Forward] = []


_entered = _Entered()


def _enter(model: nn.Module, _: Any) -> None:
    call = None
    if not torch.compiler.is_compiling():
        call = sys._getframe(1)
        if _entered.stack:
            _release_abandoned(call)
    _entered.stack.append(_Forward(model, _open(model, advance=True, fused=True), call))


def _release_abandoned(call: FrameType | None) -> None:
    """End forwards that were left by KeyboardInterrupt or the like, for which torch calls no hooks."""
    running = set()
    while call is not None:
        running.add(call)
        call = call.f_back
    for forward in reversed(_entered.stack):
        if forward.call is not None and forward.call not in running:
            forward.release()
    _entered.stack[:] = [forward for forward in _entered.stack if forward.call is None or forward.call in running]


def _leave(model: nn.Module, *_: Any) -> None:
    # Entries above that of this model belong to forwards whose hook was not called.
    stack = _entered.stack
    while any(forward.model is model for forward in stack):
        forward = stack[-1]
        forward.release()
        stack.pop()  # afterwards: what is interrupted in between, the next forward ends
        if forward.model is model:
            break


def _open(model: nn.Module, advance: bool, fused: bool) -> Callable[[], None]:
    """Normalize all weights of the model (for a ``fused`` forward: those not cached in this thread yet) and cache W̄ on
    their norms. Returns the function that ends the scope."""
    compiling = torch.compiler.is_compiling()
    region = None if compiling else recomputation.current_region()
    if region is not None and region.replaying is not None:
        return lambda: None  # each use takes its recorded vectors
    recomputing = not compiling and recomputation.in_backward()
    thread = None if compiling else threading.get_ident()
    opened: list[tuple[Sequence[SpectralNorm], list[CacheEntry]]] = []

    def release() -> None:
        for norms, cached in reversed(opened):
            for norm, own in zip(norms, cached, strict=False):
                if compiling:
                    norm.cached.pop()
                else:
                    try:
                        norm.cached.remove(own)
                    except ValueError:  # of a call that was interrupted
                        continue

    try:
        with recomputation.hide_from_checkpoint():  # includes parametrizations, which the recomputation may skip
            for group in plan.groups(model):
                for part in _uncached(group) if fused else [group]:
                    rounds = 0 if recomputing else part.rounds
                    for batch, norms in part.batches():
                        made, vectors = batch.normalize(rounds, advance and rounds > 0)
                        if not (fused or compiling):
                            batch.raise_on_second_backward(made)
                        weights = CachedWeights(batch, made, vectors, thread, not fused, compiling)
                        cached = weights.entries()
                        opened.append((norms, cached))
                        for norm, own in zip(norms, cached, strict=True):
                            norm.cached.append(own)
    except BaseException:
        release()
        raise
    return release


def _uncached(group: Group) -> list[Group]:
    """The parts of a group that a fused forward has to normalize: not those cached in this thread. Those in a step of
    another thread use its vectors, but need a graph of their own, as the other thread's backward frees its graph."""
    if not any(norm.cached for norm in group.norms):
        return [group]
    free = [i for i, norm in enumerate(group.norms) if not weight_cache.entered_in_this_thread(norm.cached)]
    steps = {i: weight_cache.step_vectors(group.norms[i].cached) for i in free}
    own = [i for i in free if steps[i] is None]
    found = {i: vectors for i, vectors in steps.items() if vectors is not None}
    return [part for part in (group.subset(own), group.subset(list(found), found)) if part.norms]
