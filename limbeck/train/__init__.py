"""Training: the `Method` base class, the loop, and the `Workspace` of a run."""

from limbeck.train.exhibits import Bars, Exhibit, Pictures, Rows, Scatter
from limbeck.train.loop import Evaluator, Fit, Loop, NonFiniteLoss, average_gradients, fit
from limbeck.train.method import Batch, Clock, Fields, Losses, Method
from limbeck.train.objectives import CrossEntropy, linear_probe
from limbeck.train.optim import LARS, Optimizer
from limbeck.train.schedule import Schedule
from limbeck.train.stage import Stage, StreamSettings
from limbeck.train.trainer import EarlyStop, Trainer
from limbeck.train.virtual import Snapshot, Soup
from limbeck.train.workspace import Workspace

__all__ = [
    "LARS",
    "Bars",
    "Batch",
    "Clock",
    "CrossEntropy",
    "EarlyStop",
    "Evaluator",
    "Exhibit",
    "Fields",
    "Fit",
    "Loop",
    "Losses",
    "Method",
    "NonFiniteLoss",
    "Optimizer",
    "Pictures",
    "Rows",
    "Scatter",
    "Schedule",
    "Snapshot",
    "Soup",
    "Stage",
    "StreamSettings",
    "Trainer",
    "Workspace",
    "average_gradients",
    "fit",
    "linear_probe",
]
