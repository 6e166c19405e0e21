"""``bayesify inspect``: what a file holds."""

from __future__ import annotations

from typing import Any

from .guard import guard
from .options import Debug, File, Json


def inspect(file: File, json: Json = False, debug: Debug = False) -> None:
    """Show what a file holds: the model, how it was converted, and each posterior tensor.

    Sigma is the posterior standard deviation, SNR the signal-to-noise ratio |mean| / sigma. The
    model is not built, so that no code of it runs.
    """
    with guard(debug):
        from .. import storage
        from . import render

        header = storage.read_header(file)
        stats = storage.read_stats(file)
        if json:
            render.as_json({"file": str(file), "header": header, "posterior": stats})
            return
        for name, value in _summary(header):
            render.text(f"{name:13} {value}")
        priors = {row["name"]: row for row in header["posterior"]}
        render.table(
            ("parameter", "elements", "sigma mean", "sigma max", "SNR mean", "SNR max"),
            [
                (
                    " = ".join((name, *priors[name]["aliases"])),
                    int(s["elements"]),
                    float(s["mean_std"]),
                    float(s["max_std"]),
                    float(s["mean_snr"]),
                    float(s["max_snr"]),
                )
                for name, s in stats.items()
            ],
        )


def _summary(header: dict[str, Any]) -> list[tuple[str, str]]:
    """The header in a few lines."""
    from ..storage.layout import Row, conversion_from_json

    model, elements = header["model"], header["elements"]
    share = elements["bayesian"] / elements["total"]
    spec = {k: v for k, v in (model["spec"] or {}).items() if v}
    lines = [
        ("model", f"{spec.pop('name', 'given by the user')} ({model['class']})"),
        ("arguments", ", ".join(f"{k}={v}" for k, v in spec.items())),
        ("weights", str(header["info"].get("weights", ""))),
        (
            "posterior",
            f"{elements['bayesian']:,} of {elements['total']:,} parameters ({share:.2%})",
        ),
        ("prior", ", ".join(sorted({str(Row.from_json(r).prior) for r in header["posterior"]}))),
    ]
    for entry in header["conversions"]:
        conversion = conversion_from_json(entry["arguments"])
        words = [f"{k}={', '.join(map(str, v))}" for k, v in
                 (("skip", conversion.skip), ("only", conversion.only)) if v]  # fmt: skip
        words += [f"preset={conversion.preset}"] if conversion.preset else []
        where = f"{entry['root']}: " if entry["root"] else ""
        lines.append(("converted", where + ("; ".join(words) or "everything")))
    if header["input"]:
        lines.append(("input", " x ".join(map(str, header["input"]["size"]))))
    if "classes" in header["info"]:
        lines.append(("classes", f"{len(header['info']['classes'])}"))
    versions = ", ".join(f"{k} {v}" for k, v in header["versions"].items())
    lines.append(("written by", f"{versions} (format {header['format']})"))
    return [(name, value) for name, value in lines if value]
