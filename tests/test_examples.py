"""Every example runs; the first differs from a plain loop by its marked lines and by nothing else."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def _as_in_a_process_of_its_own():
    """Accelerate keeps its precision, and torch what it has compiled, for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch._dynamo.reset()


def run(name, capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    names = runpy.run_path(str(EXAMPLES / name))
    return capsys.readouterr().out, names


def test_own_loop_differs_from_the_plain_loop_by_its_marked_lines(capsys, monkeypatch, tmp_path):
    source = (EXAMPLES / "own_loop.py").read_text().splitlines()
    marked = [line for line in source if line.rstrip().endswith("# +")]
    plain = tmp_path / "plain.py"
    plain.write_text("\n".join(line for line in source if line not in marked))
    assert len(marked) == 3 and not re.search(r"\bprog\b|entprog", plain.read_text().split('"""')[2])
    plain.write_text(plain.read_text().replace("islice(cycle(data), 60)", "islice(cycle(data), 2)"))
    runpy.run_path(str(plain))
    assert "step  50" in run("own_loop.py", capsys, monkeypatch)[0]


def test_accelerate_loop_counts_optimizer_steps(capsys, monkeypatch):
    out, names = run("accelerate_loop.py", capsys, monkeypatch)
    prog = names["prog"]
    assert names["step"] == names["STEPS"] and prog.last_step == names["STEPS"] - 1
    switches = [e["step"] for e in prog.events if e["event"] == "modes"]
    assert switches == [0, names["STEPS"] // 2], "two stages, counted in optimizer steps"
    assert "trains 2 of 4 blocks" in out and "trains 4 of 4 blocks" in out
    assert all(p.dtype is torch.float32 for p in names["model"].parameters())


def test_diffusers_script_averages_what_trained_and_keeps_the_rest(capsys, monkeypatch):
    out, names = run("diffusers_script.py", capsys, monkeypatch)
    ema, prog = names["ema"], names["prog"]
    early = set(next(e for e in prog.events if e["event"] == "modes")["active"])
    module = {b.name: b for b in prog.blocks}
    updates = {b: {ema.updates[ema.names[p]] for p in module[b].parameters()} for b in module}
    assert all(n == ({6} if b in early else {3}) for b, n in updates.items()), "averaged only while it trained"
    assert "averaged" in out


def test_lightning_counts_its_own_steps_only(capsys, monkeypatch):
    out, names = run("lightning_module.py", capsys, monkeypatch)
    assert names["trainer"].global_step == 12 and names["module"].prog.last_step == 11
    switches = [e["step"] for e in names["module"].prog.events if e["event"] == "modes"]
    assert switches == [0, 6] and "trains 4 of 4 blocks" in out


def test_compiled_blocks_compile_a_few_graphs(capsys, monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # of other tests in this process
    out, names = run("compiled_blocks.py", capsys, monkeypatch, "eager")
    graphs = [int(n) for n in re.findall(r"graphs so far (\d+)", out)]
    assert len(graphs) == 12 and 0 < graphs[-1] <= 10 and len(set(graphs[3:])) == 1, "then nothing is compiled"
    assert len({tuple(e["active"]) for e in names["prog"].events if e["event"] == "modes"}) == 4


def test_peft_adapters_train_and_their_base_does_not(capsys, monkeypatch):
    _, names = run("peft_adapters.py", capsys, monkeypatch)
    state = names["optimizer"].state
    stepped = {n for n, p in names["model"].named_parameters() if state.get(p)}
    assert stepped and all("lora_" in n for n in stepped)


def test_schedule_free_starts_a_blocks_count_when_the_block_starts(capsys, monkeypatch):
    _, names = run("schedule_free.py", capsys, monkeypatch)
    optimizer, prog = names["optimizer"], names["prog"]
    early = set(next(e for e in prog.events if e["event"] == "modes")["active"])
    counts = [group["k"] for group in optimizer.param_groups[:-1]]
    assert counts == [12 if b.name in early else 6 for b in prog.blocks]
    assert not optimizer.param_groups[0]["train_mode"]
