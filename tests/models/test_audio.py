"""AudioNTT, exits at its depths, and the audio classifiers of transformers behind one call."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from limbeck.data import load_audio, make_view
from limbeck.errors import UserError
from limbeck.models import (
    AudioNTT,
    Exits,
    PooledTaps,
    load_audio_model,
    load_model,
    mlp_projector,
    pooled,
    save_model,
)
from limbeck.models.audio_ntt import frames

BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]
SMALL = {"channels": 4, "width": 24}


def clips(rows: int = 3, mels: int = 64, length: int = 40) -> Tensor:
    return torch.randn(rows, 1, mels, length, generator=torch.Generator().manual_seed(0))


def small(**changes: int) -> AudioNTT:
    torch.manual_seed(0)
    return AudioNTT(**{**SMALL, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [16, 48, 95])
def test_taps_of_the_full_net_have_the_papers_widths_whatever_the_length(length: int) -> None:
    taps = PooledTaps(AudioNTT().eval(), [*BLOCKS, "fc"])
    assert [x.shape[1] for x in taps(clips(2, length=length))] == [2048, 1024, 512, 2048]


def test_a_frame_is_flattened_band_by_band_with_the_channels_inside() -> None:
    map_BCMT = torch.randn(2, 3, 5, 7)
    found = frames(map_BCMT)
    for mel in range(5):
        for channel in range(3):
            assert torch.equal(found[:, :, mel * 3 + channel], map_BCMT[:, channel, mel])


def test_the_perceptron_reads_frames_in_that_order() -> None:
    net = small().eval()
    x = clips()
    for block in net.blocks:
        x = block(x)
    torch.testing.assert_close(net.sequence(clips()), net.fc(x.permute(0, 3, 2, 1).reshape(3, 5, -1)))


def test_pooling_is_max_plus_mean_of_a_sequence_and_the_mean_of_a_map() -> None:
    sequence, map_BCMT, vector = torch.randn(2, 5, 7), torch.randn(2, 3, 4, 5), torch.randn(2, 6)
    torch.testing.assert_close(pooled(sequence), sequence.max(1).values + sequence.mean(1))
    torch.testing.assert_close(pooled(map_BCMT), map_BCMT.mean(3).transpose(1, 2).flatten(1))
    assert pooled(vector) is vector


def test_the_classifier_reads_the_mean_over_time_alone() -> None:
    net = small().eval()
    torch.testing.assert_close(net(clips()), net.head(net.sequence(clips()).mean(1)))


def test_a_clip_of_fewer_than_8_frames_is_refused() -> None:
    with pytest.raises(UserError, match="at least 8 frames, got 7"):
        small()(clips(length=7))


def test_a_projector_has_three_layers_without_bias() -> None:
    layers = list(mlp_projector(12, 5))
    shapes = [tuple(m.weight.shape) for m in layers if isinstance(m, nn.Linear)]
    assert shapes == [(5, 12), (5, 5), (5, 5)]
    assert [type(m).__name__ for m in layers] == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    assert all(m.bias is None for m in layers if isinstance(m, nn.Linear))


def test_exits_answer_at_every_depth_and_leave_the_head_alone() -> None:
    net = small()
    before = copy.deepcopy(net.state_dict())
    exits = Exits(net, BLOCKS, "fc", 7, clips(2))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())  # the probe left no trace
    logits, early = exits(clips())
    assert [x.shape for x in (logits, *early)] == [(3, 7)] * 4
    (logits.sum() + sum(x.sum() for x in early)).backward()
    assert net.head.weight.grad is None and net.blocks[0][0].weight.grad is not None


def test_exits_of_any_network_are_found_by_name() -> None:
    net = load_model("small_cnn", in_channels=1, num_classes=3, config={"channels": [4, 8]})
    logits, early = Exits(net, ["stages.0"], "stages.1", 6, clips(2))(clips())
    assert logits.shape == early[0].shape == (3, 6)


def test_a_saved_net_loads_again(tmp_path: Path) -> None:
    net = load_audio_model("audio_ntt", num_classes=3, n_mels=32, config=SMALL).eval()
    save_model(net, tmp_path)
    again = load_audio_model(tmp_path, num_classes=3, n_mels=32).eval()
    assert torch.equal(again(clips(mels=32)), net(clips(mels=32)))
    with pytest.raises(UserError, match="reads 32 mel bands, the data have 64"):
        load_audio_model(tmp_path, n_mels=64)


TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
WAVES = {"conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2}


def test_a_spectrogram_transformer_reads_the_data_spectrograms_and_shorter_windows(tmp_path: Path) -> None:
    model = load_audio_model(
        "hf-config:audio-spectrogram-transformer", num_classes=4, n_mels=64, n_frames=40, config=TINY
    ).eval()
    assert model(clips()).shape == model(clips(length=24)).shape == (3, 4)
    padded = torch.nn.functional.pad(clips(length=24), (0, 16))
    torch.testing.assert_close(model(clips(length=24)), model(padded))
    save_model(model, tmp_path)
    torch.testing.assert_close(load_audio_model(tmp_path, num_classes=4).eval()(clips()), model(clips()))
    with pytest.raises(UserError, match="pass new_head=True"):
        load_audio_model(tmp_path, num_classes=9)
    assert load_audio_model(tmp_path, num_classes=9, new_head=True)(clips()).shape == (3, 9)


def test_a_waveform_model_reads_waveforms() -> None:
    model = load_audio_model("hf-config:wav2vec2", num_classes=4, config={**TINY, **WAVES})
    assert model(torch.randn(2, 4000)).shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "words"),
    [("hf-config:whisper", "wav2vec2"), ("hf-config:vit", "no classifier"), ("hf-config:wav2vec", "wav2vec2")],
)
def test_networks_that_cannot_hear_are_refused(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_audio_model(name, num_classes=4)


def test_views_of_real_sizes_fit_the_net() -> None:
    data = load_audio({"train": {"audio": [(torch.randn(8000), 8000)] * 4, "label": [0, 1, 0, 1]}})
    window = make_view("random_window", frames=96)
    assert small(num_classes=2)(window(data.train.fields["spectrogram"])).shape == (3, 2)
