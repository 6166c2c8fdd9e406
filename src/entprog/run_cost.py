"""What a training step costs in EntProg's runs: FLOPs counted at each token scale, or seconds that were timed.

A smaller step is counted, not reckoned: attention makes its FLOPs fall faster than its tokens.
"""

from collections.abc import Mapping
from dataclasses import astuple, replace
from typing import TYPE_CHECKING, Any

from entprog import memory, parallel
from entprog.blocks import batch_size, forked_rng
from entprog.checkpointing import checkpointed
from entprog.cost import MODEL_CLOCK_FLOPS, StepCost, with_adapters
from entprog.measure import now
from entprog.modes import mode_of
from entprog.priority import block_gradients, samples
from entprog.profiling import cost_of
from entprog.schedule import Candidate
from entprog.snapshot import back_on_error
from entprog.supernet import TIMING_STEPS
from entprog.tokens import WHOLE, Tokens

if TYPE_CHECKING:
    from entprog.plugin import EntProg


def step_cost(prog: "EntProg", tokens: Tokens) -> StepCost:
    """Return the FLOPs of a step at a token scale, counted once. ValueError if shrinking saves none."""
    if tokens not in prog.costs:
        with forked_rng(0):
            batch = next(iter(prog.score_batches()))
            small = prog.shrunk(batch, tokens)
        prog.costs[tokens] = cost_of(
            prog.model, prog.blocks, lambda: prog.loss_fn(prog.model, small), batch_size(small), prog.new
        )
        if not tokens.whole:
            flops, whole = prog.costs[tokens].prediction({}), step_cost(prog, WHOLE).prediction({})
            if flops >= whole:
                raise ValueError(
                    f"shrink(batch, tokens) leaves {flops} of {whole} FLOPs at {tokens}: it must return a smaller "
                    "batch, of fewer frames or smaller ones; a patch that does not divide further needs a larger scale"
                )
    return prog.costs[tokens]


def step_flops(prog: "EntProg", modes: Mapping[str, str], tokens: Tokens) -> int:
    """Return the FLOPs of a training step in some modes at a token scale, blocks checkpointed as they are now."""
    outside, again = memory.outside(prog, modes), checkpointed(prog.blocks)
    modes = with_adapters(modes, {b.name for b in prog.blocks if b.adapters})
    return step_cost(prog, tokens).step(modes, outside=outside, checkpointed=again)


def charge(prog: "EntProg", batch: Any, backward: bool, tokens: Tokens) -> None:
    """Let the model clock run on by one pass of a batch, at a token scale, over the blocks in their present modes."""
    if prog.costs:
        cost = step_cost(prog, tokens)
        modes = {b.name: mode_of(b) for b in prog.blocks}
        flops = step_flops(prog, modes, tokens) if backward else cost.prediction(modes)
        prog.model_seconds += batch_size(batch) / cost.samples * flops / MODEL_CLOCK_FLOPS


def full_step_seconds(prog: "EntProg") -> float:
    """Time the full step, or the largest that the memory allows, scaled by FLOPs."""
    whole = Candidate(len(prog.candidates))
    largest = memory.largest(prog, whole)
    seconds = timed(prog, largest)
    if largest == whole:
        return seconds
    modes = prog.modes_of(largest, prog.bypass_set(largest)[0])
    return seconds * prog.step_flops(prog.modes_of(whole, ())) / prog.step_flops(modes)


def search_seconds(prog: "EntProg") -> float:
    """Return what a stage's search may cost: search_budget of the stage."""
    settings = prog.settings
    if prog.seconds is not None:
        return settings.search_budget * prog.seconds / settings.stages
    steps = settings.search_budget * prog.total_steps / settings.stages
    return steps * prog.full_step_seconds()


def gradient_seconds(prog: "EntProg") -> float:
    """Seconds of a batch's gradients as scores take them, timed on one sample: small steps are slow for their FLOPs.

    By the model clock, and inside a memory budget, those of a full step.
    """
    if prog.clock == "model" or prog.budget is not None:
        return prog.full_step_seconds()
    parts, times = samples(next(iter(prog.score_batches()))), []
    for _ in range(2):  # the first warms up
        begun = now()
        block_gradients(prog.model, prog.blocks, prog.loss, parts[0], seed=0)
        times.append(parallel.slowest(prog.model, now() - begun))
    return len(parts) * min(times)


def estimate(prog: "EntProg", candidate: Candidate) -> float:
    """Seconds of one training step of a candidate, by FLOPs from the one timed full step."""
    whole = prog.step_flops(prog.modes_of(Candidate(len(prog.candidates)), ()))
    flops = prog.step_flops(prog.modes_of(candidate), candidate.tokens)
    return prog.full_step_seconds() * flops / whole


def worth_freezing(prog: "EntProg", chosen: Candidate, progress: float) -> Candidate:
    """Return what the linear schedule chose, or all blocks where that saves less than min_saving of their FLOPs.

    Gradients that pass through most of the frozen blocks save a sixth at best: less than untrained blocks lose.
    """
    least, whole = prog.settings.min_saving, replace(chosen, active=len(prog.candidates))
    if not least or chosen.active == whole.active or prog.settings.schedule != "linear" or prog.budget is not None:
        return chosen
    flops = [prog.step_flops(prog.modes_of(c, prog.bypass_set(c)[0]), c.tokens) for c in (chosen, whole)]
    if (saving := 1 - flops[0] / flops[1]) >= least:
        return chosen
    prog.emit("all_train", progress, wanted=chosen.active, saving=saving, min_saving=least)
    return whole


def timed(prog: "EntProg", candidate: Candidate) -> float:
    """Seconds of one training step of a candidate: FLOPs by the model clock, else timed on steps that are undone."""
    before, keeping, tokens = prog.modes, prog.keeping, prog.tokens
    prog.switch(candidate)
    if prog.clock == "model":
        seconds = prog.step_flops(prog.modes, candidate.tokens) / MODEL_CLOCK_FLOPS
    else:
        start, times = prog.snapshot(), []
        with back_on_error(start):
            for _ in range(TIMING_STEPS):
                begun = now()
                prog.train(0, 1)
                times.append(parallel.slowest(prog.model, now() - begun))
        start.restore()
        seconds = min(times[1:])  # the first step after a switch does not count
    if before:
        memory.apply(prog, before, keeping)
        prog.tokens = tokens
    return seconds


def state(prog: "EntProg") -> list[Any]:
    """Return what was counted, as plain data."""
    prog.step_cost()
    return [[list(astuple(tokens)), cost.to_json()] for tokens, cost in prog.costs.items()]


def load(prog: "EntProg", saved: list[tuple[list[float], Mapping[str, Any]]]) -> None:
    """Take over what `state` returned."""
    found = {Tokens(*tokens): cost for tokens, cost in saved}
    prog.costs = {t: StepCost(**cost, fill=prog.step_cost(t).fill) for t, cost in found.items()}
