"""torch_support.py: features that need a newer torch say so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bayesify
from bayesify import torch_support


@pytest.mark.parametrize(
    ("version", "found"), [("2.6.0", (2, 6)), ("2.14.1+cu130", (2, 14)), ("3.0.0a0+git1", (3, 0))]
)
def test_the_version_is_read(
    version: str, found: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert torch_support.installed() == found


def test_both_versions_and_the_remedy_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.6.1")
    with pytest.raises(bayesify.UnsupportedVersionError, match=r"needs torch 2.8.*is 2.6.1.*pip"):
        torch_support.check("torch.compile")


def test_compile_with_a_torch_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_support, "FIRST", {"torch.compile": (99, 0)})
    compiled = torch.compile(bayesify.to_bbb(nn.Linear(2, 2)).train(), backend="eager")
    with pytest.raises(Exception, match=r"torch.compile of a Bayesian model needs torch 99.0"):
        compiled(torch.ones(1, 2))
