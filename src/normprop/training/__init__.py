"""Training: the loop, its settings and schedules, the unit-norm constraint, parameter groups and checkpoints.

:func:`normprop.training.loop.fit` trains one network; it needs the extra ``train``. Everything else here needs torch
alone and serves any training loop.
"""

from normprop.training.config import TrainConfig
from normprop.training.decouple import decouple
from normprop.training.groups import parameter_groups
from normprop.training.muon import Muon, momentum_at
from normprop.training.records import EpochRecord, LayerRecord, TrainResult
from normprop.training.unit_norm import constrain

__all__ = [
    "EpochRecord",
    "LayerRecord",
    "Muon",
    "TrainConfig",
    "TrainResult",
    "constrain",
    "decouple",
    "momentum_at",
    "parameter_groups",
]
