"""VQGraph's facts: what its losses are, what they reduce to, and what the student does not need."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from limbeck.data import Graph, full_batch, load_graph
from limbeck.errors import UserError
from limbeck.evaluate.graph import GraphEvaluator
from limbeck.methods.graph.vqgraph import (
    LearnFromTokens,
    LearnTokens,
    Tokenizer,
    cached,
    dense_adjacency,
    edge_reconstruction,
    vqgraph,
)
from limbeck.models.graph import load_graph_model
from limbeck.train import Optimizer, Stage, StreamSettings, Trainer, Workspace, average_gradients

pytest.importorskip("torch_geometric")

F_, C, K, D = 6, 2, 8, 4


def graph(setting: str = "transductive") -> Graph:
    """Two rings, one a class, whose features hint at it; the last node is isolated."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(31) % C
    source = torch.arange(28)
    features = torch.rand(31, F_, generator=generator) + 0.5 * F.one_hot(label, F_)
    content = {"features": features, "edge_index": torch.stack([source, (source + 2) % 30]), "label": label}
    return load_graph(content, train_per_class=3, validation_per_class=3, setting=setting)


def teacher(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    config = {"widths": [D, 5], "head": "linear", "dropout": dropout}
    return load_graph_model("gcn", num_features=F_, num_classes=C, config=config)


def student() -> nn.Module:
    torch.manual_seed(2)
    return load_graph_model("mlp", num_features=F_, num_classes=C, config={"hidden": [7]})


def tokenizer() -> Tokenizer:
    net = teacher()
    return Tokenizer(net, K, 0.8, 0.25)


def known(data: Graph) -> dict[str, torch.Tensor]:
    return cached(tokenizer().eval(), data)


def batch(data: Graph, found: dict[str, torch.Tensor], order: torch.Tensor | None = None) -> dict:
    samples = data.observed.with_fields({name: found[name] for name in ("teacher_logits", "code_scores")})
    order = torch.arange(len(samples)) if order is None else order
    return {"labelled": data.train.batch(torch.arange(len(data.train))), "unlabelled": samples.batch(order)}


def total(method: LearnFromTokens, fields: dict) -> torch.Tensor:
    return sum(method.weights[name] * value for name, value in method.training_step(fields).items())


# -- stage 1


def test_edge_reconstruction_is_the_root_mean_square_against_the_rescaled_products() -> None:
    q, adjacency = torch.randn(5, 3), (torch.rand(5, 5) > 0.5).float()
    product = q @ q.T
    rescaled = (product - product.min()) / (product.max() - product.min())
    expected = torch.sqrt(((adjacency - rescaled) ** 2).mean())
    assert torch.allclose(edge_reconstruction(q, adjacency), expected, atol=1e-5)


def test_edge_reconstruction_of_equal_nodes_has_a_finite_gradient() -> None:
    q = torch.ones(4, 3, requires_grad=True)
    edge_reconstruction(q, torch.zeros(4, 4)).backward()
    assert bool(q.grad.isfinite().all())


def test_the_adjacency_among_some_nodes_has_their_edges_and_self_loops() -> None:
    data = graph()
    whole = dense_adjacency(data.edge_index, torch.arange(31), 31)
    expected = torch.eye(31)
    expected[data.edge_index[0], data.edge_index[1]] = 1
    assert torch.equal(whole, expected)
    rows = torch.tensor([7, 30, 5, 9])
    assert torch.equal(dense_adjacency(data.edge_index, rows, 31), expected[rows][:, rows])


def test_stage_one_sums_class_commitment_node_and_edge_terms() -> None:
    data, model = graph(), tokenizer()
    method = LearnTokens(model, data.observed_edges, lamb_node=0.001, lamb_edge=0.03, edge_nodes=None)
    nodes = data.observed.batch(torch.arange(31))
    losses = method.eval().training_step({"nodes": nodes})
    tokens = model.tokenize(nodes["features"], data.edge_index)
    assert method.weights == {"node": 0.001, "edge": 0.03}
    expected = F.cross_entropy(tokens.logits_NC[data.train.index], data.train.labels)
    assert torch.allclose(losses["ce"], expected)
    assert torch.allclose(
        losses["commitment"], 0.25 * (tokens.h_ND - model.quantizer.codebook[tokens.codes_N]).square().mean()
    )
    assert torch.allclose(losses["node"], (tokens.h_ND - tokens.node_ND).square().mean())
    whole = dense_adjacency(data.edge_index, torch.arange(31), 31)
    assert torch.allclose(losses["edge"], edge_reconstruction(tokens.edge_ND, whole))  # whatever the drawn order


def test_stage_one_learns_edges_through_the_codes_and_never_the_codes_by_gradient() -> None:
    data, model = graph(), tokenizer()
    method = LearnTokens(model, data.observed_edges, lamb_node=0.001, lamb_edge=0.03, edge_nodes=20)
    method.training_step({"nodes": data.observed.batch(torch.arange(31))})["edge"].backward()
    assert float(model.gnn.layers[0].lin.weight.grad.norm()) > 0
    assert "quantizer.codebook" not in dict(model.named_parameters())


def test_labels_of_other_than_training_nodes_are_not_read() -> None:
    data = graph()
    assert set(data.observed.fields) == {"features", "index", "train_label"}
    assert int((data.observed.fields["train_label"] >= 0).sum()) == len(data.train)


# -- stage 2


def test_without_beta_and_lamb_the_loss_is_glnn_without_labels() -> None:
    data, found = graph(), known(graph())
    method = LearnFromTokens(student(), found["codebook"], beta=0.0, lamb=0.0).eval()
    p, q = found["teacher_logits"].exp(), method.student(data.observed.fields["features"]).log_softmax(-1)
    expected = (p * (p.log() - q)).sum(-1).mean()
    fields = batch(data, found)
    assert torch.allclose(total(method, fields), expected, atol=1e-6)
    fields["labelled"]["label"] = 1 - fields["labelled"]["label"]
    assert torch.allclose(total(method, fields), expected, atol=1e-6)


def test_with_lamb_one_and_without_beta_the_loss_is_cross_entropy() -> None:
    data, found = graph(), known(graph())
    method = LearnFromTokens(student(), found["codebook"], beta=0.0, lamb=1.0).eval()
    expected = F.cross_entropy(method.student(data.train.fields["features"]), data.train.labels)
    assert torch.allclose(total(method, batch(data, found)), expected)


def test_the_code_loss_is_zero_where_the_student_stands_on_the_teachers_vector() -> None:
    found = known(graph())
    same = LearnFromTokens(student(), found["codebook"], code_metric="cosine")
    mixed = LearnFromTokens(student(), found["codebook"], code_metric="mixed")
    assert float(same.code_loss(found["vectors"], found["code_scores"])) == pytest.approx(0, abs=1e-5)
    assert float(mixed.code_loss(found["vectors"], found["code_scores"])) > 1e-3


def test_the_code_loss_is_the_divergence_between_log_probabilities() -> None:
    found = known(graph())
    method = LearnFromTokens(student(), found["codebook"], temperature=0.5, code_metric="mixed")
    r = torch.randn(31, D)
    p = (found["code_scores"] / 0.5).softmax(-1)
    q = (-(r[:, None] - found["codebook"]).norm(dim=-1) / 0.5).softmax(-1)
    expected = 0.25 * (p * (p / q).log()).sum(-1).mean()
    assert torch.allclose(method.code_loss(r, found["code_scores"]), expected, atol=1e-5)


def test_the_code_loss_has_a_finite_limit_for_large_temperatures() -> None:
    """T^2 KL tends to half the mean squared difference of the centred scores."""
    found, r = known(graph()), torch.randn(31, D, dtype=torch.float64)
    scores, codebook = found["code_scores"].double(), found["codebook"].double()
    at = {t: LearnFromTokens(student(), codebook, temperature=t).code_loss(r, scores).item() for t in (50.0, 100.0)}
    assert at[50.0] == pytest.approx(at[100.0], rel=0.01)
    difference = F.normalize(r, dim=-1) @ F.normalize(codebook, dim=-1).T - scores
    centred = difference - difference.mean(-1, keepdim=True)
    assert at[100.0] == pytest.approx(float(centred.square().mean(-1).mean() / 2), rel=0.02)


def test_the_order_of_the_nodes_does_not_change_the_loss() -> None:
    data, found = graph(), known(graph())
    method = LearnFromTokens(student(), found["codebook"], temperature=0.1).eval()
    shuffled = torch.randperm(31, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(total(method, batch(data, found)), total(method, batch(data, found, shuffled)), atol=1e-6)


def test_hard_codes_are_cross_entropy_with_the_nearest_code() -> None:
    found = known(graph())
    method = LearnFromTokens(student(), found["codebook"], temperature=0.5, code_target="hard")
    logits = F.normalize(found["vectors"], dim=-1) @ F.normalize(found["codebook"], dim=-1).T / 0.5
    expected = 0.25 * F.cross_entropy(logits, found["codes"])
    assert torch.allclose(method.code_loss(found["vectors"], found["code_scores"]), expected, atol=1e-5)


def test_the_pull_of_the_code_loss_is_logged() -> None:
    data, found = graph(), known(graph())
    pull = {}
    for beta in (1e-8, 1.0):
        method = LearnFromTokens(student(), found["codebook"], temperature=0.1, beta=beta)
        method.training_step(batch(data, found))
        pull[beta] = float(method.logged["code_gradient"])
    assert pull[1e-8] < 1e-6 < 1e-2 < pull[1.0]  # the official beta does nothing


# -- the system


def stage(steps: int, size: int | None = None) -> Stage:
    trainer = Trainer(
        epochs=steps, optimizer=Optimizer("adam", 0.01), accelerator="cpu", select="accuracy", evaluate_every=5
    )
    streams = {"labelled": StreamSettings(6, {}, True), "unlabelled": StreamSettings(size, {})} if size else {}
    return Stage(trainer, streams)


def run(path: Path, data: Graph, **settings) -> tuple[nn.Module, Workspace]:
    ws = Workspace(path, evaluator=GraphEvaluator(data))
    return vqgraph(ws, data, student(), teacher(), tokenizer=stage(20), distill=stage(10, 10), codes=K, **settings), ws


def test_the_student_ships_without_codebook_and_graph_and_reloads_from_its_workspace(tmp_path: Path) -> None:
    data = graph()
    shipped, ws = run(tmp_path, data, temperature=0.1)
    assert sum(p.numel() for p in shipped.parameters()) == sum(p.numel() for p in student().parameters())
    assert not list(shipped.buffers())
    measured = ws.measured
    assert 1 <= measured["codes.used"] <= K and measured["teacher.accuracy"] >= 0
    assert 0 <= measured["codes.homogeneity"] <= 1 and 0 <= measured["codes.entropy_share"] <= 1
    again, _ = run(tmp_path, data, temperature=0.1)
    row = data.test.fields["features"][:1]
    assert torch.equal(shipped(row), again(row))


def test_hidden_nodes_change_nothing_that_is_learnt(tmp_path: Path) -> None:
    data = graph("inductive")
    changed = dict(data.nodes.fields)
    changed["features"] = torch.where(
        data.hidden[:, None], torch.full_like(changed["features"], 9.0), changed["features"]
    )
    other = Graph(
        train=data.train, test=data.test, validation=data.validation, unlabelled=data.unlabelled,
        nodes=data.nodes.with_fields({"features": changed["features"]}), edge_index=data.edge_index, hidden=data.hidden,
    )  # fmt: skip
    first, second = (run(tmp_path / str(n), d)[0] for n, d in enumerate((data, other)))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    metrics = GraphEvaluator(data)(first, data.test)
    hidden = data.test.fields["hidden"].float().mean()
    mixed = hidden * metrics["accuracy_hidden"] + (1 - hidden) * metrics["accuracy_observed"]
    assert metrics["accuracy"] == pytest.approx(float(mixed), abs=1e-6)


def test_a_teacher_that_is_no_graph_network_is_refused() -> None:
    with pytest.raises(UserError, match=r"VQGraph's teacher is a graph network \(gcn, sage\), got Mlp"):
        Tokenizer(student(), K, 0.8, 0.25)


def step_of_both_stages() -> dict[str, torch.Tensor]:
    """Averaged gradients of a step of each stage, and the codebook, with this process's share of the global batch."""
    data = graph()
    method = LearnTokens(tokenizer(), data.observed_edges, lamb_node=0.001, lamb_edge=0.03, edge_nodes=None)
    stream = full_batch(data.observed)
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    stream.open("nodes", 0, rank, world)
    losses = method.training_step({"nodes": stream.next()})
    (sum(method.weights.get(name, 1.0) * value for name, value in losses.items())).backward()
    average_gradients(method.parameters())
    states = {f"1.{name}": p.grad for name, p in method.named_parameters()}
    states["codebook"] = method.student.quantizer.codebook.clone()
    found = known(data)
    mlp = LearnFromTokens(student(), found["codebook"], temperature=0.1, lamb=0.5)
    rows = torch.arange(30).chunk(world)[rank]
    fields = batch(data, found, rows)
    fields["labelled"] = data.train.batch(torch.arange(6).chunk(world)[rank])
    total(mlp, fields).backward()
    average_gradients(mlp.parameters())
    return {**states, **{f"2.{name}": p.grad for name, p in mlp.named_parameters()}}


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(step_of_both_stages(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_take_the_step_that_one_takes(tmp_path: Path) -> None:
    mp.spawn(process, args=(str(tmp_path),), nprocs=2)
    alone = step_of_both_stages()
    for rank in range(2):
        both = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in alone.items():
            assert torch.allclose(both[name], value, atol=1e-5), name


@pytest.mark.slow
def test_a_wide_teacher_with_five_thousand_codes_takes_a_step_of_each_stage() -> None:
    generator = torch.Generator().manual_seed(0)
    nodes = 2000
    content = {
        "features": torch.rand(nodes, 500, generator=generator),
        "edge_index": torch.randint(nodes, (2, 10_000), generator=generator),
        "label": torch.arange(nodes) % 7,
    }
    data = load_graph(content)
    net = load_graph_model("sage", num_features=500, num_classes=7, config={"widths": [1024, 1024], "head": "linear"})
    model = Tokenizer(net, 5000, 0.8, 0.25)
    method = LearnTokens(model, data.observed_edges, lamb_node=0.001, lamb_edge=0.03, edge_nodes=None)
    losses = method.training_step({"nodes": data.observed.batch(torch.arange(nodes))})
    sum(losses.values()).backward()
    found = cached(model.eval(), data)
    mlp = load_graph_model("mlp", num_features=500, num_classes=7, config={"hidden": [1024]})
    second = LearnFromTokens(mlp, found["codebook"])
    step = total(second, batch(data, found, torch.arange(512)))
    step.backward()
    assert bool(step.isfinite()) and found["code_scores"].shape == (nodes, 5000)
