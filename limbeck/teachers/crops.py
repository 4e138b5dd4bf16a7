"""Stored answers for several crops of each image: read side by side, and drawn for batches of n_c crops an image.

Shapes: N images, B images of a batch, V stored crops of an image, R crops that are read of an image, K kept classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limbeck.data import seed_of
from limbeck.distributed import rank
from limbeck.errors import UserError
from limbeck.models import TopK
from limbeck.teachers.stored import Stored


class StoredCrops:
    """The versions of a stored teacher whose view is one crop of an image, several of an image at once.

    Args:
        stored: its view `view` was `MultiCrop(1, ...)`.

    Raises:
        UserError: the store has no such view, or it was none of one crop.
    """

    def __init__(self, stored: Stored, view: str = "crop") -> None:
        box = stored.store.manifest.schema.get(f"{view}/params.box")
        if box is None or box.shape != (1, 4) or stored.class_count is None:
            raise UserError(
                f"the store {stored.store.path} holds no labels of crops: it has the views {', '.join(stored.views)}; "
                f"fill it by a classifier with a view '{view}' that is multi_crop with crops=1"
            )
        self.stored, self.view, self.versions, self.classes = stored, view, stored.versions, stored.class_count

    def params(self, index_B: Tensor, version_BR: Tensor) -> dict[str, Tensor]:
        """What `MultiCrop(R).apply` cuts these crops by: `box` [B,R,4] and `flip` bool [B,R]."""
        found = self.stored.params(self.view, index_B.repeat_interleave(version_BR.shape[1]), version_BR.flatten())
        return {"box": found["box"].reshape(*version_BR.shape, 4), "flip": found["flip"].reshape(version_BR.shape)}

    def top_k(self, index_B: Tensor, version_BR: Tensor, k: int) -> TopK:
        """The K likeliest classes of these crops, [B,R,K]."""
        index = index_B.repeat_interleave(version_BR.shape[1])
        kept = self.stored.top_k({"index": index, f"{self.view}_version": version_BR.flatten()}, self.view, k)
        shape = version_BR.shape
        ids, log_probs = kept.ids.reshape(*shape, k), kept.log_probs.float().reshape(*shape, k)
        return TopK(ids, log_probs, kept.rest.reshape(shape), kept.classes)

    def all_versions(self, index_B: Tensor) -> Tensor:
        """int64 [B,V]: 0 to V - 1 for each image."""
        return torch.arange(self.versions).expand(len(index_B), -1)


class CropReader:
    """What `Stream.beside` puts into batches: n_c surviving crops of each image, and what was stored of them.

    Of an image of which n_c crops survive it draws n_c different ones; of one of which fewer survive, all of them and
    then some again. A pure function of seed, epoch and position. Gives `<view>_params`, by which the stream replays its
    view, `<view>_version` int64 [B,n_c], `<view>_ids`, `<view>_log_probs` [B,n_c,K], `<view>_rest` [B,n_c] (of `TopK`),
    and `<view>_marked` bool [B,n_c].

    Args:
        index_N: the images that it is asked for.
        survives_NV: bool, the crops that may be drawn; one at least of each image.
        marked_NV: bool, whatever is to be known of the drawn crops.
    """

    def __init__(
        self,
        crops: StoredCrops,
        index_N: Tensor,
        survives_NV: Tensor,
        marked_NV: Tensor,
        *,
        num_crops: int,
        k: int,
        seed: int = 0,
    ) -> None:
        self.crops, self.num_crops, self.k, self.seed, self.rank = crops, num_crops, k, seed, rank()
        self.index_N, order_N = index_N.sort()
        self.survives_NV, self.marked_NV = survives_NV[order_N], marked_NV[order_N]

    def __call__(self, index_B: Tensor, epoch: int, position: int) -> dict[str, Any]:
        row_B, view = torch.searchsorted(self.index_N, index_B), self.crops.view
        version_BR = draw_versions(self.survives_NV[row_B], self.num_crops, self._generator(epoch, position))
        kept = self.crops.top_k(index_B, version_BR, self.k)
        return {
            f"{view}_params": self.crops.params(index_B, version_BR),
            f"{view}_version": version_BR,
            f"{view}_ids": kept.ids,
            f"{view}_log_probs": kept.log_probs,
            f"{view}_rest": kept.rest,
            f"{view}_marked": self.marked_NV[row_B].gather(1, version_BR),
        }

    def _generator(self, epoch: int, position: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(f"{self.seed}/{self.rank}/{epoch}/{position}"))


def draw_versions(survives_BV: Tensor, num_crops: int, generator: torch.Generator) -> Tensor:
    """int64 [B, num_crops]: random survivors of each row, each at most once where enough survive, else each at least
    once."""
    key_BV = torch.rand(survives_BV.shape, generator=generator).masked_fill(~survives_BV, 2.0)
    survivors_B1 = survives_BV.sum(1, keepdim=True)
    place_R = torch.arange(num_crops)
    again_BR = (torch.rand(len(survives_BV), num_crops, generator=generator) * survivors_B1).long()
    return key_BV.argsort(1).gather(1, torch.where(place_R < survivors_B1, place_R, again_BR))
