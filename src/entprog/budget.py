"""One memory budget: what training a set of blocks needs, and how they are kept so that it fits.

    peak = weights + gradients + optimizer state + activations + one recomputed block

is predicted for every set of modes before it is tried, from the model's own code on the meta device (profiling.py), and
corrected by what the first step in those modes measures. Three things make room without changing any number that
training computes: the state of frozen parameters waits on the host, blocks are checkpointed (each kind for itself, as a
whole or by parts), and the weights of frozen blocks stream from the host. Only then are fewer blocks trained. What
scores and fidelity hold is part of the budget.

On a CPU everything is counted as a GPU would hold it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from torch import nn

from entprog import parallel
from entprog.blocks import Block
from entprog.cei import Scores
from entprog.cost import outside_of, with_adapters
from entprog.frozen import parked_bytes
from entprog.measure import tensor_bytes
from entprog.plan import CHECKPOINTED, parse_bytes
from entprog.profiling import Profile, profile
from entprog.strategy import Progressive

SUMS = {"gain": 16, "grad_norm": 0}  # bytes a parameter of what a score keeps of all batches: two sums, in float64
MIXED = 3  # kinds of blocks whose checkpointing is tried in every mixture


@dataclass(frozen=True)
class Keeping:
    """How blocks are kept: what the weights of frozen ones are kept as (frozen.py), how they are checkpointed.

    checkpointing: one row of CHECKPOINTS for all blocks, or name -> row.
    """

    frozen_weights: str | None = None
    checkpointing: str | dict[str, str] = "none"

    def __str__(self) -> str:
        weights = (
            f"frozen weights kept as {self.frozen_weights}" if self.frozen_weights else "frozen weights as they are"
        )
        if isinstance(self.checkpointing, str):
            return f"{weights}, {CHECKPOINTED[self.checkpointing]}"
        counts = Counter(self.checkpointing.values())
        return f"{weights}, checkpointing {', '.join(f'{way} of {n} blocks' for way, n in sorted(counts.items()))}"


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
        self.adapted = {b.name for b in blocks if b.adapters}
        self.always += tensor_bytes(p for b in blocks for p in b.adapters)
        self.sizes = {b.name: tensor_bytes(b.parameters()) for b in blocks}
        self.counts = {b.name: sum(p.numel() for p in b.parameters()) for b in blocks}
        self.weights = tensor_bytes(model.parameters())
        self.already = already_checkpointed(model)
        self.parked = {p: parked_bytes(model, blocks, p) for p in ("cpu", settings.frozen_weights) if p}
        device = "cuda" if next(model.parameters()).is_cuda else "cpu"
        self.profile = _profiled(model, inputs, blocks, always, device)
        self._steps: dict[str, dict[str, int]] = {}
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
        stem = self.stem if self.settings.stem_trains(self.first in active) else 0
        return self.always + stem + sum(self.sizes[n] for n in active), outside_of(stem > 0, self.always > 0)

    def _step(self, modes: Mapping[str, str], keeping: Keeping) -> dict[str, int]:
        key = repr((sorted(modes.items()), keeping.checkpointing))
        if key not in self._steps:
            _, outside = self._trained(_active(modes))
            modes = with_adapters(modes, self.adapted)
            self._steps[key] = self.profile.step(modes, outside=outside, checkpointing=keeping.checkpointing)
        return self._steps[key]

    def recomputed(self, modes: Mapping[str, str], keeping: Keeping) -> int:
        """Bytes of the largest block that checkpointing runs again."""
        return self._step(modes, keeping)["recompute"]

    def training(self, modes: Mapping[str, str], keeping: Keeping) -> int:
        """Bytes of one training step: weights, gradients, two moments, activations, one recomputed block."""
        active, step = _active(modes), self._step(modes, keeping)
        trained, _ = self._trained(active)
        held = self.weight_bytes(active, keeping.frozen_weights)
        return held + 3 * trained + step["activations"] + step["recompute"]

    def one_sample(self) -> int:
        """Activations of one sample through all blocks, checkpointed, at most."""
        step = self.profile.step({}, outside="all", checkpointing="block")
        return -(-(step["activations"] + step["recompute"]) // self.samples)

    def streams(self) -> int:
        """What the blocks are given, of one sample: no smaller than their streams' gradients."""
        return -(-self.profile.step({}, outside="all", checkpointing="block")["activations"] // self.samples)

    def fidelity(self, active: Sequence[str], keeping: Keeping) -> int:
        """Bytes of comparing two gradients of what trains on one sample, checkpointed; no optimizer state is there.

        The errors of single detours take a gradient of every block's stream more, no larger than what is kept.
        """
        held = self.weight_bytes(active, keeping.frozen_weights)
        return held + 2 * self._trained(active)[0] + self.one_sample() + self.streams()

    def scoring(self, keeping: Keeping, group: int = 0, sums: int = 0) -> int:
        """Bytes of scoring, sample by sample, by gradients of `group` bytes of blocks and `sums` bytes over batches.

        The group's weights, its gradient of one sample and its sum over samples come on top.
        """
        gradients = sums + (2 + (keeping.frozen_weights is not None)) * group
        return self.weight_bytes((), keeping.frozen_weights) + gradients + self._trained(())[0] + self.one_sample()

    # -- what fits -----------------------------------------------------------------------------------------------------

    def options(self) -> list[Keeping]:
        """Ways to keep all blocks alike, the cheapest in time first; none changes a number unless asked to."""
        asked = self.settings.frozen_weights
        ways = ("block",) if self.already else ("none", "parts", "block")
        precisions = (asked,) if asked or self.adapted else (None, "cpu")  # adapters train beside frozen weights
        return [Keeping(p, c) for p in precisions for c in ways]

    def choose(self, modes: Mapping[str, str]) -> Keeping | None:
        """Return the cheapest way in which training in some modes fits, None if it does in none.

        Each kind of block is checkpointed for itself: not, as a whole, or by parts where running one block again is
        the peak. The fewest FLOPs decide; weights are streamed from the host where nothing else fits.
        """
        for precision in dict.fromkeys(k.frozen_weights for k in self.options()):
            fitting = (k for k in self._by_kind(modes, precision) if self._fits(self.training(modes, k)))
            if (found := min(fitting, key=lambda k: self._step(modes, k)["flops"], default=None)) is not None:
                return found
        return None

    def _by_kind(self, modes: Mapping[str, str], precision: str | None) -> Iterator[Keeping]:
        """Yield ways to checkpoint each kind of block that keeps something: alike, then every mixture of up to 3."""
        alike = [k for k in self.options() if k.frozen_weights == precision]
        for keeping in alike:
            yield keeping
            if keeping.checkpointing == "none" and self._fits(self.training(modes, keeping)):
                return  # nothing is cheaper
        kinds = self.profile.kinds()
        kept = list(dict.fromkeys(k for n, k in kinds.items() if modes.get(n) not in ("bypass", "skip")))
        if len(alike) < 2 or not 1 < len(kept) <= MIXED:
            return
        for ways in product(("none", "parts", "block"), repeat=len(kept)):
            if len(set(ways)) > 1:
                of = dict(zip(kept, ways, strict=True))
                yield Keeping(precision, {n: of.get(k, "none") for n, k in kinds.items()})

    def _fits(self, need: int) -> bool:
        return need * self.ratio <= self.limit

    def thriftiest(self, modes: Mapping[str, str]) -> Keeping:
        """Return the way in which training in some modes needs least."""
        return min(self.options(), key=lambda k: self.training(modes, k))

    def choose_for_fidelity(self, active: Sequence[str]) -> Keeping | None:
        """Return the first way in which fidelity can be measured."""
        options = [k for k in self.options() if k.checkpointing == "block"]
        return self._first(options, lambda k: self.fidelity(active, k))

    def choose_for_scores(self, group: int = 0, sums: int = 0) -> Keeping | None:
        """Return the first way in which blocks can be scored; always with their own weights."""
        options = [Keeping(None, "block"), Keeping("cpu", "block")]
        return self._first(options, lambda k: self.scoring(k, group, sums))

    def _first(self, options: Sequence[Keeping], need: Callable[[Keeping], int]) -> Keeping | None:
        return next((k for k in options if self._fits(need(k))), None)

    def scores_kept(self, group: int = 0, sums: int = 0) -> Keeping:
        """Return how blocks are kept while they are scored. RuntimeError if no way fits what steps have measured."""
        keeping = self.choose_for_scores(group, sums)
        if keeping is None:
            raise RuntimeError(
                f"scoring does not fit {_gib(self.limit)} any more: steps held {self.ratio:.2f} times the predicted; "
                "choose a priority without gradients, cei, or a larger max_memory"
            )
        return keeping

    def groups(self, blocks: Sequence[Block], sums: int) -> tuple[Keeping, list[list[Block]]]:
        """Return (how blocks are kept, groups of them whose gradients fit together) for a score.

        sums: bytes a parameter of what it keeps of all batches, a row of SUMS.
        """
        keeping = self.scores_kept(
            max(self.sizes[b.name] for b in blocks), sums * max(self.counts[b.name] for b in blocks)
        )
        groups: list[list[Block]] = [[]]
        for block in blocks:
            if groups[-1]:
                names = [b.name for b in (*groups[-1], block)]
                size, count = sum(self.sizes[n] for n in names), sum(self.counts[n] for n in names)
                if not self._fits(self.scoring(keeping, size, sums * count)):
                    groups.append([])
            groups[-1].append(block)
        return keeping, groups

    def _check(self, candidates: Sequence[str]) -> None:
        """Refuse a budget in which the costliest single block cannot train, or nothing be scored."""
        largest = max(candidates, key=lambda n: self.sizes[n])
        modes = dict.fromkeys(self.sizes, "pass") | {largest: "train"}
        scored = [SUMS[p] for p in (self.settings.priority, *self.settings.beside) if p in SUMS]
        group, sums = (max(self.sizes.values()), max(scored) * max(self.counts.values())) if scored else (0, 0)
        needs = [
            min((self.training(modes, k), f"training one block, {k}") for k in self.options()),
            min((self.scoring(Keeping(p, "block"), group, sums), "scoring") for p in (None, "cpu")),
        ]
        if self.settings.frozen != "pass":
            ways = [k for k in self.options() if k.checkpointing == "block"]
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
