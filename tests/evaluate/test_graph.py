"""Which part of a graph a network is measured on."""

from __future__ import annotations

import pytest
import torch

from limbeck.data import load_graph
from limbeck.evaluate.graph import GraphEvaluator
from limbeck.models.graph import GraphModel, load_graph_model


def graph(setting="transductive"):
    around = torch.arange(40)
    content = {
        "features": torch.rand(40, 3, generator=torch.Generator().manual_seed(0)),
        "edge_index": torch.stack([around, (around + 1) % 40]),
        "label": around % 2,
    }
    return load_graph(content, train_per_class=3, validation_per_class=3, setting=setting)


class Degrees(GraphModel):
    """Says class 1 of nodes that have lost a neighbour, and remembers how many nodes it saw."""

    def forward(self, features_NF, edge_index):
        self.seen = len(features_NF)
        degree_N = torch.zeros(self.seen).index_add(0, edge_index[0], torch.ones(edge_index.shape[1]))
        return torch.stack([degree_N, 2.5 - 0 * degree_N - (degree_N == 2).float()], 1)


def test_without_hidden_nodes_the_whole_graph_is_read():
    data, model = graph(), Degrees()
    metrics = GraphEvaluator(data)(model, data.test)
    assert model.seen == 40 and "accuracy_hidden" not in metrics
    assert metrics["accuracy"] == pytest.approx(float((data.test.labels == 0).float().mean()))


def test_observed_nodes_are_measured_without_hidden_ones_and_test_nodes_with_them():
    data, model = graph("inductive"), Degrees()
    evaluator = GraphEvaluator(data)
    evaluator(model, data.validation)
    assert model.seen == 40 - int(data.hidden.sum())
    metrics = evaluator(model, data.test)
    assert model.seen == 40
    labels, hidden = data.test.labels, data.test.fields["hidden"]
    assert metrics["accuracy_hidden"] == pytest.approx(float((labels[hidden] == 0).double().mean()))
    assert metrics["accuracy_observed"] == pytest.approx(float((labels[~hidden] == 0).double().mean()))


def test_rows_of_the_observed_part_are_found_by_the_nodes_numbers():
    data = graph("inductive")
    torch.manual_seed(0)
    mlp = load_graph_model("mlp", num_features=3, num_classes=2, config={"hidden": [4]})
    right = mlp(data.validation.fields["features"]).argmax(1) == data.validation.labels
    assert GraphEvaluator(data)(mlp, data.validation)["accuracy"] == pytest.approx(float(right.float().mean()))
