"""What running frozen blocks cheaply does to gradients, and the choice of the blocks that may run so.

Gradient fidelity is measured, never assumed: the gradients with some blocks bypassed beside the exact ones, on batches
of the task. Of modules that train in front of the blocks (a new pose encoder) it is measured apart.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from entprog import parallel
from entprog.attention import attention_modules, call_detached, self_attention
from entprog.blocks import Block, by_name, evaluating, gradients_aside
from entprog.modes import LossFn, Predict, plain_forward, preserved, running, set_active, skip
from entprog.probe import Arguments
from entprog.snapshot import buffers_kept


def _gradients(model: nn.Module, loss_fn: LossFn, batch: Any, parameters: list[nn.Parameter]) -> list[Tensor]:
    with torch.enable_grad(), parallel.own_noise(model, 0), buffers_kept(model):
        loss = loss_fn(model, batch)
        return parallel.mean(model, parallel.gradients(model, loss, parameters))


def _agreement(approximate: list[Tensor], exact: list[Tensor]) -> tuple[float, float]:
    """(cosine, ratio of norms) of two lists of gradients, accumulated in float64."""
    dot = parallel.inner(approximate, exact)
    norm_a, norm_e = parallel.inner(approximate, approximate) ** 0.5, parallel.inner(exact, exact) ** 0.5
    if norm_a == 0 or norm_e == 0:
        return (1.0, 1.0) if norm_a == norm_e else (0.0, 0.0)
    return dot / (norm_a * norm_e), norm_a / norm_e


def fidelity(
    model: nn.Module,
    blocks: Sequence[Block],
    loss_fn: LossFn,
    batch: Any,
    active: Iterable[Any],
    bypass: Iterable[Any],
    skipped: Iterable[Any] = (),
    mode: str = "bypass",
) -> dict[str, float | None]:
    """Compare the gradients with `bypass` bypassed, or in another mode, against the exact ones.

    cosine = <g, g*> / |g||g*| and norm_ratio = |g| / |g*| over the parameters of the active blocks;
    new_modules_cosine the same cosine over the parameters outside blocks that require a gradient and do not get it
    exactly (the output head does), None if nothing outside blocks trains. Blocks in `skipped` sit out on both
    sides. Costs two backward passes; leaves the model as it was.
    """
    blocks = list(blocks)
    curve, _ = _fidelities(model, blocks, loss_fn, [batch], by_name(blocks, active), by_name(blocks, skipped), mode)
    return curve(by_name(blocks, bypass))


def _fidelities(
    model: nn.Module,
    blocks: list[Block],
    loss_fn: LossFn,
    batches: Sequence[Any],
    active: list[Block],
    skipped: list[Block],
    mode: str,
) -> tuple[Callable[[list[Block]], dict[str, float | None]], dict[str, float]]:
    """Return a function from bypass set to fidelity, averaged over batches, and each block's error of its own.

    Exact gradients are computed once, and the errors of going around single blocks (`detours`) with them.
    """
    inside = [p for b in active for p in b.parameters()]
    in_blocks = {id(p) for b in blocks for p in b.module.parameters()}
    outside = [p for p in model.parameters() if p.requires_grad and id(p) not in in_blocks]

    def measured(bypassed: list[Block]) -> list[list[Tensor]]:
        modes = {b.name: mode for b in bypassed} | {b.name: "skip" for b in skipped}
        own = (p for b in blocks for p in b.parameters())
        with preserved(model, blocks), gradients_aside(own):  # set_active refuses pending ones
            set_active(blocks, active, frozen=modes)
            return [_gradients(model, loss_fn, batch, inside + outside) for batch in batches]

    with detours(blocks, mode) as own:
        exact = measured([])
    errors = parallel.from_rank_0(model, own)  # every rank has seen batches of its own

    def fidelity_of(bypassed: list[Block]) -> dict[str, float | None]:
        cosine = ratio = new = 0.0
        for g, e in zip(measured(bypassed), exact, strict=True):
            c, r = _agreement(g[: len(inside)], e[: len(inside)])
            cosine, ratio = cosine + c / len(exact), ratio + r / len(exact)
            pairs = zip(g[len(inside) :], e[len(inside) :], strict=True)
            touched = [
                (a, b) for a, b in pairs if parallel.inner([a - b], [a - b])
            ]  # behind the blocks gradients stay exact
            new += (_agreement([a for a, _ in touched], [b for _, b in touched])[0] if touched else 1.0) / len(exact)
        return {"cosine": cosine, "norm_ratio": ratio, "new_modules_cosine": new if outside else None}

    return fidelity_of, errors


@contextmanager
def detours(blocks: Sequence[Block], mode: str = "bypass") -> Iterator[dict[str, float]]:
    """Measure, in backward passes inside, what bypassing each block alone would do to the gradient it passes on.

        error_b = |g_x - g_around|^2 / |g_x|^2

    g_x is the gradient of the block's stream through the block, g_around that of what is left without its branch (for
    most blocks the gradient of its output), or with mode="bypass_attn" of the block with its self-attention cut. The
    first comes free with an exact backward pass, the other costs two forward passes and a backward pass of the blocks
    more, one block at a time; the dict is filled at the end. A
    block that no gradient passes has error 0: nothing is lost. Blocks have to be verified. Compiled blocks run as
    they are written meanwhile: graphs for these hooks would never be used again.
    """
    sums: dict[str, list[float]] = {b.name: [0.0, 0.0] for b in blocks}
    errors: dict[str, float] = {}
    handles = []
    for block in blocks:
        handles.append(block.module.register_forward_pre_hook(partial(_enter_detour, block), with_kwargs=True))
        leave = partial(_leave_detour, block, sums[block.name], mode)
        handles.append(block.module.register_forward_hook(leave, with_kwargs=True))
    try:
        with torch.compiler.set_stance("force_eager"):
            yield errors
    finally:
        for handle in handles:
            handle.remove()
        errors |= {name: wrong / size if size else 0.0 for name, (wrong, size) in sums.items()}


def _streams(block: Block, module: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    if block.outputs is None or not torch.is_grad_enabled():
        return []
    arguments = Arguments(module, args, kwargs)
    streams = [arguments[slot] for slot in dict.fromkeys(block.outputs.slots) if slot is not None]
    return [x for x in streams if x.requires_grad]


def _swapped(value: Any, old: Sequence[Tensor], new: Sequence[Tensor]) -> Any:
    table = {id(x): y for x, y in zip(old, new, strict=True)}
    return tree_map(lambda v: table.get(id(v), v), value)


def _enter_detour(block: Block, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Give the block views of its streams: their gradient is the block's alone, not that of other readers."""
    streams = _streams(block, module, args, kwargs)
    return _swapped((args, kwargs), streams, [x.view_as(x) for x in streams])


def _around(block: Block, mode: str, module: nn.Module, args: Any, kwargs: Any) -> list[Any]:
    """Return the block's outputs as a mode's gradient sees them, without keeping more than what the block is given."""
    assert block.outputs is not None
    if mode != "bypass_attn":
        return block.outputs.bases(Arguments(module, args, kwargs))
    call = plain_forward(module)
    if block.attention is None:
        block.attention = self_attention(block, partial(call, *args, **kwargs)) if attention_modules(module) else ()
    parts = [module.get_submodule(name) for name in block.attention]
    return block.outputs.unpack(checkpoint(call_detached, parts, call, *args, use_reentrant=False, **kwargs))


def _leave_detour(
    block: Block, sums: list[float], mode: str, module: nn.Module, args: Any, kwargs: Any, output: Any
) -> None:
    streams = _streams(block, module, args, kwargs)
    if block.outputs is None or not streams:
        return
    if block.outputs.shortcut is not None and parallel.is_sharded(module):
        sums[:] = [1.0, 1.0]  # its weights are gone by now: not measured, taken for a bad one
        return
    leaves = [x.detach().requires_grad_() for x in streams]
    bases = _around(block, mode, module, *_swapped((args, kwargs), streams, leaves))
    around = [torch.zeros_like(x) for x in leaves]

    def arrived(base: Tensor, grad: Tensor) -> None:
        several = len(bases) > 1  # outputs of one graph
        for i, part in enumerate(torch.autograd.grad(base, leaves, grad, allow_unused=True, retain_graph=several)):
            if part is not None:
                around[i] = around[i] + part

    def passed(i: int, grad: Tensor) -> None:
        wrong = grad - around[i]
        sums[0] += parallel.inner([wrong], [wrong])
        sums[1] += parallel.inner([grad], [grad])

    for y, base in zip(block.outputs.unpack(output), bases, strict=True):
        if isinstance(y, Tensor) and y.requires_grad and isinstance(base, Tensor) and base.requires_grad:
            y.register_hook(partial(arrived, base))
    for i, x in enumerate(streams):
        x.register_hook(partial(passed, i))


def choose_bypass(
    model: nn.Module,
    blocks: Sequence[Block],
    loss_fn: LossFn,
    batches: Sequence[Any],
    active: Iterable[Any],
    order: Sequence[str] | None = None,
    *,
    min_fidelity: float = 0.98,
    min_new_fidelity: float = 0.0,
    skipped: Iterable[Any] = (),
    mode: str = "bypass",
    among: Iterable[Any] | None = None,
) -> tuple[list[str], list[dict[str, Any]]]:
    """Choose the largest set of frozen blocks to bypass whose fidelity is high enough.

    That is a cosine of at least `min_fidelity` for the trainable blocks and `min_new_fidelity` for what trains outside
    blocks. `order` lists names, first to be bypassed first; by default those whose bypass alone changes least the
    gradient they pass on (`detours`), which is measured with the exact gradients. `among`: the only blocks that may
    be bypassed, by default all. The set is a beginning of it, its
    size found by bisection, so a curve that dips and recovers is cut at the first dip it meets. Returns (names, the
    measured points of the curve: {"size", "cosine", "norm_ratio", "new_modules_cosine"}).
    """
    blocks = list(blocks)
    trained, out = by_name(blocks, active), by_name(blocks, skipped)
    frozen = {b.name for b in blocks} - {b.name for b in trained + out}
    frozen &= {b.name for b in by_name(blocks, among)} if among is not None else frozen
    candidates = [n for n in (order if order is not None else (b.name for b in blocks)) if n in frozen]
    if not candidates or not trained or min_fidelity >= 1:
        return [], []
    fidelity_of, errors = _fidelities(model, blocks, loss_fn, batches, trained, out, mode)
    if order is None:
        candidates.sort(key=lambda name: errors[name])
    curve: list[dict[str, Any]] = []

    def enough(size: int) -> bool:
        point = fidelity_of(by_name(blocks, candidates[:size]))
        curve.append({"size": size} | point)
        new = point["new_modules_cosine"]
        return float(point["cosine"] or 0.0) >= min_fidelity and (new is None or new >= min_new_fidelity)

    low, high = 0, len(candidates)
    if enough(high):
        low = high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return candidates[:low], sorted(curve, key=lambda point: point["size"])


def choose_skips(
    model: nn.Module, blocks: Sequence[Block], predict: Predict, batch: Any, count: int, keep: Iterable[Any] = ()
) -> list[dict[str, Any]]:
    """Order blocks for skipping, greedily by the change of the prediction when they are left out together.

    Step k adds the block that keeps E|eps_skip - eps|^2 / E|eps|^2 of the whole set smallest. Returns `count` entries
    {"name", "change"}, the change being that of the set so far. Blocks in `keep` are never skipped. Costs about
    count * L forward passes.
    """
    blocks = list(blocks)
    free = [b for b in blocks if b not in by_name(blocks, keep)]
    if not 0 <= count <= len(free):
        raise ValueError(f"cannot skip {count} of {len(free)} free blocks: choose a count between 0 and {len(free)}")
    chosen: list[Block] = []
    steps: list[dict[str, Any]] = []
    with evaluating(model):

        def prediction() -> Tensor:
            with parallel.own_noise(model, 0):
                return predict(model, batch).float()

        def power(values: Tensor) -> Tensor:
            return parallel.mean(model, [values.square().mean()])[0]

        with running(blocks, "train"):
            full = prediction()
            scale = power(full)
            for _ in range(count):
                changes = []
                for block in (b for b in free if b not in chosen):
                    with skip(chosen, block):
                        changes.append((float(power(prediction() - full) / scale), block))
                change, best = min(changes, key=lambda pair: (pair[0], pair[1].index))
                chosen.append(best)
                steps.append({"name": best.name, "change": change})
    return steps
