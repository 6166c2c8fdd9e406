"""Latents: a diffusers autoencoder from a folder, with its own normalisation, and the small one that lies here.

An autoencoder is used frame by frame, so that a latent frame is a frame: a video model's causal encoder sees every
frame as the first of its own clip. Latents are (B, C, F, h, w), normalised to about unit variance; videos are
(B, 3, F, H, W) in [-1, 1].

TAEF2 is the tiny autoencoder of FLUX.2's latent space (madebyollin/taef2, MIT): 32 channels at an eighth of the size.
"taef2-people" is the same, trained on with rendered people of 64 px (scripts/finetune_autoencoder.py): the original was
made for large pictures, and loses arms and faces that are eight pixels wide.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from safetensors.torch import load_file
from torch import Tensor, nn

# The autoencoders that lie here, all of TAEF2's shape: name -> their folder, the deviation of their latents.
TINY = {
    "taef2": (Path(__file__).parent / "taef2", 0.9),  # of natural images and rendered people, all channels alike
    "taef2-people": (Path(__file__).parent / "taef2_people", 1.09),
}
PIXELS_AT_ONCE = 2**19  # of frames that share a pass: 64 channels of them take 128 MiB


class _Residual(nn.Module):
    """Three convolutions beside the identity; some first mix the whole picture in by a normalised 1x1 bottleneck."""

    def __init__(self, pooled: bool, width: int = 64, inner: int = 256) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip
        if pooled:
            self.pool = nn.Sequential(
                nn.Conv2d(width, inner, 1, bias=False),
                nn.GroupNorm(4, inner),
                nn.ReLU(),
                nn.Conv2d(inner, width, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "pool"):
            x = x + self.pool(x)
        return nnf.relu(x + self.conv(x))


class _Squash(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return 3 * torch.tanh(z / 3)


def _taef2() -> tuple[nn.Sequential, nn.Sequential]:
    """Build encoder and decoder, 3 x H x W in [0, 1] to 32 x H/8 x W/8 and back."""

    def down() -> nn.Module:
        return nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False)

    def up() -> list[nn.Module]:
        return [nn.Upsample(scale_factor=2), nn.Conv2d(64, 64, 3, padding=1, bias=False)]

    encoder = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), _Residual(False),
        down(), *(_Residual(False) for _ in range(3)),
        down(), *(_Residual(False) for _ in range(3)),
        down(), *(_Residual(True) for _ in range(3)),
        nn.Conv2d(64, 32, 3, padding=1),
    )  # fmt: skip
    decoder = nn.Sequential(
        _Squash(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        *(_Residual(True) for _ in range(3)), *up(),
        *(_Residual(False) for _ in range(3)), *up(),
        *(_Residual(False) for _ in range(3)), *up(),
        _Residual(False), nn.Conv2d(64, 3, 3, padding=1),
    )  # fmt: skip
    return encoder, decoder


class Autoencoder(nn.Module):
    """Encode videos to normalised latents and decode them, frame by frame.

    `name` is a row of TINY or a folder with a diffusers autoencoder (config.json and safetensors). `channels` and
    `factor` describe its latents: channels per place, pixels per side of a place. ValueError for anything else.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.network: Any = None
        if name in TINY:
            folder, deviation = TINY[name]
            self.encoder, self.decoder = _taef2()
            self.encoder.load_state_dict(load_file(folder / "encoder.safetensors"))
            self.decoder.load_state_dict(load_file(folder / "decoder.safetensors"))
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster on a CPU
            self.channels, mean, std = 32, [0.0], [deviation]
        else:
            self.network = _diffusers_class(Path(name)).from_pretrained(name, use_safetensors=True)
            self.channels, mean, std = _normalisation(self.network.config)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.requires_grad_(False).eval()
        self.factor = 64 // self._encode(torch.zeros(1, 3, 64, 64)).shape[-1]

    def _encode(self, frames: Tensor) -> Tensor:
        """Frames (n, 3, H, W) in [-1, 1] to latents (n, C, h, w), not normalised; the mode, not a sample."""
        if self.network is None:
            return self.encoder((frames / 2 + 0.5).contiguous(memory_format=torch.channels_last))
        whole = _is_video(self.network)
        out = self.network.encode(frames[:, :, None] if whole else frames)
        z = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents
        return z[:, :, 0] if whole else z

    def _decode(self, z: Tensor) -> Tensor:
        if self.network is None:
            return self.decoder(z) * 2 - 1
        whole = _is_video(self.network)
        frames = self.network.decode(z[:, :, None] if whole else z).sample
        return frames[:, :, 0] if whole else frames

    def fingerprint(self) -> str:
        """Return 12 hex digits that change with what makes the latents: the encoder's weights and the normalisation."""
        digest = hashlib.sha256()
        encoding = [(k, v) for k, v in self.state_dict().items() if "decoder" not in k and "post_quant" not in k]
        for name, tensor in [*encoding, ("mean", self.mean), ("std", self.std)]:
            digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    @torch.no_grad()
    def encode(self, video: Tensor, chunk: int | None = None) -> Tensor:
        """Encode (B, 3, F, H, W) in [-1, 1] to (B, C, F, h, w); ValueError where H or W do not divide by `factor`."""
        if video.shape[-1] % self.factor or video.shape[-2] % self.factor:
            raise ValueError(f"frames of {tuple(video.shape[-2:])} do not divide by {self.factor}: choose another size")
        chunk = chunk or max(1, PIXELS_AT_ONCE // video[0, 0, 0].numel())
        frames = video.transpose(1, 2).flatten(0, 1).to(self.mean)
        z = torch.cat([(self._encode(part) - self.mean) / self.std for part in frames.split(chunk)])
        return z.unflatten(0, (video.shape[0], video.shape[2])).transpose(1, 2)

    @torch.no_grad()
    def decode(self, latents: Tensor, chunk: int | None = None) -> Tensor:
        """Decode (B, C, F, h, w) to (B, 3, F, H, W), clamped to [-1, 1]."""
        chunk = chunk or max(1, PIXELS_AT_ONCE // (latents[0, 0, 0].numel() * self.factor**2))
        frames = latents.transpose(1, 2).flatten(0, 1).to(self.mean)
        x = torch.cat([self._decode(part * self.std + self.mean) for part in frames.split(chunk)]).clamp(-1, 1)
        return x.unflatten(0, (latents.shape[0], latents.shape[2])).transpose(1, 2)


def latent_places(name: str) -> tuple[int, int]:
    """Return an Autoencoder's (channels, factor) from its configuration alone: no weights are read.

    ValueError as for Autoencoder.
    """
    if name in TINY:
        return 32, 8
    kind = _diffusers_class(Path(name))
    with torch.device("meta"):
        network: Any = kind.from_config(kind.load_config(name)).eval()
        out = network.encode(torch.empty(1, 3, *[1] * _is_video(network), 64, 64))
    z = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents
    return _normalisation(network.config)[0], 64 // z.shape[-1]


def _diffusers_class(folder: Path) -> Any:
    """Return the diffusers class that a folder's config.json names. ValueError if it is not an autoencoder."""
    import diffusers

    path = folder / "config.json"
    if not path.exists():
        raise ValueError(
            f"autoencoder {str(folder)!r} is unknown: choose one of {sorted(TINY)} or a folder with config.json"
        )
    name = json.loads(path.read_text()).get("_class_name", "")
    kind = getattr(diffusers, name, None) if name.startswith("Autoencoder") else None
    if kind is None:
        raise ValueError(f"{path} is for {name!r}, not one of diffusers' Autoencoder classes")
    return kind


def _is_video(network: Any) -> bool:
    return any(isinstance(m, nn.Conv3d) for m in network.modules())


def _normalisation(config: Any) -> tuple[int, list[float], list[float]]:
    """Return (latent channels, mean, std) of a diffusers autoencoder: per channel (Wan), or shift and scaling (SD)."""
    channels = int(config.get("latent_channels") or config["z_dim"])
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        return channels, list(config["latents_mean"]), list(config["latents_std"])
    return channels, [config.get("shift_factor") or 0.0], [1 / (config.get("scaling_factor") or 1.0)]
