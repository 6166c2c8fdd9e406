"""Blocks: the residual units of a model, found by structure and proven by a probe.

A residual block computes y = x + f(x; parameters). With its parameters at zero f vanishes, so the block must return its
own inputs bit for bit. `probe` runs a module that way (zeros of stride 0: no memory) and so learns three things at
once: that leaving the block out is legal, which output is which input (Flux returns its two streams in the other order
than it takes them), and that a third-party block behaves. No class names are consulted.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

Slot = tuple[str, int | None]  # argument name, and the position inside *args where the name is variadic


@contextmanager
def forked_rng(seed: int | None = None) -> Iterator[None]:
    """Run with the random state set aside, optionally from a seed, and put it back afterwards."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, without gradients, and restore each module's own mode afterwards."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class Arguments:
    """The arguments of one call of a module's forward, by slot."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        signature = inspect.signature(type(module).forward)
        self.bound = signature.bind(module, *args, **kwargs)
        self.kinds = {name: p.kind for name, p in signature.parameters.items()}
        self.self_name = next(iter(signature.parameters))

    def items(self) -> Iterator[tuple[Slot, Any]]:
        """Yield (slot, value) for every argument but self."""
        for name, value in self.bound.arguments.items():
            if name == self.self_name:
                continue
            if self.kinds[name] is inspect.Parameter.VAR_POSITIONAL:
                yield from (((name, i), v) for i, v in enumerate(value))
            elif self.kinds[name] is inspect.Parameter.VAR_KEYWORD:
                yield from (((k, None), v) for k, v in value.items())
            else:
                yield (name, None), value

    def __getitem__(self, slot: Slot) -> Any:
        return dict(self.items())[slot]


@dataclass(frozen=True)
class Outputs:
    """Which argument each output of a residual block continues.

    `slots` has one entry per output, None where the block returns None; `container` is `Tensor` for a bare tensor,
    otherwise the sequence type.
    """

    slots: tuple[Slot | None, ...]
    container: type

    def identity(self, arguments: Arguments) -> Any:
        """Return what the block would with its residual branch left out."""
        return self.pack([None if slot is None else arguments[slot] for slot in self.slots])

    def pack(self, values: list[Any]) -> Any:
        """Put one value per output into the block's return form."""
        return values[0] if self.container is Tensor else self.container(values)

    def unpack(self, returned: Any) -> list[Any]:
        """Take the block's return value apart, one value per output."""
        return [returned] if self.container is Tensor else list(returned)


@dataclass(eq=False)
class Block:
    """One residual unit that can be named, frozen and run in a mode.

    `outputs` is None until the probe has verified the block: by `find_blocks` when it is given an example, otherwise at
    the block's first use in a mode that needs it. `adapters` are parameters added inside the block that train whether
    it is frozen or not.
    """

    index: int
    name: str
    module: nn.Module
    outputs: Outputs | None = field(default=None, repr=False)
    adapters: list[nn.Parameter] = field(default_factory=list, repr=False)

    def parameters(self) -> list[nn.Parameter]:
        """Return the block's own floating-point parameters, the only ones that freezing concerns."""
        added = {id(p) for p in self.adapters}
        return [p for p in self.module.parameters() if p.is_floating_point() and id(p) not in added]


def probe(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Outputs | None:
    """Run `module` once with all parameters at zero; return its outputs' slots, or None if it is not residual.

    Every floating-point argument is shifted by its own noise first, so that two arguments that happen to be equal (or
    zero) cannot be taken for each other. A module that cannot run on zeros is not residual either.
    """
    with torch.no_grad(), forked_rng(0):

        def shifted(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value + torch.rand_like(value)
            return tuple(shifted(v) for v in value) if isinstance(value, tuple) else value

        # tuples inside arguments (rotary pairs) are shifted too, which no block minds
        new_args = tuple(shifted(a) for a in args)
        new_kwargs = {k: shifted(v) for k, v in kwargs.items()}
        zeros = {n: torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape) for n, p in
                 module.named_parameters()}  # fmt: skip
        try:
            arguments = Arguments(module, new_args, new_kwargs)
            returned = functional_call(module, zeros, new_args, new_kwargs)
        except (RuntimeError, ValueError, TypeError, ZeroDivisionError):
            return None
    if isinstance(returned, Tensor):
        container: type = Tensor
        values = [returned]
    elif type(returned) in (tuple, list):
        container = type(returned)
        values = list(returned)
    else:
        return None
    streams = {slot: v for slot, v in arguments.items() if isinstance(v, Tensor)}
    slots = [_origin(value, streams) for value in values]
    if not any(slots) or any(slot == () for slot in slots):
        return None
    return Outputs(tuple(slots), container)  # type: ignore[arg-type]


def _origin(value: Any, streams: dict[Slot, Tensor]) -> Slot | tuple[()] | None:
    """Return the slot whose tensor `value` equals bit for bit, None for None, () for anything else."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        for slot, stream in streams.items():
            if stream.shape == value.shape and stream.dtype == value.dtype and torch.equal(stream, value):
                return slot
    return ()


def _list_elements(model: nn.Module) -> dict[str, tuple[int, nn.Module]]:
    """Name -> (depth, module) of every element of a ModuleList or Sequential that has parameters and children.

    Depth counts the modules between the model and the list that are not themselves list elements: 0 for `blocks.3`, 2
    for `context_embedder.token_refiner.refiner_blocks.0`.
    """
    found: dict[str, tuple[int, nn.Module]] = {}
    seen: set[int] = set()

    def visit(module: nn.Module, prefix: str, depth: int) -> None:
        is_list = isinstance(module, nn.ModuleList | nn.Sequential)
        for name, child in module.named_children():
            full = f"{prefix}{name}"
            has_parts = any(True for _ in child.children()) and any(True for _ in child.parameters())
            if is_list and has_parts and id(child) not in seen:
                seen.add(id(child))
                found[full] = (depth, child)
            child_is_list = isinstance(child, nn.ModuleList | nn.Sequential)
            visit(child, f"{full}.", depth + (0 if child_is_list or is_list else 1))

    visit(model, "", 0)
    return found


def _no_blocks(model: nn.Module, refused: list[str]) -> ValueError:
    lists = [
        f"{name} ({len(m)} x {type(m[0]).__name__})"
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len(m)
    ]
    return ValueError(
        f"no residual blocks found in {type(model).__name__}. ModuleLists seen: {lists or 'none'}; elements that the "
        f"probe refused: {refused or 'none'}. A block must be an element of a ModuleList or Sequential and return its "
        "own inputs when its parameters are zero."
    )


def find_blocks(model: nn.Module, example: Mapping[str, Any] | None = None) -> list[Block]:
    """Find the residual blocks of a model, in execution order.

    Candidates are the elements of ModuleLists and Sequentials. With `example`, a dict of forward inputs, the model runs
    once, every candidate is probed at its first call and only verified blocks are returned, in the order they ran.
    Without it the outermost lists are taken as registered, and each block is verified at its first use. Of nested hits
    the outermost counts, and of several depths the shallowest: a text refiner inside an embedder is not a block.

    ValueError if there are none, with the lists that were seen.
    """
    elements = _list_elements(model)
    if example is None:
        names = _outermost(list(elements))
        hits: list[tuple[str, Outputs | None]] = [
            (n, None) for n in names if elements[n][0] == min(elements[m][0] for m in names)
        ]
        refused: list[str] = []
    else:
        hits, refused = _probe_all(model, {n: m for n, (_, m) in elements.items()}, example)
        hits = [(n, out) for n, out in hits if elements[n][0] == min(elements[m][0] for m, _ in hits)]
    if not hits:
        raise _no_blocks(model, refused)
    return [Block(i, name, elements[name][1], outputs) for i, (name, outputs) in enumerate(hits)]


def _outermost(names: list[str]) -> list[str]:
    return [n for n in names if not any(n.startswith(f"{other}.") for other in names)]


def _probe_all(
    model: nn.Module, candidates: dict[str, nn.Module], example: Mapping[str, Any]
) -> tuple[list[tuple[str, Outputs | None]], list[str]]:
    """Run the model once and probe each candidate at its first call: (verified in order, refused)."""
    verified: dict[str, Outputs | None] = {}
    refused: list[str] = []
    probing = False

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal probing
            if probing or name in verified or name in refused or any(name.startswith(f"{v}.") for v in verified):
                return
            probing = True
            try:
                outputs = probe(module, args, kwargs)
            finally:
                probing = False
            if outputs is None:
                refused.append(name)
            else:
                verified[name] = outputs

        return hook

    handles = [m.register_forward_pre_hook(hook_for(n), with_kwargs=True) for n, m in candidates.items()]
    try:
        with forked_rng(0), evaluating(model):
            model(**example)
    finally:
        for handle in handles:
            handle.remove()
    return list(verified.items()), refused


def record_example(model: nn.Module, run: Callable[[], Any]) -> dict[str, Any]:
    """Run something that calls the model and return the arguments of the first call, as an example for find_blocks."""
    seen: list[dict[str, Any]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append({slot[0]: value for slot, value in Arguments(module, args, kwargs).items()})

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with evaluating(model), forked_rng(0):
            run()
    finally:
        handle.remove()
    return seen[0]


def output_head(model: nn.Module, blocks: Sequence[Block], run: Callable[[], Any]) -> list[nn.Module]:
    """Return the modules outside blocks whose first call in a forward pass comes after the last block's."""
    inside = {id(m) for b in blocks for m in b.module.modules()}
    watched = [m for m in model.modules() if id(m) not in inside and m is not model] + [b.module for b in blocks]
    calls: list[nn.Module] = []
    handles = [m.register_forward_pre_hook(lambda module, args: calls.append(module)) for m in watched]
    try:
        with evaluating(model), forked_rng(0):
            run()
    finally:
        for handle in handles:
            handle.remove()
    last = max(i for i, m in enumerate(calls) if id(m) in inside)
    earlier = {id(m) for m in calls[: last + 1]}
    return [m for m in calls[last + 1 :] if id(m) not in earlier]


def by_name(blocks: list[Block], wanted: Any) -> list[Block]:
    """Turn names or Blocks into Blocks, in the blocks' order. ValueError for a name that no block has."""
    names = {b.name for b in blocks}
    asked = {w.name if isinstance(w, Block) else w for w in wanted}
    if unknown := sorted(map(str, asked - names)):
        raise ValueError(f"no block is called {unknown}: the blocks are {[b.name for b in blocks]}")
    return [b for b in blocks if b.name in asked]


def outside_blocks(
    model: nn.Module, blocks: Sequence[Block], always: Sequence[str], run: Callable[[], Any]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split the trainable parameters outside blocks into (always, stem).

    `always` names modules or parameters made for the task; the output head, what first runs after the last block, joins
    them. The rest is stem: pretrained embeddings. ValueError for a name the model lacks.
    """
    named, modules = dict(model.named_parameters()), dict(model.named_modules())
    if unknown := [a for a in always if a not in named and a not in modules]:
        raise ValueError(f"always names {unknown}, which the model lacks: its parts are {list(modules)[1:30]} ...")
    inside = {id(p) for b in blocks for p in b.module.parameters()}
    chosen = {id(named[a]) for a in always if a in named}
    chosen |= {id(p) for a in always if a in modules for p in modules[a].parameters()}
    chosen |= {id(p) for m in output_head(model, blocks, run) for p in m.parameters()}
    outside = [p for p in named.values() if p.requires_grad and id(p) not in inside]
    return [p for p in outside if id(p) in chosen], [p for p in outside if id(p) not in chosen]


def first_tensor(output: Any) -> Tensor:
    """Return the first tensor of a model's output. ValueError if there is none."""
    if isinstance(output, Tensor):
        return output
    for value in output.values() if isinstance(output, Mapping) else output:
        if isinstance(value, Tensor):
            return value
    raise ValueError(
        f"the model's output {type(output).__name__} holds no tensor: pass predict(model, batch) -> tensor"
    )


def batch_size(batch: Any) -> int:
    """Return the length of the first tensor of a batch (a tensor, dict or sequence), 1 where there is none."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else [batch]
    return next((len(v) for v in values if isinstance(v, Tensor) and v.ndim), 1)
