"""Follow one person through a video: sample it by time stamps, find shots, smooth the track, choose windows.

Letters: N sampled frames of a video, F frames of a window.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from entprog.data.detect import Tracker
from entprog.data.framing import body_scale, smooth_track
from entprog.data.video import video_stream

_LOOK_SIDE = 640  # pixels of the longer side in which the person is looked for
_SHOT_SECONDS = 60  # references come from the same shot; longer ones are divided, which bounds the memory
_CUT = 40  # of 255: neighbouring thumbnails that differ more are of different shots
_JUMP = 4.0  # torsos between frames: farther, and it is someone else


@dataclass(frozen=True)
class Track:
    """A person followed through N sampled frames, in pixels of the source of `shape` (H, W)."""

    shape: tuple[int, int]
    points: Tensor  # (N, 17, 3)
    presence: Tensor  # (N,)
    shots: list[int]  # which shot each frame is of
    usable: list[bool]  # a person is found, and the frame is not the one before repeated
    masks: list[np.ndarray]  # packed bits of the reduced frames
    mask_shape: tuple[int, int]


def sampled(path: str | Path, fps: float) -> Iterator[tuple[av.VideoFrame, bool]]:
    """Yield the frame nearest to each of the times 0, 1/fps, 2/fps, ... and whether it is another than the last.

    Times are the file's own stamps, so variable frame rates come out even. ValueError for a file without a video, for
    pixels that are not square and for damage that the decoder notices; av.FFmpegError and OSError for files that cannot
    be opened.
    """
    with av.open(str(path)) as container:
        stream = video_stream(container, path)
        rate = float(stream.average_rate or 30)
        held, held_time, origin, count = None, 0.0, 0.0, 0
        for number, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:  # the decoder painted over damage and hands out an invented frame
                raise ValueError(f"frame {number} of {path} is corrupt")
            now = float(frame.time if frame.time is not None else number / rate)
            if held is None:
                held, origin = frame, now
                continue
            middle, fresh = (held_time + now - origin) / 2, True
            while count / fps < middle:
                yield held, fresh
                count, fresh = count + 1, False
            held, held_time = frame, max(held_time, now - origin)
        if held is not None and count / fps <= held_time + 0.5 / rate:
            yield held, True


def to_image(frame: av.VideoFrame, side: int | None = None) -> Tensor:
    """Return a frame as a player shows it, (3, H, W) uint8, reduced to at most `side`."""
    scale = min(1.0, side / max(frame.width, frame.height)) if side else 1.0
    if scale < 1:
        size = {"width": max(1, round(frame.width * scale)), "height": max(1, round(frame.height * scale))}
        array = frame.reformat(**size, format="rgb24", interpolation="AREA").to_ndarray()
    else:
        array = frame.to_ndarray(format="rgb24")
    return torch.from_numpy(array).permute(2, 0, 1).rot90(round(frame.rotation / 90), (1, 2)).contiguous()


def _thumbnail(image: Tensor) -> Tensor:
    return adaptive_avg_pool2d(image.float(), 16)


def follow(path: str | Path, fps: float, tracker: Tracker, *, smooth: float = 0.04) -> Track:
    """Follow the person through a video sampled at fps, and smooth the track where it is not interrupted.

    ValueError for what `sampled` refuses, and for a video of fewer frames per second than fps.
    """
    shapes, thumbnails, fresh, masks, found = set(), [], [], [], []

    def images() -> Iterator[Tensor]:
        for frame, new in sampled(path, fps):
            turned = round(frame.rotation / 90) % 2 == 1
            shapes.add((frame.width, frame.height) if turned else (frame.height, frame.width))
            image = to_image(frame, _LOOK_SIDE)
            thumbnails.append(_thumbnail(image))
            fresh.append(new)
            yield image

    for one in tracker.track(images()):
        masks.append(np.packbits(one.mask.numpy()))
        mask_shape = (one.mask.shape[0], one.mask.shape[1])
        found.append((one.keypoints, one.presence))
    if len(shapes) != 1:
        raise ValueError(f"{path} has frames of the sizes {sorted(shapes)}, not of one")
    if (rate := fps * sum(fresh[1:]) / max(1, len(fresh) - 1)) < 0.9 * fps and len(fresh) > 1:
        raise ValueError(f"{path} has about {rate:.1f} frames per second, fewer than fps {fps:g}: choose fewer")
    shape = shapes.pop()
    points = torch.stack([p for p, _ in found])
    points[..., :2] *= torch.tensor((shape[1] / mask_shape[1], shape[0] / mask_shape[0]))
    presence = torch.tensor([p for _, p in found])
    usable = [bool(p > 0) and new for p, new in zip(presence, fresh, strict=True)]
    shots = _shots(points, usable, thumbnails, fps)
    for first, last in _runs(usable, shots):
        points[first:last] = smooth_track(points[first:last], fps, smooth)
    return Track(shape, points, presence, shots, usable, masks, mask_shape)


def _shots(points: Tensor, usable: list[bool], thumbnails: list[Tensor], fps: float) -> list[int]:
    """Number the shots: a new one where the picture changes, where the person jumps, and every minute."""
    shots, began, last = [0], 0, 0 if usable[0] else None
    for k in range(1, len(usable)):
        new = float((thumbnails[k] - thumbnails[k - 1]).abs().mean()) > _CUT or k - began >= _SHOT_SECONDS * fps
        if usable[k]:
            if last is not None:
                moved = (points[k, [11, 12], :2] - points[last, [11, 12], :2]).mean(0).norm()
                new = new or bool(moved > _JUMP * (k - last) ** 0.5 * body_scale(points[[k, last]]).max())
            last = k
        shots.append(shots[-1] + new)
        began = k if new else began
    return shots


def _runs(usable: Sequence[bool], shots: Sequence[int]) -> list[tuple[int, int]]:
    """Return the [first, last) of uninterrupted usable frames of one shot."""
    runs, first = [], None
    for k in range(len(usable) + 1):
        goes_on = k < len(usable) and usable[k] and (first is None or shots[k] == shots[first])
        if goes_on and first is None:
            first = k
        elif not goes_on and first is not None:
            runs.append((first, k))
            first = k if k < len(usable) and usable[k] else None
    return runs


def windows(track: Track, lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return (start, length) of windows that do not overlap, the longest length that fits first."""
    windows = []
    for first, last in _runs(track.usable, track.shots):
        while fitting := [n for n in lengths if first + n <= last]:
            windows.append((first, max(fitting)))
            first += max(fitting)
    return windows
