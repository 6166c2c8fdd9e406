"""Ranking the blocks in a training run: how many batches it pays for, within which memory, what sits out until when.

Inside a memory budget blocks are scored with their own weights, and nothing trains but what a score needs: by skipping
one sample at a time, by gradients one group of blocks at a time, both checkpointed.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

from entprog import memory, run_cost
from entprog.budget import SUMS, merged
from entprog.bypass import choose_skips
from entprog.cei import Scores, Stop, with_inherited
from entprog.frozen import settle_weights
from entprog.measure import tensor_bytes
from entprog.plan import cost_aware
from entprog.priority import HostBatches, agreement, samples, score
from entprog.schedule import RESTORES, Candidate, at_least_one, at_most, block_sets, block_sizes, still_out

if TYPE_CHECKING:
    from entprog.plugin import EntProg


def rank(prog: "EntProg", progress: float) -> None:
    """Score the blocks and order them for skipping."""
    settings, count = prog.settings, len(prog.candidates)
    sizes = tuple(sorted({at_least_one(share, count) for share in settings.grid}))
    stop = Stop(sizes) if settings.schedule == "adaptive" else None
    if prog.budget is None:
        prog.switch(Candidate(count))
    prog.step_cost()
    batches = prog.decide(f"score batches at stage {prog.stage}", lambda: batches_within_budget(prog))
    if prog.budget is None and settings.frozen_weights not in (None, "cpu"):  # from the host they are their own
        settle_weights(prog.model, prog.blocks, None)  # the next switch parks again
    names = [b.name for b in prog.blocks]  # a zero-initialised block takes its host's place
    prog.scores = with_inherited(_scored(prog, settings.priority, batches, stop), names)
    for other in settings.beside:
        half = max(2, batches // 2)  # for the record, at half the price
        beside = with_inherited(_scored(prog, other, half, stop), names)
        prog.emit("score", progress, **asdict(beside), agreement=agreement(beside, prog.scores))
    prog.skip_order = _order_for_skipping(prog, prog.scores, min(int(settings.skip * count), count - 1))
    prog.emit("score", progress, **asdict(prog.scores), skip_order=prog.skip_order)


def batches_within_budget(prog: "EntProg") -> int:
    """Return how many batches score_budget pays for, at least 4 and at most 64.

    A batch costs grad_norm the gradients of its samples once, gain twice, and a priority that skips blocks 1/3 + L/6
    full steps; what is scored beside it takes half as many.
    """
    if prog.seconds is None:
        return 8
    by_skipping = (1 + len(prog.blocks) / 2) / 3 * prog.full_step_seconds()
    passes = {"grad_norm": 1, "gain": 2}.get(prog.settings.priority)
    per_batch = passes * run_cost.gradient_seconds(prog) if passes else by_skipping
    per_batch += 0.5 * by_skipping * len(prog.settings.beside)
    return int(min(64, max(4, prog.settings.score_budget * prog.seconds / per_batch)))


def _scored(prog: "EntProg", priority: str, batches: int, stop: Stop | None) -> Scores:
    drawn: Iterable[Any] = islice(prog.score_batches(), batches)
    groups = [prog.blocks]
    if prog.budget is not None:
        if priority in SUMS:
            keeping, groups = prog.budget.groups(prog.blocks, SUMS[priority])
        else:
            keeping = prog.budget.scores_kept()
            drawn = (sample for batch in drawn for sample in samples(batch))
        drawn = HostBatches(drawn)  # for every group of blocks the same
        memory.rest(prog, keeping)
    parts = []
    for group in groups:
        parameters = [p for b in group for p in b.parameters()]
        if priority in SUMS:  # beside the sum over the samples
            prog.held_bytes = tensor_bytes(parameters) + SUMS[priority] * sum(p.numel() for p in parameters)
        parts.append(
            score(
                prog.model,
                group,
                prog.prediction,
                drawn,
                priority,
                loss_fn=prog.loss,
                t=prog.t,
                stop=stop,
            )
        )
    prog.held_bytes = 0
    return parts[0] if len(parts) == 1 else merged(parts, prog.blocks)


def selected(prog: "EntProg", candidate: Candidate) -> tuple[list[str], list[str]]:
    """Names of a candidate's trainable and skipped blocks: the ranking's best, or by `cost_aware` at the same price.

    The price is that of the best blocks in forwards, gradients passing through what lies behind the first (plan.py).
    """
    ranking = prog.ranking()
    if prog.settings.selection == "top" or prog.drawn or prog.scores is None:
        return block_sets(candidate, ranking, prog.skip_order, prog.out)
    costs, best = prog.step_cost().parts(), ranking[: candidate.active]
    names = list(costs)
    behind = names[min(names.index(n) for n in best) :]
    price = sum(c["forward"] for c in costs.values()) + sum(costs[n]["input"] for n in behind)
    price += sum(costs[n]["weight"] for n in best)
    scores = {n: prog.scores.values[n] if n in prog.candidates else -math.inf for n in names}
    chosen = cost_aware(scores, costs, price)
    order = [*chosen, *(n for n in ranking if n not in chosen)]
    return block_sets(Candidate(len(chosen), candidate.skipped), order, prog.skip_order, prog.out)


def out_at_most(prog: "EntProg", progress: float) -> int:
    """Return how many blocks may sit out at `progress`: fewer and fewer, by settings.restore."""
    settings = prog.settings
    count = at_most(settings.skip, block_sizes(prog.blocks, prog.ranking(trainable=True)))
    most = still_out(count, settings.restore, settings.restore_at, progress)
    return most if prog.out is None else min(most, len(prog.out))


def boundaries(prog: "EntProg") -> list[float]:
    """Return the progress marks at which stages begin and blocks or tokens come back.

    Where blocks differ in size, how many sit out depends on the ranking; before there is one it is a guess.
    """
    settings, marks = prog.settings, [k / prog.settings.stages for k in range(prog.settings.stages)]
    if settings.skip:
        count = at_most(settings.skip, block_sizes(prog.blocks, prog.ranking(trainable=True)))
        marks += [settings.restore_at * mark for mark in RESTORES[settings.restore](count)]
    if settings.axes != "blocks":
        marks.append(settings.tokens_until)
    return sorted(set(marks))


def _order_for_skipping(prog: "EntProg", scores: Scores, count: int) -> list[str]:
    """Names of all blocks, the one that changes the prediction least first.

    Scores by skipping have measured every block's change on the way; others cost a greedy search of their own.
    """
    if not count or scores.changes:
        return sorted(scores.changes, key=lambda name: scores.changes[name])
    batch = next(iter(prog.score_batches()))
    keep = scores.ranking[:1]
    return [s["name"] for s in choose_skips(prog.model, prog.blocks, prog.prediction, batch, count, keep)]
