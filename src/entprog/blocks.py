"""Blocks: the residual units of a model, found by structure and proven by a probe.

Candidates are the elements of ModuleLists and Sequentials; `probe` decides which of them are residual. Parameters that
are used outside the block they lie in (tied, or read by another part of the model) are seen on the way and named.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from entprog.probe import Arguments, Outputs, Watch, forked_rng, probe


@contextmanager
def gradients_aside(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Put pending gradients aside, and back afterwards, whatever happens."""
    pending = [(p, p.grad) for p in parameters]
    try:
        for p, _ in pending:
            p.grad = None
        yield
    finally:
        for p, grad in pending:
            p.grad = grad


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


@dataclass(eq=False)
class Block:
    """One residual unit that can be named, frozen and run in a mode.

    `outputs` is None until the probe has verified the block: by `find_blocks` when it is given an example, otherwise at
    the block's first use in a mode that needs it. `adapters` are parameters added inside the block that train whether
    it is frozen or not.

    `shared` names what else uses the block's parameters: other names they are registered under (tied weights) and,
    with an example, the modules outside the block that read them (DiT's head reads the first block's time embedding).
    Skipping such a block leaves out its own calls only. Freezing it freezes the other use too, and a parameter that two
    blocks hold trains when either of them does.

    `attention` names the modules inside that are self-attention, `segments` those that keep most for backward; both are
    found at the first call that needs them.
    """

    index: int
    name: str
    module: nn.Module
    outputs: Outputs | None = field(default=None, repr=False)
    adapters: list[nn.Parameter] = field(default_factory=list, repr=False)
    shared: tuple[str, ...] = ()
    apart: frozenset[str] = field(
        default=frozenset(), repr=False
    )  # names of what was frozen beside trainable parameters
    attention: tuple[str, ...] | None = field(default=None, repr=False)
    segments: tuple[str, ...] | None = field(default=None, repr=False)

    def parameters(self) -> list[nn.Parameter]:
        """Return the block's own floating-point parameters that may train, the only ones that freezing concerns."""
        added = {id(p) for p in self.adapters}
        named = self.module.named_parameters()
        return [p for n, p in named if p.is_floating_point() and id(p) not in added and n not in self.apart]


@dataclass(frozen=True)
class _Element:
    """A candidate: an element of a ModuleList or Sequential that has parameters and children.

    `depth` counts the modules between the model and the list that are neither list elements nor containers: 0 for
    `blocks.3`, 2 for `context_embedder.token_refiner.refiner_blocks.0`. A container is a module whose parameters all
    sit in ModuleLists of its own, as in a UNet's down, mid and up blocks: it counts as a list itself.
    """

    depth: int
    module: nn.Module
    container: bool


def _is_container(module: nn.Module) -> bool:
    parts = [c for c in module.children() if any(True for _ in c.parameters())]
    own = any(True for _ in module.parameters(recurse=False))
    return bool(parts) and not own and all(isinstance(c, nn.ModuleList) for c in parts)


def _elements(model: nn.Module) -> dict[str, _Element]:
    """Return the candidates by name, in the order they are registered; of a module with two names, the first."""
    found: dict[str, _Element] = {}
    seen: set[int] = set()

    def visit(module: nn.Module, prefix: str, depth: int) -> None:
        is_list = isinstance(module, nn.ModuleList | nn.Sequential)
        for name, child in module.named_children():
            full, container = f"{prefix}{name}", _is_container(child)
            has_parts = any(True for _ in child.children()) and any(True for _ in child.parameters())
            if is_list and has_parts and id(child) not in seen:
                seen.add(id(child))
                found[full] = _Element(depth, child, container)
            flat = is_list or container or isinstance(child, nn.ModuleList | nn.Sequential)
            visit(child, f"{full}.", depth + (0 if flat else 1))

    visit(model, "", 0)
    return found


def _shallowest(elements: Mapping[str, _Element], names: Iterable[str]) -> list[str]:
    """Of candidates nested in each other keep the outer one, or a container's parts; of several depths the least."""
    names = list(names)
    names = [n for n in names if not (elements[n].container and any(m.startswith(f"{n}.") for m in names))]
    names = [n for n in names if not any(n.startswith(f"{m}.") for m in names)]
    return [n for n in names if elements[n].depth == min(elements[m].depth for m in names)]


def _several_layers(module: nn.Module) -> bool:
    layers = [m for m in module.modules() if any(True for _ in m.parameters(recurse=False))]
    return len(layers) > 1


def _no_blocks(model: nn.Module, refused: Mapping[str, str]) -> ValueError:
    lists = [
        f"{name} ({len(m)} x {type(m[0]).__name__})"
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len(m)
    ]
    reasons = [f"{name}: {reason}" for name, reason in refused.items()]
    return ValueError(
        f"no residual blocks found in {type(model).__name__}. ModuleLists seen: {lists or 'none'}; elements that the "
        f"probe refused: {reasons or 'none'}. A block must be an element of a ModuleList or Sequential and return its "
        "own inputs when its parameters are zero."
    )


def find_blocks(model: nn.Module, example: Mapping[str, Any] | None = None) -> list[Block]:
    """Find the residual blocks of a model, in execution order.

    Candidates are the elements of ModuleLists and Sequentials. With `example`, a dict of forward inputs, the model runs
    once, every candidate is probed at its first call and only verified blocks are returned, in the order they ran.
    Without it the outermost lists are taken as registered (a UNet registers its mid block last), elements of a single
    layer left out, and each block is verified at its first use. Of nested hits the outermost counts, and of several
    depths the shallowest: a text refiner inside an embedder is not a block. A module whose parameters all sit in
    ModuleLists (a UNet's down, mid and up blocks) counts as a list: its parts are the blocks, where they are residual.

    ValueError if there are none, with the lists that were seen and why each candidate was refused.
    """
    elements = _elements(model)
    found: Mapping[str, Outputs | None]
    if example is None:
        refused: dict[str, str] = {}
        uses: list[tuple[set[int], tuple[str, ...]]] = []
        candidates = {n: e for n, e in elements.items() if _several_layers(e.module)} or elements
        found = dict.fromkeys(_shallowest(candidates, candidates))
    else:
        found, refused, uses = _probe_all(model, elements, example)
    if not found:
        raise _no_blocks(model, refused)
    names = _shallowest(elements, found)
    shared = _shared(model, {n: elements[n].module for n in names}, uses)
    apart = {n: _frozen_beside_trainable(elements[n].module) for n in names}
    return [Block(i, n, elements[n].module, found[n], shared=shared[n], apart=apart[n]) for i, n in enumerate(names)]


def _frozen_beside_trainable(module: nn.Module) -> frozenset[str]:
    """Name what is frozen where something else in the module trains: the base under an adapter, never to be enabled."""
    frozen = frozenset(n for n, p in module.named_parameters() if not p.requires_grad)
    return frozen if any(p.requires_grad for p in module.parameters()) else frozenset()


def _shared(
    model: nn.Module, blocks: Mapping[str, nn.Module], uses: Sequence[tuple[set[int], tuple[str, ...]]]
) -> dict[str, tuple[str, ...]]:
    """Block name -> what else uses its parameters. uses: (ids of parameters, names of the modules running then)."""
    named = [(n, id(p)) for n, p in model.named_parameters(remove_duplicate=False)]

    def of(name: str, module: nn.Module) -> tuple[str, ...]:
        own = {id(p) for p in module.parameters()}
        users = [n for n, i in named if i in own and not n.startswith(f"{name}.")]
        for taken, running in uses:
            if own & taken and name not in running:
                holder = next((n for n in running if n in blocks), None)  # another block, or the innermost module
                users.append(holder or (running[-1] if running else type(model).__name__))
        return tuple(dict.fromkeys(users))

    return {name: of(name, module) for name, module in blocks.items()}


def _probe_all(
    model: nn.Module, elements: Mapping[str, _Element], example: Mapping[str, Any]
) -> tuple[dict[str, Outputs], dict[str, str], list[tuple[set[int], tuple[str, ...]]]]:
    """Run the model once and probe each candidate at its first call.

    Returns the verified in the order they ran, the refused with the reason, and which parameters were used with which
    modules running (outermost first).
    """
    verified: dict[str, Outputs] = {}
    refused: dict[str, str] = {}
    running: list[str] = []
    parameters = {id(p) for p in model.parameters()}
    uses: dict[tuple[str, ...], set[int]] = {}

    def on_use(tensors: list[Tensor]) -> None:
        if taken := {id(t) for t in tensors} & parameters:
            uses.setdefault(tuple(running), set()).update(taken)

    watch = Watch((), (), on_use)

    def try_candidate(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inside = any(name.startswith(f"{v}.") and not elements[v].container for v in verified)
        if watch.paused or name in verified or name in refused or inside:
            return
        watch.paused = True
        try:
            outputs = probe(elements[name].module, args, kwargs)
        finally:
            watch.paused = False
        if isinstance(outputs, str):
            refused[name] = outputs
        else:
            verified[name] = outputs

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in elements:
                try_candidate(name, args, kwargs)
            running.append(name)

        return hook

    def leave(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if running and running[-1] == name:
                running.pop()

        return hook

    handles = []
    for name, module in model.named_modules():
        if module is not model:
            handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(leave(name), always_call=True))
    try:
        with forked_rng(0), evaluating(model), watch:
            model(**example)
    finally:
        for handle in handles:
            handle.remove()
    return verified, refused, [(taken, names) for names, taken in uses.items()]


def record_example(model: nn.Module, run: Callable[[], Any]) -> dict[str, Any]:
    """Run something that calls the model and return the arguments of the first call, as an example for find_blocks.

    A wrapper that only hands *args on (PEFT's) has no names for them; the first module inside that has gives them.
    Parts that a loss calls before the model say nothing.
    """
    seen: list[dict[str, Any]] = []
    called = False

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal called
        called |= module is model
        items = [] if seen or not called else list(Arguments(module, args, kwargs).items())
        if called and not seen and all(position is None for (_, position), _ in items):
            seen.append({name: value for (name, _), value in items})

    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in model.modules()]
    try:
        with evaluating(model), forked_rng(0):
            run()
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise ValueError(
            f"{type(model).__name__} was not called with named arguments: the loss has to call the model it is given"
        )
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
    them. The rest is stem: pretrained embeddings. ValueError for a name the model lacks or that is part of a block.
    """
    named, modules = dict(model.named_parameters()), dict(model.named_modules())
    if unknown := [a for a in always if a not in named and a not in modules]:
        raise ValueError(f"always names {unknown}, which the model lacks: its parts are {list(modules)[1:30]} ...")
    inside = {id(p) for b in blocks for p in b.module.parameters()}
    chosen = {id(named[a]) for a in always if a in named}
    chosen |= {id(p) for a in always if a in modules for p in modules[a].parameters()}
    if chosen & inside:
        raise ValueError(
            f"always names parts of blocks among {list(always)}: a block trains as a whole, when it is due"
        )
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


def on_host(batch: Any) -> Callable[[], Any]:
    """Move a batch's tensors, in dicts, lists and tuples, to the host; returns what gives the batch back as it was."""
    leaves, form = tree_flatten(batch)
    devices = [v.device if isinstance(v, Tensor) else None for v in leaves]
    held = [v.to("cpu") if isinstance(v, Tensor) else v for v in leaves]
    return lambda: tree_unflatten([v if d is None else v.to(d) for v, d in zip(held, devices, strict=True)], form)


def batch_size(batch: Any) -> int:
    """Return the length of the first tensor of a batch (a tensor, dict or sequence), 1 where there is none."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else [batch]
    return next((len(v) for v in values if isinstance(v, Tensor) and v.ndim), 1)
