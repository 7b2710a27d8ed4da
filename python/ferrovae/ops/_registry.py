"""How an operation is registered with torch: one schema, one fake implementation, one function a backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ferrovae.ops import _backend, _functions

library = torch.library.Library("ferrovae", "DEF")
operations: dict[str, Operation] = {}


@dataclass(frozen=True)
class Kernel:
    """An implementation beside the reference: a function of the operation's arguments, and what it takes."""

    run: Callable[..., Any]
    dtypes: frozenset[torch.dtype]


class Operation:
    """A `torch.library` operation `ferrovae::<name>`.

    Its schema ends in `str backend`, so that a backward pass (an operation of its own, which gets the same
    string) runs where its forward ran, also when the choice has changed in between.

    Args:
        name: the operation's one name.
        schema: its arguments and results, without the backend: `"(Tensor x, Tensor logits) -> Tensor"`.
        reference: the meaning, in plain torch; runs on every device.
        fake: shapes, dtypes and devices of the results.
        rust, triton: the kernels, where there are any. The first tensor argument's device and dtype decide. Where an
            operation has no kernel for a device it is meant to run on its reference there, without a warning.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        rust: Kernel | None = None,
        triton: Kernel | None = None,
    ) -> None:
        self.name = name
        self.kernels = {key: kernel for key, kernel in (("rust", rust), ("triton", triton)) if kernel is not None}
        self._reference = reference
        self._dtypes = tuple((key, kernel.dtypes) for key, kernel in self.kernels.items())
        self._chosen: dict[tuple[str, torch.device, torch.dtype], Callable[..., Any]] = {}
        # How it is called with gradients: eagerly, and under `torch.func`'s transforms.
        self._function: _functions.Function | None = None
        self._functional: _functions.Function | None = None
        self._vmap_rule: Callable[..., Any] | None = None
        arguments, results = schema.rsplit(" -> ", 1)
        library.define(f"{name}{arguments.removesuffix(')')}, str backend) -> {results}")
        for dispatch_key in ("CPU", "CUDA", "CompositeExplicitAutograd"):
            library.impl(name, self._run, dispatch_key)
        torch.library.register_fake(f"ferrovae::{name}", lambda *args: fake(*args[:-1]), lib=library)
        self.overload = getattr(torch.ops.ferrovae, name).default
        operations[name] = self

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        """Run on `backend`, or on the one chosen by `use_backend`.

        Past `torch.library`'s autograd layer, unless `torch.compile` traces it. Forward-mode derivatives raise
        `NotImplementedError`.
        """
        backend = _backend.state.name if backend is None else backend
        if torch.compiler.is_compiling():
            return self.overload(*args, backend)
        if _functions.has_tangent(args):
            raise _functions.no_forward_mode(self.name)
        if torch._C._are_functorch_transforms_active():
            return (self.overload if self._functional is None else self._functional.apply)(*args, backend)
        if torch.is_grad_enabled() and _functions.needs_gradient(args):
            return (self.overload if self._function is None else self._function.apply)(*args, backend)
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args, backend)

    def on(self, *args: Any) -> Any:
        """As a call whose last argument is the backend."""
        return self(*args[:-1], backend=args[-1])

    def backend_for(self, device_type: str, dtype: torch.dtype, backend: str = "auto") -> str:
        """The backend that would run; raises `RuntimeError` when a forced one cannot."""
        return _backend.resolve(self.name, backend, device_type, dtype, self._dtypes)

    def obstacle(self, backend: str, device_type: str) -> str | None:
        """Why `backend` cannot run this operation on such a device; None when it can."""
        if backend != "reference" and backend not in self.kernels:
            return f"it has no {backend} kernel"
        return _backend.obstacle(backend, device_type)

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
        """`torch.library.register_autograd`; `inputs[-1]` is the backend to hand on to the backward operation."""
        torch.library.register_autograd(f"ferrovae::{self.name}", backward, setup_context=setup_context, lib=library)

        def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
            if self._vmap_rule is None:
                return _functions.one_by_one(self.on, info.batch_size, in_dims, args)
            return self._vmap_rule(info, in_dims, *args)

        self._function = _functions.eager(self.name, self.overload, backward, setup_context)
        self._functional = _functions.functional(self.name, self.overload, backward, setup_context, rule)

    def register_vmap(self, rule: Callable[..., Any]) -> None:
        """`torch.library.register_vmap`; the rule is given the backend as the last argument."""
        torch.library.register_vmap(f"ferrovae::{self.name}", rule, lib=library)
        self._vmap_rule = rule

    def _run(self, *args: Any) -> Any:
        *inputs, backend = args
        tensor = inputs[0]
        if not isinstance(tensor, torch.Tensor):
            tensor = next(argument for argument in inputs if isinstance(argument, torch.Tensor))
        key = (backend, tensor.device, tensor.dtype)
        run = self._chosen.get(key)
        if run is None:
            chosen = self.backend_for(tensor.device.type, tensor.dtype, backend)
            run = self._chosen[key] = self._reference if chosen == "reference" else self.kernels[chosen].run
        return run(*inputs)
