"""Every row of PRIORITIES: a finite score per block, nothing left behind, and what each is supposed to measure."""

import copy

import pytest
import torch
from conftest import Plain, first, trained_by
from torch import nn
from zoo import build

from entprog.blocks import batch_size, find_blocks, first_tensor
from entprog.measure import PeakBytes
from entprog.modes import mode_of, skip
from entprog.priority import PRIORITIES, agreement, samples, score


@pytest.mark.parametrize("name", PRIORITIES)
def test_each_priority_scores_every_block_and_leaves_the_model_as_it_was(family, name):
    model, inputs = family
    blocks = find_blocks(model, inputs)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    requires = [p.requires_grad for p in model.parameters()]
    batch = dict(inputs)

    def predict(m, b):
        return first(m(**b))

    def loss(m, b):
        return trained_by(b)(m).mean()

    scores = score(model, blocks, predict, [batch, batch, batch], name, loss_fn=loss)
    names = [b.name for b in blocks]
    assert sorted(scores.ranking) == sorted(names) and list(scores.values) == names
    assert all(torch.isfinite(torch.tensor(v)) for v in scores.values.values())
    assert [scores.values[n] for n in scores.ranking] == sorted(scores.values.values(), reverse=True)
    assert all(low <= scores.values[n] + 1e-9 and scores.values[n] <= high + 1e-9
               for n, (low, high) in scores.intervals.items())  # fmt: skip
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert requires == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert {mode_of(b) for b in blocks} == {"train"}


def test_oracle_is_the_drop_after_training_only_that_block():
    model = Plain()
    train, held_out = torch.randn(8, 5, 8), torch.randn(8, 5, 8)

    def loss(m, b):
        return m(b).square().mean()

    blocks = find_blocks(model, {"x": train})
    scores = score(model, blocks, lambda m, b: m(b), [train, held_out], "oracle", loss_fn=loss)
    for block in blocks:
        other = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(other.get_submodule(block.name).parameters(), lr=1e-3)
        for _ in range(20):
            loss(other, train).backward()
            optimizer.step()
            other.zero_grad(set_to_none=True)
        drop = loss(model, held_out) - loss(other, held_out)
        assert scores.values[block.name] == pytest.approx(drop.item(), rel=1e-4)


def test_loss_priority_is_the_rise_of_the_loss():
    model, x = Plain(), torch.randn(4, 5, 8)
    blocks = find_blocks(model, {"x": x})
    scores = score(model, blocks, lambda m, b: m(b), [x], "loss", loss_fn=lambda m, b: m(b).square().mean())
    with torch.no_grad(), skip(blocks[2]):
        without = model(x).square().mean()
    with torch.no_grad():
        assert scores.values["blocks.2"] == pytest.approx(float(without - model(x).square().mean()), abs=1e-6)


def test_gain_is_positive_for_a_block_with_a_consistent_gradient():
    model, x = Plain(), torch.randn(16, 5, 8)
    blocks = find_blocks(model, {"x": x})
    scores = score(model, blocks, lambda m, b: m(b), [x, x], "gain", loss_fn=lambda m, b: m(b).square().mean())
    assert all(v > 0 for v in scores.values.values()), "the same batch twice: every Adam step lowers it"
    with pytest.raises(ValueError, match="at least 2 batches"):
        score(model, blocks, lambda m, b: m(b), [x], "gain", loss_fn=lambda m, b: m(b).square().mean())


def held_all(model, blocks, loss, batches):
    """gain the slow, obvious way: every batch's gradients held at once."""
    grads = []
    for batch in batches:
        model.zero_grad(set_to_none=True)
        loss(model, batch).backward()
        grads.append([[p.grad.clone() for p in b.parameters()] for b in blocks])
    model.zero_grad(set_to_none=True)
    sizes = [sum(p.numel() for p in b.parameters()) for b in blocks]
    values = {}
    for b, block in enumerate(blocks):
        rows = []
        for i, own in enumerate(grads):
            others = [torch.cat([g.flatten() for g in o[b]]) for j, o in enumerate(grads) if j != i]
            stack = torch.stack(others)
            step = stack.mean(0) / (stack.square().mean(0).sqrt() + 1e-8)
            rows.append(torch.dot(torch.cat([g.flatten() for g in own[b]]), step))
        values[block.name] = float(torch.stack(rows).mean()) * sum(sizes) / len(sizes) / sizes[b]
    return values


def test_gain_holds_the_same_however_many_batches():
    torch.manual_seed(0)
    model = Plain(width=64)
    blocks = find_blocks(model, {"x": torch.randn(1, 1, 64)})
    batches = [{"x": torch.randn(1, 1, 64) * 1.5**i} for i in range(12)]  # of very different size

    def loss(m, b):
        return m(b["x"]).square().mean()

    peaks = {}
    for n in (3, 12):
        with PeakBytes() as live:
            scores = score(model, blocks, lambda m, b: m(b["x"]), batches[:n], "gain", loss_fn=loss)
        peaks[n] = live.peak
        assert scores.values == pytest.approx(held_all(model, blocks, loss, batches[:n]), rel=1e-3)
    copy_of_all = 4 * sum(p.numel() for b in blocks for p in b.parameters())
    assert peaks[12] < 1.05 * peaks[3] < 8 * copy_of_all


@pytest.mark.parametrize("running", [True, False])
def test_scores_by_gradients_know_batch_norm(running):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(8, track_running_stats=running), nn.Linear(8, 8)

        def forward(self, x):
            return x + self.linear(self.norm(x))

    model = nn.Module()
    model.blocks = nn.ModuleList(Normed() for _ in range(3))
    model.forward = lambda x: model.blocks[2](model.blocks[1](model.blocks[0](x)))
    batches = [{"x": torch.randn(4, 8)} for _ in range(3)]
    blocks = find_blocks(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for name in ("gain", "grad_norm"):
        scores = score(model, blocks, None, batches, name, loss_fn=lambda m, b: m.forward(b["x"]).square().mean())
        assert len(scores.values) == 3
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "running statistics too"
    assert all(m.training for m in model.modules())


def test_a_loss_that_fails_leaves_gradients_and_batch_norm_as_they_were():
    model = nn.Sequential(body := Plain(depth=2), nn.BatchNorm1d(8))
    blocks = find_blocks(body)
    pending = {p: torch.ones_like(p) for b in blocks for p in b.parameters()}
    for p, grad in pending.items():
        p.grad = grad

    def fails(model, batch):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        score(model, blocks, None, [{"x": torch.randn(4, 8)}] * 2, "gain", loss_fn=fails)
    assert all(p.grad is grad for p, grad in pending.items()) and model[-1].training


def test_position_orders():
    blocks = find_blocks(Plain(depth=8))

    def order(name):
        return [int(n.split(".")[1]) for n in score(None, blocks, None, [], name).ranking]

    assert order("first") == list(range(8)) and order("last") == list(range(7, -1, -1))
    assert order("stride") == [0, 4, 2, 6, 1, 5, 3, 7]
    assert order("random") == order("random") != list(range(8))


def test_missing_loss_and_unknown_priority_are_said():
    model = Plain()
    blocks = find_blocks(model)
    with pytest.raises(ValueError, match="needs loss_fn"):
        score(model, blocks, lambda m, b: m(b), [torch.randn(2, 8)], "grad_norm")
    with pytest.raises(ValueError, match=r"priority 'entropy' is unknown: choose one of .*'cei'"):
        score(model, blocks, lambda m, b: m(b), [torch.randn(2, 8)], "entropy")
    with pytest.raises(ValueError, match="no batch"):
        score(model, blocks, lambda m, b: m(b), [])


def test_agreement_of_a_score_with_itself_is_one():
    blocks = find_blocks(Plain(depth=6))
    a, b = score(None, blocks, None, [], "first"), score(None, blocks, None, [], "last")
    assert agreement(a, a) == {"spearman": pytest.approx(1), "kendall": pytest.approx(1)}
    assert agreement(a, b)["spearman"] == pytest.approx(-1)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "UNetMotionModel", "FluxTransformer2DModel"])
def test_block_influence_is_one_number_a_sample_whatever_the_stream(name):
    model, inputs = build(name)
    blocks = find_blocks(model, inputs)
    scores = score(model, blocks, lambda m, b: first_tensor(m(**b)), [inputs], "block_influence")
    assert scores.samples == batch_size(inputs) and all(0 <= v <= 2 for v in scores.values.values())
    with torch.no_grad():
        for p in blocks[1].parameters():
            p.zero_()
    again = score(model, blocks, lambda m, b: first_tensor(m(**b)), [inputs], "block_influence")
    assert again.values[blocks[1].name] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", ["cei", "loss", "block_influence", "grad_norm", "gain"])
def test_every_batch_draws_noise_of_its_own(name):
    model, drawn = Plain(), []

    def loss(m, batch):
        drawn.append(torch.rand(()).item())
        return m(batch).square().mean()

    def predict(m, batch):
        drawn.append(torch.rand(()).item())
        return m(batch)

    x = torch.randn(1, 3, 8)
    score(model, find_blocks(model, {"x": x}), predict, [x, x, x], name, loss_fn=loss)
    assert len(set(drawn)) == 3


def test_a_batch_with_attributes_of_its_own_is_not_taken_apart():
    class Batch(dict):
        __getattr__ = dict.__getitem__

    assert len(samples({"x": torch.zeros(3, 2)})) == 3
    (whole,) = samples(Batch(x=torch.zeros(3, 2)))
    assert whole.x.shape == (3, 2)


def test_an_interrupted_oracle_puts_the_weights_back():
    model, calls = Plain(), []
    start = [p.detach().clone() for p in model.parameters()]

    def loss_fn(model, batch):
        calls.append(batch)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return model(batch).square().mean()

    with pytest.raises(KeyboardInterrupt):
        score(model, find_blocks(model), first, [torch.randn(2, 5, 8)] * 2, "oracle", loss_fn=loss_fn)
    assert all(map(torch.equal, model.parameters(), start))
