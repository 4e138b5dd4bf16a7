"""A teacher that was asked before: its answers are read from a store by the samples' numbers.

Letters: B samples, L places of a row of tokens, K kept classes, C classes or words, T kept tokens of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.data import EncodedImages, Identity, Samples, Stream
from limbeck.errors import UserError
from limbeck.models import Outputs, TopK
from limbeck.teachers.columns import decode, decode_top
from limbeck.teachers.filling import describe_view, scored_places
from limbeck.teachers.store import Store, sample_hashes
from limbeck.teachers.teacher import Teacher

COMPARED = 4096  # pictures that are not decoded yet are compared with the store's in so many places


class Stored(Teacher):
    """Answers from the store at `path`, for any method that takes a teacher.

    Before a stage's first step the streams' samples are compared with the store's. Views that the store has answers for
    are replayed from their stored parameters: in epoch e every sample shows version e modulo the number of versions.
    The answers are read one batch ahead of the loop, and go to the device with the batch.

    A batch is answered by `fields["index"]` and, of several versions, `fields["<view>_version"]`. Logits that were kept
    as the K likeliest become log-probabilities of all classes, the rest of the mass spread evenly; `top_k` keeps them
    sparse. Places of tokens that were not scored have uniform answers.

    Args:
        path: folder of the store.
        teacher: the teacher that is expected to have filled it.
        answer: the stored view that stands for every view that is asked for, whatever the student sees.
        verify: see `Store`.

    Raises:
        UserError: there is no complete store, it is damaged, or another teacher filled it.
    """

    def __init__(
        self, path: str | Path, *, teacher: Teacher | None = None, answer: str | None = None, verify: bool = True
    ) -> None:
        self.store = Store(path, verify=verify)
        manifest = self.store.manifest
        if teacher is not None and teacher.fingerprint() != manifest.teacher:
            raise UserError(
                f"the store {path} was filled by another teacher ({manifest.teacher[:12]}..., this one is "
                f"{teacher.fingerprint()[:12]}...); leave the teacher's name and weights out, or fill a store by it"
            )
        self.settings, self.versions = manifest.settings, self.store.versions
        self.views: dict[str, Any] = self.settings["views"]
        self.answer = answer
        if answer is not None and answer not in self.views:
            raise UserError(f"the store {path} has no view '{answer}', it has {', '.join(self.views)}")
        self.of_tokens = "place" in manifest.schema
        self.words: int | None = self.settings.get("classes")
        self.class_count = None if self.of_tokens else self.words
        self.sparse = self.settings["top_k"] is not None
        self.aliases: dict[str, str] = {}
        # Two stores may answer for the same view of one batch.
        self.tag = hashlib.sha256(manifest.to_json().encode()).hexdigest()[:8]

    def fingerprint(self) -> str:
        return self.store.manifest.teacher

    # -- answers ----------------------------------------------------------------------------------------------------

    def __call__(self, fields: Mapping[str, Any], view: str) -> Outputs:
        """All that was kept for this view, as float32 on the device of the batch."""
        view, columns = self._columns(fields, view)
        found = {name.partition(".")[0] for name in columns}
        outputs = Outputs()
        if "logits" in found:
            outputs.logits = (
                self._top(columns, fields, view).dense() if self.sparse else self._dense(columns, fields, view)
            )
        if "embedding" in found:
            outputs.embedding = decode("embedding", columns)
        for name in columns:
            if name.startswith("features.") and not name.endswith((".low", ".step")):
                outputs.features[name.removeprefix("features.")] = decode(name, columns)
        return outputs

    def top_k(self, fields: Mapping[str, Any], view: str, k: int) -> TopK:
        """The k likeliest of those that were kept, without filling up the others.

        Raises:
            UserError: fewer were kept.
        """
        if not self.sparse:
            return TopK.of(self.logits(fields, view), k)
        if k > self.settings["top_k"]:
            raise UserError(
                f"the store {self.store.path} kept {self.settings['top_k']} classes an item, {k} are wanted"
            )
        view, columns = self._columns(fields, view)
        return self._top(columns, fields, view).cut(k)

    def params(self, view: str, index: Tensor, version: Tensor) -> dict[str, Tensor]:
        """The parameters of a stored view for these samples and versions, [B, ...], to replay it by `view.apply`."""
        rows = self.store.rows(index.numpy(), version.numpy())
        prefix = f"{view}/params."
        names = [name for name in self.store.manifest.schema if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.store.take(name, rows) for name in names}

    def _columns(self, fields: Mapping[str, Any], view: str) -> tuple[str, dict[str, Tensor]]:
        """The stored view that answers, and its columns: those put into the batch, else read by index."""
        name = self._view(view)
        placed = fields.get(f"{name}_stored_{self.tag}")
        if placed is None:
            device = fields["index"].device
            version = fields.get(f"{name}_version", torch.zeros(1, dtype=torch.long))
            placed = self._read(name, fields["index"].cpu().numpy(), version.cpu().numpy())
            placed = {key: value.to(device) for key, value in placed.items()}
        return name, placed

    def _view(self, view: str) -> str:
        name = self.answer or self.aliases.get(view, view)
        if name not in self.views:
            raise UserError(
                f"the teacher is asked about the view '{view}' and the store {self.store.path} has answers for "
                f"{', '.join(self.views)}; fill it with that view, or name one that stands for all: teacher.answer"
            )
        return name

    def _read(self, view: str, index: np.ndarray, version: np.ndarray) -> dict[str, Tensor]:
        """The columns of one view at these rows; of tokens also the row and place that each belongs to."""
        rows = self.store.rows(index, version)
        prefix, columns = f"{view}/", {}
        for name, column in self.store.manifest.schema.items():
            if name.startswith(prefix) and not name.startswith(f"{view}/params."):
                take = self.store.take_tokens if column.tokens else self.store.take
                columns[name.removeprefix(prefix)] = take(name, rows)
        if self.of_tokens:
            counts = torch.from_numpy(self.store.count_tokens(rows))
            columns["row"] = torch.repeat_interleave(torch.arange(len(rows)), counts)
            columns["place"] = self.store.take_tokens("place", rows)
        return columns

    def _dense(self, columns: Mapping[str, Tensor], fields: Mapping[str, Any], view: str) -> Tensor:
        values = decode("logits", columns)
        return self._placed(values, columns, fields, view, 0.0) if self.of_tokens else values

    def _top(self, columns: Mapping[str, Tensor], fields: Mapping[str, Any], view: str) -> TopK:
        assert self.words is not None
        top = decode_top("logits", columns, self.words)
        if not self.of_tokens:
            return top
        k = top.ids.shape[-1]
        ids = self._placed(top.ids, columns, fields, view, 0)
        # Distinct words where nothing was stored, so that what is filled up is a distribution too.
        empty = self._placed(torch.ones_like(top.rest), columns, fields, view, 0.0) == 0
        ids = torch.where(empty[..., None], torch.arange(k, device=ids.device), ids)
        log_probs = self._placed(top.log_probs, columns, fields, view, float(-np.log(self.words)))
        return TopK(ids, log_probs, self._placed(top.rest, columns, fields, view, 1 - k / self.words), self.words)

    def _placed(
        self, values: Tensor, columns: Mapping[str, Tensor], fields: Mapping[str, Any], view: str, fill: float
    ) -> Tensor:
        """Items of tokens [T, ...] at their places, [B, L, ...]."""
        shape = fields[view if view in fields else self.settings["field"]]["input_ids"].shape
        out = values.new_full((*shape, *values.shape[1:]), fill)
        return out.index_put((columns["row"], columns["place"].long()), values)

    # -- before the first step ----------------------------------------------------------------------------------------

    def join(self, streams: Mapping[str, Stream]) -> None:
        """Compare the samples with the store's, have its views replayed, and put its answers beside the batches.

        Streams of which the store knows no sample are left alone: the method may never ask about them.

        Raises:
            UserError: samples are missing or others, or a view differs from the one that was labelled.
        """
        known = {name: self.store.has(stream.samples.index.numpy()) for name, stream in streams.items()}
        if not any(there.any() for there in known.values()):
            raise UserError(
                f"the store {self.store.path} ({self.store.manifest.data['name']}, {len(self.store)} rows) knows none "
                f"of the samples of {', '.join(streams)}; fill it with the data that you train on"
            )
        for name, there in known.items():
            if there.any():
                self.check(streams[name].samples, name)
                self._attach(streams[name])

    def check(self, samples: Samples, name: str = "labelled") -> None:
        """Compare the samples of a stream with those that the store was filled from. UserError where they differ."""
        index = samples.index.numpy()
        there = self.store.has(index)
        if not there.all():
            missing = index[~there]
            raise UserError(
                f"the store {self.store.path} lacks {len(missing)} of the {len(index)} samples of the stream '{name}' "
                f"(first: index {missing[0]}); `limbeck label` with these data appends them"
            )
        field = self.settings["field"]
        if field not in samples.fields:
            raise UserError(f"the store was filled from the field '{field}', the stream '{name}' has no such field")
        chosen = np.arange(len(index))
        if isinstance(samples.fields[field], EncodedImages) and len(index) > COMPARED:
            chosen = np.linspace(0, len(index) - 1, COMPARED).astype(np.int64)
        self.store.check_samples(index[chosen], sample_hashes(samples, field, chosen))
        self._check_places(name, samples)

    def _check_places(self, name: str, samples: Samples) -> None:
        """Every token that is scored here must have an answer."""
        scored_NL = scored_places(samples.fields)
        if not self.of_tokens or scored_NL is None:
            return
        rows = self.store.rows(samples.index.numpy())
        answered_NL = torch.zeros_like(scored_NL)
        row_T = torch.repeat_interleave(torch.arange(len(rows)), torch.from_numpy(self.store.count_tokens(rows)))
        place_T = self.store.take_tokens("place", rows).long()
        inside = place_T < scored_NL.shape[1]
        answered_NL[row_T[inside], place_T[inside]] = True
        lacking = (scored_NL & ~answered_NL).any(1).nonzero().flatten()
        if len(lacking):
            raise UserError(
                f"the stream '{name}' scores tokens that the store {self.store.path} has no answers for (first: index "
                f"{int(samples.index[lacking[0]])}); it was filled with other labels: fill one with these"
            )

    def _attach(self, stream: Stream) -> None:
        """Have the stream read answers beside its samples, and replay the views that were drawn."""
        asked, drawn = self._asked(stream.views)
        if any(set(drawn) & set(reader.drawn) for reader in stream.readers if isinstance(reader, _Reader)):
            raise UserError(
                f"two stores replay the view '{drawn[0]}'; give one of them answer=<a view without drawing>"
            )
        stream.beside(_Reader(self, asked, drawn))

    def _asked(self, views: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """The stored views that may be asked for, and those of them that are replayed."""
        if self.answer is not None:  # it stands for whatever the student sees, which stays as the stream draws it
            return [self.answer], []
        asked = [self.settings["field"]] if self.settings["field"] in self.views else []
        plain = next((view for view, described in self.views.items() if described == describe_view(Identity())), None)
        for view, made in views.items():
            if view in self.views:
                self._check_view(view, describe_view(made))
                asked.append(view)
            elif isinstance(made, Identity) and plain is not None:
                self.aliases[view] = plain
                asked.append(plain)
        asked = list(dict.fromkeys(asked))
        return asked, [view for view in asked if self._is_drawn(view)]

    def _is_drawn(self, view: str) -> bool:
        return any(name.startswith(f"{view}/params.") for name in self.store.manifest.schema)

    def _check_view(self, view: str, here: Mapping[str, Any]) -> None:
        there = self.views[view]
        if dict(here) != there:
            raise UserError(
                f"the store {self.store.path} has answers for the view '{view}' as {_words(there)}, and here it is "
                f"{_words(here)}; train on the same view, or let one stand for all by teacher.answer"
            )


class _Reader:
    """What a stream reads of a store beside its samples: a pure function of index and epoch."""

    def __init__(self, stored: Stored, views: list[str], drawn: list[str]) -> None:
        self.stored, self.views, self.drawn = stored, views, drawn

    def __call__(self, index: Tensor, epoch: int, position: int) -> dict[str, Any]:
        version = torch.full((len(index),), epoch % self.stored.versions)
        fields: dict[str, Any] = {}
        for view in self.views:
            fields[f"{view}_stored_{self.stored.tag}"] = self.stored._read(view, index.numpy(), version.numpy())
            if view in self.drawn:
                fields[f"{view}_version"] = version
                fields[f"{view}_params"] = self.stored.params(view, index, version)
        return fields


def _words(view: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{name}={value}" for name, value in view.items() if name != "view")
    return f"{view['view']}({settings})"
