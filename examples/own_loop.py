"""Your own training loop: what changes in it when the model is Bayesian is marked with (*).

python examples/own_loop.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesify import (
    check_optimizer,
    elbo_loss,
    kl_divergence,
    kl_schedule,
    param_groups,
    predict,
    to_bbb,
)


def spirals(n: int) -> tuple[Tensor, Tensor]:
    """Two noisy spirals, one class each."""
    labels = torch.arange(n) % 2
    radius = torch.rand(n).sqrt()
    angle = 7.0 * radius + torch.pi * labels
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return 2.0 * points + 0.15 * torch.randn(n, 2), labels


def main(epochs: int = 60) -> dict[str, float]:
    torch.manual_seed(0)
    inputs, labels = spirals(1000)
    network = nn.Sequential(
        nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)
    )
    model = to_bbb(network)  # (*)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, logvar_lr=3e-2))  # (*)
    check_optimizer(model, optimizer)  # (*) an error if it would ruin the posterior
    steps = epochs * 10
    beta = kl_schedule("linear", 0.0, 0.2, steps // 2)  # (*) the KL comes in over the first half
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    model.train()  # (*) every call of the model in train() draws its weights
    for step in range(steps):
        batch = torch.randint(len(inputs), (100,))
        loss = F.cross_entropy(model(inputs[batch]), labels[batch])
        total = elbo_loss(loss, model, num_data=len(inputs), kl_weight=beta(step))  # (*)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        rate.step()
        if step % 100 == 99:
            kl = kl_divergence(model).item()
            print(f"step {step + 1:4}  loss {loss.item():.3f}  KL {kl:.0f} nats")

    model.eval()  # (*) eval() uses the posterior means ...
    test_inputs, test_labels = spirals(1000)
    with torch.no_grad():
        at_means = model(test_inputs).softmax(-1)
    average = predict(model, test_inputs, num_samples=30, reduce="probabilities").mean  # (*) ... or
    result = {}
    for name, probabilities in (("at the means", at_means), ("MC average", average)):
        correct = (probabilities.argmax(1) == test_labels).float().mean().item()
        nll = F.nll_loss(probabilities.log(), test_labels).item()
        print(f"{name:15} accuracy {correct:.1%}  NLL {nll:.3f}")
        result[name] = correct
    return result


if __name__ == "__main__":
    main()
