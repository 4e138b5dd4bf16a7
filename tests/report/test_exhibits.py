"""What systems show of themselves, drawn."""

from __future__ import annotations

import pytest
import torch

from limbeck.report import draw
from limbeck.train import Bars, Pictures, Rows, Scatter


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def test_pictures_are_drawn_with_their_names():
    figure = draw(Pictures(torch.rand(3, 1, 4, 4), ["one", "two", "three"]))
    assert {"one", "two", "three"} <= set(texts(figure))
    assert sum(len(axes.images) for axes in figure.axes) == 3


def test_a_scatter_has_one_colour_and_shape_a_group_and_names_it():
    groups = torch.arange(20) % 10
    figure = draw(Scatter(torch.rand(20, 2), groups, [f"class {number}" for number in range(10)]))
    lines = figure.axes[0].lines
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 10
    assert [line.get_label() for line in lines] == [f"class {number}" for number in range(10)]
    assert sum(len(line.get_xdata()) for line in lines) == 20


def test_bars_are_as_long_as_their_values():
    figure = draw(Bars({"teacher": 3.0, "student": 0.5}))
    assert [bar.get_width() for bar in figure.axes[0].patches] == [3.0, 0.5]
    assert {"teacher", "student", "3", "0.5"} <= set(texts(figure))


def test_a_table_shows_every_cell_and_its_headings():
    figure = draw(Rows(["query", "score"], [["a $x$ b", 0.51234], ["c", 2]]))
    (table,) = figure.axes[0].tables
    cells = {cell.get_text().get_text() for cell in table.get_celld().values()}
    assert cells == {"query", "score", "a $x$ b", "0.5123", "c", "2"}


@pytest.mark.parametrize("exhibit", [Bars({"a$b$": 1.0}), Rows(["$"], [["$x"]])])
def test_dollars_in_names_are_no_formulas(exhibit, tmp_path):
    draw(exhibit).savefig(tmp_path / "drawn.png")
