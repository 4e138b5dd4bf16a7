"""Networks for sound: exits on inner layers, and the loader of AudioNTT and of transformers' audio classifiers.

Letters: B samples, C channels, M mel bands, T frames (or samples of a waveform), D width, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.models.audio_ntt import AudioNTT, frames
from limbeck.models.load import (
    DESCRIPTION,
    from_checkpoint,
    from_configuration,
    load_model,
    new_configuration,
    read_configuration,
)
from limbeck.models.taps import Taps
from limbeck.models.unwrap import LogitsOf, core_network
from limbeck.models.weights import load_weights


def pooled(feature: Tensor) -> Tensor:
    """One vector a clip [B,D]: a map [B,C,M,T] as the mean of its `frames`, a sequence [B,T,D] as max + mean over time.

    A vector [B,D] stays.
    """
    if feature.ndim == 4:
        return frames(feature).mean(1)
    return feature.amax(1) + feature.mean(1) if feature.ndim == 3 else feature


def mlp_projector(in_features: int, out_features: int) -> nn.Sequential:
    """Three linear layers without bias, all `out_features` wide, with BatchNorm and ReLU after the first two."""

    def layer(before: int) -> list[nn.Module]:
        return [nn.Linear(before, out_features, bias=False), nn.BatchNorm1d(out_features), nn.ReLU()]

    last = nn.Linear(out_features, out_features, bias=False)
    return nn.Sequential(*layer(in_features), *layer(out_features), last)


class PooledTaps:
    """`taps(x)` is a list with one vector a clip [B,D] for each named layer of a network (see `pooled`).

    The network runs only as far as the last of them: its head is left out.
    """

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.taps = Taps(network, self.names, stop_early=True)

    def __call__(self, inputs: Tensor) -> list[Tensor]:
        features = self.taps(inputs).features
        return [pooled(features[name]) for name in self.names]

    @torch.no_grad()
    def widths(self, example: Tensor) -> list[int]:
        """D of each layer, learned from one run in eval mode (BatchNorm must not count the example)."""
        network = self.taps.model
        modes = {module: module.training for module in network.modules()}
        network.eval()
        widths = [feature.shape[1] for feature in self(example)]
        for module, training in modes.items():
            module.training = training
        return widths


class Exits(nn.Module):
    """A network that answers at several depths: (logits of the last layer, [logits of each earlier exit]), all [B,K].

    The last layer has a linear classifier on its `pooled` output, each earlier one an `mlp_projector`. What lies behind
    the last layer (the network's own head) is not run.

    Args:
        network: whose layers are named.
        exits, last: names of layers as in `network.named_modules()`.
        num_classes: K.
        example: inputs of the network; it is run once to learn the layers' widths.
    """

    def __init__(self, network: nn.Module, exits: Sequence[str], last: str, num_classes: int, example: Tensor) -> None:
        super().__init__()
        self.network = network
        self.taps = PooledTaps(network, [*exits, last])
        widths = self.taps.widths(example)
        self.classifier = nn.Linear(widths[-1], num_classes)
        self.projectors = nn.ModuleList(mlp_projector(width, num_classes) for width in widths[:-1])

    def forward(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        *early, last = self.taps(inputs)
        return self.classifier(last), [project(x) for project, x in zip(self.projectors, early, strict=True)]


# ---------------------------------------------------------------- loading


class SpectrogramLogits(LogitsOf):
    """A transformers classifier of spectrograms: [B,1,M,T] to logits [B,K].

    It reads a fixed number of frames: further ones are cut off, missing ones are zeros.
    """

    def forward(self, spectrogram_B1MT: Tensor) -> Tensor:
        config: Any = self.model.config
        missing = config.max_length - spectrogram_B1MT.shape[-1]
        return self.model(input_values=F.pad(spectrogram_B1MT, (0, missing))[:, 0].mT).logits


class WaveformLogits(LogitsOf):
    """A transformers classifier of waveforms: [B,T] to logits [B,K]."""

    def forward(self, audio_BT: Tensor) -> Tensor:
        return self.model(input_values=audio_BT).logits


_READS_MORE = ("whisper", "wav2vec2-bert")  # of transformers' audio classifiers: they have a front end of their own


def load_audio_model(
    name: str | Path | nn.Module,
    *,
    num_classes: int | None = None,
    n_mels: int | None = None,
    n_frames: int | None = None,
    weights: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    new_head: bool = False,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The classifier of sounds of that name: spectrogram [B,1,M,T], or waveform [B,T], to logits [B,K].

    `name` is one of

    - `audio_ntt`, or a reference net for pictures of one channel (`small_cnn`, ...); `config` holds further arguments;
    - `hf-config:<type>`: an audio classifier of transformers with random weights: `audio-spectrogram-transformer` reads
      spectrograms, `wav2vec2`, `hubert`, `wavlm`, ... read waveforms at 16 kHz; `config` overrides its configuration;
    - `hf:<hub id or folder>`: the same with its weights (safetensors only);
    - a folder that `save_model` or transformers wrote, or an `nn.Module`.

    `num_classes`, `n_mels` and `n_frames` describe a new network. `new_head=True` gives a checkpoint a random head of
    `num_classes`.

    Raises `UserError` as `load_model` does, and for types that read neither.
    """
    if isinstance(name, nn.Module):
        return load_model(name, weights=weights)
    text = str(name)
    asked = {"num_labels": num_classes, "num_mel_bins": n_mels, "max_length": n_frames}
    asked = {key: value for key, value in asked.items() if value is not None}
    folder = Path(text.removeprefix("hf:"))
    if text.startswith("hf-config:"):
        built = new_configuration(text[10:], asked, config or {})
        wrapper = _reads(built)
        model: nn.Module = wrapper(from_configuration(_auto(), built, attn_implementation))
    elif text.startswith("hf:") or (folder / "config.json").exists():
        model = _pretrained(
            str(folder) if folder.exists() else text[3:], asked, new_head, attn_implementation, trust_remote_code
        )
    else:
        config = {**({"n_mels": n_mels} if text == "audio_ntt" and n_mels else {}), **(config or {})}
        shape = {} if (folder / DESCRIPTION).exists() else {"num_classes": num_classes, "in_channels": 1}
        model = load_model(name, config=config, **shape)  # type: ignore[arg-type]
        _check_bands(model, n_mels)
    if weights is not None:
        load_weights(core_network(model), weights)
    return model


def _pretrained(
    source: str, asked: dict[str, Any], new_head: bool, attn_implementation: str | None, trust_remote_code: bool
) -> nn.Module:
    stated = read_configuration(source, trust_remote_code)
    classes = asked.get("num_labels", stated.num_labels)
    if classes != stated.num_labels and not new_head:
        raise UserError(
            f"'{source}' has {stated.num_labels} classes, {classes} were asked for; choose a checkpoint with {classes} "
            "classes, or pass new_head=True to fine-tune it with a random head."
        )
    bands = getattr(stated, "num_mel_bins", None)
    if bands is not None and asked.get("num_mel_bins", bands) != bands:
        raise UserError(
            f"'{source}' reads {bands} mel bands, the data have {asked['num_mel_bins']}; set n_mels={bands}."
        )
    stated.num_labels = classes
    wrapper = _reads(stated)
    model, random = from_checkpoint(_auto(), source, stated, attn_implementation, trust_remote_code, new_head)
    if random and not new_head:
        raise UserError(
            f"'{source}' has no weights for {len(random)} parts (first '{random[0]}'), which would be random; "
            "pass new_head=True to fine-tune it, or choose a checkpoint with a trained classifier."
        )
    return wrapper(model)


def _auto() -> Any:
    from transformers import AutoModelForAudioClassification

    return AutoModelForAudioClassification


def _reads(config: Any) -> type[LogitsOf]:
    """The wrapper for what models of that configuration read."""
    from transformers import MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING

    if type(config) not in MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING or config.model_type in _READS_MORE:
        raise UserError(
            f"'{config.model_type}' is no classifier of log-mel spectrograms or waveforms in transformers; take "
            "audio-spectrogram-transformer, wav2vec2, hubert or wavlm, or pass an nn.Module."
        )
    return SpectrogramLogits if hasattr(config, "num_mel_bins") else WaveformLogits


def _check_bands(model: nn.Module, n_mels: int | None) -> None:
    core = core_network(model)
    if isinstance(core, AudioNTT) and n_mels is not None:
        built = core.origin["config"]["n_mels"]  # type: ignore[index]
        if built != n_mels:
            raise UserError(f"This audio_ntt reads {built} mel bands, the data have {n_mels}; set data.n_mels={built}.")
