"""Do blocks that sit out and come back reach full training's loss sooner? Plans at equal FLOPs, PoseDiT and a tiny Wan.

    python benchmarks/skip_restore.py                # 80 minutes of one core; results/skip_restore.json, resumable
    python benchmarks/skip_restore.py --only dev     # one part; runs that are in the file are not repeated

A plan says how many blocks sit out, until which share of the run, how they come back (schedule.RESTORES), by which
order they are chosen, and what trains meanwhile. Plans are chosen on `dev` alone, one word after another; the
chosen plan, full training and the prototype's plan are then compared on tasks, people and motions of their own:

    figures      PoseDiT-T, the same domain, other people, motions, batches and noise
    long         the same for five times as many FLOPs, on other clips again
    wan          a Wan transformer of 1.6 M parameters, pretrained here on plain figures, fine-tuned on the others

All spend the same FLOPs (cost.py), the scoring that the order of blocks takes among them; everything outside blocks
trains throughout; rate to zero by a cosine after a warm-up of a tenth. The held-out loss is the whole network's.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from entprog.bench import environment, paired_difference
from entprog.blocks import Block, evaluating, find_blocks, record_example
from entprog.data.batches import Batch, Data, batch_at, fixed_batches
from entprog.data.synthetic import figures
from entprog.measure import held_out_losses
from entprog.metrics.protocol import bootstrap_interval
from entprog.models.pretrained import load_model, loss_fn, predict_fn
from entprog.modes import preserved, set_active, skip
from entprog.objective import OBJECTIVES
from entprog.priority import score
from entprog.profiling import cost_of
from entprog.schedule import RESTORES, at_most, still_out

FLOW = OBJECTIVES["flow_prediction"]
SCORED = 3  # batches
LOOKS = (0.5, 0.699, 0.85, 0.95)  # at the held-out loss on the way, of half of the clips
PRETRAINED = {"wan": 400}  # steps
RATES = (5e-4, 1e-3, 2e-3)
CLIPS, HELD_OUT, FRAMES = 512, 48, 2
console = Console(width=150)


@dataclass(frozen=True)
class Plan:
    """skip: share of blocks that sit out; trains: "all" that run, or the best "half" and the others are bypassed."""

    skip: float = 0.0
    trains: str = "all"
    until: float = 0.7
    restore: str = "once"
    order: str = "change"
    lr: float = 1e-3

    def __str__(self) -> str:
        if not self.skip:
            return f"{'full' if self.trains == 'all' else 'top half'}, rate {self.lr:g}"
        return (f"{self.skip:.2f} out until {self.until:g} {self.restore}, {self.trains} of the rest, by {self.order}, "
                f"rate {self.lr:g}")  # fmt: skip


FULL, HALF = Plan(), Plan(trains="half")
PROTOTYPE = Plan(0.5, "half", order="cei")  # what won before there was a library
COMPARED = {
    "figures": ("full", "chosen"),
    "long": ("full", "chosen", "prototype", "top half"),
    "wan": ("full", "chosen", "prototype"),
}
FEWER = {("wan", "prototype"): 2}  # seeds


@dataclass(frozen=True)
class Task:
    """What is trained on what; `steps` of full training are what every plan may spend."""

    model: str
    domain: str = "target"
    seed: int = 0
    held_out: int = 777
    steps: int = 120


TASKS: dict[str, Callable[[int], Task]] = {
    "dev": lambda seed: Task("base", seed=seed),
    "figures": lambda seed: Task("base", seed=100 + seed, held_out=888),
    "long": lambda seed: Task("base", seed=200 + seed, held_out=999, steps=600),
    "wan dev": lambda seed: Task("wan", seed=seed, steps=100),
    "wan": lambda seed: Task("wan", seed=300 + seed, held_out=1111, steps=100),
}

# -- models ------------------------------------------------------------------------------------------------------------


def wan_call(model: nn.Module, x_t: Tensor, t: Tensor, batch: Any) -> Tensor:
    """Predict from the noisy video and the pose map as further channels, with an empty text."""
    x = torch.cat((x_t, batch["pose"] * 2 - 1), 1)
    text = torch.zeros(len(x), 2, 16)
    return model(hidden_states=x, timestep=1000 * t, encoder_hidden_states=text, return_dict=False)[0]


def new_wan() -> nn.Module:
    """Build a Wan transformer of 10 blocks with random weights."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 4, 4), num_attention_heads=3, attention_head_dim=32, in_channels=6, out_channels=3, text_dim=16,
        freq_dim=64, ffn_dim=384, num_layers=10, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )  # fmt: skip


def pretrained_wan(name: str, folder: Path) -> nn.Module:
    """Return the Wan transformer after its pretraining on plain figures, which is done once."""
    model, path = new_wan(), folder / f"{name}.safetensors"
    if not path.exists():
        clips, loss = figures(1024, domain="source", frames=FRAMES, size=24, seed=5000), loss_fn(FLOW, call=wan_call)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for step in range(PRETRAINED[name]):
            anneal(optimizer, 2e-3, step / PRETRAINED[name])
            take_step(model, loss(model, batch_at(clips, step, batch_size=4, seed=0)).mean(), optimizer)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    model.load_state_dict(load_file(path))
    return model


def anneal(optimizer: torch.optim.Optimizer, lr: float, progress: float) -> None:
    """Set the rate: a warm-up over a tenth of the run, a cosine to zero."""
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1.0, (progress + 1e-3) / 0.1) * 0.5 * (1 + math.cos(math.pi * progress))


def take_step(model: nn.Module, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Backward, clip at 1, step."""
    loss.backward()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# -- one run -----------------------------------------------------------------------------------------------------------


@cache
def drawn(count: int, domain: str, seed: int) -> Data:
    """Draw clips once."""
    return figures(count, domain=domain, frames=FRAMES, size=24, seed=seed)


class Bench:
    """A task's model, blocks, data and cost, ready for one plan."""

    def __init__(self, task: Task, weights: Path) -> None:
        torch.manual_seed(0)
        wan = task.model in PRETRAINED
        ways: dict[str, Any] = {"call": wan_call} if wan else {}
        self.task, self.model = task, pretrained_wan(task.model, weights) if wan else load_model(task.model)
        self.per_sample, self.predict = loss_fn(FLOW, **ways), predict_fn(FLOW, **ways)
        self.clips = drawn(CLIPS, task.domain, task.seed)
        self.held_out = fixed_batches(drawn(HELD_OUT, task.domain, task.held_out), batch_size=HELD_OUT // 2)
        one = self.batch(0)
        self.blocks: list[Block] = find_blocks(
            self.model, record_example(self.model, lambda: self.loss(self.model, one))
        )
        self.names = [b.name for b in self.blocks]
        self.cost = cost_of(self.model, self.blocks, lambda: self.loss(self.model, one))

    def batch(self, step: int) -> Batch:
        """Return what step trains on; the same for all plans."""
        return batch_at(self.clips, step, batch_size=4, seed=self.task.seed)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean loss."""
        return self.per_sample(model, batch).mean()

    def worst_first(self, order: str) -> tuple[list[str], float]:
        """Return the blocks in an order, the first to sit out first, and the FLOPs that finding it took."""
        if order == "random":
            generator = torch.Generator().manual_seed(self.task.seed)
            return [self.names[i] for i in torch.randperm(len(self.names), generator=generator).tolist()], 0.0
        batches = [self.batch(10_000 + i) for i in range(SCORED)]
        scores = score(self.model, self.blocks, self.predict, batches, "cei")
        by = scores.values if order == "cei" else scores.changes
        return sorted(self.names, key=lambda n: by[n]), SCORED * self.cost.prediction({}) * (1 + len(self.names) / 2)

    def modes(self, plan: Plan, order: Sequence[str], progress: float) -> dict[str, str]:
        """Return every block's mode at a share of the run."""
        out = order[: still_out(at_most(plan.skip, len(order)), plan.restore, plan.until, progress)]
        best = order if plan.trains == "all" else order[len(order) // 2 :]
        return {n: "skip" if n in out else "train" if n in best else "bypass" for n in self.names}

    def losses(self, batches: Sequence[Batch]) -> Tensor:
        """Held-out losses of the whole network."""
        with preserved(self.model, self.blocks):
            set_active(self.blocks, self.blocks)
            return held_out_losses(self.model, self.per_sample, batches)

    def train(self, plan: Plan) -> dict[str, Any]:
        """Spend the task's FLOPs on a plan; curve: (share of FLOPs, loss) of half of the clips; losses: of all."""
        budget = self.task.steps * self.cost.step({})
        order, spent = self.worst_first(plan.order) if plan != replace(FULL, lr=plan.lr) else (self.names, 0.0)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=plan.lr)
        curve, modes, step, begun = [(0.0, self.losses(self.held_out[:1]).mean().item())], {}, 0, time.process_time()
        while spent < budget:
            done = spent / budget
            while len(curve) <= len(LOOKS) and done >= LOOKS[len(curve) - 1]:
                curve.append((done, self.losses(self.held_out[:1]).mean().item()))
            if (now := self.modes(plan, order, done)) != modes:
                modes = now
                set_active(self.blocks, [n for n in modes if modes[n] == "train"],
                           frozen={n: m for n, m in modes.items() if m != "train"})  # fmt: skip
            anneal(optimizer, plan.lr, done)
            take_step(self.model, self.loss(self.model, self.batch(step)), optimizer)
            spent, step = spent + self.cost.step(modes), step + 1
        losses = self.losses(self.held_out)
        curve.append((1.0, losses[: HELD_OUT // 2].mean().item()))
        return {"steps": step, "loss": losses.mean().item(), "curve": [[round(v, 5) for v in point] for point in curve],
                "losses": [round(v, 6) for v in losses.tolist()], "cpu": round(time.process_time() - begun),
                "order": order}  # fmt: skip


# -- runs on file ------------------------------------------------------------------------------------------------------


@dataclass
class Runs:
    """Finished runs by task, seed and plan; written after each."""

    path: Path
    weights: Path
    found: dict[str, Any]

    def __call__(self, name: str, seed: int, plan: Plan) -> dict[str, Any]:
        """Return a run, done now if it is not on file."""
        key = f"{name} | seed {seed} | {plan}"
        runs = self.found.setdefault("runs", {})
        if key not in runs:
            runs[key] = {"task": name, "seed": seed, "plan": asdict(plan)} | Bench(
                TASKS[name](seed), self.weights
            ).train(plan)
            self.save()
            console.print(f"{key}: {runs[key]['loss']:.5f}, {runs[key]['steps']} steps", highlight=False)
        return runs[key]

    def save(self) -> None:
        """Write the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.found | environment(), indent=1) + "\n")


def best(run: Callable[[Plan], dict[str, Any]], plans: Sequence[Plan]) -> Plan:
    """Return the plan of the lowest loss."""
    return min(plans, key=lambda plan: run(plan)["loss"])


def choose(runs: Runs) -> tuple[Plan, Plan, Plan]:
    """Choose on `dev`, one word after another: (full training's rate, top half's, the best plan that skips)."""
    run = partial(runs, "dev", 0)
    full = best(run, [replace(FULL, lr=lr) for lr in RATES[:2]])
    run(HALF)
    plan = best(run, [Plan(0.5, "half"), Plan(0.5), Plan(0.25)])
    plan = best(run, [replace(plan, until=until) for until in (0.5, 0.7, 0.85)])
    plan = best(run, [replace(plan, restore=r) for r in RESTORES])
    plan = best(run, [replace(plan, order=o) for o in ("change", "cei", "random")])
    return full, HALF, best(run, [replace(plan, lr=lr) for lr in RATES[:2]])


def compare(runs: Runs, name: str, plans: dict[str, Plan], seeds: Sequence[int]) -> dict[str, Any]:
    """Run every plan on every seed; against full training of the same seed, which comes first."""
    rows: dict[str, Any] = {}
    for seed in seeds:  # all plans of a seed before the next
        for label, plan in plans.items():
            if seed in seeds[: FEWER.get((name, label))]:
                runs(name, seed, plan)
    for label, plan in plans.items():
        rows[label] = {"plan": str(plan), "loss": [], "minus_full": [], "sooner": [], "steps": []}
        for seed in seeds[: FEWER.get((name, label))]:
            found, full = runs(name, seed, plan), runs(name, seed, plans["full"])
            difference = paired_difference(found["losses"], full["losses"])
            goal = reached(full["curve"], full["curve"][-1][1])
            when = reached(found["curve"], full["curve"][-1][1])
            rows[label]["loss"].append(found["loss"])
            rows[label]["steps"].append(found["steps"])
            rows[label]["minus_full"].append([difference["difference"], *difference["interval"]])
            rows[label]["sooner"].append(goal / when if goal and when else None)
        means = torch.tensor([d[0] for d in rows[label]["minus_full"]], dtype=torch.float64)
        rows[label]["mean"] = [means.mean().item(), *bootstrap_interval(means)]
    return rows


def reached(curve: Sequence[Sequence[float]], loss: float) -> float | None:
    """Share of the FLOPs at which a curve first has a loss, linear between looks; None if never."""
    for (a, before), (b, after) in zip(curve[:-1], curve[1:], strict=True):
        if after <= loss:
            return a + (b - a) * max(0.0, before - loss) / max(before - after, 1e-12)
    return None


def idleness(runs: Runs, name: str, seed: int = 0) -> dict[str, Any]:
    """How idle are the blocks? What leaving some out, those first that alone change least, does before any training."""
    bench = Bench(TASKS[name](seed), runs.weights)
    order, _ = bench.worst_first("change")
    batch, rows = bench.held_out[0], {}
    with torch.no_grad(), evaluating(bench.model):
        whole = bench.predict(bench.model, batch)
        for share in (0.0, 1 / len(order), 1 / 4, 1 / 3, 1 / 2):
            count = round(share * len(order)) if share < 0.2 else at_most(share, len(order))
            with skip([b for b in bench.blocks if b.name in order[:count]]):
                change = (bench.predict(bench.model, batch) - whole).square().mean() / whole.square().mean()
                rows[str(count)] = {"change": change.item(), "loss": bench.loss(bench.model, batch).item()}
    return rows


def times(runs: Runs, name: str) -> dict[str, Any]:
    """CPU time of a step beside its FLOPs, both as shares of full training's; medians of alternating steps."""
    bench = Bench(TASKS[name](0), runs.weights)
    ways = {
        "full": FULL,
        "top half": HALF,
        "1/2 out": Plan(0.5),
        "1/4 out": Plan(0.25),
        "1/4 out, top half": Plan(0.25, "half"),
    }
    seconds: dict[str, list[float]] = {k: [] for k in ways}
    optimizer = torch.optim.AdamW(bench.model.parameters(), lr=1e-5)
    for _ in range(7):
        for way, plan in ways.items():
            modes = bench.modes(plan, bench.names, 0.0)
            set_active(bench.blocks, [n for n in modes if modes[n] == "train"],
                       frozen={n: m for n, m in modes.items() if m != "train"})  # fmt: skip
            begun = time.process_time()
            take_step(bench.model, bench.loss(bench.model, bench.batch(0)), optimizer)
            seconds[way].append(time.process_time() - begun)
    middle = {k: sorted(v[1:])[len(v) // 2 - 1] for k, v in seconds.items()}
    flops = {k: bench.cost.step(bench.modes(p, bench.names, 0.0)) for k, p in ways.items()}
    return {k: {"time": middle[k] / middle["full"], "flops": flops[k] / flops["full"]} for k in ways}


def show(name: str, rows: dict[str, Any]) -> None:
    """Print one task's comparison."""
    table = Table(title=name)
    for column in ("plan", "held-out loss, by seed", "minus full, mean and interval over seeds", "sooner", "steps"):
        table.add_column(column)
    for label, row in rows.items():
        mean, low, high = row["mean"]
        table.add_row(label, "  ".join(f"{v:.4f}" for v in row["loss"]), f"{mean:+.4f} ({low:+.4f} .. {high:+.4f})",
                      "  ".join(f"{v:.2f}" if v else "never" for v in row["sooner"]), str(row["steps"][0]))  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=["dev", "idle", "time", *TASKS], help="parts, by default all")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument(
        "--weights", type=Path, default=Path("runs/skip_restore"), help="of the pretrained Wan, made here"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "skip_restore.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(args.out, args.weights, json.loads(args.out.read_text()) if args.out.exists() else {})
    full, half, plan = choose(runs)
    console.print(f"chosen on dev: {full}; {half}; {plan}", highlight=False)
    plans = {"full": full, "chosen": plan, "prototype": replace(PROTOTYPE, lr=plan.lr), "top half": half}
    runs.found["chosen"] = {k: asdict(p) for k, p in plans.items()}
    wanted = args.only or [*COMPARED, "idle", "time"]
    if "wan" in wanted:
        rates = {k: best(partial(runs, "wan dev", 0), [replace(plans[k], lr=lr) for lr in RATES[1:]]).lr
                 for k in ("full", "chosen")}  # fmt: skip
    for name in [n for n in COMPARED if n in wanted]:
        mine = {k: plans[k] for k in COMPARED[name]}
        if name in PRETRAINED:
            mine = {k: replace(p, lr=rates["full" if k == "full" else "chosen"]) for k, p in mine.items()}
        runs.found.setdefault("test", {})[name] = rows = compare(runs, name, mine, args.seeds)
        show(name, rows)
    for part, measure in (("idle", idleness), ("time", times)):
        if part in wanted:
            for name in ("dev", "wan"):
                runs.found.setdefault(part, {})[name] = found = measure(runs, name)
                console.print(part, name, found)
    runs.save()


if __name__ == "__main__":
    main()
