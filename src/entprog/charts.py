"""Charts of what a run did to its blocks: scores, searches, modes, fidelity; each an SVG as a URI."""

import base64
import io
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

MODE_COLOURS = {"train": "#d55e00", "pass": "#f3c79a", "prefix": "#d5dce2"}
MODE_COLOURS |= {"bypass": "#5aa9d6", "bypass_attn": "#1f5f8b", "skip": "#333333"}
FIDELITY_COLOURS = {"cosine": "#0072b2", "norm_ratio": "#8c8c8c", "new_modules_cosine": "#d95f02"}


def score_chart(score: dict[str, Any]) -> str:
    """Draw each block's score with its interval, and by time."""
    names, values, intervals = list(score["values"]), score["values"], score.get("intervals") or {}
    taus = score.get("per_tau") or {}
    heights = [2.6] + ([0.5 + 0.22 * len(taus)] if taus else [])
    figure = Figure(figsize=(10.5, sum(heights) + 0.6))
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    top, rank = panels[0], {name: i for i, name in enumerate(score.get("ranking") or [], 1)}
    for i, name in enumerate(names):
        low, high = intervals.get(name) or (math.nan, math.nan)
        top.plot([i, i], [low, high], color="#0072b2", lw=1.6)
        top.plot(i, values[name], "o", ms=5.5, color="#0072b2", mfc="w" if name in (score.get("zero") or ()) else None)
        top.annotate(rank.get(name, ""), (i, 1.01), xycoords=("data", "axes fraction"), ha="center", fontsize=7.5)
    top.axhline(0, color="black", lw=0.6)
    top.set_ylabel(f"{score.get('priority', 'score')} (rank on top)")
    if taus:
        grid = np.array([[by_name.get(name, math.nan) for name in names] for by_name in taus.values()], dtype=float)
        mesh = panels[1].pcolormesh(np.arange(len(names) + 1) - 0.5, np.arange(len(taus) + 1), grid, cmap="cividis")
        panels[1].set_yticks(np.arange(len(taus)) + 0.5, list(taus))
        panels[1].set(ylabel="t (1 is noise)")
        figure.colorbar(mesh, ax=panels[1], pad=0.01, aspect=8)
    _block_ticks(panels[-1], names)
    return svg(figure)


def search_chart(events: Sequence[dict[str, Any]]) -> str | None:
    """Draw the convergence efficiency of every candidate, one panel for each search that was afforded."""
    searches = [event for event in events if event.get("rungs")]
    if not searches:
        return None
    columns = min(3, len(searches))
    lines = math.ceil(len(searches) / columns)
    figure = Figure(figsize=((4, 7, 10.5)[columns - 1], 2.9 * lines))
    for place, search in enumerate(searches, 1):
        _search_panel(figure.add_subplot(lines, columns, place), search)
    return svg(figure)


def _search_panel(axes: Axes, search: dict[str, Any]) -> None:
    rungs = [rung["entries"] for rung in search.get("rungs") or []]
    chosen = _point(search.get("chosen") or {})
    points = sorted({_point(e) for entries in rungs for e in entries})
    shades = ListedColormap(["#9db4c0", "#0072b2", "#003f66"]).resampled(max(len(rungs), 1))
    for i, entries in enumerate(rungs):
        for entry in entries:
            x = points.index(_point(entry)) + 0.18 * (i - (len(rungs) - 1) / 2)
            low, high = entry.get("interval") or (math.nan, math.nan)
            axes.plot([x, x], [low, high], color=shades(i), lw=1.4)
            axes.plot([x], [entry.get("efficiency")], "o", ms=4.5, color=shades(i))
    if chosen in points:
        x = points.index(chosen)
        axes.axvspan(x - 0.45, x + 0.45, color="#f3c79a", alpha=0.6, lw=0, zorder=0)
    axes.axhline(0, color="black", lw=0.6)
    axes.set_xticks(range(len(points)), [_label(*point) for point in points])
    axes.set_title(f"stage {search.get('stage')}, {search.get('estimator')}")
    small = "; below: frames x size" if any(p[2:] != (1, 1) for p in points) else ""
    about = f"active blocks (−: skipped blocks{small})"
    axes.set(xlabel=about, ylabel="loss decrease / second", xlim=(-0.6, len(points) - 0.4))


def _point(entry: dict[str, Any]) -> tuple[float, ...]:
    """Return a candidate's coordinates; a run from before the token axis has whole clips."""
    return (*(entry.get(k, -1) for k in ("active", "skipped")), *(entry.get(k, 1.0) for k in ("frames", "size")))


def _label(active: float, skipped: float, frames: float, size: float) -> str:
    clip = "" if frames == size == 1 else f"\n{frames:g}x{size:g}"
    return f"{active}" + (f"\n−{skipped}" if skipped else "") + clip


def map_chart(every: Sequence[dict[str, Any]]) -> str:
    """Draw blocks x progress; a decision holds until the next one, the last until the last event of the run.

    Where training steps saw smaller clips, their share of the tokens stands below.
    """
    events = list(
        {e["step"]: e for e in every if e.get("event") == "modes"}.values()
    )  # a resumed run may repeat a step
    names = list(dict.fromkeys(name for e in events for name in (*e["modes"], *e["active"])))
    used = [{**e["modes"], **dict.fromkeys(e["active"], "train")} for e in events]
    present = {mode for modes in used for mode in modes.values()}
    kinds = [k for k in MODE_COLOURS if k in present] + sorted(present - MODE_COLOURS.keys())
    colours = [MODE_COLOURS.get(kind, "#cc79a7") for kind in kinds]
    edges = [e["progress"] for e in events]
    last = max(e.get("progress") or 0.0 for e in every)
    edges.append(last if last > edges[-1] else 1.0)
    grid = np.array([[kinds.index(m[n]) if n in m else math.nan for m in used] for n in names], dtype=float)
    shares = [t["frames"] * t["size"] ** 2 if (t := e.get("tokens")) else 1.0 for e in events]
    heights = [min(1.3 + 0.19 * len(names), 12)] + ([0.9] if min(shares) < 1 else [])
    figure = Figure(figsize=(10.5, sum(heights)))
    axes, *below = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    norm = BoundaryNorm(np.arange(len(kinds) + 1) - 0.5, len(kinds))
    rows = np.arange(len(names) + 1) - 0.5
    axes.pcolormesh(edges, rows, grid, cmap=ListedColormap(colours), norm=norm, ec="w", lw=0.7)
    _block_ticks(axes, names, vertical=True)
    for panel in below:
        panel.stairs(shares, edges, fill=True, color="#9db4c0")
        panel.set(ylabel="tokens", ylim=(0, 1.05))
    (below or [axes])[-1].set(xlabel="progress of the run", xlim=(0, max(1.0, edges[-1])))
    handles = [Patch(color=c, label=k) for k, c in zip(kinds, colours, strict=True)]
    figure.legend(handles=handles, loc="outside upper left", ncols=7, fontsize=8)
    return svg(figure)


def fidelity_chart(modes: Sequence[dict[str, Any]]) -> str | None:
    """Draw what each choice of bypassed blocks was made on: gradient fidelity over the size of the set."""
    events = [e for e in modes if e.get("fidelity_curve")]
    if not events:
        return None
    figure = Figure(figsize=(min(10.5, 3.5 * len(events)), 2.4))
    for axes, event in zip(figure.subplots(1, len(events), squeeze=False)[0], events, strict=True):
        sizes = [point["size"] for point in event["fidelity_curve"]]
        for key, colour in FIDELITY_COLOURS.items():
            values = [point.get(key) for point in event["fidelity_curve"]]
            if any(v is not None for v in values):
                axes.plot(sizes, values, "o-", ms=3.5, lw=1.2, color=colour, label=key.replace("_", " "))
        axes.axvline((event.get("fidelity") or {"size": 0}).get("size", 0), color="black", ls=":", lw=1)
        axes.set(xlabel="frozen blocks not exact", title=f"stage {event.get('stage')}, {len(event['active'])} active")
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.axes[0].legend(fontsize=7.5)
    return svg(figure)


def _block_ticks(axes: Axes, names: Sequence[str], vertical: bool = False) -> None:
    """Label one axis with block names, or only with their numbers where the rest of the name is shared."""
    shared = {re.sub(r"\d+$", "", name) for name in names}
    prefix = shared.pop() if len(shared) == 1 else ""
    axis = axes.yaxis if vertical else axes.xaxis
    axis.set_ticks(range(len(names)), [name.removeprefix(prefix) for name in names], fontsize=8)
    axis.set_label_text(f"block ({prefix}N)" if prefix else "block")
    axis.set_tick_params(rotation=0 if prefix or vertical else 90)
    axis.set_inverted(vertical)


def svg(figure: Figure) -> str:
    """Return a figure as the URI of an SVG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return uri("image/svg+xml", buffer.getvalue())


def uri(kind: str, data: bytes) -> str:
    """Return data as a URI that a page can hold."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
