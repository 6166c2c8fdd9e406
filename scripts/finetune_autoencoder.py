"""Train TAEF2 on with rendered people: the autoencoder "taef2-people" that lies in the package.

    entprog prepare --rendered 400 --out data/people64
    python scripts/finetune_autoencoder.py data/people64 --seconds 1500

Loss: 2 |y - x| (people four times as much as what is behind them) + LPIPS alex + .005 z^2. The decoder sees latents
with noise of a random deviation, .3 |N(0, 1)|: a generator's latents are never exact, and it has to live with that.
Writes the weights in half precision and about.json: how they were made, the deviation of the latents (which the table
in models/autoencoder.py states), PSNR on held-out people before and after.
"""

import argparse
import json
import math

import torch
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor

from entprog.bench import environment
from entprog.data.cache import load_split
from entprog.ema import Ema
from entprog.measure import now
from entprog.metrics.frame import psnr
from entprog.metrics.lpips import load_lpips
from entprog.models.autoencoder import TINY, Autoencoder

RATE, BATCH, NOISE, PERSON_WEIGHT = 5e-4, 12, 0.3, 4.0


def frames_of(folder: str, split: str) -> tuple[Tensor, Tensor]:
    """Return all clips of a split as bytes, (N, 3, F, H, W), and where people are, (N, F, H, W)."""
    data = load_split(folder, split)
    rows = range(len(data["video"]))
    return data["video"].take(rows), data["labels"].take(rows) > 0


def loss_of(autoencoder: Autoencoder, frames: Tensor, person: Tensor, generator: torch.Generator) -> Tensor:
    """Return the loss of frames (n, 3, H, W) in [-1, 1] with masks (n, H, W)."""
    with torch.autocast("cpu", torch.bfloat16):
        z = autoencoder._encode(frames).float()
        deviation = NOISE * torch.randn(len(z), 1, 1, 1, generator=generator).abs()
        y = autoencoder._decode(z + deviation * torch.randn(z.shape, generator=generator)).float()
    weight = 1 + (PERSON_WEIGHT - 1) * person[:, None].float()
    error = (weight * (y - frames).abs()).mean() / weight.mean()
    return 2 * error + load_lpips("alex")(y, frames).mean() + 0.005 * z.square().mean()


def quality(autoencoder: Autoencoder, videos: Tensor) -> float:
    """Return the mean PSNR of videos after a round trip."""
    x = videos / 127.5 - 1
    back = autoencoder.decode(autoencoder.encode(x))
    return psnr(*(((v + 1) / 2).double().transpose(1, 2) for v in (back, x))).mean().item()


def train(autoencoder: Autoencoder, folder: str, seconds: float) -> int:
    """Train for so many seconds, the rate falling to nothing; returns the steps."""
    videos, people = frames_of(folder, "train")
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=RATE, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    average, generator, begun, step = Ema(autoencoder, 0.99), torch.Generator().manual_seed(0), now(), 0
    with Progress() as progress:
        task = progress.add_task("training", total=seconds)
        while (spent := now() - begun) < seconds:
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1, (step + 1) / 30) * (0.51 + 0.49 * math.cos(math.pi * spent / seconds))
            rows = torch.randint(len(videos), (BATCH,), generator=generator)
            frames = torch.randint(videos.shape[2], (BATCH,), generator=generator)
            x, person = videos[rows, :, frames] / 127.5 - 1, people[rows, frames]
            if step % 2:
                x, person = x.flip(-1), person.flip(-1)
            loss_of(autoencoder, x, person, generator).backward()
            torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update()
            step += 1
            progress.update(task, completed=spent, description=f"step {step}")
    average.swap()
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="prepared folder of rendered people")
    parser.add_argument("--seconds", type=float, default=1500)
    args = parser.parse_args()
    torch.set_num_threads(1)
    autoencoder, held_out = Autoencoder("taef2"), frames_of(args.data, "test")[0][:32]
    about = environment() | {"seconds": args.seconds, "psnr_before": quality(autoencoder, held_out)}
    autoencoder.requires_grad_(True).train()
    about["steps"] = train(autoencoder, args.data, args.seconds)
    autoencoder.requires_grad_(False).eval()
    half = {k: v.detach().half() for k, v in autoencoder.state_dict().items()}
    autoencoder.load_state_dict(half)
    about["psnr_after"] = quality(autoencoder, held_out)
    about["deviation"] = (autoencoder.encode(held_out / 127.5 - 1) * autoencoder.std).std().item()
    folder = TINY["taef2-people"][0]
    folder.mkdir(exist_ok=True)
    for part in ("encoder", "decoder"):
        tensors = {k.removeprefix(f"{part}."): v.contiguous() for k, v in half.items() if k.startswith(part)}
        save_file(tensors, folder / f"{part}.safetensors")
    (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n")
    print(folder)


if __name__ == "__main__":
    main()
