"""`limbeck label`: the teacher of a recipe answers for its samples once, into a store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from limbeck.data import View, make_view
from limbeck.errors import UserError
from limbeck.recipes import recipe as recipes
from limbeck.recipes.recipe import Parsed, plain
from limbeck.recipes.run import build_teacher, trainers_of
from limbeck.teachers import Answers, Filling, Frozen, Store, Teacher
from limbeck.train import Trainer

PRECISIONS = {"32-true": "32", "bf16-mixed": "bf16", "16-mixed": "16"}


@dataclass(frozen=True)
class Labelling:
    """What is to be labelled, in plain values, so that every process that takes part builds the same plan from it.

    Attributes:
        recipe: content of the recipe, settings included.
        store: folder of the store; it must be the same for all processes.
        section: of the recipe's teacher.
        streams: names of streams or splits (`labelled`, `train`, `unlabelled`, `validation`, `test`); default: all
            streams of a `Method`; of a system of several stages `train`, and `unlabelled` where there is one.
        views: names of the recipe's views, or views by name as streams have them; default: those of the first stream
            that is labelled, or what models read as it is.
        answers: what is kept of the outputs.
        batch_size: samples in a forward pass; default: that of the recipe's stream, with which a live teacher's answers
            are those of the store to the last bit, or 256 where the recipe has none.
        features: names of the teacher's inner modules whose outputs are kept.
        networks: folder of networks that other recipes train first; the default of `run` for the same recipe.
    """

    recipe: dict[str, Any]
    store: str
    section: str = "teacher"
    streams: tuple[str, ...] | None = None
    views: Any = None
    answers: Answers = field(default_factory=Answers)
    features: tuple[str, ...] = ()
    networks: str = "runs/networks"
    batch_size: int | None = None
    allow_imports: bool = False

    def fillings(self, progress: bool = False, single: bool = False) -> Iterator[Filling]:
        """One filling a stream, made when the one before is complete: later ones append what is still missing.

        `single` refuses more than one, for processes that do not wait for each other.
        """
        parsed = recipes.parse(self.recipe, self.allow_imports)
        seed = parsed.settings.seed
        data = parsed.task.prepare_data(plain(parsed.settings.data), seed)
        how = _how(next(iter(trainers_of(parsed, seed, progress).values())))
        teacher = self._teacher(parsed, data, progress)
        names = self._streams(parsed, data)
        if single and len(names) > 1:
            raise UserError(
                f"processes share out one stream at a time, and {', '.join(names)} would be labelled; name one by "
                f"--streams {names[0]}"
            )
        for name in names:
            samples = parsed.task.samples(data, name)
            read = parsed.task.view_field(samples)
            yield Filling(
                Path(self.store),
                teacher,
                samples,
                views=self._views(parsed, name),
                field=read,
                answers=self.answers,
                batch_size=self.batch_size or _batch_size(parsed, name),
                seed=seed,
                name=data.name,
                **how,
            )

    def _teacher(self, parsed: Parsed, data: Any, progress: bool) -> Teacher:
        kinds = parsed.interface.networks
        if kinds.get(self.section) is not Teacher:
            known = ", ".join(name for name, kind in kinds.items() if kind is Teacher) or "none"
            raise UserError(f"the recipe has no teacher in a section '{self.section}' (teachers: {known})")
        networks, answers = Path(self.networks), Path(self.store)
        teacher = build_teacher(
            parsed, self.section, data, networks, self.allow_imports, progress, answers=answers, live=True
        )
        if isinstance(teacher, Frozen) and {"embedding", "features"} & set(self.answers.keep):
            return Frozen(teacher.model, taps=self.features, embedding="embedding" in self.answers.keep)
        return teacher

    def _streams(self, parsed: Parsed, data: Any) -> tuple[str, ...]:
        if self.streams:
            return self.streams
        if parsed.interface.is_method:
            return tuple(parsed.system.streams)
        return ("train",) if data.unlabelled is None else ("train", "unlabelled")

    def _views(self, parsed: Parsed, stream: str) -> dict[str, View] | None:
        """The views to label, by name; None stands for what models read as it is."""
        if isinstance(self.views, Mapping):
            return {name: _made(spec) for name, spec in self.views.items()}
        known = _views_of(parsed, stream)
        names = self.views if self.views is not None else list(known)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise UserError(
                f"the recipe has no view '{unknown[0]}' to label, it has {', '.join(known) or 'none'}; describe it: "
                f"--views '{{{unknown[0]}: {{name: multi_crop, crops: 1}}}}'"
            )
        return {name: _made(known[name]) for name in names} or None


def _views_of(parsed: Parsed, stream: str) -> dict[str, Any]:
    """The recipe's views: those of the stream, or of all streams where the name is that of a split."""
    if not parsed.interface.is_method:
        return {}
    streams = vars(parsed.settings.streams)
    chosen = [streams[stream]] if stream in streams else list(streams.values())
    return {name: spec for settings in chosen for name, spec in settings.views.items()}


def _batch_size(parsed: Parsed, stream: str) -> int:
    """That of the recipe's stream of this name, or of its first one where the name is that of a split."""
    if not parsed.interface.is_method:
        return 256
    streams = vars(parsed.settings.streams)
    return streams.get(stream, next(iter(streams.values()))).batch_size


def _made(spec: Any) -> View:
    arguments = {"name": spec} if isinstance(spec, str) else dict(spec)
    return make_view(arguments.pop("name"), **arguments)


def _how(trainer: Trainer) -> dict[str, Any]:
    """Device, precision and memory format as training has them, so that stored answers are those of a live teacher."""
    return {
        "device": trainer.fabric().device,
        "precision": PRECISIONS[trainer.precision],
        "memory_format": torch.channels_last if trainer.channels_last else None,
    }


def label(
    recipe: str | Path | Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    *,
    store: str | Path | None = None,
    section: str = "teacher",
    streams: Sequence[str] | None = None,
    views: Any = None,
    keep: Sequence[str] = ("logits",),
    features: Sequence[str] = (),
    top_k: int | None = None,
    values: str | None = None,
    dtype: str = "float32",
    versions: int = 1,
    batch_size: int | None = None,
    share: tuple[int, int] | None = None,
    workers: int = 0,
    ray: int | None = None,
    address: str | None = None,
    allow_imports: bool = False,
    progress: bool = False,
    say: Callable[[str], Any] = lambda line: None,
) -> Store | None:
    """Fill a store with the answers of a recipe's teacher, or append the samples that it lacks.

    A filling that was broken off goes on where it was; the result is that of an uninterrupted one, byte for byte.

    Args:
        recipe, settings, allow_imports: as `run` takes them.
        store: the folder; by default the recipe's `teacher.store`.
        section, streams, views, batch_size: see `Labelling`.
        features: names of the teacher's inner modules (`model.named_modules()`) whose outputs are kept too.
        keep, top_k, values, dtype, versions: see `limbeck.teachers.Answers`; a teacher that only knows its likeliest
            classes gives log-probabilities.
        share: (i, n): this process takes every n-th block from the i-th on; the last one to finish completes the store.
        workers: processes that decode pictures.
        ray: label with that many Ray workers, on the cluster at `address` or on this machine.
        progress: show a bar.

    Returns:
        The complete store, or None while other processes are still at it.

    Raises:
        UserError: the recipe has no such teacher, or the folder holds something else.
    """
    content = recipes.override(recipes.read(recipe), settings or {})
    content.pop("claim", None)
    content.setdefault("seed", 0)
    given = (content.get(section) or {}) if isinstance(content.get(section), Mapping) else {}
    folder = store or given.get("store")
    if folder is None:
        raise UserError("say where the answers go: --store <folder>")
    if top_k is None and "served" in given:
        top_k = int(given["served"].get("top_k", 5))
    keep = [*keep, "features"] if features and "features" not in keep else keep
    if "features" in keep and not features:
        raise UserError("say which features to keep, by the names of the teacher's modules: features=[layer2, layer3]")
    kept = values or ("log_probabilities" if "served" in given else "logits")
    name = recipe if isinstance(recipe, str | Path) else content["method"]["name"]
    plan = Labelling(
        content,
        str(recipes.expand(str(folder))),
        section,
        tuple(streams) if streams else None,
        views,
        Answers(tuple(keep), top_k, kept, dtype, versions),  # type: ignore[arg-type]
        tuple(features),
        str(Path("runs") / recipes.name_of(name) / "networks"),
        batch_size,
        allow_imports,
    )
    made: Store | None = None
    for number, filling in enumerate(plan.fillings(progress, single=share is not None)):
        say(f"{len(filling.samples):,} samples to label, {filling.left():,} of {filling.blocks:,} parts left")
        if ray is not None:
            from limbeck.recipes.cluster import label_on_ray

            label_on_ray(plan, number, filling, workers=ray, address=address, progress=progress)
            made = filling.seal()
        else:
            made = filling.run(share, workers, progress)
        if made is None:
            return None
    return made
