"""A linear classifier that learns beside the encoder and shows how training goes."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from bayesify import ArgumentError


class OnlineProbe:
    """A linear classifier that learns from detached features while the encoder trains.

    It shows how training goes and is no result: it lags behind the encoder. Its loss never reaches
    the encoder. It takes features as they are, so that its layer, ``linear``, is a classifier of
    the encoder.

    Args:
        features: Width of a feature.
        num_classes: Number of classes.
        lr: Of Adam.
        device: Of the classifier.

    Reference:
        Grill et al. 2020 train such a classifier along: deepmind-research, byol_experiment.py.
    """

    def __init__(
        self,
        features: int,
        num_classes: int,
        *,
        lr: float = 1e-3,
        device: torch.device | str = "cpu",
    ) -> None:
        if features < 1 or num_classes < 2 or not lr > 0:
            raise ArgumentError(
                "OnlineProbe needs features of 1 or more, 2 classes or more and lr above 0, "
                f"not {features}, {num_classes} and {lr}."
            )
        self.linear: nn.Linear = nn.utils.skip_init(nn.Linear, features, num_classes, device=device)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.optimizer = torch.optim.Adam(self.linear.parameters(), lr=lr)

    def logits(self, features: Tensor) -> Tensor:
        """Return (B, num_classes) for features (B, D), without a gradient for them."""
        logits: Tensor = self.linear(features.detach().float())
        return logits

    def step(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step and return loss and accuracy of this batch before it, on the device."""
        with torch.enable_grad(), torch.autocast(features.device.type, enabled=False):
            logits = self.logits(features)
            loss = functional.cross_entropy(logits, labels)
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()
        return loss.detach(), (logits.argmax(dim=1) == labels).float().mean()

    @torch.no_grad()
    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Return the share of these features, in [0, 1], that is classified right."""
        return (self.logits(features).argmax(dim=1) == labels).float().mean().item()

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that an exact continuation needs, tensors only."""
        state = dict(self.linear.state_dict())
        for name, parameter in self.linear.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                state[f"{name}.{key}"] = value
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self.linear.load_state_dict({name: state[name] for name in ("weight", "bias")})
        self.optimizer.state.clear()
        for name, parameter in self.linear.named_parameters():
            for key, value in state.items():
                if key.startswith(f"{name}."):
                    # Adam counts its steps on the CPU.
                    device = "cpu" if key.endswith(".step") else parameter.device
                    kept = value.to(device, copy=True)
                    self.optimizer.state[parameter][key.partition(".")[2]] = kept
