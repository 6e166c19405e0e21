"""``bayesify inspect``: what a file holds."""

from __future__ import annotations

from .options import File, Json


def inspect(file: File, json: Json = False) -> None:
    """Show what a file holds: the model, how it was converted, and each posterior tensor.

    Sigma is the posterior standard deviation, SNR the signal-to-noise ratio |mean| / sigma. The
    model is not built, so that no code of it runs.
    """
    from .. import storage
    from . import render

    header = storage.read_header(file)
    stats = storage.read_stats(file)
    if json:
        render.as_json({"file": str(file), "header": header, "posterior": stats})
        return
    for name, value in storage.describe(header):
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
    for name, s in stats.items():
        if s["fixed"]:
            render.text(f"{name}: {int(s['fixed']):,} elements are fixed: no draw, no KL.")
