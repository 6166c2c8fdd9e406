"""The page of a recipe: quality of unseen people, cost of every phase, curves, scores; each phase has its own page too.

Like report.py, a pure function of the folder. What a strategy's clips look like stands first.
"""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure

from entprog.charts import score_chart, svg, uri
from entprog.evaluate import BETTER, compare
from entprog.report import (
    CHART_STYLE,
    CLIP_TYPES,
    MORE_COLOURS,
    STRATEGY_COLOURS,
    Run,
    read_run,
    render,
    write_report,
)

SHOWN = ("lpips[alex]", "lpips[vgg]", "ssim", "psnr", "l1", "pck@0.1", "oks", "nearer_to_own", "appearance_distance",
         "same_face", "flicker", "background_flicker", "colour_drift")  # fmt: skip
NAMES = {
    "nearer_to_own": "nearer to own reference",
    "appearance_distance": "colour distance, Lab",
    "same_face": "same face",
    "colour_drift": "colour drift",
    "background_flicker": "background flicker",
}


def write_recipe_report(folder: Path, results: dict[str, Any]) -> Path:
    """Write `folder/report.html` and one page for each phase; returns the path of the first."""
    runs = {
        phase: [read_run(folder / phase / name, name, own) for name, own in compared["strategies"].items()]
        for phase, compared in results["phases"].items()
    }
    for phase in runs:
        write_report(folder / phase)
    pairs = {split: _paired(found) for split, found in results["evaluation"].items()}
    with style.context(["default", CHART_STYLE]):
        content = {
            "title": results["title"],
            "results": results,
            "strategies": results["strategies"],
            "splits": {split: _quality(found, pairs[split]) for split, found in results["evaluation"].items()},
            "clips": _clips(folder, results["strategies"]),
            "unseen": all(_unseen(e["protocol"]) for found in results["evaluation"].values() for e in found.values()),
            "phases": runs,
            "base": (
                json.loads((folder / "base" / "results.json").read_text()) if (folder / "base").exists() else None
            ),
            "curves": _curves(runs),
            "scores": {
                f"{phase}, {run.name}": score_chart(run.scores[0])
                for phase, own in runs.items()
                for run in own
                if run.scores
            },
            "verdict": _verdict(results, pairs),
            "recipe": (folder / "recipe.yaml").read_text(encoding="utf-8"),
        }
        path = folder / "report.html"
        path.write_text(render("recipe.html.j2", content), encoding="utf-8")
    return path


def _paired(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """Compare the last strategy with the first on one split; None where there is only one."""
    strategies = list(found)
    return compare(found[strategies[-1]], found[strategies[0]]) if len(strategies) > 1 else None


def _verdict(results: Mapping[str, Any], pairs: Mapping[str, Any]) -> str:
    """Say in one sentence where the strategies differ on held-out clips beyond the spread of the clips."""
    strategies, split = results["strategies"], next(iter(results["evaluation"]), None)
    if split is None or len(strategies) < 2:
        return "One strategy was trained, so there is nothing to compare."
    found = results["evaluation"][split]
    one, other = (s for s in (strategies[-1], strategies[0]))
    differences = pairs[split]["differences"]
    better: list[str] = []
    worse: list[str] = []
    for name, value in differences.items():
        if name not in SHOWN or not BETTER.get(name) or value["low"] is None:  # defined on no clip
            continue
        if not value["low"] <= 0 <= value["high"]:
            (better if math.copysign(1, value["mean"]) == BETTER[name] else worse).append(NAMES.get(name, name))
    parts = [f"better than {other} in {', '.join(better)}"] if better else []
    parts += [f"worse in {', '.join(worse)}"] if worse else []
    told = " and ".join(parts) or f"not told apart from {other} by any measure"
    protocol = found[one]["protocol"]
    whose = "people that neither has seen" if _unseen(protocol) else "people that are in training, too,"
    return f"On {protocol['clips']} clips of {whose} ({split}), {one} is {told}."


def _unseen(protocol: Mapping[str, Any]) -> bool:
    """Whether the data were split by person, as far as their preparation warned."""
    return not any("shared between train and test" in said for said in (protocol.get("data") or {}).get("warnings", ()))


def _quality(found: Mapping[str, Any], paired: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the table of one split: a line a measure, with the means of every strategy, the truth and baselines."""
    strategies = list(found)
    first = found[strategies[0]]
    columns = [("truth", first["rows"].get("truth"))] + [(s, found[s]["rows"]["generated"]) for s in strategies]
    columns += [(f"{way.replace('_', ' ')}", first["rows"].get(way)) for way in ("copy_reference", "shuffled")]
    lines: list[dict[str, Any]] = [{
        "name": "fvd", "better": "lower",
        "cells": [{"mean": (row or {}).get("fvd", {}).get("value")} for _, row in columns],
        "difference": {"mean": f["difference"], **f} if paired and (f := paired.get("fvd")) else None,
    }]  # fmt: skip
    for name in SHOWN:
        cells = [((row or {}).get("means") or {}).get(name) for _, row in columns]
        if any(cells):
            difference = paired["differences"].get(name) if paired else None
            better = {1: "higher", -1: "lower", 0: "nearer to 0"}[BETTER[name]]
            lines.append({"name": NAMES.get(name, name), "better": better, "cells": cells, "difference": difference})
    ratios = {s: (found[s].get("pose_ratio") or {}).get("pck@0.1") for s in strategies}
    return {"columns": [name for name, _ in columns], "lines": lines, "protocol": first["protocol"],
            "paired": f"{strategies[-1]} − {strategies[0]}" if paired else None, "ratios": ratios}  # fmt: skip


def _clips(folder: Path, strategies: Sequence[str]) -> dict[str, Any]:
    """Return {split: {"columns", "rows": {clip: {column: URI}}}} of what evaluation kept to look at."""
    out: dict[str, Any] = {}
    for split in sorted(p for p in (folder / "videos").glob("*") if p.is_dir()):
        rows: dict[str, dict[str, str]] = {}
        for path in sorted(split.glob("*_*")):
            number, _, column = path.stem.partition("_")
            if path.suffix in CLIP_TYPES:
                rows.setdefault(number, {})[column] = uri(CLIP_TYPES[path.suffix], path.read_bytes())
        out[split.name] = {"columns": ["reference", "pose", "truth", *strategies], "rows": rows}
    return out


def _curves(runs: Mapping[str, Sequence[Run]]) -> str:
    """Draw held-out loss against net seconds, one panel a phase."""
    figure = Figure(figsize=(10.5, 3.4))
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    for axes, (phase, own) in zip(panels, runs.items(), strict=True):
        more = cycle(MORE_COLOURS)
        for run in own:
            x, y = ([p[key] for p in run.results["curve"]] for key in ("net_seconds", "loss"))
            colour = STRATEGY_COLOURS.get(run.name) or next(more)
            axes.plot(x, y, "o-", ms=2.6, lw=1.5, color=colour, label=run.name)
        axes.set(xlabel="net seconds", title=phase)
    panels[0].set_ylabel("held-out loss")
    panels[0].legend()
    return svg(figure)
