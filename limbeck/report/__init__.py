"""Tables, plots and one self-contained HTML file."""

from limbeck.report.boxes import boxes_figure
from limbeck.report.exhibits import draw
from limbeck.report.html import write_report
from limbeck.report.masks import class_colours, masks_figure
from limbeck.report.pairs import extreme_rows, retrieval_rows, score_plot
from limbeck.report.plots import arms_plot, cost_plot, curve_keys, curves_plot, image_grid, reliability_plot
from limbeck.report.samples import sample_grid
from limbeck.report.tables import Cell, Column, Table, column_of, comparison_table, markdown_table, rich_table
from limbeck.report.texts import texts_figure

__all__ = [
    "Cell",
    "Column",
    "Table",
    "arms_plot",
    "boxes_figure",
    "class_colours",
    "column_of",
    "comparison_table",
    "cost_plot",
    "curve_keys",
    "curves_plot",
    "draw",
    "extreme_rows",
    "image_grid",
    "markdown_table",
    "masks_figure",
    "reliability_plot",
    "retrieval_rows",
    "rich_table",
    "sample_grid",
    "score_plot",
    "texts_figure",
    "write_report",
]
