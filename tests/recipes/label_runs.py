"""Labelling of digits by a small network, as the command line does it; imported once by processes that are killed."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

import sklearn.datasets  # noqa: F401  (read by the digits; forked processes need not import it again)
import torch
import yaml

import limbeck.recipes.label  # noqa: F401
from limbeck.cli import main
from limbeck.models import load_model, save_model
from limbeck.teachers import filling


def recipe(folder: Path) -> Path:
    """A recipe of knowledge distillation on digits, whose teacher's weights lie beside it."""
    torch.manual_seed(0)
    config = {"channels": [8, 8, 8]}
    save_model(load_model("small_cnn", num_classes=10, in_channels=1, config=config), folder / "teacher")
    content = {
        "method": {"name": "kd"},
        "data": {"name_or_path": "digits", "validation_fraction": 0.1},
        "teacher": {"name": str(folder / "teacher")},
        "student": {"name": "small_cnn", "config": {"channels": [4, 4, 4]}},
        "streams": {"labelled": {"batch_size": 16, "views": {"weak": {"name": "weak", "padding": 1, "flip": False}}}},
        "trainer": {"steps": 10},
    }
    file = folder / "digits.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


SETTINGS = ["--batch-size", "16", "--versions", "2", "--top-k", "5", "--dtype", "float16"]


def label(file: str, store: str) -> int:
    """`limbeck label` in this process, in parts of two batches."""
    torch.set_num_threads(1)
    filling.BATCHES_PER_PART = 2
    with contextlib.redirect_stdout(io.StringIO()):
        return main(["label", file, "--store", store, *SETTINGS])


def serve() -> None:
    """For every line of recipe and store: fork, say the child's number, let it label, say how it ended.

    An import of everything would cost each process seconds.
    """
    for line in iter(sys.stdin.readline, ""):
        file, store = line.split()
        child = os.fork()
        if not child:
            os._exit(label(file, store))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
