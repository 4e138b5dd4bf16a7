"""What a run tells while it runs: CSV files, TensorBoard events, a progress bar."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from limbeck.train.checkpoint import write_text

Row = dict[str, float]


class Table:
    """A CSV file that grows by rows, may gain columns, and is cut back to the step at which a run resumes."""

    def __init__(self, path: Path | None, quiet: bool = False) -> None:
        self.rows: list[Row] = read_csv(path) if path and path.exists() else []
        self.path = None if quiet else path

    def cut(self, step: int) -> None:
        """Forget the rows behind `step`: the resumed run writes them again."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        self._rewrite()

    def add(self, row: Mapping[str, float]) -> None:
        known = self._columns()
        self.rows.append(dict(row))
        if self.path is None:
            return
        if list(row) != known:
            return self._rewrite()
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow([_short(value) for value in row.values()])

    def _columns(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def _rewrite(self) -> None:
        if self.path is None:
            return
        text, columns = io.StringIO(), self._columns()
        writer = csv.writer(text)
        writer.writerow(columns)
        writer.writerows([_short(row[name]) if name in row else "" for name in columns] for row in self.rows)
        write_text(self.path, text.getvalue())


def read_csv(path: Path) -> list[Row]:
    """The rows of a metrics file; absent values are left out."""
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v not in ("", None)} for row in csv.DictReader(file)]


def _short(value: float) -> str:
    return f"{value:.7g}"


class Logs:
    """Everything that one stage reports: `train.csv`, `validation.csv`, TensorBoard events, and the progress bar.

    `quiet`, for the processes behind the first, reads what was written and writes nothing.
    """

    def __init__(self, folder: Path | None, name: str, *, tensorboard: bool, progress: bool, quiet: bool = False) -> None:
        self.train = Table(folder / "train.csv" if folder else None, quiet)
        self.validation = Table(folder / "validation.csv" if folder else None, quiet)
        self.name = name
        self._events_folder = folder / "tensorboard" if folder and tensorboard and not quiet else None
        self._events: Any = None
        self._bar: Progress | None = None
        if progress and not quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[shown]}"),
                console=Console(stderr=True),
                refresh_per_second=4,
            )

    def start(self, step: int, steps: int) -> None:
        """Open at `step` of `steps`; rows of an earlier try that lie behind it are dropped."""
        self.train.cut(step)
        self.validation.cut(step)
        if self._events_folder:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

            self._events = SummaryWriter(str(self._events_folder), purge_step=step + 1)
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=steps, completed=step, shown="")
        self._since, self._from = time.perf_counter(), step

    def train_row(self, step: int, epoch: int, values: Mapping[str, float], samples_per_step: int) -> None:
        """One row of means since the last one."""
        now = time.perf_counter()
        rate = samples_per_step * (step - self._from) / max(now - self._since, 1e-9)
        self._since, self._from = now, step
        self._write(self.train, "train", {"step": step, "epoch": epoch, **values, "samples_per_second": rate})
        if self._bar:
            terms = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if name != "learning_rate")
            self._bar.update(self._task, completed=step, shown=f"{terms}  {rate:,.0f} samples/s")

    def validation_row(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """One row of metrics on the validation data."""
        self._write(self.validation, "validation", {"step": step, "epoch": epoch, **values})
        self._since, self._from = time.perf_counter(), step  # evaluation is no training time

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
        if self._events:
            self._events.close()

    def _write(self, table: Table, split: str, row: Row) -> None:
        table.add(row)
        if self._events:
            for name, value in row.items():
                if name not in ("step", "epoch"):
                    self._events.add_scalar(f"{split}/{name}", value, int(row["step"]))
