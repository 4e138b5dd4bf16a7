"""Representation: encoders that are pre-trained without labels, and classifiers that are built on them."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from torch import nn

from limbeck.data import Data, Samples
from limbeck.evaluate import ClassificationEvaluator, NearestNeighbours, Reliability, predict
from limbeck.models import MaskedAutoencoder, load_masked_autoencoder
from limbeck.recipes.tasks.classification import Classification
from limbeck.recipes.tasks.task import Evaluator
from limbeck.report import draw
from limbeck.train import Scatter


class Representation(Classification):
    """A classifier's metrics, or the accuracy of nearest neighbours where what ships gives embeddings."""

    name = "representation"
    columns = ("accuracy", "knn_accuracy", "linear.accuracy", "nll", "parameters", "latency_ms", "seconds")
    load_model = staticmethod(load_masked_autoencoder)

    def evaluator(self, data: Data) -> Evaluator:
        field = self.view_field(data.test)
        classify, neighbours = ClassificationEvaluator(field=field), NearestNeighbours(data.train, field)

        def evaluate(model: nn.Module, samples: Samples) -> dict[str, float]:
            return neighbours(model, samples) if _gives_embeddings(model) else classify(model, samples)

        return evaluate

    def reliability(self, model: nn.Module, data: Data) -> Reliability | None:
        return None if _gives_embeddings(model) else super().reliability(model, data)

    def exhibits(self, model: nn.Module, data: Data) -> dict[str, Figure]:
        """Test samples where the encoder puts them, by their two main directions."""
        encoder: Any = model if _gives_embeddings(model) else model[0]  # type: ignore[index]
        some = data.test.select(torch.arange(min(1000, len(data.test))))
        embeddings, labels = predict(encoder, some, field=self.view_field(some))
        points = torch.from_numpy(PCA(2).fit_transform(embeddings.numpy()))
        return {"Embeddings of test samples, two main directions": draw(Scatter(points, labels, data.classes))}


def _gives_embeddings(model: nn.Module) -> bool:
    return isinstance(model, MaskedAutoencoder)


TASK = Representation()
