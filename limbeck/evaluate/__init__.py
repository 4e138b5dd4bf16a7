"""How good a model is: metrics of one model, and arms compared over seeds."""

from limbeck.evaluate.classification import (
    ClassificationEvaluator,
    Reliability,
    classification_metrics,
    predict,
    reliability,
)
from limbeck.evaluate.compare import Comparison, Paired, Statistics, Verdict
from limbeck.evaluate.detection import DetectionEvaluator, box_recall, detect_all, detection_metrics
from limbeck.evaluate.generation import (
    FeatureNet,
    GenerationEvaluator,
    class_coverage,
    energy_distance,
    frechet_distance,
    precision_recall,
    train_feature_net,
)
from limbeck.evaluate.language import LanguageEvaluator, language_metrics
from limbeck.evaluate.multimodal import MultimodalEvaluator, predict_fields
from limbeck.evaluate.neighbours import NearestNeighbours
from limbeck.evaluate.pairs import PairEvaluator, pair_metrics, predict_pairs
from limbeck.evaluate.segmentation import (
    SegmentationEvaluator,
    confusion,
    confusion_matrix,
    predict_masks,
    segmentation_metrics,
)

__all__ = [
    "NearestNeighbours",
    "ClassificationEvaluator",
    "Comparison",
    "DetectionEvaluator",
    "FeatureNet",
    "GenerationEvaluator",
    "LanguageEvaluator",
    "MultimodalEvaluator",
    "PairEvaluator",
    "Paired",
    "Reliability",
    "SegmentationEvaluator",
    "Statistics",
    "Verdict",
    "box_recall",
    "class_coverage",
    "classification_metrics",
    "confusion",
    "confusion_matrix",
    "detect_all",
    "detection_metrics",
    "energy_distance",
    "frechet_distance",
    "language_metrics",
    "pair_metrics",
    "precision_recall",
    "predict",
    "predict_fields",
    "predict_masks",
    "predict_pairs",
    "reliability",
    "segmentation_metrics",
    "train_feature_net",
]
