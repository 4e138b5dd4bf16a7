"""Recipes, and what the command line does with them: every command is a function here."""

from limbeck.recipes.compare import compare, prove
from limbeck.recipes.demo import demo
from limbeck.recipes.label import label
from limbeck.recipes.recipe import columns_of
from limbeck.recipes.run import Result, distill, export, restore, run

__all__ = ["Result", "columns_of", "compare", "demo", "distill", "export", "label", "prove", "restore", "run"]
