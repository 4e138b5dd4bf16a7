"""Labels: targets made from teachers' outputs, each with a weight and a keep-mask.

Pure functions where nothing is remembered; small modules with buffers where something is, so that it is in
the checkpoint and the same on all processes.
"""

from .alignment import AverageAlignment, DistributionAlignment, align
from .memory import PredictionTable
from .pseudo import PseudoLabels, pseudo_labels
from .targets import hard, mix_targets, one_hot, sharpen, soften
from .thresholds import (
    ClassAdaptive,
    RunningQuantile,
    SelfAdaptive,
    class_thresholds,
    fixed,
    percentile,
    quantile,
)
from .weights import TruncatedGaussian, certainty, confidence, margin, negative_entropy

__all__ = [
    "AverageAlignment",
    "ClassAdaptive",
    "DistributionAlignment",
    "PredictionTable",
    "PseudoLabels",
    "RunningQuantile",
    "SelfAdaptive",
    "TruncatedGaussian",
    "align",
    "certainty",
    "class_thresholds",
    "confidence",
    "fixed",
    "hard",
    "margin",
    "mix_targets",
    "negative_entropy",
    "one_hot",
    "percentile",
    "pseudo_labels",
    "quantile",
    "sharpen",
    "soften",
]
