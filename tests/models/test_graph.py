"""Graph networks against dense formulas, and how they are loaded, served and saved."""

from __future__ import annotations

import builtins

import pytest
import torch
import torch.nn.functional as F

from limbeck.data.graphs import undirected
from limbeck.errors import UserError
from limbeck.models import save_model
from limbeck.models.graph import GNN, ForNodes, load_graph_model, node_logits

pytest.importorskip("torch_geometric")

N, FEATURES, C = 9, 5, 3
EDGES = undirected(torch.tensor([[0, 1, 2, 0, 4, 5], [1, 2, 3, 3, 5, 6]]), N)  # 7 and 8 are isolated
X = torch.randn(N, FEATURES, generator=torch.Generator().manual_seed(0))


def gnn(kind="gcn", **settings) -> GNN:
    torch.manual_seed(1)
    return GNN(kind, FEATURES, C, **{"widths": (8, 6), "dropout": 0.0, **settings}).eval()


def adjacency() -> torch.Tensor:
    return torch.zeros(N, N).index_put((EDGES[0], EDGES[1]), torch.ones(EDGES.shape[1]))


@pytest.mark.parametrize("head", ["graph", "linear"])
def test_a_gcn_is_the_dense_formula(head):
    model = gnn(head=head)
    with_loops = adjacency() + torch.eye(N)
    scale = with_loops.sum(1).rsqrt()
    normalised = scale[:, None] * with_loops * scale
    h = X
    for number, layer in enumerate(model.layers):
        h = normalised @ (h @ layer.lin.weight.T) + layer.bias
        if number < len(model.layers) - 1 or head == "linear":
            h = F.relu(h)
    h = h if model.head is None else model.head(h)
    assert torch.allclose(model(X, EDGES), h, atol=1e-5)


def test_a_sage_layer_adds_the_mean_of_the_neighbours():
    model = gnn("sage", widths=(8,))
    h = X
    for number, layer in enumerate(model.layers):
        mean = adjacency() @ h / adjacency().sum(1, keepdim=True).clamp(min=1)
        h = mean @ layer.lin_l.weight.T + layer.lin_l.bias + h @ layer.lin_r.weight.T
        h = F.relu(h) if number == 0 else h
    assert torch.allclose(model(X, EDGES), h, atol=1e-5)


@pytest.mark.parametrize("kind", ["gcn", "sage"])
def test_isolated_nodes_have_finite_logits_of_their_own_features_alone(kind):
    model = gnn(kind)
    logits = model(X, EDGES)
    assert bool(logits.isfinite().all())
    nothing = torch.empty(2, 0, dtype=torch.long)
    assert torch.allclose(model(X, nothing)[7:], logits[7:], atol=1e-6)


@pytest.mark.parametrize("kind", ["gcn", "sage"])
def test_a_node_is_served_from_its_neighbourhood_as_from_the_whole_graph(kind):
    model = gnn(kind, widths=(8,))
    rows = torch.tensor([8, 1, 5, 1])
    # The degrees at the rim of a neighbourhood count only edges inside it, so GCN looks up one hop more.
    assert model.hops == (3 if kind == "gcn" else 2)
    assert torch.allclose(ForNodes(model, X, EDGES)(rows), model(X, EDGES)[rows], atol=1e-6)


def test_encode_and_classify_are_the_two_halves_of_the_network():
    model = gnn()
    assert torch.equal(model.classify(model.encode(X, EDGES), EDGES), model(X, EDGES))
    assert model.encode(X, EDGES).shape == (N, model.encoded_width)


def test_logits_of_all_nodes_come_without_dropout_and_leave_modes_alone():
    model = gnn(dropout=0.9).train()
    assert torch.equal(node_logits(model, X, EDGES), node_logits(model, X, EDGES))
    assert all(module.training for module in model.modules())
    mlp = load_graph_model("mlp", num_features=FEATURES, num_classes=C, config={"hidden": [4], "dropout": 0.6})
    assert torch.equal(node_logits(mlp, X, EDGES), node_logits(mlp, X, EDGES[:, :0]))


@pytest.mark.parametrize("name", ["gcn", "sage", "mlp"])
def test_a_saved_network_loads_as_it_was(name, tmp_path):
    config = {"hidden": [7], "dropout": 0.3} if name == "mlp" else {"widths": [7, 6], "head": "linear"}
    model = load_graph_model(name, num_features=FEATURES, num_classes=C, config=config).eval()
    again = load_graph_model(save_model(model, tmp_path / name), num_features=FEATURES, num_classes=C).eval()
    assert torch.equal(node_logits(again, X, EDGES), node_logits(model, X, EDGES))


def test_what_does_not_fit_is_named():
    with pytest.raises(UserError, match="gcn has no argument 'width'; there are widths, head, dropout"):
        load_graph_model("gcn", num_features=2, num_classes=2, config={"width": 3})
    with pytest.raises(UserError, match="needs num_features and num_classes"):
        load_graph_model("sage", num_classes=2)
    with pytest.raises(UserError, match="There is no model 'gat'"):
        load_graph_model("gat", num_features=2, num_classes=2)
    with pytest.raises(UserError, match="a linear head needs 2 widths"):
        GNN("gcn", 2, 2, widths=(3,), head="linear")


def test_without_torch_geometric_one_sentence_says_so(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("torch_geometric"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"need torch-geometric, which is not installed: pip install limbeck\[graph\]"):
        GNN("gcn", 2, 2)
