"""Optimizer state of what trains only, and steps inside backward that equal plain ones."""

import copy
import gc
import weakref

import pytest
import schedulefree
import torch
from accelerate import Accelerator
from conftest import Plain
from torch import nn

from entprog.blocks import find_blocks
from entprog.frozen import settle_weights
from entprog.modes import set_active
from entprog.optim import KEEP, LOW_BIT, low_bit_optimizers, settle_optimizer, state_bytes, step_in_backward

OPTIMIZERS = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-2, amsgrad=True),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9),
    "RAdam": lambda ps: torch.optim.RAdam(ps, lr=1e-2),
    "Adafactor": lambda ps: torch.optim.Adafactor(ps, lr=1e-2),
}
optimizers = pytest.mark.parametrize("name", list(OPTIMIZERS))


def plain(width=8):
    torch.manual_seed(0)
    model = Plain(width=width)
    return model, find_blocks(model)


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        x = torch.randn(4, model.head.in_features, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def frozen_parameters(blocks):
    return [p for b in blocks for p in b.parameters() if not p.requires_grad]


def equal_states(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


@optimizers
@pytest.mark.parametrize("keep", KEEP)
def test_state_of_frozen_blocks_is_dropped_or_comes_back_bit_for_bit(name, keep):
    model, blocks = plain()
    optimizer = OPTIMIZERS[name](model.parameters())
    groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    members = [[id(p) for p in g["params"]] for g in optimizer.param_groups]
    train(model, optimizer, 3)
    before = {p: copy.deepcopy(s) for p, s in optimizer.state.items()}
    set_active(blocks, blocks[:1])
    frozen = frozen_parameters(blocks)
    for _ in range(2):
        settle_optimizer(optimizer, frozen, keep)
    for p, state in before.items():
        dropped = keep == "drop" and any(p is f for f in frozen)
        assert (p not in optimizer.state) if dropped else equal_states(optimizer.state[p], state)
    set_active(blocks, blocks)
    settle_optimizer(optimizer, [], keep)
    assert all(equal_states(optimizer.state[p], s) for p, s in before.items() if p in optimizer.state)
    assert [[id(p) for p in g["params"]] for g in optimizer.param_groups] == members
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == groups
    train(model, optimizer, 1)
    assert len(optimizer.state) == len(before)


@optimizers
def test_parking_does_not_change_a_run(name):
    results = []
    for keep in (None, "park"):
        model, blocks = plain()
        optimizer = OPTIMIZERS[name](model.parameters())
        for stage, active in enumerate(([0], [1], [0, 1], [0])):
            set_active(blocks, [blocks[i] for i in active])
            if keep:
                settle_optimizer(optimizer, frozen_parameters(blocks), keep)
            train(model, optimizer, 2, start=2 * stage)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*results)


def test_dropped_state_begins_from_nothing():
    model, blocks = plain()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 3)
    set_active(blocks, blocks[1:])
    settle_optimizer(optimizer, frozen_parameters(blocks), "drop")
    fewer = state_bytes(optimizer)["cpu"]
    set_active(blocks, blocks)
    train(model, optimizer, 1)
    weight = blocks[0].module.mlp[0].weight
    assert optimizer.state[weight]["step"] == 1 and optimizer.state[blocks[1].module.mlp[0].weight]["step"] == 4
    made = 2 * sum(p.nbytes for p in blocks[0].parameters()) + 4 * len(blocks[0].parameters())
    assert state_bytes(optimizer)["cpu"] == fewer + made


def test_settling_refuses_pending_gradients_and_unknown_words():
    model, blocks = plain()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="'forget'.*'drop', 'park'"):
        settle_optimizer(optimizer, [], "forget")
    model(torch.randn(2, 8)).sum().backward()
    with pytest.raises(RuntimeError, match="zero_grad"):
        settle_optimizer(optimizer, blocks[0].parameters())


def test_accelerates_wrapper_works():
    model, blocks = plain()
    wrapped, optimizer = Accelerator(cpu=True).prepare(model, torch.optim.AdamW(model.parameters()))
    train(wrapped, optimizer, 2)
    set_active(blocks, blocks[:1])
    settle_optimizer(optimizer, frozen_parameters(blocks), "drop")
    assert not any(p in optimizer.state for p in blocks[1].parameters())
    undo = step_in_backward(optimizer)
    train(wrapped, optimizer, 2)
    undo()
    assert all(optimizer.state[p]["step"] == 4 for p in blocks[0].parameters())


@pytest.mark.parametrize("package", list(LOW_BIT))
def test_low_bit_optimizers_settle_too(package):
    if package not in low_bit_optimizers():
        pytest.skip(f"{package} is not installed")
    if package == "torchao":
        pytest.skip("torchao's step compiles, which takes minutes")
    bnb = pytest.importorskip("bitsandbytes")
    results = []
    for keep in (None, "park"):
        model, blocks = plain(width=64)  # smaller weights get 32-bit state
        optimizer = bnb.optim.AdamW8bit(model.parameters(), lr=1e-3)
        train(model, optimizer, 2)
        before = {p: copy.deepcopy(s) for p, s in optimizer.state.items()}
        assert any("qmap1" in s for s in before.values())
        set_active(blocks, blocks[:1])
        if keep:
            settle_optimizer(optimizer, frozen_parameters(blocks), keep)
        train(model, optimizer, 2, start=2)
        set_active(blocks, blocks)
        if keep:
            settle_optimizer(optimizer, [], keep)
            assert all(equal_states(optimizer.state[p], before[p]) for b in blocks[1:] for p in b.parameters())
        train(model, optimizer, 1, start=4)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*results)


def test_low_bit_optimizers_are_listed_by_what_can_be_imported(monkeypatch):
    assert low_bit_optimizers().keys() <= LOW_BIT.keys()
    monkeypatch.setitem(LOW_BIT, "torch", ("torch.optim", ("AdamW", "NotThere")))
    monkeypatch.setitem(LOW_BIT, "nobody", ("nobody.optim", ("AdamW8bit",)))
    found = low_bit_optimizers()
    assert found["torch"] == ["AdamW"] and "nobody" not in found


@optimizers
@pytest.mark.parametrize("precision", [None, "int8"])
def test_steps_in_backward_equal_plain_steps_bit_for_bit(name, precision):
    """With blocks frozen and thawed on the way, frozen ones at the beginning included."""
    results = []
    for inside in (False, True):
        model, blocks = plain()
        optimizer = OPTIMIZERS[name](model.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (k + 1))
        set_active(blocks, blocks[:1])
        undo = step_in_backward(optimizer) if inside else lambda: None
        alive = []
        for active in ([0], [1, 2], [0, 1, 2, 3]):
            set_active(blocks, [blocks[i] for i in active])
            settle_weights(model, blocks, precision)
            for step in range(2):
                x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
                model(x).square().mean().backward()
                alive.append(sum(p.grad is not None for p in model.parameters()))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
        undo()
        assert any(alive) != inside
        settle_weights(model, blocks, None)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        x = torch.randn(4, 8)
        model(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters())  # undone
    assert torch.equal(*results)


def test_steps_in_backward_never_hold_two_gradients():
    model, _ = plain()
    optimizer = torch.optim.AdamW(model.parameters())
    together = []
    optimizer.register_step_pre_hook(lambda *_: together.append(sum(p.grad is not None for p in model.parameters())))
    undo = step_in_backward(optimizer)
    train(model, optimizer, 2)
    undo()
    count = len(list(model.parameters()))
    assert together == ([1] * count + [0]) * 2  # the loop's own step finds none


def test_a_model_that_was_stepped_in_backward_is_freed_with_its_optimizer():
    model, _ = plain()
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    step_in_backward(optimizer)
    train(model, optimizer, 1)
    left = [weakref.ref(v) for v in (model.head.weight, optimizer)]
    del model, optimizer
    gc.collect()
    assert [ref() for ref in left] == [None, None]


def test_combinations_that_need_all_gradients_are_refused():
    model, _ = plain()
    optimizer = torch.optim.AdamW(model.parameters())

    class Scaler:
        def is_enabled(self):
            return True

    for wrong, says in (
        ({"accumulation_steps": 4}, "accumulation_steps=4"),
        ({"max_grad_norm": 1.0}, r"max_grad_norm=1\.0"),
        ({"scaler": Scaler()}, "GradScaler"),
    ):
        with pytest.raises(ValueError, match=says):
            step_in_backward(optimizer, **wrong)
    step_in_backward(optimizer, scaler=torch.amp.GradScaler("cpu", enabled=False))()
    undo = step_in_backward(optimizer)
    model(torch.randn(2, 8)).sum().backward()
    with pytest.raises(RuntimeError, match="do not accumulate"):
        model(torch.randn(2, 8)).sum().backward()
    undo()
    model.zero_grad(set_to_none=True)
    model(torch.randn(2, 8)).sum().backward()
    with pytest.raises(RuntimeError, match="pending"):
        step_in_backward(optimizer)


def test_optimizers_that_count_in_their_groups_are_refused():
    model, _ = plain()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters())
    optimizer.train()
    undo = step_in_backward(optimizer)
    with pytest.raises(ValueError, match=r"AdamWScheduleFree changes \[.*'k'.*step after backward"):
        model(torch.randn(2, 8)).sum().backward()
    undo()


@pytest.mark.gpu
def test_parked_state_is_on_the_host_and_scalars_stay():
    model, blocks = plain()
    model.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(4, 8, device="cuda")).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    before = {p: copy.deepcopy(s) for p, s in optimizer.state.items()}
    set_active(blocks, blocks[:1])
    settle_optimizer(optimizer, frozen_parameters(blocks))
    parked: nn.Parameter = blocks[1].module.mlp[0].weight
    assert optimizer.state[parked]["exp_avg"].is_pinned() and optimizer.state[parked]["step"].is_cuda
    settle_optimizer(optimizer, [])
    assert all(equal_states(optimizer.state[p], s) for p, s in before.items())
