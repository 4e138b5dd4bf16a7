"""Geometric views that carry boxes along, and boxes moved from one view to another by the views' matrices.

Shapes: B samples, C channels, H height, W width, M boxes of a sample (padded). Boxes are (x1, y1, x2, y2) in pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.data.views import VIEWS, Params
from limbeck.errors import UserError, require_share


class Affine:
    """A random flip, zoom, rotation, shear and shift of the picture, as one 3x3 matrix a sample.

    Left and right change places with probability `flip`; sizes change by a factor drawn log-uniformly from `scale`;
    the picture turns by up to `rotate` degrees, shears by up to `shear` degrees in both directions, and shifts by up to
    `translate` of its edges, all around its centre, on a canvas that stays as large as it is. What comes in from
    outside has the colour `fill`. Bilinear. `params["matrix"]` maps pixel coordinates of the original to those of the
    view: recorded for two views of a sample, `between` gives the matrix from one to the other.

    Source: weak (flip, zoom) and strong (shift, turn, shear) geometry of Soft Teacher (Xu et al. 2021).
    """

    def __init__(
        self,
        flip: float = 0.5,
        scale: tuple[float, float] = (1.0, 1.0),
        translate: float = 0.0,
        rotate: float = 0.0,
        shear: float = 0.0,
        fill: float = 0.5,
    ) -> None:
        require_share(flip=flip, translate=translate, fill=fill)
        if not 0 < scale[0] <= scale[1]:
            raise UserError(f"scale is {list(scale)}, expected two positive factors in rising order.")
        if not 0 <= shear < 90 or rotate < 0:
            raise UserError(f"Got rotate={rotate} and shear={shear}, expected degrees of at least 0, shear below 90.")
        self.flip, self.scale, self.translate = flip, (scale[0], scale[1]), translate
        self.rotate, self.shear, self.fill = rotate, shear, fill

    def draw(self, images: Tensor) -> Params:
        """`matrix` [B,3,3], from pixel coordinates of the images to those of the view."""
        rows, device = len(images), images.device
        height, width = images.shape[-2:]

        def even(limit: float) -> Tensor:
            return (2 * torch.rand(rows, device=device) - 1) * limit

        low, high = torch.tensor(self.scale, device=device).log()
        factor = (low + torch.rand(rows, device=device) * (high - low)).exp()
        mirror = torch.where(torch.rand(rows, device=device) < self.flip, -1.0, 1.0)
        angle, shear_x, shear_y = (even(limit).deg2rad() for limit in (self.rotate, self.shear, self.shear))
        shift_x, shift_y = even(self.translate) * width, even(self.translate) * height
        cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(factor), torch.ones_like(factor)
        turn = _matrix([[cos, -sin, shift_x + width / 2], [sin, cos, shift_y + height / 2], [zero, zero, one]])
        skew = _matrix([[one, shear_x.tan(), zero], [shear_y.tan(), one, zero], [zero, zero, one]])
        size = _matrix([[factor * mirror, zero, zero], [zero, factor, zero], [zero, zero, one]])
        centre = _matrix([[one, zero, zero - width / 2], [zero, one, zero - height / 2], [zero, zero, one]])
        return {"matrix": turn @ skew @ size @ centre}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """[B,C,H,W] to [B,C,H,W]."""
        height, width = images.shape[-2:]
        edges = torch.tensor([[2 / width, 0, -1], [0, 2 / height, -1], [0, 0, 1]], device=images.device)
        backwards = edges @ params["matrix"].inverse() @ edges.inverse()
        grid = F.affine_grid(backwards[:, :2], list(images.shape), align_corners=False)
        # grid_sample brings in zeros from outside: shifted, they are the fill colour
        return F.grid_sample(images - self.fill, grid, align_corners=False) + self.fill

    def apply_boxes(self, boxes: Tensor, params: Params, height: int, width: int) -> Tensor:
        """[B,M,4] to [B,M,4]: see `warp_boxes`."""
        return warp_boxes(boxes, params["matrix"], height, width)

    def __call__(self, images: Tensor) -> Tensor:
        return self.apply(images, self.draw(images))


def warp_boxes(boxes_BM4: Tensor, matrix_B33: Tensor, height: int, width: int) -> Tensor:
    """Boxes [B,M,4] under a matrix a sample: the upright hull of the four moved corners, clipped to the picture.

    Exact for flips, zooms and shifts; under a rotation or a shear the hull is larger than the object. A box that leaves
    the picture has no area.
    """
    x1, y1, x2, y2 = boxes_BM4.unbind(-1)
    corners = torch.stack([torch.stack([x1, x2, x2, x1], -1), torch.stack([y1, y1, y2, y2], -1)], -1)
    moved = corners @ matrix_B33[:, None, :2, :2].mT + matrix_B33[:, None, None, :2, 2]
    low, high = moved.amin(2), moved.amax(2)
    edges = moved.new_tensor([width, height])
    return torch.cat([low.clamp(min=0).minimum(edges), high.clamp(min=0).minimum(edges)], -1)


def between(first_B33: Tensor, second_B33: Tensor) -> Tensor:
    """The matrix [B,3,3] that takes pixel coordinates of the first view to those of the second."""
    return second_B33 @ first_B33.inverse()


def _matrix(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


VIEWS["affine"] = Affine
