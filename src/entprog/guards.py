"""Guards: what would go wrong in silence in somebody's loop, refused before blocks are switched."""

import gc
import json
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path
from torch.utils.data import DataLoader

from entprog.blocks import Block, by_name, forked_rng
from entprog.parallel import is_sharded
from entprog.snapshot import buffers_kept

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

# model that is not released -> (whose it is, which parameters trained when that EntProg was built)
OWNERS: "weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[EntProg], dict[str, bool]]]"
OWNERS = weakref.WeakKeyDictionary()

CALL_IT = (
    "call it once per optimizer step, before the forward pass (with Accelerate: before `with "
    "accelerator.accumulate(model)`) and after zero_grad(set_to_none=True)"
)


def check_inputs(clock: str, total_steps: int, train_batches: Any, settings: "Progressive", shrink: Any) -> None:
    """Refuse what EntProg cannot begin with. ValueError with the value and what to do."""
    if clock not in ("wall", "model"):
        raise ValueError(f"clock {clock!r} is unknown: choose 'wall' or 'model'")
    if not 1 <= total_steps < math.inf:
        raise ValueError(f"total_steps is {total_steps}: give the number of optimizer steps of the whole run")
    if not callable(train_batches):
        raise ValueError(
            f"train_batches is a {type(train_batches).__name__}: give a callable that begins anew at each call, as "
            "lambda: iter(loader)"
        )
    if settings.axes != "blocks" and shrink is None:
        raise ValueError(
            f"axes {settings.axes!r} trains on smaller batches, and how yours get smaller only you know: give "
            "shrink(batch, tokens) -> batch, as entprog.shrinker({'latents': 'BCFHW'}) builds it, and compute the loss "
            "of prog.shrunk(batch); or set axes to 'blocks'"
        )


def check_released(model: nn.Module) -> None:
    """Refuse a model that another EntProg has switched: what it has frozen would pass for frozen by its owner.

    Where that EntProg is gone, what it has frozen may train again. ValueError.
    """
    for part in [m for m in model.modules() if m in OWNERS]:
        owner, flags = OWNERS[part]
        if owner() is not None:
            gc.collect()  # it may be gone but for a cycle
        if owner() is not None:
            raise ValueError(
                "the model's blocks are frozen and run as another EntProg has left them: call its release() first"
            )
        for name, p in part.named_parameters():
            p.requires_grad_(flags.get(name, p.requires_grad))
        del OWNERS[part]


def own(prog: "EntProg") -> None:
    """Note whose model this is now. ValueError where another EntProg has switched it meanwhile."""
    found = OWNERS.get(prog.model)
    if found is None or found[0]() is not prog:
        check_released(prog.model)
        flags = {id(p): required for p, required in prog.required}
        OWNERS[prog.model] = (
            weakref.ref(prog),
            {name: flags.get(id(p), p.requires_grad) for name, p in prog.model.named_parameters()},
        )


def disown(prog: "EntProg") -> bool:
    """Forget whose model this is; return whether it was this EntProg's."""
    found = OWNERS.get(prog.model)
    if found is None or found[0]() is not prog:
        return False
    del OWNERS[prog.model]
    return True


def check_saved_modes(modes: Mapping[str, str], candidates: Sequence[str]) -> None:
    """Refuse a saved state in which blocks train that may not train here. ValueError."""
    if others := [name for name, mode in modes.items() if mode == "train" and name not in candidates]:
        raise ValueError(
            f"in the saved state the blocks {others} train, and of this EntProg's candidates they are none: give it "
            "the candidates of the run that was saved, or leave its blocks unfrozen before"
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


def check_always(model: nn.Module, always: Sequence[str]) -> None:
    """Refuse names of what is to train throughout and is frozen: it never would. ValueError."""
    named, modules = dict(model.named_parameters()), dict(model.named_modules())
    parts = {a: [named[a]] if a in named else list(modules[a].parameters()) for a in always}
    if frozen := [a for a, own in parts.items() if own and not any(p.requires_grad for p in own)]:
        raise ValueError(f"always names {frozen}, which are frozen: call requires_grad_(True) on them before EntProg")


def check_loss(loss_fn: Callable[[nn.Module, Any], Any], model: nn.Module, batch: Any) -> None:
    """Compute a batch's loss; refuse one of another form, and a function that changes the batch it is given.

    ValueError. Batches are given to it several times. Moving one to a device or adding keys is no change.
    """
    before = {path: (v, v.clone()) for path, v in _tensors(batch).items()}
    loss = loss_fn(model, batch)
    if not isinstance(loss, Tensor) or (loss.ndim > 1 and loss.numel() > len(loss)):
        form = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"type {type(loss).__name__}"
        raise ValueError(f"loss_fn returns a loss of {form}: return a scalar or one loss per sample, (B,)")
    after = _tensors(batch)
    if changed := [path for path, (v, old) in before.items() if path not in after or _differ(v, old, after[path])]:
        raise ValueError(
            f"loss_fn changes the batch it is given, at {changed}, and gets batches more than once: let it work on a "
            "copy, batch = dict(batch), by operations that are not in place"
        )


def _tensors(batch: Any) -> dict[str, Tensor]:
    """Return the tensors in a batch of dicts, lists and tuples by their place in it."""
    return {f"batch{''.join(map(str, p))}": v for p, v in tree_flatten_with_path(batch)[0] if isinstance(v, Tensor)}


def _differ(given: Tensor, old: Tensor, now: Tensor) -> bool:
    """Return whether a tensor holds other values now; a copy on another device or in another dtype does not count."""
    if (now.shape, now.dtype, now.device) != (old.shape, old.dtype, old.device):
        return now is given
    return not bool(((now == old) | ((now != now) & (old != old))).all())  # NaN stays NaN


def begun(make: Callable[[], Iterable[Any]]) -> Callable[[], Iterator[Any]]:
    """Return `make`, whose iterators have been found to yield a batch each time.

    ValueError where they do not, and for the one iterator of a DataLoader with persistent workers, which begins again
    in the middle of the training loop's epoch.
    """

    def batches() -> Iterator[Any]:
        source = iter(make())
        if getattr(source, "_persistent_workers", False):
            raise ValueError(
                "train_batches() iterates a DataLoader with persistent_workers=True, which has a single iterator: the "
                "training loop's own epoch would begin again. Give EntProg a DataLoader of its own without them"
            )
        for first in source:
            return chain([first], source)
        raise ValueError("train_batches() yields no batch: pass a callable that gives a new iterator at each call")

    return batches


@contextmanager
def epoch_kept(optimizer: Any) -> Iterator[None]:
    """Let Accelerate know afterwards, as before, where the loop stands in its epoch.

    A prepared loader notes that on itself, and iterating it a second time, for scores, overwrites it: a window of
    accumulation would end too early, or not at the epoch's end.
    """
    state = getattr(optimizer, "gradient_state", None)
    loaders = list(getattr(state, "dataloader_references", ()))
    ends = [(loader, loader.end_of_dataloader, loader.remainder) for loader in loaders if loader is not None]
    try:
        yield
    finally:
        if state is not None:
            state.dataloader_references = loaders
        for loader, end, remainder in ends:
            loader.end_of_dataloader, loader.remainder = end, remainder


def check_step(prog: "EntProg", step: int, progress: float | None) -> None:
    """Refuse a step that the run has passed, and what a later one would stumble over.

    ValueError for a step or progress that goes back. RuntimeError where gradients are pending, though blocks have to be
    switched only later on, and where 8 steps that were to see smaller batches have not asked for any.
    """
    if prog.unshrunk > 8:
        raise RuntimeError(
            "training steps should see smaller batches by now, and nobody has asked for one in 8 steps: compute "
            "loss_fn(model, prog.shrunk(batch)), or set axes to 'blocks'"
        )
    if step < prog.last_step:
        raise ValueError(
            f"prog.step({step}) after {prog.last_step}: count optimizer steps over the whole run, not from 0 in each "
            "epoch; going back to a checkpoint needs load_state_dict, training anew a new EntProg"
        )
    least = max(0, prog.stage) / prog.settings.stages
    if progress is not None and not least - 1e-6 <= progress < math.inf:
        raise ValueError(
            f"progress is {progress}, and stage {prog.stage + 1} has begun at {least}: give the share of the whole run "
            "that is over, in [0, 1), which never falls, not after a resume either"
        )
    if 0 <= prog.stage < prog.settings.stages - 1 and _pending((p for p, _ in prog.required), prog.optimizer):
        raise RuntimeError(
            "gradients are pending in prog.step, and with them it cannot change the trainable blocks when the next "
            f"stage begins: {CALL_IT}"
        )


def _pending(parameters: Iterable[nn.Parameter], optimizer: Any) -> bool:
    """Return whether gradients wait for the optimizer; those of what it lacks are nobody's to clear."""
    held = {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
    return any(p.grad is not None and (not held or id(p) in held) for p in parameters)


def held_out_batches(held_out: Any, train_batches: Callable[[], Iterable[Any]]) -> list[Any]:
    """Return the list of batches that `held_out` means: one batch, or a list of batches.

    A list with tensors in it may be either; it is one batch where training batches are lists or tuples too, as those of
    a DataLoader over a TensorDataset are. ValueError for none, and for a loader.
    """
    if isinstance(held_out, DataLoader | Iterator):
        raise ValueError(f"held_out is a {type(held_out).__name__}: give a list of its batches, as list(loader)")
    if not isinstance(held_out, list | tuple):
        return [held_out]
    if not held_out:
        raise ValueError("held_out is empty: pass a batch, or a list of batches, that is not trained on")
    if any(isinstance(v, Tensor) for v in held_out):
        with forked_rng(0):
            one = next(iter(train_batches()), None)
        if isinstance(one, list | tuple):
            return [held_out]
    return list(held_out)


def candidate_names(blocks: Sequence[Block], candidates: Sequence[str] | None) -> list[str]:
    """Return the names of the blocks that may ever train, by default of those that hold a parameter which does.

    Their owner has chosen what trains, then; all blocks where none does and none holds adapters. ValueError for none,
    and for unknown names.
    """
    if candidates is None:
        candidates = [b.name for b in blocks if any(p.requires_grad for p in b.module.parameters())]
        if not candidates and not any(b.apart for b in blocks):
            candidates = [b.name for b in blocks]
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
    if accumulating or _pending(model.parameters(), optimizer):
        raise RuntimeError(
            f"prog.step would change the trainable blocks {'inside an accumulation window' if accumulating else ''}"
            f"{'' if accumulating else 'while gradients are pending'}: {CALL_IT}"
        )
    _check_reached_by(optimizer, blocks)
    if is_sharded(model):
        return
    with buffers_kept(model):
        reached = _reached_by_autograd(blocks, run)
    if not reached:
        raise ValueError(
            f"block {blocks[0].name} runs with autograd off in a training forward pass, as in reentrant gradient "
            "checkpointing: behind frozen blocks nothing would get a gradient. Use the non-reentrant form: "
            "model.enable_gradient_checkpointing() of diffusers, or checkpoint(..., use_reentrant=False)"
        )


def unscaled(backward: Callable[[Tensor], Any], model: nn.Module) -> Callable[[Tensor], Any]:
    """Return the loop's `backward`, which is refused where its first gradients are left scaled. ValueError.

    Searches step by them, and Adam would keep their squares: its steps would be next to nothing for a thousand more.
    """
    looked = False

    def looking(loss: Tensor) -> Any:
        nonlocal looked
        last = next((p for p in reversed(list(model.parameters())) if p.requires_grad), None)
        if looked or last is None or is_sharded(model):
            return backward(loss)
        seen: dict[str, float] = {}
        handles = [
            loss.register_hook(lambda g: seen.update(scale=float(g))),
            last.register_hook(lambda g: seen.update(size=float(g.float().norm()))),
        ]
        try:
            result = backward(loss)
        finally:
            for handle in handles:
                handle.remove()
        left = 0.0 if last.grad is None else float(last.grad.float().norm())
        if (scale := seen.get("scale", 1.0)) > 16 and left * scale > 16 * seen.get("size", math.inf):
            raise ValueError(
                f"backward(loss) leaves gradients {scale:g} times the loss's own, as under a GradScaler, and searches "
                "step by them: give EntProg a backward that unscales them, scaler.scale(loss).backward(); "
                "scaler.unscale_(optimizer); scaler.update(), or leave backward out"
            )
        looked = True
        return result

    return looking


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
