"""Discovery and exact skipping, on every family."""

import copy
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import Plain, Residual, first
from torch import nn
from zoo import build, cosmos

from entprog.blocks import Block, find_blocks, forked_rng, record_example
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


# the zoo's hard cases, and blocks that reach outside their stream


def test_modules_beside_the_main_lists_are_not_blocks():
    for name, outsiders in (
        ("AuraFlowTransformer2DModel", ["norm_out"]),
        ("HunyuanVideoTransformer3DModel", ["context_embedder.token_refiner.refiner_blocks.0"]),
        ("WanAnimateTransformer3DModel", ["face_adapter.0", "face_adapter.1"]),
        ("HunyuanDiT2DModel", ["blocks.3"]),
    ):
        model, inputs = build(name)
        assert set(outsiders) <= dict(model.named_modules()).keys()
        names = [b.name for b in find_blocks(model, inputs)]
        assert not any(n == o or n.startswith(f"{o}.") for n in names for o in outsiders)


@torch.no_grad()
def test_a_skipped_control_block_gives_no_hint_and_hands_the_control_on():
    model, inputs = build("WanVACETransformer3DModel")
    control = [b for b in find_blocks(model, inputs) if b.name.startswith("vace_blocks")]
    assert [b.outputs.vanishing for b in control] == [(0,), (0,)]
    with skip(control):
        skipped = first(model(**inputs))
    assert torch.equal(skipped, first(model(**inputs, control_hidden_states_scale=torch.zeros(2))))


@torch.no_grad()
def test_cosmos_blocks_still_add_the_position_when_skipped():
    for position, added in (("learnable", ("extra_pos_emb", None)), (None, None)):
        model, inputs = cosmos(position)
        assert {b.outputs.added for b in find_blocks(model, inputs)} == {added}


class Scaled(nn.Module):
    """(shortcut(x) + f(x)) / 2, a resnet that changes the number of channels."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.scale = 2.0
        self.shortcut = nn.Linear(width, out) if out != width else None
        self.mlp = nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))

    def forward(self, x):
        return ((self.shortcut(x) if self.shortcut else x) + self.mlp(x)) / self.scale


def test_a_shortcut_is_left_when_shapes_change_and_carries_the_bypassed_gradient():
    model = nn.Sequential(Scaled(4, 6), Scaled(6, 6))
    x = torch.randn(2, 4, requires_grad=True)
    blocks = find_blocks(model, {"input": x})
    assert [(b.outputs.shortcut, b.outputs.divisor) for b in blocks] == [("shortcut", 2.0), (None, 2.0)]
    with skip(blocks):
        assert torch.equal(model(x), model[0].shortcut(x) / 2 / 2)
    normal = model(x)
    set_active(blocks, [], frozen="bypass")
    bypassed = model(x)
    assert torch.equal(bypassed, normal)
    weight = torch.randn(2, 6)
    (expected,) = torch.autograd.grad(model[0].shortcut(x) / 4, x, weight)
    assert torch.equal(torch.autograd.grad(bypassed, x, weight)[0], expected)


def test_a_lone_layer_is_no_block_and_a_refusal_says_why():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Linear(4, 6)

        def forward(self, x):
            return self.conv(x)

    with pytest.raises(ValueError, match="0: it does not return its inputs"):
        find_blocks(nn.Sequential(Layer()), {"input": torch.randn(2, 4)})


def test_a_unets_mid_block_is_taken_apart_and_nothing_is_nested():
    model, inputs = build("UNet2DConditionModel")
    names = [b.name for b in find_blocks(model, inputs)]
    assert {"mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"} <= set(names)
    assert not any("transformer_blocks" in n or "samplers" in n for n in names)
    assert sorted(names) == sorted(b.name for b in find_blocks(model))


def test_parameters_read_outside_a_block_are_named():
    model, inputs = build("DiTTransformer2DModel")
    blocks = find_blocks(model, inputs)
    assert all(n.startswith("transformer_blocks.0.norm1.emb.") for n in blocks[0].shared) and blocks[0].shared
    assert not any(b.shared for b in blocks[1:])


def test_tied_parameters_are_named_and_train_with_either_block():
    model = Plain()
    x = torch.randn(3, 8)
    model.blocks[2].mlp[0].weight = model.blocks[0].mlp[0].weight
    for blocks in (find_blocks(model, {"x": x}), find_blocks(model)):
        assert "blocks.2.mlp.0.weight" in blocks[0].shared and "blocks.0.mlp.0.weight" in blocks[2].shared
        assert not blocks[1].shared
    for mode in ("prefix", "bypass", "pass"):
        set_active(blocks, ["blocks.0"], frozen=mode)
        assert model.blocks[0].mlp[0].weight.requires_grad, "block 2, frozen, must not freeze it again"
        assert not model.blocks[2].mlp[0].bias.requires_grad
        exact = torch.autograd.grad(model(x).sum(), model.blocks[0].mlp[0].weight)[0]
        assert exact.any()


def test_one_module_in_two_places_is_one_block_and_says_so():
    model = Plain()
    model.blocks[3] = model.blocks[1]
    blocks = find_blocks(model, {"x": torch.randn(3, 8)})
    assert [b.name for b in blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    assert any(n.startswith("blocks.3.") for n in blocks[1].shared)
    assert find_blocks(model)[1].shared == blocks[1].shared


class Banked(nn.Module):
    """A residual block of a reference or a denoising network: writes its features to a bank, or reads them there."""

    def __init__(self, bank: list, writes: bool) -> None:
        super().__init__()
        self.inner, self.proj, self.bank, self.writes = Residual(4), nn.Linear(4, 4), bank, writes

    def forward(self, x):
        if self.writes:
            self.bank.append(self.proj(x) + x)
            return self.inner(x)
        return self.inner(x) + self.proj(self.bank.pop(0))


class WithReference(nn.Module):
    """Animate-Anyone in small: a reference network fills banks that the denoising network empties."""

    def __init__(self) -> None:
        super().__init__()
        self.bank: list = []
        self.embed = nn.Linear(4, 4)
        self.reference = nn.ModuleList(Banked(self.bank, True) for _ in range(2))
        self.blocks = nn.ModuleList(Banked(self.bank, False) for _ in range(2))

    def forward(self, x, reference):
        for block in self.reference:
            reference = block(reference)
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


def test_blocks_that_fill_a_bank_are_refused_and_those_that_read_it_are_never_cut():
    model = WithReference()
    inputs = {"x": torch.randn(2, 4), "reference": torch.randn(2, 4)}
    with torch.no_grad():
        expected = model(**inputs)
    blocks = find_blocks(model, inputs)
    assert not model.bank, "the probe leaves nothing in it"
    assert [b.name for b in blocks] == ["blocks.0", "blocks.1"]
    assert all(b.outputs.reads for b in blocks)
    assert torch.equal(model(**inputs), expected)

    found = {}
    model.embed.requires_grad_(False)
    for mode in ("pass", "prefix", "bypass"):
        set_active(blocks, [], frozen=mode)
        outer = list(model.reference.parameters())
        found[mode] = torch.autograd.grad(model(**inputs).square().sum(), outer, allow_unused=True)
    assert any(g is not None for g in found["pass"])
    for mode in ("prefix", "bypass"):
        for exact, grad in zip(found["pass"], found[mode], strict=True):
            assert (exact is None) == (grad is None)
            assert exact is None or torch.equal(exact, grad)

    writer = Block(0, "reference.0", model.reference[0])
    with pytest.raises(ValueError, match="keeps features outside itself"), skip(writer):
        model(**inputs)


def test_text_weights_in_front_of_a_bypassed_last_block_get_no_gradient_rather_than_zeros():
    model, inputs = build("FluxTransformer2DModel")
    blocks = find_blocks(model, inputs)
    set_active(blocks, blocks[:1], frozen="bypass")
    first(model(**inputs)).square().sum().backward()
    assert model.transformer_blocks[0].ff_context.net[2].weight.grad is None, "so no optimizer decays it"
    assert model.transformer_blocks[0].ff.net[2].weight.grad.any()


def test_forked_randomness_is_also_pythons_and_numpys_and_of_every_device(monkeypatch):
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    def seeded():
        with forked_rng(3):
            return draw()

    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    first, between = seeded(), draw()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    assert between == draw() and seeded() == first
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext(seen.extend(devices)))
    with forked_rng():
        pass
    assert seen == [0, 1], "torch.manual_seed sets them all"


def test_a_part_that_the_loss_calls_before_the_model_is_no_example_of_it():
    model, x = Plain(), torch.randn(2, 5, 8)
    assert list(record_example(model, lambda: model(model.embed(input=x)))) == ["x"]
