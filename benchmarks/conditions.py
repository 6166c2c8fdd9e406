"""Does training the blocks that matter for a condition move what that condition is for?

    python benchmarks/conditions.py runs/human/subject/full --scored-on runs/human/pose/full --steps 300 \
        --out runs/conditions

starts from a model that knows the reference but no pose (the subject phase's), ranks its blocks by how much of their
CEI comes from the reference and from the pose (measured on the pose phase's model with --scored-on), trains only the
best, only the worst and only random blocks of each ranking for the same steps on the pose phase's task, draws unseen
people and measures appearance and pose. Writes benchmarks/results/conditions.json.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from entprog.bench import environment
from entprog.blocks import find_blocks, record_example
from entprog.cei import cei_per_condition
from entprog.config import RunConfig, load_config
from entprog.data.batches import Batch, batch_at, fixed_batches, load_data
from entprog.data.movenet import MoveNet
from entprog.data.prepared import Prepared
from entprog.evaluate import evaluate
from entprog.models.pretrained import load_model, loss_fn, precision, predict_fn, scoring_ways
from entprog.modes import set_active
from entprog.objective import OBJECTIVES
from entprog.recipe import draw_videos
from entprog.tables import progress_bar


def scores_of(config: RunConfig, folder: Path) -> dict[str, dict[str, float]]:
    """CEI of every block with all conditions, without each, and within each region."""
    model, predict = load_model(str(folder)), predict_fn(OBJECTIVES[config.objective])
    data, _ = load_data(replace(config, held_out_clips=64), "test")
    batches = fixed_batches(data, batch_size=16, frames=config.frames, conditions=config.conditions)
    blocks = find_blocks(model, record_example(model, lambda: predict(model, batches[0])))

    ways, whole = scoring_ways(predict, batches, config.conditions)
    return {name: scores.values for name, scores in cei_per_condition(model, blocks, ways, whole).items()}


def trained(config: RunConfig, folder: Path, active: list[str], steps: int, out: Path) -> Path:
    """Train only the named blocks (and the pose guider) on the pose task; returns the model's folder."""
    if (out / "config.json").exists():
        return out
    model, loss = load_model(str(folder)), loss_fn(OBJECTIVES[config.objective], config.person_weight)
    data, _ = load_data(config, "train")

    def batch(position: int) -> Batch:
        return batch_at(data, position, batch_size=config.batch_size, seed=config.seed, frames=1,
                        joint_dropout=config.joint_dropout, conditions=config.conditions)  # fmt: skip

    blocks = find_blocks(model, record_example(model, lambda: loss(model, batch(0))))
    model.requires_grad_(False)
    model.pose_guider.requires_grad_(True)
    set_active(blocks, active, frozen="pass")
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    with progress_bar() as show:
        for step in range(steps):
            drawn = batch(step)  # latents are kept in half precision, which autocast on a CPU does not stack
            with precision(config, torch.device("cpu")):
                value = loss(model, drawn).mean()
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            show({"run": out.name, "done": step + 1, "of": steps})
    set_active(blocks, blocks)
    model.save_pretrained(out)
    return out


def measured(config: RunConfig, folder: Path, clips: int) -> dict[str, float]:
    """Pose and appearance of unseen people drawn by a model, as images of each clip's first frame."""
    videos, data = draw_videos(replace(config, frames=1), str(folder), "test", clips, frames=4)
    data = _cut(data, 4)
    means = evaluate(videos, data, estimate=MoveNet(), networks=(), baselines=False)["rows"]["generated"]["means"]
    return {k: means[k]["mean"] for k in ("pck@0.1", "oks", "nearer_to_own", "appearance_distance", "psnr")}


class _Cut(Prepared):
    """A split whose clips are cut to their first frames."""

    frames: int

    def rows(self, indices: Any, names: Any) -> dict[str, torch.Tensor]:
        whole = super().rows(indices, names)
        framed = ("video", "keypoints", "labels")
        return {k: v[:, : self.frames] if k in framed else v for k, v in whole.items()}


def _cut(data: Prepared, frames: int) -> Prepared:
    cut = _Cut(data.folder, data.split, len(data))
    cut.frames = frames
    cut.records = [r | {"frames": frames} for r in cut.records]
    return cut


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", type=Path, help="run folder of a subject phase")
    parser.add_argument("--scored-on", type=Path, required=True, help="run folder of a pose phase")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--blocks", type=int, default=2, help="how many of the blocks train")
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = load_config(args.scored_on / "config.yaml")
    scores = scores_of(config, args.scored_on / "checkpoints" / "final")
    names = list(scores["all conditions"])
    needs = {c: {n: scores["all conditions"][n] - scores[f"without {c}"][n] for n in names} for c in config.conditions}
    sets = {}
    for condition, by_name in needs.items():
        order = sorted(names, key=lambda n: -by_name[n])
        sets[f"top {condition}"], sets[f"bottom {condition}"] = order[: args.blocks], order[-args.blocks :]
    for seed in (0, 1):
        sets[f"random {seed}"] = random.Random(seed).sample(names, args.blocks)
    rows = []
    for name, active in sets.items():
        folder = trained(config, args.start / "checkpoints" / "final", active, args.steps, args.out / name)
        rows.append({"trained": name, "blocks": active} | measured(config, folder, args.clips))
    path = Path(__file__).parent / "results" / "conditions.json"
    about = {"steps": args.steps, "clips": args.clips, "scores": scores, "needs": needs}
    path.write_text(json.dumps(environment() | about | {"rows": rows}, indent=1) + "\n")
    table = Table()
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
