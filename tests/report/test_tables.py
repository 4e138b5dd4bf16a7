from __future__ import annotations

import io

import pytest
from rich.console import Console

from limbeck.errors import UserError
from limbeck.evaluate import Comparison
from limbeck.report import comparison_table, markdown_table, rich_table


@pytest.fixture
def comparison():
    kd = {"accuracy": 0.90, "ece": 0.04, "parameters": 5130}
    other = {"accuracy": 0.95, "ece": 0.05, "parameters": 1}
    arms = {
        "kd": [kd, kd | {"accuracy": 0.92, "ece": 0.02}],
        "a|b [bold]": [other, other],
        "teacher": [{"accuracy": 0.99, "ece": 0.01}] * 2,
    }
    return Comparison(arms, seeds=[0, 1])


def texts(table):
    return {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}


def bests(table):
    return {row[0].text: [cell.best for cell in row[1:]] for row in table.rows}


def test_cells_hold_mean_and_deviation_in_the_metrics_unit(comparison):
    table = comparison_table(comparison)
    assert table.heading == ["Arm", "Accuracy (%)", "ECE (%)", "Parameters"]
    assert texts(table)["kd"] == ["91.00 ± 1.41", "3.00 ± 1.41", "5,130"]
    assert texts(table)["teacher"] == ["99.00", "1.00", "–"]


def test_the_best_arm_has_the_highest_accuracy_and_the_lowest_error(comparison):
    table = comparison_table(comparison)
    assert bests(table)["teacher"] == [True, True, False]
    assert bests(table)["kd"] == [False, False, False]


def test_an_arm_in_the_context_comes_first_and_never_wins(comparison):
    table = comparison_table(comparison, context=["teacher"])
    assert table.rows[0][0].text == "teacher"
    assert bests(table) == {"teacher": [False] * 3, "kd": [False, True, False], "a|b [bold]": [True, False, False]}


def test_arms_that_show_the_same_best_value_are_all_best():
    table = comparison_table(Comparison({a: [{"accuracy": v}] for a, v in (("a", 0.9), ("b", 0.9000001))}, [0]))
    assert bests(table) == {"a": [True], "b": [True]}


def test_a_lone_arm_wins_nothing():
    assert bests(comparison_table(Comparison({"a": [{"accuracy": 0.9}]}, [0]))) == {"a": [False]}


def test_an_unknown_metric_keeps_its_own_numbers():
    table = comparison_table(Comparison({"a": [{"my_score": 12.34567, "big": 123456.7}]}, [0]))
    assert table.heading[1:] == ["My score", "Big"] and texts(table)["a"] == ["12.35", "123,457"]


def test_what_the_comparison_lacks_is_named(comparison):
    with pytest.raises(UserError, match="no metric 'miou'; it has: accuracy, ece, parameters"):
        comparison_table(comparison, metrics=["miou"])
    with pytest.raises(UserError, match="no arm 'tutor'"):
        comparison_table(comparison, context=["tutor"])


def test_markdown_marks_the_best_and_escapes_bars(comparison):
    lines = markdown_table(comparison_table(comparison, ["accuracy"], ["teacher"])).splitlines()
    assert lines[0] == "| Arm | Accuracy (%) |" and lines[1] == "|---|---:|"
    assert "| a\\|b [bold] | **95.00** |" in lines


def test_the_terminal_shows_an_arms_name_as_it_is(comparison):
    console = Console(file=io.StringIO(), width=120)
    console.print(rich_table(comparison_table(comparison), "a [red]title[/red]"))
    shown = console.file.getvalue()
    assert "a|b [bold]" in shown and "[red]title[/red]" in shown and "91.00 ± 1.41" in shown
