"""How well scores of sentence pairs follow the labels.

Shapes: N pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from limbeck.data import Samples
from limbeck.errors import UserError
from limbeck.models import BiEncoder, CrossEncoder, score_pairs


@dataclass(frozen=True)
class PairEvaluator:
    """`evaluator(encoder, samples)` gives the metrics of a bi- or a cross-encoder: `score_pairs`, `pair_metrics`."""

    batch_size: int = 128

    def __call__(self, model: nn.Module, samples: Samples) -> dict[str, float]:
        return pair_metrics(predict_pairs(model, samples, batch_size=self.batch_size), samples.fields)


def predict_pairs(model: nn.Module, samples: Samples, *, batch_size: int = 128) -> Tensor:
    """The scores [N] of a bi- or cross-encoder. Raises `UserError` for other models and missing fields."""
    if not isinstance(model, BiEncoder | CrossEncoder):
        raise UserError(
            f"pairs are scored by a bi-encoder or a cross-encoder, got {type(model).__name__}; wrap the network in "
            "limbeck.models.BiEncoder or CrossEncoder"
        )
    missing = [name for name in model.reads if name not in samples.fields]
    if missing:
        raise UserError(f"the samples have no field '{missing[0]}', only {', '.join(samples.fields)}; use load_pairs")
    return score_pairs(model, samples.fields, batch_size=batch_size)


def pair_metrics(scores_N: Tensor, fields: Mapping[str, Any]) -> dict[str, float]:
    """Agreement of scores with labels; all are better when larger.

    - `spearman` and `pearson` with the field `score`, in [-1, 1]; ties take their mean rank. Constant scores say
      nothing: 0.
    - `auc` with a field `label` of two classes where there is no score: the chance that a pair of class 1 scores
      above a pair of class 0.

    Raises:
        UserError: the samples have neither; scores that are not finite; AUC of a single class.
    """
    scores = scores_N.double().numpy()
    if not np.isfinite(scores).all():
        raise UserError(f"the score of pair {int(np.argmin(np.isfinite(scores)))} is not finite; the model diverged")
    if "score" in fields:
        labels = fields["score"].double().numpy()
        if np.ptp(scores) == 0 or np.ptp(labels) == 0:
            return {"spearman": 0.0, "pearson": 0.0}
        return {
            "spearman": float(spearmanr(scores, labels).statistic),
            "pearson": float(pearsonr(scores, labels).statistic),
        }
    if "label" not in fields:
        raise UserError(f"pairs are measured by a field 'score' or 'label', the samples have {', '.join(fields)}")
    labels = fields["label"].numpy()
    if sorted(set(labels.tolist())) != [0, 1]:
        raise UserError(
            f"the AUC needs pairs of the classes 0 and 1, got {sorted(set(labels.tolist()))}; give a column 'score' or "
            "two classes"
        )
    return {"auc": float(roc_auc_score(labels, scores))}
