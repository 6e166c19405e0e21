"""Where autocast to bfloat16 does not pay."""

from __future__ import annotations

import warnings

import torch


def check_amp(device: torch.device, amp: bool) -> None:
    """Warn where ``amp`` slows a processor down: torch emulates bfloat16 on one with AVX2 only."""
    if amp and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        warnings.warn(
            "amp: this processor (AVX2) has no bfloat16 arithmetic, and torch takes many times as "
            "long without it as in float32. Leave amp out.",
            UserWarning,
            stacklevel=3,
        )
