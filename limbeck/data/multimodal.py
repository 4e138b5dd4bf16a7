"""Samples of several modalities: pairing sets by class or by index, missing modalities, dropping them.

A modality is a field: `image` uint8 [N,C,H,W], `spectrogram` float32 [N,1,M,T], ... Beside it `present_<modality>`
bool [N] says which samples have it; without that field all have. A missing modality is filled with zeros.

Letters: N samples, B rows of a batch, K modalities, S subsets of them, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.data.audio import load_audio
from limbeck.data.samples import Data, Samples
from limbeck.data.sources import load_data
from limbeck.data.splits import subset, train_validation
from limbeck.errors import UserError

PRESENT = "present_"
MOST_MODALITIES = 12  # all subsets are enumerated


@dataclass(frozen=True)
class MultimodalData(Data):
    """Data with several `modalities`; `target` is the one that a student has at test time."""

    modalities: tuple[str, ...] = ()
    target: str = ""


def load_multimodal(
    modalities: Mapping[str, Mapping[str, Any]],
    *,
    target: str,
    pair: Literal["class", "index"] = "class",
    size: Mapping[str, int] | None = None,
    incomplete: Literal["drop", "keep"] = "drop",
    missing: Mapping[str, float] | None = None,
    validation_fraction: float | None = None,
    seed: int = 0,
) -> MultimodalData:
    """Several sets as one whose samples have a field for each modality, `label`, and `item_<modality>` [N].

    Each set's splits are made before its items are paired, and each split pairs its own items, so that no item of any
    modality is in two splits. `item_<modality>` is the item's `index` in its own set, -1 where it is missing.

    Args:
        modalities: for each modality how its set is loaded: the arguments of `load_audio` for `spectrogram` and
            `audio`, those of `load_data` for all others. AV-MNIST is
            `{"image": {"name_or_path": "mnist"}, "spectrogram": {"name_or_path": "fsdd"}}`. With `field` another field
            of the set is taken than the one of the modality's name.
        target: the student's modality.
        pair: items of equal class (`pair_by_class`), or of equal `index` (`pair_by_index`).
        size: pairs of each split, or those named; of a pairing by class more than there are items repeat them.
        incomplete: of a pairing by index: leave out what a set lacks, or keep it as missing.
        missing: share of the training samples that lose a modality; it must not be the target.
        validation_fraction: share of every set's training items held out, the classes in proportion.
        seed: of splits, pairs and what is missing.

    Raises:
        UserError: fewer than two modalities, a target that is none of them, sets of different classes, a set without
            that field, or a share outside [0, 1).
    """
    if len(modalities) < 2 or target not in modalities:
        raise UserError(
            f"data of several modalities need at least two and one of them as target, got {', '.join(modalities)} and "
            f"target {target!r}; name them in data.modalities and data.target"
        )
    sets = {name: _load(name, dict(settings), validation_fraction, seed) for name, settings in modalities.items()}
    names = [data.name for data in sets.values()]
    splits: dict[str, Samples] = {}
    for split in ("train", "test", "validation"):
        parts = {name: getattr(data, split) for name, data in sets.items()}
        if all(part is not None for part in parts.values()):
            bound = (size or {}).get(split)
            seed_of_split = seed * 3 + ("train", "test", "validation").index(split)
            if pair == "class":
                splits[split] = pair_by_class(parts, size=bound, seed=seed_of_split)
            else:
                splits[split] = pair_by_index(parts, incomplete=incomplete)
                if bound is not None and bound < len(splits[split]):
                    splits[split] = subset(splits[split], bound, seed_of_split)
    if missing:
        if target in missing:
            raise UserError(f"the target modality '{target}' must not be missing; name others in data.missing")
        splits["train"] = drop_at_random(splits["train"], missing, seed)
    return MultimodalData(**splits, name="+".join(dict.fromkeys(names)), modalities=tuple(modalities), target=target)


def pair_by_class(sets: Mapping[str, Samples], *, size: int | None = None, seed: int) -> Samples:
    """Samples that join an item of each set of the same class, drawn by the seed; in random order.

    Of class c come as many pairs as the smallest set has items of it, each item at most once; or, with `size` pairs in
    all, each class's share of that in proportion (largest remainder), where items are repeated once all of their class
    have been used, every time in another order, so that all are used equally often to within one.

    Raises `UserError` where classes differ, or one has no item in some set.
    """
    classes = _shared_classes(sets)
    counts_KC = torch.stack([torch.bincount(part.labels, minlength=len(classes)) for part in sets.values()])
    empty = ((counts_KC == 0) & (counts_KC.amax(0) > 0)).nonzero().tolist()
    if empty:
        which, number = empty[0]
        raise UserError(
            f"the set of the modality '{list(sets)[which]}' has no item of class '{classes[number]}' to pair"
        )
    pairs_C = counts_KC.amin(0)
    if size is not None:
        quota_C = pairs_C.double() * size / pairs_C.sum()
        pairs_C = quota_C.floor().long()
        pairs_C[(quota_C - pairs_C).sort(descending=True, stable=True).indices[: size - int(pairs_C.sum())]] += 1
    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, Tensor] = {}
    for name, part in sets.items():
        chosen = []
        for number, pairs in enumerate(pairs_C.tolist()):
            items = (part.labels == number).nonzero().flatten()
            orders = [torch.randperm(len(items), generator=generator) for _ in range(-(-pairs // max(1, len(items))))]
            chosen.append(items[torch.cat([*orders, torch.empty(0, dtype=torch.long)])[:pairs]])
        rows[name] = torch.cat(chosen)
    order = torch.randperm(int(pairs_C.sum()), generator=generator)
    label = torch.arange(len(classes)).repeat_interleave(pairs_C)[order]
    chosen_rows = {name: part[order] for name, part in rows.items()}
    return Samples({**_columns(sets, chosen_rows), "label": label}, classes)


def pair_by_index(sets: Mapping[str, Samples], *, incomplete: Literal["drop", "keep"] = "drop") -> Samples:
    """Samples that join the items of equal `index`, in that order; columns other than modalities come from the first.

    `drop` leaves out an index that some set lacks. `keep` keeps it: what is missing is zeros, and the field
    `present_<modality>` says so.

    Raises `UserError` where an index occurs twice in a set, labels contradict each other, or nothing is left.
    """
    classes = _shared_classes(sets) if all(part.classes for part in sets.values()) else None
    for name, part in sets.items():
        if len(part.index.unique()) < len(part):
            raise UserError(f"the set of the modality '{name}' holds an index twice; pairing by index needs each once")
    found, times = torch.cat([part.index for part in sets.values()]).unique(return_counts=True)
    index = found if incomplete == "keep" else found[times == len(sets)]
    if not len(index):
        raise UserError(f"the sets of {', '.join(sets)} share no index; pair them by class or mend their index")
    rows = {name: _rows_of(part.index, index) for name, part in sets.items()}
    fields = _columns(sets, rows)
    for name, part in sets.items():
        if "label" in part.fields:
            there = rows[name] >= 0
            labels = part.labels[rows[name].clamp(min=0)]
            known = fields.setdefault("label", torch.full_like(labels, -1))
            wrong = (there & (known >= 0) & (known != labels)).nonzero().flatten()
            if len(wrong):
                row = int(wrong[0])
                raise UserError(
                    f"the sample of index {int(index[row])} has the label {int(labels[row])} in the set of '{name}' "
                    f"and {int(known[row])} in another; pair by class, or mend the index"
                )
            fields["label"] = torch.where(there, labels, known)
        if incomplete == "keep":
            fields[PRESENT + name] = rows[name] >= 0
    return Samples({**fields, "index": index}, classes)


def require_modalities(samples: Samples, modalities: Sequence[str], why: str) -> None:
    """Raise `UserError` unless every sample has these modalities; `why` says who needs them ("which fused reads")."""
    for name in modalities:
        if name not in samples.fields:
            raise UserError(
                f"the samples have no modality '{name}', {why}; they have "
                f"{', '.join(field for field in samples.fields if not field.startswith((PRESENT, 'item_')))}"
            )
        present = samples.fields.get(PRESENT + name)
        if present is not None and not bool(present.all()):
            absent = (~present.bool()).nonzero().flatten()
            raise UserError(
                f"the modality '{name}', {why}, is missing in {len(absent)} of {len(samples)} samples, first in row "
                f"{int(absent[0])}; leave these samples out, or fill it in and drop '{PRESENT}{name}'"
            )


def require_modalities_of(data: Data, **networks: Any) -> None:
    """Raise `UserError` unless the samples have all modalities that these networks read (their `modalities`)."""
    for name, network in networks.items():
        modalities = getattr(network, "modalities", None)
        if modalities is None:
            raise UserError(
                f"{name} is a {type(network).__name__}, which does not say what it reads of a batch; give a "
                "OneModality or a MultimodalClassifier"
            )
        for samples in (data.train, data.validation):
            if samples is not None:
                require_modalities(samples, modalities, f"which {name} reads")


def drop_at_random(samples: Samples, missing: Mapping[str, float], seed: int) -> Samples:
    """The samples, a share `missing[m]` of them without modality m (zeros, `present_m` false), drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    fields: dict[str, Any] = {}
    for name, share in missing.items():
        require_modalities(samples, [name], "which data.missing names")
        if not 0 <= share < 1:
            raise UserError(f"the missing share of '{name}' is {share}; give a number from 0 to below 1")
        rows = torch.randperm(len(samples), generator=generator)[: round(share * len(samples))]
        present = torch.ones(len(samples), dtype=torch.bool)
        present[rows] = False
        fields[PRESENT + name] = present
        fields[name] = _without(samples.fields[name], present)
    return samples.with_fields(fields)


# ---------------------------------------------------------------- of a batch


def draw_present(
    batch: int,
    modalities: Sequence[str],
    *,
    keep: float,
    always: Sequence[str] = (),
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """For each sample a random set of modalities, never empty: bool [B] by modality.

    Each is kept with probability `keep` independently, empty draws are drawn anew: a set of k of K modalities comes
    with probability proportional to keep^k (1 - keep)^(K - k), so that one is kept with keep / (1 - (1 - keep)^K) and
    not with `keep`. Those in `always` are kept in any case (and do not count in K). The sets are drawn from their
    exact distribution: no loop, and nothing is read back from the device.

    Raises `UserError` where `keep` is not in (0, 1], or there are more than 12 modalities to draw.
    """
    drawn = [name for name in modalities if name not in always]
    if not 0 < keep <= 1 or len(drawn) > MOST_MODALITIES:
        raise UserError(
            f"keep is {keep} with {len(drawn)} modalities to draw; give a number above 0 and up to 1, and at most "
            f"{MOST_MODALITIES} modalities"
        )
    present = {name: torch.ones(batch, dtype=torch.bool, device=device) for name in always if name in modalities}
    if drawn:
        subsets_SK = (
            torch.arange(2 ** len(drawn), device=device)[:, None] >> torch.arange(len(drawn), device=device) & 1
        )
        kept_S = subsets_SK.sum(1)
        weight_S = torch.tensor(keep, device=device) ** kept_S * torch.tensor(1 - keep, device=device) ** (
            len(drawn) - kept_S
        )
        if not present:
            weight_S = torch.where(kept_S > 0, weight_S, torch.zeros_like(weight_S))
        chosen_BK = subsets_SK[torch.multinomial(weight_S, batch, replacement=True, generator=generator)].bool()
        present |= dict(zip(drawn, chosen_BK.unbind(1), strict=True))
    return {name: present[name] for name in modalities}


def drop_modalities(fields: Mapping[str, Any], present: Mapping[str, Tensor]) -> dict[str, Any]:
    """The batch with zeros for the modalities that a sample lacks, and `present_<modality>` bool [B].

    What was missing before stays missing. Nothing of a dropped modality's values is left: a NaN there becomes 0 too.
    """
    changed = dict(fields)
    for name, kept_B in present.items():
        known_B = fields.get(PRESENT + name)
        kept_B = kept_B if known_B is None else kept_B & known_B
        changed[name] = _without(fields[name], kept_B)
        changed[PRESENT + name] = kept_B
    return changed


# ---------------------------------------------------------------- the sets


def _load(modality: str, settings: dict[str, Any], validation_fraction: float | None, seed: int) -> Data:
    """One modality's set with the fields modality and `label`."""
    field = settings.pop("field", modality)
    load = load_audio if modality in ("spectrogram", "audio") else load_data
    if load is load_audio and "features" not in settings:
        settings["features"] = modality
    try:
        data = load(**settings, seed=seed)
    except TypeError as error:
        raise UserError(f"data.modalities.{modality} does not fit {load.__name__}: {error}") from None
    if field not in data.train.fields:
        raise UserError(
            f"the set {data.name} has no field '{field}' for the modality '{modality}'; it has "
            f"{', '.join(data.train.fields)}: name one as data.modalities.{modality}.field"
        )
    found = {split: getattr(data, split) for split in ("train", "test", "validation")}
    if found["validation"] is None and validation_fraction:
        found["train"], found["validation"] = train_validation(data.train, validation_fraction, seed)
    kept = {"index", "label", field}
    for split, samples in found.items():
        if samples is not None:
            bare = samples.without(*(name for name in samples.fields if name not in kept))
            if field != modality:
                bare = bare.with_fields({modality: samples.fields[field]}).without(field)
            found[split] = bare
    return Data(**found, name=data.name)


def _columns(sets: Mapping[str, Samples], rows: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of each modality the items in these rows, zeros where the row is -1, and their index."""
    fields: dict[str, Any] = {}
    for name, part in sets.items():
        there, row = rows[name] >= 0, rows[name].clamp(min=0)
        items = part.select(row).fields[name]
        fields[name] = items if bool(there.all()) else _without(items, there)
        fields[f"item_{name}"] = part.index[row].where(there, torch.tensor(-1))
    return fields


def _without(column: Any, present_N: Tensor) -> Any:
    """A modality with zeros in the rows that lack it."""
    if isinstance(column, dict):
        return {name: _without(part, present_N) for name, part in column.items()}
    if not isinstance(column, Tensor):
        raise UserError(f"a modality that may be missing is a tensor or a dict of tensors, got {type(column).__name__}")
    kept = present_N.reshape(-1, *[1] * (column.ndim - 1))
    return torch.where(kept, column, torch.zeros_like(column))


def _rows_of(index: Tensor, wanted: Tensor) -> Tensor:
    """For each wanted number the row where `index` holds it, -1 where it does not."""
    order = index.argsort()
    place = torch.searchsorted(index[order], wanted).clamp(max=len(index) - 1)
    row = order[place]
    return row.where(index[row] == wanted, torch.tensor(-1))


def _shared_classes(sets: Mapping[str, Samples]) -> list[str]:
    first, *others = sets
    classes = sets[first].classes
    for name in [first, *others]:
        if sets[name].classes is None:
            raise UserError(f"the set of the modality '{name}' has no classes; pairing needs labels or an index")
        if sets[name].classes != classes:
            raise UserError(
                f"the sets of '{first}' and '{name}' have different classes ({', '.join((classes or [])[:4])}, ... and "
                f"{', '.join((sets[name].classes or [])[:4])}, ...); name them alike in both"
            )
    assert classes is not None
    return classes
