"""``bayesify prune``: set the weights to 0 whose posterior says little."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ..errors import ArgumentError
from ..settings import Measuring, NofMSettings, PruneSettings, Shown, UnitSettings
from ..settings.fields import checked, refuse
from ..settings.pruning import SCORE, ScoreName
from .options import (
    By,
    Device,
    File,
    Force,
    Json,
    ModelArgs,
    ModelName,
    Quiet,
    Split,
    resolve_device,
)
from .outputs import check_outputs

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..data import ImageData
    from .checkpoint import Opened

_CURVE = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
_UNITS = {
    "weights": PruneSettings,
    "channels": UnitSettings,
    "heads": UnitSettings,
    "2:4": NofMSettings,
}


@dataclass(frozen=True, kw_only=True)
class What:
    """What is pruned, and how much of it.

    Args:
        sparsity: Share that is pruned, in [0, 1). Repeatable with --curve.
        score: The lowest go first: snr (|mean| / sigma, the default), magnitude, variance (the
            widest first), random. Repeatable with --curve.
        unit: What is pruned; 2:4 keeps the best two of every four inputs.
    """

    sparsity: tuple[float, ...] = ()
    score: tuple[ScoreName, ...] = ()
    unit: Literal["weights", "channels", "heads", "2:4"] = "weights"

    def __post_init__(self) -> None:
        refuse("prune", checked(self))

    @property
    def scores(self) -> tuple[ScoreName, ...]:
        return self.score or (SCORE,)

    def apply(self, model: nn.Module, share: float, score: Any, settings: NofMSettings) -> None:
        """Prune a model in place."""
        from ..pruning import prune_, prune_n_of_m_, prune_units_

        if self.unit == "2:4":
            prune_n_of_m_(model, score=score, **vars(settings))
        elif self.unit == "weights":
            prune_(model, share, score=score, **vars(settings))
        else:
            prune_units_(model, share, unit=self.unit, score=score, **vars(settings))


def prune(
    file: File,
    what: What,
    chosen: Annotated[PruneSettings | UnitSettings | NofMSettings, By("unit", _UNITS)],
    *,
    out: Annotated[
        Path | None,
        Shown(letter="-o", metavar="FILE", text="Default: FILE's name with .pruned in it, here."),
    ] = None,
    deterministic: Annotated[
        bool, Shown(text="Write the means alone, as the original model loads them.")
    ] = False,
    curve: Annotated[
        bool, Shown(text="Write nothing: measure on --data at many sparsities.")
    ] = False,
    data: Annotated[
        str | None, Shown(metavar="DATA", text="For --curve: a data set as eval takes it.")
    ] = None,
    plot: Annotated[
        Path | None, Shown(metavar="FILE", text="With --curve: draw it into a .png.")
    ] = None,
    measuring: Measuring,
    split: Split = "test",
    model: ModelName = None,
    model_args: ModelArgs = None,
    device: Device = "auto",
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune the weights in FILE of the lowest signal-to-noise ratio: mean and sigma become 0.

    For example: bayesify prune resnet50.bbb.safetensors --sparsity 0.8
    """
    from .. import storage
    from ..data import load_dataset
    from ..report.curve import draw_curve
    from . import render
    from .checkpoint import note_on_classes, open_model
    from .images import readable_images

    _check(what, curve, data, plot, out, deterministic)
    if curve:
        check_outputs({"--plot": plot}, {"FILE": file, "--data": data}, force=force)
        images = load_dataset(str(data), split=split)
        opened = open_model(file, model, model_args, resolve_device(device))
        note_on_classes(opened, file, str(data))
        images, unreadable = readable_images(images, measuring.workers, measuring.skip_unreadable)
        rows = _measured(opened, images, what, chosen, measuring, resolve_device(device))
        if plot is not None:
            draw_curve(rows, plot, overwrite=force)
        if json:
            about = {"file": str(file), "data": data, "unreadable": unreadable}
            render.as_json({**about, "rows": rows})
        else:
            _show(rows)
        return
    target = out or Path(default_name(file, deterministic=deterministic))
    check_outputs(
        {"--out": target}, {"FILE": file}, force=force,
        in_place={} if deterministic else {"--out": "FILE"},
    )  # fmt: skip
    opened = open_model(file, model, model_args, resolve_device("cpu"))
    share = what.sparsity[0] if what.sparsity else 0.0
    what.apply(opened.model, share, what.scores[0], chosen)
    if deterministic:
        from ..export import export_safetensors

        export_safetensors(opened.model, target, overwrite=force)
    else:
        asked: dict[str, Any] = {
            "score": what.scores[0], "unit": what.unit, "only": [*chosen.only],
            "skip": [*chosen.skip],
        }  # fmt: skip
        if isinstance(chosen, UnitSettings):
            asked |= {"sparsity": share, "scope": chosen.scope}
        info = {**opened.header["info"], "pruned": asked}
        storage.save(opened.model, target, spec=opened.spec, info=info, overwrite=force)
    _report(opened.model, target, json, quiet)


def _measured(
    opened: Opened,
    images: ImageData,
    what: What,
    chosen: NofMSettings,
    measuring: Measuring,
    device: torch.device,
) -> list[dict[str, Any]]:
    """The rows of the curve."""
    from ..pruning import sparsity
    from ..report.curve import pruning_curve
    from . import render

    if sparsity(opened.model).pruned:
        render.note("The file has pruned weights already: they stay pruned throughout.")

    def apply(pruned: nn.Module, share: float, score: Any) -> None:
        what.apply(pruned, share, score, chosen)

    shares = sorted(what.sparsity or _CURVE)
    with render.progress("Measuring", len(what.scores) * len(shares)) as bar:
        return pruning_curve(
            opened.model, images, apply, shares, what.scores,
            on_step=bar.to, device=device, model_config=opened.input, **vars(measuring),
        )  # fmt: skip


def _show(rows: list[dict[str, Any]]) -> None:
    from . import render

    render.table(
        ("score", "sparsity", "prediction", "accuracy", "NLL", "ECE"),
        [
            (r["score"], f"{r['sparsity']:.0%}", r["prediction"], f"{r['accuracy']:.2%}",
             f"{r['nll']:.4f}", f"{r['ece']:.4f}")
            for r in rows
        ],
    )  # fmt: skip


def default_name(file: Path, *, deterministic: bool) -> str:
    """``net.bbb.safetensors`` becomes ``net.pruned.bbb.safetensors``."""
    stem = file.name.removesuffix(".safetensors").removesuffix(".bbb")
    return f"{stem}.pruned{'' if deterministic else '.bbb'}.safetensors"


def _check(
    what: What, curve: bool, data: str | None, plot: Path | None, out: Path | None,
    deterministic: bool,
) -> None:  # fmt: skip
    """Refuse options that contradict each other."""
    if curve and data is None:
        raise ArgumentError("--curve measures on a data set: give --data DATA.")
    if curve and (out is not None or deterministic):
        raise ArgumentError("--curve writes no model: leave out --out and --deterministic.")
    if curve and what.unit == "2:4":
        raise ArgumentError("--unit 2:4 has one sparsity and no curve: write it, and use eval.")
    if curve and plot is not None and plot.suffix != ".png":
        raise ArgumentError(f"--plot must end in .png, not {plot.name!r}.")
    if curve:
        return
    if data is not None or plot is not None:
        raise ArgumentError("--data and --plot belong to --curve.")
    if len(what.scores) > 1 or len(what.sparsity) > 1:
        raise ArgumentError("More than one --sparsity or --score needs --curve.")
    if what.unit == "2:4" and what.sparsity:
        raise ArgumentError("--unit 2:4 prunes half of the weights: leave out --sparsity.")
    if what.unit != "2:4" and not what.sparsity:
        raise ArgumentError("Say how much to prune: --sparsity 0.8 for 80 %.")


def _report(model: nn.Module, target: Path, json: bool, quiet: bool) -> None:
    from dataclasses import asdict

    from ..pruning import sparsity
    from . import render

    found = sparsity(model)
    if json:
        total = {"elements": found.elements, "pruned": found.pruned, "share": found.share}
        sizes = {"dense_bytes": found.dense_bytes, "sparse_bytes": found.sparse_bytes}
        rows = [{**asdict(row), "share": row.share} for row in found.rows]
        render.as_json({"file": str(target), **total, **sizes, "rows": rows})
        return
    if quiet:
        return
    render.table(
        ("parameter", "elements", "pruned", "share", "outputs pruned"),
        [
            (r.name, r.elements, r.pruned, f"{r.share:.1%}", f"{r.dead_outputs} of {r.outputs}")
            for r in found.rows
            if r.pruned
        ],
    )
    render.text(
        f"{found.pruned:,} of {found.elements:,} weights are 0 ({found.share:.2%}): "
        f"{found.dense_bytes / 2**20:.2f} MiB of means, {found.sparse_bytes / 2**20:.2f} MiB where "
        f"zeros are left out. Wrote {target}, with the zeros in it."
    )
