"""Modes: how one block runs, what that does to gradients, and the choice of the sets that run cheaply.

    mode     forward                     gradient                     kept for backward     exact
    train    normal                      input and weights            activations           yes
    pass     normal                      input                        fewer activations     yes
    prefix   no_grad, where no argument needs a gradient; else pass   nothing               yes
    bypass   no_grad                     identity, stream to stream   nothing               no: measured by `fidelity`
    skip     not run                     identity                     nothing               no: changes the forward

`train` and `pass` need nothing from us. The others replace the module's `forward` on the instance by a bound method,
with the mode kept on the module: a deep copy of the model then runs its own weights. A block of which any parameter
requires a gradient always runs normally, so nothing trainable inside a block is ever cut; what trains in front of a
bypassed block gets its gradient through the stream only, not through conditioning arguments.
"""

import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from entprog import parallel
from entprog.blocks import Block, by_name, evaluating, first_tensor
from entprog.probe import Arguments, Outputs, probe

LossFn = Callable[[nn.Module, Any], Tensor]
Predict = Callable[[nn.Module, Any], Tensor]


def predict_by_loss(loss_fn: LossFn) -> Predict:
    """Return predict(model, batch): the first tensor of the forward pass that loss_fn makes."""

    def predict(model: nn.Module, batch: Any) -> Tensor:
        seen: list[Any] = []
        handle = model.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            loss_fn(model, batch)
        finally:
            handle.remove()
        return first_tensor(seen[0])

    return predict


@dataclass
class _Run:
    """How a block's module runs now; an attribute of the module, so that deepcopy carries it along."""

    mode: str
    block: Block
    original: Callable[..., Any] | None  # the instance's forward that was there before ours
    replayed: Any = None


def _normal(module: nn.Module, run: _Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if run.original is not None:
        return run.original(*args, **kwargs)
    return type(module).forward(module, *args, **kwargs)


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _prefix(module: nn.Module, run: _Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    needed = any(isinstance(v, Tensor) and v.requires_grad for v in tree_leaves((args, kwargs)))
    if needed or _trains(module) or not torch.is_grad_enabled():
        return _normal(module, run, args, kwargs)
    if _verified(module, run, args, kwargs).reads:
        return _normal(module, run, args, kwargs)
    with torch.no_grad():
        return _normal(module, run, args, kwargs)


class _StraightThrough(torch.autograd.Function):
    """Return y; hand y's gradient to x unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> tuple[Tensor, None]:
        return grad[0].to(ctx.dtype), None


def _bypass(module: nn.Module, run: _Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    trains = _trains(module)
    parallel.gather_in_backward(module, trains or not _weightless(run.block))
    if not torch.is_grad_enabled() or trains:
        return _normal(module, run, args, kwargs)
    outputs = _verified(module, run, args, kwargs)
    if outputs.reads:  # what was read may need a gradient, and nobody can tell
        return _normal(module, run, args, kwargs)
    with torch.no_grad():  # never inference_mode: its tensors may not enter autograd later
        returned = _normal(module, run, args, kwargs)
    arguments = Arguments(module, args, kwargs)
    values = outputs.unpack(returned)
    for i, base in enumerate(outputs.bases(arguments)):
        if isinstance(base, Tensor) and base.requires_grad:
            values[i] = _StraightThrough.apply(base, values[i])
    return outputs.pack(values)


def _weightless(block: Block) -> bool:
    """Return whether what is left of the block without its branch needs none of its weights."""
    return block.outputs is not None and block.outputs.shortcut is None and not block.outputs.reads


def _skip(module: nn.Module, run: _Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _verified(module, run, args, kwargs).identity(Arguments(module, args, kwargs))


def _replay(module: nn.Module, run: _Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return run.replayed


MODES: dict[str, Callable[..., Any]] = {
    "train": _normal,
    "pass": _normal,
    "prefix": _prefix,
    "bypass": _bypass,
    "skip": _skip,
}
_INTERNAL = {"replay": _replay}


def _verified(module: nn.Module, run: _Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outputs:
    """Return the block's outputs, probing it first if no example has verified it yet."""
    if run.block.outputs is None:
        mode, run.mode = run.mode, "train"  # the probe calls the module, and must not come back here
        try:
            outputs = probe(module, args, kwargs)
        finally:
            run.mode = mode
        if isinstance(outputs, str):
            raise ValueError(
                f"block {run.block.name} ({type(module).__name__}) is not residual and cannot run in mode {mode!r}: "
                f"{outputs}. Pass an example to find_blocks to leave such modules out."
            )
        run.block.outputs = outputs
    return run.block.outputs


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    run: _Run = self._entprog_run  # type: ignore[assignment]
    return (MODES.get(run.mode) or _INTERNAL[run.mode])(self, run, args, kwargs)


def mode_of(block: Block) -> str:
    """Return the block's mode; without one of ours it is `train` or `pass`, by whether anything in it trains."""
    run = vars(block.module).get("_entprog_run")
    if run is not None:
        return run.mode
    return "train" if _trains(block.module) else "pass"


def set_mode(block: Block, mode: str, replayed: Any = None) -> None:
    """Run a block in a mode from now on; `train` and `pass` restore the forward that was there before.

    ValueError for a mode that MODES does not list.
    """
    if mode not in MODES and mode not in _INTERNAL:
        raise ValueError(f"mode {mode!r} is unknown: choose one of {list(MODES)}")
    module = block.module
    parallel.gather_in_forward(module, not (mode == "replay" or (mode == "skip" and _weightless(block))))
    parallel.gather_in_backward(module, True)
    run: _Run | None = vars(module).get("_entprog_run")
    if mode in ("train", "pass"):
        if run is not None:
            if run.original is not None:
                module.forward = run.original  # type: ignore[method-assign]
            else:
                del module.forward
            del module._entprog_run
        return
    if run is None:
        run = _Run(mode, block, vars(module).get("forward"))
        module._entprog_run = run  # type: ignore[assignment]
        module.forward = types.MethodType(_forward, module)  # type: ignore[method-assign]
    run.mode, run.block, run.replayed = mode, block, replayed


@contextmanager
def running(blocks: Iterable[Block], mode: str) -> Iterator[None]:
    """Run some blocks in a mode inside the context; their modes come back afterwards, even on error."""
    blocks = list(blocks)
    before = [(b, mode_of(b)) for b in blocks]
    try:
        for block in blocks:
            set_mode(block, mode)
        yield
    finally:
        for block, old in before:
            set_mode(block, old)


def skip(*blocks: Block | Iterable[Block]) -> Any:
    """Leave blocks out inside a `with`: each returns its own inputs, exactly, and is restored even on error.

    Takes Blocks or lists of Blocks. ValueError at the first forward if a block proves not to be residual.
    """
    flat: list[Block] = []
    for item in blocks:
        flat += [item] if isinstance(item, Block) else list(item)
    return running(flat, "skip")


def set_active(blocks: Sequence[Block], active: Iterable[Any], frozen: str | Mapping[str, str] = "pass") -> None:
    """Train the blocks in `active` and freeze the others, each in its backward mode.

    `active` holds names or Blocks; `frozen` is one mode for all frozen blocks or a dict name -> mode, in which blocks
    left out get `pass`. Only requires_grad inside blocks is touched. ValueError for an unknown name or mode;
    RuntimeError when a block that changes still holds a gradient, even of zeros, which would keep AdamW moving it.
    """
    blocks = list(blocks)
    trained = set(by_name(blocks, active))
    modes = dict(frozen) if isinstance(frozen, Mapping) else {b.name: frozen for b in blocks if b not in trained}
    by_name(blocks, modes)
    if wrong := sorted({m for m in modes.values() if m not in MODES or m == "train"}):
        raise ValueError(
            f"frozen blocks cannot run in mode {wrong}: choose one of {[m for m in MODES if m != 'train']}"
        )
    training = {id(p) for b in trained for p in b.parameters()}  # blocks may share parameters: then either trains them
    for block in blocks:
        for p in block.parameters():
            wanted = id(p) in training
            if p.requires_grad != wanted and p.grad is not None:
                raise RuntimeError(
                    f"block {block.name} would be {'unfrozen' if wanted else 'frozen'} with a gradient pending: call "
                    "optimizer.step() and zero_grad(set_to_none=True) first, and never inside an accumulation window"
                )
    for block in blocks:
        for p in block.parameters():
            p.requires_grad_(id(p) in training)
        set_mode(block, "train" if block in trained else modes.get(block.name, "pass"))


@contextmanager
def preserved(model: nn.Module, blocks: Sequence[Block]) -> Iterator[None]:
    """Put back every parameter's requires_grad and every block's mode afterwards."""
    required = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(b, mode_of(b)) for b in blocks]
    try:
        yield
    finally:
        for p, value in required:
            p.requires_grad_(value)
        for block, mode in modes:
            set_mode(block, mode)


def _gradients(model: nn.Module, loss_fn: LossFn, batch: Any, parameters: list[nn.Parameter]) -> list[Tensor]:
    with torch.enable_grad(), parallel.own_noise(model, 0):
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
) -> dict[str, float | None]:
    """Compare the gradients with `bypass` bypassed against the exact ones, same batch and noise.

    cosine = <g, g*> / |g||g*| and norm_ratio = |g| / |g*| over the parameters of the active blocks;
    new_modules_cosine the same cosine over the parameters outside blocks that require a gradient and do not get it
    exactly (the output head does), None if nothing outside blocks trains. Blocks in `skipped` sit out on both
    sides. Costs two backward passes; leaves the model as it was.
    """
    blocks = list(blocks)
    curve = _fidelities(model, blocks, loss_fn, [batch], by_name(blocks, active), by_name(blocks, skipped))
    return curve(by_name(blocks, bypass))


def _fidelities(
    model: nn.Module,
    blocks: list[Block],
    loss_fn: LossFn,
    batches: Sequence[Any],
    active: list[Block],
    skipped: list[Block],
) -> Callable[[list[Block]], dict[str, float | None]]:
    """Return a function from bypass set to fidelity, averaged over batches; exact gradients are computed once."""
    inside = [p for b in active for p in b.parameters()]
    in_blocks = {id(p) for b in blocks for p in b.module.parameters()}
    outside = [p for p in model.parameters() if p.requires_grad and id(p) not in in_blocks]

    def measured(bypassed: list[Block]) -> list[list[Tensor]]:
        modes = {b.name: "bypass" for b in bypassed} | {b.name: "skip" for b in skipped}
        with preserved(model, blocks):
            pending = [(p, p.grad) for b in blocks for p in b.parameters()]
            for p, _ in pending:
                p.grad = None  # set_active refuses pending gradients; these come back untouched
            set_active(blocks, active, frozen=modes)
            grads = [_gradients(model, loss_fn, batch, inside + outside) for batch in batches]
            for p, grad in pending:
                p.grad = grad
        return grads

    exact = measured([])

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

    return fidelity_of


def choose_bypass(
    model: nn.Module,
    blocks: Sequence[Block],
    loss_fn: LossFn,
    batches: Sequence[Any],
    active: Iterable[Any],
    order: Sequence[str],
    *,
    min_fidelity: float = 0.98,
    skipped: Iterable[Any] = (),
) -> tuple[list[str], list[dict[str, Any]]]:
    """Choose the largest set of frozen blocks to bypass whose fidelity is at least `min_fidelity`.

    `order` lists names, first to be bypassed first (ascending priority). The set is a beginning of it, its size found
    by bisection, so a curve that dips and recovers is cut at the first dip it meets. Returns (names, the measured
    points of the curve: {"size", "cosine", "norm_ratio", "new_modules_cosine"}).
    """
    blocks = list(blocks)
    trained, out = by_name(blocks, active), by_name(blocks, skipped)
    candidates = [n for n in order if n in {b.name for b in blocks} - {b.name for b in trained + out}]
    if not candidates or not trained or min_fidelity >= 1:
        return [], []
    fidelity_of = _fidelities(model, blocks, loss_fn, batches, trained, out)
    curve: list[dict[str, Any]] = []

    def enough(size: int) -> bool:
        point = fidelity_of(by_name(blocks, candidates[:size]))
        curve.append({"size": size} | point)
        return point["cosine"] is not None and point["cosine"] >= min_fidelity

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
