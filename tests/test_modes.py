"""What each mode does to outputs, gradients and weights."""

import pytest
import torch
from conftest import Plain, first, trained_by

from entprog.blocks import find_blocks
from entprog.bypass import choose_bypass, choose_skips, fidelity
from entprog.modes import MODES, mode_of, running, set_active, skip


def gradients(model, loss_fn):
    model.zero_grad(set_to_none=True)
    loss_fn(model, None).mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads


@pytest.mark.parametrize("mode", [m for m in MODES if m not in ("train", "skip")])
def test_frozen_modes_do_not_change_the_forward(family, mode):
    model, inputs = family
    model.eval()
    blocks = find_blocks(model, inputs)
    expected = first(model(**inputs)).detach()
    if mode == "bypass_attn" and isinstance(model, Plain):
        with pytest.raises(ValueError, match="no attention module"):
            set_active(blocks, blocks[1:2], frozen=mode)
        return
    set_active(blocks, blocks[1:2], frozen=mode)
    assert torch.equal(first(model(**inputs)), expected)


@pytest.mark.parametrize("trainable_outside", [True, False])
@pytest.mark.parametrize("active", [[0], [2], [1, 2]])
def test_prefix_gradients_are_bit_equal_to_pass(family, active, trainable_outside):
    """Trainable blocks, embedders, guider and the input itself: nothing trainable is ever cut."""
    model, inputs = family
    blocks = find_blocks(model, inputs)
    inside = {id(p) for b in blocks for p in b.parameters()}
    for p in model.parameters():
        p.requires_grad_(trainable_outside or id(p) in inside)
    key = next(k for k, v in inputs.items() if v.is_floating_point() and v.ndim > 1)
    for input_needs_grad in (False, True):
        inputs[key] = inputs[key].detach().requires_grad_(input_needs_grad)
        found = {}
        for mode in ("pass", "prefix"):
            set_active(blocks, [blocks[i] for i in active], frozen=mode)
            found[mode] = gradients(model, trained_by(inputs))
            found[mode]["input"] = inputs[key].grad.clone() if input_needs_grad else torch.zeros(1)
            inputs[key].grad = None
        assert found["pass"].keys() == found["prefix"].keys()
        for name, grad in found["pass"].items():
            assert torch.equal(grad, found["prefix"][name]), name
        wanted = {n for n, p in model.named_parameters() if p.requires_grad}
        if trainable_outside:
            assert {n for n in wanted if n.startswith("blocks.")} <= found["pass"].keys()


def test_pose_guider_and_time_embedder_train_in_front_of_prefix_blocks():
    from conftest import ZOO

    model, inputs = ZOO["pose_dit"]()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    blocks = find_blocks(model, inputs)
    set_active(blocks, [blocks[-1]], frozen="prefix")
    found = gradients(model, trained_by(inputs))
    for name in ("pose_guider.proj_out.weight", "t_embedder.mlp.0.weight", "x_embedder.weight"):
        assert found[name].any(), name


def test_bypass_gradient_is_the_identity_from_stream_to_stream(family):
    model, inputs = family
    blocks = find_blocks(model, inputs)
    set_active(blocks, blocks[-1:], frozen="bypass")
    block = blocks[0]
    streams, outs = [], []
    handle = block.module.register_forward_pre_hook(
        lambda m, a, k: streams.extend(
            v for v in (*a, *k.values()) if isinstance(v, torch.Tensor) and v.requires_grad and v.ndim > 2
        ),
        with_kwargs=True,
    )
    after = block.module.register_forward_hook(
        lambda m, a, o: outs.extend([o] if isinstance(o, torch.Tensor) else list(o))
    )
    model(**inputs)
    handle.remove(), after.remove()
    for out in outs:
        weight = torch.randn_like(out)
        grads = torch.autograd.grad(out, streams, weight, retain_graph=True, allow_unused=True)
        same = [g is not None and g.shape == weight.shape and torch.equal(g, weight) for g in grads]
        assert sum(same) == 1


def test_bypassed_blocks_keep_nothing_for_backward(family):
    from entprog.measure import saved_bytes

    model, inputs = family
    blocks = find_blocks(model, inputs)
    kept = {}
    for mode in ("pass", "bypass"):
        set_active(blocks, blocks[:1], frozen=mode)
        with saved_bytes(ignore=list(model.parameters())) as held:
            loss = trained_by(inputs)(model, None).mean()
            kept[mode] = held()
        del loss
    assert kept["bypass"] < 0.8 * kept["pass"]


def test_frozen_blocks_do_not_move_under_adamw(family):
    model, inputs = family
    blocks = find_blocks(model, inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    trained_by(inputs)(model, None).mean().backward()
    optimizer.step()  # every parameter has state now, the hard case
    optimizer.zero_grad(set_to_none=True)
    set_active(blocks, blocks[:1], frozen="bypass")
    before = {b.name: [p.clone() for p in b.parameters()] for b in blocks}
    for _ in range(3):
        trained_by(inputs)(model, None).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for block in blocks:
        unmoved = all(torch.equal(a, b) for a, b in zip(before[block.name], block.parameters(), strict=True))
        assert unmoved == (block is not blocks[0])


def test_a_block_with_something_trainable_inside_is_never_cut():
    model = Plain()
    x = torch.randn(3, 8)
    blocks = find_blocks(model, {"x": x})
    for mode in ("prefix", "bypass"):
        set_active(blocks, blocks[-1:], frozen=mode)
        model.blocks[0].mlp[0].bias.requires_grad_(True)
        model.embed.requires_grad_(False)
        model(x).sum().backward()
        assert model.blocks[0].mlp[0].bias.grad is not None
        model.zero_grad(set_to_none=True)


def test_pending_gradients_forbid_a_switch():
    model = Plain()
    blocks = find_blocks(model)
    model(torch.randn(2, 8)).sum().backward()
    with pytest.raises(RuntimeError, match="gradient pending"):
        set_active(blocks, blocks[:1])


def test_unknown_modes_are_refused_with_the_choices():
    blocks = find_blocks(Plain())
    with pytest.raises(ValueError, match=r"cannot run in mode \['fast'\].*bypass"):
        set_active(blocks, blocks[:1], frozen="fast")
    with pytest.raises(ValueError, match="train"):
        set_active(blocks, blocks[:1], frozen="train")


def test_set_active_touches_nothing_outside_blocks():
    model = Plain()
    model.embed.requires_grad_(False)
    set_active(find_blocks(model), ["blocks.2"])
    assert not any(p.requires_grad for p in model.embed.parameters())
    assert all(p.requires_grad for p in model.head.parameters())


def test_fidelity_is_one_without_bypass_and_leaves_no_trace(family):
    model, inputs = family
    blocks = find_blocks(model, inputs)
    before = [p.requires_grad for p in model.parameters()], [mode_of(b) for b in blocks]
    exact = fidelity(model, blocks, lambda m, b: trained_by(inputs)(m).mean(), None, blocks[:2], [])
    rough = fidelity(model, blocks, lambda m, b: trained_by(inputs)(m).mean(), None, blocks[:1], blocks[1:])
    assert exact["cosine"] == pytest.approx(1) and exact["norm_ratio"] == pytest.approx(1)
    assert 0 < rough["cosine"] < 1
    assert before == ([p.requires_grad for p in model.parameters()], [mode_of(b) for b in blocks])
    assert all(p.grad is None for p in model.parameters())


def test_bypass_set_is_the_largest_that_meets_the_fidelity(family):
    model, inputs = family
    blocks = find_blocks(model, inputs)

    def loss(m, b):
        return trained_by(inputs)(m).mean()

    order = [b.name for b in blocks[1:]]
    exact = [fidelity(model, blocks, loss, None, blocks[:1], order[:k])["cosine"] for k in range(len(order) + 1)]
    for threshold in (0.0, 0.9, min(exact) + 1e-9):
        chosen, curve = choose_bypass(model, blocks, loss, [None], blocks[:1], order, min_fidelity=threshold)
        assert chosen == order[: len(chosen)]
        assert exact[len(chosen)] >= threshold
        measured = {point["size"]: point["cosine"] for point in curve}
        assert all(measured[size] == pytest.approx(exact[size], abs=1e-9) for size in measured)
        if len(chosen) < len(order) and exact == sorted(exact, reverse=True):
            assert exact[len(chosen) + 1] < threshold
    assert choose_bypass(model, blocks, loss, [None], blocks[:1], order, min_fidelity=1)[0] == []


@torch.no_grad()
def test_skip_order_is_the_greedy_one(family):
    model, inputs = family
    model.eval()
    blocks = find_blocks(model, inputs)
    full = first(model(**inputs))
    order = choose_skips(model, blocks, lambda m, b: first(m(**inputs)), None, 2, keep=blocks[:1])
    chosen = []
    for entry in order:
        changes = {}
        for block in blocks[1:]:
            if block not in chosen:
                with skip([*chosen, block]):
                    out = first(model(**inputs))
                changes[block.name] = float((out - full).square().mean() / full.square().mean())
        assert entry["name"] == min(changes, key=changes.get)
        assert entry["change"] == pytest.approx(changes[entry["name"]], rel=1e-4)
        chosen.append(next(b for b in blocks if b.name == entry["name"]))


def test_running_restores_modes_even_on_error():
    blocks = find_blocks(Plain())
    set_active(blocks, blocks[:1], frozen="bypass")
    before = [mode_of(b) for b in blocks]
    with pytest.raises(ZeroDivisionError), running(blocks, "skip"):
        raise ZeroDivisionError
    assert [mode_of(b) for b in blocks] == before
