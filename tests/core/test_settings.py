"""settings/: each setting once, for the function that takes it and for the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import bayesify
from bayesify import ArgumentError, report, settings
from bayesify.settings.fields import (
    MISSING,
    Count,
    PartShare,
    Positive,
    Seed,
    Shown,
    Whole,
    Within,
    accept,
    checked,
    described,
    documented,
    expected,
    plain,
    refuse,
    settings_of,
)
from bayesify.settings.files import (
    assignments,
    changed,
    check_names,
    config_text,
    names_in,
    read_config,
)

TAKEN: list[tuple[Callable[..., Any], tuple[type, ...]]] = [
    (bayesify.fit, (settings.FitSettings, settings.Reading)),
    (bayesify.fit_laplace_, (settings.LaplaceSettings, settings.Reading)),
    (bayesify.evaluate, (settings.EvaluateSettings,)),
    (report.gather, (settings.ReportSettings,)),
    (bayesify.prune_, (settings.PruneSettings,)),
    (bayesify.prune_units_, (settings.UnitSettings,)),
    (bayesify.prune_n_of_m_, (settings.NofMSettings,)),
    (bayesify.to_program, (settings.ProgramSettings,)),
    (bayesify.export_torch, (settings.ProgramSettings,)),
    (bayesify.export_onnx, (settings.ProgramSettings,)),
]
CLASSES = sorted({cls for _, classes in TAKEN for cls in classes}, key=lambda cls: cls.__name__)


@pytest.mark.parametrize(
    ("function", "classes"), TAKEN, ids=lambda value: getattr(value, "__name__", None)
)
def test_a_function_takes_what_its_dataclass_has(
    function: Callable[..., Any], classes: tuple[type, ...]
) -> None:
    arguments = inspect.signature(function).parameters
    documentation = inspect.getdoc(function) or ""
    for cls in classes:
        for name, each in settings_of(cls).items():
            default = arguments[name].default
            # a function may ask for what the command line has a default for; fit asks for a
            # batch_size only where its data have none
            asked_for = inspect.Parameter.empty, (None if name == "batch_size" else each.default)
            assert default in (each.default, *asked_for), name
            assert f"\n    {name}: {each.text.split()[0]}" in documentation, name
    # no argument that the dataclass has is described a second time
    assert all(documentation.count(f"\n    {name}: ") < 2 for name in arguments)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_setting_has_a_text_and_its_default_is_one_of_its_values(cls: Any) -> None:
    given = {"file": "a", "data": "b", "out": "c"}
    made = cls(**{k: v for k, v in given.items() if k in settings_of(cls)})
    for name, each in settings_of(cls).items():
        assert each.text.strip().endswith("."), name
        if each.default is not MISSING:
            assert getattr(made, name) == each.default


@dataclass(frozen=True)
class Things:
    """Some of each.

    Args:
        count: How many.

            More than one is better.
        share: A part, of ``count``. The rest is left.
        either: A number or a word.
        pair: Two.
        names: Some.
        inside: Anything.
        where: A place.
        on: Or off.
        kind: One of two.
    """

    count: Count = 1
    share: Annotated[PartShare, Shown(panel="Parts")] = 0.5
    either: Positive | Literal["most"] = "most"
    pair: tuple[PartShare, PartShare] = (0.1, 0.2)
    names: tuple[str, ...] = ()
    inside: Mapping[str, Any] = field(default_factory=dict)
    where: Path = Path("x")
    on: bool = False
    kind: Literal["a", "b"] = "a"
    left: Annotated[Whole | None, Shown(text="Of several classes.")] = None

    def __post_init__(self) -> None:
        refuse("things", checked(self))


def test_values_become_what_their_annotations_say() -> None:
    things = Things(share=0, names=["a"], where="y", inside={"x": (1, 2)}, either=3, pair=[0, 0.5])  # type: ignore[arg-type]
    assert things == Things(
        share=0.0, names=("a",), where=Path("y"), inside={"x": [1, 2]}, either=3.0, pair=(0.0, 0.5)
    )
    assert type(things.share) is type(things.either) is float
    with pytest.raises(ArgumentError) as error:
        Things(count=0, pair=(0.5, 1.0), on=1, kind="c", left=True)  # type: ignore[arg-type]
    assert str(error.value).splitlines() == [
        "things:",
        "  count must be a whole number above 0, got 0.",
        "  pair must be 2 numbers, each from 0 to below 1, got 1.0.",
        "  on must be True or False, got 1.",
        "  kind must be 'a' or 'b', got 'c'.",
        "  left must be None or a whole number of at least 0, got True.",
    ]
    with pytest.raises(ArgumentError, match=r"^things: inside must be a mapping that JSON can"):
        Things(inside={"x": math.nan})


@pytest.mark.parametrize(
    ("hint", "inside", "outside", "words"),
    [
        (Count, [1, 10**9], [0, -1, 1.0, True, "1"], "a whole number above 0"),
        (Whole, [0], [-1, False], "a whole number of at least 0"),
        (Seed, [0, 2**63 - 1], [-1, 2**63], "a whole number from 0 to below 2**63"),
        (Positive, [1e-300, 3], [0.0, math.inf, math.nan], "above 0 and finite"),
        (PartShare, [0, 0.999], [1.0, -1e-9, math.nan], "from 0 to below 1"),
        (Annotated[float, Within(above=0, finite=False)], [math.inf], [0, math.nan], "above 0"),
        (Annotated[float, Within(above=0, below=1)], [0.5], [0, 1], "between 0 and 1"),
        (Annotated[float, Within(above=0, most=1)], [1], [0, 1.1], "above 0, at most 1"),
        (float, [0, -1.5], [math.inf, "1"], "a finite number"),
        (Positive | Literal["most"], [2, "most"], ["least", -1], "above 0 and finite, or 'most'"),
        (tuple[str, ...], [[], ["a"]], ["a", [1]], "a list of texts"),
    ],
    ids=str,
)
def test_ranges(hint: Any, inside: list[Any], outside: list[Any], words: str) -> None:
    for value in inside:
        accept("it", hint, value)
    for value in outside:
        with pytest.raises(ArgumentError) as error:
            accept("it", hint, value)
        assert str(error.value).startswith(f"it must be {words}")


def test_the_range_is_part_of_the_text() -> None:
    texts = {name: each.text for name, each in settings_of(Things).items()}
    assert texts["count"] == "How many (at least 1).\n\nMore than one is better."
    assert texts["share"] == "A part, of ``count`` (from 0 to below 1). The rest is left."
    assert texts["either"] == "A number or a word (above 0)."
    assert texts["left"] == "Of several classes."
    assert settings_of(Things)["share"].shown.panel == "Parts"


def test_a_class_has_the_texts_of_what_it_inherits_from() -> None:
    @dataclass(frozen=True)
    class More(Things):
        """More.

        Args:
            share: Another text.
            last: At the end.

        Raises:
            ArgumentError: Never.
        """

        last: int = 3

    texts = described(More)
    assert texts["count"].startswith("How many.")
    assert (texts["share"], texts["last"]) == ("Another text.", "At the end.")


def test_a_docstring_gets_the_texts() -> None:
    @documented(Things)
    def function(own: int, count: int, share: float) -> None:  # noqa: D417
        """What it does.

        Args:
            own: Its own.

        Returns:
            Nothing.
        """

    text = inspect.getdoc(function) or ""
    assert "\n    own: Its own.\n    count: How many (at least 1).\n\n        More than" in text
    assert text.index("kind: One of two.") < text.index("\n\nReturns:\n    Nothing.")


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(
    st.dictionaries(TEXT, VALUES, max_size=3),
    st.lists(TEXT, max_size=3),
)
def test_a_config_file_holds_every_value(inside: dict[str, Any], names: list[str]) -> None:
    things = Things(inside=inside, names=(*names,))
    with pytest.MonkeyPatch.context() as patched:
        text = config_text("Things", {"things": things})
        patched.setattr(Path, "read_text", lambda *_: text)
        found = read_config(Path("x"))["things"]
    if isinstance(found["inside"], str):  # TOML has no null
        found["inside"] = json.loads(found["inside"])
    assert Things(**found) == things


def test_numbers_without_end_and_what_is_none(tmp_path: Path) -> None:
    fit = settings.FitSettings(max_grad_norm=math.inf, lr=1e-20, seed=2**60)
    path = tmp_path / "a.toml"
    path.write_text(config_text("A fit", {"fit": fit}), "utf-8")
    assert settings.FitSettings(**read_config(path)["fit"]) == fit
    assert "patience" not in read_config(path)["fit"]
    # what is None and left out has None for its default
    for cls in CLASSES:
        for each in settings_of(cls).values():
            assert each.default is None or not expected(each.hint).startswith("None")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"a = ", "is no TOML"),
        (b"a = '\xff'", "no TOML"),
        (b"a = " + b"[" * 10_000, "is no TOML"),
        (b"a = " + b"1" * 10_000, "is no TOML"),
    ],
)
def test_a_file_that_is_none(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArgumentError, match=message):
        read_config(path)


@given(st.randoms(use_true_random=False))
def test_a_damaged_file_is_one_error_or_none(random: Any) -> None:
    damaged = bytearray(config_text("A fit", {"fit": settings.FitSettings()}).encode())
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(damaged))
        damaged[at : at + random.choice([0, 1, 5])] = random.randbytes(random.randint(0, 2))
    known = [("fit", name) for name in settings_of(settings.FitSettings)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "read_text", lambda *_: bytes(damaged).decode("utf-8"))
        with contextlib.suppress(ArgumentError):
            document = read_config(Path("x"))
            check_names("x", names_in(document), known)
            settings.FitSettings(**document.get("fit", {}))


def test_assignments() -> None:
    texts = ["a.b=1e-3", "a.c.d=[1, 2]", "a.e = some text", "a.f=x=y", "a.g={h = true}", "a.c.i=2"]
    before = {"b": 1, "c": {"k": 0}}
    assert changed(before, assignments(texts)) == {
        "b": 1e-3, "c": {"k": 0, "d": [1, 2], "i": 2}, "e": "some text", "f": "x=y",
        "g": {"h": True},
    }  # fmt: skip
    assert before == {"b": 1, "c": {"k": 0}}
    for wrong in ("a=1", "a.b", ".b=1", "a.=1"):
        with pytest.raises(ArgumentError, match=r"TABLE\.NAME=VALUE"):
            assignments([wrong])
    with pytest.raises(ArgumentError, match=r"a\.b is 1, which holds no names"):
        changed(before, assignments(["a.b.c=1"]))


def test_an_unknown_name_is_told_the_nearest() -> None:
    known = [("fit", "lr"), ("fit", "epochs"), ("run", "out")]
    check_names("x", [("fit", "lr")], known)
    message = r"x: there is no setting fit\.epoch \(the nearest is fit\.epochs\), "
    with pytest.raises(ArgumentError, match=message + r"rum\.out \(the nearest is run\.out\)\."):
        check_names("x", [("fit", "epoch"), ("run", "out"), ("rum", "out")], known)
    with pytest.raises(ArgumentError, match=r"x: there is no setting fit \(the nearest"):
        check_names("x", [("fit", "")], known)


def test_a_function_is_named_where_it_cannot_be_kept() -> None:
    assert plain(settings.FitSettings(augment=abs))["augment"] == "callable"
    assert dataclasses.asdict(settings.FitSettings())["augment"] == "none"
