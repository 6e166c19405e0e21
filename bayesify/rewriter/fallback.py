"""The fallback: the original code runs and each read of a parameter is exchanged for its draw."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import scope as scopes
from ..posterior import owner_state
from ..scope import LOCAL
from .trace_context import ACTIVE, opaque_calls


class SwapMode(TorchFunctionMode):
    """Exchanges each Bayesian parameter among a torch function's arguments for its draw."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.outer: list[Any] = []
        self.where: dict[int, tuple[nn.Module, str]] = {}
        for module in owner.modules():
            state = owner_state(module)
            for attribute in state.slots if state is not None else ():
                self.where.setdefault(id(module._parameters[attribute]), (module, attribute))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if LOCAL.scope is None or not LOCAL.scope.drawing or ACTIVE.tracer is not None:
            return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "__get__" and func.__self__.__name__ in _HARMLESS:
            return func(*args, **(kwargs or {}))
        return func(*self.exchange(args), **self.exchange(kwargs or {}))

    def __enter__(self) -> SwapMode:
        opaque_calls.__enter__()
        self.outer.append(ACTIVE.exchange)
        ACTIVE.exchange = self.exchange_while_drawing
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        ACTIVE.exchange = self.outer.pop()
        opaque_calls.__exit__()

    def exchange_while_drawing(self, value: Any) -> Any:
        scope = LOCAL.scope
        return value if scope is None or not scope.drawing else self.exchange(value)

    def exchange(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            found = self.where.get(id(value))
            return value if found is None else scopes.read(*found)
        kind = type(value)
        if kind in (tuple, list):
            return kind(self.exchange(v) for v in value)
        if kind is dict:
            return {k: self.exchange(v) for k, v in value.items()}
        return value


_HARMLESS = {"shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad"}


class DrawnHook:
    """A forward hook that reads parameters, run with those reads exchanged for draws."""

    def __init__(self, hook: Any) -> None:
        self.hook = hook

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        scope = LOCAL.scope
        if scope is None or not scope.drawing:
            return self.hook(module, *args, **kwargs)
        with SwapMode(module):
            return self.hook(module, *args, **kwargs)
