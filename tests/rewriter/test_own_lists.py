"""Modules that list their own state or parameters: no log variance is lost without a word."""

import io
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesify
from bayesify import ArgumentError, CheckpointError, LostPosteriorWarning
from bayesify.posterior import sites


class Saves(nn.Linear):
    """As torch_geometric's Linear: it writes weight and bias by itself."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name in ("weight", "bias"):
            value = getattr(self, name)
            destination[prefix + name] = value if keep_vars else value.detach()


class Loads(nn.Linear):
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        with torch.no_grad():
            self.weight.copy_(state_dict[prefix + "weight"])
            self.bias.copy_(state_dict[prefix + "bias"])


class SavesAndLoads(Loads, Saves):
    pass


class Filters(nn.Linear):
    """It calls torch's own, and throws away what it does not know."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        known = {prefix + "weight", prefix + "bias"}
        for key in [k for k in destination if k.startswith(prefix) and k not in known]:
            del destination[key]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        known = {prefix + "weight", prefix + "bias"}
        for key in [k for k in state_dict if k.startswith(prefix) and k not in known]:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)


class LoadsWhole(nn.Module):
    """A ``load_state_dict`` of its own that knows means only."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 2)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        with torch.no_grad():
            self.lin.weight.copy_(state_dict["lin.weight"])
            self.lin.bias.copy_(state_dict["lin.bias"])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lin(x)
        return out


class Renames(nn.Module):
    """Its keys are not its names, both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {k.removeprefix("net."): v for k, v in super().state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict({f"net.{k}": v for k, v in state_dict.items()}, strict)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Means(nn.Module):
    """Its ``state_dict`` knows means only."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 2)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {"lin.weight": self.lin.weight.detach(), "lin.bias": self.lin.bias.detach()}

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lin(x)
        return out


def hooked() -> nn.Module:
    """A hook drops what it does not know."""
    model = nn.Sequential(nn.Linear(3, 2))

    def hook(module: nn.Module, state: Any, prefix: str, metadata: Any) -> None:
        for key in [k for k in state if not k.endswith(("weight", "bias"))]:
            del state[key]

    model.register_state_dict_post_hook(hook)
    return model


class Packed(nn.Linear):
    """It writes something else in the place of its weight."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "packed"] = self.weight.detach().to(torch.int8)
        destination[prefix + "bias"] = self.bias.detach()


def moved(model: nn.Module) -> nn.Module:
    """The model with a posterior that no conversion gives."""
    with torch.no_grad():
        for number, site in enumerate(sites(model)):
            site.mean.add_(number + 1.0)
            site.raw.uniform_(-9.0, -2.0)
    return model


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Means and log variances, read from where they are and not from a state dict."""
    found = {f"{site.name} mean": site.mean.detach().clone() for site in sites(model)}
    return found | {f"{site.name} logvar": site.logvar.detach().clone() for site in sites(model)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


BUILDERS: dict[str, Any] = {
    kind.__name__: lambda kind=kind: nn.Sequential(nn.Linear(3, 3), kind(3, 2))
    for kind in (nn.Linear, Saves, Loads, SavesAndLoads, Filters, nn.BatchNorm1d)
    if kind is not nn.BatchNorm1d
} | {
    "BatchNorm": lambda: nn.Sequential(nn.BatchNorm1d(3)),
    "a root": lambda: SavesAndLoads(3, 2),
    "LoadsWhole": LoadsWhole,
}
whole = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


@whole
@pytest.mark.parametrize("parameterization", ["exp", "softplus"])
def test_state_dicts_hold_the_posterior(build: Any, parameterization: Any) -> None:
    config = bayesify.BBBConfig(parameterization=parameterization)
    model = moved(bayesify.to_bbb(build(), config=config))
    state = model.state_dict()
    for site in sites(model):
        raw = site.name + {"exp": "_logvar", "softplus": "_rho"}[parameterization]
        assert torch.equal(state[raw], site.raw)
        assert not state[raw].requires_grad
        assert model.state_dict(keep_vars=True)[raw] is site.raw
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    back = bayesify.to_bbb(build(), config=config)
    back.load_state_dict(torch.load(buffer, weights_only=True))
    assert same(tensors(back), tensors(model))


@whole
def test_files_hold_the_posterior(build: Any, tmp_path: Path) -> None:
    model = moved(bayesify.to_bbb(build()))
    bayesify.save(model, tmp_path / "file")
    for given in (build(), bayesify.to_bbb(build())):
        assert same(tensors(bayesify.load(tmp_path / "file", model=given)), tensors(model))


def test_assigned_tensors_are_in_place() -> None:
    for build in (lambda: SavesAndLoads(3, 2), lambda: nn.Sequential(nn.BatchNorm1d(3))):
        model, back = moved(bayesify.to_bbb(build())), bayesify.to_bbb(build())
        state = {k: v.clone() for k, v in model.state_dict().items()}
        back.load_state_dict(state, assign=True)
        assert same(tensors(back), tensors(model))
        for site in sites(back):
            assert site.raw.data_ptr() == state[f"{site.name}_logvar"].data_ptr()
            assert site.raw.requires_grad


def test_what_a_state_dict_lacks_is_an_error() -> None:
    model = bayesify.to_bbb(nn.Sequential(SavesAndLoads(3, 2)))
    state = nn.Sequential(nn.Linear(3, 2)).state_dict()
    with pytest.raises(RuntimeError, match=r'Missing key.*"0.weight_logvar", "0.bias_logvar"'):
        model.load_state_dict(state)
    before = tensors(model)
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert missing == ["0.weight_logvar", "0.bias_logvar"]
    after = tensors(model)
    assert torch.equal(after["0.weight mean"], state["0.weight"])
    assert torch.equal(after["0.weight logvar"], before["0.weight logvar"])
    wrong = {**model.state_dict(), "0.weight_logvar": torch.zeros(9)}
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight_logvar"):
        model.load_state_dict(wrong)


def test_in_a_new_process(tmp_path: Path) -> None:
    model = moved(bayesify.to_bbb(nn.Sequential(SavesAndLoads(3, 2)))).eval()
    torch.save(model.state_dict(), tmp_path / "state")
    torch.save(model, tmp_path / "model")
    with bayesify.one_draw(model, seed=4):
        torch.save(model(torch.ones(1, 3)), tmp_path / "out")
    code = f"""
import sys, torch
from torch import nn
sys.path.insert(0, {str(Path(__file__).parent)!r})
import bayesify
from test_own_lists import SavesAndLoads
folder = {str(tmp_path)!r} + "/"
whole = torch.load(folder + "model", weights_only=False)
model = bayesify.to_bbb(nn.Sequential(SavesAndLoads(3, 2))).eval()
model.load_state_dict(torch.load(folder + "state", weights_only=True))
for m in (whole, model):
    with bayesify.one_draw(m, seed=4):
        assert torch.equal(m(torch.ones(1, 3)), torch.load(folder + "out", weights_only=True))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


# -- what cannot be mended is named ----------------------------------------------------------------


@pytest.mark.parametrize("build", [Means, hooked], ids=["state_dict", "hook"])
def test_what_stays_out_of_the_state_dict_is_named(build: Any, tmp_path: Path) -> None:
    with pytest.warns(LostPosteriorWarning, match=r"state_dict\(\) leaves out 2 log variances \("):
        model = bayesify.to_bbb(build())
    with pytest.raises(CheckpointError, match=r"does not hold 2 tensors of the posterior"):
        bayesify.save(model, tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_other_keys_for_the_same_tensors_are_not_a_loss(tmp_path: Path) -> None:
    model, back = moved(bayesify.to_bbb(Renames())), bayesify.to_bbb(Renames())
    assert "weight_logvar" in model.state_dict()
    back.load_state_dict(model.state_dict())
    assert same(tensors(back), tensors(model))
    with pytest.raises(CheckpointError, match=r"net\.weight, net\.weight_logvar"):
        bayesify.save(model, tmp_path / "file")  # a file goes by names


def test_packed_weights_are_refused_by_save(tmp_path: Path) -> None:
    model = bayesify.to_bbb(nn.Sequential(Packed(3, 2)))
    with pytest.raises(CheckpointError, match=r"does not hold 1 tensors.*\(0\.weight\)"):
        bayesify.save(model, tmp_path / "file")
    skipped = bayesify.to_bbb(nn.Sequential(nn.Linear(3, 3), Packed(3, 2)), skip="1")
    bayesify.save(skipped, tmp_path / "file")


class Lists(nn.Module):
    """Its ``parameters`` knows means only."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 2)
        self.hidden = nn.Linear(2, 2)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return iter([("w", self.lin.weight), ("b", self.lin.bias)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.hidden(self.lin(x))
        return out


class ListsPlainly(Lists):
    def parameters(self, recurse: bool = True) -> Any:
        return iter([self.lin.weight, self.lin.bias])


@pytest.mark.parametrize("kind", [Lists, ListsPlainly])
@pytest.mark.parametrize("place", ["root", "child"])
def test_parameters_that_leave_out_log_variances(kind: Any, place: str) -> None:
    net = kind() if place == "root" else nn.Sequential(kind())
    prefix = "" if place == "root" else "0."
    text = rf"parameters\(\) leaves out 2 log variances \({prefix}lin\.weight_logvar, "
    with pytest.warns(LostPosteriorWarning, match=text):
        model: Any = bayesify.to_bbb(net)
    if place == "child":
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            bayesify.check_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
        return
    model.hidden.requires_grad_(False)  # what the module hides from optimizers on purpose
    with pytest.raises(ArgumentError, match=r"does not hold 2 log variances \(lin\.weight_logvar"):
        bayesify.check_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    groups = bayesify.param_groups(model, lr=0.1)
    assert {g["name"]: len(g["params"]) for g in groups} == {"means": 2, "logvars": 2}
    bayesify.check_optimizer(model, torch.optim.SGD(groups))


@pytest.mark.parametrize("kind", [Lists, ListsPlainly])
def test_selection_goes_by_what_a_module_holds(kind: Any) -> None:
    rows = {row.name: row.action for row in bayesify.plan(kind(), only="lin").rows}
    assert rows == {
        "lin.weight": "bayes", "lin.bias": "bayes",
        "hidden.weight": "skipped: not in only", "hidden.bias": "skipped: not in only",
    }  # fmt: skip


def test_fit_trains_what_parameters_leaves_out() -> None:
    with pytest.warns(LostPosteriorWarning, match="parameters"):
        model: Any = bayesify.to_bbb(ListsPlainly(), skip="hidden")
    before = model.lin.weight_logvar.detach().clone()
    data = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.randint(0, 2, (8,)))
    bayesify.fit(model, data, epochs=1, batch_size=4, lr=0.1)
    assert not torch.equal(model.lin.weight_logvar, before)
