"""Figures of the report. Each function returns a matplotlib Figure; none touches pyplot's global state.

The colours are Okabe and Ito's, which colour-blind readers tell apart (without yellow, too faint on white); line
styles and markers say the same a second time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from limbeck.errors import UserError
from limbeck.evaluate import Comparison, Reliability
from limbeck.report.tables import column_of

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#222222")
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = "os^Dv<>P"
_INK, _GRID = "#1b1f24", "#d9dde2"
_SIZE = (5.2, 3.6)


def curves_plot(curves: Mapping[str, Sequence[Mapping[str, float]]], key: str, arms: Sequence[str] = ()) -> Figure:
    """`key` over the optimiser steps, one line an arm: every row that has `key` and `step` is a point.

    Args:
        curves: arm to its history rows, e.g. `fit.train + fit.validation`.
        key: a metric, a loss term or any other column of the rows.
        arms: order of the arms that settles their colours, the same as in a report's other plots.

    Raises:
        UserError: no row of any arm has `key`.
    """
    column = column_of(key)
    points = {arm: [(row["step"], row[key]) for row in rows if key in row] for arm, rows in curves.items()}
    if not any(points.values()):
        raise UserError(f"No history row has '{key}'; draw one of: {', '.join(curve_keys(curves))}.")
    figure, axes = new_figure(column.title)
    for number, arm in enumerate(dict.fromkeys([*arms, *points])):
        if points.get(arm):
            step, value = np.asarray(points[arm]).T
            marker = "." if len(step) <= 30 else None
            axes.plot(step, value * column.scale, label=short(arm), marker=marker, **_style(number))
    axes.set_xlabel("Optimiser step")
    axes.set_ylabel(column.heading)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if column.best == "max" and column.unit == "%":
        axes.set_ylim(top=min(axes.get_ylim()[1], 101))
    legend(figure, axes)
    return figure


def curve_keys(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """All columns of the history rows that can be drawn, in order of appearance."""
    names = dict.fromkeys(name for rows in curves.values() for row in rows for name in row)
    return [name for name in names if name not in ("step", "epoch")]


def reliability_plot(diagram: Reliability, title: str = "") -> Figure:
    """Accuracy over confidence in bins, the share of samples below; on the dashed diagonal they agree."""
    figure = Figure(figsize=(4.4, 4.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    bins = len(diagram.accuracy)
    centre, width = (np.arange(bins) + 0.5) / bins * 100, 100 / bins * 0.92
    fraction, accuracy = 100 * np.asarray(diagram.fraction), 100 * np.asarray(diagram.accuracy)
    filled = fraction > 0
    name = f"{short(title, 28)}: " if title else ""
    _title(figure, f"{name}ECE {100 * diagram.ece:.2f} %")
    dress(upper)
    dress(lower)
    upper.bar(centre[filled], accuracy[filled], width, color=PALETTE[0])
    upper.plot([0, 100], [0, 100], color=_INK, linestyle="--", linewidth=1.2)
    upper.set(xlim=(0, 100), ylim=(0, 100), ylabel="Accuracy (%)")
    lower.bar(centre, fraction, width, color="#8a94a0")
    lower.set(xlabel="Confidence (%)", ylabel="Samples (%)", ylim=(0, None))
    return figure


def cost_plot(comparison: Comparison, metric: str, cost: str) -> Figure:
    """Mean `metric` over mean `cost` (`parameters`, `latency_ms`, ...), one labelled point an arm that has both.

    Bars are one sample deviation over the seeds. The axis of the cost is logarithmic when it spans a factor of 10.
    """
    vertical, horizontal = column_of(metric), column_of(cost)
    summary = {arm: row for arm, row in comparison.summary().items() if metric in row and cost in row}
    if not summary:
        raise UserError(f"No arm has both '{metric}' and '{cost}'; measure both, or draw another pair.")
    figure, axes = new_figure(f"{vertical.title} against {horizontal.title.lower()}")
    costs = []
    for number, (arm, row) in enumerate(summary.items()):
        costs.append(row[cost].mean * horizontal.scale)
        axes.errorbar(
            costs[-1], row[metric].mean * vertical.scale, yerr=(row[metric].deviation or 0) * vertical.scale,
            color=_style(number)["color"], marker=_MARKERS[number % len(_MARKERS)], markersize=8, capsize=3,
            linestyle="none", label=short(arm),
        )  # fmt: skip
    if min(costs) > 0 and max(costs) / min(costs) >= 10:
        axes.set_xscale("log")
        # Few round labels: matplotlib's own minor labels run into each other on a short axis.
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    if not horizontal.unit:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.12, y=0.15)
    axes.set_xlabel(horizontal.heading)
    axes.set_ylabel(vertical.heading)
    legend(figure, axes)
    return figure


def arms_plot(comparison: Comparison, metric: str) -> Figure:
    """One row an arm: a bar's end at the mean of `metric` and a dot for each seed.

    The axis starts near the values so that small differences show; the bars are therefore not filled from 0.
    """
    column = column_of(metric)
    arms = [arm for arm, rows in comparison.arms.items() if metric in rows[0]]
    if not arms:
        raise UserError(f"No arm has the metric '{metric}'; there are: {', '.join(comparison.metrics())}.")
    seeds = len(comparison.seeds)
    figure = Figure(figsize=(_SIZE[0], max(_SIZE[1], 1.2 + 0.4 * len(arms))), layout="constrained")
    axes = figure.subplots()
    _title(figure, f"{column.title}: mean (bar) and {'each seed' if seeds > 1 else 'the seed'} (dot)")
    dress(axes, grid="x")
    offsets = np.linspace(-0.18, 0.18, seeds) if seeds > 1 else np.zeros(1)
    for row, arm in enumerate(arms):
        values = np.asarray(comparison.values(arm, metric)) * column.scale
        if row % 2:
            axes.axhspan(row - 0.5, row + 0.5, color="#f4f6f8", zorder=0)
        axes.plot([values.mean()] * 2, [row - 0.32, row + 0.32], color=PALETTE[0], linewidth=4)
        axes.plot(values, row + offsets, "o", color=PALETTE[1], markersize=5, markeredgecolor="white")
    axes.set_yticks(range(len(arms)), [short(arm, 24) for arm in arms], parse_math=False)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel(column.heading)
    axes.margins(x=0.08)
    return figure


def image_grid(images_NCHW: Tensor, columns: int = 8, names: Sequence[str] | None = None) -> Figure:
    """Pictures (uint8, or float in [0, 1]; 1 or 3 channels) in rows of `columns`, each pixel drawn sharp.

    `names` stand above the pictures.
    """
    if images_NCHW.dim() != 4 or images_NCHW.shape[1] not in (1, 3) or not len(images_NCHW):
        raise UserError(f"An image grid needs [N, 1 or 3, H, W] with N > 0, got {list(images_NCHW.shape)}.")
    pixels = images_NCHW.detach().cpu()
    pixels = pixels.float() / 255 if not pixels.is_floating_point() else pixels.float().clamp(0, 1)
    count, _, height, width = pixels.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    layout = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01)
    named = 0.25 * rows if names else 0.0
    figure = Figure(figsize=(_SIZE[0], named + _SIZE[0] * rows * height / (columns * width)), layout=layout)
    for number, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.axis("off")
        if number < count:
            picture = pixels[number].permute(1, 2, 0).expand(-1, -1, 3).numpy()
            axes.imshow(picture, interpolation="nearest")
            if names:
                axes.set_title(short(str(names[number]), 14), fontsize=8, color=_INK, parse_math=False)
    return figure


def new_figure(title: str) -> tuple[Figure, Axes]:
    """An empty plot in the house's style."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    _title(figure, title)
    dress(axes)
    return figure, axes


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(short(text, 48), x=0.02, ha="left", fontsize=12, color=_INK, parse_math=False)


def dress(axes: Axes, grid: Literal["both", "x"] = "both") -> None:
    """Give axes the house's style."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#8a94a0")
    axes.grid(True, axis=grid, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=10)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(fontsize=11, color=_INK, parse_math=False)


def _style(number: int) -> dict[str, Any]:
    # Beyond 7 arms the colours repeat with the next line style, so that 35 lines stay distinct.
    lap = number // len(PALETTE)
    dashes = _DASHES[(number + lap) % len(_DASHES)]
    return {"color": PALETTE[number % len(PALETTE)], "linestyle": dashes, "linewidth": 1.8}


def legend(figure: Figure, axes: Axes) -> None:
    """Below the axes, where it covers nothing; the figure grows by its height."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) < 2:
        return
    columns = max(1, min(len(labels), 54 // (max(map(len, labels)) + 6)))
    figure.set_figheight(_SIZE[1] + 0.2 * -(-len(labels) // columns))
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=10)
    for text in legend.get_texts():
        text.set(color=_INK, parse_math=False)


def short(text: str, most: int = 36) -> str:
    """The text, cut to `most` letters."""
    return text if len(text) <= most else text[: most - 1] + "…"
