"""30 draws of a network's output beside 30 deterministic forwards, and beside installed peers.

    python benchmarks/predict.py [--rounds 2] [--only resnet18]    15 minutes on 2 cores
    python benchmarks/predict.py --device cuda [--rounds 10]       3 minutes on a GPU, by estimate

In every round each method runs once, in an order that turns, and its time is divided by that of the
deterministic forwards of the same round; the result is the median of these ratios with quartiles.
One image gets four times as many rounds. No gradient is recorded. On CUDA the forwards run under
bfloat16 autocast, and the deterministic forward is also replayed as a CUDA graph. Writes
`results/predict.json` or `results/predict_cuda.json`, and `docs/speed.md` anew.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import speed_table
import timm
import torch
from paired import keep_memory, paired
from torch import Tensor, nn

import bayesify
from bayesify.provenance import machine, provenance
from bayesify.seeds import fold
from bayesify.storage import replacing

RESULTS = Path(__file__).parent / "results"
CASES = {
    "cpu": [("vit_tiny_patch16_224", 64), ("vit_tiny_patch16_224", 1), ("resnet18", 1)],
    "cuda": [("vit_base_patch16_224", 64), ("vit_base_patch16_224", 1), ("resnet50", 1)],
}
Run = Callable[[], Any]


def deterministic(model: nn.Module, x: Tensor, draws: int) -> Run:
    return lambda: [model(x) for _ in range(draws)]


def replayed(model: nn.Module, x: Tensor, draws: int) -> Run:
    """The deterministic forward as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # a cache of lowered weights would not be filled again on replay
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False), torch.cuda.graph(graph):
        model(x)
    return lambda: [graph.replay() for _ in range(draws)]


def ours(model: nn.Module, x: Tensor, draws: int) -> Run:
    bayesify.to_bbb_(model)
    return lambda: bayesify.predict(model, x, num_samples=draws, seed=0)


def ours_in_a_loop(model: nn.Module, x: Tensor, draws: int) -> Run:
    """What a user would write, without the memory and the batches of `predict`."""
    bayesify.to_bbb_(model)

    def run() -> None:
        for k in range(draws):
            with bayesify.one_draw(model, seed=fold(0, k)):
                model(x)

    return run


def bayesian_torch(model: nn.Module, x: Tensor, draws: int) -> Run:
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn

    dnn_to_bnn(
        model,
        {
            "prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0,
            "posterior_rho_init": -3.0, "type": "Reparameterization", "moped_enable": True,
            "moped_delta": 0.1,
        },
    )  # fmt: skip
    model.to(x.device).eval()
    return lambda: [model(x) for _ in range(draws)]


def torchbayesian(model: nn.Module, x: Tensor, draws: int) -> Run:
    import torchbayesian.bnn as bnn

    bayesian: Any = bnn.BayesianModule(model).to(x.device).eval()
    return lambda: [bayesian(x) for _ in range(draws)]


def torch_blue(model: nn.Module, x: Tensor, draws: int) -> Run:
    """All draws in one call, which the package runs under vmap."""
    from torch_blue import vi

    vi.convert_to_vimodule(model, keep_weights=True)
    bayesian: Any = model
    bayesian.return_log_probs = False
    return lambda: bayesian(x, samples=draws)


def posteriors(model: nn.Module, x: Tensor, draws: int) -> Run:
    import posteriors as library
    import torchopt

    state = library.vi.diag.init(dict(model.named_parameters()), torchopt.adam(), init_log_sds=-5.0)

    def run() -> None:
        for _ in range(draws):
            torch.func.functional_call(model, library.vi.diag.sample(state), (x,))

    return run


def ivon(model: nn.Module, x: Tensor, draws: int) -> Run:
    import ivon as library

    optimizer = library.IVON(model.parameters(), lr=1e-4, ess=50_000)

    def run() -> None:
        for _ in range(draws):
            with optimizer.sampled_params():
                model(x)

    return run


METHODS: dict[str, tuple[str | None, Callable[[nn.Module, Tensor, int], Run]]] = {
    "deterministic": (None, deterministic),
    "deterministic, CUDA graph": (None, replayed),
    "bayesify": (None, ours),
    "bayesify, one_draw in a loop": (None, ours_in_a_loop),
    "bayesian-torch reparam": ("bayesian_torch", bayesian_torch),
    "torchbayesian": ("torchbayesian", torchbayesian),
    "torch_blue": ("torch_blue", torch_blue),
    "IVON": ("ivon", ivon),
    "posteriors vi.diag": ("posteriors", posteriors),
}


def measure(name: str, batch: int, draws: int, rounds: int, device: str) -> dict[str, Any]:
    """Ratios to the deterministic forwards of the same round, by method."""
    torch.manual_seed(0)
    x = torch.randn(batch, 3, 224, 224, device=device)
    runs: dict[str, Run] = {}
    found: dict[str, Any] = {}
    for method, (package, make) in METHODS.items():
        if method == "deterministic, CUDA graph" and device == "cpu":
            continue
        if package is not None and importlib.util.find_spec(package) is None:
            found[method] = {"error": "not installed"}
            continue
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=10).to(device).eval()
        try:
            make(model, x, 2)()  # warm, and whether it runs at all
            torch.manual_seed(0)
            model = timm.create_model(name, num_classes=10).to(device).eval()
            runs[method] = make(model, x, draws)
            if batch == 1:
                runs[method]()
        except Exception as error:
            found[method] = {"error": f"{type(error).__name__}: {error}"[:200]}
            runs.pop(method, None)
    rounds *= 4 if batch == 1 else 1
    return {**found, **paired(runs, "deterministic", rounds, device)}


def main() -> None:
    keep_memory()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, help="four times as many for one image")
    parser.add_argument("--draws", type=int, default=30)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", help="a part of 'model, batch'; nothing is written")
    options = parser.parse_args()
    results = {}
    for name, batch in CASES[options.device]:
        case = f"{name}, {batch}"
        if options.only and options.only not in case:
            continue
        with (
            torch.no_grad(),
            torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"),
        ):
            results[case] = measure(name, batch, options.draws, options.rounds, options.device)
        for method, row in results[case].items():
            print(f"{case:26}{method:30}", row.get("error") or
                  f"{row['median']:.3f} ({row['low']:.3f} to {row['high']:.3f}), "
                  f"{1000 * row['seconds']:.0f} ms", flush=True)  # fmt: skip
    if options.only:
        return
    installed = [p for p, _ in METHODS.values() if p and importlib.util.find_spec(p)]
    packages = {"bayesian_torch": "bayesian-torch", "ivon": "ivon-opt"}
    record = {
        "command": f"benchmarks/predict.py --device {options.device} --rounds {options.rounds} "
        f"--draws {options.draws}",
        "rounds": options.rounds, "draws": options.draws, "seed": 0,
        "threads": torch.get_num_threads(), "machine": machine(options.device),
        **provenance("torch", "timm", *sorted({packages.get(p, p) for p in installed})),
        "cases": results,
    }  # fmt: skip
    result = RESULTS / ("predict.json" if options.device == "cpu" else "predict_cuda.json")
    with replacing(result, overwrite=True) as path:
        path.write_text(json.dumps(record, indent=1) + "\n")
    speed_table.write()


if __name__ == "__main__":
    main()
