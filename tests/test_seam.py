"""Seams between windows."""

import pytest
import torch

from entprog.metrics.adherence import seam


def drifting(frames: int = 12) -> torch.Tensor:
    """A video that changes by the same amount every frame."""
    return torch.linspace(0.2, 0.6, frames).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).clone()


def test_a_seam_is_what_jumps_at_borders_beyond_the_truth():
    truth = drifting()
    assert seam(truth, truth, [4, 8]) == 0
    jumping = truth.clone()
    jumping[4:8] += 0.3
    assert seam(jumping, truth, [4, 8]) == pytest.approx(0.3 - 0.4 / 11, abs=1e-5)  # up with the drift, down against it
    assert seam(jumping, truth, [2, 6]) < 0  # the jumps lie elsewhere
    assert seam(jumping, jumping, [4, 8]) == 0  # a cut in the truth is no seam


def test_borders_must_be_frames():
    for borders in ([0], [12]):
        with pytest.raises(ValueError, match="must be frames 1 to 11"):
            seam(drifting(), drifting(), borders)
