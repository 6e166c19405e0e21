"""Predict with many draws, and fit what depends on the weights to the posterior means."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from . import gaussian
from .errors import ArgumentError
from .kernels.noise import fold
from .posterior import bayesian_sites
from .scope import as_seed, at_mean, one_draw

Reduce = Literal["probabilities", "moments"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class ProbabilitySummary(NamedTuple):
    """What K draws say of the classes of each example; entropies in nats.

    Attributes:
        mean: Mean over the draws of the class probabilities, (batch, classes).
        std: Standard deviation over the draws (divisor K) of the probabilities, (batch, classes).
        predictive_entropy: Entropy of ``mean``: the whole doubt, (batch,).
        expected_entropy: Mean of the draws' entropies: the doubt that more data would leave.
        mutual_information: Their difference: the doubt about the weights, at least 0.
    """

    mean: Tensor
    std: Tensor
    predictive_entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor


class Moments(NamedTuple):
    """Mean and standard deviation (divisor K) over the draws, in the structure of the output."""

    mean: Any
    std: Any


def predict(
    model: nn.Module,
    *inputs: Any,
    num_samples: int,
    seed: int | None = None,
    reduce: Reduce | None = None,
    **kwargs: Any,
) -> Any:
    """Run ``model`` with ``num_samples`` draws of its weights.

    The model runs in ``eval()`` mode, whatever its present one, which it has again afterwards:
    dropout is off, BatchNorm uses its running statistics. No gradient is recorded.

    Args:
        model: A converted model, or a module that holds one.
        *inputs: Positional arguments of the model.
        num_samples: Number K of draws, at least 1.
        seed: The K draws are a function of it: calls with one seed use the same K weights for
            every batch. None takes a new one from torch's global generator.
        reduce: None stacks the outputs. ``"probabilities"`` takes them for logits and gives a
            :class:`ProbabilitySummary`, ``"moments"`` gives :class:`Moments`; both in the memory
            of a few outputs, however many draws.
        **kwargs: Keyword arguments of the model.

    Shape:
        Each output tensor (batch, ...) becomes (K, batch, ...); the logits are (batch, classes).

    Returns:
        What the model returns (tensor, tuple, dict, Hugging Face output), each tensor in it
        stacked over the draws, or a summary.

    Raises:
        ArgumentError: An argument has a value that cannot work, the batch is empty, or the output
            cannot be summarised so.
        UnsupportedModuleError: ``model`` has no posterior.

    Reference:
        Blundell et al., 2015, arXiv:1505.05424, section 3.1; Houlsby et al., 2011,
        arXiv:1112.5745, equation 2 (mutual information).

    >>> import torch, bayesify
    >>> model = bayesify.to_bbb(torch.nn.Linear(2, 3))
    >>> predict(model, torch.ones(5, 2), num_samples=4).shape
    torch.Size([4, 5, 3])
    >>> predict(model, torch.ones(5, 2), num_samples=4, reduce="probabilities").mean.shape
    torch.Size([5, 3])
    """
    collectors: dict[str | None, Callable[[int], _Collector]] = {
        None: _Stack, "probabilities": _Probabilities, "moments": _Moments
    }  # fmt: skip
    if reduce not in collectors:
        raise ArgumentError(
            f"predict: reduce must be None, 'probabilities' or 'moments', got {reduce!r}."
        )
    _check_samples("predict", num_samples)
    bayesian_sites(model)
    _check_batch("predict", (inputs, kwargs))
    collector = collectors[reduce](num_samples)
    with torch.no_grad(), _evaluating(model):
        for outputs in _drawn(model, inputs, kwargs, num_samples, int(as_seed(seed))):
            collector.add(outputs)
    return collector.result()


def recompute_batchnorm_(
    model: nn.Module, loader: Iterable[Any], device: torch.device | str | None = None
) -> nn.Module:
    """Gather the running statistics of every BatchNorm anew, at the posterior means.

    Statistics gathered in training belong to drawn weights; ``eval()`` uses the means. Each
    statistic becomes the plain average over the batches. All else runs as in ``eval()``. A model
    without BatchNorm is left alone and ``loader`` is not read.

    Args:
        model: A converted model.
        loader: Batches: an input tensor, a sequence that begins with it, or a mapping of keyword
            arguments. Each batch counts alike, so that they should be of one size.
        device: Where the inputs are moved to; None: the device of the first parameter.

    Returns:
        ``model``.

    Raises:
        ArgumentError: ``loader`` gives no batch. Upon any error the old statistics are back.
        UnsupportedModuleError: ``model`` has no posterior.

    Reference:
        Izmailov et al., 2018, arXiv:1803.05407, section 3.2.

    >>> import torch, bayesify
    >>> model = bayesify.to_bbb(torch.nn.Sequential(torch.nn.BatchNorm1d(1)))
    >>> _ = recompute_batchnorm_(model, [torch.tensor([[1.0], [3.0]])])
    >>> model[0].running_mean.item(), model[0].running_var.item()
    (2.0, 2.0)
    """
    first = bayesian_sites(model)[0].mean
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return model
    target = first.device if device is None else torch.device(device)
    kept = [
        (n, n.momentum, {k: b.clone() for k, b in n.named_buffers(recurse=False)}) for n in norms
    ]
    empty = True
    try:
        with torch.no_grad(), _evaluating(model), at_mean(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.training = True
            for batch in loader:
                args, kwargs = _arguments(batch, target)
                model(*args, **kwargs)
                empty = False
        if empty:
            raise ArgumentError(
                "recompute_batchnorm_: loader gave no batch. Is it a generator that was used up?"
            )
    except BaseException:
        with torch.no_grad():
            for norm, _, buffers in kept:
                for name, value in buffers.items():
                    norm.get_buffer(name).copy_(value)
        raise
    finally:
        for norm, momentum, _ in kept:
            norm.momentum = momentum
    return model


def calibrate_(
    model: nn.Module,
    batch: Any,
    *,
    target_agreement: float = 0.99,
    target_change: float | None = None,
    num_samples: int = 8,
    seed: int = 0,
) -> float:
    """Scale every sigma by one factor: the largest at which draws keep the function of the means.

    The factor is found by bisection to within 3 %, with the same noise at every factor.

    Args:
        model: A converted model; only its log variances change.
        batch: The input tensor, or a tuple of the model's positional arguments.
        target_agreement: For logits (batch, ..., classes): at least this share, in (0, 1], of the
            drawn outputs has the largest class of the means' output.
        target_change: For any other output, instead of the agreement: the root mean square of
            ``output - output at the means`` is at most this share of that of the means' output.
        num_samples: Number of draws that are compared with the means, at least 1.
        seed: Of those draws.

    Returns:
        The factor by which every sigma was multiplied.

    Raises:
        ArgumentError: An argument has a value that cannot work, or no factor from 2**-20 to 2**20
            meets the target. Upon any error the log variances are as they were.
        UnsupportedModuleError: ``model`` has no posterior.

    >>> import torch, bayesify
    >>> model = bayesify.to_bbb(torch.nn.Linear(3, 2), logvar=0.0)
    >>> calibrate_(model, torch.randn(64, 3)) < 1.0
    True
    """
    if not _in_unit_interval(target_agreement):
        raise ArgumentError(
            f"calibrate_: target_agreement must be in (0, 1], got {target_agreement!r}."
        )
    if target_change is not None and not (
        isinstance(target_change, Real) and 0.0 < target_change < math.inf
    ):
        raise ArgumentError(
            f"calibrate_: target_change must be a positive finite number, got {target_change!r}."
        )
    _check_samples("calibrate_", num_samples)
    found = bayesian_sites(model)
    inputs = batch if isinstance(batch, tuple) else (batch,)
    _check_batch("calibrate_", inputs)
    base = int(as_seed(seed))
    kept = [site.raw.detach().clone() for site in found]

    def scale(factor: float) -> None:
        for site, raw in zip(found, kept, strict=True):
            kind = site.slot.parameterization
            logvar = gaussian.logvar_from_raw(raw, kind) + 2.0 * math.log(factor)
            site.raw.copy_(gaussian.raw_from_logvar(logvar, kind))

    with torch.no_grad(), _evaluating(model):
        with at_mean(model):
            reference = main_output(model(*inputs))
        if target_change is None:
            _check_classes(reference)

        def keeps(exponent: float) -> bool:
            scale(math.exp2(exponent))
            outputs = _drawn(model, inputs, {}, num_samples, base)
            compared = [main_output(output) for output in outputs]
            if target_change is None:
                labels = reference.argmax(-1)
                shares = [(c.argmax(-1) == labels).double().mean().item() for c in compared]
                return sum(shares) / num_samples >= target_agreement
            changes = [(c.double() - reference.double()).square().mean().item() for c in compared]
            scale_of = reference.double().square().mean().item()
            return sum(changes) / num_samples <= target_change**2 * scale_of

        try:
            exponent = _largest(keeps)
            scale(math.exp2(exponent))
        except BaseException:
            for site, raw in zip(found, kept, strict=True):
                site.raw.copy_(raw)
            raise
    return math.exp2(exponent)


def _largest(keeps: Callable[[float], bool]) -> float:
    """The largest exponent of two that ``keeps``, to within 0.04."""
    grows = keeps(0.0)
    edge = 0.0
    while keeps(edge + 1.0 if grows else edge - 1.0) == grows:
        edge += 1.0 if grows else -1.0
        if abs(edge) == 20.0:
            raise ArgumentError(
                "calibrate_: the output does not depend on the drawn weights: no factor up to "
                "2**20 misses the target."
                if grows
                else "calibrate_: no factor down to 2**-20 meets the target. Does the output hold "
                "NaN or ties, or random numbers of the model's own?"
            )
    low, high = (edge, edge + 1.0) if grows else (edge - 1.0, edge)
    while high - low > 0.04:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low


# -- summaries ---------------------------------------------------------------------------------


class _Collector:
    """Takes the outputs of the draws one by one."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.count = 0

    def add(self, output: Any) -> None:
        raise NotImplementedError

    def result(self) -> Any:
        raise NotImplementedError


class _Structured(_Collector):
    """A collector that treats each tensor of the output by itself and keeps the structure."""

    def __init__(self, num_samples: int) -> None:
        super().__init__(num_samples)
        self.leaves: list[Any] = []
        self.structure: Any = None

    def add(self, output: Any) -> None:
        leaves, structure = pytree.tree_flatten(output)
        if self.count == 0:
            self.structure = structure
            self.leaves = [self.first(v) if isinstance(v, Tensor) else v for v in leaves]
            self.shapes = [v.shape if isinstance(v, Tensor) else None for v in leaves]
        elif structure != self.structure:
            raise ArgumentError(
                "predict: two draws gave outputs of different structure, which cannot be "
                "combined. Call the model in one_draw(model) draw by draw."
            )
        for kept, shape, leaf in zip(self.leaves, self.shapes, leaves, strict=True):
            if shape is None:
                _check_plain(kept, leaf)
            elif not isinstance(leaf, Tensor) or leaf.shape != shape:
                raise ArgumentError(
                    f"predict: an output has the shape {tuple(shape)} in one draw and "
                    f"{tuple(getattr(leaf, 'shape', ()))} in another, so that they cannot be "
                    "combined. Call the model in one_draw(model) draw by draw."
                )
            else:
                self.update(kept, leaf)
        self.count += 1

    def first(self, leaf: Tensor) -> Any:
        raise NotImplementedError

    def update(self, kept: Any, leaf: Tensor) -> None:
        raise NotImplementedError


class _Stack(_Structured):
    def first(self, leaf: Tensor) -> Tensor:
        return leaf.new_empty((self.num_samples, *leaf.shape))

    def update(self, kept: Tensor, leaf: Tensor) -> None:
        kept[self.count] = leaf

    def result(self) -> Any:
        return pytree.tree_unflatten(self.leaves, self.structure)


class _Welford:
    """Running mean and standard deviation of a tensor (Welford, 1962)."""

    def __init__(self, like: Tensor) -> None:
        if like.is_complex():
            raise ArgumentError("predict: complex outputs have no moments here; take reduce=None.")
        wide = like.float() if like.device.type == "mps" else like.double()
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        self.count = 0
        self.mean = torch.zeros_like(wide)
        self.squares = torch.zeros_like(wide)

    def add(self, value: Tensor) -> None:
        value = value.to(self.mean.dtype)
        self.count += 1
        delta = value - self.mean
        self.mean += delta / self.count
        self.squares += delta * (value - self.mean)

    def moments(self) -> tuple[Tensor, Tensor]:
        std = (self.squares / self.count).clamp_min(0.0).sqrt()
        return self.mean.to(self.dtype), std.to(self.dtype)


class _Moments(_Structured):
    def first(self, leaf: Tensor) -> _Welford:
        return _Welford(leaf)

    def update(self, kept: _Welford, leaf: Tensor) -> None:
        kept.add(leaf)

    def result(self) -> Moments:
        pairs = [v.moments() if isinstance(v, _Welford) else (v, v) for v in self.leaves]
        mean, std = (pytree.tree_unflatten([p[i] for p in pairs], self.structure) for i in (0, 1))
        return Moments(mean, std)


class _Probabilities(_Collector):
    def add(self, output: Any) -> None:
        logits = main_output(output)
        if logits.dim() != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
            raise ArgumentError(
                "predict: reduce='probabilities' needs logits of the shape (batch, classes), with "
                f"at least 2 classes; the model gave {logits.dtype} of {tuple(logits.shape)}. "
                "Take reduce='moments' or None."
            )
        log_probs = logits.to(_wide_dtype(logits)).log_softmax(-1)
        probs = log_probs.exp()
        entropy = torch.special.entr(probs).sum(-1)
        if self.count == 0:
            self.dtype = torch.promote_types(logits.dtype, torch.float32)
            self.probs, self.entropy = _Welford(probs), torch.zeros_like(entropy)
        self.probs.add(probs)
        self.entropy += entropy
        self.count += 1

    def result(self) -> ProbabilitySummary:
        mean, std = self.probs.moments()
        predictive = torch.special.entr(mean).sum(-1)
        expected = self.entropy / self.count
        information = (predictive - expected).clamp_min(0.0)
        return ProbabilitySummary(
            *(v.to(self.dtype) for v in (mean, std, predictive, expected, information))
        )


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _check_plain(first: Any, other: Any) -> None:
    """What is no tensor must be a plain value, and the same in every draw."""
    if not isinstance(first, _PLAIN):
        raise ArgumentError(
            f"predict: the output holds a {type(first).__name__}, of which the tensors cannot be "
            "reached. torch.export.register_dataclass makes a dataclass known; or call the model "
            "in one_draw(model) draw by draw."
        )
    if first != other:
        raise ArgumentError(
            f"predict: the output holds {first!r} in one draw and {other!r} in another, and only "
            "tensors can be combined. Call the model in one_draw(model) draw by draw."
        )


# -- running -----------------------------------------------------------------------------------


def _drawn(
    model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], num_samples: int, base: int
) -> Iterator[Any]:
    """The outputs of ``num_samples`` draws, the k-th being a function of ``base`` and k alone."""
    for k in range(num_samples):
        with one_draw(model, seed=fold(base, k)):
            output = model(*inputs, **kwargs)
        yield output


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Run the block in ``eval()``, then give every module its own mode again."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(flags[0][1])  # a module may override it to undo what its eval() has done
        for module, training in flags:
            module.training = training


def main_output(output: Any) -> Tensor:
    """The output itself, or the logits of a Hugging Face output."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise ArgumentError(
            f"The model's output is a {type(output).__name__}, expected a tensor or an object with "
            ".logits. Wrap the model in a module that returns the tensor."
        )
    return found


def _arguments(batch: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    first = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(first, Tensor):
        raise ArgumentError(
            "recompute_batchnorm_: a batch must be a tensor, a sequence that begins with one, or "
            f"a mapping, got {type(batch).__name__}."
        )
    return (first.to(device),), {}


def _check_samples(what: str, num_samples: int) -> None:
    integer = isinstance(num_samples, Integral) and not isinstance(num_samples, bool)
    if not integer or num_samples < 1:
        raise ArgumentError(f"{what}: num_samples must be an integer above 0, got {num_samples!r}.")


def _check_batch(what: str, inputs: Any) -> None:
    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            if leaf.shape[0] == 0:
                raise ArgumentError(
                    f"{what}: the batch is empty (an input has the shape {tuple(leaf.shape)})."
                )
            return


def _check_classes(reference: Tensor) -> None:
    if reference.dim() < 2 or reference.shape[-1] < 2 or not reference.is_floating_point():
        raise ArgumentError(
            "calibrate_: target_agreement needs logits of the shape (batch, ..., classes), with at "
            f"least 2 classes; the model gave {reference.dtype} of {tuple(reference.shape)}. Give "
            "target_change=0.05, say, for any other output."
        )


def _in_unit_interval(value: object) -> bool:
    return isinstance(value, Real) and 0.0 < float(value) <= 1.0
