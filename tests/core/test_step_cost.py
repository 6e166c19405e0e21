"""What a Bayesian training step does beyond the deterministic one: kernels and memory, not time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import bayesify
from bayesify.kernels import native
from bayesify.kernels.cpu_draw import _PIECE, _STRIP

# By what they work on: each of these goes through all elements of its tensors.
KERNELS = (
    "normal_", "mul", "mul_", "exp_", "exp", "exp2_", "add", "add_", "sub", "sub_", "expm1",
    "expm1_", "square_", "div", "div_", "sum", "amax", "log", "zero_", "clone", "cat", "addcmul_",
    "_fused_adamw_", "_foreach_add_",
)  # fmt: skip
# Of plain torch, by pieces of tensors: the draw in strips of them.
NOISE = Counter({"normal_": 1})
DRAW = Counter({"mul": 1, "exp_": 1, "mul_": 1, "add": 1})
EXPM1 = Counter({"amax": 1, "mul": 1, "exp2_": 1, "sub_": 1})
KL = EXPM1 + Counter({"sub_": 1, "addcmul_": 1, "sum": 1})  # to a standard normal prior
KL_BACKWARD = EXPM1 + Counter({"add": 1, "add_": 1})
# Of either, by tensors.
BACKWARD = Counter({"mul_": 1})  # the gradient of the mean is that of the draw
OPTIMIZER = Counter({"add_": 1})  # of a number: each log variance counts its steps
TEMPORARIES = {"torch": 2, "native": 0}  # of a piece: one of the KL, one of its gradient


def mlp() -> tuple[nn.Module, Tensor]:
    """A weight of two pieces, in five strips, and three tensors of one."""
    return nn.Sequential(nn.Linear(512, 300), nn.ReLU(), nn.Linear(300, 10)), torch.randn(4, 512)


def vit() -> tuple[nn.Module, Tensor]:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3,
        num_classes=10,
    )  # fmt: skip
    return model, torch.randn(4, 3, 32, 32)


def step_of(
    make: Callable[[], tuple[nn.Module, Tensor]], bayesian: bool, kl: bool = True
) -> tuple[Callable[[], None], list[int]]:
    """A training step, and the number of weights of each tensor."""
    torch.manual_seed(0)
    model, x = make()
    sizes = [p.numel() for p in model.parameters()]
    y = torch.randint(0, 10, (4,))
    groups: Any = model.parameters()
    if bayesian:
        bayesify.to_bbb_(model)
        groups = bayesify.param_groups(model, lr=1e-3)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    model.train()

    def step() -> None:
        loss = F.cross_entropy(model(x), y)
        if bayesian and kl:
            loss = bayesify.elbo_loss(loss, model, num_data=100)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, sizes


def count(sizes: list[int], part: int) -> int:
    """Of the parts of all tensors."""
    return sum(-(-size // part) for size in sizes)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The profiler sees the noise that this thread makes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def profiled(run: Callable[[], Any], times: int = 3) -> tuple[Counter[str], Counter[int]]:
    """Calls of each operation, and sizes in bytes of what is allocated, once all is warm."""
    for _ in range(times):
        run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        run()
    operations = Counter(
        event.name.removeprefix("aten::")
        for event in seen.events() or ()
        if event.name.startswith("aten::")
    )
    results: Any = seen.profiler
    sizes = Counter(
        event.nbytes()
        for event in results.kineto_results.events()
        if event.name() == "[memory]" and event.nbytes() > 0
    )
    return operations, sizes


def extra(bayesian: Counter[Any], deterministic: Counter[Any]) -> Counter[Any]:
    difference = Counter(bayesian)
    difference.subtract(deterministic)
    return Counter({key: count for key, count in difference.items() if count})


def times(counts: Counter[str], factor: int) -> Counter[str]:
    return Counter({key: count * factor for key, count in counts.items()})


class Calls:
    """How often the C library goes through tensors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: Counter[str] = Counter()
        for name in ("draw", "kl", "gradient", "fill_normal"):
            monkeypatch.setattr(native, name, self._counted(name, getattr(native, name)))

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.seen[name] += 1
            return function(*args)

        return call


@pytest.mark.parametrize("make", [mlp, vit])
@pytest.mark.parametrize("kl", [True, False])
def test_the_kernels_of_a_step(
    make: Callable[[], tuple[nn.Module, Tensor]], kl: bool, library: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    step, sizes = step_of(make, True, kl)
    pieces, tensors = count(sizes, _PIECE), len(sizes)
    base, _ = profiled(step_of(make, False)[0])
    calls = Calls(monkeypatch)
    found = extra(profiled(step)[0], base)
    steps = 4  # of which the last is profiled
    # means and log variances are two groups of the optimizer; the KL divergence is scaled and added
    once = Counter(("_fused_adamw_", "_foreach_add_")) + times(OPTIMIZER, tensors)
    if kl:
        once += Counter(("mul", "mul", "add", "cat", "clone", "sum"))
    if library == "torch":
        once += times(NOISE, pieces) + times(DRAW, count(sizes, _STRIP))
        once += times(BACKWARD, pieces if kl else tensors)
        once += times(KL + KL_BACKWARD, pieces) if kl else Counter()
        assert not calls.seen
    elif kl:  # one pass for all draws and one for their KL, and one for each tensor's gradients
        assert calls.seen == {"draw": steps, "kl": steps, "gradient": steps * tensors}
    else:
        once += times(BACKWARD, tensors)
        assert calls.seen == {"draw": steps}
    assert {k: found[k] for k in KERNELS if found[k]} == dict(once)


def test_a_step_allocates_nothing_of_the_size_of_a_weight(library: str) -> None:
    base = profiled(step_of(mlp, False)[0])[1]
    found = extra(profiled(step_of(mlp, True)[0])[1], base)
    weight = 4 * 512 * 300
    assert found[weight] == 0
    assert base[weight] == 1  # its gradient
    assert found[4 * _PIECE] == found[weight - 4 * _PIECE] == TEMPORARIES[library]
    without = extra(profiled(step_of(mlp, True, kl=False)[0])[1], base)
    assert {size: count for size, count in without.items() if size > 1024} == {}


def test_calls_of_small_operations_stay_few(library: str) -> None:
    """Those that make views and wrap numbers; a draw is to be no long Python program."""
    step, sizes = step_of(vit, True)
    found = extra(profiled(step)[0], profiled(step_of(vit, False)[0])[0])
    assert sum(found.values()) <= {"torch": 115, "native": 20}[library] * count(sizes, _PIECE) + 60


def test_the_means_run_what_the_original_runs() -> None:
    model, x = mlp()
    original = profiled(lambda: model(x))
    bayesify.to_bbb_(model).eval()
    assert profiled(lambda: model(x)) == original
