"""Batches whose crops, flips and CutMix boxes are drawn once and replayed exactly, and what storing them costs.

Shapes: N pictures, E epochs, M batches of an epoch, B rows of a batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.data.mixing import Mix, cutmix, from_mask
from limbeck.data.samples import Samples
from limbeck.data.views import MultiCrop
from limbeck.errors import UserError

PADDING = -1  # the picture in rows that a short last batch doesn't have


@dataclass(frozen=True)
class Replay:
    """How N pictures are presented in E epochs of M batches each; batch m of epoch e is row e M + m.

    Attributes:
        picture: int64 [E M, B], the picture in each row, -1 behind the end of a short batch.
        box, flip: float32 [E M, B, 4] and bool [E M, B], the crop of each row as `MultiCrop` draws it.
        partner: int64 [E M, B], the row that is mixed in.
        cut: int16 [E M, 4], top, bottom, left, right of the batch's CutMix box in pixels; equal ones: nothing is mixed.
    """

    picture: Tensor
    box: Tensor
    flip: Tensor
    partner: Tensor
    cut: Tensor

    def __len__(self) -> int:
        return len(self.picture)

    def columns(self) -> dict[str, Tensor]:
        """All tensors by name, to store them; `Replay(**columns)` is the same again."""
        return dict(vars(self))

    def samples(self, **columns: Tensor) -> Samples:
        """One sample a batch, in order, with further columns such as the labels of its rows."""
        return Samples({**self.columns(), **columns})

    def batches(self, pictures: Tensor) -> Iterator[Tensor]:
        """The mixed pictures of every batch, [rows, C, H, W] in [0, 1]."""
        for number in range(len(self)):
            rows = int((self.picture[number] != PADDING).sum())
            yield present(pictures, {name: column[number] for name, column in self.columns().items()}, rows)


def draw_replay(
    pictures: int,
    height_width: tuple[int, int],
    *,
    epochs: int,
    batch_size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    cutmix_alpha: float | None = 1.0,
    seed: int = 42,
) -> Replay:
    """Draw all presentations: a permutation an epoch, a random-resized crop and flip a row, one CutMix box a batch.

    Raises:
        UserError: the last batch would have fewer than 4 rows, which cannot be halved for batch statistics.
    """
    if 0 < pictures % batch_size < 4 or batch_size < 4:
        raise UserError(
            f"{pictures} pictures in batches of {batch_size} leave a batch of {pictures % batch_size or batch_size}, "
            "which has no two halves with statistics of their own; change the batch size"
        )
    view, rows = MultiCrop(crops=1, scale=scale), torch.empty(batch_size, 1, *height_width)
    found: dict[str, list[Tensor]] = {name: [] for name in ("picture", "box", "flip", "partner", "cut")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(epochs):
            for part in torch.randperm(pictures).split(batch_size):
                crop = view.draw(rows[: len(part)])
                mix = (
                    cutmix(len(part), height_width, cutmix_alpha) if cutmix_alpha else _nothing(len(part), height_width)
                )
                missing = batch_size - len(part)
                found["picture"].append(torch.nn.functional.pad(part, (0, missing), value=PADDING))
                found["box"].append(torch.nn.functional.pad(crop["box"][:, 0], (0, 0, 0, missing)))
                found["flip"].append(torch.nn.functional.pad(crop["flip"][:, 0], (0, missing)))
                found["partner"].append(torch.nn.functional.pad(mix.partner, (0, missing)))
                found["cut"].append(_corners(mix))
    return Replay(**{name: torch.stack(parts) for name, parts in found.items()})


def present(pictures: Tensor, batch: Mapping[str, Tensor], rows: int) -> Tensor:
    """One stored batch of pictures [N,C,H,W] (uint8 or float in [0,1]): cropped, flipped, mixed, [rows, C, H, W].

    `batch` holds one row of each of `Replay`'s columns, `rows` how many it has without padding.
    """
    images = pictures[batch["picture"][:rows]]
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    crop = {"box": batch["box"][:rows, None], "flip": batch["flip"][:rows, None]}
    images = MultiCrop(crops=1).apply(images, crop)[:, 0]
    top, bottom, left, right = batch["cut"].long()
    y = torch.arange(images.shape[-2], device=images.device)[:, None]
    x = torch.arange(images.shape[-1], device=images.device)
    cut_HW = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    return from_mask(~cut_HW.expand(rows, -1, -1), batch["partner"][:rows]).pixels(images)


def stored_bytes(columns: Mapping[str, Tensor] | Iterable[Tensor]) -> int:
    """What tensors take as they are stored, in bytes."""
    tensors = columns.values() if isinstance(columns, Mapping) else columns
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def soft_label_bytes(epochs: int, pictures: int, classes: int, *, bytes_each: int = 2) -> int:
    """Bytes of a soft label for every picture in every epoch (float16 by default), without the augmentations."""
    return epochs * pictures * classes * bytes_each


def _nothing(rows: int, height_width: tuple[int, int]) -> Mix:
    return from_mask(torch.ones(rows, *height_width, dtype=torch.bool), torch.arange(rows))


def _corners(mix: Mix) -> Tensor:
    """int16 [4]: top, bottom, left, right of the one box that a batch's rows share."""
    assert mix.mask is not None
    inside_HW = ~mix.mask[0]
    if not inside_HW.any():
        return torch.zeros(4, dtype=torch.int16)
    ends = [
        place for axis in (1, 0) for place in (inside_HW.any(axis).nonzero().flatten()[[0, -1]] + torch.tensor([0, 1]))
    ]
    return torch.stack(ends).to(torch.int16)
