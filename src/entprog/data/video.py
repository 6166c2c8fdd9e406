"""Clips on disk: a folder of videos, poses and a manifest becomes training clips; tensors become mp4, WebP and PNG.

`manifest.jsonl` holds one JSON object a line: `id`, `video`, `pose` (paths relative to the folder) and optionally
`reference` (an image), `caption`, `start` and `end` (frames of both files, end not included), `fps`, `width`,
`height`, `split`, `subject_id`; other keys are kept. `pose` is a pose video, or keypoints in a `.json` file:
{"format": a key of TO_COCO17, "size": [w, h], "points": [null or [[x, y, visibility], ...] a frame]}.

Letters: N windows, F frames, H = W = size.
"""

import json
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

import av
import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.nn.functional import interpolate

from entprog.data.pose import VISIBLE, draw_skeleton, to_coco17

Split = Literal["train", "test"]
_BLACK = 16  # what compression leaves of black, of 255


class Record(BaseModel):
    """One line of the manifest; keys that are not listed here are kept in `model_extra`.

    `width` and `height` are checked against the video; `fps` is information, nothing is resampled to it.
    """

    model_config = ConfigDict(extra="allow", frozen=True, coerce_numbers_to_str=True)

    id: str = Field(min_length=1)
    video: str = Field(min_length=1)
    pose: str = Field(min_length=1)
    reference: str | None = None
    caption: str = ""
    start: int = Field(default=0, ge=0)
    end: int | None = None
    fps: float | None = None
    width: int | None = None
    height: int | None = None
    split: Split = "train"
    subject_id: str | None = None


def read_manifest(folder: str | Path) -> list[Record]:
    """Read and check `manifest.jsonl`.

    ValueError naming the line, the key, its value and what is valid: for a line that is not a JSON object, a missing
    or wrong key, an `end` that is not after `start`, an id used twice, no record at all.
    """
    path = Path(folder) / "manifest.jsonl"
    records: dict[str, Record] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}, {line.strip()[:80]}..."
        try:
            record = Record.model_validate_json(line)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors()]
            raise ValueError(f"{where}: {'; '.join(problems)}") from error
        if record.end is not None and record.end <= record.start:
            raise ValueError(f"{where}: end {record.end} is not after start {record.start}")
        if record.id in records:
            raise ValueError(f"{where}: id {record.id!r} is used twice, ids name one record each")
        records[record.id] = record
    if not records:
        raise ValueError(f"{path} holds no record")
    return list(records.values())


def _crop(height: int, width: int) -> tuple[int, int, int]:
    """Left, top and side of the centre square."""
    side = min(height, width)
    return (width - side) // 2, (height - side) // 2, side


def _fit(image: Tensor, size: int) -> Tensor:
    """Centre-crop to a square and resize with antialiasing, (3, h, w) -> (3, size, size), uint8."""
    left, top, side = _crop(*image.shape[-2:])
    square = image[None, :, top : top + side, left : left + side].float()
    small = interpolate(square, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return small[0].round().clamp(0, 255).to(torch.uint8)


def video_stream(container: av.container.InputContainer, path: str | Path) -> av.VideoStream:
    """Return the stream of a file that is read. ValueError if there is none, or if its pixels are not square."""
    if not container.streams.video:
        raise ValueError(f"{path} has no video stream")
    stream = container.streams.video[0]
    ratio = stream.sample_aspect_ratio or 1  # unknown is square
    if abs(float(ratio) - 1) > 0.01:  # 1280:1281 and the like are what converters' rounding leaves
        raise ValueError(
            f"{path} has pixels of {ratio.numerator}:{ratio.denominator}, which would distort people: make them square "
            'with ffmpeg -i IN -vf "scale=iw*sar:ih,setsar=1" OUT'
        )
    return stream


def _read(path: Path, size: int | None, start: int, end: int | None) -> tuple[Tensor, int, tuple[int, int]]:
    """Decode a file once: the frames of [start, end), resized as they come; how many there are; their (h, w)."""
    kept, total, shapes = [], 0, set()
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video_stream(container, path)):
                if frame.is_corrupt:  # the decoder painted over damage and hands out an invented frame
                    raise ValueError(f"frame {total} of {path} is corrupt")
                if start <= total and (end is None or total < end):
                    image = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
                    image = image.rot90(round(frame.rotation / 90), (1, 2))  # phones film sideways and say so
                    shapes.add((image.shape[1], image.shape[2]))
                    kept.append(image.contiguous() if size is None else _fit(image, size))
                total += 1
    except FileNotFoundError:
        raise
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be decoded after {total} frames: {error}") from error
    if len(shapes) != 1:
        raise ValueError(f"{path}: the frames {start} to {end} of its {total} have the sizes {sorted(shapes)}, not one")
    return torch.stack(kept), total, shapes.pop()


def decode(path: str | Path, *, size: int | None = None, start: int = 0, end: int | None = None) -> Tensor:
    """Decode the frames [start, end) of a video, turned as a player would show them, to (F, 3, H, W) uint8.

    With `size` they are centre-cropped to a square and resized (bilinear, antialiased) one by one. FileNotFoundError
    for a missing file; ValueError for one with damage that the decoder notices (it cannot notice all), without a
    video, of pixels that are not square, of changing size or without such frames.
    """
    return _read(Path(path), size, start, end)[0]


def _read_keypoints(path: Path, shape: tuple[int, int], size: int) -> Tensor:
    """Read a keypoints file into pixels of the resized frames, (F, 17, 3); NaN where no person was found."""
    content = json.loads(path.read_text(encoding="utf-8"))
    try:
        frames, layout, (across, down) = content["points"], content["format"], content["size"]
        found = [i for i, frame in enumerate(frames) if frame is not None]
        raw = torch.from_numpy(np.array([frames[i] for i in found], dtype=np.float32))
        points = to_coco17(raw, layout) if found else torch.zeros(0, 17, 3)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"{path} is no keypoints file: {error!r}") from error
    if points.shape[1:] != (17, 3) or not points.isfinite().all():
        raise ValueError(f"{path} needs a finite x, y and visibility of every keypoint")
    _check_aspect(path, (down, across), shape)
    left, top, side = _crop(*shape)
    scale = torch.tensor((shape[1] / across, shape[0] / down))
    points[..., :2] = (points[..., :2] * scale - torch.tensor((left, top))) * (size / side)
    out = torch.full((len(frames), 17, 3), torch.nan)
    out[found] = points
    return out


def _check_aspect(path: Path, own: tuple[int, int], shape: tuple[int, int]) -> None:
    if abs(own[1] * shape[0] - own[0] * shape[1]) >= 0.02 * own[0] * shape[1]:  # also for a size of 0
        raise ValueError(f"{path} is for frames of {own[1]}x{own[0]}, its video is {shape[1]}x{shape[0]}")


def _read_pose(path: Path, record: Record, shape: tuple[int, int], size: int) -> tuple[Tensor, Tensor, int]:
    """Read keypoints (F, 17, 3) or the frames (F, 3, H, W) of a pose video; who is seen, (F,); how many there are."""
    if path.suffix == ".json":
        points = _read_keypoints(path, shape, size)
        inside = ((points[..., :2] >= 0) & (points[..., :2] < size)).all(-1) & (points[..., 2] >= VISIBLE)
        cut = slice(record.start, record.end)
        return points[cut], inside.sum(-1)[cut] >= 2, len(points)
    maps, total, own = _read(path, size, record.start, record.end)
    _check_aspect(path, own, shape)
    return maps, maps.flatten(1).amax(1) > _BLACK, total


def _check_lengths(record: Record, shape: tuple[int, int], frames: int, poses: int) -> None:
    """Refuse a pose that is not for this video; one frame more or less is what containers lose, so only warn."""
    said = (record.height or shape[0], record.width or shape[1])
    if said != shape:
        raise ValueError(f"the manifest says {said[1]}x{said[0]}, {record.video} is {shape[1]}x{shape[0]}")
    if record.end is not None and record.end > frames:
        raise ValueError(f"end is {record.end}, {record.video} has {frames} frames")
    if abs(frames - poses) > 1:
        raise ValueError(f"{record.video} has {frames} frames, {record.pose} has {poses}")
    if frames != poses:
        message = f"clip {record.id!r}: {frames} frames, {poses} poses: the last of the longer is dropped"
        warnings.warn(message, stacklevel=4)


def _starts(found: list[bool], frames: int, stride: int) -> list[int]:
    """First frames of windows that do not overlap and use only frames where someone was found."""
    span, starts, first = (frames - 1) * stride + 1, [], 0
    while first + span <= len(found):
        whole = all(found[first : first + span : stride])
        starts += [first] if whole else []
        first += span if whole else 1
    return starts


def _still(path: Path, size: int) -> Tensor:
    """Read an image, (3, size, size) uint8."""
    with Image.open(path) as image:
        pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    return _fit(torch.from_numpy(pixels).permute(2, 0, 1), size)


def _windows(folder: Path, record: Record, size: int, frames: int, stride: int) -> list[dict[str, Tensor]]:
    """Cut one clip into windows; `starts` of each is a 0-dimensional integer tensor."""
    video, total, shape = _read(folder / record.video, size, record.start, record.end)
    pose, found, poses = _read_pose(folder / record.pose, record, shape, size)
    _check_lengths(record, shape, total, poses)
    still = _still(folder / record.reference, size) if record.reference else None
    found = found[: len(video)]
    span, usable, windows = (frames - 1) * stride + 1, found.nonzero()[:, 0], []
    for start in _starts(found.tolist(), frames, stride):
        used = slice(start, start + span, stride)
        far = usable[(usable - start - (span - 1) / 2).abs().argmax()]
        clip = {"video": video[used].transpose(0, 1) / 127.5 - 1}
        clip["reference"] = (video[far] if still is None else still) / 127.5 - 1
        if pose.ndim == 3:
            clip["pose"] = draw_skeleton(pose[used], size, size).transpose(0, 1)
            clip["keypoints"] = pose[used]
        else:
            clip["pose"] = pose[used].transpose(0, 1) / 255
        windows.append(clip | {"starts": torch.tensor(record.start + start)})
    if not windows:
        raise ValueError(f"{len(found)} frames, {len(usable)} with a person, hold no window that spans {span}")
    return windows


def load_clips(
    folder: str | Path, *, split: str, size: int, frames: int, stride: int = 1, on_error: str = "record"
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Load the windows of every clip of a split: `frames` frames each, every `stride`-th of the file.

    Frames are centre-cropped to a square and resized to size x size, keypoints with them. Windows of a clip do not
    overlap and use no frame without a person: null keypoints, fewer than two visible ones in the crop, a black frame
    of a pose video. The reference is the record's image, else the frame with a person farthest from the middle of the
    window (outside the window wherever the clip has such a frame).

    Returns (clips, errors). Clips: `video` (N, 3, F, H, W) in [-1, 1], `pose` (N, 3, F, H, W) in [0, 1], `reference`
    (N, 3, H, W) in [-1, 1], `keypoints` (N, F, 17, 3) in pixels unless poses are videos, `starts` (N,) first frames in
    the files, `ids` the N records' ids. Errors: {"id", "error"} a clip that cannot be read (missing or damaged files,
    lengths more than one frame apart, unknown layout, too few frames). ValueError for the first with on_error="raise",
    when no clip can be read, and for keypoints beside pose videos, whose drawings are not interchangeable.
    """
    for value, choices in ((split, get_args(Split)), (on_error, ("record", "raise"))):
        if value not in choices:
            raise ValueError(f"{value!r} is unknown: choose one of {choices}")
    if min(size, frames, stride) < 1:
        raise ValueError(f"size {size}, frames {frames} and stride {stride} must be at least 1")
    windows, ids, errors = [], [], []
    for record in (r for r in read_manifest(folder) if r.split == split):
        try:
            windows += (read := _windows(Path(folder), record, size, frames, stride))
            ids += [record.id] * len(read)
        except (OSError, ValueError) as error:
            if on_error == "raise":
                raise ValueError(f"clip {record.id!r}: {error}") from error
            errors.append({"id": record.id, "error": f"{type(error).__name__}: {error}"})
    if not windows:
        raise ValueError(f"no clip of split {split!r} can be read; the first errors: {errors[:3]}")
    if len({len(window) for window in windows}) > 1:
        raise ValueError("some poses are keypoints and some are videos: draw them all alike, or load them apart")
    return {key: torch.stack([w[key] for w in windows]) for key in windows[0]} | {"ids": ids}, errors


def _pixels(video: Tensor, low: float) -> np.ndarray:
    """Turn (3, F, H, W) in [low, 1] into (F, H, W, 3) uint8; values outside are clamped, NaN is a ValueError."""
    if video.ndim != 4 or video.shape[0] != 3 or 0 in video.shape:
        raise ValueError(f"a video is (3, F, H, W), not {tuple(video.shape)}")
    if low not in (-1, 0) or not video.is_floating_point() or video.isnan().any():
        raise ValueError(f"low is {low}: -1 for a video, 0 for a pose map, of {video.dtype} numbers without NaN")
    levels = (video.detach().cpu().float() - low) * (255 / (1 - low))
    return levels.round().clamp(0, 255).byte().permute(1, 2, 3, 0).numpy()


def write_mp4(path: str | Path, video: Tensor, fps: float, *, low: float = -1, upscale: int = 1) -> None:
    """Write (3, F, H, W) in [low, 1] (-1 for videos, 0 for pose maps) as H.264; values outside are clamped.

    `upscale` repeats pixels, so that a 32-pixel video is watchable. ValueError for an odd size, which this format does
    not know and an even upscale avoids, for NaN and for other shapes.
    """
    images = _pixels(video, low).repeat(upscale, axis=1).repeat(upscale, axis=2)
    height, width = images.shape[1:3]
    if height % 2 or width % 2 or not height:
        raise ValueError(f"H.264 needs even sizes, not {width}x{height}: crop a row or pass an even upscale")
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "15"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_webp(path: str | Path, video: Tensor, fps: float, lossless: bool = True, *, low: float = -1) -> None:
    """Write (3, F, H, W) in [low, 1] as an animated WebP that repeats; equal neighbouring frames may be merged."""
    first, *rest = [Image.fromarray(image) for image in _pixels(video, low)]
    times = [round(i * 1000 / fps) for i in range(len(rest) + 2)]  # milliseconds, rounded without drifting
    durations = [after - before for before, after in zip(times[:-1], times[1:], strict=True)]
    first.save(path, "WEBP", save_all=True, append_images=rest, duration=durations, loop=0, lossless=lossless)


def write_png(path: str | Path, image: Tensor, *, low: float = -1) -> None:
    """Write one image (3, H, W) in [low, 1] as a PNG; values outside are clamped."""
    Image.fromarray(_pixels(image[:, None], low)[0]).save(path, "PNG")
