"""DeLoRes-M: momentum contrast on the clip, Barlow Twins at every depth; an encoder of sounds without labels.

Ghosh, Seth, Umesh: Decorrelating Feature Spaces for Learning General-Purpose Audio Representations, IEEE Journal of
Selected Topics in Signal Processing 2022; as its code has it (LAPE, `src/upstream/delores_m`).

With two views x, x' of a clip, the encoder's layers t_l(x) and last layer e(x), all pooled over time, and the key
encoder that follows the encoder as k <- m k + (1 - m) q:

    q = norm(W e(x)),  p = norm(W_k e_k(x'))                              (no gradient into p)
    L = -log exp(q p / T) / (exp(q p / T) + sum_{n in queue} exp(q n / T))
        + w sum_l BT(P_l t_l(x), P_l t_l,k(x')),   BT = sum_i (C_ii - 1)^2 + sum_{i != j} C_ij^2

The queue holds the latest p of all processes; C is the cross-correlation over the batch of all processes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.data import Stream
from limbeck.distributed import gather, gather_with_gradient, world_size
from limbeck.errors import UserError, require_positive, require_share
from limbeck.losses import barlow_twins, info_nce
from limbeck.models import PooledTaps, mlp_projector
from limbeck.train import Batch, Losses, Method


def contrast(query_BD: Tensor, key_BD: Tensor, queue_QD: Tensor, temperature: float) -> Tensor:
    """MoCo's loss: each query finds its own key among that key and the queue (not among the batch's other keys)."""
    own_BB = torch.eye(len(query_BD), dtype=torch.bool, device=query_BD.device)
    queued_BQ = own_BB.new_ones(len(query_BD), len(queue_QD))
    return info_nce(
        query_BD,
        key_BD,
        temperature=temperature,
        normalize=False,
        queue_QD=queue_QD,
        candidates_BM=torch.cat([own_BB, queued_BQ], 1),
        reduction="mean",
    )


class DeLoResM(Method):
    """Self-supervised pre-training of an encoder of sounds. What ships is the student, its head still untrained.

    Args:
        student: whose layers are named; AudioNTT by default.
        embedding: width of queries and keys.
        queue: negatives.
        temperature: T > 0.
        key_decay: m in [0, 1].
        barlow_weight: w; the official code has 5e-5 / 32.
        barlow_width: of the projectors P_l.
        exits: layers for Barlow Twins.
        layer: the last one, for the contrast.

    Raises:
        UserError: a setting is out of its range, a layer is not there, or a step brings more keys than the queue holds.
    """

    streams = {"unlabelled": ("first", "second")}
    epoch_stream = "unlabelled"

    queue: Tensor
    place: Tensor

    def __init__(
        self,
        student: nn.Module,
        *,
        embedding: int = 128,
        queue: int = 65536,
        temperature: float = 0.07,
        key_decay: float = 0.999,
        barlow_weight: float = 5e-5 / 32,
        barlow_width: int = 2048,
        exits: Sequence[str] = ("blocks.0", "blocks.1", "blocks.2"),
        layer: str = "fc",
    ) -> None:
        super().__init__()
        require_positive(temperature=temperature)
        require_share(key_decay=key_decay)
        self.student, self.temperature, self.key_decay = student, temperature, key_decay
        self.embedding, self.barlow_width = embedding, barlow_width
        self.weights = {"barlow": barlow_weight}
        self.key_encoder = copy.deepcopy(student).requires_grad_(False)
        layers = [*exits, layer]
        self.query_taps, self.key_taps = PooledTaps(student, layers), PooledTaps(self.key_encoder, layers)
        self.register_buffer("queue", F.normalize(torch.randn(queue, embedding)))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    def prepare(self, streams: Mapping[str, Stream]) -> None:
        """Heads as wide as the layers turn out to be on the first clips."""
        stream = streams["unlabelled"]
        arriving = stream.batch_size * world_size()
        if arriving > len(self.queue):
            raise UserError(
                f"A step brings {arriving} keys, but the queue holds {len(self.queue)}: raise method.queue, or lower "
                "the batch size."
            )
        device = next(self.student.parameters()).device
        *early, last = self.query_taps.widths(stream.samples.batch(torch.arange(2))[stream.view_field].to(device))
        self.head = nn.Linear(last, self.embedding, device=device)
        self.key_head = copy.deepcopy(self.head).requires_grad_(False)
        self.projectors = nn.ModuleList(mlp_projector(width, self.barlow_width) for width in early).to(device)

    def training_step(self, batch: Batch) -> Losses:
        fields = batch["unlabelled"]
        *query_early, query_last = self.query_taps(fields["first"])
        query_BD = F.normalize(self.head(query_last))
        with torch.no_grad():
            # In train mode, as the official code has it: BatchNorm by the batch, dropout on.
            *key_early, key_last = self.key_taps(fields["second"])
            key_BD = F.normalize(self.key_head(key_last))
        losses = {
            "contrast": contrast(query_BD, key_BD, self.queue, self.temperature),
            "barlow": self._barlow(query_early, key_early),
        }
        self._enqueue(gather(key_BD))
        return losses

    def _barlow(self, query_early: list[Tensor], key_early: list[Tensor]) -> Tensor:
        """Summed over the depths; the projectors get gradient from both sides, the key encoder none."""
        total = torch.zeros((), device=self.queue.device)
        for project, query, key in zip(self.projectors, query_early, key_early, strict=True):
            both = gather_with_gradient(project(query)), gather_with_gradient(project(key))
            total = total + barlow_twins(*both, redundancy_weight=1.0)
        return total

    @torch.no_grad()
    def _enqueue(self, keys_KD: Tensor) -> None:
        """The oldest keys make room for these."""
        places_K = (self.place + torch.arange(len(keys_KD), device=keys_KD.device)) % len(self.queue)
        self.queue[places_K] = keys_KD.to(self.queue.dtype)
        self.place += len(keys_KD)

    @torch.no_grad()
    def after_step(self) -> None:
        """The key encoder follows: parameters only, its BatchNorm statistics are its own."""
        for slow, fast in ((self.key_encoder, self.student), (self.key_head, self.head)):
            for key, query in zip(slow.parameters(), fast.parameters(), strict=True):
                key.lerp_(query, 1 - self.key_decay)
