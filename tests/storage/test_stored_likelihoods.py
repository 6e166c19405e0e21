"""A likelihood in the file of its model, and beside it everywhere else."""

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import bayesify
from bayesify import CheckpointError
from bayesify.likelihoods import (
    Bernoulli,
    Categorical,
    FromDistribution,
    Gaussian,
    Heads,
    Likelihood,
)
from bayesify.storage import describe, read_header


def converted(outputs: int = 3) -> nn.Module:
    return bayesify.to_bbb(nn.Linear(2, outputs))


def learned() -> Gaussian:
    found = Gaussian(outputs=3, location=torch.tensor([1.0, 2.0, 3.0]), scale=0.5, noise_scale=1.25)
    assert found.log_noise is not None
    with torch.no_grad():
        found.log_noise.copy_(torch.tensor([-0.3, 0.1, 2.0]))
    return found


def states(likelihood: Likelihood) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in likelihood.state_dict().items()}


KINDS: dict[str, Callable[[], Likelihood]] = {
    "learned": learned,
    "not yet learned": lambda: Gaussian(dim=1),
    "fixed": lambda: Gaussian(0.3),
    "predicted": lambda: Gaussian("predicted", dim=-1),
    "categorical": lambda: Categorical(
        1, ignore_index=7, weight=torch.tensor([1.0, 2.0]), label_smoothing=0.1, temperature=1.5
    ),
    "bernoulli": lambda: Bernoulli(dim=-1, pos_weight=2.0),
    "heads": lambda: Heads({"a": learned(), "b": Categorical(), "c": Heads({0: Bernoulli()})}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_brings_the_likelihood(tmp_path: Path, kind: str) -> None:
    model, path = bayesify.set_likelihood_(converted(), KINDS[kind]()), tmp_path / "a.safetensors"
    before = bayesify.likelihood_of(model)
    assert before is not None
    bayesify.save(model, path)
    with safe_open(path, "pt") as file:
        names = {name for name in file.keys() if name.startswith("__likelihood__.")}
    assert names == {"__likelihood__." + name for name in before.state_dict()}
    loaded = bayesify.load(path, nn.Linear(2, 3))
    found = bayesify.likelihood_of(loaded)
    assert repr(found) == repr(before)
    assert found is not None
    torch.testing.assert_close(states(found), states(before), rtol=0, atol=0)
    assert list(loaded.state_dict()) == list(converted().state_dict())
    bayesify.save(loaded, tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()
    assert "likelihood" in dict(describe(read_header(path)))


def test_what_a_file_says_of_its_likelihood(tmp_path: Path) -> None:
    model, path = bayesify.set_likelihood_(converted(), learned()), tmp_path / "a.safetensors"
    bayesify.save(model, path)
    header = read_header(path)
    assert header["likelihood"] == {
        "kind": "Gaussian", "args": {"noise": "learned", "dim": -1, "noise_scale": 1.25}
    }  # fmt: skip
    text = dict(describe(header))["likelihood"]
    assert text == "Gaussian(dim=-1, noise='learned', noise_scale=1.25)"


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> Path:
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["bayesify"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    change(header, tensors)
    save_file(tensors, path, {"bayesify": json.dumps(header, sort_keys=True)})
    return path


def test_files_of_before_and_files_without_a_likelihood_load(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    bayesify.save(converted(), path)
    assert read_header(path)["likelihood"] is None
    with_own = bayesify.set_likelihood_(nn.Linear(2, 3), Gaussian())
    assert bayesify.likelihood_of(bayesify.load(path, with_own)) is None
    rewritten(path, lambda header, _: header.pop("likelihood"))
    assert bayesify.likelihood_of(bayesify.load(path, nn.Linear(2, 3))) is None


def test_code_is_not_in_a_file_and_load_says_so(tmp_path: Path) -> None:
    own = FromDistribution(lambda f: torch.distributions.Poisson(f.exp()))
    path = tmp_path / "a.safetensors"
    bayesify.save(bayesify.set_likelihood_(converted(), own), path)
    assert read_header(path)["likelihood"] == {"kind": "FromDistribution", "args": None}
    with pytest.warns(UserWarning, match="had the likelihood FromDistribution, which is code"):
        loaded = bayesify.load(path, nn.Linear(2, 3))
    assert bayesify.likelihood_of(loaded) is None
    model = bayesify.set_likelihood_(nn.Linear(2, 3), own)
    assert bayesify.likelihood_of(bayesify.load(path, model)) is own

    both = Heads({"a": Gaussian(outputs=3), "b": own})
    bayesify.save(bayesify.set_likelihood_(converted(), both), path, overwrite=True)
    with pytest.warns(UserWarning, match="FromDistribution"):
        bayesify.load(path, nn.Linear(2, 3))


DAMAGE: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], object]] = {
    "another kind": lambda h, t: h["likelihood"].update(kind="Sequential"),
    "no kind": lambda h, t: h["likelihood"].pop("kind"),
    "a list": lambda h, t: h.update(likelihood=[1]),
    "another argument": lambda h, t: h["likelihood"]["args"].update(hook="os.system"),
    "no noise at all": lambda h, t: h["likelihood"]["args"].update(noise=0.0),
    "fixed noise that is learned": lambda h, t: h["likelihood"]["args"].update(noise=1.0),
    "NaN": lambda h, t: t.update({"__likelihood__.log_noise": torch.full((3,), torch.nan)}),
    "a table": lambda h, t: t.update({"__likelihood__.log_noise": torch.zeros(3, 1)}),
    "whole numbers": lambda h, t: t.update({"__likelihood__.scale": torch.ones(3).long()}),
    "a scale of 0": lambda h, t: t.update({"__likelihood__.scale": torch.zeros(3)}),
    "no scale": lambda h, t: t.pop("__likelihood__.scale"),
    "one too many": lambda h, t: t.update({"__likelihood__.weight": torch.ones(3)}),
    "tensors of none": lambda h, t: h.update(likelihood=None),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_likelihood_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.safetensors"
    bayesify.save(bayesify.set_likelihood_(converted(), learned()), path)
    rewritten(path, DAMAGE[damage])
    model = nn.Linear(2, 3)
    with pytest.raises(CheckpointError, match="is damaged"):
        bayesify.load(path, model)
    assert type(model) is nn.Linear
    assert bayesify.likelihood_of(model) is None


def test_copies_have_a_likelihood_of_their_own() -> None:
    model = bayesify.set_likelihood_(nn.Linear(2, 3), learned())
    model = bayesify.to_bbb(model)
    before = bayesify.likelihood_of(model)
    assert before is not None
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(model), bayesify.to_deterministic(model), pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):  # fmt: skip
        found = bayesify.likelihood_of(twin)
        assert found is not None
        assert found is not before
        torch.testing.assert_close(states(found), states(before), rtol=0, atol=0)
        assert isinstance(found, Gaussian)
        assert isinstance(before, Gaussian)
        assert found.log_noise is not before.log_noise


def test_what_leaves_bayesify_does_not_hold_it(tmp_path: Path) -> None:
    plain, model = converted(), bayesify.set_likelihood_(converted(), learned())
    model.load_state_dict(plain.state_dict())
    for name, each in (("a", plain), ("b", model)):
        bayesify.export_safetensors(each, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    drawn = [bayesify.predict(m, torch.ones(1, 2), num_samples=3, seed=1) for m in (plain, model)]
    assert torch.equal(*drawn)
    loss = bayesify.elbo_loss(torch.zeros(()), model, num_data=1)  # would warn of a lost posterior
    assert torch.equal(loss, bayesify.elbo_loss(torch.zeros(()), plain, num_data=1))
    kept = model.double().half()
    assert kept(torch.ones(1, 2, dtype=torch.float16)).shape == (1, 3)
