"""Guards: what would go wrong in silence in somebody's loop, refused before blocks are switched."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from entprog.blocks import Block, by_name, forked_rng
from entprog.parallel import is_sharded

if TYPE_CHECKING:
    from entprog.plugin import EntProg
    from entprog.strategy import Progressive

# what says that a stage or a period has begun
BEGUN = (
    "last_step",
    "stage",
    "stage_step",
    "period",
    "turns",
    "waited",
    "drawn",
    "rotating",
    "candidate",
    "wanted",
    "out",
)


def check_inputs(clock: str, total_steps: int, settings: "Progressive", shrink: Any) -> None:
    """Refuse what EntProg cannot begin with. ValueError with the value and what to do."""
    if clock not in ("wall", "model"):
        raise ValueError(f"clock {clock!r} is unknown: choose 'wall' or 'model'")
    if total_steps < 1:
        raise ValueError(f"total_steps is {total_steps}: give the number of optimizer steps of the whole run")
    if settings.axes != "blocks" and shrink is None:
        raise ValueError(
            f"axes {settings.axes!r} trains on smaller batches, and how yours get smaller only you know: give "
            "shrink(batch, tokens) -> batch, as entprog.shrinker({'latents': 'BCFHW'}) builds it, and compute the loss "
            "of prog.shrunk(batch); or set axes to 'blocks'"
        )


def check_adapters(settings: "Progressive", blocks: Sequence[Block]) -> None:
    """Refuse `adapters` where no block has any. ValueError with how to put them in."""
    if settings.adapters and not any(b.adapters for b in blocks):
        raise ValueError(
            "adapters=True trains adapters beside frozen blocks, and no block has any: blocks = find_blocks(model, "
            "example); add_adapters(model, blocks, rank) (entprog.strategy), then EntProg(..., blocks=blocks); or set "
            "adapters to False"
        )


def check_settings(settings: "Progressive", saved: Mapping[str, Any]) -> None:
    """Refuse to go on with another setting than the saved one. ValueError with what differs."""
    mine, theirs = (json.loads(json.dumps(dict(s))) for s in (asdict(settings), saved))
    if mine != theirs:
        differing = {k: (theirs.get(k), v) for k, v in mine.items() if theirs.get(k) != v}
        raise ValueError(
            f"the saved state belongs to another setting (saved, now): {differing}: resume with the saved one"
        )


@contextmanager
def retriable(prog: "EntProg") -> Iterator[None]:
    """Forget a stage or period that failed to begin, so that the next call of `step` does not pass it by."""
    before = {name: copy(getattr(prog, name)) for name in BEGUN}
    try:
        yield
    except BaseException:
        vars(prog).update(before)
        raise


def check_shrunk(steps: int) -> None:
    """Refuse a loop that has not asked for smaller batches in some steps that were to be small. RuntimeError."""
    if steps > 8:
        raise RuntimeError(
            "training steps should see smaller batches by now, and nobody has asked for one in 8 steps: compute "
            "loss_fn(model, prog.shrunk(batch)), or set axes to 'blocks'"
        )


def held_out_batches(held_out: Any, train_batches: Callable[[], Iterable[Any]]) -> list[Any]:
    """Return the list of batches that `held_out` means: one batch, or a list of batches.

    A list of tensors may be either; it is one batch where training batches are lists or tuples too, as those of a
    DataLoader over a TensorDataset are. ValueError for none.
    """
    if not isinstance(held_out, list | tuple):
        return [held_out]
    if not held_out:
        raise ValueError("held_out is empty: pass a batch, or a list of batches, that is not trained on")
    if all(isinstance(v, Tensor) for v in held_out):
        with forked_rng(0):
            one = next(iter(train_batches()), None)
        if isinstance(one, list | tuple):
            return [held_out]
    return list(held_out)


def candidate_names(blocks: Sequence[Block], candidates: Sequence[str] | None) -> list[str]:
    """Return the names of the blocks that may ever train: those asked for, by default all.

    Where adapters lie in some blocks and those without any came frozen, they stay so by default: their owner has
    chosen what trains. ValueError for none, and for unknown names.
    """
    if candidates is None:
        adapted = any(b.apart for b in blocks)
        candidates = [b.name for b in blocks if not adapted or any(p.requires_grad for p in b.module.parameters())]
    if not candidates:
        raise ValueError(f"candidates is empty: name blocks that may train, of {[b.name for b in blocks]}")
    return [b.name for b in by_name(list(blocks), candidates)]


def _check_reached_by(optimizer: Any, blocks: Sequence[Block]) -> None:
    """Refuse an optimizer that lacks parameters of blocks that may train: they would never be stepped."""
    groups = getattr(optimizer, "param_groups", None)
    if groups is None:
        return
    held = {id(p) for group in groups for p in group["params"]}
    lacking = [b.name for b in blocks if any(id(p) not in held for p in b.parameters())]
    if lacking:
        raise ValueError(
            f"the optimizer lacks parameters of the blocks {lacking}, which may train: build it over all of "
            "model.parameters(), or name the blocks that may train as candidates"
        )


def check_switchable(
    model: nn.Module, blocks: Sequence[Block], optimizer: torch.optim.Optimizer | None, run: Callable[[], Any]
) -> None:
    """Refuse to switch blocks where training would go wrong in silence afterwards.

    RuntimeError while gradients are pending or inside accelerator.accumulate, whose optimizer would not step.
    ValueError where `run`, which computes the training loss, runs `blocks`, those that may train, only with autograd
    off, as reentrant gradient checkpointing does: behind frozen blocks nothing would get a gradient. FSDP2 models are
    not looked at for that: a forward pass that ends early changes what they train afterwards. ValueError, too, where
    the optimizer lacks parameters of `blocks`.
    """
    accumulating = not getattr(getattr(optimizer, "gradient_state", None), "sync_gradients", True)
    if accumulating or any(p.grad is not None for p in model.parameters()):
        raise RuntimeError(
            f"prog.step would change the trainable blocks {'inside an accumulation window' if accumulating else ''}"
            f"{'' if accumulating else 'while gradients are pending'}: call it once per optimizer step, before the "
            "forward pass (with Accelerate: before `with accelerator.accumulate(model)`) and after "
            "zero_grad(set_to_none=True)"
        )
    _check_reached_by(optimizer, blocks)
    if not is_sharded(model) and not _reached_by_autograd(blocks, run):
        raise ValueError(
            f"block {blocks[0].name} runs with autograd off in a training forward pass, as in reentrant gradient "
            "checkpointing: behind frozen blocks nothing would get a gradient. Use the non-reentrant form: "
            "model.enable_gradient_checkpointing() of diffusers, or checkpoint(..., use_reentrant=False)"
        )


def check_parkable(optimizer: Any, frozen_weights: str | None) -> None:
    """Refuse to park weights (frozen.py) that the optimizer writes while they are frozen. ValueError."""
    if frozen_weights and callable(getattr(optimizer, "eval", None)):
        raise ValueError(
            f"the weights of frozen blocks are to be kept as {frozen_weights!r}, and {type(optimizer).__name__} writes "
            "all weights in its eval() and train(): leave frozen_weights out, within max_memory give more of it, or "
            "take an optimizer without such modes"
        )


class _Reached(Exception):
    """Ends a forward pass at a block that runs with autograd on."""


def _reached_by_autograd(blocks: Sequence[Block], run: Callable[[], Any]) -> bool:
    """Run up to the first call of one of the blocks with autograd on; whether there was one."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            raise _Reached

    handles = [block.module.register_forward_pre_hook(hook) for block in blocks]
    try:
        with torch.enable_grad(), forked_rng(0):
            run()
    except _Reached:
        return True
    finally:
        for handle in handles:
            handle.remove()
    return False
