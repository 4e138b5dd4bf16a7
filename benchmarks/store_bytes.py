"""Bytes that a sample's answers take on disk, against what a student loses that learns from them.

    python -m benchmarks.store bytes

Students learn from a store in each precision, on pictures (CIFAR-10, ResNet-56 to a small CNN) and on text (Tiny
Shakespeare by characters, Llamas of 3 layers to 1). What one loses is counted against dense float32 with the same seed;
with the first seed a student of the live teacher must end with the very same weights.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import limbeck
from benchmarks.common import Row, finish, machine
from limbeck.data import Samples, load_data, load_language
from limbeck.models import load_language_model, load_model
from limbeck.recipes import recipe as recipes
from limbeck.teachers import Frozen, Stored, Teacher, fill
from limbeck.teachers.store import KEYS, Store

SEEDS = 3
REFERENCE = "dense float32"
Train = Callable[[Teacher, int, Path], limbeck.Result]  # teacher, seed, folder


def kept(likeliest: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """What is stored, by name."""
    dense = {f"dense {dtype}": {"dtype": dtype} for dtype in ("float32", "float16", "bfloat16", "int8")}
    top = {f"top-{k} {dtype}": {"dtype": dtype, "top_k": k} for k in likeliest for dtype in ("float16", "int8")}
    return dense | top | {"top-1 float16": {"dtype": "float16", "top_k": 1}}


def measure() -> bool:
    where = machine()
    with tempfile.TemporaryDirectory() as folder:
        rows = [*of_pictures(Path(folder) / "pictures"), *of_text(Path(folder) / "text")]
    return finish("store-bytes", rows, {"seeds": SEEDS}, where)


def of_pictures(folder: Path) -> list[Row]:
    """`kd` for 6 epochs of 5,000 pictures, shown as they are; accuracy in per cent of 2,000 others."""
    data = load_data("cifar10", limit={"train": 5000, "test": 2000})
    weights = Path(os.environ["LIMBECK_MODELS"]) / "cifar10-resnet56"
    teacher = Frozen(load_model("resnet56", num_classes=10, weights=weights, normalize="imagenet"))
    optimizer = limbeck.Optimizer("sgd", lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def train(teacher: Teacher, seed: int, workspace: Path) -> limbeck.Result:
        torch.manual_seed(seed)
        return limbeck.distill(
            "kd",
            data=data,
            student=load_model("small_cnn", num_classes=10, config={"channels": [16, 32, 64]}),
            teacher=teacher,
            trainer=limbeck.Trainer(epochs=6, optimizer=optimizer, schedule=limbeck.Schedule("cosine")),
            workspace=workspace,
            seed=seed,
            report=False,
        )

    settings = {"batch_size": 64, "memory_format": torch.channels_last}
    return table("pictures", train, teacher, data.train, kept((5,)), settings, folder, "accuracy", 100)


def of_text(folder: Path) -> list[Row]:
    """`token-kd` for 350 steps of 32 rows out of 4,000 of 64 characters; negative log-likelihood of held-out text."""
    teacher = Frozen(limbeck.run("taid.teacher", workspace=folder / "teacher", report=False).student)
    limit = {"train": 4000, "validation": 100}
    data = load_language("tiny_shakespeare", tokenizer="char", max_length=65, limit=limit)
    config = recipes.read("token-kd")["student"]["config"]
    shape = {"vocab_size": data.vocab_size, "max_length": data.max_length, "eos_id": data.tokenizer.eos_token_id}
    optimizer = limbeck.Optimizer("adamw", lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)

    def train(teacher: Teacher, seed: int, workspace: Path) -> limbeck.Result:
        torch.manual_seed(seed)
        return limbeck.distill(
            "token-kd",
            data=data,
            student=load_language_model("hf-config:llama", config=config, **shape),
            teacher=teacher,
            trainer=limbeck.Trainer(
                steps=350, optimizer=optimizer, schedule=limbeck.Schedule("cosine", warmup=0.05), clip_norm=1.0
            ),
            streams={"labelled": limbeck.StreamSettings(32, {})},
            workspace=workspace,
            seed=seed,
            report=False,
        )

    settings = {"batch_size": 32, "field": "tokens"}
    return table("characters", train, teacher, data.train, kept((20, 5)), settings, folder, "nll", 1)


def table(
    task: str,
    train: Train,
    teacher: Teacher,
    samples: Samples,
    forms: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    folder: Path,
    metric: str,
    scale: float,
) -> list[Row]:
    """One row for each form: bytes of answers, and what students lose by them."""
    live = train(teacher, 0, folder / "live")
    rows: list[Row] = []
    reference: list[float] = []
    for name, form in forms.items():
        store = folder / name.replace(" ", "-")
        fill(store, teacher, samples, **settings, **form)
        found = [train(Stored(store), seed, folder / f"{store.name}-{seed}") for seed in range(SEEDS)]
        values = [scale * each.metrics[metric] for each in found]
        reference = reference or values
        lost = [one - other for one, other in zip(values, reference, strict=True)]
        row: Row = {"task": task, "kept": name, **sizes(Store(store)), metric: statistics.mean(values)}
        row |= {"change": statistics.mean(lost), "spread": statistics.stdev(values)}
        if name == REFERENCE:
            row["weights as live's"] = same_weights(live, found[0])
        rows.append(row)
    return rows


def sizes(store: Store) -> Row:
    """Bytes for each item, a picture or a token: of its answer, and with its share of numbers, hashes and places."""
    tokens = store.manifest.schema.get("place")
    items = int(store.count_tokens(np.arange(len(store))).sum()) if tokens else len(store)
    answers = [column for name, column in store.manifest.schema.items() if name not in KEYS]
    each = sum(math.prod(column.shape) * getattr(torch, column.dtype).itemsize for column in answers)
    return {"answer bytes": each, "bytes": sum(shard["bytes"] for shard in store.manifest.shards) / items}


def same_weights(one: limbeck.Result, other: limbeck.Result) -> bool:
    first, second = one.student.state_dict(), other.student.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
