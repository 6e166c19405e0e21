"""How sparse a model is, and what that saves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..numeric import positive, real
from ..posterior import Site, bayesian_sites, pruned_elements, sites
from ..scope import at_mean
from .elements import LAYERS
from .units import heads_of


@dataclass(frozen=True)
class SparsityRow:
    """One Bayesian tensor.

    ``outputs`` is the length of its first dimension, ``dead_outputs`` how many entries of that
    are pruned as a whole.
    """

    name: str
    elements: int
    pruned: int
    outputs: int
    dead_outputs: int
    dense_bytes: int
    sparse_bytes: int

    @property
    def share(self) -> float:
        """Share of the weights that are pruned, in [0, 1]."""
        return self.pruned / self.elements if self.elements else 0.0


@dataclass(frozen=True)
class Sparsity:
    """How sparse the Bayesian tensors of a model are, tied ones counted once.

    ``dense_bytes`` is what their means take in a file, pruned or not; ``sparse_bytes`` what the
    means that are left take together with a mask of one bit a weight.
    """

    rows: tuple[SparsityRow, ...]

    @property
    def elements(self) -> int:
        """Weights."""
        return sum(row.elements for row in self.rows)

    @property
    def pruned(self) -> int:
        """Weights that are pruned."""
        return sum(row.pruned for row in self.rows)

    @property
    def share(self) -> float:
        """Share of the weights that are pruned, in [0, 1]."""
        return self.pruned / self.elements if self.elements else 0.0

    @property
    def dense_bytes(self) -> int:
        """Bytes of all means."""
        return sum(row.dense_bytes for row in self.rows)

    @property
    def sparse_bytes(self) -> int:
        """Bytes of the means that are left, and of a mask for each tensor with pruned weights."""
        return sum(row.sparse_bytes for row in self.rows)


@dataclass(frozen=True)
class MultiplyAdds:
    """Multiply-adds of one call: of the dense model, and without the units that are pruned."""

    dense: int
    remaining: int


def sparsity(model: nn.Module) -> Sparsity:
    """How much of ``model`` is pruned, one row for each Bayesian tensor.

    Raises:
        UnsupportedModuleError: ``model`` has no posterior.

    >>> import torch, bayesify
    >>> model = bayesify.prune_(bayesify.to_bbb(torch.nn.Linear(8, 5, bias=False)), 0.8)
    >>> found = sparsity(model)
    >>> found.share, found.dense_bytes, found.sparse_bytes
    (0.8, 160, 37)
    """
    return Sparsity(tuple(map(_row, bayesian_sites(model))))


def _row(site: Site) -> SparsityRow:
    mask = pruned_elements(site.raw)
    rows = mask.reshape(mask.shape[0], -1) if mask.dim() and mask.numel() else mask.reshape(1, -1)
    elements, pruned, size = mask.numel(), int(mask.sum()), site.mean.element_size()
    return SparsityRow(
        name=site.name,
        elements=elements,
        pruned=pruned,
        outputs=rows.shape[0],
        dead_outputs=int(rows.all(dim=1).sum()) if elements else 0,
        dense_bytes=elements * size,
        sparse_bytes=(elements - pruned) * size + (-(-elements // 8) if pruned else 0),
    )


def multiply_adds(model: nn.Module, *inputs: Tensor) -> MultiplyAdds:
    """Multiply-adds of one call at the means, counted by torch's ``FlopCounterMode``.

    In ``remaining`` a ``Linear`` or convolution counts without those of its outputs and inputs
    whose weights are all pruned, and an attention without its pruned heads; single weights save
    nothing on dense hardware. That a layer need not compute what the next one does not read is
    not counted.

    Args:
        model: A converted model.
        *inputs: Arguments of the call.

    Returns:
        Half of the floating-point operations, which count multiplications and additions.

    Raises:
        UnsupportedModuleError: ``model`` has no posterior.

    >>> import torch, bayesify
    >>> model = bayesify.to_bbb(torch.nn.Linear(8, 4))
    >>> multiply_adds(model, torch.ones(1, 8)).dense
    32
    """
    bayesian_sites(model)
    counter = FlopCounterMode(display=False)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    modes = [(module, module.training) for module in model.modules()]
    torch.backends.mha.set_fastpath_enabled(False)  # one opaque operator, which nothing counts
    try:
        # not every version of torch counts every fused attention
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), at_mean(model.eval()), counter:
            model(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in modes:
            module.training = mode
    by_module = {path: sum(ops.values()) for path, ops in counter.get_flop_counts().items()}
    root = type(model).__name__
    saved = 0.0
    for path, module in model.named_modules():
        full = f"{root}.{path}" if path else root
        total = by_module.get(full, 0)
        if total:
            own = total - sum(
                by_module.get(f"{full}.{name}", 0) for name, _ in module.named_children()
            )
            saved += own * (1.0 - _live(model, module))
    dense = counter.get_total_flops()
    return MultiplyAdds(dense // 2, round((dense - saved) / 2))


def latency(call: Callable[..., object], *inputs: Tensor, seconds: float = 1.0) -> float:
    """Measure how long one call takes on this machine, without gradients.

    Args:
        call: A model or a program.
        *inputs: Arguments of the call, on the device where it runs.
        seconds: How long is measured, above 0, after a warm-up.

    Returns:
        The median, in seconds.

    Raises:
        ArgumentError: ``seconds`` is not above 0.
    """
    seconds = real("latency: seconds", seconds, "above 0 and finite", positive)
    # it warns when it is imported, where a CUDA toolkit is but no GPU
    from torch.utils.benchmark import Timer

    timer = Timer(
        "call(*inputs)", globals={"call": call, "inputs": inputs},
        num_threads=torch.get_num_threads(),
    )  # fmt: skip
    with torch.no_grad():
        return float(timer.blocked_autorange(min_run_time=seconds).median)


def _live(model: nn.Module, module: nn.Module) -> float:
    """Share of a module's own operations that pruned units leave."""
    layer = heads_of(model, module)
    if layer is not None:
        rows = torch.cat([p.by_unit(pruned_elements(p.site.raw)) for p in layer.parts], dim=1)
        return 1.0 - rows.all(dim=1).double().mean().item()
    if isinstance(module, LAYERS):
        for site in sites(module):
            if site.name == "weight":
                mask = pruned_elements(site.raw)
                dead = mask.flatten(2).all(dim=2) if mask.dim() > 2 else mask
                outputs = 1.0 - dead.all(dim=1).double().mean().item()
                inputs = 1.0 - dead.all(dim=0).double().mean().item()
                return outputs * inputs
    return 1.0
