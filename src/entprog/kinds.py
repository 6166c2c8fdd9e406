"""Each kind of block, run once for every way it may run, on the meta device: what profiling.py is made of.

Two blocks are of one kind when class, parameters and arguments have the same shapes. The model runs around its blocks,
which only pretend to run; one forward pass for each answer to what trains outside blocks and whether blocks do. What a
block saves is told apart by whose storage it is: its own, one of its arguments' (the residual stream; embeddings that
all blocks share count once), or one of its outputs'.
"""

import copy
import types
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from entprog.attention import attention_modules, call_detached, observing, patched
from entprog.blocks import Block
from entprog.checkpointing import CHECKPOINTS, segments
from entprog.cost import state
from entprog.meta import BlockCost, Call, Flops, Holder, again, as_on, block_cost, saved, storage_of, tensors_of
from entprog.probe import Arguments


@dataclass
class _Capture:
    """One forward pass in which something outside blocks trains or not, and all blocks train or none."""

    calls: dict[str, Call] = field(default_factory=dict)
    needs: dict[str, tuple[bool, ...]] = field(default_factory=dict)
    sizes: dict[Any, int] = field(default_factory=dict)  # label -> bytes
    gaps: dict[int, dict[Any, int]] = field(default_factory=dict)  # gap -> what is saved there, label -> bytes
    flops: dict[int, int] = field(default_factory=dict)  # gap -> FLOPs, of the forward pass
    backward: int = 0  # FLOPs, of all gaps together

    def label(self, held: Sequence[Holder], weights: set[int]) -> None:
        """Name the storages by where they first occur, which is the same in every capture, as addresses are not."""
        labels: dict[int, Any] = {}
        seen: Counter[tuple[int, int]] = Counter()

        def named(value: Any, label: Any) -> Any:
            if not isinstance(value, Tensor):
                return None
            first = labels.setdefault(storage_of(value), label)
            self.sizes.setdefault(first, value.untyped_storage().nbytes())
            return first

        for name, call in self.calls.items():
            call.inputs = [named(v, (name, "in", i)) for i, v in enumerate(call.leaves)]
            call.made = [named(v, (name, "out", i)) for i, v in enumerate(call.outputs)]
        for h in sorted(held, key=lambda h: h.serial):
            if (storage := storage_of(h.tensor)) in weights:
                continue
            size = h.tensor.untyped_storage().nbytes()
            if storage not in labels:
                labels[storage] = ("between", h.gap, size, seen[h.gap, size])
                seen[h.gap, size] += 1
            self.gaps.setdefault(h.gap, {})[labels[storage]] = size


def _settings(module: nn.Module) -> list[Any]:
    """Everything about a module, besides tensors, that may decide how its forward runs."""
    plain = bool | int | float | str | tuple | None

    def of(m: nn.Module) -> list[Any]:
        own = [(k, v) for k, v in vars(m).items() if not k.startswith("_") and k not in ("training", "forward")]
        return [(k, v if isinstance(v, plain) else type(v)) for k, v in sorted(own)]

    return [(name, type(m), of(m)) for name, m in module.named_modules()]


class Machine:
    """The model on the meta device, with blocks that are run once per kind and way and then only pretended to run."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block], inputs: dict[str, Any], device: str) -> None:
        self.model, self.inputs, self.device = model, inputs, device
        self.modules = {b.name: b.module for b in blocks}
        self.outputs = {b.name: b.outputs for b in blocks}
        self.apart = {b.name: b.apart for b in blocks}
        self.adapted: dict[str, nn.Module] = {}
        self.kinds: dict[Any, str] = {}
        self.kind_of: dict[str, str] = {}
        self.costs: dict[Any, BlockCost] = {}
        self.cut: dict[str, tuple[str, ...]] = {}  # kind -> its self-attention
        self.segments: dict[str, tuple[str, ...]] = {}  # kind -> its large parts
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

    def cost(self, name: str, way: str, pattern: tuple[bool, ...], keep: str = "none") -> BlockCost:
        """Return what a block costs, run one way and checkpointed or not; its kind is run once.

        way: "train", "frozen", "attention" (frozen, its self-attention cut), "lora" or "base" (its shortcut alone).
        keep: a row of CHECKPOINTS, or "by part": not checkpointed, its parts told apart.
        """
        kind = self.kind_of[name]
        if (kind, way, pattern, keep) not in self.costs:
            module = self.adapted.get(kind, self.modules[kind]) if way == "lora" else self.modules[kind]
            before = [(p, p.requires_grad) for p in module.parameters()]
            for n, p in module.named_parameters():
                trains = way == "train" and n not in self.apart[kind]
                p.requires_grad_(p.is_floating_point() and (trains or (way == "lora" and "lora_" in n)))
            parts = self.parts_of(kind) if keep in ("parts", "by part") else ()
            forward_of = self._forward_of(kind, module, way, keep, parts)
            self.costs[kind, way, pattern, keep] = block_cost(
                module, self.calls[kind], pattern, self.device, forward_of, parts if keep == "by part" else ()
            )
            for p, needs in before:
                p.requires_grad_(needs)
        return self.costs[kind, way, pattern, keep]

    def _forward_of(
        self, kind: str, module: nn.Module, way: str, keep: str, parts: tuple[str, ...]
    ) -> Callable[..., Any]:
        """Return the forward of a kind of block that runs one way, checkpointed or not."""
        outputs, cut = self.outputs[kind], [module.get_submodule(n) for n in self.cut.get(kind, ())]
        cut = cut if way == "attention" else []

        def plain(*args: Any, **kwargs: Any) -> Any:
            if way == "base" and outputs is not None:
                return outputs.identity(Arguments(module, args, kwargs))
            return type(module).forward(module, *args, **kwargs)

        call = partial(call_detached, cut, plain) if cut else plain
        checkpoint = CHECKPOINTS.get(keep)
        if checkpoint is None:
            return call
        block = Block(0, kind, module, segments=parts)

        def again_on(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with as_on(self.device):  # backward, which runs it again, leaves such modes behind
                return run(*args, **kwargs)

        def checkpointed(*args: Any, **kwargs: Any) -> Any:
            with patched([module.get_submodule(n) for n in parts], again_on):
                return checkpoint(partial(again_on, call), block, module, cut, args, kwargs)

        return checkpointed

    def _once(self, kind: str, use: Callable[..., Any]) -> Any:
        """Return use(forward, args, kwargs) for a kind of block on the shapes of its call."""
        args, kwargs = tree_unflatten(self.calls[kind].leaves, self.calls[kind].spec)
        with as_on(self.device):
            return use(partial(type(self.modules[kind]).forward, self.modules[kind]), args, kwargs)

    def parts_of(self, kind: str) -> tuple[str, ...]:
        """Return the large parts of a kind of block, which checkpointing by parts runs again one by one."""
        if kind not in self.segments:
            self.segments[kind] = self._once(kind, partial(segments, self.modules[kind]))
        return self.segments[kind]

    def cut_of(self, name: str) -> tuple[str, ...]:
        """Return the self-attention of a block, which bypass_attn cuts; empty if it has none of its own."""
        kind = self.kind_of[name]
        if kind not in self.cut:
            with torch.no_grad(), observing(self.modules[kind]) as found:
                if attention_modules(self.modules[kind]):
                    self._once(kind, lambda call, args, kwargs: call(*args, **kwargs))
                self.cut[kind] = tuple(found())
        return self.cut[kind]

    def way_of(self, name: str, mode: str) -> str:
        """Return what of a block autograd meets in a mode: a way of `cost`, or "" (nothing)."""
        if mode in ("train", "lora"):
            return mode
        outputs = self.outputs[self.kind_of[name]]
        reads = outputs is not None and outputs.reads
        if mode == "bypass_attn":
            return "attention" if self.cut_of(name) and not reads else "frozen"
        if mode not in ("bypass", "skip") or (mode == "bypass" and reads):
            return "frozen"
        changed = outputs is not None and (outputs.shortcut or outputs.added or outputs.divisor != 1.0)
        return "base" if changed else ""

    def met(self, name: str, mode: str, keep: str, pattern: tuple[bool, ...]) -> BlockCost | None:
        """Return what autograd meets of a block in a mode, None for nothing."""
        way = self.way_of(name, mode)
        keeps = way in ("train", "lora") or (way in ("frozen", "attention") and any(pattern))
        return self.cost(name, way, pattern, keep if keeps else "none") if way else None

    def fill(self, mode: str, keep: str, outside: str, reached: bool) -> dict[str, int]:
        """Count a column of StepCost: the FLOPs of every block in a mode, forward and backward."""
        found = {}
        for name, pattern in self.captures[outside, reached].needs.items():
            if mode == "bypass_attn" and not self.cut_of(name):
                continue
            cost = self.met(name, mode, keep, pattern)
            found[name] = cost.forward + cost.backward if cost else 0
            if mode == "bypass" and self.way_of(name, mode) != "frozen":  # the block itself runs without autograd
                found[name] += self.cost(name, "frozen", (False,) * len(pattern)).forward
        return found

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
            capture.label(list(held), {storage_of(p) for p in self.model.parameters()})  # the head's are alive
            before = self.counter.total
            self._backward([v for c in capture.calls.values() for v in c.leaves] + tensors_of(output))
            capture.backward = self.counter.total - before
        self.counter, self.captures[outside, reached] = None, capture

    def _backward(self, ends: Sequence[Any]) -> None:
        """Run everything outside blocks backward, from what blocks are given and from the output."""
        ends = [v for v in ends if isinstance(v, Tensor) and v.grad_fn is not None]
        if ends:
            with as_on(self.device):
                torch.autograd.backward(ends, [torch.empty_like(v) for v in ends])
        for p in self.model.parameters():
            p.grad = None

    def _outside(self) -> int:
        assert self.counter is not None
        return self.counter.total - self.pretended

    def keep(self, name: str, cost: BlockCost, held: dict[Any, int]) -> int:
        """Add what a block keeps to the storages held; return the bytes made inside it."""
        capture = self.captures["all", True]
        call = capture.calls[name]
        outputs = {call.made[i] for i in cost.outputs}
        held |= {call.inputs[i]: capture.sizes[call.inputs[i]] for i in cost.arguments}
        held |= {label: capture.sizes[label] for label in outputs} | {name: cost.own}
        return cost.own + sum(capture.sizes[label] for label in outputs)

    def recomputed(self, name: str, mode: str, keep: str, pattern: tuple[bool, ...]) -> int:
        """Bytes that checkpointing makes again at once in a block: all it would keep, or its largest part."""
        way = self.way_of(name, mode)
        cut = self.cut_of(name) if way == "attention" else ()
        parts = self.parts_of(self.kind_of[name]) if keep == "parts" else ()
        parts = tuple(p for p in parts if not any(p == c or p.startswith(f"{c}.") for c in cut))
        if not parts or any(c.startswith(f"{p}.") for c in cut for p in parts):  # then it runs again as a whole
            return self.keep(name, self.cost(name, way, pattern), {})
        return self.cost(name, way, pattern, "by part").largest

    def between(self) -> dict[str, list[int]]:
        """Return the FLOPs in front of the first block and behind each, outside blocks, backward included."""
        found = {}
        for (outside, reached), capture in self.captures.items():
            kept = sum(f for gap, f in capture.flops.items() if capture.gaps.get(gap))
            times = {gap: 1 + capture.backward / kept if capture.gaps.get(gap) and kept else 1 for gap in capture.flops}
            found[state(outside, reached)] = [round(f * times[gap]) for gap, f in capture.flops.items()]
        return found


def add_adapters(machine: Machine, rank: int) -> dict[str, int]:
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
