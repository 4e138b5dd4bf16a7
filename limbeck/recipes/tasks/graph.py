"""Classification of the nodes of a graph."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from limbeck.data import Data, Graph, load_graph
from limbeck.errors import UserError
from limbeck.evaluate.graph import GraphEvaluator
from limbeck.models.graph import GraphModel, load_graph_model
from limbeck.recipes.tasks.task import Evaluator, Task


class GraphTask(Task):
    """Accuracy on the nodes that were not trained on, and what one node costs without its neighbours."""

    name = "graph"
    columns = ("accuracy", "nll", "ece", "parameters", "latency_ms", "seconds")
    load_data = staticmethod(load_graph)
    load_model: ClassVar[Any] = staticmethod(load_graph_model)

    def shape(self, data: Data, section: str) -> dict[str, Any]:
        return {"num_features": data.train.fields["features"].shape[1], "num_classes": data.num_classes}

    def evaluator(self, data: Data) -> Evaluator:
        return GraphEvaluator(_graph(data))

    def metrics(self, model: nn.Module, data: Data) -> dict[str, float]:
        if isinstance(model, GraphModel):  # no single sample to measure its cost on
            weights = sum(parameter.numel() for parameter in model.parameters())
            return {**self.evaluator(data)(model, data.test), "parameters": weights}
        return super().metrics(model, data)


def _graph(data: Data) -> Graph:
    if not isinstance(data, Graph):
        raise UserError(f"the task 'graph' needs a Graph, got {type(data).__name__}; load it with load_graph")
    return data


TASK = GraphTask()
