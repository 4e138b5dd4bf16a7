"""Streams: endless, shuffled, resumable flows of batches from samples.

Shapes: B rows of a batch, C channels, H height, W width (of images) or W processes (in the order).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from limbeck.data.samples import Samples
from limbeck.data.views import On, View
from limbeck.errors import UserError

Reader = Callable[[Tensor, int, int], Mapping[str, Any]]  # index_B, epoch, position -> fields


class Stream:
    """A named flow of batches of `batch_size` samples for each process.

    The order is a pure function of (seed, name, epoch): with `perm` the epoch's permutation, rank r of W
    processes takes `perm[(step*W + r)*B : (step*W + r + 1)*B]` at each step, and the next epoch brings a new
    permutation (`shuffle=False`: always 0..N-1). What is left over is dropped; with `drop_last=False` it
    makes a last, shorter batch, equally long for all processes (under several, the first rows of the
    permutation fill it up). `cycle=True` is for few labels: nothing is dropped, the order is the endless
    concatenation of the permutations, so a set of 40 serves batches of 64 and each sample comes equally
    often; an epoch is then ceil(N / (B*W)) steps.

    `views` are applied by `render` to the field `view_field`, on the device, and stored under their names.
    The parameters of those views named in `record` are stored as `<view>_params`, to replay or keep them; a view whose
    parameters are in the batch already (put `beside` it) is replayed by them and draws nothing.
    Samples with masks or boxes get `<view>_mask`, `<view>_boxes` and `<view>_box_labels` beside each view; a box
    that a view leaves without area gets the label -1. A view made by `On` is applied to an earlier view.
    `workers` > 0 reads batches ahead in that many processes: for images that decode when they are asked for.

    Raises `UserError` at `open` where there are fewer samples than one step takes, unless `drop_last=False`
    or `cycle=True`.
    """

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        views: Mapping[str, View] | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        workers: int = 0,
        *,
        cycle: bool = False,
        view_field: str = "image",
        record: Sequence[str] = (),
    ) -> None:
        if batch_size < 1:
            raise UserError(f"A stream's batch_size is {batch_size}, expected at least 1.")
        if len(samples) == 0:
            raise UserError("A stream needs at least one sample, got none.")
        self.samples, self.batch_size, self.workers = samples, batch_size, workers
        self.views = dict(views or {})
        self.shuffle, self.drop_last, self.cycle, self.view_field = shuffle, drop_last, cycle, view_field
        taken = [name for name in self.views if name in samples.fields]
        if taken:
            raise UserError(f"The view {taken[0]!r} has the name of a field of the samples: give it another name.")
        if self.views and view_field not in samples.fields:
            raise UserError(f"Views need a field {view_field!r}, the samples have {', '.join(samples.fields)}.")
        unknown = [name for name in record if name not in self.views]
        if unknown:
            raise UserError(f"There is no view {unknown[0]!r} to record: the views are {', '.join(self.views)}.")
        self.carried = tuple(name for name in _CARRIED if name in samples.fields)
        self._check_views()
        self.record = tuple(record)
        self.readers: list[Reader] = []
        self.epoch, self.position = 0, 0
        self.name: str | None = None

    def beside(self, reader: Reader) -> None:
        """Put what `reader(index_B, epoch, position)` gives into every batch: fields of tensors, or dicts of tensors.

        It runs on the host, one batch ahead of the loop, and what it gives goes to the device with the batch. It must
        be a pure function of its arguments, so that a resumed run reads the same.
        """
        self.readers.append(reader)

    def open(self, name: str, seed: int, rank: int = 0, world_size: int = 1) -> None:
        """Name the stream and go to its start; once, before the first `next`."""
        per_step = self.batch_size * world_size
        if self.drop_last and not self.cycle and per_step > len(self.samples):
            raise UserError(
                f"The stream {name!r} has {len(self.samples)} samples but one step takes {per_step} "
                f"(batch_size {self.batch_size} x {world_size} processes): lower batch_size, or pass "
                "cycle=True to repeat them, or drop_last=False for one short batch."
            )
        self.name, self.seed, self.rank, self.world_size = name, seed, rank, world_size
        self.epoch, self.position = 0, 0
        for view in self._remembering().values():
            view.reset()
        self._permutations: dict[int, Tensor] = {}
        self._ahead: Iterator[dict] | None = None
        self._reading: tuple[ThreadPoolExecutor, dict[tuple[int, int], Future[dict]]] | None = None
        self._pin = torch.cuda.is_available()

    @property
    def steps_per_epoch(self) -> int:
        """Steps that go once through the samples."""
        self._require_open()
        per_step = self.batch_size * self.world_size
        whole = len(self.samples) // per_step
        return whole if self.drop_last and not self.cycle else -(-len(self.samples) // per_step)

    @property
    def moved_fields(self) -> list[str]:
        """Names of the masks and boxes that stand beside each view: `weak_mask`, `weak_boxes`, `weak_box_labels`."""
        fields = [*self.carried, *(["box_labels"] if "boxes" in self.carried else [])]
        return [f"{view}_{field}" for view in self.views for field in fields]

    def next(self) -> dict:
        """The next batch, on the host (pinned where there is CUDA); goes on into the next epoch."""
        self._require_open()
        rows = self._rows(self.epoch, self.position)
        batch = self._read_ahead() if self.workers else self.samples.batch(rows)
        if self.readers:
            batch |= self._read_beside(rows)
        self.epoch, self.position = self._after(self.epoch, self.position)
        return _pin(batch) if self._pin else batch

    def render(self, batch: dict) -> dict:
        """The batch, on its device, with images as float32 in [0,1] and every view under its name."""
        rendered = {name: _to_float(value) for name, value in batch.items()}
        for name, view in self.views.items():
            of = view.of if isinstance(view, On) else None
            images = rendered[of or self.view_field]
            params = rendered.get(f"{name}_params")
            if params is None and name not in self.record and not self.carried:
                rendered[name] = view(images)
                continue
            if params is None:
                params = view.draw(images)
            rendered[name] = view.apply(images, params)
            if name in self.record:
                rendered[f"{name}_params"] = params
            prefix = f"{of}_" if of else ""
            for field in self.carried:
                rendered.update(_carry(field, name, prefix, view, rendered, params))
        return rendered

    def _check_views(self) -> None:
        """Refuse a view on top of one that there is not, and one that would tear masks or boxes from their pixels."""
        names = list(self.views)
        for place, (name, view) in enumerate(self.views.items()):
            if isinstance(view, On) and view.of not in names[:place]:
                raise UserError(
                    f"The view {name!r} lies on the view {view.of!r}, which is not among the views before it "
                    f"({', '.join(names[:place]) or 'none'}): name that one first."
                )
            inner = _inner(view)
            for field in self.carried:
                if not getattr(inner, "keeps_place", False) and not hasattr(inner, _mover(field)):
                    raise UserError(
                        f"The view {name!r} ({type(inner).__name__}) moves pixels but cannot move the samples' "
                        f"{field}: use one that can, such as 'weak', or one that only recolours, such as 'photometric'."
                    )

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, what that place depends on, and what views remember (`log_mixup` does)."""
        self._require_open()
        remembered = {name: view.state_dict() for name, view in self._remembering().items()}
        views = {"views": remembered} if remembered else {}
        return {"epoch": self.epoch, "position": self.position, **self._identity(), **views}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place. Raises `UserError` where it belongs to another set, seed or batch size."""
        self._require_open()
        differing = [k for k, v in self._identity().items() if state.get(k) != v]
        if differing:
            key = differing[0]
            raise UserError(
                f"The saved place of stream {self.name!r} belongs to {key}={state.get(key)}, the stream has "
                f"{key}={self._identity()[key]}: resume with the same, or start anew."
            )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        for name, view in self._remembering().items():
            view.load_state_dict(state["views"][name])
        self._ahead = None

    def _remembering(self) -> dict[str, Any]:
        """The views that remember something of what they have seen."""
        inner = {name: _inner(view) for name, view in self.views.items()}
        return {name: view for name, view in inner.items() if hasattr(view, "state_dict")}

    def _identity(self) -> dict[str, int]:
        sizes = {"samples": len(self.samples), "batch_size": self.batch_size}
        return {**sizes, "seed": self.seed, "world_size": self.world_size}

    def _require_open(self) -> None:
        if self.name is None:
            raise RuntimeError("A stream must be opened before use: stream.open(name, seed).")

    def _after(self, epoch: int, position: int) -> tuple[int, int]:
        return (epoch, position + 1) if position + 1 < self.steps_per_epoch else (epoch + 1, 0)

    def _rows(self, epoch: int, position: int) -> Tensor:
        """int64 [B]: this rank's rows of the samples at one step."""
        size, batch_size = len(self.samples), self.batch_size
        start = position * self.world_size * batch_size
        if self.cycle:
            start += epoch * self.steps_per_epoch * self.world_size * batch_size
            places = start + self.rank * batch_size + torch.arange(batch_size)
            first, last = int(places[0]) // size, int(places[-1]) // size
            order = torch.cat([self._permutation(number) for number in range(first, last + 1)])
            return order[places - first * size]
        order = self._permutation(epoch)
        share = min(batch_size, -(-(size - start) // self.world_size))
        first = start + self.rank * share
        if first + share <= size:
            return order[first : first + share]
        return order[(first + torch.arange(share)) % size]

    def _permutation(self, number: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(len(self.samples))
        if number not in self._permutations:
            generator = torch.Generator().manual_seed(seed_of(f"{self.seed}/{self.name}/{number}"))
            # a step looks at neighbouring permutations only: those long past are forgotten
            self._permutations = {k: v for k, v in self._permutations.items() if k >= number - 1}
            self._permutations[number] = torch.randperm(len(self.samples), generator=generator)
        return self._permutations[number]

    def _read_ahead(self) -> dict:
        if self._ahead is None:
            # a copy, so that no cycle of references keeps the workers of a stream that is gone
            rows = copy.copy(self)._rows_from(self.epoch, self.position)
            self._ahead = read_rows(self.samples, rows, self.workers, seed=self.seed)
        try:
            return next(self._ahead)
        except UserError as error:  # a worker's error carries its traceback: its last line is the sentence
            self._ahead = None
            raise UserError(str(error).strip().splitlines()[-1].split("UserError: ")[-1]) from None

    def _read_beside(self, rows: Tensor) -> dict:
        """What the readers give for these rows, read while the loop was busy with the batch before."""
        here, ahead = (self.epoch, self.position), self._after(self.epoch, self.position)

        def read(rows: Tensor, place: tuple[int, int]) -> dict:
            index = self.samples.index[rows]
            return {name: value for reader in self.readers for name, value in reader(index, *place).items()}

        if self._reading is None:
            self._reading = ThreadPoolExecutor(1), {}
        pool, coming = self._reading
        found = coming.pop(here).result() if here in coming else read(rows, here)
        coming.clear()  # of another place, after a jump
        coming[ahead] = pool.submit(read, self._rows(*ahead), ahead)
        return found

    def _rows_from(self, epoch: int, position: int) -> Iterator[Tensor]:
        while True:
            yield self._rows(epoch, position)
            epoch, position = self._after(epoch, position)


_CARRIED = ("mask", "hidden_mask", "boxes")


def _mover(field: str) -> str:
    """The method of a view that moves this field."""
    return "apply_boxes" if field == "boxes" else "apply_mask"


def _inner(view: View) -> View:
    return view.view if isinstance(view, On) else view


def _carry(field: str, name: str, prefix: str, view: View, batch: Mapping[str, Any], params: Any) -> dict[str, Tensor]:
    """A mask or boxes as the view `name` shows them; `prefix` says on which view it lies."""
    inner: Any = _inner(view)
    value = batch[f"{prefix}{field}"]
    moved = not getattr(inner, "keeps_place", False)
    if field != "boxes":
        return {f"{name}_{field}": inner.apply_mask(value, params) if moved else value}
    label = batch[f"{prefix}box_labels"]
    if moved:
        value = inner.apply_boxes(value, params, *batch[name].shape[-2:])
        width, height = (value[..., 2:] - value[..., :2]).unbind(-1)
        label = torch.where((width > 0) & (height > 0), label, -1)
    return {f"{name}_boxes": value, f"{name}_box_labels": label}


def to_device(value: Any, device: torch.device) -> Any:
    """A tensor, or a dict of tensors and dicts, on the device; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: to_device(part, device) for name, part in value.items()}
    return value


def channels_last(value: Any) -> Any:
    """Pictures (floating point, [B,C,H,W]) in the layout that convolutions are fastest in; anything else as it is."""
    if isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point():
        return value.contiguous(memory_format=torch.channels_last)
    return value


def seed_of(words: str) -> int:
    """A 63-bit seed that depends on these words alone."""
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little") >> 1


def read_rows(samples: Samples, rows: Iterable[Tensor], workers: int, *, seed: int = 0) -> Iterator[dict]:
    """The batches of these rows in order, read ahead by `workers` processes: for pictures that decode on demand."""
    loader: Any = torch.utils.data.DataLoader(
        _Rows(samples),  # type: ignore[arg-type]
        sampler=(part.tolist() for part in rows),
        batch_size=None,
        num_workers=workers,
        collate_fn=_same,
        # its own, since drawing the workers' seed from the global one would shift the views' draws
        generator=torch.Generator().manual_seed(seed),
    )
    return iter(loader)


class _Rows:
    """Samples as the data set of a loader whose sampler yields the rows of whole batches."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, rows: list[int]) -> dict:
        return self.samples.batch(torch.tensor(rows))


def _same(batch: Any) -> Any:
    return batch


def _pin(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.pin_memory()
    return {name: _pin(part) for name, part in value.items()} if isinstance(value, dict) else value


def _to_float(value: Any) -> Any:
    """uint8 images [B,C,H,W] as float32 in [0,1]; anything else as it is."""
    is_image = isinstance(value, Tensor) and value.dtype == torch.uint8 and value.dim() == 4
    return value.float().div_(255) if is_image else value
