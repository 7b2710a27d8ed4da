"""`code_logsumexp`: log of the sum over all codes of exp(-distance / temperature), without the N x K matrix.

What attention does for keys, for codebooks: the forward pass keeps a running maximum and sum a row, the backward pass
computes the softmax again, block by block (Dao et al., FlashAttention, 2022).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ferrovae.ops import _code_softmax, _codes, _triton
from ferrovae.ops._code_softmax import Gradients, Head
from ferrovae.ops._registry import Kernel, Operation
from ferrovae.ops.nearest_code import Metric


def code_logsumexp(
    x: Tensor, codebook: Tensor, temperature: float | Tensor = 1.0, metric: Metric = "euclidean"
) -> Tensor:
    """log sum_k exp(-distance(x, e_k) / temperature): x [..., D], codebook [K, D] -> [...], in nats.

    Args:
        x: [..., D] float32, float64, bfloat16 or float16; with heads [H, ..., D].
        codebook: [K, D], or [H, K, D] for one codebook a head; any of these dtypes.
        temperature: positive; a number, or a tensor of one element, which then gets a gradient.
        metric: the distance: `"euclidean"` |x - e|, `"sqeuclidean"` |x - e|^2, `"cosine"` 1 - x.e / (|x| |e|), 1 where
            either vector is zero, `"dot"` -x.e.

    Returns:
        [...] ([H, ...] with heads), float32; float64 where x or the codebook is. Differentiable, also twice, in x,
        codebook and temperature; the gradient of a Euclidean distance is 0 where it is 0.

    float32 distances are summed in difference form, so a common offset costs no digits. A code that is not finite has
    probability 0; no such code leaves -infinity. A row that is not finite gives NaN and no gradient to anything. No
    rows give an empty result. Memory beyond inputs and results: O(N + K D), and at most 64 MiB.

    Raises:
        ValueError: shapes that do not match, no codes, D = 0, an unknown metric, two devices, a temperature that is
            not positive (a tensor's is looked at on a CPU only).
        TypeError: a dtype that is not floating point.
    """
    rows, codes, scale, kernel_metric = _codes.prepared("code_logsumexp", x, codebook, temperature, metric)
    result = logsumexp(rows, codes, scale, kernel_metric)
    return (result - 1 / scale if metric == "cosine" else result).reshape(x.shape[:-1])


def logsumexp(x: Tensor, codebook: Tensor, temperature: Tensor, metric: str) -> Tensor:
    """The registered operation, on what `_codes.prepared` gives: [H, N]."""
    return _operation(x, codebook, temperature, metric)


def _forward(x: Tensor, codebook: Tensor, temperature: Tensor, metric: str, backend: str) -> Tensor:
    _codes.positive("code_logsumexp", temperature)
    x, codes, rows, bias = _codes.usable(x, codebook)
    out = _code_softmax.logsumexp(x, codes, bias, temperature, metric, backend)
    return out.masked_fill_(~rows, torch.nan)


def _backward(
    x: Tensor, codebook: Tensor, temperature: Tensor, lse: Tensor, grad: Tensor, metric: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    x, codes, _, bias = _codes.usable(x, codebook)
    grad = torch.where(lse.isfinite(), grad, 0.0)
    if backend == "triton" and x.dtype == torch.float32:
        kernels = _triton.kernels("code_logsumexp")
        of_x, of_codes = kernels.backward(x, codes, bias, temperature, lse, grad, metric)
        centre = 0.0 if metric == "dot" else codes.mean(1, keepdim=True)
        centred = x - centre, codes - centre
        return of_x, of_codes, _code_softmax.temperature_gradient(*centred, of_x, of_codes, temperature, metric)
    of_x, of_codes, of_temperature = torch.empty_like(x), torch.empty_like(codes), torch.zeros_like(temperature)
    for number in range(x.shape[0]):
        head = Head(x[number], codes[number], bias[number], lse[number], temperature, metric)
        gradients = Gradients(head)
        for block in _code_softmax.each_block(head, 0, x.shape[1], backend)():
            gradients.add(block.rows, block.codes, block.slopes.mul_(grad[number, block.rows, None]))
        of_x[number], of_codes[number], of_this = gradients.finish()
        of_temperature += of_this
    return of_x, of_codes, of_temperature


def _fake_backward(x: Tensor, codebook: Tensor, temperature: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), codebook.new_empty(codebook.shape), temperature.new_empty(())


_operation = Operation(
    "code_logsumexp",
    "(Tensor x, Tensor codebook, Tensor temperature, str metric) -> Tensor",
    reference=partial(_forward, backend="reference"),
    fake=lambda x, codebook, temperature, metric: x.new_empty(x.shape[:2]),
    rust=Kernel(partial(_forward, backend="rust"), _codes.KERNEL_DTYPES),
    triton=Kernel(partial(_forward, backend="triton"), _codes.KERNEL_DTYPES),
)
_gradient = Operation(
    "code_logsumexp_backward",
    "(Tensor x, Tensor codebook, Tensor temperature, Tensor lse, Tensor grad, str metric) -> (Tensor, Tensor, Tensor)",
    reference=partial(_backward, backend="reference"),
    fake=_fake_backward,
    rust=Kernel(partial(_backward, backend="rust"), _codes.KERNEL_DTYPES),
    triton=Kernel(partial(_backward, backend="triton"), _codes.KERNEL_DTYPES),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.metric, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradient(*ctx.saved_tensors, grad, ctx.metric, backend=ctx.backend), None, None


def _save_twice(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.metric, _ = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_twice(
    ctx: Any, v_x: Tensor | None, v_codes: Tensor | None, v_temperature: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Derivatives of v . (gradients), by autograd over chunks of rows: the lse counts as the function it is."""
    x, codebook, temperature, lse, grad = ctx.saved_tensors
    clean, codes, _, bias = _codes.usable(x.detach(), codebook.detach())
    grad = torch.where(lse.isfinite(), grad, 0.0).detach()
    results = [torch.zeros_like(tensor) for tensor in (clean, codes, temperature, grad)]
    step = max(1, _code_softmax.BLOCK // (4 * codes.shape[1]))
    for head in range(x.shape[0]):
        for first in range(0, x.shape[1], step):
            rows = slice(first, first + step)
            given = clean[head, rows], codes[head], temperature.detach(), grad[head, rows]
            places = results[0][head, rows], results[1][head], results[2], results[3][head, rows]
            directions = (None if v_x is None else v_x[head, rows], None if v_codes is None else v_codes[head])
            with torch.enable_grad():
                leaves = [tensor.clone().requires_grad_() for tensor in given]
                value = (_scores(leaves[0], leaves[1], leaves[2], ctx.metric) + bias[head]).logsumexp(1)
                firsts = torch.autograd.grad((value * leaves[3]).sum(), leaves[:3], create_graph=True)
                pairs = zip(firsts, (*directions, v_temperature), strict=True)
                along = torch.stack([(first * v).sum() for first, v in pairs if v is not None]).sum()
                parts = torch.autograd.grad(along, leaves)
            for place, part in zip(places, parts, strict=True):
                place += part
    return results[0], results[1], results[2], None, results[3], None, None


def _scores(x: Tensor, codes: Tensor, temperature: Tensor, metric: str) -> Tensor:
    """-distance / temperature as sums of products, which autograd differentiates as often as it likes."""
    if metric == "dot":
        return x @ codes.mT / temperature
    centre = codes.detach().mean(0)
    x, codes = x - centre, codes - centre
    square = x.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * x @ codes.mT
    if metric == "sqeuclidean":
        return -square / temperature
    apart = square.detach() > 0
    return -torch.where(apart, torch.where(apart, square, 1.0).sqrt(), 0.0) / temperature


def _batched(
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    metric: str,
    backend: str,
) -> tuple[Tensor, int]:
    """vmap: a batch of rows is more rows of each head, a batch of codebooks is more heads."""
    of_x, of_codes, of_temperature = in_dims[:3]
    if of_temperature is not None:
        results = [
            _operation(
                *(
                    v if d is None else v.select(d, i)
                    for v, d in zip((x, codebook, temperature), in_dims[:3], strict=True)
                ),
                metric,
                backend=backend,
            )
            for i in range(info.batch_size)
        ]
        return torch.stack(results), 0
    x = x.expand(info.batch_size, *x.shape) if of_x is None else x.movedim(of_x, 0)
    batch, heads, rows, dims = x.shape
    if of_codes is None:
        flat = x.transpose(0, 1).reshape(heads, batch * rows, dims)
        return _operation(flat, codebook, temperature, metric, backend=backend).view(heads, batch, rows), 1
    codes = codebook.movedim(of_codes, 0).flatten(0, 1)
    flat = x.reshape(batch * heads, rows, dims)
    return _operation(flat, codes, temperature, metric, backend=backend).view(batch, heads, rows), 0


_operation.register_autograd(_differentiate, _save)
_operation.register_vmap(_batched)
_gradient.register_autograd(_differentiate_twice, _save_twice)
