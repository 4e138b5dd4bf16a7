"""`Method`: one published system's training objective, and `Clock`: where in its run it stands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from limbeck.data import Stream
from limbeck.errors import UserError
from limbeck.models import class_count
from limbeck.teachers import Teacher
from limbeck.train.schedule import Schedule
from limbeck.train.trainer import Trainer

Fields = Mapping[str, Any]  # one stream's batch: a tensor [B, ...] or a dict of tensors for each field
Batch = Mapping[str, Fields]  # all streams
Losses = dict[str, Tensor]  # named scalars


@dataclass
class Clock:
    """Where a run stands. `step` counts optimiser steps that are done, `epoch` whole epochs that are done."""

    step: int = 0
    steps: int = 1
    steps_per_epoch: int = 1

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch

    @property
    def epochs(self) -> int:
        return -(-self.steps // self.steps_per_epoch)

    @classmethod
    def of(cls, method: Method, streams: Mapping[str, Stream], trainer: Trainer) -> Clock:
        """The clock of a run at its start; an optimiser step takes `accumulate` batches of each stream."""
        per_epoch = max(1, streams[method.epoch_stream].steps_per_epoch // trainer.accumulate)
        return cls(steps=trainer.steps or (trainer.epochs or 0) * per_epoch, steps_per_epoch=per_epoch)


class Method(nn.Module):
    """A training objective: what it needs, what it computes on a batch, and what ships in the end.

    A subclass sets `student` (and `teacher`, when it has one), declares the fields that it reads of each stream,
    and writes `training_step` as the paper's algorithm box. Everything else has a default.

    Attributes:
        streams: for each stream the fields that `training_step` reads: views and `label`, `index`, ...
        epoch_stream: the stream whose length is an epoch.
        weights: factor of each loss term in the sum (1 where absent); a `Schedule` may stand for a number.
        clock: where the run stands; set by the loop, read by the method.
        logged: values that `log` was given in this step.
        optimizers: the optimiser of each part while a run lasts; set by the loop, for methods that roll a step back.
    """

    streams: Mapping[str, tuple[str, ...]] = {"labelled": ("weak", "label")}
    epoch_stream: ClassVar[str] = "labelled"

    student: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.weights: dict[str, float | Schedule] = {}
        self.logged: dict[str, Tensor | float] = {}
        self.optimizers: dict[str, Any] = {}

    def training_step(self, batch: Batch) -> Losses | Iterator[tuple[str, Losses]]:
        """The named loss terms of one step, each a scalar.

        A method that updates several parts in turn yields `(part, losses)` one after another: the loop updates that
        part by the weighted sum of these losses before it asks for the next. Only the part's own parameters get
        gradients. A part that is not yielded keeps still in this step.
        """
        raise NotImplementedError

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The groups of parameters that are updated together, by name; one optimiser each."""
        return {"student": [p for p in self.parameters() if p.requires_grad]}

    def networks(self) -> list[nn.Module]:
        """The modules that `training_step` calls; each is compiled by itself when the trainer says so."""
        return list(self.children())

    def prepare(self, streams: Mapping[str, Stream]) -> None:
        """Build what depends on the data (tables by index, class priors); called once, before weights are restored."""

    def after_step(self) -> None:
        """Called after every optimiser step of the loop, when all parts are updated: EMA teachers, controllers."""

    def after_epoch(self) -> None:
        """Called after the last step of each epoch, before evaluation."""

    def tune(self, validation: Iterable[Fields]) -> None:
        """Choose what is chosen on validation data (mixing factors, thresholds); called before each evaluation.

        The batches have the fields of the method's first stream, every view being the unchanged input.
        """

    def shipped(self) -> nn.Module:
        """The module that is evaluated, saved and exported: inputs to outputs, without teacher or training heads."""
        return self.student

    def forward(self, inputs: Any) -> Any:
        return self.shipped()(inputs)

    def now(self, value: float | Schedule) -> float:
        """A number, or the value that a schedule has at this step."""
        return value(self.clock.step, self.clock.steps) if isinstance(value, Schedule) else value

    def log(self, **values: Tensor | float) -> None:
        """Keep numbers beside the losses in the metrics; tensors are detached and read at the logging interval."""
        for name, value in values.items():
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(f"log was given {name} of shape {list(value.shape)}; give one number, e.g. its mean")
            self.logged[name] = value.detach() if isinstance(value, Tensor) else float(value)

    def teachers(self) -> dict[str, Teacher]:
        """The frozen teachers by attribute name; `to` and `state_dict` pass them by, for they are no submodules."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Teacher)}

    def check(self, streams: Mapping[str, Stream]) -> None:
        """Compare what the method declares with what it was given.

        Raises:
            UserError: a stream or field is missing, class counts differ, or a label is out of the student's range.
        """
        name = type(self).__name__
        for stream, fields in self.streams.items():
            if stream not in streams:
                raise UserError(
                    f"{name} needs the stream '{stream}' with the fields {', '.join(fields)}, but was given only "
                    f"{', '.join(streams) or 'none'}; add '{stream}' to the streams"
                )
            given = {*streams[stream].samples.fields, *streams[stream].views, *streams[stream].moved_fields, "index"}
            for field in fields:
                if field not in given:
                    kind = "field 'label'" if field == "label" else f"view '{field}'"
                    view, _, carried = field.partition("_")
                    where = "samples" if field == "label" else "views"
                    if view in streams[stream].views and carried:  # `weak_mask`: the view is there, the masks are not
                        kind, where = f"field '{carried}'", "samples"
                    raise UserError(
                        f"{name} reads the {kind} of the stream '{stream}', which has {', '.join(sorted(given))}; "
                        f"add it to the stream's {where}"
                    )
        student_classes = class_count(self.student) if isinstance(getattr(self, "student", None), nn.Module) else None
        if student_classes is None:
            return
        for attribute, teacher in self.teachers().items():
            if teacher.class_count not in (None, student_classes):
                raise UserError(
                    f"the {attribute} has {teacher.class_count} classes and the student {student_classes}; "
                    "give both the classes of the data, in the same order"
                )
        for stream in self.streams:
            if (
                "label" in self.streams[stream]
                and (top := int(streams[stream].samples.labels.max())) >= student_classes
            ):
                raise UserError(
                    f"the stream '{stream}' holds the label {top}, but the student has {student_classes} classes "
                    f"(labels 0 to {student_classes - 1}); build the student with num_classes={top + 1} "
                    "or mend the labels"
                )
