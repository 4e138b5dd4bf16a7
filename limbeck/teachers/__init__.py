"""Who supervises: frozen networks, moving averages, ensembles, the model's own past, and answers on disk."""

from limbeck.teachers.columns import Dtype, Values
from limbeck.teachers.crops import CropReader, StoredCrops
from limbeck.teachers.ema import EMA
from limbeck.teachers.endpoint import Endpoint
from limbeck.teachers.ensemble import Ensemble
from limbeck.teachers.filling import Answers, Filling, fill
from limbeck.teachers.frozen import Frozen
from limbeck.teachers.past import Past
from limbeck.teachers.routed import Routed
from limbeck.teachers.served import Served
from limbeck.teachers.store import Store
from limbeck.teachers.stored import Stored
from limbeck.teachers.teacher import Teacher

__all__ = [
    "EMA",
    "Answers",
    "CropReader",
    "Dtype",
    "Endpoint",
    "Ensemble",
    "Filling",
    "Frozen",
    "Past",
    "Routed",
    "Served",
    "Store",
    "Stored",
    "StoredCrops",
    "Teacher",
    "Values",
    "fill",
]
