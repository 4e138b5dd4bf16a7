"""Vector quantiser: a codebook that follows what is assigned to it, with a straight-through gradient.

Shapes: [..., D] vectors of width D, K codes, N vectors of a batch, W processes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.distributed import gather, sum_across, world_size
from limbeck.errors import UserError, require_share


class Quantized(NamedTuple):
    """What a quantiser says of vectors h [..., D].

    `vectors` [..., D]: each one's code, as the codebook holds it; its gradient goes to h unchanged. `codes`: int64
    [...]. `scores` [..., K]: cosine or negative squared distance to each code (highest at `codes`). `commitment`:
    scalar, commitment * mean over all elements of (sg(code) - h)^2.
    """

    vectors: Tensor
    codes: Tensor
    scores: Tensor
    commitment: Tensor


class VectorQuantizer(nn.Module):
    """h -> the nearest of K codes. The codes get no gradient: in training mode they move to what was assigned to them.

    cosine (CosineSimCodebook of lucidrains' vector-quantize-pytorch, as VQGraph uses it): z = argmax_k cos(h, E_k),
        first on ties; after the codes were read, E_k <- d E_k + (1 - d) t_k with t_k = unit(mean of the assigned
        unit(h)), and unit(E_k) for an unused code. Codes are stored as they are and normalised to compare.
    euclidean (van den Oord et al. 2017, appendix A.1): z = argmin_k ||h - E_k||^2; n_k <- d n_k + (1 - d) count_k,
        m_k <- d m_k + (1 - d) sum_k, E_k = m_k / n_k with n smoothed by epsilon.

    Counts and sums are those of all processes, so that codebooks stay equal.

    Args:
        codes, width: K and D.
        decay: d in [0, 1].
        commitment: factor of the commitment loss.
        expire_below: replace codes whose running count per batch falls below this by vectors of the batch; 0: never.
        epsilon: Laplace smoothing of the euclidean counts.

    State: `codebook` [K, D], `usage` [K] (running count, starts at 1) and, euclidean, `sums` [K, D].
    """

    codebook: Tensor
    usage: Tensor
    sums: Tensor

    def __init__(
        self,
        codes: int,
        width: int,
        *,
        metric: Literal["cosine", "euclidean"] = "cosine",
        decay: float = 0.8,
        commitment: float = 0.25,
        expire_below: float = 0.0,
        epsilon: float = 1e-5,
    ) -> None:
        super().__init__()
        require_share(decay=decay)
        if codes < 1 or width < 1:
            raise UserError(f"a codebook of {codes} codes of width {width} is empty; give at least one of each")
        if metric not in ("cosine", "euclidean"):
            raise UserError(f"metric is '{metric}'; choose cosine or euclidean")
        self.metric, self.decay, self.commitment = metric, decay, commitment
        self.expire_below, self.epsilon = expire_below, epsilon
        start_KD = torch.randn(codes, width)
        self.register_buffer("codebook", F.normalize(start_KD, dim=-1) if metric == "cosine" else start_KD / width**0.5)
        self.register_buffer("usage", torch.ones(codes))
        if metric == "euclidean":
            self.register_buffer("sums", self.codebook.clone())

    def forward(self, vectors: Tensor) -> Quantized:
        flat_ND = vectors.detach().float().flatten(0, -2)
        scores_NK = self.scores(flat_ND)
        codes_N = scores_NK.argmax(-1)
        picked = self.codebook[codes_N].reshape(vectors.shape).to(vectors.dtype)  # a copy: the update comes after it
        commitment = self.commitment * F.mse_loss(vectors.float(), picked.float())
        if self.training:
            self._follow(flat_ND, codes_N)
        shape = vectors.shape[:-1]
        through = vectors + (picked - vectors).detach()
        return Quantized(through, codes_N.reshape(shape), scores_NK.reshape(*shape, -1), commitment)

    def scores(self, vectors: Tensor) -> Tensor:
        """[..., K]: cosine in [-1, 1], or the negative squared distance."""
        if self.metric == "cosine":
            return F.normalize(vectors.float(), dim=-1) @ F.normalize(self.codebook, dim=-1).T
        dot = vectors.float() @ self.codebook.T
        return 2 * dot - vectors.float().square().sum(-1, keepdim=True) - self.codebook.square().sum(-1)

    @torch.no_grad()
    def initialise(self, vectors_ND: Tensor, iterations: int = 10) -> None:
        """Start from k-means over the vectors of all processes (equally many on each) instead of random codes.

        An empty cluster keeps its centre. Raises `UserError` where there are fewer vectors than codes.
        """
        points_ND = gather(self._comparable(vectors_ND.float()))
        if len(points_ND) < len(self.codebook):
            raise UserError(
                f"k-means of {len(self.codebook)} codes needs as many vectors, got {len(points_ND)}; lower codes"
            )
        # The draw of the first process, so that all start alike.
        order_N = gather(torch.randperm(len(points_ND), device=points_ND.device))[: len(points_ND)]
        self.codebook.copy_(points_ND[order_N[: len(self.codebook)]])
        for _ in range(iterations):
            sums_KD, counts_K = self._totals(points_ND, self.scores(points_ND).argmax(-1))
            means_KD = self._comparable(sums_KD / counts_K.clamp(min=1)[:, None])
            self.codebook.copy_(torch.where(counts_K[:, None] > 0, means_KD, self.codebook))
        self.usage.fill_(1.0)
        if self.metric == "euclidean":
            self.sums.copy_(self.codebook)

    @torch.no_grad()
    def _follow(self, flat_ND: Tensor, codes_N: Tensor) -> None:
        sums_KD, counts_K = self._totals(self._comparable(flat_ND), codes_N)
        sums_KD, counts_K = sum_across(sums_KD), sum_across(counts_K)
        self.usage.lerp_(counts_K, 1 - self.decay)
        if self.metric == "cosine":
            mean_KD = sums_KD / counts_K.clamp(min=1)[:, None]
            target_KD = F.normalize(torch.where(counts_K[:, None] > 0, mean_KD, self.codebook), dim=-1)
            self.codebook.lerp_(target_KD, 1 - self.decay)
        else:
            self.sums.lerp_(sums_KD, 1 - self.decay)
            total, classes = self.usage.sum(), len(self.usage)
            smoothed_K = (self.usage + self.epsilon) / (total + classes * self.epsilon) * total
            self.codebook.copy_(self.sums / smoothed_K[:, None])
        if self.expire_below > 0:
            self._expire(flat_ND)

    def _expire(self, flat_ND: Tensor) -> None:
        """Every code that is hardly used becomes a vector of the batch; process k % W offers the one for code k."""
        codes = len(self.codebook)
        drawn_KD = self._comparable(flat_ND[torch.randint(len(flat_ND), (codes,), device=flat_ND.device)])
        number_K = torch.arange(codes, device=flat_ND.device)
        offered_KD = gather(drawn_KD).reshape(-1, *drawn_KD.shape)[number_K % world_size(), number_K]
        dead_K = self.usage < self.expire_below
        self.codebook.copy_(torch.where(dead_K[:, None], offered_KD, self.codebook))
        self.usage.masked_fill_(dead_K, max(1.0, self.expire_below))
        if self.metric == "euclidean":
            self.sums.copy_(torch.where(dead_K[:, None], offered_KD * max(1.0, self.expire_below), self.sums))

    def _comparable(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.metric == "cosine" else vectors

    def _totals(self, vectors_ND: Tensor, codes_N: Tensor) -> tuple[Tensor, Tensor]:
        """Sum [K, D] and number [K] of the vectors of each code."""
        sums_KD = torch.zeros_like(self.codebook).index_add_(0, codes_N, vectors_ND)
        return sums_KD, torch.zeros_like(self.usage).index_add_(0, codes_N, torch.ones_like(vectors_ND[:, 0]))


class CodeUsage(NamedTuple):
    """`used`: codes that occur. `perplexity`: exp of the entropy of their shares, 1 (one code) to K (all alike)."""

    used: int
    perplexity: float


def code_usage(codes: Tensor, total: int) -> CodeUsage:
    """How many of `total` codes int64 [...] names, and how evenly."""
    share_K = torch.bincount(codes.flatten(), minlength=total).double() / codes.numel()
    return CodeUsage(int((share_K > 0).sum()), float(torch.exp(-torch.special.xlogy(share_K, share_K).sum())))
