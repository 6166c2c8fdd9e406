"""EntProg in a foreign loop: what trains, what moves, what is refused."""

from itertools import count, islice, repeat
from types import SimpleNamespace

import pytest
import torch
from conftest import ZOO, Plain, first, trained_by

from entprog import memory
from entprog.blocks import find_blocks
from entprog.budget import Keeping
from entprog.frozen import weight_bytes
from entprog.modes import mode_of
from entprog.plugin import EntProg
from entprog.strategy import STRATEGIES, Progressive, add_adapters


def loop(model, inputs, settings, steps=8, **kwargs):
    """The five-line loop on fixed inputs; returns (prog, names of active blocks per step)."""
    loss_fn = trained_by(inputs)
    prog = EntProg(model, loss_fn, held_out=None, train_batches=lambda: islice(count(), 64), total_steps=steps,
                   strategy=settings, clock="model", **kwargs)  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    for step in range(steps):
        prog.step(step, optimizer)
        history.append(prog.active)
        loss_fn(model).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return prog, history


def test_it_discovers_ranks_and_trains_any_family(family):
    model, inputs = family
    prog, history = loop(model, inputs, Progressive(schedule="linear", stages=4))
    assert [len(h) for h in history] == sorted(len(h) for h in history)
    assert set(history[-1]) == {b.name for b in prog.blocks}
    assert set(history[0]) == set(prog.scores.ranking[: len(history[0])])
    kinds = [e["event"] for e in prog.events]
    assert kinds.count("score") == 1 and kinds.count("modes") == 4


@pytest.mark.parametrize("name", [n for n, make in STRATEGIES.items() if make() is not None])
def test_every_strategy_lowers_the_loss(name):
    torch.manual_seed(0)
    model, inputs = Plain(), {"x": torch.randn(4, 5, 8)}
    before = float(trained_by(inputs)(model).mean().detach())
    settings, blocks = STRATEGIES[name](), find_blocks(model, inputs)
    if settings.adapters:
        add_adapters(model, blocks, rank=2)
    prog, _ = loop(model, inputs, settings, steps=40, blocks=blocks)
    assert float(trained_by(inputs)(model).mean().detach()) < before
    assert prog.losses().shape == (8,), "4 samples, drawn twice"


@pytest.mark.parametrize("frozen", ["pass", "bypass"])
def test_fixed_with_all_blocks_equals_full_training_bit_for_bit(family, frozen):
    model, inputs = family
    start = {k: v.clone() for k, v in model.state_dict().items()}
    settings = Progressive(priority="first", schedule="fixed", active_share=1.0, stages=2, frozen=frozen)
    loop(model, inputs, settings)
    progressive = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(8):
        trained_by(inputs)(model).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert all(torch.equal(v, progressive[k]) for k, v in model.state_dict().items())


def test_blocks_sit_out_and_come_back():
    model, inputs = Plain(depth=8), {"x": torch.randn(4, 5, 8)}
    settings = Progressive(schedule="fixed", active_share=0.5, skip=0.5, restore_at=0.5, stages=1)
    prog, _ = loop(model, inputs, settings, steps=8)
    first_modes, last_modes = (e["modes"] for e in prog.events if e["event"] == "modes")
    assert list(first_modes.values()).count("skip") == 4 and "skip" not in last_modes.values()
    restored = [e for e in prog.events if e["event"] == "modes"][1]
    assert restored["step"] == 4 and restored["reason"] == "restored"
    assert prog.boundaries() == [0.0, 0.5]


def test_held_out_loss_is_the_whole_networks_while_blocks_sit_out():
    model, inputs = Plain(depth=8), {"x": torch.randn(4, 5, 8)}
    prog, _ = loop(model, inputs, Progressive(schedule="fixed", skip=0.5, restore_at=1.0, stages=1), steps=2)
    assert "skip" in prog.modes.values()
    from entprog.modes import running

    with running(prog.blocks, "train"), torch.no_grad():
        assert torch.equal(prog.losses()[:4], trained_by(inputs)(model))


@pytest.mark.parametrize("search", ["race", *(pytest.param(s, marks=pytest.mark.slow) for s in ("paired", "literal"))])
def test_a_search_in_the_loop_is_affordable_deterministic_and_logged(search):
    outcomes = []
    for _ in range(2):
        torch.manual_seed(0)
        model, inputs = Plain(depth=4), {"x": torch.randn(4, 5, 8)}
        settings = Progressive(search=search, search_budget=0.5, stages=2, skip=0.5)
        prog, history = loop(model, inputs, settings, steps=400)
        searches = [e for e in prog.events if e["event"] == "search"]
        assert len(searches) == 2 and searches[0]["rungs"], "the first stage has several candidates"
        assert prog.search_steps > 0
        outcomes.append((history, [p.detach().clone() for p in model.parameters()]))
    assert outcomes[0][0] == outcomes[1][0]
    assert all(torch.equal(a, b) for a, b in zip(outcomes[0][1], outcomes[1][1], strict=True))


def test_stem_is_frozen_until_the_first_block_trains_and_the_head_never():
    model, inputs = Plain(depth=4), {"x": torch.randn(4, 5, 8)}
    prog, history = loop(model, inputs, Progressive(priority="last", schedule="linear", stages=4), steps=4)
    assert [p.requires_grad for p in model.embed.parameters()] == [True, True]
    model2 = Plain(depth=4)
    start = model2.embed.weight.detach().clone(), model2.head.weight.detach().clone()
    prog, _ = loop(model2, inputs, Progressive(priority="last", schedule="fixed", active_share=0.5), steps=4)
    assert torch.equal(model2.embed.weight, start[0]) and not torch.equal(model2.head.weight, start[1])


def test_named_new_modules_train_throughout_and_frozen_ones_are_never_enabled():
    model, inputs = ZOO["pose_dit"]()
    model.x_embedder.requires_grad_(False)
    settings = Progressive(schedule="linear", stages=2, stem="always")
    prog, _ = loop(model, inputs, settings, steps=4, always=["pose_guider"])
    assert not any(p.requires_grad for p in model.x_embedder.parameters())
    assert all(p.requires_grad for p in model.pose_guider.parameters())
    always = {id(p) for p in prog.always}
    assert {id(p) for m in (model.pose_guider, model.final_layer) for p in m.parameters()} == always
    prog.release()
    with pytest.raises(ValueError, match="always names"):
        loop(model, inputs, settings, always=["pose_encoder"])


def test_adapters_that_nobody_put_in_are_refused():
    with pytest.raises(ValueError, match="add_adapters"):
        loop(Plain(), {"x": torch.randn(4, 5, 8)}, Progressive(adapters=True, frozen="pass"))


def test_the_deciding_priority_is_not_measured_beside_itself():
    settings = Progressive(priority="cei", also_score=("cei", "cei_abs"), schedule="linear", stages=2)
    prog, _ = loop(Plain(), {"x": torch.randn(4, 5, 8)}, settings, steps=4)
    assert [e["priority"] for e in prog.events if e["event"] == "score"] == ["cei_abs", "cei"]


def test_repeating_a_step_changes_nothing_and_pending_gradients_are_refused():
    model, inputs = Plain(), {"x": torch.randn(4, 5, 8)}
    loss_fn = trained_by(inputs)
    prog = EntProg(model, loss_fn, held_out=None, train_batches=lambda: range(8), total_steps=4,
                   strategy=Progressive(schedule="linear", stages=4))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters())
    prog.step(0, optimizer)
    events = len(prog.events)
    loss_fn(model).mean().backward()
    prog.step(0, optimizer)  # inside an accumulation window
    assert len(prog.events) == events
    with pytest.raises(RuntimeError, match="gradients are pending"):
        prog.step(1, optimizer)


def test_state_dict_continues_and_refuses_another_setting():
    inputs = {"x": torch.randn(4, 5, 8)}
    prog, _ = loop(Plain(), inputs, Progressive(schedule="linear", stages=4), steps=6)
    other = EntProg(Plain(), trained_by(inputs), held_out=None, train_batches=lambda: range(8), total_steps=6,
                    strategy=Progressive(schedule="linear", stages=4))  # fmt: skip
    other.load_state_dict(prog.state_dict())
    assert other.active == prog.active and other.modes == prog.modes and other.scores == prog.scores
    other.settings = Progressive(schedule="linear", stages=2)
    with pytest.raises(ValueError, match=r"another setting.*stages.*\(4, 2\)"):
        other.load_state_dict(prog.state_dict())


def test_wrapped_models_are_refused_with_the_recipe():
    model = torch.compile(Plain())
    with pytest.raises(ValueError, match="build it on the bare model"):
        EntProg(model, lambda m, b: first(m(b)), held_out=None, train_batches=lambda: [], total_steps=1)


def test_param_groups_are_never_touched():
    model, inputs = Plain(), {"x": torch.randn(4, 5, 8)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = [(id(g), [id(p) for p in g["params"]], g["lr"]) for g in optimizer.param_groups]
    prog = EntProg(model, trained_by(inputs), held_out=None, train_batches=lambda: range(8), total_steps=4,
                   strategy=Progressive(schedule="linear", stages=4))  # fmt: skip
    for step in range(4):
        prog.step(step, optimizer)
    assert before == [(id(g), [id(p) for p in g["params"]], g["lr"]) for g in optimizer.param_groups]


def test_a_race_trains_each_candidate_in_the_modes_its_fidelity_allows():
    torch.manual_seed(0)
    model, inputs = Plain(depth=4), {"x": torch.randn(4, 5, 8)}
    settings = Progressive(search_budget=0.5, stages=1, min_fidelity=1.0)
    loss_fn, seen = trained_by(inputs), set()

    def watching(m, b):
        if torch.is_grad_enabled() and "prog" in found:
            seen.update(found["prog"].modes.values())
        return loss_fn(m)

    found = {}
    found["prog"] = EntProg(model, watching, held_out=None, train_batches=lambda: count(), total_steps=400,
                            strategy=settings, clock="model")  # fmt: skip
    found["prog"].step(0, torch.optim.AdamW(model.parameters()))
    assert found["prog"].events[-2]["rungs"], "there was a race"
    assert seen <= {"train", "prefix"}, "min_fidelity = 1 is the exact method, in the race too"


def test_batches_of_a_search_are_the_same_for_all_and_begin_again():
    from entprog.supernet import BatchStream

    data = torch.utils.data.DataLoader(range(5), batch_size=2, shuffle=True)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    stream = BatchStream(lambda: iter(data))
    drawn = [stream[i].tolist() for i in (6, 0, 3)]
    assert torch.equal(torch.get_rng_state(), before), "the loop's own random numbers are not touched"
    torch.manual_seed(2)
    again = BatchStream(lambda: iter(data))
    assert [again[i].tolist() for i in (6, 0, 3)] == drawn
    with pytest.raises(ValueError, match="yields no batch"):
        BatchStream(lambda: iter([]))[0]


@pytest.mark.parametrize("priority, batches", [("gain", 5), ("grad_norm", 10)])
def test_scores_are_paid_for_as_they_are_taken_sample_by_sample(priority, batches, monkeypatch):
    model, asked = Plain(depth=4), []
    monkeypatch.setattr("entprog.run_cost.now", lambda: 0.25 * len(asked))  # a sample takes a quarter of a second

    def loss_fn(model, batch):
        asked.append(batch)
        return model(batch["x"]).square().mean()

    def decide(key, compute):
        return 1.0 if key == "full step seconds" else compute()  # not the 2 seconds its samples take one by one

    drawn = [{"x": torch.randn(8, 5, 8)} for _ in range(12)]
    prog = EntProg(model, loss_fn, held_out=drawn[:2], train_batches=lambda: iter(drawn), total_steps=1,
                   predict=lambda m, b: m(b["x"]), seconds=1000.0, decide=decide,
                   strategy=Progressive(priority=priority, schedule="fixed", stages=1, score_budget=0.02))  # fmt: skip
    prog.step(0, torch.optim.AdamW(model.parameters()), progress=0.0)
    (event,) = (e for e in prog.events if e["event"] == "score")
    assert event["samples"] == batches


@pytest.mark.parametrize("frozen, trains", [("pass", 4), ("bypass", 2)])
def test_a_stage_that_hardly_saves_trains_all_blocks_and_says_so(frozen, trains):
    model, inputs = Plain(depth=4), {"x": torch.randn(4, 5, 8)}
    settings = Progressive(priority="first", schedule="linear", stages=2, frozen=frozen, min_fidelity=0.0,
                           min_new_fidelity=0.0, min_saving=0.2)  # fmt: skip
    prog, history = loop(model, inputs, settings)
    assert len(history[0]) == trains and len(history[-1]) == 4
    said = [e for e in prog.events if e["event"] == "all_train"]
    assert len(said) == (trains == 4) and all(e["wanted"] == 2 and 0 < e["saving"] < 0.2 for e in said)
    _, plain = loop(
        Plain(depth=4), inputs, Progressive(priority="first", schedule="fixed", frozen=frozen, min_saving=0.2)
    )
    assert len(plain[0]) == 2, "a share that was asked for stays"


@pytest.mark.parametrize("priority, trains", [("first", True), ("last", False)])
def test_fidelity_is_measured_with_the_stem_as_it_will_train(priority, trains, monkeypatch):
    from entprog import bypass

    model, inputs = ZOO["wan"]()
    seen = []

    def watched(*args, **kwargs):
        seen.append({p.requires_grad for p in prog.stem})
        return bypass.choose_bypass(*args, **kwargs)

    monkeypatch.setattr("entprog.plugin.choose_bypass", watched)
    settings = Progressive(priority=priority, schedule="fixed", active_share=0.5, stages=1)
    prog = EntProg(model, trained_by(inputs), held_out=None, train_batches=lambda: islice(count(), 64), total_steps=2,
                   strategy=settings, clock="model")  # fmt: skip
    prog.step(0, torch.optim.AdamW(model.parameters()))
    assert prog.stem and seen == [{trains}]


@pytest.mark.parametrize("name, wrong", [("min_fidelity", 1.5), ("min_new_fidelity", -0.1), ("min_saving", 1.0)])
def test_bounds_that_nothing_can_meet_are_refused(name, wrong):
    with pytest.raises(ValueError, match=f"{name} {wrong}"):
        Progressive(**{name: wrong})


def racing(loss_fn, model, **kwargs):
    """A run that can afford a race of two before its first step."""
    settings = Progressive(schedule="adaptive", search_budget=0.2, stages=1)
    given = {"held_out": None, "train_batches": lambda: islice(count(), 64), "total_steps": 400, "clock": "model"}
    return EntProg(model, loss_fn, **{"strategy": settings} | given | kwargs)


@pytest.mark.parametrize("failing, at", [("score_batches", 1), ("train_batches", 4)])
def test_a_step_that_failed_begins_its_stage_when_it_is_called_again(failing, at):
    torch.manual_seed(0)
    model, inputs, broken = Plain(depth=4), {"x": torch.randn(4, 5, 8)}, [True]

    def batches():
        for i in range(64):
            if broken and i == at:
                raise OSError("the disk is gone")
            yield i

    whole = {"train_batches": lambda: range(64), "score_batches": lambda: range(64)}
    prog = racing(trained_by(inputs), model, **whole | {failing: batches})
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            prog.step(0, optimizer)
        assert (prog.stage, prog.last_step, prog.candidate) == (-1, -1, None)
        assert all(map(torch.equal, model.parameters(), start)), "steps of the race that failed are taken back"
    broken.clear()
    prog.step(0, optimizer)
    assert prog.stage == prog.last_step == 0 and prog.active and prog.events[-1]["event"] == "modes"
    assert prog.search_steps and not prog.stream.drawn, "nobody needs the batches of a search after it"


def test_a_search_puts_back_what_the_loss_and_batch_norm_hold():
    torch.manual_seed(0)
    model, inputs, scale = Plain(depth=4), {"x": torch.randn(4, 5, 8)}, torch.nn.Parameter(torch.ones(()))
    model.norm = torch.nn.BatchNorm1d(5)
    model.register_buffer("table", torch.arange(3))  # of no training

    def loss_fn(model, batch):
        return (model.norm(model(**inputs)) * scale - 3).square().flatten(1).mean(1)

    prog = EntProg(model, loss_fn, held_out=None, train_batches=lambda: range(64), total_steps=4, clock="model",
                   strategy=Progressive(schedule="linear", stages=4))  # fmt: skip
    prog.step(0, torch.optim.AdamW([*model.parameters(), scale], lr=0.1))
    names = {"scale": scale, **dict(model.norm.named_buffers())}
    before, kept = {n: v.detach().clone() for n, v in names.items()}, prog.snapshot()
    prog.train(0, 2)
    assert not any(torch.equal(v, before[n]) for n, v in names.items())
    kept.restore()
    assert all(torch.equal(v, before[n]) for n, v in names.items()) and scale not in prog.optimizer.state


def test_at_learning_rate_0_no_race_is_run_and_the_event_says_so():
    model, inputs = Plain(depth=4), {"x": torch.randn(4, 5, 8)}
    prog = racing(trained_by(inputs), model, strategy=Progressive(search_budget=0.2, stages=2))
    prog.step(0, torch.optim.AdamW(model.parameters(), lr=0.0))
    (event,) = (e for e in prog.events if e["event"] == "search")
    assert "learning rate is 0" in event["note"] and not event["rungs"] and len(prog.active) == 2


@pytest.mark.parametrize("rates, chosen", [(1e-3, True), (1e30, False)])
def test_where_every_candidate_diverges_the_linear_schedule_goes_on_from_the_start(rates, chosen):
    torch.manual_seed(0)
    model, inputs = Plain(depth=4), {"x": torch.randn(4, 5, 8)}
    start = [p.detach().clone() for p in model.parameters()]
    prog = racing(trained_by(inputs), model, strategy=Progressive(search_budget=0.2, stages=2))
    prog.step(0, torch.optim.SGD(model.parameters(), lr=rates))
    (event,) = (e for e in prog.events if e["event"] == "search")
    assert event["rungs"] and (prog.search_steps > 0) == chosen
    if not chosen:
        assert "diverged" in event["note"] and len(prog.active) == 2
        assert all(map(torch.equal, model.parameters(), start))


def test_release_gives_the_model_back_as_it_was_found(monkeypatch):
    model, inputs, moved = Plain(depth=4), {"x": torch.randn(4, 5, 8)}, []
    model.head.bias.requires_grad_(False)
    found = [p.requires_grad for p in model.parameters()]
    settings = Progressive(priority="last", schedule="fixed", active_share=0.5, stages=1, optimizer_state="park")
    prog, _ = loop(model, inputs, settings, steps=2)
    assert [p.requires_grad for p in model.parameters()] != found
    monkeypatch.setattr(memory, "settle_optimizer", lambda *args: moved.append(args))
    prog.release()
    assert [p.requires_grad for p in model.parameters()] == found
    assert moved == [(prog.optimizer, [])], "nothing is parked any more"
    again, _ = loop(model, inputs, settings, steps=1)
    assert [id(p) for p in again.stem] == [id(p) for p in prog.stem] and again.stem
    moved.clear()
    prog.release(optimizer=False)
    assert not moved


def test_blocks_that_may_never_train_are_scored_with_their_own_weights():
    scores = []
    for kept in (None, "int8"):
        torch.manual_seed(0)
        model, inputs = Plain(depth=4), {"x": torch.randn(4, 5, 8)}
        settings = Progressive(schedule="fixed", stages=1, frozen_weights=kept)
        prog, _ = loop(model, inputs, settings, steps=1, candidates=["blocks.0", "blocks.1"])
        scores.append(prog.scores.values)
    assert scores[0] == scores[1]
    assert hasattr(model.blocks[3].mlp[0].weight, "_entprog_parked"), "and parked again afterwards"


def test_a_model_released_on_the_way_is_frozen_again_by_the_next_step():
    model, inputs = Plain(depth=4), {"x": torch.randn(4, 5, 8)}
    settings = Progressive(
        schedule="fixed", active_share=0.25, skip=0.5, restore_at=1.0, stages=1, frozen_weights="int8"
    )
    prog, _ = loop(model, inputs, settings, steps=2)

    def state():
        return [p.requires_grad for p in model.parameters()], [mode_of(b) for b in prog.blocks], weight_bytes(model)

    before, saved = state(), prog.state_dict()
    prog.release()
    assert "skip" in before[1] and [mode_of(b) for b in prog.blocks] == ["train"] * 4
    prog.step(1, prog.optimizer)  # in an accumulation window
    assert state() == before and not prog.released
    prog.decide("later", lambda: 1)
    assert "later" not in saved["decisions"]


@pytest.mark.parametrize("max_memory", [None, "1GiB"])
def test_what_is_only_measured_leaves_batch_norm_alone(max_memory):
    torch.manual_seed(0)
    model, batch = Plain(depth=4), {"x": torch.randn(4, 5, 8)}
    model.norm = torch.nn.BatchNorm1d(5)
    prog = EntProg(model, lambda m, b: m(m.norm(b["x"])).square().mean(), held_out=batch, total_steps=4, clock="model",
                   train_batches=lambda: islice(repeat(batch), 64), max_memory=max_memory,
                   strategy=Progressive(priority="gain", schedule="linear", stages=2))  # fmt: skip
    prog.step(0, torch.optim.AdamW(model.parameters()))
    assert not model.norm.running_mean.any() and not model.norm.num_batches_tracked


def test_what_is_named_to_train_throughout_and_is_frozen_is_refused():
    model = Plain()
    model.embed.requires_grad_(False)
    with pytest.raises(ValueError, match=r"always names \['embed'\], which are frozen"):
        loop(model, {"x": torch.randn(4, 5, 8)}, Progressive(), always=["embed", "head"])


def test_a_measurement_that_fails_leaves_the_choice_to_park(monkeypatch):
    prog = SimpleNamespace(optimizer_state="park", optimizer=None)
    monkeypatch.setattr(memory, "apply", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        memory.measuring(prog, {}, Keeping())
    assert prog.optimizer_state == "park"
