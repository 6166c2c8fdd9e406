"""Self-attention inside a block, found by what it does: the modules whose output the mode `bypass_attn` cuts.

An attention module is one that holds the projections of queries, keys and values, apart or fused, or torch's own
MultiheadAttention. It is self-attention if queries and keys are projected from the same tensor, which one call of the
block shows. Joint attention of two streams counts: each stream's queries meet keys of both. Cross-attention does not:
its keys come from elsewhere (text, an image, another modality).

A block that writes its attention out in its own forward, or fuses it with its feed-forward, has no such module. It may
name what returns the attention's output in an attribute `self_attention`, a tuple of names of its submodules.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from entprog.blocks import Block
from entprog.probe import Outputs, forked_rng, probe

_OTHERWISE = "Run it in 'pass' or 'bypass', with frozen={name: mode}"
_PROJECTION = re.compile(r"(?:to_|w)?(qkv|q|k|v|query|key|value)(?:_proj|_linear)?")


def _projections(module: nn.Module) -> dict[str, nn.Module]:
    """Return a module's children that project queries, keys and values, by "q", "k", "v" or "qkv"."""
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        if match := _PROJECTION.fullmatch(name.lower()):
            found["qkv" if match[1] == "qkv" else match[1][0]] = child
    return found


def _is_attention(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.MultiheadAttention) or "qkv" in (p := _projections(module)) or {"q", "k", "v"} <= set(p)
    )


def attention_modules(module: nn.Module) -> dict[str, bool]:
    """Return the attention modules inside a block, outermost only: name -> named by the block as its self-attention.

    The block itself is none: then everything it does is attention, and cutting that is `bypass`.
    """
    found: dict[str, bool] = {}
    for name, part in module.named_modules():
        if any(name.startswith(f"{f}.") for f in found):
            continue
        named = getattr(part, "self_attention", ())
        if isinstance(named, tuple) and named:
            found |= {f"{name}.{n}" if name else n: True for n in named}
        elif name and _is_attention(part):
            found.setdefault(name, False)
    return found


def _place(tensor: Tensor) -> tuple[int, int]:
    """Return where a tensor's values lie, on the meta device too."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


@dataclass
class _Calls:
    """What the calls of one attention module showed."""

    inputs: dict[str, Tensor] = field(default_factory=dict)  # of the projections, in the call that runs
    verdicts: list[bool] = field(default_factory=list)
    first: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # arguments

    def judge(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note whether the call that ends projected queries and keys from the same tensor."""
        inputs, self.inputs = self.inputs, {}
        if isinstance(module, nn.MultiheadAttention):
            given = dict(zip(("query", "key"), args, strict=False)) | kwargs
            inputs = {"q": given["query"], "k": given["key"]}
        if "qkv" in inputs:
            self.verdicts.append(True)
        elif "q" in inputs and "k" in inputs:
            q, k = inputs["q"], inputs["k"]
            self.verdicts.append(q.shape == k.shape and _place(q) == _place(k))
        self.first = self.first or (args, kwargs)


@contextmanager
def observing(module: nn.Module) -> Iterator[Callable[[], dict[str, Any]]]:
    """Watch the calls of a block's attention modules; the yielded function returns those that are self-attention.

    It returns name -> (args, kwargs) of the first call. One that was called both ways, or not called, is left out.
    """
    declared = attention_modules(module)
    seen = {name: _Calls() for name in declared}
    handles = []
    for name, calls in seen.items():
        part = module.get_submodule(name)
        for kind, projection in _projections(part).items():
            handles.append(projection.register_forward_pre_hook(partial(_keep_input, calls, kind)))
        handles.append(part.register_forward_hook(partial(_ended, calls), with_kwargs=True))

    def found() -> dict[str, Any]:
        called = {n: c for n, c in seen.items() if c.first is not None}
        return {n: c.first for n, c in called.items() if declared[n] or (c.verdicts and all(c.verdicts))}

    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _keep_input(calls: _Calls, kind: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    if args:
        calls.inputs[kind] = args[0]


def _ended(calls: _Calls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    calls.judge(module, args, kwargs)


def self_attention(block: Block, call: Callable[[], Any]) -> tuple[str, ...]:
    """Name a block's self-attention by one call more, without autograd.

    ValueError if it has none, or one that adds its own input: cutting that would cut the stream.
    """
    kind = f"{block.name} ({type(block.module).__name__}) cannot run in mode 'bypass_attn'"
    with torch.no_grad(), forked_rng(), observing(block.module) as found:
        call()
        calls = found()
    if not calls:
        raise ValueError(
            f"{kind}: of its attention modules {list(attention_modules(block.module))} none projected queries and keys "
            f"from one tensor. {_OTHERWISE}"
        )
    for name, (args, kwargs) in calls.items():
        if isinstance(probe(block.module.get_submodule(name), args, kwargs), Outputs):
            raise ValueError(f"{kind}: {name} adds its own input to its output, so the stream lies in it. {_OTHERWISE}")
    return tuple(calls)


def find_attention(blocks: Sequence[Block], run: Callable[[], Any]) -> list[str]:
    """Name the blocks that bypass_attn can cut, those with self-attention of their own, by one run of the model.

    Each notes its own. ValueError if there is none.
    """

    def hook(block: Block, module: nn.Module, args: Any, kwargs: Any) -> None:
        if block.attention is None:
            try:
                block.attention = self_attention(block, partial(module.forward, *args, **kwargs))
            except ValueError:
                block.attention = ()

    handles = [b.module.register_forward_pre_hook(partial(hook, b), with_kwargs=True) for b in blocks]
    try:
        with torch.no_grad(), forked_rng(0):
            run()
    finally:
        for handle in handles:
            handle.remove()
    if not (found := [b.name for b in blocks if b.attention]):
        kinds = sorted({type(b.module).__name__ for b in blocks})
        raise ValueError(f"frozen='bypass_attn' needs blocks with self-attention of their own, and of {kinds} none has "
                         "any: choose 'bypass' or 'pass'")  # fmt: skip
    return found


def check_attention(blocks: Sequence[Block]) -> None:
    """ValueError if a block has no attention module that bypass_attn could cut."""
    without = [f"{b.name} ({type(b.module).__name__})" for b in blocks if not attention_modules(b.module)]
    if without:
        raise ValueError(
            f"{without} cannot run in mode 'bypass_attn': no attention module in them, one that holds the projections "
            "of queries, keys and values apart from the rest. Attention written out in the block's own forward must "
            f"become a submodule that the block names in an attribute self_attention = (name,). {_OTHERWISE}"
        )


@contextmanager
def patched(parts: Iterable[nn.Module], wrap: Callable[..., Any]) -> Iterator[None]:
    """Run the forward of some modules as wrap(forward, *args, **kwargs) inside; each has its own back afterwards."""
    before = [(part, vars(part).get("forward")) for part in parts]
    try:
        for part, _ in before:
            part.forward = partial(wrap, part.forward)
        yield
    finally:
        for part, forward in before:
            if forward is not None:
                part.forward = forward
            else:
                vars(part).pop("forward", None)


def _without_gradient(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return forward(*args, **kwargs)


def call_detached(parts: Sequence[nn.Module], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return call(*args, **kwargs) with the outputs of some modules treated as constants by autograd.

    They run without autograd, so they keep nothing for backward, nor does what only leads to them.
    """
    with patched(parts, _without_gradient):
        return call(*args, **kwargs)
