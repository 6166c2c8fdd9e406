"""One self-contained HTML page from a run folder: cost, quality, and every decision of the run.

`write_report` is a pure function of the folder: it opens no network connection, measures nothing, and writes the same
bytes for the same files. A run folder holds one run, or one sub-folder per strategy (results.json says which). What a
run did not measure stays None from the file to the page, where a sentence says so: no number is ever filled in.

Charts are SVG inside <img>, so that the ids of two charts cannot clash on the page; the page inverts them in the dark.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import cycle
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from matplotlib import style
from matplotlib.figure import Figure

from entprog.charts import fidelity_chart, map_chart, score_chart, search_chart, svg, uri
from entprog.metrics.protocol import bootstrap_interval

CHART_STYLE = {
    **{"svg.fonttype": "none", "svg.hashsalt": "entprog", "font.size": 9, "grid.alpha": 0.3, "legend.frameon": False},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9.5, "axes.titlelocation": "left"},
    **{"axes.axisbelow": True, "axes.grid": True, "figure.constrained_layout.use": True},
}
STRATEGY_COLOURS = {"full": "#4d4d4d", "lora": "#d98200", "ent-prog": "#0072b2"}
MORE_COLOURS = ("#009e73", "#a6568a", "#b04a1a", "#56a0d3", "#8a7f00")
LEDGER_COLOURS = {"training": "#9db4c0", "data": "#66a182", "scoring": "#0072b2", "search": "#d95f02"}
NET = tuple(LEDGER_COLOURS)  # what counts when strategies are compared; the rest of the ledger does not
LEDGER_COLOURS |= {"held_out": "#c9b458", "checkpoint": "#a6568a", "sampling": "#b9a7d0", "other": "#8c8c8c"}
CLIP_TYPES = {".png": "image/png", ".webp": "image/webp", ".gif": "image/gif"}
CURVES = "curves are of the weights as they train, final losses of the saved ones, such as their average"
SHARED_CLIPS = ("reference", "pose", "truth")


@dataclass(frozen=True)
class Run:
    """One run folder in memory: what it measured, and nothing where it did not."""

    name: str
    folder: Path
    results: dict[str, Any]
    ledger: dict[str, Any]
    events: list[dict[str, Any]]
    scores: list[dict[str, Any]]
    config: str | None

    def of(self, event: str) -> list[dict[str, Any]]:
        """Return the events of one kind, in the order they were written."""
        return [e for e in self.events if e.get("event") == event]


def write_report(run: Path) -> Path:
    """Write `run/report.html`, one page without external files, and return its path.

    `run` is the folder of a single run or of a comparison. Raises ValueError when its results.json is missing, cannot
    be read, or is of another kind.
    """
    results = read_json(run / "results.json")
    kind = results.get("kind") if isinstance(results, dict) else None
    if kind == "recipe":
        from entprog.recipe_report import write_recipe_report

        return write_recipe_report(run, results)
    if kind not in ("run", "comparison"):
        problem = "is missing" if results is None else f"has kind {kind!r}, not 'run', 'comparison' or 'recipe'"
        raise ValueError(f"{run / 'results.json'} {problem}; finish `entprog train` or `entprog demo` there first")
    if kind == "comparison":
        runs = [read_run(run / name, name, own) for name, own in results["strategies"].items()]
    else:
        runs = [read_run(run, results.get("strategy", "run"), results)]
    path = run / "report.html"
    with style.context(["default", CHART_STYLE]):  # "default": a user's matplotlibrc must not change the page
        path.write_text(render("report.html.j2", _content(run, results, runs)), encoding="utf-8")
    return path


def verdict(runs: Sequence[Run]) -> str:
    """Say in one sentence who ends lowest, whether the intervals tell them apart, and when full's loss was reached."""
    measured = sorted((r for r in runs if _loss(r) is not None), key=lambda r: _loss(r) or 0.0)
    if not measured:
        return "No finite held-out loss was measured, so nothing can be said about quality."
    if len(runs) == 1:
        seconds = _number(runs[0].results.get("net_seconds"))
        return f"{runs[0].name} ended at a held-out loss of {_loss_text(runs[0])} after {seconds} net seconds."
    best, full = measured[0], next((r for r in runs if r.name == "full"), None)
    parts = [f"{best.name} ends with the lowest held-out loss, {_loss_text(best)}", _overlaps(best, measured[1:])]
    subject = next((r for r in measured if r.name == "ent-prog"), best)
    if subject is not best:
        how: dict[bool | None, str] = {
            True: "though the held-out samples do not tell them apart",
            False: "beyond the spread of the held-out samples",
        }
        apart = how.get(_overlap(subject, best), "and without intervals that may be noise")
        parts[1:] = [f"ent-prog is worse at {_loss_text(subject)}, {apart}"]
    if full is not None and subject is not full:
        parts.append(_sooner(subject, full))
    parts += [f"{r.name} has no finite held-out loss" for r in runs if r not in measured]
    return "; ".join(parts) + "."


def _overlaps(best: Run, others: Sequence[Run]) -> str:
    unknown = [r.name for r in others if _overlap(best, r) is None]
    close = [r.name for r in others if _overlap(best, r)]
    if close:
        return f"the held-out samples do not tell it apart from {_join(close)}"
    if unknown:
        return f"without intervals, the lead over {_join(unknown)} may be noise"
    return (
        "the others are worse beyond the spread of the held-out samples"
        if others
        else "no other strategy has a finite held-out loss"
    )


def _sooner(subject: Run, full: Run) -> str:
    time, speedup = subject.results.get("time_to_full_loss", math.nan), subject.results.get("net_speedup")
    if time is None:
        seconds = _number(subject.results.get("net_seconds"))
        return f"{subject.name} did not reach {_goal(subject, full)} within its {seconds} net seconds"
    if not speedup:
        return f"how much sooner {subject.name} reached {_goal(subject, full)} was not measured"
    times, word = (speedup, "sooner") if speedup >= 1 else (1 / speedup, "later")
    when = "at the same time" if 0.995 < speedup < 1.005 else f"{times:.2f} times {word}"
    return f"{subject.name} reached {_goal(subject, full)} {when}, scoring and search included"


def _goal(*runs: Run) -> str:
    """Name the loss that times are taken to: the end of full's curve, which need not be its saved model's loss."""
    return "the last loss of full's curve" + (f" ({CURVES})" if any(map(_saved_differs, runs)) else "")


def _saved_differs(run: Run) -> bool:
    """Whether the saved model is not the one the curve ends with: an average of weights, or frozen ones made whole."""
    loss, curve = _loss(run), run.results.get("curve") or []
    return bool(curve) and loss is not None and not math.isclose(loss, curve[-1]["loss"], rel_tol=1e-4)


def _loss(run: Run) -> float | None:
    loss = (run.results.get("held_out") or {}).get("loss")
    return loss if loss is not None and math.isfinite(loss) else None


def _loss_text(run: Run) -> str:
    return f"{_number(_loss(run))} {_interval(run.results['held_out'].get('interval'))}".strip()


def _overlap(one: Run, two: Run) -> bool | None:
    """Whether the runs' losses cannot be told apart: sample by sample where both kept them, else by their intervals."""
    left, right = (torch.tensor(r.results.get("held_out_losses") or []) for r in (one, two))
    if len(left) == len(right) and len(left) > 1:
        low, high = bootstrap_interval((left - right).double())
        return low <= 0 <= high
    a, b = (run.results["held_out"].get("interval") for run in (one, two))
    return None if not a or not b else a[0] <= b[1] and b[0] <= a[1]


def _content(folder: Path, results: dict[str, Any], runs: list[Run]) -> dict[str, Any]:
    """Return everything the template shows; each chart is a data URI or None."""
    costs = (read_json(folder / "step_cost.json") or {}).get("models", [])
    ledgers, curves = [r for r in runs if r.ledger.get("seconds")], [r for r in runs if r.results.get("curve")]
    ratios = [row.get(f"{k}_ratio") or 0.0 for m in costs for row in m["rows"] for k in ("time", "flops", "bytes")]
    return {
        "title": results.get("title") or (f"{runs[0].name}: one run" if len(runs) == 1 else "Strategies compared"),
        "verdict": verdict(runs),
        "results": results,
        "runs": runs,
        "several": results["kind"] == "comparison",
        "clips": _clips(runs),
        "clip_columns": [*SHARED_CLIPS, *(r.name for r in runs)],
        "step_cost": costs,
        "cost_scale": max([1.0, *ratios]),
        "lowest": min((loss for r in runs if (loss := _loss(r)) is not None), default=None),
        "ledger": _ledger_chart(ledgers) if ledgers else None,
        "curves": _curve_chart(curves) if curves else None,
        "saved_differs": [r.name for r in runs if _saved_differs(r)],
        "scores": {r.name: (score_chart(r.scores[0]), r.scores) for r in runs if r.scores},
        "searches": {r.name: (search_chart(r.of("search")), r.of("search")) for r in runs if r.of("search")},
        "maps": {
            r.name: (map_chart(r.events), fidelity_chart(r.of("modes")), r.of("modes")) for r in runs if r.of("modes")
        },
    }


# ---- reading


def read_json(path: Path) -> Any:
    """Return a JSON file's content, None where there is no file. ValueError if it is not JSON."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); delete it or write it again") from error


def read_run(folder: Path, name: str, results: dict[str, Any]) -> Run:
    """Read what a run folder holds beside its results."""
    config = folder / "config.yaml"
    events = _read_events(folder / "events.jsonl")
    order = [Path(e["path"]).name for e in events if e.get("event") == "score" and e.get("path")]
    files = sorted((folder / "scores").glob("*.json"))
    files.sort(key=lambda path: order.index(path.name) if path.name in order else len(order))
    scores = [{"file": path.stem, **read_json(path)} for path in files]
    scores.sort(key=lambda score: score.get("priority") != "cei")  # stable: the first CEI leads
    text = config.read_text(encoding="utf-8") if config.is_file() else None
    return Run(name, folder, results, read_json(folder / "ledger.json") or {}, events, scores, text)


def _read_events(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    events = []
    for number, line in enumerate(lines, 1):
        try:
            events.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):  # a killed run may tear its last line, and only that one
                raise ValueError(f"{path} line {number} is not JSON ({error}); repair or remove it") from error
    return events


def _clips(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """Return {clip number: {column: data URI}}; shared columns come from the first run that has them."""
    found: dict[str, dict[str, str]] = {}
    for run in runs:
        for path in sorted((run.folder / "samples").glob("*_*")):
            number, _, part = path.stem.partition("_")
            if path.suffix in CLIP_TYPES:
                column = run.name if part == "sample" else part
                found.setdefault(number, {}).setdefault(column, uri(CLIP_TYPES[path.suffix], path.read_bytes()))
    return dict(sorted(found.items()))


# ---- charts


def _ledger_chart(runs: Sequence[Run]) -> str:
    names = LEDGER_COLOURS | {k: "#d0d0d0" for r in runs for k in r.ledger["seconds"] if k not in LEDGER_COLOURS}
    figure = Figure(figsize=(10.5, 1.0 + 0.42 * len(runs)))
    axes = figure.subplots()
    left = np.zeros(len(runs))
    for key, colour in names.items():
        widths = np.array([r.ledger["seconds"].get(key) or 0.0 for r in runs])
        if widths.any():
            axes.barh(range(len(runs)), widths, 0.62, left=left, color=colour, label=key.replace("_", "-"))
        left += widths
    net = [sum(r.ledger["seconds"].get(key) or 0.0 for key in NET) for r in runs]
    rows = np.arange(len(runs))
    axes.vlines(net, rows - 0.42, rows + 0.42, color="black", lw=1.4, label="net seconds")
    axes.set_yticks(rows, [r.name for r in runs])
    axes.set(xlabel="seconds", ylim=(len(runs) - 0.5, -0.5))
    figure.legend(loc="outside upper left", ncols=9, fontsize=8, handlelength=1.0, columnspacing=1.2)
    return svg(figure)


def _curve_chart(runs: Sequence[Run]) -> str:
    figure = Figure(figsize=(10.5, 3.9))
    whole, late = figure.subplots(1, 2)
    end = max(p["net_seconds"] for r in runs for p in r.results["curve"])
    seen, more = [], cycle(MORE_COLOURS)
    for run in runs:
        colour = STRATEGY_COLOURS.get(run.name) or next(more)
        x, y = ([p[key] for p in run.results["curve"]] for key in ("net_seconds", "loss"))
        for axes in (whole, late):
            axes.plot(x, y, "o-", ms=2.6, lw=1.5, color=colour, label=run.name)
            if run.name == "full" and math.isfinite(y[-1]):  # the goal that times to full's loss are taken to
                axes.axhline(y[-1], color=colour, ls=":", lw=1, label="last loss of full's curve")
        interval = (run.results.get("held_out") or {}).get("interval") or [math.nan] * 2
        late.plot(x[-1:] * 2, interval, "_-", ms=7, lw=1.2, color=colour)
        seen += [v for a, v in zip([*x, end, end], [*y, *interval], strict=True) if a >= end / 2 and math.isfinite(v)]
    if seen:
        margin = 0.06 * (max(seen) - min(seen)) or 0.01
        late.set(xlim=(end / 2, end * 1.02), ylim=(min(seen) - margin, max(seen) + margin))
    whole.set(xlabel="net seconds", ylabel="held-out loss", title="the whole run")
    late.set(xlabel="net seconds", title="its second half, enlarged; upright bar: the saved model's interval")
    whole.legend()
    return svg(figure)


# ---- the page


def render(template: str, content: dict[str, Any]) -> str:
    """Fill one of the package's page templates."""
    # Chainable: an absent number reaches the filters as undefined, and they write the dash of "not measured"
    files = jinja2.FunctionLoader(lambda name: resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))
    environment = jinja2.Environment(
        loader=files, autoescape=True, undefined=jinja2.ChainableUndefined, trim_blocks=True
    )
    filters: tuple[Callable[..., str], ...] = (_number, _interval, _bytes, _ranges, _join)
    environment.filters |= {function.__name__.removeprefix("_"): function for function in filters}
    return environment.get_template(template).render(content)


def _number(value: Any) -> str:
    """Return four significant digits, thousands with separators, and a dash for what was not measured."""
    if value is None or isinstance(value, jinja2.Undefined):
        return "–"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:#.4g}"


def _interval(value: Any) -> str:
    return f"[{_number(value[0])}, {_number(value[1])}]" if value else ""


def _bytes(value: Any) -> str:
    if not value:
        return "–"
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


def _ranges(numbers: Sequence[int] | None) -> str:
    """Write block numbers in runs: [0, 1, 2, 5] is 0–2, 5."""
    groups: list[list[int]] = []
    for n in sorted(numbers or []):
        if groups and n == groups[-1][1] + 1:
            groups[-1][1] = n
        else:
            groups.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in groups) or "–"


def _join(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
