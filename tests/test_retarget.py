"""A driving skeleton fitted to another body: exact where it can be, foot on the floor where it stood."""

import pytest
import torch
from torch import Tensor

from entprog.data.retarget import fit_pose

# A standing person, arms a little out, in units of its torso's length.
BODY = torch.tensor([
    (0, -1.5), (0.07, -1.57), (-0.07, -1.57), (0.15, -1.5), (-0.15, -1.5), (0.35, -1), (-0.35, -1), (0.5, -0.5),
    (-0.5, -0.5), (0.6, 0), (-0.6, 0), (0.2, 0), (-0.2, 0), (0.22, 0.8), (-0.22, 0.8), (0.22, 1.6), (-0.22, 1.6),
])  # fmt: skip


def person(size: float = 40, x: float = 100, y: float = 120) -> Tensor:
    return torch.cat((BODY * size + torch.tensor((x, y)), torch.ones(17, 1)), -1)


def moving(size: float = 40, frames: int = 6) -> Tensor:
    """Walks to the right and waves: no bone changes its length."""
    video = torch.stack([person(size, 100 + 7 * f) for f in range(frames)])
    for f in range(frames):
        angle = torch.tensor(0.3 * f)
        turn = torch.stack((torch.cos(angle), -torch.sin(angle), torch.sin(angle), torch.cos(angle))).reshape(2, 2)
        for elbow, wrist in ((7, 9), (8, 10)):
            video[f, wrist, :2] = video[f, elbow, :2] + turn @ (video[f, wrist, :2] - video[f, elbow, :2])
    return video


@pytest.mark.parametrize("per_limb", [False, True])
@pytest.mark.parametrize("scale", [0.4, 1.0, 1.7])
def test_a_scaled_and_shifted_copy_is_recovered_exactly(scale: float, per_limb: bool) -> None:
    video = moving()
    driving = video.clone()
    driving[..., :2] = driving[..., :2] * scale + torch.tensor((31.0, -12.0))
    assert torch.allclose(fit_pose(driving, video[0], per_limb=per_limb), video, atol=1e-3)


@pytest.mark.parametrize("per_limb", [False, True])
def test_fitting_to_itself_changes_nothing_and_fitting_twice_is_fitting_once(per_limb: bool) -> None:
    video, other = moving(), person(25, 60, 70)
    assert torch.allclose(fit_pose(video, video[0], per_limb=per_limb), video, atol=1e-4)
    once = fit_pose(video, other, per_limb=per_limb)
    assert torch.allclose(fit_pose(once, other, per_limb=per_limb), once, atol=1e-3)


def test_hips_and_feet_stand_where_the_reference_stands() -> None:
    other = person(25, 60, 70)
    other[[13, 14, 15, 16], 1] -= 4  # shorter legs
    fitted = fit_pose(moving(), other)
    assert fitted[0, [11, 12], 0].mean() == pytest.approx(60)
    assert fitted[0, 15, 1] == pytest.approx(float(other[15, 1]))
    middle = fit_pose(moving(), other, anchor="median")
    assert middle[:, [11, 12], 0].mean() == pytest.approx(60) and middle[0, 15, 1] == pytest.approx(float(other[15, 1]))


def test_a_jump_is_kept_in_proportion() -> None:
    video = moving()
    video[3, :, 1] -= 30
    fitted = fit_pose(video, person(20))
    assert fitted[2, 15, 1] - fitted[3, 15, 1] == pytest.approx(15)


def test_per_limb_gives_the_lengths_of_the_reference() -> None:
    other = person(30, 70, 80)
    other[[15, 16], 1] += 6  # longer shins
    fitted = fit_pose(moving(), other, per_limb=True)
    lengths = (fitted[:, [15, 7, 9], :2] - fitted[:, [13, 5, 7], :2]).norm(dim=-1)
    assert torch.allclose(lengths, (other[[15, 7, 9], :2] - other[[13, 5, 7], :2]).norm(dim=-1).expand(6, 3), atol=1e-3)
    assert fitted[0, 15, 1] == pytest.approx(float(other[15, 1]), abs=1e-3)


def test_one_wrong_joint_does_not_change_the_size() -> None:
    other = person(20)
    other[15, :2] = torch.tensor((300.0, 300.0))
    fitted = fit_pose(moving(), other)
    assert (fitted[0, 5, :2] - fitted[0, 6, :2]).norm() == pytest.approx(0.7 * 20, rel=0.02)


def test_without_legs_the_hips_are_the_anchor_and_nobody_stays_nobody() -> None:
    other, video = person(20, 50, 60), moving()
    other[13:, 2] = 0
    video[2, :, :2], video[2, :, 2] = torch.nan, 0
    fitted = fit_pose(video, other)
    assert fitted[0, [11, 12], :2].mean(0).tolist() == pytest.approx([50, 60])
    assert fitted[2, :, :2].isnan().all() and fitted[[0, 1, 3, 4, 5]].isfinite().all()
    assert torch.equal(fitted[..., 2], video[..., 2])


def test_bodies_that_cannot_be_compared_are_refused() -> None:
    hidden = person()
    hidden[:, 2] = 0
    with pytest.raises(ValueError, match="no bone is seen in both"):
        fit_pose(moving(), hidden)
    armed = person()
    armed[11:, 2] = 0
    with pytest.raises(ValueError, match="hips"):
        fit_pose(moving(), armed)
    with pytest.raises(ValueError, match="first"):
        fit_pose(moving(), person(), anchor="last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="17, 3"):
        fit_pose(person(), person())
