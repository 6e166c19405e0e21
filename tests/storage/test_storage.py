"""storage/: what is saved comes back bit for bit, or not at all and with a reason."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bayesify
from bayesify import (
    BBBConfig,
    GaussianPrior,
    LivePrior,
    NoMatchWarning,
    ScaleMixturePrior,
    check_optimizer,
    param_groups,
    storage,
)
from bayesify.convert import extend_
from bayesify.errors import ArgumentError, CheckpointError, UnsupportedModuleError
from bayesify.models import ModelSpec
from bayesify.posterior import gaussian_prior, is_bayesian, sites
from bayesify.report.weights import left_out
from bayesify.storage import describe, load, read_header, read_stats, replacing, save

ROOT = Path(__file__).resolve().parents[2]


class Tied(nn.Module):
    """A language model in small: the embedding is the output layer's weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.head(self.embed((x[:, :3].abs() * 3).long() % 11).mean(dim=1))
        return hidden


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 5, batch_first=True)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.rnn(x[:, None])[0]
        return hidden * self.scale


def convnet() -> Any:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Flatten(),
        nn.Linear(12, 3),
    )  # fmt: skip


def frozen() -> Any:
    model = convnet()
    model[1].requires_grad_(False)
    return model


def half() -> Any:
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).to(torch.bfloat16)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "batch norm": (convnet, {}),
    "partial": (convnet, {"skip": [nn.BatchNorm2d, "re:bias$"]}),
    "frozen": (frozen, {"config": BBBConfig(include_frozen=True)}),
    "frozen, skipped": (frozen, {}),
    "tied": (Tied, {"initial_std": 0.1}),
    "softplus": (convnet, {"config": BBBConfig(parameterization="softplus")}),
    "initial prior": (convnet, {"prior": GaussianPrior(0.3, mean="initial", relative=True)}),
    "initial prior, tied": (Tied, {"prior": GaussianPrior(0.3, mean="initial")}),
    "mixture": (convnet, {"prior": ScaleMixturePrior(0.25, 1.5, 0.01)}),
    "recurrent": (Recurrent, {}),
    "bfloat16": (half, {"prior": GaussianPrior(0.3, mean="initial")}),
    "float64": (lambda: convnet().double(), {"only": "Linear"}),
}


def inputs(model: nn.Module) -> Tensor:
    dtype = next(model.parameters()).dtype
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).to(dtype)


def train_a_little(model: nn.Module) -> None:
    """Move means, spreads and buffers away from what a conversion gives."""
    model.train()
    model(inputs(model))
    with torch.no_grad():
        for site in sites(model):
            site.mean.add_(torch.randn_like(site.mean) * 0.1)
            site.raw.add_(torch.randn_like(site.raw) * 0.5)
    model.eval()


def answers(model: nn.Module) -> dict[str, Tensor]:
    """What must be the same after loading: outputs at the means and of a draw, sigma, prior."""
    found = dict(bayesify.stddev(model))
    with torch.no_grad():
        found["at the means"] = model(inputs(model))
        with bayesify.one_draw(model, seed=3):
            found["a draw"] = model(inputs(model))
    for site in sites(model):
        if isinstance(site.slot.prior, GaussianPrior):
            mean, var = gaussian_prior(site)
            found[f"prior mean of {site.name}"] = torch.as_tensor(mean)
            found[f"prior variance of {site.name}"] = torch.as_tensor(var)
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    different = [k for k, v in expected.items() if not torch.equal(found[k], v)]
    assert different == []


def saved(tmp_path: Path, build: Callable[[], nn.Module] = convnet, **arguments: Any) -> Path:
    path = tmp_path / "a.bbb.safetensors"
    save(bayesify.to_bbb(build(), **arguments), path)
    return path


@pytest.mark.filterwarnings("ignore:Sigma is below the spacing")
@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_comes_back(tmp_path: Path, case: str) -> None:
    build, arguments = CASES[case]
    model = bayesify.to_bbb(build(), **arguments)
    train_a_little(model)
    path = tmp_path / "a.bbb.safetensors"
    save(model, path)

    fresh = build().eval()
    back = load(path, model=fresh)

    assert back is fresh
    assert list(back.state_dict()) == list(model.state_dict())
    assert_same(answers(back), answers(model))
    assert_same(
        bayesify.to_deterministic(back).state_dict(), bayesify.to_deterministic(model).state_dict()
    )
    assert [str(s.slot.prior) for s in sites(back)] == [str(s.slot.prior) for s in sites(model)]

    # into a model that is converted already, and has other values
    other = bayesify.to_bbb(build(), **arguments).eval()
    assert_same(answers(load(path, model=other)), answers(model))

    again = tmp_path / "b.bbb.safetensors"
    save(back, again)
    assert again.read_bytes() == path.read_bytes()


def test_a_loaded_model_is_trained_on_as_the_saved_one(tmp_path: Path) -> None:
    model = bayesify.to_bbb(Tied(), prior=GaussianPrior(0.3, mean="initial"))
    path = tmp_path / "a.bbb.safetensors"
    save(model, path)
    back = load(path, model=Tied()).train()
    for m in (model, back):
        torch.manual_seed(5)
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            m(inputs(m)).square().mean().backward()
            optimizer.step()
    assert_same(dict(back.state_dict()), dict(model.state_dict()))
    head = back.get_submodule("head")
    assert head.weight is back.get_submodule("embed").weight
    assert head.weight_logvar is back.get_submodule("embed").weight_logvar


def test_parts_converted_one_by_one(tmp_path: Path) -> None:
    def build() -> Any:
        return nn.ModuleDict({"online": convnet(), "target": convnet(), "head": nn.Linear(4, 2)})

    model = build()
    bayesify.to_bbb_(model["online"], skip="re:bias$", prior=GaussianPrior(2.0))
    softplus = BBBConfig(parameterization="softplus", strict=True)
    bayesify.to_bbb_(model["head"], config=softplus, initial_std=math.exp(-1.5))
    path = tmp_path / "a.bbb.safetensors"
    save(model, path)

    back: Any = load(path, model=build())

    assert list(back.state_dict()) == list(model.state_dict())
    assert_same(bayesify.draws(back["online"], 1), bayesify.draws(model["online"], 1))
    # noise is keyed by the name at conversion, "weight", and not by "head.weight"
    assert_same(bayesify.draws(back["head"], 1), bayesify.draws(model["head"], 1))
    states: list[Any] = [m.__dict__.get("_bayesify") for m in (back, back["target"], back["head"])]
    assert [s is None for s in states] == [True, True, False]
    assert states[2].strict
    assert states[2].spec.initial_std == math.exp(-1.5)


def test_a_part_of_a_converted_model_keeps_its_draws(tmp_path: Path) -> None:
    part: Any = bayesify.to_bbb(nn.Sequential(convnet(), nn.ReLU())).get_submodule("0")
    save(part, tmp_path / "a")
    back = load(tmp_path / "a", model=convnet())
    # keyed by "0.1.weight", its name in the whole
    assert_same(bayesify.draws(back, seed=1), bayesify.draws(part, seed=1))


class Caching(nn.Linear):
    """In evaluation mode it keeps a function of its weight, as timm's levit does."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x @ (2 * self.weight).t()
        if "twice" not in self.kept:
            self.kept["twice"] = 2 * self.weight
        return x @ self.kept["twice"].t()


def test_caches_of_the_old_weights_are_dropped(tmp_path: Path) -> None:
    model = bayesify.to_bbb(Caching()).eval()
    save(model, tmp_path / "a")
    for given in (Caching().eval(), bayesify.to_bbb(Caching()).eval()):
        given(inputs(given))
        assert_same(answers(load(tmp_path / "a", model=given)), answers(model))


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    path = saved(tmp_path)
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_layers_added_after_loading_are_converted_alike(tmp_path: Path) -> None:
    model: Any = bayesify.to_bbb(
        convnet(), skip=[nn.BatchNorm2d, "*.bias"], initial_std=math.exp(-2.5)
    )
    path = tmp_path / "a.bbb.safetensors"
    save(model, path)
    back: Any = load(path, model=convnet())
    for m in (model, back):
        m[4] = nn.Linear(12, 7)
        extend_(m)  # as reset_classifier does
        assert [s.name for s in sites(m)] == ["1.weight", "4.weight"]
        assert float(m[4].weight_logvar.detach().max()) == pytest.approx(-5.0)


ENDLESS = r"re:(([a-z.0-9]+)+)+!"
"""It takes years to find out that a parameter's name does not match."""


def refuse_endless(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = re.compile

    def look(pattern: Any, *flags: Any) -> Any:
        assert ENDLESS[3:] not in str(pattern), "a regular expression of a file is run"
        return compile_(pattern, *flags)

    monkeypatch.setattr(re, "compile", look)


@pytest.mark.parametrize("given", [True, False])
def test_regular_expressions_of_a_file_are_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    """They stand for what they had chosen; new parameters are named, not matched."""
    refuse_endless(monkeypatch)
    estimator: Any = {"re:^4": "local", "*": "flipout"}
    model: Any = bayesify.to_bbb(convnet(), skip=["re:bias$", "BatchNorm2d"], estimator=estimator)
    save(model, tmp_path / "a")

    def make_endless(header: Any, _: Any) -> None:
        arguments = header["conversions"][0]["arguments"]
        arguments["skip"][0] = arguments["estimators"][0][0] = ENDLESS

    path = rewritten(tmp_path / "a", make_endless)
    describe(read_header(path))
    back: Any = load(path, convnet() if given else bayesify.to_bbb(convnet(), skip=ENDLESS_SKIP))
    assert [s.name for s in sites(back)] == ["1.weight", "4.weight"]
    check_optimizer(back, torch.optim.SGD(param_groups(back, lr=0.1)))
    reasons = {reason: tensors for reason, tensors, _ in left_out(back)}
    assert reasons == {"skipped: BatchNorm2d": 2, f"skipped: {ENDLESS}": 2}
    back[4] = nn.Linear(12, 7)
    extend_(copy.deepcopy(back))
    extend_(back)
    assert [(s.name, s.slot.estimator) for s in sites(back)] == [
        ("1.weight", "flipout"), ("4.weight", "local")
    ]  # fmt: skip
    back.append(nn.Linear(7, 2))
    with pytest.warns(NoMatchWarning, match=r"not choose among 2 new ones: 5.weight, 5.bias\."):
        extend_(back)
    save(back, tmp_path / "b")
    assert read_header(tmp_path / "b")["conversions"][0]["arguments"]["skip"][0] == ENDLESS


ENDLESS_SKIP = ["*bias", "BatchNorm2d"]


def test_only_by_a_regular_expression_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bayesify.to_bbb(convnet(), only=["re:^4"])
    save(model, tmp_path / "a")
    path = rewritten(
        tmp_path / "a", lambda h, _: h["conversions"][0]["arguments"].update(only=[ENDLESS])
    )
    refuse_endless(monkeypatch)
    back: Any = load(path, convnet())
    back[4], back[1] = nn.Linear(12, 7), nn.Conv2d(2, 3, 1)
    assert [s.name for s in sites(extend_(back))] == ["4.weight", "4.bias"]


@pytest.mark.parametrize(
    "spec",
    [
        ModelSpec("test_resnet", num_classes=4, img_size=32),
        ModelSpec("test_vit", num_classes=3, in_chans=1),
        ModelSpec("torchvision:squeezenet1_1", num_classes=3),
    ],
    ids=lambda spec: str(spec.name),
)
def test_models_are_built_by_name(tmp_path: Path, spec: ModelSpec) -> None:
    model = bayesify.to_bbb(spec.build(), skip="LayerNorm" if "vit" in spec.name else ()).eval()
    path = tmp_path / "a.bbb.safetensors"
    save(model, path, spec=spec)
    torch.manual_seed(8)
    expected = torch.rand(3)
    torch.manual_seed(8)
    back = load(path)
    assert torch.equal(torch.rand(3), expected)  # the global generator was not touched

    assert type(back) is not type(model) or type(back).__name__ == type(model).__name__
    assert not back.training
    channels = spec.in_chans or 3
    size = {"test_resnet": 32, "test_vit": 160}.get(spec.name, 64)
    x = torch.randn(2, channels, size, size)
    with torch.no_grad():
        assert torch.equal(back(x), model(x))
        with bayesify.one_draw(back, 1), bayesify.one_draw(model, 1):
            assert torch.equal(back(x), model(x))
    shown = read_header(path)["input"]
    assert shown["size"] == {"test_resnet": [3, 32, 32], "test_vit": [1, 160, 160]}.get(
        spec.name, [3, 224, 224]
    )
    again = tmp_path / "b.bbb.safetensors"
    save(back, again)  # the model has brought its spec
    assert again.read_bytes() == path.read_bytes()


def test_a_new_classifier_is_stored(tmp_path: Path) -> None:
    spec = ModelSpec("test_resnet")
    model: Any = bayesify.to_bbb(spec.build())
    model.reset_classifier(7)
    save(model, tmp_path / "a", spec=spec)
    assert_same(dict(load(tmp_path / "a").state_dict()), dict(model.state_dict()))


def test_a_half_model_is_built_half(tmp_path: Path) -> None:
    spec = ModelSpec("test_vit", num_classes=3)
    model = bayesify.to_bbb(spec.build()).bfloat16()
    path = tmp_path / "a.bbb.safetensors"
    save(model, path, spec=spec)
    back = load(path)
    assert_same(dict(back.state_dict()), dict(model.state_dict()))
    assert {p.dtype for n, p in back.named_parameters() if n.endswith("_logvar")} == {torch.float32}


def test_the_same_in_a_new_process(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = bayesify.to_bbb(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    train_a_little(model)
    path = tmp_path / "a.bbb.safetensors"
    save(model, path)
    save_file({k: v.contiguous() for k, v in answers(model).items()}, tmp_path / "expected")
    code = f"""
import torch, bayesify
from torch import nn
from bayesify.storage import load, save
from safetensors.torch import load_file
model = load({str(path)!r}, model=nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval())
x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
expected = load_file({str(tmp_path / "expected")!r})
with torch.no_grad():
    assert torch.equal(model(x), expected["at the means"])
    with bayesify.one_draw(model, seed=3):
        assert torch.equal(model(x), expected["a draw"])
save(model, {str(tmp_path / "again")!r})
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_layout_of_the_file(tmp_path: Path) -> None:
    model = bayesify.to_bbb(Tied(), skip="*.bias", prior=GaussianPrior(mean="initial"))
    path = tmp_path / "a.bbb.safetensors"
    save(model, path, info={"note": ["x", 1]})

    # read by hand: 8 bytes of length, then the JSON of safetensors
    data = path.read_bytes()
    outer = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    assert list(outer["__metadata__"]) == ["bayesify"]
    text = outer["__metadata__"]["bayesify"]
    header = json.loads(text)
    assert json.dumps(header, sort_keys=True) == text

    assert read_header(path) == header
    assert header["format"] == 2
    assert header["model"]["spec"] is None
    assert header["model"]["class"].endswith(".Tied")
    assert header["elements"] == {"total": 77, "bayesian": 66}
    assert header["info"] == {"note": ["x", 1]}
    assert header["versions"]["torch"] == torch.__version__.partition("+")[0]
    [row] = header["posterior"]
    assert (row["name"], row["aliases"], row["slot"]) == (
        "embed.weight",
        ["head.weight"],
        "embed.weight",
    )
    assert header["aliases"] == {
        "head.weight": "embed.weight",
        "head.weight_logvar": "embed.weight_logvar",
    }
    arrays = load_numpy(path)
    assert sorted(arrays) == [
        "embed.weight", "embed.weight_logvar", "embed.weight_prior_mean", "head.bias",
    ]  # fmt: skip
    assert (arrays["embed.weight"] == model.get_parameter("embed.weight").detach().numpy()).all()


def test_stats_of_a_file_are_those_of_the_model(tmp_path: Path) -> None:
    model = bayesify.to_bbb(convnet(), config=BBBConfig(parameterization="softplus"))
    train_a_little(model)
    path = tmp_path / "a.bbb.safetensors"
    save(model, path)
    assert read_stats(path) == bayesify.posterior_stats(model)


def test_views_and_strides(tmp_path: Path) -> None:
    def build() -> Any:
        model = nn.Linear(4, 3)
        model.weight = nn.Parameter(torch.randn(4, 3).t())  # not contiguous
        both = torch.randn(6)
        model.register_buffer("first", both[:4])
        model.register_buffer("second", both[2:])  # overlaps the first
        model.register_buffer("none", torch.zeros(0, 4))
        return model

    model = bayesify.to_bbb(build())
    path = tmp_path / "a.bbb.safetensors"
    save(model, path)
    assert_same(dict(load(path, model=build()).state_dict()), dict(model.state_dict()))
    assert path.stat().st_size < 4000


def test_a_compiled_model_is_saved_as_itself(tmp_path: Path) -> None:
    model = bayesify.to_bbb(convnet())
    save(model, tmp_path / "a")
    compiled: Any = torch.compile(model)
    save(compiled, tmp_path / "b")
    save(nn.DataParallel(model), tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()
    with pytest.raises(CheckpointError, match="give the model inside it"):
        load(tmp_path / "a", model=compiled)


# -- what cannot be saved --------------------------------------------------------------------


def test_targets_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bayesify.to_bbb(nn.Linear(2, 1))
    path = tmp_path / "a.safetensors"
    save(model, path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="exists"):
        save(model, path)
    with pytest.raises(CheckpointError, match="is a folder"):
        save(model, tmp_path)
    with pytest.raises(CheckpointError, match="no folder"):
        save(model, tmp_path / "missing" / "a")
    with pytest.raises(CheckpointError, match="no folder"):
        save(model, path / "a")  # a file in the place of a folder
    with torch.no_grad():
        model.get_parameter("bias").add_(1)
    save(model, path, overwrite=True)
    assert path.read_bytes() != before
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(CheckpointError, match="not writable"):
        save(model, tmp_path / "b")
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bayesify.to_bbb(nn.Linear(2, 1))
    path = tmp_path / "a.safetensors"
    save(model, path)
    before = path.read_bytes()

    def full(_: Any, file: Path, **__: Any) -> None:
        file.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.writing, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save(model, path, overwrite=True)
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert path.read_bytes() == before

    with pytest.raises(KeyboardInterrupt), replacing(path, overwrite=True) as temporary:  # noqa: PT012
        temporary.write_bytes(b"half of it")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert path.read_bytes() == before


def test_a_link_keeps_pointing_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "a")
    save(bayesify.to_bbb(nn.Linear(2, 1)), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert is_bayesian(load(tmp_path / "folder" / "a", model=nn.Linear(2, 1)))


class WithExtra(nn.Linear):
    extra: Any = None

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_extra_state_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a"
    plain = {"steps": 3, "rate": 0.1, "names": ["a", 'b"\n'], "on": True, "none": None, "in": {}}
    model = bayesify.to_bbb(nn.Sequential(WithExtra(2, 1)))
    inner: Any = model.get_submodule("0")
    inner.extra = plain
    save(model, path)
    back: Any = load(path, model=nn.Sequential(WithExtra(2, 1)))
    assert back[0].extra == plain
    assert back[0].extra is not plain
    assert torch.equal(back[0].weight, inner.weight)
    with pytest.raises(CheckpointError, match=r"1 missing from the model: 0\._extra_state"):
        load(path, model=nn.Sequential(nn.Linear(2, 1)))
    save(bayesify.to_bbb(nn.Sequential(nn.Linear(2, 1))), path, overwrite=True)
    with pytest.raises(CheckpointError, match=r"1 missing from the file: 0\._extra_state"):
        load(path, model=nn.Sequential(WithExtra(2, 1)))


@pytest.mark.parametrize(
    "value", [(1, 2), {1: 2}, float("nan"), b"pickled", {"a": [object()]}, np.float64(1.0)]
)
def test_extra_state_that_json_would_change_is_refused(tmp_path: Path, value: Any) -> None:
    model = bayesify.to_bbb(WithExtra(2, 1))
    model.extra = value
    with pytest.raises(CheckpointError, match=r"'_extra_state' of the state dict, a .*no.* pickle"):
        save(model, tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_models_that_cannot_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(UnsupportedModuleError, match="no Bayesian parameter"):
        save(nn.Linear(2, 1), path)
    live = bayesify.to_bbb(nn.Linear(2, 1), prior=LivePrior(lambda name: (0.0, 1.0)))
    with pytest.raises(CheckpointError, match=r"prior of 'weight' is live.*set_prior_"):
        save(live, path)
    with pytest.raises(CheckpointError, match="no dense tensor"):
        save(bayesify.to_bbb(nn.Linear(2, 1, device="meta")), path)
    with pytest.raises(ArgumentError, match="info"):
        save(bayesify.to_bbb(nn.Linear(2, 1)), path, info={"a": object()})
    odd = bayesify.to_bbb(nn.Linear(2, 1))
    odd.register_buffer("odd", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(CheckpointError, match="complex128"):
        save(odd, path)
    twice = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    twice[1].weight = twice[0].weight
    bayesify.to_bbb_(twice[0])
    bayesify.to_bbb_(twice[1])
    with pytest.raises(UnsupportedModuleError, match=r"'0\.weight' and '1\.weight' are one tied"):
        save(twice, path)
    assert os.listdir(tmp_path) == []

    bayesify.set_prior_(live, GaussianPrior(0.7))
    save(live, path)
    assert [s.slot.prior for s in sites(load(path, model=nn.Linear(2, 1)))] == [
        GaussianPrior(0.7)
    ] * 2


# -- what cannot be loaded -------------------------------------------------------------------


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Path:
    """A copy of a file with another header or other tensors."""
    header, tensors = read_header(path), load_file(path)
    change(header, tensors)
    target = path.with_name("changed")
    save_file(tensors, target, metadata={"bayesify": json.dumps(header)})
    return target


def test_files_that_are_none(tmp_path: Path) -> None:
    path = saved(tmp_path)
    data = path.read_bytes()
    bad = tmp_path / "bad"
    for content in (b"", b"not a safetensors file", data[: len(data) // 2], data[:-1], data[9:]):
        bad.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"bad is no readable safetensors file"):
            load(bad, model=convnet())
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="is a folder"):
        load(tmp_path)
    torch.save(convnet().state_dict(), bad)
    with pytest.raises(CheckpointError, match="no readable safetensors file"):
        read_header(bad)
    save_file(convnet().state_dict(), bad)
    with pytest.raises(CheckpointError, match=r"deterministic checkpoint.*--weights"):
        load(bad, model=convnet())


@pytest.mark.parametrize(
    "change",
    [
        lambda h, t: h.update(format="1"),
        lambda h, t: h.pop("format"),
        lambda h, t: h.pop("posterior"),
        lambda h, t: h.update(model=None),
        lambda h, t: h["posterior"][0].update(prior={"kind": "os.system"}),
        lambda h, t: h["posterior"][0].update(parameterization="cubic"),
        lambda h, t: h["aliases"].update(x="nowhere"),
        lambda h, t: t.pop("4.weight_logvar"),
        lambda h, t: t.update({"4.weight_logvar": torch.zeros(1)}),
    ],
    ids=lambda f: str(f.__code__.co_firstlineno),
)
def test_damaged_headers(tmp_path: Path, change: Any) -> None:
    path = rewritten(saved(tmp_path), change)
    with pytest.raises(CheckpointError, match="is damaged"):
        load(path, model=convnet())


def test_a_newer_format(tmp_path: Path) -> None:
    path = rewritten(saved(tmp_path), lambda h, t: h.update(format=3))
    with pytest.raises(CheckpointError, match=r"format 3.*up to 2.*update bayesify"):
        load(path, model=convnet())


def test_a_file_does_not_choose_code(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.raises(CheckpointError, match=r"does not say how to build.*model="):
        load(path)
    path = rewritten(path, lambda h, t: h["model"].update(spec={"name": "os:getcwd"}))
    with pytest.raises(CheckpointError, match=r"os:getcwd.*model="):
        load(path)


def wider() -> Any:
    model = convnet()
    model[4] = nn.Linear(12, 7)
    return model


def deeper() -> Any:
    return nn.Sequential(*convnet().children(), nn.Linear(3, 3))


def untied() -> Any:
    model = Tied()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    return model


def frozen_as_buffer() -> Any:
    model = convnet()
    weight = model[4].weight.detach()
    del model[4].weight
    model[4].register_buffer("weight", weight)
    return model


def with_buffer(buffer: Tensor) -> nn.Module:
    model = nn.Linear(2, 1)
    model.register_buffer("extra", buffer)
    return model


def broken() -> Any:
    model = convnet()
    with torch.no_grad():
        model[1].weight.fill_(torch.nan)
    return model


@pytest.mark.parametrize(
    ("build", "other", "message"),
    [
        (convnet, wider, r"2 of another shape: 4.bias \(file \(3,\), model \(7,\)\), 4.weight"),
        (convnet, deeper, "2 missing from the file: 5.weight, 5.bias"),
        (deeper, convnet, r"2 missing from the model: 5\.\w+, 5\.\w+\."),
        (convnet, lambda: nn.Linear(4, 4), "missing from the model: .*, ..."),
        (convnet, lambda: convnet().half(), r"of another dtype: .*file torch.float32"),
        (Tied, untied, r"1 tied to others: embed.weight \(file \['embed.weight', 'head.weight'\]"),
        (convnet, frozen_as_buffer, "1 not parameters: 4.weight"),
        (convnet, lambda: convnet().to("meta"), "without data"),
        (
            lambda: with_buffer(torch.zeros(4)),
            lambda: with_buffer(torch.zeros(1).expand(4)),
            "expanded",
        ),
        (convnet, broken, "1.weight holds NaN"),
        (convnet, lambda: bayesify.to_bbb(convnet(), skip="1"), "2 Bayesian in the file only"),
        (
            convnet,
            lambda: bayesify.to_bbb(convnet(), config=BBBConfig(parameterization="softplus")),
            "Bayesian in the model only",
        ),
    ],
    ids=range(12),
)
def test_a_model_that_does_not_fit_is_left_as_it_was(
    tmp_path: Path,
    build: Callable[[], nn.Module],
    other: Callable[[], nn.Module],
    message: str,
) -> None:
    path = saved(tmp_path, build)
    model = other()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    types = [type(m) for m in model.modules()]
    untouched = copy.deepcopy(model)
    with pytest.raises(CheckpointError, match=message):
        load(path, model=model)
    after = model.state_dict()
    assert list(after) == list(before)
    if next(model.parameters()).device.type != "meta":
        assert all(torch.equal(after[k].nan_to_num(), v.nan_to_num()) for k, v in before.items())
    assert [type(m) for m in model.modules()] == types
    assert [sorted(m.__dict__) for m in model.modules()] == [
        sorted(m.__dict__) for m in untouched.modules()
    ]


def test_a_second_part_that_cannot_be_converted_undoes_the_first(tmp_path: Path) -> None:
    def build() -> Any:
        return nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    model = build()
    for part in model:
        bayesify.to_bbb_(part)
    path = tmp_path / "a"
    save(model, path)
    given = build()
    given[1].weight_logvar = 3.0
    with pytest.raises(CheckpointError, match="exists already"):
        load(path, model=given)
    assert not is_bayesian(given)
    assert [type(m) for m in given] == [nn.Linear, nn.Linear]


def test_no_module_is_refused(tmp_path: Path) -> None:
    name: Any = "resnet50"
    with pytest.raises(ArgumentError, match=r"must be a torch.nn.Module, not 'resnet50'"):
        load(saved(tmp_path), model=name)


# -- a load that fails leaves the model as it was --------------------------------------------


def seen(model: nn.Module) -> list[Any]:
    """All that there is to see of a model: by identity where it must be the same, and values."""
    found: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        found.append((name, type(module)))
        for key, value in module.__dict__.items():
            inside = list(value.items()) if isinstance(value, dict) else value
            if isinstance(value, set):
                inside = sorted(value)
            if isinstance(inside, list):
                found.append(
                    (
                        key,
                        [(k, id(v)) if isinstance(v, object) else k for k, v in inside]
                        if isinstance(value, dict)
                        else inside,
                    )
                )
            elif key != "_bayesify":
                found.append((key, id(value)))
        state = module.__dict__.get("_bayesify")
        for attribute, slot in state.slots.items() if state is not None else ():
            found.append((attribute, type(slot), *slot.settings, state.spec, state.strict))
    for tensor in (*model.parameters(), *model.buffers()):
        found.append((id(tensor), tensor.requires_grad, tensor.detach().clone().tolist()))
    return found


def refuse(*_: Any, **__: Any) -> None:
    raise RuntimeError("refused by a hook")


def with_pre_hook(model: Any) -> Any:
    model[4].register_load_state_dict_pre_hook(refuse)
    return model


def with_post_hook(model: Any) -> Any:
    model.register_load_state_dict_post_hook(refuse)
    return model


class Stubborn(nn.Linear):
    def _load_from_state_dict(self, *_: Any) -> None:
        raise KeyError("weight")


def with_stubborn(model: Any) -> Any:
    model[4].__class__ = Stubborn
    return model


def with_name_taken(model: Any) -> Any:
    model[4].weight_logvar = 3.0
    return model


def with_hooks(model: Any) -> Any:
    model[1].register_forward_hook(lambda m, args, out: None)
    model[4].register_forward_pre_hook(lambda m, args: None)
    model[4].forward = functools.partial(nn.Linear.forward, model[4])
    return with_post_hook(model)


def with_frozen(model: Any) -> Any:
    model[1].weight.requires_grad_(False)
    return with_pre_hook(model)


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize(
    "spoil", [with_pre_hook, with_post_hook, with_stubborn, with_hooks, with_frozen]
)
@pytest.mark.parametrize(
    "prior", [GaussianPrior(), GaussianPrior(0.3, mean="initial", relative=True)]
)
def test_a_load_that_fails_leaves_the_model_as_it_was(
    tmp_path: Path, spoil: Any, converted: bool, prior: GaussianPrior
) -> None:
    source = bayesify.prune_(bayesify.to_bbb(convnet(), prior=prior, estimator="flipout"), 0.5)
    save(source, tmp_path / "a", info={"classes": ["a", "b", "c"]})
    model = spoil(convnet())
    if converted:
        bayesify.to_bbb_(model, config=BBBConfig(include_frozen=True))
        model(torch.randn(5, 4))
    before = seen(model)
    with pytest.raises(CheckpointError, match="cannot be loaded into this Sequential"):
        load(tmp_path / "a", model=model)
    assert seen(model) == before
    assert is_bayesian(model) == converted
    assert bayesify.classes.classes_of(model) is None
    model(torch.randn(5, 4)).sum().backward()


@pytest.mark.parametrize(
    "step", ["_convert", "_restore", "keep_pruned_", "name_classes_", "attach_prior"]
)
def test_a_load_that_is_interrupted_leaves_the_model_as_it_was(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path)
    real = getattr(storage.reading, step)

    def stop(*arguments: Any) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(storage.reading, step, stop)
    model = convnet()
    before = seen(model)
    with pytest.raises(KeyboardInterrupt):
        load(path, model=model)
    assert seen(model) == before


def renamed_root(h: Any, t: Any) -> None:
    h["conversions"][0]["root"] = "nowhere"


def row_of_nothing(h: Any, t: Any) -> None:
    for old, new in (("4.bias", "4.offset"), ("4.bias_logvar", "4.offset_logvar")):
        t[new] = t.pop(old)
    h["posterior"][-1]["name"] = "4.offset"


def mean_of_halves(h: Any, t: Any) -> None:
    t["4.weight"] = t["4.weight"].half()


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("change", [renamed_root, row_of_nothing, mean_of_halves])
def test_a_file_that_does_not_fit_changes_nothing(
    tmp_path: Path, change: Any, converted: bool
) -> None:
    path = rewritten(saved(tmp_path), change)
    model = bayesify.to_bbb(convnet()) if converted else convnet()
    before = seen(model)
    with pytest.raises(CheckpointError):
        load(path, model=model)
    assert seen(model) == before


def test_no_such_device_changes_nothing(tmp_path: Path) -> None:
    model = convnet()
    before = seen(model)
    with pytest.raises(ArgumentError, match="device 'cuda:77'"):
        load(saved(tmp_path), model=model, device="cuda:77")
    assert seen(model) == before


# -- headers that contradict themselves ------------------------------------------------------


def deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["posterior"].append(h["posterior"][0]), "'1.weight' stands there twice"),
        (lambda h: h["posterior"][0].update(aliases=["4.weight"]), "'4.weight' stands there twice"),
        (lambda h: h.update(conversions=[]), "'1.weight' is below no conversion"),
        (lambda h: h["conversions"].append(h["conversions"][0]), "is converted twice"),
        (
            lambda h: h["conversions"].append({**h["conversions"][0], "root": "1"}),
            "'1' is converted twice",
        ),
        (lambda h: h.update(info=deep(100)), "deeper than 64"),
        (lambda h: h["info"].update(a=deep(100)), "deeper than 64"),
        (lambda h: h.update(info=[]), "info is"),
        (lambda h: h.update(elements={"total": 0, "bayesian": 0}), "elements is"),
        (lambda h: h.update(elements={"total": 3, "bayesian": 9}), "elements is"),
        (lambda h: h.update(format=True), "its format is True"),
        (lambda h: h.update(format=0), "its format is 0"),
        (lambda h: h["model"].update(spec=[1]), "TypeError"),
        (lambda h: h["model"].update(spec={}), "KeyError: 'name'"),
        (lambda h: h.update(input={"size": [3, 1 << 20, 1 << 20]}), "TypeError"),
        (lambda h: h.update(versions={"torch": 2}), "2 is no text"),
        (lambda h: h["posterior"][0].update(name=3), "3 is no text"),
        (lambda h: h["posterior"][0].update(prior_scale=1e300), "prior_scale must be"),
        (lambda h: h["posterior"][0].update(prior_scale=float("nan")), "prior_scale must be"),
        (lambda h: h["posterior"][0]["prior"].update(std=1e200), "std must be"),
        (lambda h: h["posterior"][0]["prior"].update(relative="no"), "relative must be"),
        (lambda h: h["posterior"][0]["prior"].update(kind=[]), "TypeError"),
        (lambda h: h["conversions"][0]["arguments"].update(skip="re:("), "is no list"),
        (lambda h: h["conversions"][0]["arguments"].update(skip=["*" * 1001]), "1,000 char"),
        (lambda h: h["conversions"][0]["arguments"].update(only=["*", "a["] * 501), "1,000 patt"),
        (lambda h: h["conversions"][0]["arguments"].update(initial_std=1e40), "initial_std must"),
        (lambda h: h["conversions"][0]["arguments"]["config"].update(strict="no"), "strict must"),
    ],
    ids=range(27),
)
def test_headers_that_contradict_themselves(tmp_path: Path, change: Any, message: str) -> None:
    path = rewritten(saved(tmp_path), lambda h, t: change(h))
    model = convnet()
    before = seen(model)
    for read in (read_header, read_stats, lambda p: load(p, model=model)):
        with pytest.raises(CheckpointError, match=f"is damaged .*{message}"):
            read(path)
    assert seen(model) == before


def test_json_too_deep_or_too_long_for_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    for text in ("[" * 200_000 + "]" * 200_000, '{"a":' * 200_000 + "1" + "}" * 200_000):
        save_file({"x": torch.zeros(1)}, path, metadata={"bayesify": text})
        with pytest.raises(CheckpointError, match="too deep"):
            read_header(path)
    monkeypatch.setattr(storage.json_text, "MAX_CHARACTERS", 100)
    with pytest.raises(CheckpointError, match="characters of JSON, more than 100"):
        read_header(saved(tmp_path))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.int64])
@pytest.mark.parametrize("key", ["4.weight_logvar", "4.weight_prior_mean"])
def test_spreads_of_another_kind(tmp_path: Path, key: str, dtype: torch.dtype) -> None:
    path = saved(tmp_path, prior=GaussianPrior(mean="initial"))
    try:
        path = rewritten(path, lambda h, t: t.update({key: t[key].to(dtype)}))
    except KeyError:
        pytest.skip(f"this safetensors writes no {dtype}, as 0.4.5 no complex numbers")
    with pytest.raises(CheckpointError, match=f"{key} is of {dtype}"):
        load(path, model=convnet())


# -- a file is compared before memory is taken -----------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"num_classes": 2_000_000},
        {"in_chans": 100_000},
        {"model_args": {"channels": [100_000, 24, 32, 48]}},
        {"model_args": {"layers": [1, 1, 1, 1_000_000]}},
        {"name": "resnet152"},
    ],
    ids=str,
)
def test_what_a_file_names_is_compared_before_it_is_built(
    tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    save(bayesify.to_bbb(ModelSpec("test_resnet", num_classes=4).build()), path)
    path = rewritten(path, lambda h, t: h["model"]["spec"].update(changes))
    built: list[str] = []
    real = ModelSpec.build

    def build(spec: ModelSpec, **options: Any) -> nn.Module:
        model = real(spec, **options)
        built.append(next(model.parameters()).device.type)
        return model

    monkeypatch.setattr(ModelSpec, "build", build)
    with pytest.raises(CheckpointError, match=r"does not fit|cannot be built.*more modules"):
        load(path)
    assert set(built) <= {"meta"}


def test_a_model_that_cannot_be_without_data_is_bounded(tmp_path: Path) -> None:
    """torchvision's RegNet computes with numbers while it is built: it has no meta build."""
    path = tmp_path / "a"
    spec = ModelSpec("torchvision:regnet_y_400mf", num_classes=2)
    model = bayesify.to_bbb(spec.build()).eval()
    save(model, path)
    assert_same(dict(load(path).state_dict()), dict(model.state_dict()))
    path = rewritten(path, lambda h, t: h["model"]["spec"].update(num_classes=2_000_000))
    with pytest.raises(CheckpointError, match="more elements than the tensors in the file"):
        load(path)


FORMAT_1 = Path(__file__).parents[1] / "files" / "format1"


@pytest.mark.parametrize(
    ("name", "bayesian", "std"),
    [
        # to_bbb(m, logvar=-4.0, skip="re:bias$", estimator={"0": "flipout"})
        ("logvar", {"0.weight", "1.weight"}, math.exp(-2.0)),
        # to_bbb(m, skip=nn.LayerNorm, config=BBBConfig(relative_std=0.25))
        ("relative_std", {"0.weight", "0.bias"}, bayesify.RelativeStd(0.25)),
    ],
)
@pytest.mark.filterwarnings("ignore::bayesify.NoMatchWarning")  # of the regular expression
def test_files_with_the_two_settings_of_before(name: str, bayesian: set[str], std: Any) -> None:
    """Of format 1, in which logvar and BBBConfig.relative_std were two settings."""

    def expected(mean: Tensor) -> float:
        rms = mean.detach().double().square().mean().sqrt().item()
        return std.fraction * rms if isinstance(std, bayesify.RelativeStd) else std

    model: Any = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    load(FORMAT_1 / f"{name}.safetensors", model)
    found = {p.name: p for p in bayesify.posteriors(model)}
    assert set(found) == bayesian
    for p in found.values():
        assert p.logvar.exp().sqrt().mean().item() == pytest.approx(expected(p.mean), rel=1e-5)
    assert model.__dict__["_bayesify"].spec.initial_std == std
    model.append(nn.Linear(3, 50))
    bayesify.extend_(model)
    added = bayesify.stddev(model)["2.weight"].mean().item()
    assert added == pytest.approx(expected(model[2].weight), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(skip=[{"function": "f()"}]), "names"),
        (lambda a: a.update(skip=[{"function": 3, "names": []}]), "3 is no text"),
        (lambda a: a.update(skip=[{"function": "f()", "names": [3]}]), "3 is no text"),
        (lambda a: a.update(only=[{"function": "f" * 1001, "names": []}]), "1,000 char"),
        (lambda a: a.update(initial_std="0.1"), "initial_std must be"),
        (lambda a: a.update(initial_std={"rms": -1.0}), "fraction must be"),
        (lambda a: a.update(initial_std={}), "KeyError"),
        (lambda a: (a.pop("initial_std"), a.update(logvar=81.0)), "logvar must be"),
        (lambda a: a.pop("initial_std"), "KeyError: 'logvar'"),
    ],
    ids=range(9),
)
def test_damaged_settings_of_a_conversion(tmp_path: Path, change: Any, message: str) -> None:
    path = rewritten(saved(tmp_path), lambda h, t: change(h["conversions"][0]["arguments"]))
    with pytest.raises(CheckpointError, match=message):
        load(path, model=convnet())
