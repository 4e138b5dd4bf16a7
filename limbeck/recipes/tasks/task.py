"""`Task`: what the recipes of one kind of problem have in common. Each module of this folder holds one, as `TASK`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from limbeck.data import Data, Samples
from limbeck.errors import UserError
from limbeck.evaluate import Reliability
from limbeck.models import count_flops, count_parameters, count_weight_bytes, load_model, measure_latency
from limbeck.train.stage import viewed_field

NOT_IN_RECIPES = {"seed", "progress"}  # the recipe's own seed is used; the terminal decides about progress

Evaluator = Callable[[nn.Module, Samples], dict[str, float]]


class Task:
    """A subclass says how its data and networks are loaded, how they are measured, and what its reports show.

    Attributes:
        name: as cards and recipes write it.
        columns: the metrics of tables and reports, the main one first.
        load_data: function whose signature is the recipe's section `data`; it takes `seed` too and returns `Data`.
        load_model: function whose signature is the section of every network.
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    load_data: ClassVar[Callable[..., Data]]
    load_model: ClassVar[Callable[..., nn.Module]] = staticmethod(load_model)

    def add_data_arguments(self, parser: Any) -> None:
        """Add the keys of the section `data` to a jsonargparse parser."""
        parser.add_function_arguments(self.load_data, "data", skip={*NOT_IN_RECIPES})

    def prepare_data(self, settings: Mapping[str, Any], seed: int) -> Data:
        """The data that the section `data` describes."""
        return self.load_data(**settings, seed=seed)

    def shape(self, data: Data, section: str) -> dict[str, Any]:
        """What a new network of this section must know of the data, as arguments of `load_model`."""
        return {}

    def attach(self, data: Data, networks: Mapping[str, Any]) -> Data:
        """The data, once the run's networks are there by section: checked against them, or told of its teacher."""
        return data

    def save_beside(self, data: Data, folder: Path) -> None:
        """Write what the student in `folder` cannot be used without, its tokenizer say."""

    def samples(self, data: Data, stream: str) -> Samples:
        """The samples that a stream of this name draws from."""
        if stream == "labelled":
            return data.train
        samples = getattr(data, stream, None)
        if isinstance(samples, Samples):
            return samples
        if stream == "unlabelled":
            raise UserError(
                "the method needs the stream 'unlabelled', but the data have no unlabelled samples; set "
                "data.labels_per_class or data.labelled_fraction, or add an 'unlabelled' split"
            )
        raise UserError(
            f"no samples are known for the stream '{stream}'; pass streams={{'{stream}': Stream(...)}} from Python"
        )

    def view_field(self, samples: Samples) -> str:
        """The field that views read, and models of this task."""
        return viewed_field(samples)

    def example(self, data: Data, rows: int = 1) -> Any:
        """The first samples as the shipped model reads them, to count its operations and to export it.

        None where a model cannot be run by one tensor or dict of tensors.
        """
        value = data.test.batch(torch.arange(rows))[self.view_field(data.test)]
        return value.float() / 255 if isinstance(value, Tensor) and value.dtype == torch.uint8 else value

    def evaluator(self, data: Data) -> Evaluator:
        """`evaluator(model, samples)` gives the metrics of validation and test data."""
        raise NotImplementedError

    def metrics(self, model: nn.Module, data: Data) -> dict[str, float]:
        """Quality on the test data, and cost of one sample."""
        found, example = dict(self.evaluator(data)(model, data.test)), self.example(data)
        if example is not None:
            found |= {"flops": count_flops(model, example), "latency_ms": measure_latency(model, example)}
        return {**found, "parameters": count_parameters(model), "weight_bytes": count_weight_bytes(model)}

    def exhibits(self, model: nn.Module, data: Data) -> dict[str, Figure]:
        """What people look at, by caption: boxes, masks, samples."""
        return {}

    def reliability(self, model: nn.Module, data: Data) -> Reliability | None:
        """How well the model knows its own errors, where its outputs are probabilities of classes."""
        return None


def describe(data: Data) -> dict[str, Any]:
    """Name and sizes, for results and reports."""
    splits = {"train": data.train, "unlabelled": data.unlabelled, "validation": data.validation, "test": data.test}
    classes = {} if data.classes is None else {"classes": data.num_classes}
    return {"name": data.name, **classes, **{k: len(v) for k, v in splits.items() if v is not None}}
