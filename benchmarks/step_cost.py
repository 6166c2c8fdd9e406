"""What one training step costs: models x modes x share of trainable blocks x precision of the frozen weights.

    python benchmarks/step_cost.py                   # 6 minutes of one core; benchmarks/results/step_cost.json

Small diffusers models with random weights and the embedded PoseDiT, float32, one thread; trainable blocks spread evenly
(`prefix`: the last ones), nothing outside blocks trains, except in full training, which everything is a ratio to. Time
is the process's own CPU time, forward + backward + AdamW: the median over rounds of the ratio within the round; a round
runs every case once, the first round does not count. FLOPs and bytes kept for backward are counted, `peak` is weights,
gradients, moments and those bytes (measure.training_bytes). `fidelity` is the cosine of the trainable blocks' gradients
to the exact ones; for `skip`, which changes the prediction, E|found - exact|^2 / E|exact|^2 stands in `changed`.
`rest` is time over FLOPs: 1.0 where the step costs no more than its FLOPs allow.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from entprog.bench import environment, tiny_wan, wan_loss
from entprog.blocks import Block, evaluating, find_blocks, first_tensor, forked_rng, record_example
from entprog.bypass import fidelity
from entprog.data.batches import fixed_batches
from entprog.data.synthetic import figures
from entprog.frozen import settle_weights
from entprog.measure import saved_bytes, training_bytes
from entprog.meta import Flops
from entprog.models.pretrained import load_model, loss_fn
from entprog.modes import preserved, set_active
from entprog.objective import OBJECTIVES
from entprog.plan import modes_for
from entprog.schedule import at_least_one

Loss = Callable[[nn.Module, Any], Tensor]
Made = tuple[nn.Module, Loss, Any, str]
SHARES = (0.1, 0.25, 0.5)
MODES = ("bypass", "pass", "prefix")
PRECISIONS = ("bf16", "int8", "fp8", "cpu")


@dataclass(frozen=True)
class Case:
    """Which share of the blocks trains, how the others run, and what their weights are kept as (None: as they are)."""

    share: float = 1.0
    mode: str = "train"
    precision: str | None = None

    def name(self) -> str:
        """Return the case in words."""
        stored = "" if self.precision is None else f", {self.precision}"
        return "full" if self.mode == "train" else f"m/L {self.share:g}, {self.mode}{stored}"


def cases(stored: bool) -> list[Case]:
    """Return the cases of a model, full training first; `stored` with the precisions of frozen weights."""
    rows = [Case(), *(Case(s, m) for m in MODES for s in SHARES), Case(0.25, "skip")]
    return rows + [Case(0.25, m, p) for m in ("bypass", "pass") for p in PRECISIONS if stored]


def pose_dit() -> Made:
    """The embedded model on drawn figures."""
    return load_model("base"), *_on_figures(4), "PoseDiT-T, 4 clips of 6 frames of 24 px"


def pose_dit_s() -> Made:
    """The same four times as wide and twice as deep, random weights with open gates: larger products, as much else."""
    model = load_model("S")
    torch.nn.init.normal_(model.get_submodule("adaLN_modulation.1").get_parameter("weight"), std=0.1)
    torch.nn.init.normal_(model.get_submodule("final_layer.linear").get_parameter("weight"), std=0.1)
    return model, *_on_figures(1), "PoseDiT-S, 1 clip of 6 frames of 24 px"


def _on_figures(count: int) -> tuple[Loss, Any]:
    per_sample = loss_fn(OBJECTIVES["flow_prediction"])
    return lambda m, b: per_sample(m, b).mean(), fixed_batches(figures(count, size=24), batch_size=count)[0]


def wan(width: int, height: int) -> Made:
    """The tiny Wan transformer of entprog.bench, on a part of its latents."""
    model, batch = tiny_wan(width)
    batch = batch | {k: batch[k][..., :height, :] for k in ("video", "target")}
    return model, wan_loss, batch, f"WanTransformer3DModel, {width} wide, 12 blocks, {32 * height} tokens"


def _zoo(model: nn.Module, inputs: dict[str, Any], about: str) -> Made:
    """A model trained on fixed inputs towards noise."""

    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        found = first_tensor(model(**batch))
        return (found - torch.randn(found.shape, generator=torch.Generator().manual_seed(7))).square().mean()

    return model, loss, inputs, about


def cogvideox() -> Made:
    """CogVideoX: text and video in one stream of attention."""
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=64, num_layers=8, time_embed_dim=128, text_embed_dim=64,
        sample_width=32, sample_height=16, sample_frames=5, max_text_seq_length=32,
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(1, 2, 16, 16, 32), "encoder_hidden_states": torch.randn(1, 32, 64)}
    return _zoo(model, inputs | {"timestep": torch.tensor([500])}, "CogVideoX, 256 wide, 8 blocks, 288 tokens")


def hunyuan_video() -> Made:
    """HunyuanVideo: blocks of two streams, then of one."""
    model = diffusers.HunyuanVideoTransformer3DModel(
        num_attention_heads=4, attention_head_dim=64, num_layers=3, num_single_layers=6, num_refiner_layers=1,
        text_embed_dim=64, pooled_projection_dim=64, rope_axes_dim=(16, 24, 24),
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(1, 16, 2, 16, 32), "encoder_hidden_states": torch.randn(1, 32, 64)}
    inputs |= {"timestep": torch.tensor([500.0]), "guidance": torch.tensor([6000.0])}
    inputs |= {"pooled_projections": torch.randn(1, 64), "encoder_attention_mask": torch.ones(1, 32)}
    return _zoo(model, inputs, "HunyuanVideo, 256 wide, 3 + 6 blocks, 288 tokens")


def ltx() -> Made:
    """LTX-Video."""
    model = diffusers.LTXVideoTransformer3DModel(
        num_attention_heads=4, attention_head_dim=64, in_channels=16, out_channels=16, cross_attention_dim=256,
        num_layers=8, caption_channels=64,
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(1, 256, 16), "encoder_hidden_states": torch.randn(1, 32, 64)}
    inputs |= {"timestep": torch.tensor([500]), "encoder_attention_mask": torch.ones(1, 32)}
    return _zoo(
        model, inputs | {"num_frames": 2, "height": 8, "width": 16}, "LTX-Video, 256 wide, 8 blocks, 256 tokens"
    )


MODELS: dict[str, Callable[[], Made]] = {
    "PoseDiT": pose_dit,
    "PoseDiT-S": pose_dit_s,
    "Wan 256": lambda: wan(256, 16),
    "Wan 512": lambda: wan(512, 8),
    "CogVideoX": cogvideox,
    "HunyuanVideo": hunyuan_video,
    "LTX-Video": ltx,
}


def apply(case: Case, model: nn.Module, blocks: list[Block]) -> dict[str, str]:
    """Set what trains and every block's mode, keep frozen weights as the case says; return name -> mode."""
    names = [b.name for b in blocks]
    full = case.mode == "train"
    modes = modes_for(names, len(names) if full else at_least_one(case.share, len(names)), case.mode)
    settle_weights(model, blocks, None)
    model.requires_grad_(full)
    set_active(blocks, [n for n, m in modes.items() if m == "train"], {n: m for n, m in modes.items() if m != "train"})
    if case.precision is not None:
        settle_weights(model, blocks, case.precision)
    return modes


def predicted(model: nn.Module, loss: Loss, batch: Any) -> Tensor:
    """Return what the model predicts on the way to the loss."""
    seen: list[Any] = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(output))
    with evaluating(model), forked_rng(0):
        loss(model, batch)
    handle.remove()
    return first_tensor(seen[0])


def count(case: Case, model: nn.Module, blocks: list[Block], loss: Loss, batch: Any, exact: Tensor) -> dict[str, Any]:
    """FLOPs, bytes kept for backward, peak, fidelity and change of the prediction `exact` of one case."""
    modes = apply(case, model, blocks)
    trained = [p for p in model.parameters() if p.requires_grad]
    with saved_bytes(ignore=list(model.parameters())) as held:
        value = loss(model, batch)
        kept = held()
    del value
    row: dict[str, Any] = {"case": case.name(), "share": case.share, "mode": case.mode, "precision": case.precision}
    row |= {"active": sum(m == "train" for m in modes.values()), "bytes": kept}
    with Flops() as counter:  # torch's own counter does not know a CPU's attention
        loss(model, batch).backward()
    row["flops"] = counter.total
    model.zero_grad(set_to_none=True)
    row["peak"] = training_bytes(model, torch.optim.AdamW(trained), kept)
    difference = predicted(model, loss, batch) - exact
    row["changed"] = float(difference.square().mean() / exact.square().mean())
    row["fidelity"] = None if case.mode == "skip" or case.precision else 1.0
    if case.mode == "bypass" and case.precision is None:
        groups = ([n for n, m in modes.items() if m == want] for want in ("train", "bypass"))
        row["fidelity"] = fidelity(model, blocks, loss, batch, *groups)["cosine"]
    return row


def timed(
    todo: list[Case], model: nn.Module, blocks: list[Block], loss: Loss, batch: Any, rounds: int
) -> list[list[list[float]]]:
    """CPU seconds of forward, backward and optimizer, [round][case][part]; a round before them does not count."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    times: list[list[list[float]]] = []
    for _ in range(rounds + 1):
        times.append([])
        for case in todo:
            apply(case, model, blocks)
            marks = [time.process_time()]
            value = loss(model, batch)
            marks.append(time.process_time())
            value.backward()
            marks.append(time.process_time())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            marks.append(time.process_time())
            times[-1].append([b - a for a, b in zip(marks, marks[1:], strict=False)])
    return times[1:]


def measure(made: Made, rounds: int, stored: bool) -> dict[str, Any]:
    """Measure every case of one model."""
    model, loss, batch, about = made
    blocks = find_blocks(model, record_example(model, lambda: loss(model, batch)))
    todo = cases(stored)
    exact = predicted(model, loss, batch)
    with preserved(model, blocks):
        rows = [count(case, model, blocks, loss, batch, exact) for case in todo]
        times = timed(todo, model, blocks, loss, batch, rounds)
        settle_weights(model, blocks, None)
    full = rows[0]
    for i, row in enumerate(rows):
        row |= {f"{k}_ratio": row[k] / full[k] for k in ("flops", "bytes", "peak")}
        ratios = [sum(t[i]) / sum(t[0]) for t in times]
        row |= {"time_ratio": median(ratios), "time_range": [min(ratios), max(ratios)]}
        row["rest"] = row["time_ratio"] / row["flops_ratio"]
        for part, name in enumerate(("forward", "backward", "optimizer")):
            row[name] = median(t[i][part] / sum(t[0]) for t in times)  # as shares of a full step
    seconds = median(sum(t[0]) for t in times)
    return {"description": about, "blocks": len(blocks), "rounds": rounds, "full_seconds": seconds, "rows": rows}


def table_of(name: str, result: dict[str, Any]) -> Table:
    """Lay one model's rows out."""
    table = Table(title=f"{name}: {result['description']}; against full training")
    for column in ("case", "FLOPs", "time", "rest", "bytes kept", "peak", "fidelity", "changed"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in result["rows"]:
        ratios = [f"{row[k]:.3f}" for k in ("flops_ratio", "time_ratio", "rest", "bytes_ratio", "peak_ratio")]
        exact = "" if row["fidelity"] is None else f"{row['fidelity']:.4f}"
        table.add_row(row["case"], *ratios, exact, f"{row['changed']:.1e}" if row["changed"] else "")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step_cost.json")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--models", nargs="*", choices=list(MODELS), default=list(MODELS), help="the others keep their results"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=150)
    earlier = json.loads(args.out.read_text())["models"] if args.out.exists() and len(args.models) < len(MODELS) else {}
    results: dict[str, Any] = environment() | {"models": earlier}
    for name in args.models:
        torch.manual_seed(0)
        with console.status(name):
            results["models"][name] = measure(MODELS[name](), args.rounds, name in ("PoseDiT", "Wan 256"))
        console.print(table_of(name, results["models"][name]))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
