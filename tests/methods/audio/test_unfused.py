"""UnFuSeD: the card's identities, a fresh student, and the whole system on a few tones, broken off and resumed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck.data import AudioData, Samples, load_audio
from limbeck.errors import UserError
from limbeck.labels import mutual_information
from limbeck.methods.audio.unfused import BLOCKS, ClusterDistillation, embed, exit_losses, unfused
from limbeck.models import AudioNTT, Exits, load_audio_model
from limbeck.teachers import Frozen
from limbeck.train import Optimizer, Stage, StreamSettings, Trainer, Workspace

B, K, M, T = 6, 5, 16, 16


def logits(seed: int, exits: int = 3) -> tuple[Tensor, list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    main, *early = torch.randn(exits + 1, B, K, generator=generator) * 2
    return main, early, torch.randint(K, (B,), generator=generator)


def total(losses: dict[str, Tensor], **weights: float) -> Tensor:
    return sum((weights.get(name, 1.0) * value for name, value in losses.items()), torch.zeros(()))


# ---------------------------------------------------------------- the losses of stage 3


def test_the_terms_are_those_of_the_paper() -> None:
    main, early, y = logits(0)
    losses = exit_losses(main, early, y)
    torch.testing.assert_close(losses["ce"], F.cross_entropy(main, y))
    torch.testing.assert_close(losses["exit_ce"], torch.stack([F.cross_entropy(x, y) for x in early]).sum())
    kl = [F.kl_div(x.log_softmax(1), main.softmax(1), reduction="batchmean") for x in early]
    torch.testing.assert_close(losses["kl"], torch.stack(kl).sum())
    feature = [(F.normalize(x) - F.normalize(main)).square().sum(1).mean() for x in early]  # 2 - 2 cos
    torch.testing.assert_close(losses["feature"], torch.stack(feature).sum())


def test_without_the_weights_it_is_plain_training_on_the_ids() -> None:
    main, early, y = logits(1)
    plain = total(exit_losses(main, early, y), exit_ce=0, kl=0, feature=0)
    torch.testing.assert_close(plain, F.cross_entropy(main, y))


def test_alpha_1_weighs_every_exit_alike() -> None:
    main, early, y = logits(2)
    found = total(exit_losses(main, early, y), exit_ce=1, kl=0, feature=0)
    torch.testing.assert_close(found, torch.stack([F.cross_entropy(x, y) for x in (main, *early)]).sum())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_equal_exits_have_nothing_to_learn_from_each_other(seed: int) -> None:
    main, _, y = logits(seed)
    losses = exit_losses(main, [main.clone()] * 3, y)
    assert abs(float(losses["kl"])) < 1e-6 and abs(float(losses["feature"])) < 1e-5


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 20))
def test_the_feature_term_ignores_the_scale_and_lies_in_0_to_4_an_exit(seed: int, scale: float) -> None:
    main, early, y = logits(seed)
    for exit_BK in early:
        alone = exit_losses(main, [exit_BK], y)["feature"]
        assert -1e-6 <= float(alone) <= 4 + 1e-6
        torch.testing.assert_close(exit_losses(scale * main, [exit_BK], y)["feature"], alone, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(exit_losses(main, [scale * exit_BK], y)["feature"], alone, atol=1e-5, rtol=1e-4)


def test_the_last_layer_moves_by_the_kl_term_unless_it_is_detached() -> None:
    for detached in (False, True):
        main, early, y = logits(3)
        main.requires_grad_()
        kl = exit_losses(main, [x.requires_grad_() for x in early], y, detach_target=detached)["kl"]
        grad = torch.autograd.grad(kl, [main, *early], materialize_grads=True)
        assert bool(grad[0].any()) is not detached and all(g.any() for g in grad[1:])


def test_a_step_reads_nothing_back_from_the_device() -> None:
    net = AudioNTT(n_mels=M, channels=2, width=8)
    method = ClusterDistillation(Exits(net, BLOCKS, "fc", K, torch.zeros(2, 1, M, T))).to("meta")
    fields = {
        "weak": torch.empty(B, 1, M, T, device="meta"),
        "cluster": torch.empty(B, dtype=torch.long, device="meta"),
    }
    losses = method.training_step({"unlabelled": fields})
    sum(losses.values()).backward()
    assert method.weights.keys() <= losses.keys() and not method.logged.keys() & losses.keys()
    assert method.shipped() is net and net.head.weight.grad is None


# ---------------------------------------------------------------- the whole system


def tones(n: int = 48) -> AudioData:
    """Four pitches at random loudness, 0.25 s; 8 clips are labelled."""
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(2000) / 8000
    audio = [
        (torch.sin(2 * torch.pi * 300 * 1.7 ** (row % 4) * time) * torch.rand(1, generator=generator), 8000)
        for row in range(n)
    ]
    rows = {"audio": audio, "label": [row % 4 for row in range(n)], "speaker": [row % 3 for row in range(n)]}
    sounds = {"train": rows, "test": {name: column[:8] for name, column in rows.items()}}
    return load_audio(sounds, seconds=0.25, n_mels=M, hop=80, labels_per_class=2, hidden_labels=True)


def net(seed: int, channels: int = 3) -> AudioNTT:
    torch.manual_seed(seed)
    return AudioNTT(num_classes=4, n_mels=M, channels=channels, width=16)


def stage(**trainer: int) -> Stage:
    optimizer = Optimizer("adam", lr=1e-2)
    settings_ = StreamSettings(8, {"weak": {"name": "random_window", "frames": 16}}, cycle=True)
    made = Trainer(**trainer, optimizer=optimizer, checkpoint_every=1)  # type: ignore[arg-type]
    return Stage(made, {"unlabelled": settings_} if "epochs" in trainer else {"labelled": settings_})


def run(
    folder: Path, student: nn.Module, encoder: nn.Module, data: AudioData | None = None, **settings_: object
) -> tuple[nn.Module, Workspace]:
    ws = Workspace(folder, seed=0)
    stages = {"distill": stage(epochs=2), "finetune": stage(steps=4), "clusters": 4, **settings_}
    return unfused(ws, data or tones(), student, Frozen(encoder), **stages), ws  # type: ignore[arg-type]


def test_the_encoder_only_makes_the_ids_and_the_student_starts_fresh(tmp_path: Path) -> None:
    """Another encoder that gives the same ids gives the same student; none of its tensors is the encoder's."""
    encoder = net(7, channels=5)
    before = copy.deepcopy(encoder.state_dict())
    shipped, ws = run(tmp_path / "a", net(1), encoder)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    mine = {p.data_ptr() for p in shipped.parameters()}
    assert not mine & {p.data_ptr() for p in encoder.parameters()}
    scaled = copy.deepcopy(encoder)
    with torch.no_grad():  # all features doubled (a ReLU is positively homogeneous): other weights, the same ids
        scaled.fc[3].weight *= 2
        scaled.fc[3].bias *= 2
    again, other = run(tmp_path / "b", net(1), scaled)
    ids, other_ids = (w.compute("pseudo", dict)["cluster"] for w in (ws, other))
    assert torch.equal(ids, other_ids)
    assert all(
        torch.equal(a, b) for a, b in zip(shipped.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_clusters_are_measured_and_shown(tmp_path: Path) -> None:
    _, ws = run(tmp_path, net(1), net(7))
    ids = ws.compute("pseudo", dict)["cluster"]
    target = tones().unlabelled
    assert target is not None
    assert ws.measured["clusters.nmi_label"] == pytest.approx(mutual_information(ids, target.fields["hidden_label"]))
    assert 0 <= ws.measured["clusters.nmi_speaker_by_chance"] <= 1
    assert [caption.split()[-1] for caption in ws.exhibits] == ["cluster", "label", "speaker"]


def test_clean_clips_are_embedded_with_the_last_sequence_or_the_layer_that_is_named(tmp_path: Path) -> None:
    data, encoder = tones(), net(7)
    found = embed(Workspace(tmp_path), Frozen(encoder), "fc", data.test, batch_size=3)
    sequence = encoder.eval().sequence(data.test.fields["spectrogram"])
    torch.testing.assert_close(found, sequence.amax(1) + sequence.mean(1))
    assert embed(Workspace(tmp_path), Frozen(encoder), "blocks.0", data.test).shape == (8, 3 * M // 2)


class Stop(Exception):
    pass


def test_a_run_that_is_broken_off_ends_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run(tmp_path / "whole", net(1), net(7))
    step = ClusterDistillation.training_step

    def breaks(self: ClusterDistillation, batch: dict) -> dict:
        if self.clock.step == 5:
            raise Stop
        return step(self, batch)

    monkeypatch.setattr(ClusterDistillation, "training_step", breaks)
    with pytest.raises(Stop):
        run(tmp_path / "broken", net(1), net(7))
    monkeypatch.undo()
    resumed, _ = run(tmp_path / "broken", net(1), net(7))
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_freezing_leaves_only_the_head_to_learn(tmp_path: Path) -> None:
    frozen, _ = run(tmp_path / "frozen", net(1), net(7), freeze=True)
    tuned, _ = run(tmp_path / "tuned", net(1), net(7))
    only_distilled, _ = run(tmp_path / "frozen_too", net(1), net(7), freeze=True, finetune=stage(steps=1))
    before, after = dict(only_distilled.named_parameters()), dict(frozen.named_parameters())
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {"head.weight", "head.bias"}
    assert any(not torch.equal(value, tuned.state_dict()[name]) for name, value in after.items() if "fc" in name)


def test_too_many_clusters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lower clusters"):
        run(tmp_path, net(1), net(7), clusters=100)


def test_without_unlabelled_clips_the_labelled_ones_are_the_target(tmp_path: Path) -> None:
    data = tones()
    alone = AudioData(train=data.train, test=data.test, name="tones")
    _, ws = run(tmp_path, net(1), net(7), alone, distill=stage(epochs=1), compare_with=())
    assert len(ws.compute("pseudo", dict)["cluster"]) == len(data.train)


@pytest.mark.slow
def test_real_sizes_take_a_step_without_other_code(tmp_path: Path) -> None:
    """Clusters of wav2vec2-base on waveforms; a spectrogram transformer of base size learns them at three depths."""
    torch.manual_seed(0)
    waves = torch.randn(4, 16000)
    sounds = {split: {"audio": [(w, 16000) for w in waves], "label": [0, 1, 0, 1]} for split in ("train", "test")}
    data = load_audio(sounds, n_mels=128, hop=160)
    spectrogram = data.test.fields["spectrogram"]
    ast = load_audio_model(
        "hf-config:audio-spectrogram-transformer", num_classes=2, n_mels=128, n_frames=spectrogram.shape[3]
    )
    assert sum(p.numel() for p in ast.parameters()) > 85e6
    exits = [f"audio_spectrogram_transformer.layers.{layer}" for layer in (2, 5, 8)]
    last = "audio_spectrogram_transformer.layernorm"
    shipped, _ = run(
        tmp_path, ast, load_audio_model("audio_ntt", num_classes=2, n_mels=128), data, exits=exits, student_layer=last,
        distill=Stage(Trainer(steps=1), {"unlabelled": StreamSettings(2, {"weak": "identity"})}),
        finetune=Stage(Trainer(steps=1), {"labelled": StreamSettings(2, {"weak": "identity"})}), clusters=2,
    )  # fmt: skip
    assert shipped(spectrogram).shape == (4, 2)
    speech = load_audio_model("hf-config:wav2vec2", num_classes=2)
    found = embed(
        Workspace(tmp_path / "w"), Frozen(speech), "wav2vec2.encoder.layers.11", Samples({"audio": waves[:2]})
    )
    assert found.shape == (2, 768) and found.isfinite().all()
