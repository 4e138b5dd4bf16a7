"""What a store holds after it was filled: at once, in pieces, by several processes, appended to."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.data import LogMixup, MultiCrop, On, Photometric, Samples, Strong, Weak
from limbeck.errors import UserError
from limbeck.teachers import EMA, Ensemble, Frozen, Store, fill
from limbeck.teachers import filling as fillings
from tests.teachers.stores import Everything, as_floats, net, samples, teacher


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.glob("shard-*.arrow")}


def test_every_sample_has_the_teachers_answer(tmp_path):
    store = fill(tmp_path, teacher(), samples(50), batch_size=16)
    rows = store.rows(np.arange(50))
    with torch.no_grad():
        expected = net().eval()(as_floats(samples(50)))
    torch.testing.assert_close(store.take("image/logits", rows), expected)
    assert len(store) == 50 and not (tmp_path / "filling").exists()


def test_all_kinds_of_outputs_are_kept(tmp_path):
    store = fill(tmp_path, Everything(), samples(20), keep=("logits", "embedding", "features"), batch_size=8)
    rows = store.rows(np.array([3, 17]))
    assert store.take("image/embedding", rows).shape == (2, 16)
    assert store.take("image/features.inner", rows).shape == (2, 4, 8, 8)


@pytest.mark.parametrize("view", [Weak(2), Strong(n=2, m=None), MultiCrop(1, scale=(0.1, 0.5)), Photometric()])
def test_a_stored_view_is_replayed_exactly(tmp_path, view):
    """The teacher, asked again about the replayed pictures, says what was stored."""
    images, asked = samples(24), teacher()
    store = fill(tmp_path, asked, images, views={"seen": view}, versions=3, batch_size=8)
    index, version = np.array([5, 5, 23, 0]), np.array([0, 2, 1, 2])
    rows = store.rows(index, version)
    names = [name for name in store.manifest.schema if name.startswith("seen/params.")]
    params = {name.removeprefix("seen/params."): store.take(name, rows) for name in names}
    shown = view.apply(as_floats(images)[index], params)
    shown = shown[:, 0] if shown.dim() == 5 else shown
    torch.testing.assert_close(asked.logits({"seen": shown}, "seen"), store.take("seen/logits", rows))


def test_versions_of_a_sample_are_drawn_anew(tmp_path):
    store = fill(tmp_path, teacher(), samples(40), views={"seen": Weak(3)}, versions=2, batch_size=8)
    first, second = (store.take("seen/params.shift", store.rows(np.arange(40), v)) for v in (0, 1))
    assert int((first == second).all(1).sum()) < 10
    neighbours = store.take("seen/params.shift", store.rows(np.arange(8), 0))
    assert not torch.equal(neighbours, store.take("seen/params.shift", store.rows(np.arange(8, 16), 0)))


def test_filling_draws_nothing_from_the_global_generators(tmp_path):
    state = torch.get_rng_state()
    fill(tmp_path, teacher(), samples(20), views={"seen": Weak(3)}, batch_size=8)
    assert torch.equal(state, torch.get_rng_state())


def test_answers_do_not_depend_on_how_many_samples_the_last_batch_has(tmp_path):
    """The last batch is filled up: a convolution of another batch size may round differently."""
    whole = fill(tmp_path / "a", teacher(), samples(32), batch_size=16)
    short = fill(tmp_path / "b", teacher(), samples(19), batch_size=16)
    rows = np.arange(19)
    assert torch.equal(whole.take("image/logits", rows), short.take("image/logits", rows))


def test_a_filling_that_broke_off_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(fillings, "BATCHES_PER_PART", 2)
    whole = fill(tmp_path / "whole", teacher(), samples(50), views={"seen": Weak(2)}, versions=2, batch_size=4)
    broken = teacher()
    calls = []
    answer = broken.model.forward

    def breaking(images):
        calls.append(len(images))
        if len(calls) > 9:
            raise KeyboardInterrupt
        return answer(images)

    monkeypatch.setattr(broken.model, "forward", breaking)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "broken", broken, samples(50), views={"seen": Weak(2)}, versions=2, batch_size=4)
    left = sorted(path.name for path in (tmp_path / "broken" / "filling").glob("part-*"))
    assert 0 < len(left) < 7
    with pytest.raises(UserError, match="not complete"):
        Store(tmp_path / "broken")
    fill(tmp_path / "broken", teacher(), samples(50), views={"seen": Weak(2)}, versions=2, batch_size=4)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    assert Store(tmp_path / "broken").manifest == whole.manifest


def _share(path: str, number: int) -> None:
    torch.set_num_threads(1)
    fillings.BATCHES_PER_PART = 1
    fill(path, teacher(), samples(60), batch_size=8, share=(number, 2))


def test_two_processes_fill_the_store_of_one(tmp_path, monkeypatch):
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_share, args=(str(tmp_path / "two"), number)) for number in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    monkeypatch.setattr(fillings, "BATCHES_PER_PART", 1)
    fill(tmp_path / "one", teacher(), samples(60), batch_size=8)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_new_samples_are_appended_and_old_rows_stay(tmp_path):
    fill(tmp_path, teacher(), samples(30), batch_size=8)
    before = contents(tmp_path)
    store = fill(tmp_path, teacher(), samples(50), batch_size=8)
    assert len(store) == 50 and before.items() <= contents(tmp_path).items()
    with torch.no_grad():
        expected = net().eval()(as_floats(samples(50)))
    torch.testing.assert_close(store.take("image/logits", store.rows(np.arange(50))), expected)
    store.verify()
    assert contents(tmp_path) == {**contents(tmp_path), **before}


def test_a_complete_store_is_not_filled_again(tmp_path, monkeypatch):
    asked = teacher()
    fill(tmp_path, asked, samples(30), batch_size=8)
    monkeypatch.setattr(asked.model, "forward", None)
    assert len(fill(tmp_path, asked, samples(30), batch_size=8)) == 30


def test_rows_are_spread_over_shards_of_limited_size(tmp_path, monkeypatch):
    monkeypatch.setattr(fillings, "BATCHES_PER_PART", 1)
    monkeypatch.setattr(fillings, "SHARD_BYTES", 1500)
    store = fill(tmp_path, teacher(), samples(60), batch_size=8)
    assert len(store.manifest.shards) > 2
    with torch.no_grad():
        expected = net().eval()(as_floats(samples(60)))
    index = torch.randperm(60).numpy()
    torch.testing.assert_close(store.take("image/logits", store.rows(index)), expected[index])


def test_samples_in_any_order_make_the_same_store(tmp_path):
    fill(tmp_path / "a", teacher(), samples(40), batch_size=8)
    fill(tmp_path / "b", teacher(), samples(40).select(torch.randperm(40)), batch_size=8)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"teacher": teacher(1)}, "another teacher"),
        ({"samples": samples(40, seed=1)}, "other data"),
        ({"dtype": "float16"}, "dtype='float32'"),
        ({"top_k": 2}, "top_k=None"),
        ({"views": {"seen": Weak(1)}}, "views="),
        ({"seed": 1}, "seed=0"),
    ],
)
def test_something_else_in_the_folder_is_named(tmp_path, change, said):
    asked = {"teacher": teacher(), "samples": samples(40), "batch_size": 8}
    fill(tmp_path, **asked)
    with pytest.raises(UserError, match=said):
        fill(tmp_path, **{**asked, **change})


def test_a_filling_under_way_belongs_to_its_settings(tmp_path):
    (tmp_path / "filling").mkdir()
    asked = fillings.Filling(
        tmp_path, teacher(), samples(40), views=None, field="image", answers=fillings.Answers(), batch_size=8
    )
    assert json.loads((tmp_path / "filling" / "plan.json").read_text())["settings"] == asked.settings
    with pytest.raises(UserError, match="is being filled with batch_size=8, here it is 4"):
        fill(tmp_path, teacher(), samples(40), batch_size=4)
    with pytest.raises(UserError, match="is being filled from other data"):
        fill(tmp_path, teacher(), samples(39), batch_size=8)


def test_views_that_cannot_be_stored_are_refused(tmp_path):
    with pytest.raises(UserError, match="makes 2 crops at once"):
        fill(tmp_path / "a", teacher(), samples(8), views={"seen": MultiCrop(2)}, batch_size=4)
    with pytest.raises(UserError, match="depends on the samples before"):
        fill(tmp_path / "b", teacher(), samples(8), views={"seen": LogMixup()}, batch_size=4)
    with pytest.raises(UserError, match="has the name of a field"):
        fill(tmp_path / "c", teacher(), samples(8), views={"image": Weak(1)}, batch_size=4)


def test_a_view_on_a_view_is_stored_with_both_draws(tmp_path):
    views = {"weak": Weak(2), "strong": On("weak", Photometric())}
    store = fill(tmp_path, teacher(), samples(16), views=views, batch_size=8)
    assert {"weak/params.shift", "strong/params.factors", "weak/logits", "strong/logits"} <= set(store.manifest.schema)


def test_two_samples_of_one_number_are_refused(tmp_path):
    twice = Samples({"image": samples(2).fields["image"], "index": torch.tensor([4, 4])})
    with pytest.raises(UserError, match="the number 4"):
        fill(tmp_path, teacher(), twice)


def test_outputs_that_the_teacher_lacks_are_named(tmp_path):
    with pytest.raises(UserError, match="gives no embedding"):
        fill(tmp_path, teacher(), samples(8), keep=("embedding",))


def test_answers_that_are_not_finite_stop_the_filling(tmp_path):
    broken = teacher()
    torch.nn.init.constant_(broken.model[5].bias, torch.nan)
    with pytest.raises(UserError, match="NaN or infinity"):
        fill(tmp_path, broken, samples(8))


def test_fingerprints_tell_weights_buffers_and_members_apart():
    one, other = teacher(), teacher(1)
    assert one.fingerprint() == teacher().fingerprint() != other.fingerprint()
    moved = teacher()
    moved.model[1].running_mean += 1
    assert moved.fingerprint() != one.fingerprint()
    assert Ensemble([one, other]).fingerprint() != Ensemble([one, other], weights=[1, 2]).fingerprint()
    assert Ensemble([one, other]).fingerprint() != Ensemble([other, one]).fingerprint()
    assert isinstance(Frozen(EMA(net(), 0.9)).fingerprint(), str)
