"""Figures, batches and the swap metric."""

import pytest
import torch

from entprog.data.batches import _generator, _rows_at, batch_at, fixed_batches
from entprog.data.synthetic import figures, swapped
from entprog.metrics.swap import pose_obeyed, reference_obeyed, swap_scores


def test_a_clip_depends_on_seed_and_index_alone():
    many, few = figures(6, size=16, frames=3), figures(2, size=16, frames=3, start=3)
    assert all(torch.equal(many[k][3:5], few[k]) for k in many)
    other = figures(6, size=16, frames=3, seed=1)
    assert not any(torch.equal(many["video"][i], other["video"][i]) for i in range(6))


def test_figures_have_the_documented_shapes_and_ranges():
    clips = figures(3, size=24, frames=4)
    shapes = {"video": (3, 3, 4, 24, 24), "pose": (3, 3, 4, 24, 24), "reference": (3, 3, 24, 24)}
    shapes |= {"keypoints": (3, 4, 17, 3), "masks": (3, 2, 4, 24, 24)}
    assert {k: tuple(v.shape) for k, v in clips.items()} == shapes
    assert clips["video"].min() >= -1 and clips["video"].max() <= 1
    assert clips["pose"].min() >= 0 and clips["pose"].max() <= 1
    assert set(clips["masks"].unique().tolist()) == {0.0, 1.0}


def test_figures_move_and_domains_differ():
    clips = figures(8, size=24, frames=6)
    assert (clips["video"][:, :, 0] - clips["video"][:, :, -1]).abs().mean() > 0.01

    def saturation(domain):
        rgb = (figures(32, size=24, frames=1, domain=domain)["video"] + 1) / 2
        masks = figures(32, size=24, frames=1, domain=domain)["masks"][:, :1]
        spread = rgb.amax(1, keepdim=True) - rgb.amin(1, keepdim=True)
        return float((spread * masks).sum() / masks.sum())

    assert saturation("target") > saturation("source") + 0.15
    with pytest.raises(ValueError, match="choose one of"):
        figures(1, domain="cartoon")


def test_the_pose_map_lies_on_the_figure():
    clips = figures(16, size=32, frames=2)
    background = clips["video"][:, :, :, :1, :1]
    on_figure = (clips["video"] - background).abs().amax(1) > 0.1
    drawn = clips["pose"].amax(1) > 0.5
    above_floor = torch.zeros_like(drawn)
    above_floor[..., :24, :] = True
    inside = (drawn & on_figure & above_floor).sum() / (drawn & above_floor).sum()
    assert inside > 0.8


def test_swapped_truths_share_what_they_should():
    clips, other_pose, other_reference = swapped(4, size=24, frames=3)
    assert torch.equal(other_pose["reference"], clips["reference"])
    assert torch.equal(other_reference["reference"], clips["reference"].roll(-1, 0))
    assert not torch.equal(other_pose["video"], clips["video"])


def test_swap_scores_are_perfect_for_the_truth_and_chance_for_blind_generators():
    clips, other_pose, other_reference = swapped(48, size=24, frames=2, seed=3)
    truths = {id(d["pose"]): d["video"] for d in (clips, other_pose, other_reference)}
    perfect = swap_scores(
        lambda pose, reference: truths.get(id(pose), clips["video"]), clips, other_pose, other_reference
    )
    assert perfect["model"]["pose_swap"] == 1 and perfect["model"]["reference_swap"] == 1
    for chance in ("pose_swap", "reference_swap"):
        assert 0.25 < perfect["shuffled"][chance] < 0.75
    blind = swap_scores(lambda pose, reference: torch.zeros_like(clips["video"]), clips, other_pose, other_reference)
    assert 0.2 < blind["model"]["pose_swap"] < 0.8
    assert not pose_obeyed(clips["video"], other_pose["video"], clips["video"]).any()
    assert not reference_obeyed(clips["video"], clips | {"masks": clips["masks"]}, clips).any()
    two = [{k: v[:2] for k, v in d.items()} for d in (clips, other_pose, other_reference)]
    with pytest.raises(ValueError, match="three or more"):
        swap_scores(lambda pose, reference: two[0]["video"], *two)


def test_every_clip_comes_once_an_epoch_and_batches_repeat_exactly():
    data = {"video": torch.arange(10.0).view(10, 1, 1, 1, 1), "pose": torch.zeros(10, 3, 1, 1, 1)}
    seen = torch.cat([batch_at(data, p, batch_size=2, seed=1)["video"].flatten() for p in range(5)])
    assert sorted(seen.tolist()) == list(range(10))
    a, b = (batch_at(data, 7, batch_size=2, seed=1) for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    c = batch_at(data, 8, batch_size=2, seed=1)
    assert not torch.equal(a["t"], c["t"])
    with pytest.raises(ValueError, match="lower batch_size"):
        batch_at(data, 0, batch_size=11, seed=1)


def rows_listed(buckets, position, batch_size, seed):
    """The slow, obvious way: list the whole epoch, take one batch of it."""
    epoch, index = divmod(position, sum(len(bucket) // batch_size for bucket in buckets))
    generator = _generator(seed, 1, epoch)
    orders = [[bucket[i] for i in torch.randperm(len(bucket), generator=generator).tolist()] for bucket in buckets]
    batches = [o[i : i + batch_size] for o in orders for i in range(0, len(o) - batch_size + 1, batch_size)]
    return batches[torch.randperm(len(batches), generator=generator)[index] if len(buckets) > 1 else index]


@pytest.mark.parametrize("sizes", [(11,), (5, 2, 8)])
def test_a_batch_holds_the_rows_of_the_listed_epoch_without_listing_it(sizes, monkeypatch):
    rows = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(9)).split(sizes)
    buckets = [range(11)] if len(sizes) == 1 else [part.tolist() for part in rows]
    monkeypatch.setattr("entprog.data.batches._buckets", lambda data: buckets)
    drawn, randperm = [], torch.randperm
    for position in (0, 1, 2, 13, 3, 14, 40):
        expected = rows_listed(buckets, position, 3, 7)
        monkeypatch.setattr(torch, "randperm", lambda *a, **k: drawn.append(a) or randperm(*a, **k))
        assert _rows_at({}, position, 3, 7) == expected
        monkeypatch.setattr(torch, "randperm", randperm)
    assert len(drawn) == 4 * (len(sizes) + (len(sizes) > 1)), "four epochs: each is shuffled once"


def test_conditions_are_dropped_at_the_asked_rate():
    data = figures(4, size=8, frames=1)
    kept = [set(batch_at(data, p, batch_size=1, seed=0, condition_dropout=0.3)) for p in range(300)]
    for condition in ("pose", "reference"):
        assert 0.2 < sum(condition not in k for k in kept) / 300 < 0.4


def test_batches_share_the_noise_of_a_clip_s_frames():
    data = figures(4, size=8, frames=3)
    for noise in (
        batch_at(data, 0, batch_size=4, seed=0, shared_noise=1.0)["noise"],
        fixed_batches(data, batch_size=4, shared_noise=1.0)[0]["noise"],
    ):
        assert torch.equal(noise[:, :, :1].expand_as(noise), noise) and not torch.equal(noise[0], noise[1])
    own, plain = (batch_at(data, 0, batch_size=4, seed=0, **more)["noise"] for more in ({"shared_noise": 0.0}, {}))
    assert torch.equal(own, plain)


def test_held_out_times_are_spread_evenly():
    batches = fixed_batches(figures(8, size=8, frames=1), batch_size=3)
    t = torch.cat([b["t"] for b in batches])
    assert torch.allclose(t.sort().values, (torch.arange(8) + 0.5) / 8)
    assert [len(b["video"]) for b in batches] == [3, 3, 2]
