"""Errors for exports that cannot work."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsn import torch_private
from fastsn.backends import chosen


def refuse_onnx(weight: Tensor, impl: str, training: bool) -> None:
    """During an export to ONNX, raise RuntimeError unless it can succeed: only the reference in evaluation mode can,
    and not by way of TorchScript. The exporter's own error names missing operators, but no remedy."""
    if _in_onnx_export():
        traced = torch_private.tracing_state() is not None
        if traced or training or chosen(impl, weight) != "reference":
            raise RuntimeError(
                "ONNX has no operators for spectral norms: call fastsn.fold(model) before torch.onnx.export (on a "
                "copy.deepcopy of a model that is to be trained on)"
            )


@torch_private.constant_in_graphs  # Dynamo replaces torch's function by False; this wrapper runs during tracing
def _in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()
