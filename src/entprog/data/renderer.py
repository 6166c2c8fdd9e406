"""Draw a posed, dressed body with moderngl: colours, labels of every pixel and the depth, in one pass a frame.

It needs OpenGL 3.3 through EGL, without a screen: a graphics card, or Mesa's llvmpipe on the processor
(LP_NUM_THREADS sets its threads). Frames are drawn `supersample` times larger and averaged down.

Letters: H = W = size, N frames, B bones, K = supersample * size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from importlib.resources import files
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from entprog.data.body import Body, Template, package_folder
from entprog.data.motions import MISSING, Array
from entprog.data.prepared import LABELS

Colour = tuple[float, float, float]

_MESHES = (("body", 0), ("helper-tights", 1), ("helper-skirt", 2), ("helper-hair", 3), ("helper-l-eye", 4),
           ("helper-r-eye", 4), ("body", 5))  # fmt: skip
_CAP = 5
_NEAR, _FAR = 0.1, 60.0


@dataclass(frozen=True)
class Look:
    """What a person wears: colours in [0, 1], patterns by number, lengths as shares.

    hair: "bald", "cropped", "short", "bob" or "long". sleeve: share of the arm. leg: "trousers", "shorts" or "skirt";
    leg_length: share of the leg that it covers. pattern: 0 plain, 1 and 2 stripes, 3 checks, 4 dots, 5 and 6 halves.
    """

    skin: Colour
    lips: Colour
    iris: Colour
    hair: str
    hair_colour: Colour
    top: tuple[Colour, Colour]
    top_pattern: int
    bottom: tuple[Colour, Colour]
    bottom_pattern: int
    shoes: Colour
    sleeve: float
    leg: str
    leg_length: float
    neck_dip: float
    pattern_period: float
    print_picture: NDArray[np.uint8] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Scene:
    """Where a person stands: light, wall and floor. Colours in [0, 1], lengths in metres, angles in radians.

    light: the direction that it comes from. wall_kind: 0 plain, 1 shaded upwards, 2 stripes, 3 blocks, 4 two halves.
    floor_kind: 0 plain, 1 checks, 2 boards, 3 a round carpet.
    """

    light: tuple[float, float, float]
    light_colour: Colour
    ambient: Colour
    wall_kind: int
    wall_colours: tuple[Colour, Colour]
    wall_period: float
    wall_distance: float
    floor_kind: int
    floor_colours: tuple[Colour, Colour]
    floor_period: float
    floor_turn: float


@dataclass(frozen=True)
class Camera:
    """A pinhole camera: eye and target in metres, the field of view in degrees; the frame is square."""

    eye: Array
    target: Array
    fov: float

    def axes(self) -> Array:
        """Rows are the directions to the right, upwards and ahead, (3, 3)."""
        ahead = (self.target - self.eye) / np.linalg.norm(self.target - self.eye)
        right = np.cross(ahead, (0, 0, 1.0))
        right /= np.linalg.norm(right)
        return np.stack((right, np.cross(right, ahead), ahead))

    def see(self, points: Array) -> Array:
        """Points (..., 3) of the world in [-1, 1] of the frame (x right, y up) and their depth in metres, (..., 3)."""
        seen = (points - self.eye) @ self.axes().T
        reach = np.tan(np.radians(self.fov) / 2)
        return np.concatenate((seen[..., :2] / (seen[..., 2:] * reach), seen[..., 2:]), axis=-1)

    def matrix(self) -> Array:
        """Return the view and projection matrix (4, 4) of OpenGL."""
        right, up, ahead = self.axes()
        view = np.eye(4)
        view[:3, :3] = right, up, -ahead
        view[:3, 3] = -view[:3, :3] @ self.eye
        scale = 1 / np.tan(np.radians(self.fov) / 2)
        span = _NEAR - _FAR
        rows = [
            [scale, 0, 0, 0],
            [0, scale, 0, 0],
            [0, 0, (_FAR + _NEAR) / span, 2 * _FAR * _NEAR / span],
            [0, 0, -1, 0],
        ]
        return np.array(rows) @ view


def _shader(name: str) -> str:
    return (files("entprog.data") / "shaders" / name).read_text()


def _arm_coordinate(body: Body) -> Array:
    """Where vertices lie along an arm: 0 at the shoulder, 1 at the wrist, -1 for those that no arm moves, (V,)."""
    template = body.template
    arm = [i for i, n in enumerate(template.names) if n.startswith(("upperarm", "lowerarm", "wrist", "finger", "meta"))]
    share = (template.weights * np.isin(template.bones, arm)).sum(1)
    shoulder, wrist = body.head("upperarm01.L"), body.head("wrist.L")
    along = wrist - shoulder
    place = np.concatenate((np.abs(body.vertices[:, :1]), body.vertices[:, 1:]), axis=1)
    return np.where(share > 0.5, (place - shoulder) @ along / (along @ along), -1.0)


@lru_cache(maxsize=1)
def _layout(template: Template) -> tuple[dict[str, NDArray[Any]], NDArray[np.int32]]:
    """Vertices of the drawing (a vertex and a texture coordinate each), the mesh they belong to, and triangles."""
    vertices, coordinates, meshes, triangles, start = [], [], [], [], 0
    head = template.bone("head")
    for group, mesh in _MESHES:
        corners = template.corners[group]
        if mesh == _CAP:  # hair covers a part of the head; only there a second layer of skin is drawn, pushed out
            moved_by_head = ((template.bones == head) * template.weights).sum(1) > 0.5
            corners = corners[moved_by_head[corners[..., 0]].all(1)]
        pairs, index = np.unique(corners.reshape(-1, 2), axis=0, return_inverse=True)
        vertices.append(pairs[:, 0])
        coordinates.append(template.uv[pairs[:, 1]])
        meshes.append(np.full(len(pairs), mesh))
        triangles.append(index.reshape(-1, 3) + start)
        start += len(pairs)
    arrays = {"vertex": np.concatenate(vertices), "uv": np.concatenate(coordinates), "mesh": np.concatenate(meshes)}
    return arrays, np.concatenate(triangles).astype(np.int32)


def _normals(vertices: Array, template: Template) -> Array:
    """Vertex normals, from the triangles of each group, (V, 3)."""
    out = np.zeros_like(vertices, dtype=np.float64)
    for corners in template.corners.values():
        a, b, c = (vertices[corners[:, k, 0]] for k in range(3))
        face = np.cross(b - a, c - a)
        for k in range(3):
            for axis in range(3):
                out[:, axis] += np.bincount(corners[:, k, 0], face[:, axis], minlength=len(out))
    return out / (np.linalg.norm(out, axis=1, keepdims=True) + 1e-12)


def _measures(body: Body, look: Look) -> dict[str, Any]:
    """The uniforms of person.frag and person.vert that come from the body's size and the clothes' cut."""
    eye = body.vertices[body.template.vertices_of("helper-l-eye")].mean(0)
    rest = body.keypoints_at_rest
    head = float(np.ptp(rest[3:5, 0]) / 0.155)
    floor = float(body.vertices[body.template.probes, 2].min())
    ankle, hip = float(body.head("foot.L")[2]), float(body.head("upperleg01.L")[2])
    waist, neck = float(body.head("spine05")[2]), float(body.head("neck01")[2])
    bare = hip - look.leg_length * (hip - ankle)  # under a skirt tights reach nearly to its end: no thigh shows through
    shoe_top = max(ankle + 0.01 * head, floor + 0.05)
    hair_end = {"bob": eye[2] - 0.11 * head, "long": neck - 0.12 * head}.get(look.hair, eye[2] - 0.075 * head)
    chest = waist + 0.35 * (neck - waist)
    picture = (-0.11 * head, chest, 0.11 * head, chest + 0.22 * head)
    nowhere = (9.0, 9.0, 9.1, 9.1)
    return {
        "left_eye": tuple(float(x) for x in eye), "head_size": head, "ear": float(rest[3, 1]) + 0.005,
        "chin": float(rest[0, 2] - 0.078 * head), "hairline": 0.068 if look.hair != "cropped" else 0.06,
        "hair_end": float(hair_end), "bald": look.hair == "bald", "neckline": neck + 0.015, "neck_dip": look.neck_dip,
        "waist": waist + 0.03, "ankle": shoe_top, "sleeve": look.sleeve,
        "leg_end": max(bare + (0.05 * head if look.leg == "skirt" else 0.0), shoe_top), "skirt_end": float(bare),
        "skirt": look.leg == "skirt", "pattern_period": look.pattern_period, "shoe_size": 0.006,
        "print_box": nowhere if look.print_picture is None else picture,
    }  # fmt: skip


def _needed(body: Body, look: Look, measures: Mapping[str, Any]) -> NDArray[np.bool_]:
    """Which vertices of the drawing can be seen; the skin deep under clothes is most of the triangles."""
    layout, _ = _layout(body.template)
    mesh, place = layout["mesh"], body.vertices[layout["vertex"]]
    arm, z, m = _arm_coordinate(body)[layout["vertex"]], place[:, 2], measures
    sleeve = (arm > 0.02) & (arm < min(look.sleeve, 0.95) - 0.05)
    garment = (z > m["leg_end"] + 0.02) & (z < m["neckline"] - m["neck_dip"] - 0.03)
    clothed = sleeve | ((arm < 0.02) & (garment | (z < m["ankle"] - 0.01)))
    y = (place[:, 1] - m["left_eye"][1]) / m["head_size"]
    scalp = (z - m["left_eye"][2]) / m["head_size"] + 0.6 * y + 1.3 * np.maximum(0, y - 0.075) > m["hairline"] - 0.03
    kinds = {
        0: ~clothed, 2: np.full(len(z), look.leg == "skirt"), 3: np.full(len(z), look.hair in ("bob", "long")),
        _CAP: scalp & (look.hair != "bald"),
    }  # fmt: skip
    return np.select([mesh == k for k in kinds], list(kinds.values()), default=True)


def _face_mask() -> NDArray[np.uint8]:
    """Lips, eyelids and nothing, a texture (256, 256, 3)."""
    folder = package_folder() / "mpfb2" / "textures"
    names = ("mpfb_lips.jpg", "mpfb_eyelids.jpg")
    masks = [np.asarray(Image.open(folder / n).convert("L").resize((512, 512), Image.Resampling.BOX)) for n in names]
    return np.stack((*masks, np.zeros_like(masks[0])), axis=-1)


class Renderer:
    """One OpenGL context that draws square frames of one person at a time.

    `wear` takes a body and its clothes, `place` a scene, `draw` a posed frame. `close` it, or use it as a context
    manager, to give its memory back. ImportError without moderngl, RuntimeError without EGL.
    """

    def __init__(self, size: int, supersample: int) -> None:
        try:
            moderngl: Any = import_module("moderngl")
        except ImportError as error:
            raise ImportError(MISSING) from error
        try:
            self.context = moderngl.create_context(standalone=True, backend="egl")
        except Exception as error:
            raise RuntimeError(f"no OpenGL through EGL ({error}): install libegl1 and libgl1-mesa-dri") from error
        self.size, self.supersample, side = size, supersample, size * supersample
        context = self.context
        self._person = context.program(_shader("person.vert"), _shader("person.frag"))
        self._scene = context.program(_shader("scene.vert"), _shader("scene.frag"))
        targets = [context.texture((side, side), 3), context.texture((side, side), 1)]
        self._frame = context.framebuffer(targets, context.depth_texture((side, side)))
        corners = np.array([[-1, -1], [3, -1], [-1, 3]], np.float32)
        self._backdrop = context.vertex_array(self._scene, [(context.buffer(corners), "2f", "corner")])
        self._bones = context.buffer(reserve=128 * 64)
        self._person["BoneBlock"].binding = 0
        self._bones.bind_to_uniform_block(0)
        mask = _face_mask()
        self._mask = context.texture(mask.shape[1::-1], 3, mask.tobytes())
        self._mask.build_mipmaps()
        self._worn: list[Any] = []
        self._depth_test = moderngl.DEPTH_TEST

    def __enter__(self) -> "Renderer":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Release the context; nothing can be drawn after."""
        self.context.release()

    def _set(self, program: Any, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if name in program:  # a driver drops uniforms that no fragment needs
                program[name].value = value

    def wear(self, body: Body, look: Look) -> None:
        """Load a body at rest and its clothes."""
        layout, triangles = _layout(body.template)
        chosen, mesh = layout["vertex"], layout["mesh"]
        template = body.template
        tag = np.stack((mesh, _arm_coordinate(body)[chosen]), axis=1)
        normals = _normals(body.vertices, template)
        columns = (
            body.vertices[chosen],
            normals[chosen],
            layout["uv"],
            template.bones[chosen],
            template.weights[chosen],
        )
        data = np.concatenate((*columns, tag), axis=1).astype(np.float32)
        for old in self._worn:
            old.release()
        buffer, index = self.context.buffer(data), self.context.buffer(triangles)
        names = ("position", "normal", "uv", "bones", "weights", "tag")
        self._vertices = self.context.vertex_array(self._person, [(buffer, "3f 3f 2f 4f 4f 2f", *names)], index)
        picture = np.zeros((1, 1, 3), np.uint8) if look.print_picture is None else look.print_picture
        texture = self.context.texture(picture.shape[1::-1], 3, np.ascontiguousarray(picture).tobytes(), alignment=1)
        texture.build_mipmaps()
        self._mask.use(0)
        texture.use(1)
        self._worn = [self._vertices, buffer, index, texture]
        cap = {"short": 0.012, "bob": 0.014, "long": 0.012}.get(look.hair, 0.003)
        measures = _measures(body, look)
        self._set(self._person, measures | {
            "face_mask": 0, "print_picture": 1, "skin_colour": look.skin, "lip_colour": look.lips,
            "iris_colour": look.iris, "hair_colour": look.hair_colour, "shoe_colour": look.shoes,
            "top_colours": list(look.top), "bottom_colours": list(look.bottom), "top_pattern": look.top_pattern,
            "bottom_pattern": look.bottom_pattern, "inflate": [0.0, 0.005, 0.009, 0.004, 0.0, cap],
        })  # fmt: skip
        kept = _needed(body, look, measures)[triangles].any(1)
        index.write(np.ascontiguousarray(triangles[kept]))
        self._count = int(kept.sum()) * 3

    def place(self, scene: Scene, ahead: Array) -> None:
        """Build a scene around the origin; `ahead` (3,) is the horizontal direction in which the camera looks."""
        light = np.array(scene.light)
        lit = {"light": tuple(light / np.linalg.norm(light)), "light_colour": scene.light_colour}
        self._set(self._person, lit | {"ambient": scene.ambient})
        tint = np.array(scene.ambient) + 0.75 * np.array(scene.light_colour)
        self._set(self._scene, {
            "ahead": tuple(ahead), "wall_distance": scene.wall_distance, "wall_kind": scene.wall_kind,
            "floor_kind": scene.floor_kind, "wall_colours": list(scene.wall_colours), "tint": tuple(tint),
            "floor_colours": list(scene.floor_colours), "wall_period": scene.wall_period,
            "floor_period": scene.floor_period, "floor_turn": scene.floor_turn,
        })  # fmt: skip

    def draw(
        self, transforms: Array, camera: Camera, blobs: Array
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Array]:
        """Draw one frame.

        transforms (B, 3, 4): posed bones; blobs (3, 3): x, y and radius of shadows on the floor, in metres. Returns
        the picture (H, W, 3), the labels (H, W), each the most frequent of its pixels, and the depth in metres (K, K).
        """
        matrices = np.zeros((len(transforms), 4, 4), np.float32)
        matrices[:, :3], matrices[:, 3, 3] = transforms, 1
        self._bones.write(np.ascontiguousarray(matrices.transpose(0, 2, 1)))
        self._frame.use()
        self._frame.clear(depth=1.0)
        reach = np.tan(np.radians(camera.fov) / 2)
        rays = camera.axes() * np.array([[reach], [reach], [1.0]])
        self._set(self._scene, {"eye": tuple(camera.eye), "rays": tuple(rays.ravel()), "blobs": blobs.tolist()})
        self.context.disable(self._depth_test)
        self._backdrop.render(vertices=3)
        self.context.enable(self._depth_test)
        self._set(self._person, {"view_projection": tuple(camera.matrix().T.ravel()), "camera": tuple(camera.eye)})
        self._vertices.render(vertices=self._count)
        side, k = self.size * self.supersample, self.supersample
        read = self._frame.read
        picture = np.frombuffer(read(components=3, alignment=1), np.uint8).reshape(side, side, 3)[::-1]
        labels = np.frombuffer(read(components=1, attachment=1, alignment=1), np.uint8).reshape(side, side)[::-1]
        depth = np.frombuffer(read(components=1, attachment=-1, dtype="f4"), np.float32).reshape(side, side)[::-1]
        metres = 2 * _NEAR * _FAR / (_FAR + _NEAR - (2 * depth - 1) * (_FAR - _NEAR))
        return _average(picture, k), _majority(labels, k), metres


def _average(picture: NDArray[np.uint8], k: int) -> NDArray[np.uint8]:
    """Return the rounded mean of each k x k block, (K, K, 3) -> (H, W, 3)."""
    total = np.stack([picture[i::k, j::k] for i in range(k) for j in range(k)]).sum(0, dtype=np.int32)
    return ((2 * total + k * k) // (2 * k * k)).astype(np.uint8)


def _majority(labels: NDArray[np.uint8], k: int) -> NDArray[np.uint8]:
    """Return the most frequent label of each k x k block, (K, K) -> (H, W); of a tie the lowest."""
    cells = np.stack([labels[i::k, j::k] for i in range(k) for j in range(k)])
    votes = np.stack([(cells == value).sum(0, dtype=np.int16) for value in range(max(LABELS.values()))])
    return votes.argmax(0).astype(np.uint8)
