"""Classification: one class of pictures, texts or tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from limbeck.data import Data, Samples, load_data, on_canvas, tokenize
from limbeck.data.splits import noisy_labels, split_labels
from limbeck.errors import UserError
from limbeck.evaluate import ClassificationEvaluator, Reliability, predict, reliability
from limbeck.recipes.tasks.task import NOT_IN_RECIPES, Evaluator, Task


class Classification(Task):
    """Accuracy and calibration of a classifier."""

    name = "classification"
    columns: ClassVar[tuple[str, ...]] = ("accuracy", "nll", "ece", "parameters", "latency_ms", "seconds")
    load_data = staticmethod(load_data)

    def add_data_arguments(self, parser: Any) -> None:
        super().add_data_arguments(parser)
        parser.add_function_arguments(harder, "data", as_group=False, skip={"data", "seed"})
        parser.add_function_arguments(tokenized, "data", as_group=False, skip={"data"})

    def prepare_data(self, settings: Mapping[str, Any], seed: int) -> Data:
        """Load the data, make them harder, and take labels away."""
        settings = {name: value for name, value in settings.items() if name not in NOT_IN_RECIPES}
        labels = {name: settings.pop(name, None) for name in ("labels_per_class", "labelled_fraction")}
        keep = settings.pop("keep_labelled_in_unlabelled", True)
        changes = {name: settings.pop(name) for name in ("label_noise", "hidden_labels", "canvas") if name in settings}
        tokens = {name: settings.pop(name) for name in ("tokenizer", "max_length") if name in settings}
        data = tokenized(load_data(settings.pop("name_or_path"), **settings, seed=seed), **tokens)
        data = harder(data, **changes, seed=seed)
        if all(value is None for value in labels.values()):
            return data
        labelled, unlabelled = split_labels(data.train, **labels, keep_labelled_in_unlabelled=keep, seed=seed)
        return replace(data, train=labelled, unlabelled=unlabelled if data.unlabelled is None else data.unlabelled)

    def shape(self, data: Data, section: str) -> dict[str, Any]:
        example = self.example(data)
        shape = {"num_classes": data.num_classes}
        if not isinstance(example, Tensor):
            return shape
        return {**shape, "in_channels": example.shape[1], "image_size": example.shape[-1] if example.ndim == 4 else 1}

    def evaluator(self, data: Data) -> Evaluator:
        return ClassificationEvaluator(field=self.view_field(data.test))

    def reliability(self, model: nn.Module, data: Data) -> Reliability | None:
        return reliability(*predict(model, data.test, field=self.view_field(data.test)))


TASK = Classification()


def harder(
    data: Data,
    *,
    label_noise: float = 0.0,
    hidden_labels: bool = False,
    canvas: int | None = None,
    seed: int = 0,
) -> Data:
    """Change the samples of a data set, before labels are taken away.

    Args:
        label_noise: share of the training labels that are replaced by another class, drawn evenly.
        hidden_labels: keep the true labels of unlabelled samples as the field `hidden_label`, which methods only use
            to measure themselves.
        canvas: paste every image, of all splits, at a random place of an empty square of so many pixels; the field
            `hidden_box` says where the object lies.
    """
    if canvas is not None:
        splits = {name: getattr(data, name) for name in ("train", "test", "validation", "unlabelled")}
        placed: Any = {name: on_canvas(split, canvas, seed) for name, split in splits.items() if split is not None}
        data = replace(data, **placed)
    train = noisy_labels(data.train, label_noise, seed) if label_noise > 0 else data.train
    if hidden_labels:
        train = train.with_fields({"hidden_label": data.train.labels})
    return replace(data, train=train)


def tokenized(data: Data, *, tokenizer: str | None = None, max_length: int = 128) -> Data:
    """Give samples with texts the field `tokens`.

    Args:
        tokenizer: folder or hub id of a transformers tokenizer; needed for data sets of texts.
        max_length: tokens behind it are cut off.
    """
    if "text" not in data.test.fields:
        return data
    if tokenizer is None:
        raise UserError(f"{data.name} holds texts; say which tokenizer reads them: data.tokenizer=<folder or hub id>")
    from transformers import AutoTokenizer

    try:
        reader = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"there is no tokenizer '{tokenizer}' ({str(error).splitlines()[0]})") from error

    def read(split: Samples | None) -> Samples | None:
        return None if split is None else tokenize(split, reader, max_length)

    train, test = tokenize(data.train, reader, max_length), tokenize(data.test, reader, max_length)
    return replace(data, train=train, test=test, validation=read(data.validation), unlabelled=read(data.unlabelled))
