"""One draw of every weight, and the plain draw of one parameter that the others are held to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import gaussian, torch_private
from ..kernels import grouped
from ..kernels.buffers import Buffers
from ..kernels.noise import noise
from ..posterior import Slot, bayesian_sites, tensors_of
from .seeds import as_seed, distinct_keys


class Scope:
    """One draw of every weight: a seed and the tensors realised from it so far.

    Tensors are kept per (slot, grad mode): one drawn without a graph must not serve a call that
    needs gradients. One in autocast's dtype stands beside that in the mean's.
    """

    __slots__ = (
        "compiled", "drawing", "filled", "keys", "later", "lowered", "means", "reads", "realised",
        "seed",
    )  # fmt: skip

    def __init__(self, seed: Tensor | None, keys: dict[int, int] | None = None) -> None:
        self.seed = seed
        self.drawing = seed is not None
        self.keys = {} if keys is None else keys
        self.realised: dict[tuple[Any, ...], Tensor] = {}
        self.means: dict[tuple[int, str], Tensor] = {}  # of what is realised, by place
        self.later: dict[tuple[Any, ...], grouped.Later] = {}  # drawn, and not read yet
        self.filled: set[tuple[int, int]] = set()  # what needs no look again: (module, grad mode)
        self.reads: set[tuple[int, int]] = set()
        self.lowered: set[tuple[int, int, torch.dtype]] = set()  # reads in autocast's dtype
        self.compiled = False  # whether compiled code has read something, which is not in reads

    def clear(self) -> None:
        """Let go of what is realised."""
        self.realised.clear()
        self.later.clear()
        self.means.clear()
        self.filled.clear()

    def of(self, module: nn.Module) -> Scope:
        """The scope in which the parameters of a module are read: this one, unless modes differ."""
        return self

    def empty(self) -> Scope:
        """A scope of the same seed."""
        return Scope(self.seed, self.keys)

    def fork(self, *, keep: bool) -> Scope:
        """A scope of the same seed, with a copy of what is realised or with nothing."""
        child = self.empty()
        if keep:
            child.realised = dict(self.realised)
            child.later = dict(self.later)
            child.means = dict(self.means)
            child.filled = set(self.filled)
        return child

    def keeps(self, module: nn.Module, attribute: str, mean: Tensor | None) -> bool:
        """Whether what is realised is of this mean of a module.

        In one scope ``functional_call`` may put in the posterior of another model.
        """
        if mean is None or torch.compiler.is_compiling():
            return True
        return self.means.setdefault((id(module), attribute), mean) is mean

    def read(self, module: nn.Module, attribute: str, slot: Slot) -> Tensor:
        """The draw of one slot, whose parameters are those that ``module`` holds now."""
        if torch.compiler.is_compiling():
            self.compiled = True
        else:
            self.reads.add((slot.uid, grad_mode()))
        return self.draw(module, attribute, slot)

    def read_lowered(self, module: nn.Module, attribute: str, slot: Slot) -> Tensor:
        """As :meth:`read`, for operations that autocast lowers: in its dtype where it is on.

        The numbers are those that autocast would make of the draw, once for all reads.
        """
        if not torch_private.is_any_autocast_enabled() or torch.compiler.is_compiling():
            return self.read(module, attribute, slot)
        mean, _ = tensors_of(module, attribute, slot)
        dtype = autocast_dtype(mean)
        if dtype is None or not self.keeps(module, attribute, mean):
            return self.read(module, attribute, slot)
        index = (slot.uid, grad_mode(), dtype)
        self.lowered.add(index)
        tensor = self.realised.get(index)
        if tensor is None:
            tensor = self._first_read(index, slot)
            if tensor is None:
                tensor = self.draw(module, attribute, slot).to(dtype)
                if index in self.later:
                    return tensor  # it belongs to the transform around this read
            self.realised[index] = tensor
        return tensor

    def draw(self, module: nn.Module, attribute: str, slot: Slot) -> Tensor:
        """As :meth:`read`, but no read."""
        index = (slot.uid, grad_mode())
        if not self.keeps(module, attribute, dict.get(module._parameters, attribute)):
            return realise(module, attribute, slot, self.seed, self.key_of(slot))
        tensor = self.realised.get(index)
        if tensor is None:
            tensor = self._first_read(index, slot)
            if tensor is None:
                tensor = realise(module, attribute, slot, self.seed, self.key_of(slot))
                if not torch.compiler.is_compiling() and index in self.later:
                    return tensor  # it belongs to the transform around this read
            self.realised[index] = tensor
        return tensor

    def _first_read(self, index: tuple[Any, ...], slot: Slot) -> Tensor | None:
        """The draw that was made when the scope opened, where one was and it can be read here."""
        if torch.compiler.is_compiling():
            return None
        later = self.later.get(index)
        if later is None or grouped.transformed():
            return None
        tensor = later.read()
        slot.drawn = later.hook
        return tensor

    def deviation(self, module: nn.Module, attribute: str, slot: Slot) -> Tensor:
        """The draw of one slot less its mean: sigma times noise. Zeros, where there is no seed."""
        if self.seed is None:
            return torch.zeros_like(tensors_of(module, attribute, slot)[0])
        mean, raw = tensors_of(module, attribute, slot)
        index = (slot.uid, grad_mode(), "deviation")
        kept = self.keeps(module, attribute, mean)
        tensor = self.realised.get(index) if kept else None
        if tensor is None:
            dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
            epsilon = self.noise(slot, mean.shape, dtype, mean.device)
            with torch_private.DisableTorchFunction():  # as in realise
                std = gaussian.std_from_raw(raw, slot.parameterization).to(dtype)
                tensor = (std * epsilon).to(mean.dtype)
            if kept:
                self.realised[index] = tensor
        return tensor

    def noise(
        self, slot: Slot, size: Sequence[int], dtype: torch.dtype, device: torch.device,
        family: int = 0,
    ) -> Tensor:  # fmt: skip
        """Standard normal noise that belongs to one slot; family 0 is that of its draw.

        Zeros, where there is no seed.
        """
        with torch_private.DisableTorchFunction():
            if self.seed is None:
                return torch.zeros(size, dtype=dtype, device=device)
            return noise(self.seed, self.key_of(slot) ^ family, size, dtype, device)

    def key_of(self, slot: Slot) -> int:
        """The key of a slot's noise."""
        return self.keys.get(slot.uid, slot.key)


AT_MEAN = Scope(None)


def grad_mode() -> int:
    """What draws of one scope are told apart by: 0 without gradient, 1 with, 2 in inference."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        return 2
    return int(torch.is_grad_enabled())


def autocast_dtype(mean: Tensor) -> torch.dtype | None:
    """To what autocast lowers a weight now; None if it leaves it as it is."""
    kind = mean.device.type
    if mean.dtype is not torch.float32 or not torch.amp.is_autocast_available(kind):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def realise(module: nn.Module, attribute: str, slot: Slot, seed: Tensor | None, key: int) -> Tensor:
    """Draw one parameter: on the CPU as draws are made together if possible, else by plain torch.

    The latter is the reference of :mod:`bayesify.kernels.grouped`. It draws in float32, or in
    float64 for a float64 mean, and has the mean's dtype.
    """
    mean, raw = tensors_of(module, attribute, slot)
    assert seed is not None
    # Not autocast and not a torch-function mode: the mode that swaps reads must not see this one.
    with torch_private.DisableTorchFunction():
        # On the CPU alone: the backward of a draw on CUDA reads the log variance again, which FSDP2
        # may have let go of by then. Memory is not kept either, where a unit is to be let go of.
        if mean.is_cpu and grouped.possible() and suits_group(slot, mean, raw):
            [(value, _)] = grouped.draw([grouped.Item(mean, raw, key, Buffers())], seed)
            return value
        dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
        std = gaussian.std_from_raw(raw, slot.parameterization)
        return gaussian.draw(mean, std, noise(seed, key, mean.shape, dtype, mean.device))


def suits_group(slot: Slot, mean: Tensor, raw: Tensor) -> bool:
    """Whether :mod:`bayesify.kernels.grouped` can draw this parameter, where it is possible."""
    return slot.parameterization == "exp" and grouped.suits(mean, raw)


def draws(model: nn.Module, seed: int | Tensor | None = None) -> dict[str, Tensor]:
    """The weights that ``one_draw(model, seed)`` uses, for ``torch.func.functional_call``.

    With the estimators ``local`` and ``flipout`` each example has weights of its own: a call in
    ``one_draw`` then gives something else than one with these, of the same distribution.

    Returns:
        ``{name: draw}`` over the Bayesian parameters, tied ones once; differentiable in means
        and log variances; batched if ``seed`` is batched by ``torch.vmap``.

    Raises:
        ArgumentError: ``seed`` is not a non-negative integer.
        UnsupportedModuleError: ``model`` has no posterior.

    >>> import torch, bayesify
    >>> model = bayesify.to_bbb(torch.nn.Linear(2, 1)).eval()
    >>> x = torch.ones(1, 2)
    >>> with bayesify.one_draw(model, seed=0):
    ...     y = model(x)
    >>> torch.equal(y, torch.func.functional_call(model, bayesify.draws(model, seed=0), (x,)))
    True
    """
    tensor, found = as_seed(seed), bayesian_sites(model)
    keys = distinct_keys(found)
    return {
        s.name: realise(s.module, s.attribute, s.slot, tensor, keys.get(s.slot.uid, s.slot.key))
        for s in found
    }
