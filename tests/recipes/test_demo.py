"""The demo from the command line, with one seed."""

from __future__ import annotations

import json

import pytest

from limbeck.cli import main


@pytest.mark.slow
def test_the_demo_trains_all_arms_and_few_labels_gain_from_teacher_and_unlabelled_digits(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--seeds", "1"]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "runs/demo/comparison.json").read_text())["arms"]
    for arm, (metrics,) in rows.items():
        assert arm.split(",")[0] in printed
        assert {"accuracy", "ece", "parameters", "latency_ms", "seconds"} <= set(metrics)
    alone = rows["student alone, 4 labels"][0]["accuracy"]
    assert rows["dho, 4 labels"][0]["accuracy"] > alone + 0.05
    assert rows["shrinkmatch, 4 labels"][0]["accuracy"] > alone
    page = (tmp_path / "runs/demo/report.html").read_text()
    assert 'src="http' not in page and 'href="http' not in page
    # Run again, it loads every run and repeats the table.
    assert main(["demo", "--seeds", "1"]) == 0
    assert json.loads((tmp_path / "runs/demo/comparison.json").read_text())["arms"] == rows
