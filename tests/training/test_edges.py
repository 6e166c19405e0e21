"""What a user does wrong without noticing: each is named."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import bayesify
from bayesify import LostPosteriorWarning, UnsupportedModuleError, extend_, to_bbb

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
DATA = torch.utils.data.TensorDataset(X, torch.arange(6) % 3)


def test_a_model_that_ends_in_a_softmax_is_told() -> None:
    model = to_bbb(nn.Sequential(nn.Linear(3, 3), nn.Softmax(-1)))
    for call in (
        lambda: bayesify.predict(model, X, num_samples=2, reduce="probabilities"),
        lambda: bayesify.fit(model, DATA, epochs=1, batch_size=6, lr=1e-3),
        lambda: bayesify.fit_laplace_(model, DATA),
    ):
        with pytest.warns(UserWarning, match="seems to end in a softmax"):
            call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bayesify.predict(model, X, num_samples=2, reduce="moments")
        bayesify.predict(to_bbb(nn.Linear(3, 3)), X, num_samples=2, reduce="probabilities")


@pytest.mark.parametrize("act", ["predict", "ensemble"])
def test_a_head_that_was_replaced_is_named_where_the_model_is_used(act: str) -> None:
    model: Any = to_bbb(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    model[1] = nn.Linear(4, 3)
    with pytest.warns(LostPosteriorWarning, match="1.weight"):
        bayesify.predict(model, X, num_samples=2) if act == "predict" else bayesify.ensemble(
            model, 2
        )


def test_posteriors_that_a_wrapper_does_not_know_are_refused(tmp_path: Any) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 1)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model: Any = to_bbb(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
        wrapped = DistributedDataParallel(model)
        wrapped(X)
        model[1] = nn.Linear(4, 3)
        extend_(model)
        with pytest.raises(UnsupportedModuleError, match=r"1\.weight.*wrap the model anew"):
            wrapped(X)
        out: Tensor = DistributedDataParallel(model)(X)
        assert out.shape == (6, 3)
    finally:
        dist.destroy_process_group()
