"""The figure of texts: everything that was written is on it, within its frame."""

from __future__ import annotations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from limbeck.errors import UserError
from limbeck.report import texts_figure
from limbeck.report.texts import wrap


def words_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def test_every_prompt_and_text_is_shown_beside_its_model():
    figure = texts_figure(["ROMEO:", "$x$ {"], {"student": ["a b", "c"], "teacher": ["d", "e\nf"]})
    shown = words_of(figure)
    assert shown == ["ROMEO:", "student", "a b", "teacher", "d", "$x$ {", "student", "c", "teacher", "e\nf"]
    assert len({text.get_position()[0] for text in figure.texts}) == 2


def test_nothing_overlaps_or_leaves_the_page():
    figure = texts_figure(["p" * 300] * 3, {"student": ["long words " * 60] * 3, "teacher": ["x\n" * 40] * 3})
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.texts]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)
    hits = [(i, j) for i, a in enumerate(boxes) for j, b in enumerate(boxes) if i < j and a.overlaps(b)]
    assert not hits


def test_long_texts_are_cut_with_an_ellipsis():
    assert wrap("one two three", 5, 9) == ["one", "two", "three"]
    assert wrap("a\n\nb", 5, 9) == ["a", "", "b"]
    assert wrap("a\nb\nc\nd", 5, 3) == ["a", "b", "…"]
    assert wrap("", 5, 3) == [""]


@pytest.mark.parametrize(("prompts", "written"), [([], {"s": []}), (["a"], {}), (["a"], {"s": ["b", "c"]})])
def test_texts_that_do_not_fit_the_prompts_are_refused(prompts, written):
    with pytest.raises(UserError):
        texts_figure(prompts, written)
