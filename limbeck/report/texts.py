"""Figures of texts: what a language model writes after a prompt, beside what others write."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from limbeck.errors import UserError

_WIDTH, _LINES = 44, 14  # letters of a line and lines of a cell, beyond which a text is cut
_INK, _MUTED = "#1b1f24", "#5b6570"


def texts_figure(prompts: Sequence[str], written: Mapping[str, Sequence[str]]) -> Figure:
    """A row for each prompt: the prompt above, and below it one column for each model with what it wrote.

    Args:
        prompts: what each row begins with.
        written: model to its texts, one for each prompt, without the prompt.

    Raises:
        UserError: no prompts, no models, or a model that did not write one text for each prompt.
    """
    if not prompts or not written:
        raise UserError(f"a figure of texts needs prompts and models, got {len(prompts)} and {len(written)}")
    for model, texts in written.items():
        if len(texts) != len(prompts):
            raise UserError(f"'{model}' has {len(texts)} texts for {len(prompts)} prompts; give one for each")
    cells = [[wrap(prompt, 2 * _WIDTH, 4), *(wrap(written[model][row], _WIDTH, _LINES) for model in written)]
             for row, prompt in enumerate(prompts)]  # fmt: skip
    # Height in lines: the prompt, a gap, the models' names, the longest text, and a gap to the next row.
    heights = [len(cell[0]) + 2.5 + max(len(text) for text in cell[1:]) + 1.5 for cell in cells]
    total = sum(heights) + 0.5
    figure = Figure(figsize=(3.4 * max(len(written), 2), 0.18 * total))  # inches of a column, and of a line
    top = 1 - 0.5 / total
    for cell, height in zip(cells, heights, strict=True):
        _put(figure, 0.01, top, cell[0], family="monospace", weight="bold", color=_INK)
        below = top - (len(cell[0]) + 0.7) / total
        for column, (model, text) in enumerate(zip(written, cell[1:], strict=True)):
            left = 0.01 + column / len(written)
            _put(figure, left, below, [model], color=_MUTED)
            _put(figure, left, below - 1.3 / total, text, family="monospace", color=_INK)
        top -= height / total
    return figure


def wrap(text: str, width: int, lines: int) -> list[str]:
    """The text's own lines broken at `width` letters, at most `lines` of them; what is cut off shows as an ellipsis."""
    broken = [part for line in text.strip("\n").splitlines() for part in textwrap.wrap(line, width) or [""]] or [""]
    return broken if len(broken) <= lines else [*broken[: lines - 1], "…"]


def _put(figure: Figure, x: float, y: float, lines: Sequence[str], **style: Any) -> None:
    figure.text(x, y, "\n".join(lines), va="top", fontsize=8, linespacing=1.25, parse_math=False, **style)
