"""What a training step costs in FLOPs, for any modes: the one cost model of plans, budgets, the model clock.

    step = sum over blocks of FLOPs(mode, checkpointing) + what lies between the blocks

Every term is counted where the block's own code runs forward and backward, once for each kind of block and way to run
it (profiling.py, `cost_of`): fused attention's backward is 2.5 times its forward, a product's 1 or 2 times by what
needs a gradient, and what checkpointing runs again is what it does run again.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

OUTSIDE = ("none", "always", "all")  # what trains outside blocks: nothing; the head and what is new; everything
KEEPS = ("none", "block", "parts")  # how a block is checkpointed, rows of checkpointing.CHECKPOINTS
MODEL_CLOCK_FLOPS = 1e10  # FLOPs that `clock: model` takes for one second

Fill = Callable[[str, str, str, bool], dict[str, int]]  # (mode, keep, outside, reached) -> name -> FLOPs


@dataclass
class StepCost:
    """A table of FLOPs, filled by profiling as it is asked.

    forward: of each block, in execution order. between: FLOPs in front of the first block and behind each, backward
    included, by what trains outside blocks and whether a block before trains. rest: of a forward pass outside blocks.
    extra: of what the loss runs besides the model. columns: of each block, forward and backward, by mode,
    checkpointing and the same two. All for `samples` samples. counted: by "kind", or by "rule" where a model cannot
    run on shapes alone.
    """

    forward: dict[str, int]
    between: dict[str, list[int]]
    rest: int
    samples: int = 1
    extra: int = 0
    counted: str = "kind"
    columns: dict[str, dict[str, int]] = field(default_factory=dict)
    fill: Fill | None = field(default=None, repr=False, compare=False)

    def block(self, name: str, mode: str, keep: str = "none", outside: str = "all", reached: bool = True) -> int:
        """Return the FLOPs of one block in a mode, forward and backward; reached: a block before it trains."""
        mode = "pass" if mode == "prefix" else mode
        key = f"{mode}, {keep}, {state(outside, reached)}"
        if key not in self.columns:
            if self.fill is None:
                raise ValueError(f"column {key!r} of this table was never filled: the columns are {list(self.columns)}")
            self.columns[key] = self.fill(mode, keep, outside, reached)
        if name not in self.columns[key]:
            raise ValueError(f"block {name} has no self-attention of its own: choose another mode for it than {mode!r}")
        return self.columns[key][name]

    def step(
        self,
        modes: Mapping[str, str],
        *,
        outside: str = "all",
        checkpointed: Mapping[str, str] | None = None,
        lora: bool = False,
    ) -> int:
        """Return the FLOPs of a step with each block in a mode, by default `train`.

        outside: what trains outside blocks, one of OUTSIDE. checkpointed: name -> "block" or "parts". lora: adapters
        train in all blocks. ValueError for an unknown name or value, and for bypass_attn in a block without
        self-attention.
        """
        if outside not in OUTSIDE:
            raise ValueError(f"outside {outside!r} is unknown: choose one of {OUTSIDE}")
        if unknown := set(modes) - set(self.forward):
            raise ValueError(f"no block is called {sorted(unknown)}: the blocks are {list(self.forward)}")
        reached, ways = False, checkpointed or {}
        total = self.extra + self.between[state(outside, reached)][0]
        for i, name in enumerate(self.forward, 1):
            mode = "lora" if lora else modes.get(name, "train")
            total += self.block(name, mode, ways.get(name, "none"), outside, reached)
            reached = reached or mode in ("train", "lora")
            total += self.between[state(outside, reached)][i]
        return total

    def prediction(self, modes: Mapping[str, str]) -> int:
        """Return the FLOPs of a forward pass, without the blocks that do not run."""
        run = (f for n, f in self.forward.items() if modes.get(n) not in ("skip", "replay"))
        return self.extra + self.rest + sum(run)

    def parts(self) -> dict[str, dict[str, int]]:
        """Return {"forward", "input", "weight"} FLOPs of each block behind a trainable one, for `plan.cost_aware`."""
        found = {}
        for name, forward in self.forward.items():
            train, through = self.block(name, "train"), self.block(name, "pass")
            found[name] = {"forward": forward, "input": through - forward, "weight": train - through}
        return found

    def times(self, calls: int) -> "StepCost":
        """Return the table of a loss that calls the model several times."""
        if calls == 1:
            return self
        fill = self.fill

        def filled(*column: Any) -> dict[str, int]:
            return {n: calls * f for n, f in fill(*column).items()} if fill is not None else {}

        between = {s: [calls * f for f in row] for s, row in self.between.items()}
        return StepCost({n: calls * f for n, f in self.forward.items()}, between, calls * self.rest, fill=filled)

    def to_json(self) -> dict[str, Any]:
        """Return what is filled in, as plain data: StepCost(**data) reads it."""
        return {k: v for k, v in vars(self).items() if k != "fill"}


def with_adapters(modes: Mapping[str, str], adapted: Collection[str]) -> dict[str, str]:
    """Return the modes with "lora" for frozen blocks that carry adapters, which train there."""
    return {n: "lora" if n in adapted and m != "train" else m for n, m in modes.items()}


def outside_of(stem: bool, always: bool) -> str:
    """Return what trains outside blocks, one of OUTSIDE, where pretrained modules there train or not (`stem`).

    always: whether there is anything that always trains, a head or what was made for the task.
    """
    return "all" if stem else "always" if always else "none"


def state(outside: str, reached: bool) -> str:
    return f"{outside}, {'reached' if reached else 'not reached'}"


def by_rule(forward: Mapping[str, int], attention: Mapping[str, int], rest: int, samples: int) -> StepCost:
    """Return the table of a model that cannot run on shapes alone, from the FLOPs of one real forward pass.

    attention: of fused attention in each block. Backward is twice a block's products where it trains and once where a
    gradient passes, and 2.5 times its attention, which bypass_attn leaves out; twice the rest. A checkpointed block
    runs again as a whole.
    """

    def fill(mode: str, keep: str, outside: str, reached: bool) -> dict[str, int]:
        passed = reached or outside == "all" or mode in ("train", "lora")
        times = {"train": 2, "skip": 0, "bypass": 0}.get(mode, int(passed))
        found = {}
        for name, f in forward.items():
            a = 0 if mode == "bypass_attn" else attention[name]
            backward = times * (f - attention[name]) + (5 * a // 2 if times else 0)
            found[name] = (f if mode != "skip" else 0) + backward + (f if times and keep != "none" else 0)
        return found

    between = {state(o, r): [3 * rest, *[0] * len(forward)] for o in OUTSIDE for r in (False, True)}
    return StepCost(dict(forward), between, rest, samples, counted="rule", fill=fill)
