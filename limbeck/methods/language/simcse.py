"""SimCSE: a sentence encoder learns from dropout alone, without any label.

Gao, Yao and Chen: SimCSE: Simple Contrastive Learning of Sentence Embeddings, EMNLP 2021 (arXiv 2104.08821), section 3.

Each sentence passes the encoder twice, with two dropout masks; h_i and h'_i must find each other in the batch of N:

    l_i = -log exp(cos(h_i, h'_i) / tau) / sum_j exp(cos(h_i, h'_j) / tau)
"""

from __future__ import annotations

from torch import nn

from limbeck.distributed import gather_with_gradient, rank
from limbeck.errors import UserError, require_positive
from limbeck.losses import info_nce
from limbeck.models import BiEncoder
from limbeck.models.encoders import width_of
from limbeck.train import Batch, Losses, Method


class SimCSE(Method):
    """Unsupervised SimCSE. Under several processes the second views of all of them are the keys.

    Args:
        student: the bi-encoder; its dropout makes the two views.
        temperature: tau.
        projection: train through a linear layer and tanh on top, which do not ship, as the paper does.

    Raises:
        UserError: the student is no bi-encoder, has no dropout, or the temperature is not above 0.
    """

    streams = {"sentences": ("tokens",)}
    epoch_stream = "sentences"

    student: BiEncoder

    def __init__(self, student: nn.Module, *, temperature: float = 0.05, projection: bool = True) -> None:
        super().__init__()
        require_positive(temperature=temperature)
        if not isinstance(student, BiEncoder):
            raise UserError(f"SimCSE trains a bi-encoder, got {type(student).__name__}; use load_encoder")
        if not any(isinstance(module, nn.Dropout) and module.p > 0 for module in student.modules()):
            raise UserError("SimCSE's views differ by dropout alone, and the student has none; set it in its config")
        width = width_of(student.model)
        self.student, self.temperature = student, temperature
        self.projection = nn.Sequential(nn.Linear(width, width), nn.Tanh()) if projection else nn.Identity()

    def training_step(self, batch: Batch) -> Losses:
        tokens = batch["sentences"]["tokens"]
        first_BD, second_BD = self.projection(self.student(tokens)), self.projection(self.student(tokens))
        keys_KD = gather_with_gradient(second_BD)
        loss = info_nce(
            first_BD, keys_KD, temperature=self.temperature, normalize=True, offset=rank() * len(first_BD),
            reduction="mean",
        )  # fmt: skip
        return {"info_nce": loss}
