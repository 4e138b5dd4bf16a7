"""Labels: targets made from teachers' outputs, each with a weight and a keep-mask.

Pure functions where nothing is remembered; small modules with buffers where something is, so that it is in
the checkpoint and the same on all processes.
"""

from .alignment import AverageAlignment, DistributionAlignment, align
from .bands import HARD, IMPORTANT, UNINFORMATIVE, confidence_bands, keep_median
from .boxes import (
    confident_boxes,
    jitter_boxes,
    jitter_variance,
    merge_boxes,
    score_thresholds,
    uncovered,
)
from .calibration import expected_calibration_error, grid_search
from .clusters import Clusters, cluster_labels, kmeans, mutual_information, nearest_centre, whiten
from .masks import confident_share, drop_uncertain, hard_mask, mask_accuracy
from .memory import PredictionTable
from .prototypes import class_means, prototype_scores, soft_assignment
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
    "HARD",
    "IMPORTANT",
    "UNINFORMATIVE",
    "AverageAlignment",
    "ClassAdaptive",
    "Clusters",
    "DistributionAlignment",
    "PredictionTable",
    "PseudoLabels",
    "RunningQuantile",
    "SelfAdaptive",
    "TruncatedGaussian",
    "align",
    "certainty",
    "class_means",
    "class_thresholds",
    "cluster_labels",
    "confidence",
    "confidence_bands",
    "confident_boxes",
    "confident_share",
    "drop_uncertain",
    "expected_calibration_error",
    "fixed",
    "grid_search",
    "hard",
    "hard_mask",
    "jitter_boxes",
    "jitter_variance",
    "keep_median",
    "kmeans",
    "margin",
    "mask_accuracy",
    "merge_boxes",
    "mix_targets",
    "mutual_information",
    "nearest_centre",
    "negative_entropy",
    "one_hot",
    "percentile",
    "prototype_scores",
    "pseudo_labels",
    "quantile",
    "score_thresholds",
    "sharpen",
    "soft_assignment",
    "soften",
    "uncovered",
    "whiten",
]
