"""Networks over graphs, and the multilayer perceptrons that learn from them.

Shapes: N nodes, E directed edges, F features, C classes, D width, R nodes that are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.models.load import DESCRIPTION, load_model
from limbeck.models.modes import evaluating
from limbeck.models.weights import load_weights, refuse_pickle


class GraphModel(nn.Module):
    """Base of networks that read a graph: `model(features_NF, edge_index_2E) -> logits_NC`.

    Edges come in both directions and without self loops; layers add the ones they need.
    """

    hops = 0  # how much of its neighbourhood a node's logits depend on

    def forward(self, features_NF: Tensor, edge_index: Tensor) -> Tensor:
        raise NotImplementedError


class GNN(GraphModel):
    """Graph layers with ReLU and dropout between them, from torch-geometric.

    gcn (Kipf & Welling 2017): D^-1/2 (A + I) D^-1/2 X W + b. sage (Hamilton et al. 2017): W_1 x_i + W_2 mean of the
    neighbours + b; the mean over no neighbours is 0. An isolated node is its own neighbourhood in both.

    `encode` is all layers but the last with ReLU and dropout behind each, `classify` the rest: what a bottleneck
    between them splits.

    Args:
        widths: of the hidden layers.
        head: `graph`, the last graph layer gives the logits; `linear`, a linear layer behind the last hidden one does.

    Raises:
        UserError: torch-geometric is not installed, or there are too few layers to have an inside.
    """

    def __init__(
        self,
        kind: Literal["gcn", "sage"],
        num_features: int,
        num_classes: int,
        widths: Sequence[int] = (64,),
        head: Literal["graph", "linear"] = "graph",
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if len(widths) < (1 if head == "graph" else 2):
            raise UserError(f"a GNN with a {head} head needs {1 if head == 'graph' else 2} widths, got {list(widths)}")
        conv = _layers()[kind]
        self.num_classes = num_classes
        self.origin = {
            "name": kind,
            "num_features": num_features,
            "num_classes": num_classes,
            "config": {"widths": list(widths), "head": head, "dropout": dropout},
        }
        sizes = [num_features, *widths, *([num_classes] if head == "graph" else [])]
        self.layers = nn.ModuleList(conv(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        self.head = nn.Linear(widths[-1], num_classes) if head == "linear" else None
        self.dropout = nn.Dropout(dropout)
        self.encoded_width = sizes[-2]
        # GCN divides by the degrees of neighbours, which are complete only with one hop more.
        self.hops = len(self.layers) + (kind == "gcn")

    def encode(self, features_NF: Tensor, edge_index: Tensor) -> Tensor:
        """h [N, D]: what the last graph layer reads."""
        for layer in list(self.layers)[:-1]:
            features_NF = self.dropout(F.relu(layer(features_NF, edge_index)))
        return features_NF

    def classify(self, h_ND: Tensor, edge_index: Tensor) -> Tensor:
        """Logits [N, C] from h or from what stands in its place."""
        out = self.layers[-1](h_ND, edge_index)
        return out if self.head is None else self.head(F.relu(out))

    def forward(self, features_NF: Tensor, edge_index: Tensor) -> Tensor:
        return self.classify(self.encode(features_NF, edge_index), edge_index)


class ForNodes(nn.Module):
    """A graph model as it is served: `rows_R -> logits_RC`, from the nodes' neighbourhood, which is looked up first."""

    features_NF: Tensor
    edge_index: Tensor

    def __init__(self, model: GraphModel, features_NF: Tensor, edge_index: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("features_NF", features_NF, persistent=False)
        self.register_buffer("edge_index", edge_index, persistent=False)

    def forward(self, rows_R: Tensor) -> Tensor:
        _layers()
        from torch_geometric.utils import k_hop_subgraph

        nodes, edges, place_R, _ = k_hop_subgraph(
            rows_R, self.model.hops, self.edge_index, relabel_nodes=True, num_nodes=len(self.features_NF)
        )
        return self.model(self.features_NF[nodes], edges)[place_R]


def node_logits(model: nn.Module, features_NF: Tensor, edge_index: Tensor) -> Tensor:
    """Logits [N, C] of all nodes in eval mode, without gradient, on the CPU; networks without a graph ignore the edges.

    A dropped-out node or a moving codebook must not enter: the model's mode is put back afterwards.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with evaluating(model), torch.inference_mode():
        inputs = (features_NF.to(device), edge_index.to(device))
        logits_NC = model(*inputs) if isinstance(model, GraphModel) else model(inputs[0])
    return logits_NC.float().cpu().clone()


def load_graph_model(
    name: str | Path | nn.Module,
    *,
    num_features: int | None = None,
    num_classes: int | None = None,
    weights: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A network for nodes: `gcn` or `sage` (`GNN`, with its arguments in `config`), or one that sees no edges.

    Everything else is `load_model`'s: `mlp` gets the features as `in_channels` and takes
    `config={"hidden": [128], "dropout": 0.6}`. A folder that `save_model` wrote gives the saved network.

    Raises:
        UserError: an unknown name or argument, missing sizes, or weights of another architecture.
    """
    if isinstance(name, nn.Module):
        return load_model(name, weights=weights)
    description, saved = Path(name) / DESCRIPTION, {}
    if description.is_file():
        refuse_pickle(Path(name))
        saved = json.loads(description.read_text())
    kind, settings = saved.get("name", str(name)), {**saved.get("config", {}), **(config or {})}
    if kind not in ("gcn", "sage"):
        channels, size = (None, None) if saved else (num_features, 1)
        return load_model(
            name, weights=weights, config=config, num_classes=num_classes, in_channels=channels, image_size=size
        )
    features, classes = saved.get("num_features", num_features), saved.get("num_classes", num_classes)
    if features is None or classes is None:
        raise UserError(f"a new '{kind}' needs num_features and num_classes; give both")
    known = ("widths", "head", "dropout")
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise UserError(f"{kind} has no argument '{unknown[0]}'; there are {', '.join(known)}")
    model = GNN(kind, features, classes, **settings)
    if weights is not None or saved:
        load_weights(model, name if weights is None else weights)
    return model


def _layers() -> dict[str, Any]:
    try:
        from torch_geometric.nn import GCNConv, SAGEConv
    except ImportError as error:
        raise UserError(
            "graph networks need torch-geometric, which is not installed: pip install limbeck[graph]"
        ) from error
    return {"gcn": GCNConv, "sage": SAGEConv}
