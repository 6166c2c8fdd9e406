"""Make the embedded base weights: PoseDiT-T trained on the source figures, reference given, no pose control.

    python scripts/pretrain_base.py --out src/entprog/models/pose_dit_t.safetensors

The pose guider stays at its zero initialisation: pose control is what fine-tuning adds. Beside the weights a JSON file
records the command, versions, losses and time.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import save_file

from entprog.data.synthetic import figures
from entprog.models.pose_dit import pose_dit
from entprog.objective import OBJECTIVES


def draw(count: int, seed: int, size: int, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw source clips in parts, (N, 3, F, H, W) and references (N, 3, H, W)."""
    parts = [
        figures(min(256, count - i), domain="source", seed=seed, start=i, size=size, frames=frames)
        for i in track(range(0, count, 256), "drawing")
    ]
    return torch.cat([p["video"] for p in parts]), torch.cat([p["reference"] for p in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--clips", type=int, default=4096)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--size", type=int, default=24)
    parser.add_argument("--frames", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    objective = OBJECTIVES["flow_prediction"]
    video, reference = draw(args.clips, args.seed, args.size, args.frames)
    model = pose_dit("T")
    average = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    started, losses, mean = time.perf_counter(), [], 0.0

    def save(step: int) -> None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in average.items()}, args.out)
        record = {
            "arguments": {k: str(v) for k, v in vars(args).items() if k != "out"},
            "steps": step,
            "loss_every_250_steps": losses,
            "seconds": round(time.perf_counter() - started),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        }
        args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")

    for step in track(range(1, args.steps + 1), "training"):
        warm = min(1.0, step / 200)
        lr = args.lr * warm * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        optimizer.param_groups[0]["lr"] = lr
        rows = torch.randint(args.clips, (args.batch,))
        x0 = video[rows]
        still = reference[rows] if torch.rand(()) > 0.1 else None
        t, noise = torch.rand(args.batch), torch.randn_like(x0)
        prediction = model(objective.noisy(x0, noise, t), t, None, still)
        loss = (prediction - objective.target(x0, noise, t)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in model.state_dict().items():
                average[name].lerp_(value, 1 - decay)
        mean += float(loss) / 250
        if step % 250 == 0:
            losses.append(round(mean, 5))
            mean = 0.0
            print(f"step {step}: loss {losses[-1]} after {time.perf_counter() - started:.0f} s", flush=True)
            save(step)
    save(args.steps)


if __name__ == "__main__":
    main()
