"""What systems show of themselves, drawn."""

from __future__ import annotations

from matplotlib.figure import Figure

from limbeck.report.plots import PALETTE, dress, image_grid, legend, new_figure, short
from limbeck.train import Bars, Exhibit, Pictures, Rows, Scatter


def draw(exhibit: Exhibit) -> Figure:
    """The figure of what a system showed."""
    match exhibit:
        case Pictures():
            return image_grid(exhibit.images, names=exhibit.names)
        case Scatter():
            return _scatter(exhibit)
        case Bars():
            return _bars(exhibit)
        case Rows():
            return _rows(exhibit)


def _scatter(scatter: Scatter) -> Figure:
    figure, axes = new_figure("")
    points, groups = scatter.points.detach().cpu(), scatter.groups.cpu()
    for number in groups.unique().tolist():
        name = str(scatter.names[number]) if scatter.names is not None else str(number)
        mine = points[groups == number]
        colour = PALETTE[number % len(PALETTE)]
        marker = "os^DvP*X"[number // len(PALETTE) % 8]  # beyond the colours the next shape tells groups apart
        axes.plot(mine[:, 0], mine[:, 1], marker, color=colour, markersize=3, alpha=0.7, label=short(name, 16))
    axes.set_xticks([])
    axes.set_yticks([])
    if len(groups.unique()) <= 20:  # nobody looks up one colour among fifty
        legend(figure, axes)
    return figure


def _bars(bars: Bars) -> Figure:
    names, values = list(bars.values), [float(value) for value in bars.values.values()]
    figure = Figure(figsize=(6.4, max(1.6, 0.8 + 0.34 * len(names))), layout="constrained")
    axes = figure.subplots()
    dress(axes, grid="x")
    drawn = axes.barh(range(len(names)), values, color=PALETTE[0], height=0.7)
    axes.bar_label(drawn, labels=[f"{value:.3g}" for value in values], padding=3, fontsize=9)
    axes.set_yticks(range(len(names)), [short(name, 28) for name in names], parse_math=False)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    return figure


def _rows(table: Rows) -> Figure:
    cells = [[short(f"{cell:.4g}" if isinstance(cell, float) else str(cell), 60) for cell in row] for row in table.rows]
    widths = [
        max(len(row[place]) for row in [list(map(str, table.columns)), *cells]) for place in range(len(table.columns))
    ]
    figure = Figure(figsize=(max(6.4, 0.085 * sum(widths) + 0.4), 0.5 + 0.3 * len(cells)), layout="constrained")
    axes = figure.subplots()
    axes.axis("off")
    total = max(1, sum(widths))
    drawn = axes.table(
        cellText=cells, colLabels=list(table.columns), loc="center", cellLoc="left", colLoc="left",
        colWidths=[width / total for width in widths], edges="horizontal",
    )  # fmt: skip
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)
    for cell in drawn.get_celld().values():
        cell.set_text_props(parse_math=False)
        cell.set_edgecolor("#d9dde2")
    drawn.scale(1, 1.35)
    return figure
