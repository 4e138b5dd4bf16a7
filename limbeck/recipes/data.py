"""The data of a recipe: what `load_data` gives, made harder where the recipe asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from limbeck.data import Data, Samples, load_data, tokenize
from limbeck.data.splits import noisy_labels, split_labels
from limbeck.errors import UserError

NOT_IN_RECIPES = {"seed", "progress"}  # the recipe's own seed is used; the terminal decides about progress


def harder(data: Data, *, label_noise: float = 0.0, hidden_labels: bool = False, seed: int = 0) -> Data:
    """Change the training samples of a data set, before labels are taken away.

    Args:
        label_noise: share of the training labels that are replaced by another class, drawn evenly.
        hidden_labels: keep the true labels of unlabelled samples as the field `hidden_label`, which methods only use
            to measure themselves.
    """
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
        reader = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise UserError(f"there is no tokenizer '{tokenizer}' ({str(error).splitlines()[0]})") from error

    def read(split: Samples | None) -> Samples | None:
        return None if split is None else tokenize(split, reader, max_length)

    train, test = tokenize(data.train, reader, max_length), tokenize(data.test, reader, max_length)
    return replace(data, train=train, test=test, validation=read(data.validation), unlabelled=read(data.unlabelled))


def input_field(samples: Samples) -> str:
    """What a model reads of these samples: `image`, `tokens` or `features`."""
    for name in ("image", "tokens", "features"):
        if name in samples.fields:
            return name
    raise UserError(
        f"these samples have no image, tokens or features for a model to read, only {', '.join(samples.fields)}"
    )


def prepare_data(settings: Mapping[str, Any], seed: int) -> Data:
    """Load the data of a recipe, make it harder, and take labels away."""
    settings = dict(settings)
    labels = {name: settings.pop(name, None) for name in ("labels_per_class", "labelled_fraction")}
    keep = settings.pop("keep_labelled_in_unlabelled", True)
    changes = {name: settings.pop(name) for name in ("label_noise", "hidden_labels") if name in settings}
    tokens = {name: settings.pop(name) for name in ("tokenizer", "max_length") if name in settings}
    data = tokenized(load_data(settings.pop("name_or_path"), **settings, seed=seed), **tokens)
    data = harder(data, **changes, seed=seed)
    if all(value is None for value in labels.values()):
        return data
    labelled, unlabelled = split_labels(data.train, **labels, keep_labelled_in_unlabelled=keep, seed=seed)
    return replace(data, train=labelled, unlabelled=unlabelled)


def describe(data: Data) -> dict[str, Any]:
    """Name and sizes, for results and reports."""
    splits = {"train": data.train, "unlabelled": data.unlabelled, "validation": data.validation, "test": data.test}
    return {"name": data.name, "classes": data.num_classes, **{k: len(v) for k, v in splits.items() if v is not None}}


def stream_samples(data: Data, stream: str) -> Samples:
    """The samples that a stream of this name draws from."""
    if stream == "labelled":
        return data.train
    if stream == "unlabelled":
        if data.unlabelled is None:
            raise UserError(
                "the method needs the stream 'unlabelled', but the data have no unlabelled samples; set "
                "data.labels_per_class or data.labelled_fraction, or add an 'unlabelled' split"
            )
        return data.unlabelled
    raise UserError(
        f"no samples are known for the stream '{stream}'; pass streams={{'{stream}': Stream(...)}} from Python"
    )


def as_data(data: Any, seed: int) -> Data:
    """Data as they are, or loaded from a name, folder or mapping."""
    return data if isinstance(data, Data) else load_data(data, seed=seed)


def example_of(samples: Samples, rows: int = 1) -> Any:
    """The first samples as a model reads them: [rows, ...]."""
    value = samples.batch(torch.arange(rows))[input_field(samples)]
    return value.float() / 255 if isinstance(value, torch.Tensor) and value.dtype == torch.uint8 else value
