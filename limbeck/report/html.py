"""The report: one HTML file that needs nothing else, no network either."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jinja2
import matplotlib
from matplotlib.figure import Figure

from limbeck.evaluate import Comparison, Reliability, Verdict
from limbeck.files import write_text
from limbeck.report.plots import arms_plot, cost_plot, curve_keys, curves_plot, reliability_plot
from limbeck.report.tables import Column, column_of, comparison_table

_COSTS = ("parameters", "latency_ms")
_CURVES = ("accuracy", "nll", "loss")  # drawn when the rows have them and nothing else is asked for


@dataclass(frozen=True)
class _Picture:
    source: str
    alt: str
    caption: str = ""


def write_report(
    path: Path | str,
    *,
    title: str,
    comparison: Comparison,
    metrics: Sequence[str] | None = None,
    context: Sequence[str] = (),
    curves: Mapping[str, Sequence[Mapping[str, float]]] | None = None,
    curve_metrics: Sequence[str] | None = None,
    reliability: Mapping[str, Reliability] | None = None,
    figures: Mapping[str, Mapping[str, Figure]] | None = None,
    configuration: str = "",
    notes: Sequence[str] = (),
) -> Path:
    """Write a comparison (of one arm or many) as one self-contained HTML file and return its path.

    The page holds the table, the verdicts on the comparison's expectations, the seeds of the first two metrics, the
    first one against `parameters` and `latency_ms` where arms have them, and what the arguments give:

    Args:
        path: file to write; its folder is made.
        title: heading of the page.
        comparison: the arms' metrics.
        metrics: columns of the table, the main one first. Default: all.
        context: arms that are no rivals, a teacher say: first in the table and never marked as best.
        curves: arm to history rows, e.g. `fit.train + fit.validation`.
        curve_metrics: what of the rows is drawn; default: accuracy, nll and loss, or the first three there are. What
            has one point only is left out.
        reliability: arm to its reliability diagram.
        figures: arm to what people look at, by caption: pictures, boxes, masks, embeddings. What looks the same for
            several arms (their common test samples) stands there once.
        configuration: the recipe's text.
        notes: paragraphs above the table.

    Text from outside (arms, notes, configuration) is escaped.

    Raises:
        UserError: a metric, arm or curve that there is not, or a file that cannot be written.
    """
    table = comparison_table(comparison, metrics, context)
    shown = list(metrics or comparison.metrics())
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        title=title,
        facts=_facts(comparison),
        notes=list(notes),
        table=table,
        legend=_legend([column_of(metric) for metric in shown], len(comparison.seeds)),
        verdicts=[(verdict, _sentence(verdict)) for verdict in comparison.verdicts()],
        results=_results(comparison, shown),
        costs=_costs(comparison, shown[0]),
        curves=_curves(curves or {}, curve_metrics, list(comparison.arms)),
        reliability=[_reliability(arm, diagram) for arm, diagram in (reliability or {}).items()],
        figures=_figures(figures or {}),
        configuration=configuration.strip(),
        versions=comparison.versions,
    )
    write_text(Path(path), page)
    return Path(path)


def _results(comparison: Comparison, shown: Sequence[str]) -> list[_Picture]:
    """Every seed of the first two metrics: one run of one arm has nothing to compare."""
    if len(comparison.arms) * len(comparison.seeds) == 1:
        return []
    metrics = [metric for metric in shown if metric not in _COSTS][:2]
    return [
        _picture(arms_plot(comparison, metric), f"{column_of(metric).title} of every arm: the mean and each seed.")
        for metric in metrics
    ]


def _costs(comparison: Comparison, metric: str) -> list[_Picture]:
    name = column_of(metric).title
    pictures = []
    for cost in _COSTS:
        arms = [arm for arm, rows in comparison.arms.items() if {metric, cost} <= rows[0].keys()]
        if cost != metric and len(arms) > 1:
            alt = f"{name} against {column_of(cost).title.lower()} for {', '.join(arms)}."
            pictures.append(_picture(cost_plot(comparison, metric, cost), alt))
    return pictures


def _curves(
    curves: Mapping[str, Sequence[Mapping[str, float]]], wanted: Sequence[str] | None, arms: Sequence[str]
) -> list[_Picture]:
    there = curve_keys(curves)
    keys = wanted if wanted is not None else [key for key in _CURVES if key in there] or there[:3]
    # One point is no curve: a run that was evaluated at its end alone has nothing to draw.
    points = {key: max((sum(key in row for row in rows) for rows in curves.values()), default=0) for key in keys}
    keys = [key for key in keys if points[key] != 1]  # 0: no such column, which is said below
    names = ", ".join(curves)
    return [
        _picture(curves_plot(curves, key, arms), f"{column_of(key).title} during training of {names}.") for key in keys
    ]


def _figures(figures: Mapping[str, Mapping[str, Figure]]) -> list[_Picture]:
    """The figures of all arms, each picture once, with the arm's name before its caption where arms differ in it."""
    drawn: dict[str, list[tuple[str, _Picture]]] = {}
    for arm, shown in figures.items():
        for caption, figure in shown.items():
            drawn.setdefault(caption, []).append((arm, _picture(figure, f"{caption}.", caption, kind="png")))
    pictures = []
    for caption, found in drawn.items():
        sources = {picture.source for _, picture in found}
        if len(sources) == 1:
            pictures.append(found[0][1])
        else:
            pictures += [
                _Picture(picture.source, f"{arm}: {picture.alt}", f"{arm}: {caption}") for arm, picture in found
            ]
    return pictures


def _reliability(arm: str, diagram: Reliability) -> _Picture:
    alt = f"Reliability diagram of {arm}: expected calibration error {100 * diagram.ece:.2f} %."
    return _picture(reliability_plot(diagram, arm), alt)


def _picture(figure: Figure, alt: str, caption: str = "", kind: Literal["svg", "png"] = "svg") -> _Picture:
    """The figure inside a data URI: as an image, a drawing's inner names cannot clash with another's."""
    buffer = io.BytesIO()
    # Neither the date nor random names: the same results give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "limbeck", "svg.fonttype": "path"}):
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(buffer, format=kind, dpi=160, metadata=metadata)
    mime = "image/svg+xml" if kind == "svg" else "image/png"
    return _Picture(f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode()}", alt, caption)


def _facts(comparison: Comparison) -> list[str]:
    """What was compared, in a few words."""
    seeds = len(comparison.seeds)
    facts = [str(comparison.data["name"])] if "name" in comparison.data else []
    facts += [f"{len(comparison.arms)} arm{'s' * (len(comparison.arms) > 1)}", f"{seeds} seed{'s' * (seeds > 1)}"]
    if comparison.seconds:
        minutes, seconds = divmod(round(comparison.seconds), 60)
        facts.append(f"{minutes} min {seconds} s" if minutes else f"{seconds} s")
    return facts


def _legend(columns: Sequence[Column], seeds: int) -> str:
    """How to read the table."""
    parts = [f"Mean ± sample standard deviation over {seeds} seeds."] if seeds > 1 else ["One seed."]
    for way, word in (("max", "Higher"), ("min", "Lower")):
        titles = [column.title for column in columns if column.best == way]
        if titles:
            parts.append(f"{word} is better: {', '.join(titles)}.")
    return " ".join([*parts, "The best of a column is bold."])


def _sentence(verdict: Verdict) -> str:
    p = "" if verdict.p is None else f", paired t-test p = {verdict.p:.2g}"
    seeds = f"{verdict.seeds_holding} of {verdict.seeds} seeds"
    return f"difference of the means {verdict.difference:+.3g}, true for {seeds}{p}"
