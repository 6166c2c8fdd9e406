"""Time, memory and arithmetic: the ledger, training bytes and FLOPs.

Seconds are wall-clock and synchronised. Bytes are what training holds: weights, gradients, optimizer state and what
autograd keeps for backward; on CUDA the allocator's own peak. FLOPs count multiply-adds as two.
"""

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from entprog import parallel
from entprog.blocks import evaluating, forked_rng
from entprog.frozen import weight_bytes
from entprog.meta import Flops, saved
from entprog.modes import LossFn

# What the ledger tells apart; the first four are a training run's net time.
NET = ("training", "scoring", "search", "data")
KINDS = (*NET, "held_out", "checkpoint", "sampling")


def best_device() -> torch.device:
    """Return the first GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def now() -> float:
    """Return the wall-clock seconds after everything queued on the GPU has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Ledger:
    """Where a run's wall-clock seconds went; kinds nest, and the inner one is charged.

    The kinds and `other` add up to the wall time since the ledger was made, plus what a resumed run had spent.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    earlier: float = 0.0  # wall seconds of the run's earlier lives, up to the checkpoint it resumed from
    started: float = field(default_factory=now)
    _open: list[tuple[str, float]] = field(default_factory=list, repr=False)

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        """Charge the time inside to `kind`; an enclosing kind is not charged meanwhile."""
        if kind not in self.seconds:
            raise ValueError(f"the ledger has no kind {kind!r}: choose one of {KINDS}")
        self._settle()
        self._open.append((kind, now()))
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def _settle(self) -> None:
        """Charge the innermost open kind up to now."""
        if self._open:
            kind, since = self._open[-1]
            at = now()
            self.seconds[kind] += at - since
        self._open = [(kind, now()) for kind, _ in self._open]

    def net(self) -> float:
        """Return the seconds that count when strategies are compared: training, scoring, search and data."""
        self._settle()
        return sum(self.seconds[k] for k in NET)

    def wall(self) -> float:
        """Return the wall seconds of all the run's lives."""
        return self.earlier + now() - self.started

    def summary(self) -> dict[str, Any]:
        """Return {"seconds": per kind with "other", "wall": their sum}."""
        self._settle()
        wall = self.wall()
        known = sum(self.seconds.values())
        return {"seconds": self.seconds | {"other": max(0.0, wall - known)}, "wall": wall}


@contextmanager
def saved_bytes(ignore: Sequence[Tensor] = ()) -> Iterator[Callable[[], int]]:
    """Count the bytes autograd holds for backward; call the yielded function at the end of the forward pass.

    Storages are counted once, and those of `ignore` (parameters, inputs) not at all. Only what is still alive counts,
    so activation checkpointing shows.
    """
    ignored = {parallel.local(t).untyped_storage().data_ptr() for t in ignore}
    with saved() as held:

        def total() -> int:
            storages = {h.tensor.untyped_storage().data_ptr(): h.tensor.untyped_storage().nbytes() for h in held}
            return sum(size for pointer, size in storages.items() if pointer not in ignored)

        yield total


class PeakBytes(TorchDispatchMode):
    """The most bytes of tensors made inside a `with` that were alive at once: `peak`.

    On any device, by following storages from birth to death, so a checkpointed block's second run shows. What a kernel
    allocates for itself does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note the storages it made."""
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and (at := t.untyped_storage().data_ptr()) not in given | self._known:
                self._known.add(at)
                self.now += t.untyped_storage().nbytes()
                weakref.finalize(t.untyped_storage(), self._freed, at, t.untyped_storage().nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, at: int, size: int) -> None:
        self._known.discard(at)
        self.now -= size


def tensor_bytes(tensors: Any) -> int:
    """Sum the bytes of an iterable of tensors; of sharded ones this rank's part."""
    return sum(t.numel() * t.element_size() for t in map(parallel.local, tensors))


def training_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, activations: int, state: str = "all") -> int:
    """Bytes one training step holds: weights, gradients and optimizer state of what trains, and `activations`.

    On CUDA the allocator's peak since the last reset instead. State that the optimizer has not made yet is counted as
    the two moments it will make. state: "all"; "trained" where that of frozen parameters waits on the host; "none"
    where all does and no step is taken.
    """
    if torch.cuda.is_available() and next(model.parameters()).is_cuda:
        return torch.cuda.max_memory_allocated()
    trained = [p for p in model.parameters() if p.requires_grad]
    held = weight_bytes(model)["device"] + tensor_bytes(trained) + activations
    if state == "none":
        return held
    here = {p: optimizer.state.get(p) for group in optimizer.param_groups for p in group["params"]}
    counted = [s for p, s in here.items() if s and (state == "all" or p.requires_grad)]
    made = tensor_bytes(v for s in counted for v in s.values() if isinstance(v, Tensor) and v.ndim)
    return held + made + moments_to_come(trained, optimizer)


def moments_to_come(trained: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the two moments of what trains that the optimizer has not made yet."""
    return 2 * tensor_bytes(p for p in trained if not optimizer.state.get(p))


def count_flops(function: Callable[[], Any]) -> int:
    """Run a function and return the FLOPs of its matrix products, attention and convolutions, on any device."""
    with Flops() as counter:
        function()
    return counter.total


def held_out_losses(model: nn.Module, loss_fn: LossFn, batches: Sequence[Any]) -> Tensor:
    """Return the losses of fixed batches, (n,): eval mode, the i-th batch's noise from seed i.

    Several processes share the work, batch by batch; give all of them the same batches.
    """

    def losses(i: int, batch: Any) -> Tensor:
        with forked_rng(i):
            return loss_fn(model, batch).detach().float().reshape(-1).cpu()

    with evaluating(model):
        return torch.cat(parallel.divided(model, batches, losses))
