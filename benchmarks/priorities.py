"""How well does each priority foresee which block is worth training? Spearman against the oracle, on PoseDiT-T.

    python benchmarks/priorities.py                   # writes benchmarks/results/priorities.json

Oracle: the drop of the held-out loss (32 clips) after 20 AdamW steps that train one block only. The pose guider and the
output head are trained first for some steps, as every strategy does: with a zero guider no block can use the pose.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from entprog.bench import environment
from entprog.blocks import find_blocks, record_example
from entprog.data.batches import Data, batch_at, fixed_batches
from entprog.data.synthetic import figures
from entprog.models.pose_dit import PoseDiT
from entprog.models.pretrained import load_model, loss_fn, predict_fn
from entprog.objective import OBJECTIVES
from entprog.priority import PRIORITIES, agreement, oracle, score


def warmed(clips: Data, steps: int) -> PoseDiT:
    """Return the embedded base after some steps of guider and head on drawn figures; they alone require gradients."""
    model, per_sample = load_model("base"), loss_fn(OBJECTIVES["flow_prediction"])
    model.requires_grad_(False)
    new = [p for m in (model.pose_guider, model.final_layer) for p in m.requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(new, lr=1e-3)
    for step in range(steps):
        per_sample(model, batch_at(clips, 1000 + step, batch_size=4, seed=0)).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm", type=int, nargs="*", default=[0, 40], help="steps of guider and head beforehand")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "priorities.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console = Console()
    objective = OBJECTIVES["flow_prediction"]
    predict, per_sample = predict_fn(objective), loss_fn(objective)
    clips, unseen = figures(512, size=24), figures(32, size=24, seed=777)
    at = partial(batch_at, clips, batch_size=4, seed=0)
    held_out = fixed_batches(unseen, batch_size=32)[0]
    scored_on = fixed_batches({k: v[:32] for k, v in clips.items()}, batch_size=4)
    results = {}
    for warm in args.warm:
        model = warmed(clips, warm).requires_grad_(True)
        blocks = find_blocks(model, record_example(model, lambda: predict(model, held_out)))  # noqa: B023

        def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return per_sample(model, batch).mean()

        with console.status(f"oracle after {warm} steps of guider and head"):
            truth = oracle(model, blocks, predict, [*(at(i) for i in range(20)), held_out], loss_fn=loss)
        rows = {"oracle": {"values": truth.values}}
        table = Table(title=f"after {warm} steps of guider and head")
        for column in ("priority", "Spearman", "Kendall", "seconds", "order"):
            table.add_column(column)
        for name in (n for n in PRIORITIES if n != "oracle"):
            begun = time.perf_counter()
            scores = score(model, blocks, predict, scored_on, name, loss_fn=loss)
            row = agreement(scores, truth) | {"seconds": time.perf_counter() - begun, "values": scores.values}
            rows[name] = row | {"share_negative": scores.share_negative}
            order = " ".join(n.removeprefix("blocks.") for n in scores.ranking)
            table.add_row(name, f"{row['spearman']:.2f}", f"{row['kendall']:.2f}", f"{row['seconds']:.1f}", order)
        console.print(table)
        results[f"{warm} steps"] = rows
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(environment() | results, indent=1) + "\n")


if __name__ == "__main__":
    main()
