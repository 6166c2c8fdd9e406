"""What each mode of frozen blocks keeps for backward, and what checkpointing leaves of it.

    python benchmarks/kept_bytes.py                   # writes benchmarks/results/kept_bytes.json

A Wan-shaped transformer, 12 blocks, 1,024 tokens, float32, blocks 1, 5 and 9 trainable, nothing outside blocks: bytes
that autograd holds at the end of the forward pass, the most that is alive at once until the end of the backward pass,
and FLOPs, each counted, not timed. Every gradient is compared with the one without checkpointing.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from entprog.bench import environment, tiny_wan, wan_loss
from entprog.blocks import find_blocks, record_example
from entprog.checkpointing import CHECKPOINTS, checkpoint_blocks
from entprog.measure import PeakBytes, count_flops, saved_bytes
from entprog.modes import set_active
from entprog.profiling import cost_of


def gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the gradients of one step."""
    wan_loss(model, batch).backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kept_bytes.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, batch = tiny_wan(args.dim)
    model.requires_grad_(False)
    blocks = find_blocks(model, record_example(model, lambda: wan_loss(model, batch)))
    cost = cost_of(model, blocks, lambda: wan_loss(model, batch))
    some = [blocks[i] for i in (1, 5, 9)]
    rows: list[dict[str, Any]] = []
    for active, mode in ((blocks, "train"), *((some, m) for m in ("pass", "bypass_attn", "bypass"))):
        set_active(blocks, active, frozen=mode if mode != "train" else "pass")
        exact: list[torch.Tensor] = []
        for way in CHECKPOINTS:
            checkpoint_blocks(blocks, way)
            exact = exact or gradients(model, batch)
            with saved_bytes(ignore=[*model.parameters(), *batch.values()]) as held:
                loss = wan_loss(model, batch)
                kept = held()
            del loss
            with PeakBytes() as live:
                same = all(torch.equal(a, b) for a, b in zip(exact, gradients(model, batch), strict=True))
            modes = {b.name: "train" if b in active else mode for b in blocks}
            predicted = cost.step(modes, outside="none", checkpointed=dict.fromkeys(cost.forward, way))
            row = {"active": len(active), "mode": mode, "checkpointing": way, "kept": kept, "peak": live.peak}
            row |= {"flops": count_flops(lambda: gradients(model, batch)), "predicted_flops": predicted}
            rows.append(row | {"bit_equal": same, "segments": blocks[1].segments})
            print(row, same, flush=True)
    args.out.write_text(json.dumps(environment() | {"dim": args.dim, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
