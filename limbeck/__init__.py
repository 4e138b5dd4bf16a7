"""Limbeck turns big models and unlabelled data into small models that ship."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Names are imported when they are first asked for: finding a system must not wait for PyTorch.
_HOMES = {
    "Data": "limbeck.data",
    "EarlyStop": "limbeck.train",
    "Ensemble": "limbeck.teachers",
    "Frozen": "limbeck.teachers",
    "Method": "limbeck.train",
    "Optimizer": "limbeck.train",
    "Result": "limbeck.recipes",
    "Samples": "limbeck.data",
    "Schedule": "limbeck.train",
    "Stage": "limbeck.train",
    "Stream": "limbeck.data",
    "StreamSettings": "limbeck.train",
    "Trainer": "limbeck.train",
    "UserError": "limbeck.errors",
    "Workspace": "limbeck.train",
    "compare": "limbeck.recipes",
    "demo": "limbeck.recipes",
    "distill": "limbeck.recipes",
    "export": "limbeck.recipes",
    "load_data": "limbeck.data",
    "load_model": "limbeck.models",
    "prove": "limbeck.recipes",
    "run": "limbeck.recipes",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'limbeck' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
