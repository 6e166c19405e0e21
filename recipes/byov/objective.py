"""What is minimised: the symmetric BYOL loss, the classifier's, and the term with negatives."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_TEMPERATURE = 0.1


def byol_loss(prediction1: Tensor, prediction2: Tensor, target1: Tensor, target2: Tensor) -> Tensor:
    r"""BYOL's loss, symmetric, on its own scale from 0 to 8; unrelated embeddings give 4.

    .. math:: \Vert \bar q_1 - \bar z_2 \Vert^2 + \Vert \bar q_2 - \bar z_1 \Vert^2

    A bar is the unit vector. Computed in float32; targets get no gradient.

    Shape:
        All (B, out); the result is the mean over the batch, a scalar.

    Reference:
        Grill et al., 2020, arXiv:2006.07733, equation 2.

    >>> q = torch.eye(3)
    >>> byol_loss(q, q, -q, -q)
    tensor(8.)
    """
    return _distance(prediction1, target2) + _distance(prediction2, target1)


def negatives_loss(
    prediction1: Tensor, prediction2: Tensor, target1: Tensor, target2: Tensor
) -> Tensor:
    r"""How near each prediction is to the targets of the other images of its batch.

    .. math:: 2 \alpha \, \log \frac{1}{B-1} \sum_{j \ne i} e^{\bar q_i \cdot \bar z_j / \alpha}

    summed over both directions, averaged over i; :math:`\alpha = 0.1`.

    Shape:
        All (B, out) with B of at least 2; the result is a scalar.

    Reference:
        Grill et al., 2020, arXiv:2006.07733, equation 8: the second term of InfoNCE. There it also
        has the predictions among the negatives.
    """
    return _crowding(prediction1, target2) + _crowding(prediction2, target1)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1, eps=1e-12)


def _distance(prediction: Tensor, target: Tensor) -> Tensor:
    return (_unit(prediction) - _unit(target.detach())).square().sum(dim=-1).mean()


def _crowding(prediction: Tensor, target: Tensor) -> Tensor:
    similarity = _unit(prediction) @ _unit(target.detach()).T / _TEMPERATURE
    own = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    others = torch.logsumexp(similarity.masked_fill(own, -math.inf), dim=1)
    return 2.0 * _TEMPERATURE * (others - math.log(len(similarity) - 1)).mean()
