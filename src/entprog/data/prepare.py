"""Turn raw videos of people into a prepared data set: find the person, frame it, cut windows, label, split by person.

A video is read twice, as a stream: once reduced, to follow the person through the frames nearest to the time stamps
k / fps, and once in full, to cut out what was planned. Nothing is upscaled beyond `min_person`, padded or invented, and
what cannot be used is listed with its reason.

Letters: N sampled frames of a video, F frames of a window.
"""

import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from entprog.data.detect import PoseEstimator, Tracker, mirrored_keypoints
from entprog.data.follow import Track, follow, sampled, to_image, windows
from entprog.data.framing import (
    Box,
    body_extent,
    body_scale,
    bucket_sizes,
    covers,
    crop_box,
    cut,
    cut_mask,
    face_boxes,
    holds,
    label,
    to_box,
)
from entprog.data.prepared import PreparedClip, ShardWriter, is_prepared, mended_lines
from entprog.data.sources import Source, find_subjects, find_videos, pose_folders, split_sources, videos_called

_MOVED = 0.6  # what a reference counts whose box must be moved, compared to one in the window's own box


@dataclass(frozen=True)
class _Settings:
    """What every video is prepared with; see prepare_videos."""

    sizes: list[tuple[int, int]]
    lengths: list[int]
    fps: float
    face_size: int
    min_person: float
    min_presence: float
    smooth: float


@dataclass
class _Plan:
    """A clip to be cut: frames [start, start + length) of the sampled frames, and the reference's."""

    start: int
    length: int
    size: tuple[int, int]
    box: Box
    reference: int
    reference_box: Box
    images: dict[int, Tensor] = field(default_factory=dict)  # by sampled frame
    faces: dict[int, Tensor] = field(default_factory=dict)

    @property
    def needs(self) -> list[int]:
        return [*range(self.start, self.start + self.length), self.reference]


def _plan(track: Track, start: int, length: int, settings: _Settings) -> _Plan | str:
    """Frame a window and choose its reference, or say why it is left out."""
    used = slice(start, start + length)
    if track.presence[used].mean() < settings.min_presence:
        return "unsure that there is a person"
    extent = body_extent(track.points[used])
    if not np.isfinite(extent).all():
        return "no visible joints"
    framed = _framed(extent, track.shape, settings.sizes)
    if framed is None:
        whole = Fraction(track.shape[1], track.shape[0]).limit_denominator(16)
        wider = f"add --aspects {whole.numerator}:{whole.denominator}, the frame's own"
        return f"the body leaves the largest crop: {wider}, or choose fewer --frames"
    size, box = framed
    tall = float(np.nanmedian([_height(p) for p in track.points[used]]))  # a frame without visible joints has none
    if tall < settings.min_person * size[0]:
        return f"the person is smaller than {settings.min_person:g} times the clip's height"
    reference = _reference(track, start, length, box)
    if reference is None:
        return "no other frame of the shot shows the whole body for the reference"
    own = body_extent(track.points[reference : reference + 1])
    moved = box if covers(box, own) else _centred(box, own, track.shape)
    return _Plan(start, length, size, box, reference, moved)


def _framed(
    extent: tuple[float, float, float, float], shape: tuple[int, int], sizes: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int], Box] | None:
    """Return the size nearest to an extent's shape of those whose box holds it, and that box; None if no box does."""
    ratio = (extent[2] - extent[0]) / max(extent[3] - extent[1], 1)
    nearest = sorted(sizes, key=lambda s: abs(np.log(s[1] / s[0]) - np.log(max(ratio, 1e-3))))
    boxes = ((size, crop_box(extent, shape, size)) for size in nearest)
    return next(((size, box) for size, box in boxes if holds(box, extent, shape)), None)


def _height(points: Tensor) -> float:
    extent = body_extent(points[None])
    return max(extent[3] - extent[1], extent[2] - extent[0])


def _centred(box: Box, extent: tuple[float, float, float, float], shape: tuple[int, int]) -> Box:
    """Move a box so that an extent is in its middle, without leaving the frame."""
    x, y = round((extent[0] + extent[2] - box[2]) / 2), round((extent[1] + extent[3] - box[3]) / 2)
    return min(max(x, 0), shape[1] - box[2]), min(max(y, 0), shape[0] - box[3]), box[2], box[3]


def _reference(track: Track, start: int, length: int, box: Box) -> int | None:
    """Choose the frame of the shot, outside the window, that is farthest from it in pose and time and shows most.

    Only frames whose body is visible and fits into the window's box, moved if need be. One in which it lies inside the
    box as it is counts more, since its background is the same.
    """
    inside_window = range(start, start + length)
    sure = float(track.presence[start : start + length].min())
    others = [
        k
        for k, shot in enumerate(track.shots)
        if shot == track.shots[start] and track.usable[k] and k not in inside_window and track.presence[k] >= sure
    ]
    extents = {k: body_extent(track.points[k : k + 1]) for k in others}
    others = [k for k in others if np.isfinite(extents[k]).all()]
    others = [k for k in others if holds(_centred(box, extents[k], track.shape), extents[k], track.shape)]
    if not others:
        return None
    chosen = torch.tensor(others)
    fits = torch.tensor([covers(box, extents[k]) for k in others])
    poses = track.points[..., :2] - track.points[:, [11, 12], :2].mean(1, keepdim=True)
    poses = poses / body_scale(track.points)[:, None, None]
    apart = (poses[chosen][:, None] - poses[None, start : start + length]).norm(dim=-1).mean(-1).amin(-1)
    late = (chosen - start - (length - 1) / 2).abs() / len(track.shots)
    shown = track.points[chosen][..., 2].mean(-1)
    return int(chosen[(shown * (apart + late) * torch.where(fits, 1.0, _MOVED)).argmax()])


def _cut_plans(path: Path, track: Track, plans: list[_Plan], settings: _Settings) -> Iterator[_Plan]:
    """Read the video again and yield the plans as their pictures are complete."""
    needed: dict[int, list[_Plan]] = {}
    face_at: dict[tuple[int, int], Box] = {}
    for plan in plans:
        for k in plan.needs:
            needed.setdefault(k, []).append(plan)
        if settings.face_size:
            boxes = face_boxes(track.points[plan.start : plan.start + plan.length])
            face_at |= {(plan.start, plan.start + i): box for i, box in enumerate(boxes)}
    for k, (frame, _) in enumerate(sampled(path, settings.fps)):
        image = to_image(frame) if k in needed else None
        for plan in needed.pop(k, ()):
            assert image is not None
            plan.images[k] = cut(image, plan.reference_box if k == plan.reference else plan.box, plan.size)
            if (plan.start, k) in face_at:
                plan.faces[k] = cut(image, face_at[plan.start, k], (settings.face_size, settings.face_size))
            if len(plan.images) == plan.length + 1:
                yield plan
        if not needed:
            return


def _labels(track: Track, k: int, box: Box, points: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut the person mask of a sampled frame like its picture, and label it."""
    h, w = track.mask_shape
    mask = np.unpackbits(track.masks[k], count=h * w).reshape(h, w)
    return label(cut_mask(mask, track.shape, box, size), points)


def _clip(source: Source, track: Track, plan: _Plan, settings: _Settings) -> PreparedClip:
    """Put a finished plan together, and let go of its pictures."""
    used = range(plan.start, plan.start + plan.length)
    points = to_box(track.points[plan.start : plan.start + plan.length], plan.box, plan.size)
    own = to_box(track.points[plan.reference], plan.reference_box, plan.size)
    labels = [_labels(track, k, plan.box, p, plan.size) for k, p in zip(used, points, strict=True)]
    clip = PreparedClip(
        id=f"{source.name}@{plan.start:05d}x{plan.length}",
        subject_id=source.subject,
        split=source.split,
        fps=settings.fps,
        video=torch.stack([plan.images[k] for k in used]),
        keypoints=points,
        labels=torch.stack(labels),
        reference=plan.images[plan.reference],
        reference_keypoints=own,
        reference_labels=_labels(track, plan.reference, plan.reference_box, own, plan.size),
        face=torch.stack([plan.faces[k] for k in used]) if plan.faces else None,
        about={
            "video": source.name,
            "seconds": round(plan.start / settings.fps, 3),
            "box": plan.box,
            "reference_seconds": round(plan.reference / settings.fps, 3),
            "reference_box": plan.reference_box,
            "presence": round(float(track.presence[plan.start : plan.start + plan.length].mean()), 3),
        },
    )
    plan.images, plan.faces = {}, {}
    return clip


def video_clips(source: Source, tracker: Tracker, settings: _Settings, refused: Counter[str]) -> Iterator[PreparedClip]:
    """Yield the clips of one video; windows left out are counted in `refused`, by reason.

    ValueError saying what was found if there is no clip.
    """
    track = follow(source.path, settings.fps, tracker, smooth=settings.smooth)
    plans = []
    for start, length in windows(track, settings.lengths):
        plan = _plan(track, start, length, settings)
        if isinstance(plan, str):
            refused[plan] += 1
        else:
            plans.append(plan)
    if not plans:
        reasons = "; ".join(f"{reason} ({count} windows)" for reason, count in refused.items())
        raise ValueError(
            f"{len(track.usable)} frames at {settings.fps:g} per second, {sum(track.usable)} with a person, hold no "
            f"clip of {min(settings.lengths)} frames: {reasons or 'never that many in a row'}"
        )
    for plan in _cut_plans(source.path, track, plans, settings):
        yield _clip(source, track, plan, settings)


def prepare_videos(
    videos: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    size: int = 256,
    frames: int | Sequence[int] = 16,
    fps: float = 8,
    aspects: Sequence[str] = ("1:1",),
    subject: str | Path | Mapping[str, str] = "video",
    test_share: float = 0.1,
    test_subjects: Sequence[str] = (),
    test_videos: Sequence[str] = (),
    min_person: float = 0.5,
    min_presence: float = 0.9,
    face_size: int = 0,
    smooth: float = 0.04,
    flips: bool = False,
    seed: int = 0,
    tracker: Tracker | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Prepare clips of `frames` frames at `fps` around one person from videos, written to `out` by ShardWriter.

    Args:
        videos: a folder, a list of files, or a JSON list; see `find_videos`.
        size: pixels; a clip of aspect 1:1 is size x size, others have about as many pixels; see `bucket_sizes`.
        frames: one length of the windows, or several (the longest that fits is cut first).
        fps: frames a second, sampled by time stamps. A video with fewer is refused, not repeated.
        aspects: width to height; each clip takes the one nearest to the shape of the body's path that holds it.
        subject: whom a video shows; see `find_subjects`. Views of one person never lie in both splits, except by
            test_videos.
        test_share, test_subjects, test_videos, seed: who is kept for testing; see `split_sources`.
        min_person: the person's length must be this share of the clip's height, in pixels of the source.
        min_presence: mean confidence in [0, 1] that there is a person, below which a window is left out.
        face_size: pixels of the square face crops, 0 for none. Wan-Animate takes 512.
        smooth: seconds over which the track is smoothed; see `smooth_track`.
        flips: whether each training clip comes a second time, mirrored, left and right joints exchanged.
        tracker: what finds the person, PoseEstimator() by default.
        on_progress: called with (videos done, videos, name of the next).

    The crop is one box for a whole clip, inside the frame; a window whose body leaves the largest such box is left out,
    since its clip would show no head, no feet or nobody. The reference is the frame of the same shot, outside the
    window, that is farthest from it in pose and time; if the body has left the window's box there, the box is moved
    after it (`reference_box` differs from `box` in the manifest). Labels are person (network's mask) and face (its
    part inside the face's circle).

    A run that was interrupted goes on where it was: videos in `videos.jsonl` are not read again, and must be the same
    files of the same people. Videos that cannot be used are listed in `errors.json` with the reason, and tried again
    next time. Returns {"clips": by split, "errors": the list, "warnings", "left_out": windows of the other videos by
    reason, "seconds"}. ValueError for wrong options, a video that changed since its clips were made, and if there is no
    clip at all.
    """
    lengths = sorted({frames} if isinstance(frames, int) else set(frames))
    if not lengths or lengths[0] < 1 or fps <= 0 or face_size < 0 or min_person < 0:
        raise ValueError(
            f"frames {frames}, fps {fps} must be positive, face_size {face_size} and min_person not negative"
        )
    sizes = bucket_sizes(size, aspects)
    settings = _Settings(sizes, lengths, float(fps), face_size, min_person, min_presence, smooth)
    named = find_videos(videos)
    options = {"test_share": test_share, "test_subjects": test_subjects, "test_videos": test_videos}
    sources, said = split_sources(named, find_subjects(named, subject), seed=seed, **options)  # type: ignore[arg-type]
    alone = videos_called(named, test_videos)
    said += [
        f"{folder} was left out, its name says pose videos: rename it if it is footage"
        for folder in pose_folders(videos)
    ]
    for message in said:
        warnings.warn(message, stacklevel=2)
    about = {
        "kind": "videos", "size": size, "frames": lengths[0] if len(lengths) == 1 else lengths, "fps": float(fps),
        "aspects": list(aspects), "face_size": face_size, "min_person": min_person, "min_presence": min_presence,
        "smooth": smooth, "flips": flips, "seed": seed, "warnings": said,
        "poses": getattr(tracker, "name", "BlazePose"),
        "test": sorted({s.name if s.name in alone else s.subject for s in sources if s.split == "test"}),
    }  # fmt: skip
    return _write(sources, Path(out), about, settings, tracker, on_progress)


def mirrored(clip: PreparedClip) -> PreparedClip:
    """Return a clip flipped left to right, under its own id, as another clip of the same person."""
    width = clip.video.shape[-1]
    values = clip.tensors()
    turned: dict[str, Any] = {
        k: mirrored_keypoints(v, width) if "keypoints" in k else v.flip(-1) for k, v in values.items()
    }
    return replace(clip, id=f"{clip.id}-mirrored", about={**clip.about, "mirrored": True}, **turned)


def _write(
    sources: Sequence[Source],
    out: Path,
    about: Mapping[str, Any],
    settings: _Settings,
    tracker: Tracker | None,
    on_progress: Callable[[int, int, str], None] | None,
) -> dict[str, Any]:
    began, errors = time.perf_counter(), []
    _check_unchanged(sources, out)
    with ShardWriter(out, about) as writer:
        finished = _finished(out / "videos.jsonl", writer.done)
        for number, source in enumerate(sources):
            if on_progress:
                on_progress(number, len(sources), source.name)
            if source.name in finished:
                continue
            tracker = tracker or PoseEstimator()
            ids, refused = [], Counter[str]()
            try:
                for whole in video_clips(source, tracker, settings, refused):
                    flipped = [mirrored(whole)] if about["flips"] and whole.split == "train" else []
                    for clip in (whole, *flipped):
                        ids.append(clip.id)
                        if clip.id not in writer.done:
                            writer.add(clip)
            except (OSError, ValueError, av.FFmpegError) as error:
                errors.append({"video": str(source.path), "error": f"{type(error).__name__}: {error}"})
                continue
            with (out / "videos.jsonl").open("a") as file:
                line = {"video": source.name, "ids": ids, "left_out": dict(refused)} | _identity(source)
                file.write(json.dumps(line) + "\n")
    (out / "errors.json").write_text(json.dumps(errors, indent=1) + "\n")
    if not writer.records:
        raise ValueError(f"no clip could be made of {len(sources)} videos; the first errors: {errors[:3]}")
    clips = dict(Counter(record["split"] for record in writer.records))
    left_out = sum((Counter(line.get("left_out")) for line in mended_lines(out / "videos.jsonl")), Counter[str]())
    return {"clips": clips, "errors": errors, "warnings": about["warnings"], "left_out": dict(left_out),
            "seconds": time.perf_counter() - began}  # fmt: skip


def _identity(source: Source) -> dict[str, Any]:
    """Return what a name alone does not say: whom a video shows, in which split, and which file it is."""
    file = source.path.stat()
    return {"subject_id": source.subject, "split": source.split, "bytes": file.st_size, "modified": int(file.st_mtime)}


def _check_unchanged(sources: Sequence[Source], out: Path) -> None:
    """ValueError if a video that clips were made of is now another file, another person's or in the other split.

    The clips themselves are asked too: of a video that was interrupted there are some, but no line in videos.jsonl.
    """
    if not is_prepared(out):
        return
    now = {source.name: _identity(source) for source in sources if source.path.exists()}
    for record in mended_lines(out / "manifest.jsonl") + mended_lines(out / "videos.jsonl"):
        is_now = now.get(record.get("video", ""), {})
        if differs := [f"{k} was {record[k]!r}, is {v!r}" for k, v in is_now.items() if record.get(k, v) != v]:
            raise ValueError(
                f"{out} has clips of another video {record['video']!r}: {', '.join(differs)}: choose another --out, or "
                "delete the folder to prepare all videos again"
            )


def _finished(path: Path, done: set[str]) -> set[str]:
    """Return the videos whose clips are all on disk."""
    return {record["video"] for record in mended_lines(path) if set(record["ids"]) <= done}
