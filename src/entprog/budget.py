"""One memory budget: what training a set of blocks needs, and how they are kept so that it fits.

    peak = weights + gradients + optimizer state + activations + one recomputed block

is predicted for every set of modes before it is tried, from the model's own code on the meta device (profiling.py), and
corrected by what the first step in those modes measures. Three things make room without changing any number that
training computes: the state of frozen parameters waits on the host, blocks are checkpointed, and the weights of frozen
blocks stream from the host. Only then are fewer blocks trained. What scores and fidelity hold is part of the budget.

On a CPU everything is counted as a GPU would hold it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from entprog import parallel
from entprog.blocks import Block
from entprog.cei import Scores
from entprog.frozen import parked_bytes
from entprog.measure import tensor_bytes
from entprog.plan import parse_bytes
from entprog.profiling import Profile, profile
from entprog.strategy import Progressive


@dataclass(frozen=True)
class Keeping:
    """How blocks are kept: what the weights of frozen ones are kept as (frozen.py), whether all are checkpointed."""

    frozen_weights: str | None = None
    checkpointing: bool = False

    def __str__(self) -> str:
        weights = (
            f"frozen weights kept as {self.frozen_weights}" if self.frozen_weights else "frozen weights as they are"
        )
        return f"{weights}, {'with' if self.checkpointing else 'without'} checkpointing"


def already_checkpointed(model: nn.Module) -> bool:
    """Return whether the model checkpoints its blocks by itself (diffusers' enable_gradient_checkpointing)."""
    return any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


class Budget:
    """Bytes that a run may hold, and what each of its phases would.

    limit: bytes. model, blocks, always, stem: as EntProg has them, nothing parked yet. inputs: of one forward pass on
    a batch of `samples`. ValueError, with what would fit, if not even the worst single block can train within it.
    """

    def __init__(
        self,
        limit: str | int | float,
        model: nn.Module,
        blocks: Sequence[Block],
        candidates: Sequence[str],
        outside: tuple[list[nn.Parameter], list[nn.Parameter]],
        inputs: Mapping[str, Any],
        samples: int,
        settings: Progressive,
        always: Sequence[str] = (),
    ) -> None:
        refuse(model, settings)
        self.limit = parse_bytes(limit)
        self.settings, self.samples = settings, samples
        self.first = blocks[0].name
        self.always, self.stem = map(tensor_bytes, outside)
        self.sizes = {b.name: tensor_bytes(b.parameters()) for b in blocks}
        self.weights = tensor_bytes(model.parameters())
        self.already = already_checkpointed(model)
        self.parked = {p: parked_bytes(model, blocks, p) for p in ("cpu", settings.frozen_weights) if p}
        device = "cuda" if next(model.parameters()).is_cuda else "cpu"
        self.profile = _profiled(model, inputs, blocks, always, device)
        self.ratio = 1.0  # largest measured / predicted so far
        self._check(candidates)

    # -- what each phase holds -----------------------------------------------------------------------------------------

    def weight_bytes(self, active: Sequence[str], precision: str | None) -> int:
        """Bytes of all weights, the blocks that are not active parked."""
        if precision is None:
            return self.weights
        frozen = [v for n, v in self.parked[precision].items() if n not in active]
        stored = [s for _, s in frozen]
        held = 2 * max(stored, default=0) if precision == "cpu" else sum(stored)
        return self.weights - sum(w for w, _ in frozen) + held

    def _trained(self, active: Sequence[str]) -> tuple[int, str]:
        """Bytes of what trains, and what of it lies outside blocks, in the profile's words."""
        stem = {"always": True, "never": False, "late": self.first in active}[self.settings.stem]
        outside = self.always + (self.stem if stem else 0)
        return outside + sum(self.sizes[n] for n in active), "all" if stem else "always"

    def recomputed(self, modes: Mapping[str, str], keeping: Keeping) -> int:
        """Bytes of the largest block that checkpointing runs again."""
        _, outside = self._trained(_active(modes))
        return self.profile.step(modes, outside=outside, checkpointing=keeping.checkpointing)["recompute"]

    def training(self, modes: Mapping[str, str], keeping: Keeping) -> int:
        """Bytes of one training step: weights, gradients, two moments, activations, one recomputed block."""
        active = _active(modes)
        trained, outside = self._trained(active)
        step = self.profile.step(modes, outside=outside, checkpointing=keeping.checkpointing)
        held = self.weight_bytes(active, keeping.frozen_weights)
        return held + 3 * trained + step["activations"] + step["recompute"]

    def one_sample(self) -> int:
        """Activations of one sample through all blocks, checkpointed, at most."""
        step = self.profile.step({}, outside="all", checkpointing=True)
        return -(-(step["activations"] + step["recompute"]) // self.samples)

    def streams(self) -> int:
        """What the blocks are given, of one sample: no smaller than their streams' gradients."""
        return -(-self.profile.step({}, outside="all", checkpointing=True)["activations"] // self.samples)

    def fidelity(self, active: Sequence[str], keeping: Keeping) -> int:
        """Bytes of comparing two gradients of what trains on one sample, checkpointed; no optimizer state is there.

        The errors of single detours take a gradient of every block's stream more, no larger than what is kept.
        """
        held = self.weight_bytes(active, keeping.frozen_weights)
        return held + 2 * self._trained(active)[0] + self.one_sample() + self.streams()

    def scoring(self, keeping: Keeping, group: int = 0, batches: int = 0) -> int:
        """Bytes of scoring, sample by sample, gradients of `group` bytes of blocks kept of that many batches.

        The group's weights, its gradient of one sample and its sum over samples come on top.
        """
        gradients = (batches + 2 + (keeping.frozen_weights is not None)) * group
        return self.weight_bytes((), keeping.frozen_weights) + gradients + self._trained(())[0] + self.one_sample()

    # -- what fits -----------------------------------------------------------------------------------------------------

    def options(self) -> list[Keeping]:
        """Every way to keep blocks, the cheapest in time first; none changes what training computes unless asked to."""
        asked = self.settings.frozen_weights
        steps = (True,) if self.already else (False, True)
        return [Keeping(p, c) for p in ((asked,) if asked else (None, "cpu")) for c in steps]

    def choose(self, modes: Mapping[str, str]) -> Keeping | None:
        """Return the first way in which training in some modes fits, None if it does in none."""
        return self._first(self.options(), lambda k: self.training(modes, k))

    def choose_for_fidelity(self, active: Sequence[str]) -> Keeping | None:
        """Return the first way in which fidelity can be measured."""
        options = [k for k in self.options() if k.checkpointing]
        return self._first(options, lambda k: self.fidelity(active, k))

    def choose_for_scores(self, group: int = 0, batches: int = 0) -> Keeping | None:
        """Return the first way in which blocks can be scored; always with their own weights."""
        options = [Keeping(None, True), Keeping("cpu", True)]
        return self._first(options, lambda k: self.scoring(k, group, batches))

    def _first(self, options: Sequence[Keeping], need: Callable[[Keeping], int]) -> Keeping | None:
        return next((k for k in options if need(k) * self.ratio <= self.limit), None)

    def scores_kept(self, group: int = 0, batches: int = 0) -> Keeping:
        """Return how blocks are kept while they are scored. RuntimeError if no way fits what steps have measured."""
        keeping = self.choose_for_scores(group, batches)
        if keeping is None:
            raise RuntimeError(
                f"scoring does not fit {_gib(self.limit)} any more: steps held {self.ratio:.2f} times the predicted; "
                "choose a priority without gradients, cei, or a larger max_memory"
            )
        return keeping

    def groups(self, blocks: Sequence[Block], batches: int) -> tuple[Keeping, list[list[Block]], int]:
        """Return (how blocks are kept, groups of them whose gradients fit together, number of batches) for a score.

        batches: how many of whose gradients are to be held at once; fewer, at least 2, where a single block needs it.
        """
        largest = max(self.sizes[b.name] for b in blocks)
        while batches > 2 and self.choose_for_scores(largest, batches) is None:
            batches -= 1
        keeping = self.scores_kept(largest, batches)
        groups: list[list[Block]] = [[]]
        for block in blocks:
            if groups[-1]:
                size = sum(self.sizes[b.name] for b in (*groups[-1], block))
                if self.scoring(keeping, size, batches) * self.ratio > self.limit:
                    groups.append([])
            groups[-1].append(block)
        return keeping, groups, batches

    def _check(self, candidates: Sequence[str]) -> None:
        """Refuse a budget in which the costliest single block cannot train, or nothing be scored."""
        largest = max(candidates, key=lambda n: self.sizes[n])
        modes = dict.fromkeys(self.sizes, "pass") | {largest: "train"}
        held = {"gain": 2, "grad_norm": 0}  # batches whose gradients are held at once, at least
        scored = [held[p] for p in (self.settings.priority, *self.settings.also_score) if p in held]
        group, batches = (max(self.sizes.values()), max(scored)) if scored else (0, 0)
        needs = [
            min((self.training(modes, k), f"training one block, {k}") for k in self.options()),
            min((self.scoring(Keeping(p, True), group, batches), "scoring") for p in (None, "cpu")),
        ]
        if self.settings.frozen == "bypass":
            ways = [k for k in self.options() if k.checkpointing]
            needs.append(min((self.fidelity([largest], k), f"measuring fidelity, {k}") for k in ways))
        least, what = max(needs)
        if least > self.limit:
            raise ValueError(
                f"max_memory {_gib(self.limit)} is too little: the least is {_gib(least)}, for {what}, {self.samples} "
                f"samples a batch, frozen blocks {self.settings.frozen}, scores by {self.settings.priority}. Smaller "
                "batches or clips, frozen_weights='cpu' and scores without gradients (cei) need less"
            )


def refuse(model: nn.Module, settings: Progressive) -> None:
    """Raise ValueError for what no budget can be kept with."""
    if settings.adapters:
        raise ValueError("max_memory does not know adapters, which train in frozen blocks: leave one of them out")
    if settings.optimizer_state == "keep":
        raise ValueError(
            "optimizer_state='keep' lets the state of blocks that no longer train grow beyond any max_memory: choose "
            "'park' (the default within a budget) or 'drop'"
        )
    if "oracle" in (settings.priority, *settings.also_score):
        raise ValueError("priority 'oracle' trains every block by itself and keeps no budget: leave max_memory out")
    if parallel.is_sharded(model):
        raise ValueError(
            "max_memory counts whole weights, and this model is sharded: use data_parallel, or leave it out"
        )


def _profiled(
    model: nn.Module, inputs: Mapping[str, Any], blocks: Sequence[Block], always: Sequence[str], device: str
) -> Profile:
    try:
        return profile(model, inputs, blocks=blocks, always=always, device=device, lora_rank=0)
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"max_memory runs {type(model).__name__} on shapes alone, but its forward reads values: {error}. "
            "Train it without max_memory, or keep such values out of its forward"
        ) from error


def _active(modes: Mapping[str, str]) -> list[str]:
    return [n for n, m in modes.items() if m == "train"]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.3f} MiB"


def merged(parts: Sequence[Scores], blocks: Sequence[Block]) -> Scores:
    """Join scores of groups of blocks that were taken on the same batches.

    `gain` divides by the blocks' size relative to the mean of those scored together, which is undone and done over all.
    """
    sizes = {b.name: sum(p.numel() for p in b.parameters()) for b in blocks}
    values: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for part in parts:
        mean = sum(sizes[n] for n in part.values) / len(part.values)
        factor = sum(sizes.values()) / len(sizes) / mean if part.priority == "gain" else 1.0
        values |= {n: v * factor for n, v in part.values.items()}
        intervals |= {n: (low * factor, high * factor) for n, (low, high) in part.intervals.items()}
    place = {n: i for i, n in enumerate(sizes)}
    return replace(
        parts[0],
        values={n: values[n] for n in place},
        intervals={n: intervals[n] for n in place},
        ranking=sorted(place, key=lambda n: (-values[n], place[n])),
        share_negative=sum(v < 0 for v in values.values()) / len(values),
        zero=[n for part in parts for n in part.zero],
    )
