"""Several processes: gradients averaged by hooks or by FSDP2, decisions made by rank 0, measurements joined over ranks.

A model takes part after `data_parallel(model)` or `fully_sharded(model, blocks, forward)`; every other model is one
process's own, whatever process groups exist. Both leave `requires_grad` free to change from step to step. The ranks
train on different batches of one size, and a batch is what all ranks hold at one position: scores, fidelities and
searches come out as in one process that trains on the joined batches, and the same on every rank.

Every rank must use the same trainable parameters in each step, as it does when EntProg chooses them.
"""

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from entprog.blocks import Block, evaluating, gradients_aside
from entprog.probe import forked_rng

SMALL = 2**20  # bytes; gradients below are sent together
_hooked: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def rank() -> int:
    """Return this process's number, 0 where there is only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def on_cpus() -> bool:
    """Return whether several processes were started on a machine without an accelerator.

    Accelerate has to be told (cpu=True): otherwise it takes each process for the only one.
    """
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP2's fully_shard was applied to the model."""
    return hasattr(model, "set_reshard_after_forward")


def takes_part(model: nn.Module) -> bool:
    """Return whether the model was given to `data_parallel` or to FSDP2."""
    return model in _hooked or is_sharded(model)


def ranks(model: nn.Module) -> int:
    """Return how many processes train this model together."""
    together = dist.is_available() and dist.is_initialized() and takes_part(model)
    return dist.get_world_size() if together else 1


# -- gradients ---------------------------------------------------------------------------------------------------------


class GradientMean:
    """Average over ranks each gradient that a backward pass makes; `data_parallel` returns it.

    A hook on every parameter starts the all-reduce as soon as the gradient is there, while backward goes on; small
    gradients go together. When backward() returns, all gradients are averaged, ready for clipping. A frozen parameter
    gets no gradient and costs nothing. `sent` counts the bytes given to all-reduce.

    RuntimeError in the forward pass after a backward pass that did not come to its end (out of memory, and the batch
    left out, say): the ranks may have sent different gradients, and the next all-reduce would mix them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.sent = 0
        self._enabled = True
        self._pass: int | None = None  # autograd's number of the backward pass that is under way
        self._small: list[Tensor] = []
        self._under_way: list[tuple[Any, Tensor, list[Tensor]]] = []
        self._handles = [model.register_forward_pre_hook(self._begins)]
        for p in model.parameters():
            if p.is_floating_point():
                required = p.requires_grad
                p.requires_grad_(True)  # a hook can only be put on a parameter that requires a gradient
                self._handles.append(p.register_post_accumulate_grad_hook(self._arrived))
                p.requires_grad_(required)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate locally inside; the next backward pass outside sends the sum, for what has a gradient in it."""
        self._enabled = False
        try:
            yield
        finally:
            self._enabled = True

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _begins(self, *_: Any) -> None:
        if self._pass is not None and torch._C._current_graph_task_id() < 0:  # not recomputed in backward
            raise RuntimeError(
                "a backward pass did not come to its end, so that the ranks may have sent different gradients: stop "
                "all processes and resume; where it failed on every rank, call zero_grad(), remove() "
                "of what data_parallel returned, and data_parallel(model) again, on every rank"
            )

    def _arrived(self, p: Tensor) -> None:
        if not self._enabled or p.grad is None:
            return
        if self._pass != (number := torch._C._current_graph_task_id()):
            self._pass = number
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)  # type: ignore[attr-defined]
        if p.grad.numel() * p.grad.element_size() >= SMALL:
            self._send(p.grad, [])
            return
        self._small.append(p.grad)
        if sum(g.numel() * g.element_size() for g in self._small) >= SMALL:
            self._send_small()

    def _send(self, values: Tensor, parts: list[Tensor]) -> None:
        self.sent += values.numel() * values.element_size()
        values.div_(dist.get_world_size())
        self._under_way.append((dist.all_reduce(values, async_op=True), values, parts))

    def _send_small(self) -> None:
        for kind in dict.fromkeys((g.dtype, g.device) for g in self._small):
            parts = [g for g in self._small if (g.dtype, g.device) == kind]
            self._send(torch.cat([g.flatten() for g in parts]), parts)
        self._small = []

    def _finish(self) -> None:
        """Wait for everything; runs when backward has gone through."""
        self._send_small()
        for work, values, parts in self._under_way:
            work.wait()
            for part, mean in zip(parts, values.split([g.numel() for g in parts]) if parts else (), strict=True):
                part.copy_(mean.view_as(part))
        self._under_way, self._pass = [], None


def data_parallel(model: nn.Module) -> GradientMean:
    """Train copies of a model in all processes: rank 0's weights everywhere, gradients averaged in each backward pass.

        torch.distributed.init_process_group(); model.to(device)
        entprog.data_parallel(model)                     # then EntProg(model, ...) and the loop as in one process

    Instead of DistributedDataParallel, which fixes at wrapping what trains. Each rank draws its own batches. Over
    several backward passes a step nothing is needed; `no_sync()` saves communication. ValueError without a process
    group.
    """
    _needs_process_group("data_parallel")
    _broadcast(model)
    for module in model.modules():  # the model inside an adapter's wrapper takes part too
        _hooked.add(module)
    return GradientMean(model)


def _needs_process_group(name: str) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(f"{name} needs a process group: call torch.distributed.init_process_group() or make an "
                         "accelerate.Accelerator first, and start with torchrun or accelerate launch")  # fmt: skip


def _broadcast(model: nn.Module) -> None:
    for value in (*model.parameters(), *model.buffers()):
        dist.broadcast(value.data, 0)


def fully_sharded(
    model: nn.Module, blocks: Sequence[Block], forward: Callable[[], Any], **options: Any
) -> Sequence[Block]:
    """Shard a model over all processes by FSDP2, one group a block, so that what trains may change at every step.

        blocks = entprog.find_blocks(model, example)     # before sharding: zeros cannot be put into a sharded block
        entprog.fully_sharded(model, blocks, lambda: loss_fn(model, batch))
        optimizer = AdamW(model.parameters())            # after it
        prog = EntProg(model, loss_fn, blocks=blocks, ...)

    options go to fully_shard (mesh, mp_policy, offload_policy). `forward()` runs the model once without gradients
    while every parameter requires one: FSDP2 fixes the precision of a block's gradients at its first forward pass by
    what trains then. ValueError for blocks that no example has verified. Returns the blocks.
    """
    from torch.distributed.fsdp import fully_shard

    _needs_process_group("fully_sharded")
    if unproven := [b.name for b in blocks if b.outputs is None]:
        raise ValueError(
            f"blocks {unproven[:5]} are not verified, which needs unsharded weights: use find_blocks(model, example) "
            "before fully_sharded"
        )
    _broadcast(model)
    with _everything_trains(model):
        for block in blocks:
            fully_shard(block.module, reshard_after_forward=True, **options)
        fully_shard(model, reshard_after_forward=True, **options)  # the root too: snapshots change sharded weights
        with evaluating(model), forked_rng(0):
            forward()
    return blocks


@contextmanager
def _everything_trains(model: nn.Module) -> Iterator[None]:
    """Let every parameter require a gradient inside; by name, for sharding replaces them."""
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    for p in model.parameters():
        p.requires_grad_(p.is_floating_point() or p.requires_grad)
    try:
        yield
    finally:
        for n, p in model.named_parameters():
            p.requires_grad_(required[n])


def prepared(model: nn.Module, blocks: Sequence[Block] | None, forward: Callable[[], Any]) -> None:
    """Check that EntProg can train the model in this process; FSDP2 models are warmed up as `fully_sharded` does.

    ValueError, with what to do instead, for wrappers that fix what trains, for a sharded model without blocks or with
    blocks in several precisions, and for a model that several processes would train apart.
    """
    kind = type(model).__name__
    if kind in ("DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule", "DeepSpeedEngine"):
        raise ValueError(
            f"EntProg was given a model wrapped by {kind}: build it on the bare model. For torch.compile, compile each "
            "block with block.module.compile(). For several processes use entprog.data_parallel(model) or "
            "entprog.fully_sharded(model, blocks, forward) in the wrapper's place; they let what trains change"
        )
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and ranks(model) == 1:
        raise ValueError(
            f"{dist.get_world_size()} processes would train this model apart: call entprog.data_parallel(model) or "
            "entprog.fully_sharded(model, blocks, forward) before EntProg"
        )
    if not is_sharded(model):
        return
    if blocks is None or any(b.outputs is None for b in blocks):
        raise ValueError(
            "the model is sharded, and blocks are found on unsharded weights: call blocks = find_blocks(model, "
            "example), then fully_sharded(model, blocks, forward), and pass blocks=blocks to EntProg"
        )
    kinds = {b.name: sorted({str(p.dtype) for p in b.parameters()}) for b in blocks}
    if len({str(k) for k in kinds.values()}) > 1:
        raise ValueError(
            f"the blocks' sharded weights differ in precision, {kinds}: Accelerate keeps full precision only for what "
            "requires a gradient at prepare, so let everything require one there"
        )
    model.set_reshard_after_forward(True)  # type: ignore[operator]
    model.reshard()  # type: ignore[operator]
    with _everything_trains(model), evaluating(model), forked_rng(0):
        forward()


def gradients(model: nn.Module, loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return this rank's gradients of a loss, zeros where it does not depend; `.grad` stays as it was.

    FSDP2 gives gradients by backward() only, already averaged over ranks and sharded like the parameters.
    """
    if not is_sharded(model):
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
    with gradients_aside(model.parameters()):
        loss.backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def mean(model: nn.Module, values: Sequence[Tensor]) -> list[Tensor]:
    """Return the averages of tensors over the ranks; FSDP2's gradients are that already."""
    together = ranks(model)
    if together == 1:
        return list(values)
    means = [v if hasattr(v, "full_tensor") else v / together for v in values]  # copies: autograd may share one
    for work in [dist.all_reduce(v, async_op=True) for v in means if not hasattr(v, "full_tensor")]:
        work.wait()
    return means


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Return the inner product of two lists of tensors in float64; sharded ones count over all their shards."""
    pairs = list(zip(a, b, strict=True))
    total = sum(float((local(x).double() * local(y).double()).sum()) for x, y in pairs)
    like = next((x for x, _ in pairs if hasattr(x, "full_tensor")), None)
    if like is None:
        return total
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Partial() if p.is_shard() else Replicate() for p in like.placements]  # type: ignore[attr-defined]
    own = torch.tensor(total, dtype=torch.float64, device=local(like).device)
    return float(DTensor.from_local(own, like.device_mesh, placements).full_tensor())  # type: ignore[attr-defined]


def local(value: Tensor) -> Tensor:
    """Return this rank's part of a tensor."""
    return value.to_local() if hasattr(value, "to_local") else value


# -- what a frozen block does not need ---------------------------------------------------------------------------------


def gather_in_forward(module: nn.Module, wanted: bool) -> None:
    """Let a block that FSDP2 shards gather its weights in the forward pass, or not where it is not run at all."""
    if not is_sharded(module):
        return
    state = module._get_fsdp_state()  # type: ignore[operator]
    for hooks, first in ((module._forward_pre_hooks, True), (module._forward_hooks, False)):
        aside = vars(module).setdefault("_entprog_aside", {})
        if wanted:
            for key in [k for k, (where, _) in aside.items() if where is first]:
                hooks[key] = aside.pop(key)[1]
                hooks.move_to_end(key, last=not first)  # type: ignore[attr-defined]
        else:
            for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", None) is state]:
                aside[key] = (first, hooks.pop(key))


def gather_in_backward(module: nn.Module, wanted: bool) -> None:
    """Let a block that FSDP2 shards gather its weights in the backward pass, or not where none need them."""
    if is_sharded(module):
        module.set_unshard_in_backward(wanted)  # type: ignore[operator]


# -- agreement ---------------------------------------------------------------------------------------------------------


def from_rank_0(model: nn.Module, value: Any) -> Any:
    """Return rank 0's plain data on every rank."""
    if ranks(model) == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def agreed(model: nn.Module, record: Callable[[Callable[[], Any]], Any], compute: Callable[[], Any]) -> Any:
    """Return rank 0's record(compute) on every rank; where rank 0 has to compute all do, for that may take them all."""
    if ranks(model) == 1:
        return record(compute)
    if rank():
        if from_rank_0(model, None):
            compute()
        return from_rank_0(model, None)
    asked = False

    def asking() -> Any:
        nonlocal asked
        asked = from_rank_0(model, True)
        return compute()

    value = record(asking)
    if not asked:
        from_rank_0(model, False)
    return from_rank_0(model, value)


def slowest(model: nn.Module, seconds: float) -> float:
    """Return the maximum over ranks."""
    return max(_every(model, seconds))


def _every(model: nn.Module, value: Any) -> list[Any]:
    if ranks(model) == 1:
        return [value]
    found: list[Any] = [None] * ranks(model)
    dist.all_gather_object(found, value)
    return found


def joined(model: nn.Module, rows: Tensor) -> Tensor:
    """Put all ranks' rows below each other, in the order of the ranks, on every rank; shape (n, ...) on the CPU."""
    return torch.cat(_every(model, rows)) if ranks(model) > 1 else rows


def in_step(model: nn.Module, batches: Iterable[Any]) -> Iterator[Any]:
    """Yield this rank's batches as long as every rank has one."""
    nothing = object()
    source = iter(batches)
    while True:
        batch = next(source, nothing)
        if not all(_every(model, batch is not nothing)):
            return
        yield batch


def divided(model: nn.Module, items: Sequence[Any], run: Callable[[int, Any], Tensor]) -> list[Tensor]:
    """Return run(i, item) of every item, each computed by one rank, in order and on every rank.

    All ranks run equally often, as a sharded model needs: the last item may be run by several.
    """
    count, together = len(items), ranks(model)
    places = [min(i + rank() % together, count - 1) for i in range(0, count, together)]
    every = _every(model, [run(i, items[i]) for i in places])
    return [every[i % together][i // together] for i in range(count)]


def own_noise(model: nn.Module, seed: int) -> AbstractContextManager[None]:
    """Fork the random state from a seed of this rank's own, so that ranks do not draw the same noise."""
    return forked_rng(seed + (1_000_003 * rank() if ranks(model) > 1 else 0))
