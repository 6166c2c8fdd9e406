"""Prepared data sets: clips cut, posed and labelled once, in safetensors shards that are read row by row.

A folder holds `dataset.json` (size, frames, fps, where it came from, the hash of its split), `manifest.jsonl` (one
record a clip: `id`, `subject_id`, `split`, `shard`, `row`, and what else is known of it) and `shards/*.safetensors`.
`entprog prepare` writes it from rendered people or from videos; training, scoring and evaluation read it.

Letters: N clips, F frames, H, W pixels.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from entprog.checkpoint import write_whole

SPLITS = ("train", "test", "hard")  # test: unseen people; hard: unseen people and unseen motions

_SHARD_BYTES = 2**28  # a shard lies in memory until it is full

# What a pixel shows. Rendered people know their garments; real footage only knows person, and face by a box.
LABELS = {"background": 0, "face": 1, "skin": 2, "hair": 3, "top": 4, "bottom": 5, "shoes": 6, "person": 7}


@dataclass(frozen=True)
class PreparedClip:
    """One clip of one person, and a reference image of the same person far from it.

    video (F, 3, H, W), reference (3, H, W): uint8. keypoints (F, 17, 3), reference_keypoints (17, 3): COCO-17, x and y
    in pixels of the frame, visibility in [0, 1]. labels (F, H, W), reference_labels (H, W): uint8, values of LABELS.
    face (F, 3, S, S): uint8 crops of the face, where there are any. about: other keys of the manifest line.
    """

    id: str
    subject_id: str
    split: str
    fps: float
    video: Tensor
    keypoints: Tensor
    labels: Tensor
    reference: Tensor
    reference_keypoints: Tensor
    reference_labels: Tensor
    face: Tensor | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v.contiguous() for k, v in values.items() if isinstance(v, Tensor)}


def _content_hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()


def shard_source(path: Path) -> str:
    """Return what tells a shard from another that lay at its place: its content's hash, or size and time without.

    The writer notes the hash in the file, so that a copy of a folder, whose times are new, has the same.
    """
    with safe_open(str(path), framework="pt") as file:
        noted = (file.metadata() or {}).get("content")
    stat = path.stat()
    return noted or f"{stat.st_size} bytes of {stat.st_mtime_ns}"


def shard_rows(path: Path) -> int:
    """Return how many clips lie in a shard or in its copy in a cache, whatever the manifest still lists."""
    with safe_open(str(path), framework="pt") as file:
        return int(file.get_slice(next(iter(file.keys()))).get_shape()[0])


def split_hash(records: Iterable[Mapping[str, Any]]) -> str:
    """Return 12 hex digits that change when any clip changes its split or person."""
    lines = sorted(f"{r['id']}\t{r['subject_id']}\t{r['split']}" for r in records)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


class ShardWriter:
    """Write prepared clips; used as a context manager. What was written before an interruption is kept.

        with ShardWriter(folder, about={"kind": "rendered", "size": 64, "frames": 16, "fps": 8, "seed": 0}) as writer:
            for clip in clips:
                if clip.id not in writer.done: writer.add(clip)

    Clips of different shapes go to different shards. A shard is written whole before the manifest names its clips.
    ValueError if the folder holds clips of another `about`, for a split that SPLITS lacks and for an id used twice.
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any], *, per_shard: int = 64) -> None:
        self.folder, self.about, self.per_shard = Path(folder), dict(about), per_shard
        (self.folder / "shards").mkdir(parents=True, exist_ok=True)
        path, manifest = self.folder / "dataset.json", self.folder / "manifest.jsonl"
        if manifest.exists() and not path.exists():
            raise ValueError(f"{folder} holds a manifest of something else: choose another --out")
        self.records = mended_lines(manifest)
        if path.exists() and self.records:  # an attempt that made no clip binds nobody
            saved = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("clips", "split_hash")}
            if saved != json.loads(json.dumps(self.about)):
                raise ValueError(
                    f"{folder} was prepared as {saved}, now asked for as {self.about}: choose another --out"
                )
        self._write_about({})
        self.done = {r["id"] for r in self.records}
        self._pending: dict[Any, list[PreparedClip]] = {}

    def _write_about(self, counted: Mapping[str, Any]) -> None:
        write_whole(self.folder / "dataset.json", json.dumps(self.about | dict(counted), indent=1) + "\n")

    def add(self, clip: PreparedClip) -> None:
        """Take a clip; it is on disk when its shard is full or the writer is closed."""
        if clip.split not in SPLITS:
            raise ValueError(f"clip {clip.id!r} has the split {clip.split!r}: choose one of {SPLITS}")
        if clip.id in self.done:
            raise ValueError(f"clip id {clip.id!r} is used twice, ids name one clip each")
        self.done.add(clip.id)
        shapes = tuple((k, tuple(v.shape)) for k, v in sorted(clip.tensors().items()))
        group = self._pending.setdefault((clip.split, shapes), [])
        group.append(clip)
        size = sum(v.nbytes for v in clip.tensors().values())
        if len(group) >= min(self.per_shard, max(1, _SHARD_BYTES // size)):
            self._flush(group)

    def _flush(self, group: list[PreparedClip]) -> None:
        if not group:
            return
        number = 1 + max((int(r["shard"].split("-")[-1].split(".")[0]) for r in self.records), default=-1)
        name = f"{group[0].split}-{number:05d}.safetensors"
        rows = [clip.tensors() for clip in group]
        tensors = {k: torch.stack([r[k] for r in rows]) for k in rows[0]}
        partial = self.folder / "shards" / f"{name}.partial"
        save_file(tensors, partial, metadata={"content": _content_hash(tensors)})
        partial.rename(self.folder / "shards" / name)
        lines = []
        for row, clip in enumerate(group):
            height, width = clip.video.shape[-2:]
            record = {"id": clip.id, "subject_id": clip.subject_id, "split": clip.split, "shard": name, "row": row,
                      "fps": clip.fps, "frames": len(clip.video), "height": height, "width": width}  # fmt: skip
            self.records.append(record | dict(clip.about))
            lines.append(json.dumps(self.records[-1]) + "\n")
        with (self.folder / "manifest.jsonl").open("a") as manifest:
            manifest.write("".join(lines))
        group.clear()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Write what is pending, and after a run that made clips, without error, their number and the split's hash."""
        for group in self._pending.values():
            self._flush(group)
        if kind is None and self.records:
            self._write_about({"clips": len(self.records), "split_hash": split_hash(self.records)})


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; a last line that a crash cut short is left out, what it told is done again."""
    *whole, last = path.read_text().split("\n")
    if _is_json(last):  # written by hand, or cut just before its end
        whole.append(last)
    return [json.loads(line) for line in whole if line.strip()]


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def mended_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines that is to be added to, none if it is not there.

    A last line that a crash cut short is cut off; those before it are not written again, so that no kill loses them.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    begin = content.rfind(b"\n") + 1
    if begin < len(content) and _is_json(content[begin:].decode(errors="replace")):
        with path.open("a") as file:
            file.write("\n")
    elif begin < len(content):
        os.truncate(path, begin)
    return _read_lines(path)


def shape_groups(records: Iterable[Mapping[str, Any]]) -> list[list[int]]:
    """Group the places of records by the shape of their clips: only equals can share a batch."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, record in enumerate(records):
        groups.setdefault((record["frames"], record["height"], record["width"]), []).append(place)
    return list(groups.values())


def read_manifest(folder: str | Path) -> list[dict[str, Any]]:
    """Return the record of every clip of a folder. ValueError for a folder that is not prepared."""
    if not is_prepared(folder):
        raise ValueError(f"{folder} holds no dataset.json: run entprog prepare first")
    if not (path := Path(folder) / "manifest.jsonl").exists():
        raise ValueError(f"{folder} holds no manifest.jsonl, no clip was made yet: run its `entprog prepare` again")
    return _read_lines(path)


def is_prepared(folder: str | Path) -> bool:
    """Whether a folder holds a prepared data set (and not, say, a manifest of video files)."""
    return (Path(folder) / "dataset.json").exists()


def read_about(folder: str | Path, *, finished: bool = True) -> dict[str, Any]:
    """Return a prepared folder's dataset.json.

    ValueError for a folder that is not prepared, and with `finished` for one whose clips are not all there: the hash of
    the split is written last.
    """
    if not is_prepared(folder):
        raise ValueError(f"{folder} holds no dataset.json: run entprog prepare first")
    about: dict[str, Any] = json.loads((Path(folder) / "dataset.json").read_text())
    if finished and "split_hash" not in about:
        raise ValueError(
            f"{folder} is not finished, its `entprog prepare` was interrupted, still runs or made no clip: run the "
            "same command again, it goes on where it was"
        )
    return about


def stored_size(folder: str | Path) -> int | None:
    """Return the `size` that a folder was prepared with, None for one that is not prepared or does not say."""
    size = read_about(folder, finished=False).get("size") if is_prepared(folder) else None
    return size if isinstance(size, int) else None


def spread_evenly(count: int, limit: int) -> list[int]:
    """Return at most `limit` of the rows 0 .. count - 1, spread evenly."""
    return [i * count // limit for i in range(limit)] if limit < count else list(range(count))


class Prepared:
    """The clips of one split of a prepared folder, read from disk when they are asked for.

    `about` is dataset.json, its `clips` and `split_hash` those of the manifest as it is: lines may have been taken out
    by hand. `every` are all manifest lines, `records` those of the split, in order; with `limit` so many of them,
    spread evenly over the split. ValueError for a folder that is not prepared, or only in part, or whose split is
    empty.
    """

    def __init__(self, folder: str | Path, split: str, limit: int | None = None) -> None:
        self.folder, self.split = Path(folder), split
        about, self.every = read_about(folder), read_manifest(folder)
        self.about = about | {"clips": len(self.every), "split_hash": split_hash(self.every)}
        self.records = [r for r in self.every if r["split"] == split]
        if not self.records:
            raise ValueError(
                f"{folder} has no clip of split {split!r}: choose one of {sorted({r['split'] for r in self.every})}"
            )
        if limit is not None:
            self.records = [self.records[i] for i in spread_evenly(len(self.records), limit)]
        self._open: dict[Path, Any] = {}

    def __len__(self) -> int:
        return len(self.records)

    def rows(self, indices: Sequence[int], names: Sequence[str]) -> dict[str, Tensor]:
        """Read some tensors of some clips, stacked on a first axis. ValueError for clips of different shapes."""
        read = [[self.stored(self.records[i], name)[self.records[i]["row"]] for name in names] for i in indices]
        if len(shapes := {tuple(tuple(v.shape) for v in row) for row in read}) > 1:
            raise ValueError(f"the clips {list(indices)} have different shapes {sorted(shapes)}: batch them by bucket")
        return {name: torch.stack([row[i] for row in read]) for i, name in enumerate(names)}

    def stored(self, record: Mapping[str, Any], name: str, cache: str = "") -> Any:
        """Return the slice object of one tensor of a clip's shard, or of that shard's copy in a cache folder."""
        path = self.folder / (cache or "shards") / record["shard"]
        if path not in self._open:
            self._open[path] = safe_open(str(path), framework="pt")  # mapped, not loaded
        return self._open[path].get_slice(name)
