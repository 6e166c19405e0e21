"""torch_private.py holds every name of torch that is private, and torch_support.py the versions."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import bayesify
from bayesify import torch_private, torch_support
from bayesify.torch_support import COMPILE

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / "bayesify" / "torch_private.py"
NAMESPACES = {"torch._C", "torch._C._autograd", "torch._C._functorch"}
LISTED = [
    "torch.Tensor._make_wrapper_subclass",
    "torch._C.DisableTorchFunction",
    "torch._C.ScriptFunction",
    "torch._C._EnableTorchFunction",
    "torch._C._autograd._get_current_graph_task_keep_graph",
    "torch._C._autograd._saved_tensors_hooks_is_enabled",
    "torch._C._current_autograd_node",
    "torch._C._functorch._is_vmap_fallback_enabled",
    "torch._C._functorch._set_vmap_fallback_enabled",
    "torch._C._functorch.is_functorch_wrapped_tensor",
    "torch._C._functorch.is_legacy_batchedtensor",
    "torch._C._functorch.maybe_current_level",
    "torch._C._functorch.peek_interpreter_stack",
    "torch._C._is_any_autocast_enabled",
    "torch._C._set_grad_enabled",
    "torch._C._storage_Use_Count",
    "torch._foreach_addcmul_",
    "torch._foreach_copy_",
    "torch._foreach_lerp_",
    "torch._foreach_mul_",
    "torch._foreach_sub",
    "torch._subclasses.fake_tensor.FakeTensor",
    "torch._subclasses.fake_tensor.FakeTensorMode",
    "torch.autograd.forward_ad._current_level",
    "torch.nn.Module._load_from_state_dict",
    "torch.nn.modules.batchnorm._BatchNorm",
    "torch.nn.modules.batchnorm._NormBase",
    "torch.nn.modules.conv._ConvNd",
    "torch.nn.parallel.DistributedDataParallel._active_ddp_module",
    "torch.nn.utils.parametrize._cache_enabled",
    "torch.overrides._get_current_function_mode_stack",
    "torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS",
    "torch.utils._device.DeviceContext",
    "torch.utils._device._device_constructors",
    "torch.utils._python_dispatch._disable_current_modes",
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack",
    "torch.utils._pytree",
    "torch.utils.data._utils.signal_handling",
    "torch.utils.data._utils.signal_handling._remove_worker_pids",
]


def private_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines and dotted names: what a file takes from torch by a name with an underscore."""
    origins: dict[str, str] = {}  # what names of the file are, as torch calls them
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    origins[alias.asname or "torch"] = alias.name if alias.asname else "torch"
                    yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                origins[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield node.lineno, f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        parts: list[str] = []
        at: ast.AST = node
        while isinstance(at, ast.Attribute):
            parts.insert(0, at.attr)
            at = at.value
        if parts and isinstance(at, ast.Name) and at.id in origins:
            yield node.lineno, ".".join([origins[at.id], *parts])  # type: ignore[attr-defined]


def is_private(name: str) -> bool:
    return any(re.match(r"_(?!_)", part) for part in name.split("."))


def found_in(source: str) -> list[str]:
    return [name for _, name in private_names(ast.parse(source)) if is_private(name)]


def test_nothing_else_names_what_torch_does_not_promise_to_keep() -> None:
    files = [*ROOT.glob("bayesify/**/*.py"), *ROOT.glob("recipes/**/*.py")]
    assert len(files) > 100
    found = [
        f"{file.relative_to(ROOT)}:{line}: {name}; give it a name in torch_private.py"
        for file in files
        if file != HOME
        for line, name in private_names(ast.parse(file.read_text("utf-8")))
        if is_private(name)
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch._dynamo",
        "import torch\ntorch._C.f()",
        "import torch\ndef f():\n    torch.nn.Module._load_from_state_dict(0)",
        "from torch import nn\nnn.Module._call_impl",
        "from torch.utils import _pytree as pytree",
        "import torch.fx as g\ng._symbolic_trace.x",
        "from torch._C import f",
    ],
)
def test_a_private_name_is_found(source: str) -> None:
    assert found_in(source)


def test_public_names_and_own_private_ones_are_left_alone() -> None:
    assert not found_in("import torch\nself._x = torch.__version__\ntorch.Tensor.__add__\na._b")


def test_what_is_private_is_this() -> None:
    """A list to read: a new entry is to be weighed, and its versions said where it stands."""
    assert sorted(set(found_in(HOME.read_text("utf-8"))) - NAMESPACES) == LISTED


@pytest.mark.parametrize("name", torch_private.__all__)
def test_each_is_there(name: str) -> None:
    assert callable(getattr(torch_private, name)) or name == "pytree"


def test_hooks_that_get_what_is_saved_are_seen() -> None:
    knows = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
    assert torch_private.saves_to_hooks() is not knows
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert torch_private.saves_to_hooks()
    with torch.autograd.graph.disable_saved_tensors_hooks("no"):
        assert not torch_private.saves_to_hooks()


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )


def test_a_name_that_torch_dropped_is_said_at_import() -> None:
    result = python(
        "import torch\ndel torch._C._storage_Use_Count\nimport bayesify\nbayesify.to_bbb"
    )
    last = result.stderr.splitlines()[-1]
    assert re.search(
        r"UnsupportedVersionError: torch .* lacks .*_storage_Use_Count.*pip install", last
    )


def test_a_torch_that_is_too_old_is_refused_at_import() -> None:
    code = "import torch\ntorch.__version__ = '2.3.1+cu121'\nimport bayesify\nbayesify.to_bbb"
    last = python(code).stderr.splitlines()[-1]
    assert re.search(r"bayesify needs torch 2\.6 or newer, this is 2\.3\.1\+cu121: pip inst", last)


def test_the_lowest_torch_is_the_bound_of_the_package() -> None:
    first = ".".join(map(str, torch_support.FIRST["bayesify"]))
    assert f'"torch>={first}"' in (ROOT / "pyproject.toml").read_text("utf-8")


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
    with pytest.raises(
        bayesify.UnsupportedVersionError, match=r"needs torch 2.10 .*is 2.6.1: pip install 'torch>="
    ):
        torch_support.check(COMPILE)


def test_compile_with_a_torch_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch_support.FIRST, COMPILE, (99, 0))
    model = bayesify.to_bbb(nn.Linear(2, 2)).train()
    with pytest.raises(Exception, match=r"torch.compile, .* of a Bayesian model needs torch 99.0"):
        torch.compile(model, backend="eager")(torch.ones(1, 2))
    with pytest.raises(Exception, match=r"torch.compile, .* of a Bayesian model needs torch 99.0"):
        torch.compile(bayesify.kl_divergence, backend="eager")(model)
    assert model(torch.ones(1, 2)).shape == (1, 2)  # it goes on without
