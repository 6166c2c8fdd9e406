"""From a tracked person to training pixels: smooth the track, frame the body, cut, label.

Letters: F frames, H, W pixels. Boxes are (left, top, width, height) in whole pixels of the source; positions are
continuous, the centre of the first pixel is (0.5, 0.5).
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from entprog.data.pose import VISIBLE
from entprog.data.prepared import LABELS

Box = tuple[int, int, int, int]

_FACE_SEEN = 0.5
_CUT_OFF = 0.02  # share of a box's side that a body may stick out: less than its outline's own uncertainty
_FACE = slice(0, 5)  # nose, eyes, ears


def bucket_sizes(size: int, aspects: Sequence[str]) -> list[tuple[int, int]]:
    """Return the (height, width) of every aspect such as "9:16" (width to height), each of about size x size pixels.

    Sizes are multiples of 32, what video autoencoders with patches need; of 16 below 256 pixels. ValueError for a size
    that is not such a multiple and for an aspect that is not two positive numbers.
    """
    step = 32 if size >= 256 else 16
    if size < step or size % step:
        raise ValueError(f"size {size} must be a positive multiple of {step}")
    sizes = []
    for aspect in aspects:
        try:
            across, down = (int(part) for part in aspect.split(":"))
            ratio = float(Fraction(across, down)) ** 0.5
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(
                f"aspect {aspect!r} is not width:height: choose for example '1:1', '3:4', '9:16'"
            ) from error
        if not 0.2 < ratio < 5:
            raise ValueError(f"aspect {aspect!r} is too extreme: try '1:1', '3:4', '9:16'")
        height, width = (max(step, round(size * r / step) * step) for r in (1 / ratio, ratio))
        sizes.append((height, width))
    return sorted(set(sizes))


def smooth_track(points: Tensor, fps: float, seconds: float = 0.04) -> Tensor:
    """Take the jitter out of a track, without delay and without shrinking straight motion.

    Every coordinate becomes a local linear fit over time, weighted by a Gaussian of that many seconds and by the
    confidences. A joint that leaves its neighbours by more than half its body's torso for a single frame, and comes
    back, is put between them first. Shapes: (F, 17, 3) without NaN -> (F, 17, 3); confidences are kept. ValueError
    for fps or seconds that are not positive.
    """
    if fps <= 0 or seconds <= 0:
        raise ValueError(f"fps {fps} and seconds {seconds} must be positive")
    if len(points) < 3:
        return points.clone()
    where = _without_spikes(points).double()[..., :2]
    time = torch.arange(len(points), dtype=torch.float64) / fps
    apart = time[None, :] - time[:, None]  # (F, F), of the frame that is fitted to the frames it is fitted from
    near = torch.exp(-0.5 * (apart / seconds) ** 2)
    sure = points[..., 2].double() + 1e-3  # (F, 17)
    s0, s1, s2 = (torch.einsum("fg,gk->fk", near * apart**n, sure) for n in range(3))
    t0, t1 = (torch.einsum("fg,gk,gkc->fkc", near * apart**n, sure, where) for n in range(2))
    spread = (s0 * s2 - s1**2)[..., None]
    fitted = (s2[..., None] * t0 - s1[..., None] * t1) / spread.clamp(min=1e-30)
    enough = spread > 1e-9 * (s0[..., None] / fps) ** 2  # a frame without neighbours in reach stays as it is
    out = points.clone()
    out[..., :2] = torch.where(enough, fitted, where).to(points.dtype)
    return out


def _without_spikes(points: Tensor) -> Tensor:
    """Put joints that jump away for one frame between their neighbours in time."""
    out = points.clone()
    before, now, after = points[:-2, :, :2], points[1:-1, :, :2], points[2:, :, :2]
    between = (before + after) / 2
    torso = body_scale(points)[1:-1, None]
    spike = ((now - between).norm(dim=-1) > 0.5 * torso) & ((before - after).norm(dim=-1) < 0.25 * torso)
    out[1:-1, :, :2] = torch.where(spike[..., None], between, now)
    return out


def body_scale(points: Tensor) -> Tensor:
    """Return the torso's length in pixels, or 1.2 times the shoulders' width if larger, (..., 17, 3) -> (...)."""
    xy = points[..., :2]
    torso = (xy[..., [5, 6], :].mean(-2) - xy[..., [11, 12], :].mean(-2)).norm(dim=-1)
    return torch.maximum(torso, 1.2 * (xy[..., 5, :] - xy[..., 6, :]).norm(dim=-1)).clamp(min=1e-3)


def face_circle(points: Tensor) -> Tensor:
    """Return centre x, y and radius of the face, (..., 17, 3) -> (..., 3).

    The centre is the middle of the nose and the eyes, a little lower, where noses are; the radius comes from the
    distances of the ears and of the nose from the ears (whichever a profile leaves), and is at least a sixth of the
    torso. A head seen from behind has one too: detectors guess where the nose would be.
    """
    face = points[..., _FACE, :2]
    ears = (face[..., 3, :] - face[..., 4, :]).norm(dim=-1)
    nose = (face[..., 3:, :] - face[..., :1, :]).norm(dim=-1).amax(-1)
    radius = 0.8 * torch.stack((ears, 1.2 * nose, 0.2 * body_scale(points)), -1).amax(-1)
    return torch.cat((face[..., [0, 0, 1, 2], :].mean(-2), radius[..., None]), -1)


def face_seen(points: Tensor) -> Tensor:
    """Whether the nose and one eye are visible, (..., 17, 3) -> (...) bool."""
    return (points[..., 0, 2] >= _FACE_SEEN) & (points[..., 1:3, 2].amax(-1) >= _FACE_SEEN)


def body_extent(points: Tensor) -> tuple[float, float, float, float]:
    """Return left, top, right, bottom of all visible joints and heads of (F, 17, 3); NaN if nothing is visible."""
    seen = points[..., 2] >= VISIBLE
    joints = points[seen][:, :2]
    heads = face_circle(points)[seen[..., 0]]
    reach = 1.4 * heads[:, 2:]  # the top of the head lies above the face
    every = torch.cat((joints, heads[:, :2] - reach, heads[:, :2] + reach))
    if not len(every):
        return (torch.nan,) * 4
    low, high = every.amin(0).tolist(), every.amax(0).tolist()
    return low[0], low[1], high[0], high[1]


def crop_box(
    extent: tuple[float, float, float, float], shape: tuple[int, int], size: tuple[int, int], *, margin: float = 0.1
) -> Box:
    """Return the box with the proportions of `size` (h, w) around an extent, inside a frame of `shape` (H, W).

    The box keeps `margin` times the extent's longer side free on every side, is moved where it would leave the frame,
    and made smaller where it is larger than the frame: no pixel is ever invented.
    """
    left, top, right, bottom = extent
    free = margin * max(right - left, bottom - top)
    aspect = size[1] / size[0]
    height = max(bottom - top + 2 * free, (right - left + 2 * free) / aspect)
    height = min(height, shape[0], shape[1] / aspect)
    h, w = max(1, round(height)), max(1, min(shape[1], round(height * aspect)))
    x, y = round((left + right - w) / 2), round((top + bottom - h) / 2)
    return min(max(x, 0), shape[1] - w), min(max(y, 0), shape[0] - h), w, h


def covers(box: tuple[float, float, float, float], extent: tuple[float, float, float, float]) -> bool:
    """Whether an extent lies inside a box."""
    left, top, width, height = box
    return left <= extent[0] and top <= extent[1] and extent[2] <= left + width and extent[3] <= top + height


def holds(box: Box, extent: tuple[float, float, float, float], shape: tuple[int, int]) -> bool:
    """Whether a box cuts nothing off a body that its frame of `shape` (H, W) shows, but for 2 % of the box's sides."""
    left, top, width, height = box
    across, down = _CUT_OFF * width, _CUT_OFF * height
    shown = (max(extent[0], 0), max(extent[1], 0), min(extent[2], shape[1]), min(extent[3], shape[0]))
    return covers((left - across, top - down, width + 2 * across, height + 2 * down), shown)


def cut(image: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    """Cut a box out of (C, H, W) uint8 and resize it, bilinear and antialiased, to (C, *size) uint8.

    Where the box leaves the frame (a face at the border) the border is repeated.
    """
    left, top, width, height = box
    rows = torch.arange(top, top + height).clamp(0, image.shape[-2] - 1)
    columns = torch.arange(left, left + width).clamp(0, image.shape[-1] - 1)
    part = image[:, rows][:, :, columns][None].float()
    out = interpolate(part, size=size, mode="bilinear", antialias=True, align_corners=False)
    return out[0].round().clamp(0, 255).to(torch.uint8)


def to_box(points: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    """Take keypoints from pixels of the source to pixels of the cut, (..., 3) -> (..., 3); outside none is visible."""
    left, top, width, height = box
    out = points.clone()
    out[..., 0] = (points[..., 0] - left) * (size[1] / width)
    out[..., 1] = (points[..., 1] - top) * (size[0] / height)
    inside = (out[..., :2] >= 0).all(-1) & (out[..., :2] < torch.tensor((size[1], size[0]))).all(-1)
    out[..., 2] *= inside
    return out


def cut_mask(mask: np.ndarray, shape: tuple[int, int], box: Box, size: tuple[int, int]) -> Tensor:
    """Cut a box of the source of `shape` (H, W) out of its reduced mask (h, w) bool, -> (*size) bool.

    The box is not rounded to the mask's pixels: one of them may be many of the cut's.
    """
    left, top, width, height = box
    h, w = mask.shape
    corners = (left * w / shape[1], top * h / shape[0], (left + width) * w / shape[1], (top + height) * h / shape[0])
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    small = image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=corners)  # antialiased, like the picture
    return torch.from_numpy(np.array(small)) > 127


def label(mask: Tensor, points: Tensor) -> Tensor:
    """Label the pixels of a cut: person where the mask is, face inside the face's circle where the mask is too.

    Shapes: mask (H, W) bool, points (17, 3) in its pixels -> (H, W) uint8, values of LABELS.
    """
    labels = mask.to(torch.uint8) * LABELS["person"]
    if face_seen(points):
        x, y, radius = face_circle(points).tolist()
        rows = torch.arange(mask.shape[0])[:, None] + 0.5 - y
        columns = torch.arange(mask.shape[1])[None] + 0.5 - x
        labels[mask & (rows**2 + columns**2 <= radius**2)] = LABELS["face"]
    return labels


def face_boxes(points: Tensor, *, margin: float = 1.5) -> list[Box]:
    """Return a square box around the face in every frame of (F, 17, 3), all of one side so that faces do not pulse."""
    circles = face_circle(points)
    side = max(2, round(2 * margin * float(circles[:, 2].quantile(0.75))))
    return [(round(x - side / 2), round(y - side / 2), side, side) for x, y, _ in circles.tolist()]
