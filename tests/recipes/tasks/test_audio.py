"""The task `audio`: what networks learn of the data, what is measured, what the report shows."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.data import AudioData, load_audio
from limbeck.models import load_audio_model
from limbeck.recipes import recipe as recipes
from limbeck.recipes.tasks import find_task

TASK = find_task("audio")


def sounds(features: str = "spectrogram", **labels: int) -> AudioData:
    waves: list[Tensor] = [torch.sin(torch.arange(2000) * (0.2 + 0.2 * (row % 2))) for row in range(16)]
    rows = {"audio": [(wave, 8000) for wave in waves], "label": [row % 2 for row in range(16)]}
    return load_audio({"train": rows, "test": rows}, seconds=0.25, n_mels=16, features=features, **labels)  # type: ignore[arg-type]


def test_a_new_network_fits_the_spectrograms() -> None:
    data = sounds()
    assert TASK.shape(data, "student") == {"num_classes": 2, "n_mels": 16, "n_frames": 26}
    model = load_audio_model("audio_ntt", **TASK.shape(data, "student"), config={"channels": 2, "width": 8})
    assert model(TASK.example(data, rows=3)).shape == (3, 2)


def test_waveforms_are_read_where_there_are_no_spectrograms() -> None:
    data = sounds("audio")
    assert TASK.shape(data, "student") == {"num_classes": 2}
    assert TASK.view_field(data.test) == "audio" and TASK.example(data).shape == (1, 2000)
    assert TASK.exhibits(torch.nn.Linear(2000, 2), data) == {}


def test_all_training_clips_are_unlabelled_where_no_label_is_hidden() -> None:
    data = sounds()
    assert "label" not in TASK.samples(data, "unlabelled").fields and len(TASK.samples(data, "unlabelled")) == 16
    few = sounds(labels_per_class=1)
    assert TASK.samples(few, "unlabelled") is few.unlabelled and TASK.samples(few, "labelled") is few.train


def test_metrics_and_exhibits_are_those_of_the_test_sounds() -> None:
    data = sounds()
    model = load_audio_model("audio_ntt", **TASK.shape(data, "student"), config={"channels": 2, "width": 8}).eval()
    right = (model(data.test.fields["spectrogram"]).argmax(1) == data.test.labels).float().mean()
    assert TASK.metrics(model, data)["accuracy"] == torch.tensor(float(right))
    (figure,) = TASK.exhibits(model, data).values()
    titles = [axis.get_title() for axis in figure.axes]
    assert len(titles) == 12 and all(title.startswith(("0:", "1:")) for title in titles)


def test_the_recipes_of_the_system_fit_it() -> None:
    base = recipes.read("unfused")
    claim = base.pop("claim")
    assert recipes.parse(base).trained == {"encoder": "delores-m"}
    for change in claim["arms"].values():
        parsed = recipes.parse(recipes.fit_to_method(recipes.merge(base, change)))
        assert parsed.task.name == "audio"
    tuned = recipes.merge(base, claim["arms"]["ssl encoder"])
    assert tuned["student"] == {"run": "delores-m"}  # a network that a recipe trains is described there alone
    encoder = recipes.parse(recipes.read("delores-m"))
    assert encoder.settings.data.test_groups == parsed.settings.data.test_groups  # nobody hears the test's speaker
