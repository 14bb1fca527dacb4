"""What exporters are told of models that they cannot take."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsn import torch_private
from fastsn.backends import chosen


def refuse_onnx(weight: Tensor, impl: str, training: bool) -> None:
    """Inside of an export to ONNX, raise RuntimeError unless it can succeed: that of the reference in evaluation, and
    not by way of TorchScript. What the exporters themselves say of operators that ONNX lacks does not help."""
    if _in_onnx_export():
        traced = torch_private.tracing_state() is not None
        if traced or training or chosen(impl, weight) != "reference":
            raise RuntimeError(
                "ONNX has no operators for spectral norms: call fastsn.fold(model) before torch.onnx.export (on a "
                "copy.deepcopy of a model that is to be trained on)"
            )


@torch_private.constant_in_graphs  # Dynamo takes torch's function for False; ours is called while it traces
def _in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()
