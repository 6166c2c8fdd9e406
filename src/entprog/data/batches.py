"""Batches as a pure function of (seed, position): what is trained on at step 1,234 can be made again after a crash.

A data set is a dict of tensors with the clips on the first axis: `video` (N, C, F, H, W), `pose` (N, 3, F, H_p, W_p),
`reference` (N, C, H, W), and what else a source has (`reference_pose`, `labels`); in memory, or read from disk when
asked for (data/cache.py). A batch holds some rows of it, cut to the frames that are trained on, and its own times `t`
(B,) and `noise` (B, C, F, H, W); a condition that is dropped for guidance is missing from it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entprog.data.cache import Column, Stored, load_split, take
from entprog.data.prepared import is_prepared, spread_evenly
from entprog.data.synthetic import figures
from entprog.measure import best_device
from entprog.models.wan import is_pipeline
from entprog.objective import frame_noise

if TYPE_CHECKING:
    from entprog.config import RunConfig

Data = Mapping[str, Column]
Batch = dict[str, Tensor]
CONDITIONS = ("pose", "reference")
BESIDE = {"reference": ("reference_pose",)}  # what comes and goes with a condition
ALWAYS = ("labels", "control", "condition", "image", "pose_latents", "face")  # what is there is in every batch


def _generator(*numbers: int) -> torch.Generator:
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63)
    return torch.Generator().manual_seed(seed)


def _columns(data: Data, conditions: Sequence[str] | None) -> list[str]:
    """Name what a batch takes of the data: the conditions asked for, or all there are, and what belongs to them."""
    if conditions is None:
        conditions = [c for c in CONDITIONS if c in data]
    beside = [name for condition in conditions for name in BESIDE.get(condition, ())]
    if missing := [c for c in conditions if c not in data]:
        raise ValueError(f"the data have no {missing}: they hold {sorted(data)}")
    return [k for k in ("video", *conditions, *beside, *ALWAYS) if k in data]


def _buckets(data: Data) -> Sequence[Sequence[int]]:
    """Rows whose clips have the same shape."""
    video = data["video"]
    return video.buckets() if isinstance(video, Stored) else [range(len(video))]


def _part(data: Data, rows: Sequence[int]) -> Data:
    return {k: v.subset(rows) if isinstance(v, Stored) else v[list(rows)] for k, v in data.items()}


def _rows_at(data: Data, position: int, batch_size: int, seed: int) -> list[int]:
    """Return which clips a batch holds: every clip once an epoch, but for what is left over of a bucket."""
    buckets = _buckets(data)
    sizes = tuple(len(bucket) for bucket in buckets)
    per_epoch = sum(size // batch_size for size in sizes)
    if per_epoch == 0:
        raise ValueError(
            f"buckets of {list(sizes)} clips do not fill a batch of {batch_size}: lower batch_size or add clips"
        )
    epoch, index = divmod(position, per_epoch)
    orders, places = _shuffled(sizes, per_epoch, seed, epoch)
    index = int(places[index]) if places is not None else index
    for bucket, order in zip(buckets, orders, strict=True):
        if index < (full := len(order) // batch_size):
            return [bucket[i] for i in order[index * batch_size : (index + 1) * batch_size].tolist()]
        index -= full
    raise AssertionError("a batch lies in one of the buckets")


@lru_cache(maxsize=4)  # of the epoch that is trained on, and of one beside it
def _shuffled(sizes: tuple[int, ...], per_epoch: int, seed: int, epoch: int) -> tuple[list[Tensor], Tensor | None]:
    """Return an epoch's order of each bucket's rows, and of the batches where there are several buckets."""
    generator = _generator(seed, 1, epoch)
    orders = [torch.randperm(size, generator=generator) for size in sizes]
    return orders, torch.randperm(per_epoch, generator=generator) if len(sizes) > 1 else None


def _windows(clip_frames: int, frames: int | None, starts: Sequence[int]) -> list[slice] | None:
    if frames is None or frames == clip_frames:
        return None
    return [slice(start, start + frames) for start in starts]


def _spare(data: Data, frames: int | None) -> int:
    """Return how many frames a clip has more than are trained on. ValueError if it has fewer."""
    spare = data["video"].shape[2] - (frames or data["video"].shape[2])
    if spare < 0:
        raise ValueError(f"clips of {data['video'].shape[2]} frames do not hold {frames}: lower frames")
    return spare


def batch_at(
    data: Data,
    position: int,
    *,
    batch_size: int,
    seed: int,
    condition_dropout: float = 0.0,
    joint_dropout: float = 0.0,
    frames: int | None = None,
    conditions: Sequence[str] | None = None,
    shared_noise: float = 0.0,
    share: tuple[int, int] = (0, 1),
) -> Batch:
    """Return the batch at a position of an endless, shuffled stream; t is uniform in [0, 1].

    Every clip comes once per epoch, with `frames` frames from a random place of it; clips of different shapes never
    share a batch, and what does not fill one sits the epoch out. With `condition_dropout` each
    condition is left out of a batch with that probability, with `joint_dropout` all of them at once. `shared_noise` is
    that of `frame_noise`. `share` (i, n) makes only the i-th of n equal parts of the batch. ValueError if the data
    hold fewer clips than a batch, or clips fewer frames, or the batch has no n equal parts.
    """
    if batch_size % share[1]:
        raise ValueError(f"a batch of {batch_size} has no {share[1]} equal parts: choose a multiple for batch_size")
    size = batch_size // share[1]
    mine = slice(share[0] * size, (share[0] + 1) * size)
    data = _part(data, _rows_at(data, position, batch_size, seed)[mine])
    rows = range(size)
    starts = torch.randint(_spare(data, frames) + 1, (batch_size,), generator=_generator(seed, 4, position)).tolist()
    windows = _windows(data["video"].shape[2], frames, starts[mine])
    batch = {k: take(data[k], k, rows, windows) for k in _columns(data, conditions)}
    generator = _generator(seed, 2, position)
    batch["t"] = torch.rand(batch_size, generator=generator)[mine]
    batch["noise"] = frame_noise((batch_size, *batch["video"].shape[1:]), shared_noise, generator)[mine]
    droppable = list(dict.fromkeys((*CONDITIONS, *(conditions or ()))))
    dropped = [c for c in droppable if torch.rand((), generator=generator) < condition_dropout]
    if joint_dropout and torch.rand((), generator=generator) < joint_dropout:
        dropped = droppable
    for condition in dropped:
        for name in (condition, *BESIDE.get(condition, ())):
            batch.pop(name, None)
    return batch


def fixed_batches(
    data: Data,
    *,
    batch_size: int,
    seed: int = 0,
    frames: int | None = None,
    conditions: Sequence[str] | None = None,
    shared_noise: float = 0.0,
    draws: int = 1,
) -> list[Batch]:
    """Return all clips in order with fixed noise and times spread evenly over (0, 1), for held-out losses.

    Clips with more than `frames` frames are cut at places spread evenly over them. `draws` takes every clip so often.
    Clips of different shapes come bucket by bucket.
    """
    if len(buckets := _buckets(data)) > 1:
        own = {"batch_size": batch_size, "seed": seed, "frames": frames, "conditions": conditions,
               "shared_noise": shared_noise, "draws": draws}  # fmt: skip
        return [batch for bucket in buckets for batch in fixed_batches(_part(data, bucket), **own)]  # type: ignore[arg-type]
    clips, spare = len(data["video"]), _spare(data, frames)
    count = clips * draws
    generator = _generator(seed, 3)
    t = (torch.randperm(count, generator=generator) + 0.5) / count
    noise = frame_noise((count, *_one(data, frames)), shared_noise, generator)
    starts = [round(spare * ((i * 0.618) % 1)) for i in range(count)]
    batches = []
    for first in range(0, count, batch_size):
        chosen = range(first, min(first + batch_size, count))
        windows = _windows(data["video"].shape[2], frames, [starts[i] for i in chosen])
        batch = {k: take(data[k], k, [i % clips for i in chosen], windows) for k in _columns(data, conditions)}
        batches.append(batch | {"t": t[first : first + batch_size], "noise": noise[first : first + batch_size]})
    return batches


def _one(data: Data, frames: int | None) -> tuple[int, ...]:
    """Return the shape of one clip, cut to `frames`."""
    _, channels, whole, *sides = data["video"].shape
    return (channels, frames or whole, *sides)


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """Move a batch's tensors."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def load_data(
    config: "RunConfig", split: str, on_progress: Callable[[float], Any] | None = None
) -> tuple[Data, list[dict[str, str]]]:
    """Load a run's clips, "train", "test" or "hard", and the list of clips that could not be read ({"id", "error"}).

    Drawn figures of the two splits share neither people nor motions. A folder's are as its manifest says; of a
    prepared folder latents are made first where the run has an autoencoder, and what a pipeline's folder needs. Of the
    held-out splits there are at most `held_out_clips`, spread evenly over the split.
    """
    if config.data == "figures":
        count, seed = (config.clips, 0) if split == "train" else (config.held_out_clips, 777)
        return figures(count, domain=config.domain, frames=config.frames, size=config.size, seed=seed), []
    limit = config.held_out_clips if split != "train" else None
    if is_pipeline(config.model):
        from entprog.data.encode import load_encoded

        return load_encoded(config, split, on_progress, limit), []
    if is_prepared(config.data):
        from entprog.models.autoencoder import Autoencoder

        autoencoder = Autoencoder(config.autoencoder).to(best_device()) if config.autoencoder else None
        return load_split(config.data, split, autoencoder, on_progress, limit), []
    if config.autoencoder:
        raise ValueError(f"{config.data} is not prepared: run entprog prepare before training with an autoencoder")
    from entprog.data.video import load_clips

    clips, errors = load_clips(
        config.data, split=split, size=config.size, frames=config.frames, stride=config.frame_stride
    )
    count = len(clips["video"])
    rows = spread_evenly(count, limit or count)
    return {k: v[rows] for k, v in clips.items() if isinstance(v, Tensor)}, errors
