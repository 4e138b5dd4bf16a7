"""Tables, plots and one self-contained HTML file."""

from limbeck.report.exhibits import draw
from limbeck.report.html import write_report
from limbeck.report.masks import class_colours, masks_figure
from limbeck.report.plots import arms_plot, cost_plot, curve_keys, curves_plot, image_grid, reliability_plot
from limbeck.report.tables import Cell, Column, Table, column_of, comparison_table, markdown_table, rich_table
from limbeck.report.texts import texts_figure

__all__ = [
    "Cell",
    "Column",
    "Table",
    "arms_plot",
    "class_colours",
    "column_of",
    "comparison_table",
    "cost_plot",
    "curve_keys",
    "curves_plot",
    "draw",
    "image_grid",
    "markdown_table",
    "masks_figure",
    "reliability_plot",
    "rich_table",
    "texts_figure",
    "write_report",
]
