"""What a terminal shows: the console, a run's progress, results as tables."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from entprog.plan import Plan, Setting

console = Console()


@contextmanager
def progress_bar() -> Iterator[Any]:
    """Yield a function that shows a run's progress: run, stage, active blocks, loss, memory, time left."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, Any] = {}

        def show(info: dict[str, Any]) -> None:
            name = info.get("run", "run")
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=1.0, note="")
            if "done" in info:
                bar.update(
                    tasks[name],
                    completed=info["done"] / info["of"],
                    note=f"{info['done']:.4g} of {info['of']}  {escape(str(info.get('at', '')))}",
                )
                return
            if "message" in info:
                bar.update(tasks[name], note=info["message"])
                return
            note = (
                f"step {info['step']}  stage {info['stage']}  {info['active']}/{info['blocks']} blocks  "
                f"loss {info['loss']:.4f}  {info['bytes'] / 2**20:.0f} MiB"
            )
            bar.update(tasks[name], completed=info["progress"], note=note)

        yield show
        for task in tasks.values():
            bar.update(task, completed=1.0)


def results_table(runs: dict[str, dict[str, Any]]) -> Table:
    """One column per strategy, so that the table fits a narrow terminal."""

    def quality(run: dict[str, Any], name: str, form: str) -> str:
        return format(run["metrics"][name]["mean"], form) if name in run["metrics"] else "-"

    def held_out(run: dict[str, Any]) -> str:
        low, high = run["held_out"]["interval"]
        return f"{run['held_out']['loss']:.4f} ± {(high - low) / 2:.4f}"

    def against_full(run: dict[str, Any]) -> str:
        low, high = run["against_full"]["interval"]
        return f"{run['against_full']['difference']:+.4f} ({low:+.4f} .. {high:+.4f})"

    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("net seconds", lambda r: f"{r['net_seconds']:.1f}"),
        ("steps", lambda r: str(r["steps"])),
        ("held-out loss", held_out),
        ("SSIM", lambda r: quality(r, "ssim", ".3f")),
        ("PSNR, dB", lambda r: quality(r, "psnr", ".2f")),
        ("peak memory, MiB", lambda r: f"{r['peak_bytes'] / 2**20:.0f}"),
        ("mean memory, MiB", lambda r: f"{r['mean_bytes'] / 2**20:.0f}"),
        ("scoring, search", lambda r: f"{r['scoring_share']:.1%}, {r['search_share']:.1%}"),
    ]
    if len(runs) > 1:
        rows += [
            ("loss - full's, paired", against_full),
            ("full's loss reached", lambda r: f"{t:.0f} s" if (t := r["time_to_full_loss"]) else "never"),
            ("sooner, net", lambda r: f"{x:.2f}x" if (x := r["net_speedup"]) else "-"),
        ]
    table = Table(title="held-out clips" + (", equal net time" if len(runs) > 1 else ""))
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")
    for label, cell in rows:
        table.add_row(label, *(cell(run) for run in runs.values()))
    return table


def evaluation_table(result: dict[str, Any]) -> Table:
    """One line a metric, one column for the videos, the truth and each baseline."""
    table = Table(title=f"{result['protocol']['clips']} clips of split {result['protocol']['split']}")
    rows = result["rows"]
    for column in ("", *rows):
        table.add_column(column, justify="right")
    names = list(dict.fromkeys(name for row in rows.values() for name in row["means"]))
    for name in names:
        cells = [row["means"].get(name) for row in rows.values()]
        table.add_row(escape(name), *(f"{c['mean']:.4g}" if c and c["mean"] is not None else "-" for c in cells))
    distances = [(row.get("fvd") or {}).get("value") for row in rows.values()]
    table.add_row("fvd", *(f"{value:.4g}" if value is not None else "-" for value in distances))
    return table


def plan_table(plan: "Plan", memory: int | None = None) -> Table:
    """One line a setting: its peak by the precision of frozen weights, its step against full training's and LoRA's.

    What fits `memory` is green.
    """
    inputs = " x ".join(str(n) for n in next(iter(plan.assumptions["inputs"].values())))
    table = Table(title=f"{plan.model}: {plan.parameters / 1e9:.2f} B parameters, {len(plan.blocks)} blocks, {inputs}")
    own = plan.reference.frozen
    kept = dict.fromkeys((own, "bf16", "int8", "cpu"))
    stored = [f"GiB {own}", *["bf16"] * (own != "bf16"), "int8, fp8", "cpu"]
    columns = ["train", "others", "ckpt", *stored, "step / full", "/ LoRA"]
    timed = plan.reference.seconds is not None
    for column in columns + ["h / 1000 steps"] * timed:
        table.add_column(column, justify="left" if column in columns[:3] else "right")

    def size(s: "Setting | None") -> str:
        if s is None:
            return ""
        text = f"{s.peak / 2**30:.1f}"
        return f"[green]{text}[/]" if memory is not None and s.peak <= memory else text

    rows: dict[Any, dict[str, Setting]] = {}
    for s in plan.settings:
        rows.setdefault((s.checkpointing, s.method, s.active, s.mode), {})[s.frozen] = s
    for (again, method, active, mode), found in rows.items():
        s = found[own]
        rank = plan.assumptions["lora_rank"]
        name = {"full": "all", "lora": f"LoRA r{rank}"}.get(method, f"{active} of {len(plan.blocks)}")
        cells = [name, mode if method == "ent-prog" else "", "no" if again == "none" else again]
        cells += [size(found.get(p)) for p in kept]
        cells += [f"{s.flops / plan.reference.flops:.2f}", f"{s.flops / plan.lora.flops:.2f}"]
        table.add_row(*cells, *[f"{1000 * s.seconds / 3600:.2f}"] * timed if s.seconds else [])
    state = f"{plan.assumptions['optimizer']}{', float32 master copies' if plan.assumptions['master'] else ''}"
    table.caption = (
        f"{state}; trainable blocks {plan.assumptions['active']}; steps by FLOPs, allocator slack not included"
    )
    return table
