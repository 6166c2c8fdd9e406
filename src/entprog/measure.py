"""Time, memory and arithmetic: the ledger, training bytes and FLOPs.

Seconds are wall-clock and synchronised. Bytes are what training holds: weights, gradients, optimizer state and what
autograd keeps for backward; on CUDA the allocator's own peak. FLOPs count multiply-adds as two.
"""

import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from entprog import parallel
from entprog.attention import attention_modules, observing
from entprog.blocks import Block, evaluating, forked_rng
from entprog.frozen import weight_bytes
from entprog.meta import saved
from entprog.modes import LossFn, running

# What the ledger tells apart; the first four are a training run's net time.
NET = ("training", "scoring", "search", "data")
KINDS = (*NET, "held_out", "checkpoint", "sampling")
MODEL_CLOCK_FLOPS = 1e10  # FLOPs that `clock: model` takes for one second


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
    """Run a function and return the FLOPs of its matrix products, attention and convolutions."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@dataclass(frozen=True)
class StepCost:
    """FLOPs of one training step for any set of modes, from one counted forward pass.

    forward F_b of each block, A_b of the self-attention in it, F_rest of everything else; a training step costs, where
    linear layers dominate,

        2 F_rest + sum over blocks of  F_b * {train: 3, pass: 2, prefix: 1, bypass: 1, skip: 0} + F_rest

    and 2 F_b - A_b for a block in bypass_attn. `pass` blocks in front of everything trainable cost 1, as `prefix`. A
    checkpointed block runs once more where gradients reach it.
    """

    blocks: dict[str, int]
    rest: int
    samples: int = 1  # of the pass that was counted
    attention: dict[str, int] = field(default_factory=dict)

    @classmethod
    def measure(
        cls, model: nn.Module, blocks: Sequence[Block], forward: Callable[[], Any], samples: int = 1
    ) -> "StepCost":
        """Count one forward pass of some samples in eval mode, block by block."""
        counter = FlopCounterMode(display=False)
        spent = {b.name: [0] for b in blocks}
        inside = {b.name: {n: [0] for n in attention_modules(b.module)} for b in blocks}
        with ExitStack() as stack:
            observed = {b.name: stack.enter_context(observing(b.module)) for b in blocks}
            for block in blocks:
                stack.enter_context(_counting(counter, block.module, spent[block.name]))
                for name, flops in inside[block.name].items():
                    stack.enter_context(_counting(counter, block.module.get_submodule(name), flops))
            with evaluating(model), running(blocks, "train"), forked_rng(0), counter:
                forward()
            total = counter.get_total_flops()
        of_blocks = {name: found[0] for name, found in spent.items()}
        attention = {b.name: sum(inside[b.name][n][0] for n in observed[b.name]()) for b in blocks}
        return cls(of_blocks, total - sum(of_blocks.values()), samples, {n: f for n, f in attention.items() if f})

    def step(self, modes: Mapping[str, str], upstream_trains: bool = True, checkpointed: Collection[str] = ()) -> int:
        """Return the FLOPs of a step with each block in a mode; `upstream_trains`: something before block 0 trains.

        ValueError for bypass_attn in a block whose self-attention was not counted.
        """
        total, reached = 3 * self.rest, upstream_trains
        for name, flops in self.blocks.items():
            mode = modes.get(name, "train")
            reached = reached or mode == "train"
            if mode == "bypass_attn" and name not in self.attention:
                raise ValueError(f"block {name} has no self-attention that was counted: choose another mode for it")
            passes = 2 if reached else 1
            total += flops * {"train": 3, "bypass": 1, "skip": 0}.get(mode, passes)
            total -= self.attention[name] if mode == "bypass_attn" and reached else 0
            total += flops if name in checkpointed and reached and mode not in ("bypass", "skip") else 0
        return total

    def forward(self, modes: Mapping[str, str]) -> int:
        """Return the FLOPs of a forward pass, without the blocks that do not run."""
        return self.rest + sum(f for n, f in self.blocks.items() if modes.get(n) not in ("skip", "replay"))

    def seconds(
        self, modes: Mapping[str, str], upstream_trains: bool = True, checkpointed: Collection[str] = ()
    ) -> float:
        """Return what `clock: model` takes for the step's time."""
        return self.step(modes, upstream_trains, checkpointed) / MODEL_CLOCK_FLOPS


@contextmanager
def _counting(counter: FlopCounterMode, module: nn.Module, spent: list[int]) -> Iterator[None]:
    """Add the FLOPs of each call of a module to spent[0]."""
    entered: list[int] = []
    handles = [
        module.register_forward_pre_hook(lambda m, args: entered.append(counter.get_total_flops())),
        module.register_forward_hook(
            lambda m, args, output: spent.__setitem__(0, spent[0] + counter.get_total_flops() - entered.pop())
        ),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def held_out_losses(model: nn.Module, loss_fn: LossFn, batches: Sequence[Any]) -> Tensor:
    """Return the losses of fixed batches, (n,): eval mode, the i-th batch's noise from seed i.

    Several processes share the work, batch by batch; give all of them the same batches.
    """

    def losses(i: int, batch: Any) -> Tensor:
        with forked_rng(i):
            return loss_fn(model, batch).detach().float().reshape(-1).cpu()

    with evaluating(model):
        return torch.cat(parallel.divided(model, batches, losses))
