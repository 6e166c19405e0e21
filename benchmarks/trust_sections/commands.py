"""Commands with a bad option, file or data set, too few words or too many: one clear error."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import typer

from . import mutations
from .forks import Child, broken_rule, command
from .jobs import JOBS, Bench, contents
from .section import FAULT, Section, Trial

_SMALL = ["--model", "trustfactory:small"]
_LEFT_OUT = {
    "--help", "--debug", "--pretrained", "--version", "--install-completion", "--show-completion",
}  # fmt: skip
_VALUES = (
    "x", "", "nan", "true", "-1", "-7", "0", "1.5", "1e3", "0x10", "inf", "-inf", "1e400", "1e-400",
    "1,5", "other", "TEST", "None", "\x1b[31mred", "x" * 5000, "re:(", "a,,b", "[", "{}", "[1]",
    "no:such", "json:nothing", "json:loads", "trustfactory", "trustfactory:", ":", "é" * 300, "-",
    "*", "0.5=", "=", "local", "@no-token", "preset", "\U0001f600", "../..",
)  # fmt: skip
_OF_OPTION: dict[str, tuple[str, ...]] = {
    "--device": ("tpu", "", "cuda:99", "cuda", "mps", "cpu:7", "meta", "\x1b[2J"),
    "--seed": ("-1", "x", "", "1.5", str(1 << 63), str(1 << 64), "9" * 30),
    "--limit": ("-1", "x", "0", "9" * 30),
}
_PATHS = {"--out", "--weights", "--checkpoint", "--plot", "--data", "--ood", "--bbb-encoder"}


class Base(NamedTuple):
    """A command that works: its name, words, and the places of model files and data among them."""

    name: tuple[str, ...]
    words: Callable[[Path, Path], list[object]]
    files: tuple[int, ...] = ()
    data: tuple[int, ...] = ()


def _bases() -> tuple[Base, ...]:
    net, data = "small.bbb.safetensors", "data.safetensors"
    fit = JOBS["fit"].words
    return (
        Base(("convert",), lambda i, o: ["trustfactory:small", "--img-size", 8, "-o", o / "a"]),
        Base(("inspect",), lambda i, o: [i / net], (0,)),
        Base(("fit",), lambda i, o: [*fit(i, o)[1:], "--epochs", 1], (0,), (1,)),
        Base(("eval",), lambda i, o: [i / net, i / data, "-k", 2, *_SMALL], (0,), (1,)),
        Base(
            ("predict",), lambda i, o: [i / net, i / "images", "-k", 2, "-o", o / "a.csv", *_SMALL],
            (0,), (1,),
        ),
        Base(
            ("prune",), lambda i, o: [i / net, "--sparsity", 0.5, "-o", o / "a", *_SMALL], (0,),
        ),
        Base(
            ("prune",),
            lambda i, o: [i / net, "--curve", "--data", i / data, "-k", 1, "--sparsity", 0.5,
                          *_SMALL],
            (0,), (3,),
        ),
        Base(("export",), lambda i, o: [i / net, "-o", o / "a", *_SMALL], (0,)),
        Base(
            ("report",),
            lambda i, o: [i / net, i / data, "-o", o / "a.html", "-k", 2, "--resamples", 2,
                          "--no-pruning", *_SMALL],
            (0,), (1,),
        ),
        Base(("models",), lambda i, o: ["test_*"]),
        Base(
            ("recipe", "byov", "train"),
            lambda i, o: [*JOBS["byov"].words(i, o)[3:], "--epochs", 1, "--warmup-epochs", 0],
            (), (1,),
        ),
        Base(("recipe", "byov", "eval"), lambda i, o: [o / "run", "-k", 0, "--epochs", 1]),
        Base(
            ("recipe", "byov", "prune"),
            lambda i, o: [o / "run", "--out", o / "a", "--epochs", 1, "--sparsity", 0],
        ),
    )  # fmt: skip


def _options(name: tuple[str, ...]) -> list[str]:
    """The options of a command that take a value."""
    from bayesify.cli.app import app

    found: Any = typer.main.get_command(app)
    for part in name:
        found = found.get_command(None, part)
    names = [
        max(p.opts, key=len) for p in found.params
        if p.param_type_name == "option" and not p.is_flag
    ]  # fmt: skip
    return [name for name in names if name not in _LEFT_OUT]


class Bad(NamedTuple):
    """The words of a call that is wrong, and the exit codes that are right for it."""

    words: list[object]
    codes: frozenset[int]
    what: str


def _bad_path(inputs: Path, rng: random.Random, scratch: Path) -> str:
    """A name where no good file is."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    way = rng.randrange(12)
    path = scratch / "file.safetensors"
    if way < 3:
        whole = (inputs / "small.bbb.safetensors").read_bytes()
        path.write_bytes(mutations.safetensors(whole, "bayesify", rng) if way else whole[:-9])
    elif way == 3:
        path.write_bytes(b"")
    elif way == 4:
        path.write_text("a text\n" * 100)
    elif way == 5:
        path.mkdir()
    elif way == 6:
        path.symlink_to(path)
    elif way == 7:
        return str(scratch / "no" / "such" / "file")
    elif way == 8:
        return "/dev/null"
    elif way == 9:
        return str(scratch / ("x" * 5000))
    elif way == 10:
        path = scratch / "\x1b[31m.safetensors"
        path.write_bytes(rng.randbytes(100))
    else:
        return ""
    return str(path)


def _bad(base: Base, inputs: Path, outputs: Path, scratch: Path, rng: random.Random) -> Bad:
    words = list(base.words(inputs, outputs))
    way = rng.random()
    if way < 0.3 and (base.files or base.data):
        place = rng.choice(base.files + base.data)
        words[place] = name = _bad_path(inputs, rng, scratch)
        # damage may leave a file that can be read
        codes = {0, 1, 2} if place in base.files else {0, 2, 3}
        return Bad(words, frozenset(codes), f"{name[-40:]!r} at {place}")
    if way < 0.4:
        word = rng.choice(("--no-such-option", "one too many", "--", "-Z"))
        if base.name in (("predict",), ("recipe", "byov", "eval"), ("recipe", "byov", "prune")):
            word = rng.choice(("--no-such-option", "-Z"))  # these take any number of words
        return Bad([*words, word, *(["x"] if word == "--" else [])], frozenset({2}), word)
    if way < 0.5 and base.name != ("recipe", "byov", "train"):  # of which all words may lack
        return Bad(words[rng.randrange(1, 3) :] if rng.random() < 0.5 else [], frozenset({0, 1, 2}),
                   "too few words")  # fmt: skip
    options = _options(base.name)
    if not options:
        return Bad([*words, "one too many"], frozenset({2}), "one too many")
    name = rng.choice(options)
    values = _OF_OPTION.get(name, _VALUES)
    value = _bad_path(inputs, rng, scratch) if name in _PATHS else rng.choice(values)
    return Bad([*words, name, value], frozenset({0, 1, 2}), f"{name} {value[-40:]!r}")


def _prepare(folder: Path) -> Trial:
    bench = Bench(folder)
    bases, kept = _bases(), folder / "kept"
    made = bench.outputs()
    if bench.start(JOBS["byov"], made).wait() != 0:
        raise RuntimeError("the run of BYOV failed")
    shutil.copytree(made / "run", kept)

    def trial(index: int) -> str:
        rng = random.Random(f"command {index}")
        base = bases[index % len(bases)]
        outputs = bench.outputs()
        if base.name[-1] in ("eval", "prune") and base.name[0] == "recipe":
            shutil.copytree(kept, outputs / "run")
        before = contents(outputs)
        whole = index < len(bases)
        if whole:
            bad = Bad(base.words(bench.inputs, outputs), frozenset({0}), "as it should be")
        else:
            bad = _bad(base, bench.inputs, outputs, folder / "bad", rng)
        words = [*base.name, *bad.words]
        if rng.random() < 0.3 and base.name[0] not in ("report", "recipe") and not whole:
            words.insert(len(base.name), "--json")
        log = folder / "log"
        log.unlink(missing_ok=True)

        def work() -> int:
            os.chdir(outputs)
            return command(words)

        child = Child(work, log)
        code = child.wait(120.0)
        wrong = broken_rule(code, child)
        if wrong is None and code not in bad.codes:
            wrong = f"exit code {code}: {child.said()[-300:]}"
        if wrong is None and code in (1, 2) and (found := contents(outputs)) != before:
            wrong = f"exit code {code}, and files: {sorted(found.keys() - before.keys())}"
        if contents(bench.inputs) != bench.input_bytes:
            wrong = "an input has changed"
        if wrong is not None:
            return f"{FAULT}: {' '.join(base.name)}, {bad.what}: {wrong}"
        return "done" if code == 0 else f"exit code {code}"

    return trial


COMMANDS = Section(
    "commands",
    "a command with a bad option, file or data set, with too few words or too many: one error of "
    "bayesify's kinds, its exit code by the rule, nothing written",
    share=100,
    full=300,
    prepare=_prepare,
    seconds=200.0,
    slow=20.0,
)
