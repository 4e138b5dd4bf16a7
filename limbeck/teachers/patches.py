"""Crops of real pictures that a teacher judges: realistic ones to start a synthetic picture from.

Shapes: K crops of a picture, C channels, S edge of a picture, I pictures of a class.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.data import MultiCrop, Samples
from limbeck.errors import UserError
from limbeck.teachers.teacher import Teacher


def realistic_patches(
    teacher: Teacher,
    samples: Samples,
    *,
    per_class: int,
    crops: int = 5,
    candidates: int = 300,
    difficulty: Literal["easy", "medium"] = "easy",
    factor: int = 1,
) -> Tensor:
    """uint8 [classes, per_class, C, S, S]: pictures made of real crops, chosen by their realism score.

    The score of a crop is the teacher's cross-entropy on its class, low for a realistic one. Of `crops`
    random square crops of each of `candidates` pictures of a class, the best one stands for the picture; the pictures
    are ranked by it. `easy` takes them from the most realistic on, as RDED does; `medium` from the middle of the
    ranking, as CV-DD's starts are. `factor`^2 crops are shrunk and stitched into one picture.

    Source: RDED (Sun et al. 2024), section 4; random numbers from torch's generator.

    Raises:
        UserError: a class has fewer pictures than are wanted.
    """
    wanted, made = per_class * factor**2, []
    for number in range(samples.num_classes):
        rows = (samples.labels == number).nonzero().flatten()
        rows = rows[torch.randperm(len(rows))[:candidates]]
        if len(rows) < wanted:
            raise UserError(
                f"class {number} has {len(rows)} pictures, {wanted} are wanted to start from; take fewer, or more data"
            )
        best_ICSS, score_I = _best_crops(teacher, samples.batch(rows)["image"], number, crops)
        order = score_I.argsort()
        first = 0 if difficulty == "easy" else (len(order) - wanted) // 2
        # Neighbours in the ranking are dealt to different pictures, so that none gets only the easiest.
        made.append(_stitch(best_ICSS[order[first : first + wanted]], per_class, factor))
    return torch.stack(made)


def _best_crops(teacher: Teacher, images: Tensor, label: int, crops: int) -> tuple[Tensor, Tensor]:
    """The most realistic crop of each picture, float [I,C,S,S], and its cross-entropy [I]."""
    images = images.float() / 255
    crops_IKCSS = MultiCrop(crops=crops, scale=(0.08, 1.0), ratio=(1.0, 1.0))(images)
    flat = crops_IKCSS.flatten(0, 1)
    logits = torch.cat([teacher.logits({"image": part}, "image") for part in flat.split(256)])
    target = torch.full((len(logits),), label, device=logits.device)
    score_I, best_I = F.cross_entropy(logits.float(), target, reduction="none").view(len(images), crops).min(1)
    return crops_IKCSS[torch.arange(len(images)), best_I], score_I


def _stitch(crops: Tensor, pictures: int, factor: int) -> Tensor:
    """uint8 [pictures, C, S, S] of factor^2 crops each."""
    grid = crops.reshape(factor**2, pictures, *crops.shape[1:])
    if factor > 1:
        small = [F.interpolate(part, scale_factor=1 / factor, mode="area") for part in grid]
        rows = [torch.cat(small[first : first + factor], -1) for first in range(0, factor**2, factor)]
        grid = torch.cat(rows, -2)[None]
    return (grid[0] * 255).round().clamp(0, 255).to(torch.uint8)
