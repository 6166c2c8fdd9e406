"""bypass_attn: which modules are self-attention, and what is left of a block's gradient without them."""

import pytest
import torch
from conftest import Plain, first
from torch import nn
from zoo import build, tensors

from entprog.attention import attention_modules
from entprog.blocks import Block, find_blocks
from entprog.measure import count_flops, saved_bytes
from entprog.modes import mode_of, set_active, set_mode
from entprog.profiling import cost_of

# one of each way attention is built in: single stream, joint of two, parallel to the MLP, UNet's units, double
FOUND = {
    "WanTransformer3DModel": {"attn1"},
    "FluxTransformer2DModel": {"attn"},
    "CogVideoXTransformer3DModel": {"attn1"},
    "HunyuanVideoTransformer3DModel": {"attn"},
    "LTX2VideoTransformer3DModel": {"attn1", "audio_attn1"},
    "UNet2DConditionModel": {"transformer_blocks.0.attn1"},
    "UNetMotionModel": {"transformer_blocks.0.attn1", "transformer_blocks.0.attn2"},
}


def gradients(model, inputs, key):
    """Of every trainable parameter and of the input `key`, for a random but fixed weighting of all outputs."""
    inputs = inputs | {key: inputs[key].detach().requires_grad_()}
    outs = tensors(model(**inputs))
    torch.manual_seed(3)
    sum((o * torch.randn_like(o)).sum() for o in outs).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None} | {"": inputs[key].grad}
    model.zero_grad(set_to_none=True)
    return found


def stream(inputs):
    return next(k for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point() and v.ndim > 2)


def detach_outputs(module, args, output):
    """The obvious version: run attention as ever, then forget where its outputs came from."""
    return output.detach() if isinstance(output, torch.Tensor) else tuple(o.detach() for o in output)


@pytest.mark.parametrize("name", FOUND)
def test_it_equals_detaching_the_self_attention_and_leaves_the_forward_alone(name):
    model, inputs = build(name)
    blocks = find_blocks(model, inputs)
    cut = [b for b in blocks[1:-1] if attention_modules(b.module)]
    expected = [t.detach() for t in tensors(model(**inputs))]
    kept, found = {}, {}
    for mode in ("pass", "bypass_attn"):
        set_active(blocks, [blocks[0], blocks[-1]], frozen={b.name: mode for b in cut})
        with saved_bytes(ignore=list(model.parameters())) as held:
            outs = tensors(model(**inputs))
            kept[mode] = held()
        assert all(torch.equal(o, e) for o, e in zip(outs, expected, strict=True))
        del outs
        found[mode] = gradients(model, inputs, stream(inputs))
    named = {n for b in cut for n in b.attention}
    assert named <= FOUND[name] and named
    set_active(blocks, [blocks[0], blocks[-1]], frozen="pass")
    handles = [b.module.get_submodule(n).register_forward_hook(detach_outputs) for b in cut for n in b.attention]
    slow = gradients(model, inputs, stream(inputs))
    for handle in handles:
        handle.remove()
    assert slow.keys() == found["bypass_attn"].keys()
    assert all(torch.equal(g, slow[n]) for n, g in found["bypass_attn"].items())
    assert found["bypass_attn"][""].any(), "the stream has a gradient"
    assert any(not torch.equal(g, found["pass"][n]) for n, g in slow.items())
    assert kept["bypass_attn"] < kept["pass"]


def test_cross_attention_keeps_its_gradient():
    model, inputs = build("WanTransformer3DModel")
    blocks = find_blocks(model, inputs)
    set_active(blocks, [], frozen={"blocks.1": "bypass_attn", "blocks.0": "bypass", "blocks.2": "bypass"})
    model.patch_embedding.requires_grad_(False)
    found = gradients(model, inputs, "encoder_hidden_states")
    assert found[""].any()


def test_fused_attention_and_blocks_without_any_are_refused_before_anything_changes():
    model, inputs = build("Flux2Transformer2DModel")
    blocks = find_blocks(model, inputs)
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"single_transformer_blocks.0.*Flux2Single.*self_attention = .*'pass'"):
        set_active(blocks, blocks[:1], frozen="bypass_attn")
    assert before == [p.requires_grad for p in model.parameters()] and {mode_of(b) for b in blocks} == {"train"}
    single = [b.name for b in blocks if not attention_modules(b.module)]
    set_active(blocks, blocks[:1], frozen=dict.fromkeys(single, "bypass") | {blocks[1].name: "bypass_attn"})
    assert tensors(model(**inputs))[0].requires_grad
    plain = Plain()
    with pytest.raises(ValueError, match=r"blocks.0 \(Residual\)"):
        set_mode(find_blocks(plain)[0], "bypass_attn")


class Attention(nn.Module):
    """Attention of one head; `kind` says what is special about it."""

    def __init__(self, kind: str, width: int = 8) -> None:
        super().__init__()
        self.kind = kind
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x, context=None):
        context = x if context is None else context
        weights = (self.query(x) @ self.key(context).transpose(-1, -2)).softmax(-1)
        y = weights @ self.value(context)
        return x + y if self.kind == "residual" else y


class Own(nn.Module):
    """A user's block with attention and an MLP."""

    def __init__(self, kind: str, width: int = 8) -> None:
        super().__init__()
        self.kind = kind
        if kind == "torch":
            self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        else:
            self.attn = Attention(kind)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x, context):
        if self.kind == "torch":
            x = x + self.attn(x, x, x, need_weights=False)[0]
        elif self.kind == "residual":
            x = self.attn(x)
        else:
            x = x + self.attn(x, context if self.kind == "cross" else None)
        return x + self.mlp(x)


@pytest.mark.parametrize("kind", ["plain", "torch"])
def test_attention_of_ones_own_is_found(kind):
    block = Block(0, "own", Own(kind).requires_grad_(False))
    x, context = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 8)
    weight = torch.randn(2, 3, 8)
    handle = block.module.attn.register_forward_hook(
        lambda m, a, o: (o[0].detach(), None) if isinstance(o, tuple) else o.detach()
    )
    expected = torch.autograd.grad(block.module(x, context), x, weight)[0]
    handle.remove()
    set_mode(block, "bypass_attn")
    assert torch.equal(torch.autograd.grad(block.module(x, context), x, weight)[0], expected)
    assert block.attention == ("attn",)


@pytest.mark.parametrize("kind", ["cross", "residual"])
def test_what_is_no_self_attention_or_holds_the_stream_is_refused(kind):
    block = Block(0, "own", Own(kind).requires_grad_(False))
    set_mode(block, "bypass_attn")
    with pytest.raises(ValueError, match=r"own \(Own\).*" + {"cross": "none projected", "residual": "adds its"}[kind]):
        block.module(torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 8))


def test_a_block_with_something_trainable_inside_is_never_cut():
    model, inputs = build("WanTransformer3DModel")
    blocks = find_blocks(model, inputs)
    set_active(blocks, blocks[-1:], frozen="bypass_attn")
    adapter = blocks[0].module.attn1.to_q.weight.requires_grad_()
    gradients(model, inputs, "hidden_states")
    first(model(**inputs)).sum().backward()
    assert adapter.grad is not None and adapter.grad.any()


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "FluxTransformer2DModel"])
def test_step_cost_knows_the_attention(name):
    """Against the FLOPs of real steps, attention included."""
    model, inputs = build(name)
    blocks = find_blocks(model, inputs)
    model.requires_grad_(False)
    cost = cost_of(model, blocks, lambda: model(**inputs))
    flops, predicted = {}, {}
    for mode in ("pass", "bypass_attn", "bypass"):
        set_active(blocks, blocks[:1], frozen=mode)
        first(model(**inputs))  # finds the attention, which costs once
        flops[mode] = count_flops(lambda: first(model(**inputs)).sum().backward())
        model.zero_grad(set_to_none=True)
        predicted[mode] = cost.step({b.name: mode for b in blocks[1:]}, outside="none")
    assert flops["bypass"] < flops["bypass_attn"] < flops["pass"]
    assert predicted["pass"] == flops["pass"] and predicted["bypass_attn"] == flops["bypass_attn"]
    assert predicted["bypass"] == pytest.approx(flops["bypass"], rel=0.07), "Flux: text that nobody reads is counted"


def test_step_cost_refuses_attention_that_is_not_there():
    plain = Plain()
    blocks = find_blocks(plain)
    cost = cost_of(plain, blocks, lambda: plain(torch.randn(2, 8)))
    with pytest.raises(ValueError, match="no self-attention of its own"):
        cost.step({"blocks.1": "bypass_attn"})
