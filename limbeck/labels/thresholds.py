"""Which pseudo-labels to keep. Everything here returns a keep-mask, bool, one per item.

Letters: B samples, C classes, N samples of the whole set. Probabilities are [..., C] with classes last;
scores and masks are [...]. Inputs are detached. Where nothing passes, the mask is all False and every state
stays finite.

Those with a memory are modules: their state lies in buffers and so in the checkpoint; it moves only in train
mode (evaluating must not shift a threshold); and it is the same on all processes, because what it learns from
is gathered or averaged over them. With gradient accumulation, call them once per batch that counts.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from limbeck.distributed import gather, mean_across


def fixed(probabilities: Tensor, threshold: float | Tensor, *, strict: bool) -> Tensor:
    """Keep where the highest probability reaches the threshold: `>=`, or `>` when strict.

    threshold: a number, or a tensor with one per item. Source: FixMatch (Sohn et al. 2020), not strict.
    """
    confidence = probabilities.detach().amax(-1)
    return confidence > threshold if strict else confidence >= threshold


def quantile(scores: Tensor, share: float, *, mask: Tensor | None = None) -> Tensor:
    """The `share` quantile (in [0, 1]) of all kept scores, linearly interpolated, as a tensor of no
    dimension.

    The same as `torch.quantile`, but without its limit of 16 million values and with a mask that is not read
    back to the host. Where nothing is kept it is +inf. Raises ValueError for a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}: it must lie in [0, 1].")
    values = scores.detach().float().flatten()
    kept = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.bool().expand_as(scores).flatten()
    ordered = values.masked_fill(~kept, torch.inf).sort().values
    # float64: float32 cannot number more than 16 million positions.
    position = share * (kept.sum() - 1).clamp(min=0).double()
    # Not ordered[position]: indexing by a tensor of no dimension reads the index back to the host.
    below, above = ordered.gather(0, torch.stack([position.floor(), position.ceil()]).long()).unbind()
    # Not torch.lerp: inf - inf is NaN when nothing is kept.
    return torch.where(below == above, below, below + (above - below) * position.frac().float())


def percentile(
    scores: Tensor, share: float, *, keep: Literal["low", "high"], strict: bool, mask: Tensor | None = None
) -> Tensor:
    """Keep the scores on one side of this batch's `share` quantile, taken over the items of `mask` only.

    keep="low": score <= quantile, or < when strict (an entropy; U2PL and FST: the lowest 80 %, strict).
    keep="high": score >= quantile, or > when strict (a confidence). Items outside `mask` are never kept.
    The quantile is this process's. Raises ValueError for another `keep`.
    """
    if keep not in ("low", "high"):
        raise ValueError(f'keep is {keep!r}: choose "low" or "high".')
    sign = 1.0 if keep == "low" else -1.0
    scores = scores.detach().float()
    limit = quantile(scores, share, mask=mask)
    distance = sign * (scores - limit)
    kept = distance < 0 if strict else distance <= 0
    return kept if mask is None else kept & mask.bool()


def class_thresholds(counts_C: Tensor, threshold: float, *, unassigned: Tensor | float = 0.0) -> Tensor:
    """threshold * M(r_c), r_c = n_c / max(max_k n_k, unassigned), M(r) = r / (2 - r): lower for classes that
    lag, [C].

    The leading class gets `threshold`, an absent one 0, equal counts the plain threshold everywhere.
    unassigned: the samples without a confident label yet, which keep all thresholds low at the start
    (warm-up); 0 to leave it out (KD3). All counts 0 and nothing unassigned: `threshold` everywhere.
    Source: FlexMatch (Zhang et al. 2021), equations 5 to 12.
    """
    counts_C = counts_C.float()
    most = counts_C.amax().clamp(min=unassigned)
    status_C = torch.where(most > 0, counts_C / most.clamp(min=1e-12), torch.ones_like(counts_C))
    return threshold * status_C / (2 - status_C)


class ClassAdaptive(nn.Module):
    """FlexMatch: a threshold per class that follows how many samples of the set the model is confident of.

    Remembers for every sample the class that it was last confident of (-1: none yet).
    forward(probabilities_BC, index_B) keeps max p >= class_thresholds(counts)[argmax p], with the counts from
    BEFORE this batch, then notes the samples whose max p >= threshold (the plain one). warm_up: count the
    unassigned samples too (see class_thresholds). Source: FlexMatch, algorithm 1. State: `assigned` int64
    [N].
    """

    assigned: Tensor

    def __init__(self, num_samples: int, num_classes: int, *, threshold: float = 0.95, warm_up: bool = True):
        super().__init__()
        self.num_classes = num_classes
        self.threshold = threshold
        self.warm_up = warm_up
        self.register_buffer("assigned", torch.full((num_samples,), -1, dtype=torch.int64))

    def thresholds(self) -> Tensor:
        """The threshold of each class now, float32 [C]."""
        counts = torch.zeros(self.num_classes + 1, device=self.assigned.device)
        counts = counts.index_add(0, self.assigned + 1, torch.ones_like(self.assigned, dtype=counts.dtype))
        return class_thresholds(counts[1:], self.threshold, unassigned=counts[0] if self.warm_up else 0.0)

    @torch.no_grad()
    def forward(self, probabilities_BC: Tensor, index_B: Tensor) -> Tensor:
        confidence_B, class_B = probabilities_BC.max(-1)
        mask_B = confidence_B >= self.thresholds()[class_B]
        if self.training:
            index, classes = gather(index_B), gather(class_B)
            sure = gather(confidence_B) >= self.threshold
            self.assigned[index] = torch.where(sure, classes, self.assigned[index])
        return mask_B


class SelfAdaptive(nn.Module):
    """FreeMatch: a global threshold that follows the mean confidence, times each class's relative mean
    probability.

    tau <- decay tau + (1 - decay) mean_b max p_b; m_c <- decay m_c + (1 - decay) mean_b p_bc (both start at 1
    / C); keep max p >= tau m_c / max_k m_k at c = argmax p, AFTER the update with this batch.
    Source: FreeMatch (Wang et al. 2023), equations 5 to 8. State: `overall` (tau), `per_class` (m) [C].
    """

    overall: Tensor
    per_class: Tensor

    def __init__(self, num_classes: int, *, decay: float = 0.999):
        super().__init__()
        self.decay = decay
        self.register_buffer("overall", torch.tensor(1 / num_classes))
        self.register_buffer("per_class", torch.full((num_classes,), 1 / num_classes))

    def thresholds(self) -> Tensor:
        """The threshold of each class now, float32 [C]."""
        return self.overall * self.per_class / self.per_class.amax()

    @torch.no_grad()
    def forward(self, probabilities_BC: Tensor) -> Tensor:
        probabilities_BC = probabilities_BC.float()
        confidence_B, class_B = probabilities_BC.max(-1)
        if self.training:
            self.overall.lerp_(mean_across(confidence_B.mean()), 1 - self.decay)
            self.per_class.lerp_(mean_across(probabilities_BC.mean(0)), 1 - self.decay)
        return confidence_B >= self.thresholds()[class_B]


class RunningQuantile(nn.Module):
    """Instance-adaptive selection (IAST, HIAST): a running quantile of the confidence per predicted class.

    With theta_c the threshold of class c (start `initial`), for a batch: P_c = the confidences of items
    predicted c, with theta_c itself as one more; psi_c = quantile(P_c, 1 - share theta_c^gamma), linearly
    interpolated; theta_c <- decay theta_c + (1 - decay) psi_c, and 0.999 where that reaches 1. Keep p >=
    theta_c, AFTER the update. A class absent from the batch keeps its threshold. A larger gamma keeps less of
    classes whose threshold is low. forward(probabilities [..., C]) -> mask [...]; all leading dimensions are
    items. Depends on the order of batches. Source: IAST (Mei et al. 2020), section 3.1, by HIAST's official
    code. State: `theta` [C].
    """

    theta: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        share: float = 0.5,
        decay: float = 0.9,
        gamma: float = 8.0,
        initial: float = 0.9,
    ):
        super().__init__()
        self.share = share
        self.decay = decay
        self.gamma = gamma
        self.register_buffer("theta", torch.full((num_classes,), initial))

    @torch.no_grad()
    def forward(self, probabilities: Tensor) -> Tensor:
        confidence, classes = probabilities.float().max(-1)
        if self.training:
            psi_C = self._quantiles(gather(confidence.flatten()), gather(classes.flatten()))
            # lerp, because decay * x + (1 - decay) * x rounds and the threshold of an absent class would drift.
            theta_C = self.theta.lerp(psi_C, 1 - self.decay)
            self.theta.copy_(torch.where(theta_C >= 1, torch.full_like(theta_C, 0.999), theta_C))
        return confidence >= self.theta[classes]

    def _quantiles(self, confidence_N: Tensor, class_N: Tensor) -> Tensor:
        """psi [C]: one sort by (class, confidence) serves all classes."""
        num_classes = len(self.theta)
        values = torch.cat([confidence_N, self.theta])
        classes = torch.cat([class_N, torch.arange(num_classes, device=class_N.device)])
        ordered, order = values.sort()
        ordered = ordered[classes[order].sort(stable=True).indices]
        count_C = torch.zeros(num_classes, device=values.device, dtype=torch.int64)
        count_C = count_C.index_add(0, classes, torch.ones_like(classes))
        start_C = count_C.cumsum(0) - count_C
        level_C = (1 - self.share * self.theta**self.gamma).clamp(0, 1)
        position_C = level_C * (count_C - 1)
        below_C, above_C = position_C.floor().long(), position_C.ceil().long()
        return ordered[start_C + below_C].lerp(ordered[start_C + above_C], position_C - below_C)
