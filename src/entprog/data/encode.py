"""A prepared data set as a pipeline folder takes it: latents, text and image embeddings, made once beside the data.

`encode` writes `cache/KEY/` into a prepared folder, one shard for each of its shards, and `empty.safetensors` with the
empty prompt. KEY names the model and ends in a fingerprint of its encoders and the pose style. Columns are those of the
folder's kind (models/wan.py); each row is one clip, that of the shard, whether or not the manifest still lists it.
`text` (512, D) has shards of its own in `cache/KEY/text-HASH/`, HASH being that of all clips' captions: another caption
is another text, and the video need not be encoded again.
"""

import gc
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from entprog.data.cache import Stored, is_current, pose_maps, save_columns
from entprog.data.pose import POSE_STYLE
from entprog.data.prepared import SPLITS, Prepared, read_manifest, shard_rows
from entprog.measure import best_device
from entprog.models.wan import TOKENS, Clip, draw, open_encoders, pipeline_of

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


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _cache(folder: str | Path) -> Path:
    """Return where a model's columns lie in the data."""
    return Path("cache") / f"{Path(folder).resolve().name}-{_short_hash(f'{fingerprint(folder)} {POSE_STYLE}')}"


def _text_cache(folder: str | Path, records: Sequence[Mapping[str, Any]], caption: str | None) -> Path:
    """Return where the texts of all clips' captions lie in the data, or those of one caption for all."""
    used = sorted((r["id"], r.get("caption")) for r in records) if caption is None else caption
    return _cache(folder) / f"text-{_short_hash(json.dumps(used))}"


def caption_of(record: Mapping[str, Any], caption: str | None) -> str:
    """Return a clip's prompt, `caption` if it is given. ValueError for a clip without, where there is no fixed one."""
    prompt = caption if caption is not None else record.get("caption")
    if prompt is None:
        raise ValueError(f"clip {record['id']!r} has no caption: add \"caption\" to its line of manifest.jsonl, or "
                         "give one for all clips (--caption TEXT, caption=TEXT)")  # fmt: skip
    return prompt


def _prompts(
    every: Sequence[Mapping[str, Any]], splits: Sequence[str], caption: str | None
) -> dict[str, dict[int, str]]:
    """Return the prompt of each row that the manifest lists, for every shard with a clip of some splits."""
    prompts: dict[str, dict[int, str]] = {r["shard"]: {} for r in every if r["split"] in splits}
    for record in every:
        if record["shard"] in prompts:
            prompts[record["shard"]][record["row"]] = caption_of(record, caption)
    return prompts


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

    def __init__(self, folder: str | Path) -> None:
        self.kind, self.device = pipeline_of(folder), best_device()
        self.pipe = open_encoders(folder, self.device)
        self.texts: dict[str, Tensor] = {}

    def text(self, prompt: str) -> Tensor:
        """Return the embedding of a prompt, (512, D)."""
        if prompt not in self.texts:
            embeds, _ = self.pipe.encode_prompt(prompt, None, False, max_sequence_length=TOKENS, device=self.device)
            self.texts[prompt] = embeds[0].cpu()
        return self.texts[prompt]

    def columns(self, clip: Clip) -> dict[str, Tensor]:
        """Return a clip's row but for its text. ValueError for frames that the model's patches do not divide."""
        unit = self.pipe.vae_scale_factor_spatial * self.pipe.transformer.config.patch_size[1]
        if any(side % unit for side in clip.size.values()):
            raise ValueError(f"frames of {clip.size} do not divide by {unit}: prepare the data with another --size")
        found = {k: v[0].cpu() for k, v in self.kind.encode(self.pipe, clip).items()}
        return {k: v.half() if k in HALVED else v for k, v in found.items()}


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
    every = read_manifest(data)
    cache, texts = _cache(folder), _text_cache(folder, every, caption)
    (Path(data) / texts).mkdir(parents=True, exist_ok=True)
    prompts, shards = _prompts(every, splits, caption), Path(data) / "shards"
    missing = [
        (part, name)
        for part in (cache, texts)
        for name in sorted(prompts)
        if not is_current(Path(data) / part / name, shards / name)
    ]
    if missing or not (Path(data) / cache / "empty.safetensors").exists():
        encoders = Encoders(folder)
        step = encoders.pipe.vae_scale_factor_temporal
        about = {"text": encoders.text("")[None], "frame_step": torch.tensor(step)}
        save_columns(about, Path(data) / cache / "empty.safetensors")
        for i, (part, name) in enumerate(missing):
            rows = range(shard_rows(shards / name))
            if part == texts:  # a row that nobody lists: what all have, or nothing
                columns = [{"text": encoders.text(prompts[name].get(row, caption or ""))} for row in rows]
            else:
                tensors = load_file(shards / name)
                frames = _whole(tensors["video"].shape[1], step)
                columns = [encoders.columns(_clip(tensors, row, frames)) for row in rows]
            stacked = {k: torch.stack([c[k] for c in columns]) for k in columns[0]}
            save_columns(stacked, Path(data) / part / name, shards / name)
            if on_progress:
                on_progress((i + 1) / len(missing))
        del encoders
        gc.collect()
        torch.cuda.empty_cache()
    return str(cache)


def load_encoded(
    config: "RunConfig", split: str, on_progress: Callable[[float], Any] | None = None, limit: int | None = None
) -> dict[str, Stored]:
    """Open a split for a run of a pipeline folder, encoding what is not cached yet: every column, Stored."""
    Prepared(config.data, split)  # before anything is encoded
    cache = encode(config.data, config.model, config.caption, (split,), on_progress)
    chosen = Prepared(config.data, split, limit)
    with safe_open(str(Path(config.data) / cache / chosen.records[0]["shard"]), framework="pt") as file:
        columns = {name: Stored(chosen, name, cache) for name in file.keys()}  # noqa: SIM118  # not a dict
    return columns | {"text": Stored(chosen, "text", str(_text_cache(config.model, chosen.every, config.caption)))}


def _of_all(config: "RunConfig") -> dict[str, Tensor]:
    """Return what the clips of a cache share: `text` (1, 512, D) of the empty prompt, `frame_step`."""
    return load_file(Path(config.data) / _cache(config.model) / "empty.safetensors")


def empty_text(config: "RunConfig") -> Tensor:
    """Return the empty prompt's embedding, (1, 512, D)."""
    return _of_all(config)["text"]


def draw_clips(
    config: "RunConfig", model: "nn.Module", data: Mapping[str, Stored], count: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Draw the first clips of a split (of several shapes, those of the first clip's): `models.wan.draw`."""
    part = {k: v.subset(data["video"].first(count)) for k, v in data.items()}
    column, shared = part["video"], _of_all(config)
    names = ["video", "keypoints", "reference", *(["face"] if "face" in part else [])]
    raw = column.prepared.rows(column.indices, names)
    frames = _whole(raw["video"].shape[1], int(shared["frame_step"]))
    clips = [_clip(raw, row, frames) for row in range(len(column))]
    return draw(config, model, clips, part["text"].take(range(len(clips))), shared["text"])
