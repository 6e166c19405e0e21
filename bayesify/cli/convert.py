"""``bayesify convert``: a deterministic model becomes a file of a Bayesian one."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..errors import ArgumentError
from ..settings import Shown
from ..settings.fields import Seed
from .options import Force, Json, Quiet
from .outputs import check_outputs

if TYPE_CHECKING:
    from torch import nn

    from ..conversion import InitialStd
    from ..models import ModelSpec
    from ..planning import ConversionPlan, PlanRow

SUFFIX = ".bbb.safetensors"


@dataclass(frozen=True, kw_only=True)
class Converting:
    """What becomes Bayesian, and how.

    Args:
        skip: Stays deterministic: a class name (LayerNorm), a module (patch_embed), a glob on names
            (blocks.*.attn.*), or re:.... Repeatable.
        only: Only this may become Bayesian. Repeatable.
        preset: full, no-conv, linear-only, no-layernorm, last-layer.
        prior_std: Standard deviation of the prior.
        prior_mean: Mean of the prior: a number, or initial for the weights given.
        relative_prior: --prior-std is a share of each tensor's root mean square.
        initial_std: Initial sigma: a number for every weight, 0.01, or a share of each tensor's
            root mean square, 0.05rms; 0.01rms to 0.1rms suits training from random weights. Without
            it sigma is so small that a pretrained model keeps its function.
        relative_std: X is --initial-std Xrms.
        logvar: Log variance; X is --initial-std exp(X / 2).
        estimator: weight, local or flipout, for all layers that can take it, or for those that a
            pattern matches: head=local. Repeatable; the first that matches counts.
        strict: A pattern that matches nothing is an error.
    """

    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    preset: str | None = None
    prior_std: float = 1.0
    prior_mean: str = "0"
    relative_prior: bool = False
    initial_std: Annotated[str | None, Shown(metavar="STD")] = None
    relative_std: Annotated[float | None, Shown(hidden=True)] = None
    logvar: Annotated[float | None, Shown(hidden=True)] = None
    estimator: Annotated[tuple[str, ...], Shown(metavar="[PATTERN=]NAME")] = ()
    strict: bool = False

    def arguments(self) -> dict[str, Any]:
        """What :func:`bayesify.plan` and :func:`bayesify.to_bbb_` take."""
        from ..conversion import BBBConfig
        from ..priors import GaussianPrior

        mean: Any = "initial" if self.prior_mean == "initial" else _number(self.prior_mean)
        return {
            "skip": self.skip, "only": self.only, "preset": self.preset,
            "prior": GaussianPrior(self.prior_std, mean, relative=self.relative_prior),
            "initial_std": self._initial_std(), "estimator": _estimators(self.estimator),
            "config": BBBConfig(strict=self.strict),
        }  # fmt: skip

    def _initial_std(self) -> InitialStd | None:
        """The initial sigma, from ``--initial-std`` or the options of before."""
        from ..conversion import RelativeStd, read_initial_std

        given, relative, logvar = self.initial_std, self.relative_std, self.logvar
        if sum(value is not None for value in (given, relative, logvar)) > 1:
            raise ArgumentError(
                "--initial-std, --relative-std and --logvar all set the initial sigma: give one."
            )
        if given is not None:
            return read_initial_std(given)
        if relative is not None:
            return RelativeStd(relative)
        return None if logvar is None else math.exp(min(0.5 * logvar, 100.0))  # refused, not inf


@dataclass(frozen=True, kw_only=True)
class Building:
    """How the model is built.

    Args:
        num_classes: Outputs of the classifier.
        in_chans: Channels of the input.
        img_size: Side of the input in pixels.
        weights: A safetensors file, or a torch file of a state_dict.
        pretrained: Fetch the published weights.
    """

    num_classes: int | None = None
    in_chans: int | None = None
    img_size: int | None = None
    weights: Annotated[Path | None, Shown(metavar="FILE")] = None
    pretrained: bool = False

    @property
    def source(self) -> str:
        """Where the weights come from."""
        given = "random" if self.weights is None else self.weights.name
        return "pretrained" if self.pretrained else given


def convert(
    name: Annotated[
        str,
        Shown(
            argument=True,
            metavar="MODEL",
            text="A timm name, torchvision:NAME, or package.module:factory.",
        ),
    ],
    converting: Converting,
    building: Building,
    out: Annotated[
        Path | None, Shown(letter="-o", metavar="FILE", text=f"Default: ./NAME{SUFFIX}.")
    ] = None,
    force: Force = False,
    dry_run: Annotated[bool, Shown(text="Print the plan and write nothing.")] = False,
    show: Annotated[
        str | None,
        Shown(metavar="MODULE", text="Print a module's forward before and after; . is the model."),
    ] = None,
    verbose: Annotated[bool, Shown(letter="-v", text="One row for each parameter.")] = False,
    seed: Annotated[Seed, Shown(text="Seed of all that is random.")] = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Give the weights of a model a Gaussian posterior, and write the result into a file.

    For example: bayesify convert resnet50 --skip BatchNorm2d --pretrained
    """  # fmt: skip
    import torch

    from .. import storage
    from ..convert import to_bbb_
    from ..models import ModelSpec, create_model
    from ..planning import plan
    from . import render

    target = out or Path(default_name(name))
    if not dry_run:
        check_outputs({"--out": target}, {"--weights": building.weights}, force=force)
    arguments = converting.arguments()
    spec = ModelSpec(name, building.num_classes, building.in_chans, building.img_size)
    with render.status(f"Building {name}..."):
        torch.manual_seed(seed)
        model = create_model(name, **vars(building))
    result = plan(model, **arguments)
    to_bbb_(model, **arguments)
    notes = list(result.notes)
    if building.source == "random":
        notes.append(
            f"The weights of {name} are random. Give real ones: --weights FILE"
            + ("." if spec.source == "factory" else ", or --pretrained.")
        )
    listing = None if show is None else before_and_after(model, spec, show)
    if not dry_run:
        info = {"weights": building.source}
        storage.save(model, target, spec=spec, info=info, overwrite=force)
    written = None if dry_run else str(target)
    if json:
        document = {"file": written, **result.to_json(), "notes": notes}
        render.as_json(document if listing is None else {**document, "code": listing})
        return
    if not quiet:
        print_plan(result, verbose)
    for line in (*result.fixed, *result.hints, *result.spacing, *notes):
        render.note(line)
    for entry in listing or ():
        print_code(entry)
    if written is not None and not quiet:
        size = target.stat().st_size / 2**20
        render.text(f"\nWrote {written} ({size:.1f} MiB). In Python:\n")
        render.text("\n".join(f"    {line}" for line in python_lines(spec, written)))


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ArgumentError(f"--prior-mean must be a number or initial, not {value!r}.") from None


def _estimators(given: Sequence[str]) -> dict[str, str]:
    """``["flipout", "head=local"]`` as ``{"head": "local", "*": "flipout"}``."""
    pairs = [(p or "*", e) for p, _, e in (text.rpartition("=") for text in given)]
    named = [pair for pair in pairs if pair[0] != "*"]
    return dict([*named, *(pair for pair in pairs if pair[0] == "*")])


def default_name(name: str) -> str:
    """The file that a model of this name is written to: ``resnet50.bbb.safetensors``."""
    return re.sub(r"[^\w.-]", "_", name.rpartition(":")[2]) + SUFFIX


def python_lines(spec: ModelSpec, file: str) -> list[str]:
    """Three lines of Python that load the file and predict."""
    lines = ["import bayesify", f"model = bayesify.load({file!r})"]
    if spec.source == "factory":
        module, _, factory = spec.name.partition(":")
        lines = [
            f"import bayesify, {module}",
            f"model = bayesify.load({file!r}, model={module}.{factory}())",
        ]
    return [*lines, "outputs = bayesify.predict(model, images, num_samples=16)  # (16, batch, ...)"]


def print_plan(plan: ConversionPlan, verbose: bool) -> None:
    """Print what becomes Bayesian: a row for each part of the model, or for each parameter."""
    from . import render

    if verbose:
        render.table(
            ("parameter", "layer", "shape", "action", "estimator", "sigma", "read in"),
            [
                (" = ".join((r.name, *r.aliases)), r.owner, " x ".join(map(str, r.shape)),
                 _action(r), r.estimator, r.std, r.rewrite)
                for r in plan.rows
            ],
        )  # fmt: skip
    else:
        render.table(
            ("part", "layers", "parameters", "action", "estimator", "sigma"),
            [
                (
                    part,
                    _layers(rows),
                    sum(r.elements for r in rows),
                    action,
                    _estimates(rows),
                    _sigmas(rows),
                )
                for (part, action), rows in parts(plan.rows).items()
            ],
        )
    priors = ", ".join(sorted({r.prior for r in plan.rows if r.bayes}))
    render.text(
        f"{plan.model}: {plan.bayesian_elements:,} of {plan.elements:,} parameters "
        f"({plan.share:.2%}) get a posterior, prior {priors}."
    )


def parts(rows: tuple[PlanRow, ...]) -> dict[tuple[str, str], list[PlanRow]]:
    """The rows by part of the model and action; a part is the first name in which rows differ."""
    paths = [r.name.split(".") for r in rows]
    depth = 1
    while len({tuple(p[:depth]) for p in paths}) == 1 and any(len(p) > depth + 1 for p in paths):
        depth += 1
    found: dict[tuple[str, str], list[PlanRow]] = defaultdict(list)
    for row, path in zip(rows, paths, strict=True):
        part = ".".join("*" if step.isdigit() else step for step in path[:depth])
        found[part, _action(row)].append(row)
    return dict(found)


def _action(row: PlanRow) -> str:
    return "posterior" if row.bayes else row.action


def _layers(rows: list[PlanRow]) -> str:
    owners = {row.name.rpartition(".")[0]: row.owner for row in rows}
    return ", ".join(f"{n} {kind}" for kind, n in Counter(owners.values()).most_common())


def _estimates(rows: list[PlanRow]) -> str:
    return ", ".join(dict.fromkeys(row.estimator for row in rows if row.estimator))


def _sigmas(rows: list[PlanRow]) -> str:
    stds = [row.std for row in rows if row.std is not None]
    if not stds:
        return ""
    low, high = f"{min(stds):.2g}", f"{max(stds):.2g}"
    return low if low == high else f"{low} to {high}"


def before_and_after(model: nn.Module, spec: ModelSpec, path: str) -> list[dict[str, Any]]:
    """The forward methods of a module and of those below it that draw, before and after.

    Returns:
        ``module``, ``alike`` (the modules with the same code), ``class``, ``method``, ``rung``
        (plain or guided fx, or swap: the original with each read of a parameter exchanged), and
        the sources ``before`` and ``after``.

    Raises:
        ArgumentError: There is no such module, or its forward does not run on zeros.
    """
    import difflib

    import torch

    from ..models import input_config
    from ..rewriter.owner import original_class
    from ..rewriter.variants import generated_code, rungs
    from ..scope import sampled

    modules = dict(model.named_modules())
    name = "" if path == "." else path
    if name not in modules:
        close = difflib.get_close_matches(path, modules, n=3, cutoff=0.0)
        raise ArgumentError(f"--show: there is no module {path!r}. Closest: {', '.join(close)}.")
    size = input_config(model, img_size=spec.img_size, in_chans=spec.in_chans).size
    training = model.training
    try:
        with torch.no_grad(), sampled(model.eval()):
            model(torch.zeros(1, *size))
    except Exception as error:
        raise ArgumentError(
            f"--show: the model does not take one image of {' x '.join(map(str, size))} "
            f"({type(error).__name__}: {error}). Give its --img-size and --in-chans."
        ) from error
    finally:
        model.train(training)
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for rung in rungs(model):
        below = rung.owner.startswith(f"{name}." if name else "") and rung.reason != "0 draws"
        if rung.owner != name and not below:
            continue
        kind = original_class(type(modules[rung.owner]))
        after = generated_code(modules[rung.owner]).get(rung.method, "").rstrip()
        entry = {
            "module": rung.owner, "alike": [], "class": kind.__name__, "method": rung.method,
            "rung": rung.rung, "reason": rung.reason, "after": after,
            "before": _source(getattr(kind, rung.method)),
        }  # fmt: skip
        first = found.setdefault((kind.__name__, rung.method, after), entry)
        if first is not entry:
            first["alike"].append(rung.owner)
    if not found:
        raise ArgumentError(f"--show: nothing in {path!r} draws: it holds no Bayesian parameter.")
    return list(found.values())


def _source(function: object) -> str:
    import inspect
    import textwrap

    try:
        return textwrap.dedent(inspect.getsource(function)).rstrip()  # type: ignore[arg-type]
    except OSError:
        return "# its source is not in a file"


def print_code(entry: dict[str, Any]) -> None:
    """Print one method before and after."""
    from . import render

    alike = f" and {len(entry['alike'])} alike" if entry["alike"] else ""
    title = f"{entry['module'] or 'the model'}{alike}: {entry['class']}.{entry['method']}"
    render.code(entry["before"], title=f"\n{title}, as it was")
    render.code(
        entry["after"] or "# as it was, with each read of a parameter exchanged for a draw",
        title=f"\n{title}, when it draws ({entry['rung']} rung, {entry['reason']})",
    )
