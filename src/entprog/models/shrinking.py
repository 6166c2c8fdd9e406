"""How a run's own batches are made smaller, for the token axis: which axes the columns of each model family have."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from entprog.models.wan import class_of, is_pipeline, part_of
from entprog.tokens import Shrink, shrinker

if TYPE_CHECKING:
    from entprog.config import RunConfig

# Family, or pipeline class -> the axes of its batches' columns (tokens.shrinker); what is not named stays whole.
AXES: dict[str, dict[str, str]] = {
    "PoseDiT": {"video": "BCFHW", "noise": "BCFHW", "pose": "BCFHW", "reference": "BCHW", "reference_pose": "BCHW",
                "labels": "BFYX"},
    "WanPipeline": {"video": "BCFHW", "noise": "BCFHW"},
    "WanImageToVideoPipeline": {"video": "BCFHW", "noise": "BCFHW", "condition": "BCFHW"},
}  # fmt: skip
REFUSED = {
    "WanVACEPipeline": "the channels of its masks are pixels of an 8 x 8 square, which have no smaller grid",
    "WanAnimatePipeline": "its face frames are encoded inside the model, four to a latent frame",
}


def shrink_of(config: "RunConfig", model: nn.Module) -> Shrink | None:
    """Return what makes a run's batches smaller, None where its axes are blocks alone.

    ValueError for a pipeline whose conditions cannot be made smaller, and for every n-th frame of causal latents.
    """
    settings = config.progressive()
    if settings is None or settings.axes == "blocks":
        return None
    if not is_pipeline(config.model):
        patch: int = model.config["patch_size"]  # type: ignore[index,union-attr,assignment]
        scale = "grid_scale" if config.token_positions == "scaled" else None
        return shrinker(AXES["PoseDiT"], patch=(1, patch, patch), frames=config.token_frames, scale=scale)
    kind = class_of(config.model)
    if kind in REFUSED:
        raise ValueError(f"axes {settings.axes!r} cannot be had of a {kind}: {REFUSED[kind]}. Set axes to 'blocks'")
    if config.token_frames != "first":
        raise ValueError(f"token_frames {config.token_frames!r}: a latent frame of {kind} stands for several frames in "
                         "a row, and every n-th of them for no video: choose 'first'")  # fmt: skip
    about = json.loads((Path(config.model) / part_of(config) / "config.json").read_text())
    return shrinker(AXES[kind], patch=tuple(about["patch_size"]))
