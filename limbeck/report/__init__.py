"""Tables, plots and one self-contained HTML file."""

from limbeck.report.html import write_report
from limbeck.report.plots import arms_plot, cost_plot, curve_keys, curves_plot, image_grid, reliability_plot
from limbeck.report.tables import Cell, Column, Table, comparison_table, markdown_table, rich_table

__all__ = [
    "Cell",
    "Column",
    "Table",
    "arms_plot",
    "comparison_table",
    "cost_plot",
    "curve_keys",
    "curves_plot",
    "image_grid",
    "markdown_table",
    "reliability_plot",
    "rich_table",
    "write_report",
]
