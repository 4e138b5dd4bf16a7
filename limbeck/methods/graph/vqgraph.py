"""VQGraph: an MLP learns from a graph network which of many local structures surrounds a node, and its class.

Yang et al.: VQGraph: Rethinking Graph Representation Space for Bridging GNNs and MLPs, ICLR 2024 (arXiv 2308.02117).

Stage 1, a tokenizer: h = GNN layers of (X, A) but the last, z_i = argmax_k cos(h_i, E_k), q = E_z straight through,
q_n and q_e two linear maps of q, logits = last GNN layer and head of (q_e, A):

    L1 = CE(labelled) + commitment + lamb_node mean (h - q_n)^2
         + lamb_edge sqrt( mean over node pairs (A + I - minmax(q_e q_e^T))^2 )

Stage 2, with p^T the tokenizer's classes, s its scores over the codes, r a second head on the MLP's hidden layer:

    L2 = lamb CE(labelled) + (1 - lamb) KL(p^T || p^S) + beta T^2 KL(softmax(s / T) || softmax(score(r, E) / T))
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.metrics import homogeneity_score
from torch import Tensor, nn

from limbeck.data import Graph, full_batch
from limbeck.data.graphs import NO_LABEL
from limbeck.errors import UserError, require_share
from limbeck.labels.prototypes import prototype_scores
from limbeck.losses import entropy, kl_divergence
from limbeck.models import measure_latency, split_head
from limbeck.models.graph import GNN, ForNodes, GraphModel, node_logits
from limbeck.models.quantize import VectorQuantizer, code_usage
from limbeck.train import Bars, Batch, Losses, Method, Scatter, Stage, Workspace


class Tokens(NamedTuple):
    """What the tokenizer says of N nodes: h and q_n, q_e [N, D], scores [N, K], codes [N], logits [N, C]."""

    h_ND: Tensor
    node_ND: Tensor
    edge_ND: Tensor
    scores_NK: Tensor
    codes_N: Tensor
    commitment: Tensor
    logits_NC: Tensor


class Tokenizer(GraphModel):
    """A graph network with a quantiser in front of its last graph layer. It takes the network's layers over."""

    def __init__(self, gnn: GNN, codes: int, decay: float, commitment: float) -> None:
        super().__init__()
        if not isinstance(gnn, GNN):
            raise UserError(f"VQGraph's teacher is a graph network (gcn, sage), got {type(gnn).__name__}")
        width = gnn.encoded_width
        self.num_classes, self.hops = gnn.num_classes, gnn.hops
        self.quantizer = VectorQuantizer(codes, width, decay=decay, commitment=commitment)
        self.edge_decoder, self.node_decoder = nn.Linear(width, width), nn.Linear(width, width)
        self.gnn = gnn

    def tokenize(self, features_NF: Tensor, edge_index: Tensor) -> Tokens:
        h_ND = self.gnn.encode(features_NF, edge_index)
        found = self.quantizer(h_ND)
        edge_ND = self.edge_decoder(found.vectors)
        logits_NC = self.gnn.classify(edge_ND, edge_index)
        node_ND = self.node_decoder(found.vectors)
        return Tokens(h_ND, node_ND, edge_ND, found.scores, found.codes, found.commitment, logits_NC)

    def forward(self, features_NF: Tensor, edge_index: Tensor) -> Tensor:
        return self.tokenize(features_NF, edge_index).logits_NC


def edge_reconstruction(q_ND: Tensor, adjacency_NN: Tensor, eps: float = 1e-8) -> Tensor:
    """sqrt(mean (A - minmax(q q^T))^2); minmax rescales the whole matrix to [0, 1].

    `eps` guards both where the product is constant or the reconstruction perfect: there the gradient is undefined.
    Source: GCN.forward of the official code, whose adjacency has self loops.
    """
    product_NN = q_ND.float() @ q_ND.float().T
    low, high = product_NN.aminmax()
    return ((adjacency_NN - (product_NN - low) / (high - low + eps)).square().mean() + eps).sqrt()


def dense_adjacency(edge_index: Tensor, rows_R: Tensor, nodes: int) -> Tensor:
    """float32 [R, R]: the edges among these nodes, with ones on the diagonal."""
    rows, device = len(rows_R), rows_R.device
    place_N = torch.full((nodes,), rows, device=device).scatter(0, rows_R, torch.arange(rows, device=device))
    # Edges to all other nodes fall into a last row and column, which are cut off: no mask is read back.
    adjacency = torch.zeros(rows + 1, rows + 1, device=device)
    adjacency[place_N[edge_index[0]], place_N[edge_index[1]]] = 1.0
    return adjacency[:rows, :rows].fill_diagonal_(1.0)


class LearnTokens(Method):
    """Stage 1: classes, codes and reconstructions, on all observed nodes at once.

    Args:
        student: the tokenizer.
        edge_index: int64 [2, E], numbering the nodes of the stream.
        edge_nodes: pairs are compared among this many nodes, drawn anew in each step; None: among all.
    """

    streams = {"nodes": ("features", "train_label")}
    epoch_stream = "nodes"

    student: Tokenizer
    edge_index: Tensor

    def __init__(
        self, student: Tokenizer, edge_index: Tensor, *, lamb_node: float, lamb_edge: float, edge_nodes: int | None
    ) -> None:
        super().__init__()
        self.student, self.edge_nodes = student, edge_nodes
        self.register_buffer("edge_index", edge_index, persistent=False)
        self.weights = {"node": lamb_node, "edge": lamb_edge}

    def training_step(self, batch: Batch) -> Losses:
        nodes = batch["nodes"]
        tokens = self.student.tokenize(nodes["features"], self.edge_index)
        count = len(nodes["features"])
        rows_R = torch.randperm(count, device=self.edge_index.device)[: self.edge_nodes or count]
        adjacency_RR = dense_adjacency(self.edge_index, rows_R, count)
        return {
            "ce": F.cross_entropy(tokens.logits_NC.float(), nodes["train_label"], ignore_index=NO_LABEL),
            "commitment": tokens.commitment,
            "node": F.mse_loss(tokens.h_ND.float(), tokens.node_ND.float()),
            "edge": edge_reconstruction(tokens.edge_ND[rows_R], adjacency_RR),
        }


class LearnFromTokens(Method):
    """Stage 2: the MLP, on the labelled nodes and on all observed ones. Only its class head ships.

    Args:
        student: features [B, F] to logits [B, C]; taken apart in place: its last linear layer is the class head, what
            comes before feeds a second, linear one of the codes' width too.
        codebook_KD: the tokenizer's codes; fixed.
        code_metric: how r is compared with the codes: by `cosine`, as the teacher is, or `mixed`, the official code's
            negative distance against the teacher's cosine.
        code_target: the teacher's distribution over codes (`soft`) or its one code (`hard`, an ablation).
    """

    streams = {"labelled": ("features", "label"), "unlabelled": ("features", "teacher_logits", "code_scores")}
    epoch_stream = "unlabelled"

    student: nn.Sequential
    codebook_KD: Tensor

    def __init__(
        self,
        student: nn.Module,
        codebook_KD: Tensor,
        *,
        temperature: float = 4.0,
        lamb: float = 0.0,
        beta: float = 1.0,
        code_metric: Literal["cosine", "mixed"] = "cosine",
        code_target: Literal["soft", "hard"] = "soft",
    ) -> None:
        super().__init__()
        require_share(lamb=lamb)
        backbone, head = split_head(student)
        self.student = nn.Sequential(OrderedDict(backbone=backbone, head=head))
        self.code_head = nn.Linear(head.in_features, codebook_KD.shape[1])
        self.register_buffer("codebook_KD", codebook_KD)
        self.temperature, self.code_metric, self.code_target = temperature, code_metric, code_target
        self.weights = {"hard": lamb, "soft": 1 - lamb, "code": beta}

    def training_step(self, batch: Batch) -> Losses:
        labelled, nodes = batch["labelled"], batch["unlabelled"]
        backbone, head = self.student
        hidden = backbone(torch.cat([labelled["features"], nodes["features"]]))
        labelled_LC, logits_BC = head(hidden).split([len(labelled["label"]), len(nodes["features"])])
        r_BD = self.code_head(hidden[len(labelled["label"]) :])
        losses = {
            "hard": F.cross_entropy(labelled_LC.float(), labelled["label"]),
            "soft": kl_divergence(
                logits_BC, nodes["teacher_logits"], temperature=1.0, scale_by_t2=False, reduction="batchmean"
            ),
            "code": self.code_loss(r_BD, nodes["code_scores"]),
        }
        if self.clock.step % self.clock.steps_per_epoch == 0:
            self._log_gradients(losses, hidden)
        return losses

    def code_loss(self, r_BD: Tensor, scores_BK: Tensor) -> Tensor:
        """T^2 KL between the distributions over the codes; with hard targets T^2 times the cross-entropy."""
        metric: Literal["cosine", "euclidean"] = "cosine" if self.code_metric == "cosine" else "euclidean"
        student_BK = prototype_scores(r_BD, self.codebook_KD, metric=metric)
        if self.code_target == "hard":
            return self.temperature**2 * F.cross_entropy(student_BK / self.temperature, scores_BK.argmax(-1))
        return kl_divergence(
            student_BK, scores_BK, temperature=self.temperature, scale_by_t2=True, reduction="batchmean"
        )

    def _log_gradients(self, losses: Losses, hidden: Tensor) -> None:
        """The weighted code loss's pull on the hidden layer over the soft labels'; below 0.01 it does nothing."""
        code, soft = (torch.autograd.grad(losses[name], hidden, retain_graph=True)[0] for name in ("code", "soft"))
        self.log(code_gradient=self.now(self.weights["code"]) * code.norm() / soft.norm().clamp(min=1e-12))


def vqgraph(
    ws: Workspace,
    data: Graph,
    student: nn.Module,
    teacher: nn.Module,
    *,
    tokenizer: Stage,
    distill: Stage,
    codes: int = 5000,
    decay: float = 0.8,
    commitment: float = 0.25,
    lamb_node: float = 0.001,
    lamb_edge: float = 0.03,
    edge_nodes: int | None = None,
    temperature: float = 4.0,
    lamb: float = 0.0,
    beta: float = 1.0,
    code_metric: Literal["cosine", "mixed"] = "cosine",
    code_target: Literal["soft", "hard"] = "soft",
) -> nn.Module:
    """Both stages. Ships the MLP: features [B, F] to logits [B, C], without graph and codebook.

    Args:
        student: an MLP over the features of single nodes.
        teacher: a graph network (`gcn`, `sage`); its hidden width before the last graph layer is that of the codes.
        tokenizer, distill: how they are trained. Stage 1 takes all observed nodes at each step.
        codes, decay, commitment: of the quantiser (cosine).
        lamb_node, lamb_edge, edge_nodes: see `LearnTokens`.
        temperature, lamb, beta, code_metric, code_target: see `LearnFromTokens`. `beta=0` is GLNN; with `lamb=1` too it
            is a plain MLP.
    """
    model = Tokenizer(teacher, codes, decay, commitment)  # type: ignore[arg-type]
    learn = LearnTokens(model, data.observed_edges, lamb_node=lamb_node, lamb_edge=lamb_edge, edge_nodes=edge_nodes)
    nodes = {"nodes": full_batch(data.observed)}
    ws.fit("tokenizer", learn, nodes, tokenizer.trainer, validation=data.validation)
    model.cpu().eval()
    known = ws.compute("tokens", lambda: cached(model, data))

    # The columns are those of `observed`, row for row: features and targets can't come apart.
    targets = {name: known[name] for name in ("teacher_logits", "code_scores")}
    streams = distill.on(labelled=data.train, unlabelled=data.observed.with_fields(targets))
    method = LearnFromTokens(
        student,
        known["codebook"],
        temperature=temperature,
        lamb=lamb,
        beta=beta,
        code_metric=code_metric,
        code_target=code_target,
    )
    ws.fit("distill", method, streams, distill.trainer, validation=data.validation)
    shipped = method.shipped().cpu().eval()
    ws.measure("codes", lambda: code_statistics(known, data, temperature))
    cost = ws.measure("teacher", lambda: against(model, shipped, data))
    ws.show("Milliseconds for ten nodes", Bars({name: cost[f"{name}_ms"] for name in ("teacher", "student")}))
    ws.show("Nodes by their code vectors (two principal components), coloured by class", _map(known, data))
    return shipped


@torch.no_grad()
def cached(model: Tokenizer, data: Graph) -> dict[str, Tensor]:
    """What stage 2 reads of the tokenizer in eval mode, row by row of `data.observed`."""
    tokens = model.tokenize(data.observed.fields["features"], data.observed_edges)
    return {
        "teacher_logits": tokens.logits_NC.log_softmax(-1),
        "code_scores": tokens.scores_NK,
        "codes": tokens.codes_N,
        "vectors": tokens.h_ND,
        "codebook": model.quantizer.codebook.clone(),
    }


def code_statistics(known: dict[str, Tensor], data: Graph, temperature: float) -> dict[str, float]:
    """Used codes and their perplexity; homogeneity (1: each code holds one class) and that of the same codes dealt out
    at random; mean entropy of the soft assignment as a share of log K."""
    codes_N, labels_N = known["codes"], data.nodes.labels[data.observed.index]
    usage, total = code_usage(codes_N, len(known["codebook"])), len(known["codebook"])
    dealt_N = codes_N[torch.randperm(len(codes_N))]
    spread = entropy(known["code_scores"], temperature=temperature, reduction="mean")
    return {
        "used": usage.used,
        "classes": data.num_classes,
        "perplexity": usage.perplexity,
        "homogeneity": float(homogeneity_score(labels_N, codes_N)),
        "homogeneity_by_chance": float(homogeneity_score(labels_N, dealt_N)),
        "entropy_share": float(spread) / max(1e-12, float(torch.log(torch.tensor(float(total))))),
    }


def against(model: Tokenizer, student: nn.Module, data: Graph) -> dict[str, float]:
    """The teacher's accuracy on the test nodes, and milliseconds of both for ten of them, neighbours looked up."""
    features_NF, rows_R = data.nodes.fields["features"], data.test.index[:10]
    logits_NC = node_logits(model, features_NF, data.edge_index)
    right = logits_NC[data.test.index].argmax(-1) == data.test.labels
    served = ForNodes(model, features_NF, data.edge_index)
    return {
        "accuracy": float(right.double().mean()),
        "teacher_ms": measure_latency(served, rows_R, len(rows_R)),
        "student_ms": measure_latency(student, features_NF[rows_R], len(rows_R)),
    }


def _map(known: dict[str, Tensor], data: Graph) -> Scatter:
    unit_ND = F.normalize(known["vectors"], dim=-1)  # codes are compared by direction
    centred_ND = unit_ND - unit_ND.mean(0)
    _, axes_DD = torch.linalg.eigh(centred_ND.T @ centred_ND)
    return Scatter(centred_ND @ axes_DD[:, -2:], data.nodes.labels[data.observed.index], data.classes)
