"""Schedules and the search: bounds, the literal reading's degeneracy, and that a race finds what pays."""

import itertools
import math

import pytest
import torch

from entprog.schedule import SCHEDULES, Candidate, candidates
from entprog.snapshot import Snapshot
from entprog.strategy import Progressive
from entprog.supernet import SEARCHES, TIMING_STEPS, _race_shares, literal, paired, race


class Toy:
    """A run whose loss falls at a known rate per step for each candidate, for a known price."""

    def __init__(self, rates, costs):
        self.rates, self.costs = rates, costs
        self.p = torch.nn.Parameter(torch.tensor(10.0))
        self.optimizer = torch.optim.SGD([self.p], lr=1.0)
        self.now = None
        self.trained = []

    def cost(self, candidate):
        return self.costs[candidate]

    estimate = cost

    def switch(self, candidate):
        self.now = candidate

    def train(self, start, steps):
        self.trained.append((self.now, start, steps))
        with torch.no_grad():
            self.p -= steps * self.rates[self.now]

    def losses(self):
        return self.p.detach() + torch.linspace(-0.1, 0.1, 8)

    def snapshot(self):
        return Snapshot.take([self.p], self.optimizer)


SMALL, MIDDLE, LARGE = Candidate(2), Candidate(4), Candidate(8)
COSTS = {SMALL: 1.0, MIDDLE: 1.5, LARGE: 3.0}


@pytest.mark.parametrize("best", COSTS)
def test_race_finds_the_candidate_with_the_largest_drop_per_second(best):
    rates = {c: 0.01 * COSTS[c] * (2 if c == best else 1) for c in COSTS}
    result = race(Toy(rates, COSTS), list(COSTS), seconds=400)
    assert result.chosen == best


@pytest.mark.parametrize("best", COSTS)
def test_paired_finds_it_too_and_literal_always_takes_the_cheapest(best):
    rates = {c: 0.01 * COSTS[c] * (2 if c == best else 1) for c in COSTS}
    assert paired(Toy(rates, COSTS), list(COSTS), seconds=400).chosen == best
    degenerate = literal(Toy(rates, COSTS), list(COSTS), seconds=400)
    assert degenerate.chosen == SMALL
    drops = {e["efficiency"] * e["seconds"] for e in degenerate.rungs[0]["entries"]}
    assert max(drops) - min(drops) < 1e-4, "every candidate is credited with the same change of the loss"


def test_race_spends_its_budget_and_goes_on_from_the_winner():
    rates = {SMALL: 0.01, MIDDLE: 0.06, LARGE: 0.03}
    toy = Toy(rates, COSTS)
    result = race(toy, list(COSTS), seconds=400)
    spent = sum(steps * COSTS[c] for c, _, steps in toy.trained)
    assert 0.8 * 400 < spent <= 400 - TIMING_STEPS * sum(COSTS.values())
    assert toy.now == MIDDLE
    assert toy.p.item() == pytest.approx(10 - 0.06 * result.steps, rel=1e-5)
    assert result.rungs[0]["entries"][1]["steps"] >= 8
    final = {e["active"]: e for e in result.rungs[-1]["entries"]}
    assert final[4]["efficiency"] == pytest.approx(0.06 / 1.5, rel=0.05)


def test_candidates_see_the_same_batches_and_equal_seconds():
    toy = Toy(dict.fromkeys(COSTS, 0.01), COSTS)
    race(toy, list(COSTS), seconds=400)
    first = toy.trained[:3]
    assert {start for _, start, _ in first} == {0}
    seconds = [steps * COSTS[c] for c, _, steps in first]
    assert max(seconds) - min(seconds) <= max(COSTS.values())


def test_a_tie_at_the_last_rung_goes_to_the_cheaper():
    rates = {SMALL: 0.01, LARGE: 0.03}
    result = race(Toy(rates, {SMALL: 1.0, LARGE: 3.0}), [SMALL, LARGE], seconds=300)
    assert result.chosen == SMALL and "tie" in result.note


def test_a_short_budget_races_the_ends_or_nothing():
    toy = Toy(dict.fromkeys(COSTS, 0.01), COSTS)
    ends = race(toy, list(COSTS), seconds=2 * 8 * 3.0 + TIMING_STEPS * 4.0)
    assert {(e["active"]) for e in ends.rungs[0]["entries"]} == {2, 8} and "only smallest" in ends.note
    assert race(toy, list(COSTS), seconds=20) is None


@pytest.mark.parametrize("search", [race, paired, literal])
@pytest.mark.parametrize("diverging", [[SMALL], [LARGE, MIDDLE], [SMALL, MIDDLE, LARGE]])
def test_a_candidate_that_diverges_never_wins(search, diverging):
    toy = Toy({c: math.nan if c in diverging else 0.01 for c in COSTS}, COSTS)
    result = search(toy, list(COSTS), 400)
    assert "diverged" in result.note and result.rungs
    if search is race and len(diverging) < 3:
        assert result.chosen == next(c for c in (SMALL, MIDDLE) if c not in diverging)
        assert toy.p.item() == pytest.approx(10 - 0.01 * result.steps, rel=1e-5)
    else:  # of one trajectory nothing is left
        assert result.chosen is None and result.steps == 0 and toy.p.item() == 10


def test_skipping_candidates_are_judged_with_the_blocks_back():
    out, back = Candidate(4, 4), Candidate(4, 0)
    toy = Toy({out: 0.05, back: 0.01}, {out: 0.5, back: 1.0})
    race(toy, [back, out], seconds=200)
    probes = [call for call, following in itertools.pairwise(toy.trained) if call[0] == out and following[0] == back]
    assert probes, "after training with blocks out, some steps run with them back before the loss is measured"


@pytest.mark.parametrize("count", range(2, 9))
def test_race_shares_is_what_the_rungs_add_up_to(count):
    total, extra, rung = 0, [], count
    while rung > 1:
        extra.append(1 if not extra else 2 ** (len(extra) - 1))
        total += rung * extra[-1]
        rung = -(-rung // 2)
    assert _race_shares(count) == total


def test_snapshot_restores_weights_moments_and_deletes_newer_state():
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([p, q], lr=0.1)
    p.sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    weight, moment = p.detach().clone(), optimizer.state[p]["exp_avg"].clone()
    kept = Snapshot.take([p, q], optimizer)
    (p.sum() + q.sum()).backward()
    optimizer.step()
    kept.restore()
    assert torch.equal(p, weight) and torch.equal(optimizer.state[p]["exp_avg"], moment)
    assert optimizer.state[p]["step"] == 1 and q not in optimizer.state
    assert p.grad is None


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("count", [1, 3, 12, 40])
def test_schedules_stay_within_the_blocks(name, count):
    settings = Progressive(schedule=name, skip=0.5)
    previous = None
    for stage in range(4):
        previous = SCHEDULES[name](stage, 4, count, settings, previous, lambda options: options[-1])
        assert 1 <= previous.active <= count
        assert 0 <= previous.skipped < count


def test_linear_ends_with_all_blocks_and_never_shrinks():
    sizes = [SCHEDULES["linear"](k, 4, 12, Progressive(), None, None).active for k in range(4)]
    assert sizes == [3, 6, 9, 12]


def test_candidates_are_nested_and_skipping_never_grows():
    settings = Progressive(skip=0.5)
    every = candidates(12, settings, None)
    assert {c.active for c in every} == {2, 3, 6, 9, 12}
    assert {c.skipped for c in every} == {0, 3, 6}
    later = candidates(12, settings, Candidate(6, 3))
    assert min(c.active for c in later) == 6 and max(c.skipped for c in later) == 3
    assert Candidate(6, 3) in later, "staying is allowed"
    assert {c.skipped for c in candidates(12, Progressive(), None)} == {0}


def test_every_row_of_the_tables_is_a_choice_and_other_words_are_refused():
    for schedule in SCHEDULES:
        for search in SEARCHES:
            assert Progressive(schedule=schedule, search=search)
    for field in ("schedule", "search", "priority", "frozen", "stem", "rescore"):
        with pytest.raises(ValueError, match="choose one of"):
            Progressive(**{field: "nonsense"})
