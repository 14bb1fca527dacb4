"""torchmetrics and torch-fidelity, whose scores ours are compared with.

Both import torchvision, which fails where its wheel was built for another build of torch: it registers meta kernels for
operators that its library has not declared. Here they are declared; nothing calls them.
"""

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError as error:
    if "torchvision::nms does not exist" not in str(error):
        raise
    OPERATORS = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

__all__ = ["FrechetInceptionDistance", "InceptionScore", "isc_features_to_metric", "kid_features_to_metric"]
