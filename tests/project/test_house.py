"""The order of the house: who may import whom, what an import may cost, what is packaged."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.util import resolve_name
from pathlib import Path
from typing import NamedTuple

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]

# From the ground up; units on one floor do not import each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("torch_support", "requirements"),
    (
        "gaussian",
        "images",
        "numeric",
        "seeds",
        "signals",
        "spacing",
        "devices",
        "json_numbers",
        "welford",
    ),
    ("torch_private", "settings"),
    ("kernels",),
    ("priors", "likelihoods", "provenance"),
    ("posterior",),
    ("scope", "absorbed_biases", "fixed", "own_lists"),
    ("selection", "estimators"),
    ("rewriter", "conversion"),
    ("validation",),
    ("planning",),
    ("unconverted", "copies"),
    ("applying",),
    ("convert",),
    ("divergence",),
    ("objective", "optim", "inference", "pruning", "metrics"),
    ("models", "classes", "loading", "zoo"),
    ("data", "storage", "corruptions"),
    ("training", "export"),
    ("bayesify",),  # bayesify/__init__.py, that is `from bayesify import to_bbb`
    ("report",),
    ("cli",),
)
FLOOR_OF = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}
# The same of the recipe, which uses public names of bayesify alone.
RECIPE_FLOORS: tuple[tuple[str, ...], ...] = (
    ("config", "resnet"),
    ("presets",),
    ("model", "objective", "optimizer", "trust"),
    ("runtime",),
    ("data", "teacher"),
    ("evaluation",),
    ("step",),
    ("train_log", "export"),
    ("train", "iterative"),
    ("paper",),
    ("commands",),
    ("cli",),
    ("__main__", "__init__"),
)
RECIPE_FLOOR_OF = {unit: floor for floor, units in enumerate(RECIPE_FLOORS) for unit in units}
NOT_PACKAGED = {"paper"}  # only a checkout has it
HEAVY = {"timm", "torchvision"}
ROOMS = ("bayesify", "recipes", "benchmarks", "examples")
NOT_AT_IMPORT = {"matplotlib", "numpy", "rich", "timm", "torch", "torchvision", "typer"}


class Import(NamedTuple):
    line: int
    module: str  # absolute, with the imported name where that may be a module itself
    at_top: bool  # runs when the file is imported


def imports(tree: ast.Module, package: str) -> Iterator[Import]:
    """Every import statement of a file in ``package``, also those inside functions."""

    def visit(node: ast.AST, at_top: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(child.lineno, alias.name, at_top)
            elif isinstance(child, ast.ImportFrom):
                base = resolve_name("." * child.level + (child.module or ""), package)
                for alias in child.names:
                    yield Import(child.lineno, f"{base}.{alias.name}", at_top)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for part in child.body:
                    yield from visit(ast.Module([part], []), False)
                for part in child.orelse:
                    yield from visit(ast.Module([part], []), at_top)
            else:
                is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                yield from visit(child, at_top and not is_function)

    yield from visit(tree, True)


def unit_of(parts: tuple[str, ...]) -> str:
    """The file or folder directly below ``bayesify/`` that a module belongs to."""
    return parts[1] if len(parts) > 1 and parts[1] in (*FLOOR_OF, "recipes") else "bayesify"


def faults(root: Path) -> list[str]:
    """What breaks the rules in ``root/bayesify``, one line a fault."""
    found = []
    for file in sorted((root / "bayesify").rglob("*.py")):
        path = file.relative_to(root)
        parts = path.with_suffix("").parts
        package = ".".join(parts[:-1])
        own = "bayesify" if parts[1:] == ("__init__",) else parts[1]
        if own not in FLOOR_OF:
            found.append(f"{path}: '{own}' has no floor; give it one in FLOORS")
            continue
        for line, module, at_top in imports(ast.parse(file.read_text("utf-8")), package):
            top = module.partition(".")[0]
            where = f"{path}:{line}: {module}"
            if top == "bayesify":
                unit = unit_of(tuple(module.split(".")))
                if unit == "recipes":
                    found.append(f"{where}: only entry points lead to a recipe")
                elif own != "bayesify" and unit != own and FLOOR_OF[unit] >= FLOOR_OF[own]:
                    found.append(f"{where}: '{unit}' is not below '{own}'")
            elif top == "recipes":
                found.append(f"{where}: only entry points lead to a recipe")
            elif top == "rich" and own != "cli":
                found.append(f"{where}: rich belongs to bayesify/cli")
            elif top in HEAVY and at_top:
                found.append(f"{where}: import it in the function that needs it")
    return found


def recipe_faults(root: Path) -> list[str]:
    """What breaks the rules in ``root/recipes/byov``, one line a fault."""
    found = []
    for file in sorted((root / "recipes" / "byov").rglob("*.py")):
        path = file.relative_to(root)
        parts = path.with_suffix("").parts
        own = parts[2]
        if own not in RECIPE_FLOOR_OF:
            found.append(f"{path}: '{own}' has no floor; give it one in RECIPE_FLOORS")
            continue
        for line, module, at_top in imports(
            ast.parse(file.read_text("utf-8")), ".".join(parts[:-1])
        ):
            names = module.split(".")
            if names[:2] == ["recipes", "byov"]:
                unit = names[2]
                if unit != own and RECIPE_FLOOR_OF.get(unit, 99) >= RECIPE_FLOOR_OF[own]:
                    found.append(f"{path}:{line}: '{unit}' is not below '{own}'")
                elif unit in NOT_PACKAGED and own not in NOT_PACKAGED and at_top:
                    found.append(f"{path}:{line}: a wheel has no '{unit}': import it where needed")
            elif names[0] == "bayesify" and any(n.startswith("_") for n in names):
                found.append(f"{path}:{line}: {module} is private")
    return found


def code_lines(text: str) -> list[tuple[int, str]]:
    """Number and text of each line of code: no docstring, comment, import or lone punctuation."""
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            left_out.update(range(node.lineno, (node.end_lineno or 0) + 1))
    stripped = ((n, line.strip()) for n, line in enumerate(text.splitlines(), 1))
    return [
        (number, line.partition("  # ")[0])
        for number, line in stripped
        if number not in left_out and not line.startswith("#") and re.search(r"\w", line)
    ]


def repeated(files: Iterable[Path], most: int = 12) -> list[str]:
    """Runs of more than ``most`` lines of code that stand twice in the files."""
    seen: dict[tuple[str, ...], str] = {}
    found = []
    for file in files:
        lines = code_lines(file.read_text("utf-8"))
        for first in range(len(lines) - most):
            run = tuple(line for _, line in lines[first : first + most + 1])
            place = f"{file}:{lines[first][0]}"
            if run in seen:
                found.append(f"{place} is {seen[run]}")
            seen.setdefault(run, place)
    return found


def links(root: Path) -> dict[str, set[str]]:
    """The files of ``bayesify/`` and ``recipes/`` that each file imports, as names of modules.

    Also those that it imports in functions and under TYPE_CHECKING.
    """
    files: dict[str, Path] = {}
    for file in sorted(f for room in ("bayesify", "recipes") for f in (root / room).rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    found: dict[str, set[str]] = {}
    for name, file in files.items():
        package = ".".join(file.relative_to(root).parts[:-1])
        found[name] = set()
        for _, module, _ in imports(ast.parse(file.read_text("utf-8")), package):
            installed = module.startswith("bayesify.recipes.")
            target = module.removeprefix("bayesify.") if installed else module
            target = target if target in files else target.rpartition(".")[0]
            found[name] |= {target} & files.keys() - {name}
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """One circle through each group of files that import each other."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for other in sorted(graph[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])
    return found


def run_python(code: str, folder: Path, path: str | None) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a new process, in ``folder``, with PYTHONPATH set to ``path``."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = path
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True
    )


def test_every_file_imports_only_from_below() -> None:
    assert faults(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source", "fault"),
    [
        ("gaussian.py", "from bayesify.priors import x", "'priors' is not below 'gaussian'"),
        ("gaussian.py", "from .priors import x", "'priors' is not below 'gaussian'"),
        ("gaussian.py", "from . import priors", "'priors' is not below 'gaussian'"),
        ("gaussian.py", "import bayesify.cli.app", "'cli' is not below 'gaussian'"),
        ("gaussian.py", "def f():\n    from .cli import app", "'cli' is not below 'gaussian'"),
        ("gaussian.py", "from bayesify import to_bbb", "'bayesify' is not below 'gaussian'"),
        ("metrics.py", "from .storage import save", "'storage' is not below 'metrics'"),
        ("data.py", "from .training import fit", "'training' is not below 'data'"),
        ("rewriter/owner.py", "from ..convert import x", "'convert' is not below 'rewriter'"),
        ("cli/app.py", "import bayesify.recipes.byov", "only entry points"),
        ("cli/app.py", "from recipes import byov", "only entry points"),
        ("report/page.py", "from rich.table import Table", "rich belongs"),
        ("models.py", "import timm", "in the function"),
        ("models.py", "try:\n    import torchvision\nexcept ImportError:\n    pass", "in the func"),
        ("models.py", "class A:\n    import timm.data", "in the function"),
        ("utils.py", "", "no floor"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, source: str, fault: str) -> None:
    path = tmp_path / "bayesify" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    [found] = faults(tmp_path)
    assert found.startswith(f"bayesify/{file}:")
    assert fault in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("__init__.py", "from .cli import app\nfrom bayesify.errors import BayesifyError"),
        ("priors.py", "from . import gaussian\nfrom .gaussian import kl\nimport torch"),
        ("training.py", "from .data import x\nfrom bayesify import models, objective"),
        ("rewriter/owner.py", "from .passes import x\nfrom bayesify.rewriter import tracer"),
        ("cli/render.py", "from rich.table import Table\nfrom bayesify import to_bbb"),
        ("models.py", "def f():\n    import timm"),
        ("models.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import timm"),
    ],
)
def test_a_right_import_is_accepted(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / "bayesify" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert faults(tmp_path) == []


def test_no_circle_between_files() -> None:
    assert circles(links(ROOT)) == []


@pytest.mark.parametrize(
    "source",
    [
        "from .b import x",
        "from . import b",
        "import bayesify.rewriter.b",
        "def f():\n    from bayesify.rewriter import b",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import x",
    ],
)
def test_a_circle_is_found(tmp_path: Path, source: str) -> None:
    folder = tmp_path / "bayesify" / "rewriter"
    folder.mkdir(parents=True)
    for name, text in (("a", source), ("b", "from .c import x"), ("c", "from .a import x")):
        (folder / f"{name}.py").write_text(text)
    [circle] = circles(links(tmp_path))
    assert circle == [f"bayesify.rewriter.{name}" for name in "abca"]
    (folder / "c.py").write_text("from .d import x")
    assert circles(links(tmp_path)) == []


def test_contributing_has_the_same_floors() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| ([^|]*) \|", text, re.MULTILINE)
    shown = [
        tuple(name.strip("/") for name in re.findall(r"`([^`]*)`", names)) for _, names in rows
    ]
    expected = [tuple("__init__" if unit == "bayesify" else unit for unit in f) for f in FLOORS]
    assert [int(number) for number, _ in rows] == list(range(1, len(FLOORS) + 1))
    assert shown == expected


def test_every_file_of_the_recipe_imports_only_from_below() -> None:
    assert recipe_faults(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source", "fault"),
    [
        (
            "data/batches.py",
            "from ..evaluation.linear import x",
            "'evaluation' is not below 'data'",
        ),
        ("runtime/log.py", "def f():\n    from ..train import x", "'train' is not below 'runtime'"),
        ("step.py", "from bayesify.scope import _x", "private"),
        ("tools.py", "", "no floor"),
        ("commands.py", "from .paper import figures", "a wheel has no 'paper'"),
    ],
)
def test_a_wrong_import_of_the_recipe_is_found(
    tmp_path: Path, file: str, source: str, fault: str
) -> None:
    path = tmp_path / "recipes" / "byov" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    [found] = recipe_faults(tmp_path)
    assert fault in found


def test_no_file_grows_beyond_450_lines() -> None:
    files = [file for room in ROOMS for file in (ROOT / room).rglob("*.py")]
    assert [str(f) for f in files if len(f.read_text("utf-8").splitlines()) > 450] == []


def long_functions(source: str) -> set[str]:
    """The functions of more than 80 lines, without their docstring and a reason right above.

    The reason is a comment that begins with ``# long:``.
    """
    found = set()
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        length = (node.end_lineno or 0) - node.lineno + 1
        if ast.get_docstring(node) is not None:
            length -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
        if length > 80 and not lines[first - 2].strip().startswith("# long:"):
            found.add(node.name)
    return found


def test_no_function_is_longer_than_80_lines_without_a_reason() -> None:
    found = {
        f"{file.relative_to(ROOT)}:{name}"
        for room in ROOMS
        for file in (ROOT / room).rglob("*.py")
        for name in long_functions(file.read_text("utf-8"))
    }
    assert found == set()


def test_a_long_function_is_found() -> None:
    body = "\n".join(["    pass"] * 79)
    docstring = "    '''" + "\n" * 50 + "    '''\n"
    assert long_functions(f"def f():\n{body}\n    pass") == {"f"}
    assert long_functions(f"x = 1\n# long: a table\ndef f():\n{body}\n    pass") == set()
    assert long_functions(f"def f():\n{docstring}{body}") == set()
    assert long_functions(f"class A:\n  @property\n  def f(self):\n{body}\n    pass") == {"f"}


def test_no_run_of_lines_stands_twice() -> None:
    assert repeated(file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))) == []


def test_a_run_that_stands_twice_is_found(tmp_path: Path) -> None:
    lines = [f"x{i} = call({i})" for i in range(13)]
    (tmp_path / "a.py").write_text("\n".join(['"""Text."""', *lines]))
    moved = [f"    {line}  # a comment" for line in lines]
    (tmp_path / "b.py").write_text("\n".join(["def f():", '    """Other."""', *moved, ""]))
    (tmp_path / "c.py").write_text("\n".join(lines[:12]))
    a, b, c = (tmp_path / f"{name}.py" for name in "abc")
    assert repeated([a, b, c]) == [f"{b}:3 is {a}:2"]


def test_import_is_lean(tmp_path: Path) -> None:
    code = "import bayesify, json, sys; print(json.dumps(list(sys.modules)))"
    result = run_python(code, tmp_path, str(ROOT))
    assert result.returncode == 0, result.stderr
    assert NOT_AT_IMPORT & set(json.loads(result.stdout)) == set()


def test_public_names_resolve() -> None:
    import bayesify

    names = getattr(bayesify, "__all__", [])
    assert len(names) == len(set(names))
    assert [name for name in names if not hasattr(bayesify, name)] == []


def test_installed_package_holds_the_recipe(tmp_path: Path) -> None:
    installed = "import importlib.util as u, sys; sys.exit(u.find_spec('bayesify') is None)"
    if run_python(installed, tmp_path, None).returncode:
        pytest.skip("bayesify is not installed here")
    result = run_python("import bayesify.recipes.byov", tmp_path, None)
    assert result.returncode == 0, result.stderr


def test_every_package_folder_but_the_papers_is_packaged() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    folders = {file.parent.relative_to(ROOT) for file in ROOT.glob("bayesify/**/*.py")}
    folders |= {"bayesify" / file.parent.relative_to(ROOT) for file in ROOT.glob("recipes/**/*.py")}
    expected = {".".join(folder.parts) for folder in folders}
    expected -= {f"bayesify.recipes.byov.{room}" for room in NOT_PACKAGED}
    assert set(setuptools["packages"]) == expected
