"""The rules of differentiation of the list ops, for devices whose kernels do not bring their own. What an iteration
gives is constant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsn import torch_private
from fastsn.ops import checks
from fastsn.ops.fallback import differentiable_backward
from fastsn.ops.schema import DTYPE_CODES, LIBRARY, rescale, rescale_backward

for _name in ("power_iteration", "power_iteration_"):
    LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]


# torch's own error for a graph that has been freed knows nothing of steps. csrc/register.cpp says the same.
FREED = (
    "backward has come to weights of fastsn a second time, and the first has freed their graph. All uses in a "
    "fastsn.step share one: call one backward for the sum of the losses, or leave the step out (fastsn.fuse(model) "
    "needs none), or give all backward calls but the last one retain_graph=True"
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor]) -> None:
    weights, scales, _, vectors, dims, view_masks, scale_index, scale_factor, _ = inputs
    bases = [w if place >= 0 else out for w, out, place in zip(weights, output[0], scale_index, strict=True)]
    ctx.save_for_backward(*bases, *scales, output[1], vectors)
    ctx.numbers = [dims, view_masks, scale_index, scale_factor, [DTYPE_CODES[w.dtype] for w in weights]]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradients: list[Tensor | None], grad_sigma: Tensor | None) -> tuple[Any, ...]:
    try:
        *saved, sigma, vectors = ctx.saved_tensors
    except RuntimeError as error:
        raise RuntimeError(FREED if "second time" in str(error) else str(error)) from error
    count = len(gradients)
    bases, scales = saved[:count], saved[count:]
    # A weight that was not used gets no gradient, rather than one of zeros.
    used = [i for i in range(count) if gradients[i] is not None or grad_sigma is not None]
    d_weights: list[Tensor | None] = [None] * count
    d_scales: list[Tensor | None] = [None] * len(scales)
    if used:
        given = [gradients[i] if gradients[i] is not None else torch.zeros_like(bases[i]) for i in used]
        if len(used) < count:  # nothing here may make a GPU wait, as an index that comes from a list does
            sizes = [checks.vector_size(b, *n) for b, *n in zip(bases, *ctx.numbers[:2], strict=True)]
            parts = torch.split(vectors, sizes)
            vectors = torch.cat([parts[i] for i in used])
            sigma = torch.cat([sigma[i : i + 1] for i in used])
            grad_sigma = None if grad_sigma is None else torch.cat([grad_sigma[i : i + 1] for i in used])
        found, d_scales = rescale_backward(
            given,
            grad_sigma,
            [bases[i] for i in used],
            scales,
            sigma,
            vectors,
            *([numbers[i] for i in used] for numbers in ctx.numbers),
        )
        for i, dw in zip(used, found, strict=True):
            d_weights[i] = dw
    return d_weights, d_scales, None, None, None, None, None, None, None


torch.library.register_autograd("fastsn::rescale", _backward, setup_context=_save, lib=LIBRARY)


def _rescale_backward_autograd(*arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
    if torch.is_grad_enabled():
        checks.check_backward(*arguments)
        return differentiable_backward(*arguments)
    with torch_private.below_autograd():
        return rescale_backward(*arguments)  # type: ignore[no-any-return]


LIBRARY.impl("rescale_backward", _rescale_backward_autograd, "Autograd")  # type: ignore[no-untyped-call]
for _key in ("Batched", "FuncTorchBatched"):  # is_grads_batched=True, and vmap over a backward
    LIBRARY.impl("rescale_backward", differentiable_backward, _key)  # type: ignore[no-untyped-call]


@torch.library.register_vmap("fastsn::rescale", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _rescale_vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    """Sample by sample: a batch of networks is a longer list."""

    def sample(x: Tensor, dim: int | None, i: int) -> Tensor:
        return x if dim is None else x.select(dim, i)

    results = []
    for i in range(info.batch_size):
        tensors = [[sample(x, d, i) for x, d in zip(arguments[j], in_dims[j], strict=True)] for j in (0, 1)]
        flat = [sample(arguments[j], in_dims[j], i) for j in (2, 3)]
        results.append(rescale(*tensors, *flat, *arguments[4:]))
    outputs = [torch.stack(same) for same in zip(*(outputs for outputs, _ in results), strict=True)]
    return (outputs, torch.stack([mean for _, mean in results])), ([0] * len(outputs), 0)
