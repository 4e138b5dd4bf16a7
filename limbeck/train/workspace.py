"""The folder of a run: what was asked for, the results of every stage, and what is left to do."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import yaml
from lightning_fabric import Fabric
from torch import Tensor, nn

from limbeck.data import Samples, Stream, View, to_device
from limbeck.distributed import rank, world_size
from limbeck.errors import UserError
from limbeck.files import write_text
from limbeck.teachers import Dtype, Stored, Teacher, Values, fill
from limbeck.train.checkpoint import load_tensors, save_tensors, seed_everything
from limbeck.train.exhibits import Exhibit
from limbeck.train.logs import read_csv
from limbeck.train.loop import Evaluator, Fit, fit, place
from limbeck.train.method import Clock, Method
from limbeck.train.trainer import Trainer

M = TypeVar("M", bound=Method)


class Workspace:
    """A run on disk: `recipe.yaml`, and one folder a stage under `stages/`.

    A system of several stages is a plain function that calls `fit`, `label`, `compute` and `measure` one after
    another. Run again after a crash, complete stages load and the broken one goes on in mid-epoch, bit for bit as if
    nothing had happened: random numbers are seeded anew by (seed, stage) where a stage begins and where it ends.

    Attributes:
        fits: what each training stage left behind.
        seconds: what each stage took.
        measured: the numbers of `measure`, as `<stage>.<name>`.
        exhibits: what `show` was given, by caption.

    Args:
        path: the folder; made when it is not there.
        config: what was asked for. A folder that holds another run's configuration is refused.
        seed: of everything that is drawn between stages (initial weights).
        evaluator: what `fit` measures on validation data when it is given no other.
        fabric: devices that were launched; None lets every stage's trainer launch its own.
    """

    def __init__(
        self,
        path: str | Path,
        config: Mapping[str, Any] | None = None,
        *,
        seed: int = 0,
        evaluator: Evaluator | None = None,
        fabric: Fabric | None = None,
    ) -> None:
        self.path, self.seed, self.evaluator, self.fabric = Path(path), seed, evaluator, fabric
        self.fits: dict[str, Fit] = {}
        self.measured: dict[str, float] = {}
        self.exhibits: dict[str, Exhibit] = {}
        self.seconds: dict[str, float] = {}
        if config is not None:
            asked = dict(config)
            self._first(lambda: self._own(asked))
        seed_everything(seed, "workspace")

    def _own(self, config: dict[str, Any]) -> None:
        file = self.path / "recipe.yaml"
        if file.exists():
            found = yaml.safe_load(file.read_text())
            asked = yaml.safe_load(yaml.safe_dump(config))
            if found != asked:
                raise UserError(
                    f"the workspace {self.path} belongs to another recipe ({_first_difference(found, asked)}); "
                    "choose another folder with --workspace, or delete this one"
                )
        else:
            write_text(file, yaml.safe_dump(config, sort_keys=False))

    def folder(self, stage: str) -> Path:
        """Where a stage keeps its files."""
        return self.path / "stages" / stage

    def done(self, stage: str) -> bool:
        """Whether a stage is complete."""
        return (self.folder(stage) / "done.json").exists()

    def fit(
        self,
        stage: str,
        method: M,
        streams: Mapping[str, Stream],
        trainer: Trainer,
        *,
        validation: Samples | None = None,
        evaluator: Evaluator | None = None,
    ) -> M:
        """Train a method as one stage, or load what this stage left behind. Returns the method, in eval mode."""
        folder = self.folder(stage)
        if self._done_for_all(stage):
            self._restore(stage, method, streams, trainer)
        else:
            evaluator = evaluator or self.evaluator
            result = fit(
                method,
                streams,
                trainer,
                validation=validation,
                evaluator=evaluator if validation is not None else None,
                folder=folder,
                name=stage,
                fabric=self.fabric,
            )
            self._first(lambda: save_tensors(folder / "method.safetensors", method.state_dict()))
            self._complete(stage, metrics=result.metrics, seconds=result.seconds, steps=result.steps)
        for name in ("checkpoint.pt", "best.safetensors"):
            (folder / name).unlink(missing_ok=True)
        self.fits[stage] = Fit(
            **self._record(stage), train=_rows(folder / "train.csv"), validation=_rows(folder / "validation.csv")
        )
        self.seconds[stage] = self.fits[stage].seconds
        seed_everything(self.seed, stage, "done")
        return method

    def _restore(self, stage: str, method: Method, streams: Mapping[str, Stream], trainer: Trainer) -> None:
        streams = {name: streams[name] for name in method.streams if name in streams}
        for name, stream in streams.items():
            stream.open(name, seed=trainer.seed, rank=rank(), world_size=world_size())
        method.clock = Clock.of(method, streams, trainer)
        method.clock.step = self._record(stage)["steps"]
        method.prepare(streams)
        file = self.folder(stage) / "method.safetensors"
        try:
            method.load_state_dict(load_tensors(file))
        except RuntimeError as error:
            first = str(error).strip().splitlines()[-1].strip()
            raise UserError(
                f"{file} belongs to another architecture ({first}); delete {file.parent} to redo it"
            ) from error
        place(method, trainer, (self.fabric or trainer.fabric()).device)
        method.eval()

    def compute(self, stage: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors that one stage makes (pseudo-labels, synthetic data, codebooks): made once, then loaded."""
        file = self.folder(stage) / "tensors.safetensors"
        if not self._done_for_all(stage):
            started = time.perf_counter()
            seed_everything(self.seed, stage)
            tensors = make()
            self._first(lambda: save_tensors(file, tensors))
            self._complete(stage, metrics={}, seconds=time.perf_counter() - started, steps=0)
        self.seconds[stage] = self._record(stage)["seconds"]
        seed_everything(self.seed, stage, "done")
        return load_tensors(file)

    def measure(self, stage: str, make: Callable[[], Mapping[str, float]]) -> dict[str, float]:
        """Numbers that say how a stage went: measured once, and kept among the run's metrics as `<stage>.<name>`."""
        if not self._done_for_all(stage):
            started = time.perf_counter()
            seed_everything(self.seed, stage)
            values = {name: float(value) for name, value in make().items()}
            self._complete(stage, metrics=values, seconds=time.perf_counter() - started, steps=0)
        values = self._record(stage)["metrics"]
        self.measured.update({f"{stage}.{name}": value for name, value in values.items()})
        self.seconds[stage] = self._record(stage)["seconds"]
        seed_everything(self.seed, stage, "done")
        return values

    def evaluate(self, model: nn.Module, samples: Samples) -> dict[str, float]:
        """The metrics of a model by the workspace's evaluator, for `measure`."""
        if self.evaluator is None:
            raise UserError("this workspace has no evaluator; make it with Workspace(..., evaluator=...)")
        return dict(self.evaluator(model, samples))

    def show(self, caption: str, exhibit: Exhibit) -> None:
        """Put something to look at into the run's report."""
        self.exhibits[caption] = exhibit

    def label(
        self,
        stage: str,
        teacher: Teacher | Callable[[Mapping[str, Any], str], Any],
        samples: Samples,
        *,
        view: str = "image",
        keep: Sequence[str] = ("logits",),
        batch_size: int = 256,
        device: torch.device | str = "cpu",
    ) -> Samples:
        """The samples with the teacher's outputs added as fields, e.g. `logits` [N, C]; computed once, then loaded."""

        device = torch.device(device)

        def outputs() -> dict[str, Tensor]:
            stream = Stream(samples, batch_size, shuffle=False, drop_last=False)
            stream.open(stage, seed=0)
            if isinstance(teacher, Teacher | nn.Module):
                teacher.to(device)
            answers = []
            for _ in range(stream.steps_per_epoch):
                with torch.no_grad():
                    answers.append(teacher(to_device(stream.render(stream.next()), device), view))
            return {name: torch.cat([getattr(answer, name).cpu() for answer in answers]) for name in keep}

        return samples.with_fields(self.compute(stage, outputs))

    def store(
        self,
        stage: str,
        teacher: Teacher,
        samples: Samples,
        *,
        views: Mapping[str, View] | None = None,
        field: str = "image",
        keep: Sequence[str] = ("logits",),
        top_k: int | None = None,
        values: Values = "logits",
        dtype: Dtype = "float32",
        versions: int = 1,
        batch_size: int = 256,
    ) -> Stored:
        """The teacher's answers for these samples, on disk below this stage's folder; see `limbeck.teachers.fill`.

        What was filled stays after a crash, whatever its share. A teacher that answers from a store already is returned
        as it is; the next `fit` compares its samples.
        """
        if isinstance(teacher, Stored):
            return teacher
        folder = self.folder(stage) / "store"
        if not self._done_for_all(stage):
            started = time.perf_counter()
            fill(
                folder,
                teacher,
                samples,
                views=views,
                field=field,
                keep=keep,
                top_k=top_k,
                values=values,
                dtype=dtype,
                versions=versions,
                batch_size=batch_size,
                seed=self.seed,
                device=self.fabric.device if self.fabric else "cpu",
            )
            self._complete(stage, metrics={}, seconds=time.perf_counter() - started, steps=0)
        self.seconds[stage] = self._record(stage)["seconds"]
        return Stored(folder)

    def _complete(self, stage: str, **record: Any) -> None:
        self._first(lambda: write_text(self.folder(stage) / "done.json", json.dumps(record, indent=2)))

    @staticmethod
    def _first(write: Callable[[], Any]) -> None:
        """Let the first process write, and the others wait until it has."""
        if rank() == 0:
            write()
        if world_size() > 1:
            dist.barrier()

    def _done_for_all(self, stage: str) -> bool:
        """`done`, as it was before any process went on: the fastest must not complete the stage under the others."""
        done = self.done(stage)
        if world_size() > 1:
            dist.barrier()
        return done

    def _record(self, stage: str) -> dict[str, Any]:
        return json.loads((self.folder(stage) / "done.json").read_text())


def _rows(path: Path) -> list[dict[str, float]]:
    return read_csv(path) if path.exists() else []


def _first_difference(found: Any, asked: Any, key: str = "") -> str:
    """The first place where two configurations differ, in words."""
    if isinstance(found, dict) and isinstance(asked, dict):
        for name in {**found, **asked}:
            if found.get(name) != asked.get(name):
                return _first_difference(found.get(name), asked.get(name), f"{key}.{name}" if key else str(name))
    return f"there {key} is {found!r}, here {asked!r}"
