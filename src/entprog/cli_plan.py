"""entprog plan: the command."""

import argparse
import json
from dataclasses import asdict
from typing import Any


def _plan(args: argparse.Namespace) -> None:
    from entprog.plan import parse_bytes, plan
    from entprog.tables import console, plan_table

    memory = parse_bytes(args.memory) if args.memory else None
    size = (args.frames, args.height, args.width)
    if any(size) and not all(size):
        raise ValueError(f"--frames, --height, --width are {size}: give all three or none")
    planned = plan(
        args.model, size if all(size) else None, batch=args.batch, optimizer=args.optimizer, master=not args.no_master,
        checkpointing=None if args.checkpointing == "all" else args.checkpointing, lora_rank=args.lora_rank,
        rate=args.rate * 1e12 if args.rate else None, seconds_per_step=args.seconds_per_step, device=args.device,
    )  # fmt: skip
    best = planned.best(memory) if memory else None
    if args.json:
        print(json.dumps(planned.to_json() | {"best": asdict(best) if best else None}, indent=1))
        return
    console.print(plan_table(planned, memory))
    if best:
        console.print(f"{args.memory}: {best.describe()}, {best.peak / 2**30:.1f} GiB", markup=False)


def add_plan(commands: Any) -> None:
    """Add the command and its options to the command line's parsers."""
    plan = commands.add_parser("plan", help="memory and time of every setting, from a model's configuration alone")
    plan.add_argument("model", help="a preset (wan2.1-t2v-14b, hunyuanvideo, ...) or a folder with config.json")
    plan.add_argument("--frames", type=int, help="of a clip in pixels (default: the preset's)")
    plan.add_argument("--height", type=int)
    plan.add_argument("--width", type=int)
    plan.add_argument("--batch", type=int, default=1)
    plan.add_argument("--optimizer", choices=("adamw", "adamw8bit"), default="adamw")
    plan.add_argument("--no-master", action="store_true", help="no float32 copy of the bf16 weights that train")
    plan.add_argument("--checkpointing", choices=("block", "parts", "none", "all"), default="all")
    plan.add_argument("--lora-rank", type=int, default=64)
    plan.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="whose kernels (default: %(default)s)")
    plan.add_argument("--memory", metavar="24GiB", help="what is there: marks what fits, names the best")
    speed = plan.add_mutually_exclusive_group()
    speed.add_argument("--rate", type=float, metavar="TFLOPS", help="sustained, for hours")
    speed.add_argument("--seconds-per-step", type=float, help="of full training (with checkpointing unless none)")
    plan.add_argument("--json", action="store_true", help="everything as JSON")
    plan.set_defaults(function=_plan)
