"""Audio: one class of a sound, from its spectrogram or its waveform."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from limbeck.data import AudioData, Data, Samples, load_audio
from limbeck.evaluate import ClassificationEvaluator, Reliability, predict, reliability
from limbeck.models import load_audio_model
from limbeck.recipes.tasks.task import Evaluator, Task

SHOWN = 12  # sounds of the report's picture


class Audio(Task):
    """Accuracy and calibration of a classifier of sounds."""

    name = "audio"
    columns = ("accuracy", "nll", "ece", "parameters", "latency_ms", "seconds")
    load_data = staticmethod(load_audio)
    load_model = staticmethod(load_audio_model)

    def shape(self, data: Data, section: str) -> dict[str, Any]:
        classes = {"num_classes": data.num_classes}
        spectrogram = data.test.fields.get("spectrogram")
        return classes if spectrogram is None else {**classes, "n_mels": spectrogram.shape[2]} | _frames(data.test)

    def samples(self, data: Data, stream: str) -> Samples:
        """`unlabelled` are all training clips where no label is hidden."""
        if stream == "unlabelled" and data.unlabelled is None:
            return data.train.without("label")
        return super().samples(data, stream)

    def evaluator(self, data: Data) -> Evaluator:
        return ClassificationEvaluator(field=self.view_field(data.test))

    def exhibits(self, model: nn.Module, data: Data) -> dict[str, Figure]:
        if "spectrogram" not in data.test.fields:
            return {}
        chosen = torch.linspace(0, len(data.test) - 1, min(SHOWN, len(data.test))).long()
        shown = data.test.select(chosen)
        logits, labels = predict(model, shown, field=self.view_field(shown))
        return {"Test sounds: said, and heard by the model": _spectrograms(shown, logits.softmax(1).cpu(), data)}

    def reliability(self, model: nn.Module, data: Data) -> Reliability | None:
        return reliability(*predict(model, data.test, field=self.view_field(data.test)))


TASK = Audio()


def _frames(samples: Samples) -> dict[str, int]:
    return {"n_frames": samples.fields["spectrogram"].shape[3]}


def _spectrograms(samples: Samples, probabilities_NC: torch.Tensor, data: Data) -> Figure:
    """Log-mel spectrograms, low bands at the bottom, each with its class and what the model says of it."""
    figure = Figure(figsize=(9, 2 * -(-len(samples) // 4)), layout="constrained")
    axes = figure.subplots(-(-len(samples) // 4), 4, squeeze=False, sharex=True, sharey=True).flatten()
    front_end = data.front_end if isinstance(data, AudioData) else None
    seconds = samples.fields["spectrogram"].shape[3] * (front_end.hop / front_end.rate if front_end else 1.0)
    classes = data.classes or []
    for place, axis in enumerate(axes):
        axis.set_axis_off()
        if place >= len(samples):
            continue
        axis.set_axis_on()
        image = samples.fields["spectrogram"][place, 0].numpy()
        axis.imshow(image, origin="lower", aspect="auto", cmap="magma", extent=(0, seconds, 0, len(image)))
        said, (confidence, heard) = int(samples.labels[place]), probabilities_NC[place].max(0)
        right = said == int(heard)
        text = f"{classes[said]}: {'' if right else f'heard {classes[int(heard)]}, '}{100 * float(confidence):.0f} %"
        axis.set_title(text, fontsize=9, color="#222222" if right else "#D55E00")
    figure.supxlabel("Time (s)" if front_end else "Frame", fontsize=9)
    figure.supylabel("Mel band", fontsize=9)
    return figure
