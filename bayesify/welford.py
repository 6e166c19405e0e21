"""Mean and spread of tensors that come one by one."""

from __future__ import annotations

import torch
from torch import Tensor


class Welford:
    """Running mean and standard deviation of tensors of one shape, in float64 where there is one.

    Args:
        like: A tensor of that shape, dtype and device; it is not taken.

    Reference:
        Welford, 1962, Technometrics 4(3).
    """

    def __init__(self, like: Tensor) -> None:
        wide = like.float() if like.device.type == "mps" else like.double()
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        self.count = 0
        self.mean = torch.zeros_like(wide)
        self.squares = torch.zeros_like(wide)

    def add(self, value: Tensor) -> None:
        """Take one more."""
        value = value.to(self.mean.dtype)
        self.count += 1
        delta = value - self.mean
        self.mean += delta / self.count
        self.squares += delta * (value - self.mean)

    def std(self, correction: int = 0) -> Tensor:
        """Standard deviation, with the divisor ``count - correction`` but 1 at least."""
        return (self.squares / max(1, self.count - correction)).clamp_min(0.0).sqrt()

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (divisor ``count``), in the dtype of what was added."""
        return self.mean.to(self.dtype), self.std().to(self.dtype)
