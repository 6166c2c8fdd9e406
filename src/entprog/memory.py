"""What EntProg does about memory: how everything is kept at every switch, the budget, rotation.

Inside a budget a candidate is tried on one batch, without a step, before training goes on with it; what it measures
corrects every later prediction. What does not fit is kept more thriftily, then made smaller. Trials are at full size
where training steps see smaller clips, too: the budget holds for the whole run.
"""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, replace
from typing import TYPE_CHECKING, Any

import torch

from entprog import parallel
from entprog.blocks import forked_rng, record_example
from entprog.budget import Budget, Keeping
from entprog.checkpointing import checkpoint_blocks, checkpointed
from entprog.cost import outside_of
from entprog.frozen import settle_weights
from entprog.guards import check_parkable, disown, own
from entprog.measure import moments_to_come, saved_bytes, tensor_bytes, training_bytes
from entprog.modes import set_active, set_mode
from entprog.optim import settle_optimizer
from entprog.priority import samples
from entprog.schedule import Candidate, periods, rotated
from entprog.snapshot import buffers_kept

if TYPE_CHECKING:
    from entprog.plugin import EntProg


def apply(prog: "EntProg", modes: Mapping[str, str], keeping: Keeping) -> None:
    """Set what trains, every block's mode, and how all of it is kept."""
    own(prog)
    active = [n for n, m in modes.items() if m == "train"]
    set_active(prog.blocks, active, frozen={n: m for n, m in modes.items() if m != "train"})
    settle_stem(prog, modes)
    prog.modes, prog.keeping, prog.stepping, prog.released = dict(modes), keeping, True, False
    if prog.budget is not None and not prog.budget.already:
        checkpoint_blocks(prog.blocks, keeping.checkpointing)
        name_parts(prog)
    if prog.budget is not None or prog.settings.frozen_weights:
        check_parkable(prog.optimizer, keeping.frozen_weights)
        settle_weights(prog.model, prog.blocks, keeping.frozen_weights)
    settle_state(prog)


def name_parts(prog: "EntProg") -> None:
    """Name the parts of blocks that run again by parts, from shapes alone: to find them a block keeps all, once."""
    assert prog.budget is not None
    ways = checkpointed(prog.blocks)
    for block in prog.blocks:
        if block.segments is None and ways.get(block.name) == "parts" and block.name in prog.budget.profile.blocks:
            block.segments = prog.budget.profile.parts(block.name)


def settle_stem(prog: "EntProg", modes: Mapping[str, str]) -> None:
    """Let pretrained modules outside blocks train, or not, as they do in some modes."""
    trains = reached(prog, modes)
    for p in prog.stem:
        p.requires_grad_(trains)
        if not trains:
            p.grad = None


def reached(prog: "EntProg", modes: Mapping[str, str]) -> bool:
    """Return whether what lies outside blocks trains in some modes, besides the head and what is new."""
    return prog.settings.stem_trains(modes.get(prog.blocks[0].name) == "train")


def outside(prog: "EntProg", modes: Mapping[str, str]) -> str:
    """Return what trains outside blocks in some modes, in the words of cost.OUTSIDE."""
    return outside_of(bool(prog.stem) and reached(prog, modes), bool(prog.always))


def settle_state(prog: "EntProg") -> None:
    """Drop the optimizer state of what does not train, or park it, as the setting says."""
    if prog.optimizer is not None and prog.optimizer_state != "keep" and prog.modes:
        inside = [*prog.stem, *(p for b in prog.blocks for p in b.parameters())]
        settle_optimizer(prog.optimizer, [p for p in inside if not p.requires_grad], prog.optimizer_state)


def resume(prog: "EntProg") -> None:
    """Keep everything as the present modes say: state that was loaded, or all of a model released on the way."""
    if prog.released and prog.modes:
        prog.tokens = prog.candidate.tokens if prog.candidate else prog.tokens
        apply(prog, prog.modes, prog.keeping)
    else:
        settle_state(prog)


def rest(prog: "EntProg", keeping: Keeping) -> None:
    """Train nothing inside blocks, run them all normally, and park all optimizer state: for scoring in a budget."""
    measuring(prog, dict.fromkeys((b.name for b in prog.blocks), "pass"), keeping)


def measuring(prog: "EntProg", modes: Mapping[str, str], keeping: Keeping) -> None:
    """Set modes in which gradients are measured and no step is taken: all optimizer state is parked."""
    state, prog.optimizer_state = prog.optimizer_state, "keep"  # only parked here, never dropped
    try:
        apply(prog, modes, keeping)
    finally:
        prog.optimizer_state = state
    prog.stepping = False
    if prog.optimizer is not None:
        inside = [p for b in prog.blocks for p in (*b.parameters(), *b.adapters)]
        settle_optimizer(prog.optimizer, prog.always + prog.stem + inside)


def held(prog: "EntProg", activations: int) -> int:
    """Bytes that a step holds whose forward pass has kept `activations` (measure.training_bytes), in this setting."""
    assert prog.optimizer is not None
    state = "none" if not prog.stepping else "all" if prog.optimizer_state == "keep" else "trained"
    total = training_bytes(prog.model, prog.optimizer, activations, state)
    if prog.budget is None or next(prog.model.parameters()).is_cuda:
        return total
    again = prog.budget.recomputed(prog.modes, prog.keeping)
    return total + (again if prog.stepping else -(-again // prog.budget.samples))


# -- the budget --------------------------------------------------------------------------------------------------------


def budget_of(prog: "EntProg", max_memory: str | int | float) -> Budget:
    """Return the budget of a run that has just been set up, for batches like those it scores on."""
    with forked_rng(0):
        batch = next(iter(prog.score_batches()))
    inputs = record_example(prog.model, lambda: prog.loss_fn(prog.model, batch))
    outside = (prog.always, prog.stem)
    return Budget(
        max_memory, prog.model, prog.blocks, prog.candidates, outside, inputs, len(samples(batch)), prog.settings,
        prog.new,
    )  # fmt: skip


def fits(prog: "EntProg", candidate: Candidate) -> bool:
    """Return whether the budget allows a candidate, with the blocks bypassed that its fidelity allows.

    Where blocks sit out it has to allow what follows, too: all blocks back, as many bypassed as may be.
    """
    budget = prog.budget
    if budget is None:
        return True
    if candidate.skipped and budget.choose(prog.modes_of(Candidate(candidate.active))) is None:
        return False  # once all blocks are back, more run and more may train
    if budget.choose(prog.modes_of(candidate)) is None:
        return False
    active, _ = prog.sets(candidate)
    if prog.measures_fidelity(candidate) and budget.choose_for_fidelity(active) is None:
        return False
    return budget.choose(prog.modes_of(candidate, prog.bypass_set(candidate)[0])) is not None


def kept(prog: "EntProg", modes: Mapping[str, str]) -> Keeping:
    """Return how blocks are kept in some modes: the first way that fits, or the thriftiest."""
    if prog.budget is None:
        return Keeping(prog.settings.frozen_weights)
    return prog.budget.choose(modes) or prog.budget.thriftiest(modes)


def largest(prog: "EntProg", candidate: Candidate) -> Candidate:
    """Return the candidate, or the largest smaller one that fits."""
    while not fits(prog, candidate) and candidate.active > 1:
        candidate = replace(candidate, active=candidate.active - 1)
    return candidate


def settle(prog: "EntProg", candidate: Candidate, progress: float) -> Candidate:
    """Switch to a candidate, or the largest smaller one whose first measured step fits; each trial is an event.

    RuntimeError if a single block does not fit, in spite of the prediction.
    """
    budget = prog.budget
    if budget is None:
        prog.switch(candidate)
        return candidate
    while True:
        candidate = largest(prog, candidate)
        prog.switch(candidate)
        predicted = budget.training(prog.modes, prog.keeping)
        key = (
            f"bytes at step {prog.last_step}, {candidate.active} active, {candidate.skipped} skipped, {prog.keeping!r}"
        )
        measured = int(prog.decide(key, lambda: _tried(prog)))
        budget.ratio = max(budget.ratio, measured / predicted)
        bytes_ = {"predicted": predicted, "measured": measured, "limit": budget.limit}
        prog.emit("plan_check", progress, active=candidate.active, keeping=str(prog.keeping), **bytes_,
                  error=measured / predicted - 1)  # fmt: skip
        if measured <= budget.limit:
            prog.peak_bytes = max(prog.peak_bytes, measured)
            return candidate
        if candidate.active == 1 and not fits(prog, candidate):
            raise RuntimeError(
                f"one trainable block holds {measured} bytes, {budget.limit} are allowed, {predicted} were predicted: "
                "use smaller batches or clips, or a larger max_memory"
            )


def _tried(prog: "EntProg") -> int:
    """Bytes of a training step in the present modes, from one forward pass (on a GPU backward, too) without a step.

    On a GPU running out of memory counts as twice the limit.
    """
    assert prog.optimizer is not None and prog.budget is not None
    cuda = next(prog.model.parameters()).is_cuda
    with forked_rng(0):
        batch = next(iter(prog.score_batches()))  # like a training batch, with every condition there
    trained = [p for p in prog.model.parameters() if p.requires_grad]
    moments = moments_to_come(trained, prog.optimizer)  # the trial itself does not make them
    prog.charge(batch, backward=True)
    with prog.ledger("search"), buffers_kept(prog.model), parallel.own_noise(prog.model, 999):
        if not cuda:
            with saved_bytes(ignore=list(prog.model.parameters())) as activations:
                loss = prog.loss_fn(prog.model, batch).mean()
                measured = held(prog, activations())
            del loss
        elif (peak := _peak_on_gpu(prog, batch, trained)) is not None:
            measured = peak + moments
        else:
            measured = 2 * prog.budget.limit
            gc.collect()  # what a pass that broke off has left: the next trial would be charged with it
            torch.cuda.empty_cache()
    prog.peak_bytes = max(prog.peak_bytes, torch.cuda.max_memory_allocated() if cuda else measured - moments)
    return int(parallel.slowest(prog.model, measured))


def _peak_on_gpu(prog: "EntProg", batch: Any, trained: Sequence[torch.nn.Parameter]) -> int | None:
    """Most bytes allocated during a forward and backward pass, None where the GPU has too few."""
    torch.cuda.reset_peak_memory_stats()
    try:
        loss = prog.loss_fn(prog.model, batch).mean()
        parallel.gradients(prog.model, loss, trained)  # no hook that steps or sends them runs
        return torch.cuda.max_memory_allocated()
    except torch.cuda.OutOfMemoryError:
        return None


@contextmanager
def within_fidelity(prog: "EntProg", candidate: Candidate) -> Iterator[None]:
    """Let what a candidate trains require gradients while its fidelity is measured, kept so that two of them fit."""
    if prog.budget is None:
        settle_stem(prog, prog.modes_of(candidate, ()))
        yield
        return
    active, _ = prog.sets(candidate)
    keeping = prog.budget.choose_for_fidelity(active) or Keeping(prog.budget.options()[-1].frozen_weights, "block")
    measuring(prog, {b.name: "train" if b.name in active else "pass" for b in prog.blocks}, keeping)
    exact = tensor_bytes(p for p in prog.model.parameters() if p.requires_grad)
    prog.held_bytes = exact + prog.budget.streams()  # and gradients of the streams around single blocks
    try:
        yield
    finally:
        prog.held_bytes = 0


# -- rotation ----------------------------------------------------------------------------------------------------------


def due(prog: "EntProg", step: int, progress: float) -> int:
    """Return which period of its stage a rotating run is in."""
    if not prog.rotating:
        return 0
    if prog.settings.rotate_every is not None:
        return (step - prog.stage_step) // prog.settings.rotate_every
    assert prog.wanted is not None
    count = periods(len(prog.candidates), prog.wanted.active)
    return int((progress * prog.settings.stages - prog.stage) * count + 1e-9)


def rotate(prog: "EntProg", progress: float) -> None:
    """Draw the blocks that train in the next period, as many as the stage began with."""
    assert prog.wanted is not None
    prog.turns += 1
    prog.bypass_sets = {}
    for name in prog.candidates:
        prog.waited[name] = 0 if name in prog.active else prog.waited.get(name, 0) + 1
    prog.drawn = []
    ranking = [n for n in prog.ranking(trainable=True) if n not in (prog.out or ())]
    count = min(prog.wanted.active, len(ranking))
    prog.drawn = rotated(ranking, count, prog.turns, prog.waited, prog.settings.seed)
    now = prog.candidate or prog.wanted
    prog.enter(replace(now, active=prog.wanted.active), progress, reason="rotated")


def release(prog: "EntProg", optimizer: bool = True) -> None:
    """Give the model back as it was found, weights as trained: nothing parked, checkpointed, frozen or left out.

    optimizer: parked optimizer state comes back, too.
    """
    if not disown(prog):
        return  # never switched, or released already, and perhaps another's now
    for block in prog.blocks:
        set_mode(block, "train")
    for p, required in prog.required:
        p.requires_grad_(required)
    if prog.budget is not None and not prog.budget.already:
        checkpoint_blocks(prog.blocks, "none")
    if prog.budget is not None or prog.settings.frozen_weights:
        settle_weights(prog.model, prog.blocks, None)
    if optimizer and prog.optimizer is not None and prog.optimizer_state != "keep":
        settle_optimizer(prog.optimizer, [])


def state(prog: "EntProg") -> dict[str, Any]:
    """Return what a resumed run needs to go on in the same memory and rotation."""
    return {
        "keeping": [prog.keeping.frozen_weights, prog.keeping.checkpointing],
        "ratio": prog.budget.ratio if prog.budget else 1.0,
        "wanted": list(astuple(prog.wanted)) if prog.wanted else None,
        "rotation": [prog.rotating, prog.turns, prog.period, prog.stage_step],
        "waited": dict(prog.waited),
        "drawn": list(prog.drawn),
    }


def load(prog: "EntProg", saved: Mapping[str, Any]) -> None:
    """Take over what `state` returned; the modes come after."""
    prog.keeping = Keeping(*saved["keeping"])
    if prog.budget is not None:
        prog.budget.ratio = saved["ratio"]
    prog.wanted = Candidate(*saved["wanted"]) if saved["wanted"] else None
    prog.rotating, prog.turns, prog.period, prog.stage_step = saved["rotation"]
    prog.waited, prog.drawn = dict(saved["waited"]), list(saved["drawn"])
