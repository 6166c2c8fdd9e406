"""Find one person in the frames of a video: COCO-17 keypoints and a person mask, by BlazePose on the CPU.

Two small networks (Bazarevsky et al. 2020, arXiv 2006.10204; Apache-2.0): a detector looks at the whole frame and
answers where the hips are, how large the person is and how it is turned; a landmark network looks at that turned
square and answers 33 points, their visibility, a person mask, and two points that say where the square of the next
frame is. So the detector runs only on the first frame and when the person is lost.

Letters: F frames, H, W pixels. Positions are continuous: the centre of the first pixel is (0.5, 0.5).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample, interpolate

from entprog.data.pose import COCO17, to_coco17
from entprog.packaged import packaged_file

# (package, version, member, sha256): the two networks travel inside the wheel of mediapipe, which itself is not used.
DETECTOR = (
    "mediapipe", "0.10.21", "mediapipe/modules/pose_detection/pose_detection.tflite",
    "9ba9dd3d42efaaba86b4ff0122b06f29c4122e756b329d89dca1e297fd8f866c",
)  # fmt: skip
LANDMARKS = (
    "mediapipe", "0.10.21", "mediapipe/modules/pose_landmark/pose_landmark_full.tflite",
    "e9a5c5cb17f736fafd4c2ec1da3b3d331d6edbe8a0d32395855aeb2cdfd64b9f",
)  # fmt: skip

# Where each COCO-17 keypoint's partner on the other side stands.
MIRROR = tuple(
    COCO17.index(name.replace("left", "\0").replace("right", "left").replace("\0", "right")) for name in COCO17
)

_DETECTOR_SIZE, _LANDMARK_SIZE, _HEATMAP_SIZE = 224, 256, 64
_MARGIN = 1.25  # the square is this much larger than the circle around the person, as in training
_OVERLAP = 0.3  # detections whose boxes overlap more are of one person
_SURE = 0.9  # presence of a person who was not followed before: walls and furniture reach 0.8
_SHIFT = 0.1  # a look is repeated with the square it answers if that is off by this share of its side
_LOOKS = 3  # at most


@dataclass(frozen=True)
class Found:
    """What one frame shows: keypoints (17, 3), x, y in pixels and a confidence in [0, 1], and a mask (H, W) bool.

    Where no one is found, x and y are NaN, confidences and presence are 0 and the mask is empty. The confidence of a
    keypoint is that it is visible: in the frame and not hidden; `presence` in [0, 1] is that there is a person at all.
    """

    keypoints: Tensor
    mask: Tensor
    presence: float


class Tracker(Protocol):
    """What finds a person in the frames of one video, in order; PoseEstimator is one."""

    def track(self, frames: Iterable[Tensor]) -> Iterator[Found]:
        """Yield what each frame (3, H, W) uint8 shows."""
        ...


@dataclass(frozen=True)
class _Square:
    """A turned square around a person: centre (2,), side in pixels, angle in radians (0: the person is upright)."""

    centre: np.ndarray
    side: float
    angle: float

    @staticmethod
    def around(hips: np.ndarray, top: np.ndarray) -> "_Square":
        """Return the square of the circle around `hips` through `top`, turned so that `top` is above `hips`."""
        x, y = top - hips
        return _Square(hips, float(2 * _MARGIN * np.hypot(x, y)), float(np.arctan2(y, x) + np.pi / 2))

    @property
    def axes(self) -> np.ndarray:
        """Return (2, 2): the columns are the square's own x and y axes, as long as its side, in the frame."""
        c, s = np.cos(self.angle), np.sin(self.angle)
        return self.side * np.array([[c, -s], [s, c]])

    def to_frame(self, points: np.ndarray) -> np.ndarray:
        """Take points (N, 2) of the square, in [0, 1], to pixels of the frame."""
        return (points - 0.5) @ self.axes.T + self.centre


def _interpreter() -> Any:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise ImportError(
            "finding people in videos needs the extra pose: pip install -e '.[pose]' in a clone"
        ) from error
    return Interpreter


class _Network:
    """A tflite file, as a function of one float array (1, S, S, 3) to its outputs by shape."""

    def __init__(self, path: Path, threads: int) -> None:
        self._net: Any = _interpreter()(model_path=str(path), num_threads=threads)
        self._net.allocate_tensors()
        self._input = self._net.get_input_details()[0]["index"]
        self._outputs = [output["index"] for output in self._net.get_output_details()]

    def __call__(self, image: Tensor) -> dict[tuple[int, ...], np.ndarray]:
        """Run on (3, S, S)."""
        self._net.set_tensor(self._input, image.permute(1, 2, 0)[None].contiguous().numpy())
        self._net.invoke()
        outputs = [self._net.get_tensor(index)[0] for index in self._outputs]
        return {output.shape: output for output in outputs}


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -50, 50)))


def _anchors() -> np.ndarray:
    """Return the centres (2254, 2), in [0, 1], that the detector's boxes are relative to: strides 8, 16, 3 times 32."""
    centres = []
    for stride, repeats in ((8, 2), (16, 2), (32, 6)):
        n = _DETECTOR_SIZE // stride
        y, x = np.divmod(np.arange(n * n), n)
        centres.append(np.repeat((np.stack((x, y), -1) + 0.5) / n, repeats, axis=0))
    return np.concatenate(centres)


def overlap(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union of (cx, cy, w, h) with (N, 4)."""
    low = np.maximum(box[:2] - box[2:] / 2, boxes[:, :2] - boxes[:, 2:] / 2)
    high = np.minimum(box[:2] + box[2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2)
    common = np.prod(np.clip(high - low, 0, None), axis=-1)
    return common / (box[2] * box[3] + boxes[:, 2] * boxes[:, 3] - common + 1e-9)


def _letterbox(frame: Tensor, size: int) -> Tensor:
    """Fit a frame (3, H, W) in [0, 1] into the middle of a black square, (3, size, size)."""
    height, width = frame.shape[-2:]
    side = max(height, width)
    h, w = max(1, round(height * size / side)), max(1, round(width * size / side))
    small = interpolate(frame[None], size=(h, w), mode="bilinear", antialias=True, align_corners=False)[0]
    canvas = torch.zeros(3, size, size)
    top, left = (size - h) // 2, (size - w) // 2
    canvas[:, top : top + h, left : left + w] = small
    return canvas


def _sample(frame: Tensor, square: _Square, size: int) -> Tensor:
    """Cut a turned square out of (3, H, W), (3, size, size); what lies outside the frame repeats its border."""
    shrink = max(1, int(square.side / size))  # average first what bilinear sampling would skip
    height, width = frame.shape[-2:]
    small = avg_pool2d(frame, shrink, ceil_mode=True, count_include_pad=False) if shrink > 1 else frame
    steps = (np.arange(size) + 0.5) / size
    grid = square.to_frame(np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2))
    grid = grid / (np.array([small.shape[-1], small.shape[-2]]) * shrink) * 2 - 1
    where = torch.from_numpy(grid.reshape(1, size, size, 2).astype(np.float32))
    return grid_sample(small[None], where, mode="bilinear", padding_mode="border", align_corners=False)[0]


def _refined(points: np.ndarray, heatmaps: np.ndarray) -> np.ndarray:
    """Move points (39, 2), in [0, 1], to the mean of the heatmap (64, 64, 39) within 3 cells, where it is sure."""
    moved = points.copy()
    for k, (x, y) in enumerate(points * _HEATMAP_SIZE):
        left, top = max(0, int(x) - 3), max(0, int(y) - 3)
        near = _sigmoid(heatmaps[top : int(y) + 4, left : int(x) + 4, k])
        if near.size and near.max() >= 0.5:
            across, down = np.arange(near.shape[1]) + left, np.arange(near.shape[0]) + top  # peaks sit on corners
            moved[k] = near.sum(0) @ across, near.sum(1) @ down
            moved[k] /= near.sum() * _HEATMAP_SIZE
    return moved


class PoseEstimator:
    """Follow the most prominent person through a video.

        points = PoseEstimator().estimate(frames)  # (F, 3, H, W) uint8 -> (F, 17, 3)

    `min_score` is the detector's, `min_presence` the landmark network's confidence below which the person is lost; to
    be found at all takes a presence of 0.9.
    `weights` is a folder with pose_detection.tflite and pose_landmark_full.tflite; without it they are fetched once
    from the package index. Small frames are enlarged inside. One person only: the one the detector is surest of.

    ImportError naming the extra if ai-edge-litert is missing; ValueError for a threshold outside [0, 1].
    """

    def __init__(
        self,
        *,
        min_score: float = 0.5,
        min_presence: float = 0.5,
        threads: int = 1,
        weights: str | Path | None = None,
    ) -> None:
        for name, value in (("min_score", min_score), ("min_presence", min_presence)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}, a confidence lies in [0, 1]")
        self.min_score, self.min_presence = min_score, min_presence
        _interpreter()  # before anything is downloaded
        detector, landmarks = (
            packaged_file(*wanted) if weights is None else Path(weights) / wanted[2].split("/")[-1]
            for wanted in (DETECTOR, LANDMARKS)
        )
        self._detector, self._landmarks = _Network(detector, threads), _Network(landmarks, threads)
        self._anchors = _anchors()

    def _detect(self, frame: Tensor) -> _Square | None:
        """Look for a person in the whole frame (3, H, W) in [0, 1]."""
        out = self._detector(_letterbox(frame, _DETECTOR_SIZE) * 2 - 1)
        scores = _sigmoid(out[(len(self._anchors), 1)][:, 0])
        best = scores.argmax()
        if scores[best] < self.min_score:
            return None
        values = out[(len(self._anchors), 12)].reshape(-1, 6, 2) / _DETECTOR_SIZE  # centre, size, 4 points
        values[:, [0, 2, 3, 4, 5]] += self._anchors[:, None]
        boxes = values[:, :2].reshape(-1, 4)
        votes = scores * (scores >= self.min_score) * (overlap(boxes[best], boxes) > _OVERLAP)
        hips, top = np.tensordot(votes / votes.sum(), values[:, 2:4], axes=1)
        height, width = frame.shape[-2:]
        offset = np.array([width, height]) / 2
        return _Square.around(*((point - 0.5) * max(height, width) + offset for point in (hips, top)))

    def _look(self, frame: Tensor, square: _Square) -> tuple[float, np.ndarray, np.ndarray, _Square]:
        """Look at a square: presence, 33 points (x, y, visibility), mask (256, 256), the square it should have been."""
        out = self._landmarks(_sample(frame, square, _LANDMARK_SIZE))
        raw = out[(195,)].reshape(39, 5)
        points = _refined(raw[:, :2] / _LANDMARK_SIZE, out[(_HEATMAP_SIZE, _HEATMAP_SIZE, 39)])
        where = square.to_frame(points)
        mask = _sigmoid(out[(_LANDMARK_SIZE, _LANDMARK_SIZE, 1)][..., 0])
        found = np.concatenate((where[:33], _sigmoid(raw[:33, 3:4])), axis=1)
        return float(out[(1,)][0]), found, mask, _Square.around(where[33], where[34])

    def _find(
        self, frame: Tensor, square: _Square | None
    ) -> tuple[float, np.ndarray, np.ndarray, _Square, _Square] | None:
        """Look where the person was, then, if it is lost, in the whole frame; again where the square was off."""
        for tried in ("track", "detect"):
            square = square if tried == "track" else self._detect(frame)
            if square is None:
                continue
            for _ in range(_LOOKS):
                used = square
                presence, points, mask, square = self._look(frame, used)
                shift = np.abs(square.centre - used.centre).max() + abs(square.side - used.side)
                if presence < self.min_presence or shift <= _SHIFT * used.side:
                    break
            if presence >= (self.min_presence if tried == "track" else max(self.min_presence, _SURE)):
                return presence, points, mask, used, square
        return None

    def track(self, frames: Iterable[Tensor]) -> Iterator[Found]:
        """Yield what each frame (3, H, W) uint8 of one video shows, as the frames come; they may be a generator.

        ValueError for a frame that is not (3, H, W) uint8.
        """
        square: _Square | None = None
        for frame in frames:
            check_frame(frame)
            height, width = frame.shape[-2:]
            found = self._find(frame / 255, square)
            if found is None:
                square = None
                yield nobody(height, width)
                continue
            presence, points, mask, used, square = found
            inside = (points[:, :2] >= 0).all(-1) & (points[:, :2] < (width, height)).all(-1)
            points[:, 2] *= inside  # a joint outside the frame is not visible, whatever the network thinks
            keypoints = to_coco17(torch.from_numpy(points.astype(np.float32)), "blazepose33")
            yield Found(keypoints, _paste(mask, used, height, width), presence)

    def estimate(self, frames: Tensor) -> Tensor:
        """Return the COCO-17 keypoints (F, 17, 3) of the frames (F, 3, H, W) uint8 of one video.

        x and y are in pixels of the frames, the third number is a confidence in [0, 1]; where no one is found x and y
        are NaN and the confidence is 0. ValueError for frames of another shape or type.
        """
        return self.estimate_masked(frames)[0]

    def estimate_masked(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keypoints (F, 17, 3) as `estimate` does, and the person masks (F, H, W) bool."""
        check_frames(frames)
        found = list(self.track(frames))
        return torch.stack([f.keypoints for f in found]), torch.stack([f.mask for f in found])

    __call__ = estimate


def check_frame(frame: Tensor) -> None:
    """Raise ValueError for a frame that is not (3, H, W) uint8."""
    if frame.ndim != 3 or frame.shape[0] != 3 or frame.dtype != torch.uint8:
        raise ValueError(f"a frame is (3, H, W) uint8, not {tuple(frame.shape)} {frame.dtype}")


def check_frames(frames: Tensor) -> None:
    """Raise ValueError for what is no video (F, 3, H, W), or one without frames."""
    if frames.ndim != 4 or not len(frames):
        raise ValueError(f"frames are (F, 3, H, W) uint8, not {tuple(frames.shape)}")


def nobody(height: int, width: int) -> Found:
    """Return what a frame without a person shows."""
    keypoints = torch.full((17, 3), torch.nan)
    keypoints[:, 2] = 0
    return Found(keypoints, torch.zeros(height, width, dtype=torch.bool), 0.0)


def _paste(mask: np.ndarray, square: _Square, height: int, width: int) -> Tensor:
    """Lay the mask of a turned square over the frame, (H, W) bool."""
    y, x = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    own = (np.stack((x, y), -1) - square.centre) @ np.linalg.inv(square.axes).T * 2  # in [-1, 1] inside the square
    where = torch.from_numpy(own[None].astype(np.float32))
    values = torch.from_numpy(mask.astype(np.float32))[None, None]
    return grid_sample(values, where, mode="bilinear", padding_mode="zeros", align_corners=False)[0, 0] > 0.5


def mirrored_keypoints(keypoints: Tensor, width: float) -> Tensor:
    """Return the keypoints of the horizontally flipped frames: x -> width - x, and left and right exchanged.

    The exchange matters: limbs of the two sides are drawn in different colours, and the left arm of the flipped
    picture is the right arm of the person. Shapes: (..., 17, 3) -> (..., 17, 3), width in pixels. ValueError for
    another layout.
    """
    if keypoints.shape[-2:] != (17, 3):
        raise ValueError(f"keypoints are (..., 17, 3), not {tuple(keypoints.shape)}")
    out = keypoints[..., list(MIRROR), :].clone()
    out[..., 0] = width - out[..., 0]
    return out
