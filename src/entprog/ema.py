"""Exponential moving average over the parameters that ever trained.

diffusers' EMAModel copies the raw weight over the average of every parameter that is frozen at a step, which destroys
the average of blocks that come and go.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from entprog.frozen import set_value, value_of

WARM = 10**6  # updates after which the decay is the one asked for


class Ema:
    """Average of the parameters that have ever trained, updated only on steps they train.

    host: the averages lie in the host's memory, so that they take none of a memory budget; each step then copies there
    what trains.
    """

    def __init__(self, model: nn.Module, decay: float, host: bool = False) -> None:
        self.host = host
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
                self.average[name], self.updates[name] = self._copy(p), 0
            self.updates[name] += 1
            n = self.updates[name]
            now = p.to(self.average[name].device)
            self.average[name].lerp_(now, 1 - min(self.decay, (1 + n) / (10 + n)))

    def _copy(self, value: Tensor) -> Tensor:
        return value.detach().to("cpu" if self.host else value.device, copy=True)

    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Take over averages by name, as `average` holds them; what `updates` lacks of them has warmed up."""
        self.average = {name: self._copy(value) for name, value in averages.items()}
        self.updates = {name: self.updates.get(name, WARM) for name in averages}

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averages with the weights; a second call exchanges them back."""
        for p, name in self.names.items():
            if name in self.average:
                held = value_of(p).detach().clone()
                set_value(p, self.average[name].to(p.device))
                self.average[name].copy_(held)
