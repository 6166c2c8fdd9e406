"""Activation checkpointing, block by block and independent of modes: keep a block's input, run it again in backward.

Only non-reentrant checkpoints (a reentrant one would run a bypassed block again). A block is checkpointed at a call
that has to keep something for backward: one that trains, or a frozen one that gradients pass, told by whether an
argument or a parameter requires a gradient. A bypassed or skipped block, and one in front of everything trainable,
keeps nothing and is left alone; so the setting stays when modes change.

`block` keeps the block's input and runs all of it again: least memory between forward and backward, and at its peak
what one whole block keeps. `parts` keeps what lies between a block's large parts (attention, cross-attention,
feed-forward), runs them again one by one, and its peak is what the largest keeps: for few trainable blocks the smaller
sum. A block without large parts runs again as a whole.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from entprog.attention import patched
from entprog.blocks import Block, by_name
from entprog.meta import storage_of
from entprog.modes import Checkpoint, plain_forward, set_checkpoint
from entprog.probe import forked_rng

SMALLEST_PART = 0.1  # of what the block keeps; less is not worth a segment of its own


def _whole(
    call: Callable[..., Any], block: Block, module: nn.Module, cut: Sequence[nn.Module], args: Any, kwargs: Any
) -> Any:
    return checkpoint(call, *args, use_reentrant=False, **kwargs)


def _parts(
    call: Callable[..., Any], block: Block, module: nn.Module, cut: Sequence[nn.Module], args: Any, kwargs: Any
) -> Any:
    if block.segments is None:
        block.segments = segments(module, plain_forward(module), args, kwargs)
    inside = {id(m) for part in cut for m in part.modules()}
    chosen = [m for name in block.segments if id(m := module.get_submodule(name)) not in inside]
    torn = any(part in list(m.modules()) for part in cut for m in chosen)  # would run again outside what cuts it
    if torn or not chosen:
        return checkpoint(call, *args, use_reentrant=False, **kwargs)
    with patched(chosen, _segment):
        return call(*args, **kwargs)


def _segment(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


CHECKPOINTS: dict[str, Checkpoint | None] = {"none": None, "block": _whole, "parts": _parts}


def checkpoint_blocks(
    blocks: Sequence[Block], which: str | Mapping[str, str] | Iterable[Any] = "block", *, model: nn.Module | None = None
) -> None:
    """Checkpoint the activations of blocks from now on, in every mode that keeps some; the gradients stay the same.

    which: how, one of CHECKPOINTS for all blocks ("block", "parts", "none"), a dict name -> how, or names or Blocks to
    checkpoint whole; blocks left out are not checkpointed any more. Dropout draws the same numbers again. Blocks that
    read features of another network are left alone, as in every mode.

    model: where the blocks lie. ValueError for an unknown name or way, and where blocks or the model checkpoint
    themselves: everything would run once more for nothing.
    """
    blocks = list(blocks)
    if isinstance(which, str):
        ways = {b.name: which for b in blocks}
    elif isinstance(which, Mapping):
        ways = dict(which)
        by_name(blocks, ways)
    else:
        ways = {b.name: "block" for b in by_name(blocks, which)}
    if wrong := sorted(set(ways.values()) - set(CHECKPOINTS)):
        raise ValueError(f"checkpointing {wrong} is unknown: choose of {list(CHECKPOINTS)}")
    whole = {"the model": model} if model is not None else {}
    for name, module in (whole | {b.name: b.module for b in blocks if ways.get(b.name, "none") != "none"}).items():
        if any(getattr(m, "gradient_checkpointing", False) for m in module.modules()):
            raise ValueError(
                f"{name} ({type(module).__name__}) has gradient_checkpointing on, which would run every block once "
                "more than checkpoint_blocks does: call model.disable_gradient_checkpointing() first"
            )
    for block in blocks:
        set_checkpoint(block, CHECKPOINTS[ways.get(block.name, "none")])


def checkpointed(blocks: Iterable[Block]) -> dict[str, str]:
    """Return how the blocks run again in backward that have to, name -> "block" or "parts"."""
    runs = ((b.name, vars(b.module).get("_entprog_run")) for b in blocks)
    names = {way: name for name, way in CHECKPOINTS.items()}
    return {name: names[run.checkpoint] for name, run in runs if run is not None and run.checkpoint is not None}


class _Saved:
    """A tensor autograd saved, and the modules that were running."""

    __slots__ = ("__weakref__", "running", "tensor")

    def __init__(self, tensor: Tensor, running: tuple[str, ...]) -> None:
        self.tensor, self.running = tensor, running


def segments(module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> tuple[str, ...]:
    """Name the parts of a block that keep most for backward, by one call more whose graph is thrown away.

    They are those of a block that trains, in whatever mode it runs first. A part is worth a segment where it keeps at
    least SMALLEST_PART of the block's bytes beyond its own input, which a checkpoint keeps too. One that keeps more
    than half of all gives way to its own parts, if several are worth it (a UNet's unit around its transformer block).
    Empty where no part is worth it.
    """
    kept, parents = _kept(module, call, args, kwargs)
    total = max(1, kept[""])

    def inside(name: str) -> list[str]:
        found: list[str] = []
        for part in (n for n, p in parents.items() if p == name and kept[n] >= SMALLEST_PART * total):
            deeper = inside(part) if kept[part] > 0.5 * total else []
            found += deeper if len(deeper) > 1 else [part]
        return found

    return tuple(inside(""))


def _kept(module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> tuple[dict[str, int], dict[str, str]]:
    """Bytes kept by the block ("") and by each part beyond its inputs, and the part each was called in."""
    running: list[str] = []
    parents: dict[str, str] = {}
    inputs: dict[str, int] = {}
    held: weakref.WeakSet[_Saved] = weakref.WeakSet()
    required = [(p, p.requires_grad) for p in module.parameters() if p.is_floating_point()]
    weights = {storage_of(p) for p in module.parameters()}

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor.detach(), tuple(running))  # with its graph it would never be freed
        held.add(saved)
        return saved

    def enter(name: str, part: nn.Module, args: Any, kwargs: Any) -> None:
        parents.setdefault(name, running[-1] if running else "")
        given = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        inputs[name] = inputs.get(name, 0) + _storage_bytes(given)
        running.append(name)

    def leave(name: str, part: nn.Module, args: Any, output: Any) -> None:
        running.remove(name)

    handles = []
    for name, part in module.named_modules():
        if name:
            handles.append(part.register_forward_pre_hook(partial(enter, name), with_kwargs=True))
            handles.append(part.register_forward_hook(partial(leave, name), always_call=True))
    try:
        for p, _ in required:
            p.requires_grad_(True)
        with torch.enable_grad(), forked_rng(), torch.autograd.graph.saved_tensors_hooks(pack, lambda s: s.tensor):
            output = call(*tree_map(_leaf, args), **tree_map(_leaf, kwargs))
            tensors = [s for s in held if storage_of(s.tensor) not in weights]
            kept = {"": _storage_bytes(s.tensor for s in tensors)}
            for name in parents:
                kept[name] = _storage_bytes(s.tensor for s in tensors if name in s.running) - inputs[name]
            del output
    finally:
        for handle in handles:
            handle.remove()
        for p, needs in required:
            p.requires_grad_(needs)
    return kept, parents


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_(value.is_floating_point()) if isinstance(value, Tensor) else value


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    return sum({storage_of(t): t.untyped_storage().nbytes() for t in tensors}.values())
