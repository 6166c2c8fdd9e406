"""Clips longer than the window a model was trained on: seams, flicker and drift against the overlap of the windows.

    python benchmarks/long_clips.py runs/human/video/ent-prog --out runs/long

renders unseen people in clips of 40 frames (or takes --data), draws them by windows of the run's frames with several
overlaps and writes benchmarks/results/long_clips.json. Each value is beyond the truth's own; 0 is like it. `seam`
compares the first frames of windows with the others.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from entprog.bench import environment, first_clips, sample_clips
from entprog.config import load_config
from entprog.data.batches import load_data
from entprog.data.prepared import Prepared
from entprog.data.video import write_mp4
from entprog.metrics.adherence import background_flicker, colour_drift, flicker, seam
from entprog.metrics.protocol import bootstrap_interval
from entprog.models.pretrained import load_model
from entprog.sample import windows

FRAMES = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of a video phase")
    parser.add_argument("--data", type=Path, help="prepared folder with long clips (default: rendered into --out)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--overlaps", type=int, nargs="*", default=[0, 2, 4])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = args.data or args.out / "data"
    if args.data is None:
        from entprog.data.rendered import render_people

        render_people({"hard": args.clips}, data, frames=FRAMES, clips_per_person=1, seed=1)
    config = replace(load_config(args.run / "config.yaml"), data=str(data), held_out_clips=args.clips)
    model = load_model(str(args.run / "checkpoints" / "final"))
    clips, _ = load_data(config, "hard")
    frames = clips["video"].shape[2]
    batch, truth = first_clips(config, clips, args.clips, frames)
    labels = Prepared(data, "hard", args.clips).rows(range(len(truth)), ["labels"])["labels"]
    rows = []
    for overlap in args.overlaps:
        drawn = sample_clips(config, model, batch, overlap=overlap)
        borders = [start for start, _ in windows(frames, config.frames, overlap)[1:]]
        values: dict[str, list[float]] = {"seam": [], "flicker": [], "background_flicker": [], "colour_drift": []}
        for one, real, mask in zip(drawn, truth, labels, strict=True):
            a, b = ((v.transpose(0, 1) / 2 + 0.5).clamp(0, 1) for v in (one, real))
            values["seam"].append(seam(a, b, borders))
            values["flicker"].append(flicker(a, b))
            values["background_flicker"].append(background_flicker(a, b, mask))
            values["colour_drift"].append(colour_drift(a, b, mask, windows=len(borders) + 1))
        found = {k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()}
        rows.append({"overlap": overlap, "windows": len(borders) + 1} | {
            k: {"mean": v.mean().item(), "interval": bootstrap_interval(v)} for k, v in found.items()
        })  # fmt: skip
        wall = torch.cat((torch.cat(list(truth), -1), torch.cat(list(drawn), -1)), -2)
        write_mp4(args.out / f"overlap-{overlap}.mp4", wall, 10, upscale=2)
    about = {"clips": len(truth), "frames": frames, "window": config.frames, "run": "/".join(args.run.parts[-2:])}
    path = Path(__file__).parent / "results" / "long_clips.json"
    path.write_text(json.dumps(environment() | about | {"rows": rows}, indent=1) + "\n")
    table = Table(title=f"{len(truth)} clips of {frames} frames, windows of {config.frames}")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{v['mean']:+.4f}" if isinstance(v, dict) else str(v) for v in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
