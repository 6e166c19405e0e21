"""Regression with error bars: a small network on noisy points, wide where there are none.

python examples/regression.py [OUT.png]
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import bayesify
from bayesify.likelihoods import Gaussian, Predictive

NOISE_STD = 0.1


def truth(x: Tensor) -> Tensor:
    return torch.sin(2 * x) + 0.3 * x


def points(n: int, low: float, high: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = low + (high - low) * torch.rand(n, 1, generator=generator)
    return x, truth(x) + NOISE_STD * torch.randn(n, 1, generator=generator)


def main(out: str = "demo_out/regression.png") -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    x, y = points(200, -2.0, 2.0, generator)
    network = nn.Sequential(
        nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1)
    )
    model = bayesify.to_bbb(network, estimator="local")
    bayesify.fit(
        model,
        TensorDataset(x, y),
        likelihood=Gaussian("learned").standardise_(y),
        epochs=150,
        batch_size=20,
        lr=1e-2,
        kl_warmup=0.5,
        on_start=print,
    )

    test_x, test_y = points(1000, -2.0, 2.0, generator)
    measured = bayesify.evaluate(model, TensorDataset(test_x, test_y), num_samples=100)[-1]
    far = predictive(model, torch.tensor([[-4.0], [4.0]]))
    result = {
        "noise_std": float(bayesify.likelihood_of(model).std().detach()),
        "rmse": float((truth(test_x) - predictive(model, test_x).mean).square().mean().sqrt()),
        "nll": measured.nll,
        "share_in_95_percent_band": measured.coverage["0.95"],
        "std_at_the_data": measured.std,
        "std_far_away": float(far.std.mean()),
    }
    for name, value in result.items():
        print(f"{name:26} {value:.3f}")
    draw(model, x, y, out)
    return result


def predictive(model: nn.Module, x: Tensor) -> Predictive:
    return bayesify.predict(model, x, num_samples=100, seed=0, reduce="predictive")


def draw(model: nn.Module, x: Tensor, y: Tensor, out: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grid = torch.linspace(-4, 4, 300)[:, None]
    p = predictive(model, grid)
    low, high = (ends[:, 0].numpy() for ends in p.interval(0.95))
    line = grid[:, 0].numpy()
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    axes.fill_between(line, low, high, alpha=0.25, label="95 % interval")
    axes.plot(line, p.mean[:, 0].numpy(), label="mean of 100 draws")
    axes.plot(line, truth(grid)[:, 0].numpy(), "k--", linewidth=1, label="truth")
    axes.plot(x[:, 0].numpy(), y[:, 0].numpy(), "k.", markersize=3, label="training points")
    axes.set(xlabel="x", ylabel="y", ylim=(-4, 4))
    axes.legend(loc="upper left")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    plt.close(figure)
    print(f"picture: {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
