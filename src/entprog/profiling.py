"""What each block costs, from its own code on the meta device: parameters, FLOPs and bytes kept for backward.

No weights, no data, no fit: the model runs forward with shapes only, each kind of block once more forward and backward
for every way it may run, and what autograd saves is counted storage by storage. Two blocks are of one kind when class,
parameters and arguments have the same shapes. What a block saves is told apart by whose storage it is: its own, one of
its arguments' (the residual stream; embeddings that all blocks share count once), or one of its outputs'.
"""

import copy
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from entprog.blocks import Block, find_blocks, outside_blocks
from entprog.measure import tensor_bytes
from entprog.meta import (
    DEVICES,
    BlockCost,
    Call,
    Flops,
    Holder,
    again,
    as_on,
    block_cost,
    meta_inputs,
    saved,
    storage_of,
    tensors_of,
    to_meta,
)
from entprog.probe import Arguments


@dataclass
class _Capture:
    """One forward pass in which something outside blocks trains or not, and all blocks train or none."""

    calls: dict[str, Call] = field(default_factory=dict)
    needs: dict[str, tuple[bool, ...]] = field(default_factory=dict)
    sizes: dict[Any, int] = field(default_factory=dict)  # label -> bytes
    gaps: dict[int, dict[Any, int]] = field(default_factory=dict)  # gap -> what is saved there, label -> bytes
    flops: dict[int, int] = field(default_factory=dict)  # gap -> FLOPs

    def label(self, held: Sequence[Holder], weights: set[int]) -> None:
        """Name the storages by where they first occur, which is the same in every capture."""
        labels: dict[int, Any] = {}

        def named(value: Any, label: Any) -> Any:
            if not isinstance(value, Tensor):
                return None
            first = labels.setdefault(storage_of(value), label)
            self.sizes.setdefault(first, value.untyped_storage().nbytes())
            return first

        for name, call in self.calls.items():
            call.inputs = [named(v, (name, "in", i)) for i, v in enumerate(call.leaves)]
            call.made = [named(v, (name, "out", i)) for i, v in enumerate(call.outputs)]
        for h in held:
            if (storage := storage_of(h.tensor)) not in weights:
                label = labels.get(storage, ("between", storage))
                self.gaps.setdefault(h.gap, {})[label] = h.tensor.untyped_storage().nbytes()


def _settings(module: nn.Module) -> list[Any]:
    """Everything about a module, besides tensors, that may decide how its forward runs."""
    plain = bool | int | float | str | tuple | None

    def of(m: nn.Module) -> list[Any]:
        own = [(k, v) for k, v in vars(m).items() if not k.startswith("_") and k not in ("training", "forward")]
        return [(k, v if isinstance(v, plain) else type(v)) for k, v in sorted(own)]

    return [(name, type(m), of(m)) for name, m in module.named_modules()]


class _Machine:
    """The model on the meta device, with blocks that are run once per kind and way and then only pretended to run."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block], inputs: dict[str, Any], device: str) -> None:
        self.model, self.inputs, self.device = model, inputs, device
        self.modules = {b.name: b.module for b in blocks}
        self.outputs = {b.name: b.outputs for b in blocks}
        self.adapted: dict[str, nn.Module] = {}
        self.kinds: dict[Any, str] = {}
        self.kind_of: dict[str, str] = {}
        self.costs: dict[Any, BlockCost] = {}
        self.captures: dict[tuple[str, bool], _Capture] = {}
        self.calls: dict[str, Call] = {}
        self.way, self.pretended = "train", 0
        self.counter: Flops | None = None
        self.now = _Capture()
        for block in blocks:

            def forward(module: nn.Module, *args: Any, _name: str = block.name, **kwargs: Any) -> Any:
                return self.pretend(_name, args, kwargs)

            block.module.forward = types.MethodType(forward, block.module)  # type: ignore[method-assign]

    def pretend(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stand in for a block's forward: note the arguments, return what it would."""
        before = self.counter.total if self.counter else 0
        call = Call.of(args, kwargs)
        if name not in self.kind_of:
            shapes = [(v.shape, v.dtype, v.stride()) if isinstance(v, Tensor) else repr(v)[:80] for v in call.leaves]
            module = self.modules[name]
            weights = [(n, p.shape, p.dtype) for n, p in module.named_parameters()]
            kind = repr((_settings(module), shapes, weights, call.spec))
            self.kind_of[name] = self.kinds.setdefault(kind, name)
            self.calls.setdefault(self.kind_of[name], call)
        pattern = call.pattern()
        returned = again(self.cost(name, self.way, pattern), call.leaves)
        call.outputs = tensors_of(returned)
        self.now.calls.setdefault(name, call)
        self.now.needs.setdefault(name, pattern)
        if self.counter:
            self.pretended += self.counter.total - before
        return returned

    def cost(self, name: str, way: str, pattern: tuple[bool, ...]) -> BlockCost:
        """Return what a block costs, run one way: "train", "frozen", "lora" or "base"; its kind is run once."""
        kind = self.kind_of[name]
        if (kind, way, pattern) not in self.costs:
            module = self.adapted[kind] if way == "lora" else self.modules[kind]
            before = [(p, p.requires_grad) for p in module.parameters()]
            for n, p in module.named_parameters():
                p.requires_grad_(p.is_floating_point() and (way == "train" or (way == "lora" and "lora_" in n)))
            outputs = self.outputs[kind]

            def forward_of(*args: Any, **kwargs: Any) -> Any:
                if way == "base" and outputs is not None:
                    return outputs.identity(Arguments(module, args, kwargs))
                return type(module).forward(module, *args, **kwargs)

            self.costs[kind, way, pattern] = block_cost(module, self.calls[kind], pattern, self.device, forward_of)
            for p, needs in before:
                p.requires_grad_(needs)
        return self.costs[kind, way, pattern]

    def way_of(self, name: str, mode: str) -> str:
        """Return what of a frozen block autograd meets: "frozen" (all), "base" (its shortcut) or "" (nothing)."""
        outputs = self.outputs[self.kind_of[name]]
        if mode not in ("bypass", "skip") or (mode == "bypass" and outputs is not None and outputs.reads):
            return "frozen"
        changed = outputs is not None and (outputs.shortcut or outputs.added or outputs.divisor != 1.0)
        return "base" if changed else ""

    def run(self) -> Any:
        """One forward pass outside the blocks."""
        with as_on(self.device):
            return self.model(**self.inputs)

    def capture(self, outside: str, reached: bool) -> None:
        """Note a forward pass in which all blocks train (`reached`) or none; requires_grad outside is the caller's."""
        self.now, self.pretended = capture, _ = _Capture(), 0
        self.way = "train" if reached else "frozen"
        marks: list[int] = []
        with Flops() as self.counter, saved(lambda: len(capture.calls)) as held:
            handles = [
                m.register_forward_pre_hook(lambda *_: marks.append(self._outside())) for m in self.modules.values()
            ]
            output = self.run()
            marks.append(self._outside())
        for handle in handles:
            handle.remove()
        capture.flops = {i: b - a for i, (a, b) in enumerate(zip([0, *marks], marks, strict=False))}
        capture.label(list(held), {storage_of(p) for p in self.model.parameters()})
        del output  # until here what the head keeps is alive
        self.counter, self.captures[outside, reached] = None, capture

    def _outside(self) -> int:
        assert self.counter is not None
        return self.counter.total - self.pretended

    def keep(self, name: str, cost: BlockCost, checkpointing: bool, held: dict[Any, int]) -> int:
        """Add what a block keeps to the storages held; return the bytes made inside it."""
        capture = self.captures["all", True]
        call = capture.calls[name]
        outputs = {call.made[i] for i in cost.outputs}
        labels = {call.inputs[i] for i in (call.top if checkpointing else cost.arguments)}
        held |= {label: capture.sizes[label] for label in labels}
        if not checkpointing:
            held |= {label: capture.sizes[label] for label in outputs} | {name: cost.own}
        return cost.own + sum(capture.sizes[label] for label in outputs)

    def between(self, gap: int, outside: str, reached: bool, held: dict[Any, int]) -> int:
        """Add what is kept behind the gap-th block, outside blocks; return the FLOPs there, backward included."""
        capture = self.captures[outside, reached]
        held |= capture.gaps.get(gap, {})
        return capture.flops.get(gap, 0) * (3 if capture.gaps.get(gap) else 1)


OUTSIDE = ("none", "always", "all")


@dataclass
class Profile:
    """What planning needs to know of a model at one shape of inputs; `profile` makes it.

    blocks, bytes: name -> number of parameters, bytes of weights, in execution order. outside: (parameters, bytes)
    outside blocks; always: those of them that always train, the head and what was made for the task. adapters: name ->
    number of parameters of its LoRA adapters.
    """

    blocks: dict[str, int]
    bytes: dict[str, int]
    outside: tuple[int, int]
    always: tuple[int, int]
    adapters: dict[str, int]
    device: str
    _machine: _Machine = field(repr=False)

    def step(
        self, modes: Mapping[str, str], *, outside: str = "always", checkpointing: bool = False, lora: bool = False
    ) -> dict[str, int]:
        """Return {"activations", "recompute", "flops"} of one step with each block in a mode, by default `train`.

        activations: bytes autograd keeps at the end of the forward pass. recompute: bytes of the dearest block that
        checkpointing runs again. outside: what trains outside blocks, "none", "always" (the head and what was made for
        the task) or "all". ValueError for an unknown name or value.
        """
        if outside not in OUTSIDE:
            raise ValueError(f"outside {outside!r} is unknown: choose one of {OUTSIDE}")
        if unknown := set(modes) - set(self.blocks):
            raise ValueError(f"no block is called {sorted(unknown)}: the blocks are {list(self.blocks)}")
        machine, held = self._machine, dict[Any, int]()
        recompute, reached = 0, False
        flops = machine.between(0, outside, reached, held)
        for i, name in enumerate(self.blocks, 1):
            mode = modes.get(name, "train")
            trains = lora or mode == "train"
            pattern = machine.captures[outside, reached].needs[name]
            way = "lora" if lora else "train" if trains else machine.way_of(name, mode)
            if not trains and mode == "bypass" and way != "frozen":
                flops += machine.cost(name, "frozen", (False,) * len(pattern)).forward  # without autograd
            if way:
                cost = machine.cost(name, way, pattern)
                flops += cost.forward
                if trains or any(pattern):
                    flops += cost.backward + (cost.forward if checkpointing else 0)
                    own = machine.keep(name, cost, checkpointing, held)
                    recompute = max(recompute, own if checkpointing else 0)
            reached = reached or trains
            flops += machine.between(i, outside, reached, held)
        return {"activations": sum(held.values()), "recompute": recompute, "flops": flops}

    def block(self, name: str, mode: str = "train", reached: bool = True) -> dict[str, int]:
        """Return {"forward", "backward", "bytes"} of one block, a trainable one before it or not."""
        pattern = self._machine.captures["always", reached].needs[name]
        cost = self._machine.cost(name, "train" if mode == "train" else "frozen", pattern)
        if mode != "train" and (mode in ("bypass", "skip") or not any(pattern)):  # a shortcut's own cost left out
            return {"forward": 0 if mode == "skip" else cost.forward, "backward": 0, "bytes": 0}
        held: dict[Any, int] = {}
        self._machine.keep(name, cost, False, held)
        return {"forward": cost.forward, "backward": cost.backward, "bytes": sum(held.values())}


def profile(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    blocks: Sequence[Block | str] | None = None,
    always: Sequence[str] = (),
    device: str = "cuda",
    dtype: torch.dtype | None = None,
    lora_rank: int = 64,
) -> Profile:
    """Profile a model for training, from its structure alone; the model itself is neither run nor changed.

    inputs: arguments of forward, tensors on any device (only shapes count). blocks: Blocks or their names, by default
    those of find_blocks, which is not verified here. always: modules made for the task. device: "cuda" or "cpu", whose
    kernels save what. dtype: precision of the weights and inputs planned for, by default their own. lora_rank: 0 leaves
    adapters out.

    ValueError for unknown names; a model whose forward reads values of tensors cannot run without them.
    """
    if device not in DEVICES:
        raise ValueError(f"device {device!r} is unknown: choose one of {DEVICES}")
    meta = to_meta(model, dtype).train()
    for m in meta.modules():
        if getattr(m, "gradient_checkpointing", False):
            m.gradient_checkpointing = False  # type: ignore[assignment]
    for p in meta.parameters():
        p.requires_grad_(p.is_floating_point())
    found = _named_blocks(meta, blocks)
    machine = _Machine(meta, found, meta_inputs(inputs, dtype), device)
    head, stem = outside_blocks(meta, found, always, machine.run)
    for outside in OUTSIDE:
        for group, trains in ((head, outside != "none"), (stem, outside == "all")):
            for p in group:
                p.requires_grad_(trains)
        for reached in (False, True):
            machine.capture(outside, reached)
    order = list(machine.captures["all", True].calls)
    by_name = {b.name: b for b in found}
    adapters = _adapters(machine, lora_rank) if lora_rank else dict.fromkeys(machine.kind_of.values(), 0)
    return Profile(
        blocks={n: sum(p.numel() for p in by_name[n].parameters()) for n in order},
        bytes={n: tensor_bytes(by_name[n].module.parameters()) for n in order},
        outside=(sum(p.numel() for p in (*head, *stem)), tensor_bytes((*head, *stem))),
        always=(sum(p.numel() for p in head), tensor_bytes(head)),
        adapters={n: adapters[machine.kind_of[n]] for n in order},
        device=device,
        _machine=machine,
    )


def _named_blocks(meta: nn.Module, blocks: Sequence[Block | str] | None) -> list[Block]:
    if blocks is None:
        return find_blocks(meta)
    modules = dict(meta.named_modules())
    names = [b.name if isinstance(b, Block) else b for b in blocks]
    if unknown := [n for n in names if n not in modules]:
        raise ValueError(f"the model has no modules {unknown}: its blocks may be {[b.name for b in find_blocks(meta)]}")
    known = {b.name: b.outputs for b in blocks if isinstance(b, Block)}
    return [Block(i, n, modules[n], known.get(n)) for i, n in enumerate(names)]


def _adapters(machine: _Machine, rank: int) -> dict[str, int]:
    """Give each kind of block peft's LoRA adapters on all its linear layers, on a copy; return their sizes."""
    from peft import LoraConfig, inject_adapter_in_model

    sizes: dict[str, int] = {}
    for kind in set(machine.kind_of.values()):
        module = copy.copy(machine.modules[kind])
        del module.__dict__["forward"]
        module = copy.deepcopy(module)
        targets = [n for n, m in module.named_modules() if isinstance(m, nn.Linear)]
        if targets:
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
            dtype = next(module.get_submodule(t) for t in targets).get_parameter("weight").dtype
            inject_adapter_in_model(config, module)
            for n, m in module.named_modules():  # peft makes adapters in float32; planned for is the weights' dtype
                if "lora_" in n and isinstance(m, nn.Linear):
                    m.to(dtype)
        machine.adapted[kind] = module
        sizes[kind] = sum(p.numel() for n, p in module.named_parameters() if "lora_" in n)
    return sizes
