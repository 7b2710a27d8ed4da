"""How a call reaches its kernel, whatever else of torch is in its way."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from ferrovae import ops


class Recorded(TorchDispatchMode):
    """The names of our operations, as they are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ferrovae":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("recording", [False, True])
def test_every_call_is_seen_by_dispatch_modes(learnt, recording):
    x, logits = torch.rand(3, 5), torch.randn(3, 5, requires_grad=learnt)
    with torch.set_grad_enabled(recording), Recorded() as recorded:
        value = ops.bernoulli_log_prob(x, logits)
        assert value.requires_grad == (learnt and recording)
        if value.requires_grad:
            value.sum().backward()
    backward = ["bernoulli_log_prob_backward"] if learnt and recording else []
    assert recorded.names == ["bernoulli_log_prob", *backward]


def test_the_short_way_differentiates_as_the_registered_one():
    x, logits = torch.rand(3, 5).double(), torch.randn(3, 5, requires_grad=True, dtype=torch.float64)
    grads = []
    for call in (ops.bernoulli_log_prob, lambda x, p: torch.ops.ferrovae.bernoulli_log_prob(p, x, 1, "auto")):
        (first,) = torch.autograd.grad(call(x, logits).square().sum(), logits, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), logits)
        grads.append((first, second))
    for one, two in zip(*grads, strict=True):
        assert torch.equal(one, two)


# torch's forward mode compiles its formulas with torch.jit.
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_forward_mode_raises_instead_of_giving_zeros():
    x, logits = torch.rand(3, 5), torch.randn(3, 5)

    def value(logits):
        return ops.bernoulli_log_prob(x, logits).sum()

    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="bernoulli_log_prob has no forward-mode"):
        value(forward_ad.make_dual(logits, torch.ones_like(logits)))
    with forward_ad.dual_level():  # without a tangent there is nothing to lose
        assert torch.isfinite(value(logits))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(value, (logits,), (logits,))
    with pytest.raises(NotImplementedError, match="jacrev"):
        torch.func.hessian(value)(logits)
    twice = torch.func.jacrev(torch.func.jacrev(value))(logits).reshape(15, 15)
    exact = torch.autograd.functional.hessian(lambda p: -torch.nn.functional.softplus(p).sum(), logits).reshape(15, 15)
    assert torch.allclose(twice, exact, atol=1e-6)
