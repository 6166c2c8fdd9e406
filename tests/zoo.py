"""Tiny random models of diffusers' denoisers, one function each: ZOO, name -> () -> (model, inputs).

Configurations are the smallest that still have every kind of block their class has. `build` makes one from a seed.
"""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn, randn

Tiny = tuple[nn.Module, dict[str, Any]]
ZOO: dict[str, Callable[[], Tiny]] = {}


def _entry(make: Callable[[], Tiny]) -> Callable[[], Tiny]:
    ZOO[make.__name__] = make
    return make


def build(name: str, seed: int = 0) -> Tiny:
    """Return a model of the zoo in eval mode and its inputs; no parameter is zero.

    Fresh models start with zero gates, which would make every block the identity and every test of skipping empty.
    """
    torch.manual_seed(seed)
    model, inputs = ZOO[name]()
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.05)
    return model.eval(), inputs | {"return_dict": False}


def tensors(output: Any) -> list[Tensor]:
    """Return the tensors of a model's output, however it nests them."""
    if isinstance(output, Tensor):
        return [output]
    return [t for part in output or () for t in tensors(part)]


def _steps(batch: int) -> Tensor:
    return torch.randint(1, 1000, (batch,))


WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "freq_dim": 32, "ffn_dim": 32,
    "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32, "text_dim": 16,
}  # fmt: skip
FLUX: dict[str, Any] = {
    "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32,
}  # fmt: skip
PIXART: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "num_attention_heads": 2, "in_channels": 4, "out_channels": 8,
    "attention_bias": True, "activation_fn": "gelu-approximate", "norm_elementwise_affine": False, "norm_eps": 1e-6,
}  # fmt: skip


@_entry
def WanTransformer3DModel() -> Tiny:
    model = diffusers.WanTransformer3DModel(in_channels=4, out_channels=4, num_layers=3, **WAN)
    inputs = {"hidden_states": randn(1, 4, 2, 8, 8), "encoder_hidden_states": randn(1, 6, 16)}
    return model, inputs | {"timestep": _steps(1)}


@_entry
def WanVACETransformer3DModel() -> Tiny:
    model = diffusers.WanVACETransformer3DModel(
        in_channels=4, out_channels=4, num_layers=4, vace_layers=[0, 2], vace_in_channels=12, **WAN
    )
    inputs = {"hidden_states": randn(1, 4, 2, 8, 8), "encoder_hidden_states": randn(1, 6, 16)}
    return model, inputs | {"timestep": _steps(1), "control_hidden_states": randn(1, 12, 2, 8, 8)}


@_entry
def WanAnimateTransformer3DModel() -> Tiny:
    model = diffusers.WanAnimateTransformer3DModel(
        in_channels=12, latent_channels=4, out_channels=4, num_layers=4, image_dim=4, motion_encoder_size=16,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_style_dim=8, motion_dim=4, motion_encoder_dim=8,
        face_encoder_hidden_dim=16, face_encoder_num_heads=2, inject_face_latents_blocks=2, **WAN,
    )  # fmt: skip
    inputs = {"hidden_states": randn(1, 12, 3, 8, 8), "encoder_hidden_states": randn(1, 6, 16)}
    inputs |= {"encoder_hidden_states_image": randn(1, 3, 4), "timestep": _steps(1)}
    return model, inputs | {"pose_hidden_states": randn(1, 4, 2, 8, 8), "face_pixel_values": randn(1, 3, 5, 16, 16)}


@_entry
def SkyReelsV2Transformer3DModel() -> Tiny:
    model = diffusers.SkyReelsV2Transformer3DModel(in_channels=4, out_channels=4, num_layers=3, **WAN)
    inputs = {"hidden_states": randn(1, 4, 1, 8, 8), "encoder_hidden_states": randn(1, 6, 16)}
    return model, inputs | {"timestep": _steps(1)}


def _cogvideox(kind: Any, num_layers: int = 3, head_dim: int = 8, **more: Any) -> Tiny:
    model = kind(
        num_attention_heads=2, attention_head_dim=head_dim, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=8, num_layers=num_layers, sample_width=8, sample_height=8, sample_frames=8, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=8, **more,
    )  # fmt: skip
    inputs = {"hidden_states": randn(2, 1, 4, 8, 8), "encoder_hidden_states": randn(2, 8, 8)}
    return model, inputs | {"timestep": _steps(2)}


@_entry
def CogVideoXTransformer3DModel() -> Tiny:
    return _cogvideox(diffusers.CogVideoXTransformer3DModel)


@_entry
def ConsisIDTransformer3DModel() -> Tiny:
    face = {"id_dim": 16, "vit_dim": 8, "depth": 2, "dim_head": 4, "num_heads": 2, "num_id_token": 2, "num_querie": 3}
    face |= {"output_dim": 32, "ff_mult": 1, "num_scale": 2}
    model, inputs = _cogvideox(
        diffusers.ConsisIDTransformer3DModel, num_layers=4, head_dim=24, is_train_face=True, cross_attn_interval=2,
        cross_attn_dim_head=4, cross_attn_num_heads=2, **{f"LFE_{k}": v for k, v in face.items()},
    )  # fmt: skip
    return model, inputs | {"id_cond": randn(2, 16), "id_vit_hidden": [randn(2, 3, 8) for _ in range(2)]}


def _hunyuan_video(kind: Any, **more: Any) -> Tiny:
    model = kind(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4), **more,
    )  # fmt: skip
    inputs = {"hidden_states": randn(1, 4, 1, 8, 8), "timestep": _steps(1).float(), "guidance": _steps(1).float()}
    inputs |= {"encoder_hidden_states": randn(1, 6, 16), "encoder_attention_mask": torch.ones(1, 6)}
    return model, inputs | {"pooled_projections": randn(1, 8)}


@_entry
def HunyuanVideoTransformer3DModel() -> Tiny:
    return _hunyuan_video(diffusers.HunyuanVideoTransformer3DModel, patch_size=1)


@_entry
def HunyuanVideoFramepackTransformer3DModel() -> Tiny:
    model, inputs = _hunyuan_video(
        diffusers.HunyuanVideoFramepackTransformer3DModel, patch_size=2, image_condition_type=None,
        has_image_proj=True, image_proj_dim=8, has_clean_x_embedder=True,
    )  # fmt: skip
    inputs |= {"hidden_states": randn(1, 4, 3, 8, 8), "image_embeds": randn(1, 3, 8)}
    inputs |= {"indices_latents": torch.arange(3), "latents_clean": randn(1, 4, 2, 8, 8)}
    inputs |= {"indices_latents_clean": torch.arange(2), "latents_history_2x": randn(1, 4, 2, 8, 8)}
    inputs |= {"indices_latents_history_2x": torch.arange(2), "latents_history_4x": randn(1, 4, 4, 8, 8)}
    return model, inputs | {"indices_latents_history_4x": torch.arange(4)}


@_entry
def HunyuanVideo15Transformer3DModel() -> Tiny:
    model = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=3, num_refiner_layers=1,
        mlp_ratio=2.0, patch_size=1, patch_size_t=1, text_embed_dim=16, text_embed_2_dim=8, image_embed_dim=12,
        rope_axes_dim=(2, 2, 4), target_size=16, task_type="t2v",
    )  # fmt: skip
    inputs = {"hidden_states": randn(1, 4, 1, 8, 8), "timestep": torch.tensor([1.0]), "image_embeds": randn(1, 3, 12)}
    inputs |= {"encoder_hidden_states": randn(1, 6, 16), "encoder_attention_mask": torch.ones(1, 6)}
    return model, inputs | {"encoder_hidden_states_2": randn(1, 4, 8), "encoder_attention_mask_2": torch.ones(1, 4)}


@_entry
def LTXVideoTransformer3DModel() -> Tiny:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=3, qk_norm="rms_norm_across_heads", caption_channels=16,
    )  # fmt: skip
    inputs = {"hidden_states": randn(2, 32, 4), "encoder_hidden_states": randn(2, 6, 16), "timestep": _steps(2)}
    return model, inputs | {"encoder_attention_mask": torch.ones(2, 6).bool(), "num_frames": 2, "height": 4, "width": 4}


@_entry
def LTX2VideoTransformer3DModel() -> Tiny:
    model = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
        audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=3, qk_norm="rms_norm_across_heads",
        caption_channels=16, rope_double_precision=False,
    )  # fmt: skip
    inputs = {"hidden_states": randn(2, 32, 4), "audio_hidden_states": randn(2, 9, 4), "timestep": _steps(2).float()}
    inputs |= {"encoder_hidden_states": randn(2, 6, 16), "audio_encoder_hidden_states": randn(2, 6, 16), "fps": 25.0}
    inputs |= {"encoder_attention_mask": torch.ones(2, 6).bool(), "num_frames": 2, "height": 4, "width": 4}
    return model, inputs | {"audio_num_frames": 9}


@_entry
def MochiTransformer3DModel() -> Tiny:
    model = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=3, pooled_projection_dim=16,
        in_channels=4, qk_norm="rms_norm", text_embed_dim=16, time_embed_dim=4, activation_fn="swiglu",
        max_sequence_length=16,
    )  # fmt: skip
    inputs = {"hidden_states": randn(2, 4, 2, 8, 8), "encoder_hidden_states": randn(2, 16, 16), "timestep": _steps(2)}
    return model, inputs | {"encoder_attention_mask": torch.ones(2, 16).bool()}


@_entry
def AllegroTransformer3DModel() -> Tiny:
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=3,
        cross_attention_dim=16, sample_width=8, sample_height=8, sample_frames=8, caption_channels=8,
    )  # fmt: skip
    inputs = {"hidden_states": randn(2, 4, 2, 8, 8), "encoder_hidden_states": randn(2, 6, 8), "timestep": _steps(2)}
    return model, inputs


@_entry
def LatteTransformer3DModel() -> Tiny:
    model = diffusers.LatteTransformer3DModel(
        num_layers=2, attention_head_dim=4, caption_channels=8, cross_attention_dim=8, num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", video_length=2, **PIXART,
    )  # fmt: skip
    inputs = {"hidden_states": randn(2, 4, 2, 8, 8), "encoder_hidden_states": randn(2, 8, 8), "timestep": _steps(2)}
    return model, inputs | {"enable_temporal_attentions": True}


def cosmos(position: str | None) -> Tiny:
    """Return a tiny Cosmos with or without the learnable position that every block adds to its stream."""
    model = diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=3, mlp_ratio=2,
        text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2), rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=False, extra_pos_embed_type=position,
    )  # fmt: skip
    inputs = {"hidden_states": randn(1, 4, 1, 8, 8), "encoder_hidden_states": randn(1, 6, 16), "timestep": _steps(1)}
    return model, inputs | {"attention_mask": torch.ones(1, 6), "fps": 30}


@_entry
def CosmosTransformer3DModel() -> Tiny:
    return cosmos("learnable")


@_entry
def Kandinsky5Transformer3DModel() -> Tiny:
    model = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=16, in_text_dim=16, in_text_dim2=8, time_dim=16, out_visual_dim=16, patch_size=(1, 2, 2),
        model_dim=16, ff_dim=32, num_text_blocks=1, num_visual_blocks=3, axes_dims=(1, 1, 2), visual_cond=False,
        attention_type="regular",
    )  # fmt: skip
    inputs = {"hidden_states": randn(1, 2, 8, 8, 16), "encoder_hidden_states": randn(1, 6, 16)}
    inputs |= {"timestep": _steps(1).float(), "pooled_projections": randn(1, 8), "text_rope_pos": torch.arange(6)}
    return model, inputs | {"visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)]}


@_entry
def EasyAnimateTransformer3DModel() -> Tiny:
    model = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=3, mmdit_layers=2,
        patch_size=2, time_embed_dim=8, text_embed_dim=8, sample_width=8, sample_height=8,
    )  # fmt: skip
    inputs = {"hidden_states": randn(2, 4, 2, 8, 8), "encoder_hidden_states": randn(2, 6, 8), "timestep": _steps(2)}
    return model, inputs


@_entry
def SanaVideoTransformer3DModel() -> Tiny:
    model = diffusers.SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=3,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=8,
        sample_size=8, patch_size=(1, 2, 2), rope_max_seq_len=32,
    )  # fmt: skip
    inputs = {"hidden_states": randn(1, 4, 2, 8, 8), "encoder_hidden_states": randn(1, 6, 8), "timestep": _steps(1)}
    return model, inputs


@_entry
def FluxTransformer2DModel() -> Tiny:
    model = diffusers.FluxTransformer2DModel(pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], **FLUX)
    inputs = {"hidden_states": randn(1, 16, 4), "encoder_hidden_states": randn(1, 6, 32)}
    inputs |= {"pooled_projections": randn(1, 32), "timestep": torch.tensor([1.0])}
    return model, inputs | {"img_ids": randn(16, 3), "txt_ids": randn(6, 3)}


@_entry
def Flux2Transformer2DModel() -> Tiny:
    model = diffusers.Flux2Transformer2DModel(timestep_guidance_channels=32, axes_dims_rope=[4, 4, 4, 4], **FLUX)
    inputs = {"hidden_states": randn(1, 16, 4), "encoder_hidden_states": randn(1, 6, 32), "guidance": torch.ones(1)}
    inputs |= {"img_ids": torch.randint(4, (1, 16, 4)), "txt_ids": torch.randint(6, (1, 6, 4))}
    return model, inputs | {"timestep": torch.tensor([1.0])}


@_entry
def ChromaTransformer2DModel() -> Tiny:
    model = diffusers.ChromaTransformer2DModel(
        axes_dims_rope=[4, 4, 8], approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1, **FLUX
    )
    inputs = {"hidden_states": randn(1, 16, 4), "encoder_hidden_states": randn(1, 6, 32)}
    return model, inputs | {"img_ids": randn(16, 3), "txt_ids": randn(6, 3), "timestep": torch.tensor([1.0])}


@_entry
def SD3Transformer2DModel() -> Tiny:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=64, out_channels=4,
        pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    inputs = {"hidden_states": randn(2, 4, 8, 8), "encoder_hidden_states": randn(2, 6, 32), "timestep": _steps(2)}
    return model, inputs | {"pooled_projections": randn(2, 64)}


@_entry
def QwenImageTransformer2DModel() -> Tiny:
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    inputs = {"hidden_states": randn(1, 16, 16), "encoder_hidden_states": randn(1, 8, 16)}
    inputs |= {"encoder_hidden_states_mask": torch.ones(1, 8).long(), "timestep": torch.tensor([1.0])}
    return model, inputs | {"img_shapes": [(1, 4, 4)]}


@_entry
def AuraFlowTransformer2DModel() -> Tiny:
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip
    inputs = {"hidden_states": randn(2, 4, 8, 8), "encoder_hidden_states": randn(2, 6, 32), "timestep": _steps(2)}
    return model, inputs


@_entry
def CogView4Transformer2DModel() -> Tiny:
    model = diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=3, attention_head_dim=4, num_attention_heads=4, out_channels=4,
        text_embed_dim=8, time_embed_dim=8, condition_dim=4,
    )  # fmt: skip
    inputs = {"hidden_states": randn(2, 4, 8, 8), "encoder_hidden_states": randn(2, 8, 8), "timestep": _steps(2)}
    sizes = torch.tensor([[64, 64]] * 2)
    return model, inputs | {"original_size": sizes, "target_size": sizes, "crop_coords": torch.zeros(2, 2).long()}


@_entry
def PixArtTransformer2DModel() -> Tiny:
    model = diffusers.PixArtTransformer2DModel(
        num_layers=3, attention_head_dim=2, cross_attention_dim=8, num_embeds_ada_norm=8, norm_type="ada_norm_single",
        use_additional_conditions=False, caption_channels=None, **PIXART,
    )  # fmt: skip
    inputs = {"hidden_states": randn(4, 4, 8, 8), "encoder_hidden_states": randn(4, 8, 8), "timestep": _steps(4)}
    return model, inputs | {"added_cond_kwargs": {"aspect_ratio": None, "resolution": None}}


@_entry
def DiTTransformer2DModel() -> Tiny:
    options = {k: v for k, v in PIXART.items() if k != "norm_elementwise_affine"}
    model = diffusers.DiTTransformer2DModel(
        num_layers=3, attention_head_dim=4, norm_type="ada_norm_zero", num_embeds_ada_norm=8, **options
    )
    inputs = {"hidden_states": randn(4, 4, 8, 8), "timestep": _steps(4), "class_labels": torch.tensor([1, 2, 3, 4])}
    return model, inputs


@_entry
def SanaTransformer2DModel() -> Tiny:
    model = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=4, num_attention_heads=2,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=8,
    )  # fmt: skip
    inputs = {"hidden_states": randn(2, 4, 8, 8), "encoder_hidden_states": randn(2, 8, 8), "timestep": _steps(2)}
    return model, inputs


@_entry
def HunyuanDiT2DModel() -> Tiny:
    model = diffusers.HunyuanDiT2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=2,
        cross_attention_dim=8, cross_attention_dim_t5=8, pooled_projection_dim=4, hidden_size=16, text_len=4,
        text_len_t5=4, activation_fn="gelu-approximate",
    )  # fmt: skip
    inputs = {"hidden_states": randn(2, 4, 8, 8), "timestep": _steps(2).float(), "style": torch.zeros(2).long()}
    inputs |= {"encoder_hidden_states": randn(2, 4, 8), "text_embedding_mask": torch.ones(2, 4)}
    inputs |= {"encoder_hidden_states_t5": randn(2, 4, 8), "text_embedding_mask_t5": torch.ones(2, 4)}
    inputs |= {"image_meta_size": torch.tensor([[1024.0, 1024, 16, 16, 0, 0]] * 2)}
    return model, inputs | {"image_rotary_emb": [torch.ones(1, 8), torch.zeros(1, 8)]}


@_entry
def Lumina2Transformer2DModel() -> Tiny:
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=3, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(32, 32, 32),
        cap_feat_dim=8,
    )  # fmt: skip
    inputs = {"hidden_states": randn(2, 4, 8, 8), "encoder_hidden_states": randn(2, 6, 8), "timestep": torch.rand(2)}
    return model, inputs | {"encoder_attention_mask": torch.ones(2, 6).bool()}


@_entry
def ZImageTransformer2DModel() -> Tiny:
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    inputs = {"x": [randn(4, 1, 8, 8) for _ in range(2)], "t": torch.rand(2)}
    return model, inputs | {"cap_feats": [randn(6, 8) for _ in range(2)]}


def _unet(kind: str, suffix: str, channels: tuple[int, int], groups: int | None, **more: Any) -> nn.Module:
    norms = {} if groups is None else {"norm_num_groups": groups}
    return getattr(diffusers, kind)(
        block_out_channels=channels, down_block_types=(f"CrossAttnDownBlock{suffix}", f"DownBlock{suffix}"),
        up_block_types=(f"UpBlock{suffix}", f"CrossAttnUpBlock{suffix}"), out_channels=4, in_channels=4,
        layers_per_block=2, **norms, **more,
    )  # fmt: skip


@_entry
def UNet2DConditionModel() -> Tiny:
    model = _unet("UNet2DConditionModel", "2D", (4, 8), 4, cross_attention_dim=8, attention_head_dim=2, sample_size=8)
    return model, {"sample": randn(2, 4, 8, 8), "timestep": _steps(1), "encoder_hidden_states": randn(2, 4, 8)}


@_entry
def UNet3DConditionModel() -> Tiny:
    model = _unet("UNet3DConditionModel", "3D", (4, 8), 4, cross_attention_dim=8, attention_head_dim=2, sample_size=8)
    return model, {"sample": randn(2, 4, 2, 8, 8), "timestep": _steps(1), "encoder_hidden_states": randn(2, 4, 8)}


@_entry
def UNetMotionModel() -> Tiny:
    model = _unet(
        "UNetMotionModel", "Motion", (16, 32), 16, cross_attention_dim=16, num_attention_heads=2, sample_size=8
    )
    return model, {"sample": randn(2, 4, 2, 8, 8), "timestep": _steps(1), "encoder_hidden_states": randn(4, 4, 16)}


@_entry
def UNetSpatioTemporalConditionModel() -> Tiny:
    model = _unet(
        "UNetSpatioTemporalConditionModel", "SpatioTemporal", (32, 64), None, cross_attention_dim=32,
        num_attention_heads=8, sample_size=8, projection_class_embeddings_input_dim=96, addition_time_embed_dim=32,
    )  # fmt: skip
    inputs = {"sample": randn(2, 2, 4, 8, 8), "timestep": _steps(1), "encoder_hidden_states": randn(2, 1, 32)}
    return model, inputs | {"added_time_ids": torch.tensor([[6, 127, 0.02]] * 2)}
