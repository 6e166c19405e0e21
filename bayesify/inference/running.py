"""Run a model with many draws of its weights: one after the other, or together by vmap."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import torch_private
from ..errors import ArgumentError
from ..kernels import grouped
from ..numeric import whole
from ..posterior import Site, bayesian_sites, owner_state
from ..scope import Scope, distinct_keys, grad_mode, held, modules_of, realise
from ..seeds import fold
from ..torch_private import pytree
from .given import Given
from .summaries import is_cache

LOG = logging.getLogger(__name__)

KEPT_BYTES = 256 << 20
"""Draws of all samples that take no more memory are made once for all batches."""

MOST_EXAMPLES = 16
"""The largest batch that is run with several draws at once."""

CPU_BYTES = 8 << 20
"""Draws that are run at once on the CPU fit its caches: beyond, a loop was as fast or faster."""

_VMAPS: weakref.WeakKeyDictionary[nn.Module, dict[Any, bool]] = weakref.WeakKeyDictionary()
"""For each model and kind of input that ran once: whether vmap can run it."""


class Draws:
    """K draws of the weights of a model, made again once it has changed.

    The k-th is a function of ``base`` and k alone, that of ``one_draw(model, fold(base, k))``.

    Args:
        model: A converted model in ``eval()``.
        num_samples: K.
        base: Seed of the family.
        keep: Make the draws once for all calls of :meth:`outputs`, where they are small enough.
    """

    def __init__(self, model: nn.Module, num_samples: int, base: int, keep: bool = False) -> None:
        self.model = model
        self.num_samples, self.base = num_samples, base
        self.keeping = keep
        self._look()

    def _look(self) -> None:
        model, found = self.model, bayesian_sites(self.model)
        self.keys = distinct_keys(found)
        self.modules = modules_of(model)
        # sharded weights are drawn by the modules that read them, compiled models draw themselves,
        # other estimators need no draw, and a mixture of experts reads few
        self.plain = (
            not grouped.possible()
            or any(map(_is_compiled, model.modules()))
            or any(site.slot.estimator != "weight" for site in found)
            or any(map(_leaves_unread, model.modules()))
        )
        suited = [
            site.slot.parameterization == "exp" and grouped.suits(site.mean, site.raw)
            for site in found
        ]
        self.whole = [site for site, fits in zip(found, suited, strict=True) if fits]
        self.others = [site for site, fits in zip(found, suited, strict=True) if not fits]
        self.version = _version([*self.whole, *self.others])
        items = [self._item(site) for site in self.whole]
        self.repeated = None if self.plain else grouped.Repeated(items)
        self.bytes = sum(site.mean.numel() * site.mean.element_size() for site in found)
        self.keep = self.keeping and self.num_samples * self.bytes <= KEPT_BYTES
        self.kept: list[Tensor] | None = None

    def seed(self, k: int) -> int:
        """Of the k-th draw."""
        return fold(self.base, k)

    def _item(self, site: Site) -> grouped.Item:
        key = self.keys.get(site.slot.uid, site.slot.key)
        return grouped.Item(site.mean, site.raw, key, site.slot.buffers)

    def outputs(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
        """The output of each draw, in order."""
        if self.version != _version([*self.whole, *self.others]):
            self._look()
        given = Given(inputs, kwargs)
        if self.plain or not grouped.possible():
            yield from (self._one(k, None, given) for k in range(self.num_samples))
            return
        done, chunk = 0, self._together(inputs, kwargs)
        kind = _kind(inputs, kwargs)
        known = _VMAPS.setdefault(self.model, {})
        if chunk > 1 and kind not in known:
            # its code is traced here: under vmap it might seem to be code that cannot be
            self._one(0, self._draw(0), given)
            known[kind] = True
        while chunk > 1 and known[kind] and done < self.num_samples:
            ready = self._vmapped(range(done, min(done + chunk, self.num_samples)), given)
            if ready is None:
                known[kind] = False
                break
            done += len(ready)
            yield from ready
        for k in range(done, self.num_samples):
            yield self._one(k, self._draw(k), given)

    # -- one after the other -----------------------------------------------------------------

    def _one(self, k: int, drawn: list[Tensor] | None, given: Given) -> Any:
        scope = Scope(torch.tensor(self.seed(k)), self.keys)
        if drawn is not None:
            self._give(scope, drawn, complete=not self.others)
        with held(self.modules, scope):
            return given.call(self.model)

    def _draw(self, k: int) -> list[Tensor]:
        assert self.repeated is not None
        if not self.keep:
            return self.repeated.draw(self.seed(k))
        return [value[k] for value in self._stack(range(k, k + 1), everything=True)]

    def _give(self, scope: Scope, drawn: Sequence[Tensor], complete: bool) -> None:
        mode = grad_mode()
        for site, tensor in zip([*self.whole, *self.others], drawn, strict=False):
            scope.realised[site.slot.uid, mode] = tensor
        if complete:
            scope.filled |= {(module, mode) for module in self.modules}

    # -- together ----------------------------------------------------------------------------

    def _together(self, inputs: Any, kwargs: Any) -> int:
        """How many draws are run at once: 1 where a loop is as fast, or surely right."""
        batch = next((t for t in pytree.tree_leaves((inputs, kwargs)) if _has_batch(t)), None)
        if batch is None or len(batch) > MOST_EXAMPLES or self.num_samples == 1:
            return 1
        sites = (*self.whole, *self.others)
        if any(not _is_plain(s.mean) or s.mean.device != batch.device for s in sites):
            return 1
        if any(map(_has_hooks, self.model.modules())):
            return 1  # a hook would see all draws at once
        if batch.device.type == "cpu":
            return self.num_samples if self.num_samples * self.bytes <= CPU_BYTES else 1
        if batch.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(batch.device)
            return min(self.num_samples, free // 4 // max(self.bytes, 1))
        return 1

    def _stack(self, chosen: range, everything: bool = False) -> list[Tensor]:
        """Draws of each grouped tensor, one behind the other; kept ones as they are if asked."""
        assert self.repeated is not None
        if not self.keep:
            return self.repeated.stack([self.seed(k) for k in chosen])
        if self.kept is None:
            self.kept = self.repeated.stack([self.seed(k) for k in range(self.num_samples)])
        return self.kept if everything else [v[chosen.start : chosen.stop] for v in self.kept]

    def _vmapped(self, chosen: range, given: Given) -> list[Any] | None:
        """The outputs of the chosen draws by one call; None, and a line in the log, if it fails."""
        stacked = self._stack(chosen)
        for site in self.others:
            key = self.keys.get(site.slot.uid, site.slot.key)
            parts = [
                realise(site.module, site.attribute, site.slot, torch.tensor(self.seed(k)), key)
                for k in chosen
            ]
            stacked.append(torch.stack(parts))
        shape: dict[str, Any] = {}

        def call(*drawn: Tensor) -> tuple[Tensor, ...]:
            scope = Scope(torch.tensor(self.seed(chosen.start)), self.keys)
            self._give(scope, drawn, complete=True)
            with held(self.modules, scope):
                leaves, shape["structure"] = pytree.tree_flatten(given.call(self.model))
            shape["leaves"] = [None if isinstance(v, Tensor) else v for v in leaves]
            shape["tensors"] = [i for i, v in enumerate(leaves) if isinstance(v, Tensor)]
            return tuple(leaves[i] for i in shape["tensors"])

        state = _attributes(self.model)
        try:
            with _no_slow_vmap(), _batched_attention(stacked[0].device):
                results = torch.vmap(call)(*stacked)
            _put_back(state)
        except Exception as error:
            with contextlib.suppress(_LeftBehind):
                _put_back(state)
            reason = str(error).partition("\n")[0]
            LOG.info("%s runs draw by draw: %s", type(self.model).__name__, reason)
            return None
        outputs = []
        for k in range(len(chosen)):
            leaves = list(shape["leaves"])
            for index, result in zip(shape["tensors"], results, strict=True):
                leaves[index] = result[k]
            outputs.append(pytree.tree_unflatten(leaves, shape["structure"]))
        return outputs


def _version(found: Sequence[Site]) -> list[tuple[int, int, int]]:
    """What tells that a tensor of the posterior was changed, exchanged or moved."""
    tensors = [tensor for site in found for tensor in (site.mean, site.raw)]
    return [
        (id(t), 0 if t.is_inference() else t._version, t.data_ptr() if _is_plain(t) else 0)
        for t in tensors
    ]


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is nn.Parameter


class _LeftBehind(RuntimeError):
    """A call under vmap left tensors in the model that mean nothing outside."""


def _attributes(model: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    found = [d for m in model.modules() for d in (m.__dict__, m._buffers)]
    return [(live, dict(live)) for live in found]


def _put_back(state: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Take out what a call under vmap has left in the model."""
    names = []
    for live, before in state:
        for name, value in list(live.items()):
            if isinstance(value, Tensor) and torch_private.is_functorch_wrapped_tensor(value):
                names.append(name)
                if name in before:
                    live[name] = before[name]
                else:
                    del live[name]
    if names:
        raise _LeftBehind(f"it keeps tensors that it computed ({', '.join(names)})")


@contextlib.contextmanager
def _no_slow_vmap() -> Iterator[None]:
    """An operation without a rule for vmap is an error here, not a loop with a warning."""
    before = torch_private.is_vmap_fallback_enabled()
    torch_private.set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        torch_private.set_vmap_fallback_enabled(before)


def _batched_attention(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The CPU's fused attention has no rule for vmap, its plain one does."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


def _leaves_unread(module: nn.Module) -> bool:
    state = owner_state(module)
    return state is not None and any(state.seldom.values())


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _has_batch(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _kind(inputs: Any, kwargs: Any) -> Any:
    """What decides which code of a model runs, as far as can be told from outside."""
    leaves, structure = pytree.tree_flatten((inputs, kwargs))
    described = tuple(
        (v.shape, v.dtype, v.device) if isinstance(v, Tensor) else repr(v) for v in leaves
    )
    return (
        described,
        str(structure),
        grad_mode(),
        torch.is_autocast_enabled("cpu"),
        (torch.is_autocast_enabled("cuda")),
    )


# -- before and around -----------------------------------------------------------------------


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the block in ``eval()``, then give every module its own mode again."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(flags[0][1])  # a module may override it to undo what its eval() has done
        for module, training in flags:
            module.training = training


def check_samples(what: str, num_samples: int) -> int:
    return whole(f"{what}: num_samples", num_samples, "an integer above 0")


def check_batch(what: str, inputs: Any) -> None:
    leaves = pytree.tree_leaves(inputs, is_leaf=is_cache)
    cache = next((type(leaf).__name__ for leaf in leaves if is_cache(leaf)), None)
    if cache is not None:
        raise ArgumentError(
            f"{what}: an input is a {cache}, to which each draw would add its keys and values for "
            "the next draw to read. Give the whole sequence without it, or call the model in "
            "one_draw(model), with a cache of its own for each draw."
        )
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            if leaf.shape[0] == 0:
                raise ArgumentError(
                    f"{what}: the batch is empty (an input has the shape {tuple(leaf.shape)})."
                )
            return
