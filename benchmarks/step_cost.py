"""What one training step of a Wan-shaped transformer costs with 3 of 12 blocks trainable, against full training.

    python benchmarks/step_cost.py                   # writes benchmarks/results/step_cost.json

FLOPs and bytes kept for backward at 256 wide, paired median step time at 512 wide: ratios within one run.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from entprog.bench import environment, wan_step_cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step_cost.json")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    console = Console()
    with console.status("counting FLOPs and bytes, 256 wide"):
        counted = wan_step_cost(256, timed=False)
    with console.status(f"timing {args.rounds} rounds, 512 wide"):
        timed = wan_step_cost(512, rounds=args.rounds)
    table = Table(title="against full training")
    for column in ("case", "FLOPs", "bytes kept", "time (512)", "gradient cosine"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for row, other in zip(counted["rows"], timed["rows"], strict=True):
        row["time_ratio"] = other["time_ratio"]
        ratios = [f"{row[k]:.3f}" for k in ("flops_ratio", "bytes_ratio", "time_ratio", "fidelity")]
        table.add_row(row["case"], *ratios)
    counted["description"] += "; time measured 512 wide"
    counted["rounds"] = args.rounds
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(environment() | {"models": [counted]}, indent=1) + "\n")
    console.print(table)
    console.print(f"{args.out}")


if __name__ == "__main__":
    main()
