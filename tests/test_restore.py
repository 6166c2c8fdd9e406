"""Blocks that sit out and come back: when, which, what trains then, exact resume, the memory budget, searches."""

import json
from dataclasses import replace
from itertools import count, islice

import pytest
import torch
from conftest import Plain

from entprog import memory
from entprog.measure import saved_bytes
from entprog.plugin import EntProg
from entprog.schedule import RESTORES, SCHEDULES, Candidate
from entprog.snapshot import Snapshot
from entprog.strategy import Progressive
from entprog.supernet import PROBE_STEPS, literal, paired

HALF_OUT = Progressive(schedule="fixed", active_share=1.0, skip=0.5, restore_at=0.75, stages=1, min_fidelity=0.5)


def batches():
    """Endless batches, the same at every call."""
    for i in count():
        yield torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(i))


def loss_fn(model, batch):
    return (model(batch) - batch.roll(1, -1)).square().flatten(1).mean(1)


class Run:
    """A loop of one's own that notes what sits out, what trains and what each step holds."""

    def __init__(self, settings, steps=16, depth=8, max_memory=None):
        torch.manual_seed(0)
        self.model, self.steps = Plain(depth=depth, width=16), steps
        self.prog = EntProg(self.model, loss_fn, held_out=next(islice(batches(), 900, None)), train_batches=batches,
                            total_steps=steps, strategy=settings, clock="model", max_memory=max_memory)  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.out, self.trained, self.bytes = [], [], []

    def go(self, begin=0, end=None):
        for step, batch in islice(enumerate(batches()), begin, end or self.steps):
            self.prog.step(step, self.optimizer)
            self.out.append({n for n, mode in self.prog.modes.items() if mode == "skip"})
            self.trained.append(set(self.prog.active))
            with saved_bytes(ignore=list(self.model.parameters())) as held:
                loss = loss_fn(self.model, batch).mean()
                self.bytes.append(memory.held(self.prog, held()))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return self

    def sits_out(self):
        return [len(out) for out in self.out]


def by_hand(restore, first, restore_at, progress):
    """How many of `first` blocks are still out: the slow and obvious version."""
    if progress >= restore_at:
        return 0
    if restore == "halves":
        return first if progress < restore_at * 2 / 3 else first - first // 2
    if restore == "one_by_one":
        return first - sum(progress >= restore_at * (k + 1) / first for k in range(first))
    return first


@pytest.mark.parametrize("restore", RESTORES)
@pytest.mark.parametrize(("schedule", "stages"), [("fixed", 1), ("linear", 3)])
def test_blocks_come_back_when_due_and_stay_and_train(restore, schedule, stages):
    settings = replace(HALF_OUT, restore=restore, schedule=schedule, stages=stages)
    run = Run(settings, steps=48).go()
    assert run.sits_out() == [by_hand(restore, 4, 0.75, step / 48) for step in range(48)]
    assert all(later <= earlier for earlier, later in zip(run.out[:-1], run.out[1:], strict=True)), "who is back stays"
    assert not run.out[-1] and run.trained[-1] == set(run.prog.modes), "in the end everything runs and trains"
    for out, trained in zip(run.out, run.trained, strict=True):
        assert trained and not out & trained
    marks = [m for m in run.prog.boundaries() if m not in [k / stages for k in range(stages)]]
    told = [e for e in run.prog.events if e["event"] == "modes"]
    assert {e["step"] for e in told if e["reason"] == "restored"} <= {round(48 * m) for m in marks}
    assert all(set(e["skipped"]) == run.out[e["step"]] for e in told)


def test_those_that_change_the_prediction_least_sit_out_longest_whatever_is_to_train():
    run = Run(replace(HALF_OUT, restore="one_by_one")).go()
    changes = run.prog.scores.changes
    assert run.out[0] == set(sorted(changes, key=changes.get)[:4])
    left = [out - later for out, later in zip(run.out[:-1], run.out[1:], strict=True) if out != later]
    assert [n for names in left for n in names] == sorted(run.out[0], key=changes.get, reverse=True)


def test_a_new_ranking_sends_nobody_out_again():
    settings = replace(HALF_OUT, priority="random", schedule="linear", stages=4, rescore="stage", restore="halves")
    run = Run(settings, steps=32).go()
    assert all(later <= earlier for earlier, later in zip(run.out[:-1], run.out[1:], strict=True))
    assert len(run.out[0]) == 4 and not run.out[-1]


def test_rotation_leaves_out_what_sits_out():
    settings = replace(HALF_OUT, active_share=0.25, growth="rotate", rotate_every=2, restore="one_by_one")
    run = Run(settings, steps=32).go()
    assert run.sits_out() == [by_hand("one_by_one", 4, 0.75, step / 32) for step in range(32)]
    assert len(set(map(frozenset, run.trained))) > 3 and {len(t) for t in run.trained} == {2}


@pytest.mark.parametrize(
    ("schedule", "restore", "at"),
    [("linear", "halves", 9), ("linear", "one_by_one", 7), ("fixed", "one_by_one", 11), ("adaptive", "one_by_one", 7)],
)
def test_resume_is_exact_in_the_middle_of_a_restoration(schedule, restore, at):
    settings = replace(HALF_OUT, schedule=schedule, restore=restore, stages=2, search_budget=5.0, grid=(0.5,))
    whole = Run(settings).go()
    assert schedule == "adaptive" or 0 < len(whole.out[at]) < 4, "in the middle"
    first = Run(settings).go(end=at)
    second = Run(settings)
    second.prog.load_state_dict(json.loads(json.dumps(first.prog.state_dict())))
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.go(begin=at)
    assert second.out == whole.out[at:] and second.trained == whole.trained[at:]
    theirs = whole.model.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in second.model.state_dict().items())
    if schedule == "adaptive":
        found = [e for e in whole.prog.events if e["event"] == "search"]
        assert found[0]["rungs"], "there was a search"
        entries = [e for r in found[0]["rungs"] for e in r["entries"]]
        assert {e["skipped"] for e in entries} > {0}
        assert all(later <= earlier for earlier, later in zip(whole.out[:-1], whole.out[1:], strict=True))


@pytest.mark.parametrize(("frozen", "restore"), [("pass", "once"), ("bypass", "one_by_one")])
def test_the_budget_holds_when_blocks_are_back(frozen, restore):
    everything = max(Run(replace(HALF_OUT, skip=0.0, priority="first"), steps=1).go().bytes)
    limit = int(0.7 * everything)
    settings = replace(HALF_OUT, frozen=frozen, restore=restore, growth="nested", min_fidelity=0.0)
    run = Run(settings, max_memory=limit).go()
    assert max(run.bytes) <= limit, "every step"
    assert run.sits_out() == [by_hand(restore, 4, 0.75, step / 16) for step in range(16)]
    assert all(earlier <= later for earlier, later in zip(run.trained[:-1], run.trained[1:], strict=True)), (
        "nothing that trained has to stop for the blocks that come back"
    )
    assert len(run.trained[-1]) < 8, "not all of them may train"


def test_words_are_checked_and_marks_are_told():
    with pytest.raises(ValueError, match="restore 'twice' is unknown: choose one of"):
        Progressive(restore="twice")
    assert Run(replace(HALF_OUT, restore="one_by_one", restore_at=0.8)).prog.boundaries() == pytest.approx(
        [0.0, 0.2, 0.4, 0.6, 0.8]
    )
    assert Run(replace(HALF_OUT, skip=0.0)).prog.boundaries() == [0.0]
    assert SCHEDULES["fixed"](0, 1, 8, HALF_OUT, None, None) == Candidate(8, 4)  # type: ignore[arg-type]


class Hidden:
    """A run in which what is learned with blocks out shows once they are back, and only hurts before."""

    def __init__(self):
        self.weights = torch.nn.Parameter(torch.tensor([10.0, 0.0]))  # the loss with all blocks back, what hides it
        self.optimizer = torch.optim.SGD([self.weights], lr=1.0)
        self.now, self.steps = None, 0

    def cost(self, candidate):
        return 0.5 if candidate.skipped else 1.0

    estimate = cost

    def switch(self, candidate):
        self.now = candidate

    def train(self, start, steps):
        self.steps += steps
        with torch.no_grad():
            self.weights[0] -= steps * (0.02 if self.now.skipped else 0.01)
            self.weights[1] = 5.0 if self.now.skipped else max(0.0, self.weights[1] - steps * 5.0 / PROBE_STEPS)

    def losses(self):
        return self.weights.detach().sum() + torch.linspace(-0.1, 0.1, 8)

    def snapshot(self):
        return Snapshot.take([self.weights], self.optimizer)


@pytest.mark.parametrize("search", [paired, literal])
def test_visits_of_candidates_that_skip_are_judged_past_the_restoration(search):
    out, back = Candidate(4, 4), Candidate(4, 0)
    run = Hidden()
    result = search(run, [back, out], 100)
    assert result.chosen == out
    spent = sum(e["steps"] for e in result.rungs[0]["entries"])
    assert run.weights[0].item() == pytest.approx(10 - spent / 2 * 0.03, rel=1e-4), "looks leave no trace"
    assert run.steps > spent and 0.5 * (run.steps - spent) <= 100, "and are paid for"
    assert search(Hidden(), [back, out], 10) is None, "a look more would not fit"
