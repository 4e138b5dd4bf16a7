"""Seeded divisions of samples: pure functions of their arguments and the seed.

Every part keeps each sample's `index` and lists its samples in their original order. Parts that have no
labels keep the classes' names; what a hidden label was can be looked up in the whole set by `index`.

Letters: N samples, C classes, n_c samples of class c.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from limbeck.data.samples import Samples
from limbeck.errors import UserError


def subset(samples: Samples, n: int, seed: int) -> Samples:
    """`n` samples, the classes in proportion (largest remainder); any `n` samples where there are no classes.

    Raises `UserError` where `n` is not in 1..N.
    """
    return samples.select(_draw(samples, n, seed))


def train_validation(samples: Samples, fraction: float, seed: int) -> tuple[Samples, Samples]:
    """(train, validation): `round(fraction * N)` samples (at least 1) held out, the classes in proportion.

    Raises `UserError` where `fraction` is not between 0 and 1.
    """
    _check_fraction("fraction", fraction)
    held_out = _draw(samples, max(1, round(fraction * len(samples))), seed)
    return samples.select(_others(held_out, len(samples))), samples.select(held_out)


def split_labels(
    samples: Samples,
    *,
    labels_per_class: int | None = None,
    labelled_fraction: float | None = None,
    keep_labelled_in_unlabelled: bool,
    seed: int,
) -> tuple[Samples, Samples]:
    """(labelled, unlabelled): few samples keep their label, the unlabelled ones lose the field `label`.

    Either `labels_per_class` of each class, or `round(labelled_fraction * N)` with the classes in proportion
    but at least one of each. `keep_labelled_in_unlabelled=True` puts all N samples into the unlabelled part
    (as FixMatch does), `False` only the rest.

    Raises `UserError` where a class has fewer labels than asked for, naming it, and where the fraction is too
    small for one label of each class.
    """
    if (labels_per_class is None) == (labelled_fraction is None):
        raise UserError("Pass either labels_per_class or labelled_fraction, not both and not neither.")
    counts = torch.bincount(samples.labels, minlength=samples.num_classes)
    if labels_per_class is not None:
        wanted = torch.full_like(counts, labels_per_class)
        if labels_per_class < 1:
            raise UserError(f"labels_per_class is {labels_per_class}, expected at least 1.")
    else:
        assert labelled_fraction is not None
        _check_fraction("labelled_fraction", labelled_fraction)
        wanted = _in_proportion(counts, round(labelled_fraction * len(samples)), at_least=1)
    short = (counts < wanted).nonzero().flatten().tolist()
    if short:
        assert samples.classes is not None
        raise UserError(
            f"Class {samples.classes[short[0]]!r} has {int(counts[short[0]])} labels but "
            f"{int(wanted[short[0]])} were asked for ({len(short)} of {len(counts)} classes have too few): "
            "ask for fewer labels."
        )
    rows = _of_each_class(samples.labels, wanted, seed)
    rest = samples if keep_labelled_in_unlabelled else samples.select(_others(rows, len(samples)))
    return samples.select(rows), rest.without("label")


def long_tailed(samples: Samples, imbalance: float, seed: int) -> Samples:
    """Classes that thin out exponentially: class c keeps floor(n * imbalance^(-c / (C-1))), at least 1.

    n is the size of the smallest class, so that the counts are exact; `imbalance` >= 1 is the largest count
    over the smallest. Source: Cui et al. 2019 (class-balanced loss), section 5.1.
    """
    if imbalance < 1:
        raise UserError(f"imbalance is {imbalance}, expected at least 1 (largest class over smallest).")
    counts = torch.bincount(samples.labels, minlength=samples.num_classes)
    ranks = torch.arange(len(counts), dtype=torch.float64) / max(1, len(counts) - 1)
    # 1e-9: an exact power such as 100 * 10**-1 must not fall to 9 by rounding
    wanted = (counts.min() * imbalance**-ranks + 1e-9).floor().long().clamp(min=1)
    return samples.select(_of_each_class(samples.labels, wanted.minimum(counts), seed))


def only_classes(samples: Samples, known_classes: Sequence[int | str]) -> Samples:
    """The samples of these classes, relabelled 0..K-1 in the order given.

    Raises `UserError` for a class that the samples don't have.
    """
    known = _class_numbers(samples, known_classes)
    assert samples.classes is not None
    relabel = torch.full((samples.num_classes,), -1)
    relabel[known] = torch.arange(len(known))
    rows = (relabel[samples.labels] >= 0).nonzero().flatten()
    chosen = samples.select(rows)
    fields = {**chosen.fields, "label": relabel[chosen.labels]}
    return Samples(fields, [samples.classes[c] for c in known])


def class_mismatch(
    samples: Samples,
    known_classes: Sequence[int | str],
    mismatch_ratio: float,
    *,
    labels_per_class: int,
    seed: int,
    unlabelled_size: int | None = None,
) -> tuple[Samples, Samples]:
    """(labelled, unlabelled), where a share of the unlabelled samples belongs to no labelled class.

    labelled: `labels_per_class` of each known class, relabelled 0..K-1. unlabelled: `unlabelled_size` other
    samples, `round(mismatch_ratio * unlabelled_size)` of them from unknown classes; `None` takes as many as
    there are for that ratio. Use `only_classes` for the test split. Source: Oliver et al. 2018, section 4.4.

    Raises `UserError` where there are too few samples of either kind.
    """
    if not 0 <= mismatch_ratio <= 1:
        raise UserError(f"mismatch_ratio is {mismatch_ratio}, expected 0..1.")
    known_samples = only_classes(samples, known_classes)
    labelled, rest = split_labels(
        known_samples, labels_per_class=labels_per_class, keep_labelled_in_unlabelled=False, seed=seed
    )
    is_known = torch.isin(samples.labels, torch.tensor(_class_numbers(samples, known_classes)))
    unknown_rows = (~is_known).nonzero().flatten()
    rest_rows = is_known.nonzero().flatten()[torch.isin(known_samples.index, rest.index)]
    if unlabelled_size is None:
        by_unknown = len(unknown_rows) / mismatch_ratio if mismatch_ratio > 0 else float("inf")
        by_known = len(rest_rows) / (1 - mismatch_ratio) if mismatch_ratio < 1 else float("inf")
        unlabelled_size = int(min(by_unknown, by_known) + 1e-9)
    unknown_size = min(round(mismatch_ratio * unlabelled_size), unlabelled_size)
    sizes = {"unknown": (unknown_size, unknown_rows), "known": (unlabelled_size - unknown_size, rest_rows)}
    for kind, (size, rows) in sizes.items():
        if size > len(rows):
            raise UserError(
                f"{size} unlabelled samples of {kind} classes were asked for, there are {len(rows)}: lower "
                "unlabelled_size or change mismatch_ratio."
            )
    generator = _generator(seed)
    chosen = [rows[torch.randperm(len(rows), generator=generator)[:size]] for size, rows in sizes.values()]
    unlabelled = samples.select(torch.cat(chosen).sort().values).without("label")
    unlabelled.classes = labelled.classes
    return labelled, unlabelled


def partition_clients(samples: Samples, clients: int, alpha: float, seed: int, minimum: int = 1) -> list[Samples]:
    """Each sample to one of `clients`: every class is shared out by its own draw from Dirichlet(alpha).

    Small `alpha` gives clients of few classes, large `alpha` equal ones. Drawn anew until every client has at
    least `minimum` samples. Source: Hsu et al. 2019, section 2, shared out class by class.

    Raises `UserError` where 1,000 draws leave some client with fewer.
    """
    if clients < 1 or alpha <= 0:
        raise UserError(f"Got clients={clients} and alpha={alpha}, expected at least 1 and more than 0.")
    rng = np.random.default_rng(seed)
    counts = torch.bincount(samples.labels, minlength=samples.num_classes).numpy()
    for _ in range(1000):
        shares = rng.dirichlet([alpha] * clients, size=len(counts))
        cuts = np.rint(shares.cumsum(1)[:, :-1] * counts[:, None]).astype(int)
        sizes = np.diff(np.concatenate([np.zeros((len(counts), 1), int), cuts, counts[:, None]], 1), axis=1)
        if sizes.sum(0).min() >= minimum:
            break
    else:
        raise UserError(
            f"No draw gave each of {clients} clients {minimum} of {len(samples)} samples at alpha={alpha}: "
            "raise alpha, or take fewer clients."
        )
    rows_of_class = [rng.permutation((samples.labels == c).nonzero().flatten().numpy()) for c in range(len(counts))]
    parts = [np.split(rows, ends) for rows, ends in zip(rows_of_class, cuts, strict=True)]
    mine = [np.sort(np.concatenate([part[k] for part in parts])) for k in range(clients)]
    return [samples.select(torch.from_numpy(rows)) for rows in mine]


def noisy_labels(samples: Samples, fraction: float, seed: int) -> Samples:
    """`round(fraction * N)` samples get a wrong label, uniform over the other C-1 classes (symmetric)."""
    if not 0 <= fraction <= 1:
        raise UserError(f"fraction is {fraction}, expected 0..1.")
    if samples.num_classes < 2:
        raise UserError("Label noise needs at least 2 classes, got 1.")
    generator = _generator(seed)
    rows = torch.randperm(len(samples), generator=generator)[: round(fraction * len(samples))]
    shift = torch.randint(1, samples.num_classes, (len(rows),), generator=generator)
    label = samples.labels.clone()
    label[rows] = (label[rows] + shift) % samples.num_classes
    return samples.with_fields({"label": label})


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _check_fraction(name: str, fraction: float) -> None:
    if not 0 < fraction < 1:
        raise UserError(f"{name} is {fraction}, expected a number between 0 and 1.")


def _others(rows: Tensor, size: int) -> Tensor:
    others = torch.ones(size, dtype=torch.bool)
    others[rows] = False
    return others.nonzero().flatten()


def _draw(samples: Samples, n: int, seed: int) -> Tensor:
    """Sorted rows of `n` samples, the classes in proportion where there are some."""
    if not 1 <= n <= len(samples):
        raise UserError(f"{n} samples were asked for, expected 1..{len(samples)}.")
    label = samples.fields.get("label")
    if not isinstance(label, Tensor) or samples.classes is None or label.dim() != 1:
        return torch.randperm(len(samples), generator=_generator(seed))[:n].sort().values
    counts = torch.bincount(label, minlength=samples.num_classes)
    return _of_each_class(label, _in_proportion(counts, n), seed)


def _of_each_class(labels: Tensor, wanted: Tensor, seed: int) -> Tensor:
    """Sorted rows: `wanted[c]` random ones of each class c, which has that many."""
    shuffled = torch.randperm(len(labels), generator=_generator(seed))
    by_class = shuffled[labels[shuffled].sort(stable=True).indices]
    counts = torch.bincount(labels, minlength=len(wanted))
    place = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return by_class[place < wanted.repeat_interleave(counts)].sort().values


def _in_proportion(counts: Tensor, n: int, at_least: int = 0) -> Tensor:
    """int64 [C], sum `n`, near n * counts / N (largest remainder); `at_least` for classes that occur."""
    present = counts > 0
    if n < at_least * int(present.sum()):
        raise UserError(f"{n} labels are fewer than the {int(present.sum())} classes: raise labelled_fraction.")
    quota = counts.double() * n / counts.sum()
    share = quota.floor().long()
    largest = (quota - share).sort(descending=True, stable=True).indices[: n - int(share.sum())]
    share[largest] += 1
    while (poor := (present & (share < at_least)).nonzero().flatten()).numel():
        share[share.argmax()] -= 1
        share[poor[0]] += 1
    return share


def _class_numbers(samples: Samples, known_classes: Sequence[int | str]) -> list[int]:
    if samples.classes is None:
        raise UserError("These samples have no classes: give them a field 'label'.")
    names = {name: number for number, name in enumerate(samples.classes)}
    numbers = []
    for known in known_classes:
        number = names.get(known) if isinstance(known, str) else known
        if number is None or not 0 <= number < len(names):
            raise UserError(f"There is no class {known!r}: the classes are {', '.join(samples.classes)}.")
        numbers.append(number)
    return numbers
