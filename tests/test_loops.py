"""What other people's loops bring along: accumulation, checkpointing, adapters, compiled blocks, odd optimizers."""

import functools
import json
from dataclasses import replace
from itertools import count, islice, product

import pytest
import schedulefree
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import ZOO, Plain, first, trained_by
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint

from entprog.blocks import find_blocks
from entprog.frozen import settle_weights, weight_bytes
from entprog.modes import running, set_active
from entprog.plugin import EntProg
from entprog.snapshot import Snapshot
from entprog.strategy import Progressive
from entprog.supernet import at_average


@pytest.fixture(autouse=True)
def _accelerate_forgets():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


LINEAR = Progressive(schedule="linear", stages=2)
REENTRANT = functools.partial(checkpoint, use_reentrant=True)


def plugged(model, loss_fn, steps=4, settings=LINEAR, **kwargs):
    return EntProg(model, loss_fn, held_out=None, train_batches=lambda: islice(count(), 64), total_steps=steps,
                   strategy=settings, clock="model", **kwargs)  # fmt: skip


def wan():
    torch.manual_seed(0)
    model, inputs = ZOO["wan"]()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return model, inputs


def gradients(model, inputs):
    trained_by(inputs)(model).mean().backward()
    taken = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return taken


# -- Accelerate -------------------------------------------------------------------------------------------------------


def test_a_switch_inside_an_accumulation_window_is_refused():
    model, inputs = Plain(), {"x": torch.randn(4, 5, 8)}
    prog = plugged(model, trained_by(inputs))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    with accelerator.accumulate(prepared), pytest.raises(RuntimeError, match="before `with accelerator.accumulate"):
        prog.step(0, optimizer)  # its searches would call an optimizer that does not step
    accelerator.gradient_state._set_sync_gradients(True)
    prog.step(0, optimizer)
    assert prog.active


# -- gradient checkpointing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["pass", "prefix", "bypass", "skip"])
@pytest.mark.parametrize("stem_trains", [True, False])
@pytest.mark.parametrize("name", ["wan", "flux"])
def test_non_reentrant_checkpointing_changes_no_gradient_in_any_mode(name, mode, stem_trains):
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    blocks = find_blocks(model, inputs)
    model.requires_grad_(stem_trains)
    set_active(blocks, [blocks[1]], frozen=mode)
    expected = gradients(model, inputs)
    model.enable_gradient_checkpointing()
    checkpointed = gradients(model, inputs)
    assert checkpointed.keys() == expected.keys() and expected
    assert all(torch.equal(checkpointed[n], g) for n, g in expected.items())


def test_reentrant_checkpointing_is_refused_with_the_way_out():
    model, inputs = wan()
    prog = plugged(model, trained_by(inputs))
    model.enable_gradient_checkpointing(REENTRANT)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        prog.step(0, torch.optim.AdamW(model.parameters()))
    model.enable_gradient_checkpointing()
    prog.step(0, torch.optim.AdamW(model.parameters()))


@pytest.mark.parametrize("mode", ["skip", "bypass", "bypass_attn"])
def test_reentrant_checkpointing_under_a_mode_is_refused_where_it_runs(mode):
    model, inputs = wan()
    blocks = find_blocks(model, inputs)
    model.enable_gradient_checkpointing(REENTRANT)
    set_active(blocks, blocks[:1], frozen="pass")
    with running(blocks[1:2], mode):
        with pytest.raises(ValueError, match=r"reentrant.*use_reentrant=False"):
            trained_by(inputs)(model)
        with torch.no_grad():
            assert trained_by(inputs)(model).isfinite().all(), "without gradients nothing is checkpointed"
        model.enable_gradient_checkpointing()
        trained_by(inputs)(model).mean().backward()


def test_a_loss_that_first_runs_without_gradients_is_not_taken_for_reentrant():
    model, inputs = Plain(), {"x": torch.randn(4, 5, 8)}

    def loss_fn(m, batch):
        with torch.no_grad():
            m(**inputs)  # self-conditioning, a teacher ...
        return trained_by(inputs)(m)

    plugged(model, loss_fn).step(0, torch.optim.AdamW(model.parameters()))


class Referred(Plain):
    """A network with a reference net, whose features need no gradient."""

    def __init__(self):
        super().__init__()
        self.reference = Plain()

    def forward(self, x):
        with torch.no_grad():
            known = self.reference(x)
        return super().forward(x + known)


def test_a_reference_network_without_gradients_is_not_taken_for_reentrant():
    model, inputs = Referred(), {"x": torch.randn(4, 5, 8)}
    own = find_blocks(model, inputs)
    others = [replace(b, name=f"reference.{b.name}") for b in find_blocks(model.reference, inputs)]
    prog = plugged(model, trained_by(inputs), blocks=[*others, *own], candidates=[b.name for b in own])
    prog.step(0, torch.optim.AdamW(model.parameters()))
    assert prog.active and not any(name.startswith("reference") for name in prog.active)


# -- PEFT -------------------------------------------------------------------------------------------------------------


def test_weights_beside_adapters_that_train_are_parked():
    torch.manual_seed(0)
    model, inputs = Plain(), {"x": torch.randn(4, 5, 8)}
    whole = get_peft_model(model, LoraConfig(r=2, target_modules=r"blocks\.\d+\.mlp\.[02]", init_lora_weights=False))
    model = whole.get_base_model()
    blocks = find_blocks(model, inputs)
    set_active(blocks, blocks)
    expected = gradients(model, inputs)
    settle_weights(model, blocks, "cpu")
    base = [p for n, p in model.named_parameters() if "blocks" in n and n.endswith("base_layer.weight")]
    assert weight_bytes(model)["host"] == sum(p.nbytes for p in base) and len(base) == 8
    found = gradients(model, inputs)
    assert len(found) == 16 and all(torch.allclose(g, expected[n]) for n, g in found.items())


def with_adapters():
    model, inputs = wan()
    return get_peft_model(model, LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)), inputs


def test_blocks_are_found_inside_a_peft_model_and_its_frozen_base_is_never_enabled():
    model, inputs = with_adapters()
    trained_by_peft = {n for n, p in model.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    prog = plugged(model, trained_by(inputs), settings=Progressive(schedule="linear", stages=2, search_budget=0.5))
    assert [b.name for b in prog.blocks] == [f"base_model.model.blocks.{i}" for i in range(3)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(4):
        prog.step(step, optimizer)
        assert {n for n, p in model.named_parameters() if p.requires_grad} <= trained_by_peft
        trained_by(inputs)(model).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert {n for n, p in model.named_parameters() if not torch.equal(p, start[n])} == trained_by_peft


def test_a_base_that_was_enabled_before_trains_with_its_adapters():
    model, inputs = with_adapters()
    model.requires_grad_(True)
    prog = plugged(model, trained_by(inputs))
    prog.step(0, torch.optim.AdamW(model.parameters()))
    trained = [b for b in prog.blocks if b.name in prog.active]
    assert all(p.requires_grad for b in trained for p in b.module.parameters())


def test_a_peft_model_called_with_positional_arguments():
    model, inputs = with_adapters()

    def loss_fn(m, batch):
        return first(m(inputs["hidden_states"], inputs["timestep"], inputs["encoder_hidden_states"])).square().mean()

    assert len(plugged(model, loss_fn).blocks) == 3


@pytest.mark.parametrize("mode", ["prefix", "bypass"])
def test_adapters_that_train_in_a_frozen_block_are_never_cut(mode):
    model, inputs = with_adapters()
    blocks = find_blocks(model, inputs)
    adapters = blocks[0].parameters()
    set_active(blocks, [], frozen="pass")
    for p in adapters:
        p.requires_grad_(True)
    expected = gradients(model, inputs)
    set_active(blocks, [], frozen={blocks[0].name: mode})
    for p in adapters:
        p.requires_grad_(True)
    taken = gradients(model, inputs)
    assert len(expected) == len(adapters) and all(torch.equal(taken[n], g) for n, g in expected.items())


def test_always_inside_a_block_is_refused():
    model, inputs = Plain(), {"x": torch.randn(4, 5, 8)}
    with pytest.raises(ValueError, match="parts of blocks.*blocks.1.mlp"):
        plugged(model, trained_by(inputs), always=["blocks.1.mlp"])


# -- torch.compile ----------------------------------------------------------------------------------------------------


def test_compiled_blocks_train_alike_and_stop_compiling_once_every_mode_was_seen():
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    losses = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        model, inputs = Plain(), {"x": torch.randn(4, 5, 8)}
        prog = plugged(model, trained_by(inputs))
        for block in prog.blocks if compiled else []:
            block.module.compile(backend=backend)
        names = [b.name for b in prog.blocks]
        losses[compiled] = []
        for _ in range(3):
            before = len(graphs)
            for mode, active in product(("bypass", "prefix", "pass", "skip"), (names[1:2], names)):
                set_active(prog.blocks, active, frozen=mode)
                losses[compiled].append(trained_by(inputs)(model).mean())
                losses[compiled][-1].backward()
                model.zero_grad(set_to_none=True)
        assert len(graphs) == before and bool(graphs) == compiled, "a third round of switches compiles nothing"
    assert len(graphs) <= 8, "torch._dynamo's limit of recompiles"
    assert losses[True] == losses[False]


# -- schedule-free ----------------------------------------------------------------------------------------------------


def test_a_search_with_a_schedule_free_optimizer_leaves_its_counts_and_judges_its_average():
    torch.manual_seed(0)
    model, inputs = Plain(), {"x": torch.randn(4, 5, 8)}
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-2)
    optimizer.train()

    def train(steps):
        for _ in range(steps):
            trained_by(inputs)(model).mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    train(3)
    taken = Snapshot.take(list(model.parameters()), optimizer)
    train(2)
    expected = [p.detach().clone() for p in model.parameters()]
    taken.restore()
    assert optimizer.param_groups[0]["k"] == 3
    train(2)
    assert all(torch.equal(p, e) for p, e in zip(model.parameters(), expected, strict=True))
    optimizer.eval()
    average = [p.detach().clone() for p in model.parameters()]
    optimizer.train()
    with at_average(optimizer):
        assert all(torch.allclose(p, a, atol=1e-6) for p, a in zip(model.parameters(), average, strict=True))
    assert optimizer.param_groups[0]["train_mode"]


def test_a_race_with_a_schedule_free_optimizer():
    torch.manual_seed(0)
    model, inputs = Plain(), {"x": torch.randn(4, 5, 8)}
    prog = plugged(model, trained_by(inputs), 400, Progressive(search_budget=0.5, stages=1))
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-2)
    optimizer.train()
    prog.step(0, optimizer)
    search = next(e for e in prog.events if e["event"] == "search")
    assert search["rungs"] and optimizer.param_groups[0]["k"] == search["steps"], "only the kept trajectory counts"


def test_a_schedule_free_optimizer_and_parked_weights_are_refused():
    model, inputs = Plain(), {"x": torch.randn(4, 5, 8)}
    prog = plugged(model, trained_by(inputs), 400, Progressive(priority="last", stages=1, frozen_weights="int8"))
    optimizer = schedulefree.AdamWScheduleFree(model.parameters())
    optimizer.train()
    with pytest.raises(ValueError, match="kept as 'int8', and AdamWScheduleFree writes all weights"):
        prog.step(0, optimizer)


def _tuples(count):
    g = torch.Generator().manual_seed(0)
    return [[torch.randn(4, 3, 8, generator=g), torch.randn(4, 3, 8, generator=g)] for _ in range(count)]


def test_a_list_of_tensors_is_one_held_out_batch_where_training_batches_are_lists():
    data = _tuples(3)
    one = EntProg(Plain(), pair_loss, held_out=data[0], train_batches=lambda: iter(data), total_steps=4)
    several = EntProg(Plain(), pair_loss, held_out=data[:2], train_batches=lambda: iter(data), total_steps=4)
    assert len(one.held_out) == 1 and len(several.held_out) == 2
    tensors = [x for x, _ in data]
    plain = EntProg(
        Plain(), lambda m, x: m(x).square().mean(), held_out=tensors[:2], train_batches=lambda: iter(tensors),
        total_steps=4,
    )  # fmt: skip
    assert len(plain.held_out) == 2


def pair_loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_out": []}, "held_out is empty"),
        ({"total_steps": 0}, "total_steps is 0"),
        ({"candidates": []}, "candidates is empty"),
        ({"loss_fn": lambda model, batch: torch.zeros((), requires_grad=True)}, "call the model it is given"),
        ({"total_steps": float("inf")}, "total_steps is inf"),
        ({"train_batches": []}, r"train_batches is a list.*lambda: iter"),
        ({"held_out": torch.utils.data.DataLoader(range(2))}, r"held_out is a DataLoader.*list\(loader\)"),
        ({"loss_fn": lambda model, batch: {"loss": pair_loss(model, batch)}}, "of type dict: return a scalar"),
        ({"loss_fn": lambda model, batch: (model(batch[0]) - batch[1]).square()}, r"of shape \(4, 3, 8\)"),
        ({"loss_fn": lambda model, batch: pair_loss(model, [batch[0], batch.pop()])}, r"changes.*batch\[1\]"),
        ({"loss_fn": lambda model, batch: pair_loss(model, [batch[0].mul_(0.5), batch[1]])}, r"changes.*batch\[0\]"),
    ],
)
def test_what_cannot_begin_is_said(change, message):
    data = _tuples(2)
    arguments = {"loss_fn": pair_loss, "held_out": data[0], "train_batches": lambda: iter(data), "total_steps": 4}
    with pytest.raises(ValueError, match=message):
        EntProg(Plain(), **(arguments | change))


def test_an_optimizer_that_lacks_what_may_train_is_refused():
    data, model = _tuples(2), Plain()
    prog = EntProg(model, pair_loss, held_out=data[0], train_batches=lambda: iter(data), total_steps=4)
    with pytest.raises(ValueError, match=r"lacks parameters of the blocks \['blocks.3'\]"):
        prog.step(0, torch.optim.SGD([p for n, p in model.named_parameters() if "blocks.3" not in n], lr=0.1))


def test_frozen_blocks_beside_adapted_ones_stay_frozen():
    data, model = _tuples(2), Plain()
    for name, p in model.named_parameters():
        p.requires_grad_("blocks.0.mlp.2" in name or "blocks.1.mlp.2" in name)  # as an adapter among frozen weights
    prog = EntProg(model, pair_loss, held_out=data[0], train_batches=lambda: iter(data), total_steps=4)
    assert prog.candidates == ["blocks.0", "blocks.1"]


def test_the_bypass_sets_of_a_stage_survive_a_resume():
    data = _tuples(4)

    def made(model):
        settings = Progressive(priority="last", schedule="linear", stages=2, min_fidelity=0.1, min_new_fidelity=0.0)
        return EntProg(
            model, pair_loss, held_out=data[0], train_batches=lambda: iter(data), total_steps=8, strategy=settings,
        )  # fmt: skip

    model = Plain()
    prog = made(model)
    prog.step(0, torch.optim.SGD(model.parameters(), lr=0.1))
    again = made(Plain())
    again.load_state_dict(json.loads(json.dumps(prog.state_dict())))
    assert prog.bypass_sets and {c: list(v) for c, v in again.bypass_sets.items()} == {
        c: list(v) for c, v in prog.bypass_sets.items()
    }
