"""Samplers: from noise to video with guidance, and clips longer than the window the model was trained on.

All walk down the objective's path from its `start`, near t = 1, to 0. SAMPLERS maps a name to eta, the share of the
fresh noise that each step may hold (DDIM, arXiv 2010.02502): 0 is deterministic, and for flow prediction exactly
Euler's method; 1 is DDPM's ancestral sampling with the posterior variance (`ddpm` with 100 steps is what the
human-video papers call IDDPM-100, but for the variance, which no model here learns).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from entprog.blocks import evaluating
from entprog.models.pretrained import conditioned
from entprog.objective import Objective, frame_noise

SAMPLERS: dict[str, float] = {"ddim": 0.0, "euler": 0.0, "ddpm": 1.0}
FRAMED = ("pose",)  # conditions with frames, cut to the window


def windows(frames: int, window: int, overlap: int) -> list[tuple[int, int]]:
    """Cover `frames` frames by windows [start, end) of the same length that overlap by at least `overlap`.

    The last one is moved back to end with the clip. ValueError unless 0 <= overlap < window.
    """
    if not 0 <= overlap < window:
        raise ValueError(f"an overlap of {overlap} frames must be at least 0 and less than the window of {window}")
    if frames <= window:
        return [(0, frames)]
    starts = [*range(0, frames - window, window - overlap), frames - window]
    return [(start, start + window) for start in starts]


def _ramp(length: int, device: torch.device) -> Tensor:
    """Weights of a window's frames, highest in the middle, so that neighbours cross-fade."""
    place = torch.arange(length, device=device)
    return torch.minimum(place + 1, length - place).float()


def _step(objective: Objective, x0: Tensor, noise: Tensor, t: Tensor, s: Tensor, eta: float, fresh: Tensor) -> Tensor:
    """Go from time t to s < t: x_s = alpha_s x0 + sqrt(sigma_s^2 - v) noise + sqrt(v) fresh."""
    alpha_t, sigma_t = (a.view(-1, *[1] * (x0.ndim - 1)) for a in objective.path(t))
    alpha_s, sigma_s = (a.view(-1, *[1] * (x0.ndim - 1)) for a in objective.path(s))
    ratio = alpha_t * sigma_s / (alpha_s * sigma_t).clamp(min=1e-6)
    variance = (eta * sigma_s).square() * (1 - ratio.square()).clamp(min=0)
    return alpha_s * x0 + (sigma_s.square() - variance).clamp(min=0).sqrt() * noise + variance.sqrt() * fresh


@torch.no_grad()
def sample(
    model: nn.Module,
    objective: Objective,
    conditions: dict[str, Tensor],
    shape: tuple[int, ...],
    *,
    num_inference_steps: int = 20,
    guidance_scale: float = 1.0,
    guided: Sequence[str] | str = "reference",
    sampler: str = "ddim",
    window: int | None = None,
    overlap: int = 0,
    shared_noise: float = 0.0,
    seed: int = 0,
    on_step: Callable[[int], Any] | None = None,
) -> Tensor:
    """Draw videos (B, C, F, H, W) in the data's range, starting from seeded noise.

    guidance_scale w > 1 moves the prediction away from the one without the `guided` conditions,
    prediction = without + w (with - without), at twice the cost. With `window`, F may be larger than what the model
    was trained on: at every step the predictions of overlapping windows are cross-faded. `shared_noise` is that of
    `frame_noise`: the more of it, the steadier the video. ValueError for a condition that is not given, for an unknown
    sampler and for fewer than one step.
    """
    guided = (guided,) if isinstance(guided, str) else tuple(guided)
    if guidance_scale != 1 and (not guided or set(guided) - set(conditions)):
        raise ValueError(f"guidance needs the conditions {guided}: the conditions given are {sorted(conditions)}")
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is unknown: choose one of {sorted(SAMPLERS)}")
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps {num_inference_steps} would return the noise: choose at least 1")
    eta = SAMPLERS[sampler]
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    x = frame_noise(shape, shared_noise, generator).to(device)
    parts = windows(shape[2], window or shape[2], overlap)
    times = torch.linspace(objective.start, 0, num_inference_steps + 1).tolist()
    without = {k: v for k, v in conditions.items() if k not in guided}

    def predicted(x: Tensor, now: Tensor, given: dict[str, Tensor]) -> Tensor:
        if len(parts) == 1:
            return conditioned(model, x, now, given).float()
        total, weight = torch.zeros_like(x), torch.zeros(shape[2], device=device)
        for start, end in parts:
            own = {k: v[:, :, start:end] if k in FRAMED else v for k, v in given.items()}
            ramp = _ramp(end - start, device)
            total[:, :, start:end] += ramp[:, None, None] * conditioned(model, x[:, :, start:end], now, own).float()
            weight[start:end] += ramp
        return total / weight[:, None, None]

    with evaluating(model):
        for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
            now, then = torch.full((len(x),), t, device=device), torch.full((len(x),), s, device=device)
            prediction = predicted(x, now, conditions)
            if guidance_scale != 1:
                free = predicted(x, now, without)
                prediction = free + guidance_scale * (prediction - free)
            x0, noise = objective.ends(prediction, x, now)
            fresh = frame_noise(shape, shared_noise, generator).to(device) if eta else torch.zeros(())
            x = _step(objective, x0, noise, now, then, eta, fresh)
            if on_step is not None:
                on_step(i)
    return x
