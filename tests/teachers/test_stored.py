"""A method learns from a store what it would learn from the teacher itself, or is told why it cannot."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from limbeck.data import Identity, Photometric, Samples, Stream, Weak, load_language
from limbeck.errors import UserError
from limbeck.methods.classification.kd import KD
from limbeck.methods.language.token_kd import TokenKD
from limbeck.models import load_language_model, load_model
from limbeck.teachers import Ensemble, Frozen, Stored, Teacher, fill
from limbeck.train import Batch, Losses, Method, Optimizer, Trainer, Workspace, fit
from tests.teachers.stores import CLASSES, Everything, as_floats, net, samples, teacher

SIZE = 16


def train(method: Method, part: Samples, views: dict, *, steps: int = 12, **trainer) -> torch.Tensor:
    stream = Stream(part, SIZE, views, view_field="tokens" if "tokens" in part.fields else "image")
    fit(method, {"labelled": stream}, Trainer(steps=steps, optimizer=Optimizer("sgd", lr=0.05), **trainer))
    return torch.cat([parameter.detach().flatten() for parameter in method.student.parameters()])


def student() -> nn.Module:
    torch.manual_seed(3)
    return load_model("small_cnn", num_classes=CLASSES, config={"channels": [4, 8, 8]})


def test_a_dense_float32_store_gives_the_very_weights_of_a_live_teacher(tmp_path):
    fill(tmp_path, teacher(), samples(64), batch_size=SIZE, memory_format=torch.channels_last)
    live = train(KD(student(), teacher()), samples(64), {"weak": Identity()})
    stored = train(KD(student(), Stored(tmp_path)), samples(64), {"weak": Identity()})
    assert torch.equal(live, stored)


def test_replayed_views_give_the_weights_of_a_live_teacher_that_sees_them(tmp_path):
    """One version: the stored draws are shown in every epoch, and the live teacher is asked about what is shown."""
    fill(tmp_path, teacher(), samples(64), views={"weak": Weak(2)}, batch_size=SIZE)
    stored = Stored(tmp_path)

    class Asked(Teacher):
        """The live teacher, while the store's draws are replayed."""

        def join(self, streams) -> None:
            stored.join(streams)

        def __call__(self, fields, view):
            said = teacher()(fields, view)
            torch.testing.assert_close(said.logits, stored.logits(fields, view))
            return said

    asked = train(KD(student(), Asked()), samples(64), {"weak": Weak(2)})
    torch.testing.assert_close(
        train(KD(student(), Stored(tmp_path)), samples(64), {"weak": Weak(2)}), asked, atol=1e-4, rtol=1e-3
    )


def test_epochs_show_one_version_after_another(tmp_path):
    fill(tmp_path, teacher(), samples(32), views={"weak": Weak(3)}, versions=3, batch_size=SIZE)
    stored, stream = Stored(tmp_path), Stream(samples(32), SIZE, {"weak": Weak(3)})
    stream.open("labelled", seed=0)
    stored.join({"labelled": stream})
    seen = [stream.render(stream.next()) for _ in range(8)]
    assert [int(batch["weak_version"][0]) for batch in seen] == [0, 0, 1, 1, 2, 2, 0, 0]
    for batch in seen:
        expected = Weak(3).apply(as_floats(samples(32))[batch["index"]], batch["weak_params"])
        assert torch.equal(batch["weak"], expected)
        torch.testing.assert_close(stored.logits(batch, "weak"), teacher().logits(batch, "weak"))


def test_a_stream_that_goes_on_reads_what_an_uninterrupted_one_reads(tmp_path):
    fill(tmp_path, teacher(), samples(48), views={"weak": Weak(3)}, versions=2, batch_size=SIZE)

    def batches(resume_at: int | None) -> list:
        stream = Stream(samples(48), SIZE, {"weak": Weak(3)})
        stream.open("labelled", seed=0)
        Stored(tmp_path).join({"labelled": stream})
        seen = []
        for number in range(7):
            if number == resume_at:
                state = stream.state_dict()
                stream.open("labelled", seed=0)
                stream.load_state_dict(state)
            seen.append(stream.render(stream.next())["weak"])
        return seen

    for whole, resumed in zip(batches(None), batches(4), strict=True):
        assert torch.equal(whole, resumed)


def test_a_teacher_is_asked_by_index_where_no_stream_was_joined(tmp_path):
    fill(tmp_path, teacher(), samples(32), batch_size=SIZE)
    index = torch.tensor([7, 0, 31])
    fields = {"index": index, "image": as_floats(samples(32))[index]}
    torch.testing.assert_close(Stored(tmp_path).logits(fields, "image"), teacher().logits(fields, "image"))


def test_embeddings_and_features_come_back(tmp_path):
    fill(tmp_path, Everything(), samples(32), keep=("embedding", "features"), dtype="bfloat16", batch_size=SIZE)
    fields = {"index": torch.arange(5), "image": as_floats(samples(5))}
    stored, live = Stored(tmp_path)(fields, "image"), Everything()(fields, "image")
    assert stored.logits is None
    torch.testing.assert_close(stored.embedding, live.embedding, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(stored.features["inner"], live.features["inner"], atol=1e-2, rtol=1e-2)
    with pytest.raises(UserError, match="gives no logits"):
        Stored(tmp_path).logits(fields, "image")


def test_the_likeliest_are_filled_up_or_kept_sparse(tmp_path):
    fill(tmp_path, teacher(), samples(32), top_k=3, batch_size=SIZE)
    stored, fields = Stored(tmp_path), {"index": torch.arange(8), "image": as_floats(samples(8))}
    live = teacher().top_k(fields, "image", 3)
    assert torch.equal(stored.top_k(fields, "image", 2).ids, live.cut(2).ids)
    torch.testing.assert_close(stored.logits(fields, "image"), live.dense(), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="kept 3 classes an item, 4 are wanted"):
        stored.top_k(fields, "image", 4)


def test_samples_of_several_streams_are_answered_from_one_store(tmp_path):
    class Both(Method):
        streams = {"labelled": ("weak", "label"), "unlabelled": ("weak",)}

        def __init__(self, teacher: Teacher) -> None:
            super().__init__()
            self.student, self.teacher = student(), teacher

        def training_step(self, batch: Batch) -> Losses:
            return {
                name: (self.student(fields["weak"]) - self.teacher.logits(fields, "weak")).square().mean()
                for name, fields in batch.items()
            }

    fill(tmp_path, teacher(), samples(64), batch_size=SIZE)
    for part, rest in ((samples(32), samples(32, first=32)), (samples(32), samples(32, first=100))):
        streams = {
            "labelled": Stream(part, SIZE, {"weak": Identity()}),
            "unlabelled": Stream(rest, SIZE, {"weak": Identity()}),
        }
        method = Both(Stored(tmp_path))
        if int(rest.index[0]) == 100:  # the method asks about samples that the store does not know
            with pytest.raises(UserError, match="no answer for"):
                fit(method, streams, Trainer(steps=2))
        else:
            fit(method, streams, Trainer(steps=2))


def tokens(rows: int = 24, response: str = "foo bar"):
    given = {"prompt": ["a b", "cd e", "xyz"] * 8, "response": [response, "q", "hello there"] * 8}
    test = {"prompt": ["a"], "response": ["b"]}
    corpus = {"prompt": ["abcdefghijklmnopqrstuvwxyz "], "response": ["abcdefghijklmnopqrstuvwxyz"]}
    data = load_language({"train": {k: given[k] + corpus[k] for k in given}, "test": test}, max_length=64)
    return data, data.train.select(torch.arange(rows))


def language_model(words: int, seed: int, width: int) -> nn.Module:
    torch.manual_seed(seed)
    config = {
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }  # fmt: skip
    return load_language_model("hf-config:llama", vocab_size=words, max_length=64, config=config)


def test_tokens_that_are_scored_have_the_live_teachers_answers(tmp_path):
    data, part = tokens()
    live = Frozen(language_model(data.vocab_size, 0, 32))
    fill(tmp_path, live, part, field="tokens", batch_size=8)
    stored = Stored(tmp_path)
    ours = [train(TokenKD(language_model(data.vocab_size, 1, 16), t), part, {}, steps=6) for t in (live, stored)]
    assert torch.equal(*ours)
    scored = int((part.fields["labels"][:, 1:] != -100).sum())
    assert int(stored.store.count_tokens(np.arange(24)).sum()) == scored


def test_sparse_tokens_are_uniform_where_nothing_was_scored(tmp_path):
    data, part = tokens()
    live = Frozen(language_model(data.vocab_size, 0, 32))
    fill(tmp_path, live, part, field="tokens", top_k=4, values="log_probabilities", dtype="float16", batch_size=8)
    batch = part.batch(torch.tensor([3, 1, 8]))
    stored, direct = Stored(tmp_path).top_k(batch, "tokens", 4), live.top_k(batch, "tokens", 4)
    scored = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
    assert torch.equal(stored.ids[scored], direct.ids[scored])
    torch.testing.assert_close(stored.log_probs[scored], direct.log_probs[scored], atol=5e-3, rtol=1e-2)
    uniform = stored.dense()[~scored].exp()
    torch.testing.assert_close(uniform, torch.full_like(uniform, 1 / data.vocab_size))


def test_a_store_of_other_labels_is_refused(tmp_path):
    """The same texts, but now the prompt is scored too."""
    data, part = tokens()
    fill(tmp_path, Frozen(language_model(data.vocab_size, 0, 32)), part, field="tokens", batch_size=8)
    all_scored = part.fields["tokens"]["input_ids"].masked_fill(part.fields["tokens"]["attention_mask"] == 0, -100)
    with pytest.raises(UserError, match="scores tokens that the store"):
        train(
            TokenKD(language_model(data.vocab_size, 1, 16), Stored(tmp_path)),
            part.with_fields({"labels": all_scored}),
            {},
        )


def test_another_vocabulary_is_refused_before_training(tmp_path):
    data, part = tokens()
    fill(tmp_path, Frozen(language_model(data.vocab_size, 0, 32)), part, field="tokens", batch_size=8)
    with pytest.raises(UserError, match="one tokenizer and one vocabulary"):
        TokenKD(language_model(data.vocab_size + 5, 1, 16), Stored(tmp_path))


@pytest.mark.parametrize(
    "part, views, said",
    [
        (samples(64, first=30), {"weak": Identity()}, "lacks 44 of the 64 samples of the stream 'labelled'"),
        (samples(64, first=500), {"weak": Identity()}, "knows none of the samples"),
        (samples(50, seed=9), {"weak": Identity()}, "other data"),
        (samples(50), {"weak": Weak(2)}, "answers for image"),
        (samples(50).without("image").with_fields({"features": torch.rand(50, 4)}), {}, "no such field"),
    ],
)
def test_what_does_not_fit_is_said_before_the_first_step(tmp_path, part, views, said):
    fill(tmp_path, teacher(), samples(50), batch_size=SIZE)
    method = KD(student(), Stored(tmp_path))
    if not views:
        views, method.streams = {}, {"labelled": ("label",)}
    stream = Stream(part, SIZE, views, view_field="image" if "image" in part.fields else "features")
    with pytest.raises(UserError, match=said):
        fit(method, {"labelled": stream}, Trainer(steps=1))


def test_a_view_that_differs_from_the_labelled_one_is_named(tmp_path):
    fill(tmp_path, teacher(), samples(50), views={"weak": Weak(2)}, batch_size=SIZE)
    with pytest.raises(UserError, match=r"Weak\(flip=True, padding=2\), and here it is Weak\(flip=True, padding=3\)"):
        train(KD(student(), Stored(tmp_path)), samples(50), {"weak": Weak(3)})


def test_one_stored_view_can_stand_for_all(tmp_path):
    """The student sees shifted pictures, the teacher answered for the plain ones."""
    fill(tmp_path, teacher(), samples(50), batch_size=SIZE)
    train(KD(student(), Stored(tmp_path, answer="image")), samples(50), {"weak": Weak(3)})
    fields = {"index": torch.arange(4), "weak": torch.rand(4, 3, 8, 8)}
    live = teacher().logits({"image": as_floats(samples(4))}, "image")
    torch.testing.assert_close(Stored(tmp_path, answer="image").logits(fields, "weak"), live)


def test_an_answer_that_stands_for_all_leaves_the_students_views_alone(tmp_path):
    """The store's own draws are not replayed, even where it has a view of the same name."""
    fill(tmp_path, teacher(), samples(32), views={"weak": Weak(2)}, versions=2, batch_size=SIZE)
    stored, stream = Stored(tmp_path, answer="weak"), Stream(samples(32), SIZE, {"weak": Weak(3), "strong": Weak(1)})
    stream.open("labelled", seed=0)
    stored.join({"labelled": stream})
    batch = stream.render(stream.next())
    assert "weak_params" not in batch and batch["weak"].shape == batch["strong"].shape
    expected = stored.store.take("weak/logits", stored.store.rows(batch["index"].numpy(), 0))
    assert torch.equal(stored.logits(batch, "strong"), expected)


def test_another_teacher_is_refused(tmp_path):
    fill(tmp_path, teacher(), samples(20), batch_size=SIZE)
    Stored(tmp_path, teacher=teacher())
    with pytest.raises(UserError, match="filled by another teacher"):
        Stored(tmp_path, teacher=teacher(1))


def test_other_classes_are_refused(tmp_path):
    fill(tmp_path, Frozen(net(classes=9)), samples(50), batch_size=SIZE)
    with pytest.raises(UserError, match="9 classes and the student 7"):
        train(KD(student(), Stored(tmp_path)), samples(50), {"weak": Identity()})


def test_stored_members_answer_in_an_ensemble(tmp_path):
    for seed in (0, 1):
        fill(tmp_path / str(seed), teacher(seed), samples(48), batch_size=SIZE)
    both = Ensemble([Stored(tmp_path / "0"), Stored(tmp_path / "1")])
    live = Ensemble([teacher(), teacher(1)])
    ours = [train(KD(student(), each), samples(48), {"weak": Identity()}) for each in (both, live)]
    torch.testing.assert_close(*ours, atol=1e-5, rtol=1e-4)


def test_two_stores_cannot_replay_one_view(tmp_path):
    for seed in (0, 1):
        fill(tmp_path / str(seed), teacher(seed), samples(48), views={"weak": Weak(2)}, batch_size=SIZE, seed=seed)
    with pytest.raises(UserError, match="two stores replay the view 'weak'"):
        train(KD(student(), Ensemble([Stored(tmp_path / "0"), Stored(tmp_path / "1")])), samples(48), {"weak": Weak(2)})


def test_a_workspace_fills_its_store_once(tmp_path, monkeypatch):
    ws = Workspace(tmp_path, {"method": {"name": "x"}})
    asked = teacher()
    first = ws.store("label", asked, samples(40), batch_size=SIZE)
    monkeypatch.setattr(asked.model, "forward", None)
    again = Workspace(tmp_path, {"method": {"name": "x"}}).store("label", asked, samples(40), batch_size=SIZE)
    assert again.store.manifest == first.store.manifest
    assert ws.store("other", first, samples(40)) is first


def test_a_store_answers_for_the_views_of_photographs_in_any_stage_order(tmp_path):
    """Views of one stream are replayed by name; those that the store does not know are drawn as ever."""
    fill(tmp_path, teacher(), samples(32), views={"weak": Weak(2)}, batch_size=SIZE)
    stream = Stream(samples(32), SIZE, {"weak": Weak(2), "strong": Photometric()})
    stream.open("labelled", seed=0)
    Stored(tmp_path).join({"labelled": stream})
    torch.manual_seed(0)
    batch = stream.next()
    first, second = stream.render(copy.copy(batch)), stream.render(copy.copy(batch))
    assert torch.equal(first["weak"], second["weak"])
    assert not torch.equal(first["strong"], second["strong"])
    assert list(itertools.islice((name for name in first if name.startswith("weak_stored")), 1))
