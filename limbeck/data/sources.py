"""Where data sets come from: the embedded digits, folders, files, the hub, arrays in memory."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from limbeck.data import splits
from limbeck.data.images import GIBIBYTE, EncodedImages
from limbeck.data.samples import Data, Samples
from limbeck.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
TABLES = {".parquet", ".csv", ".jsonl", ".npz"}
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "unlabelled": "unlabelled",
    "unlabeled": "unlabelled",
}
Fields = dict[str, Any]


@dataclass(frozen=True)
class _Columns:
    """Which columns hold what, `None` where the caller leaves it to the usual names."""

    image: str | None
    text: str | None
    label: str | None
    image_size: int | tuple[int, int] | None


def load_data(
    name_or_path: str | Path | Mapping[str, Any],
    *,
    image_size: int | tuple[int, int] | None = None,
    labels_per_class: int | None = None,
    labelled_fraction: float | None = None,
    keep_labelled_in_unlabelled: bool = True,
    validation_fraction: float | None = None,
    test_fraction: float = 0.25,
    seed: int = 0,
    limit: int | Mapping[str, int] | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    classes: Sequence[str] | None = None,
    memory_limit: int = 2 * GIBIBYTE,
    progress: bool = True,
) -> Data:
    """The data set of this name, path or content.

    - `"digits"`: 1,797 digits 8x8 that come with scikit-learn, images uint8 [N,1,8,8], split by `seed`.
    - a folder of class folders of pictures, with `train/ test/ [val/ unlabelled/]` above them or without.
    - a folder of `train.parquet test.parquet ...` (the Hugging Face layout,
      `data/train-00000-of-00002.parquet` too), `.csv`, `.jsonl` (a column of texts) or `.npz` (arrays `x`,
      `y`); or one such file.
    - a name: first a folder of that name in `LIMBECK_DATA` (default `../shared/data` beside the repository),
      then the hub's data set, through `datasets`.
    - a mapping `{"train": (x, y), "test": (x, y), ...}` of arrays, tensors or lists of texts; `(x, None)` or
      x alone for `"unlabelled"`; a split may also be `Samples` or a mapping of fields.

    Columns named `image`, `text` and `label` are used unless `image_column`, `text_column`, `label_column`
    name others, which become the fields of those names; further columns stay fields. Labels that are words
    are numbered in alphabetic order. `index` numbers the rows of a split as they are stored; parts that are
    taken from it here (validation, test, unlabelled) keep its numbers.

    A set without a test split takes its validation split for it; one without either gives up `test_fraction`
    of its train split. `validation_fraction` of the train split becomes `validation` (default: none is taken
    where the set has none; 0.1 for the digits). `limit` bounds each split, or those named, by a stratified
    seeded subset. With `labels_per_class` or `labelled_fraction`, `train` keeps few samples, and where the
    set has no `unlabelled` split, all of them without labels become one (or only the rest:
    `keep_labelled_in_unlabelled=False`).

    `image_size` S scales the shorter edge to S and keeps the centre square, (H, W) stretches. Images decode
    once, in threads, where all of a split's pixels take at most `memory_limit` bytes; otherwise when they are
    asked for.

    Raises `UserError` for a set that is not there (saying where was looked), an empty folder, a missing
    column, an unreadable image, a label out of range and a NaN.
    """
    columns = _Columns(image_column, text_column, label_column, image_size)
    if isinstance(name_or_path, Mapping):
        name, found = "data", _to_samples(_from_memory(name_or_path), classes)
    elif str(name_or_path) == "digits":
        name, found = "digits", _digits()
        validation_fraction = 0.1 if validation_fraction is None else validation_fraction
    else:
        name, found = Path(name_or_path).name, _to_samples(_find(str(name_or_path), columns), classes)
    found = {split: _resized(samples, image_size) for split, samples in found.items()}
    if limit is None:  # all at once: one cache file serves every seed and fraction
        found = {split: _decoded(samples, memory_limit, progress) for split, samples in found.items()}
    found = _complete(found, test_fraction, validation_fraction, seed)
    found = {split: _limited(split, samples, limit, seed) for split, samples in found.items()}
    found = {split: _decoded(samples, memory_limit, progress) for split, samples in found.items()}
    if labels_per_class is not None or labelled_fraction is not None:
        found["train"], rest = splits.split_labels(
            found["train"],
            labels_per_class=labels_per_class,
            labelled_fraction=labelled_fraction,
            keep_labelled_in_unlabelled=keep_labelled_in_unlabelled,
            seed=seed,
        )
        found.setdefault("unlabelled", rest)
    return Data(**found, name=name)


def _resized(samples: Samples, size: int | tuple[int, int] | None) -> Samples:
    """Pictures that are in memory already in another size, smoothed where they shrink, as files are on reading."""
    images = samples.fields.get("image")
    if size is None or not isinstance(images, Tensor):
        return samples
    if isinstance(size, int):
        edge = min(images.shape[-2:])
        top, left = (images.shape[-2] - edge) // 2, (images.shape[-1] - edge) // 2
        images = images[..., top : top + edge, left : left + edge]
    height, width = (size, size) if isinstance(size, int) else size
    scaled = interpolate(images.float(), (height, width), mode="bilinear", antialias=True, align_corners=False)
    if images.dtype == torch.uint8:
        scaled = scaled.round().clamp(0, 255).to(torch.uint8)
    return samples.with_fields({"image": scaled})


def data_folder() -> Path:
    """Where data sets lie by name: `LIMBECK_DATA`, by default `../shared/data` beside the repository."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    return Path(os.environ.get("LIMBECK_DATA") or default)


def _digits() -> dict[str, Samples]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None])
    return {"train": Samples({"image": images, "label": bunch.target}, [str(digit) for digit in range(10)])}


# ---------------------------------------------------------------- from splits of fields to samples


def _to_samples(found: dict[str, Fields], classes: Sequence[str] | None) -> dict[str, Samples]:
    """Samples of every split with one list of classes; words become numbers, `unlabelled` loses its own."""
    found.get("unlabelled", {}).pop("label", None)
    names = list(classes) if classes is not None else None
    for fields in found.values():
        named = fields.pop("classes", None)
        names = names or named
    labels = {split: fields["label"] for split, fields in found.items() if "label" in fields}
    if any(isinstance(label, list) for label in labels.values()):
        words = sorted({str(word) for label in labels.values() for word in label})
        names = names or words
        numbers = {str(name): number for number, name in enumerate(names)}
        for split, label in labels.items():
            unknown = next((row for row, word in enumerate(label) if str(word) not in numbers), None)
            if unknown is not None:
                raise UserError(f"The label {label[unknown]!r} in row {unknown} of {split} is none of {names}.")
            found[split]["label"] = torch.tensor([numbers[str(word)] for word in label])
    elif names is None:
        whole = [torch.as_tensor(label) for label in labels.values()]
        whole = [label for label in whole if label.dim() == 1 and not label.is_floating_point() and len(label)]
        names = [str(c) for c in range(int(max(label.max() for label in whole)) + 1)] if whole else None
    return {split: _samples_of(split, fields, names) for split, fields in found.items()}


def _samples_of(split: str, fields: Fields, classes: list[str] | None) -> Samples:
    try:
        return Samples(fields, classes)
    except UserError as error:
        raise UserError(f"In the split {split!r}: {error}") from None


def _complete(
    found: dict[str, Samples], test_fraction: float, validation_fraction: float | None, seed: int
) -> dict[str, Samples]:
    """The splits with a train and a test split, and a validation split where one is wanted."""
    found = dict(found)
    if "train" not in found:
        raise UserError(f"The data has the splits {', '.join(found)} but no train split: name one 'train'.")
    if "test" not in found:
        if "validation" in found:
            found["test"] = found.pop("validation")
        else:
            found["train"], found["test"] = splits.train_validation(found["train"], test_fraction, seed)
    if "validation" not in found and validation_fraction:
        found["train"], found["validation"] = splits.train_validation(found["train"], validation_fraction, seed)
    return found


def _limited(split: str, samples: Samples, limit: int | Mapping[str, int] | None, seed: int) -> Samples:
    n = limit.get(split) if isinstance(limit, Mapping) else limit
    return samples if n is None or n >= len(samples) else splits.subset(samples, n, seed)


def _decoded(samples: Samples, memory_limit: int, progress: bool) -> Samples:
    small = {k: v for k, v in samples.fields.items() if isinstance(v, EncodedImages) and v.nbytes <= memory_limit}
    return samples.with_fields({k: v.decode_all(progress) for k, v in small.items()}) if small else samples


# ---------------------------------------------------------------- in memory


def _from_memory(given: Mapping[str, Any]) -> dict[str, Fields]:
    found: dict[str, Fields] = {}
    for name, content in given.items():
        split = SPLIT_NAMES.get(name.lower())
        if split is None:
            raise UserError(f"There is no split {name!r}: expected train, test, validation or unlabelled.")
        if isinstance(content, Samples):
            found[split] = {**content.fields, "classes": content.classes}
        elif isinstance(content, Mapping):
            found[split] = dict(content)
        else:
            x, y = content if isinstance(content, tuple) else (content, None)
            found[split] = _from_arrays(split, x, y)
    return found


def _from_arrays(split: str, x: Any, y: Any) -> Fields:
    """`image` where x has 3 or 4 dimensions, `text` where it holds texts, else `features`; and `label`."""
    fields: Fields = {}
    if isinstance(x, list | tuple) and x and isinstance(x[0], str):
        fields["text"] = list(x)
    else:
        values = torch.as_tensor(np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x)
        if values.dtype == torch.float64:
            values = values.float()
        if values.dim() in (3, 4):
            fields["image"] = _check_images(split, values)
        else:
            fields["features"] = values
    if y is not None:
        words = not isinstance(y, Tensor) and len(y) and isinstance(y[0], str)
        fields["label"] = [str(word) for word in y] if words else torch.as_tensor(y)
    return fields


def _check_images(split: str, images: Tensor) -> Tensor:
    """Images [N,C,H,W] (a missing C is one channel): uint8, or floats in [0,1]."""
    images = images[:, None] if images.dim() == 3 else images
    if images.shape[1] not in (1, 3) and images.shape[-1] in (1, 3):
        raise UserError(
            f"The images of {split} have the shape {list(images.shape)}, expected [N,C,H,W]: "
            "move the channels with x.transpose(0, 3, 1, 2)."
        )
    if images.is_floating_point() and (images.amin() < 0 or images.amax() > 1):
        raise UserError(
            f"The images of {split} go from {float(images.amin()):.3g} to {float(images.amax()):.3g}, "
            "expected 0..1: undo their normalisation, the model normalises by itself."
        )
    if not images.is_floating_point() and images.dtype != torch.uint8:
        raise UserError(f"The images of {split} are {images.dtype}, expected uint8 or floats in 0..1.")
    return images


# ---------------------------------------------------------------- by name or path


def _find(name: str, columns: _Columns) -> dict[str, Fields]:
    places = [Path(name), data_folder() / name]
    for place in places:
        if place.is_dir():
            return _from_folder(place, columns)
        if place.is_file():
            return _from_files({"train": [place]}, columns)
    if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        return _from_hub(name, columns, places)
    raise UserError(f"There is no data set {name!r}: looked for {places[0]} and {places[1]}.")


def _from_hub(name: str, columns: _Columns, places: list[Path]) -> dict[str, Fields]:
    import datasets
    from huggingface_hub import HfApi

    kept = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
    try:
        if not kept.exists():
            # asked first: `load_dataset` alone retries an unreachable hub for half a minute
            HfApi().dataset_info(name, timeout=10)
        dataset = datasets.load_dataset(name)
    except Exception as error:  # whatever the hub's client raises, the user's name is the culprit
        known = [path.name for path in places[1].parent.glob("*") if path.is_dir()] + ["digits"]
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        where = f"looked for {places[0].absolute()}, {places[1]} and on the hub ({reason})"
        raise UserError(f"There is no data set {name!r}: {where}{hint}") from None
    return _from_tables(_hub_tables(dataset), name, columns)


def _hub_tables(dataset: Any) -> dict[str, pa.Table]:
    """The Arrow tables of a `datasets.DatasetDict` by split; their schema names the classes."""
    known = {split: SPLIT_NAMES.get(split.lower()) for split in dataset}
    tables = {ours: dataset[split].with_format("arrow")[:] for split, ours in known.items() if ours}
    features = {ours: dataset[split].features.arrow_schema.metadata for split, ours in known.items() if ours}
    return {split: table.replace_schema_metadata(features[split]) for split, table in tables.items()}


def _from_folder(folder: Path, columns: _Columns) -> dict[str, Fields]:
    tables = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in TABLES]
    top = [path for path in tables if path.parent in (folder, folder / "data")]
    if top:
        by_split: dict[str, list[Path]] = {}
        for path in top:
            word = re.split(r"[-_.]", path.name.lower())[0]
            by_split.setdefault(SPLIT_NAMES.get(word, "train"), []).append(path)
        return _from_files(by_split, columns)
    parts = {SPLIT_NAMES[sub.name.lower()]: sub for sub in _folders(folder) if sub.name.lower() in SPLIT_NAMES}
    found = {split: _from_class_folders(sub, columns) for split, sub in (parts or {"train": folder}).items()}
    if not any(found.values()):
        raise UserError(
            f"The folder {folder} holds no pictures and no parquet, CSV, JSONL or npz files: "
            "expected <class>/<picture>, train/<class>/<picture> or train.parquet."
        )
    return {split: fields for split, fields in found.items() if fields}


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)


def _from_class_folders(folder: Path, columns: _Columns) -> Fields:
    """Pictures labelled by the folder that they lie in; unlabelled where they lie in `folder` itself."""
    by_class = {sub.name: _pictures(sub) for sub in _folders(folder)}
    by_class = {name: paths for name, paths in by_class.items() if paths}
    if not by_class:
        paths = _pictures(folder)
        return {"image": EncodedImages(paths, columns.image_size)} if paths else {}
    paths = [path for members in by_class.values() for path in members]
    label = [name for name, members in by_class.items() for _ in members]
    return {"image": EncodedImages(paths, columns.image_size), "label": label}


def _from_files(by_split: dict[str, list[Path]], columns: _Columns) -> dict[str, Fields]:
    paths = [path for members in by_split.values() for path in members]
    kinds = {path.suffix.lower() for path in paths}
    if len(kinds) > 1 or not kinds <= TABLES:
        raise UserError(f"Expected files of one of the kinds {sorted(TABLES)}, got {[str(path) for path in paths]}.")
    if kinds == {".npz"}:
        return {split: _read_npz(members) for split, members in by_split.items()}
    if kinds != {".parquet"} and columns.text is None:
        columns = replace(columns, text="text")
    tables = {split: _read_tables(members) for split, members in by_split.items()}
    return _from_tables(tables, str(paths[0].parent if len(paths) > 1 else paths[0]), columns)


def _read_npz(paths: list[Path]) -> Fields:
    if len(paths) > 1:
        raise UserError(f"Expected one npz file a split, got {', '.join(map(str, paths))}.")
    with np.load(paths[0], allow_pickle=False) as arrays:
        if "x" not in arrays:
            raise UserError(f"{paths[0]} has the arrays {', '.join(arrays)}, expected x and y.")
        return _from_arrays(str(paths[0]), arrays["x"], arrays.get("y"))


def _read_tables(paths: list[Path]) -> pa.Table:
    import pyarrow as pa
    from pyarrow import csv, json, parquet

    tables = []
    for path in paths:
        try:
            if path.suffix.lower() == ".parquet":
                tables.append(parquet.read_table(path))
            elif path.suffix.lower() == ".csv":
                multiline = csv.ParseOptions(newlines_in_values=True)
                tables.append(csv.read_csv(path, parse_options=multiline))
            else:
                tables.append(json.read_json(path))
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}).") from None
    return pa.concat_tables(tables)


# ---------------------------------------------------------------- from Arrow tables


def _from_tables(tables: dict[str, pa.Table], name: str, columns: _Columns) -> dict[str, Fields]:
    return {split: _from_table(table, f"{split} of {name}", columns) for split, table in tables.items()}


def _from_table(table: pa.Table, where: str, columns: _Columns) -> Fields:
    """The table's columns as fields; those that the caller named are called image, text and label."""
    renamed = {}
    for field, column in (("image", columns.image), ("text", columns.text), ("label", columns.label)):
        if column is not None and column not in table.column_names:
            raise UserError(
                f"The {where} has no column {column!r}, it has {', '.join(table.column_names)}: pass {field}_column=..."
            )
        if column is not None:
            renamed[column] = field
    features = _hub_features(table)
    fields: Fields = {}
    for column in table.column_names:
        field = renamed.get(column, column)
        if column not in renamed and column in renamed.values():
            continue  # another column was named for this field
        fields[field] = _from_column(table.column(column), field, features.get(column, {}), where, columns)
        if field == "label":
            fields["classes"] = features.get(column, {}).get("names")
    return fields


def _hub_features(table: pa.Table) -> dict[str, dict]:
    import json

    metadata = (table.schema.metadata or {}).get(b"huggingface")
    return json.loads(metadata).get("info", {}).get("features", {}) if metadata else {}


def _from_column(column: pa.ChunkedArray, field: str, feature: dict, where: str, columns: _Columns) -> Any:
    import pyarrow as pa

    kind = column.type
    is_struct = pa.types.is_struct(kind) and {"bytes", "path"} <= {part.name for part in kind}
    is_binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    if (is_struct or is_binary) and field != "audio" and feature.get("_type") != "Audio":
        return EncodedImages(_Encoded(column), columns.image_size, mask=field == "mask")
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise UserError(f"The column {field!r} of the {where} is empty in row {row} ({column.null_count} in all).")
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        if field == "text":  # sentences such as "2012" alone
            return [str(value) for value in column.to_pylist()]
        values = torch.from_numpy(np.array(column.to_numpy()))
        return values.float() if values.is_floating_point() else values
    return column.to_pylist()


class _Encoded:
    """The encoded pictures of an Arrow column as a sequence of bytes or paths, without a copy."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, row: int) -> bytes | str | None:
        value = self.column[row].as_py()
        return (value["bytes"] or value["path"]) if isinstance(value, dict) else value
