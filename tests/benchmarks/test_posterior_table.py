"""benchmarks/posterior_table.py: the numbers of the page are those of the lines."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import posterior_table


def line(method: str, seed: int, nll: float) -> dict[str, Any]:
    at = [{"accuracy": 0.8, "nll": nll + s, "ece": 0.1 * s, "brier": 0.3} for s in range(5)]
    return {
        "method": method, "seed": seed,
        "test": {"accuracy": 0.9173, "nll": nll, "ece": 0.0123, "brier": 0.1},
        "ood": {"auroc": 0.905},
        "corrupted": {"noise": at, "blur": [{**a, "nll": 2 * a["nll"]} for a in at]},
        "seconds": {"fit": 90.0, "predict": 1.0},
        "settings": {
            "train_images": 50_000, "epochs": 2, "test_images": 10_000, "ood_images": 10_000,
            "corrupted_images": 1000, "samples": 30, "augment": "flip-crop", "lr": 1e-3,
            "logvar_lr": 0.02, "relative_std": 0.05, "prior_std": 0.1, "freeze_batchnorm": True,
            "draws_per_step": 1, "amp": True,
        },
        "machine": {"processor": "a processor", "cores": 2}, "device": "cpu",
        "versions": {"torch": "2.15.0"}, "commit": "abc", "date": "2026-01-01",
    }  # fmt: skip


def test_the_tables_have_mean_and_spread(tmp_path: Path) -> None:
    rows = [line("ours", s, nll) for s, nll in enumerate((0.24, 0.25, 0.29))]
    rows.append(line("control", 0, 0.5))
    result, trials, page = tmp_path / "r.jsonl", tmp_path / "t.jsonl", tmp_path / "p.md"
    result.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tried_rows = [line("ours, tried", seed, nll) for seed, nll in ((0, 0.3), (0, 0.2), (1, 0.22))]
    tried_rows[0]["settings"]["anchor"] = 0.5
    trials.write_text("".join(json.dumps(row) + "\n" for row in tried_rows))
    begin, end = posterior_table.marks("results")
    first, last = posterior_table.marks("trials")
    page.write_text(f"{first}\n{last}\nbefore\n{begin}\nold\n{end}\nafter\n")
    posterior_table.write(result, trials, [page])
    text = page.read_text()
    assert f"\nbefore\n{begin}\n" in text
    assert text.endswith(f"{end}\nafter\n")
    assert "old" not in text
    shown = [[c.strip() for c in li.split("|")[1:-1]] for li in text.splitlines() if "|" in li]
    ours, control, worse_ours, _ = [row for row in shown if row[0] in ("ours", "control")]
    std = statistics.stdev((0.24, 0.25, 0.29))
    assert ours[1:4] == ["3", "91.73 ± 0.00", f"0.2600 ± {std:.4f}"]
    assert ours[-1] == "90"
    assert control[1:] == ["1", "91.73", "0.5000", "0.0123", "0.1000", "0.905", "90"]
    # corrupted: mean over severities adds 2, and the second kind is doubled
    assert worse_ours[1].startswith("2.260 ±")
    assert worse_ours[2].startswith("4.520 ±")
    assert worse_ours[3].startswith("3.390 ±")
    assert worse_ours[4:] == ["0.200 ± 0.000", "80.0 ± 0.0"]
    assert "50,000 training images" in text
    assert "bfloat16 autocast" in text
    tried = [row for row in shown if row[0] == "ours, tried"]
    # two seeds of the same settings are one row
    assert [row[-3] for row in tried] == ["0.2100 ± 0.0141", "0.3000"]
    assert tried[0][1:6] == ["2", "1", "flip-crop", "0.001, 0.02", "0.05"]
    assert tried[0][6:9] == ["N(0, 0.1^2)", "0%", "kept"]
    assert tried[0][-1] == "0.905 ± 0.000"
    posterior_table.write(result, trials, [page])
    assert page.read_text() == text


def test_trials_of_two_networks_are_two_tables() -> None:
    earlier, later = line("ours", 0, 0.2), line("ours", 0, 0.4)
    later["settings"] |= {"train_images": 20_000, "average": 0.5, "anchor": 0.25}
    latest = line("ours", 0, 0.1)
    latest["settings"] |= {**later["settings"], "network": "0123abcd"}
    assert posterior_table.trial_tables([later, latest]).count("20,000 training images") == 2
    text = posterior_table.trial_tables([earlier, later])
    first, second = text.index("20,000 training images"), text.index("50,000 training images")
    assert text.index("0.4000") < first < text.index("0.2000") < second
    assert "| N(w0, (0.25 RMS)^2) | 50% |" in text[:first]
    assert "| N(0, 0.1^2) | 0% |" in text[first:]


def test_the_targets_are_judged_by_the_mean_over_seeds(tmp_path: Path) -> None:
    rows = [line(posterior_table.OURS, s, nll) for s, nll in enumerate((0.22, 0.24, 0.26))]
    for row, ends in zip(rows, ([0.005, 0.02], [0.006, 0.02], [0.004, 0.02]), strict=True):
        row["test"]["intervals"] = {"ece": ends}
    rows += [line(m, 0, 0.25) for m in posterior_table.SHOWN if m != posterior_table.OURS]
    rows[-1]["ood"]["auroc"] = 0.5
    rows[0]["ood"]["auroc"] = 0.8
    shown = [
        [c.strip() for c in li.split("|")[1:-1]]
        for li in posterior_table.target_table(rows).splitlines()[2:]
    ]
    assert [row[1:] for row in shown] == [
        ["91.73", "yes"], ["0.2400", "yes"], ["0.01230", "yes"], ["0.8700", "no"],
        ["3.360", "yes"], ["0.2000", "no"],
    ]  # fmt: skip
    rows[1]["test"]["intervals"] = {"ece": [0.007, 0.02]}  # one does not hold the aim
    assert "| 0.01230 | no |" in posterior_table.target_table(rows)
    short = posterior_table.short_table(rows).splitlines()
    assert len(short) == 2 + len(posterior_table.SHOWN)
    assert "| 0.240 ± 0.020 |" in short[-1]
    few = posterior_table.short_table([r for r in rows if r["method"] != "ensemble"]).splitlines()
    assert [row for row in few if row not in short] == ["| ensemble | not run | | | | | | |"]
