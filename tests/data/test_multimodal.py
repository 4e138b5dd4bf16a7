"""Pairing by class and by index, what may be missing, and what is dropped."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from limbeck.data import Samples, data_folder
from limbeck.data.multimodal import (
    draw_present,
    drop_at_random,
    drop_modalities,
    load_multimodal,
    pair_by_class,
    pair_by_index,
    require_modalities,
    require_modalities_of,
)
from limbeck.errors import UserError

CLASSES = ["one", "two", "three"]


def one_set(name: str, counts: tuple[int, ...], first: int = 0) -> Samples:
    """A set whose items hold 100 * class + number, with indices from `first` on."""
    label = torch.arange(3).repeat_interleave(torch.tensor(counts))
    values = torch.cat([100.0 * c + torch.arange(n) for c, n in enumerate(counts)])[:, None]
    return Samples({name: values, "label": label, "index": first + torch.arange(len(label))}, CLASSES)


def two_sets() -> dict[str, Samples]:
    return {"image": one_set("image", (5, 4, 3)), "spectrogram": one_set("spectrogram", (2, 6, 3), first=50)}


def test_a_pair_joins_items_of_one_class_and_uses_each_item_once():
    sets = two_sets()
    pairs = pair_by_class(sets, seed=0)
    assert torch.bincount(pairs.labels).tolist() == [2, 4, 3]
    for name in sets:
        assert ((pairs.fields[name][:, 0] // 100).long() == pairs.labels).all()
        assert len(pairs.fields[f"item_{name}"].unique()) == len(pairs)
        rows = pairs.fields[f"item_{name}"] - sets[name].index[0]
        assert torch.equal(sets[name].fields[name][rows], pairs.fields[name])


def test_more_pairs_than_items_repeat_all_equally_often():
    pairs = pair_by_class(two_sets(), size=36, seed=0)
    assert torch.bincount(pairs.labels).tolist() == [8, 16, 12]
    for name in two_sets():
        for c in range(3):
            times = pairs.fields[f"item_{name}"][pairs.labels == c].unique(return_counts=True)[1]
            assert times.max() - times.min() <= 1


def test_pairs_are_a_function_of_the_seed():
    first, again, other = (pair_by_class(two_sets(), size=20, seed=seed) for seed in (1, 1, 2))
    for name in ("item_image", "item_spectrogram", "label"):
        assert torch.equal(first.fields[name], again.fields[name])
    assert not torch.equal(first.fields["item_image"], other.fields["item_image"])


def test_sets_of_other_classes_and_a_class_without_items_are_refused():
    sets = two_sets()
    renamed = Samples({k: v for k, v in sets["image"].fields.items()}, ["eins", "zwei", "drei"])
    with pytest.raises(UserError, match="different classes"):
        pair_by_class({**sets, "image": renamed}, seed=0)
    with pytest.raises(UserError, match="'image' has no item of class 'two'"):
        pair_by_class({**sets, "image": one_set("image", (5, 0, 3))}, seed=0)


def test_pairing_by_index_drops_or_keeps_what_a_set_lacks():
    depth = Samples(
        {
            "depth": torch.arange(4.0)[:, None] + 1,
            "index": torch.tensor([9, 2, 5, 7]),
            "label": torch.tensor([0, 1, 2, 0]),
        }
    )
    image = Samples(
        {"image": torch.arange(3.0)[:, None] + 1, "index": torch.tensor([2, 3, 7]), "label": torch.tensor([1, 0, 0])}
    )
    image.classes = depth.classes
    both = pair_by_index({"image": image, "depth": depth})
    assert both.index.tolist() == [2, 7] and both.labels.tolist() == [1, 0]
    assert both.fields["image"].flatten().tolist() == [1, 3] and both.fields["depth"].flatten().tolist() == [2, 4]
    kept = pair_by_index({"image": image, "depth": depth}, incomplete="keep")
    assert kept.index.tolist() == [2, 3, 5, 7, 9] and kept.labels.tolist() == [1, 0, 2, 0, 0]
    assert kept.fields["present_image"].tolist() == [True, True, False, True, False]
    assert kept.fields["image"].flatten().tolist() == [1, 2, 0, 3, 0]
    assert kept.fields["item_depth"].tolist() == [2, -1, 5, 7, 9]


def test_pairing_by_index_refuses_contradictions():
    image = Samples({"image": torch.ones(2, 1), "index": torch.tensor([1, 2]), "label": torch.tensor([0, 1])})
    wrong = Samples(
        {"depth": torch.ones(2, 1), "index": torch.tensor([1, 2]), "label": torch.tensor([0, 0])}, image.classes
    )
    twice = Samples(
        {"depth": torch.ones(2, 1), "index": torch.tensor([1, 1]), "label": torch.tensor([0, 0])}, image.classes
    )
    apart = Samples({"depth": torch.ones(2, 1), "index": torch.tensor([3, 4]), "label": torch.tensor([0, 1])})
    for depth, match in (
        (wrong, "index 2 has the label 0"),
        (twice, "holds an index twice"),
        (apart, "share no index"),
    ):
        with pytest.raises(UserError, match=match):
            pair_by_index({"image": image, "depth": depth})


def arrays(first: int) -> dict:
    """A set in memory with 8 training and 4 test items of two classes."""
    label = torch.arange(2)
    return {
        "train": {"image": first + torch.arange(8.0)[:, None], "label": label.repeat(4)},
        "test": {"image": first + 50 + torch.arange(4.0)[:, None], "label": label.repeat(2)},
    }


def load(**more):
    modalities = {"image": {"name_or_path": arrays(0)}, "depth": {"name_or_path": arrays(100), "field": "image"}}
    return load_multimodal(modalities, target="depth", **more)


def test_no_item_of_any_modality_is_in_two_splits():
    data = load(validation_fraction=0.25, size={"train": 30, "validation": 10})
    assert data.modalities == ("image", "depth") and (len(data.train), len(data.validation)) == (30, 10)
    for name in data.modalities:
        seen = [set(split.fields[name].flatten().tolist()) for split in (data.train, data.validation, data.test)]
        assert all(not a & b for a, b in itertools.combinations(seen, 2))
        assert [len(s) for s in seen] == [6, 2, 4]


def test_a_share_of_a_modality_can_be_missing_but_not_of_the_target():
    data = load(missing={"image": 0.5})
    present = data.train.fields["present_image"]
    assert present.sum() == 4 and (data.train.fields["image"][~present] == 0).all()
    with pytest.raises(UserError, match="target modality 'depth' must not be missing"):
        load(missing={"depth": 0.5})
    with pytest.raises(UserError, match="at least two"):
        load_multimodal({"image": {"name_or_path": arrays(0)}}, target="image")
    with pytest.raises(UserError, match="no field 'thermal'"):
        load_multimodal({"image": {"name_or_path": arrays(0)}, "thermal": {"name_or_path": arrays(0)}}, target="image")


def test_a_modality_missing_where_it_may_not_is_named():
    samples = drop_at_random(Samples({"image": torch.ones(4, 1), "depth": torch.ones(4, 1)}), {"depth": 0.5}, seed=0)
    require_modalities(samples, ["image"], "which the student reads")
    with pytest.raises(UserError, match="'depth', which the student reads, is missing in 2 of 4 samples, first in row"):
        require_modalities(samples, ["image", "depth"], "which the student reads")
    with pytest.raises(UserError, match="no modality 'audio'"):
        require_modalities(samples, ["audio"], "which the student reads")
    data = load()
    with pytest.raises(UserError, match="does not say what it reads"):
        require_modalities_of(data, student=torch.nn.Linear(1, 1))


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9])
def test_drawn_modalities_are_never_none_and_come_with_the_stated_probability(keep):
    names = ("a", "b", "c")
    generator = torch.Generator().manual_seed(0)
    present = draw_present(20_000, names, keep=keep, generator=generator)
    drawn = torch.stack([present[name] for name in names])
    assert drawn.any(0).all()
    expected = keep / (1 - (1 - keep) ** 3)
    assert (drawn.float().mean(1) - expected).abs().max() < 0.02
    alone = keep * (1 - keep) ** 2 / (1 - (1 - keep) ** 3)
    assert abs(float((drawn.sum(0) == 1).float().mean()) - 3 * alone) < 0.02


def test_what_is_always_kept_does_not_change_how_often_others_are():
    present = draw_present(20_000, ("a", "b"), keep=0.4, always=("b",), generator=torch.Generator().manual_seed(0))
    assert present["b"].all() and abs(float(present["a"].float().mean()) - 0.4) < 0.02
    assert all(value.all() for value in draw_present(50, ("a", "b"), keep=1.0).values())
    with pytest.raises(UserError, match="keep is 0"):
        draw_present(5, ("a", "b"), keep=0.0)


def test_nothing_is_left_of_a_dropped_modality():
    fields = {"a": torch.full((3, 2), torch.nan), "b": torch.ones(3, 2), "present_b": torch.tensor([True, False, True])}
    kept = {"a": torch.tensor([False, False, False]), "b": torch.tensor([True, True, False])}
    changed = drop_modalities(fields, kept)
    assert torch.equal(changed["a"], torch.zeros(3, 2)) and changed["b"][:, 0].tolist() == [1, 0, 0]
    assert changed["present_b"].tolist() == [True, False, False]  # what was missing stays missing
    assert isinstance(changed["present_a"], Tensor) and "present_a" not in fields


@pytest.mark.skipif(not (data_folder() / "fsdd").is_dir(), reason="needs LIMBECK_DATA with mnist and fsdd")
def test_av_mnist_pairs_spoken_with_written_digits():
    modalities = {
        "image": {"name_or_path": "mnist", "limit": {"train": 100, "test": 100}},
        "spectrogram": {"name_or_path": "fsdd", "limit": {"train": 50, "test": 40}, "seconds": 0.5, "n_mels": 32},
    }
    data = load_multimodal(modalities, target="spectrogram", size={"train": 90})
    assert data.name == "mnist+fsdd" and len(data.train) == 90 and data.num_classes == 10
    assert data.train.fields["image"].shape[1:] == (1, 28, 28) and data.train.fields["image"].dtype == torch.uint8
    assert data.train.fields["spectrogram"].shape[1:3] == (1, 32)
