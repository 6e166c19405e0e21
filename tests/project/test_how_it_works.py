"""docs/how-it-works.md shows the code that is generated."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import bayesify
from bayesify.estimators import registry

PAGE = Path(__file__).parents[2] / "docs" / "how-it-works.md"


def test_the_code_that_the_page_shows_is_what_is_generated() -> None:
    text = PAGE.read_text("utf-8")
    source, _ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    shown = [t for t in re.findall(r"```text\n(.*?)```", text, re.DOTALL) if t.startswith("def ")]
    names: dict[str, Any] = {}
    exec(source, names)
    model = bayesify.to_bbb(names["Block"]())
    model(torch.randn(3, 8))
    for module, code in zip((model, model.get_submodule("linear")), shown, strict=True):
        assert bayesify.generated_code(module)["forward"].strip() == code.strip()


def test_the_estimator_that_the_page_shows_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ESTIMATORS", dict(registry._ESTIMATORS))
    block, estimator = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    exec(estimator, names)
    model = names["model"]
    found = model(torch.ones(2, 8))
    torch.testing.assert_close(found.mean(0), model.eval()(torch.ones(8)))
