"""Which blocks may be bypassed: errors of single detours, and sets that keep the new modules' gradient too."""

import pytest
import torch
from conftest import Plain, trained_by
from zoo import build, tensors

from entprog import EntProg, Progressive
from entprog.blocks import find_blocks
from entprog.bypass import choose_bypass, detours, fidelity
from entprog.modes import set_active
from entprog.probe import Arguments


def stream_gradients(model, inputs, block):
    """The gradients of a block's streams through the block alone, by views that only it reads."""
    seen = {}

    def hook(module, args, kwargs):
        named = Arguments(module, args, kwargs)
        streams = [named[slot] for slot in dict.fromkeys(block.outputs.slots) if slot is not None]
        views = {id(x): x.view_as(x) for x in streams if x.requires_grad}
        for i, view in enumerate(views.values()):
            view.register_hook(lambda grad, i=i: seen.__setitem__(i, grad))
        return tuple(views.get(id(a), a) for a in args), {k: views.get(id(v), v) for k, v in kwargs.items()}

    handle = block.module.register_forward_pre_hook(hook, with_kwargs=True)
    sum(t.square().sum() for t in tensors(model(**inputs))).backward()
    handle.remove()
    model.zero_grad(set_to_none=True)
    return seen


def test_a_loss_that_fails_leaves_pending_gradients():
    model = Plain(depth=3)
    blocks, pending = find_blocks(model), {p: torch.ones_like(p) for p in model.parameters()}
    for p, grad in pending.items():
        p.grad = grad

    def fails(model, batch):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fidelity(model, blocks, fails, None, blocks[:1], blocks[1:])
    assert all(p.grad is grad for p, grad in pending.items())


@pytest.mark.parametrize("mode", ["bypass", "bypass_attn"])
@pytest.mark.parametrize("name", ["WanTransformer3DModel", "FluxTransformer2DModel", "UNet2DConditionModel"])
def test_detour_errors_equal_those_of_bypassing_one_block_at_a_time(name, mode):
    model, inputs = build(name)
    blocks = find_blocks(model, inputs)
    set_active(blocks, [], frozen="pass")
    with detours(blocks, mode) as errors:
        sum(t.square().sum() for t in tensors(model(**inputs))).backward()
    model.zero_grad(set_to_none=True)
    assert list(errors) == [b.name for b in blocks]
    for block in blocks[:: max(1, len(blocks) // 6)]:
        exact = stream_gradients(model, inputs, block)
        if mode == "bypass_attn" and not block.attention:
            assert errors[block.name] == 0
            continue
        set_active(blocks, [], frozen={block.name: mode})
        around = stream_gradients(model, inputs, block)
        set_active(blocks, [], frozen="pass")
        assert around.keys() <= exact.keys()  # a stream that ends here has a gradient through the branch only
        wrong = sum((e - around.get(i, torch.zeros_like(e))).square().sum() for i, e in exact.items())
        assert errors[block.name] == pytest.approx(
            float(wrong / sum(e.square().sum() for e in exact.values())), rel=1e-4
        )


def test_blocks_that_no_gradient_passes_have_no_error():
    model, x = Plain(), torch.randn(2, 5, 8)
    blocks = find_blocks(model, {"x": x})
    model.embed.requires_grad_(False)
    set_active(blocks, ["blocks.2"])
    with detours(blocks) as errors:
        model(x).square().sum().backward()
    assert errors["blocks.0"] == errors["blocks.1"] == 0 < min(errors["blocks.2"] + 1, errors["blocks.3"])


def test_by_default_the_harmless_are_bypassed_first():
    """A block that turns its stream around has to keep its gradient, wherever a ranking puts it."""
    torch.manual_seed(0)
    model, inputs = Plain(depth=5), {"x": torch.randn(4, 5, 8)}
    blocks = find_blocks(model, inputs)
    with torch.no_grad():
        for i, block in enumerate(blocks):
            block.module.mlp[2].weight.mul_(10.0 if i == 3 else 0.1)

    def loss(m, b):
        return trained_by(inputs)(m).mean()

    chosen, curve = choose_bypass(model, blocks, loss, [None], ["blocks.0"], min_fidelity=0.98)
    assert set(chosen) == {"blocks.1", "blocks.2", "blocks.4"}
    assert choose_bypass(model, blocks, loss, [None], ["blocks.0"], ["blocks.3"], min_fidelity=0.98)[0] == []
    assert {"size", "cosine", "norm_ratio", "new_modules_cosine"} == set(curve[0])


def entprog_of(model, loss, **settings):
    settings = {"priority": "last", "schedule": "fixed", "active_share": 0.3, "stages": 1, "stem": "never"} | settings
    prog = EntProg(model, loss, held_out=None, train_batches=lambda: iter([None] * 8), total_steps=4,
                   strategy=Progressive(frozen="bypass_attn", **settings), clock="model")  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(4):
        prog.step(step, optimizer)
        loss(model, None).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return prog


@pytest.mark.parametrize(
    "name", ["WanTransformer3DModel", pytest.param("UNet2DConditionModel", marks=pytest.mark.slow)]
)
def test_a_run_cuts_self_attention_where_there_is_any_and_passes_elsewhere(name):
    model, inputs = build(name)

    def loss(m, batch):
        return sum(t.square().mean() for t in tensors(m(**inputs)))

    first = [find_blocks(model, inputs)[0].name]  # everything lies behind it
    prog = entprog_of(model, loss, priority="first", active_share=0.01, min_fidelity=0.1)
    able = {b.name for b in prog.blocks if b.attention}
    assert prog.active == first and able
    assert {n for n, m in prog.modes.items() if m == "bypass_attn"} == able - set(first)
    assert {m for n, m in prog.modes.items() if n not in able} <= {"train", "prefix"}
    state = next(e for e in prog.events if e["event"] == "modes")
    assert state["fidelity"]["cosine"] >= 0.1 and state["fidelity"]["size"] == len(able - set(first))
    assert prog.step_flops(prog.modes) < prog.step_flops(
        {n: m if m == "train" else "pass" for n, m in prog.modes.items()}
    )
    prog.release()
    exact = entprog_of(model, loss, priority="first", active_share=0.01, min_fidelity=0.9999999)
    assert sum(m == "bypass_attn" for m in exact.modes.values()) < len(able - set(first)), "the bound holds"


def test_a_run_without_any_self_attention_is_refused():
    with pytest.raises(
        ValueError, match=r"'bypass_attn' needs blocks with self-attention.*Residual.*'bypass' or 'pass'"
    ):
        entprog_of(Plain(), lambda m, batch: m(torch.ones(2, 5, 8)).square().mean())


def test_new_modules_in_front_bound_the_set_too(family):
    model, inputs = family
    blocks = find_blocks(model, inputs)

    def loss(m, b):
        return trained_by(inputs)(m).mean()

    free, curve = choose_bypass(model, blocks, loss, [None], blocks[:1], min_fidelity=-1)
    assert free and len(free) == len(blocks) - 1
    reached = curve[-1]["new_modules_cosine"]
    bound, _ = choose_bypass(model, blocks, loss, [None], blocks[:1], min_fidelity=-1, min_new_fidelity=reached + 1e-6)
    assert len(bound) < len(free) and bound == free[: len(bound)]
    kept = fidelity(model, blocks, loss, None, blocks[:1], bound)["new_modules_cosine"]
    assert kept >= reached + 1e-6
