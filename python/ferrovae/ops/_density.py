"""A log-likelihood of independent dimensions as a pair of operations, made of a function of one element.

An operation's own file holds the contract, the formula and its derivatives; here is everything that is the same for
all: how parameters meet, the Rust call, fake tensors, derivatives of any order, vmap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ferrovae.ops import _checks
from ferrovae.ops._log_prob import as_columns, checked, sum_events, sum_to, work_dtype
from ferrovae.ops._registry import Kernel, Operation
from ferrovae.ops._rust import core, span, threads

_TYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.uint8: "uint8",
    torch.int64: "int64",
}


class Density:
    """`ferrovae::<name>` and `ferrovae::<name>_backward`, both on Rust, and elsewhere on the reference.

    Args:
        name: the operation's.
        parameters: names of the one or two parameters. The first has all dimensions; the second broadcasts to it.
        log_prob: `(x, *parameters)`, per element, in plain torch.
        slopes: the same arguments; a tuple of the derivatives in the parameters. Differentiable torch functions: the
            derivatives of second and higher order are theirs.
        x_slope: the derivative in x.
        double: the reference computes in float64 on every device that has it, not on a CPU alone.
    """

    def __init__(
        self,
        name: str,
        parameters: tuple[str, ...],
        *,
        log_prob: Callable[..., Tensor],
        slopes: Callable[..., tuple[Tensor, ...]],
        x_slope: Callable[..., Tensor],
        double: bool = False,
    ) -> None:
        self.name, self.parameters = name, parameters
        self._log_prob, self._slopes, self._x_slope, self._double = log_prob, slopes, x_slope, double
        tensors = ", ".join(f"Tensor {parameter}" for parameter in (*parameters, "x"))
        results = "Tensor" if len(parameters) == 1 else "(Tensor, Tensor)"
        floats = frozenset(_checks.FLOATS)
        self._forward = Operation(
            name,
            f"({tensors}, int batch_dims) -> Tensor",
            reference=self._reference,
            fake=lambda *args: _empty(args[0], args[0].shape[: args[-1]], work_dtype(args[0])),
            rust=Kernel(self._rust, floats),
        )
        self._backward = Operation(
            f"{name}_backward",
            f"({tensors}, Tensor grad, int batch_dims, int wanted) -> {results}",
            reference=self._reference_backward,
            fake=lambda *args: self._results(self._rooms(args[:-3], args[-2], args[-1])),
            rust=Kernel(self._rust_backward, floats),
        )
        self._forward.register_autograd(self._differentiate, _save)
        self._backward.register_autograd(self._differentiate_twice, _save)
        self._forward.register_vmap(self._vmap)
        self._backward.register_vmap(self._vmap)

    def __call__(self, x: Any, *parameters: Any, batch_dims: int) -> Tensor:
        """Check the arguments and run."""
        name, (first, *others) = self.name, parameters
        x = checked(name, x, self.parameters[0], first, batch_dims)
        for label, value in zip(self.parameters[1:], others, strict=True):
            _checks.floating(name, label, value)
            _checks.same_device(name, label, value, self.parameters[0], first)
            _checks.broadcasts(name, label, value, self.parameters[0], first)
        return self._forward(*parameters, x, batch_dims)

    def _wide(self, tensors: tuple[Tensor, ...], result: torch.dtype) -> list[Tensor]:
        """Tensors in the precision the reference computes in."""
        device = tensors[0].device.type
        exact = device == "cpu" or (self._double and device != "mps")
        return [tensor.to(torch.float64 if exact else result) for tensor in tensors]

    def _reference(self, *args: Any) -> Tensor:
        *parameters, x, batch_dims = args
        x, *wide = self._wide((x, *parameters), work_dtype(parameters[0]))
        return sum_events(self._log_prob(x, *wide), batch_dims).to(work_dtype(parameters[0]))

    def _reference_backward(self, *args: Any) -> Any:
        *parameters, x, grad, batch_dims, wanted = args
        x_wide, grad_wide, *wide = self._wide((x, grad, *parameters), work_dtype(parameters[0]))
        rooms = self._rooms((*parameters, x), batch_dims, wanted)
        for number, (room, slope) in enumerate(zip(rooms, self._slopes(x_wide, *wide), strict=True)):
            if wanted >> number & 1:
                product = (as_columns(grad_wide, parameters[0]) * slope).expand(parameters[0].shape)
                whole = room.shape == product.shape
                room.copy_(product if whole else as_columns(sum_events(product, batch_dims), product))
        return self._results(rooms)

    def _rooms(self, tensors: tuple[Tensor, ...], batch_dims: int, wanted: int) -> list[Tensor]:
        """Where the gradients go: of every element, or a row's sum for a parameter that is one number a row.

        The gradient of a parameter that is broadcast waits for its sum in the precision of the results. One that is
        not wanted is empty.
        """
        first, *_ = parameters = tensors[:-1]
        rooms = []
        for number, parameter in enumerate(parameters):
            if not wanted >> number & 1:
                rooms.append(_empty(first, (0,), work_dtype(first)))
                continue
            one = _aligned(parameter, first.ndim).shape[batch_dims:].numel() == 1
            shape = first.shape[:batch_dims] + (1,) * (first.ndim - batch_dims) if one else first.shape
            rooms.append(_empty(first, shape, parameter.dtype if parameter.shape == first.shape else work_dtype(first)))
        return rooms

    def _results(self, rooms: list[Tensor]) -> Any:
        return rooms[0] if len(self.parameters) == 1 else tuple(rooms)

    def _rust(self, *args: Any) -> Tensor:
        *parameters, x, batch_dims = args
        shape = parameters[0].shape
        rows = [_rows(tensor, shape, batch_dims) for tensor in (x, *parameters)]
        out = torch.empty(shape[:batch_dims], dtype=work_dtype(parameters[0]))
        function = getattr(core, self.name)
        function(*_operands(rows), shape[batch_dims:].numel(), _typed(out), threads())
        return out

    def _rust_backward(self, *args: Any) -> Any:
        *parameters, x, grad, batch_dims, wanted = args
        shape = parameters[0].shape
        rows = [_rows(tensor, shape, batch_dims) for tensor in (x, *parameters)]
        rooms, grad = self._rooms((*parameters, x), batch_dims, wanted), grad.contiguous()
        targets: list[Any] = [_typed(room) if wanted >> number & 1 else None for number, room in enumerate(rooms)]
        function = getattr(core, f"{self.name}_backward")
        targets += [None] * (2 - len(targets))
        function(*_operands(rows), shape[batch_dims:].numel(), _typed(grad), *targets, threads())
        return self._results(rooms)

    def _differentiate(self, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *parameters, x = ctx.saved_tensors
        needs = ctx.needs_input_grad
        wanted = sum(1 << number for number in range(len(parameters)) if needs[number])
        gradients: list[Tensor | None] = [None] * len(needs)
        if wanted:
            results = self._backward(*parameters, x, grad, ctx.batch_dims, wanted, backend=ctx.backend)
            for number, result in enumerate([results] if len(parameters) == 1 else results):
                if needs[number]:
                    gradients[number] = sum_to(result, parameters[number])
        if needs[len(parameters)]:
            x_wide, grad_wide, *wide = self._wide((x, grad, *parameters), work_dtype(parameters[0]))
            slope = as_columns(grad_wide, parameters[0]) * self._x_slope(x_wide, *wide)
            gradients[len(parameters)] = sum_to(slope.expand(parameters[0].shape), x)
        return tuple(gradients)

    def _differentiate_twice(self, ctx: Any, *grad_grads: Tensor) -> tuple[Tensor | None, ...]:
        """The derivatives of grad times slopes, by autograd of the slopes in plain torch."""
        saved = ctx.saved_tensors
        *parameters, x, grad = saved
        total: Any = 0.0
        with torch.enable_grad():
            x_wide, grad_wide, *wide = self._wide((x, grad, *parameters), work_dtype(parameters[0]))
            for number, slope in enumerate(self._slopes(x_wide, *wide)):
                if ctx.wanted >> number & 1:
                    outer = grad_grads[number].to(slope.dtype)
                    total = total + (outer * as_columns(grad_wide, parameters[0]) * slope).sum()
            inputs = [tensor for tensor, needed in zip(saved, ctx.needs_input_grad, strict=False) if needed]
            create = any(value.requires_grad for value in grad_grads) or torch.is_grad_enabled()
            found = torch.autograd.grad(total, inputs, create_graph=create, allow_unused=True)
        gradients, rest = [], list(found)
        for needed in ctx.needs_input_grad:
            gradients.append(rest.pop(0) if needed else None)
        return tuple(gradients)

    def _vmap(self, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """One more batch dimension, in front."""
        count = len(self.parameters)
        backward = len(args) > count + 3
        tensors, rest = args[: count + 1 + backward], args[count + 1 + backward :]
        first = tensors[0]
        ndim, batch_dims = first.ndim - (in_dims[0] is not None), rest[0]
        fronts = []
        for number, (tensor, dim) in enumerate(zip(tensors, in_dims, strict=False)):
            due = batch_dims if number > count else ndim
            front = tensor.movedim(dim, 0) if dim is not None else tensor[None]
            front = front.reshape(front.shape[:1] + (1,) * (due + 1 - front.ndim) + front.shape[1:])
            whole = number in (0, count + 1)
            fronts.append(front.expand(info.batch_size, *front.shape[1:]) if whole else front)
        operation = self._backward if backward else self._forward
        results = operation(*fronts, batch_dims + 1, *rest[1:-1], backend=rest[-1])
        if not backward:
            return results, 0
        dims = tuple(0 if rest[1] >> number & 1 else None for number in range(count))
        return (results, 0) if count == 1 else (results, dims)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    ctx.batch_dims, *wanted = (value for value in inputs[len(tensors) : -1])
    ctx.wanted, ctx.backend = wanted[0] if wanted else 0, inputs[-1]
    ctx.save_for_backward(*tensors)


def _empty(like: Tensor, shape: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _aligned(value: Tensor, ndim: int) -> Tensor:
    """With leading dimensions of 1."""
    return value.reshape((1,) * (ndim - value.ndim) + value.shape)


def _rows(value: Tensor, shape: torch.Size, batch_dims: int) -> tuple[Tensor, int]:
    """What Rust reads: contiguous rows, row r of all meeting row r mod n, and their width, 1 or all columns."""
    events = shape[batch_dims:]
    if value.shape == shape and value.dtype in _TYPES and value.is_contiguous():
        return value, events.numel()
    value = _aligned(value, len(shape))
    if value.shape[batch_dims:].numel() == 1:
        width = 1
    else:
        value, width = value.expand(value.shape[:batch_dims] + events), events.numel()
    missing = 0
    while missing < batch_dims and (value.shape[0] == 1 or (value.shape[0] > 1 and value.stride(0) == 0)):
        value, missing = value[0], missing + 1
    value = value.expand(shape[missing:batch_dims] + value.shape[batch_dims - missing :])
    if value.dtype == torch.bool:
        value = value.view(torch.uint8)
    elif value.dtype not in _TYPES:
        value = value.to(torch.float32 if value.is_floating_point() else torch.int64)
    return value.contiguous(), width


def _operands(rows: list[tuple[Tensor, int]]) -> list[Any]:
    """x and two parameters; the caller keeps the tensors."""
    operands: list[Any] = [(*_typed(tensor), width) for tensor, width in rows]
    return operands + [None] * (3 - len(operands))


def _typed(tensor: Tensor) -> tuple[int, int, str]:
    return (*span(tensor), _TYPES[tensor.dtype])
