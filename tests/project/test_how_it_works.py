"""docs/how-it-works.md shows the code that is generated."""

import re
from pathlib import Path
from typing import Any

import torch

import bayesify

PAGE = Path(__file__).parents[2] / "docs" / "how-it-works.md"


def test_the_code_that_the_page_shows_is_what_is_generated() -> None:
    text = PAGE.read_text("utf-8")
    [source] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    shown = [t for t in re.findall(r"```text\n(.*?)```", text, re.DOTALL) if t.startswith("def ")]
    names: dict[str, Any] = {}
    exec(source, names)
    model = bayesify.to_bbb(names["Block"]())
    model(torch.randn(3, 8))
    for module, code in zip((model, model.get_submodule("linear")), shown, strict=True):
        assert bayesify.generated_code(module)["forward"].strip() == code.strip()
