"""Conditional Entropy Inflation: how much more uncertain a prediction gets without one block.

    pi(b) = mean over samples n of  H(eps_n | skip b) - H(eps_n)          (Ent-Prog, arXiv 2511.21136)
    Gaussian estimate of the difference: log( sigma_n[skip b] / sigma_n[full] )

sigma_n is the standard deviation of one sample's raw prediction over all its axes, mean removed, in float32; the
log-ratio is averaged over samples (pooling samples would let noisy timesteps drown the rest). Every block is skipped on
the same samples, times and noise. `by_skipping` runs any per-sample comparison of the two predictions that way; the
rival scores of priority.py that skip blocks are other comparisons.

Cost: L skips by the plain method take L + 1 forward passes a batch. `suffix_predictions` replays each block's recorded
output in front of the skipped one and so runs only what follows: about half.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from entprog.blocks import Block, evaluating
from entprog.modes import Predict, running, set_mode, skip
from entprog.parallel import in_step, joined, own_noise

Compare = Callable[[Tensor, Tensor], Tensor]  # (full, skipped) predictions (B, ...) -> (B,)
Times = Callable[[Any], Tensor]
ZERO = 1e-6  # a block whose score is below this in magnitude was not measured: a zero-initialised branch
TAU_BINS = 4


@dataclass
class Scores:
    """One score with an interval per block; higher trains earlier.

    `intervals` are 95 % bootstrap intervals over samples. `per_tau` holds the mean score in each quarter of t, where
    times were given; `zero` the blocks whose score is below 1e-6 in magnitude, which says nothing of their worth;
    `inherited` the hosts whose place such blocks took over; `changes` the relative change of the prediction by each
    skip, E|eps_skip - eps|^2 / E|eps|^2, measured on the way.
    """

    priority: str
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    ranking: list[str]
    samples: int = 0
    per_tau: dict[str, dict[str, float]] = field(default_factory=dict)
    share_negative: float = 0.0
    zero: list[str] = field(default_factory=list)
    changes: dict[str, float] = field(default_factory=dict)
    stopped_early: bool = False
    inherited: dict[str, str] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the scores as JSON."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Scores":
        """Read scores that `save` wrote."""
        data = json.loads(Path(path).read_text())
        data["intervals"] = {k: (low, high) for k, (low, high) in data["intervals"].items()}
        return cls(**data)


def with_inherited(scores: Scores, order: Sequence[str]) -> Scores:
    """Give blocks that were not measured, zero-initialised ones, the priority of their host.

    The host is the nearest block before them in execution order, or else behind them, that was measured: a temporal
    module put behind a spatial block does its work on that block's features. Returns the scores as they are where
    nothing or everything is zero.
    """
    measured = [n for n in order if n not in scores.zero]
    if not scores.zero or not measured:
        return scores
    place = {n: i for i, n in enumerate(order)}
    hosts = {z: min(measured, key=lambda n: (place[n] > place[z], abs(place[n] - place[z]))) for z in scores.zero}
    values = scores.values | {z: scores.values[host] for z, host in hosts.items()}
    intervals = scores.intervals | {z: scores.intervals[host] for z, host in hosts.items()}
    ranking = sorted(order, key=lambda n: (-values[n], n in hosts, place[n]))
    return replace(scores, values=values, intervals=intervals, ranking=ranking, inherited=hosts)


@dataclass(frozen=True)
class Stop:
    """Stop scoring when every top-m set in `sizes` is stable: at least `confidence` of bootstrap resamples agree."""

    sizes: tuple[int, ...]
    confidence: float = 0.9
    min_samples: int = 16


def gaussian_entropy(prediction: Tensor) -> Tensor:
    """Entropy of each sample's values under a Gaussian, up to a constant: log sigma_n, (B, ...) -> (B,)."""
    flat = prediction.flatten(1).float()
    return flat.std(dim=1, correction=0).clamp(min=1e-20).log()


def knn_entropy(prediction: Tensor, neighbours: int = 8, projections: int = 16) -> Tensor:
    """Entropy of each sample's values without assuming a distribution, in nats, (B, C, ...) -> (B,).

    Kozachenko and Leonenko's k-nearest-neighbour estimate in one dimension, psi(n) - psi(k) + log(2 r_k), averaged over
    the points and over fixed random projections of the channel axis; r_k is the distance to the k-th neighbour.
    """
    points = prediction.flatten(2).float() if prediction.ndim > 2 else prediction[:, None].float()  # (B, C, n)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(projections, points.shape[1], generator=generator).to(points.device)
    directions = directions / directions.norm(dim=1, keepdim=True)
    line = (directions @ points).sort(dim=-1).values  # (B, P, n)
    n = line.shape[-1]
    k = min(neighbours, n - 1)
    # in sorted order the k nearest of i lie in a window of k + 1 that contains i
    windows = line.unfold(-1, k + 1, 1)  # (B, P, n - k, k + 1)
    reach = torch.full((*line.shape, k + 1), math.inf, device=line.device)
    for j in range(k + 1):  # i is the j-th of its window
        radius = torch.maximum(windows[..., j] - windows[..., 0], windows[..., k] - windows[..., j])
        reach[..., j : n - k + j, j] = radius
    r = reach.amin(dim=-1).clamp(min=1e-12)
    constant = torch.digamma(torch.tensor(float(n))) - torch.digamma(torch.tensor(float(k)))
    return constant.to(r.device) + (2 * r).log().mean(dim=(1, 2))


def inflation(entropy: Callable[[Tensor], Tensor]) -> Compare:
    """Return the comparison H(skipped) - H(full) of one entropy estimate."""
    return lambda full, skipped: entropy(skipped) - entropy(full)


def relative_change(full: Tensor, skipped: Tensor) -> Tensor:
    """|eps_skip - eps|^2 / |eps|^2 of each sample, (B, ...) -> (B,)."""
    full, skipped = full.flatten(1).float(), skipped.flatten(1).float()
    return (skipped - full).square().sum(1) / full.square().sum(1).clamp(min=1e-20)


def plain_predictions(
    model: nn.Module, blocks: Sequence[Block], predict: Predict, batch: Any, seed: int = 0
) -> tuple[Tensor, Iterator[tuple[Block, Tensor]]]:
    """Predict with the whole model, then with each block skipped: the slow, obvious way the other is tested against."""

    def run() -> Tensor:
        with own_noise(model, seed):
            return predict(model, batch)

    def skips() -> Iterator[tuple[Block, Tensor]]:
        for block in blocks:
            with skip(block):
                yield block, run()

    return run(), skips()


def suffix_predictions(
    model: nn.Module, blocks: Sequence[Block], predict: Predict, batch: Any, seed: int = 0
) -> tuple[Tensor, Iterator[tuple[Block, Tensor]]]:
    """Predict as `plain_predictions` does, but run only what follows the skipped block.

    The full pass records what each block returned; a skip replays the record in front of the block. Holds one output
    per block in memory, and lets go of each when no further skip needs it. Falls back to the plain way if a block runs
    more than once in a forward pass.
    """
    recorded: dict[str, list[Any]] = {}
    order: list[Block] = []

    def recorder(block: Block) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            recorded.setdefault(block.name, []).append(output)
            order.append(block)

        return hook

    handles = [b.module.register_forward_hook(recorder(b)) for b in blocks]
    try:
        with own_noise(model, seed):
            full = predict(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if len(order) != len(blocks):
        recorded.clear()
        return full, plain_predictions(model, blocks, predict, batch, seed)[1]

    def skips() -> Iterator[tuple[Block, Tensor]]:
        with running(order, "train"):
            for block in order[:-1]:
                set_mode(block, "replay", replayed=recorded[block.name][0])
            for block in reversed(order):
                with skip(block), own_noise(model, seed):
                    prediction = predict(model, batch)
                set_mode(block, "train")
                recorded.pop(block.name)
                yield block, prediction

    return full, skips()


def _resampled_means(values: Tensor, count: int = 400) -> Tensor:
    """Bootstrap: means of `count` resamples of the rows, (n, L) -> (count, L)."""
    generator = torch.Generator().manual_seed(0)
    n = values.shape[0]
    picks = torch.randint(n, (count, n), generator=generator)
    weights = torch.zeros(count, n).scatter_add_(1, picks, torch.ones(count, n)) / n
    return weights.double() @ values.double()


def top_stable(values: Tensor, stop: Stop) -> bool:
    """Return whether every top-m set of the column means is the same in `stop.confidence` of bootstrap resamples.

    Shapes: values (n, L), one row per sample.
    """
    if len(values) < stop.min_samples:
        return False
    means = _resampled_means(values)
    point = values.double().mean(0)
    for m in (m for m in stop.sizes if 0 < m < values.shape[1]):
        chosen = point.topk(m).indices.sort().values
        agree = (means.topk(m, dim=1).indices.sort(1).values == chosen).all(1).double().mean()
        if agree < stop.confidence:
            return False
    return True


def make_scores(
    priority: str,
    names: Sequence[str],
    values: Tensor,
    *,
    t: Tensor | None = None,
    changes: Tensor | None = None,
    stopped_early: bool = False,
    magnitude: bool = False,
) -> Scores:
    """Turn per-sample values (n, L) into Scores; `magnitude` ranks by the absolute value of the mean.

    Ties keep the order of `names`. ValueError if a value is not finite, with the blocks concerned.
    """
    if not values.isfinite().all():
        bad = [n for n, ok in zip(names, values.isfinite().all(0).tolist(), strict=True) if not ok]
        raise ValueError(f"priority {priority!r} is not finite for blocks {bad}: the model predicts inf or nan there")
    means, resampled = values.double().mean(0), _resampled_means(values)
    raw = means
    if magnitude:
        means, resampled = means.abs(), resampled.abs()
    low, high = resampled.quantile(0.025, dim=0), resampled.quantile(0.975, dim=0)
    per_tau = {}
    if t is not None:
        bins = (t * TAU_BINS).long().clamp(0, TAU_BINS - 1)
        for i in bins.unique().tolist():
            label = f"{i / TAU_BINS:.2f}-{(i + 1) / TAU_BINS:.2f}"
            binned = values[bins == i].double().mean(0)
            per_tau[label] = dict(zip(names, (binned.abs() if magnitude else binned).tolist(), strict=True))
    order = sorted(range(len(names)), key=lambda i: (-means[i].item(), i))
    return Scores(
        priority=priority,
        values=dict(zip(names, means.tolist(), strict=True)),
        intervals={n: (low[i].item(), high[i].item()) for i, n in enumerate(names)},
        ranking=[names[i] for i in order],
        samples=len(values),
        per_tau=per_tau,
        share_negative=(raw < 0).double().mean().item(),
        zero=[n for n, v in zip(names, raw.tolist(), strict=True) if abs(v) < ZERO],
        changes={} if changes is None else dict(zip(names, changes.double().mean(0).tolist(), strict=True)),
        stopped_early=stopped_early,
    )


def by_skipping(
    priority: str,
    model: nn.Module,
    blocks: Sequence[Block],
    predict: Predict,
    batches: Iterable[Any],
    compare: Compare,
    *,
    t: Times | None = None,
    stop: Stop | None = None,
    magnitude: bool = False,
    predictions: Callable[..., tuple[Tensor, Iterator[tuple[Block, Tensor]]]] = suffix_predictions,
) -> Scores:
    """Score every block by comparing predictions with and without it, sample by sample, in eval mode.

    `predict(model, batch)` returns the raw prediction (B, ...); what it draws at random is the same with and without
    the block, and another for every batch. `t(batch)` gives each sample's time for the per-tau scores. With `stop`,
    batches are left over once the top-m sets in it are stable. Several processes score batches of their own; all get
    the scores of all samples.
    """
    columns = {b.name: i for i, b in enumerate(blocks)}
    values, changes, times = [], [], []
    stopped = False
    with evaluating(model), running(blocks, "train"):
        for seed, batch in enumerate(in_step(model, batches)):
            full, skips = predictions(model, blocks, predict, batch, seed)
            rows = torch.empty(len(full), len(blocks))
            change = torch.empty(len(full), len(blocks))
            for block, skipped in skips:
                rows[:, columns[block.name]] = compare(full, skipped).float().cpu()
                change[:, columns[block.name]] = relative_change(full, skipped).cpu()
            values.append(joined(model, rows))
            changes.append(joined(model, change))
            if t is not None:
                times.append(joined(model, t(batch).float().cpu()))
            if stop is not None and top_stable(torch.cat(values), stop):
                stopped = True
                break
    if not values:
        raise ValueError("no batch to score on: batches must be re-iterable and hold at least one batch")
    return make_scores(
        priority,
        list(columns),
        torch.cat(values),
        t=torch.cat(times) if times else None,
        changes=torch.cat(changes),
        stopped_early=stopped,
        magnitude=magnitude,
    )


def cei(
    model: nn.Module,
    blocks: Sequence[Block],
    predict: Predict,
    batches: Iterable[Any],
    *,
    loss_fn: Any = None,
    t: Times | None = None,
    stop: Stop | None = None,
) -> Scores:
    """Conditional Entropy Inflation: mean of log(sigma[skip b] / sigma[full]); higher trains earlier."""
    return by_skipping("cei", model, blocks, predict, batches, inflation(gaussian_entropy), t=t, stop=stop)


def within(predict: Predict, share: Callable[[Any], Tensor]) -> Predict:
    """Return a prediction that varies inside a region only, so that its CEI is the region's.

    share(batch) says how much of each place shows the region, (B, 1, ...) broadcast to the prediction; inside are the
    places that show at least half as much of it as any does (a face may fill no place of the latents). Outside, the
    prediction is set to its mean inside: what is left of the variance is the region's times its size, and the size
    cancels in CEI's ratio. ValueError for a batch without the region.
    """

    def inside_only(model: nn.Module, batch: Any) -> Tensor:
        prediction = predict(model, batch).float()
        shown = share(batch)
        most = shown.flatten(1).amax(1)
        if not (most > 0).all():
            raise ValueError("a sample of the batch does not show the region anywhere: leave such samples out")
        inside = (shown >= 0.5 * most.view(-1, *[1] * (shown.ndim - 1))).expand_as(prediction)
        count = inside.flatten(1).sum(1)
        mean = (prediction * inside).flatten(1).sum(1) / count
        return torch.where(inside, prediction, mean.view(-1, *[1] * (prediction.ndim - 1)))

    return inside_only


def cei_per_condition(
    model: nn.Module, blocks: Sequence[Block], predicts: Mapping[str, Predict], batches: Iterable[Any]
) -> dict[str, Scores]:
    """Score CEI once per way of predicting, e.g. {"all": ..., "without pose": ..., "face": ...}.

    A block that matters for a condition loses score when that condition is dropped; one that matters for a region
    scores high where the prediction is kept `within` it.
    """
    batches = list(batches)
    return {name: cei(model, blocks, predict, batches) for name, predict in predicts.items()}
