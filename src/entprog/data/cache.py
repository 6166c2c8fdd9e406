"""Prepared clips as a model takes them: latents and pose maps, made once, kept beside the data, read row by row.

`load_split` writes `cache/KEY/` into a prepared folder, one shard for each of its shards, where KEY names the
autoencoder and the pose style, and returns a data set (data/batches.py) of `Stored` tensors. A cached shard has all
rows of its shard, whatever the manifest lists, and notes of which shard it was made. A `Stored` is what a tensor on
disk looks like to a batch: it has a shape, a length, slices, and is read when rows of it are asked for, so that a data
set may be larger than memory.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from entprog.data.pose import POSE_STYLE, draw_skeleton
from entprog.data.prepared import Prepared, shape_groups, shard_rows, shard_source

if TYPE_CHECKING:
    from entprog.models.autoencoder import Autoencoder

CACHED = ("video", "pose", "labels", "reference", "reference_pose")
_FRAME_AXIS = {"video": 1, "pose": 1, "labels": 0}  # of a clip, for what has one entry a frame


class Stored:
    """One tensor of a split, first axis clips, that lies in shards and is read when `take` asks for rows.

    Stands for a tensor where only `len`, `shape`, slices of clips and `take` are needed. Clips may have several
    shapes; `buckets` says which go together.
    """

    def __init__(self, prepared: Prepared, name: str, cache: str, indices: Sequence[int] | None = None) -> None:
        self.prepared, self.name, self.cache = prepared, name, cache
        self.indices = list(range(len(prepared))) if indices is None else list(indices)
        self._buckets: list[list[int]] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def _slice(self, index: int) -> tuple[Any, int]:
        record = self.prepared.records[self.indices[index]]
        return self.prepared.stored(record, self.name, self.cache), record["row"]

    @property
    def shape(self) -> torch.Size:
        """The shape that all clips together would have; that of the first clip where shapes differ."""
        return torch.Size([len(self), *self._slice(0)[0].get_shape()[1:]])

    def __getitem__(self, part: slice) -> "Stored":
        return self.subset(range(len(self))[part])

    def subset(self, rows: Sequence[int]) -> "Stored":
        """Return the same tensor of some clips only."""
        return Stored(self.prepared, self.name, self.cache, [self.indices[row] for row in rows])

    def buckets(self) -> list[list[int]]:
        """Group the rows by the shape of their clips, as the manifest knows it: only equals can share a batch."""
        if self._buckets is None:  # asked for at every batch
            self._buckets = shape_groups(self.prepared.records[index] for index in self.indices)
        return self._buckets

    def first(self, count: int) -> list[int]:
        """Return the first `count` rows that can share a batch: of several shapes, those of the first clip's."""
        return self.buckets()[0][:count]

    def ids(self, rows: Sequence[int]) -> list[str]:
        """Return the ids of the clips in some rows."""
        return [self.prepared.records[self.indices[row]]["id"] for row in rows]

    def take(self, rows: Sequence[int], windows: Sequence[slice] | None = None) -> Tensor:
        """Read rows, of each only the frames of its window; stacked."""
        read = []
        for i, row in enumerate(rows):
            stored, place = self._slice(row)
            if windows is None or self.name not in _FRAME_AXIS:
                read.append(stored[place])
            else:
                read.append(stored[(place, *[slice(None)] * _FRAME_AXIS[self.name], windows[i])])
        return torch.stack(read)


Column = Tensor | Stored


def take(column: Column, name: str, rows: Sequence[int], windows: Sequence[slice] | None = None) -> Tensor:
    """Return rows of a data set's tensor as floats, of each only the frames of its window.

    Bytes become [0, 1] for a pose map and [-1, 1] for pixels; labels stay bytes.
    """
    if isinstance(column, Stored):
        values = column.take(rows, windows)
    elif windows is None or name not in _FRAME_AXIS:
        values = column[list(rows)]
    else:
        axis = _FRAME_AXIS[name]
        values = torch.stack([column[r][(*[slice(None)] * axis, w)] for r, w in zip(rows, windows, strict=True)])
    if name == "labels":
        return values
    if values.dtype == torch.uint8:
        return values / 255 if "pose" in name else values / 127.5 - 1
    return values.float()


def pose_maps(keypoints: Tensor, height: int, width: int) -> Tensor:
    """Draw poses (..., 17, 3) as bytes, channels first: (..., 3, H, W)."""
    return (draw_skeleton(keypoints, height, width) * 255).round().to(torch.uint8)


def _converted(tensors: dict[str, Tensor], autoencoder: "Autoencoder | None") -> dict[str, Tensor]:
    """Turn a shard of prepared clips into what a model takes; latents are kept in half precision."""
    height, width = tensors["video"].shape[-2:]
    video, reference = tensors["video"].transpose(1, 2), tensors["reference"][:, :, None]
    if autoencoder is not None:
        # A CPU with tiles for bf16 encodes four times as fast with them; latents of unit variance move by .007.
        quick = autoencoder.mean.device.type == "cpu" and torch.cpu._is_amx_tile_supported()
        with torch.autocast("cpu", torch.bfloat16, enabled=quick):
            video, reference = (autoencoder.encode(x / 127.5 - 1).half().cpu() for x in (video, reference))
    return {
        "video": video,  # (n, C, F, h, w)
        "pose": pose_maps(tensors["keypoints"], height, width).transpose(1, 2),  # (n, 3, F, H, W)
        "labels": tensors["labels"],  # (n, F, H, W)
        "reference": reference[:, :, 0],
        "reference_pose": pose_maps(tensors["reference_keypoints"], height, width),
    }


def is_current(cached: Path, shard: Path) -> bool:
    """Whether a cached shard is there, of the shard as it is now and of all its rows."""
    if not cached.exists() or shard_rows(cached) != shard_rows(shard):
        return False
    with safe_open(str(cached), framework="pt") as file:
        source = (file.metadata() or {}).get("source")
    if source is None:  # of a version that noted none
        return cached.stat().st_mtime_ns >= shard.stat().st_mtime_ns
    return source == shard_source(shard)


def save_columns(columns: dict[str, Tensor], cached: Path, shard: Path | None = None) -> None:
    """Write a file of a cache, whole or not at all, with a note of the shard that it was made of."""
    partial, note = cached.with_name(cached.name + ".partial"), {"source": shard_source(shard)} if shard else None
    save_file({k: v.contiguous() for k, v in columns.items()}, partial, metadata=note)
    partial.rename(cached)


def load_split(
    folder: str | Path,
    split: str,
    autoencoder: "Autoencoder | None" = None,
    on_progress: Callable[[float], Any] | None = None,
    limit: int | None = None,
) -> dict[str, Stored]:
    """Open a split of a prepared folder for training, encoding what is not cached yet.

    Returns `video` (N, C, F, h, w), `pose` (N, 3, F, H, W), `labels` (N, F, H, W), `reference` (N, C, h, w) and
    `reference_pose` (N, 3, H, W), all Stored. With `limit` so many clips, spread evenly over the split.
    """
    prepared = Prepared(folder, split)
    name = Path(autoencoder.name).name if autoencoder is not None else "pixels"
    weights = autoencoder.fingerprint() if autoencoder is not None else ""
    key = f"{name}-{hashlib.sha256(f'{weights} {POSE_STYLE}'.encode()).hexdigest()[:8]}"
    cache = Path(folder) / "cache" / key
    cache.mkdir(parents=True, exist_ok=True)
    shards = sorted({r["shard"] for r in prepared.records})
    for i, shard in enumerate(shards):
        source = Path(folder) / "shards" / shard
        if not is_current(cache / shard, source):
            save_columns(_converted(load_file(source), autoencoder), cache / shard, source)
        if on_progress:
            on_progress((i + 1) / len(shards))
    chosen = Prepared(folder, split, limit)
    return {k: Stored(chosen, k, f"cache/{key}") for k in CACHED}
