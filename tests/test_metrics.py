"""Frame metrics equal scikit-image's; intervals cover what they should."""

import math

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from entprog.data.synthetic import figures
from entprog.metrics.frame import METRICS, l1, psnr, ssim
from entprog.metrics.protocol import bootstrap_interval


def pairs() -> list[tuple[Tensor, Tensor]]:
    """Noise, flat frames, drawn people, black against white, and sizes from the window's up; (F, 3, H, W)."""
    generator = torch.Generator().manual_seed(0)
    people = (figures(2, size=32, frames=3)["video"].transpose(1, 2) + 1) / 2
    noise = torch.rand(2, 3, 7, 7, generator=generator), torch.rand(2, 3, 7, 7, generator=generator)
    wide = torch.rand(2, 3, 9, 30, generator=generator)
    flat = torch.full((1, 3, 8, 8), 0.3)
    return [
        noise,
        (people[0], people[1]),
        (wide, (wide + 0.05 * torch.randn(wide.shape, generator=generator)).clamp(0, 1)),
        (flat, flat + 0.2),
        (torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)),
    ]


@pytest.mark.parametrize("case", range(5))
def test_metrics_equal_scikit_image(case: int) -> None:
    a, b = pairs()[case]
    for i in range(len(a)):
        x, y = (t[i].permute(1, 2, 0).double().numpy() for t in (a, b))
        assert abs(float(ssim(a, b)[i]) - structural_similarity(x, y, channel_axis=-1, data_range=1)) < 1e-6
        assert abs(float(psnr(a, b)[i]) - peak_signal_noise_ratio(x, y, data_range=1)) < 1e-6
        assert abs(float(l1(a, b)[i]) - abs(x - y).mean()) < 1e-6


@pytest.mark.parametrize("name", METRICS)
def test_metrics_are_symmetric_and_keep_leading_dimensions(name: str) -> None:
    a, b = torch.rand(2, 2, 4, 3, 8, 9, generator=torch.Generator().manual_seed(1)).unbind(0)
    score = METRICS[name](a, b)
    assert score.shape == (2, 4) and score.dtype == torch.float64
    assert torch.equal(score, METRICS[name](b, a))
    assert METRICS[name](a[0, 0], b[0, 0]).shape == ()
    assert torch.allclose(METRICS[name](a[1, 2], b[1, 2]), score[1, 2], rtol=1e-12)
    # A view of video, (3, F, H, W) with channels moved, must score like a copy of it.
    views = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (a, b))
    assert torch.allclose(METRICS[name](*views), score, rtol=1e-12)


def test_equal_frames_score_perfectly() -> None:
    a = pairs()[1][0]
    assert (psnr(a, a) == math.inf).all()
    assert torch.allclose(ssim(a, a), torch.ones(3, dtype=torch.float64))
    assert (l1(a, a) == 0).all()


def test_scores_fall_as_noise_grows() -> None:
    frame = pairs()[1][0][:1]
    noise = torch.randn(frame.shape, generator=torch.Generator().manual_seed(2))
    for metric, sign in ((psnr, 1), (ssim, 1), (l1, -1)):
        scores = torch.cat([metric(frame, (frame + s * noise).clamp(0, 1)) for s in (0.01, 0.03, 0.1, 0.3)])
        assert (sign * scores.diff() < 0).all()


@pytest.mark.parametrize("name", METRICS)
def test_wrong_frames_are_refused(name: str) -> None:
    good = torch.rand(2, 3, 8, 8)
    for bad, words in (
        (good * 2 - 1, "run from"),
        (good * 255, "run from"),
        (good * math.nan, "run from nan"),
        ((good * 255).byte(), "uint8"),
        (good[:, :1], "differ in shape"),
    ):
        with pytest.raises(ValueError, match=words):
            METRICS[name](bad, good)
    with pytest.raises(ValueError, match="3, H, W"):
        METRICS[name](torch.rand(2, 8, 8, 3), torch.rand(2, 8, 8, 3))


def test_ssim_refuses_frames_smaller_than_its_window() -> None:
    with pytest.raises(ValueError, match="7x7.*6x9"):
        ssim(torch.rand(3, 6, 9), torch.rand(3, 6, 9))


def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(3)
    hits = 0
    for trial in range(100):
        low, high = bootstrap_interval(torch.randn(40, generator=generator), 0.9, seed=trial, resamples=300)
        hits += low <= 0 <= high
    assert 80 <= hits <= 97


def test_bootstrap_interval_is_seeded_ordered_and_contains_the_sample_mean() -> None:
    values = torch.rand(30, generator=torch.Generator().manual_seed(4))
    state = torch.get_rng_state()
    low, high = bootstrap_interval(values)
    assert torch.equal(state, torch.get_rng_state())
    assert low < float(values.mean()) < high
    assert (low, high) == bootstrap_interval(values) != bootstrap_interval(values, seed=1)
    wide = bootstrap_interval(values, 0.99)
    assert wide[0] < low and high < wide[1]
    assert bootstrap_interval(torch.tensor([2.5])) == (2.5, 2.5)


@pytest.mark.parametrize("values", [torch.zeros(0), torch.zeros(2, 2), torch.tensor([1.0, math.inf])])
def test_bootstrap_interval_refuses_what_has_no_interval(values: Tensor) -> None:
    with pytest.raises(ValueError, match="finite numbers"):
        bootstrap_interval(values)
    for wrong in ({"level": 1.0}, {"level": 95}, {"resamples": 0}):
        with pytest.raises(ValueError, match="level"):
            bootstrap_interval(torch.rand(4), **wrong)
