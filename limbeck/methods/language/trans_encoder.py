"""Trans-Encoder: a bi-encoder and a cross-encoder teach each other on sentence pairs without any label.

Liu et al.: Trans-Encoder: Unsupervised sentence-pair modelling through self- and mutual-distillations, ICLR 2022
(arXiv 2109.13059).

B_0 is a sentence encoder, C a cross-encoder with logit z. In cycle k = 1..K, for every pair (a, b) of the pool:

    s = cos(B_{k-1}(a), B_{k-1}(b))                           labels from the bi-encoder
    C_k:  mean of BCE(z(a, b), s) over (a, b) and (b, a)       soft targets in [0, 1]
    r = sigmoid(z_k(a, b))                                    labels from the cross-encoder, in the pair's own order
    B_k:  mean of (cos(B(a), B(b)) - r)^2

BCE from bi to cross, because cosines crowd together and only their order matters; MSE from cross to bi, because
sigmoids are spread out. Mutual distillation: several models, whose s and r are averaged. The labels are computed pair
by pair, so nothing looks at the whole batch, and every process computes all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.data import Pairs, Samples, both_orders, read_by
from limbeck.errors import UserError
from limbeck.models import BiEncoder, CrossEncoder, PairScorer, cross_encoder, score_pairs
from limbeck.train import Batch, Losses, Method, Rows, Stage, Workspace


def cross_loss(logits_B: Tensor, cosines_B: Tensor) -> Tensor:
    """mean BCE-with-logits against soft targets; the gradient of an item is sigmoid(z) - s, its minimum the entropy
    of s. Cosines below 0 count as 0: the official code leaves them, and their gradient never vanishes."""
    return F.binary_cross_entropy_with_logits(logits_B.float(), cosines_B.detach().float().clamp(0, 1))


def bi_loss(cosines_B: Tensor, scores_B: Tensor) -> Tensor:
    """mean (cos - r)^2 on the raw cosine."""
    return F.mse_loss(cosines_B.float(), scores_B.detach().float())


class CrossFromBi(Method):
    """A cross-encoder that learns the field `score`, cosines of a bi-encoder."""

    streams = {"pairs": ("tokens", "score")}
    epoch_stream = "pairs"

    def __init__(self, student: CrossEncoder) -> None:
        super().__init__()
        self.student = student

    def training_step(self, batch: Batch) -> Losses:
        pairs = batch["pairs"]
        return {"bce": cross_loss(self.student(pairs["tokens"]), pairs["score"])}


class BiFromCross(Method):
    """A bi-encoder that learns the field `score`, sigmoids of a cross-encoder."""

    streams = {"pairs": ("tokens_a", "tokens_b", "score")}
    epoch_stream = "pairs"

    student: BiEncoder

    def __init__(self, student: BiEncoder) -> None:
        super().__init__()
        self.student = student

    def training_step(self, batch: Batch) -> Losses:
        pairs = batch["pairs"]
        return {"mse": bi_loss(self.student.score(pairs), pairs["score"])}


def trans_encoder(
    ws: Workspace,
    data: Pairs,
    student: nn.Module,
    peer: nn.Module | None = None,
    plain: nn.Module | None = None,
    peer_plain: nn.Module | None = None,
    *,
    cross: Stage,
    bi: Stage,
    cycles: int = 3,
    restart: bool = True,
    symmetric: bool = True,
    ships: Literal["bi", "cross"] = "bi",
    select: str | None = "spearman",
) -> nn.Module:
    """Self-distillation of one encoder, or mutual distillation of two, on the pool `data.unlabelled`.

    The labels of `data.validation`, where there are any, choose the best evaluation of each stage and the best cycle;
    nothing else reads a label. B_0 is no candidate, and with `cycles=0` it is returned as it is.

    Args:
        student: B_0, a bi-encoder trained without labels (`simcse`), or any sentence encoder.
        peer: another B_0, of any architecture; the scores of both are averaged. Where `data` have a second tokenizer,
            the peer reads by it.
        plain, peer_plain: bi-encoders whose weights the cross-encoders start from, the pre-trained language models
            before contrastive training; by default those of student and peer.
        cross, bi: how each form trains; both have the stream `pairs`.
        cycles: K.
        restart: each stage begins from the first weights of its form, bit for bit. Otherwise each form inherits the
            other's weights from the stage before.
        symmetric: train the cross-encoder on both orders; not for tasks whose order matters (a question, an answer).
        ships: which form is returned; the other one's weights lie in the workspace.
        select: the validation metric that chooses; None takes the last epoch and cycle.

    Raises:
        UserError: a network is no bi-encoder, there is no pool, or without restart two forms differ in architecture.
    """
    pairs = [(student, plain), *([(peer, peer_plain)] if peer is not None else [])]
    return distill_committee(
        ws, data, [base if base is not None else start for start, base in pairs], [start for start, _ in pairs],
        cross=cross, bi=bi, cycles=cycles, restart=restart, symmetric=symmetric, ships=ships, select=select,
    )  # fmt: skip


def distill_committee(
    ws: Workspace,
    data: Pairs,
    plains: Sequence[nn.Module],
    starts: Sequence[nn.Module],
    *,
    cross: Stage,
    bi: Stage,
    cycles: int = 3,
    restart: bool = True,
    symmetric: bool = True,
    ships: Literal["bi", "cross"] = "bi",
    select: str | None = "spearman",
) -> nn.Module:
    """`trans_encoder` for any number of encoders in lock-step; returns the first one's."""
    _check(data, plains, starts, cycles, restart)
    if cycles == 0:
        return starts[0]
    device = (ws.fabric or bi.trainer.fabric()).device
    bis: list[Any] = [start.to(device) for start in starts]
    watched = Watch(ws, data, select if data.validation is not None else None, len(starts))
    pool = data.unlabelled.without("text_a", "text_b")  # type: ignore[union-attr]
    crosses: list[Any] = _first_crosses(ws, plains)
    first = {"bi": list(bis), "cross": list(crosses)}  # bit for bit the same at the start of every cycle

    for cycle in range(1, cycles + 1):
        cosines = _average(ws, f"bi_labels_{cycle}", bis, pool)
        crosses = [copy.deepcopy(model) for model in first["cross"]]
        for member, model in enumerate(crosses):
            if not restart:
                model.model.load_state_dict(bis[member].model.state_dict())
            taught = read_by(pool, member).with_fields({"score": cosines})
            samples = both_orders(taught) if symmetric else taught
            crosses[member] = watched.fit("cross", cycle, member, CrossFromBi(model), cross, samples)

        scores = _average(ws, f"cross_labels_{cycle}", crosses, pool)  # in the pair's own order
        bis = [copy.deepcopy(model) for model in first["bi"]]
        for member, model in enumerate(bis):
            if not restart:
                model.model.load_state_dict(crosses[member].model.state_dict())
            samples = read_by(pool, member).with_fields({"score": scores})
            bis[member] = watched.fit("bi", cycle, member, BiFromCross(model), bi, samples)

    _measure(ws, data, first["bi"], watched, ships)
    return watched.best[ships, 0]


@dataclass
class Watch:
    """Fits one form in one cycle; keeps each form's best over the cycles by the dev metric, without one the last."""

    ws: Workspace
    data: Pairs
    select: str | None
    members: int

    def __post_init__(self) -> None:
        self.best: dict[tuple[str, int], Any] = {}
        self.values: dict[tuple[str, int], float] = {}
        self.rows: list[list[str | float]] = []

    def fit(self, form: str, cycle: int, member: int, method: Any, stage: Stage, samples: Samples) -> PairScorer:
        name = f"{form}_{cycle}" if self.members == 1 else f"{form}_{cycle}_{member}"
        trainer = replace(stage.trainer, select=self.select) if self.select else stage.trainer
        dev = None if self.data.validation is None else read_by(self.data.validation, member)
        fitted = self.ws.fit(name, method, stage.on(pairs=samples), trainer, validation=dev).student
        value = self.ws.fits[name].metrics.get(self.select) if self.select else None
        self.rows.append([form, cycle, member, float("nan") if value is None else value])
        if value is None or value > self.values.get((form, member), float("-inf")):
            self.best[form, member] = fitted
            if value is not None:
                self.values[form, member] = value
        return fitted


def average_scores(scores_MN: Sequence[Tensor]) -> Tensor:
    """The arithmetic mean over the M members' scores (cosines; sigmoids, not logits), detached: [N]."""
    return torch.stack([scores_N.detach() for scores_N in scores_MN]).mean(0)


def _average(ws: Workspace, stage: str, models: Sequence[Any], pool: Samples) -> Tensor:
    """The labels of all pairs of the pool: computed once over the whole pool, then stored, raw."""

    def make() -> dict[str, Tensor]:
        return {"score": average_scores([score_pairs(m, read_by(pool, i).fields) for i, m in enumerate(models)])}

    return ws.compute(stage, make)["score"]


def _first_crosses(ws: Workspace, plains: Sequence[Any]) -> list[CrossEncoder]:
    """Cross-encoders of the plain weights. Their new heads are drawn in a stage, so that every run has the same."""
    crosses = [cross_encoder(plain) for plain in plains]

    def draw() -> dict[str, Tensor]:
        new = [cross_encoder(plain).head.state_dict() for plain in plains]
        return {f"{member}.{key}": value for member, head in enumerate(new) for key, value in head.items()}

    heads = ws.compute("heads", draw)
    for member, model in enumerate(crosses):
        model.head.load_state_dict({key: heads[f"{member}.{key}"] for key in model.head.state_dict()})
    return crosses


def _measure(ws: Workspace, data: Pairs, starts: Sequence[Any], watched: Watch, ships: str) -> None:
    """On the test pairs: B_0, the form that does not ship, and how much the cross-encoder minds the order."""
    evaluator, test, cross = ws.evaluator, data.test, watched.best["cross", 0]
    if watched.select:
        table = Rows(["Form", "Cycle", "Member", watched.select], watched.rows)
        ws.show("The validation pairs, stage by stage", table)
    if evaluator is None:
        return
    other = "cross" if ships == "bi" else "bi"
    ws.measure("start", lambda: evaluator(starts[0], test))
    ws.measure(other, lambda: evaluator(watched.best[other, 0], test))
    ws.measure("order", lambda: {"gap": order_gap(cross, test)})


def order_gap(cross: CrossEncoder, samples: Samples) -> float:
    """mean |C(a, b) - C(b, a)|: how much a cross-encoder's scores depend on the order of the sentences."""
    swapped = {"tokens": samples.fields["tokens_swapped"]}
    return float((score_pairs(cross, samples.fields) - score_pairs(cross, swapped)).abs().mean())


def _check(data: Pairs, plains: Sequence[Any], starts: Sequence[Any], cycles: int, restart: bool) -> None:
    if cycles < 0:
        raise UserError(f"cycles is {cycles}; give 0 or more")
    if data.unlabelled is None:
        raise UserError("Trans-Encoder learns from the pairs of data.unlabelled, and there are none; use load_pairs")
    for model in [*starts, *plains]:
        if not isinstance(model, BiEncoder):
            raise UserError(f"Trans-Encoder starts from bi-encoders, got {type(model).__name__}; use load_encoder")
    for start, plain in zip(starts, plains, strict=True):
        shapes = [{key: part.shape for key, part in model.model.state_dict().items()} for model in (start, plain)]
        if not restart and shapes[0] != shapes[1]:
            raise UserError("without restart both forms share weights, but plain has another architecture than student")
