"""One comparison for the parity tests of the scalar quantizers: the same weights, inputs and draws on both sides."""

from __future__ import annotations

import torch


def twins(theirs, ours, options):
    """The layer twice; checkpoints load both ways and hold the same tensors."""
    torch.manual_seed(5)
    peer = theirs(**options)
    torch.manual_seed(5)
    layer = ours(**options)
    state = peer.state_dict()
    assert {name: (t.shape, t.dtype) for name, t in layer.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in state.items()
    }
    for name, tensor in layer.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)
    peer.load_state_dict(layer.state_dict(), strict=True)
    layer.load_state_dict(state, strict=True)
    return peer, layer


def assert_same(ours, theirs, rtol=1e-5, atol=1e-6):
    """Equal structure, shapes and dtypes; floats close, everything else equal."""
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_same(ours[name], theirs[name], rtol, atol)
    elif isinstance(ours, tuple | list):
        assert len(ours) == len(theirs)
        for one, two in zip(ours, theirs, strict=True):
            assert_same(one, two, rtol, atol)
    else:
        assert ours == theirs


def run(layer, x, seed, **arguments):
    """Results, and the gradients of the input and the parameters, of one seeded call."""
    layer.zero_grad()
    inputs = x.clone().requires_grad_()
    torch.manual_seed(seed)
    results = layer(inputs, **arguments)
    total = torch.zeros((), dtype=x.dtype)
    generator = torch.Generator().manual_seed(seed)
    for result in results:
        if isinstance(result, torch.Tensor) and result.is_floating_point() and result.requires_grad:
            total = total + (result * torch.randn(result.shape, generator=generator)).sum()
    if total.requires_grad:
        total.backward()
    gradients = [inputs.grad, *(parameter.grad for _, parameter in sorted(layer.named_parameters()))]
    return results, gradients


def assert_parity(peer, layer, x, *, seed=3, **arguments):
    """Both modes: results, and gradients of the input and of every parameter."""
    for training in (True, False):
        peer.train(training)
        layer.train(training)
        their_results, their_gradients = run(peer, x, seed, **arguments)
        our_results, our_gradients = run(layer, x, seed, **arguments)
        assert_same(our_results, their_results)
        for one, two in zip(our_gradients, their_gradients, strict=True):
            # a parameter out of reach has no gradient on one side and zeros on the other
            one, two = (torch.zeros(()) if gradient is None else gradient for gradient in (one, two))
            torch.testing.assert_close(*torch.broadcast_tensors(one, two), rtol=1e-4, atol=1e-5)
    return our_results
