"""Graphs: sources, splits, hidden nodes, and edges that cannot be."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch

from limbeck.data import data_folder, full_batch, load_graph
from limbeck.data.graphs import NO_LABEL, _ArraysOnly, subgraph, undirected
from limbeck.errors import UserError

needs_cora = pytest.mark.skipif(not (data_folder() / "cora").is_dir(), reason="the graph cora is not in LIMBECK_DATA")


def ring(nodes: int = 40, classes: int = 2) -> dict:
    """A ring whose last node is isolated."""
    around = torch.arange(nodes - 1)
    features = torch.rand(nodes, 5, generator=torch.Generator().manual_seed(0))
    return {
        "features": features,
        "edge_index": torch.stack([around, (around + 1) % (nodes - 1)]),
        "label": torch.arange(nodes) % classes,
    }


def load(**settings):
    return load_graph(ring(), train_per_class=3, validation_per_class=4, **settings)


def test_edges_go_both_ways_once_and_never_to_themselves():
    edges = undirected(torch.tensor([[0, 1, 1, 2, 2], [1, 0, 2, 2, 1]]), 3)
    assert edges.T.tolist() == [[0, 1], [1, 0], [1, 2], [2, 1]]


@pytest.mark.parametrize("bad", [[[0], [3]], [[-1], [0]]])
def test_an_edge_to_a_node_that_does_not_exist_is_named(bad):
    with pytest.raises(UserError, match=r"edge 0 joins the nodes .* but there are 3 nodes \(0 to 2\)"):
        undirected(torch.tensor(bad), 3)


def test_edges_of_another_form_are_refused():
    with pytest.raises(UserError, match=r"edge_index is int64 \[4, 2\]; give int64 \[2, edges\]"):
        undirected(torch.zeros(4, 2, dtype=torch.long), 3)


def test_a_subgraph_numbers_its_nodes_anew():
    edges = undirected(torch.tensor([[0, 1, 3], [1, 2, 4]]), 5)
    kept = torch.tensor([False, True, True, True, True])
    assert subgraph(edges, kept).T.tolist() == [[0, 1], [1, 0], [2, 3], [3, 2]]


def test_a_cpf_split_has_so_many_of_each_class_and_the_rest_for_the_test():
    graph = load()
    assert graph.train.labels.bincount().tolist() == [3, 3]
    assert graph.validation.labels.bincount().tolist() == [4, 4]
    everyone = torch.cat([graph.train.index, graph.validation.index, graph.test.index])
    assert everyone.sort().values.tolist() == list(range(40))
    assert torch.equal(graph.nodes.labels[graph.test.index], graph.test.labels)


def test_the_split_follows_the_seed_or_its_own():
    assert not torch.equal(load(seed=0).train.index, load(seed=1).train.index)
    assert torch.equal(load(seed=0, split_seed=5).train.index, load(seed=1, split_seed=5).train.index)


def test_a_class_that_is_too_small_is_named():
    with pytest.raises(UserError, match=r"class 0 has 20 nodes, and 18 for training and 4 .* lower train_per_class"):
        load_graph(ring(), train_per_class=18, validation_per_class=4)


def test_in_the_transductive_setting_everything_but_labels_is_observed():
    graph = load()
    assert torch.equal(graph.observed.index, torch.arange(40)) and torch.equal(graph.observed_edges, graph.edge_index)
    known = graph.observed.fields["train_label"]
    assert (known != NO_LABEL).nonzero().flatten().tolist() == graph.train.index.tolist()
    assert torch.equal(known[graph.train.index], graph.train.labels)
    assert "label" not in graph.observed.fields and "label" not in graph.unlabelled.fields


def test_in_the_inductive_setting_a_fifth_of_the_test_nodes_and_their_edges_are_hidden():
    graph = load(setting="inductive")
    hidden = graph.hidden.nonzero().flatten()
    assert len(hidden) == round(0.2 * len(graph.test)) and set(hidden.tolist()) <= set(graph.test.index.tolist())
    assert torch.equal(graph.test.index[graph.test.fields["hidden"]], hidden)
    numbers = graph.observed.index
    joined = {tuple(edge) for edge in numbers[graph.observed_edges].T.tolist()}
    assert not any(node in hidden.tolist() for edge in joined for node in edge)
    kept = {tuple(edge) for edge in graph.edge_index.T.tolist() if not set(edge) & set(hidden.tolist())}
    assert joined == kept
    assert not set(graph.unlabelled.index.tolist()) & set(hidden.tolist())


def test_the_largest_component_leaves_isolated_nodes_out():
    graph = load(largest_component=True)
    assert len(graph.nodes) == 39 and graph.edge_index.shape[1] == 2 * 39


def test_an_npz_file_in_cpf_layout_reads_as_the_graph_it_holds(tmp_path):
    from scipy.sparse import csr_matrix

    content = ring()
    adjacency = csr_matrix((np.ones(39), content["edge_index"].numpy()), shape=(40, 40))
    attributes = csr_matrix(content["features"].numpy())
    parts = {f"adj_{name}": getattr(adjacency, name) for name in ("data", "indices", "indptr", "shape")}
    parts |= {f"attr_{name}": getattr(attributes, name) for name in ("data", "indices", "indptr", "shape")}
    np.savez(tmp_path / "ring.npz", **parts, labels=content["label"].numpy())
    settings = {"train_per_class": 3, "validation_per_class": 4}
    read, memory = load_graph(tmp_path / "ring.npz", **settings), load_graph(content, **settings)
    assert torch.equal(read.edge_index, memory.edge_index) and torch.equal(read.test.labels, memory.test.labels)
    assert torch.equal(read.nodes.fields["features"], memory.nodes.fields["features"]) and read.name == "ring"


def test_given_splits_are_taken_as_they_are_and_may_not_share_nodes():
    content = {**ring(), "train": [0, 1], "validation": [2], "test": [4, 3]}
    graph = load_graph(content, split="given")
    assert graph.train.index.tolist() == [0, 1] and graph.test.index.tolist() == [4, 3]
    with pytest.raises(UserError, match="splits share a node"):
        load_graph({**content, "validation": [0]}, split="given")
    with pytest.raises(UserError, match="comes without the split 'train'"):
        load_graph(ring(), split="given")


def test_features_can_be_made_to_sum_to_one():
    graph = load(normalize_features=True)
    assert torch.allclose(graph.nodes.fields["features"].sum(1), torch.ones(40))


def test_a_full_batch_holds_all_nodes_in_order_for_every_process():
    stream = full_batch(load().observed)
    stream.open("nodes", seed=3, rank=1, world_size=2)
    for _ in range(3):
        assert torch.equal(stream.next()["index"], torch.arange(40))
    assert stream.steps_per_epoch == 1


def test_a_graph_that_is_not_there_and_one_without_edges_are_named(tmp_path):
    with pytest.raises(UserError, match="there is no graph"):
        load_graph(tmp_path / "nothing")
    with pytest.raises(UserError, match="a graph needs features, edge_index and label; got features"):
        load_graph({"features": np.ones((2, 2))})


class Harm:
    def __reduce__(self):
        return os.system, ("true",)


def test_a_planetoid_file_that_would_run_code_is_refused(tmp_path):
    (tmp_path / "harm").write_bytes(pickle.dumps(Harm(), protocol=2))
    with pytest.raises(UserError, match=r"the file asks for \w+\.system, which no graph needs"):
        _ArraysOnly((tmp_path / "harm").open("rb")).load()


@needs_cora
def test_cora_has_the_sizes_that_are_published_and_its_folder_stays_as_it_is():
    before = sorted(path.name for path in (data_folder() / "cora").rglob("*"))
    graph = load_graph("cora", split="given")
    assert len(graph.nodes) == 2708 and graph.edge_index.shape == (2, 10556) and graph.num_classes == 7
    assert graph.nodes.fields["features"].shape[1] == 1433
    assert (len(graph.train), len(graph.validation), len(graph.test)) == (140, 500, 1000)
    assert graph.train.labels.bincount().tolist() == [20] * 7
    assert graph.nodes.labels.bincount().tolist() == [351, 217, 418, 818, 426, 298, 180]
    assert sorted(path.name for path in (data_folder() / "cora").rglob("*")) == before


@needs_cora
def test_planetoid_files_give_what_torch_geometric_reads_from_them(tmp_path):
    pytest.importorskip("torch_geometric")
    from torch_geometric.datasets import Planetoid

    (tmp_path / "Cora").mkdir()
    (tmp_path / "Cora" / "raw").symlink_to(data_folder() / "cora" / "raw")
    theirs = Planetoid(tmp_path, "Cora")[0]
    ours = load_graph("cora", split="given")
    assert torch.equal(theirs.x, ours.nodes.fields["features"]) and torch.equal(theirs.y, ours.nodes.labels)
    assert torch.equal(undirected(theirs.edge_index, 2708), ours.edge_index)
    for mask, split in (
        (theirs.train_mask, ours.train),
        (theirs.val_mask, ours.validation),
        (theirs.test_mask, ours.test),
    ):
        assert torch.equal(mask.nonzero().flatten(), split.index)


@needs_cora
def test_the_largest_component_of_cora_is_that_of_cpf():
    assert len(load_graph("cora", largest_component=True).nodes) == 2485
