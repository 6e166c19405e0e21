"""Measurements of a run against definitions: probes, draws, pruning, augmentations, records."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

import bayesify as bb
from bayesify import ArgumentError, corruptions
from bayesify.metrics import classification_metrics, entropy
from byov_small import CONFIG, small_run
from recipes.byov.config import UNSEEN_SHIFTS, BYOVConfig
from recipes.byov.data.batches import eval_batches, train_views
from recipes.byov.data.training import configs_of
from recipes.byov.data.views import TwoViews
from recipes.byov.evaluation import evaluate, linear, ood, protocol, pruning, runs, uncertainty
from recipes.byov.evaluation.features import features_of
from recipes.byov.evaluation.monte_carlo import (
    classify,
    drawn_probs,
    labels_of,
    moments,
    outputs,
)
from recipes.byov.evaluation.runs import Run, open_run
from recipes.byov.model import Student
from recipes.byov.optimizer import make_optimizer
from recipes.byov.paper import gradients, tables
from recipes.byov.paper.claims import CLAIMS, by_beta, judge
from recipes.byov.paper.correlations import correlations, spearman
from recipes.byov.paper.page import noise_levels, rises
from recipes.byov.paper.results import RunRecord, against, estimate, families, paper_like
from recipes.byov.presets import PRESETS
from recipes.byov.runtime.seeds import Stream, seed_of
from recipes.byov.train import train

HEAD = protocol.EvalSettings(num_samples=3, epochs=5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each kind, of seconds."""
    made = {}
    for name, config in {
        "byov": replace(CONFIG, logvar_lr_ratio=40.0),
        "byol": replace(CONFIG, conversion="none"),
        "supervised": replace(CONFIG, objective="supervised"),
    }.items():
        run = small_run(tmp_path_factory.mktemp(name), eval_every=0)
        train(config, run)
        made[name] = run.out
    return made


@pytest.fixture
def byov(folders: dict[str, Path]) -> Run:
    return open_run(folders["byov"], device="cpu")


# -- runs ----------------------------------------------------------------------------------------


def test_a_run_opens_as_it_was_exported(folders: dict[str, Path], byov: Run) -> None:
    student = load_file(folders["byov"] / "student.safetensors")
    plain = bb.to_deterministic(byov.encoder).state_dict()
    assert plain.keys() == student.keys()
    assert all(torch.equal(plain[k], student[k]) for k in student)
    teacher = load_file(folders["byov"] / "teacher.safetensors")
    assert byov.teacher is not None
    own = byov.teacher.state_dict()
    assert all(torch.equal(own[f"encoder.{k}"], teacher[k]) for k in teacher)
    assert (byov.step, byov.steps) == (9, 9)


def test_spread_is_the_median_over_matrices(byov: Run) -> None:
    found = [
        p.logvar.detach().std(correction=0) for p in bb.posteriors(byov.model) if p.mean.ndim > 1
    ]
    ordered = sorted(float(v) for v in found)
    middle = len(ordered) // 2
    expected = (ordered[middle] + ordered[~middle]) / 2
    assert runs.logvar_spread(byov.model) == pytest.approx(expected)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="holds no run"):
        open_run(tmp_path)


def test_the_supervised_classifier_is_not_measured_on_other_classes(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    for split in ("train", "test"):
        for index, name in enumerate(("golf ball", "tench")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(2):
                image = Image.new("L", (28, 28), 40 + 130 * index + number)
                image.save(tmp_path / split / name / f"{number}.png")
    with pytest.raises(ArgumentError, match=r"has the classes 0, 1, and .* has golf ball, tench"):
        open_run(folders["supervised"], data=str(tmp_path), device="cpu")
    run = open_run(folders["byov"], data=str(tmp_path), device="cpu")  # its probe learns them
    assert run.source.classes == ("golf ball", "tench")


def test_a_run_of_byol_with_batchnorm_opens(tmp_path: Path) -> None:
    small = {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4]}
    config = replace(
        CONFIG, conversion="none", encoder="resnet18", encoder_args=small, image_size=32, epochs=2
    )
    run = small_run(tmp_path, eval_every=0)
    train(config, run)
    student = load_file(run.out / "student.safetensors")
    state = open_run(run.out, device="cpu").encoder.state_dict()
    assert any("running_mean" in name for name in student)
    assert all(torch.equal(state[name], value) for name, value in student.items())


@pytest.mark.parametrize("objective", ["byol", "supervised"])
def test_batchnorm_statistics_of_a_bayesian_run_are_those_of_its_views(
    tmp_path: Path, objective: Any
) -> None:
    """As those of BYOL are, which has them from its training: a control must not differ in it."""
    small = {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4]}
    config = replace(
        CONFIG, encoder="resnet18", encoder_args=small, image_size=32, objective=objective
    )
    run = small_run(tmp_path, eval_every=0)
    train(config, run)
    opened = open_run(run.out, device="cpu")
    exported = load_file(run.out / "student.safetensors")
    assert torch.equal(opened.encoder.bn1.running_mean, exported["bn1.running_mean"])

    def mean_of(images: Tensor) -> Tensor:
        with torch.no_grad():
            return F.conv2d(images, opened.encoder.conv1.weight, stride=2, padding=3).mean(
                (0, 2, 3)
            )

    source, views = opened.source, TwoViews(*configs_of(config, opened.source))
    [batch] = train_views(source, batch_size=48, seed=config.seed, epoch=config.epochs, views=views)
    seen = batch[:2] if objective == "byol" else batch[:1]
    torch.testing.assert_close(
        opened.encoder.bn1.running_mean, torch.stack([mean_of(view) for view in seen]).mean(0)
    )
    [(plain, _)] = eval_batches(source, "train", batch_size=48)
    assert (opened.encoder.bn1.running_mean - mean_of(plain)).norm() > 0.01


def test_a_result_is_made_once_and_again_for_other_settings(byov: Run) -> None:
    calls: list[int] = []

    def made() -> dict[str, Any]:
        calls.append(1)
        return {"value": float("nan"), "list": torch.ones(2)}

    first = runs.stored(byov, "trial", {"k": 1}, made)
    assert runs.stored(byov, "trial", {"k": 1}, made) == first
    assert len(calls) == 1
    assert first["numbers"] == {"value": None, "list": [1.0, 1.0]}
    runs.stored(byov, "trial", {"k": 2}, made)
    assert len(calls) == 2
    runs.result_path(byov.folder, "trial").unlink()


def test_weight_decay_with_a_posterior_warns_and_spares_the_logvars(byov: Run) -> None:
    config = replace(CONFIG, weight_decay=0.1)
    with pytest.warns(UserWarning, match="appendix C"):
        optimizer = make_optimizer(byov.model, config)
    decayed = {g["name"]: g["weight_decay"] for g in optimizer.param_groups if g["weight_decay"]}
    assert decayed
    assert "logvars" not in decayed


def test_a_run_with_sigmas_of_each_tensor_is_measured_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, epochs=2, parameterization="softplus", relative_std=0.01)
    run = small_run(tmp_path, eval_every=0)
    train(config, run)
    opened = open_run(run.out, device="cpu")
    last = [line for line in opened.log if line["kind"] == "step"][-1]
    travel = opened.facts()["logvar_travel"]
    assert travel == pytest.approx(last["logvar_travel"], rel=1e-6)
    assert 0 < travel <= last["logvar_reach"]
    name = "blocks.0.mlp.fc1.weight"
    mean, rho = (opened.encoder.get_parameter(n).detach() for n in (name, f"{name}_rho"))
    snr = mean.abs() / torch.log1p(rho.exp())
    assert torch.allclose(pruning.scores_of(opened.encoder, "SNR")[name], snr, rtol=1e-4)
    monkeypatch.setattr(gradients, "ESTIMATORS", ("weight",))
    [row] = gradients.gradient_noise(opened, batch_sizes=(8,), draws=2)["numbers"]["rows"]
    assert row["variance"] > 0
    loaded = bb.load(run.out / "encoder.safetensors")
    mine = bb.stddev(opened.encoder)
    assert all(torch.equal(std, bb.stddev(loaded)[name]) for name, std in mine.items())


# -- predictions ---------------------------------------------------------------------------------


def test_outputs_are_those_of_the_encoder_on_every_image(byov: Run) -> None:
    found = outputs(byov, lambda x: features_of(byov.model, x))
    images = torch.cat([x for x, _ in eval_batches(byov.source, "test", batch_size=5)])
    with torch.no_grad():
        assert torch.allclose(found, byov.encoder(images), atol=1e-6)


def test_the_average_is_that_of_the_softmaxes_of_single_draws(byov: Run) -> None:
    head, _ = linear.frozen_head(byov, HEAD)
    made = evaluate.evaluate(byov, "linear", HEAD)
    row = next(r for r in made["numbers"]["rows"] if r["prediction"] == protocol.AVERAGE)
    images = torch.cat([x for x, _ in eval_batches(byov.source, "test", batch_size=999)])
    total = torch.zeros(len(images), 2, dtype=torch.float64)
    with torch.no_grad():
        for draw in range(HEAD.num_samples):
            with bb.one_draw(byov.model, seed_of(Stream.MEASURED, HEAD.seed, draw)):
                total += head(byov.encoder(images)).double().softmax(-1)
    expected = classification_metrics(total / HEAD.num_samples, labels_of(byov))
    assert row["nll"] == pytest.approx(expected["nll"], rel=1e-4)
    assert row["top1"] == expected["accuracy"]


def test_all_batches_of_a_draw_have_the_same_weights(
    byov: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, _ = linear.frozen_head(byov, HEAD)
    [whole] = drawn_probs(byov, head, 1)
    monkeypatch.setattr("recipes.byov.evaluation.monte_carlo._BATCH", 3)
    [parts] = drawn_probs(byov, head, 1)
    assert torch.allclose(whole, parts, atol=1e-6)
    means = outputs(byov, classify(byov, head))
    assert not torch.allclose(whole, means, atol=1e-4)


def test_moments_are_those_of_the_stack() -> None:
    values = torch.randn(7, 3, 2)
    found = moments(values)
    assert torch.allclose(found.mean, values.double().mean(0))
    assert torch.allclose(found.std(1), values.double().std(0))


def test_every_protocol_gives_metrics(folders: dict[str, Path]) -> None:
    run = open_run(folders["byol"], device="cpu")
    quick = replace(HEAD, finetune_epochs=1)
    for name in ("linear", "knn", "semi", "finetune"):
        made = evaluate.evaluate(run, name, quick)
        assert made["numbers"]["rows"]
        for row in made["numbers"]["rows"]:
            assert 0 <= row["top1"] <= row["top5"] <= 1
            parts = 1 - 0.5 - row["resolution"] + row["reliability"] + row["residual"]
            assert row["brier"] == pytest.approx(parts, abs=1e-6)  # two classes, equally frequent
    names = [r["prediction"] for r in evaluate.evaluate(run, "linear", quick)["numbers"]["rows"]]
    assert names == [protocol.MEANS, protocol.SCALED, protocol.TEACHER]
    with pytest.raises(ArgumentError, match="protocol"):
        evaluate.evaluate(run, "zero-shot", quick)  # type: ignore[arg-type]


def test_ood_images_equal_to_the_test_images_are_not_told_apart(byov: Run) -> None:
    rows = ood.ood_detection(byov, [byov.source], HEAD)["numbers"]["rows"]
    assert {row["auroc"] for row in rows} == {0.5}
    assert {row["prediction"] for row in rows} == {
        protocol.MEANS,
        protocol.SCALED,
        protocol.AVERAGE,
    }


def test_ood_images_are_scored_by_the_runs_own_classifier(byov: Run, tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (20, 28, 28, 1), dtype=torch.uint8)
    path = tmp_path / "noise.npz"
    np.savez(path, images=noise.numpy())
    other = ood.open_ood(byov, str(path))
    assert (other.mean, other.std) == (byov.source.mean, byov.source.std)
    rows = ood.ood_detection(byov, [other], HEAD)["numbers"]["rows"]
    row = next(r for r in rows if (r["prediction"], r["score"]) == (protocol.MEANS, "entropy"))
    head, _ = linear.frozen_head(byov, HEAD)
    inside = entropy(outputs(byov, classify(byov, head)))
    outside = entropy(outputs(replace(byov, source=other), classify(byov, head), "train"))
    wins = (outside[:, None] > inside).double() + 0.5 * (outside[:, None] == inside)
    assert row["auroc"] == pytest.approx(float(wins.mean()), abs=1e-5)
    assert row["images"] == 20


def test_a_share_of_the_labels_is_the_same_of_every_class() -> None:
    labels = torch.arange(300) % 3
    rows = linear.stratified(labels, 0.1, seed=0)
    assert torch.bincount(labels[rows]).tolist() == [10, 10, 10]
    assert not torch.equal(rows, linear.stratified(labels, 0.1, seed=1))


# -- pruning -------------------------------------------------------------------------------------


def test_shuffled_sigmas_are_the_same_ones_elsewhere() -> None:
    std = torch.rand(20, 30)
    moved = pruning.shuffled(std, 3)
    assert not torch.equal(moved, std)
    assert torch.equal(moved.flatten().sort().values, std.flatten().sort().values)
    mean = torch.randn(20, 30)
    assert torch.allclose(pruning.CRITERIA["SNR, sigma shuffled"](mean, std, 3), mean.abs() / moved)


def test_scores_of_a_run_are_the_definitions(byov: Run) -> None:
    mean = dict(byov.encoder.named_parameters())["blocks.0.attn.qkv.weight"]
    logvar = dict(byov.encoder.named_parameters())["blocks.0.attn.qkv.weight_logvar"]
    std = (logvar / 2).exp()
    for name, expected in {
        "SNR": mean.abs() / std, "magnitude": mean.abs(), "1 / sigma": 1 / std,
        "magnitude x mean 1 / sigma": mean.abs() * (1 / std).mean(),
    }.items():  # fmt: skip
        found = pruning.scores_of(byov.encoder, name)["blocks.0.attn.qkv.weight"]
        assert torch.allclose(found, expected, rtol=1e-5), name


def _points(run: Run, criterion: str, **changes: Any) -> list[dict[str, float]]:
    head, _ = linear.frozen_head(run, HEAD)
    return pruning.curve(run, head, criterion, sparsities=(0.0, 0.5, 0.9), **changes)


def test_snr_prunes_as_magnitude_where_sigma_is_one_number(byov: Run) -> None:
    with torch.no_grad():
        for name, parameter in byov.model.named_parameters():
            if name.endswith("_logvar"):
                parameter.fill_(-7.0)
    for scope in ("tensor", "global"):
        assert _points(byov, "SNR", scope=scope) == _points(byov, "magnitude", scope=scope)
    assert _points(byov, "SNR") == _points(byov, "SNR, sigma shuffled")


def test_whole_channels_go_in_the_order_of_their_mean_score(
    byov: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    name = "blocks.0.mlp.fc1.weight"

    def spy(model: Any, images: Tensor) -> Tensor:
        seen.append(model.get_parameter(name).detach().clone())
        return features_of(model, images)

    monkeypatch.setattr(pruning, "features_of", spy)
    _points(byov, "SNR", scope="channels")
    mean = byov.encoder.get_parameter(name).detach()
    snr = mean.abs() / (byov.encoder.get_parameter(f"{name}_logvar").detach() / 2).exp()
    dead = (seen[-1] == 0).all(dim=1)
    assert int(dead.sum()) == round(0.9 * len(mean))
    assert torch.equal(seen[-1][~dead], mean[~dead])
    assert snr.mean(1)[dead].max() <= snr.mean(1)[~dead].min()


def test_a_typical_sigma_changes_nothing_within_a_tensor(byov: Run) -> None:
    assert _points(byov, "magnitude x mean 1 / sigma") == _points(byov, "magnitude")
    spread = {
        name: torch.rand(()) * 9 for name, _ in byov.encoder.named_parameters()
    }  # other tensors, other sigmas
    with torch.no_grad():
        for name, parameter in byov.encoder.named_parameters():
            if name.endswith("_logvar"):
                parameter.fill_(float(-9 + spread[name]))
    one = _points(byov, "magnitude x mean 1 / sigma", scope="global")
    assert one != _points(byov, "magnitude", scope="global")


def test_pruned_weights_are_those_of_the_lowest_scores(
    byov: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor]] = []

    def spy(model: Any, images: Tensor) -> Tensor:
        seen.append({k: v.clone() for k, v in model.named_parameters()})
        return features_of(model, images)

    before = {k: v.clone() for k, v in byov.encoder.named_parameters()}
    monkeypatch.setattr(pruning, "features_of", spy)
    _points(byov, "SNR")
    name = "blocks.0.mlp.fc1.weight"
    snr = before[name].abs() / (before[f"{name}_logvar"] / 2).exp()
    zero = seen[-1][name] == 0
    assert int(zero.sum()) == round(0.9 * zero.numel())
    assert snr[zero].max() <= snr[~zero].min()
    for kept in ("pos_embed", "cls_token", "norm.weight", "blocks.0.mlp.fc1.bias"):
        assert torch.equal(seen[-1][kept], before[kept])
    assert torch.equal(byov.encoder.get_parameter(name), before[name])  # the run itself is whole


def test_byol_is_pruned_by_magnitude_and_at_random_alone(folders: dict[str, Path]) -> None:
    run = open_run(folders["byol"], device="cpu")
    made = pruning.prune_curves(run, sparsities=(0.0, 0.5), scopes=["tensor"], settings=HEAD)
    assert [c["criterion"] for c in made["numbers"]["curves"]] == ["magnitude", "random"]
    assert made["numbers"]["gaps"] == []
    with pytest.raises(ArgumentError, match="rise from 0"):
        pruning.prune_curves(run, sparsities=(0.5, 0.1), settings=HEAD)


def test_gaps_of_curves_by_hand() -> None:
    shares = (0.0, 0.5, 0.7, 0.9)
    curves = [
        {
            "criterion": name, "scope": "tensor",
            "points": [{"sparsity": s, "top1": t} for s, t in zip(shares, tops, strict=True)],
        }
        for name, tops in {
            "SNR": (0.80, 0.80, 0.70, 0.40),
            "magnitude": (0.80, 0.70, 0.50, 0.30),
        }.items()
    ]  # fmt: skip
    [gap] = pruning.gaps(curves)
    assert gap["points"] == pytest.approx(20.0)
    assert gap["at"] == 0.7
    assert gap["middle"] == pytest.approx((10 + 20 + 10) / 3)
    assert gap["area"] == pytest.approx((0 + 10 + 20 + 10) / 4)
    # a point is lost on the way: 0.5 + 0.2 * 0.01 / 0.10, and 0.5 * 0.01 / 0.10
    assert gap["sparser"] == pytest.approx(100 * (0.52 - 0.05))


# -- uncertainty ---------------------------------------------------------------------------------


def test_the_spread_of_independent_draws_falls_as_the_root_of_their_number() -> None:
    pool = torch.rand(2000, 200)
    settings = uncertainty.UncertaintySettings(pool=2000, most=50, bootstraps=200)
    found = uncertainty.averages(pool, settings)
    assert found["slope"] == pytest.approx(-0.5, abs=0.02)
    assert found["disjoint_slope"] == pytest.approx(-0.5, abs=0.02)
    first = found["rows"][0]
    assert first["disjoint"] == pytest.approx(math.sqrt(1 / 12), rel=0.02)
    assert first["mean"] == pytest.approx(0.5, abs=0.01)


def test_the_same_draws_over_and_over_do_not_average_out() -> None:
    pool = torch.rand(1, 300).repeat(200, 1)
    settings = uncertainty.UncertaintySettings(pool=200, most=20, bootstraps=20)
    assert max(r["disjoint"] for r in uncertainty.averages(pool, settings)["rows"]) < 1e-12


def test_draws_of_a_run_are_independent(byov: Run) -> None:
    settings = uncertainty.UncertaintySettings(pool=120, most=12, bootstraps=20, shifted=())
    made = uncertainty.draws_needed(byov, settings, HEAD)
    [curve] = made["numbers"]["curves"]
    assert curve["disjoint_slope"] == pytest.approx(-0.5, abs=0.12)


def test_spread_is_the_std_of_the_predicted_class(byov: Run) -> None:
    settings = uncertainty.UncertaintySettings(spread_draws=6)
    numbers = uncertainty.spread(byov, settings, HEAD)["numbers"]
    head, _ = linear.frozen_head(byov, HEAD)
    stack = torch.stack(list(drawn_probs(byov, head, 6))).double()
    predicted = stack.mean(0).argmax(1)
    expected = stack.std(0).gather(1, predicted[:, None])[:, 0]
    assert numbers["std"] == pytest.approx(expected.tolist(), rel=1e-4)


def test_latent_variances_are_those_of_the_draws(byov: Run) -> None:
    settings = uncertainty.UncertaintySettings(latent_draws=4, noises=(0.0, 0.5))
    levels = uncertainty.latent_variance(byov, settings)["numbers"]["levels"]
    images = torch.cat([x for x, _ in eval_batches(byov.source, "test", batch_size=999)])
    model, kept = byov.model, []
    assert isinstance(model, Student)
    with torch.no_grad():
        for m in range(4):
            with bb.one_draw(model, seed_of(Stream.MEASURED, 0, m)):
                kept.append(model.branch(model.encoder(images)))
    for part, field in (("encoder", "features"), ("projector", "projection")):
        expected = torch.stack([getattr(b, field) for b in kept]).double().var(0).mean(1)
        assert levels[0]["raw"][part] == pytest.approx(expected.tolist(), rel=1e-3)
    assert [lev["noise"] for lev in levels] == [0.0, 0.5]
    assert levels[1]["raw"] != levels[0]["raw"]


def test_gradient_noise_is_that_of_draws_alone(byov: Run) -> None:
    made = gradients.gradient_noise(byov, batch_sizes=(8,), draws=4)
    rows = {r["estimator"]: r["relative"] for r in made["numbers"]["rows"]}
    assert rows.keys() == set(gradients.ESTIMATORS)
    assert all(value is None or value > 0 for value in rows.values())
    with torch.no_grad():
        for name, parameter in byov.model.named_parameters():
            if name.endswith("_logvar"):
                parameter.fill_(-60.0)  # no uncertainty, no variance
    runs.result_path(byov.folder, "gradients").unlink()
    still = gradients.gradient_noise(byov, batch_sizes=(8,), draws=4)["numbers"]["rows"]
    assert max(r["relative"] for r in still) < 1e-9
    runs.result_path(byov.folder, "gradients").unlink()


def test_the_twin_has_no_latents(folders: dict[str, Path]) -> None:
    with pytest.raises(ArgumentError, match="projector"):
        uncertainty.latent_variance(
            open_run(folders["supervised"], device="cpu"), uncertainty.UncertaintySettings()
        )


def test_augmentations_leave_the_clean_row_as_the_evaluation_has_it(byov: Run) -> None:
    made = uncertainty.corrupted(byov, uncertainty.UncertaintySettings(), HEAD)
    rows = made["numbers"]["rows"]
    assert len(rows) == 1 + 5 * len(corruptions.kinds(grey=True))
    clean = next(r for r in rows if r["kind"] == "none")["means"]
    linear = evaluate.evaluate(byov, "linear", HEAD)["numbers"]["rows"][0]
    assert clean["nll"] == pytest.approx(linear["nll"], rel=1e-4)


def test_limited_takes_images_from_all_over(byov: Run) -> None:
    few = runs.limited(byov, 4)
    assert len(few.source.part("test")) == 4
    assert torch.equal(labels_of(few), labels_of(byov)[torch.tensor([0, 5, 10, 15])])
    assert runs.limited(byov, 0) is byov


# -- records and claims ----------------------------------------------------------------------------


def _record(seed: int, top1: float, *, moved: bool = True, **changes: Any) -> RunRecord:
    config = replace(BYOVConfig(seed=seed), **changes)
    row = {"prediction": protocol.MEANS, "top1": top1, "ece": 0.10 - top1 / 100}
    facts = {"converged": moved, "data": "d", "logvar_spread": 0.4}
    return RunRecord(config, facts, [], {"eval-linear": {"numbers": {"rows": [row]}}})


def test_an_estimate_is_students() -> None:
    values = [1.0, 2.0, 4.0, 3.5]
    found = estimate([*values, None])
    assert found is not None
    low, high = stats.t.interval(0.95, 3, loc=found.mean, scale=stats.sem(values))
    assert found.mean == pytest.approx(sum(values) / 4)
    assert found.half == pytest.approx((high - low) / 2, rel=1e-3)
    assert estimate([1.0]) == (1.0, None, 1)
    assert estimate([None]) is None


def test_differences_are_paired_by_seed_and_plus_is_better() -> None:
    mine = [_record(s, t) for s, t in ((0, 0.50), (1, 0.70))]
    base = [_record(s, t, conversion="none") for s, t in ((1, 0.60), (0, 0.45))]

    def top1(record: RunRecord) -> float:
        row = record.row(protocol.MEANS)
        assert row is not None
        return float(row["top1"])

    found = against(mine, base, top1, top1, "top1")
    assert found is not None
    assert found.mean == pytest.approx(7.5)
    worse = against(mine, base, top1, top1, "ece")  # of an error, more is worse
    assert worse is not None
    assert worse.mean == pytest.approx(-7.5)


def test_families_are_seeds_of_one_config_with_names_of_their_own() -> None:
    records = [
        _record(0, 0.5),
        _record(1, 0.5),
        _record(0, 0.5, tau_base=0.9),
        _record(0, 0.4, beta_end=0.3),
    ]
    found = families(records)
    assert {name: len(group) for name, group in found.items()} == {
        "BYOV N(0, I)": 2,
        "BYOV N(0, I), tau_base 0.9": 1,
        "BYOV N(0, I), beta 0->0.3": 1,
    }
    assert len(paper_like(records)) == 2


def test_no_claim_from_few_seeds_or_a_posterior_that_stands_still() -> None:
    claim = next(c for c in CLAIMS if c.text == "ECE better than BYOL's")

    def verdict(seeds: int, better: float, moved: bool = True) -> str:
        records = []
        for seed in range(seeds):
            records.append(_record(seed, 0.5, conversion="none"))
            records.append(_record(seed, 0.5 + better + 0.001 * seed, moved=moved))
        return judge(claim, records)[1]

    assert verdict(2, 5.0) == "n < 3"
    assert verdict(3, 5.0) == "agrees"
    assert verdict(3, -5.0) == "disagrees"
    assert verdict(3, 0.0, moved=False) == "not converged"
    assert judge(claim, [_record(0, 0.5)])[1] == "not run"


def test_appendix_c_undoes_one_change_at_a_time() -> None:
    def record(seed: int, top1: float, norms: list[float], **changes: Any) -> RunRecord:
        log = [{"kind": "step", "step": s, "grad_norm": n} for s, n in enumerate(norms)]
        return replace(_record(seed, top1, **changes), log=log)

    calm, wild = [1.0] * 10, [1.0] * 8 + [4.0, 9.0]
    records = [record(seed, 0.8, calm) for seed in range(3)]
    records += [record(seed, 0.7, wild, parameterization="softplus") for seed in range(2)]
    records += [record(0, 0.6, calm, relative_std=0.01), record(0, 0.1, calm, lr=9.0)]
    rows = {r["change"]: r for r in tables.app_c(records)["rows"]}
    assert rows["as in the paper"]["top1"].n == 3
    softplus = rows["softplus"]
    assert (softplus["top1"].n, softplus["top1"].mean) == (2, pytest.approx(70))
    assert softplus["top1_delta"].mean == pytest.approx(-10)
    assert softplus["spikes"].mean == pytest.approx(20)
    assert rows["as in the paper"]["spikes"].mean == 0
    assert rows["sigma from 1 % of each tensor's RMS"]["top1_delta"].mean == pytest.approx(-20)
    assert rows["log variances from -6"]["top1"] is None
    found, verdict = judge(next(c for c in CLAIMS if "spikes" in c.text), records)
    assert found is not None
    assert found.mean == pytest.approx(20)
    assert (found.n, verdict) == (2, "n < 3")
    same = [record(s, 0.8, calm) for s in range(3)]
    same += [record(s, 0.8, calm, parameterization="softplus") for s in range(3)]
    # no spike here and none there: no difference is none of the claimed sign
    assert judge(next(c for c in CLAIMS if "spikes" in c.text), same)[1] == "undecided"


def test_by_beta_pairs_no_two_betas() -> None:
    def record(seed: int, beta: float, gap: float, variances: tuple[float, float]) -> RunRecord:
        found = _record(seed, 0.8, beta_end=beta)
        part = {name: [1.0] for name in ("encoder", "projector", "predictor")}
        levels = [
            {"noise": n, "raw": part, "unit": {**part, "encoder": [v, v]}}
            for n, v in zip((0.0, 1.0), variances, strict=True)
        ]
        gaps = [
            {"over": "magnitude", "scope": "tensor", "middle": gap, "points": 2 * gap,
             "sparser": 0.0},
            {"over": "random", "scope": "tensor", "middle": 9.0, "points": 9.0, "sparser": 0.0},
        ]  # fmt: skip
        more: dict[str, Any] = {
            "prune": {"settings": {}, "numbers": {"gaps": gaps}},
            "latents": {"settings": {"draws": 2}, "numbers": {"levels": levels}},
        }
        return replace(found, results={**found.results, **more})

    records = [record(seed, 1.0, 4.0, (2.0, 1.0)) for seed in range(2)]
    records += [record(0, 0.1, 1.0, (1.0, 3.0)), _record(0, 0.5, conversion="none")]
    seen = record(0, 1.0, 7.0, (1.0, 4.0))
    records.append(replace(seen, config=replace(seen.config, skip=UNSEEN_SHIFTS)))
    found = by_beta(records)
    assert found is not None
    wide, narrow, without = found["rows"]
    assert (without["skip"], without["beta"], without["n"]) == ("unseen shifts", 1.0, 1)
    assert (without["gap"].mean, without["rise"].mean) == (7, 3)
    assert wide["skip"] == ""
    assert (wide["beta"], wide["n"], narrow["beta"], narrow["n"]) == (1.0, 2, 0.1, 1)
    assert (wide["gap"].mean, wide["most"].mean) == (4, 8)
    assert (narrow["gap"].mean, narrow["most"].mean) == (1, 2)
    assert (wide["rise"].mean, narrow["rise"].mean) == (-0.5, 2)
    assert by_beta([_record(0, 0.5, conversion="none")]) is None


def test_the_variance_rises_by_noise_and_part() -> None:
    def record(seed: int, predictor: tuple[float, float, float]) -> RunRecord:
        found = _record(seed, 0.8)
        levels = [
            {
                "noise": noise,
                "raw": {part: [9.0] for part in uncertainty.PARTS},
                "unit": {"encoder": [4.0, 4.0], "projector": [2.0], "predictor": [value]},
            }
            for noise, value in zip((0.0, 0.25, 1.0), predictor, strict=True)
        ]
        latents = {"settings": {"draws": 2}, "numbers": {"levels": levels}}
        return replace(found, results={**found.results, "latents": latents})

    records = [record(0, (1.0, 2.0, 0.5)), record(1, (2.0, 5.0, 2.0)), record(2, (1.0, 3.0, 0.25))]
    found = {c.text: c.ours(records) for c in CLAIMS if "rises with noise" in c.text}
    assert len(found) == 6
    visible = found["variance behind the predictor rises with noise, to a std of 0.3"]
    most = found["variance behind the predictor rises with noise, to a std of 1"]
    flat = found["variance behind the encoder rises with noise, to a std of 1"]
    assert visible is not None
    assert most is not None
    assert flat is not None
    assert visible.mean == pytest.approx((1 + 1.5 + 2) / 3)
    # Student's t of 2 degrees of freedom at 97.5 %: 4.3027, of the standard error of 1, 1.5, 2
    assert visible.half == pytest.approx(4.3027 * 0.5 / math.sqrt(3), rel=1e-4)
    assert most.mean == pytest.approx((-0.5 + 0 - 0.75) / 3)
    assert (flat.mean, flat.n) == (0, 3)
    numbers = tables.fig7(records)
    assert numbers is not None
    assert noise_levels(numbers) == ["noise 0", "noise 0.25", "noise 1"]
    assert rises(numbers)[0] == ("encoder", *["1.00"] * 3)


def test_a_resnet_is_compared_with_its_own_optimizer_and_no_ablation() -> None:
    def record(seed: int, gap: float, **changes: Any) -> RunRecord:
        gaps = [{"over": "magnitude", "scope": "tensor", "middle": gap, "points": gap}]
        found = _record(seed, 0.8, **changes)
        return replace(found, results={**found.results, "prune": {"numbers": {"gaps": gaps}}})

    resnet = PRESETS["cifar10-resnet18"].config
    own = {"encoder": resnet.encoder, "encoder_args": {}, "optimizer": "lars", "lr": 1.0}
    records = [record(seed, 5.0) for seed in range(4)]
    records += [record(seed, 9.0 + seed, **own) for seed in range(2)]
    records.append(record(0, 1.0, **own, tau_base=0.9))
    found = {c.text: c.ours(records) for c in CLAIMS if c.text.endswith("50 to 90 % sparsity")}
    assert {text: (e.mean, e.n) for text, e in found.items() if e is not None} == {
        "SNR pruning over magnitude, mean over 50 to 90 % sparsity": (5.0, 4),
        "SNR pruning over magnitude, ResNet-18, mean over 50 to 90 % sparsity": (9.5, 2),
    }


def test_correlations_are_their_definitions() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(300, generator=generator).round(decimals=1)  # with ties
    y = x + torch.randn(300, generator=generator)
    found = correlations(x.tolist(), y.tolist())
    assert found["pearson"] == pytest.approx(np.corrcoef(x.numpy(), y.numpy())[0, 1], abs=1e-6)
    ranks = [
        [sum(b < a for b in v) + (sum(b == a for b in v) + 1) / 2 for a in v]
        for v in (x.tolist(), y.tolist())
    ]
    assert found["spearman"] == pytest.approx(np.corrcoef(np.array(ranks))[0, 1])
    assert correlations([1.0, 1.0], [1.0, 2.0])["pearson"] is None
    assert spearman([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]) is None
    fit = stats.linregress(x, y)
    residual = (y - fit.slope * x - fit.intercept).double()
    assert found["residual_skew"] == pytest.approx(stats.skew(residual), abs=1e-4)
    expected = stats.kstest((residual / residual.std(correction=0)).numpy(), "norm").statistic
    assert found["ks"] == pytest.approx(expected, abs=1e-4)


def test_results_are_json_with_what_they_depend_on(byov: Run) -> None:
    evaluate.evaluate(byov, "linear", HEAD)
    value = json.loads(runs.result_path(byov.folder, "eval-linear").read_text())
    assert {"step", "steps", "seed", "logvar_travel", "logvar_spread", "commit", "device",
            "test_images", "config"} <= value["run"].keys()  # fmt: skip
    assert value["settings"]["num_samples"] == HEAD.num_samples
