from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import UserError
from limbeck.evaluate import Comparison, reliability
from limbeck.report import arms_plot, cost_plot, curve_keys, curves_plot, image_grid, reliability_plot

CURVES = {
    "kd": [{"step": 10, "epoch": 1, "loss": 2.0}, {"step": 10, "epoch": 1, "accuracy": 0.5},
           {"step": 20, "epoch": 2, "accuracy": 0.6}],
    "dho": [{"step": 10, "epoch": 1, "accuracy": 0.7}],
}  # fmt: skip


def lines(figure):
    return {line.get_label(): line for line in figure.axes[0].get_lines()}


def test_curves_draw_only_rows_with_the_metric_in_its_unit():
    figure = curves_plot(CURVES, "accuracy")
    assert lines(figure)["kd"].get_xydata().tolist() == [[10, 50], [20, 60]]
    assert figure.axes[0].get_ylabel() == "Accuracy (%)" and figure.axes[0].get_xlabel() == "Optimiser step"


def test_an_arm_keeps_its_colour_when_another_one_has_no_curve():
    alone = curves_plot({"dho": CURVES["dho"]}, "accuracy", arms=["kd", "dho"])
    both = curves_plot(CURVES, "accuracy", arms=["kd", "dho"])
    assert lines(alone)["dho"].get_color() == lines(both)["dho"].get_color() != lines(both)["kd"].get_color()


def test_thirty_five_arms_are_told_apart_by_colour_and_line_style():
    curves = {f"arm {n}": [{"step": 1, "loss": n}] for n in range(35)}
    styles = {(line.get_color(), str(line._dash_pattern)) for line in curves_plot(curves, "loss").axes[0].get_lines()}
    assert len(styles) == 35


def test_a_metric_without_rows_is_named_with_those_there_are():
    assert curve_keys(CURVES) == ["loss", "accuracy"]
    with pytest.raises(UserError, match="No history row has 'miou'; draw one of: loss, accuracy"):
        curves_plot(CURVES, "miou")


@pytest.mark.parametrize("arms", [2, 12])
def test_the_legend_covers_no_axes_and_leaves_them_their_height(arms):
    curves = {f"an arm with a rather long name, {n}": [{"step": s, "loss": n} for s in (1, 2)] for n in range(arms)}
    figure = curves_plot(curves, "loss")
    figure.draw_without_rendering()
    legend, axes = figure.legends[0].get_window_extent(), figure.axes[0].get_window_extent()
    assert legend.y1 <= axes.y0
    assert axes.height >= 0.5 * 3.6 * figure.dpi
    assert legend.x0 >= 0 and legend.x1 <= figure.bbox.x1


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 50), st.integers(1, 20))
def test_reliability_bars_stand_only_where_samples_are(samples, bins):
    generator = torch.Generator().manual_seed(samples)
    diagram = reliability(torch.randn(samples, 3, generator=generator), torch.arange(samples) % 3, bins)
    upper, lower = reliability_plot(diagram, "kd").axes
    assert len(upper.patches) == sum(share > 0 for share in diagram.fraction)
    assert sum(bar.get_height() for bar in lower.patches) == pytest.approx(100, abs=1e-3)


@pytest.fixture
def comparison():
    row = {"accuracy": 0.9, "parameters": 5000, "latency_ms": 1.0}
    return Comparison(
        {"small": [row, row | {"accuracy": 0.8}], "large": [row | {"parameters": 90000}] * 2, "x": [{"nll": 1.0}] * 2},
        seeds=[0, 1],
    )


def test_cost_points_lie_at_the_means_and_the_axis_is_logarithmic_when_costs_differ_widely(comparison):
    axes = cost_plot(comparison, "accuracy", "parameters").axes[0]
    points = {box.get_label(): tuple(box.lines[0].get_xydata()[0]) for box in axes.containers}
    assert points == {"small": (5000, pytest.approx(85)), "large": (90000, pytest.approx(90))}
    assert axes.get_xscale() == "log"
    assert cost_plot(comparison, "accuracy", "latency_ms").axes[0].get_xscale() == "linear"


def test_every_seed_is_a_dot_and_arms_without_the_metric_are_left_out(comparison):
    axes = arms_plot(comparison, "accuracy").axes[0]
    dots = [line.get_xdata().tolist() for line in axes.get_lines() if line.get_marker() == "o"]
    assert dots == [pytest.approx([90, 80]), pytest.approx([90, 90])]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["small", "large"]


def test_names_with_dollar_signs_are_drawn_as_they_are():
    row = {"accuracy": 0.5, "parameters": 10}
    comparison = Comparison({"$x^{": [row], "b_$": [row]}, [0])
    for figure in (arms_plot(comparison, "accuracy"), cost_plot(comparison, "accuracy", "parameters")):
        figure.draw_without_rendering()


def test_missing_metrics_of_a_plot_are_named(comparison):
    with pytest.raises(UserError, match="No arm has both 'nll' and 'parameters'"):
        cost_plot(comparison, "nll", "parameters")
    with pytest.raises(UserError, match="No arm has the metric 'miou'"):
        arms_plot(comparison, "miou")


def test_the_grid_shows_uint8_and_float_pictures_alike():
    images = torch.arange(5 * 3 * 4 * 4, dtype=torch.uint8).view(5, 3, 4, 4)
    grids = [image_grid(images, columns=3), image_grid(images.float() / 255, columns=3)]
    shown = [[axes.images[0].get_array() for axes in grid.axes if axes.images] for grid in grids]
    assert len(shown[0]) == 5 and len(grids[0].axes) == 6
    assert all((a == b).all() for a, b in zip(*shown, strict=True))


def test_what_is_no_picture_is_refused():
    with pytest.raises(UserError, match=r"got \[2, 5, 8, 8\]"):
        image_grid(torch.zeros(2, 5, 8, 8))
