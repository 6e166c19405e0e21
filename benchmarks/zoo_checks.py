"""What `zoo.py` checks of one model: its structure without data, and its numbers on the CPU."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from zoo_models import (
    build,
    build_on_meta,
    detects,
    family,
    inputs,
    native_size,
    on_meta,
    signature,
)

import bayesify
from bayesify.posterior import sites
from reference import Probe, check, clear_caches, outputs

BATCHES = (1, 3)
LARGE = 180_000_000
"""Parameters above which a model is not compared in numbers: it needs 50 bytes for each."""

SHALLOW: tuple[dict[str, Any], ...] = (
    {"depth": 2}, {"depths": (1, 1, 2, 1)}, {"depths": (2, 2, 2, 2)}, {"layers": (1, 1, 1, 1)},
    {"num_layers": 2}, {"depths": (1, 1, 1)}, {"depths": (1, 2, 1)},
)  # fmt: skip
"""Arguments that make a model of the same modules with fewer layers."""


def _narrow_regnety() -> nn.Module:
    config = timm.models.regnet.RegNetCfg(
        w0=56, wa=20.1, wm=2.52, group_size=8, depth=27, se_ratio=0.25
    )
    model = timm.models.regnet.RegNet(config)
    model.__dict__["pretrained_cfg"] = {"input_size": (3, 224, 224)}
    return model


NARROW: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "regnety_1280": ("w0=56, wa=20.1, group_size=8", _narrow_regnety),
    "torchvision:regnet_y_128gf": (
        "w_0=56, w_a=20.1, group_width=8",
        lambda: torchvision.models.RegNet(
            torchvision.models.regnet.BlockParams.from_init_params(
                depth=27, w_0=56, w_a=20.1, w_m=2.52, group_width=8, se_ratio=0.25
            ),
            norm_layer=partial(nn.BatchNorm2d, eps=1e-5, momentum=0.1),
        ),
    ),
    "torchvision:vit_h_14": (
        "num_heads=4, hidden_dim=64, mlp_dim=128",
        lambda: torchvision.models.VisionTransformer(224, 14, 32, 4, 64, 128),
    ),
    "torchvision:vit_l_16": (
        "num_heads=4, hidden_dim=64, mlp_dim=128",
        lambda: torchvision.models.VisionTransformer(224, 16, 24, 4, 64, 128),
    ),
}
"""Large models whose layers have names: none can be left out, a narrow one stands for the model."""


# -- structure -------------------------------------------------------------------------------


class Uses(TorchDispatchMode):
    """Records which parameters reach an operation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = {id(p): n for n, p in model.named_parameters()}
        self.used: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and id(leaf) in self.names:
                self.used.add(self.names[id(leaf)])
        return func(*args, **(kwargs or {}))


def layout(value: Any) -> list[tuple[Any, ...]]:
    return [(tuple(t.shape), t.dtype) for t in outputs(value)]


@contextmanager
def on(device: str) -> Iterator[None]:
    """Factories without a device follow the model to meta."""
    with torch.device("meta") if device == "meta" else nullcontext():
        yield


def lost_by_conversion(
    converted: nn.Module,
    before: dict[str, type[nn.Module]],
    keys: dict[str, tuple[int, ...]],
    methods: set[str],
) -> list[str]:
    """Modules of another class, and state_dict keys and methods that are missing."""
    problems = []
    after = dict(converted.named_modules())
    for path, kind in before.items():
        there = after.get(path)
        if not isinstance(there, kind) or type(there).__name__ != kind.__name__:
            problems.append(f"3: class of {path or 'the model'} changed")
    state = converted.state_dict()
    problems += [f"3: lost key {k}" for k, s in keys.items()
                 if k not in state or tuple(state[k].shape) != s]  # fmt: skip
    return problems + [f"3: lost {m}" for m in methods if not hasattr(type(converted), m)]


# long: one check after the other, each with its own result
def structural(
    name: str, *, short: bool = False, batches: tuple[int, ...] = BATCHES
) -> dict[str, Any]:
    """Convert everything, and see that every parameter in use is drawn and none is read.

    In eval and train mode, at each batch size; no number is looked at.

    Args:
        name: The model.
        short: Keep one of all equal layers, where that runs. What is said of the size and the
            kinds of modules is of the whole model all the same.
        batches: Numbers of images.
    """
    device = "cpu" if detects(name) else "meta"  # boxes depend on numbers
    make = partial(build if device == "cpu" else build_on_meta, name)
    model = make()
    size = native_size(name, model)
    group = signature(model)
    tensors = sum(p.is_floating_point() for p in model.parameters())
    parameters = sum(p.numel() for p in model.parameters())
    if short:
        leave_out_layers(model, 1, settings=True)
        if signature(model) != group or not runs_at(name, model, size, device):
            model = make()
    problems: list[str] = []
    notes: list[str] = []
    before = {m: type(module) for m, module in model.named_modules()}
    keys = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    methods = {m for m in dir(type(model)) if not m.startswith("__")}

    start = time.perf_counter()
    converted = bayesify.to_bbb(model)
    convert_s = time.perf_counter() - start
    problems += lost_by_conversion(converted, before, keys, methods)
    bayesian = {site.name for site in sites(converted)}
    floats = {n for n, p in model.named_parameters() if p.is_floating_point()}
    problems += [f"not converted: {n}" for n in sorted(floats - bayesian)]

    used: set[str] = set()
    drawn: set[str] = set()
    first_call_s = 0.0
    with torch.no_grad(), on(device):
        for training in (False, True):
            model.train(training), converted.train(training)
            label = "train" if training else "eval"
            used_here: set[str] = set()
            drawn_here: set[str] = set()
            for batch in batches:
                args, kwargs = inputs(name, model, batch, size, device)
                uses = Uses(model)
                clear_caches(model)
                clear_caches(converted)
                try:
                    with uses:
                        expected = layout(model(*args, **kwargs))
                except Exception as error:
                    notes.append(f"{label}, batch {batch}: the original raises {_said(error)}")
                    continue
                used_here |= uses.used
                if not training and batch > 1:
                    with bayesify.at_mean(converted):
                        if layout(converted(*args, **kwargs)) != expected and device == "meta":
                            problems.append(f"1a: {label}, batch {batch}: other shapes")
                calls: list[Any] = [converted.__call__]
                if not first_call_s:
                    start = time.perf_counter()
                    with bayesify.one_draw(converted, seed=1):
                        converted(*args, **kwargs)
                    first_call_s = time.perf_counter() - start
                    if hasattr(converted, "forward_features"):
                        calls.insert(0, converted.forward_features)
                for call in calls:
                    probe = Probe(converted)
                    with probe.watching(), bayesify.one_draw(converted, seed=2):
                        found = layout(call(*args, **kwargs))
                    problems += [f"2: {label}, batch {batch}: {x}" for x in sorted(probe.leaks)]
                    drawn_here |= probe.drawn
                if found != expected and device == "meta":
                    problems.append(f"1b: {label}, batch {batch}: other shapes")
            missed = sorted(used_here & bayesian - drawn_here)
            problems += [f"2: {label}: {x} is used, not drawn" for x in missed]
            used, drawn = used | used_here, drawn | drawn_here
    if not used:
        problems.append("the original never ran")
    report: dict[str, Any] = {
        "group": group, "family": family(name), "tensors": tensors, "parameters": parameters,
        "device": device, "size": size, "used": len(used), "drawn": len(used & drawn),
        "unused": len(floats - used), **census(converted), "convert_s": round(convert_s, 3),
        "first_call_s": round(first_call_s, 2),
    }  # fmt: skip
    back = bayesify.to_deterministic(converted)
    if {m: type(module) for m, module in back.named_modules()} != before:
        problems.append("back: other classes")
    if {k: tuple(v.shape) for k, v in back.state_dict().items()} != keys:
        problems.append("back: other keys")
    return report | {"problems": _few(problems), "notes": _few(notes)}


def census(converted: nn.Module) -> dict[str, Any]:
    """How many owners of parameters took an fx rung, and who took the fallback why."""
    worst: dict[str, int] = {}
    fallback: dict[str, str] = {}
    order = ("plain", "guided", "swap")
    for rung in bayesify.rungs(converted):
        if rung.own_parameters:
            worst[rung.owner] = max(worst.get(rung.owner, 0), order.index(rung.rung))
        if rung.rung == "swap":
            kind = f"{rung.type}.{rung.method}" + ("" if rung.own_parameters else " (owns none)")
            fallback.setdefault(f"{kind}: {rung.reason}", rung.owner)
    counts = {kind: sum(w == k for w in worst.values()) for k, kind in enumerate(order)}
    return {"owners": len(worst), **counts, "fallback": sorted(fallback)}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def _few(lines: list[str], most: int = 8) -> list[str]:
    rest = len(lines) - most
    return lines if rest <= 0 else [*lines[:most], f"and {rest} more"]


# -- numbers ---------------------------------------------------------------------------------


def runs_at(name: str, model: nn.Module, size: int, device: str = "meta") -> bool:
    """Whether the original takes images of this size, in both modes."""
    with torch.no_grad(), on(device):
        try:
            for training in (False, True):
                args, kwargs = inputs(name, model, 3, size, device)
                clear_caches(model)
                model.train(training)(*args, **kwargs)
        except Exception:
            return False
    return True


def sizes(name: str, outline: nn.Module) -> tuple[int, int | None]:
    """The smallest size of image that the model takes, and another one if there is any."""
    native = native_size(name, outline)
    if detects(name):
        return native, None if name.startswith("torchvision:ssd") else native + 32
    taken = [s for s in sorted({64, 96, 128, 160, 224, native}) if s < native]
    smallest = next((s for s in taken if runs_at(name, outline, s)), native)
    others = (smallest + 32, smallest + 64, 2 * smallest)
    return smallest, next((s for s in others if runs_at(name, outline, s)), None)


def _find_boxes(name: str, model: nn.Module, size: int) -> None:
    """Give random weights statistics of their own images: without them no box survives in eval."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    args, kwargs = inputs(name, model, 3, size, "cpu")
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(*args, **kwargs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _settings(layer: nn.Module) -> list[tuple[str, str]]:
    """Whole numbers, names and switches of a layer, as the shift of a window. No rates."""
    return [
        (name, repr(value))
        for module in layer.modules()
        for name, value in vars(module).items()
        if not name.startswith("_") and isinstance(value, bool | int | str | list | tuple)
    ]


def leave_out_layers(model: nn.Module, keep: int, *, settings: bool = False) -> None:
    """Keep the first ``keep`` of all equal layers in a sequence.

    Equal are modules of the same kinds and shapes, and of the same settings where that is asked.
    """
    for module in model.modules():
        names = list(module._modules)
        if not isinstance(module, nn.Sequential | nn.ModuleList) or not all(
            name.isdigit() for name in names
        ):
            continue
        kept: list[nn.Module] = []
        kinds: list[Any] = []
        for child in module._modules.values():
            shapes = [tuple(p.shape) for p in child.parameters()]
            kinds.append((signature(child), shapes, _settings(child) if settings else []))
            if not shapes or kinds.count(kinds[-1]) <= keep:
                kept.append(child)
        if len(kept) < len(names):
            module._modules.clear()
            module._modules.update({str(i): child for i, child in enumerate(kept)})


def _fewer_layers(name: str, keep: int) -> nn.Module:
    model = build(name)
    leave_out_layers(model, keep)
    return model


def _small(name: str) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
    """A model with all kinds of modules of a large one, but fewer or narrower, and how it differs.

    The model itself where there is no such one.
    """
    whole = build_on_meta(name)
    kind, size = signature(whole), native_size(name, whole)

    def stands(outline: nn.Module) -> bool:
        return signature(outline) == kind and runs_at(name, outline, size)

    if name in NARROW:
        how, narrow = NARROW[name]
        if stands(on_meta(narrow)):
            return narrow, {"narrow": how}
    for options in SHALLOW:
        with contextlib.suppress(Exception):  # a model without these arguments
            if stands(build_on_meta(name, **options)):
                return partial(build, name, **options), options
    count = sum(p.numel() for p in whole.parameters())
    for keep in (2, 1):
        leave_out_layers(whole, keep)
        left = sum(p.numel() for p in whole.parameters())
        if left < count and left <= LARGE and stands(whole):
            return partial(_fewer_layers, name, keep), {"layers": f"{keep} of each kind"}
    return partial(build, name), {}


def numeric(name: str, shallow: bool) -> dict[str, Any]:
    """Invariants 1-5 in numbers, by ``tests/reference.py``.

    Args:
        name: The model.
        shallow: Take a smaller model with the same modules, where there is one.
    """
    make, options = _small(name) if shallow else (partial(build, name), {})
    outline = on_meta(make)
    parameters = sum(p.numel() for p in outline.parameters())
    if parameters > LARGE:
        return {"problems": ["too large for this machine, and no smaller one of its kind"]}
    size, other = sizes(name, outline)
    torch.manual_seed(0)
    model = make()
    others = [] if other is None else [inputs(name, model, 2, other, "cpu")]
    batch = 1 if name.startswith("torchvision:mvit") else 3  # 16 whole frames an example
    report = check(
        model, lambda n: inputs(name, model, n, size, "cpu"), batches=(batch,), others=others,
        prepare=partial(_find_boxes, name, size=size) if detects(name) else None,
    )  # fmt: skip
    return {
        "size": size, "other_size": other, "parameters": parameters, "options": options,
        "owners": report.owners, "fx_owners": report.fx_owners,
        "fallback": sorted(set(report.swapped))[:8], "problems": _few(report.problems),
    }  # fmt: skip
