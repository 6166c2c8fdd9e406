"""Does the sample obey its conditions? Swap one and see what moves.

For drawn figures the truth of every swap can be drawn too (`swapped` in data/synthetic.py): A in B's motion, B in
A's motion. Videos are (N, 3, F, H, W) in [-1, 1], masks (N, 2, F, H, W) in {0, 1} for shirt and trousers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from entprog.data.batches import Batch
from entprog.metrics.frame import psnr, ssim

Draw = Callable[[Tensor, Tensor], Tensor]  # (pose maps, references) -> videos


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(1)


def garment_colours(video: Tensor, masks: Tensor) -> Tensor:
    """Mean colour inside each garment's mask, (N, 2, 3); nan for a garment that is never seen."""
    total = torch.einsum("ncfhw,ngfhw->ngc", video, masks)
    return total / masks.sum((2, 3, 4))[..., None]


def pose_obeyed(drawn: Tensor, new_truth: Tensor, old_truth: Tensor) -> Tensor:
    """Whether a sample drawn with the new pose is nearer to the new pose's truth than to the old one's, (N,) bool."""
    return _distance(drawn, new_truth) < _distance(drawn, old_truth)


def reference_obeyed(drawn: Tensor, new: Batch, old: Batch) -> Tensor:
    """Whether garments drawn with the new reference are nearer in colour to the new person's than to the old one's.

    `new` and `old` hold video and masks of the two people; the sample is measured inside the new person's masks.
    Returns (N,) bool: the distances of shirt and trousers together.
    """
    mine = garment_colours(drawn, new["masks"])
    wanted, unwanted = (garment_colours(d["video"], d["masks"]) for d in (new, old))
    near, far = ((mine - other).norm(dim=-1).nansum(1) for other in (wanted, unwanted))
    return near < far


def swap_scores(draw: Draw, clips: Batch, other_pose: Batch, other_reference: Batch) -> dict[str, Any]:
    """Score a generator and its baselines on swaps.

    `draw(pose, reference)` is called for the clips themselves, with the other pose, and with the other reference, which
    is that of the next clip. Returns shares in [0, 1] and the mean PSNR and SSIM of each way against the clips:
    `model`, `copy_reference` (the reference as a still video) and `shuffled`, the video of the clip half a round away:
    a third person in a third motion, whose shares are chance. ValueError for fewer than three clips.
    """
    if len(clips["video"]) < 3:
        raise ValueError(f"{len(clips['video'])} clips hold no third person to shuffle with: swap three or more")
    own = draw(clips["pose"], clips["reference"])
    posed = draw(other_pose["pose"], clips["reference"])
    dressed = draw(other_reference["pose"], other_reference["reference"])
    shuffled = own.roll(len(own) // 2, 0)
    still = clips["reference"][:, :, None].expand_as(own)
    other_still = other_reference["reference"][:, :, None].expand_as(own)

    def row(video: Tensor, moved: Tensor, clothed: Tensor) -> dict[str, float]:
        a, b = ((v.transpose(1, 2).clamp(-1, 1) + 1) / 2 for v in (video, clips["video"]))
        return {
            "pose_swap": moved.float().mean().item(),
            "reference_swap": clothed.float().mean().item(),
            "psnr": psnr(a, b).mean().item(),
            "ssim": ssim(a, b).mean().item(),
        }

    truth, new_truth = clips["video"], other_pose["video"]
    clothed = reference_obeyed(dressed, other_reference, clips)
    return {
        "clips": len(own),
        "model": row(own, pose_obeyed(posed, new_truth, truth), clothed),
        "copy_reference": row(
            still, pose_obeyed(still, new_truth, truth), reference_obeyed(other_still, other_reference, clips)
        ),
        "shuffled": row(
            shuffled, pose_obeyed(shuffled, new_truth, truth), reference_obeyed(shuffled, other_reference, clips)
        ),
    }
