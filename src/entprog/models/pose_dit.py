"""PoseDiT: a small pose-guided video diffusion transformer, the model entprog is tried on.

* DiT's vocabulary, diffusers' ModelMixin: save_pretrained, from_pretrained, gradient checkpointing.
* Spatial and temporal blocks alternate, one residual stream x (B, F + 1, N, D).
* The reference image is patch-embedded like a frame, travels as frame 0 and is read by every other frame as extra
  keys and values of the spatial attention.
* The pose map enters through a zero-initialised PoseGuider whose output is added to the tokens: a pretrained model
  without pose control is unchanged on the day the guider is added. The reference's own pose, where it is known, enters
  the same way, so that attention can match parts of the body.
* With `motion_modules` the temporal blocks are what AnimateDiff calls motion modules: they hold the frames' positions,
  leave the reference alone and are not run for a single frame, so that a model trained on images keeps its images.
* adaLN of the time, computed once for all blocks (adaLN-single) and shifted by a table in each block.

Letters: B samples, F frames, N = h * w tokens per frame, D = hidden_size, p = patch_size.
"""

import math
from typing import Any

import torch
import torch.nn.functional as nnf
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

SIZES: dict[str, dict[str, int]] = {
    #                 parameters (patch 4, RGB)
    "T": {"hidden_size": 96, "depth": 12, "num_heads": 3},  # 1.5 M
    "P": {"hidden_size": 128, "depth": 12, "num_heads": 4},  # 2.7 M (patch 1, 32 latent channels)
    "S": {"hidden_size": 384, "depth": 24, "num_heads": 6},  # 44 M
    "B": {"hidden_size": 768, "depth": 24, "num_heads": 12},  # 175 M
    "XL": {"hidden_size": 1152, "depth": 56, "num_heads": 16},  # 904 M
}


def sincos(positions: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of positions (...), -> (..., dim)."""
    frequencies = torch.exp(-math.log(max_period) * torch.arange(dim // 2, device=positions.device) / (dim // 2))
    angles = positions[..., None].float() * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def places(count: int, device: torch.device, scale: Tensor | None = None) -> Tensor:
    """Return where `count` tokens in a row lie; on a side scaled by `scale` in the middle of what each stands for."""
    row = torch.arange(count, device=device)
    return row if scale is None else (row + 0.5) / scale - 0.5


def frame_positions(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """Embed the numbers of the frames of x (B, F, N, D), every (1 / scale)-th of a clip's, -> (F, 1, D)."""
    numbers = torch.arange(x.shape[1], device=x.device)
    return sincos(numbers if scale is None else numbers / scale, x.shape[-1])[:, None].to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention, (..., N, D) each; torch's own except for bf16 on a CPU.

    There torch 2.13's fused backward takes three times as long as two matrix products and a softmax.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
    return nnf.scaled_dot_product_attention(q, k, v)


class TimestepEmbedder(nn.Module):
    """Embed t in [0, 1] as a vector, (B,) -> (B, D)."""

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 128) -> None:
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        features = sincos(1000 * t, self.frequency_embedding_size)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class PoseGuider(nn.Module):
    """Encode pose maps as one vector per token, zero at initialisation.

    Shapes: (B, 3, F, H, W) in [0, 1] -> (B, F, N, D); H and W are `stride` times the token grid. ValueError for a
    stride below 1.
    """

    def __init__(self, hidden_size: int, stride: int) -> None:
        super().__init__()
        if stride < 1:
            raise ValueError(f"a pose stride of {stride} pixels a token is none: choose 1, 2, 3, ...")
        halvings = 2 if stride % 4 == 0 else 1 if stride % 2 == 0 else 0
        folded = stride // 2**halvings  # two halvings at most are learned: convolutions over all pixels are dear
        layers: list[nn.Module] = [nn.PixelUnshuffle(folded)] if folded > 1 else []
        layers += [nn.Conv2d(3 * folded**2, 32, 3, padding=1), nn.SiLU()]
        for _ in range(halvings):
            layers += [nn.Conv2d(layers[-2].out_channels, 64, 3, stride=2, padding=1), nn.SiLU()]  # type: ignore[arg-type]
        self.encoder = nn.Sequential(*layers)
        self.proj_out = nn.Conv2d(layers[-2].out_channels, hidden_size, 1)  # type: ignore[arg-type]

    def forward(self, pose: Tensor) -> Tensor:
        batch, _, frames = pose.shape[:3]
        features = self.proj_out(self.encoder(pose.transpose(1, 2).flatten(0, 1)))
        return features.flatten(2).transpose(1, 2).unflatten(0, (batch, frames))


class PoseDiTAttention(nn.Module):
    """Attention over space (with the reference's tokens) or over time.

    The block's projections are given at each call: a module of its own, so that the attention can be found and run
    without a gradient, but no parameter of its own, so that saved weights keep their names.
    """

    def __init__(self, num_heads: int, axis: str) -> None:
        super().__init__()
        self.num_heads, self.axis = num_heads, axis

    def forward(self, x: Tensor, qkv: nn.Module, proj: nn.Module) -> Tensor:
        if self.axis == "time":
            x = x.transpose(1, 2)  # (B, N, F+1, D); one copy here is cheaper than one each of q, k and v
        q, k, v = qkv(x).chunk(3, dim=-1)
        if self.axis == "space":  # (B, F+1, N, D)
            reference_k, reference_v = k[:, :1].expand_as(k), v[:, :1].expand_as(v)
            k, v = torch.cat((k, reference_k), dim=2), torch.cat((v, reference_v), dim=2)  # (B, F+1, 2N, D)
            q = q.contiguous()  # a part of qkv(x) would keep all of it for backward
        q, k, v = (z.flatten(0, 1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for z in (q, k, v))
        y = proj(attend(q, k, v).transpose(1, 2).flatten(-2)).unflatten(0, x.shape[:2])
        return y if self.axis == "space" else y.transpose(1, 2)


class PoseDiTBlock(nn.Module):
    """One residual block: attention over space (with the reference's tokens) or over time, then an MLP."""

    self_attention = ("attention",)  # what entprog's mode bypass_attn cuts

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float, axis: str, motion_module: bool = False
    ) -> None:
        super().__init__()
        self.axis, self.motion_module = axis, motion_module
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.attention = PoseDiTAttention(num_heads, axis)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        inner = int(hidden_size * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(hidden_size, inner), nn.GELU(), nn.Linear(inner, hidden_size))
        self.scale_shift_table = nn.Parameter(torch.zeros(6, hidden_size))

    def forward(self, x: Tensor, c: Tensor, frame_scale: Tensor | None = None) -> Tensor:
        # x (B, F+1, N, D), c (B, 6, D)
        modulation = (self.scale_shift_table + c)[:, :, None, None].unbind(1)  # 6 x (B, 1, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        still, x = (x[:, :1], x[:, 1:]) if self.motion_module else (None, x)
        h = self.norm1(x) * (1 + scale1) + shift1
        if self.motion_module:
            h = h + frame_positions(x, frame_scale)
        x = x + gate1 * self.attention(h, self.qkv, self.proj)
        x = x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return x if still is None else torch.cat((still, x), dim=1)


class FinalLayer(nn.Module):
    """Modulate and project tokens to pixels, zero at initialisation."""

    def __init__(self, hidden_size: int, out_features: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, hidden_size))
        self.linear = nn.Linear(hidden_size, out_features)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + t[:, None])[:, :, None, None].unbind(1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class PoseDiT(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Predict the objective's target for a noisy video, given pose maps and a reference image.

    Args of `forward`: sample (B, C, F, H, W); timestep (B,) in [0, 1], 1 is noise; pose (B, 3, F, H_p, W_p) or None;
    reference (B, C, H, W) or None; reference_pose (B, 3, H_p, W_p) or None. None stands for the dropped condition.
    grid_scale (B, 3), alike for all samples, of clips that were made smaller (tokens.py): 1 / the stride of frames, and
    what height and width were scaled by; tokens then lie where those of the whole clip do.
    `pose_stride` is the number of pose-map
    pixels per token side: patch_size for pixel models, patch_size * 8 for latents of an 8x autoencoder.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["PoseDiTBlock"]  # type: ignore[assignment]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        patch_size: int = 4,
        hidden_size: int = 128,
        depth: int = 12,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        pose_stride: int = 4,
        motion_modules: bool = False,
    ) -> None:
        super().__init__()
        self.x_embedder = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.reference_embedding = nn.Parameter(torch.zeros(hidden_size))
        self.null_reference = nn.Parameter(torch.zeros(hidden_size))
        self.pose_guider = PoseGuider(hidden_size, pose_stride)
        axes = ("space", "time")
        self.blocks = nn.ModuleList(
            PoseDiTBlock(hidden_size, num_heads, mlp_ratio, axes[i % 2], motion_modules and i % 2 == 1)
            for i in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels)
        self.gradient_checkpointing = False
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Xavier for linear layers; the gates, the final layer and the guider's last layer start at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        weight = self.x_embedder.weight
        nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
        nn.init.zeros_(self.adaLN_modulation[1].get_parameter("weight"))  # every block is the identity at first
        for block in self.blocks:
            if block.motion_module:  # its gates are shared with blocks that train before it: its branches start at zero
                for p in (*block.get_submodule("proj").parameters(), *block.get_submodule("mlp.2").parameters()):
                    nn.init.zeros_(p)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.normal_(self.reference_embedding, std=0.02)
        self.zero_pose_guider()

    def zero_pose_guider(self) -> None:
        """Make the pose map count for nothing, as it does before fine-tuning."""
        for parameter in self.pose_guider.proj_out.parameters():
            nn.init.zeros_(parameter)

    def _tokens(self, frames: Tensor, scale: Tensor | None = None) -> Tensor:
        """Patch-embed frames (B, F, C, H, W) with their place, -> (B, F, N, D); scale: (3,), a row of grid_scale."""
        tokens = self.x_embedder(frames.flatten(0, 1))  # (B*F, D, h, w)
        dim, height, width = tokens.shape[1:]
        down, right = (None, None) if scale is None else scale[1:]
        rows = sincos(places(height, tokens.device, down), dim // 2)[:, None].expand(-1, width, -1)
        columns = sincos(places(width, tokens.device, right), dim // 2)[None].expand(height, -1, -1)
        where = torch.cat((rows, columns), -1).flatten(0, 1).to(tokens.dtype)
        return (tokens.flatten(2).transpose(1, 2) + where).unflatten(0, frames.shape[:2])

    def unpatchify(self, x: Tensor, height: int, width: int) -> Tensor:
        """Tokens (B, F, N, p*p*C) to video (B, C, F, H, W)."""
        p, channels = self.config["patch_size"], self.config["in_channels"]
        x = x.unflatten(2, (height // p, width // p)).unflatten(-1, (p, p, channels))  # (B, F, h, w, p, p, C)
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def _check(self, sample: Tensor, pose: Tensor | None) -> None:
        p, stride = self.config["patch_size"], self.config["pose_stride"]
        height, width = sample.shape[-2:]
        if height % p or width % p:
            raise ValueError(f"frames of {height}x{width} do not divide into patches of {p}: crop or resize them")
        expected = (sample.shape[2], height // p * stride, width // p * stride)
        if pose is not None and tuple(pose.shape[2:]) != expected:
            raise ValueError(f"the pose map has (F, H, W) = {tuple(pose.shape[2:])}, expected {expected}")

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        pose: Tensor | None = None,
        reference: Tensor | None = None,
        reference_pose: Tensor | None = None,
        grid_scale: Tensor | None = None,
    ) -> Tensor:
        self._check(sample, pose)
        batch, _, frames, height, width = sample.shape
        scale = None if grid_scale is None else grid_scale[0]
        x = self._tokens(sample.transpose(1, 2), scale)  # (B, F, N, D)
        if not self.config["motion_modules"]:
            x = x + frame_positions(x, None if scale is None else scale[0])
        if pose is not None:
            x = x + self.pose_guider(pose)
        if reference is None:
            still = self.null_reference.expand(batch, 1, x.shape[2], -1)
        else:
            still = self._tokens(reference[:, None], scale) + self.reference_embedding
            if reference_pose is not None:
                still = still + self.pose_guider(reference_pose[:, :, None])
        x = torch.cat((still, x), dim=1)  # (B, F+1, N, D)
        t = self.t_embedder(timestep)
        c = self.adaLN_modulation(t).unflatten(1, (6, -1))
        given = (c,) if scale is None else (c, scale[0])
        for block in self.blocks:
            if frames == 1 and block.motion_module:
                continue
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, *given)
            else:
                x = block(x, *given)
        return self.unpatchify(self.final_layer(x[:, 1:], t), height, width)


def pose_dit(size: str = "T", **overrides: Any) -> PoseDiT:
    """Build a PoseDiT of a named size with random weights; overrides are constructor arguments."""
    if size not in SIZES:
        raise ValueError(f"PoseDiT size {size!r} is unknown: choose one of {sorted(SIZES)}")
    return PoseDiT(**(SIZES[size] | overrides))
