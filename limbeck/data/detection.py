"""Pictures with boxes: COCO json, VOC xml, the Hugging Face layout, and shifted target domains.

Shapes: N samples, C channels, H height, W width, M boxes of a sample (padded). Boxes are (x1, y1, x2, y2) in pixels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.data import splits
from limbeck.data.images import GIBIBYTE, EncodedImages
from limbeck.data.samples import Data, Samples
from limbeck.data.sources import SPLIT_NAMES, _Columns, _decoded, _find, data_folder
from limbeck.data.views import blur
from limbeck.errors import UserError, require_share

BadBoxes = Literal["refuse", "mend"]
Corruption = Literal["fog", "dark", "noise"]


def load_detection(
    name_or_path: str | Path | Mapping[str, Samples],
    *,
    image_size: int | tuple[int, int] | None = None,
    labelled_fraction: float | None = None,
    target_fraction: float | None = None,
    hidden_boxes: bool = False,
    corruption: Corruption | None = None,
    severity: float = 1.0,
    corrupted: Sequence[str] = ("unlabelled", "test"),
    validation_fraction: float | None = None,
    test_fraction: float = 0.25,
    bad_boxes: BadBoxes = "refuse",
    keep_difficult: bool = False,
    limit: int | Mapping[str, int] | None = None,
    memory_limit: int = 2 * GIBIBYTE,
    seed: int = 0,
    progress: bool = True,
) -> Data:
    """Pictures and their boxes: fields `image` uint8 [N,C,H,W], `boxes` float32 [N,M,4], `box_labels` int64 [N,M] (-1
    where padding).

    `name_or_path` is a folder or a name in `LIMBECK_DATA`, or for the last layout also a hub's name:

    - COCO: `annotations/*.json` (or `*.json`), one a split (`instances_train2017.json`, `train.json`), pictures in
      `<split>/`, `images/` or beside the file; crowds are left out.
    - VOC: `Annotations/*.xml`, `JPEGImages/`, and `ImageSets/Main/{train,val,test}.txt`; without the lists all are
      `train`. Its coordinates count pixels from 1 and include the last. `difficult` objects are left out unless
      `keep_difficult`.
    - Hugging Face: parquet with the columns `image` and `objects: {bbox, category}`, bbox (x, y, width, height).

    A mapping gives `Samples` by split that have these fields already.

    `image_size` (H, W) stretches pictures and boxes, S stands for (S, S); None leaves pictures that are all equally
    large. Validation and test splits, `limit`, `memory_limit` and `seed` are those of `load_data`. `labelled_fraction`
    of the training pictures, drawn by `seed`, keep their boxes; the others become `unlabelled`. For a target domain
    without labels `target_fraction` of the training pictures, always the last ones, become `unlabelled` instead:
    whatever the seed, a source model that was trained on the others has not seen them. `hidden_boxes` leaves the
    unlabelled pictures their boxes, which methods without labels only use to measure themselves. `corruption` shifts
    the splits named in `corrupted` to another domain, see `corrupt`.

    Raises `UserError` for a set that is not there, boxes outside of their picture (by more than a pixel: smaller
    excesses are rounding and are clipped) or without area, naming the row; `bad_boxes="mend"` clips the ones and leaves
    out the others. Pictures without boxes are fine.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if isinstance(name_or_path, Mapping):
        name, found = "data", {_split(split): samples for split, samples in name_or_path.items()}
        for split, samples in found.items():
            _check_fields(split, samples)
    else:
        name = Path(name_or_path).name
        found = _read(str(name_or_path), (size[0], size[1]) if size else None, bad_boxes, keep_difficult)
    found = _complete(found, test_fraction, validation_fraction, seed)
    for split, samples in found.items():
        most = limit.get(split) if isinstance(limit, Mapping) else limit
        if most is not None and most < len(samples):
            found[split] = splits.subset(samples, most, seed)
    found = {split: _decoded(samples, memory_limit, progress) for split, samples in found.items()}
    found = _without_labels(found, labelled_fraction, target_fraction, hidden_boxes, seed)
    if corruption is not None:
        for split in set(corrupted) & set(found):
            changed = corrupt(_all_pictures(found[split]), found[split].index, corruption, severity)
            found[split] = found[split].with_fields({"image": changed})
    return Data(**found, name=name)


def pad_boxes(boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, Tensor]:
    """Boxes [m_i, 4] and labels [m_i] of N pictures as the fields `boxes` [N,M,4] and `box_labels` [N,M] (-1 pads)."""
    most = max(1, max((len(label) for label in labels), default=1))
    return {
        "boxes": torch.stack([F.pad(box.float().reshape(-1, 4), (0, 0, 0, most - len(box))) for box in boxes]),
        "box_labels": torch.stack([F.pad(label.long(), (0, most - len(label)), value=-1) for label in labels]),
    }


# ---------------------------------------------------------------- another domain


def corrupt(images: Tensor, index: Tensor, kind: Corruption, severity: float = 1.0) -> Tensor:
    """Pictures uint8 [N,C,H,W] as another domain shows them, uint8; the same for the same `index` [N] and `severity`.

    `fog`: blended with a bluish haze of varying density (about 45 %), a colour cast, and a blur of about a pixel.
    `dark`: underexposed, with noise. `noise`: noise alone. `severity` scales all of them; 0 changes nothing.
    """
    if kind not in CORRUPTIONS:
        raise UserError(f"There is no corruption {kind!r}; there are {', '.join(CORRUPTIONS)}.")
    if severity < 0:
        raise UserError(f"severity is {severity}, expected at least 0.")
    changed = []
    for rows in torch.arange(len(images)).split(64):
        pictures = images[rows].float() / 255
        noise = torch.stack([_noise(int(number), pictures[0].numel() + 64) for number in index[rows]])
        changed.append((CORRUPTIONS[kind](pictures, noise, severity) * 255).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(changed) if changed else images


def _noise(number: int, count: int) -> Tensor:
    """Uniform numbers that belong to one sample."""
    return torch.rand(count, generator=torch.Generator().manual_seed(number))


def _fog(images: Tensor, noise: Tensor, severity: float) -> Tensor:
    clouds = F.interpolate(noise[:, :20].view(-1, 1, 4, 5), images.shape[-2:], mode="bicubic").clamp(0, 1)
    density = (severity * (0.35 + 0.2 * clouds)).clamp(max=0.95)
    haze = torch.tensor([0.72, 0.80, 0.85])[: images.shape[1]].view(1, -1, 1, 1)
    cast = 1 + severity * (torch.tensor([-0.15, 0.0, 0.1])[: images.shape[1]].view(1, -1, 1, 1))
    sigma = severity * (0.7 + 0.6 * noise[:, 20])
    return blur(torch.lerp((images * cast).clamp(0, 1), haze.expand_as(images), density), sigma)


def _dark(images: Tensor, noise: Tensor, severity: float) -> Tensor:
    gain = (1 - severity * (0.5 + 0.2 * noise[:, 0])).clamp(min=0.05).view(-1, 1, 1, 1)
    return _grain(images * gain, noise, 0.5 * severity)


def _grain(images: Tensor, noise: Tensor, severity: float) -> Tensor:
    return images + 0.25 * severity * (noise[:, 64:].view_as(images) - 0.5)


CORRUPTIONS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"fog": _fog, "dark": _dark, "noise": _grain}


# ---------------------------------------------------------------- splits


def _split(word: str) -> str:
    split = SPLIT_NAMES.get(word.lower())
    if split is None:
        raise UserError(f"There is no split {word!r}: expected train, test, validation or unlabelled.")
    return split


def _complete(
    found: dict[str, Samples], test_fraction: float, validation_fraction: float | None, seed: int
) -> dict[str, Samples]:
    """With a train and a test split, and a validation split where one is wanted."""
    found = dict(found)
    if "train" not in found:
        raise UserError(f"The data has the splits {', '.join(found)} but no train split: name one 'train'.")
    if "test" not in found and "validation" in found:
        found["test"] = found.pop("validation")
    if "test" not in found:
        found["train"], found["test"] = splits.train_validation(found["train"], test_fraction, seed)
    if "validation" not in found and validation_fraction:
        found["train"], found["validation"] = splits.train_validation(found["train"], validation_fraction, seed)
    return found


def _without_labels(
    found: dict[str, Samples], labelled: float | None, target: float | None, hidden: bool, seed: int
) -> dict[str, Samples]:
    if labelled is not None and target is not None:
        raise UserError("labelled_fraction and target_fraction both take boxes away; give one of them.")
    if labelled is None and target is None:
        return found
    share = labelled if target is None else 1 - target
    assert share is not None
    require_share(**({"labelled_fraction": share} if target is None else {"target_fraction": 1 - share}))
    train = found["train"]
    kept = round(share * len(train))
    if not 0 < kept < len(train):
        raise UserError(f"Of {len(train)} training pictures {kept} would keep their boxes; leave some on each side.")
    if target is None:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    else:
        order = torch.arange(len(train))
    rest = train.select(order[kept:].sort().values)
    rest = rest if hidden else rest.without("boxes", "box_labels")
    return {**found, "train": train.select(order[:kept].sort().values), "unlabelled": rest}


def _all_pictures(samples: Samples) -> Tensor:
    return samples.batch(torch.arange(len(samples)))["image"]


def _check_fields(split: str, samples: Samples) -> None:
    missing = [field for field in ("image", "boxes", "box_labels") if field not in samples.fields]
    if split == "unlabelled":
        missing = [field for field in missing if field == "image"]
    if missing:
        raise UserError(f"The split {split!r} has no field {missing[0]!r}, it has {', '.join(samples.fields)}.")
    if "boxes" in samples.fields:
        height, width = samples.fields["image"].shape[-2:]
        for row, (boxes, labels) in enumerate(zip(samples.fields["boxes"], samples.fields["box_labels"], strict=True)):
            _checked(boxes[labels >= 0], width, height, f"row {row} of {split}", "refuse")
        top = int(samples.fields["box_labels"].max())
        if top >= samples.num_classes:
            raise UserError(f"The split {split!r} has the box label {top}, but only {samples.num_classes} classes.")


# ---------------------------------------------------------------- files

Annotation = tuple[Tensor, list]  # boxes [m, 4] in the picture's own pixels, and their classes (numbers or words)
Size = tuple[int, int] | None


def _read(name: str, size: Size, bad_boxes: BadBoxes, keep_difficult: bool) -> dict[str, Samples]:
    """Samples of every split, pictures still encoded, boxes in the pixels that they will have."""
    place = next((path for path in (Path(name), data_folder() / name) if path.exists()), Path(name))
    if (place / "Annotations").is_dir():
        read, classes = _read_voc(place, size, keep_difficult)
    elif coco := _coco_files(place):
        read, classes = _read_coco(coco, size)
    else:
        read, classes = _read_hub_layout(name, size)
    classes = classes or sorted({str(label) for _, notes in read.values() for _, labels in notes for label in labels})
    return {split: _samples(split, *parts, classes, size, bad_boxes) for split, parts in read.items()}


def _samples(
    split: str,
    images: EncodedImages,
    annotations: list[Annotation],
    classes: list[str],
    size: Size,
    bad_boxes: BadBoxes,
) -> Samples:
    numbers = {name: number for number, name in enumerate(classes)}
    all_boxes, all_labels = [], []
    for row, (boxes, labels) in enumerate(annotations):
        width, height = images._open(row).size
        boxes, kept = _checked(boxes, width, height, f"row {row} of {split}", bad_boxes)
        if size is not None:
            boxes = boxes * torch.tensor([size[1] / width, size[0] / height]).repeat(2)
        coded = torch.tensor([_number(label, numbers, f"row {row} of {split}") for label in labels], dtype=torch.long)
        all_boxes.append(boxes)
        all_labels.append(coded[kept])
    fields: dict[str, Any] = {"image": images, **pad_boxes(all_boxes, all_labels)}
    return Samples(fields, classes)


def _number(label: Any, numbers: Mapping[str, int], where: str) -> int:
    if isinstance(label, str) and label in numbers:
        return numbers[label]
    if isinstance(label, int) and 0 <= label < len(numbers):
        return label
    raise UserError(f"The box label {label!r} in {where} is none of the {len(numbers)} classes {', '.join(numbers)}.")


def _checked(boxes: Tensor, width: int, height: int, where: str, bad_boxes: BadBoxes) -> tuple[Tensor, Tensor]:
    """The boxes within their picture, and bool [m]: which of those given they are."""
    edges = torch.tensor([width, height, width, height], dtype=torch.float32)
    outside = ((boxes < -1) | (boxes > edges + 1)).any(1)
    clipped = boxes.clamp(min=0).minimum(edges)
    empty = (clipped[:, 2] <= clipped[:, 0]) | (clipped[:, 3] <= clipped[:, 1])
    flat = (boxes[:, 2] <= boxes[:, 0]) | (boxes[:, 3] <= boxes[:, 1])
    if bad_boxes == "refuse" and bool((outside | empty).any()):
        first = int((outside | empty).nonzero()[0])
        corners = ", ".join(f"{value:g}" for value in boxes[first].tolist())
        what = "has no area" if flat[first] else f"does not lie within the picture of {width}x{height} pixels"
        raise UserError(
            f"The box ({corners}) in {where} {what}: expected x1 < x2 and y1 < y2 within the picture; mend the "
            "annotation, or pass bad_boxes='mend' to clip such boxes and leave out empty ones."
        )
    return clipped[~empty], ~empty


def _read_hub_layout(name: str, size: Size) -> tuple[dict[str, tuple[EncodedImages, list[Annotation]]], list[str]]:
    read, classes = {}, None
    for split, fields in _find(name, _Columns(None, None, None, size)).items():
        if "image" not in fields or "objects" not in fields:
            raise UserError(
                f"The {split} split of {name} has the columns {', '.join(fields)}, expected image and objects "
                "(with bbox and category), a COCO json or VOC's Annotations folder."
            )
        notes = []
        for objects in fields["objects"]:
            found = torch.tensor(objects["bbox"], dtype=torch.float32).reshape(-1, 4)
            labels = objects.get("category", objects.get("label"))
            notes.append((_from_xywh(found), list(labels)))
        read[split] = (fields["image"], notes)
    classes = _hub_classes(name)
    return read, classes or _count_classes(read)


def _count_classes(read: Mapping[str, tuple[EncodedImages, list[Annotation]]]) -> list[str]:
    labels = {label for _, notes in read.values() for _, found in notes for label in found}
    if all(isinstance(label, int) for label in labels):
        return [str(number) for number in range(max(labels, default=0) + 1)]
    return sorted(str(label) for label in labels)


def _hub_classes(name: str) -> list[str] | None:
    """The names that the schema of parquet files gives the categories."""
    from pyarrow import parquet

    place = next((path for path in (Path(name), data_folder() / name) if path.exists()), None)
    files = [] if place is None else [place] if place.is_file() else sorted(place.rglob("*.parquet"))
    if not files:
        return None
    metadata = (parquet.read_schema(files[0]).metadata or {}).get(b"huggingface")
    features = json.loads(metadata).get("info", {}).get("features", {}) if metadata else {}
    return _names_within(features.get("objects", {}))


def _names_within(feature: Any) -> list[str] | None:
    """The first list of class names anywhere inside a feature: its nesting differs between versions of `datasets`."""
    if isinstance(feature, Mapping):
        if isinstance(feature.get("names"), list):
            return feature["names"]
        feature = list(feature.values())
    if isinstance(feature, list):
        return next((names for part in feature if (names := _names_within(part))), None)
    return None


def _coco_files(place: Path) -> dict[str, Path]:
    """COCO's json files by split."""
    if place.is_file() and place.suffix == ".json":
        return {"train": place}
    found: dict[str, Path] = {}
    for path in sorted([*place.glob("*.json"), *place.glob("annotations/*.json"), *place.glob("*/*.coco.json")]):
        words = re.findall("[a-z]+", f"{path.parent.name} {path.stem}".lower())
        split = next((SPLIT_NAMES[word] for word in reversed(words) if word in SPLIT_NAMES), "train")
        found.setdefault(split, path)
    return found


def _read_coco(
    files: Mapping[str, Path], size: Size
) -> tuple[dict[str, tuple[EncodedImages, list[Annotation]]], list[str]]:
    read: dict[str, tuple[EncodedImages, list[Annotation]]] = {}
    categories: dict[int, str] = {}
    for split, path in files.items():
        try:
            content = json.loads(path.read_text())
            categories |= {entry["id"]: str(entry["name"]) for entry in content["categories"]}
            rows = {entry["id"]: row for row, entry in enumerate(content["images"])}
            boxes: list[list] = [[] for _ in rows]
            labels: list[list] = [[] for _ in rows]
            for entry in content.get("annotations", []):
                if not entry.get("iscrowd"):
                    boxes[rows[entry["image_id"]]].append(entry["bbox"])
                    labels[rows[entry["image_id"]]].append(categories[entry["category_id"]])
            paths = [_picture(path, str(entry["file_name"])) for entry in content["images"]]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no COCO annotation file ({type(error).__name__}: {error}).") from None
        notes = [
            (_from_xywh(torch.tensor(found, dtype=torch.float32).reshape(-1, 4)), words)
            for found, words in zip(boxes, labels, strict=True)
        ]
        read[split] = (EncodedImages(paths, size), notes)
    return read, [categories[number] for number in sorted(categories)]


def _picture(annotations: Path, name: str) -> Path:
    """Where the picture of a COCO entry lies."""
    top = annotations.parent.parent if annotations.parent.name == "annotations" else annotations.parent
    stem = annotations.stem.removeprefix("instances_")
    for folder in (annotations.parent, top, top / "images", top / stem, top / "images" / stem):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"The picture {name!r} of {annotations} is not there: looked in {top}, images/ and {stem}/.")


def _from_xywh(boxes: Tensor) -> Tensor:
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def _read_voc(
    folder: Path, size: Size, keep_difficult: bool
) -> tuple[dict[str, tuple[EncodedImages, list[Annotation]]], list[str]]:
    lists = sorted((folder / "ImageSets" / "Main").glob("*.txt"))
    members = {
        SPLIT_NAMES[path.stem.lower()]: [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
        for path in lists
        if path.stem.lower() in SPLIT_NAMES
    }
    members = members or {"train": sorted(path.stem for path in (folder / "Annotations").glob("*.xml"))}
    read: dict[str, tuple[EncodedImages, list[Annotation]]] = {}
    for split, stems in members.items():
        parsed = [_voc_entry(folder / "Annotations" / f"{stem}.xml", keep_difficult) for stem in stems]
        paths = [_voc_picture(folder, stem, name) for stem, (name, _) in zip(stems, parsed, strict=True)]
        read[split] = (EncodedImages(paths, size), [note for _, note in parsed])
    names = sorted({label for _, notes in read.values() for _, labels in notes for label in labels})
    return read, names


def _voc_entry(path: Path, keep_difficult: bool) -> tuple[str, Annotation]:
    """The picture's file name and its objects."""
    try:
        root = ElementTree.parse(path).getroot()
        objects = [
            entry for entry in root.iter("object") if keep_difficult or entry.findtext("difficult", "0").strip() != "1"
        ]
        corners = [
            [float(entry.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax")]
            for entry in objects
        ]
        labels = [entry.findtext("name", "").strip() for entry in objects]
    except (ElementTree.ParseError, OSError, ValueError) as error:
        raise UserError(f"{path} is no VOC annotation ({error}).") from None
    boxes = torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)
    return root.findtext("filename", ""), (boxes - torch.tensor([1.0, 1.0, 0.0, 0.0]), labels)


def _voc_picture(folder: Path, stem: str, name: str) -> Path:
    for candidate in (f"{stem}.jpg", f"{stem}.jpeg", f"{stem}.png", name):
        if candidate and (folder / "JPEGImages" / candidate).is_file():
            return folder / "JPEGImages" / candidate
    raise UserError(f"The picture of {folder / 'Annotations' / stem}.xml is not in {folder / 'JPEGImages'}.")
