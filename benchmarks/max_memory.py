"""Does a run with `max_memory` stay within it, and does every block train? Small models of five families on the CPU.

    python benchmarks/max_memory.py                  # 5 minutes of one core; benchmarks/results/max_memory.json

The limit is a share of what a step that trains everything holds, without checkpoints. EntProg decides m, modes,
precision, checkpointing and what waits on the host; ent-prog's own settings, and the same with CEI in place of gain,
AdamW, float32. `step`: the most that a step holds by the run's own accounting (weights as a GPU would hold them,
gradients, moments, what autograd keeps, the block that runs again); `search`: the most while scoring, measuring
fidelity and in trials; `live`: counted apart, by following every tensor that forward and backward make from birth to
death in the first step with each set of blocks, temporary ones included, which no plan foresees. All are shares of the
limit. `error`: what a trial measured / the plan - 1.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import count, product
from pathlib import Path
from typing import Any

import torch
from plan_accuracy import FAMILIES
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from entprog import memory
from entprog.bench import environment
from entprog.blocks import first_tensor, forked_rng
from entprog.frozen import weight_bytes
from entprog.measure import PeakBytes, saved_bytes, tensor_bytes
from entprog.plugin import EntProg
from entprog.strategy import Progressive, ent_prog

SHARES = (0.9, 0.7, 0.5, 0.35, 0.25)
NAMES = ("Wan", "HunyuanVideo", "LTX", "SD3", "PoseDiT")
EVERYTHING = Progressive(priority="first", schedule="fixed", active_share=1.0, stages=1)
SETTINGS = {
    "gain": ent_prog(),
    "cei": replace(ent_prog(), priority="cei"),  # scores that need no gradients need less memory
}


class Task:
    """One family's model and endless batches of it: its inputs scaled anew, noise to predict."""

    def __init__(self, family: str) -> None:
        torch.manual_seed(0)
        self.model, self.inputs = FAMILIES[family]()
        self.model.train()
        self.video = next(iter(self.inputs))
        with torch.no_grad():
            self.target = torch.randn_like(self.predict(self.model, self.inputs))

    def predict(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        return first_tensor(model(**inputs))

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return (self.predict(model, batch) - self.target[: len(batch[self.video])]).square().flatten(1).mean(1)

    def batches(self) -> Iterator[dict[str, Any]]:
        for i in count():
            with forked_rng(i):
                yield self.inputs | {self.video: self.inputs[self.video] * (0.5 + torch.rand(1))}


def run(family: str, settings: Progressive, limit: int | None, steps: int | None = None) -> dict[str, Any]:
    """Train a family within a limit; by default two steps in each period of a rotation of one block at a time.

    ValueError where nothing fits.
    """
    task = Task(family)
    held_out = next(task.batches())
    prog = EntProg(task.model, task.loss, held_out=held_out, train_batches=task.batches, total_steps=steps or 1,
                   strategy=settings, clock="model", max_memory=limit)  # fmt: skip
    prog.total_steps = steps = steps or 12 * len(prog.blocks)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-4)
    step_bytes, search, live, sets, ways = 0, 0, 0, [], set()
    for step, batch in zip(range(steps), task.batches(), strict=False):
        prog.step(step, optimizer)
        sets.append(frozenset(prog.active))
        ways.add(f"{prog.keeping.frozen_weights or 'as they are'}, {_words(prog.keeping.checkpointing)}")
        moments = tensor_bytes(
            v for p, s in optimizer.state.items() if p.requires_grad for v in s.values() if v.ndim
        )  # the others' wait on the host
        before = weight_bytes(task.model)["device"] + moments
        followed = len(sets) < 2 or sets[-1] != sets[-2]  # slow: once for each set of blocks
        with PeakBytes() if followed else nullcontext() as made:
            with saved_bytes(ignore=list(task.model.parameters())) as kept:
                loss = task.loss(task.model, batch).mean()
                step_bytes = max(step_bytes, memory.held(prog, kept()))
            loss.backward()
        live, search = max(live, before + made.peak if made else 0), max(search, prog.peak_bytes)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        del loss
    errors = [e["error"] for e in prog.events if e["event"] == "plan_check"]
    return {
        "blocks": len(prog.blocks), "steps": steps, "step_bytes": step_bytes, "search_bytes": search,
        "live_bytes": live, "at_a_time": [min(map(len, sets)), max(map(len, sets))],
        "never_trained": sorted({b.name for b in prog.blocks} - frozenset().union(*sets)),
        "kept_as": sorted(ways), "errors": [min(errors), max(errors)] if errors else None,
    }  # fmt: skip


def _words(checkpointing: Any) -> str:
    return checkpointing if isinstance(checkpointing, str) else " and ".join(sorted(set(checkpointing.values())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", choices=list(FAMILIES), default=list(NAMES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "max_memory.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title="shares of the limit")
    for column in (
        "family",
        "limit / full",
        "step",
        "search",
        "live",
        "at a time",
        "never trained",
        "error",
        "kept as",
    ):
        table.add_column(column)
    rows: list[dict[str, Any]] = []
    for family in args.families:
        full = run(family, EVERYTHING, None, steps=2)["step_bytes"]
        for share, scores in product(SHARES, SETTINGS):
            row: dict[str, Any] = {"family": family, "scores": scores, "share": share, "full_bytes": full}
            row["limit"] = int(share * full)
            try:
                row |= run(family, SETTINGS[scores], row["limit"])
                for part in ("step", "search", "live"):
                    row[part] = row[f"{part}_bytes"] / row["limit"]
                low, high = row["errors"]
                cells = [f"{row[k]:.2f}" for k in ("step", "search", "live")]
                cells += ["-".join(map(str, row["at_a_time"])) + f" of {row['blocks']}", str(len(row["never_trained"]))]
                cells += [f"{low:+.1%} to {high:+.1%}", "; ".join(row["kept_as"])]
            except (ValueError, RuntimeError) as refused:
                if "max_memory" not in str(refused):
                    raise
                row["refused"] = str(refused)
                cells = ["refused"] + [""] * 6
            rows.append(row)
            table.add_row(family, scores, f"{share:g}", *cells)
            print(family, scores, share, *cells, row.get("refused", ""), flush=True)
            args.out.write_text(json.dumps(environment() | {"rows": rows}, indent=1) + "\n")
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
