from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from limbeck.errors import UserError
from limbeck.evaluate import Comparison


def rows(*accuracies, metric="accuracy"):
    return [{metric: value, "ece": 0.1} for value in accuracies]


@pytest.fixture
def comparison():
    return Comparison(
        arms={
            "supervised": rows(0.80, 0.81, 0.79),
            "dho": rows(0.85, 0.84, 0.86),
            "ps-kd, our own": rows(0.80, 0.80, 0.80),
        },
        seeds=[0, 1, 2],
        slug="dho",
        expectations=["dho.accuracy > supervised.accuracy + 0.01", "dho.ece < supervised.ece"],
        data={"name": "digits", "where": "/srv/sets/digits"},
        seconds=12.3456789,
    )


def test_summary_is_mean_and_sample_deviation(comparison):
    dho = comparison.summary()["dho"]["accuracy"]
    assert (dho.mean, dho.deviation) == (pytest.approx(0.85), pytest.approx(0.01))
    assert Comparison({"a": rows(0.5)}, [0]).summary()["a"]["accuracy"].deviation is None


values = st.lists(st.floats(0, 1).map(lambda x: round(x, 5)), min_size=2, max_size=9)


@settings(max_examples=25, deadline=None)
@given(values, st.data())
def test_paired_agrees_with_scipy_and_turns_its_sign(left, data):
    right = data.draw(st.lists(st.floats(0, 1).map(lambda x: round(x, 5)), min_size=len(left), max_size=len(left)))
    difference = np.round(np.subtract(left, right), 12)
    assume(np.ptp(difference) > 1e-4)
    comparison = Comparison({"a": rows(*left), "b": rows(*right)}, list(range(len(left))))
    paired, back = comparison.paired("a", "b", "accuracy"), comparison.paired("b", "a", "accuracy")
    expected = stats.ttest_rel(left, right)
    assert paired.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    assert paired.low < paired.difference < paired.high
    assert (back.difference, back.low, back.high) == pytest.approx((-paired.difference, -paired.high, -paired.low))
    assert back.p_wilcoxon == pytest.approx(paired.p_wilcoxon)
    if len(set(np.abs(difference))) == len(difference) and (difference != 0).all():
        exact = stats.wilcoxon(difference, method="exact").pvalue
        assert paired.p_wilcoxon == pytest.approx(exact)


def test_wilcoxon_counts_all_signs_when_differences_tie():
    comparison = Comparison({"a": rows(0.81, 0.82, 0.83), "b": rows(0.80, 0.81, 0.82)}, [0, 1, 2])
    assert comparison.paired("a", "b", "accuracy").p_wilcoxon == pytest.approx(2 / 8)


def test_equal_arms_differ_by_nothing_with_certainty():
    paired = Comparison({"a": rows(0.1, 0.2), "b": rows(0.1, 0.2)}, [0, 1]).paired("a", "b", "accuracy")
    assert (paired.difference, paired.low, paired.high, paired.p, paired.p_wilcoxon) == (0, 0, 0, 1, 1)


def test_a_single_seed_has_no_interval_and_no_t_test():
    paired = Comparison({"a": rows(0.3), "b": rows(0.1)}, [0]).paired("a", "b", "accuracy")
    assert (paired.low, paired.high, paired.p, paired.p_wilcoxon) == (None, None, None, 1.0)


@pytest.mark.parametrize(
    ("expectation", "holds", "seeds_holding"),
    [
        ("dho.accuracy > supervised.accuracy", True, 3),
        ("dho.accuracy > supervised.accuracy + 0.04", True, 2),
        ("dho.accuracy > supervised.accuracy + 0.05", False, 1),
        ("dho.accuracy >= supervised.accuracy + 0.05", True, 2),
        ("dho.accuracy >= supervised.accuracy + 5e-2", True, 2),
        ("supervised.accuracy > dho.accuracy - 0.06", True, 2),
        ("supervised.accuracy<dho.accuracy", True, 3),
        ("dho.ece < supervised.ece", False, 0),
        ("dho.ece <= supervised.ece", True, 3),
        ("ps-kd, our own.accuracy >= supervised.accuracy", True, 2),
        ("dho.accuracy > 0.845", True, 2),
        ("dho.accuracy < -0.5", False, 0),
    ],
)
def test_a_verdict_holds_when_the_difference_of_the_means_does(comparison, expectation, holds, seeds_holding):
    verdict = comparison.judge(expectation)
    assert (verdict.holds, verdict.seeds_holding, verdict.seeds) == (holds, seeds_holding, 3)


def test_a_verdict_tests_the_difference_against_its_margin(comparison):
    verdict = comparison.judge("dho.accuracy > supervised.accuracy + 0.01")
    difference = np.array([0.05, 0.03, 0.07])
    assert verdict.difference == pytest.approx(0.05) and verdict.margin == pytest.approx(0.01)
    assert verdict.p == pytest.approx(stats.ttest_1samp(difference, 0.01).pvalue)


def test_arms_and_metrics_may_contain_dots_and_spaced_signs():
    arms = {"a": rows(0.1, metric="precision@0.5"), "a.b": rows(0.2), "kd + mixup": rows(0.3)}
    comparison = Comparison(arms, [0])
    assert comparison.judge("a.precision@0.5 < a.b.accuracy").holds
    assert comparison.judge("kd + mixup.accuracy > a.b.accuracy + 0.05").holds
    assert comparison.judge("a.b.accuracy < kd + mixup.accuracy").holds


@pytest.mark.parametrize(
    ("expectation", "message"),
    [
        ("dhoo.accuracy > supervised.accuracy", "no arm 'dhoo'; there are: supervised, dho, ps-kd, our own"),
        ("dho.acc > supervised.accuracy", "'dho' has no metric 'acc'; it has: accuracy, ece"),
        ("dho.accuracy == supervised.accuracy", "is no expectation"),
        ("dho.accuracy", "is no expectation"),
        ("dho.accuracy > ", "is no expectation"),
        ("0 < dho.accuracy < 1", "is no expectation"),
        ("dho > supervised", "'dho' in 'dho > supervised' is no arm.metric"),
        ("dho.accuracy > supervised.accuracy + much", "has no metric 'accuracy . much'"),
        ("dho.accuracy > __import__('os').name", "no arm"),
    ],
)
def test_an_expectation_that_cannot_be_judged_is_one_sentence(comparison, expectation, message):
    with pytest.raises(UserError, match=message):
        comparison.judge(expectation)


@pytest.mark.parametrize(
    ("arms", "seeds", "message"),
    [
        ({}, [0], "at least one arm"),
        ({"a": rows(0.1)}, [0, 1], "'a' has 1 results for 2 seeds"),
        ({"a": [{"x": 1.0}, {"y": 1.0}]}, [0, 1], "'a' has the metric 'x' for some seeds only"),
        ({"a": rows(float("nan"))}, [4], "'accuracy' of arm 'a', seed 4, is nan"),
        ({"a": rows(float("inf"))}, [0], "no finite number"),
        ({"a": rows("0.5")}, [0], "no finite number"),
    ],
)
def test_a_comparison_that_is_not_paired_is_refused(arms, seeds, message):
    with pytest.raises(UserError, match=message):
        Comparison(arms, seeds)


def test_json_survives_the_round_trip_with_its_verdicts(comparison):
    text = comparison.to_json()
    again = Comparison.from_json(text)
    assert again.arms == comparison.arms and list(again.arms) == list(comparison.arms)
    assert again.verdicts() == comparison.verdicts()
    assert again.to_json() == text


def test_json_holds_rounded_floats_whole_numbers_and_no_paths():
    arms = {"a": [{"accuracy": 1 / 3, "parameters": 12345678}]}
    text = Comparison(arms, [0], data={"where": "/srv/sets/digits", "also": ["C:\\data\\set"]}).to_json()
    content = json.loads(text)
    assert content["arms"]["a"] == [{"accuracy": 0.333333, "parameters": 12345678}]
    assert content["data"] == {"where": "digits", "also": ["set"]}
    assert "someone" not in text and content["versions"]["torch"]


def test_the_catalog_reads_the_claims_that_a_comparison_writes(comparison, tmp_path):
    from limbeck import catalog

    (tmp_path / "dho.json").write_text(comparison.to_json())
    front = "slug: dho\nname: DHO\npaper: P\narxiv: \nyear: 2025\ntask: t\nteacher: frozen\nsignal: logits\n"
    card = tmp_path / "cards" / "few_labels" / "dho.md"
    card.parent.mkdir(parents=True)
    card.write_text(f"---\n{front}labels: few\nsummary: S.\nobject: DHO\n---\n")
    table = catalog.table_markdown(tmp_path / "cards", tmp_path)
    assert "| 1 of 2 | `dho.accuracy > supervised.accuracy + 0.01`: +0.05 (3 of 3 seeds, p = 0.074)" in table


@pytest.mark.parametrize("text", ["{}", "[]", "nonsense", '{"claims": [{}]}', '{"claims": [], "other": 1}'])
def test_text_that_is_no_results_file_is_refused(text):
    with pytest.raises(UserError, match="no results file"):
        Comparison.from_json(text)
