"""A prepared data set as a pipeline folder takes it: latents, text and image embeddings, made once beside the data.

`encode` writes `cache/KEY/` into a prepared folder, one shard for each of its shards, and `empty.safetensors` with the
empty prompt. KEY names the model and ends in a fingerprint of its encoders, the fixed caption and the pose style.
Columns are those of the folder's recipe (models/wan.py) and `text` (512, D); each row is one clip.
"""

import gc
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from entprog.data.cache import Stored, pose_maps
from entprog.data.pose import POSE_STYLE
from entprog.data.prepared import SPLITS, Prepared, read_manifest
from entprog.measure import best_device
from entprog.models.wan import TOKENS, Clip, draw, open_encoders, recipe_of

if TYPE_CHECKING:
    from torch import nn

    from entprog.config import RunConfig

ENCODING = ("vae", "text_encoder", "tokenizer", "image_encoder", "image_processor")
_END = 2**20  # bytes of each end of a large file that the fingerprint reads
HALVED = ("video", "control", "condition", "pose_latents")  # latents of about unit variance, and masks


def fingerprint(folder: str | Path) -> str:
    """Return 8 hex digits that change with a pipeline folder's encoders and with the shape of its transformer.

    Of files larger than 2 MiB the size and both ends are read, so that gigabytes need not be.
    """
    digest = hashlib.sha256()
    files = [p for part in ENCODING for p in sorted((Path(folder) / part).glob("*")) if p.is_file()]
    for path in (*files, Path(folder) / "model_index.json", Path(folder) / "transformer" / "config.json"):
        size = path.stat().st_size
        digest.update(f"{path.parent.name}/{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_END if size > 2 * _END else size))
            if size > 2 * _END:
                file.seek(-_END, 2)
                digest.update(file.read())
    return digest.hexdigest()[:8]


def _key(folder: str | Path, caption: str | None) -> str:
    about = f"{fingerprint(folder)} {caption!r} {POSE_STYLE}"
    return f"{Path(folder).resolve().name}-{hashlib.sha256(about.encode()).hexdigest()[:8]}"


def _whole(frames: int, step: int) -> int:
    """Return how many of a clip's frames the autoencoder takes: 1 and a multiple of its step in time."""
    return (frames - 1) // step * step + 1


def _clip(tensors: Mapping[str, Tensor], row: int, frames: int) -> Clip:
    """Cut a clip out of a shard or a stack of rows."""
    video, face = tensors["video"][row, :frames], tensors.get("face")
    pose = pose_maps(tensors["keypoints"][row, :frames], *video.shape[-2:])
    return Clip(video, pose, tensors["reference"][row], None if face is None else face[row, :frames])


class Encoders:
    """A folder's encoders on the best device, and the texts that they have encoded."""

    def __init__(self, folder: str | Path, caption: str | None) -> None:
        self.caption, self.recipe, self.device = caption, recipe_of(folder), best_device()
        self.pipe = open_encoders(folder, self.device)
        self.texts: dict[str, Tensor] = {}

    def text(self, prompt: str) -> Tensor:
        """Return the embedding of a prompt, (512, D)."""
        if prompt not in self.texts:
            embeds, _ = self.pipe.encode_prompt(prompt, None, False, max_sequence_length=TOKENS, device=self.device)
            self.texts[prompt] = embeds[0].cpu()
        return self.texts[prompt]

    def caption_of(self, record: Mapping[str, Any]) -> str:
        """Return a clip's prompt. ValueError for a clip without, where there is no fixed one."""
        prompt = self.caption if self.caption is not None else record.get("caption")
        if prompt is None:
            raise ValueError(f"clip {record['id']!r} has no caption: add \"caption\" to its line of manifest.jsonl, or "
                             "give one for all clips (--caption TEXT, caption=TEXT)")  # fmt: skip
        return prompt

    def columns(self, clip: Clip, prompt: str) -> dict[str, Tensor]:
        """Return what a clip's row holds. ValueError for frames that the model's patches do not divide."""
        unit = self.pipe.vae_scale_factor_spatial * self.pipe.transformer.config.patch_size[1]
        if any(side % unit for side in clip.size.values()):
            raise ValueError(f"frames of {clip.size} do not divide by {unit}: prepare the data with another --size")
        found = {k: v[0].cpu() for k, v in self.recipe.encode(self.pipe, clip).items()}
        return {k: v.half() if k in HALVED else v for k, v in found.items()} | {"text": self.text(prompt)}


@torch.no_grad()
def encode(
    data: str | Path,
    folder: str | Path,
    caption: str | None = None,
    splits: Sequence[str] = SPLITS,
    on_progress: Callable[[float], Any] | None = None,
) -> str:
    """Encode what is not cached yet of some splits, free the encoders, and return the cache's name in the data.

    `caption` is the prompt of every clip; without it each clip has its own in the manifest. ValueError for clips
    without a caption.
    """
    cache = Path("cache") / _key(folder, caption)
    (Path(data) / cache).mkdir(parents=True, exist_ok=True)
    every = read_manifest(data)
    shards = sorted({r["shard"] for r in every if r["split"] in splits})
    missing = [s for s in shards if not (Path(data) / cache / s).exists()]
    if missing or not (Path(data) / cache / "empty.safetensors").exists():
        encoders = Encoders(folder, caption)
        step = encoders.pipe.vae_scale_factor_temporal
        about = {"text": encoders.text("")[None], "frame_step": torch.tensor(step)}
        _save(about, Path(data) / cache / "empty.safetensors")
        for i, shard in enumerate(missing):
            records = sorted((r for r in every if r["shard"] == shard), key=lambda r: r["row"])
            tensors = load_file(Path(data) / "shards" / shard)
            frames = _whole(tensors["video"].shape[1], step)
            rows = [encoders.columns(_clip(tensors, r["row"], frames), encoders.caption_of(r)) for r in records]
            _save({k: torch.stack([r[k] for r in rows]) for k in rows[0]}, Path(data) / cache / shard)
            if on_progress:
                on_progress((i + 1) / len(missing))
        del encoders
        gc.collect()
        torch.cuda.empty_cache()
    return str(cache)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial)
    partial.rename(path)


def load_encoded(
    config: "RunConfig", split: str, on_progress: Callable[[float], Any] | None = None, limit: int | None = None
) -> dict[str, Stored]:
    """Open a split for a run of a pipeline folder, encoding what is not cached yet: every column, Stored."""
    Prepared(config.data, split)  # before anything is encoded
    cache = encode(config.data, config.model, config.caption, (split,), on_progress)
    chosen = Prepared(config.data, split, limit)
    with safe_open(str(Path(config.data) / cache / chosen.records[0]["shard"]), framework="pt") as file:
        return {name: Stored(chosen, name, cache) for name in file.keys()}  # noqa: SIM118  # not a dict


def _of_all(config: "RunConfig") -> dict[str, Tensor]:
    """Return what the clips of a cache share: `text` (1, 512, D) of the empty prompt, `frame_step`."""
    return load_file(Path(config.data) / "cache" / _key(config.model, config.caption) / "empty.safetensors")


def empty_text(config: "RunConfig") -> Tensor:
    """Return the empty prompt's embedding, (1, 512, D)."""
    return _of_all(config)["text"]


def draw_clips(
    config: "RunConfig", model: "nn.Module", data: Mapping[str, Stored], count: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Draw the first clips of a split (of several shapes, those of the first clip's): `models.wan.draw`."""
    part = {k: v.subset(data["video"].buckets()[0][:count]) for k, v in data.items()}
    column, shared = part["video"], _of_all(config)
    names = ["video", "keypoints", "reference", *(["face"] if "face" in part else [])]
    raw = column.prepared.rows(column.indices, names)
    frames = _whole(raw["video"].shape[1], int(shared["frame_step"]))
    clips = [_clip(raw, row, frames) for row in range(len(column))]
    return draw(config, model, clips, part["text"].take(range(len(clips))), shared["text"])
