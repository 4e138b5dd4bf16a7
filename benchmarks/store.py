"""What a teacher on disk costs: training from it, reading at random, filling it, and the bytes that accuracy is worth.

    python -m benchmarks.store [epoch] [reads] [label] [bytes]

`epoch`: training steps of a ResNet-20 with a ResNet-56's answers from a store, against steps without any teacher.
`reads`: a batch's random reads from synthetic stores of 10 thousand to 1 million rows.
`label`: filling a store, from pictures in memory to checked shards, against the bare forward passes of the teacher.
`bytes`: `benchmarks.store_bytes`.

They need CIFAR-10 in LIMBECK_DATA and `cifar10-resnet56` in LIMBECK_MODELS.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pyarrow import ipc
from torch import Tensor, nn

from benchmarks import store_bytes
from benchmarks.common import Action, finish, in_turn, judged, machine, repeat
from limbeck.data import Samples, Stream, Weak, load_data
from limbeck.files import write_text
from limbeck.methods.classification.kd import KD
from limbeck.methods.classification.supervised import Supervised
from limbeck.models import Outputs, load_model
from limbeck.teachers import Frozen, Stored, Teacher, fill
from limbeck.teachers.columns import Kept, encode, encode_top
from limbeck.teachers.store import Manifest, schema_of, shard_record, write_rows
from limbeck.train import Loop, Method, Optimizer, Trainer

BATCH = 64
KEPT: dict[str, dict[str, Any]] = {
    "dense float32": {"dtype": "float32"},
    "top-5 float16": {"dtype": "float16", "top_k": 5},
}


def resnet56() -> nn.Module:
    weights = Path(os.environ["LIMBECK_MODELS"]) / "cifar10-resnet56"
    return load_model("resnet56", num_classes=10, weights=weights, normalize="imagenet")


def pictures(count: int) -> Samples:
    return load_data("cifar10", limit={"train": count}).train


# ---------------------------------------------------------------- an epoch


class Constant(Teacher):
    """Answers that cost nothing."""

    def __call__(self, fields: Mapping[str, Any], view: str) -> Outputs:
        return Outputs(logits=ANSWERS)


ANSWERS = torch.randn(BATCH, 10, generator=torch.Generator().manual_seed(0))


def stepper(method: Method, samples: Samples) -> Action:
    """One training step of the loop, with a row of metrics every 20."""
    stream = Stream(samples, BATCH, {"weak": Weak(padding=4)})
    optimizer = Optimizer("sgd", lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    loop = Loop(method, {"labelled": stream}, Trainer(steps=10**6, optimizer=optimizer))
    loop.logs.start(0, 10**6)
    method.train()

    def step() -> None:
        loop.step()
        if loop.clock.step % 20 == 0:
            loop.report()

    return step


def epoch(samples: int = 2560, steps: int = 8, rounds: int = 25) -> bool:
    """Blocks of training steps in turn: without a teacher, with answers that cost nothing, from stores, and live."""
    where, train = machine(), pictures(samples)
    torch.manual_seed(0)
    student, teacher = load_model("resnet20", num_classes=10), Frozen(resnet56())
    with tempfile.TemporaryDirectory() as folder:
        teachers: dict[str, Teacher] = {"free answers": Constant()}
        for name, kept in KEPT.items():
            store = Path(folder) / name.replace(" ", "-")
            layout = torch.channels_last
            fill(store, teacher, train, views={"weak": Weak(padding=4)}, versions=2, memory_format=layout, **kept)
            teachers[f"stored, {name}"] = Stored(store)
        teachers["live"] = teacher
        methods: dict[str, Method] = {"no teacher": Supervised(copy.deepcopy(student))}
        methods |= {name: KD(copy.deepcopy(student), each) for name, each in teachers.items()}
        timing = in_turn({name: repeat(stepper(method, train), steps) for name, method in methods.items()}, rounds)
    rows = []
    for name, base in [
        *((name, "no teacher") for name in teachers),
        *((name, "free answers") for name in teachers if name.startswith("stored")),
    ]:
        row = {"teacher": name, "against": base, "ms a step": 1000 * timing.best(name) / steps}
        row |= timing.compare(name, base)
        rows.append(judged(row, most=1.05) if name.startswith("stored") and base == "no teacher" else row)
    settings = {"student": "ResNet-20", "teacher": "ResNet-56", "pictures": samples, "batch": BATCH, "steps": steps}
    return finish("store-epoch", rows, settings, where)


# ---------------------------------------------------------------- random reads


def synthetic(path: Path, rows: int, shards: int, kept: Mapping[str, Any]) -> Stored:
    """A store of random answers, 10 classes, written as fillings write theirs."""
    path.mkdir()
    top_k, generator, records = kept.get("top_k"), torch.Generator().manual_seed(0), []
    for number, index in enumerate(torch.arange(rows).chunk(shards)):
        logits = torch.randn(len(index), 10, generator=generator)
        if top_k is None:
            answers = encode("logits", logits, kept["dtype"])
        else:
            answers = encode_top("logits", logits, top_k, "logits", kept["dtype"])
        columns = {"index": Kept.of(index), "version": Kept.of(torch.zeros(len(index), dtype=torch.int32))}
        columns["sample"] = Kept.of(index)
        for name, values in answers.items():
            columns[f"image/{name}"] = Kept.of(values, classes=10 if name.endswith(".ids") else None)
        file = path / f"shard-{number:05d}.arrow"
        write_rows(file, columns, 10)
        records.append(shard_record(file, len(index)))
    schema, classes = schema_of(ipc.open_file(pa.memory_map(str(file))).schema)
    settings = {"field": "image", "views": {"image": {"view": "Identity"}}, "top_k": top_k, "versions": 1}
    settings["classes"] = classes
    manifest = Manifest("none", {"name": "synthetic"}, settings, schema, records)
    write_text(path / "manifest.json", manifest.to_json())
    return Stored(path)


def reader(stored: Stored, batches: list[Tensor]) -> Action:
    """Read the batches: their rows, and every column of answers."""
    store = stored.store
    names = [name for name in store.manifest.schema if name.startswith("image/")]
    indices = [batch.numpy() for batch in batches]

    def read() -> None:
        for index in indices:
            rows = store.rows(index)
            for name in names:
                store.take(name, rows)

    return read


def asker(stored: Stored, batches: list[Tensor]) -> Action:
    """Ask for the logits of the batches, as a method does."""

    def ask() -> None:
        for index in batches:
            stored.logits({"index": index}, "image")

    return ask


def reads(batches: int = 4000, rounds: int = 9) -> bool:
    """The page cache is warm; every block reads so many batches of random rows."""
    where, train, sizes = machine(), pictures(640), (10_000, 100_000, 1_000_000)
    step = repeat(stepper(Supervised(load_model("resnet20", num_classes=10)), train), 8)
    step_seconds = in_turn({"step": step}, 5).best("step") / 8
    rows = []
    for name, kept in KEPT.items():
        with tempfile.TemporaryDirectory() as folder:
            stores = {f"{size:,}": synthetic(Path(folder) / str(size), size, 1, kept) for size in sizes}
            stores["1,000,000 in 8 shards"] = synthetic(Path(folder) / "8", sizes[-1], 8, kept)
            actions: dict[str, Action] = {}
            for label, stored in stores.items():
                generator = torch.Generator().manual_seed(1)
                some = list(torch.randint(len(stored.store), (batches, BATCH), generator=generator))
                actions[f"{label}/read"], actions[f"{label}/logits"] = reader(stored, some), asker(stored, some)
            timing = in_turn(actions, rounds)
        for label in stores:
            read, ask = (timing.best(f"{label}/{what}") / batches for what in ("read", "logits"))
            row = {"kept": name, "rows": label, "read us": 1e6 * read, "logits us": 1e6 * ask}
            row |= timing.compare(f"{label}/logits", "10,000/logits") | {"share of a step": ask / step_seconds}
            rows.append(row)
    settings = {"batch": BATCH, "classes": 10, "batches": batches, "step ms": 1000 * step_seconds}
    return finish("store-reads", rows, settings, where)


# ---------------------------------------------------------------- filling


def label(samples: int = 4096, rounds: int = 9) -> bool:
    """The same pictures through the bare model and through `fill`, which hashes, writes, seals and checks as well."""
    where, train, sizes = machine(), pictures(samples), (32, 64, 128, 256, 512)
    model = resnet56().to(memory_format=torch.channels_last)
    teacher, images = Frozen(model), train.fields["image"]

    def bare(size: int, count: int) -> Action:
        chunk = (images[:size].float() / 255).contiguous(memory_format=torch.channels_last)

        def forward() -> None:
            with torch.inference_mode():
                for _ in range(count // size):
                    model(chunk)

        return forward

    tried = in_turn({str(size): bare(size, 1024) for size in sizes}, 5)
    best = min(sizes, key=lambda size: tried.best(str(size)))
    with tempfile.TemporaryDirectory() as folder:
        made = iter(range(10**6))

        def filled(kept: Mapping[str, Any]) -> Action:
            settings = {"batch_size": best, "memory_format": torch.channels_last, **kept}
            return lambda: fill(Path(folder) / str(next(made)), teacher, train, **settings)

        actions = {"bare": bare(best, samples)} | {name: filled(kept) for name, kept in KEPT.items()}
        timing = in_turn(actions, rounds)
    rows = []
    for name in KEPT:
        row = {"kept": name, "bare a second": samples / timing.best("bare")}
        row |= {"labelled a second": samples / timing.best(name), **timing.compare("bare", name)}
        rows.append(judged(row, least=0.95))
    forward = {f"bare a second, batches of {size}": 1024 / tried.best(str(size)) for size in sizes}
    return finish("store-label", rows, {"teacher": "ResNet-56", "pictures": samples, "batch": best, **forward}, where)


MEASURES = {"epoch": epoch, "reads": reads, "label": label, "bytes": store_bytes.measure}

if __name__ == "__main__":
    torch.set_num_threads(2)
    wanted = sys.argv[1:] or list(MEASURES)
    sys.exit(0 if all([MEASURES[name]() for name in wanted]) else 1)
