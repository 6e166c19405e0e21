"""A training step beside the deterministic one, for bayesify and every peer that is installed.

    python benchmarks/step.py [--rounds 15] [--only resnet18]     10 minutes on 2 cores
    python benchmarks/step.py --device cuda [--rounds 15]         3 minutes on a GPU, by estimate
    python benchmarks/step.py --only mlp --methods 'bayesify;bayesify, no C library'    a minute

In every round each method takes one step (forward, loss with its KL term, backward, AdamW,
gradients set to None), in an order that turns, and its time is divided by that of the deterministic
step of the same round. The result is the median of these ratios with quartiles. Peers are used as
their documentation says, in the settings written beside their adapter. On CUDA the forward runs
under bfloat16 autocast, and the peak of the memory of each method is noted. Writes
`results/step.json` or `results/step_cuda.json`, and `docs/speed.md` anew.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import speed_table
import timm
import torch
from paired import keep_memory, paired, without_library
from torch import Tensor, nn
from torch.nn import functional as F

import bayesify
from bayesify.kernels import native
from bayesify.posterior import Estimator
from bayesify.provenance import machine, provenance
from bayesify.storage import replacing

RESULTS = Path(__file__).parent / "results"
IN_A_ROW = {"cpu": 1, "cuda": 5}
"""Steps that are timed together: training does not wait for the GPU after each."""
NUM_DATA = 50_000
LR = 1e-4
Step = Callable[[Tensor, Tensor], Any]


# -- models ----------------------------------------------------------------------------------


def mlp() -> nn.Module:
    """10.5 M weights."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(),
        nn.Linear(2048, 10),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vit_tiny_patch16_224": (
        lambda: timm.create_model("vit_tiny_patch16_224", num_classes=10), (16, 3, 224, 224),
    ),
    "resnet18": (lambda: timm.create_model("resnet18", num_classes=10), (16, 3, 224, 224)),
    "mlp": (mlp, (64, 3, 32, 32)),
}  # fmt: skip

CUDA_MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    name: (lambda name=name: timm.create_model(name), (256, 3, 224, 224))
    for name in ("vit_base_patch16_224", "vit_small_patch16_224", "resnet50")
}


def logits(model: nn.Module, x: Tensor) -> Any:
    """Lowered to bfloat16 on a GPU, as people train there."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        return model(x)


# -- methods ---------------------------------------------------------------------------------


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)


def deterministic(model: nn.Module) -> Step:
    optimizer = adamw(model.parameters())

    def step(x: Tensor, y: Tensor) -> None:
        F.cross_entropy(logits(model, x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(estimator: Estimator) -> Callable[[nn.Module], Step]:
    """One draw a step, exact KL."""

    def method(model: nn.Module) -> Step:
        bayesify.to_bbb_(model, estimator=estimator)
        optimizer = adamw(bayesify.param_groups(model, lr=LR))

        def step(x: Tensor, y: Tensor) -> None:
            loss = F.cross_entropy(logits(model, x), y)
            bayesify.elbo_loss(loss, model, num_data=NUM_DATA).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return method


def ours_without_kl(model: nn.Module) -> Step:
    """One draw a step and nothing else: what the draw alone costs."""
    bayesify.to_bbb_(model)
    optimizer = adamw(bayesify.param_groups(model, lr=LR))

    def step(x: Tensor, y: Tensor) -> None:
        F.cross_entropy(logits(model, x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bayesian_torch(kind: str) -> Callable[[nn.Module], Step]:
    def method(model: nn.Module) -> Step:
        from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss

        device = next(model.parameters()).device
        dnn_to_bnn(
            model,
            {
                "prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0,
                "posterior_rho_init": -3.0, "type": kind, "moped_enable": True,
                "moped_delta": 0.1,
            },
        )  # fmt: skip
        model.to(device)  # the package makes its parameters on the CPU
        optimizer = adamw(model.parameters())

        def step(x: Tensor, y: Tensor) -> None:
            loss = F.cross_entropy(logits(model, x), y) + get_kl_loss(model) / NUM_DATA
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return method


def torchbayesian(model: nn.Module) -> Step:
    import torchbayesian.bnn as bnn

    device = next(model.parameters()).device
    bayesian: Any = bnn.BayesianModule(model).to(device)  # makes its parameters on the CPU
    optimizer = adamw(bayesian.parameters())

    def step(x: Tensor, y: Tensor) -> None:
        loss = F.cross_entropy(logits(bayesian, x), y) + bayesian.kl_divergence() / NUM_DATA
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ivon(model: nn.Module) -> Step:
    import ivon as library

    optimizer = library.IVON(model.parameters(), lr=LR, ess=NUM_DATA)

    def step(x: Tensor, y: Tensor) -> None:
        with optimizer.sampled_params(train=True):
            F.cross_entropy(logits(model, x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def torch_blue(model: nn.Module) -> Step:
    """Converted with the weights kept, one sample a step, the closed-form KL of the package."""
    from torch_blue import vi
    from torch_blue.vi.distributions import Categorical

    vi.convert_to_vimodule(model, keep_weights=True)
    bayesian: Any = model
    bayesian.return_log_probs = False
    loss_of = vi.AnalyticalKullbackLeiblerLoss(bayesian, Categorical(), dataset_size=NUM_DATA)
    optimizer = adamw(model.parameters())

    def step(x: Tensor, y: Tensor) -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            seen = bayesian(x, samples=1)
        (loss_of(seen, y) / NUM_DATA).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def posteriors(model: nn.Module) -> Step:
    """vi.diag, one sample a step with its one-sample KL, updated in place by torchopt's AdamW."""
    import posteriors as library
    import torchopt

    transform: Any = library.vi.diag.build(
        functools.partial(_log_posterior, model),
        torchopt.adamw(lr=LR, weight_decay=0.0),  # type: ignore[attr-defined,unused-ignore]
        temperature=1 / NUM_DATA, init_log_sds=-5.0,
    )  # fmt: skip
    state = [transform.init(dict(model.named_parameters()))]

    def step(x: Tensor, y: Tensor) -> None:
        state[0], _ = transform.update(state[0], (x, y), inplace=True)

    return step


def _log_posterior(model: nn.Module, params: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Of one datum on average, as the package's documentation writes it."""
    import posteriors as library

    x, y = batch
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        seen = torch.func.functional_call(model, params, (x,))
    prior: Tensor = library.diag_normal_log_prob(params)
    return prior / NUM_DATA - F.cross_entropy(seen, y), torch.tensor([])


METHODS: dict[str, tuple[str | None, Callable[[nn.Module], Step]]] = {
    "deterministic": (None, deterministic),
    "bayesify": (None, ours("weight")),
    "bayesify flipout": (None, ours("flipout")),
    "bayesify local": (None, ours("local")),
    "bayesify, no KL": (None, ours_without_kl),
    "bayesify, no C library": (None, lambda model: without_library(ours("weight")(model))),
    "bayesian-torch reparam": ("bayesian_torch", bayesian_torch("Reparameterization")),
    "bayesian-torch flipout": ("bayesian_torch", bayesian_torch("Flipout")),
    "torchbayesian": ("torchbayesian", torchbayesian),
    "torch_blue": ("torch_blue", torch_blue),
    "IVON": ("ivon", ivon),
    "posteriors vi.diag": ("posteriors", posteriors),
}


# -- measuring -------------------------------------------------------------------------------


def measure(name: str, rounds: int, device: str) -> dict[str, Any]:
    """Ratios to the deterministic step of the same round, by method."""
    factory, shape = (MODELS if device == "cpu" else CUDA_MODELS)[name]
    torch.manual_seed(0)
    x, y = torch.randn(shape, device=device), torch.randint(0, 10, shape[:1], device=device)
    steps: dict[str, Callable[[], Any]] = {}
    found: dict[str, Any] = {}
    for method, (package, make) in METHODS.items():
        if package is not None and importlib.util.find_spec(package) is None:
            found[method] = {"error": "not installed"}
            continue
        if method == "bayesify, no C library" and (device == "cuda" or not native.there()):
            continue
        torch.manual_seed(0)
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        model = factory().train().to(device)
        try:
            step = make(model)
            for _ in range(3):
                step(x, y)
            found[method] = {}
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                step(x, y)
                found[method]["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        except Exception as error:
            found[method] = {"error": f"{type(error).__name__}: {error}"[:200]}
            continue
        steps[method] = functools.partial(step, x, y)
    count = IN_A_ROW[device]
    several = {m: functools.partial(repeated, step, count) for m, step in steps.items()}
    for method, row in paired(several, "deterministic", rounds, device).items():
        found[method] |= {**row, "seconds": row["seconds"] / count}
    return found


def repeated(step: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        step()


def main() -> None:
    keep_memory()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", choices=[*MODELS, *CUDA_MODELS], help="only this model")
    parser.add_argument("--methods", help="only these, separated by ;, nothing is written")
    options = parser.parse_args()
    if options.methods:
        for method in set(METHODS) - {"deterministic", *options.methods.split(";")}:
            del METHODS[method]
    models = MODELS if options.device == "cpu" else CUDA_MODELS
    results = {}
    for name in [options.only] if options.only else models:
        results[name] = measure(name, options.rounds, options.device)
        for method, row in results[name].items():
            print(f"{name:24}{method:26}", row.get("error") or
                  f"{row['median']:.3f} ({row['low']:.3f} to {row['high']:.3f}), "
                  f"{1000 * row['seconds']:.0f} ms", flush=True)  # fmt: skip
    if options.only or options.methods:
        return
    installed = [p for p, _ in METHODS.values() if p and importlib.util.find_spec(p)]
    sizes = {n: sum(p.numel() for p in make().parameters()) for n, (make, _) in models.items()}
    packages = {"bayesian_torch": "bayesian-torch", "ivon": "ivon-opt"}
    record = {
        "command": f"benchmarks/step.py --device {options.device} --rounds {options.rounds}",
        "rounds": options.rounds, "in_a_row": IN_A_ROW[options.device], "seed": 0,
        "threads": torch.get_num_threads(),
        "machine": machine(options.device),
        "weights": sizes,
        **provenance("torch", "timm", *sorted({packages.get(p, p) for p in installed})),
        "models": results,
    }  # fmt: skip
    result = RESULTS / ("step.json" if options.device == "cpu" else "step_cuda.json")
    with replacing(result, overwrite=True) as path:
        path.write_text(json.dumps(record, indent=1) + "\n")
    speed_table.write()


if __name__ == "__main__":
    main()
