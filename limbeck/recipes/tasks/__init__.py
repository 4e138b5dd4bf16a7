"""Tasks: how the data of a kind of problem are loaded, which networks it takes, what is measured and shown."""

from __future__ import annotations

import importlib

from limbeck.errors import UserError
from limbeck.recipes.tasks.task import Task

TASKS = {
    "classification": "classification",
    "detection": "detection",
    "segmentation": "segmentation",
    "language-modelling": "language",
    "sentence-pairs": "pairs",
    "generation": "generation",
    "multimodal": "multimodal",
    "graph": "graph",
    "audio": "audio",
    "dataset-distillation": "datasets",
    "representation": "representation",
}


def find_task(name: str) -> Task:
    """The task of this name, from the module that `TASKS` names."""
    if name not in TASKS:
        raise UserError(f"there is no task '{name}'; the tasks are {', '.join(TASKS)}")
    return importlib.import_module(f"limbeck.recipes.tasks.{TASKS[name]}").TASK


__all__ = ["TASKS", "Task", "find_task"]
