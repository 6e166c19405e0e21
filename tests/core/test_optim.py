"""Parameter groups, and optimizers that would ruin a posterior."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesify
from bayesify import ArgumentError
from bayesify.likelihoods import Gaussian, set_likelihood_
from bayesify.optim import check_optimizer, param_groups
from bayesify.posterior import sites


class Net(nn.Module):
    """A convolution, a deterministic norm, two linear layers of which one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.hidden.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        out: Tensor = self.head(self.hidden(x))
        return out


@pytest.fixture
def model() -> nn.Module:
    return bayesify.to_bbb(Net(), skip="BatchNorm2d")


def names(model: nn.Module, group: dict[str, Any]) -> list[str]:
    found = {id(p): name for name, p in model.named_parameters()}
    return sorted(found[id(p)] for p in group["params"])


def test_groups_hold_every_trained_parameter_once(model: nn.Module) -> None:
    means, deterministic, logvars = param_groups(model, lr=0.1, logvar_lr=0.5, weight_decay=0.01)
    bayesian = ["conv.bias", "conv.weight", "head.bias", "head.weight"]
    assert names(model, means) == bayesian
    assert names(model, deterministic) == ["norm.bias", "norm.weight"]
    assert names(model, logvars) == [f"{name}_logvar" for name in bayesian]
    settings = [(g["name"], g["lr"], g["weight_decay"]) for g in (means, deterministic, logvars)]
    assert settings == [
        ("means", 0.1, 0.01),
        ("deterministic", 0.1, 0.01),
        ("logvars", 0.5, 0.0),
    ]


def test_groups_without_parameters_are_left_out() -> None:
    model = bayesify.to_bbb(nn.Linear(2, 1))
    assert [g["name"] for g in param_groups(model, lr=0.1)] == ["means", "logvars"]
    for site in sites(model):
        site.raw.requires_grad_(False)
    [group] = param_groups(model, lr=0.1)
    assert (group["name"], group["lr"], group["weight_decay"]) == ("means", 0.1, 0.0)


def test_groups_hold_tied_parameters_once() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    model = bayesify.to_bbb(net)
    held = [p for g in param_groups(model, lr=0.1) for p in g["params"]]
    assert len(held) == len({id(p) for p in held}) == 6


def test_groups_know_softplus() -> None:
    config = bayesify.BBBConfig(parameterization="softplus")
    model = bayesify.to_bbb(nn.Linear(2, 1), config=config)
    _, logvars = param_groups(model, lr=0.1)
    assert names(model, logvars) == ["bias_rho", "weight_rho"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be"),
        ({"lr": math.nan}, "lr must be"),
        ({"lr": "0.1"}, "lr must be"),
        ({"lr": 0.1, "logvar_lr": -1.0}, "logvar_lr must be"),
        ({"lr": 0.1, "weight_decay": math.inf}, "weight_decay must be"),
    ],
)
def test_groups_refuse_bad_numbers(model: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        param_groups(model, **options)


def test_a_model_without_posterior_is_refused() -> None:
    plain = nn.Linear(1, 1)
    with pytest.raises(bayesify.UnsupportedModuleError, match="no Bayesian parameter"):
        param_groups(plain, lr=0.1)
    with pytest.raises(bayesify.UnsupportedModuleError, match="no Bayesian parameter"):
        check_optimizer(plain, torch.optim.SGD(plain.parameters(), lr=0.1))


def test_groups_keep_weight_decay_off_a_log_variance(model: nn.Module) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        trained = parameter.requires_grad and not name.endswith("_logvar")
        expected = before[name] * (0.95 if trained else 1.0)
        torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: torch.optim.AdamW(param_groups(m, lr=0.1, weight_decay=0.05)),
        lambda m: torch.optim.SGD(param_groups(m, lr=0.1)),
        lambda m: torch.optim.Adam(m.parameters()),  # decays nothing
        lambda m: torch.optim.LBFGS(m.parameters()),  # has no weight decay
    ],
)
def test_a_good_optimizer_passes(
    model: nn.Module, make: Callable[[nn.Module], torch.optim.Optimizer]
) -> None:
    check_optimizer(model, make(model))


def test_plain_adamw_is_refused(model: nn.Module) -> None:
    with pytest.raises(ArgumentError) as caught:
        check_optimizer(model, torch.optim.AdamW(model.parameters()))
    message = str(caught.value)
    assert "weight decay on 4 log variances (conv.weight_logvar, " in message
    assert "bayesify.param_groups(model, lr=...)" in message


def test_an_optimizer_made_before_the_conversion_is_refused() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    bayesify.to_bbb_(net)
    with pytest.raises(ArgumentError, match="does not hold 6 log variances") as caught:
        check_optimizer(net, optimizer)
    assert "not the model's" not in str(caught.value)


def test_an_optimizer_of_the_unconverted_original_is_refused() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match="but 8 parameters that are not the model's"):
        check_optimizer(bayesify.to_bbb(net), optimizer)


def test_an_optimizer_may_hold_other_modules_and_omit_fixed_log_variances(
    model: nn.Module,
) -> None:
    for site in sites(model):
        site.raw.requires_grad_(False)
    probe = nn.Linear(3, 2)
    groups = [*param_groups(model, lr=0.1), {"params": list(probe.parameters()), "lr": 1.0}]
    check_optimizer(model, torch.optim.SGD(groups))


def test_all_problems_are_told_at_once(model: nn.Module) -> None:
    head = model.get_submodule("head")
    with torch.no_grad():
        head.get_parameter("weight_logvar")[0, 0] = math.nan
    optimizer = torch.optim.AdamW(model.get_submodule("conv").parameters())
    with pytest.raises(ArgumentError) as caught:
        check_optimizer(model, optimizer)
    message = str(caught.value)
    assert "weight decay on 2 log variances" in message
    assert "does not hold 2 log variances (head.weight_logvar, head.bias_logvar)" in message
    assert "NaN or Inf in 1 log variance (head.weight_logvar)" in message


def test_what_is_no_optimizer_is_refused(model: nn.Module) -> None:
    with pytest.raises(ArgumentError, match=r"must be a torch\.optim\.Optimizer, got list"):
        check_optimizer(model, [])  # type: ignore[arg-type]


def loop(initialise: Callable[[Tensor], object]) -> Callable[[nn.Module], None]:
    def run(model: nn.Module) -> None:
        for parameter in model.parameters():
            initialise(parameter)

    return run


def xavier(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


@pytest.mark.parametrize(
    "initialise",
    [
        loop(lambda p: nn.init.normal_(p, std=0.02)),
        loop(nn.init.normal_),
        loop(nn.init.zeros_),
        loop(nn.init.ones_),
        loop(lambda p: nn.init.uniform_(p, -0.1, 0.1)),
        xavier,
    ],
)
@pytest.mark.parametrize("parameterization", ["exp", "softplus"])
def test_an_initialisation_loop_over_all_parameters_is_noticed(
    initialise: Callable[[nn.Module], None], parameterization: Any
) -> None:
    config = bayesify.BBBConfig(parameterization=parameterization)
    model = bayesify.to_bbb(nn.Sequential(nn.Linear(20, 50), nn.Linear(50, 10)), config=config)
    optimizer = torch.optim.SGD(param_groups(model, lr=0.1))
    check_optimizer(model, optimizer)
    initialise(model)
    with pytest.warns(UserWarning, match=r"initialised by a loop over model\.parameters"):
        check_optimizer(model, optimizer)


def test_resetting_each_module_leaves_the_log_variances_alone(model: nn.Module) -> None:
    before = {s.name: (s.mean.detach().clone(), s.raw.detach().clone()) for s in sites(model)}

    def reset(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()

    model.apply(reset)
    for site in sites(model):
        assert torch.equal(site.raw, before[site.name][1])
        assert not torch.equal(site.mean, before[site.name][0])
    check_optimizer(model, torch.optim.SGD(param_groups(model, lr=0.1)))


def test_a_wide_posterior_that_was_asked_for_is_right() -> None:
    model = bayesify.to_bbb(nn.Linear(20, 50), initial_std=1.0)
    check_optimizer(model, torch.optim.SGD(param_groups(model, lr=0.1)))


def test_a_wide_posterior_around_large_weights_is_right() -> None:
    net = nn.Linear(20, 50)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1e4)
    model = bayesify.to_bbb(net)
    assert max(s.std.max().item() for s in sites(model)) > 1.0
    check_optimizer(model, torch.optim.SGD(param_groups(model, lr=0.1)))


# -- timm --------------------------------------------------------------------------------------


def decay_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> float:
    [found] = [
        float(g["weight_decay"])
        for g in optimizer.param_groups
        if any(p is parameter for p in g["params"])
    ]
    return found


@pytest.mark.parametrize("opt", ["adamw", "lars", "lamb", "sgd"])
def test_timm_leaves_the_log_variances_without_decay(model: nn.Module, opt: str) -> None:
    from timm.optim._optim_factory import create_optimizer_v2

    optimizer = create_optimizer_v2(model, opt=opt, lr=0.1, weight_decay=0.05)
    assert decay_of(optimizer, model.get_submodule("conv").get_parameter("weight")) == 0.05
    for site in sites(model):
        if site.raw.requires_grad:
            assert decay_of(optimizer, site.raw) == 0.0
    check_optimizer(model, optimizer)


def test_timm_decays_the_log_variances_of_a_model_inside_another(model: nn.Module) -> None:
    from timm.optim._optim_factory import create_optimizer_v2

    outer = nn.Sequential(model)  # knows no no_weight_decay()
    optimizer = create_optimizer_v2(outer, opt="adamw", lr=0.1, weight_decay=0.05)
    with pytest.raises(ArgumentError, match=r"weight decay on 2 .*0\.conv\.weight_logvar"):
        check_optimizer(outer, optimizer)
    check_optimizer(outer, torch.optim.AdamW(param_groups(outer, lr=0.1)))


def test_a_trust_ratio_on_a_log_variance_is_refused(model: nn.Module) -> None:
    from timm.optim.lars import Lars

    with pytest.raises(ArgumentError, match="weight decay on 4"):
        check_optimizer(model, Lars(model.parameters(), lr=0.1, weight_decay=1e-4))
    check_optimizer(model, Lars(param_groups(model, lr=0.1, weight_decay=1e-4)))
    adapting = Lars(param_groups(model, lr=0.1), always_adapt=True)
    with pytest.raises(ArgumentError, match="always_adapt on 4"):
        check_optimizer(model, adapting)


def test_nothing_is_warned_of_a_converted_model(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_optimizer(model, torch.optim.AdamW(param_groups(model, lr=0.1)))


def test_learned_noise_has_a_group_without_decay(model: nn.Module) -> None:
    before = param_groups(model, lr=0.1, logvar_lr=0.2, weight_decay=0.3)
    likelihood = Gaussian(outputs=2)
    set_likelihood_(model, likelihood)
    groups = param_groups(model, lr=0.1, logvar_lr=0.2, weight_decay=0.3)
    assert [g["name"] for g in groups] == [*(g["name"] for g in before), "likelihood"]
    last = groups[-1]
    assert (last["lr"], last["weight_decay"]) == (0.1, 0.0)
    assert [id(p) for p in last["params"]] == [id(likelihood.log_noise)]
    check_optimizer(model, torch.optim.AdamW(groups))
    set_likelihood_(model, Gaussian(1.0))  # it learns nothing
    assert [g["name"] for g in param_groups(model, lr=0.1)] == [g["name"] for g in before]


def test_an_optimizer_that_misses_or_decays_the_noise_is_refused(model: nn.Module) -> None:
    groups = param_groups(model, lr=0.1)
    set_likelihood_(model, Gaussian(outputs=2))
    message = "does not hold log_noise of the likelihood Gaussian"
    with pytest.raises(ArgumentError, match=message):
        check_optimizer(model, torch.optim.AdamW(groups))
    decaying = [*param_groups(model, lr=0.1)]
    decaying[-1]["weight_decay"] = 0.1
    with pytest.raises(ArgumentError, match="decay on log_noise of the likelihood"):
        check_optimizer(model, torch.optim.AdamW(decaying))
    set_likelihood_(model, Gaussian())
    with pytest.raises(ArgumentError, match=r"say it, Gaussian\('learned', outputs=1\)"):
        param_groups(model, lr=0.1)
