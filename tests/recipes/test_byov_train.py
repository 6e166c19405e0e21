"""The loop: what it logs, how it goes on after a stop, what ends it."""

import math
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import bayesify
from bayesify import ArgumentError, BayesifyError, CheckpointError
from byov_small import CONFIG, small_run, started, stop_at
from recipes.byov import train
from recipes.byov.config import HeadNorm, PredictorName, RunConfig
from recipes.byov.model import build_student, convert_
from recipes.byov.runtime import checkpoint
from recipes.byov.runtime.log import read_log
from recipes.byov.runtime.seeds import Stream, seed_of


def steps_of(run: RunConfig) -> list[dict[str, Any]]:
    """The log without what depends on the machine."""
    lines = [line for line in read_log(run.out / "log.jsonl") if line["kind"] == "step"]
    for line in lines:
        del line["images_per_second"]
    return lines


def final_state(run: RunConfig) -> dict[str, torch.Tensor]:
    newest = checkpoint.latest(run.out / "checkpoints")
    assert newest is not None
    return load_file(newest)


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_log_holds_what_is_to_be_watched(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    before = torch.get_rng_state()
    outcome = train.train(CONFIG, run)
    assert torch.equal(torch.get_rng_state(), before)
    assert (outcome.step, outcome.steps) == (9, 9)
    lines = steps_of(run)
    assert [line["step"] for line in lines] == list(range(1, 10))
    wanted = {
        "loss", "kl", "beta", "tau", "lr", "logvar_lr", "noise_budget", "logvar_travel",
        "logvar_spread", "std", "effective_rank", "probe_loss", "probe_accuracy", "grad_norm",
    }  # fmt: skip
    assert wanted <= lines[0].keys()
    for line in lines:
        t = line["step"] - 1
        assert line["beta"] == pytest.approx(0.5 * (1 - math.cos(math.pi * t / 9)))
        assert line["tau"] == pytest.approx(1 - 0.1 * (math.cos(math.pi * t / 9) + 1) / 2)
        assert line["noise_budget"] == pytest.approx(line["beta"] / 2)  # s = 1 / P
        assert 0 <= line["loss"] <= 8
    assert max(line["lr"] for line in lines) == pytest.approx(CONFIG.lr * 16 / 256)
    epochs = [line for line in read_log(run.out / "log.jsonl") if line["kind"] == "epoch"]
    assert [line["epoch"] for line in epochs] == [1, 2, 3]
    assert {"mean_std", "max_snr"} <= epochs[0]["layers"]["projector.0.weight"].keys()
    assert outcome.results is not None
    assert outcome.results.numbers["knn_trained"] > 0.4


def test_first_kl_is_that_of_the_initial_posterior(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    train.train(replace(CONFIG, epochs=2), run)
    torch.manual_seed(CONFIG.seed)
    model = convert_(build_student(CONFIG, 2), CONFIG)
    assert steps_of(run)[0]["kl"] == pytest.approx(bayesify.kl_divergence(model).item(), rel=1e-6)


DROPPING = {**CONFIG.encoder_args, "drop_path_rate": 0.3, "proj_drop_rate": 0.1}


@pytest.mark.parametrize(
    "changes",
    [
        {"prior": "teacher", "encoder_args": DROPPING},
        {"conversion": "none", "optimizer": "lars", "weight_decay": 1e-6},
        {"parameterization": "softplus", "relative_std": 0.01},
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in (
                {},
                {"prior": "teacher-mean", "conversion": "linear-only"},
                {"optimizer": "lars", "lr": 0.1},
                {"objective": "supervised"},
            )
        ),
    ],
)
def test_stopped_and_resumed_is_uninterrupted_bit_for_bit(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = replace(CONFIG, **changes)
    whole = small_run(tmp_path, out=tmp_path / "whole")
    train.train(config, whole)
    broken = small_run(tmp_path, out=tmp_path / "broken")
    for stop in (4, 6):  # inside an epoch and at the end of one
        outcome = train.train(config, broken, resume=True, watcher=stop_at(stop))
        assert (outcome.step, outcome.results) == (stop, None)
    assert train.train(config, broken, resume=True).results is not None
    assert_same(final_state(whole), final_state(broken))
    assert steps_of(whole) == steps_of(broken)
    for name in ("encoder", "student", "teacher"):
        file = whole.out / f"{name}.safetensors"
        if file.exists():
            assert file.read_bytes() == (broken.out / file.name).read_bytes()


def kill_and_resume(tmp_path: Path, kills: int) -> None:
    config = replace(CONFIG, epochs=3 + 2 * kills)
    whole = small_run(tmp_path, out=tmp_path / "whole")
    train.train(config, whole)
    broken = small_run(tmp_path, out=tmp_path / "broken")
    dice, log, done = random.Random(kills), broken.out / "log.jsonl", 0
    for _ in range(kills):
        process = started(config, broken, {})
        goal = done + dice.randint(1, 4)
        while process.is_alive():  # at a random moment after some steps
            if log.exists() and len(log.read_text().splitlines()) > goal:
                time.sleep(dice.random() * 0.05)
                process.kill()
                process.join()
        assert process.exitcode == -signal.SIGKILL, "the run was over before its time"
        done = len(log.read_text().splitlines())
    last = started(config, broken, {})
    last.join()
    assert last.exitcode == 0
    assert_same(final_state(whole), final_state(broken))
    assert steps_of(whole) == steps_of(broken)
    assert not list(broken.out.glob("**/.*"))


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(tmp_path: Path, kills: int) -> None:
    kill_and_resume(tmp_path, kills)


def test_a_checkpoint_is_not_written_over_nor_taken_by_another_config(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    train.train(CONFIG, run, watcher=stop_at(2))
    with pytest.raises(ArgumentError, match="--resume"):
        train.train(CONFIG, run)
    with pytest.raises(CheckpointError, match=r"(?s)lr: 0\.02 here, 0\.01 there.*seed: 1 here"):
        train.train(replace(CONFIG, lr=0.02, seed=1), run, resume=True)


def test_a_checkpoint_older_than_a_setting_had_its_default(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    train.train(CONFIG, run, watcher=stop_at(2))
    path = checkpoint.latest(run.out / "checkpoints")
    assert path is not None
    saved = checkpoint.read(path)
    for name in ("parameterization", "relative_std"):
        del saved["identity"][name]
    del saved["initial_logvar"]
    checkpoint.write(path, saved)
    with pytest.raises(CheckpointError, match="parameterization: 'softplus' here, 'exp' there"):
        train.train(replace(CONFIG, parameterization="softplus"), run, resume=True)
    assert train.train(CONFIG, run, resume=True, watcher=stop_at(3)).step == 3


@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_moments_of_another_shape_are_refused(tmp_path: Path, optimizer: Any) -> None:
    config, run = replace(CONFIG, optimizer=optimizer), small_run(tmp_path)
    train.train(config, run, watcher=stop_at(2))
    path = checkpoint.latest(run.out / "checkpoints")
    assert path is not None
    saved = checkpoint.read(path)
    name = "exp_avg" if optimizer == "adamw" else "momentum_buffer"
    saved["optimizer"]["state"][0][name] = torch.zeros(())
    checkpoint.write(path, saved)
    with pytest.raises(CheckpointError, match=rf"{name} is \(\) in place of"):
        train.train(config, run, resume=True)


def test_a_finished_run_can_be_asked_again(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    (tmp_path / "run").mkdir()
    # what a run leaves that was killed before its first checkpoint
    (tmp_path / "run" / "log.jsonl").write_text('{"kind": "start", "step": 0}\n{"kind": "st')
    config = replace(CONFIG, epochs=2)
    first = train.train(config, run, resume=True)
    log = read_log(run.out / "log.jsonl")
    assert [line["kind"] for line in log].count("start") == 1
    again = train.train(config, run, resume=True)
    assert again.results == first.results
    assert read_log(run.out / "log.jsonl") == log


def test_last_and_best_checkpoints_are_kept(tmp_path: Path) -> None:
    run = small_run(tmp_path, keep_last=1)
    train.train(replace(CONFIG, epochs=4), run)
    epochs = [line for line in read_log(run.out / "log.jsonl") if line["kind"] == "epoch"]
    best = max(epochs, key=lambda line: float(line["knn"]))["step"]
    kept = sorted(p.name for p in (run.out / "checkpoints").iterdir())
    assert kept == sorted({checkpoint.path_of(Path(), s).name for s in (best, 12)})


def test_deterministic_byol_is_the_same_code_with_the_conversion_off(tmp_path: Path) -> None:
    """A posterior of no width and no KL leaves BYOL: the same numbers, step by step."""
    plain = small_run(tmp_path, out=tmp_path / "plain")
    train.train(replace(CONFIG, conversion="none"), plain)
    narrow = small_run(tmp_path, out=tmp_path / "narrow")
    no_kl = {"logvar_init": -200.0, "logvar_lr_ratio": 0.0, "beta_end": 0.0}
    train.train(replace(CONFIG, **no_kl), narrow)  # type: ignore[arg-type]
    losses = [[line["loss"] for line in steps_of(run)] for run in (plain, narrow)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert "kl" in steps_of(plain)[0]
    assert not (plain.out / "encoder.safetensors").exists()


@pytest.mark.parametrize("reduction", ["num_data", "sum"])
def test_kl_scale_of_the_other_reductions(tmp_path: Path, reduction: str) -> None:
    run = small_run(tmp_path)
    train.train(replace(CONFIG, epochs=2, kl_reduction=reduction), run)  # type: ignore[arg-type]
    assert read_log(run.out / "log.jsonl")[0]["kl_scale"] == (
        1 / 48 if reduction == "num_data" else 1
    )


@pytest.mark.parametrize(
    ("predictor", "norm"), [("linear", "group"), ("batch-optimal", "layer"), ("none", "none")]
)
def test_other_heads_run(tmp_path: Path, predictor: PredictorName, norm: HeadNorm) -> None:
    run = small_run(tmp_path)
    config = replace(
        CONFIG, epochs=2, predictor=predictor, head_norm=norm, head_init="modified",
        negatives_weight=0.1,
    )  # fmt: skip
    assert train.train(config, run).step == 6


def test_accumulation_with_checkpointed_activations_is_the_same_run(tmp_path: Path) -> None:
    config = replace(CONFIG, head_norm="layer")
    runs = [
        small_run(tmp_path, out=tmp_path / str(recompute), accumulate=2,
                  checkpoint_activations=recompute)
        for recompute in (False, True)
    ]  # fmt: skip
    for run in runs:
        train.train(config, run)
    first, second = map(steps_of, runs)
    assert [line["loss"] for line in first] == pytest.approx([line["loss"] for line in second])


def test_a_compiled_run_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compiling(module: Any) -> Any:
        compiled.append(type(module).__name__)
        return compile_(module, backend="aot_eager", fullgraph=True)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", compiling)
    config = replace(CONFIG, prior="teacher")
    runs = [
        small_run(tmp_path, out=tmp_path / str(fast), compile=fast) for fast in (False, True)
    ]  # fmt: skip
    for run in runs:
        train.train(config, run)
    assert sorted(compiled) == ["Student", "Teacher"]
    first, second = map(steps_of, runs)
    assert len(first) == 9
    losses = [[line["loss"] for line in lines] for lines in (first, second)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_the_first_step_on_cuda_has_the_loss_of_the_cpu(tmp_path: Path, compiled: bool) -> None:
    config = replace(CONFIG, prior="teacher", logvar_init=-40.0)  # noise differs without C library
    losses = []
    for device, fast in (("cpu", False), ("cuda", compiled)):
        run = small_run(tmp_path, out=tmp_path / device, device=device, compile=fast, amp=fast)
        train.train(config, run)
        losses.append(steps_of(run)[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.05 if compiled else 1e-3)


def test_nan_ends_the_run_with_step_cause_and_checkpoint(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    config = replace(CONFIG, lr=1e30, warmup_epochs=0.0)
    with pytest.raises(BayesifyError, match=r"not finite at step \d+.*learning rate.*checkpoint"):
        train.train(config, run)


def test_collapse_ends_the_run_with_step_cause_and_checkpoint(tmp_path: Path) -> None:
    run = small_run(tmp_path, stop_on_collapse=True)
    config = replace(
        CONFIG, predictor="none", head_norm="none", tau_base=0.0, tau_end=0.0, epochs=8, lr=0.1
    )
    with pytest.raises(BayesifyError, match=r"collapsed at step \d+.*no predictor.*checkpoint"):
        train.train(config, run)


@pytest.mark.parametrize(
    ("changes", "run_changes", "message"),
    [
        ({"batch_size": 64}, {}, "number of training images, 48"),
        ({"batch_size": 15}, {"accumulate": 2}, "multiple of the 2 micro-batches"),
        ({"batch_size": 2}, {"accumulate": 2}, "BatchNorm one image each"),
        ({"freeze_patch_embed": True, "encoder": "resnet18", "encoder_args": {}}, {}, "freeze_pat"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(
    tmp_path: Path, changes: dict[str, Any], run_changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        train.train(replace(CONFIG, **changes), small_run(tmp_path, **run_changes))
    assert not (tmp_path / "run").exists()


def test_seeds_differ_in_stream_seed_and_place() -> None:
    at = range(4)
    seeds = [seed_of(stream, s, t, i) for stream in Stream for s in at for t in at for i in at]
    seeds += [seed_of(stream, s, t) for stream in Stream for s in at for t in at]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    with pytest.raises(ArgumentError, match="0 or more"):
        seed_of(Stream.VIEWS, 0, -1)


def test_seeds_are_those_of_earlier_runs() -> None:
    assert seed_of(Stream.ORDER, 0, 0) == 3348016204835904075
    assert seed_of(Stream.VIEWS, 3, 1, 20, 2) == 8886009519294909018
    assert seed_of(Stream.STEP, 3, 20, 2) == 6757161343824111916
