"""Sounds: every wav format against its own samples, the front end against transformers', the splits by speaker."""

from __future__ import annotations

import io
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import wavfile
from torch import Tensor

from limbeck.data import LogMel, data_folder, load_audio, log_mel, mel_filters, read_wav, resample
from limbeck.data.audio import EPSILON, pad_or_crop
from limbeck.errors import UserError

RATE = 8000


def tone(hertz: float, seconds: float = 0.5, rate: int = RATE) -> Tensor:
    return 0.5 * torch.sin(2 * torch.pi * hertz * torch.arange(int(seconds * rate)) / rate)


def wav(waveform: Tensor, rate: int = RATE, dtype: str = "int16") -> bytes:
    values = waveform.double().numpy()
    if dtype == "uint8":
        values = np.round(values * 128 + 128)
    elif dtype.startswith("int"):
        values = np.round(values * (np.iinfo(dtype).max + 1.0)).clip(np.iinfo(dtype).min, np.iinfo(dtype).max)
    file = io.BytesIO()
    wavfile.write(file, rate, values.astype(dtype))
    return file.getvalue()


def wav24(waveform: Tensor) -> bytes:
    whole = np.round(waveform.double().numpy() * 2**23).astype("<i4")
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(3)
        out.setframerate(RATE)
        out.writeframes(whole.view("u1").reshape(-1, 4)[:, :3].tobytes())
    return file.getvalue()


def clips(n: int, rate: int = RATE, classes: int = 2) -> list[tuple[bytes, int, int]]:
    """(wav, label, speaker): the class is the pitch, the speaker the loudness."""
    return [
        (wav(tone(300 * (1 + row % classes), rate=rate) * (0.3 + 0.2 * (row % 3)), rate), row % classes, row % 3)
        for row in range(n)
    ]


def mapping(n: int = 24, **rates: int) -> dict[str, dict[str, list]]:
    audio, label, speaker = zip(*clips(n, **rates), strict=True)
    rows = {"audio": list(audio), "label": list(label), "speaker": list(speaker)}
    return {"train": rows, "test": {name: column[:6] for name, column in rows.items()}}


# ---------------------------------------------------------------- wav files


@pytest.mark.parametrize(("dtype", "step"), [("uint8", 2**-7), ("int16", 2**-15), ("int32", 2**-24), ("float32", 1e-7)])
def test_every_format_gives_the_waveform_up_to_its_own_step(dtype: str, step: float) -> None:
    found, rate = read_wav(wav(tone(440), dtype=dtype))
    assert rate == RATE and found.dtype == torch.float32
    torch.testing.assert_close(found, tone(440), atol=step, rtol=0)


def test_24_bits_give_the_waveform() -> None:
    found, _ = read_wav(wav24(tone(440)))
    torch.testing.assert_close(found, tone(440), atol=2**-22, rtol=0)


def test_channels_are_averaged() -> None:
    both = torch.stack([tone(440), -0.5 * tone(440)], 1)
    torch.testing.assert_close(read_wav(wav(both))[0], 0.25 * tone(440), atol=2**-14, rtol=0)


def test_silence_of_8_bits_is_zero() -> None:
    assert not read_wav(wav(torch.zeros(100), dtype="uint8"))[0].any()


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"not a wav file at all",
        wav(tone(440))[:30],
        wav(tone(440))[:1000],
        b"RIFF" + bytes(60),
        wav(torch.zeros(0)),
    ],
)
def test_a_damaged_file_is_refused_by_name(damaged: bytes) -> None:
    with pytest.raises(UserError, match=r"Row 3 of train \(a\.wav\)"):
        read_wav(damaged, "Row 3 of train (a.wav)")


def test_nan_samples_are_refused() -> None:
    with pytest.raises(UserError, match="NaN"):
        read_wav(wav(torch.full((100,), torch.nan), dtype="float32"))


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(0, 4000), noise=st.binary(max_size=64))
def test_any_damage_is_one_sentence(cut: int, noise: bytes) -> None:
    damaged = wav(tone(440))[:cut] + noise
    try:
        found, _ = read_wav(damaged)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert found.isfinite().all() and len(found)


def test_resampling_keeps_the_tone() -> None:
    found = resample(tone(440, rate=16000), 16000, RATE)
    assert len(found) == len(tone(440))
    torch.testing.assert_close(found[200:-200], tone(440)[200:-200], atol=2e-3, rtol=0)


def test_resampling_to_the_same_rate_changes_nothing() -> None:
    assert resample(tone(440), RATE, RATE) is not None and torch.equal(resample(tone(440), RATE, RATE), tone(440))


@given(length=st.integers(1, 50), wanted=st.integers(1, 50), place=st.sampled_from(["centre", "start"]))
def test_padding_and_cropping_give_the_length_and_undo_each_other(length: int, wanted: int, place: str) -> None:
    wave_T = torch.arange(1.0, length + 1)
    found = pad_or_crop(wave_T, wanted, place)  # type: ignore[arg-type]
    assert len(found) == wanted
    if wanted >= length:
        assert torch.equal(found[found > 0], wave_T)
    else:
        assert torch.equal(found, wave_T[int(found[0]) - 1 :][:wanted])
        assert abs(int(found[0]) - 1 - (length - wanted) // 2) <= 1 if place == "centre" else found[0] == 1


# ---------------------------------------------------------------- the front end


@pytest.mark.parametrize("scale", ["slaney", "htk"])
@pytest.mark.parametrize(("rate", "n_fft", "n_mels", "f_max"), [(16000, 1024, 64, 7800.0), (8000, 512, 40, 4000.0)])
def test_filters_are_those_of_transformers(scale: str, rate: int, n_fft: int, n_mels: int, f_max: float) -> None:
    from transformers.audio_utils import mel_filter_bank

    norm = "slaney" if scale == "slaney" else None
    reference = mel_filter_bank(n_fft // 2 + 1, n_mels, 60, f_max, rate, norm=norm, mel_scale=scale)
    found = mel_filters(rate, n_mels=n_mels, n_fft=n_fft, f_min=60, f_max=f_max, scale=scale)  # type: ignore[arg-type]
    torch.testing.assert_close(found.double(), torch.from_numpy(reference.T), atol=1e-7, rtol=1e-5)


def test_log_mel_is_that_of_transformers() -> None:
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    torch.manual_seed(0)
    noise = torch.randn(4000)
    filters = mel_filter_bank(257, 32, 60, 3900, RATE, norm="slaney", mel_scale="slaney")
    power = spectrogram(
        noise.numpy(),
        window_function(512, "hann"),
        512,
        80,
        power=2.0,
        pad_mode="constant",
        mel_filters=filters,
        mel_floor=0,
    )
    found = log_mel(noise[None], RATE, n_mels=32, n_fft=512, hop=80, f_min=60, f_max=3900)
    assert found.shape == (1, 32, 1 + 4000 // 80)
    torch.testing.assert_close(found[0].double(), torch.from_numpy(np.log(power + EPSILON)), atol=1e-4, rtol=0)


def test_a_tone_is_loudest_in_the_band_around_it() -> None:
    filters = mel_filters(RATE, n_mels=32, n_fft=512, f_min=60, f_max=3900)
    found = log_mel(tone(1000)[None], RATE, n_mels=32, n_fft=512, hop=80, f_min=60, f_max=3900)
    assert found[0, :, 20].argmax() == (filters[:, 1000 * 512 // RATE]).argmax()


@pytest.mark.parametrize(("f_min", "f_max"), [(60, 5000), (500, 400), (-1, 3000)])
def test_frequencies_out_of_range_are_refused(f_min: float, f_max: float) -> None:
    with pytest.raises(UserError, match="half the rate"):
        mel_filters(RATE, n_mels=32, n_fft=512, f_min=f_min, f_max=f_max)


def test_more_bands_than_bins_are_refused() -> None:
    with pytest.raises(UserError, match="lower n_mels or raise n_fft"):
        mel_filters(RATE, n_mels=256, n_fft=256, f_min=0, f_max=4000)


def test_mean_and_deviation_do_not_depend_on_how_the_clips_come() -> None:
    torch.manual_seed(0)
    spectrograms = 3 * torch.randn(10, 1, 8, 20) - 12
    at_once, in_parts = LogMel(RATE, n_mels=8), LogMel(RATE, n_mels=8)
    at_once.observe(spectrograms)
    for part in spectrograms.split(3):
        in_parts.observe(part)
    torch.testing.assert_close(at_once.mean, spectrograms.mean())
    torch.testing.assert_close(at_once.std, spectrograms.std(correction=0))
    torch.testing.assert_close(in_parts.mean, at_once.mean)
    torch.testing.assert_close(in_parts.std, at_once.std)


def test_the_front_end_of_the_data_makes_their_spectrograms() -> None:
    data = load_audio(mapping(), features="both", n_mels=16)
    assert data.front_end is not None
    torch.testing.assert_close(data.front_end(data.test.fields["audio"]), data.test.fields["spectrogram"])
    spectrogram = data.train.fields["spectrogram"]
    assert spectrogram.mean().abs() < 1e-4 and (spectrogram.std() - 1).abs() < 1e-2


# ---------------------------------------------------------------- data sets


def test_clips_of_several_rates_are_refused_with_the_mend() -> None:
    audio = [clip[0] for clip in clips(3)] + [clip[0] for clip in clips(1, rate=16000)]
    with pytest.raises(UserError, match=r"8000 Hz \(6 clips\), 16000 Hz \(2 clips\): pass rate=8000"):
        load_audio({"train": {"audio": audio, "label": [0, 1, 0, 1]}, "test": {"audio": audio, "label": [0, 1, 0, 1]}})


def test_clips_of_another_rate_are_resampled_one_by_one() -> None:
    own = load_audio(mapping(), features="both", n_mels=16)
    mixed = mapping(rate=16000)
    mixed["test"] = mapping()["test"]
    found = load_audio(mixed, rate=RATE, features="both", n_mels=16)
    torch.testing.assert_close(found.train.fields["audio"], own.train.fields["audio"], atol=0.02, rtol=0)
    assert torch.equal(found.test.fields["audio"], own.test.fields["audio"])


def test_lengths_are_those_before_padding() -> None:
    data = load_audio(mapping(), seconds=1.0, features="audio")
    assert data.train.fields["audio"].shape == (24, RATE) and (data.train.fields["length"] == RATE // 2).all()
    assert not data.train.fields["audio"][:, : RATE // 8].any()  # the zeros lie on both sides


def test_speakers_are_never_shared() -> None:
    data = load_audio(mapping(), group_column="speaker", test_groups=[1], validation_groups=[2], n_mels=16)
    assert data.validation is not None
    speakers = [set(part.fields["speaker"].tolist()) for part in (data.train, data.validation, data.test)]
    assert speakers == [{0}, {2}, {1}]
    assert len(data.train) + len(data.validation) + len(data.test) == 30
    assert len(torch.cat([data.train.index, data.validation.index, data.test.index]).unique()) == 30


def test_groups_that_are_words_are_numbered() -> None:
    named = mapping()
    for rows in named.values():
        rows["speaker"] = [("ann", "bob", "eve")[speaker] for speaker in rows["speaker"]]
    data = load_audio(named, group_column="speaker", test_groups=["bob"], n_mels=16)
    assert set(data.test.fields["speaker"].tolist()) == {1} and set(data.train.fields["speaker"].tolist()) == {0, 2}


def test_a_fraction_keeps_its_labels_and_all_become_unlabelled() -> None:
    data = load_audio(mapping(), labelled_fraction=0.25, hidden_labels=True, n_mels=16)
    assert data.unlabelled is not None and len(data.train) == 6 and len(data.unlabelled) == 24
    assert "label" not in data.unlabelled.fields
    hidden = data.unlabelled.fields["hidden_label"][torch.isin(data.unlabelled.index, data.train.index)]
    assert torch.equal(hidden, data.train.labels)


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"group_column": "speaker", "test_groups": [9]}, "no group '9'"),
        ({"group_column": "voice", "test_groups": [0]}, "no column 'voice'"),
        ({"group_column": "speaker", "test_groups": [0, 1, 2]}, "No clips are left for train"),
        ({"group_column": "speaker", "test_groups": [0], "validation_groups": [0]}, "leave it in one"),
        ({"audio_column": "sound"}, "no column 'sound'"),
    ],
)
def test_columns_and_groups_that_are_not_there_are_named(settings_: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_audio(mapping(), **settings_)


def test_a_corrupt_clip_of_a_set_is_named_by_row() -> None:
    damaged = mapping()
    damaged["train"]["audio"][7] = damaged["train"]["audio"][7][:100]
    with pytest.raises(UserError, match="Row 7 of train"):
        load_audio(damaged)


def test_a_folder_of_class_folders_is_read(tmp_path: Path) -> None:
    for row, (content, label, _) in enumerate(clips(16)):
        place = tmp_path / ("train" if row < 12 else "test") / ("low", "high")[label]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{row}.wav").write_bytes(content)
    data = load_audio(tmp_path, n_mels=16)
    assert (len(data.train), len(data.test), data.classes) == (12, 4, ["high", "low"])


def test_a_wav_outside_any_class_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav(tone(440)))
    with pytest.raises(UserError, match="lies in no class folder"):
        load_audio(tmp_path)


@pytest.mark.skipif(not (data_folder() / "fsdd").is_dir(), reason="needs LIMBECK_DATA with fsdd")
def test_the_spoken_digits_are_read_and_split_by_speaker() -> None:
    data = load_audio("fsdd", group_column="speaker", test_groups=[0], labelled_fraction=0.1, limit=100, hop=160)
    assert data.unlabelled is not None
    assert data.num_classes == 10 and set(data.test.fields["speaker"].tolist()) == {0}
    assert 0 not in data.unlabelled.fields["speaker"] and data.test.fields["spectrogram"].shape == (100, 1, 64, 51)
