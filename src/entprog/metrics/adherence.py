"""Does the video obey its conditions: the pose it was driven with, the clothes of its reference, and steadiness.

Pose: keypoints found on the generated frames against the driving ones. Appearance: colours of the garments inside the
masks of the true clip against those of the reference. Steadiness: change between frames beyond that of the truth.
Faces are in identity.py. Every function takes one clip.

Letters: F frames, R regions, H, W pixels. Keypoints are COCO-17: x, y in pixels, visibility.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from entprog.data.pose import VISIBLE
from entprog.data.prepared import LABELS
from entprog.metrics.frame import _pair

ALPHA = 0.1

# COCO's keypoint evaluation: k = 2 sigma, per keypoint.
_SIGMAS = (26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89)
COCO_SIGMAS = tuple(s / 1000 for s in _SIGMAS)

# Compared in colour. Real footage has no garments, only `person`.
REGIONS = ("top", "bottom", "skin", "hair", "shoes", "person")
_MIN_PIXELS = 16  # of a region over the clip: fewer have no colour to speak of

_SRGB_TO_XYZ = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
_WHITE = (0.95047, 1.0, 1.08883)  # D65, 2 degrees


def _pose_errors(found: Tensor, driving: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distances (F, 17) in pixels, inf where nothing was found; what is visible, (F, 17); its boxes (F, 2)."""
    if found.shape != driving.shape or driving.ndim != 3 or driving.shape[1:] != (17, 3):
        raise ValueError(f"keypoints are (F, 17, 3) twice, not {tuple(found.shape)} and {tuple(driving.shape)}")
    found, driving = found.double(), driving.double()
    asked = (driving[..., 2] >= VISIBLE) & driving.isfinite().all(-1)
    asked = asked & (asked.sum(1, keepdim=True) >= 2)  # one point spans no box
    distance = (found[..., :2] - driving[..., :2]).norm(dim=-1)
    distance = torch.where(found[..., :2].isfinite().all(-1), distance, torch.inf)
    low = torch.where(asked[..., None], driving[..., :2], torch.inf).amin(1)
    high = torch.where(asked[..., None], driving[..., :2], -torch.inf).amax(1)
    return distance, asked, (high - low).clamp(min=0)


def pck(found: Tensor, driving: Tensor, *, alpha: float = ALPHA) -> float:
    """Percentage of correct keypoints as a share in [0, 1] (Yang and Ramanan 2013).

    A keypoint is correct within alpha * max(h, w), where h and w are the sides of the box around the frame's visible
    driving keypoints. (Others take the torso or the head for that length: their numbers differ.) Keypoints with a
    driving visibility below VISIBLE and frames with fewer than two are not asked for; those not found (NaN) are wrong.
    Shapes: (F, 17, 3) twice. NaN if nothing was asked for; ValueError for other shapes.
    """
    distance, asked, box = _pose_errors(found, driving)
    correct = distance <= alpha * box.amax(1, keepdim=True)
    return (correct & asked).sum().double().div(asked.sum()).item()


def oks(found: Tensor, driving: Tensor, area: Tensor | None = None) -> float:
    """Object keypoint similarity of COCO, averaged over frames, in [0, 1].

    mean over visible i of exp(-d_i^2 / (2 s^2 k_i^2)), s^2 the person's area in pixels, k_i = 2 sigma_i. `area` (F,)
    is the true area; without it 0.53 of the box around the visible keypoints, as is usual where there are no masks.
    Frames with fewer than two visible keypoints are left out; keypoints not found (NaN) count 0. Shapes: (F, 17, 3)
    twice. NaN if no frame is left; ValueError for other shapes.
    """
    distance, asked, box = _pose_errors(found, driving)
    size = box.prod(1) * 0.53 if area is None else area.double()
    spread = 2 * size.clamp(min=1)[:, None] * (2 * torch.tensor(COCO_SIGMAS, dtype=torch.float64)).square()
    similarity = torch.where(asked, torch.exp(-distance.square() / spread), 0.0)  # NaN where a driving one is
    frames = asked.any(1)
    return (similarity.sum(1) / asked.sum(1))[frames].mean().item()


def keypoint_error(found: Tensor, driving: Tensor) -> float:
    """Mean distance of the keypoints that were asked for and found, in box sizes max(h, w) as in `pck`.

    Unlike `pck` it cannot count what was not found. Shapes: (F, 17, 3) twice. NaN if there is none.
    """
    distance, asked, box = _pose_errors(found, driving)
    kept = asked & distance.isfinite()
    return (distance / box.amax(1, keepdim=True).clamp(min=1))[kept].mean().item()


def rgb_to_lab(frames: Tensor) -> Tensor:
    """Convert sRGB in [0, 1] to CIELAB under D65 (CIE 15; IEC 61966-2-1), (..., 3, H, W) -> the same, float64.

    L runs from 0 to 100; a distance of about 2.3 is just noticeable.
    """
    x = frames.double()
    linear = torch.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92)
    xyz = torch.einsum("ij,...jhw->...ihw", torch.tensor(_SRGB_TO_XYZ, dtype=torch.float64), linear)
    xyz = xyz / torch.tensor(_WHITE, dtype=torch.float64)[:, None, None]
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp(min=0) ** (1 / 3), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    fx, fy, fz = f.unbind(-3)
    return torch.stack((116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)), dim=-3)


def region_colours(frames: Tensor, labels: Tensor) -> Tensor:
    """Mean CIELAB colour of each of REGIONS over all frames, NaN for one that shows fewer than 16 pixels.

    Shapes: frames (F, 3, H, W) in [0, 1], labels (F, H, W) with the values of LABELS -> (R, 3).
    """
    if frames.shape[:1] + frames.shape[2:] != labels.shape:
        raise ValueError(
            f"frames {tuple(frames.shape)} and labels {tuple(labels.shape)} differ: (F, 3, H, W), (F, H, W)"
        )
    pixels, flat = rgb_to_lab(frames).movedim(1, -1).reshape(-1, 3), labels.reshape(-1)
    colours = []
    for name in REGIONS:
        inside = pixels[flat == LABELS[name]]
        colours.append(inside.mean(0) if len(inside) >= _MIN_PIXELS else torch.full((3,), torch.nan).double())
    return torch.stack(colours)


def colour_distance(a: Tensor, b: Tensor) -> float:
    """Mean Euclidean CIELAB distance (Delta E 1976) of the regions that both have, (R, 3) twice; NaN without any."""
    return (a - b).norm(dim=1).nanmean().item()


def nearer_to_own(video: Tensor, own: Tensor, other: Tensor) -> float:
    """1 if the colours are nearer to the own reference's than to another person's, else 0; NaN if not comparable.

    A tie is one half. Shapes: colours (R, 3) three times; only regions that all three have are compared.
    """
    shared = (video + own + other).isfinite().all(1)
    if not shared.any():
        return float("nan")
    near, far = (colour_distance(video[shared], x[shared]) for x in (own, other))
    return 0.5 if near == far else float(near < far)


def _change(frames: Tensor, mask: Tensor | None = None) -> float:
    """Mean absolute difference of consecutive frames, where the mask (F-1, H, W) holds; NaN where it never does."""
    steps = frames.diff(dim=0).abs().mean(1)  # (F - 1, H, W)
    return (steps if mask is None else steps[mask]).mean().item()


def flicker(generated: Tensor, truth: Tensor) -> float:
    """Change between consecutive frames beyond that of the truth: mean |x(f+1) - x(f)| minus the same of the truth.

    0 is as lively as the truth, above it flickers or jumps, below it is frozen or smeared. Shapes: (F, 3, H, W) in
    [0, 1] twice. NaN for one frame.
    """
    generated, truth = _pair(generated, truth)
    return _change(generated) - _change(truth)


def background_flicker(generated: Tensor, truth: Tensor, labels: Tensor) -> float:
    """`flicker` where the true clip shows background in both frames: there, nothing of the person should move.

    Shapes: (F, 3, H, W) in [0, 1] twice, labels (F, H, W). NaN for one frame and without background.
    """
    generated, truth = _pair(generated, truth)
    still = labels == LABELS["background"]
    mask = still[1:] & still[:-1]
    return _change(generated, mask) - _change(truth, mask)


def seam(generated: Tensor, truth: Tensor, borders: Sequence[int]) -> float:
    """How much more the video changes where windows meet than elsewhere, beyond the truth's: 0 is seamless.

    Mean |x(f) - x(f-1)| over the first frames f in `borders` minus that over the others. Shapes: (F, 3, H, W) in
    [0, 1] twice. ValueError for borders that are not frames 1 .. F - 1; NaN without a border or without other frames.
    """
    generated, truth = _pair(generated, truth)
    if not set(borders) <= set(range(1, len(generated))):
        raise ValueError(f"borders {list(borders)} must be frames 1 to {len(generated) - 1}")
    meet = torch.zeros(len(generated) - 1, dtype=torch.bool)
    meet[[b - 1 for b in borders]] = True

    def jump(video: Tensor) -> Tensor:
        steps = video.diff(dim=0).abs().flatten(1).mean(1)
        return steps[meet].mean() - steps[~meet].mean()

    return (jump(generated) - jump(truth)).item()


def colour_drift(generated: Tensor, truth: Tensor, labels: Tensor, *, windows: int = 4) -> float:
    """How far the person's colours wander from those of the first window, beyond the truth's: CIELAB units.

    The clip is cut into equal windows; the mean `colour_distance` of the later ones to the first, minus the same of
    the truth, whose light and folds change too. Shapes as in `background_flicker`. NaN for one frame, or if no region
    is seen twice.
    """
    generated, truth = _pair(generated, truth)

    def drift(video: Tensor) -> Tensor:
        parts = zip(video.tensor_split(count), labels.tensor_split(count), strict=True)
        first, *later = [region_colours(*part) for part in parts]
        return torch.tensor([colour_distance(window, first) for window in later]).nanmean()

    count = min(windows, len(generated))
    return float("nan") if count < 2 else (drift(generated) - drift(truth)).item()
