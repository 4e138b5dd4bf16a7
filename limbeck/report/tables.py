"""Arms and their metrics as a table: for the terminal, for Markdown and for the HTML report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.markup import escape
from rich.table import Table as RichTable

from limbeck.errors import UserError
from limbeck.evaluate import Comparison, Statistics


@dataclass(frozen=True)
class Column:
    """How one metric is shown: `title`, `unit`, values times `scale` with `digits` decimals (None: 4 significant
    digits), and whether `max` or `min` is best (None: neither)."""

    metric: str
    title: str
    unit: str = ""
    scale: float = 1.0
    digits: int | None = None
    best: Literal["max", "min"] | None = None

    @property
    def heading(self) -> str:
        """Title and unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def text(self, statistics: Statistics) -> str:
        """`mean ± deviation`, or the mean alone where there is no deviation."""
        mean = self.number(statistics.mean)
        return f"{mean} ± {self.number(statistics.deviation)}" if statistics.deviation else mean

    def number(self, value: float) -> str:
        """One value as it is shown."""
        value *= self.scale
        if self.digits is not None:
            return f"{value:,.{self.digits}f}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


COLUMNS = {
    column.metric: column
    for column in (
        Column("accuracy", "Accuracy", "%", 100, 2, "max"),
        Column("nll", "NLL", "nats", 1, 3, "min"),
        Column("ece", "ECE", "%", 100, 2, "min"),
        Column("trust", "Accuracy - ECE", "%", 100, 2, "max"),
        Column("adaptive_ece", "Adaptive ECE", "%", 100, 2, "min"),
        Column("aurc", "AURC", "%", 100, 2, "min"),
        Column("brier", "Brier score", "", 1, 3, "min"),
        Column("miou", "Mean IoU", "%", 100, 2, "max"),
        Column("pixel_accuracy", "Pixel accuracy", "%", 100, 2, "max"),
        Column("pseudo_accuracy", "Right pseudo-labels", "%", 100, 2, "max"),
        Column("perplexity", "Perplexity", "", 1, 2, "min"),
        Column("bits_per_character", "Bits per character", "", 1, 3, "min"),
        Column("teacher_kl", "KL from the teacher", "nats", 1, 3, "min"),
        Column("entropy", "Entropy", "nats", 1, 3),
        Column("spearman", "Spearman", "× 100", 100, 2, "max"),
        Column("pearson", "Pearson", "× 100", 100, 2, "max"),
        Column("auc", "AUC", "%", 100, 2, "max"),
        Column("map50", "mAP at IoU 0.5", "%", 100, 2, "max"),
        Column("map", "mAP", "%", 100, 2, "max"),
        Column("frechet", "Fréchet distance", "", 1, 3, "min"),
        Column("energy", "Energy distance", "", 1, 4, "min"),
        Column("coverage", "Classes covered", "%", 100, 1, "max"),
        Column("agreement", "Class as asked", "%", 100, 2, "max"),
        Column("precision", "Precision", "%", 100, 2, "max"),
        Column("recall", "Recall", "%", 100, 2, "max"),
        Column("stored.bytes", "Synthetic set", "kB", 1e-3, 1),
        Column("parameters", "Parameters", "", 1, 0),
        Column("latency_ms", "Latency", "ms", 1, 2),
        Column("seconds", "Training", "s", 1, 1),
    )
}


@dataclass(frozen=True)
class Cell:
    """One cell's text, and whether it is the best of its column."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A heading and rows of cells; the first cell of a row is the arm, `muted` are the arms shown as context."""

    heading: list[str]
    rows: list[list[Cell]]
    muted: frozenset[str] = frozenset()


def column_of(metric: str) -> Column:
    """How `metric` is shown: as in `COLUMNS`, else under its own name with 4 significant digits."""
    words = metric.replace("_", " ")
    return COLUMNS.get(metric, Column(metric, words[:1].upper() + words[1:]))


def comparison_table(
    comparison: Comparison, metrics: Sequence[str] | None = None, context: Sequence[str] = ()
) -> Table:
    """One row an arm, one column a metric, mean ± sample deviation over the seeds.

    The best mean of a column is marked; ties as shown are all best, and a lone arm is not. The arms in `context`
    (a teacher, say) come first and are never best. A metric that an arm lacks is shown as a dash.

    Raises:
        UserError: `metrics` or `context` names what the comparison does not have.
    """
    known = comparison.metrics()
    columns = [column_of(metric) for metric in (known if metrics is None else metrics)]
    for kind, wanted, there in (
        ("metric", [column.metric for column in columns], known),
        ("arm", context, list(comparison.arms)),
    ):
        missing = [name for name in wanted if name not in there]
        if missing:
            raise UserError(f"The comparison has no {kind} '{missing[0]}'; it has: {', '.join(there)}.")
    summary = comparison.summary()
    rivals = {arm: summary[arm] for arm in summary if arm not in context}
    best = [_best_mean(column, rivals) for column in columns]
    rows = []
    for arm in [*context, *rivals]:
        cells = [Cell(arm)]
        for column, winner in zip(columns, best, strict=True):
            found = summary[arm].get(column.metric)
            won = found is not None and arm in rivals and column.number(found.mean) == winner
            cells.append(Cell(column.text(found) if found else "–", won))
        rows.append(cells)
    return Table(["Arm", *(column.heading for column in columns)], rows, frozenset(context))


def rich_table(table: Table, title: str = "") -> RichTable:
    """The table for a terminal, the best of each column in bold green, context in grey."""
    made = RichTable(title=escape(title) or None, header_style="bold")
    for number, heading in enumerate(table.heading):
        made.add_column(escape(heading), justify="right" if number else "left")
    for row in table.rows:
        cells = [f"[bold green]{escape(cell.text)}[/]" if cell.best else escape(cell.text) for cell in row]
        made.add_row(*cells, style="dim" if row[0].text in table.muted else None)
    return made


def markdown_table(table: Table) -> str:
    """The table in Markdown, the best of each column in bold."""

    def line(texts: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in texts) + " |"

    rule = "|---|" + "---:|" * (len(table.heading) - 1)
    rows = [line([f"**{cell.text}**" if cell.best else cell.text for cell in row]) for row in table.rows]
    return "\n".join([line(table.heading), rule, *rows]) + "\n"


def _best_mean(column: Column, rivals: Mapping[str, Mapping[str, Statistics]]) -> str | None:
    """The best mean as it is shown; None when there is nothing to win."""
    means = [row[column.metric].mean for row in rivals.values() if column.metric in row]
    if column.best is None or len(means) < 2:
        return None
    return column.number(max(means) if column.best == "max" else min(means))
