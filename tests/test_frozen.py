"""Parked weights: close forward, gradients that pass, originals that come back bit for bit."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import ZOO, Plain, first, trained_by
from torch import nn
from torch.utils.checkpoint import checkpoint

from entprog import frozen, memory, plugin
from entprog.blocks import Block, find_blocks
from entprog.bypass import fidelity
from entprog.ema import Ema
from entprog.frozen import PRECISIONS, set_value, settle_weights, thaw, value_of, weight_bytes
from entprog.measure import saved_bytes
from entprog.modes import MODES, mode_of, set_active, skip
from entprog.ring import Ring
from entprog.snapshot import Snapshot
from entprog.strategy import Progressive

# largest relative error of a whole network's output or gradient; the weights' own rounding is 2e-3, 5e-3, 3e-2, 0
CLOSE = {"bf16": 0.02, "int8": 0.05, "fp8": 0.15, "cpu": 0.0}
FROZEN_MODES = [m for m in MODES if m != "train"]
precisions = pytest.mark.parametrize("precision", list(PRECISIONS))


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


def wan():
    torch.manual_seed(0)
    model, inputs = ZOO["wan"]()
    return model, inputs, find_blocks(model, inputs)


def gradients(model, inputs):
    """Gradients of the floating-point input and of everything that trains."""
    key = next(k for k, v in inputs.items() if v.is_floating_point() and v.ndim > 1)
    x = inputs[key].detach().requires_grad_(True)
    loss = trained_by(inputs | {key: x})(model).mean()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, [x, *named.values()], allow_unused=True)
    return dict(zip(["input", *named], found, strict=True))


def parked_layers(model):
    return [m for m in model.modules() if "_entprog_parked" in vars(m)]


@precisions
def test_forward_and_input_gradient_are_close_and_a_thaw_is_exact(family, precision):
    model, inputs = family
    blocks = find_blocks(model, inputs)
    set_active(blocks, blocks[:1], frozen="pass")
    originals = {n: p.detach().clone() for n, p in model.named_parameters()}
    objects = list(model.parameters())
    expected, grads = first(model(**inputs)).detach(), gradients(model, inputs)
    untouched = set(vars(blocks[1].module))
    for _ in range(2):  # repeated, nothing changes
        settle_weights(model, blocks, precision)
        assert parked_layers(model) and not any(m in parked_layers(model) for m in blocks[0].module.modules())
        out = first(model(**inputs)).detach()
        assert error(out, expected) <= CLOSE[precision] and (precision == "cpu" or not torch.equal(out, expected))
        found = gradients(model, inputs)
        assert found.keys() == grads.keys() and found["input"] is not None and found["input"].any()
        for name, grad in grads.items():
            if grad is not None and grad.norm() > 1e-6:
                assert error(found[name], grad) <= CLOSE[precision] + 1e-5, name
    assert all(a is b for a, b in zip(objects, model.parameters(), strict=True))
    thaw(model)
    assert all(torch.equal(p, originals[n]) for n, p in model.named_parameters())
    assert not parked_layers(model) and set(vars(blocks[1].module)) == untouched
    assert torch.equal(first(model(**inputs)), expected)


@precisions
@pytest.mark.parametrize("mode", FROZEN_MODES)
def test_every_mode_runs_on_parked_weights(mode, precision):
    model, inputs, blocks = wan()
    set_active(blocks, blocks[1:2], frozen=mode)
    expected, grads = first(model(**inputs)).detach(), gradients(model, inputs)
    settle_weights(model, blocks, precision)
    assert error(first(model(**inputs)).detach(), expected) <= CLOSE[precision]
    found = gradients(model, inputs)
    for name, grad in grads.items():
        if grad is not None and grad.norm() > 1e-4:
            assert error(found[name], grad) <= 2 * CLOSE[precision] + 1e-5, name
    with skip(blocks[0]):  # and temporary modes on top
        model(**inputs)
    assert mode_of(blocks[0]) == mode


def layer_cases():
    torch.manual_seed(3)
    return [
        (nn.Linear(12, 20), torch.randn(2, 5, 12)),
        (nn.Linear(12, 20, bias=False), torch.randn(12)),
        (nn.Conv1d(4, 6, 3, padding=1), torch.randn(2, 4, 9)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), torch.randn(2, 4, 8, 8)),
        (nn.Conv2d(4, 6, 3, bias=False), torch.randn(4, 8, 8)),  # no batch axis
        (nn.Conv3d(4, 6, 3, dilation=2), torch.randn(2, 4, 6, 6, 6)),
    ]


@precisions
@pytest.mark.parametrize("bias_trains", [False, True])
@pytest.mark.parametrize("case", range(6))
def test_a_layer_equals_the_plain_one_with_dequantised_weights(precision, case, bias_trains):
    """The gradient is exactly that of the product that was computed."""
    layer, x = layer_cases()[case]
    layer.requires_grad_(False)
    if layer.bias is not None:
        layer.bias.requires_grad_(bias_trains)
    host = nn.Sequential(layer)
    plain = copy.deepcopy(layer)
    frozen._park(layer, precision)
    stored = [t.float() for t in layer._entprog_parked.stored] or [plain.weight]
    plain.weight.data = stored[0] * stored[1] if len(stored) == 2 else stored[0]
    results = []
    for module in (host, plain):
        x = x.detach().requires_grad_(True)
        out = module(x)
        wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
        results.append([out, *torch.autograd.grad(out, wanted, torch.ones_like(out).cumsum(-1))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@precisions
def test_backward_keeps_neither_weight_nor_input(precision):
    layer = nn.Linear(64, 64).requires_grad_(False)
    frozen._park(layer, precision)
    with saved_bytes() as held:
        out = layer(torch.randn(8, 64, requires_grad=True))
        assert held() == 0
    assert out.requires_grad


@precisions
def test_only_what_trains_moves_and_blocks_come_and_go(precision):
    """Two blocks train in turn; with `cpu` the run equals the one without parking bit for bit."""
    weights = {}
    for kept in (None, precision):
        model, inputs, blocks = wan()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        for step in range(6):
            active = blocks[step // 2 % 2]
            before = {n: value_of(p).detach().clone() for n, p in model.named_parameters()}
            set_active(blocks, [active], frozen="pass")
            settle_weights(model, blocks, kept)
            trained_by(inputs)(model).mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for name, p in model.named_parameters():
                in_other = any(name.startswith(f"{b.name}.") for b in blocks if b is not active)
                if in_other:
                    assert torch.equal(value_of(p), before[name]), name
            assert not torch.equal(active.module.ffn.net[2].weight, before[f"{active.name}.ffn.net.2.weight"])
        thaw(model)
        weights[kept] = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert error(weights[precision], weights[None]) <= (0 if precision == "cpu" else 0.2)


@precisions
def test_saving_loading_and_copying_while_parked(precision, tmp_path):
    model, inputs, blocks = wan()
    other = wan()[0]
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.01)
    originals = copy.deepcopy(model.state_dict())
    set_active(blocks, blocks[:1], frozen="pass")
    settle_weights(model, blocks, precision)
    out = first(model(**inputs)).detach()
    assert all(torch.equal(v, originals[n]) for n, v in model.state_dict().items())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(v, originals[n]) for n, v in loaded.state_dict().items())
    again = find_blocks(loaded, inputs)
    set_active(again, again[:1], frozen="pass")
    settle_weights(loaded, again, precision)  # tensors of one file are not taken for shared ones
    assert len(parked_layers(loaded)) == len(parked_layers(model)) and torch.equal(first(loaded(**inputs)), out)

    twin = copy.deepcopy(model)
    assert torch.equal(first(twin(**inputs)), out)
    model.load_state_dict(other.state_dict())
    assert parked_layers(model) and torch.equal(first(twin(**inputs)), out)  # the copy is one
    changed = first(model(**inputs)).detach()
    assert error(changed, first(other(**inputs)).detach()) <= CLOSE[precision] and not torch.equal(changed, out)
    for m, expected in ((twin, originals), (model, other.state_dict())):
        thaw(m)
        assert all(torch.equal(p, expected[n]) for n, p in m.named_parameters())
        assert not any(p.isnan().any() for p in m.parameters())


def test_loading_a_wrong_shape_fails_and_leaves_the_weights():
    model, _, blocks = wan()
    set_active(blocks, [], frozen="pass")
    settle_weights(model, blocks, "int8")
    originals = copy.deepcopy(model.state_dict())
    name = "blocks.1.ffn.net.2.weight"
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(model.state_dict() | {name: torch.zeros(3, 3)})
    thaw(model)
    assert all(torch.equal(p, originals[n]) for n, p in model.named_parameters())


def test_assigning_while_loading_gives_the_layer_up():
    model, _, blocks = wan()
    set_active(blocks, [], frozen="pass")
    settle_weights(model, blocks, "int8")
    state = {n: v + 1 for n, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert not parked_layers(model) and all(torch.equal(p, state[n]) for n, p in model.named_parameters())


def test_moving_the_model_while_parked_moves_what_comes_back():
    model, inputs, blocks = wan()
    originals = copy.deepcopy(model.state_dict())
    set_active(blocks, [], frozen="pass")
    settle_weights(model, blocks, "int8")
    model.to(torch.bfloat16)
    cast = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    assert first(model(**cast)).isfinite().all()
    thaw(model)
    assert all(torch.equal(p, originals[n].to(torch.bfloat16)) for n, p in model.named_parameters())


def test_weights_that_something_else_holds_are_left_alone():
    model = Plain()
    blocks = find_blocks(model)
    model.head.weight = model.blocks[1].mlp[0].weight  # another layer's
    model.register_buffer("view", model.blocks[2].mlp[0].weight.data[:2])  # a view's
    set_active(blocks, [], frozen="pass")
    model.requires_grad_(False)
    settle_weights(model, blocks, "cpu")
    expected = {f"blocks.{i}.mlp.{j}" for i in range(4) for j in (0, 2)} - {"blocks.1.mlp.0", "blocks.2.mlp.0"}
    assert {n for n, m in model.named_modules() if "_entprog_parked" in vars(m)} == expected


def test_what_cannot_be_parked_is_left_alone():
    class Own(nn.Linear):
        pass

    with_own_forward = nn.Linear(8, 8)
    with_own_forward.forward = with_own_forward.forward
    module = nn.Sequential(
        Own(8, 8),
        with_own_forward,
        nn.Conv1d(8, 8, 3, padding="same"),
        nn.Linear(8, 8, dtype=torch.bfloat16),
        nn.Linear(8, 8),
    )
    model = nn.ModuleList([module])
    block = Block(0, "0", module)
    set_active([block], [], frozen="bypass")
    module[4].weight.requires_grad_(True)
    settle_weights(model, [block], "bf16")
    assert not parked_layers(model)


def test_bad_input_is_refused():
    model, _, blocks = wan()
    set_active(blocks, [], frozen="pass")
    with pytest.raises(ValueError, match="'int4'.*'bf16', 'int8', 'fp8', 'cpu', None"):
        settle_weights(model, blocks, "int4")
    with pytest.raises(ValueError, match="of this Plain"):
        settle_weights(Plain(), blocks, "int8")
    weight = blocks[1].module.ffn.net[2].weight
    weight.grad = torch.zeros_like(weight)
    with pytest.raises(RuntimeError, match="pending"):
        settle_weights(model, blocks, "int8")
    weight.grad = None
    weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.net\.2\.weight: .*NaN or infinity"):
        settle_weights(model, blocks, "int8")
    thaw(model)
    weight[0, 0] = 1
    settle_weights(model, blocks, "int8")
    with pytest.raises(RuntimeError):
        weight.mul_(2)  # nothing can be written past the originals
    with pytest.raises(RuntimeError, match="cast one"):
        blocks[1].module.ffn.net[2](torch.randn(2, 32, dtype=torch.bfloat16))


@precisions
def test_autocast_computes_in_its_dtype(precision):
    model, inputs, blocks = wan()
    set_active(blocks, blocks[:1], frozen="pass")
    with torch.autocast("cpu", torch.bfloat16):
        expected = first(model(**inputs)).detach()
        settle_weights(model, blocks, precision)
        found = first(model(**inputs))
        grads = gradients(model, inputs)
    assert found.dtype == expected.dtype and error(found.detach(), expected) <= CLOSE[precision] + 0.01
    assert grads["input"].any()


@precisions
def test_fidelity_of_parked_blocks_uses_their_originals_and_leaves_them_parked(precision):
    model, inputs, blocks = wan()

    def loss(m, b):
        return trained_by(inputs)(m).mean()

    set_active(blocks, blocks[:2], frozen="pass")
    expected = fidelity(model, blocks, loss, None, blocks, blocks[2:])
    settle_weights(model, blocks, precision)
    count = len(parked_layers(model))
    found = fidelity(model, blocks, loss, None, blocks, blocks[2:])  # the third is parked and asked for its gradient
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-5 if precision == "cpu" else 0.02)
    set_active(blocks, blocks, frozen="pass")  # all train, nothing settled yet: exact
    assert fidelity(model, blocks, loss, None, blocks, blocks[2:]) == pytest.approx(expected, abs=1e-5)
    assert len(parked_layers(model)) == count > 0


@precisions
def test_snapshots_and_averages_read_and_write_the_originals(precision):
    model, inputs, blocks = wan()
    optimizer = torch.optim.SGD(model.parameters())
    average = Ema(model, 0.9)
    average.update()
    for a in average.average.values():
        a.add_(1)
    originals = copy.deepcopy(model.state_dict())
    set_active(blocks, [], frozen="pass")
    settle_weights(model, blocks, precision)
    before = first(model(**inputs)).detach()
    snapshot = Snapshot.take(list(model.parameters()), optimizer)
    average.swap()
    assert torch.equal(model.state_dict()["blocks.1.ffn.net.2.weight"], originals["blocks.1.ffn.net.2.weight"] + 1)
    assert not torch.equal(first(model(**inputs)), before)
    thaw(model)
    snapshot.restore()
    assert all(torch.equal(p, originals[n]) for n, p in model.named_parameters())
    settle_weights(model, blocks, precision)
    for p in model.parameters():
        set_value(p, value_of(p) * 0.5)
    snapshot.restore()
    assert torch.equal(first(model(**inputs)), before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_ring_holds_two_blocks_and_fetches_ahead(checkpointing, monkeypatch):
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)) for _ in range(6)))
    blocks = [Block(i, str(i), m.requires_grad_(False)) for i, m in enumerate(model)]
    x = torch.randn(3, 16, requires_grad=True)

    def run():
        y = x
        for block in model:
            y = checkpoint(block, y, use_reentrant=False) if checkpointing else block(y)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), x)]

    expected = run()
    settle_weights(model, blocks, "cpu")
    run()
    order, waits, waited, copied, asked = list[int](), 0, list[torch.Tensor](), Ring._copy, Ring.weight

    def counted(ring, place, slot):
        order.append(place)
        copied(ring, place, slot)

    def watched(ring, parked, device):
        nonlocal waits
        waits += ring._held(ring.place[id(parked)]) is None
        return asked(ring, parked, device)

    monkeypatch.setattr(Ring, "_copy", counted)
    monkeypatch.setattr(Ring, "weight", watched)
    assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
    assert waits == 0 and order == [2, 3, 4, 5, 3, 2, 1, 0]  # one block ahead, forwards and back
    ring = parked_layers(model)[0]._entprog_parked.ring
    assert len(ring.slots) == 2 and ring.slots[0].buffer.nbytes == 2 * 16 * 16 * 4
    ring.stream = SimpleNamespace(synchronize=lambda: waited.append(value_of(model[0][0].weight).clone()))
    set_value(model[0][0].weight, torch.zeros(16, 16))
    assert waited[0].any(), "a copy may be reading the original, which changes after that"


def test_bytes_are_counted_as_kept():
    model, _, blocks = wan()
    whole = sum(p.nbytes for p in model.parameters())
    set_active(blocks, [], frozen="pass")
    assert weight_bytes(model) == {"device": whole, "host": 0}
    held = {}
    for precision in PRECISIONS:
        settle_weights(model, blocks, precision)
        held[precision] = weight_bytes(model)
    parked = held["cpu"]["host"]
    count = len(parked_layers(model))
    assert held["cpu"] == {"device": whole - parked + 4 * count, "host": parked}  # no ring before the first forward
    assert held["bf16"]["device"] == whole - parked // 2 + 4 * count
    rows = sum(m.weight.shape[0] for m in parked_layers(model))
    assert held["int8"]["device"] == held["fp8"]["device"] == whole - parked * 3 // 4 + 4 * (rows + count)


@pytest.mark.parametrize(
    "precision, frozen_mode", [("cpu", "bypass"), pytest.param("int8", "pass", marks=pytest.mark.slow)]
)
def test_a_whole_entprog_run_on_parked_weights(precision, frozen_mode, monkeypatch):
    """Scores, fidelity, races with snapshots, thaws: with `cpu` the run is the one without parking, bit for bit."""
    ends, switched = {}, memory.apply
    for kept in (None, precision):
        torch.manual_seed(0)
        model, inputs = Plain(), {"x": torch.randn(4, 5, 8)}
        counts = []

        def counted(*args, model=model, counts=counts):
            switched(*args)
            counts.append(len(parked_layers(model)))

        monkeypatch.setattr(memory, "apply", counted)
        settings = Progressive(stages=3, search_budget=5.0, frozen=frozen_mode, min_fidelity=0.5, frozen_weights=kept)
        prog = plugin.EntProg(model, trained_by(inputs), held_out=None, train_batches=lambda: iter(range(64)),
                              total_steps=30, strategy=settings, clock="model")  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(30):
            prog.step(step, optimizer)
            trained_by(inputs)(model).mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        assert prog.search_steps and (max(counts) > 0) == (kept is not None) and len(set(counts)) > (kept is not None)
        thaw(model)
        ends[kept] = torch.cat([p.detach().flatten() for p in model.parameters()]), prog.events
    assert ends[precision][0].isfinite().all()
    if precision == "cpu":
        assert torch.equal(ends["cpu"][0], ends[None][0]) and ends["cpu"][1] == ends[None][1]


@pytest.mark.gpu
@precisions
def test_on_a_gpu_the_host_keeps_pinned_originals(precision):
    model, inputs, blocks = wan()
    model.cuda()
    inputs = {k: v.cuda() for k, v in inputs.items()}
    set_active(blocks, blocks[:1], frozen="pass")
    originals = copy.deepcopy(model.state_dict())
    expected = first(model(**inputs)).detach()
    settle_weights(model, blocks, precision)
    assert all(m._entprog_parked.original.is_pinned() for m in parked_layers(model))
    for _ in range(3):
        (out := first(model(**inputs))).square().mean().backward()
        model.zero_grad(set_to_none=True)
        assert error(out.detach(), expected) <= CLOSE[precision]
    thaw(model)
    assert all(torch.equal(p, originals[n]) for n, p in model.named_parameters())
