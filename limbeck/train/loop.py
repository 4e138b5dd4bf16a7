"""The training loop: any method, several streams, several parts updated in turn, exact resume."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from torch import Tensor, nn

from limbeck.data import Identity, Samples, Stream, channels_last, to_device
from limbeck.distributed import gather, rank, world_size
from limbeck.errors import UserError
from limbeck.files import remove_partial
from limbeck.models import convert_sync_batchnorm
from limbeck.models.compiled import compile_in_place
from limbeck.teachers import EMA
from limbeck.train.checkpoint import (
    load_state,
    load_tensors,
    random_state,
    save_state,
    save_tensors,
    seed_everything,
    set_random_state,
)
from limbeck.train.logs import Logs, Row
from limbeck.train.method import Batch, Clock, Losses, Method
from limbeck.train.trainer import Trainer

Evaluator = Callable[[nn.Module, Samples], Mapping[str, float]]

SECONDS_BETWEEN_CHECKPOINTS = 30.0


class NonFiniteLoss(UserError):
    """A loss term, or a weight by a bad gradient, became NaN or infinite."""


@dataclass
class Fit:
    """What a training stage leaves behind: metrics of what ships, time, and the rows of its two tables."""

    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    steps: int = 0
    train: list[Row] = field(default_factory=list)
    validation: list[Row] = field(default_factory=list)


def fit(
    method: Method,
    streams: Mapping[str, Stream],
    trainer: Trainer,
    *,
    validation: Samples | None = None,
    evaluator: Evaluator | None = None,
    folder: str | Path | None = None,
    name: str = "student",
    fabric: Fabric | None = None,
) -> Fit:
    """Train a method in place.

    Args:
        streams: batches by name; they are opened here.
        validation, evaluator: what is measured after epochs, e.g. `ClassificationEvaluator()`; also the data that
            `method.tune` sees.
        folder: for checkpoints and logs. A run that was killed goes on from its last checkpoint there, and ends with
            the very weights of an uninterrupted one.
        name: of the stage; random numbers depend on it and on the trainer's seed.
        fabric: devices that were launched before; None launches them.

    Raises:
        UserError: method, streams and trainer do not fit each other; a checkpoint belongs to something else.
        NonFiniteLoss: a loss term or a weight is NaN or infinite; the last good checkpoint is kept.
    """
    loop = Loop(
        method,
        streams,
        trainer,
        validation=validation,
        evaluator=evaluator,
        folder=Path(folder) if folder else None,
        name=name,
        fabric=fabric,
    )
    return loop.run()


class Loop:
    """The state of one `fit`."""

    def __init__(
        self,
        method: Method,
        streams: Mapping[str, Stream],
        trainer: Trainer,
        *,
        validation: Samples | None = None,
        evaluator: Evaluator | None = None,
        folder: Path | None = None,
        name: str = "student",
        fabric: Fabric | None = None,
    ) -> None:
        self.method, self.trainer, self.name = method, trainer, name
        self.streams = {stream: streams[stream] for stream in method.streams if stream in streams}
        self.validation, self.evaluator = validation, evaluator
        method.check(streams)
        for wanted in (trainer.select, trainer.early_stop and trainer.early_stop.metric):
            if wanted and (validation is None or evaluator is None):
                raise UserError(f"the trainer watches '{wanted}', but there is no validation data to measure it on")
        self.fabric = fabric or trainer.fabric()
        launched = self.fabric._precision.precision
        if fabric is not None and launched != _for_cpu(trainer.precision, self.fabric.device):
            raise UserError(
                f"the trainer wants precision {trainer.precision}, but the devices were launched with {launched}; "
                "give both the same"
            )
        seed_everything(trainer.seed, name, rank())
        for stream_name, stream in self.streams.items():
            stream.open(stream_name, seed=trainer.seed, rank=rank(), world_size=world_size())
        self.clock = method.clock = Clock.of(method, self.streams, trainer)
        for teacher in method.teachers().values():
            teacher.join(self.streams)
        method.prepare(self.streams)
        self._share_weights()
        place(method, trainer, self.fabric.device)
        self.channels_last = runs_channels_last(method, trainer)
        self.parts = method.parts()
        self.optimizers: dict[str, Any] = {
            part: self.fabric.setup_optimizers(trainer.optimizers.get(part, trainer.optimizer).build(parameters))
            for part, parameters in self.parts.items()
        }
        unknown = set(trainer.optimizers) - set(self.parts)
        if unknown:
            raise UserError(f"optimizers names the part '{min(unknown)}'; the method has {', '.join(self.parts)}")
        self.rates = {part: [g["lr"] for g in opt.param_groups] for part, opt in self.optimizers.items()}
        self.ema = EMA(method, trainer.ema_decay) if trainer.ema_decay is not None else None
        if self.ema:
            cast(Method, self.ema.model).clock = self.clock
        method.optimizers = self.optimizers  # behind the moving average, which would copy them
        self.checkpoint = folder / "checkpoint.pt" if folder else None
        self.best = folder / "best.safetensors" if folder else None
        self.best_metrics: dict[str, float] | None = None
        self.best_state: dict[str, Tensor] | None = None
        self.stopped = False
        self.seconds = 0.0
        self.metrics: dict[str, float] = {}
        self.logs = Logs(folder, name, tensorboard=trainer.tensorboard, progress=trainer.progress, quiet=rank() > 0)
        self.sums = RunningTerms(self.fabric.device.type == "cpu", self.checkpoint)

    # -- the run ------------------------------------------------------------------------------------------------

    def run(self) -> Fit:
        self._resume()
        self.logs.start(self.clock.step, self.clock.steps)
        self.started = self.saved = time.perf_counter()
        try:
            while self.clock.step < self.clock.steps and not self.stopped:
                self.method.train()
                epoch_end = min((self.clock.epoch + 1) * self.clock.steps_per_epoch, self.clock.steps)
                while self.clock.step < epoch_end:
                    self.step()
                    if self.clock.step % self.trainer.log_every == 0 or self.clock.step == self.clock.steps:
                        self.report()
                    if self._due() and self.clock.step < epoch_end:
                        self._save()
                self._end_epoch()
        finally:
            self.logs.close()
            self.method.optimizers = {}
        self._take_what_ships()
        return Fit(self.metrics, self._elapsed(), self.clock.step, self.logs.train.rows, self.logs.validation.rows)

    def step(self) -> None:
        """One optimiser step of every part that the method yields, on `accumulate` batches each."""
        self._set_rates()
        rounds = [self._rounds() for _ in range(self.trainer.accumulate)]
        while True:
            part = None
            for micro_batch in rounds:
                answer = next(micro_batch, None)
                if answer is None:
                    continue
                if part is None:
                    part = answer[0]
                    self.optimizers[part].zero_grad()
                if answer[0] != part:
                    raise ValueError(
                        f"of the accumulated batches one yields '{part}' and another '{answer[0]}' in turn"
                    )
                self._backward(*answer)
                self._take_logged()
            if part is None:
                break
            self._update(part)
        self.method.after_step()
        self._take_logged()
        if self.ema:
            self.ema.update(self.method, self.clock.step)
        self.clock.step += 1

    def _rounds(self) -> Iterator[tuple[str, Losses]]:
        """The parts and losses of one batch, asked for one after another."""
        batch = self._batch()  # in full precision: views compute coordinates
        with self.fabric.autocast():
            answer = self.method.training_step(batch)
        if isinstance(answer, dict):
            yield next(iter(self.parts)), answer
            return
        while True:
            with self.fabric.autocast():
                turn = next(answer, None)
            if turn is None:
                return
            yield turn

    def _take_logged(self) -> None:
        for name, value in self.method.logged.items():
            self.sums.add(name, value)
        self.method.logged.clear()

    def _batch(self) -> Batch:
        return {name: self.render(stream) for name, stream in self.streams.items()}

    def render(self, stream: Stream) -> Mapping[str, Any]:
        """The stream's next batch on the device, with its views."""
        fields = stream.render(to_device(stream.next(), self.fabric.device))
        if not self.channels_last:
            return fields
        return {name: channels_last(value) for name, value in fields.items()}

    def _backward(self, part: str, losses: Losses) -> None:
        if shared := losses.keys() & self.method.logged.keys():
            raise ValueError(f"'{min(shared)}' is a loss term and was given to log too; give the logged value a name")
        self.sums.take(losses, self.clock.step)
        # Parts share graphs (a critic on the student's samples): only the yielded part's parameters get gradients.
        inputs = self.parts[part] if len(self.parts) > 1 else None
        self.fabric.backward(self._total(losses), inputs=inputs)

    def _total(self, losses: Losses) -> Tensor:
        """The weighted sum of the terms, over the number of accumulated batches; a factor of 1 costs nothing."""
        factors = [self.method.now(self.method.weights.get(term, 1.0)) / self.trainer.accumulate for term in losses]
        terms = [
            value if factor == 1 else factor * value for factor, value in zip(factors, losses.values(), strict=True)
        ]
        return functools.reduce(torch.add, terms)

    def _update(self, part: str) -> None:
        average_gradients(self.parts[part])
        optimizer = self.optimizers[part]
        if self.trainer.clip_norm is not None:
            # Bad gradients are no error here: fp16 skips the step, and asking would wait for the device.
            self.fabric.clip_gradients(
                self.method, optimizer, max_norm=self.trainer.clip_norm, error_if_nonfinite=False
            )
        optimizer.step()

    def _set_rates(self) -> None:
        factor = self.trainer.schedule(self.clock.step, self.clock.steps)
        for part, optimizer in self.optimizers.items():
            for group, rate in zip(optimizer.param_groups, self.rates[part], strict=True):
                group["lr"] = rate * factor

    # -- between steps ------------------------------------------------------------------------------------------

    def report(self) -> None:
        """Write one row of means since the last one; the only look at the losses on an accelerator."""
        means = self.sums.means()
        samples = sum(stream.batch_size for stream in self.streams.values()) * self.trainer.accumulate * world_size()
        rate = next(iter(self.optimizers.values())).param_groups[0]["lr"]
        self.logs.train_row(self.clock.step, self.clock.epoch, {**means, "learning_rate": rate}, samples)

    def _end_epoch(self) -> None:
        """Evaluate, decide whether to stop early, and save."""
        self._refuse_non_finite()
        self.method.after_epoch()
        last = self.clock.step >= self.clock.steps
        if (
            self.evaluator
            and self.validation is not None
            and (last or self.clock.epoch % self.trainer.evaluate_every == 0)
        ):
            self._evaluate()
        if last or self.stopped or self._due():
            self._save()

    def _evaluate(self) -> None:
        assert self.evaluator is not None and self.validation is not None
        method = cast(Method, self.ema.model) if self.ema else self.method
        method.eval()
        method.tune(self._validation_batches())
        self.metrics = dict(self.evaluator(method.shipped(), self.validation))
        self.logs.validation_row(self.clock.step, self.clock.epoch, self.metrics)
        self._watch(method)

    def _validation_batches(self) -> Iterable[Mapping[str, Any]]:
        assert self.validation is not None
        like = next(iter(self.streams.values()))
        views = dict.fromkeys(like.views, Identity())  # a method reads the view that it trains on, unchanged here
        stream = Stream(self.validation, 256, views, shuffle=False, drop_last=False, view_field=like.view_field)
        stream.open("validation", seed=0)
        for _ in range(stream.steps_per_epoch):
            yield self.render(stream)

    def _watch(self, method: Method) -> None:
        """Keep the best state so far, and count the evaluations that brought nothing better."""
        if self.trainer.select and self._is_best(self._metric(self.trainer.select)):
            self.best_metrics = self.metrics
            self.best_state = {k: v.detach().clone() for k, v in method.state_dict().items()}
            if self.best and rank() == 0:
                save_tensors(self.best, self.best_state)
        stop = self.trainer.early_stop
        if stop is None:
            return
        self._metric(stop.metric)
        best, since = None, 0
        for value in (row[stop.metric] for row in self.logs.validation.rows):
            best, since = (value, 0) if stop.better(value, best) else (best, since + 1)
        self.stopped = since >= stop.patience

    def _is_best(self, value: float) -> bool:
        best = self.best_metrics[str(self.trainer.select)] if self.best_metrics else math.nan
        return math.isnan(best) or (value > best if self.trainer.select_mode == "max" else value < best)

    def _metric(self, name: str) -> float:
        if name not in self.metrics:
            raise UserError(f"the trainer watches '{name}'; the evaluator measures {', '.join(self.metrics)}")
        return self.metrics[name]

    def _take_what_ships(self) -> None:
        """Leave the moving average, or the best epoch, in the method."""
        if self.trainer.select:
            if self.best_state is None and self.best is not None and self.best.exists():
                self.best_state = load_tensors(self.best)
            assert self.best_state is not None and self.best_metrics is not None
            self.method.load_state_dict(self.best_state)
            self.metrics = self.best_metrics
        elif self.ema:
            self.method.load_state_dict(self.ema.model.state_dict())
        self.method.eval()

    # -- checkpoints --------------------------------------------------------------------------------------------

    def _due(self) -> bool:
        if self.trainer.checkpoint_every is not None:
            return self.clock.step % self.trainer.checkpoint_every == 0
        if world_size() > 1:  # clocks differ between processes; all save at the same step or none
            return self.clock.step % self.clock.steps_per_epoch == 0
        return time.perf_counter() - self.saved > SECONDS_BETWEEN_CHECKPOINTS

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        self._refuse_non_finite()
        ranks: list[Any] = [None] * world_size()
        mine = {"random": random_state(), "streams": {n: s.state_dict() for n, s in self.streams.items()}}
        if world_size() > 1:
            dist.all_gather_object(ranks, mine)
        else:
            ranks = [mine]
        state = {
            "step": self.clock.step,
            "seconds": self._elapsed(),
            "metrics": self.metrics,
            "best_metrics": self.best_metrics,
            "stopped": self.stopped,
            "sums": self.sums.state_dict(),
            "method": self.method.state_dict(),
            "optimizers": {part: optimizer.state_dict() for part, optimizer in self.optimizers.items()},
            "ema": self.ema.state_dict() if self.ema else None,
            "precision": self.fabric._precision.state_dict(),
            "ranks": ranks,
        }
        if rank() == 0:
            save_state(self.checkpoint, state)
        self.saved = time.perf_counter()

    def _resume(self) -> None:
        if self.checkpoint is None or self.best is None:
            return
        if rank() == 0:
            remove_partial(self.checkpoint)
            remove_partial(self.best)
        if not self.checkpoint.exists():
            return
        state = load_state(self.checkpoint)
        if "ranks" not in state:
            raise UserError(f"{self.checkpoint} is no checkpoint of Limbeck's; delete it to start this stage anew")
        if len(state["ranks"]) != world_size():
            raise UserError(
                f"{self.checkpoint} was saved by {len(state['ranks'])} processes and this run has {world_size()}; "
                "resume with the same number, or delete it to start this stage anew"
            )
        try:
            self.method.load_state_dict(state["method"])
            for part, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][part])
            if self.ema:
                self.ema.load_state_dict(state["ema"])
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            first = str(error).strip().splitlines()[-1].strip()
            raise UserError(
                f"{self.checkpoint} belongs to another architecture or method ({first}); run with the recipe that made "
                "it, or delete it to start this stage anew"
            ) from error
        self.fabric._precision.load_state_dict(state["precision"])
        mine = state["ranks"][rank()]
        for name, stream in self.streams.items():
            stream.load_state_dict(mine["streams"][name])
        set_random_state(mine["random"])
        self.clock.step = state["step"]
        self.seconds, self.stopped = state["seconds"], state["stopped"]
        self.metrics, self.best_metrics = state["metrics"], state["best_metrics"]
        self.sums.load_state_dict(state["sums"], self.fabric.device)

    def _refuse_non_finite(self) -> None:
        """Bad losses that were not looked at yet, and weights that a bad gradient of a good loss has spoilt."""
        self.sums.look()
        named = [(name, weight.detach()) for name, weight in self.method.named_parameters() if weight.requires_grad]
        finite = torch.stack(torch._foreach_norm([weight for _, weight in named])).isfinite()
        for (name, _), good in zip(named, finite.tolist(), strict=True):
            if not good:
                self.sums.stop(f"the weight '{name}' is", self.clock.step)

    # -- set-up -------------------------------------------------------------------------------------------------

    def _share_weights(self) -> None:
        """Start every process from the first one's weights, with BatchNorm over all of them."""
        if world_size() == 1:
            return
        if self.trainer.sync_batchnorm:
            convert_sync_batchnorm(self.method)
        self.method.to(self.fabric.device)  # NCCL sends nothing from the host
        for tensor in self.method.state_dict().values():
            dist.broadcast(tensor, src=0)

    def _elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self.started


def runs_channels_last(method: Method, trainer: Trainer) -> bool:
    """Whether images and weights are kept in the order that convolutions are fastest in."""
    return trainer.channels_last and any(isinstance(module, nn.Conv2d) for module in method.modules())


def place(method: Method, trainer: Trainer, device: torch.device) -> None:
    """Move method and teachers to the device, in the memory format and form that they run in.

    A stage that is loaded goes through here like one that is trained: the last bits of what it says depend on it.
    """
    networks: list[Any] = [method, *method.teachers().values()]
    for network in networks:
        network.to(device)
        if runs_channels_last(method, trainer):
            network.to(memory_format=torch.channels_last)
    if trainer.compile:
        for module in method.networks():
            compile_in_place(module)
        for teacher in method.teachers().values():
            teacher.compile()


def _for_cpu(precision: str, device: torch.device) -> str:
    """Fabric gives a CPU bf16 where fp16 is asked for."""
    return "bf16-mixed" if precision == "16-mixed" and device.type == "cpu" else precision


class RunningTerms:
    """Sums of the logged scalars since the last look, kept on the device, and the guard against NaN.

    On a CPU the guard looks before each backward pass. An accelerator would have to wait for it, so there the first
    bad step of each term is recorded on the device and read at the next look: logging, saving, or the epoch's end.
    """

    def __init__(self, check_each_step: bool, checkpoint: Path | None) -> None:
        self.check_each_step, self.checkpoint = check_each_step, checkpoint
        self.sums: dict[str, Tensor | float] = {}
        self.counts: dict[str, int] = {}
        self.first_bad: dict[str, Tensor] = {}

    def add(self, term: str, value: Tensor | float) -> None:
        value = value.float().reshape(()) if isinstance(value, Tensor) else value
        self.sums[term] = self.sums[term] + value if term in self.sums else value
        self.counts[term] = self.counts.get(term, 0) + 1

    def take(self, losses: Losses, step: int) -> None:
        """Add the terms of a step, and stop at one that is not finite or record it."""
        for term, value in losses.items():
            if self.check_each_step:
                number = value.item()  # one read serves the guard and the sum
                if not math.isfinite(number):
                    self.stop(f"the loss term '{term}' is", step)
                self.add(term, number)
                continue
            bad = ~torch.isfinite(value.detach())
            if term not in self.first_bad:
                self.first_bad[term] = torch.full((), -1.0, device=value.device)
            self.first_bad[term].masked_fill_(bad & (self.first_bad[term] < 0), step)
            self.add(term, value.detach())

    def look(self) -> None:
        """Read the guard's record."""
        self._read({})

    def means(self) -> dict[str, float]:
        """Means since the last call, over all processes; one read of the device."""
        shared = world_size() > 1  # numbers too are then averaged over the processes
        read = {t: torch.as_tensor(v) for t, v in self.sums.items() if shared or isinstance(v, Tensor)}
        sums = {**self.sums, **self._read(read)}
        means = {term: float(value) / self.counts[term] for term, value in sums.items()}
        self.sums, self.counts = {}, {}
        return means

    def _read(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Means over the processes of these sums, read together with the guard's record, which may stop the run."""
        tensors = [*self.first_bad.values(), *sums.values()]
        if not tensors:
            return {}
        device = tensors[0].device
        mine_V = torch.stack([tensor.to(device, non_blocking=True) for tensor in tensors])
        # All processes see what one of them has met, and stop together.
        columns = list(zip(*gather(mine_V[None]).tolist(), strict=True))
        bad = [
            (min(step for step in steps if step >= 0), term)
            for term, steps in zip(self.first_bad, columns, strict=False)
            if max(steps) >= 0
        ]
        if bad:
            step, term = min(bad)
            self.stop(f"the loss term '{term}' is", int(step))
        values = columns[len(self.first_bad) :]
        return {term: sum(of_ranks) / len(of_ranks) for term, of_ranks in zip(sums, values, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "counts": self.counts}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        self.sums, self.counts = to_device(state["sums"], device), dict(state["counts"])

    def stop(self, culprit: str, step: int) -> None:
        """Raise `NonFiniteLoss`, e.g. for "the loss term 'ce' is"."""
        saved = self.checkpoint is not None and self.checkpoint.exists()
        kept = f"the last good checkpoint is {self.checkpoint}" if saved else "nothing was saved yet"
        raise NonFiniteLoss(
            f"{culprit} not finite at step {step}; {kept}: lower the learning rate, clip gradients or "
            "look for bad inputs"
        )


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, in one all-reduce for each dtype.

    Which parameters have gradients must be the same in all processes. Done after the backward pass and not by a
    wrapper around the module, because a step may run a network several times, update parts in turn or leave some out.
    """
    if world_size() == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= world_size()
        pieces = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)])
