"""An exponential moving average of the weights, for validation, evaluation and sampling."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of `model` whose parameters follow as a_1 = w_1, a_t = decay a_{t-1} + (1 - decay) w_t.

    Call `update_parameters(model)` after each step. Buffers (a codebook's own averages, counts) are copied, not
    averaged: a mean of counters or of codebooks means nothing.
    """
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=False)
