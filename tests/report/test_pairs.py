"""Retrieval tables and score plots of sentence pairs."""

from __future__ import annotations

import pytest
import torch
from matplotlib.text import Text

from limbeck.errors import UserError
from limbeck.report import draw, extreme_rows, retrieval_rows, score_plot


def test_retrieval_lists_the_nearest_by_cosine_without_the_query_itself() -> None:
    sentences, embeddings = ["q", "near", "far"], torch.tensor([[2.0, 0.0], [3.0, 1.0], [-1.0, 0.0]])
    table = retrieval_rows(["q"], torch.tensor([[1.0, 0.0]]), sentences, embeddings, nearest=2)
    assert [row[1] for row in table.rows] == ["near", "far"]
    assert table.rows[0][2] == pytest.approx(3 / 10**0.5) and table.rows[1][2] == pytest.approx(-1)
    assert [row[0] for row in table.rows] == ["q", ""]
    assert draw(table).axes


def test_retrieval_refuses_texts_without_embeddings() -> None:
    with pytest.raises(UserError, match="1 queries with 2"):
        retrieval_rows(["q"], torch.zeros(2, 2), ["a"], torch.zeros(1, 2))


def test_extremes_are_the_highest_and_the_lowest_scores() -> None:
    names = [f"s{i}" for i in range(6)]
    table = extreme_rows(names, names, torch.tensor([0.3, 0.9, 0.1, 0.5, 0.2, 0.4]), each=2)
    assert [row[0] for row in table.rows] == ["s1", "s3", "s4", "s2"]


def test_the_score_plot_has_a_point_a_pair_and_says_the_correlation() -> None:
    figure = score_plot(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.0, 0.5, 1.0]))
    assert len(figure.axes[0].lines[0].get_xdata()) == 3
    assert "Spearman 1.000" in {text.get_text() for text in figure.findobj(Text)}
