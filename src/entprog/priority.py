"""Priorities: which block first. Each is one function and one row of PRIORITIES; higher scores train earlier.

All have the signature (model, blocks, predict, batches, *, loss_fn, t, stop) -> Scores and leave the model as it was.
Those that skip blocks need predictions only; `loss` needs loss_fn forward; `grad_norm`, `gain` and `oracle` need
gradients of every block and so a step's memory (CEI needs no backward pass at all).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from scipy.stats import kendalltau, spearmanr
from torch import Tensor, nn

from entprog import parallel
from entprog.blocks import Block, batch_size, evaluating, gradients_aside, on_host
from entprog.cei import Scores, Stop, Times, by_skipping, cei, inflation, knn_entropy, make_scores, relative_change
from entprog.cei import gaussian_entropy as gaussian
from entprog.modes import LossFn, Predict, preserved, running, set_active
from entprog.probe import Arguments
from entprog.snapshot import buffers_kept

Priority = Callable[..., Scores]


def _skip_priority(name: str, compare: Callable[[Tensor, Tensor], Tensor], magnitude: bool = False) -> Priority:
    def priority(
        model: nn.Module,
        blocks: Sequence[Block],
        predict: Predict,
        batches: Iterable[Any],
        *,
        loss_fn: LossFn | None = None,
        t: Times | None = None,
        stop: Stop | None = None,
    ) -> Scores:
        return by_skipping(name, model, blocks, predict, batches, compare, t=t, stop=stop, magnitude=magnitude)

    return priority


def _needs(loss_fn: LossFn | None, name: str) -> LossFn:
    if loss_fn is None:
        raise ValueError(f"priority {name!r} needs loss_fn: pass loss_fn(model, batch) -> loss, or use 'cei'")
    return loss_fn


def loss(
    model: nn.Module,
    blocks: Sequence[Block],
    predict: Predict,
    batches: Iterable[Any],
    *,
    loss_fn: LossFn | None = None,
    t: Times | None = None,
    stop: Stop | None = None,
) -> Scores:
    """Rise of the loss without the block, L[skip b] - L, one value per batch (skip-loss)."""
    fn = _needs(loss_fn, "loss")

    def as_prediction(model: nn.Module, batch: Any) -> Tensor:
        return fn(model, batch).reshape(1, 1)

    def rise(full: Tensor, skipped: Tensor) -> Tensor:
        return (skipped - full)[:, 0]

    scores = by_skipping("loss", model, blocks, as_prediction, batches, rise, stop=stop)
    scores.changes = {}  # of the loss, not of the prediction
    return scores


def _stream(
    block: Block, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> tuple[Tensor, Tensor]:
    """Return a block's first stream without its residual branch, and as the block returned it."""
    if block.outputs is None:  # not verified: the first argument that has the output's shape
        after = output if isinstance(output, Tensor) else next(v for v in output if isinstance(v, Tensor))
        return next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.shape == after.shape), after
    pairs = zip(block.outputs.bases(Arguments(module, args, kwargs)), block.outputs.unpack(output), strict=True)
    return next((base, value) for base, value in pairs if base is not None and value is not None)


def block_influence(
    model: nn.Module,
    blocks: Sequence[Block],
    predict: Predict,
    batches: Iterable[Any],
    *,
    loss_fn: LossFn | None = None,
    t: Times | None = None,
    stop: Stop | None = None,
) -> Scores:
    """How far the block turns its stream: mean over tokens of 1 - cos(x_b, x_{b+1}) (ShortGPT, arXiv 2403.03853)."""
    rows: list[Tensor] = []

    def hook_for(column: int, row: Tensor) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before, after = _stream(blocks[column], module, args, kwargs, output)
            images = before.ndim > 3 and any(isinstance(m, nn.Conv2d | nn.Conv3d) for m in module.modules())
            cosine = torch.cosine_similarity(before.float(), after.float(), dim=1 if images else -1)
            row[:, column] = 1 - cosine.reshape(len(row), -1).mean(1).cpu()  # frames may be folded into the batch

        return hook

    with evaluating(model), running(blocks, "train"):
        for seed, batch in enumerate(parallel.in_step(model, batches)):
            row = torch.zeros(batch_size(batch), len(blocks))
            handles = [b.module.register_forward_hook(hook_for(i, row), with_kwargs=True) for i, b in enumerate(blocks)]
            try:
                with parallel.own_noise(model, seed):
                    predict(model, batch)
            finally:
                for handle in handles:
                    handle.remove()
            rows.append(parallel.joined(model, row))
    return make_scores("block_influence", [b.name for b in blocks], torch.cat(rows))


def samples(batch: Any) -> list[Any]:
    """Split a plain dict of tensors with one first axis into its samples; any other batch stays whole."""
    if type(batch) is not dict or not all(isinstance(v, Tensor) and v.ndim for v in batch.values()):
        return [batch]
    counts = {len(v) for v in batch.values()}
    if len(counts) != 1:
        return [batch]
    return [{k: v[i : i + 1] for k, v in batch.items()} for i in range(counts.pop())]


class HostBatches:
    """Batches that wait on the host; each comes back to its device when it is asked for, in every pass over them."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._held = [on_host(batch) for batch in batches]

    def __iter__(self) -> Iterator[Any]:
        return (back() for back in self._held)


def _batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the modules in training mode whose output depends on which samples share a batch."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]


@contextmanager
def _as_running(norms: Sequence[nn.Module]) -> Iterator[None]:
    """Let batch norms in training mode use their running statistics."""
    try:
        for m in norms:
            m.training = False
        yield
    finally:
        for m in norms:
            m.training = True


def block_gradients(
    model: nn.Module, blocks: Sequence[Block], loss_fn: LossFn, batch: Any, seed: int
) -> list[list[Tensor]]:
    """Gradients of every block's parameters, all blocks trainable, noise from a seed.

    One sample at a time, so that scoring with gradients of all blocks holds the activations of one sample only; batch
    norm uses its running statistics, and leaves them alone. The mean over all ranks' samples in several processes.
    """
    parameters = [b.parameters() for b in blocks]
    flat = [p for group in parameters for p in group]
    total = [torch.zeros_like(p) for p in flat]
    plain, parts = _batch_norms(model), samples(batch)
    if any(m.running_mean is None for m in plain):  # of the batch it normalises, whatever the mode
        parts = [batch]
    noise = parallel.own_noise(model, seed)
    kept = buffers_kept(model)
    with preserved(model, blocks), gradients_aside(flat), kept, _as_running(plain), noise, torch.enable_grad():
        set_active(blocks, blocks)
        for sample in parts:
            grads = parallel.gradients(model, loss_fn(model, sample), flat)
            for sum_, g in zip(total, grads, strict=True):
                sum_ += g / len(parts)
    total = parallel.mean(model, total)
    filled = iter(total)
    return [[next(filled) for _ in group] for group in parameters]


def grad_norm(
    model: nn.Module,
    blocks: Sequence[Block],
    predict: Predict,
    batches: Iterable[Any],
    *,
    loss_fn: LossFn | None = None,
    t: Times | None = None,
    stop: Stop | None = None,
) -> Scores:
    """Norm of the block's gradient, |g_b|, one value per batch."""
    fn = _needs(loss_fn, "grad_norm")
    rows = [
        [parallel.inner(grads, grads) ** 0.5 for grads in block_gradients(model, blocks, fn, batch, seed)]
        for seed, batch in enumerate(parallel.in_step(model, batches))
    ]
    return make_scores("grad_norm", [b.name for b in blocks], torch.tensor(rows))


def gain(
    model: nn.Module,
    blocks: Sequence[Block],
    predict: Predict,
    batches: Iterable[Any],
    *,
    loss_fn: LossFn | None = None,
    t: Times | None = None,
    stop: Stop | None = None,
) -> Scores:
    """First-order drop of one batch's loss by an Adam step of rate 1 on the others, per cost of the block.

    g_b = <gradient of batch i, m / (sqrt(v) + eps)>, with m and v the mean gradient and mean square over the other
    batches. Divided by the block's parameters relative to the mean block's, which stand for its cost.

    Two passes over the batches: the first adds up gradients and squares, in float64, from which the second takes away
    what is batch i's own; so what is held does not grow with the number of batches. ValueError with fewer than two.
    """
    fn = _needs(loss_fn, "gain")
    kept = batches if isinstance(batches, HostBatches) else list(parallel.in_step(model, batches))
    count = 0
    sums: list[list[tuple[Tensor, Tensor]]] = []
    for seed, batch in enumerate(parallel.in_step(model, kept)):
        count += 1
        for b, block in enumerate(block_gradients(model, blocks, fn, batch, seed)):
            if seed == 0:
                sums.append([(torch.zeros_like(g), torch.zeros_like(g)) for g in map(_double, block)])
            for g, (total, squares) in zip(map(_double, block), sums[b], strict=True):
                total.add_(g)
                squares.addcmul_(g, g)
    if count < 2:
        raise ValueError(f"priority 'gain' needs at least 2 batches, one to step on and one to judge by: got {count}")
    sizes = [sum(p.numel() for p in b.parameters()) for b in blocks]
    cost = [size / (sum(sizes) / len(sizes)) for size in sizes]
    rows = []
    for seed, batch in enumerate(parallel.in_step(model, kept)):
        row = []
        for b, block in enumerate(block_gradients(model, blocks, fn, batch, seed)):
            directions = [_direction(_double(g), *s, count - 1).float() for g, s in zip(block, sums[b], strict=True)]
            row.append(parallel.inner(block, directions) / cost[b])
        rows.append(row)
    return make_scores("gain", [b.name for b in blocks], torch.tensor(rows))


def _double(gradient: Tensor) -> Tensor:
    return parallel.local(gradient).double()


def _direction(own: Tensor, total: Tensor, squares: Tensor, others: int) -> Tensor:
    """Adam's step by the mean and the mean square of the other batches' gradients."""
    return (total - own) / others / (((squares - own.square()).clamp(min=0) / others).sqrt() + 1e-8)


def oracle(
    model: nn.Module,
    blocks: Sequence[Block],
    predict: Predict,
    batches: Iterable[Any],
    *,
    loss_fn: LossFn | None = None,
    t: Times | None = None,
    stop: Stop | None = None,
    steps: int = 20,
    lr: float = 1e-3,
) -> Scores:
    """Drop of the last batch's loss after `steps` AdamW steps that train only the block; for small models.

    What every other priority is judged by. The other batches are trained on in turn; everything outside the block is
    frozen; weights come back afterwards.
    """
    fn = _needs(loss_fn, "oracle")
    *train, held_out = list(parallel.in_step(model, batches))
    if not train:
        raise ValueError("priority 'oracle' needs at least 2 batches: the last is held out")

    def held_out_loss() -> float:
        with evaluating(model), parallel.own_noise(model, 1):
            return parallel.mean(model, [fn(model, held_out).detach()])[0].item()

    row = []
    with preserved(model, blocks), parallel.own_noise(model, 0):
        for p in model.parameters():
            p.requires_grad_(False)
        before = held_out_loss()
        for block in blocks:
            saved = [p.detach().clone() for p in block.parameters()]
            set_active(blocks, [block])
            optimizer = torch.optim.AdamW(block.parameters(), lr=lr)
            try:
                for step in range(steps):
                    fn(model, train[step % len(train)]).backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                row.append(before - held_out_loss())
            finally:  # an interrupted score leaves no trace either
                with torch.no_grad():
                    for p, value in zip(block.parameters(), saved, strict=True):
                        p.copy_(value)
    return make_scores("oracle", [b.name for b in blocks], torch.tensor([row]))


def _order_priority(name: str, order: Callable[[int], Sequence[float]]) -> Priority:
    """Return a priority that looks at the blocks' positions alone."""

    def priority(
        model: nn.Module,
        blocks: Sequence[Block],
        predict: Predict | None = None,
        batches: Iterable[Any] = (),
        *,
        loss_fn: LossFn | None = None,
        t: Times | None = None,
        stop: Stop | None = None,
    ) -> Scores:
        values = torch.tensor([order(len(blocks))], dtype=torch.float64)
        scores = make_scores(name, [b.name for b in blocks], values)
        scores.samples, scores.zero = 0, []
        return scores

    return priority


def _random_order(count: int, seed: int = 0) -> list[float]:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()


def _stride_order(count: int) -> list[float]:
    """Spread: each block is as far as possible from those before it (the positions' bits reversed)."""
    bits = max(1, (count - 1).bit_length())
    return [1 - int(f"{i:0{bits}b}"[::-1], 2) / 2**bits for i in range(count)]


PRIORITIES: dict[str, Priority] = {
    "cei": cei,
    "cei_abs": _skip_priority("cei_abs", inflation(gaussian), magnitude=True),
    "cei_knn": _skip_priority("cei_knn", inflation(knn_entropy)),
    "output_mse": _skip_priority("output_mse", relative_change),
    "loss": loss,
    "block_influence": block_influence,
    "grad_norm": grad_norm,
    "gain": gain,
    "oracle": oracle,
    "random": _order_priority("random", _random_order),
    "first": _order_priority("first", lambda count: [1 - i / count for i in range(count)]),
    "last": _order_priority("last", lambda count: [(i + 1) / count for i in range(count)]),
    "stride": _order_priority("stride", _stride_order),
}


def lookup(table: dict[str, Any], name: str, what: str) -> Any:
    """Return a table's row, or raise a ValueError that lists the rows."""
    if name not in table:
        raise ValueError(f"{what} {name!r} is unknown: choose one of {sorted(table)}")
    return table[name]


def score(
    model: nn.Module,
    blocks: Sequence[Block],
    predict: Predict,
    batches: Iterable[Any],
    priority: str = "cei",
    *,
    loss_fn: LossFn | None = None,
    t: Times | None = None,
    stop: Stop | None = None,
) -> Scores:
    """Score the blocks of a model by a named priority.

    predict(model, batch) -> raw prediction (B, ...); batches re-iterable; loss_fn(model, batch) -> scalar for the
    priorities that need a loss; t(batch) -> (B,) times in [0, 1] for per-tau scores; stop=None uses every sample.
    ValueError for an unknown priority, no batch, or a score that is not finite.
    """
    function = lookup(PRIORITIES, priority, "priority")
    return function(model, list(blocks), predict, batches, loss_fn=loss_fn, t=t, stop=stop)


def agreement(a: Scores, b: Scores) -> dict[str, float | None]:
    """Rank correlations of two scores over the same blocks: Spearman's rho and Kendall's tau, None if constant."""
    names = sorted(a.values)
    left, right = [a.values[n] for n in names], [b.values[n] for n in names]
    if len(set(left)) == 1 or len(set(right)) == 1:
        return {"spearman": None, "kendall": None}
    found = {"spearman": spearmanr(left, right).statistic, "kendall": kendalltau(left, right).statistic}
    return {name: float(value) for name, value in found.items()}
