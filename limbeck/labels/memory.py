"""Predictions remembered by sample.

Letters: N samples of the set, B samples of a batch, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.distributed import gather

from .targets import one_hot


class PredictionTable(nn.Module):
    """The last prediction for every sample of the set, read and written by the sample's `index`.

    labels_N: int64, the label of index 0, 1, ...; all rows start as its one-hot, so a row that was never
    written is still a target. dtype: float32, or float16 for half the memory (its rows are normalised again
    when read). State: `table` [N, C], in the checkpoint; it moves with the module's device. Every process
    holds the whole table. Raises ValueError for labels that are not int64 [N] in 0..C-1 or another dtype.
    Source: PS-KD (Kim et al. 2021), algorithm 1.
    """

    table: Tensor

    def __init__(self, labels_N: Tensor, num_classes: int, *, dtype: torch.dtype = torch.float32):
        super().__init__()
        if dtype not in (torch.float32, torch.float16):
            raise ValueError(f"dtype is {dtype}: choose torch.float32 or torch.float16.")
        if labels_N.dtype != torch.int64 or labels_N.ndim != 1:
            raise ValueError(f"labels are {labels_N.dtype} {tuple(labels_N.shape)}: expected int64 [N].")
        if len(labels_N) and (int(labels_N.min()) < 0 or int(labels_N.max()) >= num_classes):
            raise ValueError(
                f"labels lie in {int(labels_N.min())}..{int(labels_N.max())}: expected 0..{num_classes - 1}."
            )
        self.register_buffer("table", one_hot(labels_N, num_classes).to(dtype))

    def read(self, index_B: Tensor) -> Tensor:
        """The rows of `index_B`, float32 [B, C], a copy without gradient: later writes do not change it."""
        rows_BC = self.table[index_B].float()
        return rows_BC if self.table.dtype == torch.float32 else rows_BC / rows_BC.sum(-1, keepdim=True)

    @torch.no_grad()
    def write(self, index_B: Tensor, probabilities_BC: Tensor) -> None:
        """Replace the rows of `index_B`, those of all processes, by `probabilities_BC` (detached).

        All processes must call it together, with equally many rows. An index that occurs twice keeps either
        row. Raises ValueError when the shapes do not fit.
        """
        if probabilities_BC.shape != (len(index_B), self.table.shape[1]):
            raise ValueError(
                f"probabilities have shape {tuple(probabilities_BC.shape)}: "
                f"expected {(len(index_B), self.table.shape[1])}."
            )
        self.table[gather(index_B)] = gather(probabilities_BC.detach()).to(self.table.dtype)
