"""Frame metrics: PSNR, SSIM and mean absolute difference, each a function and a row in METRICS.

Frames are tensors (..., 3, H, W) in [0, 1]; a metric returns one number a frame, (...), computed in float64. Both
PSNR and SSIM equal scikit-image's with its defaults on RGB (data_range=1, channel_axis; a uniform 7x7 window). They
differ from the grey uint8 SSIM and the L1 that is divided by H*W again, which the human-video papers report.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

SSIM_WINDOW = 7
_C1, _C2 = 0.01**2, 0.03**2


def _pair(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Check two sets of frames and return them in float64."""
    if prediction.shape != target.shape:
        raise ValueError(f"the frames differ in shape: {tuple(prediction.shape)} and {tuple(target.shape)}")
    if prediction.ndim < 3 or prediction.shape[-3] != 3 or 0 in prediction.shape:
        raise ValueError(
            f"frames are (..., 3, H, W), not {tuple(prediction.shape)}: move the channels to the third last"
        )
    for frames in (prediction, target):
        if not frames.is_floating_point():
            raise ValueError(f"frames are floating point in [0, 1], not {frames.dtype}: divide by 255")
        low, high = (float(x) for x in frames.aminmax())
        if not (low >= -1e-6 and high <= 1 + 1e-6):  # False for NaN as well
            raise ValueError(f"frames are in [0, 1], these run from {low:.3g} to {high:.3g}: map and clamp them first")
    return prediction.double(), target.double()


def l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of each frame, in [0, 1]: |p - q| averaged over channels and pixels.

    Shapes: (..., 3, H, W) in [0, 1] twice -> (...). ValueError for other shapes, types and values.
    """
    prediction, target = _pair(prediction, target)
    return (prediction - target).abs().mean(dim=(-3, -2, -1))


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each frame in dB: 10 log10(1 / mean squared error), inf for equal frames.

    Shapes: (..., 3, H, W) in [0, 1] twice -> (...). ValueError for other shapes, types and values.
    """
    prediction, target = _pair(prediction, target)
    return -10 * torch.log10((prediction - target).square().mean(dim=(-3, -2, -1)))


def ssim(prediction: Tensor, target: Tensor) -> Tensor:
    """Structural similarity of each frame (Wang et al. 2004), uniform 7x7 window, sample covariance, mean of RGB.

    Only windows that lie inside the frame count. Shapes: (..., 3, H, W) in [0, 1] twice -> (...). ValueError for
    frames smaller than the window and for other shapes, types and values.
    """
    x, y = _pair(prediction, target)
    if min(x.shape[-2:]) < SSIM_WINDOW:
        height, width = x.shape[-2:]
        raise ValueError(f"SSIM needs frames of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels, not {height}x{width}")

    def mean(image: Tensor) -> Tensor:
        return avg_pool2d(image.flatten(0, -4) if image.ndim > 3 else image[None], SSIM_WINDOW, stride=1)

    sample = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)  # n / (n - 1)
    mx, my = mean(x), mean(y)
    vx, vy = sample * (mean(x * x) - mx * mx), sample * (mean(y * y) - my * my)
    vxy = sample * (mean(x * y) - mx * my)
    score = (2 * mx * my + _C1) * (2 * vxy + _C2) / ((mx * mx + my * my + _C1) * (vx + vy + _C2))
    return score.mean(dim=(-3, -2, -1)).reshape(x.shape[:-3])


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim, "l1": l1}
