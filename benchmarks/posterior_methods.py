"""The methods of benchmarks/posterior.py: each turns the pretrained network into a predictor.

All that is trained sees the same batches of the same augmented images for the same epochs, with
AdamW (IVON is its own optimizer), the same warm-up, cosine, gradient clipping and averaging of the
last steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from posterior_table import BETA
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

import bayesify
from bayesify.data import ImageData
from bayesify.models import input_config
from bayesify.optim import warmup_cosine
from bayesify.training.averaging import TailAverage
from bayesify.training.batches import Order, shuffled_batches
from bayesify.training.randomness import seeded

Predictor = Callable[[Tensor], Tensor]
"""From images as the network takes them to class probabilities, both on the device."""
LAYOUT: Any = {"memory_format": torch.channels_last}
"""Of networks and images; convolutions are faster in it, on CPU as on CUDA."""


@dataclass(frozen=True)
class Setup:
    """What all methods share; the command line of posterior.py sets it."""

    network: Callable[[float], nn.Module]
    """The pretrained network, given the dropout before its classifier."""
    train: ImageData
    device: torch.device
    epochs: int = 2
    batch_size: int = 128
    samples: int = 30
    members: int = 5
    augment: Any = "flip-crop"
    lr: float = 3e-4
    logvar_lr: float = 0.03
    ivon_lr: float = 0.02
    relative_std: float = 0.08
    prior_std: float = 0.1
    anchor: float | None = 0.25
    """Width of the prior of ours around the pretrained weights, in RMS of each tensor; None is
    N(0, prior_std^2), which the peers have either way."""
    average: float = 0.5
    """Share of the steps, the last ones, over which every method averages."""
    draws_per_step: int = 1
    freeze_batchnorm: bool = True
    num_data: int = 50_000
    """N of the KL and of IVON, whatever part of the images a trial run sees."""
    laplace_examples: int = 5000
    laplace_holdout: float = 0.02
    amp: bool = False

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)


@dataclass(frozen=True)
class Method:
    """How a predictor is made, and whether another seed makes another one."""

    make: Callable[[Setup, int], Predictor]
    seeded: bool = True


# -- ours --------------------------------------------------------------------------------------


def converted(setup: Setup, **selection: Any) -> nn.Module:
    """The network with the initial posterior of the benchmark."""
    prior = bayesify.GaussianPrior(setup.prior_std)
    if setup.anchor is not None:
        prior = bayesify.GaussianPrior(setup.anchor, mean="initial", relative=True)
    return bayesify.to_bbb(
        setup.network(0.0).to(setup.device),
        prior=prior,
        initial_std=bayesify.RelativeStd(setup.relative_std),
        **selection,
    )


def fitted(setup: Setup, seed: int, kl_weight: float, **selection: Any) -> nn.Module:
    model = converted(setup, **selection)
    bayesify.fit(
        model, setup.train, epochs=setup.epochs, batch_size=setup.batch_size, lr=setup.lr,
        logvar_lr=setup.logvar_lr, kl_weight=kl_weight * len(setup.train) / setup.num_data,
        augment=setup.augment, seed=seed, average=setup.average,
        draws_per_step=setup.draws_per_step,
        freeze_batchnorm=setup.freeze_batchnorm, amp=setup.amp,
        model_config=input_config(model),
    )  # fmt: skip
    return model


def averaged(setup: Setup, model: nn.Module, seed: int) -> Predictor:
    def predict(x: Tensor) -> Tensor:
        summary = bayesify.predict(
            model, x, num_samples=setup.samples, seed=seed, reduce="probabilities"
        )
        mean: Tensor = summary.mean
        return mean

    return predict


def ours(kl_weight: float, **selection: Any) -> Method:
    def make(setup: Setup, seed: int) -> Predictor:
        return averaged(setup, fitted(setup, seed, kl_weight, **selection), seed)

    return Method(make)


def laplace(setup: Setup, seed: int) -> Predictor:
    model = converted(setup)
    bayesify.fit_laplace_(
        model, setup.train, max_examples=setup.laplace_examples, seed=seed,
        augment=setup.augment, holdout=setup.laplace_holdout, model_config=input_config(model),
    )  # fmt: skip
    return averaged(setup, model, seed)


# -- deterministic -----------------------------------------------------------------------------


def probabilities(model: nn.Module) -> Predictor:
    model.eval()
    return lambda x: model(x).double().softmax(-1)


def deterministic(setup: Setup, _seed: int) -> Predictor:
    return probabilities(setup.network(0.0).to(setup.device))


def training_batches(setup: Setup, seed: int) -> tuple[Any, Order]:
    """The batches of a fit: shuffled, and augmented."""
    return shuffled_batches(
        setup.train, range(len(setup.train)), batch_size=setup.batch_size, accumulate=1,
        augment=setup.augment, model_config=input_config(setup.network(0.0)), workers=0, seed=seed,
        pin=False,
    )  # fmt: skip


def recompute_batchnorm(setup: Setup, seed: int, model: nn.Module) -> None:
    """Gather BatchNorm's statistics anew from the batches after the last, as ``fit`` does."""
    if setup.freeze_batchnorm:
        return
    batches, order = training_batches(setup, seed)
    order.epoch = setup.epochs
    update_bn((x.to(setup.device) for x, _ in batches), model)


def fine_tuned_network(setup: Setup, seed: int, dropout: float = 0.0) -> nn.Module:
    model = setup.network(dropout).to(setup.device)
    bayesify.fit(
        model, setup.train, epochs=setup.epochs, batch_size=setup.batch_size, lr=setup.lr,
        augment=setup.augment, seed=seed, average=setup.average,
        freeze_batchnorm=setup.freeze_batchnorm, amp=setup.amp, model_config=input_config(model),
    )  # fmt: skip
    recompute_batchnorm(setup, seed, model)
    return model


def fine_tuned(setup: Setup, seed: int) -> Predictor:
    return probabilities(fine_tuned_network(setup, seed))


def ensemble(setup: Setup, seed: int) -> Predictor:
    members = [
        probabilities(fine_tuned_network(setup, 1000 * seed + i)) for i in range(setup.members)
    ]
    return lambda x: torch.stack([member(x) for member in members]).mean(0)


def mc_dropout(setup: Setup, seed: int) -> Predictor:
    model: Any = fine_tuned_network(setup, seed, dropout=0.1).eval()
    model.dropout.train()
    draws = sampling(setup, lambda features: model.linear(model.dropout(features)), seed)
    return lambda x: draws(model.features(x))  # alike in all draws


# -- peers -------------------------------------------------------------------------------------


def sampling(setup: Setup, model: Callable[[Tensor], Tensor], seed: int) -> Predictor:
    """The average of the probabilities of calls that each draw for themselves."""

    def predict(x: Tensor) -> Tensor:
        with seeded(seed, setup.device):
            drawn = [model(x).double().softmax(-1) for _ in range(setup.samples)]
        return torch.stack(drawn).mean(0)

    return predict


def steps(
    setup: Setup, seed: int, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a fine-tuning, with the learning rates of ``optimizer`` set for each."""
    batches, order = training_batches(setup, seed)
    highest = [group["lr"] for group in optimizer.param_groups]
    total, step = setup.epochs * len(batches), 0
    last = TailAverage(list(model.parameters()), total - round(setup.average * total))
    model.train()
    if setup.freeze_batchnorm:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    with seeded(seed, setup.device):
        for epoch in range(setup.epochs):
            order.epoch = epoch
            for x, y in batches:
                factor = warmup_cosine(step, max(1, round(0.05 * total)), total)
                for group, lr in zip(optimizer.param_groups, highest, strict=True):
                    group["lr"] = factor * lr
                yield x.to(setup.device, **LAYOUT), y.to(setup.device)
                step += 1
                last.look(step)
        last.put()
        recompute_batchnorm(setup, seed, model)
    model.eval()


def train_by_kl(setup: Setup, seed: int, model: nn.Module, kl: Callable[[], Tensor]) -> None:
    """Minimise cross entropy plus ``kl()``; the spreads get the learning rate of ours."""
    spreads = [p for n, p in model.named_parameters() if "rho" in n.rpartition(".")[2]]
    others = [p for n, p in model.named_parameters() if "rho" not in n.rpartition(".")[2]]
    optimizer = torch.optim.AdamW(
        [{"params": others, "lr": setup.lr}, {"params": spreads, "lr": setup.logvar_lr}],
        weight_decay=0.0,
    )
    for x, y in steps(setup, seed, model, optimizer):
        optimizer.zero_grad()
        with setup.autocast():
            loss = F.cross_entropy(model(x), y)
        (loss + kl()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def ivon(setup: Setup, seed: int) -> Predictor:
    """Shen et al. (2024, arXiv:2402.17641), the package's own optimizer.

    One number sets the initial sigma of all weights: the share of their RMS that ours has.
    """
    import ivon as library

    model = setup.network(0.0).to(setup.device)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    variance = float(setup.relative_std**2 * weights.square().mean())
    optimizer = library.IVON(
        model.parameters(), lr=setup.ivon_lr, ess=setup.num_data, beta2=0.9999, clip_radius=1e-3,
        weight_decay=1e-4, hess_init=1 / (setup.num_data * variance) - 1e-4,
    )  # fmt: skip
    for x, y in steps(setup, seed, model, optimizer):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            with setup.autocast():
                loss = F.cross_entropy(model(x), y)
            loss.backward()
        optimizer.step()

    def drawn(x: Tensor) -> Tensor:
        with optimizer.sampled_params(train=False):
            logits: Tensor = model(x)
        return logits

    return sampling(setup, drawn, seed)


def bayesian_torch(setup: Setup, seed: int) -> Predictor:
    """The package's conversion with MOPED, and its KL over the batch size as its README says."""
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss

    model = setup.network(0.0)
    dnn_to_bnn(
        model,
        {
            "prior_mu": 0.0, "prior_sigma": setup.prior_std, "posterior_mu_init": 0.0,
            "posterior_rho_init": -5.0, "type": "Reparameterization", "moped_enable": True,
            "moped_delta": setup.relative_std,
        },
    )  # fmt: skip
    model.to(setup.device)
    train_by_kl(setup, seed, model, lambda: get_kl_loss(model) / setup.batch_size)
    return sampling(setup, model, seed)


def torchbayesian(setup: Setup, seed: int) -> Predictor:
    """The package's container around the pretrained weights; the initial sigma is that of ours."""
    import torchbayesian.bnn as bnn

    model: Any = bnn.BayesianModule(
        copy.deepcopy(setup.network(0.0)), variational_posterior="pretrained_normal",
        prior=("normal", {"mu": 0.0, "sigma": setup.prior_std}),
    )  # fmt: skip
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "mu") and hasattr(module, "rho"):
                std = setup.relative_std * module.mu.square().mean().sqrt().clamp_min(1e-4)
                module.rho.fill_(float(torch.log(torch.expm1(std))))
    model.to(setup.device)
    train_by_kl(setup, seed, model, lambda: model.kl_divergence() / setup.num_data)
    return sampling(setup, model, seed)


METHODS: dict[str, Method] = {
    "deterministic": Method(deterministic, seeded=False),
    "fine-tuned": Method(fine_tuned),
    "ours, beta 0.01": ours(0.01),
    "ours, beta 0.1": ours(0.1),
    "ours, beta 0.3": ours(0.3),
    "ours, beta 1": ours(1.0),
    "ours, last layer only": ours(BETA, preset="last-layer"),
    "ours, without norms": ours(BETA, skip="BatchNorm2d"),
    "ours, laplace-diag": Method(laplace),
    "IVON": Method(ivon),
    "bayesian-torch": Method(bayesian_torch),
    "torchbayesian": Method(torchbayesian),
    "ensemble": Method(ensemble),
    "MC dropout": Method(mc_dropout),
}
"""Every method; "temperature scaling" is measured beside the deterministic ones."""
