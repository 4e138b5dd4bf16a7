"""RoIAlign in plain PyTorch.

Shapes: B images, C channels, h and w of the feature map, R regions of an image, P bins along an edge.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def roi_align(features_BChw: Tensor, boxes_BR4: Tensor, stride: float, bins: int, sampling_ratio: int = 2) -> Tensor:
    """Features of each region, [B, R, C, P, P], bilinear; gradient to the features only.

    The region's edge is cut into P bins, each the mean of `sampling_ratio`^2 points at regular places. Coordinates are
    aligned by half a pixel: feature (i, j) is the value at ((j + 1/2) * stride, (i + 1/2) * stride) of the picture.
    Points more than one feature outside of the map are 0, those nearer take the border's value, as in the published
    operator (He et al. 2017, section 3; `aligned=True` of detectron2 and torchvision, whose adaptive number of samples
    is not offered).
    """
    images, channels, height, width = features_BChw.shape
    regions, points = boxes_BR4.shape[1], bins * sampling_ratio
    x1, y1, x2, y2 = (boxes_BR4.detach().float() / stride).unbind(-1)
    place_P = (torch.arange(points, device=x1.device) + 0.5) / points
    x_BRP = x1[..., None] + place_P * (x2 - x1)[..., None]
    y_BRP = y1[..., None] + place_P * (y2 - y1)[..., None]
    # Without corner alignment, -1..1 are the map's outer edges: the half pixel is in the normalisation already.
    grid = torch.stack(
        torch.broadcast_tensors(2 * x_BRP[:, :, None] / width - 1, 2 * y_BRP[..., None] / height - 1), -1
    )
    grid = grid.reshape(images, regions * points, points, 2).to(features_BChw.dtype)
    sampled = F.grid_sample(features_BChw, grid, mode="bilinear", padding_mode="border", align_corners=False)
    sampled = sampled.view(images, channels, regions, points, points)
    inside_x = (x_BRP >= -0.5) & (x_BRP <= width + 0.5)
    inside_y = (y_BRP >= -0.5) & (y_BRP <= height + 0.5)
    inside = (inside_y[..., None] & inside_x[:, :, None])[:, None]
    sampled = torch.where(inside, sampled, 0.0).transpose(1, 2).flatten(0, 1)
    return F.avg_pool2d(sampled, sampling_ratio).view(images, regions, channels, bins, bins)
