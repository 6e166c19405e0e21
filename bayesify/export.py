"""A converted model for use without bayesify: its means, or K of its draws in one program."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from .convert import to_deterministic
from .errors import ArgumentError, BayesifyError, UnsupportedModuleError
from .inference import Given, class_logits
from .likelihoods import temperature_of
from .numeric import count
from .posterior import bayesian_sites
from .pruning.shrinking import shrink_
from .rewriter import caches
from .scope import as_seed, draws
from .seeds import fold
from .settings.export import ProgramSettings
from .settings.fields import documented, taken
from .storage import check_target, replacing
from .torch_private import forget_example_inputs, pytree
from .unconverted import warn_of_unconverted

INFO = "bayesify.json"
"""Name of the JSON text inside a .pt2 file; in an ONNX file it is the metadata ``bayesify``."""

_ONNX_LIMIT = 2**31  # bytes of one protobuf message, which an ONNX file is
_LONGEST = 400  # characters of a tracer's message, which can fill pages


class Ensemble(nn.Module):
    """K draws of a converted model as one deterministic module; :func:`ensemble` makes it.

    The draws are called one after the other, not by ``torch.vmap``: vmap fixes the size of the
    batch when it is exported, and has no rule for some operators.

    Attributes:
        members: The K deterministic models, which share all that was not drawn.
    """

    def __init__(self, members: list[nn.Module], *, per_draw: bool, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.members = nn.ModuleList(members)
        self.per_draw = per_draw

    def forward(self, *inputs: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Mean class probabilities (batch, classes); with ``per_draw`` also (K, batch, classes)."""
        found = []
        # an export has its own way with a forward that writes into its input: it refuses
        given = (
            None
            if torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
            else Given(inputs)
        )
        for member in self.members:
            output = member(*inputs) if given is None else given.call(member)
            logits = class_logits(output, "ensemble")
            wide = logits if logits.dtype == torch.float64 else logits.float()
            found.append((wide / self.temperature).softmax(-1))
        probs = torch.stack(found)
        return (probs.mean(0), probs) if self.per_draw else probs.mean(0)


def ensemble(
    model: nn.Module, num_samples: int, *, seed: int = 0, per_draw: bool = False
) -> Ensemble:
    r"""Hold ``num_samples`` draws of a classifier as one deterministic module.

    ``mean_k softmax(f(x; w_k))`` with the weights ``w_k`` of ``predict(..., seed=seed)``: it gives
    what :func:`bayesify.predict` gives with that seed, within rounding, and draws nothing.

    Args:
        model: A converted model whose output is logits (batch, classes); it is left as it is.
        num_samples: Number K of draws, at least 1: the memory is K times that of the weights.
        seed: Of the draws.
        per_draw: Also give the probabilities of each draw.

    Shape:
        Probabilities (batch, classes), or a tuple of these and (K, batch, classes).

    Returns:
        The module, in ``eval()``.

    Raises:
        ArgumentError: ``num_samples`` or ``seed`` cannot work; when the module is called, the
            model's output is no such table of logits.
        UnsupportedModuleError: ``model`` has no posterior.

    >>> import torch, bayesify
    >>> model = bayesify.to_bbb(torch.nn.Linear(2, 3))
    >>> x = torch.ones(5, 2)
    >>> mean = bayesify.predict(model, x, num_samples=4, seed=0, reduce="probabilities").mean
    >>> torch.allclose(bayesify.ensemble(model, 4, seed=0)(x), mean)
    True
    """
    num_samples = count("num_samples", num_samples)
    bayesian_sites(model)
    warn_of_unconverted(model, once=True)
    base = int(as_seed(seed))
    means = to_deterministic(model).eval().requires_grad_(False)
    members = []
    for k in range(num_samples):
        with torch.no_grad():
            drawn = draws(model, seed=fold(base, k))
        # The copies share what was not drawn: a deep copy keeps what its memo holds.
        weights = {id(means.get_parameter(name)) for name in drawn}
        shared = [*means.parameters(), *means.buffers()]
        member = copy.deepcopy(means, {id(t): t for t in shared if id(t) not in weights})
        with torch.no_grad():
            for name, value in drawn.items():
                member.get_parameter(name).copy_(value)
        caches.drop(member)
        members.append(member)
    return Ensemble(members, per_draw=per_draw, temperature=temperature_of(model)).eval()


@documented(ProgramSettings)
def to_program(  # noqa: D417 - the others are fields of ProgramSettings
    model: nn.Module,
    *inputs: Any,
    num_samples: int | None = ProgramSettings.num_samples,
    seed: int = ProgramSettings.seed,
    per_draw: bool = ProgramSettings.per_draw,
    shrink: bool = ProgramSettings.shrink,
) -> ExportedProgram:
    """Export the means, or K draws, as a program that runs without the model's code.

    Before it is returned, it has given what the model gives, at another batch size than that of
    ``inputs``.

    Args:
        model: A converted model; it is left as it is.
        *inputs: Positional arguments of the model as an example; the first dimension of each
            tensor is the batch.

    Returns:
        The program, for any batch size; ``.module()`` runs it.

    Raises:
        ArgumentError: An argument has a value that cannot work, or an ensemble's output is no
            table of logits.
        UnsupportedModuleError: ``model`` has no posterior, or cannot be exported.

    >>> import torch, bayesify
    >>> layers = torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
    >>> model = bayesify.to_bbb(torch.nn.Sequential(*layers))
    >>> model = bayesify.prune_units_(model, 0.5)
    >>> program = to_program(model, torch.ones(2, 3), shrink=True)
    >>> [tuple(p.shape) for p in program.parameters()]
    [(4, 3), (4,), (2, 4), (2,)]
    """
    settings = taken(ProgramSettings, locals())
    bayesian_sites(model)
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if not tensors or any(t.dim() == 0 or t.shape[0] != tensors[0].shape[0] for t in tensors):
        raise ArgumentError(
            "An export needs example inputs of the model: tensors whose first dimension is the "
            f"batch, got shapes {[tuple(t.shape) for t in tensors]}."
        )
    if tensors[0].shape[0] == 0:
        raise ArgumentError("An export needs an example of the model's input, the batch is empty.")
    module: nn.Module
    if settings.num_samples is None:
        module = to_deterministic(model).eval().requires_grad_(False)
        caches.drop(module)
    else:
        module = ensemble(
            model, settings.num_samples, seed=settings.seed, per_draw=settings.per_draw
        )
    # torch.export takes a batch of 1 for a constant
    example = _each(inputs, lambda t: torch.cat([t, t[:1]]) if len(t) == 1 else t)
    batch = Dim("batch", min=1, max=2**31 - 1)  # torch 2.6 wants to know that it is no 2**63 - 1
    shapes = pytree.tree_map(lambda v: {0: batch} if isinstance(v, Tensor) else None, example)
    # A model may keep results of a call: those of the trace must not serve the comparison.
    traced = copy.deepcopy(module)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own
            # an ensemble takes *inputs, which are one argument to torch.export
            given = (shapes,) if isinstance(module, Ensemble) else shapes
            # torch 2.6 is strict if nothing is said
            program = torch.export.export(traced, example, dynamic_shapes=given, strict=False)
            if settings.shrink:
                graph_module = program.module()
                if shrink_(graph_module):
                    program = torch.export.export(
                        graph_module, example, dynamic_shapes=shapes, strict=False
                    )
    except ArgumentError:
        raise
    except Exception as error:  # the tracer raises what the model raises
        raise UnsupportedModuleError(
            f"{type(model).__name__} cannot be exported as a program of any batch size "
            f"({_reason(error)}). The format safetensors works for every model."
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    _compare(model, program, module, example)
    forget_example_inputs(program)  # the user's data, which the file would hold
    return program


def export_safetensors(
    model: nn.Module, path: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Write the posterior means under the keys of the original model; pruned weights are zeros.

    ``timm.create_model(name, checkpoint_path=path)`` or ``load_state_dict`` of the original model
    reads it. Tied weights stand under each of their keys. The same model gives the same bytes.

    Args:
        model: A converted model.
        path: The file to write.
        overwrite: Replace a file that exists.

    Raises:
        CheckpointError: The path exists, is a folder or cannot be written.
        UnsupportedModuleError: ``model`` has no posterior.
    """
    state = to_deterministic(model).state_dict()
    with replacing(path, overwrite=overwrite) as temporary:
        tensors = {key: value.cpu().clone().contiguous() for key, value in state.items()}
        save_file(tensors, temporary, metadata={"format": "pt"})


@documented(ProgramSettings)
def export_torch(  # noqa: D417 - the others are fields of ProgramSettings
    model: nn.Module,
    path: str | os.PathLike[str],
    *inputs: Any,
    num_samples: int | None = ProgramSettings.num_samples,
    seed: int = ProgramSettings.seed,
    per_draw: bool = ProgramSettings.per_draw,
    shrink: bool = ProgramSettings.shrink,
    info: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the program of :func:`to_program`; ``torch.export.load(path).module()`` runs it.

    Args:
        model: As in :func:`to_program`.
        path: The file to write, by convention ``.pt2``.
        *inputs: As in :func:`to_program`.
        info: Anything that JSON can hold; it stands in the file as ``bayesify.json``.
        overwrite: Replace a file that exists.

    Raises:
        ArgumentError: An argument has a value that cannot work.
        CheckpointError: The path exists, is a folder or cannot be written.
        UnsupportedModuleError: ``model`` has no posterior, or cannot be exported.
    """
    check_target(path, overwrite=overwrite)
    text = _info(info)
    program = to_program(
        model, *inputs, num_samples=num_samples, seed=seed, per_draw=per_draw, shrink=shrink
    )
    with replacing(path, overwrite=overwrite) as temporary, open(temporary, "wb") as file:
        checked = _Checked(file)
        torch.export.save(program, checked, extra_files={INFO: text})  # type: ignore[arg-type]
        if checked.error is not None:
            raise checked.error


@documented(ProgramSettings)
def export_onnx(  # noqa: D417 - the others are fields of ProgramSettings
    model: nn.Module,
    path: str | os.PathLike[str],
    *inputs: Any,
    num_samples: int | None = ProgramSettings.num_samples,
    seed: int = ProgramSettings.seed,
    per_draw: bool = ProgramSettings.per_draw,
    shrink: bool = ProgramSettings.shrink,
    info: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the program of :func:`to_program` as ONNX.

    Its outputs are ``output``, or for an ensemble ``probabilities`` (and ``per_draw``); its first
    dimension is free.

    Args:
        model: As in :func:`export_torch`.
        path: The file to write, by convention ``.onnx``; the weights are inside it.
        *inputs: As in :func:`export_torch`.
        info: As in :func:`export_torch`; it stands in the metadata of the file as ``bayesify``.
        overwrite: As in :func:`export_torch`.

    Raises:
        ArgumentError: As in :func:`export_torch`, or onnx and onnxscript are not installed.
        CheckpointError: As in :func:`export_torch`.
        UnsupportedModuleError: As in :func:`export_torch`, an operator has no counterpart in ONNX,
            or the weights take 2 GiB or more, which one ONNX file cannot hold.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ArgumentError(
            f"ONNX needs the package {' and '.join(missing)}: pip install 'bayesify[onnx]'. The "
            "formats torch and safetensors need nothing more."
        )
    check_target(path, overwrite=overwrite)
    text = _info(info)
    program = to_program(
        model, *inputs, num_samples=num_samples, seed=seed, per_draw=per_draw, shrink=shrink
    )
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    if size >= _ONNX_LIMIT:
        raise UnsupportedModuleError(
            f"The weights take {size / 2**30:.1f} GiB and one ONNX file holds less than 2 GiB: "
            "export fewer draws, or take the format torch."
        )
    names = ["output"]
    if num_samples is not None:
        names = ["probabilities", "per_draw"] if per_draw else ["probabilities"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of onnxscript's, on its own future
            if any(_is_odd_attention(node) for node in program.graph.nodes):
                with sdpa_kernel(SDPBackend.MATH):
                    program = program.run_decompositions()
                for node in program.graph.nodes:  # onnxscript's full_like does not know it
                    if node.kwargs.get("memory_format") is torch.preserve_format:
                        rest = {k: v for k, v in node.kwargs.items() if k != "memory_format"}
                        node.kwargs = rest
            written = torch.onnx.export(
                program, dynamo=True, verbose=False,
                output_names=names if len(program.graph_signature.user_outputs) == len(names)
                else None,
            )  # fmt: skip
    except Exception as error:  # each stage of the exporter raises kinds of its own
        raise UnsupportedModuleError(
            f"{type(model).__name__} cannot be written as ONNX ({_reason(error)}). Take the format "
            "torch, which is a program too, or safetensors. Newer exporters write more: this is "
            f"torch {torch.__version__} with onnxscript {metadata.version('onnxscript')}, pip "
            "install --upgrade onnx onnxscript brings the newest."
        ) from error
    assert written is not None
    written.model.metadata_props["bayesify"] = text
    with replacing(path, overwrite=overwrite) as temporary:
        try:
            written.save(temporary, external_data=False)
        except OSError:
            raise
        except Exception as error:  # onnxscript's own kind, around a TypeError of protobuf
            raise UnsupportedModuleError(
                f"{type(model).__name__} cannot be written as ONNX ({_reason(error)}). With torch "
                "2.6 and its onnxscript, protobuf 7 can be why: pip install 'protobuf<7'"
            ) from error


class _Checked(io.RawIOBase):
    """A file for torch's writer, which ends the whole process where a write fails."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                return self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        if self.error is None:
            try:
                return self.file.seek(offset, whence)  # which writes what it has in its buffer
            except OSError as error:
                self.error = error
        return offset


def _is_odd_attention(node: torch.fx.Node) -> bool:
    """Attention over other than four dimensions, which ONNX takes as matmul and softmax alone."""
    attention = torch.ops.aten.scaled_dot_product_attention.default
    return node.target is attention and node.meta["val"].dim() != 4


def _compare(
    model: nn.Module, program: ExportedProgram, module: nn.Module, example: tuple[Any, ...]
) -> None:
    """See that the program gives what the module gives, with one more example in the batch."""
    other = _each(example, lambda t: torch.cat([t, t[:1]]))
    with torch.no_grad():
        expected, found = (
            [v for v in pytree.tree_leaves(run(*other)) if isinstance(v, Tensor)]
            for run in (module, program.module())
        )
    for right, given in zip(expected, found, strict=True):
        scale = max(1.0, float(right.abs().max())) if right.numel() else 1.0
        kind = right.dtype if right.is_floating_point() else torch.float32
        allowed = scale * math.sqrt(torch.finfo(kind).eps)
        if given.shape != right.shape or not torch.allclose(given, right, 0.0, allowed):
            raise UnsupportedModuleError(
                f"{type(model).__name__} was exported, but at another batch size the program gives "
                "other outputs than the model: it depends on the example, or on random numbers "
                "of its own. The format safetensors works for every model."
            )


def _each(inputs: tuple[Any, ...], change: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    changed: tuple[Any, ...] = pytree.tree_map(
        lambda v: change(v) if isinstance(v, Tensor) else v, inputs
    )
    return changed


def _info(info: Mapping[str, Any] | None) -> str:
    try:
        return json.dumps(dict(info or {}), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"info must be what JSON can hold: {error}.") from error


def _reason(error: BaseException) -> str:
    """The innermost cause, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, BayesifyError):
        return str(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:_LONGEST]}{'...' if len(text) > _LONGEST else ''}"
