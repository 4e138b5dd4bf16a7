"""How well nodes are classified, by networks that see the graph and by those that do not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from limbeck.data import Graph, Samples
from limbeck.evaluate.classification import classification_metrics
from limbeck.models.graph import node_logits


@dataclass(frozen=True)
class GraphEvaluator:
    """`evaluator(model, samples)`: the metrics of `classification_metrics` on nodes of a graph.

    A graph network sees the observed part of the graph when no node of the samples is hidden, else all of it. Where
    some are hidden and some not, `accuracy_observed` and `accuracy_hidden` are given beside `accuracy` over both.
    """

    graph: Graph

    def __call__(self, model: nn.Module, samples: Samples) -> dict[str, float]:
        graph, hidden_N = self.graph, self.graph.hidden
        rows, hidden_S = samples.index, self.graph.hidden[samples.index]
        if hidden_S.any() or not hidden_N.any():
            logits_NC = node_logits(model, graph.nodes.fields["features"], graph.edge_index)
        else:
            observed = graph.observed
            logits_NC = node_logits(model, observed.fields["features"], graph.observed_edges)
            rows = ((~hidden_N).cumsum(0) - 1)[rows]
        logits_SC = logits_NC[rows]
        metrics = classification_metrics(logits_SC, samples.labels)
        if hidden_S.any() and not hidden_S.all():
            right_S = (logits_SC.argmax(1) == samples.labels).to(torch.float64)
            metrics["accuracy_observed"] = float(right_S[~hidden_S].mean())
            metrics["accuracy_hidden"] = float(right_S[hidden_S].mean())
        return metrics
