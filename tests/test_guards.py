"""Guards: what loops, losses and loaders bring along that would go wrong in silence."""

from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from conftest import Plain

from entprog import guards
from entprog.plugin import EntProg
from entprog.strategy import Progressive


def pair_loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def test_a_loss_may_move_its_batch_and_add_to_it():
    batch = {"x": torch.tensor([[1.0, torch.nan]], dtype=torch.float64), "nested": [torch.zeros(2)]}

    def loss_fn(model, batch):
        batch |= {"x": batch["x"].float(), "cached": torch.ones(2)}
        return batch["cached"]

    guards.check_loss(loss_fn, Plain(), batch)
    with pytest.raises(ValueError, match="changes the batch.*nested"):
        guards.check_loss(lambda m, b: b["nested"][0].add_(1), Plain(), batch)


def test_a_held_out_pair_of_tensors_and_texts_is_one_batch():
    batch = (torch.randn(2, 8), ["a person dances", "a person sings"])
    assert guards.held_out_batches(batch, lambda: iter([batch])) == [batch]


def test_loaders_that_give_nothing_or_would_begin_the_epoch_again_are_refused():
    with pytest.raises(ValueError, match="yields no batch"):
        guards.begun(lambda: iter([]))()
    assert list(guards.begun(lambda: range(3))()) == [0, 1, 2]
    loader = torch.utils.data.DataLoader(range(3), num_workers=1, persistent_workers=True)
    with pytest.raises(ValueError, match="persistent_workers"):
        guards.begun(lambda: iter(loader))()


def test_accelerates_place_in_the_epoch_is_the_loops_own():
    accelerator = Accelerator(cpu=True)
    optimizer, loader = accelerator.prepare(
        torch.optim.SGD(Plain().parameters()), torch.utils.data.DataLoader(range(3))
    )
    ends = []
    for _ in loader:
        with guards.epoch_kept(optimizer):
            assert len(list(loader)) == 3, "as scores read it"
        state = accelerator.gradient_state
        ends.append((state.in_dataloader, state.end_of_dataloader))
    assert ends == [(True, False), (True, False), (True, True)]


def in_steps(model, steps, optimizer=None, clear=True):
    """Train on pairs; `steps`: numbers of steps, or (number, progress)."""
    data = [(torch.randn(4, 3, 8), torch.randn(4, 3, 8)) for _ in range(8)]
    settings = Progressive(priority="last", schedule="linear", stages=2)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    prog = EntProg(model, pair_loss, held_out=data[0], train_batches=lambda: iter(data), total_steps=8,
                   strategy=settings)  # fmt: skip
    for step, *progress in ([s] if isinstance(s, int) else s for s in steps):
        prog.step(step, optimizer, *progress)
        pair_loss(model, data[1]).backward()
        optimizer.step()
        if clear:
            optimizer.zero_grad()
    return prog


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([0, 1, 0], r"prog.step\(0\) after 1.*whole run"),
        ([(0, -0.1)], "progress is -0.1"),
        ([(0, float("nan"))], "progress is nan"),
        ([(0, 0.0), (1, 0.6), (2, 0.1)], "progress is 0.1, and stage 2 has begun at 0.5"),
    ],
)
def test_steps_that_go_back_are_refused(steps, message):
    with pytest.raises(ValueError, match=message):
        in_steps(Plain(), steps)


def test_gradients_that_nobody_clears_are_noticed_at_once_and_not_when_the_stage_changes():
    with pytest.raises(RuntimeError, match="gradients are pending.*when the next stage begins"):
        in_steps(Plain(), [0, 1], clear=False)


def test_gradients_that_the_optimizer_lacks_are_nobodys_to_clear():
    model = Plain()
    prog = in_steps(model, range(8), torch.optim.SGD(model.blocks.parameters(), lr=0.1))
    assert len(prog.active) == 4 and model.head.weight.grad is not None


def test_a_model_that_another_entprog_has_switched_is_refused_until_it_is_released():
    model = Plain()
    for p in model.head.parameters():
        p.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    first = in_steps(model, range(3))
    with pytest.raises(ValueError, match="as another EntProg has left them.*release"):
        in_steps(model, range(3))
    first.release()
    second = in_steps(model, range(3))
    switched = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="as another EntProg has left them"):
        first.step(3, torch.optim.SGD(model.parameters()))
    first.release()  # gives back nothing of the other's
    assert [p.requires_grad for p in model.parameters()] == switched != before
    second.release()
    assert [p.requires_grad for p in model.parameters()] == before


def test_what_an_entprog_has_frozen_that_is_gone_may_train_again():
    model = Plain()
    for p in model.head.parameters():
        p.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    assert not all(p.requires_grad for p in in_steps(model, range(3)).model.blocks.parameters())
    prog = in_steps(model, range(8))
    assert len(prog.active) == 4 and [p.requires_grad for p in model.parameters()] == before


def test_a_state_in_which_other_blocks_train_is_refused():
    saved = in_steps(Plain(), range(8)).state_dict()
    model = Plain()
    model.blocks[1].requires_grad_(False)
    with pytest.raises(ValueError, match="the candidates of the run that was saved"):
        in_steps(model, []).load_state_dict(saved)


def test_blocks_that_their_owner_has_frozen_stay_so_unless_all_are():
    model = Plain()
    model.blocks[1].requires_grad_(False)
    prog = in_steps(model, range(8))
    assert prog.candidates == [b.name for i, b in enumerate(prog.blocks) if i != 1] == prog.active
    everything = Plain()
    everything.requires_grad_(False)
    assert len(in_steps(everything, range(8)).active) == 4


@pytest.mark.parametrize("unscales", [False, True])
def test_a_search_by_scaled_gradients_is_refused(unscales):
    model, data = Plain(), [(torch.randn(4, 3, 8), torch.randn(4, 3, 8)) for _ in range(8)]
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.AdamW(model.parameters())

    def backward(loss):
        scaler.scale(loss).backward()
        if unscales:
            scaler.unscale_(optimizer)
            scaler.update()

    prog = EntProg(
        model, pair_loss, held_out=data[0], train_batches=lambda: iter(data), total_steps=8, backward=backward
    )
    prog.step(0, optimizer)
    with nullcontext() if unscales else pytest.raises(ValueError, match="leaves gradients 65536 times"):
        prog.train(0, 2)


def test_a_search_leaves_no_gradients_for_another_optimizer():
    model = Plain()
    prog = in_steps(model, [0, 1], torch.optim.SGD(model.blocks.parameters(), lr=0.1))
    prog.train(0, 2)
    assert all(p.grad is None for p in model.parameters())
