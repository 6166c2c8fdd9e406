"""How numbers are reported: the uncertainty of a mean."""

import math

import torch
from torch import Tensor


def bootstrap_interval(
    values: Tensor, level: float = 0.95, seed: int = 0, *, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of independent samples.

    Shapes: values (N,), one number a sample (a clip or a person: frames of one clip are not independent). Returns
    (low, high), the same for the same seed; one sample gives an interval of no width. ValueError for no samples,
    numbers that are not finite (the PSNR of equal frames), a level outside (0, 1) and fewer than one resample.
    """
    if values.ndim != 1 or len(values) == 0 or not values.isfinite().all():
        raise ValueError(f"the samples must be finite numbers (N,) with N > 0, not {tuple(values.shape)}: {values}")
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level {level} must lie between 0 and 1 and resamples {resamples} be at least 1")
    generator = torch.Generator().manual_seed(seed)
    samples, count = values.detach().cpu().double(), len(values)
    means = torch.stack([samples[torch.randint(count, (count,), generator=generator)].mean() for _ in range(resamples)])
    low, high = means.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high


def mean_interval(values: torch.Tensor) -> tuple[float, list[float]]:
    """Return the mean of values (n,) and its 95 % interval under a normal distribution, [low, high].

    One value gives an interval of no width, which says nothing.
    """
    spread = values.std().item() if len(values) > 1 else 0.0
    mean, half = values.mean().item(), 1.96 * spread / math.sqrt(len(values))
    return mean, [mean - half, mean + half]
