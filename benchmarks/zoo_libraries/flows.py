"""Normalizing flows, solvers of differential equations, operators and deep kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .entries import Built, Call, Calls, entry, lib, noise, takes


def mlp(*sizes: int, activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


# -- zuko: the log density of a batch, as it is trained ---------------------------------------


def log_density(flow: Any, x: Tensor, context: Tensor | None = None) -> Any:
    return flow(context).log_prob(x)


def _zuko(name: str, **options: Any) -> None:
    @entry("zuko", name)
    def make() -> Built:
        flow = getattr(lib("zuko.flows"), name)(4, 2, **options)
        return Calls(flow, log_density), lambda n: ((noise(n, 4).tanh(), noise(n, 2, seed=1)), {})


for _name in ("NICE", "RealNVP", "NSF", "BPF", "MAF"):
    _zuko(_name, transforms=2, hidden_features=(8, 8))
_zuko("CNF", hidden_features=(8, 8))


# -- nflows ----------------------------------------------------------------------------------


def _net(inputs: int, outputs: int) -> nn.Module:
    net: nn.Module = lib("nflows.nn.nets").ResidualNet(inputs, outputs, 8, num_blocks=1)
    return net


@entry("nflows", "MultiscaleCompositeTransform")
def _() -> Built:
    n = lib("nflows.transforms")
    model = n.MultiscaleCompositeTransform(2)
    shape = model.add_transform(n.ActNorm(4), (4, 4, 4))
    model.add_transform(n.OneByOneConvolution(shape[0]), shape)
    model(noise(3, 4, 4, 4))  # ActNorm takes its parameters from the first batch
    return model, takes(4, 4, 4)


@entry("nflows", "InverseTransform")
def _() -> Built:
    n = lib("nflows.transforms")
    return n.InverseTransform(n.MaskedAffineAutoregressiveTransform(4, 8)), takes(4)


@entry("nflows", "PiecewiseCubicCouplingTransform")
def _() -> Built:
    n = lib("nflows.transforms")
    model = n.PiecewiseCubicCouplingTransform(
        torch.tensor([1.0, 0.0, 1.0, 0.0]), _net, num_bins=4, tails=None,
        apply_unconditional_transform=True,
    )  # fmt: skip
    return model, lambda b: ((noise(b, 4).sigmoid(),), {})


@entry("nflows", "BatchNorm")
def _() -> Built:
    return lib("nflows.transforms").BatchNorm(4), takes(4)


@entry("nflows", "PiecewiseQuadraticCDF")
def _() -> Built:
    model = lib("nflows.transforms").PiecewiseQuadraticCDF([4], num_bins=4, tails="linear")
    return model, takes(4)


@entry("nflows", "MaskedPiecewiseCubicAutoregressiveTransform")
def _() -> Built:
    n = lib("nflows.transforms")
    model = n.MaskedPiecewiseCubicAutoregressiveTransform(4, 4, 8)
    return model, lambda b: ((noise(b, 4).sigmoid(),), {})


# -- normflows -------------------------------------------------------------------------------


@entry("normflows", "MaskedAffineFlow")
def _() -> Built:
    n = lib("normflows")
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0])
    flow = n.flows.MaskedAffineFlow(mask, n.nets.MLP([4, 8, 4]), n.nets.MLP([4, 8, 4]))
    return flow, takes(4)


@entry("normflows", "AffineCoupling")
def _() -> Built:
    n = lib("normflows")
    flow = n.flows.AffineCoupling(n.nets.MLP([2, 8, 4]))
    return flow, lambda b: (([noise(b, 2), noise(b, 2, seed=1)],), {})


@entry("normflows", "LULinearPermute")
def _() -> Built:
    return lib("normflows").flows.LULinearPermute(4), takes(4)


@entry("normflows", "Reverse")
def _() -> Built:
    n = lib("normflows")
    return n.flows.Reverse(n.flows.AffineConstFlow((4,))), takes(4)


# -- torchdiffeq and torchcde ----------------------------------------------------------------


class Field(nn.Module):
    """dy/dt of a neural differential equation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3, 8, 3)

    def forward(self, t: Tensor, y: Tensor) -> Any:
        return self.net(y) * torch.cos(t)


class Solved(nn.Module):
    """The state at the end."""

    def __init__(self, method: str, adjoint: bool = False) -> None:
        super().__init__()
        self.field, self.method = Field(), method
        self.solve = lib("torchdiffeq").odeint_adjoint if adjoint else lib("torchdiffeq").odeint

    def forward(self, y: Tensor) -> Any:
        times = torch.tensor([0.0, 0.5])
        steps = {"step_size": 0.25} if self.method in ("rk4", "euler", "implicit_adams") else {}
        return self.solve(
            self.field, y, times, method=self.method, rtol=1e-3, atol=1e-3, options=steps
        )[-1]


for _name in ("dopri5", "bosh3", "fehlberg2", "implicit_adams", "euler"):
    entry("torchdiffeq", _name)(lambda name=_name: (Solved(name), takes(3)))
entry("torchdiffeq", "rk4, adjoint")(lambda: (Solved("rk4", True), takes(3)))


class Controlled(nn.Module):
    """A neural controlled differential equation."""

    def __init__(self, adjoint: bool) -> None:
        super().__init__()
        self.first, self.net, self.adjoint = nn.Linear(2, 3), mlp(3, 8, 6), adjoint

    def forward(self, coefficients: Tensor) -> Any:
        cde = lib("torchcde")
        path = cde.CubicSpline(coefficients)
        start = self.first(path.evaluate(path.interval[0]))

        def field(t: Tensor, z: Tensor) -> Tensor:
            out: Tensor = self.net(z)
            return out.unflatten(-1, (3, 2))

        return cde.cdeint(
            path, field, start, path.interval, adjoint=self.adjoint, method="rk4",
            options={"step_size": 1.0},
            **({"adjoint_params": tuple(self.parameters())} if self.adjoint else {}),
        )[:, -1]  # fmt: skip


def _path(batch: int) -> Call:
    return (lib("torchcde").hermite_cubic_coefficients_with_backward_differences(
        noise(batch, 5, 2)
    ),), {}  # fmt: skip


entry("torchcde", "CubicSpline")(lambda: (Controlled(False), _path))


# -- neuraloperator --------------------------------------------------------------------------


@entry("neuralop", "CODANO")
def _() -> Built:
    model = lib("neuralop.models").CODANO(
        output_variable_codimension=1, hidden_variable_codimension=2, lifting_channels=4,
        projection_channels=4, n_layers=2, n_modes=[[4, 4], [4, 4]], n_heads=[1, 1],
        per_layer_scaling_factors=[[1, 1], [1, 1]], attention_scaling_factors=[1, 1],
        attention_token_dim=1, variable_ids=["a", "b"],
    )  # fmt: skip
    return model, lambda b: ((noise(b, 2, 8, 8),), {"input_variable_ids": ["a", "b"]})


def _fno(name: str, **options: Any) -> Any:
    return getattr(lib("neuralop.models"), name)(
        n_modes=(4, 4), in_channels=1, out_channels=1, hidden_channels=8, n_layers=2, **options
    )


@entry("neuralop", "UQNO")
def _() -> Built:
    return lib("neuralop.models").UQNO(_fno("FNO")), takes(1, 8, 8)


@entry("neuralop", "TFNO")
def _() -> Built:
    return _fno("TFNO", factorization="tucker", rank=0.5), takes(1, 8, 8)


@entry("neuralop", "FNO")
def _() -> Built:
    return _fno("FNO"), takes(1, 8, 8)


@entry("neuralop", "FNOGNO")
def _() -> Built:
    model = lib("neuralop.models").FNOGNO(
        1, 1, gno_coord_dim=2, fno_n_modes=(4, 4), fno_hidden_channels=8, fno_n_layers=2,
        gno_embed_channels=4, gno_radius=0.5, gno_channel_mlp_hidden_layers=[8],
        gno_use_open3d=False, gno_use_torch_scatter=False, fno_lifting_channel_ratio=1,
    )  # fmt: skip
    grid = torch.stack(torch.meshgrid(*[torch.linspace(0, 1, 6)] * 2, indexing="ij"), -1)

    def call(batch: int) -> Call:
        return (), {"in_p": grid, "out_p": noise(5 + batch, 2).sigmoid(), "f": noise(6, 6, 1)}

    return model, call


# -- gpytorch: a Gaussian process on the features of a network --------------------------------


class DeepKernel(nn.Module):
    """The covariance matrix of features, as the likelihood of a deep kernel needs it."""

    def __init__(self, kernel: nn.Module) -> None:
        super().__init__()
        self.features, self.kernel = mlp(4, 8, 2), kernel

    def forward(self, x: Tensor) -> Any:
        return self.kernel(self.features(x)).to_dense()


def _kernel(name: str, make: Callable[[Any], nn.Module]) -> None:
    @entry("gpytorch", name)
    def built() -> Built:
        return DeepKernel(make(lib("gpytorch.kernels"))), takes(4)


_kernel("PolynomialKernel", lambda k: k.PolynomialKernel(power=2))
_kernel("GridKernel", lambda k: k.ScaleKernel(k.RBFKernel()))
_kernel("MaternKernel", lambda k: k.MaternKernel(nu=1.5, ard_num_dims=2))
_kernel("ProductKernel", lambda k: k.RBFKernel() * k.PeriodicKernel())
_kernel("LCMKernel", lambda k: k.LCMKernel([k.RBFKernel(), k.MaternKernel()], 2, rank=1))
_kernel("AdditiveStructureKernel", lambda k: k.AdditiveStructureKernel(k.RBFKernel(), 2))


@entry("gpytorch", "IndexKernel")
def _() -> Built:
    kernel = lib("gpytorch.kernels").IndexKernel(num_tasks=3, rank=2)
    index = torch.tensor([[0], [1], [2], [1]])
    return Calls(kernel, lambda k, i: k(i).to_dense()), lambda b: ((index[: b + 1],), {})


@entry("gpytorch", "a variational process")
def _() -> Built:
    g = lib("gpytorch")

    class Process(g.models.ApproximateGP):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            points = noise(5, 2)
            distribution = g.variational.CholeskyVariationalDistribution(5)
            super().__init__(g.variational.VariationalStrategy(self, points, distribution))
            self.mean_module = g.means.ConstantMean()
            self.covar_module = g.kernels.ScaleKernel(g.kernels.RBFKernel())

        def forward(self, x: Tensor) -> Any:
            return g.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    model = Process()
    with torch.no_grad():
        model(noise(3, 2))  # its first call sets the variational distribution
    model.variational_strategy._clear_cache()  # made of weights that the check changes in place

    def run(process: Any, x: Tensor) -> Any:
        found = process(x)
        return found.mean, found.variance

    return Calls(model, run), takes(2)
