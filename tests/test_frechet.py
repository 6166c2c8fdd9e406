"""Frechet distances have a closed form; I3D equals the published weights' own implementation."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor
from torch.nn.functional import avg_pool2d

from entprog.data.video import decode
from entprog.metrics.frechet import frechet_distance, i3d_logits, load_i3d, small_set
from entprog.packaged import PackagedFileError, packaged_files

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
from make_golden import frames  # noqa: E402

# Demo_SinglePerson and Demo_MultiPerson of the pose2sim package, cam01 to cam04: BSD-3.
POSE2SIM_VIDEOS = {
    "Single": ("cf4f2816c86bea4bfbea255333d8626ff32a3ecabdab8b0fb147cea9167fde3a",
               "94ff87cf978b8406e8aa36ab3c5362e72848994e87652f0dc7a33c315e8e0442",
               "b8b329f832f178f27ecb78d024d5026b96c6adb36c387bfe2c0af85eab8a11ca",
               "b5c0e7863fd70d008e7178d3c556b045b0ea5f78fcd61ca548a0b2e807e641f7"),
    "Multi": ("543cee6a4c2c2b52dc9eac9137ee63d14f1f84e706a9a7264769edcb11e5ea53",
              "8895092a7cf26359205a427b7ac2f4a935c2e0bd36d9b7a5140cb33faa468a6b",
              "d3daf48cdf9f5603868ddb99166ddaf9b12279e7ce968922926560d5fd3f0c99",
              "1490149dc40e7301fa5ceae23862b044ba5c398a8b2a40df21ed894702728c09"),
}  # fmt: skip
GOLDEN = json.loads((ROOT / "tests/golden/i3d.json").read_text())


@pytest.fixture
def i3d() -> None:
    try:
        load_i3d()
    except PackagedFileError as error:
        pytest.skip(f"the I3D weights cannot be had: {error}")


def gaussian(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(mean: Tensor, deviation: Tensor, count: int = 64) -> Tensor:
    """Samples whose mean and covariance are exactly these (a diagonal one)."""
    basis = torch.linalg.qr(gaussian(count, len(mean), 0) - gaussian(count, len(mean), 0).mean(0)).Q
    return mean + (basis - basis.mean(0)) * math.sqrt(count - 1) * deviation


def test_the_distance_of_gaussians_has_a_closed_form() -> None:
    means = torch.tensor([[0.0, 1.0, -2.0], [0.5, 1.0, 4.0]], dtype=torch.float64)
    deviations = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.5, 0.1]], dtype=torch.float64)
    a, b = (exactly(m, s) for m, s in zip(means, deviations, strict=True))
    expected = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert abs(frechet_distance(a, b) - float(expected)) < 1e-9


@pytest.mark.parametrize(("count", "other", "width"), [(50, 40, 6), (5, 7, 12), (3, 60, 8)])
def test_the_distance_equals_the_one_by_a_matrix_root(count: int, other: int, width: int) -> None:
    a, b = gaussian(count, width, 1), gaussian(other, width, 2) * 1.5 + 0.3
    ca, cb = torch.cov(a.T).numpy(), torch.cov(b.T).numpy()
    root = torch.linalg.eigvals(torch.from_numpy(ca @ cb)).real.clamp(min=0).sqrt().sum()
    if min(count, other) > width:  # singular matrices have no principal root
        assert abs(float(root) - sqrtm(ca @ cb).trace().real) < 1e-6
    expected = (a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * root
    assert abs(frechet_distance(a, b) - float(expected)) < 1e-5


def test_the_distance_is_zero_for_itself_symmetric_and_grows_with_a_shift() -> None:
    a, b = gaussian(20, 5, 3), gaussian(30, 5, 4)
    assert frechet_distance(a, a) < 1e-9 and frechet_distance(a, a.flip(0)) < 1e-9
    assert abs(frechet_distance(a, b) - frechet_distance(b, a)) < 1e-9
    assert abs(frechet_distance(a, a + 2.0) - 5 * 4) < 1e-9
    assert abs(frechet_distance(a.float(), b.float()) - frechet_distance(a, b)) < 1e-4


def test_sets_without_a_covariance_are_refused() -> None:
    with pytest.raises(ValueError, match="sets of 1 and 5"):
        frechet_distance(gaussian(1, 3, 0), gaussian(5, 3, 0))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(gaussian(4, 3, 0) * math.nan, gaussian(5, 3, 0))
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(5, 2\)"):
        frechet_distance(gaussian(4, 3, 0), gaussian(5, 2, 0))


def test_small_sets_are_warned_of_and_short_or_wrong_videos_refused() -> None:
    assert small_set(256) is None and "2 videos are fewer than 256: only the order" in str(small_set(2))
    video = torch.rand(16, 3, 8, 8)
    with pytest.raises(ValueError, match="at least 10 frames, not 9"):
        i3d_logits(video[:9])
    for bad, words in ((video * 2, "run"), (video[:, :1], "F, 3, H, W"), ((video * 255).byte(), "uint8")):
        with pytest.raises(ValueError, match=words):
            i3d_logits(bad)


@pytest.mark.usefixtures("i3d")
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['frames']} frames")
def test_i3d_equals_the_jax_implementation(case: dict) -> None:
    video = torch.from_numpy(frames(case["frames"], 224, case["seed"])).permute(0, 3, 1, 2) / 255
    expected = torch.tensor(case["logits"], dtype=torch.float64)
    assert (i3d_logits(video) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.usefixtures("i3d")
def test_fvd_orders_how_much_real_videos_were_damaged() -> None:
    """Eight filmed videos; held-out windows of them, damaged more and more, against other windows."""
    members = {
        f"Pose2Sim/Demo_{people}Person/videos/cam0{camera}.mp4": sha256
        for people, hashes in POSE2SIM_VIDEOS.items()
        for camera, sha256 in enumerate(hashes, start=1)
    }
    try:
        paths = packaged_files("pose2sim", "0.10.49", members).values()
    except PackagedFileError as error:
        pytest.skip(f"real videos cannot be had: {error}")
    real, held = [], []
    for path in paths:
        video = decode(path, size=224)
        windows = [video[i : i + 16] / 255 for i in torch.linspace(0, len(video) - 16, 4).long().tolist()]
        real, held = real + windows[0::2], held + windows[1::2]
    generator = torch.Generator().manual_seed(0)
    features = torch.stack([i3d_logits(v) for v in real])
    damages = {
        "none": lambda v: v,
        "frozen": lambda v: v[:1].expand_as(v),
        "shuffled": lambda v: v[torch.randperm(16, generator=generator)],
        "blurred": lambda v: avg_pool2d(v, 9, 1, 4),
        "noise": lambda v: (v + 0.1 * torch.randn(v.shape, generator=generator)).clamp(0, 1),
    }
    scores = {
        name: frechet_distance(features, torch.stack([i3d_logits(damage(v)) for v in held]))
        for name, damage in damages.items()
    }
    assert list(scores.values()) == sorted(scores.values()), scores
