"""Methods of a generated class beside its ``forward*``, and what they keep in step.

What torch and users do with a module, moves and casts, state dicts, lists of parameters,
representations, goes for the log variances beside the means as well. Inside of a forward none of it
shows.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn, no_grad

from .. import torch_private
from ..posterior import STATE, owner_state, raw_name
from ..scope import LOCAL
from .active import ACTIVE
from .caches import below


def moving_methods(base: Any) -> dict[str, Any]:
    """Log variances stay in float32 where the means are cast, and go to their device with them."""

    def _apply(self: Any, fn: Callable[..., Any], recurse: bool = True) -> Any:
        state = self.__dict__.get(STATE)
        if state is None:
            return base._apply(self, fn, recurse)
        state.variants.clear()  # they hold for one dtype and device
        for slot in state.slots.values():
            slot.buffers.clear()
        names = [raw_name(a, s) for a, s in state.slots.items()]
        raws = [self._parameters[n] for n in names]
        kept = {id(t) for r in raws for t in (r, r.grad)}

        def keep_float32(tensor: Tensor) -> Any:
            result = fn(tensor)
            if id(tensor) in kept and result.dtype != tensor.dtype:
                return tensor.to(result.device)
            return result

        return base._apply(self, keep_float32, recurse)

    return {"_apply": _apply}


def describing_methods(base: Any) -> dict[str, Any]:
    """What a module says of its parameters, and the head that it makes anew."""

    def no_weight_decay(self: Any) -> set[str]:
        inherited = getattr(base, "no_weight_decay", None)
        names = set(inherited(self)) if inherited is not None else set()
        for prefix, module in self.named_modules():
            state = owner_state(module)
            if state is not None:
                for attribute, slot in state.slots.items():
                    raw = raw_name(attribute, slot)
                    names.add(f"{prefix}.{raw}" if prefix else raw)
        return names

    def extra_repr(self: Any) -> str:
        text = str(base.extra_repr(self))
        state = self.__dict__.get(STATE)
        if state is None or not state.slots:
            return text
        priors = ", ".join(dict.fromkeys(str(s.prior) for s in state.slots.values()))
        kinds = dict.fromkeys(s.estimator for s in state.slots.values() if s.estimator != "weight")
        posterior = f"posterior of {', '.join(state.slots)}, prior {priors}"
        return ", ".join(filter(None, [text, posterior, *kinds]))

    def _named_members(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = base._named_members(self, *args, **kwargs)
        if LOCAL.scope is None or ACTIVE.tracer is not None:
            return found
        # a forward knows the parameters of before the conversion
        raws = {id(raw) for module in below(self) for raw in _spreads(module).values()}
        return (entry for entry in found if id(entry[1]) not in raws)

    methods: dict[str, Any] = {
        "_named_members": _named_members,
        "no_weight_decay": no_weight_decay,
        "extra_repr": extra_repr,
    }
    reset = getattr(base, "reset_classifier", None)
    if reset is not None:

        @functools.wraps(reset)
        def reset_classifier(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = reset(self, *args, **kwargs)
            state = self.__dict__.get(STATE)
            if state is not None and state.extend is not None:
                state.extend(self)  # the new head is Bayesian as the old one was
            return result

        methods["reset_classifier"] = reset_classifier
    return methods


def listing_methods(base: Any) -> dict[str, Any]:
    """Where a class lists its own state, the trained spreads are saved and loaded beside it.

    Inside of a forward there are none, as before the conversion.
    """

    def _save_to_state_dict(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
        base._save_to_state_dict(self, destination, prefix, keep_vars)
        for name, raw in _spreads(self).items():
            if LOCAL.scope is not None:  # a forward knows what there was before the conversion
                destination.pop(prefix + name, None)
            else:
                destination.setdefault(prefix + name, raw if keep_vars else raw.detach())

    def _load_from_state_dict(
        self: Any, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        raws = _spreads(self)
        lists = missing_keys, unexpected_keys, error_msgs
        if LOCAL.scope is not None or not lists_itself:
            base._load_from_state_dict(self, state_dict, prefix, local_metadata, strict, *lists)
            if LOCAL.scope is not None:
                unknown = {prefix + name for name in raws}
                missing_keys[:] = [key for key in missing_keys if key not in unknown]
            return
        # the class's own code sees what it knows: the module and the keys of before the conversion
        given = {prefix + n: state_dict.pop(prefix + n) for n in raws if prefix + n in state_dict}
        held = self._parameters
        self.__dict__["_parameters"] = {n: p for n, p in held.items() if n not in raws}
        try:
            base._load_from_state_dict(self, state_dict, prefix, local_metadata, strict, *lists)
        finally:
            held.update(self._parameters)
            self.__dict__["_parameters"] = held
        state_dict.update(given)
        spreads = nn.Module()
        spreads._parameters.update(raws)
        torch_private.load_from_state_dict(spreads, given, prefix, local_metadata, strict, *lists)
        held.update(spreads._parameters)  # assign=True puts the given tensors in place

    def load_state_dict(self: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(state_dict)
        result = base.load_state_dict(self, state_dict, *args, **kwargs)
        for prefix, module in self.named_modules(prefix="", remove_duplicate=False):
            for name, raw in _spreads(module).items():
                value = given.get(f"{prefix}.{name}" if prefix else name)
                if isinstance(value, Tensor) and value.shape == raw.shape:
                    with no_grad():
                        raw.copy_(value)
        return result

    lists_itself = base._load_from_state_dict is not torch_private.load_from_state_dict
    methods: tuple[Any, ...] = (_save_to_state_dict, _load_from_state_dict)
    if base.load_state_dict is not nn.Module.load_state_dict:
        methods += (load_state_dict,)
    return {method.__name__: method for method in methods}


def _spreads(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trained spreads that a module holds, by their names in it."""
    state = owner_state(module)
    names = [raw_name(a, s) for a, s in state.slots.items()] if state is not None else []
    held = {name: module._parameters.get(name) for name in names}
    return {name: raw for name, raw in held.items() if raw is not None}


def _qconfig(self: Any) -> Any:
    try:
        return self.__dict__["qconfig"]
    except KeyError:
        raise AttributeError("qconfig") from None


def _set_qconfig(self: Any, value: Any) -> None:
    """What torch.ao.quantization sets on each module before it asks for the modules' classes.

    It takes it off again, and nothing else of its call can be seen.
    """
    self.__dict__["qconfig"] = value
    if value is None or type(value).__name__ in ("QConfig", "QConfigDynamic"):
        kind = type(self).__name__
        warnings.warn(
            f"torch.ao.quantization leaves this {kind} as it is: it goes by exact classes, and a "
            f"converted {kind} has one of its own. Quantise the means: "
            "bayesify.to_deterministic(model).",
            UserWarning,
            stacklevel=3,
        )


def _delete_qconfig(self: Any) -> None:
    del self.__dict__["qconfig"]


QCONFIG = property(_qconfig, _set_qconfig, _delete_qconfig)
