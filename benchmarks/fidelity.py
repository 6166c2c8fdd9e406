"""Which blocks may be bypassed? Gradient fidelity against the share of blocks bypassed, by the order they go in.

    python benchmarks/fidelity.py                    # about 6 minutes of one core; results/fidelity.json and .png

PoseDiT-T on drawn figures, after 40 steps of pose guider and output head as in priorities.py. Cosine and norm ratio of
gradients against the exact ones, means over batches: `curves` of all blocks not bypassed, `behind_first` of the
first block alone, behind which all others lie. (A bypassed block in front of everything that trains does no harm, so
orders that begin at the input look good in the first kind whatever they know.) `damage` is 1 - cosine when one block
alone is bypassed, `sensitivity` DropBP's: sum over parameter tensors of (|g| - |g with the block bypassed|)^2.

Then three ideas at equal cost, every second block trainable: another bypass set every step, a set for each noise level,
gradients scaled back to their exact norm; the first two also as held-out loss after the same FLOPs of training.
"""

import argparse
import copy
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from priorities import warmed
from rich.console import Console
from rich.table import Table
from scipy.stats import kendalltau, spearmanr
from torch import Tensor, nn

from entprog.bench import environment, paired_difference, tiny_wan, wan_loss
from entprog.blocks import Block, find_blocks, forked_rng, record_example
from entprog.cost import StepCost
from entprog.data.batches import Batch, batch_at, fixed_batches
from entprog.data.synthetic import figures
from entprog.measure import held_out_losses
from entprog.models.pretrained import loss_fn, predict_fn
from entprog.modes import preserved, set_active
from entprog.objective import OBJECTIVES
from entprog.priority import score
from entprog.profiling import cost_of

Loss = Callable[[nn.Module, Any], Tensor]
Gradients = dict[str, list[Tensor]]  # block -> one gradient per parameter tensor
BINS = 4
FREE = 3  # how many of the frozen blocks are bypassed when ideas are compared
console = Console(width=150)


@dataclass
class Setup:
    """A model with its blocks, a loss on one batch, and batches to measure on."""

    model: nn.Module
    blocks: list[Block]
    loss: Loss
    batches: list[Any]

    def names(self) -> list[str]:
        """Block names in execution order."""
        return [b.name for b in self.blocks]

    def gradients(self, batch: Any, bypassed: Iterable[str] = (), of: Sequence[str] = ()) -> Gradients:
        """Gradients of all blocks but the bypassed ones, or of some blocks only."""
        out = set(bypassed)
        active = [b for b in self.blocks if b.name not in out and (not of or b.name in of)]
        parameters = [p for b in active for p in b.parameters()]
        with preserved(self.model, self.blocks):
            self.model.requires_grad_(False)
            set_active(self.blocks, active, frozen=dict.fromkeys(out, "bypass"))
            with forked_rng(0):
                found = iter(torch.autograd.grad(self.loss(self.model, batch), parameters))
        return {b.name: [next(found) for _ in b.parameters()] for b in active}


def compared(found: Gradients, exact: Gradients) -> dict[str, float]:
    """Cosine and norm ratio over the blocks in `found`."""
    pairs = [(a.double(), e.double()) for n, group in found.items() for a, e in zip(group, exact[n], strict=True)]
    dot, aa, ee = (sum(float((x * y).sum()) for x, y in some) for some in
                   (pairs, [(a, a) for a, _ in pairs], [(e, e) for _, e in pairs]))  # fmt: skip
    return {"cosine": dot / math.sqrt(aa * ee), "norm_ratio": math.sqrt(aa / ee)}


def mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each entry."""
    return {k: sum(r[k] for r in rows) / len(rows) for k in rows[0]}


def curve(setup: Setup, exact: list[Gradients], order: Sequence[str], sizes: Sequence[int],
          of: Sequence[str] = ()) -> list[dict[str, float]]:  # fmt: skip
    """Fidelity with the first blocks of an order bypassed, for several numbers of them; `of` some blocks only."""
    rows = []
    for size in sizes:
        found = [setup.gradients(b, order[:size], of) for b in setup.batches]
        points = [compared(g, e) for g, e in zip(found, exact, strict=True)]
        rows.append({"bypassed": size, "share": size / len(setup.blocks)} | mean(points))
    return rows


def one_at_a_time(setup: Setup, exact: list[Gradients], of: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """DropBP's sensitivity and 1 - cosine of bypassing each block alone, on the gradients of all others or of some."""
    rows = {}
    for name in (n for n in setup.names() if n not in of):
        sensitivity = damage = 0.0
        for batch, e in zip(setup.batches, exact, strict=True):
            found = setup.gradients(batch, [name], of)
            sensitivity += sum(
                float(a.norm() - b.norm()) ** 2 for n in found for a, b in zip(found[n], e[n], strict=True)
            )
            damage += 1 - compared(found, e)["cosine"]
        rows[name] = {"sensitivity": sensitivity / len(exact), "damage": damage / len(exact)}
    return rows


def shuffled(names: Sequence[str], seed: int) -> list[str]:
    """Return the names in an order of chance."""
    return [names[i] for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()]


def orders_of(names: list[str], cei: dict[str, float], alone: dict[str, dict[str, float]]) -> dict[str, list[str]]:
    """Return the orders that are compared: first to be bypassed first."""
    ascending = sorted(names, key=lambda n: cei[n])
    orders = {"CEI ascending": ascending, "CEI descending": ascending[::-1]}
    orders |= {"sensitivity ascending": sorted(names, key=lambda n: alone[n]["sensitivity"])}
    orders |= {"damage ascending": sorted(names, key=lambda n: alone[n]["damage"])}
    orders |= {"first blocks first": names, "last blocks first": names[::-1]}
    return orders | {f"random {seed}": shuffled(names, seed) for seed in range(4)}


def foresight(cei: dict[str, float], alone: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Spearman correlation of CEI, and of a block's place, with what bypassing each block alone does."""
    names = list(alone)
    place = {n: i for i, n in enumerate(cei)}
    found: dict[str, Any] = {"CEI and place": float(spearmanr(list(cei.values()), list(place.values())).statistic)}
    for what, values in (("CEI", cei), ("place", place)):
        for kind in ("damage", "sensitivity"):
            test = spearmanr([values[n] for n in names], [alone[n][kind] for n in names])
            found[f"{what} and {kind}"] = {"spearman": float(test.statistic), "p": float(test.pvalue)}
    return found


def curves_of(setup: Setup, cei: dict[str, float], sizes: Sequence[int]) -> dict[str, Any]:
    """Measure every order, on all gradients and on those of the first block alone."""
    exact = [setup.gradients(b) for b in setup.batches]
    first = setup.names()[0]
    found: dict[str, Any] = {"cei": cei}
    for key, of in (("", ()), ("_behind_first", (first,))):
        alone = one_at_a_time(setup, exact, of)
        orders = orders_of([n for n in setup.names() if n not in of], cei, alone)
        found |= {f"alone{key}": alone, f"foresight{key}": foresight(cei, alone)}
        found[f"curves{key}"] = {k: curve(setup, exact, o, sizes, of) for k, o in orders.items()}
    return found


def every_second(setup: Setup) -> tuple[list[str], list[str]]:
    """Return the blocks that train and those that are frozen when ideas are compared, in execution order."""
    names = setup.names()
    return names[1::2], names[0::2]


def prepared() -> tuple[Setup, Callable[[int], Batch], list[Batch], Loss]:
    """PoseDiT after 40 steps of guider and head; training batches by position, held-out batches, loss per sample."""
    per_sample = loss_fn(OBJECTIVES["flow_prediction"])
    clips, unseen = figures(256, size=24), figures(32, size=24, seed=777)
    model = warmed(clips, 40)

    def at(position: int) -> Batch:
        return batch_at(clips, position, batch_size=4, seed=0)

    batches = fixed_batches({k: v[32:40] for k, v in clips.items()}, batch_size=4)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return per_sample(model, batch).mean()

    blocks = find_blocks(model, record_example(model, lambda: loss(model, batches[0])))
    return Setup(model, blocks, loss, batches), at, fixed_batches(unseen, batch_size=8), per_sample


def in_bin(batch: Batch, index: int) -> Batch:
    """Return the batch with its times moved into one quarter of [0, 1]."""
    return batch | {"t": (batch["t"] + index) / BINS}


def noise_levels(setup: Setup, cei: dict[str, float], per_tau: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Fidelity on batches of one noise level: bypassed by its own CEI, or by that over all levels."""
    names, (trained, frozen) = setup.names(), every_second(setup)
    rows = {}
    for index, (label, own) in enumerate(sorted(per_tau.items())):
        batches = [in_bin(b, index) for b in setup.batches]
        exact = [setup.gradients(b, of=trained) for b in batches]
        level = Setup(setup.model, setup.blocks, setup.loss, batches)
        rows[label] = {"kendall_to_all": float(kendalltau([cei[n] for n in names], [own[n] for n in names]).statistic)}
        for way, values in (("by CEI over all levels", cei), ("by its own CEI", own)):
            order = sorted(frozen, key=lambda n: values[n])
            points = curve(level, exact, order, (2, 3, 4), trained)
            rows[label] |= {way: {str(p["bypassed"]): round(p["cosine"], 5) for p in points}}
    return rows


def draw(weights: dict[str, float], count: int, step: int) -> list[str]:
    """Draw names without replacement, each next one with probability proportional to its weight."""
    generator = torch.Generator().manual_seed(step)
    noise = -torch.log(-torch.log(torch.rand(len(weights), generator=generator).clamp(1e-9, 1 - 1e-9)))
    keys = torch.tensor([math.log(w) for w in weights.values()]) + noise
    names = list(weights)
    return [names[i] for i in keys.topk(count).indices.tolist()]


def chances(cei: dict[str, float], names: Sequence[str]) -> dict[str, float]:
    """Weights with which blocks are bypassed: exp(-z), z being CEI standardised over the names; low CEI more often."""
    values = torch.tensor([cei[n] for n in names])
    z = (values - values.mean()) / values.std()
    return dict(zip(names, (-z).exp().tolist(), strict=True))


def at_random(setup: Setup, exact: list[Gradients], cei: dict[str, float], draws: int = 8) -> dict[str, Any]:
    """Fidelity of one fixed set of frozen blocks bypassed, and of sets drawn anew: each draw's, and of their mean."""
    trained, frozen = every_second(setup)
    ranked, uniform = sorted(frozen, key=lambda n: cei[n]), dict.fromkeys(frozen, 1.0)
    ways = {"fixed, lowest CEI": [ranked[:FREE]], "fixed, highest CEI": [ranked[-FREE:]]}
    ways |= {f"drawn by {k}": [draw(w, FREE, i) for i in range(draws)] for k, w in
             (("CEI", chances(cei, frozen)), ("chance", uniform))}  # fmt: skip
    rows = {}
    for way, sets in ways.items():
        singles, means = [], []
        for batch, e in zip(setup.batches, exact, strict=True):
            found = [setup.gradients(batch, s, trained) for s in sets]
            singles += [compared(g, e) for g in found]
            total = {n: [torch.stack(t).mean(0) for t in zip(*(g[n] for g in found), strict=True)] for n in trained}
            means.append(compared(total, e))
        rows[way] = {"each": mean(singles), "mean_gradient": mean(means), "draws": len(sets)}
    return rows


def scaled_back(setup: Setup, exact: list[Gradients], cei: dict[str, float]) -> dict[str, Any]:
    """Fidelity before and after each block's gradient is scaled by exact / found norm, measured on another batch."""
    trained, frozen = every_second(setup)
    ranked = sorted(frozen, key=lambda n: cei[n])
    rows = {}
    for size in (2, 4, 6):
        found = [setup.gradients(b, ranked[:size], trained) for b in setup.batches]
        ratios = [{n: compared({n: g[n]}, e)["norm_ratio"] for n in g} for g, e in zip(found, exact, strict=True)]
        plain = mean([compared(g, e) for g, e in zip(found, exact, strict=True)])
        other = [*ratios[1:], ratios[0]]
        scaled = [{n: [t / r[n] for t in g[n]] for n in g} for g, r in zip(found, other, strict=True)]
        after = mean([compared(g, e) for g, e in zip(scaled, exact, strict=True)])
        spread = [min(min(r.values()) for r in ratios), max(max(r.values()) for r in ratios)]
        rows[str(size)] = {"plain": plain, "scaled": after, "ratio_per_block": spread}
    return rows


Plan = Callable[[int], tuple[Batch, list[str], list[str]]]  # step -> batch, trained, bypassed (the others pass)


def plans_of(setup: Setup, at: Callable[[int], Batch], cei: dict[str, float], per_tau: dict[str, dict[str, float]],
             seed: int) -> dict[str, Plan]:  # fmt: skip
    """The ways to train that are compared; all draw the same clips, times and noise, the last two by noise level."""
    names, (trained, frozen) = setup.names(), every_second(setup)
    frozen = sorted(frozen, key=lambda n: cei[n])
    levels = [v for _, v in sorted(per_tau.items())]
    own = [sorted(frozen, key=lambda n, v=v: v[n])[:FREE] for v in levels]  # type: ignore[misc]
    first = 10_000 * seed

    def another(step: int) -> tuple[Batch, list[str], list[str]]:
        out = draw(chances(cei, names), len(frozen), first + step)
        return at(first + step), [n for n in names if n not in out], out

    def level(step: int) -> Batch:
        return in_bin(at(first + step), step % BINS)

    return {
        "6 frozen bypassed": lambda i: (at(first + i), trained, frozen),
        "6 frozen pass": lambda i: (at(first + i), trained, []),
        "3 bypassed, fixed": lambda i: (at(first + i), trained, frozen[:FREE]),
        "3 bypassed, drawn by CEI": lambda i: (at(first + i), trained, draw(chances(cei, frozen), FREE, first + i)),
        "6 bypassed and 6 trained, drawn by CEI": another,
        "one noise level a batch, 3 bypassed, fixed": lambda i: (level(i), trained, frozen[:FREE]),
        "one noise level a batch, 3 bypassed by its CEI": lambda i: (level(i), trained, own[i % BINS]),
    }


def train(setup: Setup, plan: Plan, cost: StepCost, flops: float) -> tuple[nn.Module, int]:
    """Train a copy until the FLOPs are spent: AdamW, rate 1e-3 after a warm-up of a tenth, cosine to zero."""
    model = copy.deepcopy(setup.model)
    blocks = find_blocks(model, record_example(model, lambda: setup.loss(model, setup.batches[0])))
    model.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for b in blocks for p in b.parameters()], lr=1e-3)
    spent, step = 0.0, 0
    while spent < flops:
        batch, trained, bypassed = plan(step)
        set_active(blocks, trained, frozen=dict.fromkeys(bypassed, "bypass"))
        done = spent / flops
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (done + 0.01) / 0.1) * 0.5 * (1 + math.cos(math.pi * done))
        setup.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        modes = {n: "train" if n in trained else "bypass" if n in bypassed else "pass" for n in setup.names()}
        spent, step = spent + cost.step(modes, outside="none"), step + 1
    return model, step


def trained(setup: Setup, at: Callable[[int], Batch], held_out: list[Batch], per_sample: Loss,
            cei: dict[str, float], per_tau: dict[str, dict[str, float]], steps: int, seeds: int) -> dict[str, Any]:  # fmt: skip  # noqa: E501
    """Held-out losses of every plan after the same FLOPs, with the difference to its fixed counterpart."""
    cost = cost_of(setup.model, setup.blocks, lambda: setup.loss(setup.model, setup.batches[0]))
    before = held_out_losses(setup.model, per_sample, held_out)
    rows: dict[str, Any] = {"before": float(before.mean())}
    for seed in range(seeds):
        plans = plans_of(setup, at, cei, per_tau, seed)
        _, chosen, bypassed = plans["6 frozen bypassed"](0)
        modes = {n: "train" if n in chosen else "bypass" for n in setup.names()}
        flops = steps * cost.step(modes, outside="none")
        losses: dict[str, list[float]] = {}
        for name, plan in plans.items():
            model, count = train(setup, plan, cost, flops)
            losses[name] = held_out_losses(model, per_sample, held_out).tolist()
            reference = "one noise level a batch, 3 bypassed, fixed" if "noise" in name else (
                "3 bypassed, fixed" if name.startswith("3") else "6 frozen bypassed")  # fmt: skip
            difference = paired_difference(losses[name], losses[reference])
            row = {"seed": seed, "steps": count, "loss": sum(losses[name]) / len(losses[name])} | difference
            rows.setdefault(name, []).append(row)
            console.print(f"{name}, seed {seed}: {row['loss']:.4f} after {count} steps", highlight=False)
    return rows


def wan() -> dict[str, Any]:
    """The curve of a Wan transformer with random weights."""
    model, batch = tiny_wan(128, layers=8)
    batch = batch | {k: batch[k][..., :16, :16] for k in ("video", "target")}
    blocks = find_blocks(model, record_example(model, lambda: wan_loss(model, batch)))
    setup = Setup(model, blocks, wan_loss, [batch])

    def predict(model: nn.Module, batch: Any) -> Tensor:
        timestep = torch.tensor([500])
        return model(
            hidden_states=batch["video"], encoder_hidden_states=batch["text"], timestep=timestep, return_dict=False
        )[0]

    values = score(model, blocks, predict, [batch], "cei").values
    return curves_of(setup, values, (2, 4, 6))


def draw_figure(result: dict[str, Any], path: Path) -> None:
    """Draw both kinds of cosine against the share of blocks bypassed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    titles = {"": "gradients of all blocks not bypassed", "_behind_first": "gradient of the first block"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for name, points in result[f"curves{key}"].items():
            random = name.startswith("random")
            style = {"color": "0.75", "label": "random" if name == "random 0" else None} if random else {"label": name}
            axis.plot([p["share"] for p in points], [p["cosine"] for p in points], marker=".", **style)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("share of blocks bypassed")
    axes[0].set_ylabel("cosine to the exact gradient")
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def table_of(title: str, curves: dict[str, list[dict[str, float]]]) -> Table:
    """Cosines, one row an order."""
    table = Table(title=title)
    table.add_column("order")
    for point in next(iter(curves.values())):
        table.add_column(str(point["bypassed"]), justify="right")
    for name, points in curves.items():
        table.add_row(name, *(f"{p['cosine']:.3f}" for p in points))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fidelity.json")
    parser.add_argument("--steps", type=int, default=40, help="of training with half of the blocks bypassed")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    setup, at, held_out, per_sample = prepared()
    predict = predict_fn(OBJECTIVES["flow_prediction"])
    scored_on = [at(2000 + i) for i in range(8)]
    cei = score(setup.model, setup.blocks, predict, scored_on, "cei", t=lambda batch: batch["t"])
    result = environment() | curves_of(setup, cei.values, (1, 2, 3, 4, 6, 8, 9, 10))
    exact = [setup.gradients(b) for b in setup.batches]
    for key in ("", "_behind_first"):
        title = "cosine by number of blocks bypassed" + (", of the first block's gradient" if key else "")
        console.print(table_of(title, result[f"curves{key}"]), result[f"foresight{key}"])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw_figure(result, args.out.with_suffix(".png"))
    result["noise_levels"] = noise_levels(setup, cei.values, cei.per_tau)
    result["sets_at_random"] = at_random(setup, exact, cei.values)
    result["scaled_back"] = scaled_back(setup, exact, cei.values)
    result["wan_random_weights"] = wan()
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    console.print(result["noise_levels"], result["sets_at_random"], result["scaled_back"])
    for key in ("", "_behind_first"):
        console.print(table_of(f"Wan, random weights{key}", result["wan_random_weights"][f"curves{key}"]))
    console.print(result["wan_random_weights"]["foresight_behind_first"])
    result["trained"] = trained(setup, at, held_out, per_sample, cei.values, cei.per_tau, args.steps, args.seeds)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"{args.out}")


if __name__ == "__main__":
    main()
