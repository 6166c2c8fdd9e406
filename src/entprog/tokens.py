"""The token axis: training steps on fewer frames and smaller frames of a clip, everything that judges on all of it.

Attention is quadratic in tokens, so half of the frames at half the height and width cost less than an eighth of a step.
A `shrink(batch, tokens) -> batch` knows how a batch is made smaller; `shrinker` builds one for batches of latents or
pixels and what belongs to them. Held-out losses, scores and gradient fidelity never see a batch that was shrunk, and a
run ends at full size (Progressive's axes, token_grid and tokens_until).

Noise is cut, never averaged: the mean of four independent values has half their standard deviation. Places of a smaller
grid can be told to a model that takes them: (i + 1/2) / s - 1/2 for the i-th of a side scaled by s, the middle of what
it stands for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

FRAMES = ("first", "strided")


@dataclass(frozen=True, order=True)
class Tokens:
    """How much of a clip a training step sees: a share of its frames, and a scale of their height and width."""

    frames: float = 1.0
    size: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.frames <= 1 and 0 < self.size <= 1):
            raise ValueError(f"tokens ({self.frames}, {self.size}) are a share of the frames and a scale of their "
                             "height and width: both in (0, 1]")  # fmt: skip

    @property
    def whole(self) -> bool:
        """Whether nothing is left out."""
        return self == WHOLE

    @property
    def share(self) -> float:
        """Return the share of a clip's tokens."""
        return self.frames * self.size**2

    def __str__(self) -> str:
        return f"{self.frames:g} of the frames at {self.size:g} of their size"


WHOLE = Tokens()
Shrink = Callable[[Any, Tokens], Any]


def shrinker(
    layout: Mapping[str, str],
    *,
    noise: Sequence[str] = ("noise",),
    patch: tuple[int, int, int] = (1, 1, 1),
    frames: str = "first",
    scale: str | None = None,
) -> Shrink:
    """Return shrink(batch, tokens) for batches that are dicts of tensors; what `layout` does not name stays whole.

    layout: a key -> its tensor's axes, one letter each, as {"latents": "BCFHW", "noise": "BCFHW", "image": "BCHW"}.
    Axes named F become fewer frames, H and W (the last two, if any) smaller; other letters mean nothing. The first key
    is the video: its frames and sides, multiples of `patch` before and after, decide how much smaller the others get.
    noise: keys whose values are independent of each other. They are cut to size; all others are averaged over areas.
    frames: the "first" ones (of a causal autoencoder's latents exactly those of a shorter clip), or "strided": every
    n-th, n as large as it can be, at least 2. scale: a key for the grid's scale, (B, 3): 1 / n in time, and what height
    and width were scaled by.

    ValueError for a layout that cannot be carried out and, in use, for tensors that do not have it.
    """
    if frames not in FRAMES:
        raise ValueError(f"frames {frames!r} is unknown: choose one of {FRAMES}")
    wrong = {k: v for k, v in layout.items() if set("HW") & set(v) and not v.endswith("HW")}
    if not layout or wrong or not set("FHW") <= set(next(iter(layout.values()))):
        raise ValueError(
            f"layout {dict(layout)} needs a video first, with axes F, H and W, and H and W last wherever they are: "
            "name axes as BCFHW or BFCHW"
        )

    def shrink(batch: Mapping[str, Any], tokens: Tokens) -> Mapping[str, Any]:
        if tokens.whole:
            return batch
        video, letters = next(iter(layout.items()))
        full = _sizes(batch, video, letters)
        shares = {"F": tokens.frames, "H": tokens.size, "W": tokens.size}
        small = {x: kept(full[x], shares[x], unit) for x, unit in zip("FHW", patch, strict=True)}
        stride = _stride(full["F"], small["F"]) if frames == "strided" else 1
        out = dict(batch)
        for key, axes in layout.items():
            if key in batch:
                out[key] = _smaller(batch, key, axes, full, small, stride, key in noise)
        if scale is not None:
            grid = [1 / stride, small["H"] / full["H"], small["W"] / full["W"]]
            out[scale] = torch.tensor(grid, device=batch[video].device).expand(len(batch[video]), 3)
        return out

    return shrink


def kept(count: int, share: float, unit: int = 1) -> int:
    """Return what a share of `count` comes to in whole units: the nearest, at least one. ValueError if count has none.

    ValueError, too, where `count` is no multiple of the unit.
    """
    if count % unit or not count:
        raise ValueError(f"{count} places do not divide into patches of {unit}: give clips that the model takes")
    return max(1, int(count // unit * share + 0.5)) * unit


def _stride(full: int, small: int) -> int:
    """Return the largest n such that a clip has `small` frames when every n-th is taken. ValueError if that is 1."""
    if small == full:
        return 1
    stride = (full - 1) // (small - 1) if small > 1 else full
    if stride == 1:
        most = (full + 1) // 2
        raise ValueError(
            f"every second of {full} frames are {most}, and {small} are asked for, which would be the first in a row: "
            f"choose a share of the frames of at most {most}/{full}, or frames 'first'"
        )
    return stride


def _sizes(batch: Mapping[str, Any], key: str, axes: str) -> dict[str, int]:
    """Return the length of each axis of a batch's tensor by its letter."""
    value = batch.get(key) if isinstance(batch, Mapping) else None
    if not isinstance(value, Tensor) or value.ndim != len(axes):
        found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"shrinking needs a tensor {key!r} of axes {axes}; the batch holds {found}, {key!r} of shape "
                         f"{tuple(getattr(value, 'shape', ()))}")  # fmt: skip
    return dict(zip(axes, value.shape, strict=True))


def _smaller(
    batch: Mapping[str, Any], key: str, axes: str, full: dict[str, int], small: dict[str, int], stride: int, cut: bool
) -> Tensor:
    """Return one tensor of a batch with fewer frames and smaller sides, its sides in the video's proportion."""
    own, value = _sizes(batch, key, axes), batch[key]
    if own.get("F", full["F"]) != full["F"]:
        raise ValueError(
            f"{key!r} has {own['F']} frames and the video {full['F']}: shrink it in a function of your own"
        )
    if "F" in axes:
        at, count = axes.index("F"), small["F"]
        value = value.narrow(at, 0, (count - 1) * stride + 1)[(slice(None),) * at + (slice(None, None, stride),)]
    if "H" not in axes or small["H"] == full["H"] and small["W"] == full["W"]:
        return value
    if any(own[x] * small[x] % full[x] for x in "HW"):
        sides, ratios = (own["H"], own["W"]), (small["H"] / full["H"], small["W"] / full["W"])
        raise ValueError(f"{key!r} of {sides} has no whole sides at {ratios} of them: choose another size of tokens")
    height, width = (own[x] * small[x] // full[x] for x in "HW")
    if cut:
        return value[..., :height, :width]
    if not value.is_floating_point():
        raise ValueError(
            f"{key!r} holds {value.dtype}, which has no averages: leave it out of the layout, or convert it"
        )
    flat = value.flatten(0, -3) if value.ndim > 3 else value
    return nnf.adaptive_avg_pool2d(flat, (height, width)).reshape(*value.shape[:-2], height, width)
