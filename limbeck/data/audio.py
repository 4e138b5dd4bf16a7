"""Sounds: wav files to waveforms, waveforms to log-mel spectrograms, both to samples.

Letters: N samples, B rows of a batch, T samples of a waveform or frames of a spectrogram, M mel bands, F frequency
bins (n_fft / 2 + 1).
"""

from __future__ import annotations

import io
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.data import splits
from limbeck.data.samples import Data, Samples
from limbeck.data.sources import SPLIT_NAMES, data_folder, load_data
from limbeck.errors import UserError

MelScale = Literal["slaney", "htk"]
EPSILON = torch.finfo(torch.float32).eps  # of the logarithm: silence is -15.9


# ---------------------------------------------------------------- waveforms


def read_wav(source: bytes | str | Path, name: str = "the file") -> tuple[Tensor, int]:
    """(waveform float32 [T] in -1..1, samples a second) of a wav file: 8, 16, 24, 32 bits or float, channels averaged.

    Raises `UserError`, naming the file, where it is no wav, is cut off, empty, or holds NaN.
    """
    from scipy.io import wavfile

    name = str(source) if isinstance(source, str | Path) else name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks of metadata
            warnings.filterwarnings("error", "Reached EOF", wavfile.WavFileWarning)
            rate, values = wavfile.read(io.BytesIO(source) if isinstance(source, bytes) else source)
    except FileNotFoundError:
        raise UserError(f"There is no file {name}.") from None
    except Exception as error:  # a damaged file can fail anywhere inside the reader
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{name} is no wav file that can be read ({reason}): mend it, convert it to wav or leave it out."
        ) from None
    if not len(values):
        raise UserError(f"{name} holds no sound (0 samples): leave it out.")
    if values.dtype == np.uint8:
        wave = (values.astype(np.float32) - 128) / 128  # the only unsigned format: silence is 128
    elif values.dtype.kind == "i":  # 24 bits come as the upper ones of 32
        wave = values.astype(np.float32) / np.float32(np.iinfo(values.dtype).max + 1)
    else:
        wave = values.astype(np.float32)
    if not np.isfinite(wave).all():
        raise UserError(f"{name} holds NaN or infinite samples: mend it or leave it out.")
    return torch.from_numpy(wave if wave.ndim == 1 else wave.mean(1)), int(rate)


def resample(waveform_T: Tensor, rate: int, wanted: int) -> Tensor:
    """The waveform at another number of samples a second (polyphase filter); [ceil(T * wanted / rate)]."""
    if rate == wanted:
        return waveform_T
    from scipy.signal import resample_poly

    common = math.gcd(rate, wanted)
    return torch.from_numpy(resample_poly(waveform_T.numpy(), wanted // common, rate // common).astype(np.float32))


def pad_or_crop(waveform_T: Tensor, length: int, place: Literal["centre", "start"] = "centre") -> Tensor:
    """[length]: zeros on both sides (`start`: behind) of a shorter waveform, the middle (the start) of a longer one."""
    missing = length - len(waveform_T)
    before = missing // 2 if place == "centre" else 0
    if missing >= 0:
        return nn.functional.pad(waveform_T, (before, missing - before))
    return waveform_T[-before : -before + length]


# ---------------------------------------------------------------- spectrograms


def mel_filters(
    rate: int, *, n_mels: int, n_fft: int, f_min: float, f_max: float, scale: MelScale = "slaney"
) -> Tensor:
    """Triangular filters [M,F] from the power spectrum to mel bands, float32.

    The corners are evenly spaced on the mel scale: `slaney` is linear below 1 kHz and logarithmic above, with filters
    of area 1 per hertz (height 2 / width), as librosa's default; `htk` is 2595 log10(1 + f / 700) with height 1.

    Raises `UserError` where 0 <= f_min < f_max <= rate / 2 does not hold, and where a filter falls between two bins.
    """
    if not 0 <= f_min < f_max <= rate / 2:
        raise UserError(
            f"f_min is {f_min} and f_max {f_max}; expected 0 <= f_min < f_max <= {rate / 2:g}, half the rate."
        )
    low, high = (_hertz_to_mel(np.array(float(f)), scale) for f in (f_min, f_max))
    corners = _mel_to_hertz(np.linspace(low, high, n_mels + 2), scale)
    bins = np.arange(n_fft // 2 + 1) * (rate / n_fft)
    rising = (bins - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - bins) / (corners[2:] - corners[1:-1])[:, None]
    filters = np.maximum(0, np.minimum(rising, falling))
    if scale == "slaney":
        filters *= (2 / (corners[2:] - corners[:-2]))[:, None]
    empty = int((filters.max(1) == 0).sum())
    if empty:
        raise UserError(
            f"{empty} of {n_mels} mel bands lie between two of the {n_fft // 2 + 1} frequency bins: "
            "lower n_mels or raise n_fft."
        )
    return torch.from_numpy(filters).float()


def _hertz_to_mel(hertz: np.ndarray, scale: MelScale) -> np.ndarray:
    if scale == "htk":
        return 2595 * np.log10(1 + hertz / 700)
    return np.where(hertz < 1000, hertz * 3 / 200, 15 + np.log(np.maximum(hertz, 1000) / 1000) * 27 / np.log(6.4))


def _mel_to_hertz(mel: np.ndarray, scale: MelScale) -> np.ndarray:
    if scale == "htk":
        return 700 * (10 ** (mel / 2595) - 1)
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))


def log_mel(
    waveform_BT: Tensor,
    rate: int,
    *,
    n_mels: int,
    n_fft: int,
    hop: int,
    f_min: float,
    f_max: float,
    scale: MelScale = "slaney",
) -> Tensor:
    """log(filters |STFT|^2 + 1.2e-7), float32 [B,M,1 + T // hop]; frame t is centred at sample t * hop.

    The window is Hann's of n_fft samples (periodic), with zeros before and behind the waveform. Source: BYOL-A and
    LAPE (`src/utils/utils.py`), which take 64 bands of 60-7800 Hz at 16 kHz, n_fft 1024, hop 160.

    Raises `UserError` as `mel_filters` does.
    """
    filters_MF = mel_filters(rate, n_mels=n_mels, n_fft=n_fft, f_min=f_min, f_max=f_max, scale=scale)
    return _log_mel(waveform_BT, filters_MF.to(waveform_BT.device), n_fft, hop)


def _log_mel(waveform_BT: Tensor, filters_MF: Tensor, n_fft: int, hop: int) -> Tensor:
    window = torch.hann_window(n_fft, device=waveform_BT.device)
    spectrum_BFT = torch.stft(waveform_BT.float(), n_fft, hop, window=window, pad_mode="constant", return_complex=True)
    return torch.log(filters_MF @ spectrum_BFT.abs().square() + EPSILON)


class LogMel(nn.Module):
    """The front end as a layer: waveforms [B,T] to standardised log-mel spectrograms [B,1,M,1 + T // hop].

    `mean` and `std` are two numbers over all bands, frames and clips, as the papers' running mean and variance come to
    be; `observe` gathers them. Put it before a model that was trained on spectrograms and it takes sound.

    Args:
        rate: samples a second of the waveforms.
        n_mels, scale: bands, and their spacing (see `mel_filters`).
        n_fft, hop: samples of a window and between windows; None for 64 ms and 10 ms.
        f_min, f_max: lowest and highest frequency in hertz; f_max None for 7800 at 16 kHz, in proportion at others.
    """

    mean: Tensor
    std: Tensor
    filters: Tensor

    def __init__(
        self,
        rate: int,
        *,
        n_mels: int = 64,
        n_fft: int | None = None,
        hop: int | None = None,
        f_min: float = 60.0,
        f_max: float | None = None,
        scale: MelScale = "slaney",
    ) -> None:
        super().__init__()
        self.rate, self.n_mels = rate, n_mels
        self.n_fft, self.hop = n_fft or rate * 64 // 1000, hop or rate // 100
        f_max = 7800 / 16000 * rate if f_max is None else f_max
        filters = mel_filters(rate, n_mels=n_mels, n_fft=self.n_fft, f_min=f_min, f_max=f_max, scale=scale)
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("mean", torch.tensor(0.0))
        self.register_buffer("std", torch.tensor(1.0))
        self._count, self._sum, self._squares = 0, 0.0, 0.0

    def log_mel(self, waveform_BT: Tensor) -> Tensor:
        """Not standardised: [B,1,M,frames]."""
        return _log_mel(waveform_BT, self.filters, self.n_fft, self.hop)[:, None]

    def observe(self, spectrogram: Tensor) -> None:
        """Let these values (of `log_mel`) count in `mean` and `std` together with all that were observed before."""
        values = spectrogram.double()
        self._count += values.numel()
        self._sum += float(values.sum())
        self._squares += float(values.square().sum())
        mean = self._sum / self._count
        self.mean.fill_(mean)
        self.std.fill_(math.sqrt(max(self._squares / self._count - mean**2, 1e-12)))

    def standardise(self, spectrogram: Tensor) -> Tensor:
        """(x - mean) / std."""
        return (spectrogram - self.mean) / self.std

    def forward(self, waveform_BT: Tensor) -> Tensor:
        return self.standardise(self.log_mel(waveform_BT))


# ---------------------------------------------------------------- data sets


@dataclass(frozen=True)
class AudioData(Data):
    """Data whose samples hold `spectrogram` float32 [N,1,M,frames] (standardised), `audio` float32 [N,T], or both.

    `front_end` makes the one from the other; `length` int64 [N] is a clip's own length in samples, before padding.
    """

    front_end: LogMel | None = None


def load_audio(
    name_or_path: str | Path | Mapping[str, Any],
    *,
    rate: int | None = None,
    seconds: float = 1.0,
    place: Literal["centre", "start"] = "centre",
    features: Literal["spectrogram", "audio", "both"] = "spectrogram",
    n_mels: int = 64,
    n_fft: int | None = None,
    hop: int | None = None,
    f_min: float = 60.0,
    f_max: float | None = None,
    mel_scale: MelScale = "slaney",
    audio_column: str = "audio",
    label_column: str = "label",
    group_column: str | None = None,
    test_groups: Sequence[int | str] = (),
    validation_groups: Sequence[int | str] = (),
    validation_fraction: float | None = None,
    labels_per_class: int | None = None,
    labelled_fraction: float | None = None,
    keep_labelled_in_unlabelled: bool = True,
    hidden_labels: bool = False,
    limit: int | Mapping[str, int] | None = None,
    seed: int = 0,
) -> AudioData:
    """The sounds of this name, path or content as samples with `spectrogram`, `label` and what other columns there are.

    Args:
        name_or_path: as `load_data` takes it (parquet in the Hugging Face layout, wav bytes or paths in
            `audio_column`), a folder of class folders of wav files (with train/ test/ above them or without), or a
            mapping `{"train": {"audio": [bytes, paths or (waveform, rate)], "label": [...]}, ...}`.
        rate: samples a second that every clip is resampled to; None keeps the set's own, which must be one.
        seconds, place: the length of every clip, and where it lies in it, see `pad_or_crop`.
        features: which fields to make: `spectrogram`, `audio` (the waveforms), or both.
        n_mels, n_fft, hop, f_min, f_max, mel_scale: of the front end, see `LogMel`.
        group_column: who speaks, say; words are numbered in alphabetic order.
        test_groups, validation_groups: the groups that make these splits, so that train and test share none; the set's
            own splits are pooled before.
        validation_fraction: share of the training clips held out, the classes in proportion.
        labels_per_class, labelled_fraction, keep_labelled_in_unlabelled: as in `load_data`: `train` keeps few clips,
            all (or the rest) become `unlabelled`.
        hidden_labels: keep the true labels of unlabelled clips as the field `hidden_label`, which methods only use to
            measure themselves.
        limit: of each split, or those named.
        seed: of these choices.

    The spectrograms' mean and deviation are those of the training clips (labelled or not), of all splits the same.

    Raises:
        UserError: a file cannot be read (named), clips have several rates and none is asked for, a column or group is
            not there, or what `load_data`, `mel_filters` and `split_labels` refuse.
    """
    found = load_data(_with_class_folders(name_or_path), label_column=_present(label_column), seed=seed)
    parts = {"train": found.train, "validation": found.validation, "test": found.test, "unlabelled": found.unlabelled}
    by_split = {name: part for name, part in parts.items() if part is not None}
    if group_column is not None and (test_groups or validation_groups):
        by_split = _by_group(by_split, group_column, test_groups, validation_groups)
    if validation_fraction and "validation" not in by_split:
        by_split["train"], by_split["validation"] = splits.train_validation(
            by_split["train"], validation_fraction, seed
        )
    bounds = {name: limit.get(name) if isinstance(limit, Mapping) else limit for name in by_split}
    for name, bound in bounds.items():
        if bound is not None and bound < len(by_split[name]):
            by_split[name] = splits.subset(by_split[name], bound, seed)
    clips = {name: _waveforms(part, name, audio_column) for name, part in by_split.items()}
    rate = _common_rate(clips) if rate is None else rate
    front_end = LogMel(rate, n_mels=n_mels, n_fft=n_fft, hop=hop, f_min=f_min, f_max=f_max, scale=mel_scale)
    length = round(seconds * rate)
    for name, part in by_split.items():
        resampled = [resample(wave, own, rate) for wave, own in clips.pop(name)]
        fields: dict[str, Any] = {"length": torch.tensor([min(len(wave), length) for wave in resampled])}
        fields["audio"] = torch.stack([pad_or_crop(wave, length, place) for wave in resampled])
        by_split[name] = part.without(audio_column).with_fields(fields)
    by_split = _with_spectrograms(by_split, front_end, features)
    if hidden_labels:
        by_split["train"] = by_split["train"].with_fields({"hidden_label": by_split["train"].labels})
    if labels_per_class is not None or labelled_fraction is not None:
        by_split["train"], rest = splits.split_labels(
            by_split["train"],
            labels_per_class=labels_per_class,
            labelled_fraction=labelled_fraction,
            keep_labelled_in_unlabelled=keep_labelled_in_unlabelled,
            seed=seed,
        )
        by_split.setdefault("unlabelled", rest)
    return AudioData(**by_split, name=found.name, front_end=front_end)


def _present(label_column: str) -> str | None:
    """`load_data` finds a column named `label` itself, and does without where there is none."""
    return None if label_column == "label" else label_column


def _with_class_folders(name_or_path: Any) -> Any:
    """A folder of class folders of wav files as a mapping of fields; anything else as it is."""
    if isinstance(name_or_path, Mapping):
        return name_or_path
    places = [Path(name_or_path), data_folder() / str(name_or_path)]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None or not (files := sorted(folder.rglob("*.wav"))):
        return name_or_path
    found: dict[str, dict[str, list[str]]] = {}
    for path in files:
        parts = path.relative_to(folder).parts
        split = SPLIT_NAMES.get(parts[0].lower()) if len(parts) > 2 else None
        if len(parts) < 2:
            raise UserError(f"{path} lies in no class folder: expected <class>/<name>.wav or train/<class>/<name>.wav.")
        fields = found.setdefault(split or "train", {"audio": [], "label": []})
        fields["audio"].append(str(path))
        fields["label"].append(parts[-2])
    return found


def _by_group(
    parts: Mapping[str, Samples],
    column: str,
    test_groups: Sequence[int | str],
    validation_groups: Sequence[int | str],
) -> dict[str, Samples]:
    """All clips pooled and divided anew by their group; `index` counts through the pool."""
    pool = _pooled(list(parts.values()))
    if column not in pool.fields:
        raise UserError(f"There is no column {column!r} to group by, the clips have {', '.join(pool.fields)}.")
    values = pool.fields[column]
    if not isinstance(values, Tensor):
        number = {word: place for place, word in enumerate(sorted(set(values)))}
        pool = pool.with_fields({column: torch.tensor([number[word] for word in values])})
    groups = [str(value) for value in (values.tolist() if isinstance(values, Tensor) else values)]
    wanted = {"test": {str(g) for g in test_groups}, "validation": {str(g) for g in validation_groups}}
    for name in wanted["test"] | wanted["validation"]:
        if name not in groups:
            raise UserError(
                f"There is no group {name!r} in {column!r}: the groups are {', '.join(sorted(set(groups)))}."
            )
    if shared := wanted["test"] & wanted["validation"]:
        raise UserError(f"The group {min(shared)!r} is both in test_groups and in validation_groups: leave it in one.")
    rows: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for row, group in enumerate(groups):
        rows[next((split for split, names in wanted.items() if group in names), "train")].append(row)
    for split in ("train", "test"):
        if not rows[split]:
            raise UserError(f"No clips are left for {split}: name other groups in test_groups and validation_groups.")
    return {split: pool.select(chosen) for split, chosen in rows.items() if chosen}


def _pooled(parts: list[Samples]) -> Samples:
    """The clips of several splits as one; columns that not all have are left out."""
    names = [name for name in parts[0].fields if name != "index" and all(name in part.fields for part in parts)]
    columns = {name: [part.fields[name] for part in parts] for name in names}
    joined = {
        name: torch.cat(column) if isinstance(column[0], Tensor) else [value for part in column for value in part]
        for name, column in columns.items()
    }
    return Samples(joined, parts[0].classes)


def _waveforms(samples: Samples, split: str, column: str) -> list[tuple[Tensor, int]]:
    """(waveform [T], rate) of each clip."""
    if column not in samples.fields:
        raise UserError(f"There is no column {column!r} of sounds in {split}, it has {', '.join(samples.fields)}.")
    return [_waveform(value, f"Row {row} of {split}") for row, value in enumerate(samples.fields[column])]


def _waveform(value: Any, where: str) -> tuple[Tensor, int]:
    if isinstance(value, tuple):
        wave, rate = value
        return torch.as_tensor(wave, dtype=torch.float32), int(rate)
    if isinstance(value, Mapping):
        path = value.get("path")
        if value.get("bytes") is not None:
            return read_wav(value["bytes"], f"{where} ({path})" if path else where)
        value = path
    if not isinstance(value, bytes | str | Path):
        raise UserError(f"{where} is {type(value).__name__}, expected the bytes or the path of a wav file.")
    return read_wav(value, where)


def _common_rate(clips: Mapping[str, list[tuple[Tensor, int]]]) -> int:
    rates = Counter(rate for part in clips.values() for _, rate in part)
    if len(rates) > 1:
        counts = ", ".join(f"{rate} Hz ({count} clips)" for rate, count in rates.most_common())
        raise UserError(
            f"The clips have several rates, {counts}: pass rate={rates.most_common(1)[0][0]} to resample all to one."
        )
    return next(iter(rates))


def _with_spectrograms(
    parts: Mapping[str, Samples], front_end: LogMel, features: Literal["spectrogram", "audio", "both"]
) -> dict[str, Samples]:
    if features == "audio":
        return dict(parts)
    found = {}
    for name, part in parts.items():
        chunks = part.fields["audio"].split(256)  # a spectrum takes many times the memory of its spectrogram
        found[name] = torch.cat([front_end.log_mel(chunk) for chunk in chunks])
        if name in ("train", "unlabelled"):
            front_end.observe(found[name])
    return {
        name: (part if features == "both" else part.without("audio")).with_fields(
            {"spectrogram": front_end.standardise(found[name])}
        )
        for name, part in parts.items()
    }
