"""Full, LoRA and Ent-Prog with its ablations at equal net time, several seeds.

    python benchmarks/seeds.py --seconds 90 --threads 1                 # writes benchmarks/results/seeds.json
    python benchmarks/seeds.py --seconds 280 --clock model --out seeds_flops.json   # equal FLOPs, whatever the load

Each strategy trains at the best rate that docs/log.md found for it. Held-out losses are compared sample by sample;
time_to_full_loss is the net time at which a run first reached the final loss of `full` of the same seed. Runs that are
there already are not repeated, so several processes can share the work (--only).
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from entprog.bench import environment, train_run, with_speedups
from entprog.cli import progress_bar
from entprog.config import RunConfig, demo

ABLATIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {},
    "ent-prog": {},
    "ent-prog cei": {"priority": "cei"},
    "ent-prog random": {"priority": "random"},
}


def config_of(name: str, seconds: float, seed: int, clock: str) -> RunConfig:
    """Return one variant's configuration: the strategy's own, and the one word that is changed."""
    base = replace(demo(name.split()[0], seconds, seed), clock=clock)
    return replace(base, samples=0, held_out_clips=64, checkpoint_every=10_000, **ABLATIONS[name])


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over seeds."""
    losses = [r["held_out"]["loss"] for r in runs]
    faster = [r["net_speedup"] for r in runs]
    return {
        "loss": mean(losses),
        "loss_sd": stdev(losses) if len(losses) > 1 else None,
        "against_full": [r["against_full"] for r in runs],
        "net_speedup": faster,
        "steps": [r["steps"] for r in runs],
        "overhead": [r["scoring_share"] + r["search_share"] for r in runs],
        "peak_bytes": [r["peak_bytes"] for r in runs],
        "mean_bytes": [r["mean_bytes"] for r in runs],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--clock", choices=("wall", "model"), default="wall", help="model: 1e10 FLOPs are a second")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4, 5])
    parser.add_argument("--only", nargs="*", default=list(ABLATIONS), choices=list(ABLATIONS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "seeds.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runs: dict[int, dict[str, Any]] = {}
    for seed in args.seeds:
        runs[seed] = {}
        for name in args.only:
            with progress_bar() as show:
                folder = args.runs / f"{seed}" / name.replace(" ", "-")
                runs[seed][name] = train_run(config_of(name, args.seconds, seed, args.clock), folder, show)
    if "full" not in args.only:
        return
    runs = {seed: with_speedups(of_seed) for seed, of_seed in runs.items()}
    totals = {name: summary([runs[s][name] for s in args.seeds]) for name in args.only}
    record = {
        "seconds": args.seconds,
        "clock": args.clock,
        "threads": args.threads,
        "summary": totals,
        "runs": runs,
    } | environment()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    table = Table(title=f"{len(args.seeds)} seeds, {args.seconds:.0f} net seconds, {args.threads} thread(s)")
    for column in ("strategy", "held-out loss", "against full", "sooner at full's loss", "peak MiB", "mean MiB"):
        table.add_column(column)
    for name, total in totals.items():
        apart = "  ".join(f"{d['difference']:+.4f}" for d in total["against_full"])
        sooner = "  ".join(f"{s:.2f}x" if s else "never" for s in total["net_speedup"])
        spread = f" ± {total['loss_sd']:.4f}" if total["loss_sd"] is not None else ""
        table.add_row(name, f"{total['loss']:.4f}{spread}", apart, sooner,
                      *(f"{mean(total[k]) / 2**20:.0f}" for k in ("peak_bytes", "mean_bytes")))  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
