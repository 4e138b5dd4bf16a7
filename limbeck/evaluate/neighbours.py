"""How well embeddings know classes without any training: k nearest neighbours.

Shapes: N samples, M known samples, D width, C classes, K neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.data import Samples
from limbeck.errors import UserError
from limbeck.evaluate.classification import predict


@dataclass(frozen=True)
class NearestNeighbours:
    """`evaluator(model, samples)` gives `knn_accuracy`: the share of samples whose neighbours vote for their class.

    Embeddings are compared by their cosine; each of the `k` most similar known samples votes for its class with the
    weight exp(cosine / temperature). Source: Wu et al. 2018 (instance discrimination), section 3.4.

    Args:
        known: labelled samples whose embeddings are the neighbours.
        field: what the model reads.
    """

    known: Samples
    field: str = "image"
    k: int = 20
    temperature: float = 0.07

    def __call__(self, model: nn.Module, samples: Samples) -> dict[str, float]:
        if not len(self.known):
            raise UserError("Nearest neighbours need labelled samples to be near to; the training split has none.")
        known_MD, labels_M = predict(model, self.known, field=self.field)
        given_ND, truth_N = predict(model, samples, field=self.field)
        votes_NC = vote(given_ND, known_MD, labels_M, self.known.num_classes, self.k, self.temperature)
        return {"knn_accuracy": float((votes_NC.argmax(1) == truth_N).float().mean())}


def vote(
    given_ND: Tensor, known_MD: Tensor, labels_M: Tensor, classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """The weight [N,C] that the k nearest known embeddings give to each class. With fewer than k known, all vote."""
    cosine_NM = F.normalize(given_ND.float(), dim=1) @ F.normalize(known_MD.float(), dim=1).T
    near_NK, place_NK = cosine_NM.topk(min(k, len(known_MD)), dim=1)
    weight_NK = (near_NK / temperature).softmax(1)  # the same order as exp, and never infinite
    return torch.zeros(len(given_ND), classes).to(weight_NK).scatter_add_(1, labels_M[place_NK], weight_NK)
