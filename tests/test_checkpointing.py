"""Activation checkpointing per block: same gradients, fewer bytes, only where something is kept."""

import copy
import gc
import weakref
from itertools import count, islice

import diffusers
import pytest
import torch
from conftest import ZOO, Plain, first, trained_by
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import build

from entprog import EntProg, Progressive, checkpoint_blocks, checkpointing, find_blocks, memory, set_active
from entprog.attention import attention_modules
from entprog.budget import Keeping
from entprog.checkpointing import CHECKPOINTS, checkpointed, segments
from entprog.measure import PeakBytes, count_flops, saved_bytes
from entprog.modes import mode_of
from entprog.profiling import cost_of

NAMES = ["WanTransformer3DModel", "FluxTransformer2DModel", "UNet2DConditionModel"]


def gradients(model, inputs):
    torch.manual_seed(5)  # for dropout
    output = first(model(**inputs))
    output.square().mean().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def with_dropout(model):
    """Dropout between the parts of every feed-forward and attention that has a place for it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    return model.train()


def test_peak_bytes_follows_tensors_from_birth_to_death():
    x = torch.zeros(1000)
    with PeakBytes() as live:
        for _ in range(3):
            y = x + 1  # 4,000 bytes, and the view none
            z = y.view(10, 100)
            del y, z
        assert live.now == 0
        kept = [x + 1, x + 2]
    assert live.peak == live.now == 8000 and len(kept) == 2


@pytest.mark.parametrize("frozen", ["pass", "bypass_attn", "bypass"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_bit_equal_and_bytes_fewer(name, frozen):
    model, inputs = build(name)
    with_dropout(model)
    blocks = find_blocks(model, inputs)
    modes = {b.name: frozen if frozen != "bypass_attn" or attention_modules(b.module) else "pass" for b in blocks[1:-1]}
    set_active(blocks, [blocks[0], blocks[-1]], frozen=modes)
    exact, kept = gradients(model, inputs), {}
    for way in CHECKPOINTS:
        checkpoint_blocks(blocks, way, model=model)
        found = gradients(model, inputs)
        assert found.keys() == exact.keys()
        assert all(torch.equal(g, exact[n]) for n, g in found.items())
        with saved_bytes(ignore=list(model.parameters())) as held:
            output = first(model(**inputs))
            kept[way] = held()
        del output
    assert kept["block"] < kept["parts"] < kept["none"]


def test_the_peak_of_recomputing_is_smaller_by_parts():
    """One trainable block of real proportions: what is alive at once in backward."""
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, num_layers=1,
        text_dim=16, freq_dim=32, ffn_dim=256, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(1, 4, 2, 32, 32), "encoder_hidden_states": torch.randn(1, 8, 16)}
    inputs |= {"timestep": torch.tensor([7]), "return_dict": False}
    blocks, peaks = find_blocks(model, inputs), {}
    set_active(blocks, blocks)
    for way in CHECKPOINTS:
        checkpoint_blocks(blocks, way)
        gradients(model, inputs)
        with PeakBytes() as live:
            gradients(model, inputs)
        peaks[way] = live.peak
    assert blocks[0].segments == ("attn1", "attn2", "ffn")
    assert peaks["parts"] < 0.75 * peaks["block"] < 0.76 * peaks["none"], "one block: as a whole it gains nothing"


def test_graphs_that_nobody_runs_backward_are_freed():
    """Tanh keeps its output, softmax and fused attention theirs: held with its graph, it would hold itself."""
    module, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), torch.randn(2, 8)
    seen = []
    module[1].register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output)))
    with saved_bytes() as held:
        assert module(x).requires_grad and held()
    segments(module, module.forward, (x,), {})
    gc.collect()
    assert [ref() for ref in seen] == [None, None]


def test_a_budget_names_parts_without_running_a_block_for_them(monkeypatch):
    model, x = Plain(), torch.randn(2, 5, 8)
    prog = EntProg(model, lambda model, x: model(x).square().mean(), held_out=x, train_batches=lambda: iter([x]),
                   total_steps=2, max_memory="1GiB", strategy=Progressive(frozen="pass"))  # fmt: skip
    monkeypatch.setattr(checkpointing, "segments", None)
    memory.apply(prog, {b.name: "pass" if b.index else "train" for b in prog.blocks}, Keeping(None, "parts"))
    model(x).sum().backward()
    assert all(b.segments is not None for b in prog.blocks)


def checkpointed_calls(monkeypatch):
    calls = []
    monkeypatch.setattr(
        checkpointing, "checkpoint", lambda function, *args, **kwargs: calls.append(function) or checkpoint(
            function, *args, **kwargs)
    )  # fmt: skip
    return calls


@pytest.mark.parametrize(("mode", "times"), [("pass", 3), ("prefix", 3), ("bypass", 2), ("skip", 2)])
def test_only_calls_that_keep_something_are_checkpointed(mode, times, monkeypatch):
    """Of 4 blocks 1 and 3 train: 0 has nothing trainable before it, 2 has."""
    model, x = Plain(), torch.randn(2, 5, 8)
    blocks = find_blocks(model, {"x": x})
    model.embed.requires_grad_(False)
    calls = checkpointed_calls(monkeypatch)
    checkpoint_blocks(blocks)
    set_active(blocks, ["blocks.1", "blocks.3"], frozen=mode)
    model(x).sum().backward()
    assert len(calls) == times
    assert [mode_of(b) for b in blocks] == [mode, "train", mode, "train"]
    with torch.no_grad():
        model(x)
    assert len(calls) == times
    checkpoint_blocks(blocks, ["blocks.3"])
    model(x).sum().backward()
    assert len(calls) == times + 1
    checkpoint_blocks(blocks, "none")
    set_active(blocks, blocks)
    assert not any("forward" in vars(m) for m in model.modules())


def test_blocks_are_checkpointed_by_name_and_way(monkeypatch):
    model, x = Plain(), torch.randn(2, 5, 8)
    blocks = find_blocks(model, {"x": x})
    calls = checkpointed_calls(monkeypatch)
    checkpoint_blocks(blocks, {"blocks.0": "parts", "blocks.2": "block"})
    model(x).sum().backward()
    assert [getattr(c, "__self__", None) for c in calls] == [model.blocks[0].mlp, model.blocks[2]]
    with pytest.raises(ValueError, match=r"\['half'\] is unknown.*none.*block.*parts"):
        checkpoint_blocks(blocks, "half")
    with pytest.raises(ValueError, match="no block is called"):
        checkpoint_blocks(blocks, {"blocks.9": "block"})


def test_the_models_own_checkpointing_is_refused():
    model, inputs = build("WanTransformer3DModel")
    blocks = find_blocks(model, inputs)
    model.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="disable_gradient_checkpointing"):
        checkpoint_blocks(blocks, model=model)
    model.disable_gradient_checkpointing()
    exact = gradients(model, inputs)
    checkpoint_blocks(blocks, model=model)
    model.enable_gradient_checkpointing()  # later on, nobody can tell: dearer, but right
    assert all(torch.equal(g, exact[n]) for n, g in gradients(model, inputs).items())


def test_a_deep_copy_recomputes_its_own_weights():
    model, x = Plain(), torch.randn(2, 5, 8)
    blocks = find_blocks(model, {"x": x})
    for way in ("block", "parts"):
        checkpoint_blocks(blocks, way)
        model(x).sum().backward()
        twin = copy.deepcopy(model)
        twin.zero_grad(set_to_none=True), model.zero_grad(set_to_none=True)
        twin(x).sum().backward()
        assert all(p.grad is not None for p in twin.parameters())
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("frozen", ["pass", "bypass"])
def test_a_whole_entprog_run_is_bit_equal(frozen):
    weights = []
    for way in ("none", "block", "parts"):
        torch.manual_seed(0)
        model, inputs = ZOO["pose_dit"]()
        prog = EntProg(
            model, trained_by(inputs), held_out=None, train_batches=lambda: islice(count(), 64), total_steps=6,
            strategy=Progressive(schedule="linear", stages=3, frozen=frozen), clock="model",
        )  # fmt: skip
        checkpoint_blocks(prog.blocks, way, model=model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(6):
            prog.step(step, optimizer)
            trained_by(inputs)(model).mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for other in weights[1:] for a, b in zip(weights[0], other, strict=True))


@pytest.mark.parametrize("mode", ["pass", "bypass_attn", "bypass"])
def test_step_cost_counts_the_second_run_of_what_gradients_reach(mode):
    model, inputs = build("WanTransformer3DModel")
    blocks = find_blocks(model, inputs)
    model.requires_grad_(False)
    cost = cost_of(model, blocks, lambda: model(**inputs))
    set_active(blocks, [blocks[1]], frozen=mode)
    gradients(model, inputs)  # finds attention and parts, which costs once
    modes = {b.name: "train" if b.index == 1 else mode for b in blocks}
    found = {}
    for way in CHECKPOINTS:
        checkpoint_blocks(blocks, way)
        gradients(model, inputs)
        found[way] = count_flops(lambda: gradients(model, inputs))
        assert checkpointed(blocks) == ({b.name: way for b in blocks} if way != "none" else {})
        assert cost.step(modes, outside="none", checkpointed=checkpointed(blocks)) == found[way], way
    assert found["none"] < found["parts"] < found["block"]
