"""One memory budget: what is kept how, what fits, rotation, exact resume, refusals."""

import json
import weakref
from dataclasses import replace
from functools import cache
from itertools import count, islice, product
from types import SimpleNamespace

import pytest
import torch
from conftest import ZOO, Plain
from safetensors.torch import load_file
from torch import nn

from entprog import memory, ranking
from entprog.blocks import find_blocks, outside_blocks
from entprog.budget import SUMS, Budget, Keeping, merged
from entprog.checkpointing import CHECKPOINTS
from entprog.config import RunConfig
from entprog.data.synthetic import figures
from entprog.measure import saved_bytes
from entprog.models.pose_dit import pose_dit
from entprog.modes import running, set_active
from entprog.plugin import EntProg
from entprog.priority import HostBatches, score
from entprog.schedule import rotated
from entprog.strategy import Progressive, add_adapters
from entprog.supernet import BatchStream
from entprog.train import Trainer

STATE = {"frozen_weights": "int8", "optimizer_state": "park", "growth": "rotate", "rotate_every": 2}


def batches():
    """Endless batches, the same at every call."""
    for i in count():
        yield {"x": torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(i))}


def loss_fn(model, batch):
    return (model(batch["x"]) - batch["x"].roll(1, -1)).square().flatten(1).mean(1)


class Run:
    """A loop of one's own that measures every step it takes."""

    def __init__(self, settings, steps=16, max_memory=None, depth=6, **kwargs):
        torch.manual_seed(0)
        self.model = Plain(depth=depth, width=32)
        if settings.adapters:
            kwargs["blocks"] = find_blocks(self.model)
            add_adapters(self.model, kwargs["blocks"], rank=4)
        held_out = next(islice(batches(), 900, None))
        self.prog = EntProg(self.model, loss_fn, held_out=held_out, train_batches=batches, total_steps=steps,
                            strategy=settings, clock="model", max_memory=max_memory, **kwargs)  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.steps, self.history, self.bytes, self.peaks = steps, [], [], []

    def go(self, begin=0, end=None):
        for step, batch in islice(enumerate(batches()), begin, end or self.steps):
            self.prog.step(step, self.optimizer)
            self.history.append(tuple(self.prog.active))
            with saved_bytes(ignore=list(self.model.parameters())) as held:
                loss = loss_fn(self.model, batch).mean()
                self.bytes.append(memory.held(self.prog, held()))
            self.peaks.append(self.prog.peak_bytes)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return self


def cei_rotating(**changes):
    return Progressive(**{"priority": "cei", "schedule": "fixed", "active_share": 0.34, "stages": 2} | STATE | changes)


@cache
def full_need(depth=6):
    """Bytes of a step that trains everything, by the run's own accounting."""
    settings = Progressive(priority="first", schedule="fixed", active_share=1.0, stages=1)
    return max(Run(settings, steps=1, depth=depth).go().bytes)


@pytest.mark.parametrize(
    "settings",
    [
        Progressive(
            priority="gain", also_score=("cei",), schedule="linear", stages=2, min_fidelity=0.5, rotate_every=4
        ),
        Progressive(priority="cei", schedule="linear", stages=2, frozen="pass", rotate_every=4),
        Progressive(priority="cei", search="race", stages=2, search_budget=0.6, min_fidelity=0.5),
    ],
    ids=["gain", "pass", "race"],
)
def test_a_run_never_exceeds_its_memory_and_every_block_trains(settings):
    limit = int(0.5 * full_need())
    run = Run(settings, steps=64, max_memory=limit).go()
    assert max(run.bytes) <= limit, "every step"
    assert max(run.peaks) <= limit, "scoring, searching, fidelity and trials"
    assert min(run.peaks) > 0.2 * limit, "they were counted"
    checks = [e for e in run.prog.events if e["event"] == "plan_check"]
    assert checks and all(abs(e["error"]) < 0.2 for e in checks)
    if settings.schedule == "linear":
        assert max(map(len, run.history)) < 6, "growth stopped"
        assert {name for active in run.history for name in active} == {b.name for b in run.prog.blocks}


def test_enough_memory_changes_nothing():
    settings = Progressive(priority="cei", schedule="linear", stages=2, optimizer_state="park")
    free, bound = Run(settings).go(), Run(settings, max_memory="1GiB").go()
    assert [len(a) for a in free.history] == [len(a) for a in bound.history]
    assert bound.prog.keeping == Keeping() and not any(e["event"] == "rotated" for e in bound.prog.events)
    assert free.prog.scores.ranking == bound.prog.scores.ranking


def test_each_kind_of_block_is_checkpointed_in_the_cheapest_way_that_fits():
    model, inputs = ZOO["pose_dit"]()  # two kinds, over space and over time
    blocks = find_blocks(model, inputs)
    names, outside = [b.name for b in blocks], outside_blocks(model, blocks, (), lambda: model(**inputs))
    settings = Progressive(priority="cei", stages=1, frozen="pass", frozen_weights="bf16")
    budget = Budget("1GiB", model, blocks, names, outside, inputs, 2, settings)
    kinds = budget.profile.kinds()
    assert len(set(kinds.values())) == 2
    modes = dict.fromkeys(names, "train")
    every = [Keeping("bf16", {n: w for n, k in kinds.items() for kind, w in zip(sorted(set(kinds.values())), ways,
             strict=True) if kind == k}) for ways in product(CHECKPOINTS, repeat=2)]  # fmt: skip
    flops = [budget.profile.step(modes, outside="all", checkpointing=k.checkpointing)["flops"] for k in every]
    needs, chosen = [budget.training(modes, k) for k in every], []
    for limit in sorted(set(needs)):
        budget.limit = limit
        found = budget.choose(modes)
        assert budget.training(modes, found) <= limit
        cheapest = min(f for f, need in zip(flops, needs, strict=True) if need <= limit)
        assert budget.profile.step(modes, outside="all", checkpointing=found.checkpointing)["flops"] == cheapest
        chosen.append(found)
    assert Keeping("bf16", "none") in chosen and any(isinstance(k.checkpointing, dict) for k in chosen)
    ways = {
        w for k in chosen for w in ([k.checkpointing] if isinstance(k.checkpointing, str) else k.checkpointing.values())
    }
    assert ways == set(CHECKPOINTS)
    budget.limit = min(needs) - 1
    assert budget.choose(modes) is None


def test_adapters_are_counted():
    settings = Progressive(priority="cei", schedule="linear", stages=2, frozen="pass", adapters=True, rotate_every=4)
    limit = int(0.7 * full_need())
    run = Run(settings, steps=16, max_memory=limit).go()
    assert max(run.bytes) <= limit and max(run.peaks) <= limit
    checks = [e for e in run.prog.events if e["event"] == "plan_check"]
    assert checks and all(abs(e["error"]) < 0.1 for e in checks)
    assert any(len(active) < 6 for active in run.history)
    half = [p for b in run.prog.blocks for p in b.adapters if p.shape[1] == 4]  # of each pair the one that starts at 0
    assert half and all(p.any() for p in half), "adapters train throughout"


def test_what_makes_room_changes_no_number():
    """Checkpointed, with weights streamed from the host and parked moments: the same weights after every step."""
    settings = Progressive(priority="last", schedule="linear", stages=2, frozen="pass", growth="nested")
    free = Run(settings, max_memory="1GiB").go(end=4)
    assert free.prog.keeping == Keeping()
    limit = int(1.03 * free.prog.budget.training(free.prog.modes, Keeping("cpu", "block")))
    bound = Run(settings, max_memory=limit).go(end=4)
    assert bound.prog.keeping.frozen_weights == "cpu" and bound.prog.keeping.checkpointing != "none"
    assert bound.history == free.history
    assert max(bound.bytes) <= limit < 0.95 * max(free.bytes)
    bound.prog.release()
    assert all(torch.equal(p, q) for p, q in zip(bound.model.parameters(), free.model.parameters(), strict=True))
    assert not any("forward" in vars(m) for m in bound.model.modules()), "as it was found"


@pytest.mark.parametrize("max_memory", [None, 0.6])
def test_resume_is_exact_with_rotation_int8_and_parked_state(max_memory):
    limit = max_memory and int(max_memory * full_need())
    whole = Run(cei_rotating(), steps=12, max_memory=limit).go()
    assert len(set(whole.history)) > 3
    first = Run(cei_rotating(), steps=12, max_memory=limit).go(end=5)  # within a period
    state, weights = first.prog.state_dict(), {k: v.clone() for k, v in first.model.state_dict().items()}
    moments = first.optimizer.state_dict()
    second = Run(cei_rotating(), steps=12, max_memory=limit)
    second.prog.load_state_dict(state)
    second.model.load_state_dict(weights)
    second.optimizer.load_state_dict(moments)
    second.go(begin=5)
    assert second.history == whole.history[5:]
    ours, theirs = second.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_frozen_weights_and_optimizer_state_follow_every_switch():
    run = Run(cei_rotating(optimizer_state="drop"))
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    run.go(end=1)
    for block in run.prog.blocks:
        parked = [hasattr(p, "_entprog_parked") for p in block.parameters()]
        assert any(parked) != (block.name in run.prog.active)
        if block.name not in run.prog.active:
            own = {k: v for k, v in run.model.state_dict().items() if k.startswith(f"{block.name}.")}
            assert all(torch.equal(v, before[k]) for k, v in own.items()), "originals, not what they were rounded to"
    run.go(begin=1)
    kept = [p for b in run.prog.blocks for p in b.parameters() if p in run.optimizer.state]
    assert all(p.requires_grad for p in kept) and kept, "state of what trains only"


def test_rotation_is_deterministic_weighted_and_reaches_every_block():
    ranking, waited, drawn = [f"b{i}" for i in range(10)], {}, []
    for period in range(60):
        now = rotated(ranking, 3, period, waited)
        assert now == rotated(ranking, 3, period, waited) and len(set(now)) == 3
        waited = {n: 0 if n in now else waited.get(n, 0) + 1 for n in ranking}
        assert max(waited.values()) <= 2 * 4 + 4
        drawn += now
    assert drawn.count("b0") + drawn.count("b1") > 2 * (drawn.count("b8") + drawn.count("b9"))
    assert rotated(ranking, 3, 1, {}) != rotated(ranking, 3, 1, {}, seed=1)


def test_rotation_holds_its_set_for_a_period_and_frozen_weights_still():
    run = Run(cei_rotating(rotate_every=4)).go()
    assert all(len(set(run.history[i : i + 4])) == 1 for i in range(0, 16, 4)) and len(set(run.history)) > 1
    assert {len(a) for a in run.history} == {2}
    reasons = [e["reason"] for e in run.prog.events if e["event"] == "modes"]
    assert reasons == ["stage", "rotated", "stage", "rotated"]


def test_gain_of_groups_is_gain_of_all():
    torch.manual_seed(0)
    model = Plain(depth=4, width=8)
    model.blocks[1].extra = nn.Linear(8, 8)  # blocks of two sizes
    blocks = find_blocks(model)
    some = [{"x": torch.randn(2, 5, 8)} for _ in range(3)]

    def of(group):
        with running(blocks, "pass"):
            set_active(blocks, [], frozen="pass")
            return score(model, group, lambda m, b: m(b["x"]), some, "gain", loss_fn=lambda m, b: loss_fn(m, b).mean())

    whole, parts = of(blocks), merged([of(blocks[:1]), of(blocks[1:])], blocks)
    assert parts.ranking == whole.ranking
    assert parts.values == pytest.approx(whole.values, rel=1e-5)
    assert list(parts.intervals) == list(whole.intervals)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_gain_holds_of_all_batches_is_counted_in_float64(dtype, monkeypatch):
    model, x = Plain(depth=4, width=8).to(dtype), torch.randn(2, 5, 8, dtype=dtype)
    blocks = find_blocks(model)
    count = sum(p.numel() for p in blocks[0].parameters())
    settings = Progressive(priority="gain", stages=1)
    names, outside = [b.name for b in blocks], outside_blocks(model, blocks, (), lambda: model(x))
    budget = Budget("1GiB", model, blocks, names, outside, {"x": x}, 2, settings)
    keeping = Keeping(None, "block")
    one = count * (2 * dtype.itemsize + 16)  # a sample's gradient, their sum, two sums of all batches
    budget.limit = budget.scoring(keeping) + 2 * one
    assert budget.groups(blocks, SUMS["gain"]) == (keeping, [blocks[:2], blocks[2:]])
    run = SimpleNamespace(blocks=blocks, budget=None, model=model, prediction=None, loss=None, t=None, held_bytes=0,
                          score_batches=lambda: iter(()))  # fmt: skip
    held = []
    monkeypatch.setattr(ranking, "score", lambda *_, **__: held.append(run.held_bytes))
    for priority in ("gain", "grad_norm", "cei"):
        ranking._scored(run, priority, 2, None)
    assert held == [4 * count * (dtype.itemsize + 16), 4 * count * dtype.itemsize, 0] and run.held_bytes == 0


def test_a_budget_and_a_run_say_the_same_of_what_trains_outside_blocks():
    for model, words in ((Plain(depth=3), {"all", "always"}), (nn.Sequential(*Plain(depth=3).blocks), {"none"})):
        blocks, x = find_blocks(model), torch.randn(2, 5, 8)
        always, stem = outside_blocks(model, blocks, (), lambda model=model, x=x: model(x))
        settings, names, found = Progressive(priority="cei", stages=1), [b.name for b in blocks], set()
        inputs = {"x" if isinstance(model, Plain) else "input": x}
        budget = Budget("1GiB", model, blocks, names, (always, stem), inputs, 2, settings)
        run = SimpleNamespace(blocks=blocks, stem=stem, always=always, settings=settings)
        for active in names:
            modes = dict.fromkeys(names, "pass") | {active: "train"}
            found.add(memory.outside(run, modes))
            assert budget._trained([active])[1] == memory.outside(run, modes)
        assert found == words


def test_a_step_that_holds_more_than_predicted_is_made_smaller_before_it_is_taken():
    limit = int(0.6 * full_need())
    settings = Progressive(priority="cei", schedule="fixed", active_share=0.75, stages=1, frozen="pass")
    run = Run(settings, steps=4, max_memory=limit)
    honest = run.prog.budget.training
    run.prog.budget.training = lambda modes, keeping: honest(modes, keeping) // 2
    run.go()
    checks = [e for e in run.prog.events if e["event"] == "plan_check"]
    assert checks[0]["measured"] > limit and checks[0]["error"] > 0.5, "the prediction was wrong"
    assert max(run.bytes) <= limit and max(run.peaks) <= 1.5 * limit and 0 < len(run.history[0]) < 5


def test_a_trial_that_the_gpu_has_too_little_for_leaves_nothing_behind(monkeypatch):
    run, left = Run(Progressive(frozen="pass"), max_memory="1GiB"), []

    def too_large(model, batch):
        kept = [torch.zeros(1)]
        kept.append(kept)
        left.append(weakref.ref(kept[0]))
        raise torch.cuda.OutOfMemoryError("of a test")

    for name in ("reset_peak_memory_stats", "max_memory_allocated", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    run.prog.optimizer, run.prog.loss_fn = run.optimizer, too_large
    monkeypatch.setattr(nn.Parameter, "is_cuda", True)
    assert memory._tried(run.prog) == 2 * run.prog.budget.limit and left[0]() is None


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    @property
    def device(self):
        return torch.device("cuda")

    def to(self, device):
        assert device == "cpu"
        return self.as_subclass(Waiting)


class Waiting(torch.Tensor):
    """One that has been moved to the host."""

    def to(self, device):
        assert device == torch.device("cuda")
        return self.as_subclass(OnGpu)


def test_batches_that_are_kept_wait_on_the_host():
    made = []

    def on_gpu(i):
        made.append(weakref.ref(x := torch.full((2,), float(i)).as_subclass(OnGpu)))
        return x

    def fresh():
        return ({"x": on_gpu(i), "rest": [torch.ones(1), "words"]} for i in range(3))

    stream, batches = BatchStream(fresh, host=True), HostBatches(fresh())
    for drawn in ([stream[i] for i in (2, 0, 1)], list(batches), list(batches)):
        assert {float(b["x"][0]) for b in drawn} == {0, 1, 2} and all(type(b["x"]) is OnGpu for b in drawn)
        assert all(b["rest"] == [torch.ones(1), "words"] for b in drawn)
    assert len(made) == 6 and not any(ref() is not None for ref in made)


def test_a_budget_scores_on_batches_that_wait_on_the_host_and_trains_its_searches_on_such(monkeypatch):
    kinds = []

    def watched(model, group, predict, drawn, *args, **kwargs):
        kinds.append((type(drawn), run.prog.stream.host))
        return score(model, group, predict, drawn, *args, **kwargs)

    monkeypatch.setattr("entprog.ranking.score", watched)
    for priority in ("cei", "gain"):
        run = Run(cei_rotating(priority=priority, frozen_weights=None), max_memory="1GiB")
        run.go(end=1)
    assert kinds and set(kinds) == {(HostBatches, True)}
    with pytest.raises(ValueError, match="at least 2 batches.* got 1"):
        score(run.model, run.prog.blocks, None, HostBatches(islice(batches(), 1)), "gain",
              loss_fn=lambda m, b: loss_fn(m, b).mean())  # fmt: skip


def test_a_trial_in_each_way_of_keeping_is_a_decision_of_its_own(monkeypatch):
    run = Run(cei_rotating(frozen_weights=None), steps=4, max_memory="1GiB").go(end=1)
    names = [b.name for b in run.prog.blocks]
    ways = [Keeping(None, dict.fromkeys(names, "none") | {name: "block"}) for name in names[:2]]
    before = len(run.prog.decisions)
    for keeping in ways:
        monkeypatch.setattr(memory, "kept", lambda prog, modes, keeping=keeping: keeping)
        memory.settle(run.prog, run.prog.candidate, 0.0)
    assert str(ways[0]) == str(ways[1]) and len(run.prog.decisions) == before + 2


def test_cost_aware_selection_scores_at_least_as_much_at_no_more_cost():
    settings = Progressive(priority="stride", schedule="fixed", active_share=0.34, stages=1, frozen="pass")
    top = Run(settings, steps=1).go().prog
    aware = Run(replace(settings, selection="cost_aware"), steps=1).go().prog
    names = [b.name for b in top.blocks]

    def worth(prog):
        return sum(prog.scores.values[n] for n in prog.active)

    def price(prog):
        return len(names) - min(map(names.index, prog.active)) + len(prog.active)

    assert set(top.active) == set(top.scores.ranking[:2]) and price(top) == 6 + 2, "block 0 is the best of all"
    assert worth(aware) > worth(top) and price(aware) <= price(top)


def test_budgets_that_cannot_be_kept_are_refused():
    cei = {"priority": "cei", "stages": 1}
    with pytest.raises(ValueError, match=r"max_memory .* is too little: the least is .* MiB, for .* one block"):
        Run(Progressive(**cei, frozen="pass"), max_memory="64 KiB")
    with pytest.raises(ValueError, match="not a size"):
        Run(Progressive(**cei), max_memory="much")
    with pytest.raises(ValueError, match="optimizer_state='keep'"):
        Run(Progressive(**cei, optimizer_state="keep"), max_memory="1GiB")
    with pytest.raises(ValueError, match="oracle"):
        Run(Progressive(priority="oracle"), max_memory="1GiB")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frozen_weights": "int3"}, "frozen_weights 'int3' is unknown"),
        ({"optimizer_state": "burn"}, "optimizer_state 'burn' is unknown"),
        ({"growth": "shrink"}, "growth 'shrink' is unknown"),
        ({"rotate_every": 0}, "rotate_every 0"),
        ({"selection": "cost_aware"}, "set frozen to 'pass'"),
        ({"adapters": True, "frozen": "pass", "frozen_weights": "int8"}, "adapters"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Progressive(**change)


def test_the_trainer_keeps_a_budget_and_resumes_in_it_exactly(tmp_path):
    config = RunConfig(
        steps=12, clips=16, held_out_clips=8, size=8, frames=2, batch_size=2, evaluations=1, checkpoint_every=5,
        stages=2, clock="model", frozen_weights="int8", rotate_every=3, max_memory=1_700_000, strategy="paper",
        schedule="linear", ema_decay=0.9,
    )  # fmt: skip

    class Killed(Exception):
        pass

    def trainer(out, dies=False):
        def on_progress(info):
            if dies and info["step"] == 8:
                raise Killed

        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = pose_dit("T", hidden_size=32, depth=4, num_heads=2)
        data, held_out = figures(24, size=8, frames=2), figures(8, size=8, frames=2, seed=5)
        return Trainer(config, model, data, held_out, tmp_path / out, on_progress)

    results = trainer("whole").run()
    with pytest.raises(Killed):
        trainer("broken", dies=True).run()
    assert trainer("broken").run()["held_out_losses"] == results["held_out_losses"]
    ours, theirs = (load_file(tmp_path / n / "checkpoints/final/diffusion_pytorch_model.safetensors")
                    for n in ("whole", "broken"))  # fmt: skip
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())
    assert results["peak_bytes"] <= config.max_memory
    events = [json.loads(line) for line in (tmp_path / "whole" / "events.jsonl").read_text().splitlines()]
    assert "rotated" in [e.get("reason") for e in events] and any(e["event"] == "plan_check" for e in events)
