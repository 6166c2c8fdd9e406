"""Whole runs on a tiny model: reproducible, resumable after a kill anywhere, honestly accounted."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from entprog.checkpoint import put_back
from entprog.config import RunConfig
from entprog.data.synthetic import figures
from entprog.ema import Ema
from entprog.measure import NET
from entprog.models.pose_dit import PoseDiT, pose_dit
from entprog.optim import cosine
from entprog.strategy import STRATEGIES
from entprog.train import Trainer

TINY = RunConfig(
    steps=24, clips=16, held_out_clips=8, size=8, frames=2, batch_size=2, evaluations=2, checkpoint_every=5, stages=2,
    clock="model", lr=3e-3,
)  # fmt: skip


def tiny_model() -> PoseDiT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return pose_dit("T", hidden_size=32, depth=4, num_heads=2)


def make(config, out):
    data, held_out = figures(24, size=8, frames=2), figures(8, size=8, frames=2, seed=5)
    return Trainer(config, tiny_model(), data, held_out, out)


def weights(out):
    return load_file(out / "checkpoints" / "final" / "diffusion_pytorch_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


CASES = {name: replace(TINY, strategy=name) for name in STRATEGIES} | {
    "skip": replace(TINY, strategy="ent-prog", schedule="fixed", skip=0.5, restore="one_by_one", ema_decay=0.9),
    "race": replace(
        TINY, strategy="ent-prog", schedule="adaptive", steps=None, seconds=0.05, search_budget=0.5, skip=0.5
    ),
}

OFTEN = ("ent-prog", "ent-prog+lora", "skip")  # the others in the slow suite


@pytest.mark.parametrize("name", [n if n == "ent-prog" else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_two_fresh_runs_are_bit_identical_and_the_model_loads(name, tmp_path):
    for run in ("a", "b"):
        results = make(CASES[name], tmp_path / run).run()
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), tiny_model().state_dict())
    loaded = PoseDiT.from_pretrained(tmp_path / "a" / "checkpoints" / "final")
    assert loaded.config["depth"] == 4
    assert results["peak_bytes"] > 0 and len(results["curve"]) == 3


@pytest.mark.parametrize("strategy", ["ent-prog", *(pytest.param(s, marks=pytest.mark.slow) for s in ("full", "lora"))])
def test_checkpointing_keeps_less_and_changes_no_weight(strategy, tmp_path):
    config = replace(TINY, strategy=strategy, steps=6, min_saving=0.0)
    plain = make(config, tmp_path / "plain").run()
    again = make(replace(config, checkpointing="block"), tmp_path / "again").run()
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "again"))
    assert again["mean_bytes"] < plain["mean_bytes"]
    with pytest.raises(ValueError, match="leave one of them out"):
        replace(CASES["ent-prog"], checkpointing="block", max_memory="1GiB")


class Killed(Exception):
    pass


def broken_off(config, folder, after):
    """Let a run die after a step and resume it to its end."""
    trainer = make(config, folder)

    def die(info):
        if info["step"] == after:
            raise Killed

    trainer.on_progress = die
    with pytest.raises(Killed):
        trainer.run()
    resumed = make(config, folder)
    resumed.run()
    return resumed


@pytest.mark.parametrize("name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
@pytest.mark.parametrize("when", [0.3, pytest.param(0.9, marks=pytest.mark.slow)])
def test_a_killed_and_resumed_run_gives_bit_equal_weights(name, when, tmp_path):
    whole_run = make(CASES[name], tmp_path / "whole")
    whole_run.run()
    broken_off(CASES[name], tmp_path / "broken", 1 + int(when * (whole_run.step - 1)))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    whole, broken = ((tmp_path / n / "events.jsonl").read_text().splitlines() for n in ("whole", "broken"))

    def told(lines):
        kept = [e for e in map(json.loads, lines) if e["event"] not in ("decision",)]
        return [{k: v for k, v in e.items() if k != "net_seconds"} for e in kept]

    assert told(whole) == told(broken), "the log of a resumed run reads like an uninterrupted one"


def test_adapters_train_in_frozen_blocks_whose_own_weights_stay(tmp_path):
    trainer = make(replace(TINY, strategy="ent-prog+lora", active_share=0.25), tmp_path)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    seen = {}

    def look(info):
        frozen = [b for b in trainer.blocks if b.name not in trainer.prog.active]
        seen["frozen"] = [b.name for b in frozen]
        assert len(frozen) == 3 and not any(p.requires_grad for b in frozen for p in b.parameters())
        assert all(p.requires_grad for b in trainer.blocks for p in b.adapters)
        seen["after"] = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}

    trainer.on_progress = look
    trainer.run()
    changed = {n for n, p in seen["after"].items() if not torch.equal(p, before[n])}
    for block in trainer.blocks:
        inside = {n for n in before if n.startswith(f"{block.name}.")}
        adapters = {n for n in inside if ".lora_" in n}
        assert len(adapters) == 8 and adapters <= changed
        assert (inside - adapters <= changed) == (block.name not in seen["frozen"])
        assert block.name not in seen["frozen"] or not (inside - adapters) & changed
    assert weights(tmp_path).keys() == tiny_model().state_dict().keys()
    kept = {id(p) for p in trainer.prog.snapshot().parameters}
    assert all(id(p) in kept for b in trainer.blocks for p in b.adapters)
    with pytest.raises(ValueError, match="frozen to 'pass'"):
        replace(TINY, strategy="ent-prog+lora", frozen="bypass").progressive()


def test_a_wall_clock_run_replays_its_decisions_after_a_kill(tmp_path):
    config = replace(
        TINY, strategy="ent-prog", schedule="adaptive", clock="wall", steps=None, seconds=3.0, checkpoint_every=1000
    )
    trainer = make(config, tmp_path)
    trainer.on_progress = lambda info: (_ for _ in ()).throw(Killed) if info["step"] == 20 else None
    with pytest.raises(Killed):
        trainer.run()
    first = [json.loads(x) for x in (tmp_path / "events.jsonl").read_text().splitlines()]
    decided = {e["key"]: e["value"] for e in first if e["event"] == "decision"}
    resumed = make(config, tmp_path)
    resumed.run()
    assert decided and decided.items() <= resumed.log.decisions.items()


def test_a_torn_last_line_of_the_log_is_dropped(tmp_path):
    trainer = make(TINY, tmp_path)
    trainer.run()
    log = tmp_path / "events.jsonl"
    log.write_text(log.read_text() + '{"event": "deci')
    trainer.log.rewind(2)
    assert len([e for e in map(json.loads, log.read_text().splitlines()) if e["event"] != "decision"]) <= 2


def test_the_ledger_adds_up_to_the_wall_time(tmp_path):
    trainer = make(replace(TINY, strategy="ent-prog"), tmp_path)
    results = trainer.write_results(trainer.run())
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert sum(ledger["seconds"].values()) == pytest.approx(ledger["wall"], rel=1e-6)
    assert all(ledger["seconds"][k] > 0 for k in ("scoring", "search", "training", "held_out", "data", "checkpoint"))
    assert results["wall_seconds"] >= sum(ledger["seconds"][k] for k in NET)
    assert ledger["stages"][0]["peak_bytes"] > 0


def test_inactive_blocks_are_bit_identical_after_training(tmp_path):
    config = replace(TINY, strategy="ent-prog", schedule="fixed", active_share=0.25, stages=1, weight_decay=0.5)
    trainer = make(config, tmp_path)
    start = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.run()
    active = next(e for e in trainer.prog.events if e["event"] == "modes")["active"]
    end = weights(tmp_path)
    moved = {k for k, v in end.items() if not torch.equal(v, start[k])}
    assert {k for k in moved if k.startswith("blocks.")} == {k for k in end if k.startswith(f"{active[0]}.")}
    assert any(k.startswith("pose_guider.") for k in moved)


@pytest.mark.parametrize(("schedule", "kept_back"), [("linear", 0), ("fixed", 0), ("adaptive", 3)])
def test_clips_are_kept_back_only_where_a_search_judges_by_them(schedule, kept_back, tmp_path):
    run = make(replace(TINY, strategy="ent-prog", schedule=schedule), tmp_path)
    assert len(run.data["video"]) == 24 - kept_back
    judges = torch.cat([b["video"] for b in run.judged_by])
    trained = {clip.numpy().tobytes() for clip in run.data["video"]}
    assert all((clip.numpy().tobytes() in trained) == (not kept_back) for clip in judges)


def test_lora_saves_a_plain_merged_model(tmp_path):
    trainer = make(replace(TINY, strategy="lora"), tmp_path)
    trainer.run()
    assert weights(tmp_path).keys() == tiny_model().state_dict().keys()
    batch = trainer.held_out[0]
    with torch.no_grad():
        merged = PoseDiT.from_pretrained(tmp_path / "checkpoints" / "final").eval()
        expected = json.loads(json.dumps(trainer.curve[-1]["loss"]))
        assert trainer.loss_fn(merged, batch).mean().item() == pytest.approx(expected, rel=1e-4)


def test_full_matches_a_plain_loop(tmp_path):
    """The trainer adds nothing: the same batches through torch alone give the same weights."""
    config = replace(TINY, strategy="full")
    trainer = make(config, tmp_path)
    trainer.run()
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    reference = make(config, tmp_path / "again")
    marks = reference._marks()
    step = 0
    for begin, end in zip(marks[:-1], marks[1:], strict=True):
        count = round(end * 24) - round(begin * 24)
        for i in range(count):
            optimizer.param_groups[0]["lr"] = cosine(config.lr, begin + (end - begin) * i / count, config.lr_warmup)
            reference.loss_fn(model, reference._batch(step, complete=step == 0)).mean().backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
    assert same(weights(tmp_path), model.state_dict())


@pytest.mark.parametrize("host", [False, True])
def test_ema_follows_only_what_trains_and_swaps_back(host):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    ema = Ema(model, 0.5, host)
    for _ in range(3):
        ema.update()
        with torch.no_grad():
            model[0].weight.add_(1)
            model[1].weight.add_(1)
    assert set(ema.average) == {"1.weight", "1.bias"}, "a frozen parameter's average is never overwritten by it"
    raw = model[1].weight.detach().clone()
    ema.swap()
    assert not torch.equal(model[1].weight, raw)
    ema.swap()
    assert torch.equal(model[1].weight, raw)
    again = Ema(model, 0.5)
    again.load(ema.average)
    again.update()
    assert torch.allclose(again.average["1.weight"], ema.average["1.weight"].lerp(raw, 0.5), atol=1e-4)


@pytest.mark.slow
def test_the_toy_survives_a_real_kill(tmp_path):
    """SIGKILL a process in the middle of examples/cpu_toy.yaml, resume it, compare with an uninterrupted one."""
    command = [sys.executable, "-m", "entprog.cli", "train", "examples/cpu_toy.yaml", "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    for wait in (15, 30):
        process = subprocess.Popen([*command, str(tmp_path / "broken")])
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([*command, str(tmp_path / "broken")], check=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


def test_another_configuration_is_refused_in_a_run_folder(tmp_path):
    make(TINY, tmp_path).run()
    with pytest.raises(ValueError, match=r"another configuration.*'lr': \(0.003, 0.5\)"):
        make(replace(TINY, lr=0.5), tmp_path).run()


def test_never_trained_blocks_stay_as_they_were_with_an_average(tmp_path):
    config = replace(TINY, strategy="ent-prog", schedule="fixed", active_share=0.25, ema_decay=0.9, clock="wall")
    trainer = make(config, tmp_path)
    start = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.run()
    trained = {n for e in trainer.prog.events if e["event"] == "modes" for n in e["active"]}
    for name, value in weights(tmp_path).items():
        if name.startswith("blocks.") and not any(name.startswith(f"{t}.") for t in trained):
            assert torch.equal(value, start[name]), name


def test_what_a_resumed_run_holds_on_the_device_is_what_trains():
    model = nn.Linear(2, 2, device="meta")  # stands for a GPU
    model.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    tensors = {}
    for name, p in model.named_parameters():
        tensors[f"model.{name}"] = torch.zeros(p.shape)
        tensors |= {f"optimizer.{name}.step": torch.zeros(()), f"optimizer.{name}.exp_avg": torch.zeros(p.shape)}
    put_back(tensors, model, optimizer)
    held = {n: {k: v.device.type for k, v in optimizer.state[p].items()} for n, p in model.named_parameters()}
    assert held == {"weight": {"step": "meta", "exp_avg": "meta"}, "bias": {"step": "meta", "exp_avg": "cpu"}}


@pytest.mark.parametrize("max_memory, device", [(None, "cuda:0"), ("1GiB", "cpu")])
def test_a_checkpoint_is_read_to_the_host_within_a_budget(max_memory, device, monkeypatch):
    asked = []
    monkeypatch.setattr("entprog.train.load_checkpoint", lambda folder, device: asked.append(device))
    ready = SimpleNamespace(wait_for_everyone=lambda: None)
    config = SimpleNamespace(max_memory=max_memory)
    resuming = SimpleNamespace(
        device=torch.device("cuda:0"), config=config, out=Path(), writes=False, accelerator=ready
    )
    Trainer._resume(resuming)
    assert asked == [device]
