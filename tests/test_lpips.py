"""LPIPS equals the published weights' own implementation, and behaves as a distance."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from entprog.metrics.lpips import BACKBONES, load_lpips, lpips
from entprog.packaged import PackagedFileError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
from make_golden import frames  # noqa: E402

GOLDEN = json.loads((ROOT / "tests/golden/lpips.json").read_text())


@pytest.fixture(params=BACKBONES)
def net(request: pytest.FixtureRequest) -> str:
    try:
        load_lpips(request.param)
    except PackagedFileError as error:
        pytest.skip(f"the LPIPS weights cannot be had: {error}")
    return request.param


def images(count: int, size: int, seed: int) -> Tensor:
    return torch.from_numpy(frames(count, size, seed)).permute(0, 3, 1, 2).double() / 255


def test_it_equals_the_jax_implementation(net: str) -> None:
    for case in (c for c in GOLDEN["cases"] if c["net"] == net):
        a, b = (images(2, case["size"], seed) for seed in case["seeds"])
        assert (lpips(a, b, net) - torch.tensor(case["lpips"])).abs().max() < 1e-4 / 4


def test_it_is_zero_for_equal_frames_symmetric_and_keeps_leading_dimensions(net: str) -> None:
    a, b = images(2, 48, 0), images(2, 48, 1)
    assert (lpips(a, a, net) == 0).all()
    score = lpips(a, b, net)
    assert score.shape == (2,) and score.dtype == torch.float64 and (score > 0).all()
    assert torch.allclose(score, lpips(b, a, net), atol=1e-6)
    assert torch.allclose(lpips(a[None], b[None], net), score[None], atol=1e-6)
    assert torch.allclose(lpips(a[1], b[1], net), score[1], atol=1e-6)


def test_batches_do_not_change_the_score(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = images(3, 40, 0), images(3, 40, 1)
    score = lpips(a, b, net)
    monkeypatch.setattr("entprog.metrics.lpips._BATCH_PIXELS", 1)
    assert torch.allclose(lpips(a, b, net), score, atol=1e-6)


def test_it_grows_with_noise_and_with_blur(net: str) -> None:
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    frame = (
        torch.stack(((x // 8 + y // 8) % 2, x // 63, (x - 32) ** 2 + (y - 32) ** 2 < 300)).double()[None] * 0.8 + 0.1
    )
    noise = torch.randn(frame.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noisy = torch.cat([lpips(frame, (frame + s * noise).clamp(0, 1), net) for s in (0.0, 0.02, 0.06, 0.2)])
    blurred = torch.cat([lpips(frame, avg_pool2d(frame, k, 1, k // 2), net) for k in (1, 3, 7, 15)])
    assert (noisy.diff() > 0).all() and (blurred.diff() > 0).all()


def test_wrong_frames_and_names_are_refused(net: str) -> None:
    small = torch.rand(3, 15, 40)
    with pytest.raises(ValueError, match="15x40"):
        lpips(small, small, net)
    with pytest.raises(ValueError, match="run from"):
        lpips(torch.rand(3, 40, 40) * 2 - 1, torch.rand(3, 40, 40), net)
    smallest = BACKBONES[net].smallest
    assert lpips(torch.rand(3, smallest, smallest), torch.rand(3, smallest, smallest), net).isfinite()


def test_an_unknown_backbone_is_refused() -> None:
    with pytest.raises(ValueError, match="'squeeze'.*alex"):
        lpips(torch.rand(3, 40, 40), torch.rand(3, 40, 40), "squeeze")
