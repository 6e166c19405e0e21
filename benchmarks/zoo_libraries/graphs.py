"""Graphs, molecules and equivariant networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .entries import Built, Call, Calls, entry, integers, lib, noise

EDGES = torch.tensor([[0, 1, 2, 3, 4, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 0, 1, 2, 3, 4]])


def graph(batch: int, channels: int = 8) -> Call:
    """A ring of five nodes with features that depend on the batch."""
    return (noise(5, channels, seed=batch), EDGES), {}


def _conv(name: str, *args: Any, call: Callable[[int], Call] = graph, **options: Any) -> None:
    @entry("torch_geometric:conv", name)
    def make() -> Built:
        return getattr(lib("torch_geometric.nn"), name)(*args, **options), call


def _with_edges(batch: int) -> Call:
    return (*graph(batch)[0], noise(10, 3, seed=batch)), {}


_conv("HypergraphConv", 8, 4)
_conv("CGConv", 8, dim=3, call=_with_edges)
_conv("TAGConv", 8, 4)
_conv("ChebConv", 8, 4, K=3)
_conv("AntiSymmetricConv", 8)
_conv("SuperGATConv", 8, 4, heads=2)
_conv("PointTransformerConv", 8, 4, call=lambda b: (
    (noise(5, 8, seed=b), noise(5, 3, seed=b + 1), EDGES), {}
))  # fmt: skip


@entry("torch_geometric:conv", "GPSConv")
def _() -> Built:
    g = lib("torch_geometric.nn")
    return g.GPSConv(8, g.GCNConv(8, 8), heads=2), graph


@entry("torch_geometric:conv", "SignedConv")
def _() -> Built:
    model = lib("torch_geometric.nn").SignedConv(8, 4, first_aggr=True)
    return model, lambda b: ((noise(5, 8, seed=b), EDGES[:, :5], EDGES[:, 5:]), {})


@entry("torch_geometric:models", "ARLinkPredictor")
def _() -> Built:
    return lib("torch_geometric.nn.models").ARLinkPredictor(8, 16, 8), graph


@entry("torch_geometric:models", "AttentiveFP")
def _() -> Built:
    model = lib("torch_geometric.nn").AttentiveFP(8, 8, 4, 3, num_layers=2, num_timesteps=2)
    nodes = torch.tensor([0, 0, 0, 1, 1])
    return model, lambda b: ((*graph(b)[0], noise(10, 3, seed=b), nodes), {})


@entry("torch_geometric:models", "GraphSAGE")
def _() -> Built:
    return lib("torch_geometric.nn").GraphSAGE(8, 8, 2, 4), graph


def _molecule(batch: int) -> Call:
    atoms = integers(9, 6, low=1, seed=batch)
    return (atoms, noise(6, 3, seed=batch) * 1.5), {"batch": torch.tensor([0, 0, 0, 1, 1, 1])}


class AllPairs(nn.Module):
    """Edges between all atoms of a molecule: a radius needs another package."""

    def forward(self, pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        near = (batch[:, None] == batch) & ~torch.eye(len(batch), dtype=torch.bool)
        edges = near.nonzero().T
        return edges, (pos[edges[0]] - pos[edges[1]]).norm(dim=-1)


@entry("torch_geometric:models", "SchNet")
def _() -> Built:
    model = lib("torch_geometric.nn").SchNet(8, 8, 2, 6, interaction_graph=AllPairs())
    return model, _molecule


@entry("torch_geometric:models", "GroupAddRev")
def _() -> Built:
    g = lib("torch_geometric.nn")
    model = g.GroupAddRev(g.GCNConv(4, 4), num_groups=2)
    # it lets go of its input's memory
    return Calls(model, lambda m, x, edges: m(x.clone(), edges)), graph


# -- e3nn ------------------------------------------------------------------------------------


def _tensors(irreps: str, seed: int = 0) -> Callable[[int], Call]:
    size = lib("e3nn.o3").Irreps(irreps).dim
    return lambda b: ((noise(b, size, seed=seed),), {})


def _pairs(first: str, second: str) -> Callable[[int], Call]:
    a, b = (lib("e3nn.o3").Irreps(i).dim for i in (first, second))
    return lambda n: ((noise(n, a), noise(n, b, seed=1)), {})


@entry("e3nn", "TensorProduct")
def _() -> Built:
    o3 = lib("e3nn.o3")
    model = o3.TensorProduct("4x0e + 2x1o", "1x0e + 1x1o", "4x0e + 2x1o", [
        (0, 0, 0, "uvw", True), (1, 1, 0, "uvw", True), (1, 0, 1, "uvu", True),
    ])  # fmt: skip
    return model, _pairs("4x0e + 2x1o", "1x0e + 1x1o")


@entry("e3nn", "FullyConnectedTensorProduct")
def _() -> Built:
    model = lib("e3nn.o3").FullyConnectedTensorProduct("4x0e + 2x1o", "0e + 1o", "4x0e + 2x1o")
    return model, _pairs("4x0e + 2x1o", "0e + 1o")


@entry("e3nn", "TensorSquare")
def _() -> Built:
    return lib("e3nn.o3").TensorSquare("4x0e + 2x1o", "2x0e + 1x1o"), _tensors("4x0e + 2x1o")


@entry("e3nn", "Linear")
def _() -> Built:
    return lib("e3nn.o3").Linear("4x0e + 2x1o", "2x0e + 3x1o"), _tensors("4x0e + 2x1o")


@entry("e3nn", "FullyConnectedNet")
def _() -> Built:
    net = lib("e3nn.nn").FullyConnectedNet([4, 8, 2], torch.nn.functional.silu)
    return net, lambda b: ((noise(b, 4),), {})


@entry("e3nn", "BatchNorm")
def _() -> Built:
    return lib("e3nn.nn").BatchNorm("4x0e + 2x1o"), _tensors("4x0e + 2x1o")


@entry("e3nn", "gate_points_2101.Network")
def _() -> Built:
    module = lib("e3nn.nn.models.gate_points_2101")
    model = module.Network(
        "2x0e", "2x0e + 2x1o", "1x0e", "1x0e", "0e + 1o", 1, 2.5, 3, 1, 8, 3.0, 5.0
    )

    def call(b: int) -> Call:
        return ({
            "pos": noise(5, 3, seed=b), "x": noise(5, 2, seed=b), "z": noise(5, 1, seed=b),
            "batch": torch.zeros(5, dtype=torch.long), "edge_index": EDGES,
            "edge_src": EDGES[0], "edge_dst": EDGES[1],
        },), {}  # fmt: skip

    return model, call


# -- torchani --------------------------------------------------------------------------------


def _networks() -> nn.Module:
    ani = lib("torchani.nn")
    return ani.ANINetworks({s: ani.AtomicNetwork((6, 8, 1)) for s in ("H", "C", "O")})


def _atoms(batch: int) -> tuple[Tensor, Tensor]:
    return integers(3, batch, 4), noise(batch, 4, 6)


@entry("torchani", "ANIModel")
def _() -> Built:
    ani = lib("torchani.nn")
    model = ani.ANIModel({s: ani.AtomicNetwork((6, 8, 1)) for s in ("H", "C", "O")})
    return model, lambda b: (_atoms(b), {})


@entry("torchani", "BmmAtomicNetwork")
def _() -> Built:
    ani = lib("torchani.nn")
    model = ani.BmmAtomicNetwork([ani.AtomicNetwork((6, 8, 1)) for _ in range(2)])
    return model, lambda b: ((noise(b, 6),), {})


@entry("torchani", "ANINetworks")
def _() -> Built:
    return _networks(), lambda b: (_atoms(b), {})
