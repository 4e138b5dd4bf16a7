import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from limbeck.data import Samples, Stream, Weak
from limbeck.data.images import EncodedImages
from limbeck.errors import UserError


def samples(n):
    return Samples(
        {"image": torch.arange(n).view(n, 1, 1, 1).expand(n, 1, 4, 4).byte(), "label": torch.zeros(n).long()}
    )


def png(value):
    file = io.BytesIO()
    Image.new("L", (4, 4), value).save(file, format="PNG")
    return file.getvalue()


def lazy(n):
    return Samples({"image": EncodedImages([png(i) for i in range(n)])})


def opened(data, batch_size, name="labelled", seed=0, rank=0, world_size=1, **settings):
    stream = Stream(data, batch_size, **settings)
    stream.open(name, seed, rank, world_size)
    return stream


def indices(stream, steps):
    return [stream.next()["index"].tolist() for _ in range(steps)]


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 40), batch_size=st.integers(1, 9), world=st.integers(1, 3), seed=st.integers(0, 9))
def test_ranks_together_take_disjoint_consecutive_parts_of_one_permutation(n, batch_size, world, seed):
    if batch_size * world > n:
        return
    streams = [opened(samples(n), batch_size, seed=seed, rank=r, world_size=world) for r in range(world)]
    alone = opened(samples(n), batch_size * world, seed=seed)
    steps = streams[0].steps_per_epoch
    assert steps == n // (batch_size * world)
    for _ in range(2):
        seen = [row for parts in zip(*(indices(s, steps) for s in streams), strict=True) for p in parts for row in p]
        assert seen == [row for part in indices(alone, steps) for row in part]
        assert len(set(seen)) == len(seen) == steps * batch_size * world


def test_epochs_seeds_and_names_have_different_orders_and_equal_ones_the_same():
    a = indices(opened(samples(50), 50), 2)
    assert a == indices(opened(samples(50), 50), 2)
    assert sorted(a[0]) == sorted(a[1]) == list(range(50)) and a[0] != a[1]
    assert a != indices(opened(samples(50), 50, seed=1), 2)
    assert a != indices(opened(samples(50), 50, name="unlabelled"), 2)


@settings(max_examples=25, deadline=None)
@given(
    k=st.integers(0, 12),
    n=st.integers(3, 20),
    batch_size=st.integers(1, 25),
    cycle=st.booleans(),
    seed=st.integers(0, 3),
)
def test_a_loaded_place_gives_exactly_the_rest(k, n, batch_size, cycle, seed):
    def fresh():
        return opened(samples(n), batch_size, seed=seed, cycle=cycle, drop_last=False)

    stream = fresh()
    indices(stream, k)
    resumed = fresh()
    resumed.load_state_dict(stream.state_dict())
    assert indices(resumed, 7) == indices(stream, 7)
    assert resumed.state_dict() == stream.state_dict()


@pytest.mark.parametrize("k", [0, 2, 3, 5])
def test_workers_give_the_same_order_and_resume_in_mid_epoch(k):
    plain = opened(lazy(10), 3)
    ahead = opened(lazy(10), 3, workers=2)
    state = torch.get_rng_state()
    assert indices(ahead, k) == indices(plain, k)
    resumed = opened(lazy(10), 3, workers=1)
    resumed.load_state_dict(ahead.state_dict())
    batch, expected = resumed.next(), plain.next()
    assert (
        torch.equal(batch["image"], expected["image"])
        and batch["image"][:, 0, 0, 0].tolist() == batch["index"].tolist()
    )
    assert indices(resumed, 4) == indices(plain, 4)
    assert torch.equal(torch.get_rng_state(), state)  # the views' draws are not disturbed


def test_a_worker_that_meets_a_broken_image_raises_one_sentence(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for i, file in enumerate(files):
        file.write_bytes(png(i))
    stream = opened(Samples({"image": EncodedImages(files)}), 4, workers=1)
    files[2].write_bytes(b"no picture")
    with pytest.raises(UserError) as caught:
        stream.next()
    assert str(files[2]) in str(caught.value) and "\n" not in str(caught.value)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 8), batch_size=st.integers(1, 20), world=st.integers(1, 2))
def test_a_cycled_stream_gives_full_batches_and_each_sample_equally_often(n, batch_size, world):
    streams = [opened(samples(n), batch_size, rank=r, world_size=world, cycle=True) for r in range(world)]
    steps = n  # after n steps every sample came exactly batch_size * world times
    seen = [row for s in streams for part in indices(s, steps) for row in part]
    assert torch.bincount(torch.tensor(seen), minlength=n).tolist() == [batch_size * world] * n


def test_a_short_last_batch_holds_the_rest_and_ranks_share_it_equally():
    assert [len(b) for b in indices(opened(samples(10), 4, drop_last=False), 4)] == [4, 4, 2, 4]
    last = [indices(opened(samples(11), 4, rank=r, world_size=2, drop_last=False), 2)[1] for r in range(2)]
    assert [len(rows) for rows in last] == [2, 2]
    assert len(set(last[0] + last[1])) == 4  # three that were left over and the epoch's first


def test_unshuffled_streams_go_in_order():
    assert indices(opened(samples(5), 2, shuffle=False, drop_last=False), 3) == [[0, 1], [2, 3], [4]]


def test_a_stream_shorter_than_a_step_is_refused_with_the_mend():
    with pytest.raises(UserError, match=r"stream 'labelled' has 40 samples but one step takes 64 .*cycle=True"):
        opened(samples(40), 64)
    opened(samples(40), 64, cycle=True)
    assert len(opened(samples(40), 64, drop_last=False).next()["index"]) == 40


def test_a_place_of_another_set_is_refused():
    with pytest.raises(UserError, match="belongs to samples=8, the stream has samples=9"):
        opened(samples(9), 2).load_state_dict(opened(samples(8), 2).state_dict())


def test_rendering_scales_images_applies_views_and_records_parameters():
    stream = opened(samples(8), 4, views={"weak": Weak(padding=1), "plain": Weak(0, flip=False)}, record=["weak"])
    batch = stream.next()
    rendered = stream.render(batch)
    assert torch.equal(rendered["image"], batch["image"].float() / 255)
    assert torch.equal(rendered["plain"], rendered["image"])
    replayed = stream.views["weak"].apply(rendered["image"], rendered["weak_params"])
    assert torch.equal(replayed, rendered["weak"])
    assert rendered["label"].dtype == torch.int64
