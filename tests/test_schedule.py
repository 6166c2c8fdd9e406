"""Shares of blocks become counts by size; equal sizes count as plain numbers do."""

import math

import pytest

from entprog.blocks import Block
from entprog.schedule import SCHEDULES, Candidate, at_least_one, at_most, block_sizes, candidates
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
    for name in ("fixed", "linear"):
        chosen = [SCHEDULES[name](k, 4, sizes, settings, None, None) for k in range(4)]
        assert all(c.active + c.skipped <= len(sizes) for c in chosen)
        assert [c.active for c in chosen] == sorted(c.active for c in chosen)
    assert chosen[-1] == Candidate(8, 0)
    assert all(c.active + c.skipped <= len(sizes) for c in candidates(sizes, settings, None))


def test_sizes_are_parameters_in_the_order_of_the_names():
    from torch import nn

    blocks = [Block(0, "a", nn.Linear(2, 3)), Block(1, "b", nn.Linear(1, 1))]
    assert block_sizes(blocks, ["b", "a", "b"]) == [2, 9, 2]
