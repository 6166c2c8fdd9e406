"""Human motion: the DeepMimic clips of the pybullet package (zlib licence), mirrored, mixed and varied.

A motion is local joint rotations, so that the legs of one clip go with the arms of another. Axes are DeepMimic's
(x forward, y up, z to the person's right) until `global_rotations`, whose axes are the body's (-y forward, z up, x to
the person's left).

Letters: N frames, L = len(LINKS) links.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Array = NDArray[np.floating]

MISSING = (
    "rendering people needs bodies, motions and a renderer: install the extra people, "
    "pip install -e '.[people]' in a clone"
)

LINKS = (
    "root", "chest", "neck", "right_hip", "right_knee", "right_ankle", "right_shoulder", "right_elbow", "left_hip",
    "left_knee", "left_ankle", "left_shoulder", "left_elbow",
)  # fmt: skip
_PARENTS = {
    "chest": "root", "neck": "chest", "right_hip": "root", "right_knee": "right_hip", "right_ankle": "right_knee",
    "right_shoulder": "chest", "right_elbow": "right_shoulder", "left_hip": "root", "left_knee": "left_hip",
    "left_ankle": "left_knee", "left_shoulder": "chest", "left_elbow": "left_shoulder",
}  # fmt: skip
_UPPER = [i for i, name in enumerate(LINKS) if "shoulder" in name or "elbow" in name or name in ("chest", "neck")]
_HINGES = {"right_knee", "right_elbow", "left_knee", "left_elbow"}  # one angle in the files instead of a quaternion

UPRIGHT = ("walk", "run", "dance_a", "dance_b", "spin", "punch", "kick", "jump")
FLOOR = ("cartwheel", "crawl", "roll", "backflip", "spinkick", "getup_faceup", "getup_facedown")
CYCLIC = ("walk", "run")  # the others are played forwards and backwards
HELD_OUT = ("dance_b", "kick", "jump", "cartwheel", "getup_faceup")  # motions of the split "hard" only

_TO_BODY = np.array([[0, 0, -1.0], [-1, 0, 0], [0, 1, 0]])


@dataclass(frozen=True)
class Motion:
    """Local joint rotations over time: root (N, 3) in metres, rotations (N, L, 4) unit quaternions, w first."""

    root: Array
    rotations: Array

    def __len__(self) -> int:
        return len(self.root)


def _folder() -> Path:
    spec = find_spec("pybullet_data")
    if spec is None or spec.origin is None:
        raise ImportError(MISSING)
    return Path(spec.origin).parent / "data" / "motions"


def multiply(a: Array, b: Array) -> Array:
    """Return the product of quaternions, (..., 4): first turn by b, then by a."""
    aw, ax, ay, az = np.moveaxis(a, -1, 0)
    bw, bx, by, bz = np.moveaxis(b, -1, 0)
    return np.stack((
        aw * bw - ax * bx - ay * by - az * bz, aw * bx + ax * bw + ay * bz - az * by,
        aw * by - ax * bz + ay * bw + az * bx, aw * bz + ax * by - ay * bx + az * bw,
    ), axis=-1)  # fmt: skip


def from_axis(axis: Sequence[float], angle: Array) -> Array:
    """Return the quaternions of turns by `angle` (...,) radians about one axis, (..., 4)."""
    unit = np.asarray(axis, float) / np.linalg.norm(axis)
    return np.concatenate((np.cos(angle / 2)[..., None], np.sin(angle / 2)[..., None] * unit), axis=-1)


def to_matrix(q: Array) -> Array:
    """Turn unit quaternions (..., 4) into rotation matrices (..., 3, 3)."""
    w, x, y, z = np.moveaxis(q, -1, 0)
    rows = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    return np.stack(rows, axis=-1).reshape(*q.shape[:-1], 3, 3)


def _blend(a: Array, b: Array, share: Array) -> Array:
    """Interpolate quaternions (..., 4) the short way, normalised; share 0 gives a."""
    b = np.where((a * b).sum(-1, keepdims=True) < 0, -b, b)
    mix = (1 - share) * a + share * b
    return mix / np.linalg.norm(mix, axis=-1, keepdims=True)


@lru_cache(maxsize=32)
def _load(name: str) -> tuple[Array, Motion]:
    """Read a clip: the seconds of its frames, and the frames."""
    path = _folder() / f"humanoid3d_{name}.txt"
    if not path.exists():
        raise ValueError(f"motion {name!r} is unknown: choose one of {sorted(UPRIGHT + FLOOR)}")
    table = np.array(json.loads(path.read_text())["Frames"])
    seconds = np.concatenate(([0.0], np.cumsum(table[:-1, 0])))
    rotations, column = [], 4
    for link in LINKS:
        if link in _HINGES:
            rotations.append(from_axis((0, 0, 1), table[:, column]))
        else:
            quaternion = table[:, column : column + 4]
            rotations.append(quaternion / np.linalg.norm(quaternion, axis=1, keepdims=True))
        column += 1 if link in _HINGES else 4
    motion = Motion(table[:, 1:4], np.stack(rotations, axis=1))
    if name in CYCLIC:  # the ends do not quite meet: let the last quarter flow into the first frame
        fade = np.clip((seconds / seconds[-1] - 0.75) * 4, 0, 1)
        fade = fade * fade * (3 - 2 * fade)
        turned = _blend(motion.rotations, motion.rotations[:1], fade[:, None, None])
        height = (1 - fade) * motion.root[:, 1] + fade * motion.root[0, 1]
        motion = Motion(np.stack((motion.root[:, 0], height, motion.root[:, 2]), axis=1), turned)
    return seconds, motion


def duration(name: str) -> float:
    """Return the seconds of a motion as it was captured."""
    return float(_load(name)[0][-1])


def sample_motion(name: str, seconds: Array) -> Motion:
    """Sample a motion at `seconds` (N,) of its own time, beyond its ends too.

    Cyclic motions go on where they ended; the others are played backwards and forwards in turn. ValueError for a name
    that neither UPRIGHT nor FLOOR lists, ImportError when the motions are not installed.
    """
    times, motion = _load(name)
    turn, within = np.divmod(seconds, times[-1])
    if name not in CYCLIC:
        within = np.where(turn % 2 == 1, times[-1] - within, within)
    after = np.clip(np.searchsorted(times, within, "right"), 1, len(times) - 1)
    share = ((within - times[after - 1]) / (times[after] - times[after - 1]))[:, None]
    root = (1 - share) * motion.root[after - 1] + share * motion.root[after]
    if name in CYCLIC:
        root = root + turn[:, None] * (motion.root[-1] - motion.root[0]) * np.array([1, 0, 1])
    return Motion(root, _blend(motion.rotations[after - 1], motion.rotations[after], share[..., None]))


def mirrored(motion: Motion) -> Motion:
    """Exchange left and right: the reflection at the plane z = 0, exactly."""
    swap = [LINKS.index(_other_side(name)) for name in LINKS]
    return Motion(motion.root * np.array([1, 1, -1]), motion.rotations[:, swap] * np.array([1, -1, -1, 1]))


def _other_side(name: str) -> str:
    side, _, joint = name.partition("_")
    return {"left": f"right_{joint}", "right": f"left_{joint}"}.get(side, name)


def mixed(lower: Motion, upper: Motion) -> Motion:
    """Return the root and legs of one motion with the chest, neck and arms of another, of equal lengths."""
    rotations = lower.rotations.copy()
    rotations[:, _UPPER] = upper.rotations[:, _UPPER]
    return replace(lower, rotations=rotations)


def swung(motion: Motion, seconds: Array, rng: Generator, strength: float) -> Motion:
    """Add slow random swings to shoulders, elbows and neck; strength 1 raises arms to the head and beyond.

    `seconds` (N,) are the times of the frames, in real time.
    """

    def wave(offset: float, swing: float) -> Array:
        rate, phase = rng.uniform(0.25, 1.1), rng.uniform(0, 2 * np.pi)
        return strength * (offset + swing * np.sin(2 * np.pi * rate * seconds + phase))

    rotations = motion.rotations.copy()
    for side, outwards in (("right", -1.0), ("left", 1.0)):
        shoulder, elbow = LINKS.index(f"{side}_shoulder"), LINKS.index(f"{side}_elbow")
        # Turning about x lifts the arm sideways, about z forwards: mostly up and out, where there is room for it.
        aside = from_axis((1, 0, 0), outwards * wave(max(0.0, rng.normal(0.5, 0.7)), 0.45))
        ahead = from_axis((0, 0, 1), wave(rng.normal(0.3, 0.6), 0.45))
        rotations[:, shoulder] = multiply(multiply(aside, ahead), rotations[:, shoulder])
        bend = 2 * np.arctan2(rotations[:, elbow, 3], rotations[:, elbow, 0])
        bend = (bend + np.pi) % (2 * np.pi) - np.pi
        rotations[:, elbow] = from_axis((0, 0, 1), np.clip(bend + wave(rng.normal(0.2, 0.5), 0.5), 0.05, 2.3))
    neck = LINKS.index("neck")
    rotations[:, neck] = multiply(rotations[:, neck], from_axis((0, 1, 0), wave(rng.normal(0, 0.2), 0.2)))
    return replace(motion, rotations=rotations)


def global_rotations(motion: Motion) -> tuple[Array, Array]:
    """Chain the joints: rotations (N, L, 3, 3) of the links and root positions (N, 3), in the body's axes."""
    local = to_matrix(motion.rotations)
    chained: list[Array] = []
    for i, link in enumerate(LINKS):
        parent = _PARENTS.get(link)
        chained.append(local[:, i] if parent is None else chained[LINKS.index(parent)] @ local[:, i])
    return _TO_BODY @ np.stack(chained, axis=1) @ _TO_BODY.T, motion.root @ _TO_BODY.T
