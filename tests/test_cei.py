"""Conditional Entropy Inflation: exactness, invariances, intervals, stopping."""

import math

import pytest
import torch
from conftest import Plain, first

from entprog.blocks import find_blocks
from entprog.cei import (
    Scores,
    Stop,
    by_skipping,
    cei,
    cei_per_condition,
    gaussian_entropy,
    inflation,
    knn_entropy,
    make_scores,
    plain_predictions,
    suffix_predictions,
    top_stable,
    with_inherited,
    within,
)
from entprog.modes import mode_of, set_active


def predict_with(inputs):
    """A prediction that also draws noise, which must be the same with and without the block."""

    def predict(model, batch):
        prediction = first(model(**inputs))
        return prediction + 0.1 * batch * torch.randn_like(prediction)

    return predict


def test_suffix_reuse_equals_the_plain_way(family):
    model, inputs = family
    blocks = find_blocks(model, inputs)
    for entropy in (gaussian_entropy, knn_entropy):
        fast, slow = (
            by_skipping("x", model, blocks, predict_with(inputs), [1.0, 2.0], inflation(entropy), predictions=way)
            for way in (suffix_predictions, plain_predictions)
        )
        assert fast.values == slow.values and fast.changes == slow.changes and fast.intervals == slow.intervals


def test_suffix_reuse_runs_half_the_blocks(family):
    model, inputs = family
    blocks = find_blocks(model, inputs)
    calls = 0

    def count(module, args, output):
        nonlocal calls
        calls += 1

    handles = [m.register_forward_hook(count) for b in blocks for m in list(b.module.modules())[1:2]]
    cei(model, blocks, predict_with(inputs), [1.0])
    for handle in handles:
        handle.remove()
    n = len(blocks)
    assert calls == n + n * (n - 1) // 2


def test_identity_block_has_score_zero_and_is_named():
    model = Plain()
    with torch.no_grad():
        for p in model.blocks[2].parameters():
            p.zero_()
    x = torch.randn(4, 5, 8)
    scores = cei(model, find_blocks(model, {"x": x}), lambda m, b: m(b), [x])
    assert scores.values["blocks.2"] == 0
    assert scores.zero == ["blocks.2"]


def test_a_block_that_shrinks_the_output_scores_negative_and_cei_is_the_mean_log_ratio():
    model = Plain(depth=2)
    x = torch.randn(6, 5, 8)
    blocks = find_blocks(model, {"x": x})
    scores = cei(model, blocks, lambda m, b: m(b), [x])
    with torch.no_grad():
        full = model(x)
        without = model.head(model.blocks[0](model.embed(x)))
    ratios = [math.log(s.std(correction=0) / f.std(correction=0)) for s, f in zip(without, full, strict=True)]
    assert scores.values["blocks.1"] == pytest.approx(sum(ratios) / 6, abs=1e-6)
    assert scores.share_negative == sum(v < 0 for v in scores.values.values()) / 2
    low, high = scores.intervals["blocks.1"]
    assert low <= scores.values["blocks.1"] <= high


def test_scoring_leaves_model_rng_and_modes_alone(family):
    model, inputs = family
    model.train()
    blocks = find_blocks(model, inputs)
    set_active(blocks, blocks[:1], frozen="bypass")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [mode_of(b) for b in blocks]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    cei(model, blocks, predict_with(inputs), [1.0])
    assert torch.equal(torch.rand(2), expected)
    assert model.training and all(m.training for m in model.modules())
    assert modes == [mode_of(b) for b in blocks]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_scores_do_not_depend_on_which_modes_the_blocks_are_in(family):
    model, inputs = family
    blocks = find_blocks(model, inputs)
    expected = cei(model, blocks, predict_with(inputs), [1.0]).values
    set_active(blocks, [], frozen="skip")
    assert cei(model, blocks, predict_with(inputs), [1.0]).values == expected


def test_per_tau_scores_average_to_the_score():
    model, x = Plain(), torch.randn(8, 5, 8)
    times = torch.linspace(0.01, 0.99, 8)
    scores = cei(model, find_blocks(model, {"x": x}), lambda m, b: m(b), [x], t=lambda b: times)
    assert list(scores.per_tau) == ["0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00"]
    for name, value in scores.values.items():
        assert sum(v[name] for v in scores.per_tau.values()) / 4 == pytest.approx(value, abs=1e-6)


def test_entropy_estimates_follow_scale_and_match_a_gaussian():
    x = torch.randn(2, 3, 40, 500)
    for entropy in (gaussian_entropy, knn_entropy):
        assert torch.allclose(entropy(4 * x) - entropy(x), torch.full((2,), math.log(4.0)), atol=1e-3)
    assert torch.allclose(knn_entropy(x), torch.full((2,), 0.5 * math.log(2 * math.pi * math.e)), atol=0.03)
    uniform = torch.rand(2, 1, 40, 500)  # entropy 0, where a Gaussian of the same variance has 0.176
    assert torch.allclose(knn_entropy(uniform), torch.zeros(2), atol=0.03)


def test_stopping_early_needs_stable_sets_and_keeps_the_ranking():
    clear = torch.tensor([3.0, 2.0, 1.0, 0.0]) + 0.01 * torch.randn(32, 4)
    blurred = torch.randn(32, 4)
    assert top_stable(clear, Stop((1, 2, 3)))
    assert not top_stable(blurred, Stop((1, 2, 3), confidence=0.99))
    assert not top_stable(clear[:8], Stop((1, 2, 3))), "too few samples"
    model, x = Plain(), torch.randn(16, 5, 8)
    blocks = find_blocks(model, {"x": x})
    seen = []

    def batches():
        for i in range(10):
            seen.append(i)
            yield x

    stopped = cei(model, blocks, lambda m, b: m(b), batches(), stop=Stop((1,), confidence=0.5))
    assert stopped.stopped_early and len(seen) < 10
    assert set(stopped.ranking) == {b.name for b in blocks}


def test_conditions_are_scored_apart():
    model, x = Plain(), torch.randn(4, 5, 8)
    blocks = find_blocks(model, {"x": x})
    ways = {"all": lambda m, b: m(b), "without": lambda m, b: m(0 * b + torch.randn_like(b))}
    found = cei_per_condition(model, blocks, ways, [x])
    assert found.keys() == ways.keys()
    assert found["all"].values != found["without"].values


def test_save_and_load_round_trip(tmp_path):
    scores = make_scores("cei", ["a", "b", "c"], torch.randn(5, 3), t=torch.rand(5))
    scores.save(tmp_path / "deep" / "scores.json")
    assert Scores.load(tmp_path / "deep" / "scores.json") == scores


def test_a_model_that_predicts_nan_is_reported_by_block():
    with pytest.raises(ValueError, match=r"not finite for blocks \['b'\]"):
        make_scores("cei", ["a", "b"], torch.tensor([[1.0, float("nan")]]))


def test_zero_initialised_blocks_take_the_place_of_their_host():
    order = [f"b{i}" for i in range(6)]
    values = {"b0": 0.1, "b1": 0.0, "b2": 0.5, "b3": 0.0, "b4": -0.2, "b5": 0.0}
    intervals = {n: (v - 0.01, v + 0.01) for n, v in values.items()}
    ranking = sorted(order, key=lambda n: -values[n])
    scores = Scores("cei", values, intervals, ranking, zero=["b1", "b3", "b5"])
    found = with_inherited(scores, order)
    assert found.inherited == {"b1": "b0", "b3": "b2", "b5": "b4"}
    assert found.ranking == ["b2", "b3", "b0", "b1", "b4", "b5"]  # each behind its host
    assert found.intervals["b3"] == intervals["b2"] and scores.values["b3"] == 0
    first = Scores("cei", values, intervals, ranking, zero=["b0"])
    assert with_inherited(first, order).inherited == {"b0": "b1"}  # nobody before it was measured
    nothing = Scores("cei", dict.fromkeys(order, 0.0), intervals, order, zero=order)
    assert with_inherited(nothing, order) is nothing


class Halves(torch.nn.Module):
    """Two residual blocks, each of which scales one half of the picture."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Scale(half) for half in (0, 1))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Scale(torch.nn.Module):
    def __init__(self, half):
        super().__init__()
        self.half, self.gain = half, torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.gain.weight)

    def forward(self, x):
        mask = torch.zeros(8, device=x.device)
        mask[4 * self.half : 4 * self.half + 4] = 1
        return x + self.gain(x[..., None])[..., 0] * mask


def test_cei_within_a_region_sees_the_blocks_that_work_there():
    model, batch = Halves(), {"x": torch.randn(6, 1, 1, 8, 8)}
    blocks = find_blocks(model, {"x": batch["x"]})

    def predict(m, b):
        return m(b["x"])

    def region(half):
        share = torch.zeros(1, 1, 1, 1, 8)
        share[..., 4 * half : 4 * half + 4] = 0.2  # never half of a place, as a small face
        return lambda b: share.expand(len(b["x"]), 1, 1, 8, 8)

    found = cei_per_condition(model, blocks, {h: within(predict, region(h)) for h in (0, 1)}, [batch])
    for half in (0, 1):
        own, other = (found[half].values[blocks[i].name] for i in (half, 1 - half))
        assert own == pytest.approx(-math.log(2), abs=1e-5) and abs(other) < 1e-6
    with pytest.raises(ValueError, match="does not show the region"):
        within(predict, lambda b: torch.zeros(6, 1, 1, 8, 8))(model, batch)
