"""Training: the `Method` base class, the loop, and the `Workspace` of a run."""

from limbeck.train.loop import Evaluator, Fit, Loop, NonFiniteLoss, average_gradients, fit
from limbeck.train.method import Batch, Clock, Fields, Losses, Method
from limbeck.train.optim import LARS, Optimizer
from limbeck.train.schedule import Schedule
from limbeck.train.trainer import EarlyStop, Trainer
from limbeck.train.workspace import Workspace

__all__ = [
    "LARS",
    "Batch",
    "Clock",
    "EarlyStop",
    "Evaluator",
    "Fields",
    "Fit",
    "Loop",
    "Losses",
    "Method",
    "NonFiniteLoss",
    "Optimizer",
    "Schedule",
    "Trainer",
    "Workspace",
    "average_gradients",
    "fit",
]
