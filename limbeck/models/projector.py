"""Projection heads of contrastive methods.

Shapes: B rows, D width of the features, H hidden width, P width of the projection.
"""

from __future__ import annotations

from torch import Tensor, nn

from limbeck.errors import UserError


class Projector(nn.Module):
    """`layers` linear layers without bias, each with BatchNorm, with ReLU after all but the last: [B,D] to [B,P].

    The last BatchNorm has a scale and no shift. Weights start as N(0, 0.01), as in the official code of SimCLRv2.
    `first(n)` is the beginning of it, on which a fine-tuned classifier is built.

    Source: Chen et al. 2020 (SimCLRv2), section 2; google-research/simclr, `model_util.py`.
    """

    def __init__(self, width: int, *, hidden: int | None = None, out: int = 128, layers: int = 3) -> None:
        super().__init__()
        if layers < 1:
            raise UserError(f"a projector has {layers} layers; it has 1 or more")
        hidden = hidden or width
        self.widths = [width, *[hidden] * (layers - 1), out]
        self.layers = nn.ModuleList()
        for number, (a, b) in enumerate(zip(self.widths[:-1], self.widths[1:], strict=True)):
            linear, norm = nn.Linear(a, b, bias=False), nn.BatchNorm1d(b)
            nn.init.normal_(linear.weight, std=0.01)
            last = number == layers - 1
            if last:
                norm.bias.requires_grad_(False)  # it stays at zero
            self.layers.append(nn.Sequential(linear, norm, *([] if last else [nn.ReLU()])))

    def first(self, layers: int) -> nn.Sequential:
        """The first `layers` layers (the same modules, not copies); none of them passes features through."""
        return nn.Sequential(*self.layers[:layers])

    def forward(self, features_BD: Tensor) -> Tensor:
        return self.first(len(self.layers))(features_BD)
