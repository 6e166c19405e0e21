"""The teacher against sums written out in float64."""

import math

import pytest
import torch
from torch import nn

import bayesify
from bayesify import kl_schedule
from recipes.byov.model import Student
from recipes.byov.teacher import Teacher, live_prior


def moving(steps: int) -> tuple[Teacher, nn.Linear, list[torch.Tensor], list[float]]:
    """A teacher after ``steps`` updates, with the weights that it saw and the factors."""
    student = nn.Linear(3, 2)
    teacher = Teacher(student, second_moment=True)
    generator = torch.Generator().manual_seed(1)
    seen, taus = [student.weight.detach().clone()], []
    for step in range(steps):
        with torch.no_grad():
            student.weight.add_(0.1 * torch.randn(2, 3, generator=generator))
        taus.append(0.8 + 0.02 * step)
        teacher.update(student, taus[-1])
        seen.append(student.weight.detach().clone())
    return teacher, student, seen, taus


def test_moments_are_those_of_the_direct_formula() -> None:
    teacher, _, seen, taus = moving(9)
    first = second = None
    for value, tau in zip(seen, [0.0, *taus], strict=True):
        value = value.double()
        first = value if first is None else tau * first + (1 - tau) * value
        second = value**2 if second is None else tau * second + (1 - tau) * value**2
    assert first is not None
    assert second is not None
    mean = dict(teacher.network.named_parameters())["weight"]
    var = teacher.var["weight"]
    assert var is not None
    torch.testing.assert_close(mean.double(), first, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(var.double(), second - first**2, rtol=1e-4, atol=1e-8)


def test_variance_stays_exact_where_the_difference_of_squares_cancels() -> None:
    student = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        student.weight.fill_(1000.0)
    teacher = Teacher(student, second_moment=True)
    with torch.no_grad():
        student.weight.add_(0.01)
    moved = student.weight.double().item() - 1000.0
    teacher.update(student, 0.5)
    var = teacher.var["weight"]
    assert var is not None
    assert var.item() == pytest.approx(0.25 * moved**2, rel=1e-6)  # EMA(w^2) - EMA(w)^2


def test_the_predictor_is_averaged_and_buffers_are_not() -> None:
    predictor = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2))
    student = Student(nn.Identity(), nn.Identity(), predictor)
    teacher = Teacher(student, second_moment=False)
    before = {k: v.clone() for k, v in teacher.network.state_dict().items()}
    with torch.no_grad():
        for value in student.state_dict().values():
            value.fill_(3)
    teacher.update(student, 0.75)
    after = teacher.network.state_dict()
    name = "predictor.0.weight"
    torch.testing.assert_close(after[name], 0.75 * before[name] + 0.25 * 3.0)
    name = "predictor.1.running_mean"
    assert torch.equal(after[name], before[name])
    assert not any(p.requires_grad for p in teacher.parameters())


def test_means_are_read_and_not_draws() -> None:
    student = nn.Linear(4, 4)
    teacher = Teacher(student, second_moment=False)
    bayesify.to_bbb_(student, initial_std=math.exp(1.0))
    with torch.no_grad():
        student.weight.add_(1.0)
    teacher.update(student, 0.0)
    assert torch.equal(dict(teacher.network.named_parameters())["weight"], student.weight)


def test_tau_rises_as_a_cosine_to_its_end() -> None:
    tau = kl_schedule("cosine", 0.99, 1.0, 100)
    for step in (0, 13, 50, 99, 100, 250):
        expected = 1 - (1 - 0.99) * (math.cos(math.pi * min(step, 100) / 100) + 1) / 2
        assert tau(step) == pytest.approx(expected, abs=1e-15)
    assert (tau(0), tau(100)) == (0.99, 1.0)


def test_at_tau_1_nothing_moves() -> None:
    teacher, student, _, _ = moving(3)
    before = {k: v.clone() for k, v in teacher.tensors().items()}
    with torch.no_grad():
        student.weight.add_(1.0)
    teacher.update(student, 1.0)
    for name, value in teacher.tensors().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("prior", ["teacher-mean", "teacher"])
def test_kl_to_the_live_prior_is_that_of_torch_distributions(prior: str) -> None:
    teacher, student, _, _ = moving(4)
    bayesify.to_bbb_(student, initial_std=math.exp(-2.0))
    bayesify.set_prior_(student, live_prior(teacher, prior, 1e-3))  # type: ignore[arg-type]
    expected = torch.zeros((), dtype=torch.float64)
    floored = False
    for name, mean, logvar, _ in bayesify.posteriors(student):
        target = dict(teacher.network.named_parameters())[name].double()
        var = teacher.var[name]
        assert var is not None
        floored |= bool((var < 1e-3).any())
        std = (
            torch.ones_like(target) if prior == "teacher-mean" else var.clamp(1e-3).double().sqrt()
        )
        q = torch.distributions.Normal(mean.double(), (0.5 * logvar.double()).exp())
        p = torch.distributions.Normal(target, std)
        expected += torch.distributions.kl_divergence(q, p).sum()
    assert floored  # the bias never moved: without a floor its KL would be infinite
    assert bayesify.kl_divergence(student).item() == pytest.approx(expected.item(), rel=1e-5)
