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

from limbeck.errors import UserError
from limbeck.files import write_text

Row = dict[str, float]


class Table:
    """A CSV file that grows by rows, may gain columns, and is cut back to the step at which a run resumes.

    `rows` are what the file holds, seven digits a value: a resumed run reads the very numbers that it had before.
    """

    def __init__(self, path: Path | None, quiet: bool = False) -> None:
        self.rows: list[Row] = read_csv(path) if path and path.exists() else []
        self.columns = list(dict.fromkeys(name for row in self.rows for name in row))
        self.path = None if quiet else path

    def cut(self, step: int) -> None:
        """Forget the rows behind `step`: the resumed run writes them again."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        self.columns = list(dict.fromkeys(name for row in self.rows for name in row))
        if self.path is not None and self.path.exists():
            write_text(self.path, self._text([self.columns, *map(self._cells, self.rows)]))

    def add(self, row: Mapping[str, float]) -> None:
        """Append a row; the whole file is written again only when it brings a new column."""
        self.rows.append({name: float(_short(value)) for name, value in row.items()})
        new = [name for name in row if name not in self.columns]
        self.columns += new
        if self.path is None:
            return
        if new:
            return write_text(self.path, self._text([self.columns, *map(self._cells, self.rows)]))
        try:
            with self.path.open("a", newline="") as file:
                file.write(self._text([self._cells(self.rows[-1])]))
        except OSError as error:
            raise UserError(
                f"could not add a row to {self.path} ({error}): make room on the disk and run again"
            ) from error

    def _cells(self, row: Row) -> list[str]:
        return [_short(row[name]) if name in row else "" for name in self.columns]

    @staticmethod
    def _text(lines: list[list[str]]) -> str:
        text = io.StringIO()
        csv.writer(text).writerows(lines)
        return text.getvalue()


def read_csv(path: Path) -> list[Row]:
    """The rows of a metrics file; absent values are left out, and so is a last line that was cut off."""
    with path.open(newline="") as file:
        whole = [line for line in file if line.endswith("\n")]
    return [{k: float(v) for k, v in row.items() if v not in ("", None)} for row in csv.DictReader(whole)]


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) < 1e15 and value == int(value) else f"{value:.7g}"


class Logs:
    """Everything that one stage reports: `train.csv`, `validation.csv`, TensorBoard events, and the progress bar.

    `quiet`, for the processes behind the first, reads what was written and writes nothing.
    """

    def __init__(
        self, folder: Path | None, name: str, *, tensorboard: bool, progress: bool, quiet: bool = False
    ) -> None:
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
        self._since, self._from, self._last = time.perf_counter(), step, step

    def train_row(self, step: int, epoch: int, values: Mapping[str, float], samples_per_step: int) -> None:
        """One row of means since the last one."""
        self._last = step
        now = time.perf_counter()
        rate = samples_per_step * (step - self._from) / max(now - self._since, 1e-9)
        self._since, self._from = now, step
        self._write(self.train, "train", {"step": step, "epoch": epoch, **values, "samples_per_second": rate})
        if self._bar:
            terms = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if name != "learning_rate")
            self._bar.update(self._task, completed=step, shown=f"{terms}  {rate:,.0f} samples/s")

    def validation_row(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """One row of metrics on the validation data."""
        self._last = step
        self._write(self.validation, "validation", {"step": step, "epoch": epoch, **values})
        self._since, self._from = time.perf_counter(), step  # evaluation is no training time

    def close(self) -> None:
        if self._bar:
            self._bar.update(self._task, completed=self._last)
            self._bar.stop()
        if self._events:
            self._events.close()

    def _write(self, table: Table, split: str, row: Row) -> None:
        table.add(row)
        if self._events:
            for name, value in row.items():
                if name not in ("step", "epoch"):
                    self._events.add_scalar(f"{split}/{name}", value, int(row["step"]))
