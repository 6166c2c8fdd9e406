"""Samplers: plain functions from noise to video, with guidance.

The update needs only the two ends a prediction implies, x_s = alpha(s) x0 + sigma(s) noise: on the variance-preserving
path that is deterministic DDIM (Song et al., 2021), on the straight path exactly Euler's method for flow matching.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from entprog.blocks import evaluating
from entprog.models.pretrained import conditioned
from entprog.objective import Objective


def sample(
    model: nn.Module,
    objective: Objective,
    conditions: dict[str, Tensor],
    shape: tuple[int, ...],
    *,
    num_inference_steps: int = 20,
    guidance_scale: float = 1.0,
    guided: str = "reference",
    seed: int = 0,
    on_step: Callable[[int], Any] | None = None,
) -> Tensor:
    """Draw videos (B, C, F, H, W) in the data's range, starting from seeded noise at t = 1.

    guidance_scale w > 1 moves the prediction away from the one without the `guided` condition,
    prediction = without + w (with - without), at twice the cost. ValueError for a condition that is not given.
    """
    if guidance_scale != 1 and guided not in conditions:
        raise ValueError(f"guidance needs the condition {guided!r}: the conditions given are {sorted(conditions)}")
    device = next(model.parameters()).device
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    times = torch.linspace(1 - 1e-3, 0, num_inference_steps + 1).tolist()
    without = {k: v for k, v in conditions.items() if k != guided}
    with evaluating(model):
        for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
            now, then = torch.full((len(x),), t, device=device), torch.full((len(x),), s, device=device)
            prediction = conditioned(model, x, now, conditions).float()
            if guidance_scale != 1:
                free = conditioned(model, x, now, without).float()
                prediction = free + guidance_scale * (prediction - free)
            x0, noise = objective.ends(prediction, x, now)
            x = objective.noisy(x0, noise, then)
            if on_step is not None:
                on_step(i)
    return x
