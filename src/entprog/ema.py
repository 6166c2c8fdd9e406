"""Exponential moving average over the parameters that ever trained.

diffusers' EMAModel copies the raw weight over the average of every parameter that is frozen at a step, which destroys
the average of blocks that come and go.
"""

import torch
from torch import Tensor, nn

from entprog.frozen import set_value, value_of


class Ema:
    """Average of the parameters that have ever trained, updated only on steps they train."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.names = {p: n for n, p in model.named_parameters()}
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self.updates: dict[str, int] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Move each trainable parameter's average towards it; the decay warms up with the parameter's own updates."""
        for p, name in self.names.items():
            if not p.requires_grad or not self.decay:
                continue
            if name not in self.average:
                self.average[name], self.updates[name] = p.detach().clone(), 0
            self.updates[name] += 1
            n = self.updates[name]
            self.average[name].lerp_(p, 1 - min(self.decay, (1 + n) / (10 + n)))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averages with the weights; a second call exchanges them back."""
        for p, name in self.names.items():
            if name in self.average:
                held = value_of(p).detach().clone()
                set_value(p, self.average[name])
                self.average[name].copy_(held)
