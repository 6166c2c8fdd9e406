"""Skeletons: the COCO-17 keypoints, other detectors' layouts mapped to them, and the pose map drawn from them.

Keypoints are tensors (..., 17, 3): x and y in pixels of the frame they belong to, and a visibility in [0, 1].
A pose map is (..., 3, H, W) in [0, 1], coloured limbs on black; its drawing style is named POSE_STYLE, because maps
drawn in another style are not interchangeable.
"""

import torch
from torch import Tensor

POSE_STYLE = "entprog-coco17-v1"
VISIBLE = 0.3  # keypoints of a lower visibility are not drawn, so nobody may ask for them, count them or frame them

COCO17 = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
    "right_ankle",
)  # fmt: skip

# Where each COCO-17 keypoint stands in other layouts.
TO_COCO17 = {
    "coco17": tuple(range(17)),
    "blazepose33": (0, 2, 5, 7, 8, 11, 12, 13, 14, 15, 16, 23, 24, 25, 26, 27, 28),
}

# (from, to, RGB): left limbs warm, right limbs cold, so that a mirrored body gives another map.
LIMBS: tuple[tuple[int, int, tuple[float, float, float]], ...] = (
    (11, 13, (1.0, 0.3, 0.0)),
    (13, 15, (1.0, 0.6, 0.0)),
    (12, 14, (0.0, 0.3, 1.0)),
    (14, 16, (0.0, 0.7, 1.0)),
    (11, 12, (0.5, 0.5, 0.5)),
    (5, 11, (0.6, 0.3, 0.3)),
    (6, 12, (0.3, 0.3, 0.6)),
    (5, 6, (0.8, 0.8, 0.8)),
    (5, 7, (1.0, 0.0, 0.3)),
    (7, 9, (1.0, 0.0, 0.8)),
    (6, 8, (0.0, 0.8, 0.2)),
    (8, 10, (0.5, 1.0, 0.0)),
    (0, 5, (1.0, 1.0, 0.3)),
    (0, 6, (0.6, 1.0, 1.0)),
)


def to_coco17(points: Tensor, layout: str) -> Tensor:
    """Pick the COCO-17 keypoints out of another layout.

    Shapes: points (..., K, 3) -> (..., 17, 3). ValueError for a layout that TO_COCO17 does not list.
    """
    if layout not in TO_COCO17:
        raise ValueError(f"keypoint layout {layout!r} is unknown: choose one of {sorted(TO_COCO17)}")
    return points[..., list(TO_COCO17[layout]), :]


def pixel_grid(height: int, width: int) -> Tensor:
    """Return the pixel centres as x, y pairs, (H, W, 2)."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack((x, y), dim=-1)


def capsule(grid: Tensor, start: Tensor, end: Tensor, radius: Tensor | float) -> Tensor:
    """Coverage of the pixels by line segments with round ends, antialiased over one pixel.

    Shapes: grid (H, W, 2), start and end (..., 2) and radius (...) in pixels -> (..., H, W) in [0, 1].
    """
    start, end = start[..., None, None, :], end[..., None, None, :]
    along = end - start
    share = ((grid - start) * along).sum(-1) / along.square().sum(-1).clamp(min=1e-6)
    distance = (grid - start - share.clamp(0, 1)[..., None] * along).norm(dim=-1)
    if isinstance(radius, Tensor):
        radius = radius[..., None, None]
    return (radius - distance + 0.5).clamp(0, 1)


def draw_skeleton(points: Tensor, height: int, width: int, *, threshold: float = VISIBLE) -> Tensor:
    """Draw the pose map of COCO-17 keypoints; limbs with an end less visible than `threshold`, or NaN, are left out.

    Shapes: points (..., 17, 3) in pixels -> (..., 3, H, W) in [0, 1].
    """
    grid = pixel_grid(height, width)
    radius = max(0.7, 0.014 * max(height, width))
    canvas = torch.zeros(*points.shape[:-2], 3, height, width)
    visible = (points[..., 2] >= threshold) & points.isfinite().all(-1)
    for start, end, colour in LIMBS:
        seen = (visible[..., start] & visible[..., end])[..., None, None]
        cover = torch.where(seen, capsule(grid, points[..., start, :2], points[..., end, :2], radius), 0.0)
        rgb = torch.tensor(colour)[:, None, None]
        canvas = canvas + cover.unsqueeze(-3) * (rgb - canvas)
    return canvas
