"""The main job in two minutes: a teacher, the same student alone and distilled, one table and one report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from limbeck.data import Data, load_data
from limbeck.data.splits import split_labels
from limbeck.evaluate import Comparison
from limbeck.files import write_text
from limbeck.models import load_model
from limbeck.recipes.compare import Page, write_page
from limbeck.recipes.run import Result, distill
from limbeck.train import Optimizer, Schedule, StreamSettings, Trainer
from limbeck.train.checkpoint import seed_everything

Streams = dict[str, StreamSettings]

STUDENT = {"channels": [8, 16, 16]}
TEACHER = {"channels": [32, 64, 64]}
SHIFT = {"weak": {"name": "weak", "padding": 1, "flip": False}}
STRONG = {"name": "strong", "padding": 1, "flip": False, "n": 1, "m": 10, "fill": 0, "cutout": 0.25}


def demo(
    workspace: str | Path = "runs/demo", *, seeds: int = 3, say: Callable[[str], None] = lambda line: None
) -> Comparison:
    """Digits: a teacher, its student trained alone and distilled by `kd`, `ps-kd`, and with 4 labels a class.

    Writes `<workspace>/report.html` and `comparison.json`. With few labels, `dho` distils the teacher that saw all
    labels on unlabelled digits, and `shrinkmatch` has no teacher at all.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks so small that threads would wait for each other longer than they compute
    try:
        return _demo(Path(workspace), seeds, say)
    finally:
        torch.set_num_threads(threads)


def _demo(folder: Path, seeds: int, say: Callable[[str], None]) -> Comparison:
    page = Page()
    for seed in range(seeds):
        for arm, result in _runs(folder / f"seed-{seed}", seed):
            say(f"seed {seed}: {arm:<24} {page.add(arm, result)}")
    comparison = page.comparison(range(seeds))
    write_text(folder / "comparison.json", comparison.to_json())
    write_page(folder / "report.html", "Limbeck demo: digits", comparison, page, context=["teacher"])
    return comparison


def _runs(folder: Path, seed: int) -> Iterator[tuple[str, Result]]:
    """(arm, result) of one seed, one after another: all students start from the same weights."""
    data = load_data("digits", seed=seed)
    few = _few(data, seed)
    adam = Trainer(
        epochs=90,
        optimizer=Optimizer("adamw", lr=5e-3, weight_decay=1e-2),
        schedule=Schedule("cosine"),
        evaluate_every=5,
    )
    labelled = {"labelled": StreamSettings(64, SHIFT)}
    both = {"labelled": StreamSettings(32, SHIFT, cycle=True), "unlabelled": StreamSettings(64, SHIFT)}

    def train(
        arm: str, method: str, on: Data, network: dict[str, Any], trainer: Trainer, streams: Streams, **more: Any
    ) -> Result:
        seed_everything(seed, "weights")
        net = load_model("small_cnn", num_classes=10, in_channels=1, config=network)
        path = folder / arm.replace(" ", "-").replace(",", "")
        return distill(
            method,
            data=on,
            student=net,
            trainer=trainer,
            streams=streams,
            workspace=path,
            seed=seed,
            report=False,
            **more,
        )

    result = train("teacher", "supervised", data, TEACHER, adam, labelled)
    yield "teacher", result
    teacher = {"teacher": result.student}
    yield "student alone", train("student alone", "supervised", data, STUDENT, adam, labelled)
    yield "kd", train("kd", "kd", data, STUDENT, adam, labelled, **teacher)
    yield "ps-kd (no teacher)", train("ps-kd", "ps-kd", data, STUDENT, adam, labelled)

    # As many steps as the others take, with an epoch of 40 samples.
    alone = replace(adam, epochs=None, steps=90 * (len(data.train) // 64), evaluate_every=50)
    few_labelled = {"labelled": StreamSettings(32, SHIFT, cycle=True)}
    yield "student alone, 4 labels", train("student alone, 4 labels", "supervised", few, STUDENT, alone, few_labelled)
    yield "dho, 4 labels", train("dho, 4 labels", "dho", few, STUDENT, adam, both, **teacher)
    strong = {**both, "unlabelled": StreamSettings(64, {**SHIFT, "strong": STRONG})}
    yield (
        "shrinkmatch, 4 labels",
        train("shrinkmatch, 4 labels", "shrinkmatch", few, STUDENT, adam, strong, ema_decay=0.98, ratio_decay=0.98),
    )


def _few(data: Data, seed: int) -> Data:
    """The data with 4 labels a class; the validation set keeps 4 a class too, as nobody would have more."""
    labelled, unlabelled = split_labels(data.train, labels_per_class=4, keep_labelled_in_unlabelled=True, seed=seed)
    assert data.validation is not None
    validation, _ = split_labels(data.validation, labels_per_class=4, keep_labelled_in_unlabelled=True, seed=seed)
    return replace(data, train=labelled, unlabelled=unlabelled, validation=validation)
