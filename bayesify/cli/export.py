"""``bayesify export``: a file for use without bayesify."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ..errors import ArgumentError
from ..settings import ProgramSettings, Shown
from .options import File, Force, Json, ModelArgs, ModelName, Quiet, resolve_device
from .outputs import check_outputs

if TYPE_CHECKING:
    from .checkpoint import Opened

_BATCH = 8  # images, of --measure
SUFFIX = {"safetensors": ".safetensors", "torch": ".pt2", "onnx": ".onnx"}


def export(
    file: File,
    *,
    format: Annotated[
        Literal["safetensors", "torch", "onnx"],
        Shown(
            text="safetensors: the means, for the original model. torch: a program (.pt2) that "
            "needs no model code. onnx: the same for other runtimes.",
        ),
    ] = "safetensors",
    settings: ProgramSettings,
    measure: Annotated[
        bool, Shown(text="With --shrink: multiply-adds and latency here, with and without it.")
    ] = False,
    out: Annotated[
        Path | None, Shown(letter="-o", metavar="FILE", text="Default: ./NAME by the format.")
    ] = None,
    model: ModelName = None,
    model_args: ModelArgs = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the model in FILE for use without bayesify: its means, or K draws as one program.

    For example: bayesify export fitted.bbb.safetensors --format onnx --ensemble 10

    Programs take float images (batch, channels, height, width), normalised as FILE says; batches
    of any size. The file tells mean, standard deviation and classes in its metadata.
    """  # fmt: skip
    import torch

    from ..export import export_onnx, export_safetensors, export_torch
    from . import render
    from .checkpoint import open_model

    draws = settings.num_samples
    if draws is not None and format == "safetensors":
        raise ArgumentError(
            "safetensors holds one set of weights: for --ensemble take --format torch or onnx."
        )
    if settings.shrink and format == "safetensors":
        raise ArgumentError(
            "--shrink changes shapes, which the original model has none for: take --format "
            "torch or onnx."
        )
    if measure and not settings.shrink:
        raise ArgumentError("--measure compares with and without --shrink: give --shrink too.")
    target = out or Path(default_name(file, format, draws))
    check_outputs({"--out": target}, {"FILE": file}, force=force)
    opened = open_model(file, model, model_args, resolve_device("cpu"))
    measured: dict[str, Any] = {}
    if format == "safetensors":
        export_safetensors(opened.model, target, overwrite=force)
    else:
        write = export_torch if format == "torch" else export_onnx
        with render.status(f"Exporting to {target}..."):
            write(
                opened.model, target, torch.zeros(2, *opened.input.size), **vars(settings),
                info=described(opened, settings), overwrite=force,
            )  # fmt: skip
        if measure:
            with render.status("Measuring..."):
                measured = _measured(opened, settings)
    size, seed = target.stat().st_size, None if draws is None else settings.seed
    if json:
        about = {"file": str(target), "format": format, "bytes": size, **measured}
        render.as_json({**about, "draws": draws, "seed": seed})
    elif not quiet:
        what = "the posterior means" if draws is None else f"{draws} draws (seed {seed})"
        render.text(f"Wrote {target}: {what}, {size / 2**20:.2f} MiB.")
        if measured:
            before, after = measured["whole"], measured["shrunk"]
            render.text(
                f"Multiply-adds of an image {after['multiply_adds']:,} instead of "
                f"{before['multiply_adds']:,}; a batch of {_BATCH} takes "
                f"{after['milliseconds']:.3g} ms here instead of {before['milliseconds']:.3g} "
                "(torch, CPU, median)."
            )
        render.text("\n".join(usage(opened, target, format)))


def _measured(opened: Opened, settings: ProgramSettings) -> dict[str, dict[str, float]]:
    """Multiply-adds of an image and latency of a batch, of the whole program and the shrunk one."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ..export import to_program
    from ..pruning import latency

    images = torch.randn(_BATCH, *opened.input.size)
    found = {}
    for name, shrink in (("whole", False), ("shrunk", True)):
        run = to_program(opened.model, images, **vars(replace(settings, shrink=shrink))).module()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run(images)
        operations = counter.get_total_flops() // (2 * _BATCH)
        found[name] = {"multiply_adds": operations, "milliseconds": 1e3 * latency(run, images)}
    return found


def default_name(file: Path, format: str, draws: int | None) -> str:
    """``net.bbb.safetensors`` becomes ``net.safetensors``, ``net.pt2`` or ``net.k10.onnx``."""
    stem = file.name.removesuffix(".safetensors").removesuffix(".bbb")
    if file.name == stem + SUFFIX[format]:
        stem += ".means"
    return f"{stem}{'' if draws is None else f'.k{draws}'}{SUFFIX[format]}"


def described(opened: Opened, settings: ProgramSettings) -> dict[str, Any]:
    """What a program's file says of its input and output."""
    from ..storage import classes_in

    draws = settings.num_samples
    return {
        "model": opened.spec.name,
        "input": asdict(opened.input),
        "output": "logits" if draws is None else "probabilities",
        "classes": list(classes_in(opened.header)),
        **({} if draws is None else {"draws": draws, "seed": settings.seed}),
    }


def usage(opened: Opened, target: Path, format: str) -> list[str]:
    """The Python lines that use the file."""
    shape = ", ".join(map(str, opened.input.size))
    if format == "torch":
        return [
            "  import torch",
            f"  program = torch.export.load({str(target)!r}).module()",
            f"  output = program(torch.zeros(1, {shape}))",
        ]
    if format == "onnx":
        return [
            "  import numpy, onnxruntime",
            f"  session = onnxruntime.InferenceSession({str(target)!r})",
            "  name = session.get_inputs()[0].name",
            f"  output = session.run(None, {{name: numpy.zeros((1, {shape}), 'float32')}})[0]",
        ]
    spec = opened.spec
    if spec.source != "timm":
        return [
            "  from safetensors.torch import load_file",
            f"  model.load_state_dict(load_file({str(target)!r}))  # of {spec.name}",
        ]
    chosen = {"num_classes": spec.num_classes, "in_chans": spec.in_chans, **spec.model_args}
    given = "".join(f", {key}={value!r}" for key, value in chosen.items() if value is not None)
    if spec.img_size is not None:
        overlay = {"input_size": opened.input.size}
        given += f", pretrained_cfg_overlay={overlay!r}"
    return [
        "  import timm",
        f"  model = timm.create_model({spec.name!r}{given}, checkpoint_path={str(target)!r})",
    ]
