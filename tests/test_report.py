"""The report shows what a run folder holds, says what it does not hold, and needs nothing but itself."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from entprog.report import Run, verdict, write_report

NAMES = [f"blocks.{i}" for i in range(6)]


def results(name: str, loss: float = 0.4, width: float = 0.01, **changes: Any) -> dict[str, Any]:
    """Return the results of one run, with `changes` on top."""
    curve = [{"step": 10 * i, "net_seconds": 12.5 * i, "loss": loss + 1 / (1 + i)} for i in range(9)]
    shares = {"scoring_share": 0.02, "search_share": 0.05} if name == "ent-prog" else {}
    return {
        **{"kind": "run", "strategy": name, "seed": 3, "clock": "wall", "steps": 80, "net_seconds": 100.0},
        **{"wall_seconds": 112.0, "peak_bytes": 3 << 30, "mean_bytes": 2.5 * 2**30, "trainable_parameters": 1500000},
        **{"held_out": {"loss": loss, "interval": [loss - width, loss + width], "samples": 64}, "curve": curve},
        **{"metrics": {"ssim": {"mean": 0.71, "interval": [0.7, 0.72]}, "psnr": {"mean": 21.0, "interval": [20, 22]}}},
        **{"time_to_full_loss": 50.0, "gross_speedup": 2.2, "net_speedup": 2.0, **shares, **changes},
    }


def events() -> list[dict[str, Any]]:
    """Return what an Ent-Prog run of two stages writes."""
    pair = {"steps": 8, "seconds": 1.0, "loss_before": 0.9, "loss_after": 0.8, "efficiency": 0.1}
    entries = [{"active": m, "skipped": s, "interval": [0.05, 0.15], **pair} for m, s in ((2, 0), (4, 0), (4, 2))]
    search: dict[str, Any] = {"estimator": "race", "chosen": {"active": 4, "skipped": 2}, "note": "too close to call"}
    search["rungs"] = [{"entries": entries}, {"entries": entries[1:]}]
    modes = [
        dict(zip(NAMES, m.split(), strict=True)) for m in ("prefix " * 4 + "train train", "skip " * 2 + "train " * 4)
    ]
    fidelity = {"cosine": 0.98, "norm_ratio": 1.01, "new_modules_cosine": None}
    return [
        {"event": "score", "step": 0, "progress": 0.0, "priority": "cei", "path": "scores/b.json"},
        {"event": "modes", "step": 0, "progress": 0.0, "stage": 0, "active": NAMES[4:], "modes": modes[0]},
        {"event": "search", "step": 40, "progress": 0.5, "stage": 1, **search},
        {"event": "modes", "step": 40, "progress": 0.5, "stage": 1, "active": NAMES[2:], "modes": modes[1]}
        | {"fidelity": fidelity, "fidelity_curve": [{"size": 0, **fidelity}, {"size": 2, **fidelity, "cosine": 0.9}]},
        {"event": "plan_check", "step": 40, "progress": 0.5, "limit": 2**31, "measured": 2**30, "error": 0.021},
        {"event": "unheard of", "step": 41, "progress": 0.51},
        {"event": "done", "step": 80, "progress": 1.0},
    ]


def score(priority: str) -> dict[str, Any]:
    """Return a score file with intervals and two tau-bins."""
    values = {name: 0.1 * (i % 4) - 0.05 for i, name in enumerate(NAMES)}
    return {
        **{"priority": priority, "values": values, "intervals": {n: [v - 0.02, v + 0.02] for n, v in values.items()}},
        **{"ranking": sorted(NAMES, key=lambda n: -values[n]), "per_tau": {"0.00-0.50": values, "0.50-1.00": values}},
        **{"samples": 48, "share_negative": 0.25, "zero": ["blocks.1"]},
    }


def clip(frames: int, kind: str) -> bytes:
    """Return a 24 x 24 picture, animated where there is more than one frame."""
    noise = np.random.default_rng(0).integers(0, 255, (frames, 24, 24, 3), dtype=np.uint8)
    first, *rest = (Image.fromarray(frame) for frame in noise)
    buffer = io.BytesIO()
    options: dict[str, Any] = {"save_all": True, "append_images": rest, "lossless": True} if rest else {}
    first.save(buffer, kind, **options)
    return buffer.getvalue()


def fill(folder: Path, name: str, clips: int = 4) -> None:
    """Write everything but results.json that a run of this strategy leaves."""
    for sub in ("scores", "samples"):
        (folder / sub).mkdir(parents=True)
    seconds = {"training": 80.0, "scoring": 2.0, "search": 5.0, "held_out": 10.0, "other": 3.0}
    stages = [{"stage": i, "peak_bytes": (i + 2) << 30, "seconds": 50.0} for i in range(2)]
    (folder / "ledger.json").write_text(json.dumps({"seconds": seconds, "wall": 112.0, "stages": stages}))
    (folder / "config.yaml").write_text(f"strategy: {name}\nseed: 3\n")
    for number in range(clips):
        for part in ("pose", "truth", "sample"):
            (folder / f"samples/{number:03}_{part}.webp").write_bytes(clip(3, "WEBP"))
        (folder / f"samples/{number:03}_reference.png").write_bytes(clip(1, "PNG"))
    if name == "ent-prog":
        (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events()))
        (folder / "scores/b.json").write_text(json.dumps(score("cei")))
        (folder / "scores/a.json").write_text(json.dumps(score("oracle")))


def comparison(folder: Path, **changes: Any) -> Path:
    """Write a comparison of three strategies and return its folder."""
    strategies = {n: results(n, loss) for n, loss in (("full", 0.5), ("lora", 0.6), ("ent-prog", 0.4))}
    strategies |= changes.pop("strategies", {})
    for name in strategies:
        fill(folder / name, name)
    top: dict[str, Any] = {
        "kind": "comparison",
        "title": "Three strategies",
        "device": "a test",
        "versions": {"torch": "2.13"},
    }
    top |= {"commit": "abc1234", "budget_seconds": 100.0, "strategies": strategies, **changes}
    (folder / "results.json").write_text(json.dumps(top))
    row: dict[str, Any] = {
        "case": "4 of 6",
        "active": [2, 3, 4, 5],
        "mode": "prefix",
        "flops_ratio": 0.5,
        "bytes_ratio": 0.6,
    }
    models = [{"model": "here", "description": "PoseDiT", "rows": [{**row, "time_ratio": 0.55, "fidelity": 1.0}]}]
    models += [{"model": "Wan-shaped", "description": "", "rows": [{**row, "time_ratio": None, "fidelity": None}]}]
    (folder / "step_cost.json").write_text(json.dumps({"models": models}))
    return folder


def single(folder: Path, name: str = "ent-prog", **changes: Any) -> Path:
    """Write one run and return its folder."""
    fill(folder, name)
    (folder / "results.json").write_text(json.dumps(results(name, **changes)))
    return folder


def page_of(folder: Path) -> str:
    """Write the report and return its text."""
    return write_report(folder).read_text(encoding="utf-8")


def run_of(name: str, **changes: Any) -> Run:
    """Return a run that has results and nothing else."""
    return Run(name, Path(), results(name, **changes), {}, [], [], None)


def test_page_refers_to_nothing_outside_itself(tmp_path: Path):
    page = page_of(comparison(tmp_path))
    links = re.findall(r"(?:src|href|srcset|action)\s*=\s*[\"']?([^\"'\s>]+)", page)
    assert links and all(link.startswith("data:") for link in links)
    assert "url(" not in page and "@import" not in page and "<script" not in page and "<link" not in page
    assert "http" not in re.sub(r"data:[^\"]+", "", page) and str(tmp_path) not in page


def test_same_folder_gives_the_same_bytes(tmp_path: Path):
    folder = comparison(tmp_path)
    assert page_of(folder) == page_of(folder)


def test_comparison_shows_every_strategy_clip_and_decision(tmp_path: Path):
    page = page_of(comparison(tmp_path))
    for name in ("full", "lora", "ent-prog"):
        assert f"<th>{name}</th>" in page and f"config.yaml of {name}" in page
    assert page.count('class="clip"') == (3 + 4) * 6
    assert "0.4000<small>[0.3900, 0.4100]" in page and "2–5" in page and "too close to call" in page
    assert "full and lora did not score the blocks." in page and page.count('<tr class="chosen">') == 2
    assert "of 2.00 GiB allowed" in page and "held at most 1.00 GiB; predicted was 2.1 % to 2.1 % off" in page
    assert "not measured" in page  # the time of the Wan-shaped step


def test_single_run_folder_works(tmp_path: Path):
    page = page_of(single(tmp_path))
    assert "ent-prog ended at a held-out loss of 0.4000" in page and page.count('class="chart"') == 6


def test_missing_files_are_said_not_invented(tmp_path: Path):
    (tmp_path / "results.json").write_text(json.dumps({"kind": "run", "strategy": "full", "steps": 7}))
    page = page_of(tmp_path)
    assert "This run did not measure the cost of a step against full training." in page
    assert "No finite held-out loss was measured" in page and "saved no sample clips" in page
    for what in ("score the blocks", "search the number", "record a mode", "write a ledger", "save its config"):
        assert f"This run did not {what}" in page
    assert "<img" not in page and "nan" not in page.split("</style>")[1].lower()


def test_missing_step_cost_says_not_measured(tmp_path: Path):
    folder = comparison(tmp_path)
    (folder / "step_cost.json").unlink()
    assert "This comparison did not measure the cost of a step" in page_of(folder)


def test_hostile_text_is_escaped(tmp_path: Path):
    hostile = '<script>alert("x")</script>'
    folder = comparison(tmp_path, title=hostile, device=hostile, versions={hostile: hostile})
    (folder / "full/config.yaml").write_text(hostile)
    assert "<script" not in page_of(folder) and "&lt;script&gt;" in page_of(folder)


def test_torn_last_event_is_dropped_and_a_torn_middle_one_is_not(tmp_path: Path):
    path = single(tmp_path) / "events.jsonl"
    text = path.read_text()
    path.write_text(text + '{"event": "che')
    assert "too close to call" in page_of(tmp_path)
    path.write_text('{"event": \n' + text)
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        write_report(tmp_path)


@pytest.mark.parametrize("text", [None, '{"kind": "walk"}', "[]", "{"])
def test_folder_without_usable_results_is_refused(tmp_path: Path, text: str | None):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results\.json"):
        write_report(tmp_path)


def test_a_diverged_run_still_gives_a_page(tmp_path: Path):
    bad = results("lora", float("nan"))
    folder = comparison(tmp_path, strategies={"lora": bad})
    assert "lora has no finite held-out loss" in page_of(folder)


def test_verdict_says_when_entprog_wins_and_by_how_much():
    said = verdict([run_of("full", loss=0.5), run_of("ent-prog", loss=0.4)])
    assert "ent-prog ends with the lowest held-out loss, 0.4000" in said and "the others are worse beyond" in said
    assert "reached the last loss of full's curve" in said and "2.00 times sooner" in said


def test_the_goal_of_times_is_the_end_of_fulls_curve_and_said_where_the_saved_model_differs(
    tmp_path: Path, monkeypatch
):
    lines: list[float] = []
    monkeypatch.setattr("matplotlib.axes.Axes.axhline", lambda self, y, **k: lines.append(y) if "label" in k else 0)
    curve = [{"step": i, "net_seconds": 50.0 * i, "loss": 0.8 - 0.1 * i} for i in range(3)]  # ends at .6
    same, average = run_of("full", loss=0.6, curve=curve), run_of("full", loss=0.5, curve=curve)
    won = run_of("ent-prog", loss=0.4, curve=[*curve[:-1], curve[-1] | {"loss": 0.4}])
    assert "reached the last loss of full's curve 2.00 times" in verdict([same, won])
    assert "reached the last loss of full's curve (curves are of the weights as they train" in verdict([average, won])
    folder = comparison(tmp_path, strategies={"full": average.results, "ent-prog": won.results})
    page = page_of(folder)
    assert "The curve is of the weights as they train" in page and "as their average: full and lora." in page
    assert lines and set(lines) == {curve[-1]["loss"]}, "the dotted line"


def test_verdict_says_when_entprog_is_worse():
    slow = run_of("ent-prog", loss=0.6, time_to_full_loss=None, net_speedup=None)
    said = verdict([run_of("full", loss=0.5), slow])
    assert "full ends with the lowest" in said and "ent-prog is worse at 0.6000" in said and "beyond the spread" in said
    assert "did not reach the last loss of full's curve" in said and "within its 100.0 net seconds" in said
    late = run_of("ent-prog", loss=0.6, net_speedup=0.8)
    assert "1.25 times later" in verdict([run_of("full", loss=0.5), late])


def test_sparse_events_and_scores_still_give_charts(tmp_path: Path):
    folder = single(tmp_path)
    (folder / "scores/a.json").unlink()
    (folder / "scores/b.json").write_text(json.dumps({"priority": "cei", "values": {"up.0": 1.0, "down.0": 2.0}}))
    search = {"event": "search", "step": 1, "progress": 0.1, "stage": 1, "note": "the budget paid for no race"}
    modes = {"event": "modes", "step": 1, "progress": 0.1, "stage": 1, "active": ["up.0"], "fidelity": None}
    lines = [search, {**modes, "modes": {"down.0": "a new mode"}}]
    (folder / "events.jsonl").write_text("\n".join(json.dumps(e) for e in lines))
    page = page_of(folder)
    assert "the budget paid for no race" in page and page.count('class="chart"') == 4


def test_measured_fidelities_are_drawn_for_the_choices_that_measured_some(tmp_path: Path):
    folder = single(tmp_path)
    page = page_of(folder)
    assert page.count("Gradient fidelity over the number of bypassed blocks") == 1
    image = re.search(r'src="data:image/svg\+xml;base64,([^"]+)" alt="Gradient fidelity over', page)
    drawn = base64.b64decode(image[1]).decode()
    assert "stage 1, 4 active" in drawn and "stage 0" not in drawn
    assert "norm ratio" in drawn and "new modules" not in drawn, "nothing outside blocks trained"


def test_verdict_does_not_call_unmeasured_time_unreached():
    run = run_of("ent-prog", net_speedup=None)
    del run.results["time_to_full_loss"]
    said = verdict([run_of("full", loss=0.5), run])
    assert "was not measured" in said and "did not reach" not in said


def test_verdict_says_when_intervals_overlap():
    said = verdict([run_of("full", loss=0.405), run_of("ent-prog", loss=0.4)])
    assert "do not tell it apart from full" in said
    worse = verdict([run_of("full", loss=0.4), run_of("ent-prog", loss=0.405)])
    assert "ent-prog is worse" in worse and "do not tell them apart" in worse
