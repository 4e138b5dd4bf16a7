"""Data-set distillation: a classifier that was trained on synthetic pictures alone, on the real test data."""

from __future__ import annotations

from limbeck.recipes.tasks.classification import Classification


class DatasetDistillation(Classification):
    """Accuracy of a network that never saw a real picture, and what its training set takes to store."""

    name = "dataset-distillation"
    columns = ("accuracy", "nll", "stored.bytes", "parameters", "latency_ms", "seconds")


TASK = DatasetDistillation()
