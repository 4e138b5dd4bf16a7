"""How good a model is: metrics of one model, and arms compared over seeds."""

from limbeck.evaluate.classification import (
    ClassificationEvaluator,
    Reliability,
    classification_metrics,
    predict,
    reliability,
)
from limbeck.evaluate.compare import Comparison, Paired, Statistics, Verdict

__all__ = [
    "ClassificationEvaluator",
    "Comparison",
    "Paired",
    "Reliability",
    "Statistics",
    "Verdict",
    "classification_metrics",
    "predict",
    "reliability",
]
