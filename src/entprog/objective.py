"""What the network is trained to predict: noise, target, loss, and the way back to the clean video.

t is in [0, 1] and t = 1 is noise. x_t = alpha(t) x0 + sigma(t) noise, and every conversion goes through the pair
(x0, noise), so one line per objective holds its whole definition:

    objective          alpha, sigma              target
    epsilon            cos(pi t/2), sin(pi t/2)  noise
    v_prediction       cos(pi t/2), sin(pi t/2)  alpha noise - sigma x0
    flow_prediction    1 - t, t                  noise - x0

An objective knows nothing of blocks, models or optimizers. Letters: B samples, t is (B,), x (B, C, F, H, W).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Path = Callable[[Tensor], tuple[Tensor, Tensor]]


def variance_preserving(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return (alpha, sigma) of the cosine path, alpha^2 + sigma^2 = 1."""
    return torch.cos(0.5 * math.pi * t), torch.sin(0.5 * math.pi * t)


def straight(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return (alpha, sigma) of the straight path of flow matching, alpha + sigma = 1."""
    return 1 - t, t


def shifted(u: Tensor, shift: float = 1.0, between: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """Return times t = s v / (1 + (s - 1) v), more of them near noise the larger the shift s.

    This is the shift of Stable Diffusion 3 (arXiv 2403.03206, equation 23). v runs with u in [0, 1] over the part of
    [0, 1] whose times lie `between` two times.
    """
    low, high = (time / (shift - (shift - 1) * time) for time in between)
    v = low + (high - low) * u
    return shift * v / (1 + (shift - 1) * v)


def frame_noise(shape: Sequence[int], shared: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
    """Return standard normal noise (B, C, F, H, W) in which a clip's frames share a part of their variance.

    noise_f = sqrt(1 - shared) own_f + sqrt(shared) common, the mixed noise of PYoCo (arXiv 2305.10474, equation 3):
    what is common to all frames cannot make them flicker. Each frame's own is drawn first, so `shared` 0 is
    `torch.randn` to the bit. ValueError for a share outside 0 .. 1.
    """
    if not 0 <= shared <= 1:
        raise ValueError(f"shared_noise {shared} is a share of the noise's variance: choose one from 0 to 1")
    own = torch.randn(*shape, generator=generator)
    if not shared:
        return own
    common = torch.randn(*shape[:2], 1, *shape[3:], generator=generator)
    return (1 - shared) ** 0.5 * own + shared**0.5 * common


@dataclass(frozen=True)
class Objective:
    """A path from video to noise and the linear combination of both ends that the network predicts.

    `combination` maps (alpha, sigma) to (p, q) of target = p x0 + q noise. Sampling begins at the time `start`.
    """

    name: str
    path: Path
    combination: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    start: float = 1 - 1e-3

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if t.shape != like.shape[:1]:
            raise ValueError(f"t must have shape ({like.shape[0]},), one time per sample, and has {tuple(t.shape)}")
        alpha, sigma = self.path(t)
        p, q = self.combination(alpha, sigma)
        shape = (-1,) + (1,) * (like.ndim - 1)
        return alpha.view(shape), sigma.view(shape), p.view(shape), q.view(shape)

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t = alpha x0 + sigma noise."""
        alpha, sigma, _, _ = self._coefficients(t, x0)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the network should predict from x_t."""
        _, _, p, q = self._coefficients(t, x0)
        return p * x0 + q * noise

    def ends(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (x0, noise) that x_t and a prediction of the target imply.

        Solves x_t = alpha x0 + sigma noise, prediction = p x0 + q noise. For `epsilon` at t = 1 nothing is left of x0
        and the determinant is clamped at 1e-3.
        """
        alpha, sigma, p, q = self._coefficients(t, x_t)
        determinant = alpha * q - sigma * p
        determinant = torch.where(determinant.abs() < 1e-3, torch.full_like(determinant, 1e-3), determinant)
        x0 = (q * x_t - sigma * prediction) / determinant
        noise = (alpha * prediction - p * x_t) / determinant
        return x0, noise


# An error e of predicted noise is one of sigma / alpha e in x0, and DDIM's first step leaves alpha_s / alpha_t e in the
# video: 50 e from t = .999 in 20 steps. So sampling begins where alpha is that of Stable Diffusion's last training
# step, alpha^2 = .0047, and the factor is 2. As there, it begins with pure noise where training had .07 x0 in it: the
# mean of a video comes out a little nearer to 0. The other objectives say x0 itself where all is noise.
_EPSILON_START = 2 / math.pi * math.acos(0.0047**0.5)

OBJECTIVES: dict[str, Objective] = {
    "epsilon": Objective(
        "epsilon", variance_preserving, lambda alpha, sigma: (0 * alpha, 1 + 0 * sigma), _EPSILON_START
    ),
    "v_prediction": Objective("v_prediction", variance_preserving, lambda alpha, sigma: (-sigma, alpha)),
    "flow_prediction": Objective("flow_prediction", straight, lambda alpha, sigma: (0 * alpha - 1, 0 * sigma + 1)),
}
