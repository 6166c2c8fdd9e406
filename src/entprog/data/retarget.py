"""Fit the skeleton of one person to the body of another: as large, standing in the same place, limb by limb if asked.

A pose map drawn from a tall driving person makes the generated person tall, whatever the reference picture shows; so
the keypoints are rescaled before they are drawn.

Letters: F frames. Keypoints are COCO-17 in pixels, (..., 17, 3): x, y, visibility.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from entprog.data.pose import VISIBLE

Anchor = Literal["first", "median"]

_LONG = 0.9  # of the lengths a bone has in a video, the quantile taken as its own: most frames foreshorten it
_LIMB_RANGE = (0.67, 1.5)  # beyond this a limb's ratio is foreshortening in the single reference, not anatomy

# Points of the body tree: 0 to 16 are COCO-17, then the middles of the hips and of the shoulders.
_HIPS, _SHOULDERS = 17, 18
# (name, from, to), parents first; both sides of a body share one ratio.
_BONES = (
    ("torso", _HIPS, _SHOULDERS), ("hips", _HIPS, 11), ("hips", _HIPS, 12), ("shoulders", _SHOULDERS, 5),
    ("shoulders", _SHOULDERS, 6), ("thigh", 11, 13), ("thigh", 12, 14), ("shin", 13, 15), ("shin", 14, 16),
    ("upper arm", 5, 7), ("upper arm", 6, 8), ("forearm", 7, 9), ("forearm", 8, 10),
    ("head", _SHOULDERS, 0), ("head", _SHOULDERS, 1), ("head", _SHOULDERS, 2), ("head", _SHOULDERS, 3),
    ("head", _SHOULDERS, 4),
)  # fmt: skip
_SIZE_BONES = ("torso", "thigh", "shin")  # what the size of the body is read from
_FALLBACK_BONES = ("torso", "shoulders", "upper arm", "forearm", "head")  # for pictures that show no legs


def _with_middles(points: Tensor) -> Tensor:
    """Append the middles of hips and shoulders; seen if both of their ends are. (..., 17, 3) -> (..., 19, 3)."""
    middles = []
    for left, right in ((11, 12), (5, 6)):
        ends = points[..., [left, right], :]
        middles.append(torch.cat((ends[..., :2].mean(-2), ends[..., 2:].amin(-2)), -1))
    return torch.cat((points, torch.stack(middles, -2)), -2)


def _lengths(points: Tensor) -> dict[str, float]:
    """Return the length of every bone that is seen in any frame, the longer side of the body. (F, 19, 3)."""
    lengths: dict[str, float] = {}
    for name, start, end in _BONES:
        seen = (points[:, [start, end], 2] >= VISIBLE).all(-1)
        if seen.any():
            all_frames = (points[seen, end, :2] - points[seen, start, :2]).norm(dim=-1)
            lengths[name] = max(lengths.get(name, 0.0), float(all_frames.quantile(_LONG)))
    return {name: length for name, length in lengths.items() if length > 0}


def _ratios(driving: Tensor, reference: Tensor) -> tuple[float, dict[str, float]]:
    """Return the ratio of the bodies' sizes, reference to driving, and that of every bone seen in both."""
    own, wanted = _lengths(driving), _lengths(reference[None])
    ratios = {name: wanted[name] / own[name] for name in own if name in wanted}
    used = [ratios[n] for n in _SIZE_BONES if n in ratios] or [ratios[n] for n in _FALLBACK_BONES if n in ratios]
    if not used:
        raise ValueError(
            f"no bone is seen in both bodies (driving: {sorted(own)}, reference: {sorted(wanted)}), so their sizes "
            f"cannot be compared: choose a reference that shows torso or legs with a visibility of at least {VISIBLE}"
        )
    return float(torch.tensor(used, dtype=torch.float64).quantile(0.5)), ratios


def _rebuilt(points: Tensor, size: float, ratios: dict[str, float]) -> Tensor:
    """Walk the body tree from the hips and give every bone its own ratio, directions kept. (F, 19, 3)."""
    low, high = _LIMB_RANGE
    out = points.clone()
    out[..., :2] *= size  # so that the hips travel as far as a body of the new size would
    for name, start, end in _BONES:
        ratio = size * min(max(ratios.get(name, size) / size, low), high)
        out[:, end, :2] = out[:, start, :2] + ratio * (points[:, end, :2] - points[:, start, :2])
    return out


def _ground(points: Tensor) -> Tensor:
    """Return where the bodies stand, (F, 2): x of the hips, y of the lower ankle (of the hips if no ankle is seen)."""
    ankles = torch.where(points[:, [15, 16], 2] >= VISIBLE, points[:, [15, 16], 1], -torch.inf).amax(-1)
    hips = points[:, _HIPS]
    return torch.stack((hips[:, 0], torch.where(ankles.isfinite(), ankles, hips[:, 1])), -1)


def fit_pose(
    keypoints: Tensor, reference_keypoints: Tensor, *, anchor: Anchor = "first", per_limb: bool = False
) -> Tensor:
    """Rescale and shift a driving skeleton so that its size and place are those of the reference body.

    x' = s (x - a) + r, where s is the median over torso, thighs and shins of (length in the reference) / (length in
    the driving video: the 0.9 quantile over its frames, since foreshortening only shortens), r is where the reference
    stands (x of its hips, y of its lower foot) and a where the driving person stands: in the first frame that shows
    it, so that the video starts where the reference is, or with anchor="median" as the median over the frames.
    Without visible ankles in both, the hips are the anchor; without legs, arms and head give s. All frames move
    alike, so walking and jumping are kept, scaled by s.

    per_limb=True also gives every bone the reference's proportion (limited to 0.67 to 1.5 times s, because a single
    picture foreshortens too), walking from the hips outwards, the head as one piece.

    Shapes: keypoints (F, 17, 3), reference_keypoints (17, 3), in pixels -> (F, 17, 3); visibilities are kept and NaN
    stays NaN. ValueError for other shapes, an unknown anchor, and bodies that share no visible bone or no visible hips.
    """
    if keypoints.ndim != 3 or keypoints.shape[1:] != (17, 3) or reference_keypoints.shape != (17, 3):
        found = tuple(keypoints.shape), tuple(reference_keypoints.shape)
        raise ValueError(f"keypoints are (F, 17, 3) and of the reference (17, 3), not {found[0]} and {found[1]}")
    if anchor not in get_args(Anchor):
        raise ValueError(f"anchor {anchor!r} is unknown: choose one of {get_args(Anchor)}")
    driving, reference = _with_middles(keypoints), _with_middles(reference_keypoints)
    size, ratios = _ratios(driving, reference)
    scaled = _rebuilt(driving, size, ratios if per_limb else {})
    feet = [(body[..., [15, 16], 2] >= VISIBLE).any(-1) for body in (scaled, reference)]
    by_feet = bool(feet[1]) and bool(feet[0].any())
    if not by_feet:  # one of the two shows no foot: then neither may be placed by its feet
        scaled, reference = scaled.clone(), reference.clone()
        scaled[:, [15, 16], 2] = reference[[15, 16], 2] = 0
    usable = (scaled[:, _HIPS, 2] >= VISIBLE) & (feet[0] if by_feet else True)
    if not usable.any() or reference[_HIPS, 2] < VISIBLE:
        raise ValueError(
            "hips are seen in no usable driving frame or not in the reference: there is nothing to place by"
        )
    stands = _ground(scaled[usable])
    place = stands[0] if anchor == "first" else stands.quantile(0.5, dim=0)
    out = keypoints.clone()
    out[..., :2] = scaled[:, :17, :2] + (_ground(reference[None])[0] - place)
    return out
