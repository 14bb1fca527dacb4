"""What fastsn asks of torch for which there is no public function, each with its reason. Tried on torch 2.10 to 2.14.

Functions are torch's own, under a name that says what they answer: each is asked at every use of a weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules
from torch.nn.utils import parametrize

# The number of the backward that this thread runs, -1 outside: a forward in there is that of a checkpointed region,
# run again. torch.utils.checkpoint asks the same.
backward_id = torch._C._current_graph_task_id

# Whether autocast is on for any type of device: a third of a read of W̄ would be the question for the weight's own.
any_autocast = torch._C._is_any_autocast_enabled

# Whether the graph of the backward that runs is kept, for an error that says how to keep it.
retains_graph = torch._C._autograd._get_current_graph_task_keep_graph

# Not None while TorchScript traces, for an error of the export to ONNX.
tracing_state = torch._C._get_tracing_state

# Kernels of autograd keys that call their own op must not come back to themselves.
below_autograd = torch._C._AutoDispatchBelowAutograd

# forward_ad.unpack_dual and make_dual do not turn forward mode off, as torch.no_grad does not: an iteration is constant
# to every derivative.
forward_mode = forward_ad._set_fwd_grad_enabled

# How many modes see the ops that are called: they are to see those of the schema.
dispatch_modes = torch._C._len_torch_dispatch_stack

# vmap has no rule for out=, which captured buffers need inside of other transforms.
is_batched = torch._C._functorch.is_batchedtensor


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does anything but its forward. Without hooks a call takes as long as a read of W̄."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or modules._global_forward_hooks
        or modules._global_forward_pre_hooks
        or modules._global_backward_hooks
        or modules._global_backward_pre_hooks
    )


def transforms_active() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is running, which see into no kernel."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def has_saved_tensors_hooks() -> bool:
    """Whether somebody sees the tensors that are saved for backward here, as checkpoints do that are not reentrant."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def in_nonreentrant_recomputation() -> bool:
    """Whether a checkpoint that is not reentrant runs its region again, only to see what is saved in it."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and "_recomputation_hook" in getattr(hooks[0], "__qualname__", "")


def parametrizations_are_cached() -> bool:
    """Whether this is inside ``parametrize.cached()``, which serves one dtype to every reader."""
    return bool(getattr(parametrize, "_cache_enabled", 0))


def is_sharded(value: Tensor) -> bool:
    """Whether this is a DTensor, whose class takes a second to import."""
    return hasattr(value, "_local_tensor")


def constant_in_graphs(function: Any) -> Any:
    """Dynamo calls the function while it traces, and takes the answer. So does torch.compiler.assume_constant_result,
    but by importing all of Dynamo."""
    function._dynamo_marked_constant = True
    return function
