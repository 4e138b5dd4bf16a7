"""`Trainer`: how a method is trained, as plain settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lightning_fabric import Fabric

from limbeck.errors import UserError, require_positive, require_share
from limbeck.train.optim import Optimizer
from limbeck.train.schedule import Schedule


@dataclass(frozen=True)
class EarlyStop:
    """Stop when `metric` has not got better by more than `min_delta` in `patience` evaluations."""

    metric: str = "accuracy"
    mode: Literal["max", "min"] = "max"
    patience: int = 5
    min_delta: float = 0.0

    def better(self, value: float, best: float | None) -> bool:
        if best is None:
            return True
        return value > best + self.min_delta if self.mode == "max" else value < best - self.min_delta


@dataclass(frozen=True)
class Trainer:
    """Settings of one training stage.

    Args:
        epochs, steps: how long; one of them. `steps` counts optimiser steps.
        optimizer: of every part; `optimizers` overrides it for the parts it names.
        schedule: factor of every learning rate.
        accumulate: batches whose gradients are averaged for one optimiser step.
        clip_norm: largest gradient norm of a part.
        precision: of forward passes; losses are computed in float32 always.
        accelerator, devices, strategy: Lightning Fabric's, e.g. `cuda`, 2, `ddp`.
        sync_batchnorm: BatchNorm statistics over all processes.
        compile: compile student and teacher with torch.compile.
        channels_last: memory format of convolutional models; much faster on CPUs and tensor cores.
        ema_decay: evaluate and ship the moving average of the student's weights.
        evaluate_every: epochs between evaluations on validation data; the last epoch is always evaluated.
        select: validation metric whose best epoch ships instead of the last one, e.g. `accuracy`; `select_mode` says
            whether more or less of it is better.
        early_stop: stop before the end.
        log_every: optimiser steps between rows of `train.csv`, and between looks at the losses on an accelerator; the
            last step always has its row.
        checkpoint_every: optimiser steps between checkpoints; None saves every 30 seconds (one process) or epoch.
        tensorboard: write TensorBoard events beside the CSV files.
        progress: show a progress bar.
        seed: of initial order, views and noise.
    """

    epochs: int | None = None
    steps: int | None = None
    optimizer: Optimizer = Optimizer()
    optimizers: dict[str, Optimizer] = field(default_factory=dict)
    schedule: Schedule = Schedule()
    accumulate: int = 1
    clip_norm: float | None = None
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    accelerator: str = "auto"
    devices: int = 1
    strategy: str = "auto"
    sync_batchnorm: bool = True
    compile: bool = False
    channels_last: bool = True
    ema_decay: float | None = None
    evaluate_every: int = 1
    select: str | None = None
    select_mode: Literal["max", "min"] = "max"
    early_stop: EarlyStop | None = None
    log_every: int = 20
    checkpoint_every: int | None = None
    tensorboard: bool = False
    progress: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise UserError(
                f"a trainer needs epochs or steps, one of them; got epochs={self.epochs}, steps={self.steps}"
            )
        for name in ("epochs", "steps", "accumulate", "evaluate_every", "log_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"the trainer's {name} is {value}; it is 1 or more")
        if self.ema_decay is not None:
            require_share(ema_decay=self.ema_decay)
        if self.clip_norm is not None:
            require_positive(clip_norm=self.clip_norm)

    def fabric(self) -> Fabric:
        """Devices and precision; with several processes this call starts the other ones."""
        fabric = Fabric(
            accelerator=self.accelerator, devices=self.devices, strategy=self.strategy, precision=self.precision
        )
        fabric.launch()
        return fabric
