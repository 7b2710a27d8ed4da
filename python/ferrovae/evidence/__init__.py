"""log p(x): estimators, diagnostics and bits/dim."""

from ferrovae.evidence.active_units import ActiveUnits, active_units
from ferrovae.evidence.bits import bits_per_dim
from ferrovae.evidence.estimate import estimate
from ferrovae.evidence.protocol import LatentVariableModel
from ferrovae.evidence.result import Evidence
from ferrovae.evidence.statistics import Statistics, log_weight_statistics

__all__ = [
    "ActiveUnits",
    "Evidence",
    "LatentVariableModel",
    "Statistics",
    "active_units",
    "bits_per_dim",
    "estimate",
    "log_weight_statistics",
]
