"""DWPose: COCO-17 keypoints by the two ONNX files that most human-video data were posed with, for those who have them.

`yolox_l.onnx` finds people in the whole frame, `dw-ll_ucoco_384.onnx` 133 keypoints in the box of one (Yang et al.
2023, arXiv 2307.15880). The first 17 are COCO's. Pre- and post-processing follow the published models: letterbox to
640 in the upper left on grey 114, blue first, [0, 255]; box enlarged by 1.25 at the shape 288:384, red first,
normalised as ImageNet; a keypoint is where the distributions over half pixels (SimCC) peak, its score the lower peak.

Letters: N boxes, K keypoints, H, W pixels. Positions are continuous: the centre of the first pixel is (0.5, 0.5).
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from entprog.data.detect import Found, check_frame, nobody, overlap
from entprog.data.pose import LIMBS, VISIBLE, capsule, pixel_grid

DETECTOR, LANDMARKS = "yolox_l.onnx", "dw-ll_ucoco_384.onnx"
_DETECTOR_SIZE, _STRIDES = 640, (8, 16, 32)
_WIDTH, _HEIGHT, _SPLIT = 288, 384, 2.0  # of the landmark network; SimCC bins a pixel
_PADDING = 1.25
_OVERLAP = 0.45
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_TORSO = (5, 6, 11, 12)  # shoulders and hips among COCO's 17
_LIMB = 0.14  # half the thickness of a limb in the mask, in lengths of the torso


def _session(path: Path, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("DWPose needs the extra dwpose: pip install -e '.[dwpose]' in a clone") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    device = [
        p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in onnxruntime.get_available_providers()
    ]
    return onnxruntime.InferenceSession(str(path), options, providers=device)


def boxes_of(output: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Decode YOLOX's raw output (8400, 85): boxes (N, 4) as x0, y0, x1, y1 in the network's pixels, person scores (N,).

    Cells of strides 8, 16, 32 lie behind each other; centre = (value + cell) * stride, side = exp(value) * stride,
    score = objectness * person. ValueError for another number of rows.
    """
    sides = [_DETECTOR_SIZE // stride for stride in _STRIDES]
    if len(output) != sum(side**2 for side in sides):
        raise ValueError(f"the detector answered {len(output)} boxes, YOLOX at 640 pixels answers 8400: is the file "
                         f"{DETECTOR}?")  # fmt: skip
    cells = [np.stack(np.divmod(np.arange(side**2), side)[::-1], -1) for side in sides]
    strides = np.concatenate([np.full((side**2, 1), stride) for side, stride in zip(sides, _STRIDES, strict=True)])
    centre = (output[:, :2] + np.concatenate(cells)) * strides
    half = np.exp(output[:, 2:4]) * strides / 2
    return np.concatenate((centre - half, centre + half), -1), output[:, 4] * output[:, 5]


def centred(boxes: np.ndarray) -> np.ndarray:
    """Return boxes (..., 4), given by two corners, as centre and sides."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return np.concatenate(((low + high) / 2, high - low), -1)


def keypoints_of(across: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Return keypoints (K, 3), x, y in the network's pixels and a score, of SimCC distributions (K, 576), (K, 768)."""
    score = np.minimum(across.max(-1), down.max(-1))
    return np.stack(((across.argmax(-1) + 0.5) / _SPLIT, (down.argmax(-1) + 0.5) / _SPLIT, score), -1)


def _window(box: np.ndarray) -> np.ndarray:
    """Enlarge a box to the landmark network's shape, corners (4,)."""
    centre, (width, height) = np.split(centred(box) * (1, 1, _PADDING, _PADDING), 2)
    width, height = max(width, height * _WIDTH / _HEIGHT), max(height, width * _HEIGHT / _WIDTH)
    half = np.array([width, height]) / 2
    return np.concatenate((centre - half, centre + half))


def _crop(frame: Tensor, window: np.ndarray) -> Tensor:
    """Cut a window out of a frame (3, H, W), (3, 384, 288); black outside the frame."""
    height, width = frame.shape[-2:]
    x = window[0] + (np.arange(_WIDTH) + 0.5) / _WIDTH * (window[2] - window[0])
    y = window[1] + (np.arange(_HEIGHT) + 0.5) / _HEIGHT * (window[3] - window[1])
    grid = np.stack(np.meshgrid(x / width * 2 - 1, y / height * 2 - 1), -1).astype(np.float32)
    return grid_sample(frame[None], torch.from_numpy(grid)[None], padding_mode="zeros", align_corners=False)[0]


def limb_mask(keypoints: Tensor, height: int, width: int) -> Tensor:
    """Return where a person is by the limbs that are seen, thickened to a seventh of the torso each side, (H, W) bool.

    DWPose has no mask. Keypoints (17, 3) in pixels; nothing where no torso is seen.
    """
    points, seen = keypoints[:, :2], keypoints[:, 2] >= VISIBLE
    if not seen[list(_TORSO)].all():
        return torch.zeros(height, width, dtype=torch.bool)
    shoulders, hips = points[list(_TORSO[:2])].mean(0), points[list(_TORSO[2:])].mean(0)
    limbs = [(points[a], points[b]) for a, b, _ in LIMBS if seen[a] and seen[b]] + [(shoulders, hips)]
    starts, ends = (torch.stack(ends) for ends in zip(*limbs, strict=True))
    cover = capsule(pixel_grid(height, width), starts, ends, _LIMB * (shoulders - hips).norm().item())
    return (cover > 0.5).any(0)


class DWPose:
    """Find the most prominent person in each frame; like PoseEstimator, which needs no files of one's own.

    weights: folder with yolox_l.onnx and dw-ll_ucoco_384.onnx. min_score: the detector's, below which there is nobody.
    A frame's person is the surest box of the first frame, then the box that overlaps the last one most. ImportError
    naming the extra without onnxruntime; ValueError for a folder that lacks a file.
    """

    def __init__(self, weights: str | Path, *, min_score: float = 0.3, threads: int = 1) -> None:
        self.name, self.min_score = "DWPose", min_score
        paths = [Path(weights) / name for name in (DETECTOR, LANDMARKS)]
        if missing := [p.name for p in paths if not p.exists()]:
            raise ValueError(f"{weights} lacks {missing}: give the folder that holds both of DWPose's files")
        self._detector, self._landmarks = (_session(path, threads) for path in paths)

    def _run(self, session: Any, image: Tensor) -> list[np.ndarray]:
        return [o[0] for o in session.run(None, {session.get_inputs()[0].name: image[None].contiguous().numpy()})]

    def _box(self, frame: Tensor, last: np.ndarray | None) -> np.ndarray | None:
        """Find the person's box (4,) in a frame (3, H, W), floats in [0, 255]."""
        height, width = frame.shape[-2:]
        scale = _DETECTOR_SIZE / max(height, width)
        h, w = round(height * scale), round(width * scale)
        canvas = torch.full((3, _DETECTOR_SIZE, _DETECTOR_SIZE), 114.0)
        canvas[:, :h, :w] = interpolate(frame[None], size=(h, w), mode="bilinear", align_corners=False)[0]
        boxes, scores = boxes_of(self._run(self._detector, canvas.flip(0))[0])
        boxes, scores = boxes[scores >= self.min_score] / scale, scores[scores >= self.min_score]
        if not len(boxes):
            return None
        if last is not None and (near := overlap(centred(last), centred(boxes))).max() > _OVERLAP:
            return boxes[near.argmax()]
        return boxes[scores.argmax()]

    def track(self, frames: Iterable[Tensor]) -> Iterator[Found]:
        """Yield what each frame (3, H, W) uint8 of one video shows. ValueError for another shape or type.

        The mask is `limb_mask`; presence is 1 wherever the detector finds somebody.
        """
        box: np.ndarray | None = None
        for frame in frames:
            check_frame(frame)
            height, width = frame.shape[-2:]
            box = self._box(frame.float(), box)
            if box is None:
                yield nobody(height, width)
                continue
            keypoints = torch.from_numpy(self._keypoints(frame.float(), _window(box))).float()
            yield Found(keypoints, limb_mask(keypoints, height, width), 1.0)

    def _keypoints(self, frame: Tensor, window: np.ndarray) -> np.ndarray:
        """Return the keypoints (17, 3) that a window (4,) of a frame shows, in pixels of the frame."""
        mean, std = (torch.tensor(v)[:, None, None] for v in (_MEAN, _STD))
        points = keypoints_of(*self._run(self._landmarks, (_crop(frame, window) - mean) / std)[:2])[:17]
        size = window[2:] - window[:2]
        points[:, :2] = window[:2] + points[:, :2] / (_WIDTH, _HEIGHT) * size
        points[:, 2] = np.clip(points[:, 2], 0, 1)
        return points

    def estimate(self, frames: Tensor) -> Tensor:
        """Return the COCO-17 keypoints (F, 17, 3) of the frames (F, 3, H, W) uint8 of one video, NaN for nobody."""
        return torch.stack([found.keypoints for found in self.track(frames)])

    __call__ = estimate
