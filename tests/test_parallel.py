"""Two processes, by hooks and by FSDP2, do what one does; all of them agree; what is frozen sends nothing."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import two_processes as two
from conftest import Plain
from torch.utils.checkpoint import checkpoint


def in_two(what, folder):
    """What each of two processes found, {name: value} by rank, and the folder they wrote to."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    mp.spawn(two.work, args=(str(folder), port, what), nprocs=two.RANKS)
    return [torch.load(folder / f"{i}.pt", weights_only=True) for i in range(two.RANKS)], folder


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return in_two("everything", tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone():
    return two.wan_run("alone")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def furthest(a, b):
    assert a.keys() == b.keys()
    return max((v - b[k]).abs().max().item() for k, v in a.items())


def decisions(events):
    """Events without measured real numbers: what was chosen, in which order, for how many steps."""
    if isinstance(events, dict):
        return {k: decisions(v) for k, v in events.items() if not isinstance(v, float) and k not in (
            "intervals", "interval", "seconds", "note")}  # fmt: skip
    return [decisions(e) for e in events if not isinstance(e, float)] if isinstance(events, list | tuple) else events


@pytest.mark.parametrize("kind", ["hooks", "fsdp"])
def test_two_processes_train_as_one_through_searches_and_stage_changes(kind, ranks, alone):
    (first, second), _ = ranks
    mine = first[f"wan {kind}"]
    assert furthest(mine["weights"], alone["weights"]) < 1e-5
    assert same(mine["weights"], second[f"wan {kind}"]["weights"]), "the ranks are bit-identical"
    assert mine["events"] == second[f"wan {kind}"]["events"]
    assert decisions(mine["events"]) == decisions(alone["events"])
    searches = [e for e in alone["events"] if e["event"] == "search"]
    sets = [str(e["modes"]) for e in alone["events"] if e["event"] == "modes"]
    assert all(e["rungs"] for e in searches) and len(searches) == 2 and len(set(sets)) >= 2


@pytest.mark.parametrize("kind", ["hooks", "fsdp"])
def test_scores_and_fidelity_are_those_of_the_joined_batches(kind, ranks):
    (first, second), _ = ranks
    expected = two.plain_scores("alone")
    assert first[f"scores {kind}"] == second[f"scores {kind}"]
    for name, values in expected.items():
        found = first[f"scores {kind}"][name]
        assert found.keys() == values.keys()
        for key, value in values.items():
            assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-6), (name, key)


def test_frozen_parameters_send_nothing(ranks):
    (first, _), _ = ranks
    hooks, fsdp = first["volume hooks"], first["volume fsdp"]
    assert hooks["reduce values"] == hooks["values"] and hooks["reduce"] == 1, "small ones go together"
    assert fsdp["scatter"] == 1 and fsdp["values"] <= fsdp["scatter values"] < (
        fsdp["values"] + 64), "padded to equal shards"  # fmt: skip
    assert not hooks["frozen with gradient"] and not fsdp["frozen with gradient"]


def test_gradients_accumulate_with_and_without_communication_in_between(ranks):
    (first, second), _ = ranks
    expected = two.accumulated("alone", False)
    for name in ("accumulated False", "accumulated True"):
        assert furthest(first[name], expected) < 1e-6
        assert same(first[name], second[name])


def test_every_mode_of_a_sharded_block_is_that_of_a_plain_one(ranks):
    (first, _), _ = ranks
    expected = two.modes_when_sharded("alone")
    for mode, found in first["modes"].items():
        assert furthest(found["gradients"], expected[mode]["gradients"]) < 1e-6, mode
        assert torch.allclose(found["after"], expected[mode]["after"], atol=1e-6), mode
    gathers = {mode: found["gathers"] for mode, found in first["modes"].items()}
    full = gathers["train"]
    assert gathers["pass"] == full and gathers["prefix"] == full
    assert gathers["bypass"] == [full[0], full[1] - 1], "nothing in its backward pass needs the weights"
    assert gathers["skip"] == [full[0] - 1, full[1] - 1], "it does not run"


def test_restored_weights_are_used_at_once(ranks):
    (first, _), _ = ranks
    assert first["snapshot"]["before"] == first["snapshot"]["restored"] != first["snapshot"]["moved"]


def test_blocks_frozen_before_sharding_train_later_in_mixed_precision(ranks):
    (first, _), _ = ranks
    expected = two.mixed_precision("alone")
    assert first["mixed"]["kept"] == expected["kept"], "what was frozen is frozen again after sharding"
    assert first["mixed"]["precisions"] == ["torch.float32"]
    for name, grad in first["mixed"]["gradients"].items():
        assert grad.dtype == torch.float32
        assert torch.cosine_similarity(grad.flatten(), expected["gradients"][name].flatten(), 0) > 0.99, name


def test_rank_0_decides_and_all_agree(ranks):
    (first, second), _ = ranks
    for found in (first["agreement"], second["agreement"]):
        assert found["decided"] == ["of rank 0", 2.0] and found["asked"] == 1
        assert found["joined"].tolist() == [[0, 0], [1, 1], [1, 1]]
        assert found["in step"] == [0, 1, 2] and found["spread"].tolist() == [2, 4, 6]


def test_what_would_go_wrong_is_refused_with_the_recipe(ranks):
    (first, second), _ = ranks
    assert first["refusals"] == second["refusals"]
    assert "call entprog.data_parallel(model)" in first["refusals"]["apart"]
    assert "blocks = find_blocks" in first["refusals"]["sharded"]
    assert "DistributedDataParallel" in first["refusals"]["ddp"] and "data_parallel" in first["refusals"]["ddp"]


def test_without_a_process_group_there_is_nothing_to_do():
    model = two.plain("alone")
    with pytest.raises(ValueError, match="torchrun"):
        two.entprog.data_parallel(model)


def test_after_a_backward_pass_that_broke_off_nothing_goes_on_unaveraged():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, x = Plain(), torch.randn(2, 5, 8)
        averaged = two.entprog.data_parallel(model)
        model.blocks[0].register_full_backward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(x).sum().backward()
        model.blocks[0]._backward_pre_hooks.clear()
        model.zero_grad(set_to_none=True)
        for _ in range(2):  # not only once
            with pytest.raises(RuntimeError, match="data_parallel.model. again"):
                model(x)
        averaged.remove()
        averaged = two.entprog.data_parallel(model)
        expected = 0
        for _ in range(2):
            checkpoint(model, x, use_reentrant=False).sum().backward()  # runs the model again in backward
            expected += sum(p.nbytes for p in model.parameters())
            assert averaged.sent == expected
    finally:
        torch.distributed.destroy_process_group()


def test_the_trainer_shares_the_batch_and_only_rank_0_writes(ranks, tmp_path):
    (first, second), folder = ranks
    expected = two.trained(tmp_path)
    assert first["trainer"]["active"] == expected["active"] == second["trainer"]["active"]
    assert furthest(first["trainer"]["weights"], expected["weights"]) < 1e-5
    assert same(first["trainer"]["weights"], second["trainer"]["weights"])
    assert first["trainer"]["wrote"] and not second["trainer"]["wrote"]
    told = [json.loads(line)["event"] for line in (folder / "run" / "events.jsonl").read_text().splitlines()]
    alone = [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert told == alone, "one log, written once"


@pytest.mark.slow
def test_a_killed_run_of_two_processes_resumes_exactly(tmp_path):
    (first, second), _ = in_two("resumed", tmp_path)
    assert same(first["resumed"]["weights"], first["trainer"]["weights"])
    assert same(second["resumed"]["weights"], first["trainer"]["weights"])


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["--sharded"]])
def test_the_example_runs(how):
    command = [*TORCHRUN, str(ROOT / "examples" / "own_loop_ddp.py"), *how]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert told.count("step  30") == 1


@pytest.mark.slow
def test_the_command_line_trains_in_two_processes_and_refuses_a_recipe(tmp_path):
    toy = ["train", str(ROOT / "examples" / "cpu_toy.yaml"), "steps=6", "clips=32", "held_out_clips=8", "samples=1",
           "checkpoint_every=3", "--out", str(tmp_path)]  # fmt: skip
    told = subprocess.run([*TORCHRUN, "-m", "entprog.cli", *toy], check=True, capture_output=True, text=True).stdout
    assert told.count("report:") == 1 and (tmp_path / "report.html").exists() and (tmp_path / "results.json").exists()
    recipe = [*TORCHRUN, "-m", "entprog.cli", "train", str(ROOT / "examples" / "human_video.yaml"), "--out"]
    refused = subprocess.run([*recipe, str(tmp_path / "recipe")], capture_output=True, text=True)
    assert refused.returncode and "configurations of their own" in " ".join(refused.stdout.split())
