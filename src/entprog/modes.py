"""Modes: how one block runs, what that does to gradients, and the choice of the sets that run cheaply.

    mode         forward                     gradient                     kept for backward     exact
    train        normal                      input and weights            activations           yes
    pass         normal                      input                        fewer activations     yes
    prefix       no_grad, where no argument needs a gradient; else pass   nothing               yes
    bypass       no_grad                     identity, stream to stream   nothing               no: see `fidelity`
    bypass_attn  self-attention no_grad      past the self-attention      without attention's   no: see `fidelity`
    skip         not run                     identity                     nothing               no: changes the forward

`train` and `pass` need nothing from us. The others replace the module's `forward` on the instance by a bound method,
with the mode kept on the module: a deep copy of the model then runs its own weights. A block of which any parameter
requires a gradient always runs normally, so nothing trainable inside a block is ever cut. What trains in front of a
bypassed block gets its gradient through the stream only, not through conditioning arguments; past a block in
bypass_attn it gets all but what reaches the self-attention.
"""

import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils._pytree import tree_leaves

from entprog import parallel
from entprog.attention import call_detached, check_attention, self_attention
from entprog.blocks import Block, by_name, first_tensor
from entprog.probe import Arguments, Outputs, probe

LossFn = Callable[[nn.Module, Any], Tensor]
Predict = Callable[[nn.Module, Any], Tensor]
Checkpoint = Callable[..., Any]  # (call, block, module, cut, args, kwargs) -> call(*args, **kwargs)


def predict_by_loss(loss_fn: LossFn) -> Predict:
    """Return predict(model, batch): the first tensor of the forward pass that loss_fn makes."""

    def predict(model: nn.Module, batch: Any) -> Tensor:
        seen: list[Any] = []
        handle = model.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            loss_fn(model, batch)
        finally:
            handle.remove()
        if not seen:
            raise ValueError(
                f"loss_fn did not call the {type(model).__name__} it was given: loss_fn(model, batch) must"
            )
        return first_tensor(seen[0])

    return predict


@dataclass
class _Run:
    """How a block's module runs now; an attribute of the module, so that deepcopy carries it along."""

    mode: str
    block: Block
    original: Callable[..., Any] | None  # the instance's forward that was there before ours
    replayed: Any = None
    checkpoint: Checkpoint | None = None  # how it runs where it keeps something for backward


def _normal(module: nn.Module, run: _Run, args: tuple[Any, ...], kwargs: dict[str, Any], cut: Any = ()) -> Any:
    """Run the block; the modules in `cut` without autograd, and all checkpointed if it is set so and has to."""
    call = run.original or types.MethodType(type(module).forward, module)
    if cut:
        call = partial(call_detached, cut, call)
    if run.checkpoint is None or not torch.is_grad_enabled() or not _keeps(module, args, kwargs):
        return call(*args, **kwargs)
    if _verified(module, run, args, kwargs).reads:  # run again, it would read what is there by then
        return call(*args, **kwargs)
    return run.checkpoint(call, run.block, module, cut, args, kwargs)


def plain_forward(module: nn.Module) -> Callable[..., Any]:
    """Return the forward of a block's module as it is without any mode or checkpoint of ours."""
    run: _Run | None = vars(module).get("_entprog_run")
    return module.forward if run is None else run.original or types.MethodType(type(module).forward, module)


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _keeps(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a normal call has to keep something for backward: told by what it is given, never by its place."""
    return _trains(module) or any(isinstance(v, Tensor) and v.requires_grad for v in tree_leaves((args, kwargs)))


def _prefix(module: nn.Module, run: _Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not torch.is_grad_enabled() or _keeps(module, args, kwargs):
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


def _bypass_attn(module: nn.Module, run: _Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not torch.is_grad_enabled() or _trains(module) or _verified(module, run, args, kwargs).reads:
        return _normal(module, run, args, kwargs)
    if run.block.attention is None:
        run.block.attention = self_attention(run.block, partial(_normal, module, run, args, kwargs))
    return _normal(module, run, args, kwargs, [module.get_submodule(name) for name in run.block.attention])


def _skip(module: nn.Module, run: _Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _verified(module, run, args, kwargs).identity(Arguments(module, args, kwargs))


def _replay(module: nn.Module, run: _Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return run.replayed


MODES: dict[str, Callable[..., Any]] = {
    "train": _normal,
    "pass": _normal,
    "prefix": _prefix,
    "bypass": _bypass,
    "bypass_attn": _bypass_attn,
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


def _inside_function() -> bool:
    """Whether we are called from the forward of a torch.autograd.Function: what reentrant checkpointing is."""
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and isinstance(frame.f_locals.get(code.co_varnames[0]), FunctionCtx):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    run: _Run = self._entprog_run  # type: ignore[assignment]
    if run.mode in ("skip", "bypass", "bypass_attn") and not torch.is_grad_enabled() and _inside_function():
        raise ValueError(
            f"block {run.block.name} runs in mode {run.mode!r} under reentrant gradient checkpointing: it would run "
            "again in backward, in whatever mode it has by then, and gradients would be wrong or missing. Use the "
            "non-reentrant form: model.enable_gradient_checkpointing() of diffusers, or checkpoint(..., "
            "use_reentrant=False)"
        )
    return (MODES.get(run.mode) or _INTERNAL[run.mode])(self, run, args, kwargs)


def mode_of(block: Block) -> str:
    """Return the block's mode; without one of ours it is `train` or `pass`, by whether anything in it trains."""
    run = vars(block.module).get("_entprog_run")
    if run is not None and run.mode not in ("train", "pass"):
        return run.mode
    return "train" if _trains(block.module) else "pass"


def set_mode(block: Block, mode: str, replayed: Any = None) -> None:
    """Run a block in a mode from now on; `train` and `pass` restore the forward that was there before.

    Checkpointing stays as it was set.

    ValueError for a mode that MODES does not list.
    """
    if mode not in MODES and mode not in _INTERNAL:
        raise ValueError(f"mode {mode!r} is unknown: choose one of {list(MODES)}")
    if mode == "bypass_attn":
        check_attention([block])
    run = vars(block.module).get("_entprog_run")
    _install(block, mode, run.checkpoint if run is not None else None, replayed)


def set_checkpoint(block: Block, checkpoint: Checkpoint | None) -> None:
    """Run a block through `checkpoint` wherever it keeps something for backward, in whatever mode; None: no more.

    Use checkpointing.checkpoint_blocks, which knows the ways to checkpoint a block.
    """
    run = vars(block.module).get("_entprog_run")
    _install(block, mode_of(block), checkpoint, run.replayed if run is not None else None)


def _install(block: Block, mode: str, checkpoint: Checkpoint | None, replayed: Any) -> None:
    """Let the module's forward be ours, or its own again where nothing is left to do."""
    module = block.module
    parallel.gather_in_forward(module, not (mode == "replay" or (mode == "skip" and _weightless(block))))
    parallel.gather_in_backward(module, True)
    run: _Run | None = vars(module).get("_entprog_run")
    if mode in ("train", "pass") and checkpoint is None:
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
    run.mode, run.block, run.replayed, run.checkpoint = mode, block, replayed, checkpoint


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
    if strangers := [b for b in flat if not isinstance(b, Block)]:
        raise ValueError(f"skip takes Blocks, not {strangers[:3]}: pick them from find_blocks(model)")
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
    check_attention([b for b in blocks if modes.get(b.name) == "bypass_attn"])
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
