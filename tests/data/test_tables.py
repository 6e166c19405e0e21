"""bayesify.data.tables: what is read, how it is coded, what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bayesify.data import Coding, Table, coding_of, read_table
from bayesify.data.tables import Categories, Numbers
from bayesify.errors import ArgumentError, CheckpointError, DataError, ModelError
from bayesify.models import ModelSpec, create_model, mlp

SIZES = [30.0, 55.5, 80.0, 41.0]
CITIES = ["Rome", "Oslo", "Rome", "Bonn"]


@pytest.fixture
def table(tmp_path: Path) -> Table:
    rows = zip(SIZES, CITIES, (1.5, 2.5, 3.5, 1.0), strict=True)
    lines = ["size,city,price", *(f'{size},"{city}",{price}' for size, city, price in rows)]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n", "utf-8")
    return read_table(tmp_path / "t.csv")


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "x.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_columns_are_standardised_and_categories_coded_one_hot(table: Table) -> None:
    coding, notes = coding_of(table, "price")
    sizes = np.array(SIZES)
    expected = np.column_stack(
        [(sizes - sizes.mean()) / sizes.std(),
         *([city == known for city in CITIES] for known in ("Bonn", "Oslo", "Rome"))]
    )  # fmt: skip
    assert coding.inputs(table).numpy() == pytest.approx(expected.astype(np.float32))
    assert coding.targets(table).tolist() == [[1.5], [2.5], [3.5], [1.0]]
    assert (coding.classes, coding.width, notes) == (None, 4, [])


def test_other_rows_are_coded_with_the_statistics_of_the_training_rows(table: Table) -> None:
    coding = Coding.from_json(json.loads(json.dumps(coding_of(table, "price")[0].to_json())))
    other = Table("o", {"city": ["Oslo"], "more": ["?"], "size": ["100"]})
    sizes = np.array(SIZES)
    assert coding.inputs(other)[0].tolist() == pytest.approx(
        [(100 - sizes.mean()) / sizes.std(), 0, 1, 0]
    )


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        (["b", "a", "b", "a"], ("a", "b")),
        (["10", "9", "10", "9.0"], ("9", "10")),
        (["0.5", "1", "0.5", "1"], None),
        (["1", "2", "3", "4"], None),  # each once
        ([*map(str, range(11))] * 3, None),
    ],
)
def test_texts_and_few_whole_numbers_are_classes(
    values: list[str], classes: tuple[str, ...] | None
) -> None:
    table = Table("t", {"x": [str(i) for i in range(len(values))], "y": values})
    coding, _ = coding_of(table, "y")
    assert coding.classes == classes
    if classes is not None:
        found = [float(classes[i]) if classes[i].isdigit() else classes[i]
                 for i in coding.targets(table).tolist()]  # fmt: skip
        assert found == [v if v.isalpha() else float(v) for v in values]


def test_the_user_says_what_a_column_is() -> None:
    table = Table(
        "t", {"zip": ["1", "2", "1", "2"], "id": ["a", "b", "c", "d"], "y": ["1", "2", "2", "1"]}
    )
    coding, _ = coding_of(table, "y", kind="number", ignore=["id"], categorical=["zip"])
    assert coding == Coding("y", None, (Categories("zip", ("1", "2")),))


def test_a_column_of_one_value_is_left_out_and_named() -> None:
    table = Table("t", {"c": ["7"] * 3, "x": ["1", "2", "4"], "y": ["0.5", "1", "3"]})
    coding, notes = coding_of(table, "y")
    assert [column.name for column in coding.columns] == ["x"]
    assert notes == ["Column 'c' has one value in all rows and is left out."]


@pytest.mark.parametrize("text", ["a;b\n1;2,5\n\n3;x\n", "\ufeffa\tb\r\n1\t2,5\r\n3\tx\r\n"])
def test_semicolons_tabs_and_the_marks_of_windows_are_read(tmp_path: Path, text: str) -> None:
    assert read_table(write(tmp_path, text)).columns == {"a": ("1", "3"), "b": ("2,5", "x")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        ("a,b\n", "no rows below its first line"),
        ("a,b\n1,2\n1,2,3\n", "line 3: there are 3 cells, and 2 columns"),
        ("a,a\n1,2\n", "two columns 'a'"),
        ("a,\n1,2\n", "no name for column 2"),
        (b"a,b\n1,\xff\n", "not in UTF-8"),
        ('a,b\n1,"2\n', "cannot be read as a table"),
    ],
)
def test_a_file_that_is_no_table_is_refused(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_table(write(tmp_path, text))
    with pytest.raises(DataError, match="There is no table"):
        read_table(tmp_path / "none.csv")


GOOD = {"n": ["1", "2", "3", "5"], "c": ["u", "v", "u", "v"], "y": [".1", ".2", ".3", ".5"]}


@pytest.mark.parametrize(
    ("changed", "target", "message"),
    [
        ({}, "Y", r"no target 'Y'.*nearest is 'y'"),
        ({"n": ["1", "NA", "3", ""]}, "y", r"'n' has no value in 2 of 4 rows.*row 2.*--ignore"),
        ({"y": ["1", "2", "3", ""]}, "y", r"'y' has no value in 1 of 4 rows.*remove these rows"),
        ({"n": ["1", "2", "3", "5 km"]}, "y", r"'n' has '5 km' in row 4.*--categorical 'n'"),
        ({"n": ["1", "2", "3", "inf"]}, "y", r"'n' has 'inf' in row 4"),
        ({"y": [".1"] * 4}, "y", r"target 'y' is 0.1 in all rows"),
        ({"y": ["k"] * 4}, "y", r"target 'y' is 'k' in all rows"),
        ({"n": ["1"] * 4, "c": ["u"] * 4}, "y", r"no column to predict 'y' from"),
    ],
)
def test_training_rows_that_cannot_be_used_are_refused(
    changed: dict[str, list[str]], target: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        coding_of(Table("t.csv", GOOD | changed), target)


def test_a_column_of_names_is_no_category() -> None:
    names = [f"name {i}" for i in range(101)]
    table = Table("t", {"who": names, "y": [f"{i}.5" for i in range(101)]})
    with pytest.raises(DataError, match=r"'who' has 101 different texts.*--ignore 'who'"):
        coding_of(table, "y")
    with pytest.raises(DataError, match=r"'who' has 101 different texts.*another target"):
        coding_of(table, "who")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"n": ["1"]}, r"lacks 'c', which the model was trained on"),
        ({"n": ["1"], "c": ["w"]}, r"'c' has 'w' in row 1.*there it is 'u', 'v'"),
        ({"n": ["one"], "c": ["u"]}, r"'n' has 'one' in row 1"),
        ({"n": [""], "c": ["u"]}, r"'n' has no value in 1 of 1 rows"),
        ({"n": ["1e31"], "c": ["u"]}, r"'n' has '1e31' in row 1"),
    ],
)
def test_another_tables_rows_are_refused(columns: dict[str, list[str]], message: str) -> None:
    coding, _ = coding_of(Table("t", GOOD), "y")
    with pytest.raises(DataError, match=message):
        coding.inputs(Table("o.csv", columns))


@pytest.mark.parametrize(
    "broken",
    [
        None, {}, {"target": "y", "classes": None, "columns": []},
        {"target": "y", "classes": None, "columns": [{"name": "a", "mean": 0, "std": 0}]},
        {"target": "y", "classes": None, "columns": [{"name": "y", "mean": 0, "std": 1}]},
        {"target": "y", "classes": ["k", "k"], "columns": [{"name": "a", "mean": 0, "std": 1}]},
        {"target": 3, "classes": None, "columns": [{"name": "a", "categories": ["k"]}]},
    ],
)  # fmt: skip
def test_a_damaged_coding_is_refused(broken: object) -> None:
    with pytest.raises(CheckpointError, match="of its table is damaged"):
        Coding.from_json(broken)
    assert Numbers("a", 0.0, 1.0).width == 1


def test_parquet_is_read_as_csv_is(tmp_path: Path, table: Table) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs bayesify[tables]")
    from pyarrow import parquet

    columns = {"size": SIZES, "city": CITIES, "price": [1.5, None, 3.5, 1.0]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    found = read_table(tmp_path / "t.parquet")
    expected, _ = coding_of(table, "price")
    assert torch.equal(expected.inputs(found), expected.inputs(table))
    with pytest.raises(DataError, match="'price' has no value in 1 of 4 rows"):
        expected.targets(found)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_table(tmp_path / "t.parquet")


def test_parquet_without_pyarrow_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"")
    with pytest.raises(ArgumentError, match=r"pip install 'bayesify\[tables\]'"):
        read_table(tmp_path / "t.parquet")


def test_the_network_of_a_table_is_built_by_its_name() -> None:
    spec = ModelSpec("bayesify:mlp", model_args={"inputs": 3, "hidden": [5, 4], "outputs": 2})
    model = ModelSpec.from_json(spec.to_json()).build()
    shapes = [tuple(p.shape) for p in model.parameters()]
    assert shapes == [(5, 3), (5,), (4, 5), (4,), (2, 4), (2,)]
    w1, b1, w2, b2, w3, b3 = model.parameters()
    x = torch.randn(6, 3)
    expected = ((x @ w1.T + b1).clamp(min=0) @ w2.T + b2).clamp(min=0) @ w3.T + b3
    torch.testing.assert_close(model(x), expected)
    for wrong in ({}, {"inputs": 3, "hidden": [], "outputs": 1}, {"hidden": "9", "code": 1}):
        with pytest.raises(ModelError):
            create_model("bayesify:mlp", model_args=wrong)
    with pytest.raises(ModelError, match="only bayesify:mlp"):
        create_model("bayesify:resnet")
    with pytest.raises(ModelError, match="inputs"):
        mlp(0, [3], 1)
