"""The page: what was measured, in words, tables and figures, as one file of HTML."""

from __future__ import annotations

import base64
import io
import math
from importlib import resources
from typing import Any

from ..metrics import Interval
from .content import Example, Report, Row
from .plots import figures, row_colour
from .shell import check_installed, filled, html_page

_SIDE = 224  # of a picture in the page, in pixels
_COLUMNS = (
    # name, key, how it reads, whether more is better, form
    ("Top-1", "accuracy", "share whose likeliest class is the true one", True, "percent"),
    ("NLL", "nll", "mean of -log of the true class's probability", False, "number"),
    ("ECE", "ece", "mean distance of accuracy from confidence over 15 bins", False, "number"),
    ("Brier", "brier", "squared error of the probabilities, summed over the classes", False,
     "number"),
    ("AURC", "aurc", "mean error rate over all shares that it may leave unanswered", False,
     "number"),
    ("Entropy", "entropy", "mean entropy of the predictions; neither good nor bad", None,
     "number"),
)  # fmt: skip
_ABOUT = {
    "at the means": "no draws",
    "temperature scaled": "control",
    "MC average": "the posterior",
}


def render(report: Report) -> str:
    """One self-contained HTML page: no script, no request, no font of its own.

    Args:
        report: What :func:`bayesify.report.gather` measured. The same one gives the same page.

    Returns:
        The text of the page.

    Raises:
        ArgumentError: jinja2 or matplotlib is not installed.
    """
    check_installed()
    from markupsafe import Markup

    # what matplotlib and this package wrote; all else is escaped
    drawn = {name: Markup(svg) for name, svg in figures(report).items()}
    body = filled("report.html.jinja", svg=drawn, **_content(report))
    css = (resources.files("bayesify") / "assets" / "report.css").read_text("utf-8")
    name = f"{report.title} on {report.data}"
    return html_page(f"{name}: how far its uncertainty can be trusted", css, body)


def _content(report: Report) -> dict[str, Any]:
    """What the template is filled with: texts and numbers as they are read."""
    sections = [
        ("quality", "Quality"),
        ("calibration", "Calibration"),
        ("uncertainty", "Uncertainty"),
        ("images", "Images"),
        ("weights", "Weights"),
        *([("pruning", "Pruning")] if report.curve else []),
        ("run", "How it was made"),
    ]
    ood = report.ood
    best = max((d.auroc for d in ood.scores), default=0.0) if ood else 0.0
    caption = (
        "How uncertain the average of the draws is, for images that it got right and wrong"
        f"{', and for images of another kind' if ood else ''}. Each group adds "
        "up to 100%. The further apart they lie, the better a threshold on the entropy works."
    )
    return {
        "title": report.title,
        "data": report.data,
        "split": "" if report.split == "all" else f" ({report.split})",
        "images": report.images,
        "classes": report.classes,
        "num_samples": report.num_samples,
        "resamples": report.resamples,
        "sections": sections,
        "findings": findings(report),
        "tiles": _tiles(report),
        "columns": [{"name": name, "title": title} for name, _, title, _, _ in _COLUMNS],
        "table": _table(report),
        "bins": [
            {
                "range": f"{b.lower:.2f} to {b.upper:.2f}",
                "size": f"{b.size:,}",
                "confidence": f"{b.confidence:.1%}",
                "accuracy": f"{b.accuracy:.1%}",
                "interval": _interval(b.interval, "percent"),
            }
            for b in report.rows[-1].bins
        ],
        "entropy_caption": caption,
        "ood": [
            {
                "score": d.score, "auroc": f"{d.auroc:.3f}", "aupr": f"{d.aupr:.3f}",
                "fpr95": f"{d.fpr95:.1%}", "best": d.auroc == best,
            }
            for d in (ood.scores if ood else ())
        ],
        "ood_note": "" if ood is None
        else f"{len(ood.entropy):,} images of {ood.name} against {report.images:,} of "
        f"{report.data}.",
        "most_entropy": f"{math.log(report.classes):.2f}",
        "information": f"{float(report.information.mean()):.3f}",
        "least_sure": [_card(e) for e in report.least_sure],
        "sure_and_wrong": [_card(e) for e in report.sure_and_wrong],
        "surest": [_card(e) for e in report.surest],
        "layers": [
            {
                "name": layer.name, "owner": layer.owner,
                "shape": " x ".join(map(str, layer.shape)) or "scalar",
                "elements": f"{layer.elements:,}", "rms": f"{layer.rms:.3g}",
                "sigma": f"{layer.sigma:.3g}", "snr": f"{layer.snr:.3g}",
                "below_one": f"{layer.below_one:.1%}", "pruned": f"{layer.pruned:.1%}",
            }
            for layer in report.layers
        ],
        "curve": [
            {
                **row, "sparsity": f"{row['sparsity']:.0%}", "accuracy": f"{row['accuracy']:.2%}",
                "nll": f"{row['nll']:.4f}", "ece": f"{row['ece']:.4f}",
            }
            for row in report.curve
        ],
        "curve_images": report.curve_images,
        "curve_draws": report.curve_draws,
        "facts": [*report.facts, *_left_out(report)],
    }  # fmt: skip


# -- words -------------------------------------------------------------------------------------


def findings(report: Report) -> list[str]:
    """What the numbers come to, in sentences; a difference that chance explains is none."""
    average, means = report.rows[-1], report.rows[0]
    accuracy, ends = average.values["accuracy"], average.intervals["accuracy"]
    said = float(average.examples.confidence.mean())
    lines = [
        f"It is right on {accuracy:.1%} of the images (95%: {_interval(ends, 'percent')}) and says "
        f"{said:.1%} on average: {_calibrated(average.excess)}."
    ]
    control = report.row("temperature scaled")
    if control is not None and average.difference is not None:
        ends = average.difference
        gap = (
            f"an NLL of {average.values['nll']:.3f} nats with the draws, "
            f"{control.values['nll']:.3f} with the scalar"
        )
        if ends.high < 0:
            verdict = f"The draws beat temperature scaling, the control: {gap}."
        elif ends.low > 0:
            verdict = f"Temperature scaling, one number, beats the draws: {gap}."
        else:
            verdict = (
                f"Between the draws and temperature scaling, one number, these images see no clear "
                f"difference: {gap}."
            )
        lines.append(verdict)
    declined = _declined(average)
    if declined is not None:
        lines.append(declined)
    if report.ood is not None:
        best = max(report.ood.scores, key=lambda d: d.auroc)
        first = report.ood.scores[0]  # the entropy of the average
        more = "" if best is first else f"; by {best.score} it is {best.auroc:.1%}"
        lines.append(
            f"An image of {report.ood.name} has more entropy than one of "
            f"{report.data} {first.auroc:.1%} of the time (chance: 50%){more}."
        )
    elif means.values["nll"] > 0:
        lines.append(
            "No images of another kind were given (--ood): OOD detection was not measured."
        )
    return lines


def _calibrated(excess: Interval) -> str:
    if excess.low <= 0.0 <= excess.high:
        return "no more and no less than it knows, as far as these images tell"
    return "it says more than it knows" if excess.low > 0.0 else "it says less than it knows"


def _declined(row: Row) -> str | None:
    """How many of the mistakes are in the least certain tenth."""
    count = len(row.examples.hit) // 10
    mistakes = float((1 - row.examples.hit).sum())
    if not count or not mistakes:
        return None
    uncertain = row.examples.confidence.argsort(stable=True)[:count]
    share = float((1 - row.examples.hit[uncertain]).sum()) / mistakes
    return f"The least certain tenth of the images holds {share:.0%} of its mistakes."


def _tiles(report: Report) -> list[dict[str, str]]:
    average = report.rows[-1]
    tiles = [
        {
            "name": name,
            "value": _number(average.values[key], form),
            "below": _interval(average.intervals[key], form),
        }
        for name, key, form in (
            ("Accuracy", "accuracy", "percent"),
            ("NLL, nats", "nll", "number"),
            ("ECE", "ece", "number"),
            ("Brier", "brier", "number"),
        )
    ]
    if report.ood is not None:
        best = max(report.ood.scores, key=lambda d: d.auroc)
        tiles.append(
            {"name": "OOD detection, AUROC", "value": f"{best.auroc:.3f}",
             "below": best.score}
        )  # fmt: skip
    return tiles


def _table(report: Report) -> list[dict[str, Any]]:
    best: dict[str, str | None] = {}
    for _, key, _, more, form in _COLUMNS:
        shown = [_number(row.values[key], form) for row in report.rows]
        pick = None if more is None else (max if more else min)(shown)
        best[key] = pick if len(set(shown)) > 1 else None
    lines = []
    for row in report.rows:
        below = _ABOUT[row.prediction]
        if row.temperature is not None:
            below = f"T = {row.temperature:.2f}, control"
        elif row.draws > 1:
            below = f"{row.draws} draws"
        cells = []
        for _, key, _, _, form in _COLUMNS:
            value = _number(row.values[key], form)
            interval = _interval(row.intervals[key], form) if key in row.intervals else ""
            cells.append({"value": value, "interval": interval, "best": value == best[key]})
        lines.append(
            {"name": row.prediction, "below": below, "colour": row_colour(row), "cells": cells}
        )
    return lines


def _number(value: float, form: str) -> str:
    return f"{value:.2%}" if form == "percent" else f"{value:.4f}"


def _interval(ends: Interval, form: str) -> str:
    if form == "percent":
        return f"{100 * ends.low:.1f} to {100 * ends.high:.1f}%"
    return f"{ends.low:.4f} to {ends.high:.4f}"


def _left_out(report: Report) -> list[tuple[str, str]]:
    if not report.left_out:
        return [("without posterior", "nothing: every parameter has one")]
    words = [
        f"{reason} ({weights:,} weights in {tensors:,} tensors)"
        for reason, tensors, weights in report.left_out
    ]
    return [("without posterior", "; ".join(words))]


# -- pictures ----------------------------------------------------------------------------------


def _card(example: Example) -> dict[str, Any]:
    source, width, height, small = _picture(example)
    predicted, probability, _ = example.bars[0]
    bars = []
    for name, mean, std in example.bars:
        role = "true" if name == example.label else "guess" if name == predicted else "other"
        left, right = max(0.0, mean - std), min(1.0, mean + std)
        bars.append(
            {
                "name": name, "percent": f"{mean:.{int(not 0.01 <= mean <= 0.99)}%}",
                "spread": f"{100 * std:.0f}",
                "width": f"{100 * mean:.1f}", "left": f"{100 * left:.1f}",
                "rest": f"{100 * (1 - right):.1f}", "role": role,
            }
        )  # fmt: skip
    truth = "rightly" if example.right else f"wrongly, it is {example.label}"
    return {
        "source": source, "width": width, "height": height, "small": small,
        "alt": f"Image {example.index}, taken {truth} for {predicted} with probability "
        f"{probability:.1%}",
        "right": example.right, "predicted": predicted, "label": example.label, "bars": bars,
        "entropy": f"{example.entropy:.2f}", "information": f"{example.information:.2f}",
    }  # fmt: skip


def _picture(example: Example) -> tuple[str, int, int, bool]:
    """The image as a data URI of PNG or, where that is smaller, JPEG; whether to show pixels."""
    from PIL import Image

    pixels = example.image.movedim(0, -1).numpy()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    small = max(image.size) <= 64
    image.thumbnail((_SIDE, _SIDE))
    kinds = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        if small and kind == "jpeg":
            continue  # its blocks would be seen
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        kinds[kind] = buffer.getvalue()
    kind, content = min(kinds.items(), key=lambda item: len(item[1]))
    text = base64.b64encode(content).decode("ascii")
    return f"data:image/{kind};base64,{text}", image.width, image.height, small
