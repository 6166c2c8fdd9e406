"""Snapshots: everything that training can change, to go back to, as searches and timings do."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from entprog.frozen import set_value, value_of
from entprog.optim import numbers


@dataclass(eq=False)
class Snapshot:
    """Weights, gradient-free, and optimizer state of some parameters, and buffers, to go back to.

    `host`: kept on the host.

    What comes back from the host leaves the optimizer state there: settle the optimizer (optim.py) after `restore`.
    `counts` are the numbers that stand in the optimizer's groups: schedule-free optimizers count their steps there.
    """

    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    weights: list[Tensor]
    state: list[dict[str, Any] | None]
    counts: list[dict[str, float]]
    host: bool = False
    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (a buffer, its values)

    @classmethod
    def take(
        cls,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        host: bool = False,
        buffers: Sequence[Tensor] = (),
    ) -> "Snapshot":
        """Copy the parameters' values and optimizer state, and the buffers."""

        def copied(value: Tensor) -> Tensor:
            return value.to("cpu", copy=True) if host else value.clone()

        return cls(
            list(parameters),
            optimizer,
            [copied(value_of(p).detach()) for p in parameters],
            [_copied(optimizer.state.get(p), host) for p in parameters],
            numbers(optimizer),
            host,
            [(b, copied(b)) for b in buffers],
        )

    def bytes(self) -> int:
        """Return what the copies take beside the model: nothing on the host."""
        if self.host:
            return 0
        copies = [v for s in self.state if s for v in s.values() if isinstance(v, Tensor)]
        return sum(t.numel() * t.element_size() for t in [*self.weights, *copies, *(v for _, v in self.buffers)])

    def restore(self) -> None:
        """Put them back in place, and delete state that has been made since.

        Never optimizer.load_state_dict: it casts the moments to the parameters' dtype.
        """
        with torch.no_grad():
            for p, weight, state in zip(self.parameters, self.weights, self.state, strict=True):
                set_value(p, weight)
                p.grad = None
                if state is None:
                    self.optimizer.state.pop(p, None)
                else:
                    self.optimizer.state[p] = _copied(state)
            for buffer, value in self.buffers:
                buffer.copy_(value)
        now = numbers(self.optimizer)
        for group, counts, found in zip(self.optimizer.param_groups, self.counts, now, strict=True):
            for made_since in found.keys() - counts.keys():
                del group[made_since]
            group.update(counts)


@contextmanager
def back_on_error(snapshot: Snapshot) -> Iterator[None]:
    """Restore a snapshot if what is done inside fails: steps that nobody has chosen leave no trace."""
    try:
        yield
    except BaseException:
        snapshot.restore()
        raise


def changing(model: nn.Module) -> list[Tensor]:
    """Return the buffers that a training forward pass may change: floating-point ones (running means) and counters."""
    return [b for b in model.buffers() if b.is_floating_point() or not b.ndim]


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put back afterwards what training forward passes change beside weights, for passes that nobody trains by."""
    before = [(b, b.clone()) for b in changing(model)]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def _copied(state: dict[str, Any] | None, host: bool = False) -> dict[str, Any] | None:
    if not state:
        return None
    return {
        k: v.to("cpu" if host and v.ndim else v.device, copy=True) if isinstance(v, Tensor) else v
        for k, v in state.items()
    }
