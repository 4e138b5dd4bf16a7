"""CSV files and TensorBoard events of a run."""

from __future__ import annotations

import csv

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.train import fit
from limbeck.train.logs import Table, read_csv
from tests.train.toys import Classify, pictures, plain_net, streams, trainer


def table_of(tmp_path, *rows):
    table = Table(tmp_path / "t.csv")
    for row in rows:
        table.add(row)
    return table


def test_a_new_column_leaves_the_earlier_rows_blank(tmp_path):
    table_of(tmp_path, {"step": 1, "a": 0.5}, {"step": 2, "a": 0.25, "b": 7}, {"step": 3, "b": 8})
    assert list(csv.reader((tmp_path / "t.csv").open())) == [
        ["step", "a", "b"],
        ["1", "0.5", ""],
        ["2", "0.25", "7"],
        ["3", "", "8"],
    ]
    assert read_csv(tmp_path / "t.csv")[2] == {"step": 3, "b": 8}


def test_rows_behind_the_step_of_a_resumed_run_are_cut(tmp_path):
    table_of(tmp_path, {"step": 1, "a": 1}, {"step": 2, "b": 2}, {"step": 3, "c": 3})
    table = Table(tmp_path / "t.csv")
    table.cut(2)
    assert [row["step"] for row in read_csv(tmp_path / "t.csv")] == [1, 2]
    table.add({"step": 3, "a": 5})
    assert read_csv(tmp_path / "t.csv")[2] == {"step": 3, "a": 5}
    assert "c" not in (tmp_path / "t.csv").read_text()


def test_a_row_that_was_cut_off_is_no_row(tmp_path):
    table_of(tmp_path, {"step": 1, "a": 1}, {"step": 12, "a": 2})
    file = tmp_path / "t.csv"
    file.write_bytes(file.read_bytes()[:-5])  # of "12,2" only "1" stands: without care, a second row of step 1
    assert read_csv(file) == [{"step": 1, "a": 1}]


def test_a_row_without_new_columns_is_appended_and_not_the_whole_file_written(tmp_path):
    table = table_of(tmp_path, {"step": 1, "a": 1, "b": 1})
    inode = (tmp_path / "t.csv").stat().st_ino
    table.add({"step": 2, "a": 1})
    assert (tmp_path / "t.csv").stat().st_ino == inode


@given(st.lists(st.floats(allow_nan=False, width=32), min_size=1), st.integers(0, 2**53))
@settings(max_examples=25, deadline=None)
def test_rows_in_memory_are_those_of_the_file(tmp_path_factory, values, step):
    folder = tmp_path_factory.mktemp("rows")
    table = table_of(folder, *({"step": min(step, 10**14) + i, "a": value} for i, value in enumerate(values)))
    assert read_csv(folder / "t.csv") == table.rows
    assert [row["step"] for row in table.rows] == [min(step, 10**14) + i for i in range(len(values))]


def test_a_quiet_table_reads_and_writes_nothing(tmp_path):
    table_of(tmp_path, {"step": 1, "a": 1}, {"step": 2, "a": 1})
    before = (tmp_path / "t.csv").read_bytes()
    quiet = Table(tmp_path / "t.csv", quiet=True)
    quiet.cut(1)
    quiet.add({"step": 2, "a": 9})
    assert [row["a"] for row in quiet.rows] == [1, 9] and (tmp_path / "t.csv").read_bytes() == before


class Logging(Classify):
    def training_step(self, batch):
        self.log(step_squared=float(self.clock.step**2), half=batch["labelled"]["weak"].mean() * 0 + 0.5)
        return super().training_step(batch)

    def after_step(self):
        self.log(late=float(self.clock.step))


def test_a_run_logs_means_of_terms_and_values_rates_and_metrics(tmp_path):
    method = Logging(plain_net())
    evaluator = lambda model, samples: {"accuracy": 0.25}  # noqa: E731
    settings = trainer(epochs=2, log_every=3)
    fit(method, streams(), settings, validation=pictures(8), evaluator=evaluator, folder=tmp_path)
    rows = read_csv(tmp_path / "train.csv")
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    assert [row["epoch"] for row in rows] == [0, 1, 1, 2]
    assert rows[1]["step_squared"] == pytest.approx((9 + 16 + 25) / 3)
    assert rows[1]["late"] == 4 and rows[1]["half"] == 0.5 and rows[1]["learning_rate"] == pytest.approx(0.1)
    assert rows[1]["ce"] > 0 and rows[1]["samples_per_second"] > 0
    assert read_csv(tmp_path / "validation.csv") == [
        {"step": 6, "epoch": 1, "accuracy": 0.25},
        {"step": 12, "epoch": 2, "accuracy": 0.25},
    ]


def test_values_are_logged_for_each_accumulated_batch(tmp_path):
    class Count(Classify):
        calls = 0

        def training_step(self, batch):
            self.calls += 1
            self.log(calls=float(self.calls))
            return super().training_step(batch)

    result = fit(Count(plain_net()), streams(), trainer(steps=1, accumulate=3, log_every=1))
    assert result.train[0]["calls"] == 2


def test_only_single_numbers_are_logged():
    class Vector(Classify):
        def training_step(self, batch):
            self.log(pixels=batch["labelled"]["weak"])
            return super().training_step(batch)

    with pytest.raises(ValueError, match=r"pixels of shape \[4, 3, 8, 8\]"):
        fit(Vector(plain_net()), streams(), trainer())


def test_tensorboard_events_hold_what_the_tables_hold(tmp_path):
    settings = trainer(steps=6, log_every=3, tensorboard=True)
    evaluator = lambda model, samples: {"accuracy": 0.25}  # noqa: E731
    fit(Classify(plain_net()), streams(), settings, validation=pictures(8), evaluator=evaluator, folder=tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"train/ce", "train/learning_rate", "validation/accuracy"} <= set(events.Tags()["scalars"])
    rows = read_csv(tmp_path / "train.csv")
    written = [(event.step, event.value) for event in events.Scalars("train/ce")]
    assert written == [(row["step"], pytest.approx(row["ce"], rel=1e-5)) for row in rows]
    assert [event.value for event in events.Scalars("validation/accuracy")] == [0.25]
