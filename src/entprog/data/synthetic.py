"""Articulated figures drawn in torch: endless, seeded, no download.

A clip is a person (proportions, clothes, background) doing a motion. Both are made from uniform random numbers that
depend on (seed, clip index) alone, so clip 7 is the same whether 8 or 8,000 clips are drawn, and any person can be
drawn in any motion, which is what the swap tests need.

Domains: `source` is what the base weights are pretrained on (plain, dull clothes, plain background, shorter arms'
reach), `target` what is fine-tuned on (saturated two-coloured clothes with patterns, floors, wider proportions).

Letters: N clips, F frames, H = W = size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from entprog.data.pose import capsule, draw_skeleton, pixel_grid

DOMAINS = ("source", "target")
GARMENTS = ("shirt", "trousers")
_PERSON_NUMBERS, _MOTION_NUMBERS = 32, 34


@dataclass(frozen=True)
class People:
    """Who is drawn: proportions (relative to the default body) and colours, RGB in [0, 1]; first axis N."""

    height: Tensor
    width: Tensor
    thickness: Tensor
    head: Tensor
    pattern: Tensor  # (N,) 0 plain, 1 horizontal stripes, 2 vertical halves
    stripes: Tensor  # (N,) stripes per torso length
    colours: dict[str, Tensor]  # name -> (N, 3)


def _numbers(seed: int, indices: range, count: int, salt: int) -> Tensor:
    """Uniform numbers (N, count) that depend on (seed, index, salt) alone."""
    rows = []
    for index in indices:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + index) * 31 + salt)
        rows.append(torch.rand(count, generator=generator))
    return torch.stack(rows)


def _hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """HSV to RGB, each (N,) in [0, 1] -> (N, 3)."""
    shift = torch.tensor([5.0, 3.0, 1.0])
    k = (shift + hue[:, None] * 6) % 6
    return value[:, None] * (1 - saturation[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


def people(seed: int, indices: range, domain: str = "target") -> People:
    """Draw who is in the clips. ValueError for an unknown domain."""
    if domain not in DOMAINS:
        raise ValueError(f"domain {domain!r} is unknown: choose one of {DOMAINS}")
    u = _numbers(seed, indices, _PERSON_NUMBERS, salt=1)
    rich = domain == "target"
    saturation, spread = ((0.65, 0.35) if rich else (0.1, 0.4)), (0.3 if rich else 0.12)

    def garment(i: int) -> Tensor:
        return _hsv(u[:, i], saturation[0] + saturation[1] * u[:, i + 1], 0.35 + 0.6 * u[:, i + 2])

    shirt = garment(8)
    ground = _hsv(u[:, 20], 0.15 + 0.25 * u[:, 21], 0.35 + 0.5 * u[:, 22])
    floor = ground * (0.55 + 0.3 * u[:, 23:24]) if rich else ground
    return People(
        height=1 + spread * (u[:, 0] - 0.6),
        width=1 + 2 * spread * (u[:, 1] - 0.5),
        thickness=1 + 2 * spread * (u[:, 2] - 0.4),
        head=1 + spread * (u[:, 3] - 0.5),
        pattern=(u[:, 4] * 3).floor() if rich else torch.zeros(len(u)),
        stripes=2 + 2 * u[:, 5],
        colours={
            "skin": _hsv(0.04 + 0.05 * u[:, 6], 0.3 + 0.3 * u[:, 7], 0.45 + 0.5 * u[:, 18]),
            "shirt": shirt,
            "shirt2": garment(11) if rich else shirt,
            "trousers": garment(14),
            "hair": _hsv(0.1 * u[:, 17], 0.5 * u[:, 19], 0.1 + 0.5 * u[:, 24]),
            "shoes": _hsv(u[:, 25], 0.4 * u[:, 26], 0.1 + 0.3 * u[:, 27]),
            "background": ground,
            "floor": floor,
        },
    )


def motions(seed: int, indices: range, frames: int, domain: str = "target") -> Tensor:
    """Draw what the figures do: angles and offsets over time, (N, F, 12).

    Columns: shoulder, elbow, hip, knee angle of the left side, then of the right side (radians, 0 = hanging straight
    down, positive = outward), torso lean, root x, root y (share of the image), facing. Sums of sinusoids.
    """
    u = _numbers(seed, indices, _MOTION_NUMBERS, salt=2)
    reach = 2.5 if domain == "target" else 1.2
    time = torch.arange(frames) / 8.0
    speed = 0.5 + 0.9 * u[:, 0]

    def wave(i: int, low: float, high: float, swing: float) -> Tensor:
        base, amplitude = low + (high - low) * u[:, i], swing * u[:, i + 1]
        phase = speed[:, None] * time[None] + u[:, i + 2, None]
        return base[:, None] + amplitude[:, None] * torch.sin(2 * torch.pi * phase)

    columns = []
    for side in range(2):
        i = 1 + 12 * side
        columns += [wave(i, 0.15, reach, 0.9), wave(i + 3, -0.3, 1.4, 0.8)]
        columns += [wave(i + 6, 0.0, 0.45, 0.45), -wave(i + 9, 0.0, 0.5, 0.4).clamp(min=0)]
    columns += [wave(25, -0.12, 0.12, 0.12), wave(28, 0.42, 0.58, 0.08), wave(30, 0.545, 0.575, 0.02)]
    columns += [0.75 + 0.25 * torch.cos(2 * torch.pi * (u[:, 33, None] + 0.15 * time[None]))]
    return torch.stack(columns, dim=-1)


def keypoints(who: People, motion: Tensor, size: int) -> Tensor:
    """Place the COCO-17 keypoints, (N, F, 17, 3) in pixels, all visible."""
    scale = who.height[:, None]
    broad = who.width[:, None] * motion[..., 11]
    lean = torch.stack((motion[..., 8].sin(), -motion[..., 8].cos()), -1)  # pelvis -> neck
    root = motion[..., 9:11]
    neck = root + 0.235 * scale[..., None] * lean
    head = neck + 0.095 * scale[..., None] * lean
    points: dict[int, Tensor] = {0: head}
    across = torch.stack((-lean[..., 1], lean[..., 0]), -1)  # towards the figure's left, the viewer's right

    def limb(start: Tensor, angle: Tensor, length: float, side: float) -> Tensor:
        direction = torch.stack((side * angle.sin(), angle.cos()), -1)
        return start + length * scale[..., None] * direction

    for side, sign in enumerate((1.0, -1.0)):
        a = motion[..., 4 * side : 4 * side + 4].unbind(-1)
        points[1 + side] = head + 0.012 * lean + sign * 0.02 * across
        points[3 + side] = head + sign * 0.045 * across
        shoulder = neck + sign * 0.085 * broad[..., None] * across
        elbow = limb(shoulder, a[0], 0.13, sign)
        hip = root + sign * 0.05 * broad[..., None] * across
        knee = limb(hip, a[2], 0.165, sign)
        points[5 + side], points[7 + side] = shoulder, elbow
        points[9 + side] = limb(elbow, a[0] + a[1], 0.125, sign)
        points[11 + side], points[13 + side] = hip, knee
        points[15 + side] = limb(knee, a[2] + a[3], 0.155, sign)
    xy = torch.stack([points[i] for i in range(17)], dim=-2) * size
    return torch.cat((xy, torch.ones_like(xy[..., :1])), dim=-1)


def _shirt(who: People, grid: Tensor, points: Tensor) -> Tensor:
    """Colour of the shirt at every pixel, (N, F, 3, H, W): plain, striped along the torso, or in two halves."""
    neck, root = points[..., 5:7, :2].mean(-2), points[..., 11:13, :2].mean(-2)
    axis = root - neck
    offset = grid - neck[..., None, None, :]
    along = (offset * axis[..., None, None, :]).sum(-1) / axis.square().sum(-1)[..., None, None]
    beside = offset[..., 0] * axis[..., None, None, 1] - offset[..., 1] * axis[..., None, None, 0]
    stripes = ((along * who.stripes[:, None, None, None]) % 1 < 0.5).float()
    halves = (beside > 0).float()
    kind = who.pattern[:, None, None, None]
    second = (kind == 1) * stripes + (kind == 2) * halves
    first, other = (who.colours[name][:, None, :, None, None] for name in ("shirt", "shirt2"))
    return first + second.unsqueeze(2) * (other - first)


def render(who: People, motion: Tensor, size: int) -> dict[str, Tensor]:
    """Draw people in motion.

    Returns `video` (N, 3, F, H, W) in [-1, 1], `pose` (N, 3, F, H, W) in [0, 1], `keypoints` (N, F, 17, 3) in pixels
    and `masks` (N, 2, F, H, W) in {0, 1}: where the shirt's torso and the trousers are seen.
    """
    points = keypoints(who, motion, size)
    frames = motion.shape[1]
    grid = pixel_grid(size, size)
    thick = who.thickness[:, None].expand(-1, frames) * size
    colour = {k: v[:, None, :, None, None] for k, v in who.colours.items()}
    horizon = (grid[..., 1] > 0.8 * size).float()
    image = colour["background"] + horizon * (colour["floor"] - colour["background"])
    image = image.expand(-1, frames, -1, -1, -1).clone()
    masks = {name: torch.zeros(len(motion), frames, size, size) for name in GARMENTS}

    def paint(cover: Tensor, rgb: Tensor, part: str = "") -> None:
        nonlocal image
        image = image + cover.unsqueeze(2) * (rgb - image)
        for name in GARMENTS:
            masks[name] = torch.maximum(masks[name], cover) if name == part else masks[name] * (1 - cover)

    def bone(a: int, b: int, radius: float, rgb: Tensor, part: str = "") -> None:
        paint(capsule(grid, points[..., a, :2], points[..., b, :2], radius * thick), rgb, part)

    shirt = _shirt(who, grid, points)
    for side in range(2):
        bone(11 + side, 13 + side, 0.036, colour["trousers"], "trousers")
        bone(13 + side, 15 + side, 0.03, colour["trousers"], "trousers")
        bone(15 + side, 15 + side, 0.034, colour["shoes"])
    for side in range(2):  # the torso: a quadrilateral as a fan of capsules from each shoulder to each hip
        for hip in range(2):
            bone(5 + side, 11 + hip, 0.045, shirt, "shirt")
    neck, head = points[..., 5:7, :2].mean(-2), points[..., 0, :2]
    paint(capsule(grid, neck, head, 0.022 * thick), colour["skin"])
    ball = 0.055 * who.head[:, None].expand(-1, frames) * size
    up = head - neck
    paint(capsule(grid, head + 0.22 * up, head + 0.22 * up, 1.06 * ball), colour["hair"])
    paint(capsule(grid, head - 0.08 * up, head - 0.08 * up, 0.92 * ball), colour["skin"])
    for side in range(2):
        bone(5 + side, 7 + side, 0.029, colour["shirt"])
        bone(7 + side, 9 + side, 0.024, colour["skin"])
    return {
        "video": image.transpose(1, 2).contiguous() * 2 - 1,
        "pose": draw_skeleton(points, size, size).transpose(1, 2).contiguous(),
        "keypoints": points,
        "masks": (torch.stack([masks[name] for name in GARMENTS], 1) > 0.5).float(),
    }


def figures(
    count: int, *, domain: str = "target", frames: int = 6, size: int = 32, seed: int = 0, start: int = 0
) -> dict[str, Tensor]:
    """Draw `count` clips, each of its own person in its own motion, with a reference image of that person.

    The reference is one frame of another motion. Returns what `render` returns and `reference` (N, 3, H, W) in
    [-1, 1]. Clips of different seeds share neither people nor motions.
    """
    indices = range(start, start + count)
    who = people(seed, indices, domain)
    clip = render(who, motions(seed, indices, frames, domain), size)
    still = render(who, motions(seed + 500_009, indices, 1, domain), size)
    return clip | {"reference": still["video"][:, :, 0]}


def swapped(
    count: int, *, domain: str = "target", frames: int = 6, size: int = 32, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Draw clips and what they should become when pose or reference comes from the next clip.

    Returns (clips, other pose, other reference): three sets like `figures`', the i-th of the second shows person i in
    the motion of clip i + 1, the i-th of the third person i + 1 in the motion of clip i (cyclic).
    """
    indices = range(count)
    clips = figures(count, domain=domain, frames=frames, size=size, seed=seed)
    who, moves = people(seed, indices, domain), motions(seed, indices, frames, domain)
    other_pose = render(who, moves.roll(-1, 0), size) | {"reference": clips["reference"]}
    rolled = People(
        **{k: getattr(who, k).roll(-1, 0) for k in ("height", "width", "thickness", "head", "pattern", "stripes")},
        colours={k: v.roll(-1, 0) for k, v in who.colours.items()},
    )
    other_reference = render(rolled, moves, size) | {"reference": clips["reference"].roll(-1, 0)}
    return clips, other_pose, other_reference
