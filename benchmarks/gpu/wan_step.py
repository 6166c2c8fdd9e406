"""Step time and peak memory of fine-tuning Wan2.1 at 81 x 480 x 832 on one GPU, case by case, beside what FLOPs allow.

    export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
    python benchmarks/gpu/wan_step.py --out wan_step.json       # a GPU of 80 GB, 9 minutes at most, no data, no network
    python benchmarks/gpu/wan_step.py --twin --seconds 1200 --steps 1 3 --out wan_step_twin.json  # small, on a CPU
    python benchmarks/gpu/wan_step.py --dry-run                 # FLOPs and bytes as planned, into wan_step_planned.json

Random bfloat16 weights (norms, tables and time embedding float32, as diffusers loads Wan), made on the device; 1 clip;
AdamW with moments in the weights' dtype. Of trainable blocks 5 steps count after 2 to warm up; of steps that take more
than 6 seconds 3 after 1. Cases come in order of importance, each with a model of its own; results are written after
every case. Run it again with the same --out to measure what there was no time for.

`bound` is the case's FLOPs over full training's with checkpointing (entprog.plan's count), `predicted` its bytes;
`rest` is measured time over that bound: 1.0 where the step costs no more than its FLOPs. Peaks are from the second step
on, GB are 1e9 bytes. A twin's time is the process's own CPU time, its bytes are counted (`held_bytes`).
"""

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from wan_cases import SHAPES, TARGETS, TWINS, Case, Shape, active_of, bound_of, cases

from entprog.blocks import Block, find_blocks
from entprog.checkpointing import checkpoint_blocks
from entprog.frozen import settle_weights, weight_bytes
from entprog.measure import PeakBytes, tensor_bytes
from entprog.modes import set_active
from entprog.optim import step_in_backward
from entprog.profiling import Profile, profile

console = Console(width=160)
FLOAT32 = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")  # kept so by diffusers' from_pretrained
PLANNED = "none: planned"  # the device of a dry run
DEAR = 6.0  # seconds of a step above which fewer are timed
RATE = {"cuda": 3e14, "cpu": 2e10}  # FLOP/s, a guess until the first case has been measured


def build(shape: Shape, device: torch.device) -> nn.Module:
    """Make a Wan transformer with random weights on the device, bfloat16 on a GPU."""
    from diffusers import WanTransformer3DModel

    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with device:
            model: Any = WanTransformer3DModel(**shape.config())
    finally:
        torch.set_default_dtype(before)
    for name, p in model.named_parameters():
        if any(part in name for part in FLOAT32):
            p.data = p.data.float()
    return model.to(device).train()  # the rotary tables are made on the CPU


def batch_of(latent: tuple[int, ...], text: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    """Make random latents, target and text."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(1)
    shapes = {"video": latent, "target": latent, "text": text}
    return {k: torch.randn(v, device=device, dtype=dtype) for k, v in shapes.items()}


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean squared error at one timestep."""
    timestep = torch.tensor([500], device=batch["video"].device)
    found = model(
        hidden_states=batch["video"], encoder_hidden_states=batch["text"], timestep=timestep, return_dict=False
    )[0]
    return (found.float() - batch["target"].float()).square().mean()


def verified_blocks(model: nn.Module, shape: Shape, device: torch.device) -> list[Block]:
    """Find the blocks, verified on inputs of a few tokens."""
    few = batch_of((*shape.latent[:2], 1, 8, 8), (1, 8, shape.text[2]), device)
    names = {"hidden_states": few["video"], "encoder_hidden_states": few["text"]}
    return find_blocks(model, names | {"timestep": torch.tensor([500], device=device), "return_dict": False})


def prepare(case: Case, model: Any, shape: Shape, device: torch.device) -> None:
    """Freeze, set modes, park weights and checkpoint as the case says."""
    model.requires_grad_(case.method == "full")
    if case.method == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        inside = [f"blocks.{n}" for n, m in model.blocks.named_modules() if isinstance(m, nn.Linear)]
        inject_adapter_in_model(LoraConfig(r=shape.rank, lora_alpha=shape.rank, target_modules=inside), model)
        for name, p in model.named_parameters():
            if "lora_" in name:  # peft makes them float32
                p.data = p.data.to(model.proj_out.weight.dtype)
    if case.method == "blocks":
        blocks = verified_blocks(model, shape, device)
        set_active(blocks, [blocks[i] for i in active_of(case, len(blocks))], frozen=case.mode)
        model.proj_out.requires_grad_(True)
        model.scale_shift_table.requires_grad_(True)
        settle_weights(model, blocks, case.precision)
        checkpoint_blocks(blocks, case.checkpointing, model=model)
    elif case.checkpointing != "none":
        model.enable_gradient_checkpointing()


def synchronised(device: torch.device) -> float:
    """Return the seconds on the clock once the device is done; a CPU's own, which other processes do not slow."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def make_step(case: Case, model: nn.Module, batch: dict[str, Tensor], device: torch.device) -> Callable[..., list[float]]:  # fmt: skip  # noqa: E501
    """Return one training step, which returns the seconds of forward, backward and optimizer."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if case.optimizer == "sgd":
        optimizer = torch.optim.SGD(trained, lr=1e-6)
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    if case.in_backward:
        step_in_backward(optimizer)

    def step() -> list[float]:
        marks = [synchronised(device)]
        loss = loss_of(model, batch)
        marks.append(synchronised(device))
        loss.backward()
        marks.append(synchronised(device))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks.append(synchronised(device))
        return [b - a for a, b in zip(marks, marks[1:], strict=False)]

    step.optimizer = optimizer  # type: ignore[attr-defined]
    return step


def held_bytes(model: nn.Module, step: Callable[..., Any]) -> int:
    """Return the most that one more step holds at once on a CPU: weights as a GPU would hold them, moments, and every
    tensor that the step makes, followed from birth to death."""
    state = [v for of in step.optimizer.state.values() for v in of.values() if v.ndim]  # type: ignore[attr-defined]
    standing = weight_bytes(model)["device"] + tensor_bytes(state)
    with PeakBytes() as made:
        step()
    return standing + made.peak


def run_case(case: Case, shape: Shape, device: torch.device, count: tuple[int, int], until: float) -> dict[str, Any]:
    """Measure one case: `count` = (steps to warm up, steps that count), fewer if `until` comes first."""
    begun = synchronised(device)
    left = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0  # by the cases before, part of `bytes`
    model = build(shape, device)
    prepare(case, model, shape, device)
    batch = batch_of(shape.latent, shape.text, device)
    step = make_step(case, model, batch, device)
    row: dict[str, Any] = {"setup_seconds": synchronised(device) - begun, "left_before": left}
    (warm, counted), times, spent = count, list[list[float]](), 0.0
    while warm + counted > 0 and (not times or time.perf_counter() + spent < until):
        parts = step()
        spent = sum(parts)
        if warm > 0:
            if warm == count[0] and device.type == "cuda":  # what the first step alone needs is no part of training
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            warm -= 1
            if spent > DEAR:
                warm, counted = 0, min(counted, 3)
        else:
            counted -= 1
            times.append(parts)
    row |= {"steps": len(times), "seconds": median(map(sum, times)), "all_seconds": [sum(t) for t in times]}
    row |= {k: median(t[i] for t in times) for i, k in enumerate(("forward", "backward", "optimizer"))}
    if device.type == "cuda":
        row |= {"bytes": torch.cuda.max_memory_allocated(device), "reserved": torch.cuda.max_memory_reserved(device)}
    else:
        row["bytes"] = held_bytes(model, step)
    if case == cases()[1]:
        try:
            row["kernels"] = kernels(step, device)
        except Exception as error:  # what has been measured is worth more
            row["kernels"] = {"failed": str(error)[:300]}
    return row


def kernels(step: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Return the ten dearest kernels of one step, and the share of the step in which any ran."""
    from torch.profiler import ProfilerActivity

    on_gpu = device.type == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]) as seen:
        whole = sum(step())
    rows = []
    for event in seen.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        rows.append({"kernel": event.key[:120], "seconds": spent / 1e6, "calls": event.count})
    rows.sort(key=lambda r: -float(r["seconds"]))
    busy = sum(float(r["seconds"]) for r in rows)
    return {"step_seconds": whole, "busy_seconds": busy, "top": rows[:10]}


def with_ratios(rows: dict[str, dict[str, Any]]) -> None:
    """Add to each row what it is of full training: bound, speed-up, and what of its time FLOPs do not explain."""
    for model in SHAPES:
        of = {k: v for k, v in rows.items() if k.startswith(f"{model},")}
        full = next((r for k, r in of.items() if "full" in k and ", checkpointing" in k and "seconds" in r), None)
        for row in of.values():
            if full and "flops" in row and "seconds" in row:
                row["bound"] = row["flops"] / full["flops"]
                row["speedup"] = full["seconds"] / row["seconds"]
                row["rest"] = row["seconds"] / (full["seconds"] * row["bound"])
                row["flops_per_second"] = row["flops"] / row["seconds"]


def against_targets(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare with what was aimed at; None where it was not measured."""
    found = []
    for what, key, kind, wanted in TARGETS:
        row = rows.get(key, {})
        value = row.get("speedup") if kind == "speedup" else row["bytes"] / 1e9 if "bytes" in row else None
        met = None if value is None else value >= wanted if kind == "speedup" else value <= wanted
        found.append({"target": what, "case": key, "wanted": wanted, "measured": value, "met": met})
    return found


def table_of(result: dict[str, Any]) -> Table:
    """Lay the rows out."""
    table = Table(title=result["device"] + (", small twins of the models" if result["twin"] else ""))
    for column in ("case", "s", "forward", "backward", "GB", "reserved", "predicted", "speed-up", "by FLOPs", "rest"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name, row in result["rows"].items():
        if "seconds" not in row:
            table.add_row(name, row["status"])
            continue
        sizes = [f"{row[k] / 1e9:.3g}" if k in row else "" for k in ("bytes", "reserved", "predicted")]
        speed = [f"{row['speedup']:.2f}", f"{1 / row['bound']:.2f}", f"{row['rest']:.2f}"] if "rest" in row else []
        table.add_row(name, *(f"{row[k]:.3g}" for k in ("seconds", "forward", "backward")), *sizes, *speed)
    return table


def environment(device: torch.device) -> dict[str, Any]:
    """Return what the figures depend on besides the cases."""
    named = {"device": f"CPU, {torch.get_num_threads()} threads", "memory": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        named = {"device": properties.name, "memory": properties.total_memory}
    versions = {}
    for package in ("torch", "diffusers", "peft"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return named | {"versions": versions}


class Manager:
    """The cases of one call: what is done, what there is time for, and the results file."""

    def __init__(self, out: Path, seconds: float, device: torch.device, shapes: dict[str, Shape]) -> None:
        self.out, self.device, self.shapes = out, device, shapes
        self.until = time.perf_counter() + seconds
        self.rates: dict[str, float] = {}
        self.profiles: dict[str, Profile] = {}
        self.result: dict[str, Any] = environment(device) | {"shapes": {k: asdict(s) for k, s in shapes.items()}}
        self.result |= {"twin": device.type == "cpu", "rows": {}}
        earlier = json.loads(out.read_text()) if out.exists() else {}
        same = json.loads(json.dumps(self.result["shapes"])) == earlier.get("shapes")
        if earlier.get("device") == self.result["device"] and same:
            done = {k: r for k, r in earlier["rows"].items() if r["status"] in ("measured", "out of memory")}
            self.result["rows"] = done

    def bound(self, case: Case) -> dict[str, Any]:
        """FLOPs and bytes of a case; {} where the plan cannot tell."""
        shape = self.shapes[case.model]
        if case.model not in self.profiles:
            from diffusers import WanTransformer3DModel

            with torch.device("meta"):
                model = WanTransformer3DModel(**shape.config())
            latent, text = torch.empty(shape.latent, device="meta"), torch.empty(shape.text, device="meta")
            inputs = {"hidden_states": latent, "encoder_hidden_states": text, "timestep": torch.empty(1, device="meta")}
            names = [f"blocks.{i}" for i in range(shape.layers)]
            on, dtype = ("cpu", torch.float32) if self.device.type == "cpu" else ("cuda", torch.bfloat16)
            self.profiles[case.model] = profile(
                model, inputs, blocks=names, device=on, dtype=dtype, lora_rank=shape.rank
            )
        return bound_of(case, self.profiles[case.model])

    def run(self, case: Case, count: tuple[int, int]) -> dict[str, Any]:
        """Measure a case, or say why not."""
        row: dict[str, Any] = asdict(case) | self.bound(case)
        rate = self.rates.get(case.model) or max(self.rates.values(), default=RATE[self.device.type])
        seconds = row["flops"] / rate
        steps = sum(count) if seconds < DEAR else 4
        needed = 1.1 * seconds * steps + (60 if case.model == "14B" and self.device.type == "cuda" else 5)
        left = self.until - time.perf_counter()
        if needed > left:
            return row | {"status": f"not run: {left:.0f} s left, about {needed:.0f} needed"}
        try:
            row |= run_case(case, self.shapes[case.model], self.device, count, self.until)
            self.rates[case.model] = row["flops"] / row["seconds"]
            return row | {"status": "measured"}
        except torch.OutOfMemoryError:
            return row | {"status": "out of memory"}
        except Exception as error:  # one case must not cost the others
            traceback.print_exc()
            return row | {"status": f"failed: {type(error).__name__}: {str(error)[:300]}"}

    def save(self) -> None:
        """Write everything measured so far."""
        with_ratios(self.result["rows"])
        if not self.result["twin"]:
            self.result["targets"] = against_targets(self.result["rows"])
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.result, indent=1) + "\n")


def dry_run(manager: Manager, only: str = "") -> None:
    """Print what the plan says of every case on a GPU whose name contains `only`, and write it."""
    table = Table(title="planned, one GPU")
    for column in ("case", "PFLOP", "of full training", "GB"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for case in (c for c in cases() if only in c.name()):
        found, full = manager.bound(case), manager.bound(Case(case.model, "full"))
        share = f"1/{full['flops'] / found['flops']:.2f}"
        held = f"{found['predicted'] / 1e9:.1f}" if "predicted" in found else ""
        table.add_row(case.name(), f"{found['flops'] / 1e15:.2f}", share, held)
        manager.result["rows"][case.name()] = found | {"bound": found["flops"] / full["flops"]}
    console.print(table)
    manager.out.parent.mkdir(parents=True, exist_ok=True)
    manager.out.write_text(json.dumps(manager.result | {"device": PLANNED}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: wan_step.json, of a dry run wan_step_planned.json")
    parser.add_argument("--seconds", type=float, default=510, help="for all cases, after the imports; what would not fit is listed")  # fmt: skip  # noqa: E501
    parser.add_argument("--steps", type=int, nargs=2, default=(2, 5), metavar=("WARM", "COUNTED"))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--twin", action="store_true", help="a small model on the CPU")
    parser.add_argument("--dry-run", action="store_true", help="the cases with FLOPs and bytes as planned, no GPU needed")  # fmt: skip  # noqa: E501
    args = parser.parse_args()
    out = args.out or Path("wan_step_planned.json" if args.dry_run else "wan_step.json")
    if args.dry_run:
        if out.exists() and json.loads(out.read_text()).get("device") != PLANNED:
            parser.error(f"{out} holds what was measured: give a dry run another --out")
        dry_run(Manager(out, 0, torch.device("meta"), SHAPES), args.only)
        return
    if not args.twin and not torch.cuda.is_available():
        parser.error("there is no GPU here: pass --twin for the small model on the CPU")
    device = torch.device("cpu" if args.twin else "cuda")
    if args.twin:
        torch.set_num_threads(1)
    manager = Manager(out, args.seconds, device, TWINS if args.twin else SHAPES)
    rows = manager.result["rows"]
    for case in (c for c in cases() if args.only in c.name()):
        if case.name() in rows:
            continue
        rows[case.name()] = row = manager.run(case, tuple(args.steps))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        manager.save()
        shown = f"{row['seconds']:.3f} s, {row['bytes'] / 1e9:.2f} GB" if "seconds" in row else row["status"]
        console.print(f"{case.name()}: {shown}", highlight=False)
    console.print(table_of(manager.result))
    for target in manager.result.get("targets", []):
        console.print(target, highlight=False)


if __name__ == "__main__":
    main()
