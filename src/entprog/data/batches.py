"""Batches as a pure function of (seed, position): what is trained on at step 1,234 can be made again after a crash.

A data set is a dict of tensors with the clips on the first axis: `video` (N, C, F, H, W), `pose` (N, 3, F, H_p, W_p),
`reference` (N, C, H, W), and what else a source has. A batch holds some rows of it and its own times `t` (B,) and
`noise` (B, C, F, H, W); a condition that is dropped for guidance is missing from it.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entprog.data.synthetic import figures

if TYPE_CHECKING:
    from entprog.config import RunConfig

Data = dict[str, Tensor]
CONDITIONS = ("pose", "reference")


def _generator(*numbers: int) -> torch.Generator:
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63)
    return torch.Generator().manual_seed(seed)


def batch_at(data: Data, position: int, *, batch_size: int, seed: int, condition_dropout: float = 0.0) -> Data:
    """Return the batch at a position of an endless, shuffled stream; t is uniform in [0, 1].

    Every clip comes once per epoch. With `condition_dropout` each condition is left out of a batch with that
    probability. ValueError if the data hold fewer clips than a batch.
    """
    count = len(data["video"])
    if count < batch_size:
        raise ValueError(f"{count} clips do not fill a batch of {batch_size}: lower batch_size or add clips")
    per_epoch = count // batch_size
    epoch, index = divmod(position, per_epoch)
    order = torch.randperm(count, generator=_generator(seed, 1, epoch))
    rows = order[index * batch_size : (index + 1) * batch_size]
    generator = _generator(seed, 2, position)
    batch = {k: data[k][rows] for k in ("video", *CONDITIONS) if k in data}
    batch["t"] = torch.rand(batch_size, generator=generator)
    batch["noise"] = torch.randn(batch["video"].shape, generator=generator)
    for condition in CONDITIONS:
        if torch.rand((), generator=generator) < condition_dropout:
            batch.pop(condition, None)
    return batch


def fixed_batches(data: Data, *, batch_size: int, seed: int = 0) -> list[Data]:
    """Return all clips in order with fixed noise and times spread evenly over (0, 1), for held-out losses."""
    count = len(data["video"])
    generator = _generator(seed, 3)
    t = (torch.randperm(count, generator=generator) + 0.5) / count
    noise = torch.randn(data["video"].shape, generator=generator)
    whole: dict[str, Any] = {k: data[k] for k in ("video", *CONDITIONS) if k in data} | {"t": t, "noise": noise}
    return [{k: v[i : i + batch_size] for k, v in whole.items()} for i in range(0, count, batch_size)]


def to_device(batch: Data, device: torch.device | str) -> Data:
    """Move a batch's tensors."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def load_data(config: "RunConfig", split: str) -> tuple[Data, list[dict[str, str]]]:
    """Load a run's clips, "train" or "test", and the list of clips that could not be read ({"id", "error"}).

    Drawn figures of the two splits share neither people nor motions. A folder's are as its manifest says.
    """
    if config.data == "figures":
        count, seed = (config.clips, 0) if split == "train" else (config.held_out_clips, 777)
        return figures(count, domain=config.domain, frames=config.frames, size=config.size, seed=seed), []
    from entprog.data.video import load_clips

    clips, errors = load_clips(
        config.data, split=split, size=config.size, frames=config.frames, stride=config.frame_stride
    )
    return {k: v for k, v in clips.items() if isinstance(v, Tensor)}, errors
