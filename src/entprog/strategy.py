"""Strategies: the settings of a run. STRATEGIES is the table: a name -> the Progressive to run, or None.

`Progressive` is the setting: the Priority ranks the blocks, the Schedule says how many train and how many sit out.
The paper's Ent-Prog is Progressive(priority="cei", schedule="adaptive"); every ablation changes one word. plugin.py
carries a setting out in a training loop. `full` and `lora` train the same parameters at every step and need none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from entprog.blocks import Block, forked_rng
from entprog.frozen import PRECISIONS
from entprog.optim import KEEP
from entprog.priority import PRIORITIES, lookup
from entprog.schedule import RESTORES, SCHEDULES
from entprog.supernet import SEARCHES
from entprog.tokens import WHOLE, Tokens


@dataclass(frozen=True)
class Progressive:
    """Train the first n blocks of a ranking and let the last s sit out, in stages.

    priority, schedule, search: rows of PRIORITIES, SCHEDULES, SEARCHES. stages: K, each an equal share of the run.
    active_share: for `fixed`. grid: shares of L that `adaptive` may choose.
    frozen: "bypass", "bypass_attn" or "pass"; as many are bypassed as leave the gradients a cosine of min_fidelity to
    the exact ones, and those of what trains outside blocks (a new pose encoder) min_new_fidelity; with "bypass_attn" of
    those with self-attention of their own, the others are "prefix". skip: largest share of blocks that may sit out; all
    are back at restore_at of the run, by a row of RESTORES (`once`, `halves`, `one_by_one`), and those that are to
    train do so from then on. stem: pretrained modules outside blocks train "late" (with block 0), "always" or "never".
    min_saving: where a stage of `linear` would save less than this share of a full step's FLOPs, all blocks train from
    then on (event `all_train`); not within a memory budget.
    search_budget, score_budget: shares of a stage and of the run. rescore: rank again at every "stage" or "never".
    adapters: every block carries LoRA adapters that train throughout, so a frozen block passes exact gradients on.
    also_score: priorities measured beside for the record, their rank correlation with the deciding one logged.
    frozen_weights: what weights of frozen blocks are kept as, a row of PRECISIONS (frozen.py), or None: as they are.
    optimizer_state: of blocks that stop training it is "keep"-t, "drop"-ped or "park"-ed on the host; None: kept, or
    parked within a memory budget. growth: "nested", the best blocks and then more; "rotate", in every period another
    set of the same size (`rotated`); None: nested until max_memory stops it, then rotating. rotate_every: steps of a
    period, by default an eighth of a stage, or as few as give every block its turn (`periods`). seed: of the rotation.
    selection: the "top" of the ranking trains, or the "cost_aware" set of largest score whose step costs no more, where
    gradients pass through what lies behind it.
    axes: what a candidate is made of, "blocks" or "blocks,tokens": training steps, and those of searches, then see
    smaller clips, as pairs (share of the frames, scale of height and width) of token_grid, until tokens_until of the
    run. `fixed` takes the smallest, `linear` all in turn, `adaptive` what pays; full size is always in the grid.
    """

    priority: str = "cei"
    schedule: str = "adaptive"
    search: str = "race"
    stages: int = 4
    active_share: float = 0.5
    grid: tuple[float, ...] = (0.125, 0.25, 0.5, 0.75, 1.0)
    frozen: str = "bypass"
    min_fidelity: float = 0.98
    min_new_fidelity: float = 0.9
    skip: float = 0.0
    restore_at: float = 0.7
    restore: str = "once"
    stem: str = "late"
    min_saving: float = 0.0
    search_budget: float = 0.08
    score_budget: float = 0.02
    rescore: str = "never"
    adapters: bool = False
    also_score: tuple[str, ...] = ()
    frozen_weights: str | None = None
    optimizer_state: str | None = None
    growth: str | None = None
    rotate_every: int | None = None
    selection: str = "top"
    seed: int = 0
    axes: str = "blocks"
    token_grid: tuple[tuple[float, float], ...] = ((0.5, 1.0),)
    tokens_until: float = 0.5

    @property
    def tokens(self) -> list[Tokens]:
        """Return the token scales of training steps, fewest tokens first, the whole last."""
        if self.axes == "blocks":
            return [WHOLE]
        return sorted({Tokens(*pair) for pair in self.token_grid} | {WHOLE}, key=lambda t: (t.share, t))

    @property
    def beside(self) -> list[str]:
        """Return the priorities that are measured for the record alone."""
        return [name for name in self.also_score if name != self.priority]

    def stem_trains(self, first_block_trains: bool) -> bool:
        """Return whether pretrained modules outside blocks train now."""
        return {"always": True, "never": False, "late": first_block_trains}[self.stem]

    def __post_init__(self) -> None:
        for priority in (self.priority, *self.also_score):
            lookup(PRIORITIES, priority, "priority")
        lookup(SCHEDULES, self.schedule, "schedule")
        lookup(SEARCHES, self.search, "search")
        lookup(RESTORES, self.restore, "restore")
        for name, choices in (
            ("frozen", ("bypass", "bypass_attn", "pass")),
            ("stem", ("late", "always", "never")),
            ("rescore", ("never", "stage")),
            ("frozen_weights", (None, *PRECISIONS)),
            ("optimizer_state", (None, "keep", *KEEP)),
            ("growth", (None, "nested", "rotate")),
            ("selection", ("top", "cost_aware")),
            ("axes", ("blocks", "blocks,tokens")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown: choose one of {choices}")
        shares = {"active_share": self.active_share, "restore_at": self.restore_at, "1 - skip": 1 - self.skip}
        shares |= {"tokens_until": self.tokens_until}
        if self.stages < 1 or not all(0 < share <= 1 for share in shares.values()):
            raise ValueError(f"stages ({self.stages}) must be at least 1 and {shares} each in (0, 1]")
        budgets = (self.search_budget, self.score_budget)
        if not self.grid or not all(0 < share <= 1 for share in self.grid) or min(budgets) < 0:
            raise ValueError(f"grid {self.grid} needs shares in (0, 1], search_budget and score_budget {budgets} at "
                             "least 0")  # fmt: skip
        if not 0 <= self.min_saving < 1:
            raise ValueError(f"min_saving {self.min_saving} is a share of a step's FLOPs: choose in [0, 1)")
        for name in ("min_fidelity", "min_new_fidelity"):
            if not 0 <= (bound := getattr(self, name)) <= 1:
                raise ValueError(f"{name} {bound} is a cosine that bounds from below: choose in [0, 1]")
        self._check_tokens()
        if self.rotate_every is not None and self.rotate_every < 1:
            raise ValueError(f"rotate_every {self.rotate_every} must be at least 1 step: hundreds are sensible")
        if self.selection == "cost_aware" and (self.frozen != "pass" or self.growth == "rotate"):
            raise ValueError(
                "selection='cost_aware' weighs the gradients that pass through frozen blocks against the best set's "
                f"score: set frozen to 'pass', not {self.frozen!r}, and growth to None or 'nested', not {self.growth!r}"
            )
        if self.adapters and self.frozen_weights:
            raise ValueError(
                f"adapters train inside frozen blocks, so frozen_weights {self.frozen_weights!r} would park nothing: "
                "leave one of them out"
            )
        if self.adapters and (self.frozen != "pass" or self.skip):
            raise ValueError(
                f"adapters train inside frozen blocks, which then have to run: set frozen to 'pass' and skip to 0, not "
                f"{self.frozen!r} and {self.skip}"
            )

    def _check_tokens(self) -> None:
        if any(len(pair) != 2 for pair in self.token_grid):
            raise ValueError(
                f"token_grid {self.token_grid} needs pairs: share of the frames, scale of height and width"
            )
        try:
            [Tokens(*pair) for pair in self.token_grid]
        except ValueError as error:
            raise ValueError(f"token_grid {self.token_grid}: {error}") from None
        if self.axes != "blocks" and (self.tokens_until >= 1 or len(self.tokens) < 2):
            raise ValueError(
                f"axes {self.axes!r} needs a token_grid with less than (1, 1), not {self.token_grid}, and tokens_until "
                f"below 1, not {self.tokens_until}: a run ends at full size"
            )


def ent_prog() -> Progressive:
    """Ours: order by first-order gain with CEI measured beside it, frozen blocks bypassed, half of them, then all.

    docs/log.md of 2026-11-22 holds why: gain follows the oracle better than CEI, races stop at too few blocks, nothing
    sits out, and half of the blocks are trained only where that makes steps a fifth cheaper. `schedule=adaptive` asks
    the nested supernet instead.
    """
    return Progressive(
        priority="gain",
        also_score=("cei",),
        schedule="linear",
        stages=2,
        grid=(0.25, 0.5, 1.0),
        min_fidelity=0.9,
        min_saving=0.2,
    )


def ent_prog_lora() -> Progressive:
    """Ent-Prog's best quarter of the blocks in full, LoRA adapters on all of them, throughout."""
    return replace(ent_prog(), schedule="fixed", active_share=0.25, stages=1, frozen="pass", adapters=True)


def paper() -> Progressive:
    """As published: signed CEI, gradients through frozen blocks, paired supernet, four stages."""
    return Progressive(priority="cei", frozen="pass", search="paired", stages=4)


STRATEGIES: dict[str, Callable[[], Progressive | None]] = {
    "full": lambda: None,
    "lora": lambda: None,
    "ent-prog": ent_prog,
    "ent-prog+lora": ent_prog_lora,
    "paper": paper,
}


def add_lora(model: nn.Module, blocks: Sequence[Block], rank: int, always: Sequence[str] = ()) -> nn.Module:
    """Freeze the model and put peft's LoRA adapters on every linear layer of the blocks; returns peft's wrapper.

    The modules and parameters named in `always` stay trainable in full.
    """
    wrapped = _wrap(model, blocks, rank)
    for name, p in model.named_parameters():
        if any(name == a or name.startswith(f"{a}.") for a in always):
            p.requires_grad_(True)
    return wrapped


def add_adapters(model: nn.Module, blocks: Sequence[Block], rank: int) -> nn.Module:
    """Put LoRA adapters on every linear layer of the blocks and freeze nothing; returns peft's wrapper.

    The blocks know their adapters, which freezing then leaves alone: they train throughout, in blocks that train in
    full too, so that unfreezing a block changes neither its output nor the optimizer's state.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    wrapped = _wrap(model, blocks, rank)
    for block in blocks:
        block.adapters = [p for name, p in block.module.named_parameters() if ".lora_" in name]
    for p in trainable:
        p.requires_grad_(True)
    return wrapped


def _wrap(model: nn.Module, blocks: Sequence[Block], rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    names = {m: n for n, m in model.named_modules()}
    targets = [names[m] for b in blocks for m in b.module.modules() if isinstance(m, nn.Linear)]
    with forked_rng(0):  # half of each adapter starts random
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))  # type: ignore[arg-type]
