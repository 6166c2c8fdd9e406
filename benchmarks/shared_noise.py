"""Noise that a clip's frames share: how steady are samples, and what does it cost?

    python benchmarks/shared_noise.py runs/human/video/full runs/noise-half --drawn 0 0.5 1

draws unseen people with the model of each run of a video phase (trained with its own `shared_noise`; make others by
`entprog train runs/human/video/full/config.yaml shared_noise=0.5 --out runs/noise-half`), beginning with noise of
which the frames share each of the given parts, and writes benchmarks/results/shared_noise.json. Flicker is beyond the
truth's own; 0 is like it.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from entprog.bench import environment
from entprog.config import RunConfig, load_config
from entprog.data.movenet import MoveNet
from entprog.evaluate import evaluate
from entprog.recipe import draw_videos
from entprog.tables import progress_bar

SHOWN = ("flicker", "background_flicker", "lpips[alex]", "psnr", "pck@0.1")


def measured(config: RunConfig, model: str, clips: int, on_clip: Any) -> dict[str, Any]:
    """Means of SHOWN over unseen people's clips drawn as a configuration says, and each clip's values."""
    videos, prepared = draw_videos(config, model, "test", clips)
    found = evaluate(videos, prepared, estimate=MoveNet(), networks=("alex",), baselines=False, on_progress=on_clip)
    per_clip = found["rows"]["generated"]["per_clip"]
    return {name: {"mean": mean(per_clip[name]), "per_clip": per_clip[name]} for name in SHOWN}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders of a video phase")
    parser.add_argument("--drawn", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "shared_noise.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    table = Table(title=f"{args.clips} clips of unseen people")
    for column in ("shared in training", "steps", "in samples", *SHOWN):
        table.add_column(column, justify="right")
    with progress_bar() as show:
        for run in args.runs:
            config = load_config(run / "config.yaml")
            steps = json.loads((run / "results.json").read_text())["steps"]
            for share in args.drawn:
                label = f"{run.name}, {share:g} shared"

                def on_clip(done: int, of: int, label: str = label) -> None:
                    show({"run": label, "done": done, "of": of})

                show({"run": label, "message": "drawing"})
                drawn = replace(config, sample_shared_noise=share)
                found = measured(drawn, str(run / "checkpoints" / "final"), args.clips, on_clip)
                rows.append({"trained": config.shared_noise, "steps": steps, "drawn": share} | found)
                means = [f"{found[name]['mean']:.4f}" for name in SHOWN]
                table.add_row(f"{config.shared_noise:g}", str(steps), f"{share:g}", *means)
    args.out.write_text(json.dumps(environment() | {"clips": args.clips, "rows": rows}, indent=1) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()
