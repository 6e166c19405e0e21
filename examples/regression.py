"""Regression with error bars: a small network on noisy points, wide where there are none.

python examples/regression.py [OUT.png]
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import bayesify

NOISE_STD = 0.1


def truth(x: Tensor) -> Tensor:
    return torch.sin(2 * x) + 0.3 * x


def points(n: int, low: float, high: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = low + (high - low) * torch.rand(n, 1, generator=generator)
    return x, truth(x) + NOISE_STD * torch.randn(n, 1, generator=generator)


def negative_log_likelihood(output: Tensor, target: Tensor) -> Tensor:
    """Mean over the examples, of a Gaussian with the known noise; its constant left out."""
    return ((output - target) / NOISE_STD).square().mean() / 2


def error_bars(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the prediction: uncertainty about the weights plus noise."""
    mean, std = bayesify.predict(model, x, num_samples=200, seed=0, reduce="moments")
    return mean, torch.hypot(std, torch.tensor(NOISE_STD))


def main(out: str = "demo_out/regression.png") -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    x, y = points(200, -2.0, 2.0, generator)
    network = nn.Sequential(
        nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1)
    )
    model = bayesify.to_bbb(network)
    bayesify.fit(
        model,
        TensorDataset(x, y),
        loss=negative_log_likelihood,
        epochs=150,
        batch_size=20,
        lr=1e-2,
        kl_warmup=0.2,
        on_start=print,
    )

    test_x, test_y = points(1000, -2.0, 2.0, generator)
    mean, std = error_bars(model, test_x)
    inside = ((test_y - mean).abs() < 1.96 * std).double().mean().item()
    far_std = error_bars(model, torch.tensor([[-4.0], [4.0]]))[1].mean().item()
    result = {
        "rmse": (truth(test_x) - mean).square().mean().sqrt().item(),
        "share_in_95_percent_band": inside,
        "std_at_the_data": std.mean().item(),
        "std_far_away": far_std,
    }
    for name, value in result.items():
        print(f"{name:26} {value:.3f}")
    draw(model, x, y, out)
    return result


def draw(model: nn.Module, x: Tensor, y: Tensor, out: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grid = torch.linspace(-4, 4, 300)[:, None]
    mean, std = (values[:, 0].numpy() for values in error_bars(model, grid))
    line = grid[:, 0].numpy()
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    axes.fill_between(line, mean - 2 * std, mean + 2 * std, alpha=0.25, label="2 sigma")
    axes.plot(line, mean, label="mean of 200 draws")
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
