"""`Stage`: how one stage of a system trains, as a recipe says it; `StreamSettings`: how one of its streams is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from limbeck.data import Samples, Stream, make_view
from limbeck.errors import UserError
from limbeck.train.trainer import Trainer

READ_BY_VIEWS = ("image", "spectrogram", "audio", "tokens", "features")


@dataclass(frozen=True)
class StreamSettings:
    """Batches of one stream.

    Args:
        batch_size: samples of one process in one step.
        views: name of each view, and which one it is: a name (`weak`), a name with arguments
            (`{name: weak, padding: 4}`), or one on top of another view (`{name: photometric, of: weak}`).
        cycle: repeat a set that is smaller than a batch, or not a multiple of it, without dropping samples.
        workers: processes that decode images which do not fit into memory.
    """

    batch_size: int = 64
    views: dict[str, Any] = field(default_factory=lambda: {"weak": "identity"})
    cycle: bool = False
    workers: int = 0

    def on(self, samples: Samples, view_field: str | None = None) -> Stream:
        """The stream of these samples. `view_field` is what views read; by default the first known field there is."""
        views = {}
        for view, spec in self.views.items():
            arguments = {"name": spec} if isinstance(spec, str) else dict(spec)
            views[view] = make_view(arguments.pop("name"), **arguments)
        return Stream(
            samples,
            self.batch_size,
            views,
            cycle=self.cycle,
            workers=self.workers,
            view_field=view_field or viewed_field(samples),
        )


@dataclass(frozen=True)
class Stage:
    """The settings of one stage of a system: its trainer, and its streams by name."""

    trainer: Trainer
    streams: dict[str, StreamSettings] = field(default_factory=dict)

    def on(self, **samples: Samples | None) -> dict[str, Stream]:
        """The stage's streams, each on its samples: `stage.on(labelled=data.train, unlabelled=data.unlabelled)`.

        A stream that the recipe says nothing of gets the default settings.

        Raises:
            UserError: a stream has no samples, or the recipe sets one that the stage does not have.
        """
        unknown = set(self.streams) - set(samples)
        if unknown:
            raise UserError(f"the stage has no stream '{min(unknown)}'; it has {', '.join(samples)}")
        missing = [name for name, value in samples.items() if value is None]
        if missing:
            raise UserError(f"the stream '{missing[0]}' has no samples; the data have no such split")
        given: Mapping[str, Any] = samples
        return {name: self.streams.get(name, StreamSettings()).on(given[name]) for name in given}


def viewed_field(samples: Samples) -> str:
    """What a model reads of these samples, and views are applied to: `image`, `spectrogram`, `audio`, `tokens` or
    `features`."""
    for name in READ_BY_VIEWS:
        if name in samples.fields:
            return name
    raise UserError(
        f"these samples have no {', '.join(READ_BY_VIEWS)} for a model to read, only {', '.join(samples.fields)}"
    )
