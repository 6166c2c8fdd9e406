"""Real models for planning: their configurations, what their forward takes, and pixels to latents.

PUBLISHED is the table. The configurations follow the published checkpoints, built by diffusers without weights;
tests hold them to the sizes their publishers name.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Latent = tuple[int, int, int, int, int]  # (B, C, F, H, W)


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _ones(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta", dtype=torch.bool)


def _wan(config: Mapping[str, Any], latent: Latent, text: int) -> dict[str, Any]:
    batch = latent[0]
    inputs = {"hidden_states": _empty(*latent), "timestep": _empty(batch)}
    inputs["encoder_hidden_states"] = _empty(batch, text, config["text_dim"])
    if config.get("image_dim"):  # CLIP's tokens of the first frame
        inputs["encoder_hidden_states_image"] = _empty(batch, 257, config["image_dim"])
    return inputs


def _wan_animate(config: Mapping[str, Any], latent: Latent, text: int) -> dict[str, Any]:
    batch, _, frames, height, width = latent
    inputs = _wan(config, (batch, config["in_channels"], frames + 1, height, width), text)  # the reference goes first
    inputs["pose_hidden_states"] = _empty(batch, config["latent_channels"], frames, height, width)
    size = config["motion_encoder_size"]
    return inputs | {"face_pixel_values": _empty(batch, 3, 4 * (frames - 1) + 1, size, size)}


def _hunyuan_video(config: Mapping[str, Any], latent: Latent, text: int) -> dict[str, Any]:
    batch = latent[0]
    return {
        "hidden_states": _empty(*latent),
        "timestep": _empty(batch),
        "encoder_hidden_states": _empty(batch, text, config["text_embed_dim"]),
        "encoder_attention_mask": _ones(batch, text),
        "pooled_projections": _empty(batch, config["pooled_projection_dim"]),
        "guidance": _empty(batch) if config["guidance_embeds"] else None,
    }


def _cogvideox(config: Mapping[str, Any], latent: Latent, text: int) -> dict[str, Any]:
    batch, channels, frames, height, width = latent
    inputs: dict[str, Any] = {"hidden_states": _empty(batch, frames, channels, height, width)}
    inputs |= {"timestep": _empty(batch), "encoder_hidden_states": _empty(batch, text, config["text_embed_dim"])}
    if config["use_rotary_positional_embeddings"]:
        tokens = frames * (height // config["patch_size"]) * (width // config["patch_size"])
        pair = (_empty(tokens, config["attention_head_dim"]), _empty(tokens, config["attention_head_dim"]))
        inputs["image_rotary_emb"] = pair
    return inputs


def _ltx(config: Mapping[str, Any], latent: Latent, text: int) -> dict[str, Any]:
    batch, channels, frames, height, width = latent
    return {
        "hidden_states": _empty(batch, frames * height * width, channels),
        "encoder_hidden_states": _empty(batch, text, config["caption_channels"]),
        "timestep": _empty(batch),
        "encoder_attention_mask": _ones(batch, text),
        "num_frames": frames,
        "height": height,
        "width": width,
    }


def _mochi(config: Mapping[str, Any], latent: Latent, text: int) -> dict[str, Any]:
    batch = latent[0]
    inputs = {"hidden_states": _empty(*latent), "timestep": _empty(batch)}
    inputs["encoder_hidden_states"] = _empty(batch, text, config["text_embed_dim"])
    return inputs | {"encoder_attention_mask": _ones(batch, text)}


@dataclass(frozen=True)
class ModelClass:
    """What a class of models needs: its inputs, its autoencoder's compression (time, space), text tokens, blocks."""

    inputs: Callable[[Mapping[str, Any], Latent, int], dict[str, Any]]
    compression: tuple[int, int]
    text: int
    containers: tuple[str, ...]


MODEL_CLASSES: dict[str, ModelClass] = {
    "WanTransformer3DModel": ModelClass(_wan, (4, 8), 512, ("blocks",)),
    "WanAnimateTransformer3DModel": ModelClass(_wan_animate, (4, 8), 512, ("blocks",)),
    "HunyuanVideoTransformer3DModel": ModelClass(
        _hunyuan_video, (4, 8), 256, ("transformer_blocks", "single_transformer_blocks")
    ),
    "CogVideoXTransformer3DModel": ModelClass(_cogvideox, (4, 8), 226, ("transformer_blocks",)),
    "LTXVideoTransformer3DModel": ModelClass(_ltx, (8, 32), 128, ("transformer_blocks",)),
    "MochiTransformer3DModel": ModelClass(_mochi, (6, 8), 256, ("transformer_blocks",)),
}


@dataclass(frozen=True)
class PublishedModel:
    """A published model: diffusers class, what its configuration changes, and its usual (frames, height, width)."""

    model_class: str
    config: dict[str, Any]
    size: tuple[int, int, int]
    compression: tuple[int, int] | None = None  # where it differs from the family's
    note: str = field(default="")


_WAN = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "text_dim": 4096, "freq_dim": 256}
_WAN_14B = _WAN | {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
_I2V = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}

PUBLISHED: dict[str, PublishedModel] = {
    "wan2.1-t2v-1.3b": PublishedModel(
        "WanTransformer3DModel",
        _WAN | {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        (81, 480, 832),
    ),
    "wan2.1-t2v-14b": PublishedModel("WanTransformer3DModel", _WAN_14B, (81, 480, 832)),
    "wan2.1-i2v-14b": PublishedModel("WanTransformer3DModel", _WAN_14B | _I2V, (81, 480, 832)),
    "wan2.2-t2v-a14b": PublishedModel("WanTransformer3DModel", _WAN_14B, (81, 480, 832), note="one of its two experts"),
    "wan2.2-i2v-a14b": PublishedModel(
        "WanTransformer3DModel", _WAN_14B | {"in_channels": 36}, (81, 480, 832), note="one of its two experts"
    ),
    "wan2.2-ti2v-5b": PublishedModel(
        "WanTransformer3DModel",
        _WAN | {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
        (121, 704, 1280),
        (4, 16),
    ),
    "wan2.2-animate-14b": PublishedModel(
        "WanAnimateTransformer3DModel",
        _WAN_14B | _I2V,
        (77, 720, 1280),
        note="the face encoder and adapters count as outside blocks",
    ),
    "hunyuanvideo": PublishedModel("HunyuanVideoTransformer3DModel", {}, (129, 720, 1280)),
    "cogvideox-2b": PublishedModel("CogVideoXTransformer3DModel", {}, (49, 480, 720)),
    "cogvideox-5b": PublishedModel(
        "CogVideoXTransformer3DModel",
        {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
        (49, 480, 720),
    ),
    "ltx-video": PublishedModel("LTXVideoTransformer3DModel", {}, (121, 512, 768)),
    "mochi-1": PublishedModel("MochiTransformer3DModel", {}, (85, 480, 848)),
}


def latent_shape(
    size: tuple[int, int, int], compression: tuple[int, int], channels: int, batch: int = 1, even: int = 1
) -> Latent:
    """Return the latent's (B, C, F, H, W) of a clip of (frames, height, width) pixels.

    F = (frames - 1) / time + 1, as causal autoencoders have it. ValueError where a size does not divide into whole
    latents, or a side into `even` of them (the patches).
    """
    frames, height, width = size
    time, space = compression
    if (frames - 1) % time or height % (space * even) or width % (space * even):
        raise ValueError(
            f"{frames}x{height}x{width} does not fit: frames must be {time} * n + 1, height and width multiples of "
            f"{space * even}; next is {(frames + time - 2) // time * time + 1}x"
            f"{-(-height // (space * even)) * space * even}x{-(-width // (space * even)) * space * even}"
        )
    return batch, channels, (frames - 1) // time + 1, height // space, width // space


def build(family: str, config: Mapping[str, Any]) -> nn.Module:
    """Build a model of a diffusers class from its configuration, on the meta device.

    ValueError for a class of which the inputs are not known here.
    """
    import diffusers

    if not family:
        raise ValueError(
            f"the configuration has no _class_name, which diffusers writes into config.json, only {sorted(config)}: "
            f"add it, one of {list(MODEL_CLASSES)}"
        )
    if family not in MODEL_CLASSES:
        raise ValueError(
            f"the inputs of {family!r} are not known: choose one of {list(MODEL_CLASSES)}, or pass the model and a "
            "dict of its forward inputs to entprog.plan"
        )
    known = {k: v for k, v in config.items() if not k.startswith("_")}
    with torch.device("meta"):
        return getattr(diffusers, family)(**known)


def inputs_of(model: nn.Module, latent: Latent, text: int | None = None) -> dict[str, Any]:
    """Return the forward inputs of a model of MODEL_CLASSES for a latent shape (B, C, F, H, W), on the meta device."""
    family = MODEL_CLASSES[type(model).__name__]
    return family.inputs(dict(model.config), latent, text or family.text)  # type: ignore[call-overload,arg-type]


def block_names(model: nn.Module) -> list[str] | None:
    """Return the names of the blocks of a model of MODEL_CLASSES, None for any other."""
    family = MODEL_CLASSES.get(type(model).__name__)
    if family is None:
        return None
    return [f"{c}.{i}" for c in family.containers for i in range(len(model.get_submodule(c)))]  # type: ignore[arg-type]


def read_model_config(path: str | Path) -> tuple[str, dict[str, Any]]:
    """Read a diffusers config.json, or the folder it lies in: (class name, configuration)."""
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"{path} does not exist: choose one of {list(PUBLISHED)}, or a folder with config.json")
    config = json.loads(path.read_text())
    return config.get("_class_name", ""), config
