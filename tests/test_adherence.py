"""Pose, appearance, faces and steadiness: perfect for the truth, worse with every step away from it."""

import math

import pytest
import skimage.data
import torch
from skimage.color import rgb2lab
from torch import Tensor

from entprog.data.prepared import LABELS
from entprog.metrics.adherence import (
    REGIONS,
    background_flicker,
    colour_distance,
    colour_drift,
    flicker,
    keypoint_error,
    nearer_to_own,
    oks,
    pck,
    region_colours,
    rgb_to_lab,
)
from entprog.metrics.identity import Faces, check_face_networks, face_distance, find_faces
from entprog.packaged import PackagedFileError


def driving(frames: int = 3, size: float = 100) -> Tensor:
    """Visible keypoints spread over a box of size x size, (F, 17, 3)."""
    points = torch.rand(frames, 17, 3, generator=torch.Generator().manual_seed(0)) * size
    points[:, 0, :2], points[:, 16, :2], points[..., 2] = 0.0, size, 1.0
    return points


def moved(points: Tensor, pixels: float) -> Tensor:
    return points + torch.tensor((pixels, 0.0, 0.0))


def test_pck_counts_keypoints_within_a_tenth_of_the_box() -> None:
    points = driving()
    assert pck(points, points) == 1 and pck(moved(points, 9.9), points) == 1 and pck(moved(points, 10.1), points) == 0
    half = points.clone()
    half[:, :8] += 50
    assert pck(half, points) == pytest.approx(9 / 17)
    assert pck(moved(points, 19), points, alpha=0.2) == 1
    assert pck(points * 3, points * 3) == pck(moved(points, 9.9) * 3, points * 3) == 1  # scale does not matter


def test_oks_and_error_follow_their_formulas() -> None:
    points, area = driving(), torch.full((3,), 4000.0)
    assert oks(points, points) == 1 and keypoint_error(points, points) == 0
    assert keypoint_error(moved(points, 5), points) == pytest.approx(0.05)
    only_nose = points.clone()
    only_nose[:, 1:16, 2] = 0  # the nose, sigma .026, and the right ankle, sigma .089
    expected = sum(math.exp(-25 / (2 * 4000 * (2 * s) ** 2)) for s in (0.026, 0.089)) / 2
    assert oks(moved(points, 5), only_nose, area) == pytest.approx(expected, abs=1e-6)
    boxed = sum(math.exp(-25 / (2 * 5300 * (2 * s) ** 2)) for s in (0.026, 0.089)) / 2
    assert oks(moved(points, 5), only_nose) == pytest.approx(boxed, abs=1e-6)
    scores = [oks(moved(points, pixels), points) for pixels in (0, 2, 5, 20, 80)]
    assert scores == sorted(scores, reverse=True) and scores[-1] < 0.2


def test_what_is_not_found_is_wrong_and_what_is_not_visible_is_not_asked() -> None:
    points = driving()
    found = points.clone()
    found[0] = math.nan  # nobody found on the first of three frames
    assert pck(found, points) == pytest.approx(2 / 3) and oks(found, points) == pytest.approx(2 / 3)
    assert keypoint_error(found, points) == 0  # says so in its docstring
    hidden = points.clone()
    hidden[:, 1:8, 2] = 0.1
    far = points.clone()
    far[:, 1:8] += 500
    assert pck(far, hidden) == 1 and oks(far, hidden) == 1
    hidden[:, 1:8, :2] = math.nan  # not known where, and not visible
    assert pck(far, hidden) == oks(far, hidden) == 1 and keypoint_error(far, hidden) == 0
    nothing = torch.full_like(points, math.nan)
    assert all(math.isnan(score(points, nothing)) for score in (pck, oks, keypoint_error))
    with pytest.raises(ValueError, match="17, 3"):
        pck(points[0], points)


def test_lab_equals_scikit_image() -> None:
    image = torch.rand(2, 3, 6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    image[0, :, 0, 0], image[0, :, 0, 1], image[0, :, 0, 2] = 0.0, 1.0, 0.03
    expected = torch.from_numpy(rgb2lab(image.movedim(1, -1).numpy())).movedim(-1, 1)
    assert (rgb_to_lab(image) - expected).abs().max() < 1e-3  # its white point has more digits


def dressed(top: tuple[float, ...], bottom: tuple[float, ...], frames: int = 4) -> tuple[Tensor, Tensor]:
    """A grey clip with two garments, (F, 3, 16, 16) in [0, 1], and its labels."""
    video, labels = torch.full((frames, 3, 16, 16), 0.5), torch.zeros(frames, 16, 16, dtype=torch.uint8)
    for name, rows, colour in (("top", slice(2, 8), top), ("bottom", slice(8, 14), bottom)):
        video[:, :, rows, 4:12] = torch.tensor(colour)[:, None, None]
        labels[:, rows, 4:12] = LABELS[name]
    return video, labels


RED, GREEN, BLUE = (0.9, 0.1, 0.1), (0.1, 0.8, 0.1), (0.1, 0.1, 0.9)


def test_colours_of_regions_tell_people_apart() -> None:
    mine, labels = dressed(RED, BLUE)
    colours, other = region_colours(mine, labels), region_colours(*dressed(GREEN, RED))
    assert colours.shape == (len(REGIONS), 3) and int(colours.isfinite().all(1).sum()) == 2
    assert torch.allclose(colours[0], rgb_to_lab(torch.tensor(RED)[:, None, None])[:, 0, 0])
    assert colour_distance(colours, colours) == 0 and colour_distance(colours, other) > 50
    tinted = region_colours(mine * 0.8, labels)
    assert nearer_to_own(tinted, colours, other) == 1 and nearer_to_own(tinted, other, colours) == 0
    assert nearer_to_own(tinted, colours, colours) == 0.5
    assert math.isnan(nearer_to_own(tinted, colours, torch.full_like(other, math.nan)))
    grey = region_colours(torch.full_like(mine, 0.5), labels)
    assert colour_distance(colours, grey) > colour_distance(colours, tinted) > 0
    with pytest.raises(ValueError, match="differ"):
        region_colours(mine, labels[:2])


def test_flicker_is_change_beyond_the_truth() -> None:
    truth, labels = dressed(RED, BLUE, frames=8)
    truth[::2, :, 2:8, 4:12] *= 0.5  # clothes may shimmer, the background does not
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(truth.shape, generator=generator)
    noisy = [flicker((truth + s * noise).clamp(0, 1), truth) for s in (0, 0.02, 0.1)]
    assert noisy[0] == 0 and 0 < noisy[1] < noisy[2]
    assert flicker(truth[:1].expand_as(truth), truth) < 0
    assert background_flicker(truth[:1].expand_as(truth), truth, labels) == 0
    blinking = truth.clone()
    blinking[::2, :, 15] += 0.25
    assert background_flicker(blinking, truth, labels) == pytest.approx(0.25 * 16 / 160)
    assert math.isnan(flicker(truth[:1], truth[:1])) and math.isnan(colour_drift(truth[:1], truth[:1], labels[:1]))
    assert math.isnan(background_flicker(truth, truth, torch.ones_like(labels)))


def test_drift_is_colour_wandering_from_the_first_window() -> None:
    truth, labels = dressed(RED, BLUE, frames=8)
    assert colour_drift(truth, truth, labels) == 0
    fade = torch.linspace(1, 0.5, 8)[:, None, None, None]
    drifts = [colour_drift(truth * fade**power, truth, labels) for power in (0.5, 1, 2)]
    assert 0 < drifts[0] < drifts[1] < drifts[2]
    assert abs(colour_drift(truth * 0.7, truth, labels)) < 1e-9  # wrong all along is not drift


@pytest.fixture
def face_networks() -> None:
    try:
        check_face_networks()
    except PackagedFileError as error:
        pytest.skip(f"face networks cannot be had: {error}")


def portrait() -> tuple[Tensor, Tensor]:
    """A photograph of a face, (1, 3, 256, 256) uint8, and its labels."""
    image = torch.from_numpy(skimage.data.astronaut())[:256, 96:352].permute(2, 0, 1).contiguous()
    labels = torch.zeros(256, 256, dtype=torch.uint8)
    labels[60:190, 80:180] = LABELS["face"]
    return image[None], labels[None]


@pytest.mark.usefixtures("face_networks")
def test_a_face_is_recognised_in_its_mirror_and_counted_where_it_is_missing() -> None:
    image, labels = portrait()
    own = find_faces(image, labels)
    assert (len(own.descriptors), own.looked, own.small) == (1, 1, 0)
    mirrored = find_faces(image.flip(-1), labels.flip(-1))
    assert face_distance(own, own) == 0 and 0 < face_distance(mirrored, own) < 0.4
    blank = find_faces(torch.full_like(image, 90), labels)
    assert (len(blank.descriptors), blank.looked, blank.small) == (0, 1, 0) and math.isnan(face_distance(blank, own))
    everywhere = find_faces(image, torch.full_like(labels, LABELS["person"]))
    assert face_distance(everywhere, own) < 0.3  # without a labelled face the whole frame is searched
    tiny = torch.zeros_like(labels)
    tiny[0, 100:105, 100:105] = LABELS["face"]
    assert find_faces(image, tiny)[1:] == (0, 1)
    assert find_faces(image, torch.full_like(labels, LABELS["hair"]))[1:] == (0, 0)  # seen from behind
    assert find_faces(image.expand(20, -1, -1, -1), labels.expand(20, -1, -1), limit=2).looked == 2


def test_faces_need_bytes_with_labels_and_nothing_has_no_distance() -> None:
    none = Faces(torch.zeros(0, 128), 0, 0)
    assert math.isnan(face_distance(none, none))
    image, labels = portrait()
    with pytest.raises(ValueError, match="uint8"):
        find_faces(image / 255, labels)
