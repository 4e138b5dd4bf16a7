"""Batches that are drawn once and come again exactly, and what they take to store."""

from __future__ import annotations

import pytest
import torch

from limbeck.data import Mix, MultiCrop
from limbeck.data.replay import Replay, draw_replay, present, soft_label_bytes, stored_bytes
from limbeck.errors import UserError

PICTURES = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def drawn(**settings) -> Replay:
    return draw_replay(20, (8, 8), **{"epochs": 3, "batch_size": 8, **settings})


def test_every_epoch_shows_every_picture_once_in_another_order():
    replay = drawn()
    assert len(replay) == 9
    epochs = [replay.picture[3 * n : 3 * n + 3].flatten() for n in range(3)]
    for epoch in epochs:
        assert epoch[epoch >= 0].sort().values.tolist() == list(range(20))
        assert (epoch < 0).sum() == 4 and bool((epoch[-4:] < 0).all())  # the last batch has 4 of 8 rows
    assert not torch.equal(epochs[0], epochs[1])


def test_what_is_replayed_from_the_stored_columns_is_bit_for_bit_the_same():
    replay = drawn()
    again = Replay(**{name: value.clone() for name, value in replay.columns().items()})
    for first, second in zip(replay.batches(PICTURES), again.batches(PICTURES), strict=True):
        assert torch.equal(first, second)


def test_a_batch_is_the_crop_the_flip_and_the_box_that_are_stored():
    replay = drawn()
    for number, batch in enumerate(replay.batches(PICTURES)):
        rows = len(batch)
        crop = {"box": replay.box[number, :rows, None], "flip": replay.flip[number, :rows, None]}
        crops = MultiCrop(crops=1).apply(PICTURES[replay.picture[number, :rows]].float() / 255, crop)[:, 0]
        top, bottom, left, right = replay.cut[number].tolist()
        expected = crops.clone()
        expected[:, :, top:bottom, left:right] = crops[replay.partner[number, :rows], :, top:bottom, left:right]
        assert torch.equal(batch, expected)


def test_without_cutmix_pictures_stay_whole():
    replay = drawn(cutmix_alpha=None)
    assert not replay.cut.any()
    number = next(replay.batches(PICTURES))
    crop = {"box": replay.box[0, :, None], "flip": replay.flip[0, :, None]}
    assert torch.equal(number, MultiCrop(crops=1).apply(PICTURES[replay.picture[0]].float() / 255, crop)[:, 0])


def test_the_draw_depends_on_its_seed_alone_and_leaves_the_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = drawn(seed=42)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first.columns().values(), drawn().columns().values(), strict=True))
    assert not torch.equal(first.box, drawn(seed=7).box)


def test_one_row_of_the_samples_is_one_batch_with_its_labels():
    replay = drawn()
    samples = replay.samples(logits=torch.zeros(9, 8, 5))
    row = samples.batch(torch.tensor([4]))
    assert row["picture"].shape == (1, 8) and row["logits"].shape == (1, 8, 5)
    stored = {name: value[0] for name, value in row.items() if name in replay.columns()}
    assert torch.equal(present(PICTURES, stored, 8), list(replay.batches(PICTURES))[4])


def test_a_batch_that_cannot_be_halved_is_refused():
    with pytest.raises(UserError, match="20 pictures in batches of 9 leave a batch of 2"):
        drawn(batch_size=9)
    with pytest.raises(UserError, match="20 pictures in batches of 2 leave a batch of 2"):
        drawn(batch_size=2)


def test_bytes_are_those_of_the_tensors():
    assert stored_bytes([PICTURES, torch.zeros(5, dtype=torch.float16)]) == 20 * 3 * 64 + 10
    # 300 epochs of 1,000 classes and 1 picture each, in float16: 572 MiB (HeLlO, introduction)
    assert soft_label_bytes(300, 1000, 1000) / 2**20 == pytest.approx(572, abs=0.5)


def test_mixed_pixels_keep_their_own_where_the_mask_is_true():
    mix = Mix(torch.tensor([1, 0]), torch.tensor([0.5, 0.5]), torch.tensor([[[True, False]]] * 2))
    values = torch.tensor([[[[1.0, 2.0]]], [[[3.0, 4.0]]]])
    assert mix.pixels(values).flatten().tolist() == [1, 4, 3, 2]
