"""Run the demo and keep its numbers, its picture and what the README says of it.

python benchmarks/record_demo.py
"""

import json
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULT = ROOT / "benchmarks" / "results" / "demo.json"
PICTURE = ROOT / "docs" / "images" / "demo.png"
BEGIN, END = "<!-- demo: begin -->\n", "<!-- demo: end -->"


def main() -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    import demo

    with tempfile.TemporaryDirectory() as folder:
        record = demo.main(["--out", folder])
        shutil.copy(Path(folder) / "demo.png", PICTURE)
    RESULT.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    README.write_text(with_section(README.read_text("utf-8"), record), encoding="utf-8")


def with_section(readme: str, record: dict[str, Any]) -> str:
    """The README with its section on the demo made from ``record``."""
    head, rest = readme.split(BEGIN)
    return head + BEGIN + section(record) + END + rest.split(END)[1]


def section(record: dict[str, Any]) -> str:
    """A table of the three predictions and what they come to."""
    rows = record["rows"]
    lines = [
        "| prediction | accuracy | NLL | ECE | Brier |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    names = {
        "deterministic": "deterministic network",
        "at the means": "Bayesian network, at the means",
        "MC average": f"Bayesian network, average of {rows[-1]['num_samples']} draws",
    }
    for row in rows:
        numbers = " | ".join(f"{row[name]:.3f}" for name in ("nll", "ece", "brier"))
        lines.append(f"| {names[row['prediction']]} | {row['accuracy']:.2%} | {numbers} |")
    before, average = rows[0]["nll"], rows[-1]["nll"]
    machine, bayesian = record["machine"], record["settings"]["bayesian"]
    text = (
        f"The average of the draws {'beats' if average < before else 'does **not** beat'} the "
        f"deterministic network: an NLL of {average:.3f} against {before:.3f} nats. The least "
        "certain tenth of the test images holds "
        f"{record['mistakes_in_the_least_certain_tenth']:.0%} of its mistakes. The posterior is "
        f"tempered (`kl_weight={bayesian['kl_weight']}`). All settings, also the weight decay of "
        "the deterministic network, were chosen on training images alone, on two splits like that "
        "of `--holdout`. One seed; "
        f"torch {record['versions']['torch']}, {machine['processor']}, {machine['threads']} of "
        f"{machine['cores']} cores, "
        f"{record['seconds']:.0f} s in all. "
        "[The file](benchmarks/results/demo.json) has every number; "
        "`python benchmarks/record_demo.py` makes it, this table and the picture anew."
    )
    return "\n".join([*lines, "", *textwrap.wrap(text, 105, break_on_hyphens=False), ""])


if __name__ == "__main__":
    main()
