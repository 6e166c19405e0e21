"""Figures, page and commands: files from runs of seconds, and numbers that are in them."""

from __future__ import annotations

import importlib.util
import json
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from bayesify import ArgumentError
from byov_small import CONFIG, small_run
from recipes.byov.cli import app
from recipes.byov.config import UNSEEN_SHIFTS
from recipes.byov.evaluation.protocol import EvalSettings
from recipes.byov.evaluation.runs import open_run
from recipes.byov.evaluation.uncertainty import UncertaintySettings
from recipes.byov.iterative import IterativeSettings, iterative_pruning
from recipes.byov.paper import figures, plots, pruning_tables, tables, trajectories
from recipes.byov.paper.page import number
from recipes.byov.paper.results import Estimate, RunRecord, distinct, read_record
from recipes.byov.train import train

HEAD = EvalSettings(num_samples=2, epochs=4)
UNCERTAINTY = UncertaintySettings(
    spread_draws=4, pool=12, most=4, bootstraps=5, latent_draws=3, noises=(0.0, 0.5), images=8,
    shifted=("shear",),
)  # fmt: skip
CELLS: dict[str, dict[str, Any]] = {
    "byol": {"conversion": "none"},
    "zero": {"logvar_lr_ratio": 40.0},
    "seen": {"logvar_lr_ratio": 40.0, "skip": UNSEEN_SHIFTS},
    "sigma": {"logvar_lr_ratio": 40.0, "prior": "teacher"},
    "supervised": {"logvar_lr_ratio": 40.0, "objective": "supervised"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, changes in CELLS.items():
        run = small_run(tmp_path_factory.mktemp(name), eval_every=0)
        train(replace(CONFIG, **{"logvar_lr_ratio": 40.0, **changes}), run)
        made[name] = run.out
    return made


@pytest.fixture(scope="module")
def made(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every figure of all runs."""
    out = tmp_path_factory.mktemp("figures")
    rounds = IterativeSettings(rounds=2, epochs=0.1, sparsities=(0.5,))
    iterative_pruning(open_run(folders["zero"], device="cpu"), rounds, head=HEAD)
    figures.make(
        list(folders.values()),
        out,
        device="cpu",
        head=HEAD,
        uncertainty=UNCERTAINTY,
        sparsities=(0.0, 0.5),
    )
    return out


def test_every_figure_is_a_picture_twice_with_its_numbers(made: Path) -> None:
    for name in figures.NAMES:
        value = json.loads((made / f"{name}.json").read_text())
        assert {"title", "runs", "stamp"} <= value.keys()
        assert {"step", "seed", "logvar_travel", "logvar_spread", "commit"} <= value["runs"][
            0
        ].keys()
        if name in plots.DRAWN:
            with Image.open(made / f"{name}.png") as image:
                assert min(image.size) > 300
            assert ET.parse(made / f"{name}.svg").getroot().tag.endswith("svg")


def test_the_page_holds_every_figure_and_claim_and_is_alone(made: Path) -> None:
    text = (made / "index.html").read_text()
    for figure in figures.FIGURES:
        assert figure.title in text
    assert text.count("data:image/svg+xml") == len(plots.DRAWN)
    assert "+2.83" in text  # the paper's
    assert "n &lt; 3" in text  # one seed is no claim
    assert "<script" not in text
    assert "default-src 'none'" in text


def test_what_was_not_run_is_said(folders: dict[str, Path], tmp_path: Path, made: Path) -> None:
    figures.make([folders["byol"]], tmp_path, measured=True)
    text = (tmp_path / "index.html").read_text()
    assert "not run" in text
    assert not (tmp_path / "fig4.png").exists()
    assert number(None) == "not run"
    assert number(Estimate(1.234, 0.5, 2)) == "1.23"
    assert number(Estimate(1.234, 0.5, 3)) == "1.23 ± 0.50"


def test_figures_are_the_same_files_again(
    folders: dict[str, Path], made: Path, tmp_path: Path
) -> None:
    figures.make(list(folders.values()), tmp_path, only=["fig4", "fig5"], measured=True)
    for name in ("fig4.svg", "fig5.svg", "fig4.json"):
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes()


def test_a_run_that_is_given_twice_is_one_seed(
    folders: dict[str, Path], made: Path, tmp_path: Path
) -> None:
    twice = [*folders.values(), folders["zero"], folders["byol"]]
    figures.make(twice, tmp_path, only=["fig4", "table1"], measured=True)
    for name in ("fig4.json", "table1.json"):
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes()


def test_of_two_cards_of_one_run_that_with_more_stays() -> None:
    def record(seed: int, *measured: str, data: str = "a") -> RunRecord:
        facts = {"data": data}
        return RunRecord(replace(CONFIG, seed=seed), facts, [], {name: {} for name in measured})

    first, more, other, elsewhere = (
        record(0, "eval"), record(0, "eval", "prune"), record(1), record(0, data="b")
    )  # fmt: skip
    assert distinct([first, more, other, elsewhere]) == [more, other, elsewhere]
    assert distinct([more, first]) == [more]


def test_a_posterior_that_stands_still_is_stamped(folders: dict[str, Path], made: Path) -> None:
    records = [read_record(folder) for folder in folders.values()]
    still = [replace(c, facts={**c.facts, "converged": False}) for c in records]
    moved = [replace(c, facts={**c.facts, "converged": True}) for c in records]
    for build in (pruning_tables.fig4, trajectories.fig3, tables.fig1b):
        found, clean = build(still), build(moved)
        assert found is not None
        assert clean is not None
        assert found["stamp"] == "posterior not converged"
        assert clean["stamp"] is None


def test_a_panel_is_stamped_for_its_own_posterior_only(
    folders: dict[str, Path], tmp_path: Path, made: Path
) -> None:
    records = {name: read_record(folder) for name, folder in folders.items()}
    one = [replace(c, facts={**c.facts, "converged": n != "sigma"}) for n, c in records.items()]
    found = pruning_tables.fig4(one)
    assert found is not None
    assert found["stamp"] is None
    stamps = {panel["run"]: panel["stamp"] for panel in found["panels"]}
    assert sorted(map(str, stamps.values())) == ["None", "None", "posterior not converged"]
    plots.draw("fig4", found, tmp_path)
    drawn = (tmp_path / "fig4.svg").read_text()
    assert drawn.count("posterior not converged") == 1
    assert "POSTERIOR NOT CONVERGED" not in drawn


def test_the_stamp_is_in_the_picture(folders: dict[str, Path], tmp_path: Path, made: Path) -> None:
    numbers = tables.fig1b([read_record(folder) for folder in folders.values()])
    assert numbers is not None
    plots.draw("fig1b", {**numbers, "stamp": "posterior not converged"}, tmp_path)
    assert "POSTERIOR NOT CONVERGED" in (tmp_path / "fig1b.svg").read_text()
    plots.draw("fig1b", {**numbers, "stamp": None}, tmp_path)
    assert "POSTERIOR NOT CONVERGED" not in (tmp_path / "fig1b.svg").read_text()


def test_trajectories_are_those_of_the_log(folders: dict[str, Path], made: Path) -> None:
    record = read_record(folders["zero"])
    numbers = trajectories.fig3([record])
    assert numbers is not None
    column = numbers["columns"]["N(0, I)"]
    epochs = [line for line in record.log if line["kind"] == "epoch"]
    assert column["epochs"] == [1, 2, 3]
    for tensor in column["tensors"]:
        expected = [e["layers"][tensor["name"]]["mean_snr"] for e in epochs]
        assert tensor["mean_snr"] == expected
    parts = {t["name"]: (t["part"], t["kind"]) for t in column["tensors"]}
    assert parts["encoder.blocks.0.mlp.fc1.weight"] == ("encoder", "matrix")
    assert parts["predictor.1.weight"] == ("predictor", "vector")


def test_trajectories_are_of_a_seed_whose_posteriors_moved(
    folders: dict[str, Path], made: Path, tmp_path: Path
) -> None:
    def record(of: str, seed: int, *, moved: bool) -> RunRecord:
        found = read_record(folders[of])
        facts = {**found.facts, "converged": moved}
        return replace(found, config=replace(found.config, seed=seed), facts=facts)

    records = [record("zero", 0, moved=True), record("sigma", 0, moved=False),
             record("zero", 1, moved=False), record("sigma", 1, moved=True),
             record("zero", 2, moved=True), record("sigma", 2, moved=True)]  # fmt: skip

    def seeds(given: list[RunRecord]) -> list[tuple[int, str | None]]:
        found = trajectories.fig3(given)
        assert found is not None
        return [(column["seed"], column["stamp"]) for column in found["columns"].values()]

    assert seeds(records) == [(2, None), (2, None)]
    assert seeds(records[:4]) == [(0, None), (0, "posterior not converged")]
    assert seeds(records[1:3]) == [(1, "posterior not converged"), (0, "posterior not converged")]
    one = trajectories.fig3(records[:4])
    assert one is not None
    assert one["stamp"] is None
    plots.draw("fig3", one, tmp_path)
    drawn = (tmp_path / "fig3.svg").read_text()
    assert drawn.count("posterior not converged") == 1
    assert "POSTERIOR NOT CONVERGED" not in drawn


@pytest.mark.parametrize("priors", [1, 2, 3])
def test_the_key_of_the_trajectories_is_inside_the_picture(priors: int) -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    tensors = [{"part": "encoder", "kind": "matrix", "mean_snr": [1.0, 2.0], "max_snr": [2.0, 3.0]}]
    shown = {"epochs": [1, 2], "seed": 0, "tensors": tensors, "stamp": None}
    figure = figure_module.Figure(layout="constrained")
    plots.DRAWN["fig6"](figure, {"columns": dict.fromkeys(map(str, range(priors)), shown)})
    figure.draw_without_rendering()
    [key] = figure.legends
    box = key.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


def test_table_1_has_the_papers_rows_and_ours(folders: dict[str, Path], made: Path) -> None:
    rows = tables.table1([read_record(folder) for folder in folders.values()])["rows"]
    assert [r["paper_top1"] for r in rows][:4] == [73.68, 73.97, 69.73, 73.62]
    byol = next(r for r in rows if r["conversion"] == "none")
    record = read_record(folders["byol"])
    row = record.row("at the means")
    assert row is not None
    assert byol["top1"].mean == pytest.approx(100 * row["top1"])
    assert next(r for r in rows if r["conversion"] == "no-conv")["top1"] is None


def test_an_unknown_figure_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="fig1b, fig1b-seen, fig2"):
        figures.make([folders["byol"]], tmp_path, only=["fig9"])


def _run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80"})


def test_without_the_papers_room_figures_say_what_is_missing(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "recipes.byov.paper", None)  # as in a wheel
    found = _run("figures", str(folders["byol"]), "--out", str(tmp_path / "figures"))
    assert found.exit_code == 2
    assert "clone it" in " ".join(found.stderr.split())
    assert not (tmp_path / "figures").exists()


def test_without_the_papers_room_pruning_goes_on(
    folders: dict[str, Path], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "recipes.byov.paper", None)
    options = ("--sparsity", "0", "--sparsity", "0.5", "--epochs", "4", "--device", "cpu")
    out = tmp_path / "figures"
    found = _run("prune", str(folders["byol"]), *options, "--out", str(out), "--scope", "tensor")
    assert found.exit_code == 0, found.output
    assert "top-1 in %, pruned per tensor" in found.stdout
    assert "No figure was drawn" in found.stderr
    assert not out.exists()


def test_what_draws_is_asked_for_before_anything_is_measured(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
    )
    monkeypatch.setattr(figures, "open_run", pytest.fail)
    with pytest.raises(ArgumentError, match=r"matplotlib: pip install 'bayesify\[report\]'"):
        figures.make([folders["byol"]], tmp_path)


def test_eval_prints_a_table_of_80_columns(folders: dict[str, Path], made: Path) -> None:
    options = ("--num-samples", "2", "--epochs", "4", "--device", "cpu")
    found = _run("eval", str(folders["zero"]), str(folders["byol"]), *options)
    assert found.exit_code == 0, found.output
    tables = [line for line in found.output.splitlines() if line.startswith(("at the", "MC", " "))]
    assert len(tables) >= 4
    assert max(map(len, tables)) <= 80
    assert "MC average" in found.output


def test_eval_as_json_is_what_lies_in_the_folder(folders: dict[str, Path], made: Path) -> None:
    found = _run("eval", str(folders["byol"]), "--protocol", "knn", "--json", "--device", "cpu")
    assert found.exit_code == 0, found.output
    [value] = json.loads(found.stdout)
    assert value == json.loads((folders["byol"] / "results" / "eval-knn.json").read_text())


def test_prune_writes_its_figure(folders: dict[str, Path], tmp_path: Path, made: Path) -> None:
    options = ("--sparsity", "0", "--sparsity", "0.5", "--epochs", "4", "--device", "cpu")
    found = _run(
        "prune",
        str(folders["zero"]),
        "--scope",
        "tensor",
        "--scope",
        "channels",
        *options,
        "-o",
        str(tmp_path),
    )
    assert found.exit_code == 0, found.output
    assert "SNR, shuffled" in found.output
    tables = [line for line in found.stdout.splitlines() if str(tmp_path.parent) not in line]
    assert len(tables) > 4
    assert max(map(len, tables)) <= 80
    assert (tmp_path / "fig4.png").exists()


def test_prune_in_rounds_writes_its_figure(folders: dict[str, Path], tmp_path: Path) -> None:
    options = ("--round-epochs", "0.1", "--sparsity", "0.5", "--epochs", "4", "--device", "cpu")
    found = _run("prune", str(folders["byol"]), "--iterative", "1", *options, "-o", str(tmp_path))
    assert found.exit_code == 0, found.output
    assert "one shot, then trained" in found.output
    tables = [line for line in found.stdout.splitlines() if str(tmp_path.parent) not in line]
    assert len(tables) > 5
    assert max(map(len, tables)) <= 80
    assert (tmp_path / "fig4rounds.png").exists()
    (folders["byol"] / "results" / "iterative.json").unlink()


@pytest.mark.parametrize(
    "options", [("--iterative", "2", "--scope", "global"), ("--round-epochs", "2")]
)
def test_prune_refuses_options_that_have_no_use(
    folders: dict[str, Path], options: tuple[str, ...]
) -> None:
    assert _run("prune", str(folders["byol"]), *options).exit_code == 2


def test_figures_refuses_two_wishes(folders: dict[str, Path]) -> None:
    found = _run("figures", str(folders["byol"]), "--all", "--only", "fig4")
    assert found.exit_code == 2
