"""The benchmarks that need a GPU, as far as a CPU can tell: cases, bounds, the time manager, its results file."""

import gc
import json
import runpy
import time
import weakref
from pathlib import Path

import pytest
import torch

from entprog.meta import Flops

ROOT = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("script", sorted(p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*.py")))
def test_every_script_finds_what_it_imports(script: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    runpy.run_path(str(ROOT / script))  # not as __main__


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "gpu"))
    import wan_step

    return wan_step


def test_every_target_names_a_case_and_no_two_cases_share_a_name(gpu):
    names = [c.name() for c in gpu.cases()]
    assert len(set(names)) == len(names)
    assert {target[1] for target in gpu.TARGETS} <= set(names)


def small(gpu):
    """The smallest Wan that still has something in every part."""
    return {"1.3B": gpu.Shape(2, 16, 4, 64, latent=(1, 16, 2, 8, 8), text=(1, 8, 32), rank=4)}


@pytest.mark.parametrize(("mode", "how"), [("bypass", "none"), ("pass", "block"), ("prefix", "block")])
def test_the_planned_flops_are_those_of_a_step(gpu, tmp_path: Path, mode: str, how: str):
    device = torch.device("cpu")
    case = gpu.Case("1.3B", "blocks", 0.25, mode, "int8", how, suffix=mode == "prefix")
    shapes = small(gpu)
    shape = shapes["1.3B"]
    planned = gpu.Manager(tmp_path / "out.json", 1, device, shapes).bound(case)["flops"]
    model = gpu.build(shape, device)
    gpu.prepare(case, model, shape, device)
    batch = gpu.batch_of(shape.latent, shape.text, device)
    with Flops() as counted:
        gpu.loss_of(model, batch).backward()
    assert planned == pytest.approx(counted.total, rel=0.02)


def test_a_case_without_time_left_is_listed_and_measured_by_the_next_call(gpu, tmp_path: Path):
    out, device, shapes = tmp_path / "out.json", torch.device("cpu"), small(gpu)
    case = gpu.Case("1.3B", "blocks", 0.1, "bypass", "int8")
    late = gpu.Manager(out, 0, device, shapes)
    late.result["rows"][case.name()] = late.run(case, (0, 1))
    late.save()
    assert json.loads(out.read_text())["rows"][case.name()]["status"].startswith("not run")
    early = gpu.Manager(out, 600, device, shapes)
    assert case.name() not in early.result["rows"]
    early.result["rows"][case.name()] = row = early.run(case, (0, 1))
    early.save()
    assert row["status"] == "measured" and row["seconds"] > 0 and row["bytes"] > 0
    assert case.name() in gpu.Manager(out, 0, device, shapes).result["rows"]


@pytest.mark.parametrize(
    "case", [("blocks", 0.5, "pass", "cpu", "parts"), ("lora",), ("full", 1.0, "", "bf16", "none")]
)
def test_a_case_leaves_nothing_to_the_next(gpu, monkeypatch, case):
    made, shape = [], small(gpu)["1.3B"]

    def building(*args, build=gpu.build):
        model = build(*args)
        made.extend(map(weakref.ref, model.parameters()))
        return model

    monkeypatch.setattr(gpu, "build", building)
    gpu.run_case(gpu.Case("1.3B", *case, in_backward=True), shape, torch.device("cpu"), (0, 1), time.perf_counter())
    gc.collect()
    assert made and not any(ref() is not None for ref in made)


def test_a_dry_run_shows_the_cases_asked_for(gpu, tmp_path: Path, capsys):
    manager = gpu.Manager(tmp_path / "out.json", 0, torch.device("meta"), small(gpu))
    wanted = [c.name() for c in gpu.cases() if c.model == "1.3B"][:1]
    gpu.dry_run(manager, only=wanted[0])
    shown = capsys.readouterr().out
    assert [c.name() for c in gpu.cases() if c.name() in shown] == wanted


def test_targets_are_met_or_missed_by_the_figures(gpu):
    rows = {key: {"speedup": wanted, "bytes": 2e9 * wanted} for _, key, _, wanted in gpu.TARGETS}
    met = {t["target"]: t["met"] for t in gpu.against_targets(rows)}
    assert met["speed-up at m/L .25"] and not met["GB at m/L .25, 14B"]
    assert all(t["met"] is None for t in gpu.against_targets({}))


def test_bypassing_in_front_of_what_trains_changes_no_gradient_and_behind_it_does(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import fidelity

    from entprog.bench import tiny_wan, wan_loss
    from entprog.blocks import find_blocks, record_example

    torch.manual_seed(0)
    model, batch = tiny_wan(64, layers=3)
    batch = batch | {k: batch[k][..., :8, :8] for k in ("video", "target")}
    blocks = find_blocks(model, record_example(model, lambda: wan_loss(model, batch)))
    setup = fidelity.Setup(model, blocks, wan_loss, [batch])
    first, middle, last = setup.names()
    exact = setup.gradients(batch)
    wan_loss(model, batch).backward()  # the plain way
    assert all(torch.equal(a, p.grad) for a, p in zip(exact[last], blocks[2].parameters(), strict=True))
    model.zero_grad(set_to_none=True)
    assert fidelity.compared(setup.gradients(batch, [first]), exact)["cosine"] == pytest.approx(1, abs=1e-9)
    cut = fidelity.compared(setup.gradients(batch, [middle], [first]), exact)
    assert cut["cosine"] < 1 - 1e-6
    assert sorted(fidelity.draw({"a": 1.0, "b": 2.0}, 2, step=3)) == ["a", "b"]
    assert sum(fidelity.draw({"a": 1.0, "b": 99.0}, 1, step=i) == ["b"] for i in range(50)) > 40
