"""Distribution alignment: pseudo-labels whose classes occur, over time, as often as a prior says.

Letters: B samples, C classes, L batches remembered. Inputs are detached; rows stay distributions.
The memory of past batches is in buffers (checkpointed), moves only in train mode, and averages over all
processes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.distributed import mean_across


def align(probabilities_BC: Tensor, mean_C: Tensor, target_C: Tensor) -> Tensor:
    """normalise(p * target / mean) per row: a class predicted more often than the target says is pressed
    down.

    probabilities_BC: rows sum to 1; mean_C: how often each class was predicted; target_C: the prior. float32.
    Source: ReMixMatch (Berthelot et al. 2020), section 3.1.
    """
    aligned_BC = probabilities_BC.detach().float() * (target_C / mean_C.clamp(min=1e-12))
    return aligned_BC / aligned_BC.sum(-1, keepdim=True)


class DistributionAlignment(nn.Module):
    """Alignment to the mean prediction of the last `length` batches, the current one included.

    forward(probabilities_BC) -> float32 [B, C]. target_C: the prior, positive, summing to 1; None is uniform.
    In eval mode the current batch is not remembered; with an empty memory the prior counts as the mean (no
    change). Source: FixMatch's code; ShrinkMatch (CIFAR, length 32). State: `means` [L, C], `seen` (batches
    so far).
    """

    means: Tensor
    seen: Tensor
    target: Tensor

    def __init__(self, num_classes: int, *, length: int = 32, target_C: Tensor | None = None):
        super().__init__()
        if length < 1:
            raise ValueError(f"length is {length}: at least the current batch must be remembered (1).")
        self.register_buffer("means", torch.zeros(length, num_classes))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("target", _prior(num_classes, target_C))

    @torch.no_grad()
    def forward(self, probabilities_BC: Tensor) -> Tensor:
        if self.training:
            slot = (self.seen % len(self.means)).reshape(1)
            self.means.index_copy_(0, slot, mean_across(probabilities_BC.float().mean(0))[None])
            self.seen += 1
        filled = self.seen.clamp(max=len(self.means))
        # Slots not yet filled are zero, so they add nothing to the sum.
        mean_C = torch.where(filled > 0, self.means.sum(0) / filled.clamp(min=1), self.target)
        return align(probabilities_BC, mean_C, self.target)


class AverageAlignment(nn.Module):
    """Alignment to a moving average of the mean prediction, updated with the current batch first.

    mean <- decay mean + (1 - decay) batch mean; the first batch's mean starts it.
    forward(probabilities_BC) -> float32 [B, C]. target_C and eval mode as in DistributionAlignment.
    Source: ShrinkMatch (STL-10 and SVHN, decay 0.999). State: `mean` [C], `seen` (batches so far).
    """

    mean: Tensor
    seen: Tensor
    target: Tensor

    def __init__(self, num_classes: int, *, decay: float = 0.999, target_C: Tensor | None = None):
        super().__init__()
        self.decay = decay
        self.register_buffer("target", _prior(num_classes, target_C))
        self.register_buffer("mean", self.target.clone())
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, probabilities_BC: Tensor) -> Tensor:
        if self.training:
            batch_C = mean_across(probabilities_BC.float().mean(0))
            self.mean.copy_(torch.where(self.seen > 0, self.mean.lerp(batch_C, 1 - self.decay), batch_C))
            self.seen += 1
        return align(probabilities_BC, self.mean, self.target)


def _prior(num_classes: int, target_C: Tensor | None) -> Tensor:
    if target_C is None:
        return torch.full((num_classes,), 1 / num_classes)
    target_C = target_C.detach().float().clone()
    if target_C.shape != (num_classes,) or not bool((target_C > 0).all()) or abs(float(target_C.sum()) - 1) > 1e-4:
        raise ValueError(
            f"target_C has shape {tuple(target_C.shape)} and sum {float(target_C.sum()):.4f}: "
            f"give {num_classes} positive shares that sum to 1."
        )
    return target_C
