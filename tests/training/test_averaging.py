"""The moving average of the weights against its closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ferrovae.training.averaging import averaged


def test_closed_form() -> None:
    """a_n = d^(n-1) w_1 + (1 - d) sum_{t=2..n} d^(n-t) w_t."""
    model = nn.Linear(3, 2).double()
    average = averaged(model, 0.9)
    history = []
    for _ in range(7):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter))
        history.append(model.weight.detach().clone())
        average.update_parameters(model)
    expected = 0.9**6 * history[0] + 0.1 * sum(0.9 ** (7 - t) * history[t - 1] for t in range(2, 8))
    assert average.module.weight.tolist() == [pytest.approx(row, rel=1e-12) for row in expected.tolist()]


def test_buffers_are_copied_not_averaged() -> None:
    model = nn.BatchNorm1d(2)
    average = averaged(model, 0.9)
    for count in (3, 8):
        model.num_batches_tracked.fill_(count)
        model.running_mean.fill_(float(count))
        average.update_parameters(model)
    assert average.module.num_batches_tracked.item() == 8
    assert average.module.running_mean.tolist() == [8.0, 8.0]
