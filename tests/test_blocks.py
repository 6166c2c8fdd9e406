"""Discovery and exact skipping, on every family."""

import copy

import pytest
import torch
from conftest import Plain, Residual, first
from torch import nn

from entprog.blocks import find_blocks, record_example
from entprog.modes import mode_of, set_active, skip


@torch.no_grad()
def test_skip_equals_zeroing_the_residual_branch(family):
    model, inputs = family
    model.eval()
    for block in find_blocks(model, inputs):
        with skip(block):
            skipped = first(model(**inputs))
        saved = copy.deepcopy(block.module.state_dict())
        for p in block.module.parameters():
            p.zero_()
        zeroed = first(model(**inputs))
        block.module.load_state_dict(saved)
        assert torch.equal(skipped, zeroed)
        assert not torch.equal(skipped, first(model(**inputs))), "the block does something, so skipping it must show"


@torch.no_grad()
def test_skip_equals_removing_the_block(family):
    model, inputs = family
    model.eval()
    for block in find_blocks(model, inputs):
        parent, _, index = block.name.rpartition(".")
        shorter = copy.deepcopy(model)
        del shorter.get_submodule(parent)[int(index)]
        with skip(block):
            assert torch.equal(first(model(**inputs)), first(shorter(**inputs)))


def test_blocks_come_in_execution_order_without_duplicates_or_sub_blocks(family):
    model, inputs = family
    blocks = find_blocks(model, inputs)
    called = []
    handles = [b.module.register_forward_hook(lambda m, a, o: called.append(m)) for b in blocks]
    model(**inputs)
    for handle in handles:
        handle.remove()
    assert [b.module for b in blocks] == called
    assert [b.index for b in blocks] == list(range(len(blocks)))
    names = [b.name for b in blocks]
    assert not any(a != b and a.startswith(f"{b}.") for a in names for b in names)
    assert names == [b.name for b in find_blocks(model)], "these families register blocks in the order they run"


def test_unverified_blocks_are_verified_at_first_use(family):
    model, inputs = family
    model.eval()
    with torch.no_grad():
        for verified, block in zip(find_blocks(model, inputs), find_blocks(model), strict=True):
            assert block.outputs is None
            with skip(verified):
                expected = first(model(**inputs))
            with skip(block):
                assert torch.equal(first(model(**inputs)), expected)
            assert block.outputs == verified.outputs


def test_flux_returns_its_streams_in_the_other_order():
    from conftest import ZOO

    model, inputs = ZOO["flux"]()
    for block in find_blocks(model, inputs):
        assert [slot[0] for slot in block.outputs.slots] == ["encoder_hidden_states", "hidden_states"]


class Swapped(nn.Module):
    """Takes (a, b) and returns (b, a): equal inputs must not hide the order."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = Residual(4), Residual(4)

    def forward(self, a, *, b):
        return self.g(b), self.f(a)


class TwoStreams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Swapped() for _ in range(3))

    def forward(self, x):
        a, b = x, x
        for layer in self.layers:
            b, a = layer(a, b=b)
        return a + 2 * b


def test_equal_streams_are_told_apart():
    blocks = find_blocks(TwoStreams(), {"x": torch.ones(2, 4)})
    assert [b.outputs.slots for b in blocks] == [(("b", None), ("a", None))] * 3


def test_blocks_inside_a_wrapper_are_found():
    wrapper = nn.Module()
    wrapper.net = Plain()
    wrapper.forward = lambda x: wrapper.net(x)
    assert [b.name for b in find_blocks(wrapper)] == [f"net.blocks.{i}" for i in range(4)]


def test_blocks_that_are_not_residual_are_refused():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    with pytest.raises(ValueError, match=r"no residual blocks found in Sequential.*refused"):
        find_blocks(model, {"input": torch.randn(2, 4)})
    with pytest.raises(ValueError, match="no residual blocks"):
        find_blocks(nn.Linear(2, 2))
    unverified = find_blocks(model)
    with pytest.raises(ValueError, match=r"block 0 .* is not residual"), skip(unverified[0]):
        model(torch.randn(2, 4))
    assert "forward" not in vars(model[0]), "restored even after an error"


def test_names_are_matched_whole_never_as_substrings():
    model = Plain(depth=12)
    blocks = find_blocks(model)
    set_active(blocks, ["blocks.1"])
    assert [b.name for b in blocks if mode_of(b) == "train"] == ["blocks.1"]
    with pytest.raises(ValueError, match=r"no block is called \['blocks.99'\]"):
        set_active(blocks, ["blocks.99"])


def test_skip_restores_an_earlier_instance_forward_and_state_dict_keys():
    model = Plain()
    keys = list(model.state_dict())
    original = model.blocks[1].forward
    model.blocks[1].forward = lambda x: original(x) * 1.0
    kept = model.blocks[1].forward
    block = find_blocks(model)[1]
    with skip(block):
        assert list(model.state_dict()) == keys
        model(torch.randn(1, 8))
    assert model.blocks[1].forward is kept


def test_a_copy_of_a_skipping_model_runs_its_own_weights():
    model = Plain()
    x = torch.randn(3, 8)
    blocks = find_blocks(model, {"x": x})
    set_active(blocks, ["blocks.0"], frozen="bypass")
    copied = copy.deepcopy(model)
    before = model(x)
    with torch.no_grad():
        for p in copied.parameters():
            p.mul_(2)
    assert torch.equal(model(x), before)
    assert not torch.equal(copied(x), before)


def test_recorded_example_reproduces_the_call(family):
    model, inputs = family
    example = record_example(model, lambda: model(**inputs))
    assert [b.name for b in find_blocks(model, example)] == [b.name for b in find_blocks(model, inputs)]
