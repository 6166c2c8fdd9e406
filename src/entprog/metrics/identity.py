"""Is it the same face: distances of dlib's face descriptor between generated frames and the reference image.

The networks (face-recognition-models 0.3.0, CC0) were trained so that two pictures of one person are nearer than 0.6.
Faces of a few pixels cannot be recognised by anyone: they are counted, not guessed.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from entprog.data.prepared import LABELS
from entprog.packaged import PackagedFileError, packaged_files

PACKAGE = ("face-recognition-models", "0.3.0")
_LANDMARKS = "face_recognition_models/models/shape_predictor_5_face_landmarks.dat"
_RECOGNISER = "face_recognition_models/models/dlib_face_recognition_resnet_model_v1.dat"
FILES = {
    _LANDMARKS: "c4b1e9804792707d3a405c2c16a80a20269e6675021f64a41d30fffafbc41888",
    _RECOGNISER: "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30",
}
MIN_PIXELS = 12  # side of the face in the frame, below which it is not looked for
FRAMES = 8  # looked at in a clip, evenly spread
_CROP = 240  # side of what the detector sees; it finds faces from about 80
_MARGIN = 2.2  # of the crop around the labelled face


class Faces(NamedTuple):
    """Descriptors (N, 128) of the faces found in `looked` images; `small` more had too small a face to look for."""

    descriptors: Tensor
    looked: int
    small: int


@cache
def _networks() -> tuple[Any, Any, Any]:
    """Detector, landmarks and recogniser. PackagedFileError without dlib or the weights."""
    try:
        import dlib
    except ImportError as error:
        raise PackagedFileError("face identity needs dlib: pip install dlib-bin, or leave out 'face'") from error
    files = packaged_files(*PACKAGE, FILES)
    return (
        dlib.get_frontal_face_detector(),
        dlib.shape_predictor(str(files[_LANDMARKS])),
        dlib.face_recognition_model_v1(str(files[_RECOGNISER])),
    )


def check_face_networks() -> None:
    """Load dlib and its weights (100 MB the first time). PackagedFileError when they cannot be had."""
    _networks()


def _crop_face(frame: Tensor, labels: Tensor) -> Tensor | None:
    """Cut the square around the labelled face, or take the frame where no face is labelled; None for a small one."""
    mask = labels == LABELS["face"]
    if not mask.any():
        # Rendered people label the face whenever it is seen, footage may not: without garments look everywhere.
        return frame if (labels == LABELS["person"]).any() or not labels.any() else None
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    top, bottom, left, right = (int(x) for x in (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1))
    side = max(bottom - top, right - left)
    if side < MIN_PIXELS:
        return None
    half = round(side * _MARGIN / 2)
    y, x = (top + bottom) // 2, (left + right) // 2
    return frame[:, max(0, y - half) : y + half, max(0, x - half) : x + half]


def _descriptor(image: Tensor) -> Tensor | None:
    """Descriptor of the largest face of an image (3, H, W) uint8, None without one."""
    detector, landmarks, recogniser = _networks()
    scale = max(1.0, _CROP / max(image.shape[1:]))
    if scale > 1:
        size = [round(n * scale) for n in image.shape[1:]]
        large = interpolate(image[None].float(), size=size, mode="bicubic", align_corners=False)[0]
        image = large.round().clamp(0, 255).byte()
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    if not (found := detector(pixels, 0)):
        return None
    largest = max(found, key=lambda box: box.width() * box.height())
    return torch.tensor(list(recogniser.compute_face_descriptor(pixels, landmarks(pixels, largest))))


def find_faces(frames: Tensor, labels: Tensor, *, limit: int = FRAMES) -> Faces:
    """Describe the faces of up to `limit` frames spread over a clip.

    With a labelled face only its surroundings are searched. Frames whose labels show a rendered person without a face
    (turned away) are neither looked at nor counted small unless a face below MIN_PIXELS is labelled.
    Shapes: frames (F, 3, H, W) uint8, labels (F, H, W). PackagedFileError when dlib or its weights cannot be had.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[:1] + frames.shape[2:] != labels.shape:
        raise ValueError(
            f"frames are (F, 3, H, W) uint8 and labels (F, H, W), not {tuple(frames.shape)}, {labels.shape}"
        )
    found, looked, small = [], 0, 0
    for i in torch.linspace(0, len(frames) - 1, min(limit, len(frames))).round().long().tolist():
        crop = _crop_face(frames[i], labels[i])
        if crop is None:
            small += int((labels[i] == LABELS["face"]).any())
            continue
        looked += 1
        if (descriptor := _descriptor(crop)) is not None:
            found.append(descriptor)
    return Faces(torch.stack(found) if found else torch.zeros(0, 128), looked, small)


def face_distance(video: Faces, reference: Faces) -> float:
    """Mean distance of a video's faces to the reference's, about 0.6 between look-alike and stranger; NaN without."""
    if not len(video.descriptors) or not len(reference.descriptors):
        return float("nan")
    return torch.cdist(video.descriptors, reference.descriptors).mean().item()
