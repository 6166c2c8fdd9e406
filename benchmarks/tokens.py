"""The token axis on drawn figures: smaller clips first, at equal FLOPs; and where smaller tokens should lie.

    python benchmarks/tokens.py                                                          # results/tokens.json
    python benchmarks/tokens.py --part runs --seconds 240 --seeds 3 4

Runs: PoseDiT-T, the embedded base, as in `entprog demo`, but by the model clock (10 GFLOP a second), so that FLOPs
decide and the machine's load does not. Held-out losses are of whole clips, compared sample by sample with full training
of the same seed, and over seeds. Runs that are there already are not repeated; each budget has its rows in the file.

Positions: a small Wan transformer is trained from nothing on the figures' source domain, then for some steps on
half-sized clips of the target domain, its rotary positions as they come (0, 1, 2 ...) or spread over the whole grid
(.5, 2.5, 4.5 ...), then for some steps at full size.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from entprog.bench import environment, paired_difference, train_run
from entprog.blocks import forked_rng
from entprog.config import DEMO_RATES, RunConfig, demo
from entprog.data.batches import batch_at, fixed_batches
from entprog.data.synthetic import figures
from entprog.measure import held_out_losses
from entprog.metrics.protocol import bootstrap_interval
from entprog.tokens import Tokens, shrinker

HERE = Path(__file__).parent
ALL: dict[str, Any] = {
    "strategy": "ent-prog",
    "schedule": "fixed",
    "active_share": 1.0,
    "stages": 1,
    "priority": "first",
}
BOTH: dict[str, Any] = {"axes": "blocks,tokens", "token_grid": ((0.5, 1.0),), "tokens_until": 0.5}
HALF_SIZE: dict[str, Any] = {"token_grid": ((1.0, 0.5),)}
RUNS: dict[str, dict[str, Any]] = {  # batches of 4; fewer clips a step are as cheap as shorter ones
    "full": {"strategy": "full"},
    "full, batches of 2": {"strategy": "full", "batch_size": 2},
    "full, batches of 1": {"strategy": "full", "batch_size": 1},
    "blocks": {},
    "blocks, batches of 2": {"batch_size": 2},
    "blocks, batches of 1": {"batch_size": 1},
    "tokens": ALL | BOTH,
    "both": BOTH,
    "both, batches of 2": BOTH | {"batch_size": 2},
}
FIRST_SEED: dict[str, dict[str, Any]] = {  # tried with the first seed only
    "full, twice the rate": {"strategy": "full", "lr": 2 * DEMO_RATES["full"]},
    "both, every second frame": BOTH | {"token_frames": "strided"},
    "half size": ALL | BOTH | HALF_SIZE,
    "half size, positions kept": ALL | BOTH | HALF_SIZE | {"token_positions": "kept"},
}


def config_of(name: str, seconds: float, seed: int) -> RunConfig:
    """Return one run's configuration."""
    changes = dict((RUNS | FIRST_SEED)[name])
    base = demo(changes.pop("strategy", "ent-prog"), seconds, seed)
    base = replace(base, clock="model", samples=0, held_out_clips=64, checkpoint_every=10_000, evaluations=2)
    return replace(base, **({"batch_size": 4} | changes))


def compared(folder: Path, seconds: float, seeds: list[int], names: list[str]) -> dict[str, Any]:
    """Train every run and compare its held-out losses with full training's."""
    found: dict[str, Any] = {}
    for seed in seeds:
        for name in names if seed == seeds[0] else [n for n in names if n in RUNS]:
            out = folder / f"{seconds:g}" / f"{seed}" / slug(name)
            result = train_run(config_of(name, seconds, seed), out)
            found.setdefault(name, {})[seed] = result
            print(seed, name, result["steps"], f"{result['held_out']['loss']:.5f}", flush=True)
    rows: dict[str, Any] = {}
    for name, of_seed in found.items():
        against = {s: paired_difference(r["held_out_losses"], found["full"][s]["held_out_losses"])
                   for s, r in of_seed.items()}  # fmt: skip
        differences = torch.tensor([d["difference"] for d in against.values()], dtype=torch.float64)
        rows[name] = {
            "settings": (RUNS | FIRST_SEED)[name],
            "loss": mean(r["held_out"]["loss"] for r in of_seed.values()),
            "losses": {s: r["held_out"]["loss"] for s, r in of_seed.items()},
            "steps": {s: r["steps"] for s, r in of_seed.items()},
            "curve": {s: [(p["net_seconds"], p["loss"]) for p in r["curve"]] for s, r in of_seed.items()},
            "minus_full": against,
            "minus_full_over_seeds": [differences.mean().item(), *bootstrap_interval(differences)],
        }
    return rows


def slug(name: str) -> str:
    """Return a run's name as a folder's."""
    return name.replace(" ", "-")


# -- rotary positions --------------------------------------------------------------------------------------------------


@contextmanager
def spread(model: nn.Module, scale: float) -> Iterator[None]:
    """Let rotary positions of height and width lie where the tokens of a grid larger by 1 / scale do."""
    rope: Any = model.get_submodule("rope")

    def placed(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> tuple[Tensor, Tensor]:
        f, h, w = (n // p for n, p in zip(args[0].shape[2:], rope.patch_size, strict=True))
        angles = torch.atan2(rope.freqs_sin[1], rope.freqs_cos[1]).split([rope.t_dim, rope.h_dim, rope.w_dim])
        where = [torch.arange(f).double(), *((torch.arange(n) + 0.5) / scale - 0.5 for n in (h, w))]
        turned = [p[:, None] * a for p, a in zip(where, angles, strict=True)]
        shapes = ((f, 1, 1, -1), (1, h, 1, -1), (1, 1, w, -1))
        whole = torch.cat([t.view(s).expand(f, h, w, -1) for t, s in zip(turned, shapes, strict=True)], -1)
        whole = whole.reshape(1, f * h * w, 1, -1)
        return whole.cos().to(output[0].dtype), whole.sin().to(output[1].dtype)

    handle = rope.register_forward_hook(placed)
    try:
        yield
    finally:
        handle.remove()


def flow_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Flow-matching loss of each sample, without text, the pose map as three more channels."""
    x0, noise, t = batch["video"], batch["noise"], batch["t"]
    x_t = x0 + (noise - x0) * t[:, None, None, None, None]
    given = {"encoder_hidden_states": torch.zeros(len(t), 1, 8), "timestep": 1000 * t}
    prediction = model(hidden_states=torch.cat((x_t, batch["pose"]), 1), **given, return_dict=False)[0]
    return (prediction - (noise - x0)).square().flatten(1).mean(1)


def small_wan() -> nn.Module:
    """Build a Wan transformer of 4 blocks, 96 wide, for pixels in patches of 4."""
    with forked_rng(0):
        return WanTransformer3DModel(
            patch_size=(1, 4, 4), num_attention_heads=4, attention_head_dim=24, in_channels=6, out_channels=3,
            text_dim=8, freq_dim=64, ffn_dim=384, num_layers=4, rope_max_seq_len=32,
        )  # fmt: skip


def positions(seeds: list[int], first: int = 400, small: int = 80, last: int = 20) -> dict[str, Any]:
    """Fine-tune on half-sized clips with both kinds of positions; losses of whole clips before, between and after."""
    base = figures(256, domain="source", size=24, seed=1)
    target, held_out = figures(256, size=24), figures(32, size=24, seed=777)
    judges = fixed_batches(held_out, batch_size=8)
    shrink = shrinker(dict.fromkeys(("video", "noise", "pose"), "BCFHW"), patch=(1, 4, 4))
    model = small_wan()
    steps(model, base, first, 1e-3, 0)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    rows: dict[str, Any] = {}
    for seed in seeds:
        for name in ("kept", "spread", "full size"):
            model.load_state_dict(start)
            tokens = Tokens() if name == "full size" else Tokens(1.0, 0.5)
            curve = [held_out_losses(model, flow_loss, judges)]
            with spread(model, 0.5) if name == "spread" else nullcontext():
                steps(model, target, small, 3e-4, seed, lambda b: shrink(b, tokens))  # noqa: B023
            curve.append(held_out_losses(model, flow_loss, judges))
            steps(model, target, last, 3e-4, seed, offset=small)
            curve.append(held_out_losses(model, flow_loss, judges))
            rows.setdefault(name, {})[seed] = {
                "before_between_after": [c.mean().item() for c in curve],
                "losses": [c.tolist() for c in curve],
            }
            print(seed, name, *(f"{c.mean():.5f}" for c in curve), flush=True)
    for seed in seeds:
        own, other = (rows[n][seed]["losses"] for n in ("spread", "kept"))
        rows["spread"][seed]["minus_kept"] = [paired_difference(a, b) for a, b in zip(own[1:], other[1:], strict=True)]
    for of_seed in rows.values():
        for row in of_seed.values():
            del row["losses"]
    return {"steps": [first, small, last], "rows": rows}


def steps(model: nn.Module, data: Any, count: int, lr: float, seed: int, made: Any = None, offset: int = 0) -> None:
    """Train for some steps on batches of 4."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for i in range(offset, offset + count):
        batch = batch_at(data, i, batch_size=4, seed=seed)
        flow_loss(model, made(batch) if made else batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=80.0, help="of the model clock, for each run")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    names = {slug(name): name for name in (*RUNS, *FIRST_SEED)}
    parser.add_argument("--only", nargs="*", choices=list(names), default=list(names), help="runs beside full")
    parser.add_argument("--part", choices=["runs", "positions", "both"], default="both")
    parser.add_argument("--runs", type=Path, default=Path("runs/tokens"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "tokens.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = json.loads(args.out.read_text()) if args.out.exists() else {}
    for count in range(1, len(args.seeds) + 1) if args.part != "positions" else ():
        rows = compared(
            args.runs, args.seconds, args.seeds[:count], ["full", *(names[n] for n in args.only if n != "full")]
        )
        record.setdefault("runs", {}).setdefault(f"{args.seconds:g} model seconds", {}).update(rows)
        args.out.write_text(json.dumps(record | environment(), indent=1) + "\n")
    if args.part != "runs":
        record["positions"] = positions(args.seeds)
        args.out.write_text(json.dumps(record | environment(), indent=1) + "\n")


if __name__ == "__main__":
    main()
