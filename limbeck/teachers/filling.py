"""Running a teacher over samples once, into a store: resumable, in one process or several, in order.

The samples that a store lacks are cut into blocks of whole batches. A block's answers are one part file, written whole
or not at all, so a killed filling goes on with the parts that are missing, and several processes take every n-th block.
When the last part is there, parts become shards and the manifest names them. What a block holds depends on the samples,
the settings and its number only: a store that was resumed is the store of an uninterrupted run.

Letters: B samples of a batch, V versions, T kept tokens of a batch, C classes or words.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from limbeck.data import EncodedImages, Identity, Samples, Stream, View, channels_last, read_rows, seed_of, to_device
from limbeck.data.language import IGNORE
from limbeck.distributed import rank, world_size
from limbeck.errors import UserError
from limbeck.files import write_text
from limbeck.models import Outputs, TopK
from limbeck.teachers.columns import Dtype, Kept, Values, encode, encode_top, refuse_bad
from limbeck.teachers.store import (
    Manifest,
    Store,
    add_hashes,
    read_manifest,
    read_part,
    sample_hashes,
    schema_of,
    shard_record,
    write_batch,
    write_rows,
)
from limbeck.teachers.teacher import Teacher

BATCHES_PER_PART = 16  # at most so many batches are lost by a kill
PART_BYTES = 256 * 2**20  # and fewer batches make a part whose answers are large
SIZED = 4  # samples are asked about first, to see how large answers are
SHARD_BYTES = 512 * 2**20
PRECISIONS = {"bf16": torch.bfloat16, "16": torch.float16}


@dataclass(frozen=True)
class Answers:
    """What is kept of a teacher's outputs.

    Attributes:
        keep: `logits`, `embedding`, and `features` (all inner outputs that the teacher taps).
        top_k: keep the K largest logits of each item and the mass that is left, instead of all.
        values: keep logits as `log_probabilities` or as `logits`.
        dtype: `float32`, `float16`, `bfloat16` or `int8` (255 levels an item).
        versions: how often each sample's views are drawn and labelled.
    """

    keep: tuple[str, ...] = ("logits",)
    top_k: int | None = None
    values: Values = "logits"
    dtype: Dtype = "float32"
    versions: int = 1

    def __post_init__(self) -> None:
        unknown = set(self.keep) - {"logits", "embedding", "features"}
        if unknown or not self.keep:
            raise UserError(f"keep is {list(self.keep)}; name some of logits, embedding, features")
        if self.versions < 1 or (self.top_k is not None and self.top_k < 1):
            raise UserError(f"versions is {self.versions} and top_k {self.top_k}; give numbers of at least 1")


def fill(
    path: str | Path,
    teacher: Teacher,
    samples: Samples,
    *,
    views: Mapping[str, View] | None = None,
    field: str = "image",
    keep: Sequence[str] = ("logits",),
    top_k: int | None = None,
    values: Values = "logits",
    dtype: Dtype = "float32",
    versions: int = 1,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
    memory_format: torch.memory_format | None = None,
    precision: str = "32",
    share: tuple[int, int] | None = None,
    workers: int = 0,
    progress: bool = False,
    name: str = "data",
) -> Store | None:
    """Label the samples that the store lacks, and seal it. Returns it; None while parts of other processes are missing.

    Args:
        path: folder of the store; a filling that was broken off goes on there, a complete store is appended to.
        views: those that the teacher answers for, as a stream has them; random ones are drawn `versions` times a sample
            and their parameters are stored. None: `field` as it is.
        field: what the teacher reads and views are applied to.
        keep, top_k, values, dtype: see `Answers`.
        batch_size: samples in a forward pass; always full, since the last bits of an answer depend on it.
        seed: of the views.
        precision: `bf16` or `16` run the teacher under autocast.
        share: (number, count) of this process: it takes the blocks number, number + count, ...; default: this process's
            place among those that torch.distributed runs, else all.
        workers: processes that decode pictures which do not lie in memory.
        name: of the data set, for the manifest.

    Raises:
        UserError: the folder holds a store of another teacher, other settings or other samples under the same numbers;
            a view cannot be stored; an answer is not finite or does not fit the dtype.
    """
    filling = Filling(
        Path(path),
        teacher,
        samples,
        views=views,
        field=field,
        answers=Answers(tuple(keep), top_k, values, dtype, versions),
        batch_size=batch_size,
        seed=seed,
        precision=precision,
        device=device,
        memory_format=memory_format,
        name=name,
    )
    return filling.run(share, workers, progress)


class Filling:
    """The plan of one filling: which blocks of which samples make which parts. Making it twice gives the same plan."""

    def __init__(
        self,
        path: Path,
        teacher: Teacher,
        samples: Samples,
        *,
        views: Mapping[str, View] | None,
        field: str,
        answers: Answers,
        batch_size: int = 256,
        seed: int = 0,
        precision: str = "32",
        device: torch.device | str = "cpu",
        memory_format: torch.memory_format | None = None,
        name: str = "data",
    ) -> None:
        self.path, self.teacher, self.answers = path, teacher, answers
        views = dict(views) if views else {field: Identity()}
        self.views, self.field, self.batch_size, self.seed, self.precision = views, field, batch_size, seed, precision
        self.device, self.memory_format, self.classes = torch.device(device), memory_format, 0
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; give at least 1")
        if field not in samples.fields:
            raise UserError(f"the samples have no field '{field}' to label, they have {', '.join(samples.fields)}")
        remembering = [view for view, made in views.items() if hasattr(made, "state_dict")]
        if remembering:
            raise UserError(
                f"the view '{remembering[0]}' depends on the samples before and cannot be stored; leave it out"
            )
        self.settings: dict[str, Any] = {
            "field": field,
            "views": {view: describe_view(made) for view, made in views.items()},
            "keep": list(answers.keep),
            "top_k": answers.top_k,
            "values": answers.values,
            "dtype": answers.dtype,
            "versions": answers.versions,
            "batch_size": batch_size,
            "seed": seed,
            "precision": precision,
        }
        self.fingerprint = teacher.fingerprint()
        self.samples, self.hashes = self._missing(samples)
        self.data = {"name": name, "fingerprint": add_hashes(self.hashes), "samples": len(self.hashes)}
        self.blocks = 0
        if not len(self.hashes):
            return
        teacher.to(self.device, memory_format)
        # What models read as it is lies in the batch already; another view of that name is refused by the stream.
        drawn = {view: made for view, made in views.items() if view != field or not isinstance(made, Identity)}
        self.stream = Stream(self.samples, 1, drawn, view_field=field, record=list(drawn))
        self._plan()

    # -- what is to be done ---------------------------------------------------------------------------------------

    def _missing(self, samples: Samples) -> tuple[Samples, np.ndarray]:
        """The samples that the store lacks, by rising number, and their hashes."""
        if not bool((samples.index[1:] >= samples.index[:-1]).all()):
            samples = samples.select(samples.index.argsort(stable=True))
        hashes = sample_hashes(samples, self.field)
        index = samples.index.numpy()
        repeated = index[1:][index[1:] == index[:-1]]
        if len(repeated):
            raise UserError(f"two samples have the number {repeated[0]}; a store needs one number for each sample")
        if not (self.path / "manifest.json").exists():
            return samples, hashes
        store = Store(self.path, verify=False)
        if store.manifest.teacher != self.fingerprint:
            raise UserError(
                f"the store {self.path} was filled by another teacher ({store.manifest.teacher[:12]}..., this one is "
                f"{self.fingerprint[:12]}...); give another folder"
            )
        _refuse_other(store.manifest.settings, self.settings, f"the store {self.path} was filled")
        there = store.has(index)
        store.check_samples(index[there], hashes[there])
        if not there.any():
            return samples, hashes
        rows = np.flatnonzero(~there)
        return samples.select(torch.from_numpy(rows)), hashes[rows]

    def _plan(self) -> None:
        """Read or write the plan; how many batches make a part is found from a few answers."""
        asked = {"teacher": self.fingerprint, "data": self.data, "settings": self.settings}
        file = self.path / "filling" / "plan.json"
        if file.exists():
            plan = json.loads(file.read_text())
            for key in ("teacher", "data"):
                if plan[key] != asked[key]:
                    raise UserError(
                        f"{self.path} is being filled from other {key}; go on with the same, or delete "
                        f"{file.parent} to give up what it holds"
                    )
            _refuse_other(plan["settings"], self.settings, f"{self.path} is being filled")
        else:
            plan = {**asked, "batches": self._batches_of_a_part()}
            write_text(file, json.dumps(plan, indent=1) + "\n")
        self.block_size = int(plan["batches"]) * self.batch_size
        self.blocks = -(-len(self.samples) // self.block_size)
        self.digest = _digest(plan)

    def _batches_of_a_part(self) -> int:
        places = np.arange(min(SIZED, len(self.samples)))
        columns = self._fetch(self._ask(self.samples.batch(torch.from_numpy(places)), places, 0))
        size = sum(kept.items.nbytes for kept in columns.values()) / len(places) * self.batch_size
        return int(min(max(PART_BYTES // max(size * self.answers.versions, 1), 1), BATCHES_PER_PART))

    def left(self) -> int:
        """How many parts are not written yet."""
        return sum(not self.part(block).exists() for block in range(self.blocks))

    def part(self, block: int) -> Path:
        """The file of a block's answers."""
        return self.path / "filling" / f"part-{block:06d}.arrow"

    # -- doing it -------------------------------------------------------------------------------------------------

    def run(self, share: tuple[int, int] | None = None, workers: int = 0, progress: bool = False) -> Store | None:
        """Label this process's share of the blocks, and seal the store if all parts are there; see `fill`."""
        number, count = share or (rank(), world_size())
        if not 0 <= number < count:
            raise UserError(f"the share is {number} of {count}; processes are numbered from 0 to {count - 1}")
        self.label(range(number, self.blocks, count), workers, progress and number == 0)
        if world_size() > 1:
            torch.distributed.barrier()
        return self.seal()

    def label(self, blocks: Sequence[int], workers: int = 0, progress: bool = False) -> None:
        """Write the parts of these blocks that are not there yet.

        The model is asked for the next batch before the answers of the last one are fetched, and parts are written by a
        thread of their own.
        """
        left = [block for block in blocks if not self.part(block).exists()]
        places = {block: self._places(block) for block in left}
        batches = _read(self.samples, [each for block in left for each in places[block]], self.batch_size, workers)
        with (
            _bar(progress, sum(len(each) for block in left for each in places[block])) as advance,
            ThreadPoolExecutor(1) as writer,
        ):
            written: Future[None] | None = None
            for block in left:
                pieces: list[dict[str, Kept]] = []
                asked: dict[str, Any] | None = None
                for each in places[block]:
                    batch = next(batches)
                    for version in range(self.answers.versions):
                        asking = self._ask(batch, each, version)
                        if asked is not None:
                            pieces.append(self._fetch(asked))
                        asked = asking
                    advance(len(each))
                assert asked is not None
                pieces.append(self._fetch(asked))
                if written is not None:
                    written.result()  # the disk is never more than one part behind
                written = writer.submit(self._write, block, pieces)
            if written is not None:
                written.result()

    def _places(self, block: int) -> list[np.ndarray]:
        """The samples of each batch of a block."""
        first, end = block * self.block_size, min((block + 1) * self.block_size, len(self.samples))
        return [np.arange(start, min(start + self.batch_size, end)) for start in range(first, end, self.batch_size)]

    def _write(self, block: int, pieces: list[dict[str, Kept]]) -> None:
        columns = {name: Kept.joined([piece[name] for piece in pieces]) for name in pieces[0]}
        write_rows(self.part(block), columns, self.classes)

    def _ask(self, batch: dict, places: np.ndarray, version: int) -> dict[str, Any]:
        """The columns of one version of the samples at these places, on the device; `(items, counts)` for tokens."""
        count = len(places)
        fields = self._render(to_device(batch, self.device), places, version)
        if self.memory_format == torch.channels_last:
            fields = {name: channels_last(value) for name, value in fields.items()}
        columns: dict[str, Any] = {
            "index": batch["index"][:count],
            "version": torch.full((count,), version, dtype=torch.int32),
            "sample": torch.from_numpy(self.hashes[places]),
        }
        scored_BL = scored_places(batch)
        chosen_T = counts = None
        if scored_BL is not None:
            scored_BL[count:] = False
            counts = scored_BL[:count].sum(1).numpy()
            columns["place"] = (scored_BL.nonzero()[:, 1].to(torch.int32), counts)
            chosen_T = scored_BL.flatten().nonzero()[:, 0].to(self.device)
        for view in self.views:
            for name, value in self._outputs(fields, view, chosen_T).items():
                of_tokens = chosen_T is not None and name.startswith("logits")
                columns[f"{view}/{name}"] = (value, counts) if of_tokens else value[:count]
            for name, value in fields.get(f"{view}_params", {}).items():
                if len(value) != len(batch["index"]):
                    raise UserError(
                        f"the view '{view}' draws '{name}' for a whole batch; it cannot be stored by sample"
                    )
                columns[f"{view}/params.{name}"] = value[:count]
        return columns

    def _render(self, batch: dict, places: np.ndarray, version: int) -> dict:
        """The batch with its views; what they draw depends on the seed, the version and the first sample alone."""
        if not self.stream.views:
            return self.stream.render(batch)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(f"{self.seed}/{version}/{int(self.samples.index[places[0]])}"))
            return self.stream.render(batch)

    def _fetch(self, columns: dict[str, Any]) -> dict[str, Kept]:
        """The columns on the host."""
        fetched = {}
        for name, value in columns.items():
            items, counts = value if isinstance(value, tuple) else (value, None)
            items = items.cpu()
            refuse_bad(name, items)
            fetched[name] = Kept.of(items, counts, classes=self.classes if name.endswith(".ids") else None)
        return fetched

    def _outputs(self, fields: dict, view: str, chosen_T: Tensor | None) -> dict[str, Tensor]:
        """Encoded columns of what the teacher says of one view."""
        shown = fields[view]
        if isinstance(shown, Tensor) and shown.dim() == 5:
            if shown.shape[1] != 1:
                raise UserError(
                    f"the view '{view}' makes {shown.shape[1]} crops at once; store 1 crop in more versions"
                )
            fields = {**fields, view: shown[:, 0]}
        answers = self.answers
        columns: dict[str, Tensor] = {}
        with torch.no_grad(), _autocast(self.precision, self.device):
            if self.teacher.sparse and answers.top_k is not None:
                outputs, logits = Outputs(), self.teacher.top_k(fields, view, answers.top_k)
            else:
                outputs = self.teacher(fields, view)
                logits = outputs.logits  # type: ignore[assignment]
        if "logits" in answers.keep:
            columns |= self._logits(_given(logits, "logits"), chosen_T)
        if "embedding" in answers.keep:
            columns |= encode("embedding", _given(outputs.embedding, "embedding"), answers.dtype)
        if "features" in answers.keep:
            for name, value in _given(outputs.features or None, "features").items():
                columns |= encode(f"features.{name}", value, answers.dtype)
        return columns

    def _logits(self, logits: Tensor | TopK, chosen_T: Tensor | None) -> dict[str, Tensor]:
        answers = self.answers
        if isinstance(logits, TopK):
            self.classes = logits.classes
            if answers.top_k is None or answers.values == "logits":
                raise UserError(
                    "this teacher only knows log-probabilities of the likeliest; set top_k and values=log_probabilities"
                )
            if chosen_T is not None:
                ids, log_probs, rest = (
                    part.flatten(0, 1)[chosen_T] for part in (logits.ids, logits.log_probs, logits.rest)
                )
                logits = TopK(ids, log_probs, rest, logits.classes)
            return encode_top("logits", logits, answers.top_k, answers.values, answers.dtype)
        if chosen_T is not None:
            logits = logits.flatten(0, 1)[chosen_T]
        self.classes = logits.shape[-1]
        if answers.top_k is not None:
            return encode_top("logits", logits, min(answers.top_k, self.classes), answers.values, answers.dtype)
        return encode("logits", logits if answers.values == "logits" else logits.float().log_softmax(-1), answers.dtype)

    # -- parts to shards --------------------------------------------------------------------------------------------

    def seal(self) -> Store | None:
        """Make shards of the parts once all are there, and name them in the manifest; one process at a time."""
        folder = self.path / "filling"
        if not self.blocks:
            self._tidy()
            return Store(self.path)
        with (self.path / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():  # another process was faster
                return Store(self.path)
            if not all(self.part(block).exists() for block in range(self.blocks)):
                return None
            before = read_manifest(self.path) if (self.path / "manifest.json").exists() else None
            if before is None or self.digest not in before.fills:
                write_text(self.path / "manifest.json", self._manifest(before).to_json())
            shutil.rmtree(folder)
        return Store(self.path)

    def _tidy(self) -> None:
        """Remove the parts of a filling that was killed after the manifest had named its shards."""
        plan = self.path / "filling" / "plan.json"
        if plan.exists() and _digest(json.loads(plan.read_text())) in read_manifest(self.path).fills:
            shutil.rmtree(plan.parent)

    def _manifest(self, before: Manifest | None) -> Manifest:
        """Write the shards; a kill before the manifest names them leaves files that the next attempt writes again."""
        tables = [read_part(self.part(block)) for block in range(self.blocks)]
        schema, classes = schema_of(tables[0].schema)
        if before is not None and before.schema != schema:
            raise UserError(f"the answers have other shapes than those in {self.path}; give another folder")
        shards = list(before.shards) if before else []
        for group in _grouped(tables, SHARD_BYTES):
            file = self.path / f"shard-{len(shards):05d}.arrow"
            batch = pa.concat_tables(group).combine_chunks().to_batches()[0]
            write_batch(file, batch)
            shards.append(shard_record(file, batch.num_rows))
        settings = {**self.settings, "classes": classes}
        if before is None:
            return Manifest(self.fingerprint, self.data, settings, schema, shards, [self.digest])
        data = {
            **before.data,
            "fingerprint": add_hashes(self.hashes, before.data["fingerprint"]),
            "samples": before.data["samples"] + len(self.hashes),
        }
        return Manifest(self.fingerprint, data, settings, schema, shards, [*before.fills, self.digest])


# ---------------------------------------------------------------- pieces


def _digest(plan: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]


def describe_view(view: Any) -> dict[str, Any]:
    """A view in plain values, to compare the one that was stored with the one that is trained on."""
    described: dict[str, Any] = {"view": type(view).__name__}
    for name, value in sorted(vars(view).items()):
        if isinstance(value, str | int | float | bool | None):
            described[name] = value
        elif isinstance(value, tuple | list):
            described[name] = list(value)
        elif hasattr(value, "draw"):
            described[name] = describe_view(value)
    return described


def scored_places(batch: Mapping[str, Any]) -> Tensor | None:
    """bool [B, L]: the places whose next token is scored, where the samples have a label for each token; else None."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return None
    return torch.nn.functional.pad(labels[:, 1:] != IGNORE, (0, 1))


def _read(samples: Samples, places: Sequence[np.ndarray], batch_size: int, workers: int) -> Iterator[dict]:
    """The batches at these places; the last rows of a short one repeat its first sample. Pictures that do not lie in
    memory are decoded ahead, by `workers` processes or a thread."""
    rows = [torch.from_numpy(np.concatenate([each, np.repeat(each[:1], batch_size - len(each))])) for each in places]
    if workers:
        yield from read_rows(samples, rows, workers)
    elif not any(isinstance(column, EncodedImages) for column in samples.fields.values()):
        yield from map(samples.batch, rows)
    else:
        with ThreadPoolExecutor(1) as reader:
            ahead: Future[dict] | None = None
            for each in rows:
                coming = reader.submit(samples.batch, each)
                if ahead is not None:
                    yield ahead.result()
                ahead = coming
            if ahead is not None:
                yield ahead.result()


def _grouped(tables: Sequence[pa.Table], limit: int) -> Iterator[list[pa.Table]]:
    """Parts in order, as many together as stay below `limit` bytes."""
    group: list[pa.Table] = []
    size = 0
    for table in tables:
        if group and size + table.nbytes > limit:
            yield group
            group, size = [], 0
        group.append(table)
        size += table.nbytes
    if group:
        yield group


def _refuse_other(found: Mapping[str, Any], asked: Mapping[str, Any], what: str) -> None:
    for key, value in asked.items():
        if found.get(key) != value:
            raise UserError(
                f"{what} with {key}={found.get(key)!r}, here it is {value!r}; give the same, or another folder"
            )


def _given(value: Any, name: str) -> Any:
    if value is None:
        raise UserError(f"the teacher gives no {name}; keep what it gives")
    return value


def _autocast(precision: str, device: torch.device) -> Any:
    if precision == "32":
        return nullcontext()
    if precision not in PRECISIONS:
        raise UserError(f"precision is '{precision}'; choose one of 32, {', '.join(PRECISIONS)}")
    return torch.autocast(device.type, dtype=PRECISIONS[precision])


@contextmanager
def _bar(show: bool, total: int) -> Iterator[Callable[[int], Any]]:
    """A progress bar of samples, with the time that is left."""
    if not show:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("labelling"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("labelling", total=total)
        yield lambda count: progress.advance(task, count)
