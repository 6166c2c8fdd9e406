"""Finding people: geometry by properties, the networks on a photograph."""

import sys

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from entprog.data import detect
from entprog.data.detect import MIRROR, PoseEstimator, mirrored_keypoints, nobody
from entprog.data.pose import COCO17, draw_skeleton
from entprog.packaged import PackagedFileError


def random_points(frames: int = 3, size: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(frames, 17, 3, generator=generator) * torch.tensor((size, size, 1))


@pytest.fixture(scope="module")
def estimator() -> PoseEstimator:
    pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed")
    try:
        return PoseEstimator()
    except PackagedFileError as error:
        pytest.skip(f"the networks cannot be had: {error}")


@pytest.fixture(scope="module")
def photo() -> Tensor:
    """A woman from the hips upwards, (3, 512, 512); her nose is at about (223, 128)."""
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    return torch.from_numpy(data.astronaut()).permute(2, 0, 1).contiguous()


def test_mirroring_twice_is_the_identity_and_exchanges_names() -> None:
    points = random_points()
    assert torch.allclose(mirrored_keypoints(mirrored_keypoints(points, 64), 64), points, atol=1e-5)
    assert sorted(MIRROR) == list(range(17)) and all(MIRROR[MIRROR[k]] == k for k in range(17))
    assert COCO17[MIRROR[COCO17.index("left_knee")]] == "right_knee" and MIRROR[0] == 0
    with pytest.raises(ValueError, match="33"):
        mirrored_keypoints(torch.zeros(33, 3), 64)


def test_keypoints_that_are_nowhere_are_left_out_of_the_map() -> None:
    points = random_points(4)
    points[..., 2] = 1
    points[0] = torch.tensor((torch.nan, torch.nan, 0.0))  # nobody
    points[2, 5], points[3, 5, 2] = torch.nan, 0
    maps = draw_skeleton(points, 64, 64)
    assert not maps[0].any() and maps[1].any()
    points[2:, :, :2] = points[2, :, :2].nan_to_num(0)
    assert torch.equal(draw_skeleton(points[3], 64, 64), maps[2])


def test_the_map_of_mirrored_keypoints_is_the_flipped_map_in_the_other_sides_colours() -> None:
    points = torch.zeros(17, 3)
    points[[5, 7]] = torch.tensor([[20.0, 10, 1], [20, 50, 1]])  # a left upper arm, red
    flipped = draw_skeleton(points, 64, 64).flip(-1)
    mirrored = draw_skeleton(mirrored_keypoints(points, 64), 64, 64)
    assert torch.equal(flipped.amax(0) > 0.5, mirrored.amax(0) > 0.5)
    assert flipped[:, 30, 43].argmax() == 0 and mirrored[:, 30, 43].argmax() == 1  # the right upper arm is green


def test_anchors_are_where_the_detector_was_trained_to_expect_them() -> None:
    anchors = detect._anchors()
    assert anchors.shape == (2254, 2) and anchors.min() > 0 and anchors.max() < 1
    assert anchors[0].tolist() == anchors[1].tolist() == [0.5 / 28, 0.5 / 28]
    assert anchors[2].tolist() == [1.5 / 28, 0.5 / 28]
    assert anchors.mean(0) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(("side", "angle"), [(20.0, 0.0), (33.0, 0.7), (150.0, -2.0)])
def test_a_turned_square_is_cut_out_and_laid_back_in_place(side: float, angle: float) -> None:
    x, y = torch.meshgrid(torch.arange(90) + 0.5, torch.arange(70) + 0.5, indexing="xy")
    frame = torch.stack((x, y, x + y))  # every pixel says where it is
    square = detect._Square(torch.tensor((41.0, 37.0)).numpy(), side, angle)
    seen = detect._sample(frame, square, 32)
    steps = torch.tensor([(8.5, 8.5), (16, 16), (20.5, 11.5)])
    for (across, down), (left, top) in zip(steps, square.to_frame(steps.numpy() / 32), strict=True):
        if 1 < left < 89 and 1 < top < 69 and across != 16:
            found = seen[:2, int(down), int(across)]
            assert found.tolist() == pytest.approx([left, top], abs=0.05 + side / 64)
    mask = detect._paste(torch.ones(32, 32).numpy(), square, 70, 90)
    wanted = min(side, 90) ** 2 if angle == 0 else side**2
    assert mask[37, 41] and (side > 70 or mask.sum() == pytest.approx(wanted, rel=0.05))


def test_overlap_is_one_for_equal_boxes_and_zero_for_distant_ones() -> None:
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.6, 0.5, 0.2, 0.4], [2, 2, 0.1, 0.1]], dtype=torch.float64).numpy()
    assert detect.overlap(boxes[0], boxes).tolist() == pytest.approx([1, 1 / 3, 0])


def test_no_person_is_nan_and_no_confidence() -> None:
    found = nobody(4, 6)
    assert found.keypoints[:, :2].isnan().all() and not found.keypoints[:, 2].any()
    assert found.mask.shape == (4, 6) and not found.mask.any() and found.presence == 0


def test_wrong_thresholds_are_refused() -> None:
    with pytest.raises(ValueError, match="min_presence is 2"):
        PoseEstimator(min_presence=2)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[pose\]'"):
        PoseEstimator()


def test_frames_of_other_shapes_and_types_are_refused(estimator: PoseEstimator) -> None:
    for bad in (torch.zeros(2, 4, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 8)):
        with pytest.raises(ValueError, match="uint8, not"):
            estimator.estimate(bad)
    with pytest.raises(ValueError, match="F, 3, H, W"):
        estimator.estimate(torch.zeros(3, 8, 8, dtype=torch.uint8))


def test_a_photograph_is_understood(estimator: PoseEstimator, photo: Tensor) -> None:
    points, masks = estimator.estimate_masked(photo[None])
    assert points.shape == (1, 17, 3) and masks.shape == (1, 512, 512)
    assert (points[0, 0, :2] - torch.tensor((222.7, 128.0))).norm() < 6  # as mediapipe itself answers
    assert points[0, 5, 0] > 270 and points[0, 6, 0] < 140  # her left shoulder is on our right
    assert points[0, 13:, 2].max() == 0  # knees and ankles are below the picture
    assert masks[0, 130, 220] and masks[0, 400, 220] and not masks[0, 30, 480] and not masks[0, 30, 30]


def test_the_mirrored_photograph_gives_the_mirrored_pose(estimator: PoseEstimator, photo: Tensor) -> None:
    points, turned = estimator.estimate(photo[None])[0], estimator.estimate(photo[None].flip(-1))[0]
    difference = (mirrored_keypoints(turned, 512) - points)[:7, :2]  # of 512; shoulders are 200 apart
    assert difference.norm(dim=-1).mean() < 10


def test_small_frames_give_the_same_pose(estimator: PoseEstimator, photo: Tensor) -> None:
    small = interpolate(photo[None].float(), 64, mode="area").round().to(torch.uint8)
    difference = estimator.estimate(small)[0, :7, :2] - estimator.estimate(photo[None])[0, :7, :2] / 8
    assert difference.norm(dim=-1).mean() < 1.5


def test_a_person_is_followed_and_lost_and_found_again(estimator: PoseEstimator, photo: Tensor) -> None:
    small = interpolate(photo[None].float(), 160, mode="area")[0].round().to(torch.uint8)
    frames = torch.zeros(5, 3, 200, 300, dtype=torch.uint8)
    for frame, left in zip((0, 1, 3, 4), (0, 20, 140, 120), strict=True):
        frames[frame, :, 40:, left : left + 160] = small
    points = estimator.estimate(frames)
    assert points[2].isnan().any() and not points[2, :, 2].any()
    assert points[1, :7, 0] - points[0, :7, 0] == pytest.approx(torch.full((7,), 20.0), abs=4)
    assert points[3, :7, 0] - points[0, :7, 0] == pytest.approx(torch.full((7,), 140.0), abs=6)
    assert torch.equal(points.nan_to_num(-1), estimator.estimate(frames).nan_to_num(-1))  # nothing is remembered
