"""What an autoencoder leaves of the pose: the best PCK any model of its latents can reach.

    python benchmarks/pose_ceiling.py data/people64 --clips 24

sends the true test clips through the autoencoder, at their own size and enlarged, and lets the pose detector look at
what comes back. Writes benchmarks/results/pose_ceiling.json: PCK@0.1 against the driving keypoints, the ratio to the
true clips' own PCK (the bar for a generator is .8 of it), frames in which a person is found, PSNR.
"""

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import interpolate

from entprog.bench import environment
from entprog.data.detect import PoseEstimator
from entprog.data.prepared import Prepared
from entprog.metrics.adherence import pck
from entprog.metrics.frame import psnr
from entprog.metrics.protocol import mean_interval
from entprog.models.autoencoder import Autoencoder


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="prepared folder")
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--autoencoder", default="taef2")
    parser.add_argument("--factors", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pose_ceiling.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, autoencoder, estimate = (
        Prepared(args.data, "test", args.clips),
        Autoencoder(args.autoencoder),
        PoseEstimator(),
    )
    ways = {"truth": 0} | {f"{args.autoencoder}, frames x{f}": f for f in args.factors}
    scores: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, list[float]] = {way: [] for way in ways}
    quality: dict[str, list[float]] = {way: [] for way in ways}
    for i in track(range(len(data)), "clips"):
        rows = data.rows([i], ("video", "keypoints"))
        frames, driving = rows["video"][0], rows["keypoints"][0]
        for way, factor in ways.items():
            shown = through(autoencoder, frames, factor) if factor else frames
            keypoints = estimate(shown)
            scores[way].append(pck(keypoints, driving))
            found[way].append(keypoints[..., 0].isfinite().any(1).float().mean().item())
            if factor:
                quality[way].append(psnr(shown / 255, frames / 255).mean().item())
    result, table = [], Table("", "PCK@0.1", "of the truth's", "found", "PSNR")
    floor = sum(scores["truth"]) / len(data)
    for way in ways:
        mean, interval = mean_interval(torch.tensor(scores[way], dtype=torch.float64))
        row = {"way": way, "pck@0.1": mean, "interval": interval, "ratio": mean / floor,
               "found": sum(found[way]) / len(data),
               "psnr": sum(quality[way]) / len(data) if quality[way] else None}  # fmt: skip
        result.append(row)
        table.add_row(way, f"{mean:.3f}", f"{row['ratio']:.2f}", f"{row['found']:.2f}", f"{row['psnr'] or 0:.1f}")
    Console().print(table)
    about = {"data": data.about, "clips": len(data), "environment": environment(), "rows": result}
    args.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
