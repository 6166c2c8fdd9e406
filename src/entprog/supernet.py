"""The nested diffusion supernet: how many blocks pay, measured.

All candidates of a stage share the weights the stage starts from, since the trainable sets are nested. Convergence
efficiency is the drop of the held-out loss per second of training,

    CE(m) = - sum(delta l) / sum(T),        m* = argmax CE(m),

and the estimators differ in whose loss change is charged to whom:

    race      every candidate trains on its own trajectory for the same seconds; the worse half drops out, the time
              doubles (successive halving), and training goes on from the winner's state. Default.
    paired    one trajectory; each visit of a candidate is charged the change it made and its own time.
    literal   one trajectory, and every candidate is credited with the whole change: the sum telescopes to the same
              number for all, so the cheapest always wins. Kept to show that.

Candidates that skip blocks or tokens are judged by the whole network on whole clips after a few steps with everything
back (PROBE_STEPS), which are charged to the search and rolled back: while blocks or tokens are out its loss looks worse
than it will be.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from entprog.blocks import forked_rng, on_host
from entprog.schedule import Candidate
from entprog.snapshot import Snapshot, back_on_error

FIRST_STEPS = 8  # counted steps every candidate gets before it can lose
PROBE_STEPS = 3
TIMING_STEPS = 3  # what measuring a candidate's step time costs


class Trial(Protocol):
    """What an estimator needs of the training run it searches in."""

    def estimate(self, candidate: Candidate) -> float:
        """Seconds of one training step, guessed without running one."""

    def cost(self, candidate: Candidate) -> float:
        """Seconds of one training step, recorded before it is used."""

    def switch(self, candidate: Candidate) -> None:
        """Train and run the blocks as the candidate says."""

    def train(self, start: int, steps: int) -> None:
        """Train on batches start, start + 1, ..., at the candidate's token scale.

        The same start gives the same batches and noise.
        """

    def losses(self) -> Tensor:
        """Held-out losses (n,) of the whole network on whole clips: fixed times and noise, eval mode."""

    def snapshot(self) -> Snapshot:
        """Copy everything training changes."""


@contextmanager
def at_average(optimizer: Any) -> Iterator[None]:
    """Give a schedule-free optimizer's parameters their averaged values inside (its eval mode), then train mode again.

    It takes gradients at a point between its average and its last iterate, but the average is what it has learned.
    Optimizers without such modes, and None, are left alone.
    """
    if not callable(getattr(optimizer, "eval", None)):
        yield
        return
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()


class BatchStream:
    """Batches by index, each drawn once under its own seed: the same for every candidate, whatever the loader draws.

    `make()` gives a new iterator; one that runs out is begun again. ValueError if it yields nothing. `host`: they wait
    on the host.
    """

    def __init__(self, make: Callable[[], Iterable[Any]], host: bool = False) -> None:
        self.make, self.host = make, host
        self.drawn: list[Callable[[], Any]] = []
        self.source: Iterator[Any] = iter(())

    def __getitem__(self, index: int) -> Any:
        while len(self.drawn) <= index:
            with forked_rng(500 + len(self.drawn)):
                batch = self._next()
            self.drawn.append(on_host(batch) if self.host else partial(_itself, batch))
        return self.drawn[index]()

    def _next(self) -> Any:
        for attempt in range(2):  # guards.begun would hold on to the first batch
            if attempt:
                self.source = iter(self.make())
            for batch in self.source:
                return batch
        raise ValueError("train_batches() yields no batch: pass a callable that gives a new iterator at each call")


def _itself(batch: Any) -> Any:
    return batch


@dataclass
class SearchResult:
    """What a search found: the choice, every measurement on the way, and what to know about it.

    `chosen` is None where no candidate's loss stayed finite; everything is then as it was before. `steps` is how many
    batches of the run's stream the kept trajectory used; rungs[i]["entries"] hold per candidate
    active, skipped, steps, seconds, loss_before, loss_after, efficiency and interval (95 %, of the efficiency).
    """

    estimator: str
    chosen: Candidate | None
    steps: int
    rungs: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""

    def record(self) -> dict[str, Any]:
        """Return the result as plain data for events."""
        return asdict(self)


def _entry(candidate: Candidate, steps: int, seconds: float, before: Tensor, after: Tensor) -> dict[str, Any]:
    drops = (before - after).double()
    spread = 1.96 * drops.std(correction=1).item() / math.sqrt(len(drops)) if len(drops) > 1 else 0.0
    mean = drops.mean().item()
    return asdict(candidate) | {
        "steps": steps,
        "seconds": seconds,
        "loss_before": before.mean().item(),
        "loss_after": after.mean().item(),
        "efficiency": mean / seconds,
        "interval": [(mean - spread) / seconds, (mean + spread) / seconds],
    }


def _finite_or(worst: float, value: float) -> float:
    """Return a value that can be compared: NaN is neither better nor worse than anything."""
    return value if math.isfinite(value) else worst


def _tied(a: Tensor, b: Tensor) -> bool:
    """Return whether the 95 % interval of the mean paired difference contains 0."""
    difference = (a - b).double()
    return abs(difference.mean().item()) <= 1.96 * difference.std(correction=1).item() / math.sqrt(len(difference))


def _rung_seconds(rungs: int) -> list[int]:
    """Further seconds of each rung, in units of the first: 1, 1, 2, 4 ... so that the total doubles."""
    return [1] + [2**i for i in range(rungs - 1)]


def _race_shares(count: int) -> int:
    """Seconds of a whole race of `count` candidates in units of the first rung's seconds per candidate."""
    fields = [count]
    while math.ceil(fields[-1] / 2) > 1:
        fields.append(math.ceil(fields[-1] / 2))
    return sum(n * extra for n, extra in zip(fields, _rung_seconds(len(fields)), strict=True))


@dataclass
class _Racer:
    candidate: Candidate
    snapshot: Snapshot
    steps: int = 0
    seconds: float = 0.0
    losses: Tensor = field(default_factory=lambda: torch.zeros(0))

    def loss(self) -> float:
        return _finite_or(math.inf, self.losses.mean().item())


def affordable(trial: Trial, candidates: Sequence[Candidate], seconds: float) -> tuple[list[Candidate], str]:
    """Return the candidates whose race fits into `seconds`: all, the smallest and the largest, or none."""
    for field_, note in ((list(candidates), ""), ([candidates[0], candidates[-1]], "only smallest and largest raced")):
        first = FIRST_STEPS * max(_seconds_per_step(trial, c) for c in field_)
        timing = TIMING_STEPS * sum(trial.estimate(c) for c in field_)
        if len(field_) > 1 and first * _race_shares(len(field_)) + timing <= seconds:
            return field_, note
    return [], "search unaffordable"


def _seconds_per_step(trial: Trial, candidate: Candidate) -> float:
    """Seconds per step, with the probe's steps spread over the first rung's."""
    probe = PROBE_STEPS * trial.estimate(candidate.restored) if candidate != candidate.restored else 0.0
    return trial.estimate(candidate) + probe / FIRST_STEPS


def race(trial: Trial, candidates: Sequence[Candidate], seconds: float) -> SearchResult | None:
    """Let every candidate train for equal seconds from the same state, halve the field, double the time.

    Returns None, with nothing changed, if `seconds` cannot pay for 8 steps of even two candidates. Of two candidates
    whose losses are tied at the last rung the cheaper one is taken. One whose loss is not finite drops out.
    """
    entered, note = affordable(trial, candidates, seconds)
    if not entered:
        return None
    per_rung = (seconds - TIMING_STEPS * sum(trial.cost(c) for c in entered)) / _race_shares(len(entered))
    if per_rung < FIRST_STEPS * max(trial.cost(c) for c in entered):  # the estimate was too low
        if len(entered) == 2:
            return None
        return race(trial, [entered[0], entered[-1]], per_rung * _race_shares(len(entered)))
    before, start = trial.losses(), trial.snapshot()
    racers = [_Racer(c, start) for c in entered]
    with back_on_error(start):
        return _raced(trial, racers, per_rung, before, note)


def _raced(trial: Trial, racers: list[_Racer], per_rung: float, before: Tensor, note: str) -> SearchResult:
    """Run the rungs of a race and switch to the winner; back at the start if all diverge."""
    start = racers[0].snapshot
    rungs: list[dict[str, Any]] = []
    leaders: list[Candidate] = []
    while len(racers) > 1:
        extra = _rung_seconds(len(rungs) + 1)[-1]
        for racer in racers:
            _advance(trial, racer, extra * per_rung)
        entries = [_entry(r.candidate, r.steps, r.seconds, before, r.losses) for r in racers]
        rungs.append({"seconds": racers[0].seconds, "entries": entries})
        racers.sort(key=_Racer.loss)
        if diverged := [str(r.candidate) for r in racers if r.loss() == math.inf]:
            note = f"{note}; diverged: {diverged}".lstrip("; ")
        if len(diverged) == len(racers):
            start.restore()
            return SearchResult("race", None, 0, rungs, note)
        leaders.append(racers[0].candidate)
        if len(racers) == 2 and _tied(racers[0].losses, racers[1].losses):
            racers.sort(key=lambda r: trial.cost(r.candidate))
            note = f"{note}; tie at the last rung, the cheaper taken".lstrip("; ")
        racers = [r for r in racers[: math.ceil(len(racers) / 2)] if r.loss() < math.inf]
    if len(set(leaders)) > 1:
        note = f"{note}; the leader changed with the horizon: {leaders}".lstrip("; ")
    winner = racers[0]
    winner.snapshot.restore()
    trial.switch(winner.candidate)
    return SearchResult("race", winner.candidate, winner.steps, rungs, note)


def _advance(trial: Trial, racer: _Racer, seconds: float) -> None:
    """Train one racer for some seconds more on its own trajectory and measure the whole network."""
    racer.snapshot.restore()
    candidate, restored = racer.candidate, racer.candidate.restored
    probe = PROBE_STEPS if candidate != restored else 0
    steps = max(1, int((seconds - probe * trial.cost(restored)) / trial.cost(candidate)))
    trial.switch(candidate)
    trial.train(racer.steps, steps)
    racer.snapshot = trial.snapshot()
    racer.steps += steps
    racer.seconds += steps * trial.cost(candidate) + probe * trial.cost(restored)
    if probe:
        trial.switch(restored)
        trial.train(racer.steps, probe)
    racer.losses = trial.losses()


def _visits(
    trial: Trial, candidates: Sequence[Candidate], seconds: float, visit_steps: int = 2
) -> list[tuple[Candidate, int, Tensor, Tensor]]:
    """Train on one trajectory, visiting all candidates in a fresh random order each cycle.

    Where some candidates skip, every look is one past the restoration, and its steps are paid for and rolled back.
    """
    restored = _restored(candidates)
    probe = PROBE_STEPS * trial.cost(restored) if restored else 0.0
    cycle = sum(visit_steps * trial.cost(c) + probe for c in candidates)
    order = random.Random(0)
    visits, position, before = [], 0, _look(trial, restored, 0)
    for _ in range(max(1, int((seconds - probe) / cycle))):
        for candidate in order.sample(list(candidates), len(candidates)):
            trial.switch(candidate)
            trial.train(position, visit_steps)
            position += visit_steps
            after = _look(trial, restored, position)
            visits.append((candidate, visit_steps, before, after))
            before = after
    return visits


def _one_cycle(trial: Trial, candidates: Sequence[Candidate]) -> float:
    """Seconds of timing every candidate and visiting it once, with the looks before, between and after."""
    restored = _restored(candidates)
    looks = (1 + len(candidates)) * PROBE_STEPS * trial.estimate(restored) if restored else 0.0
    return (2 + TIMING_STEPS) * sum(trial.estimate(c) for c in candidates) + looks


def _restored(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return how candidates that skip blocks or tokens are looked at: everything back; None if no candidate skips."""
    skips = any(c != c.restored for c in candidates)
    return Candidate(max(c.active for c in candidates)) if skips else None


def _look(trial: Trial, restored: Candidate | None, position: int) -> Tensor:
    """Measure the held-out losses, with `restored` after some steps in it, which leave no trace."""
    if restored is None:
        return trial.losses()
    kept = trial.snapshot()
    trial.switch(restored)
    trial.train(position, PROBE_STEPS)
    losses = trial.losses()
    kept.restore()
    return losses


def _one_trajectory(
    estimator: str,
    trial: Trial,
    candidates: Sequence[Candidate],
    seconds: float,
    charged: Callable[[list[Any], Candidate], Tensor],
) -> SearchResult | None:
    if len(candidates) < 2 or _one_cycle(trial, candidates) > seconds:
        return None
    seconds -= TIMING_STEPS * sum(trial.cost(c) for c in candidates)
    start = trial.snapshot()
    with back_on_error(start):
        visits = _visits(trial, candidates, seconds)
    entries = []
    for candidate in candidates:
        own = [v for v in visits if v[0] == candidate]
        steps = sum(v[1] for v in own)
        drop = charged(visits, candidate)
        entries.append(_entry(candidate, steps, steps * trial.cost(candidate), drop, torch.zeros_like(drop)))
        entries[-1] |= {"loss_before": visits[0][2].mean().item(), "loss_after": visits[-1][3].mean().item()}
    rung = {"seconds": seconds, "entries": entries}
    best = max(range(len(entries)), key=lambda i: _finite_or(-math.inf, entries[i]["efficiency"]))
    if not math.isfinite(entries[best]["efficiency"]) or not visits[-1][3].mean().isfinite():
        start.restore()
        return SearchResult(estimator, None, 0, [rung], "the trajectory diverged and was rolled back")
    trial.switch(candidates[best])
    return SearchResult(estimator, candidates[best], sum(v[1] for v in visits), [rung])


def paired(trial: Trial, candidates: Sequence[Candidate], seconds: float) -> SearchResult | None:
    """Charge each visit's change of the held-out loss to the candidate that made it.

    Nothing is rolled back, unless the loss does not stay finite.
    """

    def own_change(visits: list[Any], candidate: Candidate) -> Tensor:
        return torch.stack([before - after for c, _, before, after in visits if c == candidate]).sum(0)

    return _one_trajectory("paired", trial, candidates, seconds, own_change)


def literal(trial: Trial, candidates: Sequence[Candidate], seconds: float) -> SearchResult | None:
    """Credit every candidate with the whole trajectory's change: always picks the cheapest."""
    whole = _one_trajectory("literal", trial, candidates, seconds, lambda v, _: v[0][2] - v[-1][3])
    if whole is not None and whole.chosen is not None:
        whole.note = "degenerate estimator: all candidates are credited with the same change of the loss"
    return whole


SEARCHES: dict[str, Callable[[Trial, Sequence[Candidate], float], SearchResult | None]] = {
    "race": race,
    "paired": paired,
    "literal": literal,
}
