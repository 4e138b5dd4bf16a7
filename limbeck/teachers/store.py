"""A teacher's answers on disk: Arrow shards that are mapped into memory, and a manifest that says what they are.

    <store>/manifest.json       what was asked of whom: fingerprints, settings, schema, rows and checksum of each shard
    <store>/shard-00000.arrow   one record batch (Arrow IPC file, uncompressed); a row is one version of one sample
    <store>/verified.json       which shards were compared with their checksums on this machine, by size and time
    <store>/filling/            parts and plan of a filling that is not complete (`limbeck.teachers.filling`)

Every row has `index` (the sample's number), `version` and `sample` (a hash of what the teacher read). Columns of one
fixed shape are a primitive or a fixed-size list; those of tokens are lists of them, and `place`, the token's place in
its row, says where they belong. Nothing here is ever unpickled: manifests are JSON, shards are numbers.

Letters: R rows of the store, B rows that are read, T tokens of the rows that are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import ipc
from torch import Tensor

from limbeck.data import EncodedImages, Samples
from limbeck.errors import UserError
from limbeck.files import write_text, write_whole
from limbeck.teachers.columns import Kept, to_tensor

FORMAT = 1
KEYS = ("index", "version", "sample", "place")  # which row or token; all other columns are answers
DENSE = 4  # keys are looked up in a table where it has at most so many places a row
READ_AT_ONCE = 16 * 2**20  # bytes of a shard that are hashed in one piece


@dataclass(frozen=True)
class Column:
    """One column: the dtype that its tensor had, the shape of an item, and whether a row has one for each token."""

    dtype: str
    shape: tuple[int, ...] = ()
    tokens: bool = False


@dataclass(frozen=True)
class Manifest:
    """What a store holds.

    Attributes:
        teacher: fingerprint of its weights (or of the endpoint and model that were asked).
        data: name of the data set, and the sum of its samples' hashes.
        settings: everything else that the answers depend on: views, outputs, precision, seed, batch size.
        schema: column by column.
        shards: file, rows, bytes and SHA-256 of each.
        fills: the digests of the fillings that made it.
    """

    teacher: str
    data: dict[str, Any]
    settings: dict[str, Any]
    schema: dict[str, Column]
    shards: list[dict[str, Any]] = field(default_factory=list)
    fills: list[str] = field(default_factory=list)
    format: int = FORMAT

    @property
    def rows(self) -> int:
        return sum(shard["rows"] for shard in self.shards)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: Path) -> Manifest:
        try:
            content = dict(json.loads(text))
            if content["format"] != FORMAT:
                raise UserError(f"{where} is a store of format {content['format']}; this Limbeck reads {FORMAT}")
            schema = {
                name: Column(c["dtype"], tuple(c["shape"]), c["tokens"]) for name, c in content.pop("schema").items()
            }
            return cls(**content, schema=schema)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{where} is damaged or no manifest of a store ({error}); fill the store anew") from None


@dataclass(frozen=True)
class Rows:
    """Rows that are read together, sorted by shard once for all columns.

    Attributes:
        pieces: number of a shard, and the places in it of the rows that it holds.
        back: int64 [B]: where each row lies among the pieces, one after the other; None where all are one piece.
        count: B.
    """

    pieces: list[tuple[int, np.ndarray]]
    back: np.ndarray | None
    count: int

    def __len__(self) -> int:
        return self.count


class Store:
    """Rows of a teacher's answers, read at random by sample and version.

    Args:
        path: the folder.
        verify: compare every shard with its checksum, once on each machine; a shard that has not changed since (same
            size and time) is not read again.

    Raises:
        UserError: there is no complete store, or a shard is missing, truncated or altered.
    """

    def __init__(self, path: str | Path, *, verify: bool = True) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        if verify:
            self._verify_once()
        self.shards = [_Shard(self.path / shard["file"], shard, self.manifest.schema) for shard in self.manifest.shards]
        self.ends = np.cumsum([shard.rows for shard in self.shards], dtype=np.int64)
        self.starts = self.ends - np.array([shard.rows for shard in self.shards], dtype=np.int64)
        self.versions = int(self.manifest.settings["versions"])
        self.keys = self._whole("index").astype(np.int64) * self.versions + self._whole("version")
        self.find = _Lookup(self.keys)

    def __len__(self) -> int:
        return self.manifest.rows

    def __contains__(self, index: int) -> bool:
        return bool(self.has(np.array([index]))[0])

    @property
    def index(self) -> np.ndarray:
        """int64: the samples that it answers for, in rising order."""
        return np.unique(self.keys // self.versions)

    def has(self, index: np.ndarray) -> np.ndarray:
        """bool [B]: whether all versions of these samples are there (rows come by whole samples)."""
        return self.find(np.asarray(index, dtype=np.int64) * self.versions) >= 0

    def rows(self, index: np.ndarray, version: np.ndarray | int = 0) -> Rows:
        """The rows of these samples' versions.

        Raises:
            UserError: the store has no answer for one of them.
        """
        wanted = np.asarray(index, dtype=np.int64) * self.versions + version
        rows = self.find(wanted)
        if len(rows) and rows.min() < 0:
            missing = wanted[rows < 0]
            raise UserError(
                f"the store {self.path} has no answer for {len(missing)} of {len(wanted)} samples (first: index "
                f"{missing[0] // self.versions}, version {missing[0] % self.versions}); fill it with the data that you "
                "train on: `limbeck label` again appends what is missing"
            )
        return self._split(rows)

    def take(self, name: str, rows: Rows | np.ndarray) -> Tensor:
        """The items of a column at these rows (found, or their numbers), [B, ...], as they were stored; the only copy
        is that of the batch."""
        return to_tensor(self._gather(name, rows), self._column(name, tokens=False).dtype)

    def take_tokens(self, name: str, rows: Rows | np.ndarray) -> Tensor:
        """The items of all tokens of these rows, one row after the other, [T, ...]; `count_tokens` says how many each
        row has."""
        column, rows = self._column(name, tokens=True), self._split(rows)
        pieces, counts = [], []
        for shard, inside in rows.pieces:
            offsets, items = self.shards[shard].ragged(name)
            counts.append(offsets[inside + 1] - offsets[inside])
            pieces.append(items.take(_ranges(offsets[inside], counts[-1]), axis=0))
        if rows.back is None:
            return to_tensor(pieces[0], column.dtype)
        count = np.concatenate(counts)
        chosen = _ranges((count.cumsum() - count)[rows.back], count[rows.back])
        return to_tensor(np.concatenate(pieces).take(chosen, axis=0), column.dtype)

    def count_tokens(self, rows: Rows | np.ndarray) -> np.ndarray:
        """int64 [B]: how many tokens these rows have answers for."""
        rows, counts = self._split(rows), []
        for shard, inside in rows.pieces:
            offsets, _ = self.shards[shard].ragged("place")
            counts.append(offsets[inside + 1] - offsets[inside])
        return counts[0] if rows.back is None else np.concatenate(counts)[rows.back]

    def verify(self) -> None:
        """Read everything: each shard against its checksum, each row once, nothing left of a filling.

        Raises:
            UserError: names the first shard that is missing, truncated or altered, or what is missing.
        """
        for shard in self.manifest.shards:
            check_shard(self.path / shard["file"], shard)
        if len(np.unique(self.keys)) != len(self.keys):
            raise UserError(f"{self.path} holds a row twice; fill the store anew")
        present = self.keys % self.versions
        if len(self.keys) % self.versions or (np.bincount(present, minlength=self.versions) != len(self.index)).any():
            raise UserError(f"{self.path} lacks versions of some samples; fill the store anew")
        if (self.path / "filling").exists():
            raise UserError(f"{self.path} is whole, but a further filling is not complete; run `limbeck label` again")

    def check_samples(self, index: np.ndarray, hashes: np.ndarray) -> None:
        """Compare samples that the store has with what it was filled from.

        Raises:
            UserError: it answered for something else under one of these numbers.
        """
        found = self._gather("sample", self.rows(index))
        differing = np.flatnonzero(found != hashes)
        if len(differing):
            raise UserError(
                f"the store {self.path} was filled from other data ({self.manifest.data['name']}): {len(differing)} of "
                f"{len(index)} samples differ (first: index {index[differing[0]]}); give the store of these data, "
                "loaded in the same way (size, tokenizer), or fill one"
            )

    def _verify_once(self) -> None:
        file = self.path / "verified.json"
        known: dict[str, Any] = {}
        if file.exists():
            try:
                known = dict(json.loads(file.read_text()))
            except ValueError:
                known = {}  # a note of ours only: everything is compared again
        seen = {}
        for shard in self.manifest.shards:
            path = self.path / shard["file"]
            stamp = _stamp(path, shard)
            if known.get(shard["file"]) != stamp:
                check_shard(path, shard)
            seen[shard["file"]] = stamp
        if seen != known:
            try:
                write_text(file, json.dumps(seen))
            except UserError:
                return  # a store that may only be read is compared each time

    def _gather(self, name: str, rows: Rows | np.ndarray) -> np.ndarray:
        rows = self._split(rows)
        pieces = [self.shards[shard].fixed(name).take(inside, axis=0) for shard, inside in rows.pieces]
        return pieces[0] if rows.back is None else np.concatenate(pieces).take(rows.back, axis=0)

    def _whole(self, name: str) -> np.ndarray:
        parts = [shard.fixed(name) for shard in self.shards]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _column(self, name: str, tokens: bool) -> Column:
        if name not in self.manifest.schema:
            known = ", ".join(column for column in self.manifest.schema if column not in KEYS)
            raise UserError(f"the store {self.path} has no column '{name}', it has {known}")
        column = self.manifest.schema[name]
        assert column.tokens == tokens, name
        return column

    def _split(self, rows: Rows | np.ndarray) -> Rows:
        """Row numbers as `Rows`."""
        if isinstance(rows, Rows):
            return rows
        if len(self.shards) == 1 or not len(rows):
            return Rows([(0, rows)], None, len(rows))
        shard = np.searchsorted(self.ends, rows, side="right")
        order = shard.argsort(kind="stable")
        inside = (rows - self.starts[shard])[order]
        ends = np.bincount(shard, minlength=len(self.shards)).cumsum().tolist()
        pieces = [(number, inside[a:b]) for number, (a, b) in enumerate(pairwise([0, *ends])) if b > a]
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return Rows(pieces, back, len(rows))


class _Lookup:
    """Row numbers by key: from a table where the keys lie close together, so that no read searches; else by search."""

    def __init__(self, keys: np.ndarray) -> None:
        self.first = int(keys.min())
        self.span = int(keys.max()) - self.first + 1
        self.dense = self.span <= DENSE * len(keys)
        if self.dense:
            self.table = np.full(self.span, -1)
            self.table[keys - self.first] = np.arange(len(keys))
        else:
            self.order = keys.argsort(kind="stable")
            self.keys = keys[self.order]

    def __call__(self, wanted: np.ndarray) -> np.ndarray:
        """int64 [B]: the rows, -1 where there is none."""
        if self.dense:
            place = wanted - self.first
            inside = (place >= 0) & (place < self.span)
            return np.where(inside, self.table.take(place, mode="clip"), -1)
        place = np.searchsorted(self.keys, wanted).clip(max=len(self.keys) - 1)
        return np.where(self.keys[place] == wanted, self.order[place], -1)


class _Shard:
    """One shard, mapped into memory; its columns are views of the map."""

    def __init__(self, path: Path, record: Mapping[str, Any], schema: Mapping[str, Column]) -> None:
        self.rows, self.path = int(record["rows"]), path
        self._arrays: dict[str, Any] = {}
        try:
            batch = ipc.open_file(pa.memory_map(str(path))).get_batch(0)
            for name, column in schema.items():
                self._arrays[name] = _views(batch.column(name), column)
        except (pa.ArrowInvalid, OSError, KeyError, IndexError) as error:
            raise _damaged(path, str(error).splitlines()[0]) from None
        if batch.num_rows != self.rows:
            raise _damaged(path, f"it has {batch.num_rows} rows, the manifest says {self.rows}")

    def fixed(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def ragged(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        return self._arrays[name]


def _views(array: pa.Array, column: Column) -> Any:
    """NumPy views of an Arrow column: [R, ...], or the offsets [R + 1] and items [all tokens, ...] of one of tokens."""
    if column.tokens:
        offsets, items = array.offsets.to_numpy(), array.values
        return offsets, _items(items, column.shape)
    return _items(array, column.shape)


def _items(array: pa.Array, shape: tuple[int, ...]) -> np.ndarray:
    if not shape:
        return array.to_numpy(zero_copy_only=True)
    return array.values.to_numpy(zero_copy_only=True).reshape(len(array), *shape)


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """0..sum(counts)-1 moved so that piece i runs from starts[i] over counts[i] numbers."""
    ends = np.cumsum(counts)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)


# ---------------------------------------------------------------- writing


def write_rows(path: Path, columns: Mapping[str, Kept], classes: int | None) -> None:
    """Write a part of a store; what Arrow does not know of the columns lies in its schema's metadata."""
    arrays, fields = [], []
    for name, kept in columns.items():
        column = Column(kept.dtype, tuple(kept.items.shape[1:]), kept.counts is not None)
        arrays.append(_arrow(kept))
        fields.append(pa.field(name, arrays[-1].type, metadata={"column": json.dumps(asdict(column))}))
    schema = pa.schema(fields, metadata={"classes": json.dumps(classes)})
    write_batch(path, pa.record_batch(arrays, schema=schema))


def schema_of(schema: pa.Schema) -> tuple[dict[str, Column], int | None]:
    """The columns that `write_rows` wrote, and the number of classes."""
    columns = {}
    for found in schema:
        told = json.loads(found.metadata[b"column"])
        columns[found.name] = Column(told["dtype"], tuple(told["shape"]), told["tokens"])
    return columns, json.loads(schema.metadata[b"classes"])


def write_batch(path: Path, batch: pa.RecordBatch) -> None:
    """Write one record batch as an Arrow IPC file, whole or not at all."""

    def write(file: Any) -> None:
        with ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)

    write_whole(path, write)


def _arrow(kept: Kept) -> pa.Array:
    items = kept.items
    array = pa.array(np.ascontiguousarray(items).reshape(-1))
    if items.ndim > 1:
        array = pa.FixedSizeListArray.from_arrays(array, int(np.prod(items.shape[1:])))
    if kept.counts is None:
        return array
    offsets = np.concatenate([[0], np.cumsum(kept.counts)]).astype(np.int64)
    return pa.LargeListArray.from_arrays(pa.array(offsets), array)


def read_part(path: Path) -> pa.Table:
    """A part of a filling, mapped into memory."""
    try:
        return ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}); delete it and label again") from None


def shard_record(path: Path, rows: int) -> dict[str, Any]:
    """What the manifest says of a shard."""
    return {"file": path.name, "rows": rows, "bytes": path.stat().st_size, "sha256": _sha256(path)}


def read_manifest(path: Path) -> Manifest:
    """The manifest of a complete store. UserError where there is none."""
    file = path / "manifest.json"
    if not file.is_file():
        if (path / "filling").exists():
            raise UserError(f"the store {path} is not complete; run `limbeck label` again to go on with it")
        raise UserError(f"there is no store at {path}; fill one by `limbeck label <recipe> --store {path}`")
    return Manifest.from_json(file.read_text(), file)


def check_shard(path: Path, record: Mapping[str, Any]) -> None:
    """Compare a shard with the manifest: size first, then the checksum of all bytes. UserError names the shard."""
    _stamp(path, record)
    if _sha256(path) != record["sha256"]:
        raise _damaged(path, "its bytes are not those that were written")


def _stamp(path: Path, record: Mapping[str, Any]) -> list[Any]:
    """What changes when a shard changes: its size and time, and the checksum that it should have."""
    try:
        found = path.stat()
    except OSError:
        raise _damaged(path, "it is not there") from None
    if found.st_size != record["bytes"]:
        raise _damaged(path, f"it has {found.st_size} bytes, the manifest says {record['bytes']}")
    return [found.st_size, found.st_mtime_ns, record["sha256"]]


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"the shard {path} is missing or damaged ({what}); copy it again, or fill the store anew")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(READ_AT_ONCE):
            digest.update(piece)
    return digest.hexdigest()


# ---------------------------------------------------------------- what samples are


def sample_hashes(samples: Samples, name: str, rows: np.ndarray | None = None) -> np.ndarray:
    """int64 [B]: a hash of what the teacher reads of each sample: pixels, the tokens that are no padding, text; of
    pictures that are not decoded yet their bytes, or name and size of their files."""
    only = samples.without(*(field for field in samples.fields if field != name))
    chosen = torch.arange(len(samples)) if rows is None else torch.from_numpy(rows)
    column = only.fields[name]
    hashes = []
    for part in chosen.split(1024):
        values = column.identities(part) if isinstance(column, EncodedImages) else _bytes(only.batch(part)[name])
        hashes += [
            int.from_bytes(hashlib.blake2b(each, digest_size=8).digest(), "little", signed=True) for each in values
        ]
    return np.array(hashes, dtype=np.int64)


def _bytes(values: Any) -> Iterator[bytes]:
    """The bytes of each sample's value; dicts of tokens without their padding."""
    if isinstance(values, list):
        yield from (str(value).encode() for value in values)
        return
    if isinstance(values, Tensor):
        yield from (row.tobytes() for row in values.contiguous().numpy())
        return
    parts = {name: part.contiguous().numpy() for name, part in sorted(values.items())}
    kept = parts["attention_mask"].astype(bool) if "attention_mask" in parts else None
    for row in range(len(next(iter(parts.values())))):
        yield b"".join(
            (part[row] if kept is None or part.shape != kept.shape else part[row][kept[row]]).tobytes()
            for part in parts.values()
        )


def add_hashes(hashes: np.ndarray, before: str = "0") -> str:
    """The sum of hashes modulo 2^64 in hexadecimal: of a set, whatever its order, and to go on with."""
    return f"{(int(before, 16) + sum(hashes.tolist())) % 2**64:016x}"
