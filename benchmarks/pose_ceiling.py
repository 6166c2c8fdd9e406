"""What an autoencoder leaves of the pose: the best PCK any model of its latents can reach.

    python benchmarks/pose_ceiling.py data/people64 --clips 24

sends the true test clips through autoencoders, at their own size and enlarged, and lets the pose detectors look at
what comes back. Writes benchmarks/results/pose_ceiling.json: PCK@0.1 against the driving keypoints, the ratio to the
true clips' own PCK (the bar for a generator is .8 of it), frames in which a person is found, PSNR.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import interpolate

from entprog.bench import environment
from entprog.data.prepared import Prepared
from entprog.evaluate import ESTIMATORS, Estimate
from entprog.metrics.adherence import pck
from entprog.metrics.frame import psnr
from entprog.metrics.protocol import mean_interval
from entprog.models.autoencoder import TINY, Autoencoder

Way = Callable[[Tensor], Tensor]


def resized(frames: Tensor, factor: int, back: bool = False) -> Tensor:
    """Enlarge frames (F, 3, H, W) by bicubic interpolation, or take them back by averaging."""
    if factor == 1:
        return frames
    if back:
        return torch.nn.functional.avg_pool2d(frames, factor)
    return interpolate(frames, scale_factor=factor, mode="bicubic", align_corners=False)


@torch.no_grad()
def through(autoencoder: Autoencoder, frames: Tensor, factor: int) -> Tensor:
    """Return uint8 frames (F, 3, H, W) after a round trip through the latents, enlarged by `factor` meanwhile."""
    video = resized(frames.float() / 127.5 - 1, factor).transpose(0, 1)[None]
    back = resized(autoencoder.decode(autoencoder.encode(video))[0].transpose(0, 1), factor, back=True)
    return ((back.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def measure(data: Prepared, ways: dict[str, Way], detectors: dict[str, Estimate]) -> list[dict[str, Any]]:
    """Look at every clip in every way with every detector: a row each."""
    scores: dict[tuple[str, str], list[tuple[float, float]]] = {(w, d): [] for w in ways for d in detectors}
    quality: dict[str, list[float]] = {way: [] for way in ways}
    for i in track(range(len(data)), "clips"):
        rows = data.rows([i], ("video", "keypoints"))
        frames, driving = rows["video"][0], rows["keypoints"][0]
        for way, show in ways.items():
            shown = show(frames)
            quality[way].append(psnr(shown / 255, frames / 255).mean().item())
            for name, estimate in detectors.items():
                keypoints = estimate(shown)
                found = keypoints[..., 0].isfinite().any(1).float().mean().item()
                scores[way, name].append((pck(keypoints, driving), found))
    rows = []
    for (way, name), values in scores.items():
        mean, interval = mean_interval(torch.tensor([v[0] for v in values], dtype=torch.float64))
        floor = sum(v[0] for v in scores["truth", name]) / len(data)
        rows.append({"way": way, "detector": name, "pck@0.1": mean, "interval": interval, "ratio": mean / floor,
                     "found": sum(v[1] for v in values) / len(data),
                     "psnr": sum(quality[way]) / len(data) if way != "truth" else None})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="prepared folder")
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--autoencoders", nargs="*", default=list(TINY))
    parser.add_argument("--pose", nargs="*", default=list(ESTIMATORS), choices=list(ESTIMATORS))
    parser.add_argument("--factors", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pose_ceiling.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = Prepared(args.data, "test", args.clips)
    ways: dict[str, Way] = {"truth": lambda frames: frames}
    for name in args.autoencoders:
        for factor in args.factors:
            ways[f"{name}, frames x{factor}"] = partial(through, Autoencoder(name), factor=factor)
    rows = measure(data, ways, {name: ESTIMATORS[name]() for name in args.pose})
    table = Table("", "detector", "PCK@0.1", "of the truth's", "found", "PSNR")
    for row in rows:
        shown = [f"{row[k]:.2f}" for k in ("ratio", "found")]
        table.add_row(row["way"], row["detector"], f"{row['pck@0.1']:.3f}", *shown, f"{row['psnr'] or 0:.1f}")
    Console().print(table)
    about = {"data": data.about, "clips": len(data), "environment": environment(), "rows": rows}
    args.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
