"""Who supervises: frozen networks, moving averages, ensembles, the model's own past."""

from limbeck.teachers.ema import EMA
from limbeck.teachers.ensemble import Ensemble
from limbeck.teachers.frozen import Frozen
from limbeck.teachers.past import Past
from limbeck.teachers.routed import Routed
from limbeck.teachers.teacher import Teacher

__all__ = ["EMA", "Ensemble", "Frozen", "Past", "Routed", "Teacher"]
