"""Facts about stored crops: they come back as the teacher saw them, and are drawn as a pure function of the place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck.data import Identity, MultiCrop, Samples, Stream
from limbeck.errors import UserError
from limbeck.models import TopK
from limbeck.teachers import CropReader, Frozen, Stored, StoredCrops, fill
from limbeck.teachers.crops import draw_versions

N, V, S = 40, 5, 4
CLASSES = 3 * S * S


def pictures(seed: int = 0) -> Samples:
    """Pictures 3x12x9 whose numbers are neither in order nor from 0."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (N, 3, 12, 9), generator=generator, dtype=torch.uint8)
    return Samples({"image": image, "label": torch.arange(N) % 7, "index": 1000 - 3 * torch.arange(N)})


def store(path, k: int = CLASSES, dtype="float32", versions: int = V) -> StoredCrops:
    """A teacher whose logits are the pixels of the crop that it sees: they tell whether two crops are the same."""
    settings = {"top_k": k, "dtype": dtype, "versions": versions, "values": "log_probabilities", "batch_size": 16}
    fill(path, Frozen(nn.Flatten()), pictures(), views={"crop": MultiCrop(1, S, (0.1, 0.6))}, **settings)
    return StoredCrops(Stored(path))


def everything(crops: StoredCrops, samples: Samples) -> Tensor:
    """Every stored crop, cut again, [N,V,C,S,S]."""
    params = crops.params(samples.index, crops.all_versions(samples.index))
    return MultiCrop(V, S).apply(samples.fields["image"].float() / 255, params)


def test_a_crop_that_is_cut_again_is_the_one_that_the_teacher_saw_flip_included(tmp_path):
    crops, samples = store(tmp_path / "store"), pictures()
    cut = everything(crops, samples)
    stored = crops.top_k(samples.index, crops.all_versions(samples.index), CLASSES)
    again = TopK.of(cut.flatten(2), CLASSES)
    torch.testing.assert_close(stored.dense(), again.dense(), rtol=0, atol=1e-6)
    flip = crops.params(samples.index, crops.all_versions(samples.index))["flip"]
    assert flip.dtype == torch.bool and 0.3 < flip.float().mean() < 0.7
    assert len(cut.flatten(2).flatten(0, 1).unique(dim=0)) == N * V


def test_half_precision_changes_probabilities_by_rounding_alone_and_leaves_no_negative_rest(tmp_path):
    exact, half = store(tmp_path / "exact", 5), store(tmp_path / "half", 5, "float16")
    index = pictures().index
    first, second = (crops.top_k(index, crops.all_versions(index), 5) for crops in (exact, half))
    assert torch.equal(first.ids, second.ids)
    torch.testing.assert_close(first.log_probs, second.log_probs, rtol=1e-3, atol=1e-3)
    assert (second.rest >= 0).all() and (second.log_probs <= 0).all()


def test_a_stream_replays_the_crops_that_the_reader_draws_in_another_size(tmp_path):
    crops, samples = store(tmp_path / "store", 5), pictures()
    survives = torch.rand(N, V, generator=torch.Generator().manual_seed(0)) < 0.7
    survives[:, 2] = True
    marked = torch.rand(N, V, generator=torch.Generator().manual_seed(1)) < 0.5
    reader = CropReader(crops, samples.index, survives, marked, num_crops=3, k=5)
    stream = Stream(samples, 8, {"crop": MultiCrop(3, 7)})
    stream.beside(reader)
    stream.open("labelled", seed=0)
    for _ in range(6):
        batch = stream.render(stream.next())
        row = (1000 - batch["index"]) // 3
        version = batch["crop_version"]
        assert survives[row[:, None], version].all()
        assert torch.equal(batch["crop_marked"], marked[row[:, None], version])
        box = crops.params(batch["index"], version)
        assert torch.equal(batch["crop"], MultiCrop(3, 7).apply(batch["image"], box))
        answer = crops.top_k(batch["index"], version, 5)
        assert torch.equal(batch["crop_ids"], answer.ids) and torch.equal(batch["crop_log_probs"], answer.log_probs)
        seen = MultiCrop(3, S).apply(batch["image"], batch["crop_params"]).flatten(2)
        assert torch.equal(TopK.of(seen, 5).ids, batch["crop_ids"])


def test_a_reader_is_a_function_of_seed_and_place_and_draws_no_global_numbers(tmp_path):
    crops, index = store(tmp_path / "store", 5), pictures().index
    all_of_them = torch.ones(N, V, dtype=torch.bool)
    reader, same = (CropReader(crops, index, all_of_them, all_of_them, num_crops=3, k=5) for _ in range(2))
    other = CropReader(crops, index, all_of_them, all_of_them, num_crops=3, k=5, seed=1)
    before = torch.get_rng_state()
    first = reader(index[:9], 2, 3)["crop_version"]
    assert torch.equal(torch.get_rng_state(), before)
    reader(index[5:9], 0, 0)
    assert torch.equal(first, same(index[:9], 2, 3)["crop_version"])
    for changed in (other(index[:9], 2, 3), same(index[:9], 3, 3), same(index[:9], 2, 4)):
        assert not torch.equal(first, changed["crop_version"])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), versions=st.integers(1, 9), num_crops=st.integers(1, 6))
def test_only_survivors_are_drawn_each_once_before_any_comes_twice(seed, versions, num_crops):
    generator = torch.Generator().manual_seed(seed)
    survives = torch.rand(30, versions, generator=generator) < 0.5
    survives[torch.arange(30), torch.randint(versions, (30,), generator=generator)] = True
    drawn = draw_versions(survives, num_crops, generator)
    assert drawn.shape == (30, num_crops)
    assert survives.gather(1, drawn).all()
    for row, alive in zip(drawn.tolist(), survives.sum(1).tolist(), strict=True):
        assert len(set(row)) == min(num_crops, alive)


def test_every_survivor_is_drawn_equally_often():
    survives = torch.tensor([[True, False, True, True, True]]).expand(8000, -1)
    counts = draw_versions(survives, 2, torch.Generator().manual_seed(0)).flatten().bincount(minlength=5) / 8000
    torch.testing.assert_close(counts, torch.tensor([0.5, 0, 0.5, 0.5, 0.5]), rtol=0, atol=0.02)


def test_a_store_without_crops_and_other_pictures_are_refused(tmp_path):
    fill(tmp_path / "plain", Frozen(nn.Flatten()), pictures(), views={"image": Identity()})
    with pytest.raises(UserError, match="holds no labels of crops: it has the views image"):
        StoredCrops(Stored(tmp_path / "plain"))
    fill(tmp_path / "two", Frozen(nn.Sequential(nn.Flatten())), pictures(), views={"crop": MultiCrop(1, S)}, versions=2)
    crops = StoredCrops(Stored(tmp_path / "two"))
    crops.stored.check(pictures())
    with pytest.raises(UserError, match="40 of 40 samples differ"):
        crops.stored.check(pictures(seed=1))
