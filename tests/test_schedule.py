"""Shares of blocks become counts by size; equal sizes count as plain numbers do."""

import itertools
import math

import pytest

from entprog.blocks import Block
from entprog.schedule import (
    RESTORES,
    SCHEDULES,
    UNSEARCHED,
    Candidate,
    at_least_one,
    at_most,
    block_sets,
    block_sizes,
    candidates,
    periods,
    rotated,
    still_out,
)
from entprog.strategy import Progressive

SHARES = [k / 40 for k in range(1, 41)]


@pytest.mark.parametrize("count", [1, 2, 5, 12, 30, 40])
def test_equal_sizes_count_as_plain_numbers(count):
    for share in SHARES:
        for sizes in (count, [7] * count):
            assert at_least_one(share, sizes) == min(count, max(1, round(share * count)))
            assert at_most(share, sizes) == math.floor(share * count)
    settings = Progressive(skip=0.5, active_share=0.3)
    assert candidates([3] * count, settings, None) == candidates(count, settings, None)
    for name in ("fixed", "linear"):
        for stage in range(4):
            equal = SCHEDULES[name](stage, 4, [3] * count, settings, None, None)
            assert equal == SCHEDULES[name](stage, 4, count, settings, None, None)


def test_nearly_equal_sizes_count_like_equal_ones():
    """The rule for unequal sizes is continuous: it does not jump where sizes stop being equal."""
    sizes = [1_000_000 + i for i in range(12)]
    for share in SHARES:
        if abs(share * 12 % 1 - 0.5) > 1e-3:
            assert at_least_one(share, sizes) == at_least_one(share, 12)
        if min(share * 12 % 1, 1 - share * 12 % 1) > 1e-3:
            assert at_most(share, sizes) == at_most(share, 12)


def test_large_blocks_first_make_a_smaller_count():
    """HunyuanVideo: 20 double blocks of 340 M parameters and 40 single ones of 142 M."""
    double_first, single_first = [340] * 20 + [142] * 40, [142] * 40 + [340] * 20
    assert at_least_one(0.5, double_first) == 18  # 18 * 340 = 6120 of 12480
    assert at_least_one(0.5, single_first) == 42  # 40 * 142 + 2 * 340 = 6360
    assert at_least_one(0.5, 60) == 30
    assert at_least_one(1.0, double_first) == 60
    assert at_least_one(0.001, double_first) == 1
    assert at_most(0.5, double_first) == 41  # counted from the worst
    assert at_most(0.0, double_first) == 0 and at_most(1.0, double_first) == 60


def test_schedules_grow_to_all_blocks_and_never_overlap_what_sits_out():
    sizes = [340, 142, 142, 340, 340, 142, 142, 142]
    settings = Progressive(skip=0.5)
    names = list("abcdefgh")
    for name in ("fixed", "linear"):
        chosen = [SCHEDULES[name](k, 4, sizes, settings, None, None) for k in range(4)]
        assert [c.active for c in chosen] == sorted(c.active for c in chosen)
        for active, skipped in (block_sets(c, names, names[::2]) for c in chosen):
            assert active and not set(active) & set(skipped) and len(skipped) == chosen[0].skipped
    assert chosen[-1].active == 8
    assert all(c.active + c.skipped <= len(sizes) for c in candidates(sizes, settings, None))


def test_sizes_are_parameters_in_the_order_of_the_names():
    from torch import nn

    blocks = [Block(0, "a", nn.Linear(2, 3)), Block(1, "b", nn.Linear(1, 1))]
    assert block_sizes(blocks, ["b", "a", "b"]) == [2, 9, 2]


@pytest.mark.parametrize("restore", RESTORES)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 6, 20])
@pytest.mark.parametrize("restore_at", [0.3, 0.7, 1.0])
def test_blocks_come_back_at_their_marks_one_way_and_all_of_them(restore, count, restore_at):
    marks = RESTORES[restore](count)
    assert len(marks) == count and marks == sorted(marks) and all(0 < m <= 1 for m in marks)
    assert count == 0 or marks[-1] == 1
    out = [still_out(count, restore, restore_at, k / 1000) for k in range(1001)]
    assert out[0] == count and out == sorted(out, reverse=True)
    assert all(n == 0 for k, n in enumerate(out) if k / 1000 >= restore_at)
    assert all(n > 0 for k, n in enumerate(out) if count and k / 1000 < restore_at - 1e-6)
    for place, mark in enumerate(marks):
        assert still_out(count, restore, restore_at, restore_at * mark) <= count - place - 1
        assert still_out(count, restore, restore_at, restore_at * mark - 1e-6) >= count - place


def test_how_abruptly_blocks_come_back():
    def seen(restore):
        return [still_out(4, restore, 0.8, k / 20) for k in range(20)]

    assert seen("once") == [4] * 16 + [0] * 4
    assert seen("halves") == [4] * 11 + [2] * 5 + [0] * 4  # at .533 and .8
    assert seen("one_by_one") == [4] * 4 + [3] * 4 + [2] * 4 + [1] * 4 + [0] * 4


@pytest.mark.parametrize("active", range(1, 7))
@pytest.mark.parametrize("skipped", range(6))
def test_what_sits_out_is_nested_and_leaves_something_to_train(active, skipped):
    ranking, order = list("abcdef"), list("bdf")
    trains, out = block_sets(Candidate(active, skipped), ranking, order)
    assert len(out) == skipped and trains and not set(trains) & set(out)
    assert trains == [n for n in ranking[:active] if n not in out], "the best train unless they sit out"
    spare = [n for n in ranking if n not in ranking[:active]]
    assert set(spare) <= set(out) or set(out) <= set(spare), "who is not to train sits out first"
    for fewer in range(skipped):
        assert set(block_sets(Candidate(active, fewer), ranking, order)[1]) <= set(out)
    kept = block_sets(Candidate(active, skipped), ranking, order, out[:2])[1]
    assert kept == out[:2], "who is back stays"


@pytest.mark.parametrize("name", UNSEARCHED)
def test_what_is_said_never_to_search_never_does(name):
    """A run by it keeps no clips back: search=None would raise if it were asked."""
    for stages, skip, axes in itertools.product((1, 2, 5), (0.0, 0.5), ("blocks", "blocks,tokens")):
        settings, previous = Progressive(skip=skip, axes=axes, stages=stages), None
        for stage in range(stages):
            previous = SCHEDULES[name](stage, stages, 8, settings, previous, None)


@pytest.mark.parametrize("total", [1, 2, 7, 12, 40])
def test_a_stage_has_periods_enough_for_every_block(total):
    for count, seed in itertools.product(range(1, total + 1), range(3)):
        ranking, waited, trained = [f"b{i}" for i in range(total)], {}, set()
        for period in range(periods(total, count)):
            now = rotated(ranking, count, period, waited, seed)
            waited = {n: 0 if n in now else waited.get(n, 0) + 1 for n in ranking}
            trained |= set(now)
        assert trained == set(ranking), (count, seed)
