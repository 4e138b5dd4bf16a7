"""What people look at in scores of sentence pairs: neighbours of sentences, and scores against labels.

Shapes: N pairs, Q queries, S sentences, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from torch import Tensor

from limbeck.errors import UserError
from limbeck.evaluate.pairs import pair_metrics
from limbeck.losses import unit
from limbeck.report.plots import PALETTE, new_figure
from limbeck.train import Rows


def retrieval_rows(
    queries: Sequence[str],
    query_embeddings_QD: Tensor,
    sentences: Sequence[str],
    embeddings_SD: Tensor,
    *,
    nearest: int = 3,
) -> Rows:
    """Each query with its `nearest` sentences by cosine, best first; the query itself is left out of the sentences.

    Raises:
        UserError: there are no queries, or texts and embeddings differ in number.
    """
    if not queries or len(queries) != len(query_embeddings_QD) or len(sentences) != len(embeddings_SD):
        raise UserError(
            f"retrieval needs one embedding a text, got {len(queries)} queries with {len(query_embeddings_QD)} and "
            f"{len(sentences)} sentences with {len(embeddings_SD)}"
        )
    cosines_QS = unit(query_embeddings_QD.float()) @ unit(embeddings_SD.float()).mT
    rows: list[list[str | float]] = []
    for query, cosines_S in zip(queries, cosines_QS, strict=True):
        order = [place for place in cosines_S.argsort(descending=True).tolist() if sentences[place] != query]
        for rank, place in enumerate(order[:nearest]):
            rows.append([query if rank == 0 else "", sentences[place], float(cosines_S[place])])
    return Rows(["Query", "Nearest sentences", "Cosine"], rows)


def extreme_rows(first: Sequence[str], second: Sequence[str], scores_N: Tensor, *, each: int = 4) -> Rows:
    """The pairs with the highest and with the lowest scores."""
    order = scores_N.argsort(descending=True).tolist()
    shown = order if len(order) <= 2 * each else [*order[:each], *order[-each:]]
    rows = [[first[i], second[i], float(scores_N[i])] for i in shown]
    return Rows(["First sentence", "Second sentence", "Score"], rows)


def score_plot(scores_N: Tensor, labels_N: Tensor, *, score: str = "Score", label: str = "Label") -> Figure:
    """The model's scores over the labels, a point a pair, with their Spearman correlation in the title."""
    spearman = pair_metrics(scores_N, {"score": labels_N})["spearman"]
    figure, axes = new_figure(f"Spearman {spearman:.3f}")
    axes.plot(labels_N.numpy(), scores_N.numpy(), "o", color=PALETTE[0], markersize=3, alpha=0.35)
    axes.set_xlabel(label)
    axes.set_ylabel(score)
    return figure
