"""Saved Wan pipeline folders, as published ones but tiny and with random weights; nothing is downloaded.

Every part is the class the published folders hold, so the real code runs: tokenizer, UMT5, Wan's autoencoder, CLIP.
"""

from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, T5TokenizerFast, UMT5Config
from transformers import UMT5EncoderModel as TextEncoder

LATENTS, TEXT, IMAGE, HEADS = 4, 16, 12, 12
WORDS = "a person walks turns dances in red blue the room"
SHAPE: dict[str, Any] = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": HEADS, "out_channels": LATENTS,
    "text_dim": TEXT, "freq_dim": 16, "ffn_dim": 24, "num_layers": 3, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
}  # fmt: skip


def _text() -> dict[str, Any]:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{w}" for w in WORDS.split()), *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5TokenizerFast(vocab=[(p, -float(i)) for i, p in enumerate(pieces)], extra_ids=0)
    size = UMT5Config(vocab_size=len(pieces), d_model=TEXT, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return {"tokenizer": tokenizer, "text_encoder": TextEncoder(size)}


def _image() -> dict[str, Any]:
    size = CLIPVisionConfig(
        hidden_size=IMAGE, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return {"image_encoder": CLIPVisionModel(size), "image_processor": processor}


def _autoencoder() -> nn.Module:
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=LATENTS, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.2, 0.8, 1.5, 0.7],
    )  # fmt: skip


def unipc() -> Any:
    """Return the scheduler that the published folders hold."""
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )


def euler() -> Any:
    """Return the other one that Wan's pipelines are run with."""
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)


def transformer(kind: str) -> nn.Module:
    """Build the transformer of a kind of folder ("t2v", "i2v", "vace", "animate"), none of its parameters zero."""
    with_image = {"image_dim": IMAGE, "added_kv_proj_dim": 2 * HEADS}
    model: nn.Module
    if kind == "vace":
        model = diffusers.WanVACETransformer3DModel(
            **SHAPE, in_channels=LATENTS, vace_layers=[0, 2], vace_in_channels=2 * LATENTS + 64
        )
    elif kind == "animate":
        model = diffusers.WanAnimateTransformer3DModel(
            **SHAPE | {"num_layers": 4}, **with_image, in_channels=2 * LATENTS + 4, latent_channels=LATENTS,
            motion_encoder_size=16,
            motion_style_dim=8, motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=16,
            face_encoder_num_heads=2, inject_face_latents_blocks=2,
            motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        )  # fmt: skip
    elif kind == "i2v":
        model = diffusers.WanTransformer3DModel(**SHAPE, **with_image, in_channels=2 * LATENTS + 4)
    else:
        model = diffusers.WanTransformer3DModel(**SHAPE, in_channels=LATENTS)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.05)
    return model


PIPELINES: dict[str, Any] = {
    "t2v": diffusers.WanPipeline,
    "i2v": diffusers.WanImageToVideoPipeline,
    "vace": diffusers.WanVACEPipeline,
    "animate": diffusers.WanAnimatePipeline,
}


def save(folder: Path, kind: str, *, scheduler: Any = None, boundary: float | None = None) -> Path:
    """Save a tiny pipeline folder and return it; with `boundary` it has two experts, as Wan2.2's have."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = {"vae": _autoencoder(), "scheduler": scheduler or unipc(), "transformer": transformer(kind)} | _text()
        if kind in ("i2v", "animate"):
            parts |= _image()
        if boundary is not None:
            parts |= {"transformer_2": transformer(kind), "boundary_ratio": boundary}
        PIPELINES[kind](**parts).save_pretrained(folder)
    return folder
