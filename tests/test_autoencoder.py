"""Latents: the embedded autoencoder, and diffusers' own with their normalisation."""

import pytest
import torch

from entprog.models.autoencoder import TINY, Autoencoder, latent_places


def smooth_video(frames: int = 2, size: int = 64) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    small = torch.rand(1, 3, frames, 4, 4, generator=g) * 1.6 - 0.8
    return torch.nn.functional.interpolate(small, size=(frames, size, size), mode="trilinear")


@pytest.mark.parametrize("name", list(TINY))
def test_the_tiny_ones_reconstruct_and_are_about_normal(name):
    autoencoder, video = Autoencoder(name), smooth_video()
    latents = autoencoder.encode(video)
    assert latents.shape == (1, 32, 2, 8, 8)
    assert (autoencoder.channels, autoencoder.factor) == latent_places(name) == (32, 8)
    assert 0.5 < latents.std() < 2
    error = (autoencoder.decode(latents) - video).square().mean()
    assert 10 * torch.log10(4 / error) > 27  # dB


def test_frames_are_encoded_one_by_one():
    autoencoder, video = Autoencoder("taef2"), smooth_video(3)
    whole = autoencoder.encode(video, chunk=2)
    assert torch.allclose(whole[:, :, 1:2], autoencoder.encode(video[:, :, 1:2]), atol=1e-5)


def test_the_fingerprint_follows_what_makes_latents():
    autoencoder = Autoencoder("taef2")
    before = autoencoder.fingerprint()
    next(autoencoder.decoder.parameters()).add_(1)
    assert autoencoder.fingerprint() == before != Autoencoder("taef2-people").fingerprint()
    next(autoencoder.encoder.parameters()).add_(1e-3)
    assert autoencoder.fingerprint() != before


def kl(folder):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    net = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, scaling_factor=0.5, shift_factor=0.25,
    )  # fmt: skip
    net.save_pretrained(folder)
    return net.eval(), 2


def tiny(folder):
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    net = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4, scaling_factor=2.0,
    )  # fmt: skip
    net.save_pretrained(folder)
    return net.eval(), 2


def wan(folder):
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    net = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0],
    )  # fmt: skip
    net.save_pretrained(folder)
    return net.eval(), 8


@pytest.mark.parametrize("make", [kl, tiny, wan])
def test_a_diffusers_autoencoder_keeps_its_own_normalisation(make, tmp_path):
    net, factor = make(tmp_path)
    autoencoder, video = Autoencoder(str(tmp_path)), smooth_video(2, 32)
    latents = autoencoder.encode(video)
    assert autoencoder.factor == factor and latents.shape == (1, 4, 2, 32 // factor, 32 // factor)
    for weights in tmp_path.glob("*.safetensors"):
        weights.unlink()
    assert latent_places(str(tmp_path)) == (autoencoder.channels, factor), "from the configuration alone"
    frame = video[:, :, 1]
    with torch.no_grad():
        if make is kl:
            expected = (net.encode(frame).latent_dist.mode() - 0.25) * 0.5
            back = net.decode(expected / 0.5 + 0.25).sample
        elif make is tiny:
            expected = net.encode(frame).latents * 2.0
            back = net.decode(expected / 2.0).sample
        else:
            mean, std = (torch.tensor(v).view(1, 4, 1, 1, 1) for v in ([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]))
            z = (net.encode(frame[:, :, None]).latent_dist.mode() - mean) / std
            expected, back = z[:, :, 0], net.decode(z * std + mean).sample[:, :, 0]
    assert torch.allclose(latents[:, :, 1], expected, atol=1e-4)
    assert torch.allclose(autoencoder.decode(latents)[:, :, 1], back.clamp(-1, 1), atol=1e-4)


def test_what_is_no_autoencoder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="choose one of .* or a folder"):
        Autoencoder(str(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match="not one of diffusers' Autoencoder"):
        Autoencoder(str(tmp_path))
    with pytest.raises(ValueError, match="do not divide"):
        Autoencoder("taef2").encode(torch.zeros(1, 3, 1, 20, 20))
