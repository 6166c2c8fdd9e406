"""Schedules: how many blocks train and how many sit out, stage by stage. Each is one function and one row of SCHEDULES.

A schedule is called at the start of a stage as (stage, stages, count, settings, previous, search) and returns a
Candidate. `fixed` and `linear` are functions of the stage; `adaptive` builds the candidates and asks `search`, which
trains them from the present weights and returns the one that paid (supernet.py).

A share of the blocks is a share of their parameters: HunyuanVideo's and Flux's double blocks are 2.4 times as large as
single ones. `count` is therefore the ranked blocks' sizes, best first; a plain number stands for so many equal blocks.

Where growth stops, `rotated` says which blocks train in turn. With the token axis a candidate also says how much of a
clip a training step sees.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

from entprog.blocks import Block
from entprog.tokens import WHOLE, Tokens

if TYPE_CHECKING:
    from entprog.strategy import Progressive

Sizes = int | Sequence[int]  # of the blocks that may train, in the order of the ranking; a number: so many equal ones


@dataclass(frozen=True, order=True)
class Candidate:
    """`active` blocks train, the best of the ranking, but for those among them that still sit out.

    `skipped` sit out, of the other blocks and then of these those that change the prediction least (`block_sets`).

    Training steps see a share of a clip's `frames`, their height and width scaled by `size`.
    """

    active: int
    skipped: int = 0
    frames: float = 1.0
    size: float = 1.0

    @property
    def tokens(self) -> Tokens:
        """Return how much of a clip its training steps see."""
        return Tokens(self.frames, self.size)

    @property
    def restored(self) -> "Candidate":
        """Return it with all blocks back, at full size."""
        return Candidate(self.active)

    @property
    def at_full_size(self) -> "Candidate":
        """Return it with whole clips."""
        return self.at(WHOLE)

    def at(self, tokens: Tokens) -> "Candidate":
        """Return it at a token scale."""
        return replace(self, frames=tokens.frames, size=tokens.size)

    def __str__(self) -> str:
        blocks = f"{self.active} active, {self.skipped} skipped"
        return blocks if self.tokens.whole else f"{blocks}, {self.tokens}"


Search = Callable[[Sequence[Candidate]], Candidate]
Schedule = Callable[[int, int, Sizes, "Progressive", Candidate | None, Search], Candidate]


def block_sizes(blocks: Sequence[Block], names: Sequence[str]) -> list[int]:
    """Return the named blocks' numbers of parameters, in the order of the names."""
    sizes = {b.name: sum(p.numel() for p in b.parameters()) for b in blocks}
    return [sizes[name] for name in names]


def number(count: Sizes) -> int:
    """Return how many blocks there are."""
    return count if isinstance(count, int) else len(count)


def at_least_one(share: float, count: Sizes) -> int:
    """Return how many blocks, best first, come nearest to a share of the parameters; at least 1.

    That is round(share * L) clipped to 1 .. L where all are of one size; ties go to the even number, as in round().
    """
    if isinstance(count, int) or len(set(count)) == 1:
        return min(number(count), max(1, round(share * number(count))))
    total, sums = sum(count), list(accumulate(count))
    return min(range(1, len(count) + 1), key=lambda n: (abs(sums[n - 1] - share * total), n % 2))


def at_most(share: float, count: Sizes) -> int:
    """Return how many blocks, worst first, hold no more than a share of the parameters; floor(share * L) if equal."""
    if isinstance(count, int) or len(set(count)) == 1:
        return math.floor(share * number(count))
    total = sum(count)
    return sum(held <= share * total for held in accumulate(reversed(count)))


def fixed(
    stage: int, stages: int, count: Sizes, settings: "Progressive", previous: Candidate | None, search: Search
) -> Candidate:
    """Return the same share of the blocks in every stage, settings.active_share, at the grid's smallest token scale."""
    chosen = Candidate(at_least_one(settings.active_share, count), at_most(settings.skip, count))
    return chosen.at(small_tokens(settings, stage / stages)[0])


def linear(
    stage: int, stages: int, count: Sizes, settings: "Progressive", previous: Candidate | None, search: Search
) -> Candidate:
    """Return m_k = L * k / K trainable blocks in stage k = 1 .. K (Ent-Prog's ablation "without adaptive").

    Token scales grow, too: the grid's in turn, as evenly as the stages that begin before tokens_until allow.
    """
    chosen = Candidate(at_least_one((stage + 1) / stages, count), at_most(settings.skip, count))
    small = small_tokens(settings, stage / stages)
    begun_small = math.ceil(settings.tokens_until * stages - 1e-9)
    return chosen.at(small[min(stage * len(small) // max(1, begun_small), len(small) - 1)])


def adaptive(
    stage: int, stages: int, count: Sizes, settings: "Progressive", previous: Candidate | None, search: Search
) -> Candidate:
    """Return the candidate that the nested supernet finds to pay most per second."""
    scales = [*small_tokens(settings, stage / stages), WHOLE]
    return search(candidates(count, settings, previous, scales))


def small_tokens(settings: "Progressive", progress: float) -> list[Tokens]:
    """Return the token grid's smaller scales, fewest tokens first; only the whole where none may train (any more)."""
    small = [t for t in settings.tokens if not t.whole] if progress < settings.tokens_until else []
    return small or [WHOLE]


def candidates(
    count: Sizes, settings: "Progressive", previous: Candidate | None, scales: Sequence[Tokens] = (WHOLE,)
) -> list[Candidate]:
    """List what a stage may choose from: m on {L/8, L/4, L/2, 3L/4, L}, skipped counts on {0, L/4, L/2}, token scales.

    m never shrinks, the number skipped never grows and tokens never get fewer from stage to stage, and staying is
    allowed; nothing is skipped unless settings.skip is above 0, and at most that share.
    """
    grid = {at_least_one(share, count) for share in settings.grid}
    least = 1 if previous is None else previous.active
    most_skipped = at_most(settings.skip, count)
    if previous is not None:
        grid.add(previous.active)
        most_skipped = min(most_skipped, previous.skipped)
    skips = {0, most_skipped} | {s for s in (at_most(0.25, count), at_most(0.5, count)) if s <= most_skipped}
    fewest = 0.0 if previous is None else previous.tokens.share
    allowed = {t for t in scales if t.share >= fewest}
    blocks = [Candidate(m, s) for m in grid for s in skips if m >= least and m + s <= number(count)]
    return sorted(c.at(t) for c in blocks for t in allowed)


def nearest_to_linear(options: Sequence[Candidate], stage: int, count: Sizes, settings: "Progressive") -> Candidate:
    """Return the candidate that comes nearest to the linear schedule's, for a stage in which no search can tell."""
    usual = linear(stage, settings.stages, count, settings, None, lambda found: found[0])
    return min(options, key=lambda c: (abs(c.active - usual.active), c.skipped, c.tokens != usual.tokens))


SCHEDULES: dict[str, Schedule] = {"fixed": fixed, "linear": linear, "adaptive": adaptive}
UNSEARCHED = ("fixed", "linear")  # never ask `search`, so that a run need not keep clips back to judge by


# -- blocks that sit out come back -------------------------------------------------------------------------------------


def once(count: int) -> list[float]:
    """Bring all blocks back at the end of the way, in one step."""
    return [1.0] * count


def halves(count: int) -> list[float]:
    """Bring the first half back at two thirds of the way, the others at its end."""
    return [2 / 3 if place < count // 2 else 1.0 for place in range(count)]


def one_by_one(count: int) -> list[float]:
    """Bring one block back after another, in equal distances from the beginning on."""
    return [(place + 1) / count for place in range(count)]


# name -> function from how many blocks sit out to the marks at which they come back, one each, rising to 1.0; a mark is
# a share of the way from the beginning of the run to Progressive.restore_at
RESTORES: dict[str, Callable[[int], list[float]]] = {"once": once, "halves": halves, "one_by_one": one_by_one}


def still_out(count: int, restore: str, restore_at: float, progress: float) -> int:
    """Return how many of `count` blocks that sat out at first still do at `progress`, a share of the run.

    Never grows with progress; `count` before the first mark, 0 from restore_at on.
    """
    return sum(progress < restore_at * mark - 1e-9 for mark in RESTORES[restore](count))


def periods(total: int, count: int) -> int:
    """Return how many periods of rotation a stage has where no number of steps is given: enough for all to train.

    `count` of `total` blocks train at a time. At least 8: a block waits for 2 ceil(total / count) periods at most
    (`rotated`), and as many of them as there are sets wait at once.
    """
    return max(8, 3 * math.ceil(total / count))


def rotated(ranking: Sequence[str], count: int, period: int, waited: Mapping[str, int], seed: int = 0) -> list[str]:
    """Draw `count` blocks without replacement, weighted by priority; the same for the same (seed, period).

    Efraimidis and Spirakis (2006): the largest u ** (1 / w) win, u uniform; w falls from 1 for the best block of the
    ranking to 1 / L for the last. waited: name -> periods since the block last trained; who has waited for twice as
    many as all blocks need in turn comes first, so that every block trains. Returns names, in the order of the draw.
    """
    draw, total = random.Random(f"{seed} {period}"), len(ranking)
    keys = {name: draw.random() ** (total / (total - place)) for place, name in enumerate(ranking)}
    patience = 2 * math.ceil(total / count)
    order = sorted(ranking, key=lambda n: (min(0, patience - waited.get(n, 0)), -keys[n]))
    return order[:count]


def block_sets(
    candidate: Candidate, ranking: Sequence[str], skip_order: Sequence[str], may_skip: Sequence[str] | None = None
) -> tuple[list[str], list[str]]:
    """Names of a candidate's trainable and skipped blocks.

    The ranking's best train and of the others the first to skip sit out; where there are not enough others, some of the
    best sit out before they train. `may_skip`: the blocks that may sit out at all, by default any.
    """
    best = ranking[: candidate.active]
    order = [n for n in dict.fromkeys([*skip_order, *reversed(ranking)]) if may_skip is None or n in may_skip]
    skipped = sorted(order, key=lambda name: name in best)[: candidate.skipped]
    return [name for name in best if name not in skipped], skipped


def block_modes(
    names: Sequence[str],
    active: Sequence[str],
    skipped: Sequence[str],
    bypassed: Sequence[str],
    exact: str,
    around: str = "bypass",
) -> dict[str, str]:
    """Name -> mode; bypassed blocks run in `around`, frozen ones that neither sit out nor are bypassed in `exact`."""

    def mode(name: str) -> str:
        if name in active:
            return "train"
        return "skip" if name in skipped else around if name in bypassed else exact

    return {name: mode(name) for name in names}
