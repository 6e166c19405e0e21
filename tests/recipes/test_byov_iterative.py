"""Pruning in rounds of training: its steps are those of training, its masks are held."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesify as bb
from bayesify import ArgumentError
from bayesify.optim import warmup_cosine
from byov_small import CONFIG, small_run, stop_at
from recipes.byov import iterative
from recipes.byov.evaluation import linear, protocol, pruning
from recipes.byov.evaluation.runs import Run, open_run
from recipes.byov.iterative import DENSE, LONGER, ONCE, ROUNDS, THEN, IterativeSettings
from recipes.byov.paper.pruning_tables import fig4rounds
from recipes.byov.paper.results import RunRecord
from recipes.byov.train import train

HEAD = protocol.EvalSettings(num_samples=0, epochs=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = small_run(tmp_path_factory.mktemp("byov"), eval_every=0)
    train(replace(CONFIG, logvar_lr_ratio=40.0), run)
    return run.out


@pytest.fixture
def byov(folder: Path) -> Run:
    return open_run(folder, device="cpu")


@pytest.mark.parametrize(
    "changes", [{"prior": "teacher", "clip_norm": 0.1}, {"conversion": "none"}]
)
def test_a_round_without_pruning_is_what_training_would_have_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    constant = {"beta_start": 0.5, "beta_end": 0.5, "beta_shape": "constant", "tau_end": 0.9}
    config = replace(CONFIG, epochs=4, **constant, **changes)  # type: ignore[arg-type]
    run = small_run(tmp_path, eval_every=0, accumulate=2)
    train(config, run, watcher=stop_at(9))
    factors = [warmup_cosine(step, 3, 12) for step in range(9, 12)]
    monkeypatch.setattr(iterative, "warmup_cosine", lambda i, *_: factors[i])
    mine = iterative.gone_on(open_run(run.out, device="cpu"), None, [0.0], 3, 1.0)
    train(config, run, resume=True)
    whole = dict(open_run(run.out, device="cpu").model.named_parameters())
    found = dict(mine.model.named_parameters())
    assert [name for name in whole if not torch.equal(whole[name], found[name])] == []


def test_masks_are_of_the_lowest_snr_and_are_held_from_round_to_round(
    byov: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {n: p.detach().clone() for n, p in byov.encoder.named_parameters()}
    seen: list[dict[str, Tensor]] = []

    def spy(encoder: nn.Module, share: float, **options: Any) -> nn.Module:
        pruned = bb.prune_(encoder, share, **options)
        seen.append({n: p.detach() == 0 for n, p in pruned.named_parameters()})
        return pruned

    monkeypatch.setattr(iterative, "prune_", spy)
    schedule = bb.sparsity_schedule(0.8, 3)
    end = iterative.gone_on(byov, "SNR", schedule, 2, 1.0).encoder
    names = pruning.matrices(end)
    assert len(names) == 5
    for name in names:
        snr = before[name].abs() / (before[f"{name}_logvar"] / 2).exp()
        first = seen[0][name]
        assert int(first.sum()) == round(schedule[0] * first.numel())
        assert snr[first].max() <= snr[~first].min()
        for earlier, later in itertools.pairwise(seen):
            assert not (earlier[name] & ~later[name]).any()
        last = end.get_parameter(name) == 0
        assert torch.equal(last, seen[-1][name])
        assert int(last.sum()) == round(0.8 * last.numel())
        kept = ~last
        assert not torch.equal(end.get_parameter(name)[kept], before[name][kept])  # trained
    assert torch.equal(byov.encoder.get_parameter(names[0]), before[names[0]])  # the run is whole
    assert not (end.pos_embed == 0).any()


def test_arms_are_those_of_the_other_measurements(byov: Run) -> None:
    settings = IterativeSettings(rounds=1, epochs=0.7, sparsities=(0.5,))
    made = iterative.iterative_pruning(byov, settings, head=HEAD)
    path = byov.folder / "results" / "iterative.json"
    assert made == json.loads(path.read_text())
    arms = {(a["way"], a["criterion"]): a for a in made["numbers"]["arms"]}
    assert set(arms) == {(DENSE, None), (LONGER, None)} | {
        (way, by) for way in (ONCE, THEN, ROUNDS) for by in ("SNR", "magnitude")
    }
    assert {key[0]: a["steps"] for key, a in arms.items()} == {
        DENSE: 0, ONCE: 0, LONGER: 2, THEN: 2, ROUNDS: 2,
    }  # fmt: skip
    head, _ = linear.frozen_head(byov, HEAD)
    for by in ("SNR", "magnitude"):
        points = pruning.curve(byov, head, by, sparsities=(0.0, 0.5))
        for point, arm in zip(points, (arms[DENSE, None], arms[ONCE, by]), strict=True):
            assert arm["top1"] == pytest.approx(point["top1"])
            assert arm["nll"] == pytest.approx(point["nll"], rel=1e-5)
        numbers = ("top1", "nll", "anew", "schedule")
        assert [arms[THEN, by][k] for k in numbers] == [arms[ROUNDS, by][k] for k in numbers]
        assert arms[THEN, by]["nll"] != arms[ONCE, by]["nll"]
    assert arms[DENSE, None]["anew"] == pytest.approx(arms[DENSE, None]["top1"])


def test_byol_is_pruned_by_magnitude_alone_and_the_twin_not_at_all(tmp_path: Path) -> None:
    runs = {}
    kinds = {"byol": {"conversion": "none"}, "supervised": {"objective": "supervised"}}
    for name, changes in kinds.items():
        (tmp_path / name).mkdir()
        run = small_run(tmp_path / name, eval_every=0)
        train(replace(CONFIG, epochs=2, **changes), run)  # type: ignore[arg-type]
        runs[name] = open_run(run.out, device="cpu")
    settings = IterativeSettings(rounds=2, epochs=0.1, sparsities=(0.5,))
    arms = iterative.iterative_pruning(runs["byol"], settings, head=HEAD)["numbers"]["arms"]
    assert {a["criterion"] for a in arms} == {None, "magnitude"}
    assert {a["steps"] for a in arms} == {0, 2}
    with pytest.raises(ArgumentError, match="supervised baseline"):
        iterative.iterative_pruning(runs["supervised"], settings, head=HEAD)


@pytest.mark.parametrize(
    "changes",
    [{"rounds": 0}, {"epochs": 0.0}, {"lr_ratio": 0.0}, {"sparsities": ()}, {"sparsities": (1.0,)}],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(changes))):
        IterativeSettings(**changes)


def test_gains_are_paired_by_run() -> None:
    def record(seed: int, tops: dict[tuple[str, str | None], float]) -> RunRecord:
        arms = [
            {"way": way, "criterion": by, "sparsity": 0.9 if by else 0.0, "top1": t, "anew": t / 2}
            for (way, by), t in tops.items()
        ]
        result = {"settings": {"steps": 5, "rounds": 4}, "numbers": {"arms": arms}}
        return RunRecord(replace(CONFIG, seed=seed), {"converged": True}, [], {"iterative": result})

    both: list[tuple[str, str | None]] = [
        (w, by) for w in (ONCE, THEN, ROUNDS) for by in ("SNR", "magnitude")
    ]
    first = dict(zip(both, (0.3, 0.2, 0.6, 0.5, 0.7, 0.5), strict=True))
    second = dict(zip(both, (0.2, 0.2, 0.8, 0.5, 0.7, 0.7), strict=True))
    numbers = fig4rounds([record(0, {(DENSE, None): 0.9, **first}), record(1, second)])
    assert numbers is not None
    [panel] = numbers["panels"]
    assert (panel["steps"], panel["n"]) == (20, 2)
    dense = next(a for a in panel["arms"] if a["way"] == DENSE)
    assert (dense["top1"].mean, dense["top1"].n) == (pytest.approx(90), 1)
    gains = {g["difference"]: g for g in panel["gains"]}
    rounds = gains["SNR: iterative over one shot, then trained"]
    assert rounds["top1"].mean == pytest.approx((10 - 10) / 2, abs=1e-9)
    assert gains["iterative: SNR over magnitude"]["top1"].mean == pytest.approx((20 + 0) / 2)
    assert gains["iterative: SNR over magnitude"]["anew"].mean == pytest.approx(5)
    assert fig4rounds([]) is None
