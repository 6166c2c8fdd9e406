"""What each block costs, from its own code on the meta device: parameters, FLOPs and bytes kept for backward.

No weights, no data, no fit: the model runs forward with shapes only, each kind of block once more forward and backward
for every way it may run (kinds.py), and what autograd saves is counted storage by storage.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from entprog.blocks import Block, find_blocks, outside_blocks, record_example
from entprog.cost import KEEPS, OUTSIDE, StepCost, by_rule
from entprog.kinds import Machine, add_adapters
from entprog.measure import tensor_bytes
from entprog.meta import DEVICES, Flops, meta_inputs, to_meta
from entprog.modes import running


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
    cost: StepCost
    _machine: Machine = field(repr=False)

    def step(
        self,
        modes: Mapping[str, str],
        *,
        outside: str = "always",
        checkpointing: str | Mapping[str, str] = "none",
        lora: bool = False,
    ) -> dict[str, int]:
        """Return {"activations", "recompute", "flops"} of one step with each block in a mode, by default `train`.

        activations: bytes autograd keeps at the end of the forward pass. recompute: bytes of the dearest block, or part
        of one, that checkpointing runs again. outside: what trains outside blocks, "none", "always" (the head and what
        was made for the task) or "all". checkpointing: one of KEEPS, or a dict name -> one of them, others "none".
        ValueError for an unknown name or value.
        """
        ways = dict.fromkeys(self.blocks, checkpointing) if isinstance(checkpointing, str) else dict(checkpointing)
        if wrong := sorted(set(ways.values()) - set(KEEPS)):
            raise ValueError(f"checkpointing {wrong} is unknown: choose of {KEEPS}")
        flops = self.cost.step(modes, outside=outside, checkpointed=ways, lora=lora)
        machine, held = self._machine, dict[Any, int]()
        recompute, reached = 0, False
        held |= machine.captures[outside, reached].gaps.get(0, {})
        for i, name in enumerate(self.blocks, 1):
            mode, keep = "lora" if lora else modes.get(name, "train"), ways.get(name, "none")
            trains = mode in ("train", "lora")
            pattern = machine.captures[outside, reached].needs[name]
            if trains or any(pattern):
                if (cost := machine.met(name, mode, keep, pattern)) is not None:
                    machine.keep(name, cost, held)
                if cost is not None and keep != "none" and machine.way_of(name, mode) != "base":
                    recompute = max(recompute, machine.recomputed(name, mode, keep, pattern))
            reached = reached or trains
            held |= machine.captures[outside, reached].gaps.get(i, {})
        return {"activations": sum(held.values()), "recompute": recompute, "flops": flops}

    def block(self, name: str, mode: str = "train", reached: bool = True) -> dict[str, int]:
        """Return {"forward", "backward", "bytes"} of one block, a trainable one before it or not."""
        machine, forward = self._machine, self.cost.forward[name]
        pattern = machine.captures["always", reached].needs[name]
        if mode != "train" and (mode in ("bypass", "skip") or not any(pattern)):  # a shortcut's own cost left out
            return {"forward": 0 if mode == "skip" else forward, "backward": 0, "bytes": 0}
        held: dict[Any, int] = {}
        if (cost := machine.met(name, mode, "none", pattern)) is not None:
            machine.keep(name, cost, held)
        backward = self.cost.block(name, mode, "none", "always", reached) - forward
        return {"forward": forward, "backward": backward, "bytes": sum(held.values())}

    def attention(self) -> list[str]:
        """Name the blocks with self-attention of their own, those that can run in bypass_attn."""
        return [name for name in self.blocks if self._machine.cut_of(name)]

    def parts(self, name: str) -> tuple[str, ...]:
        """Name the large parts of a block, which checkpointing by parts runs again one by one."""
        return self._machine.parts_of(self._machine.kind_of[name])

    def kinds(self) -> dict[str, str]:
        """Return name -> name of the first block of its kind."""
        return {name: self._machine.kind_of[name] for name in self.blocks}


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
    machine = Machine(meta, found, meta_inputs(inputs, dtype), device)
    head, stem = outside_blocks(meta, found, always, machine.run)
    for outside in OUTSIDE:
        for group, trains in ((head, outside != "none"), (stem, outside == "all")):
            for p in group:
                p.requires_grad_(trains)
        for reached in (False, True):
            machine.capture(outside, reached)
    order = list(machine.captures["all", True].calls)
    by_name = {b.name: b for b in found}
    adapters = add_adapters(machine, lora_rank) if lora_rank else dict.fromkeys(machine.kind_of.values(), 0)
    return Profile(
        blocks={n: sum(p.numel() for p in by_name[n].parameters()) for n in order},
        bytes={n: tensor_bytes(by_name[n].module.parameters()) for n in order},
        outside=(sum(p.numel() for p in (*head, *stem)), tensor_bytes((*head, *stem))),
        always=(sum(p.numel() for p in head), tensor_bytes(head)),
        adapters={n: adapters[machine.kind_of[n]] for n in order},
        device=device,
        cost=_cost(machine, order),
        _machine=machine,
    )


def _cost(machine: Machine, order: Sequence[str]) -> StepCost:
    capture = machine.captures["none", False]
    forward = {n: machine.cost(n, "frozen", (False,) * len(capture.needs[n])).forward for n in order}
    return StepCost(forward, machine.between(), sum(capture.flops.values()), fill=machine.fill)


def cost_of(
    model: nn.Module,
    blocks: Sequence[Block],
    run: Callable[[], Any],
    samples: int = 1,
    always: Sequence[str] = (),
) -> StepCost:
    """Return what a step of the loss that `run()` computes, of some samples, costs; runs it once, without gradients.

    The model's cost by its profile, times the calls of the model, and what `run` does besides. A model that cannot run
    on shapes alone, or whose blocks run several times in a call, is counted by rule (cost.by_rule), with a warning that
    says why.
    """
    calls, total, spent, inputs = _counted(model, blocks, run)
    found: StepCost | None = None
    why = "its blocks do not run once in each call, or not as on shapes alone"
    try:
        found = profile(model, inputs, blocks=blocks, always=always, device="cpu", lora_rank=0).cost
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        why = f"it does not run on shapes alone, {type(error).__name__}: {error}"
    if found is None or any(spent[b.name][0] != calls * found.forward[b.name] for b in blocks):
        message = (
            f"the FLOPs of a {type(model).__name__}'s steps are reckoned by rule from one forward pass, since {why}"
        )
        warnings.warn(message, stacklevel=2)
        rest = total - sum(f for f, _ in spent.values())
        return by_rule({n: f for n, (f, _) in spent.items()}, {n: a for n, (_, a) in spent.items()}, rest, samples)
    found = found.times(calls)
    return replace(found, samples=samples, extra=max(0, total - found.prediction({})))


def trained_outside(model: nn.Module, blocks: Sequence[Block]) -> str:
    """Return how much of what lies outside blocks trains now, in the words of cost.OUTSIDE."""
    inside = {p for b in blocks for p in b.module.parameters()}
    trains = {p.requires_grad for p in model.parameters() if p not in inside}
    return "none" if True not in trains else "always" if False in trains else "all"


def _counted(
    model: nn.Module, blocks: Sequence[Block], run: Callable[[], Any]
) -> tuple[int, int, dict[str, tuple[int, int]], dict[str, Any]]:
    """Run something: (calls of the model, FLOPs, (FLOPs, of them attention) of each block, the model's arguments)."""
    counter, calls = Flops(), list[int]()
    spent = {b.name: (0, 0) for b in blocks}
    entered: list[tuple[int, int]] = []

    def leave(name: str, *_: Any) -> None:
        flops, attention = entered.pop()
        before = spent[name]
        spent[name] = before[0] + counter.total - flops, before[1] + counter.attention - attention

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(lambda *_: calls.append(1)).remove)
        for block in blocks:
            enter = block.module.register_forward_pre_hook(
                lambda *_: entered.append((counter.total, counter.attention))
            )
            stack.callback(enter.remove)
            stack.callback(block.module.register_forward_hook(partial(leave, block.name)).remove)
        with running(blocks, "train"), counter:
            inputs = record_example(model, run)
    return len(calls), counter.total, spent, inputs


def _named_blocks(meta: nn.Module, blocks: Sequence[Block | str] | None) -> list[Block]:
    if blocks is None:
        return find_blocks(meta)
    modules = dict(meta.named_modules())
    names = [b.name if isinstance(b, Block) else b for b in blocks]
    if unknown := [n for n in names if n not in modules]:
        raise ValueError(f"the model has no modules {unknown}: its blocks may be {[b.name for b in find_blocks(meta)]}")
    known = {b.name: b for b in blocks if isinstance(b, Block)}
    found = [Block(i, n, modules[n]) for i, n in enumerate(names)]
    return [replace(b, outputs=k.outputs, apart=k.apart) if (k := known.get(b.name)) else b for b in found]
