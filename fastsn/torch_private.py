"""All private functions of torch that fastsn calls, each with the reason. Tested with torch 2.11 and 2.13;
``make matrix`` tests other versions.

Some are aliases and not wrappers, as they run at every access to a weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules import module as modules
from torch.nn.utils import parametrize

# The id of the backward that this thread runs, else -1. A forward inside a backward is the recomputation of a
# checkpointed region. torch.utils.checkpoint uses the same function.
backward_id = torch._C._current_graph_task_id

# Whether autocast is enabled for any device type: much cheaper than the question for one device type.
any_autocast = torch._C._is_any_autocast_enabled

# Whether the running backward retains its graph, for the error of a second backward.
retains_graph = torch._C._autograd._get_current_graph_task_keep_graph

# Not None during TorchScript tracing, for an error in exports to ONNX.
tracing_state = torch._C._get_tracing_state

# Kernels registered for autograd keys call their own op below autograd, to avoid infinite recursion.
below_autograd = torch._C._AutoDispatchBelowAutograd

# Disables forward-mode differentiation, which no_grad does not: derivatives treat an iteration as constant.
forward_mode = forward_ad._set_fwd_grad_enabled

# Number of active TorchDispatchModes, which have to see the public ops and not the fused private one.
dispatch_modes = torch._C._len_torch_dispatch_stack

# vmap has no batching rule for out=, which captured buffers need in other transforms.
is_batched = torch._C._functorch.is_batchedtensor


def has_hooks(own: dict[str, Any]) -> bool:
    """Whether the module with this ``__dict__``, or torch globally, has hooks. If not, calling its forward directly is
    equivalent."""
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or modules._global_forward_hooks
        or modules._global_forward_pre_hooks
        or modules._global_backward_hooks
        or modules._global_backward_pre_hooks
    )


def transforms_active() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is active; kernels support neither."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def has_saved_tensors_hooks() -> bool:
    """Whether saved-tensors hooks are active, as in checkpoints with ``use_reentrant=False``."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def in_nonreentrant_recomputation() -> bool:
    """Whether a checkpoint with ``use_reentrant=False`` recomputes its region, only to collect its saved tensors."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and "_recomputation_hook" in getattr(hooks[0], "__qualname__", "")


def parametrizations_are_cached() -> bool:
    """Whether ``parametrize.cached()`` is active, which returns one tensor, of one dtype, for all accesses."""
    return bool(getattr(parametrize, "_cache_enabled", 0))


def is_sharded(value: Tensor) -> bool:
    """Whether this is a DTensor. No isinstance, as importing the class takes a second."""
    return hasattr(value, "_local_tensor")


def constant_in_graphs(function: Any) -> Any:
    """Decorator: Dynamo runs the function while tracing and takes its result as a constant. The same as
    torch.compiler.assume_constant_result, which imports all of Dynamo."""
    function._dynamo_marked_constant = True
    return function
