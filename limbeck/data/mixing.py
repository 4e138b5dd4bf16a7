"""Mixing the samples of a batch: mixup, CutMix, any mask, with the labels and the teacher's outputs to match.

Shapes: B samples, C channels or classes, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from limbeck.errors import UserError


@dataclass(frozen=True)
class Mix:
    """How the rows of a batch are mixed: row b with row `partner[b]`, of which it keeps `share[b]`.

    partner int64 [B]; share [B] in 0..1 (the papers' lambda); mask bool [B,H,W] is true where a pixel is its
    own sample's, or `None` where whole images blend (mixup). With a mask, `share` is the mean of the mask.
    """

    partner: Tensor
    share: Tensor
    mask: Tensor | None = None

    def pixels(self, values: Tensor) -> Tensor:
        """Images [B,C,H,W] or class maps [B,H,W] (these need a mask), mixed; the same type and shape.

        Raises `TypeError` for integers without a mask: class numbers cannot blend.
        """
        if self.mask is not None:
            mask = self.mask if values.dim() == 3 else self.mask[:, None]
            return torch.where(mask, values, values[self.partner])
        if not values.is_floating_point():
            raise TypeError(f"Mixup blends floats, got {values.dtype}: class maps need a mask, as CutMix has.")
        return self._blend(values)

    def labels(self, labels: Tensor) -> Tensor:
        """share * labels + (1 - share) * labels[partner], for any float tensor [B,...]: soft labels, logits.

        Raises `TypeError` for integers: make class numbers one-hot before.
        """
        if not labels.is_floating_point():
            raise TypeError(f"Labels are mixed as floats [B,C], got {labels.dtype}: use one_hot(label, C).float().")
        return self._blend(labels)

    def _blend(self, values: Tensor) -> Tensor:
        share = self.share.to(values.dtype).view(-1, *[1] * (values.dim() - 1))
        return share * values + (1 - share) * values[self.partner]

    def only(self, mixed: Tensor) -> Mix:
        """The same, but the rows where `mixed` (bool [B]) is false stay as they are: partial mixing."""
        share = torch.where(mixed, self.share, 1.0)
        mask = None if self.mask is None else self.mask | ~mixed[:, None, None]
        return replace(self, share=share, mask=mask)


def mixup(
    batch_size: int,
    alpha: float,
    *,
    per_sample: bool = False,
    mix_fraction: float = 1.0,
    partner: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Mix:
    """A draw of mixup: share ~ Beta(alpha, alpha), one for the batch or one a sample; partner: `permutation`.

    Only `round(mix_fraction * B)` random rows are mixed, the others stay whole.
    Source: Zhang et al. 2018, section 2.
    """
    share = _beta(batch_size, alpha, per_sample, device)
    partner = permutation(batch_size, device=device) if partner is None else partner
    return _partial(Mix(partner, share), mix_fraction)


def cutmix(
    batch_size: int,
    height_width: tuple[int, int],
    alpha: float = 1.0,
    *,
    per_sample: bool = False,
    mix_fraction: float = 1.0,
    partner: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Mix:
    """A draw of CutMix: a box of about 1 - Beta(alpha, alpha) of the area comes from the partner.

    The box has the image's proportions, a uniform centre, and is clipped at the border; `share` is the true
    share of pixels outside of it. One box for the batch, or one a sample; `mix_fraction` as in `mixup`.
    Source: Yun et al. 2019, section 3.1.
    """
    height, width = height_width
    edge = (1 - _beta(batch_size, alpha, per_sample, device)).sqrt()
    centre = torch.rand(batch_size if per_sample else 1, 2, device=device).expand(batch_size, 2)
    inside_y = _inside(centre[:, 0], edge, height)
    inside_x = _inside(centre[:, 1], edge, width)
    partner = permutation(batch_size, device=device) if partner is None else partner
    return _partial(from_mask(~(inside_y[:, :, None] & inside_x[:, None, :]), partner), mix_fraction)


def mixup_or_cutmix(
    batch_size: int,
    height_width: tuple[int, int],
    *,
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    switch_probability: float = 0.5,
    partner: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Mix:
    """A draw of `cutmix` with `switch_probability`, else of `mixup`, for the whole batch.

    Source: the usual augmentation of ViT recipes (Touvron et al. 2021, table 9), whose settings are the defaults.
    """
    if float(torch.rand(())) < switch_probability:  # a number of the host: nothing waits for the device
        return cutmix(batch_size, height_width, cutmix_alpha, partner=partner, device=device)
    return mixup(batch_size, mixup_alpha, partner=partner, device=device)


def from_mask(mask: Tensor, partner: Tensor) -> Mix:
    """Any mask (bool [B,H,W], true where a pixel is its own sample's): regions, classes, objects."""
    return Mix(partner, mask.float().mean((1, 2)), mask)


def permutation(
    batch_size: int,
    *,
    group: Tensor | None = None,
    derange: bool = False,
    device: torch.device | str = "cpu",
) -> Tensor:
    """int64 [B]: a random permutation; given `group` (int64 [B]), one within each group of equal numbers.

    `derange=True` draws a random cycle through each group: no row meets itself, unless it is alone. FerKD's
    SelfMix is this with the images' `index` as group (Shen 2023).
    """
    group = torch.zeros(batch_size, dtype=torch.long, device=device) if group is None else group
    shuffled = torch.randperm(batch_size, device=group.device)
    shuffled = shuffled[group[shuffled].argsort(stable=True)]  # the groups one after another, each in random order
    if not derange:
        rows = group.argsort(stable=True)
        return torch.empty_like(rows).scatter_(0, rows, shuffled)
    sorted_group = group[shuffled].contiguous()
    place = torch.arange(batch_size, device=group.device)
    first = torch.searchsorted(sorted_group, sorted_group)
    end = torch.searchsorted(sorted_group, sorted_group, right=True)
    following = torch.where(place + 1 < end, place + 1, first)
    return torch.empty_like(shuffled).scatter_(0, shuffled, shuffled[following])


def _beta(batch_size: int, alpha: float, per_sample: bool, device: torch.device | str) -> Tensor:
    if alpha <= 0:
        raise UserError(f"alpha is {alpha}, expected more than 0 (leave mixing out instead of alpha=0).")
    concentration = torch.full((batch_size if per_sample else 1,), float(alpha), device=device)
    # validation would make the host wait for the device
    return torch.distributions.Beta(concentration, concentration, validate_args=False).sample().expand(batch_size)


def _inside(centre: Tensor, edge: Tensor, size: int) -> Tensor:
    """bool [B,size]: the pixels of a box with this centre and edge (fractions), clipped."""
    length = (edge * size).floor()
    start = (centre * size).floor() - (length / 2).floor()
    place = torch.arange(size, device=centre.device)
    return (place >= start[:, None]) & (place < (start + length)[:, None])


def _partial(mix: Mix, mix_fraction: float) -> Mix:
    if not 0 <= mix_fraction <= 1:
        raise UserError(f"mix_fraction is {mix_fraction}, expected 0..1.")
    size = len(mix.partner)
    mixed = torch.randperm(size, device=mix.partner.device) < round(mix_fraction * size)
    return mix if mix_fraction == 1 else mix.only(mixed)
