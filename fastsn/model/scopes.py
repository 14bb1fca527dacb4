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
from fastsn.weight_cache import Cached, CachedWeights

Module = TypeVar("Module", bound=nn.Module)


class step:
    """Normalize every weight once for the whole block; each use in it is served the same W̄.

    ::

        with fastsn.step(D):                       # one power iteration per layer
            loss = hinge(D(real), D(fake)) + penalty(D)
        loss.backward()
        with fastsn.step(D, advance=False):        # the generator's step: D's vectors stay as they are
            loss = -D(G(z)).mean()

    In training mode u and v are iterated once at the start; ``advance=False`` uses the iterated vectors without storing
    them. In evaluation mode the stored vectors are used. A weight or scale that changes inside the block is normalized
    anew with the block's vectors (changes through ``.data`` and by torch's fused optimizers are not seen: end the block
    before ``optimizer.step()``). All uses share one graph, so call ``backward`` once (or keep the graph). Of nested
    steps the inner one counts; one that an exception leaves has ended.

    Activation checkpointing: in a backward no norm iterates. A region that backward runs again gets the vectors of the
    step that it runs in, outside of any step the stored ones. With the backward inside the block these are those of its
    forward; after it, only if ``advance`` is True and no other forward or step has come between. Otherwise pass
    ``context_fn=fastsn.recompute``.

    Threads: a step counts in the thread that has opened it, and in those that have opened none, as the threads of
    ``DataParallel`` and of ``backward``.

    Raises:
        ValueError: a model without norms of fastsn; a weight on the meta device. No vector has moved.
        TypeError: ``advance`` is no bool; a sharded DTensor: open the step where the weights are whole. No vector has
            moved.
        RuntimeError: a step that is entered a second time. The first is as it was.
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
    """From now on each forward of the model normalizes all of its weights in one call, as inside a ``step``.

    ::

        D = fastsn.fuse(fastsn.convert(D))         # the training loop stays as it is
        loss = hinge(D(real), D(fake))             # one power iteration per layer and forward

    In training mode u and v advance once per forward of the model, also those of layers that the forward uses several
    times or not at all. Layers that are called on their own normalize as before. Inside a ``step``, and inside the
    forward of a larger fused model, all is served from there. ``model.forward(x)`` passes the hooks by, as in torch.
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


def separate(model: nn.Module) -> None:
    """Take back ``fuse``, of the model and of all in it, and forget what was found for steps."""
    for module in model.modules():
        plan.forget(module)
        for hooks, ours in ((module._forward_pre_hooks, _enter), (module._forward_hooks, _leave)):
            for key in [key for key, hook in hooks.items() if hook is ours]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)


class _Forward(NamedTuple):
    """A forward of a fused model, what ends it, and the call that it is in (None in a graph)."""

    model: nn.Module
    release: Callable[[], None]
    call: FrameType | None


class _Entered(threading.local):
    """The forwards of fused models that this thread is in."""

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
    """End what KeyboardInterrupt and its like have left: torch calls no hook then."""
    running = set()
    while call is not None:
        running.add(call)
        call = call.f_back
    for forward in reversed(_entered.stack):
        if forward.call is not None and forward.call not in running:
            forward.release()
    _entered.stack[:] = [forward for forward in _entered.stack if forward.call is None or forward.call in running]


def _leave(model: nn.Module, *_: Any) -> None:
    # What lies above was entered by forwards that never came to their end.
    stack = _entered.stack
    while any(forward.model is model for forward in stack):
        forward = stack[-1]
        forward.release()
        stack.pop()  # afterwards: what is interrupted in between, the next forward ends
        if forward.model is model:
            break


def _open(model: nn.Module, advance: bool, fused: bool) -> Callable[[], None]:
    """One call for all weights; for a ``fused`` forward, for those that this thread does not hold already. Returns what
    ends it."""
    compiling = torch.compiler.is_compiling()
    region = None if compiling else recomputation.region()
    if region is not None and region.replaying is not None:
        return _nothing  # the vectors of each use are known
    runs_again = not compiling and recomputation.in_backward()
    thread = None if compiling else threading.get_ident()
    opened: list[tuple[Sequence[SpectralNorm], list[Cached]]] = []

    def release() -> None:
        for norms, cached in reversed(opened):
            for norm, own in zip(norms, cached, strict=False):
                if compiling:
                    norm.cached.pop()
                elif own in norm.cached:  # not of a call that was interrupted
                    norm.cached.remove(own)

    try:
        with recomputation.unseen_by_checkpoints():  # also what makes the weights, which is not run again each time
            for group in plan.groups(model):
                for part in _parts(group) if fused else [group]:
                    rounds = 0 if runs_again else part.rounds
                    for batch, norms in part.batches():
                        made, vectors = batch.normalize(rounds, advance and rounds > 0)
                        if not (fused or compiling):
                            batch.explain_freed_graphs(made)
                        weights = CachedWeights(batch, made, vectors, thread, not fused, compiling)
                        cached = [(weights, i) for i in range(len(made))]
                        opened.append((norms, cached))
                        for norm, own in zip(norms, cached, strict=True):
                            norm.cached.append(own)
    except BaseException:
        release()
        raise
    return release


def _nothing() -> None:
    pass


def _parts(group: Group) -> list[Group]:
    """Of a group, what a fused forward has to normalize: not what this thread has in a step already; with the vectors
    of another thread's step, but not its graph, which that thread's backward frees; the rest as it is."""
    if not any(norm.cached for norm in group.norms):
        return [group]
    free = [i for i, norm in enumerate(group.norms) if not weight_cache.of_this_thread(norm.cached)]
    steps = {i: weight_cache.of_a_step(group.norms[i].cached) for i in free}
    own = [i for i in free if steps[i] is None]
    found = {i: vectors for i, vectors in steps.items() if vectors is not None}
    return [part for part in (group.some(own), group.some(list(found), found)) if part.norms]
