"""Where a run's model comes from, and how it is called and trained: the one place that knows a model family."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as nnf
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from entprog.blocks import Block
from entprog.cei import within
from entprog.data.batches import BESIDE, Batch
from entprog.data.prepared import LABELS
from entprog.models import wan
from entprog.models.autoencoder import latent_places
from entprog.models.pose_dit import SIZES, PoseDiT, pose_dit
from entprog.modes import Predict
from entprog.objective import OBJECTIVES, Objective, shifted

if TYPE_CHECKING:
    from entprog.config import RunConfig

# The weights that lie here, each with a JSON that says how they were made: name -> size, constructor arguments, and the
# autoencoder whose latents they know.
EMBEDDED: dict[str, tuple[str, dict[str, Any], str]] = {
    "base": ("T", {}, ""),  # drawn figures, 24 px, pixels
    "people": (  # rendered people, 64 px
        "P",
        {"in_channels": 32, "patch_size": 1, "pose_stride": 8, "motion_modules": True},
        "taef2-people",
    ),
}


def load_model(name: str, *, seed: int = 0, autoencoder: str = "", patch_size: int = 0) -> PoseDiT:
    """Load a PoseDiT: a row of EMBEDDED ("base", "people"), a size ("T" ...), or a saved folder.

    A size gives random weights from `seed`, for pixels or for the latents of an autoencoder, with patches of 4 pixels
    or 1 latent unless patch_size says otherwise, and temporal blocks that are motion modules. ValueError for anything
    else, with the choices.
    """
    if name in EMBEDDED:
        size, arguments, _ = EMBEDDED[name]
        model = pose_dit(size, **arguments)
        weights = load_file(Path(__file__).parent / f"pose_dit_{size.lower()}.safetensors")
        model.load_state_dict({k: v.float() for k, v in weights.items()})
        return model
    if name in SIZES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return pose_dit(name, motion_modules=True, **_tokens(autoencoder, patch_size))
    if (path := Path(name) / "config.json").exists():
        if (kind := json.loads(path.read_text()).get("_class_name")) != "PoseDiT":
            raise ValueError(
                f"{name} holds a {kind!r}, not a PoseDiT: give the folder of its whole pipeline as the model"
            )
        return PoseDiT.from_pretrained(name, use_safetensors=True)
    raise ValueError(
        f"model {name!r} is unknown: choose one of {sorted(EMBEDDED)}, a size of {sorted(SIZES)}, or a folder with "
        "config.json"
    )


def check_origin(config: "RunConfig") -> None:
    """Refuse weights that were made in other latents or for another objective than the configuration's.

    ValueError for a row of EMBEDDED with another autoencoder, and for RUN/checkpoints/final where RUN/config.yaml says
    so; channels alone do not tell, for the latents of all TAEF2's kin have the same shape.
    """
    made: dict[str, Any] = {}
    folder = Path(config.model).resolve()
    if config.model in EMBEDDED:
        made = {"autoencoder": EMBEDDED[config.model][2]}
    elif folder.parts[-2:] == ("checkpoints", "final") and (run := folder.parents[1] / "config.yaml").exists():
        saved = yaml.safe_load(run.read_text()) or {}
        made = {k: saved[k] for k in ("autoencoder", "objective") if k in saved}
    if wrong := {k: getattr(config, k) for k, v in made.items() if not _same(getattr(config, k), v)}:
        said = ", ".join(f"{k}={made[k]!r} and not {v!r}" for k, v in wrong.items())
        raise ValueError(f"model {config.model!r} was trained with {said}: set what it was trained with, or choose "
                         "another model (a copy of its folder elsewhere if you mean to retrain it)")  # fmt: skip


def _same(one: str, other: str) -> bool:
    """Whether two values are equal, or name one folder."""
    there = one and other and Path(one).exists() and Path(other).exists()
    return one == other or bool(there and Path(one).samefile(other))


def _pose_dit_of(config: "RunConfig") -> PoseDiT:
    """Load the PoseDiT a configuration names, for its data."""
    if wrong := {k: v for k, v in (("expert", config.expert), ("dtype", config.dtype)) if v is not None}:
        raise ValueError(f"{wrong} belong to pipeline folders, and model {config.model!r} is none: leave them out")
    check_origin(config)
    model = load_model(config.model, seed=config.seed, autoencoder=config.autoencoder, patch_size=config.patch_size)
    wanted = _tokens(config.autoencoder, 0).get("in_channels", 3)
    if model.config["in_channels"] != wanted:
        raise ValueError(
            f"model {config.model!r} takes {model.config['in_channels']} channels, the data have {wanted}: "
            f"autoencoder {config.autoencoder!r} does not belong to it"
        )
    return model


def _tokens(autoencoder: str, patch_size: int) -> dict[str, int]:
    """Return the constructor arguments that fit a model to pixels or latents."""
    if not autoencoder:
        patch_size = patch_size or 4
        return {"patch_size": patch_size, "pose_stride": patch_size}
    channels, factor = latent_places(autoencoder)
    patch_size = patch_size or 1
    return {"in_channels": channels, "patch_size": patch_size, "pose_stride": patch_size * factor}


def conditioned(model: nn.Module, x_t: Tensor, t: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """Call a PoseDiT-like model with the conditions that are there, and where the tokens of a smaller clip lie."""
    names = ("pose", "reference", "reference_pose", "grid_scale")
    known = {k: conditions[k] for k in names if k in conditions}
    return model(x_t, t, **known)


Call = Callable[[nn.Module, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
Times = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Family:
    """A kind of model: a row of FAMILIES.

    load(config) -> the model; call(config) -> call(model, x_t, t, batch) -> prediction; times(config) -> the map from
    the batches' u in [0, 1] to times t. conditions: what may be dropped from a batch, None: as the configuration says.
    cuts: whether clips are cut to the configuration's frames, and not trained on whole.
    """

    load: Callable[["RunConfig"], nn.Module]
    call: Callable[["RunConfig"], Call]
    times: Callable[["RunConfig"], Times]
    conditions: tuple[str, ...] | None = None
    cuts: bool = True


FAMILIES: dict[str, Family] = {
    "PoseDiT": Family(_pose_dit_of, lambda config: conditioned, lambda c: partial(shifted, shift=c.shift or 1.0)),
    **dict.fromkeys(wan.PIPELINES, Family(wan.load, wan.call, wan.times, ("text",), cuts=False)),
}


def family_of(config: "RunConfig") -> Family:
    """Return the family of a configuration's model: by the pipeline class of a folder, otherwise PoseDiT's."""
    return FAMILIES[wan.class_of(config.model) if wan.is_pipeline(config.model) else "PoseDiT"]


def model_of(config: "RunConfig") -> nn.Module:
    """Load the model a configuration names, for its data."""
    return family_of(config).load(config)


def batch_settings(config: "RunConfig") -> dict[str, Any]:
    """Return which frames, conditions and noise a run's batches have, as keywords of data/batches.py."""
    family = family_of(config)
    conditions = config.conditions if family.conditions is None else family.conditions
    frames = config.frames if family.cuts else None
    return {"frames": frames, "conditions": conditions, "shared_noise": config.shared_noise}


def precision(config: "RunConfig", device: torch.device) -> torch.autocast:
    """Return the autocast in which a run's model is called on a device."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16")


def predict_and_loss(config: "RunConfig") -> tuple[Predict, Callable[[nn.Module, Batch], Tensor]]:
    """Return predict(model, batch) and loss(model, batch), (B,), as a configuration asks for, in its precision."""
    family, objective = family_of(config), OBJECTIVES[config.objective]
    ways: dict[str, Any] = {"call": family.call(config), "times": family.times(config)}

    def in_precision(function: Callable[..., Tensor]) -> Callable[[nn.Module, Batch], Tensor]:
        def run(model: nn.Module, batch: Batch) -> Tensor:
            with precision(config, batch["video"].device):
                return function(model, batch)

        return run

    loss = loss_fn(objective, config.person_weight, config.face_weight, **ways)
    return in_precision(predict_fn(objective, **ways)), in_precision(loss)


def predict_fn(
    objective: Objective, call: Call = conditioned, times: Times = shifted
) -> Callable[[nn.Module, Batch], Tensor]:
    """Return predict(model, batch): the raw prediction for a batch that holds its own times and noise."""

    def predict(model: nn.Module, batch: Batch) -> Tensor:
        t = times(batch["t"])
        return call(model, objective.noisy(batch["video"], batch["noise"], t), t, batch)

    return predict


def loss_fn(
    objective: Objective,
    person_weight: float = 1.0,
    face_weight: float = 1.0,
    call: Call = conditioned,
    times: Times = shifted,
) -> Callable[[nn.Module, Batch], Tensor]:
    """Return loss(model, batch): the mean squared error of each sample, (B,).

    With weights, places that show a person count person_weight times as much as the background, and a face
    face_weight times as much again; the weighted mean is taken within each sample. They need the batch's `labels`.
    """
    predict = predict_fn(objective, call, times)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        target = objective.target(batch["video"], batch["noise"], times(batch["t"]))
        error = (predict(model, batch).float() - target).square()
        if person_weight == face_weight == 1:
            return error.flatten(1).mean(1)
        weight = 1 + (person_weight - 1) * region_share(batch, "person")
        weight = weight + person_weight * (face_weight - 1) * region_share(batch, "face")
        return (weight * error).flatten(1).mean(1) / weight.flatten(1).mean(1)

    return loss


# What PoseDiT gets for a condition.
NEW_MODULES = {"pose": ("pose_guider",), "reference": ("reference_embedding", "pose_guider")}

REGIONS = {
    "person": tuple(v for k, v in LABELS.items() if k != "background"),
    "face": (LABELS["face"],),
    "background": (LABELS["background"],),
}


def region_share(batch: Batch, region: str) -> Tensor:
    """Return how much of each place of the video (or its latents) shows a region, (B, 1, F, h, w) in [0, 1].

    ValueError for data without labels and for a region that REGIONS lacks.
    """
    if region not in REGIONS or "labels" not in batch:
        raise ValueError(
            f"region {region!r} of a batch with {sorted(batch)}: needs labels, and one of {sorted(REGIONS)}"
        )
    labels = batch["labels"]
    inside = torch.isin(labels, torch.tensor(REGIONS[region], device=labels.device, dtype=labels.dtype)).float()
    height, width = batch["video"].shape[-2:]
    return nnf.adaptive_avg_pool2d(inside, (height, width))[:, None]


def scoring_ways(
    predict: Predict, batches: Sequence[Batch], conditions: Sequence[str]
) -> tuple[dict[str, Predict], list[Batch]]:
    """Return the predictions whose CEI tells conditions and regions apart, and the batches to take it on.

    All conditions, each one left out, and within each region where the batches have labels; then only samples that
    show every region are kept.
    """

    def without(condition: str) -> Predict:
        dropped = (condition, *BESIDE.get(condition, ()))
        return lambda model, batch: predict(model, {k: v for k, v in batch.items() if k not in dropped})

    ways = {"all conditions": predict} | {f"without {c}": without(c) for c in conditions}
    if "labels" not in batches[0]:
        return ways, list(batches)
    ways |= {name: within(predict, partial(region_share, region=name)) for name in REGIONS}
    seen = [torch.stack([(region_share(b, r) > 0).flatten(1).any(1) for r in REGIONS]).all(0) for b in batches]
    return ways, [{k: v[s] for k, v in b.items()} for b, s in zip(batches, seen, strict=True) if s.any()]


def freeze_for_good(model: nn.Module, candidates: Sequence[Block], config: "RunConfig") -> None:
    """Freeze what no strategy may train in a run: all but the candidate blocks, and for images what is about time."""
    if config.candidates != "all":
        may_train = {p for b in candidates for p in b.module.parameters()}
        for p in model.parameters():
            p.requires_grad_(p in may_train)
    if config.frames == 1:  # it does not run, and what does not run should not count as trainable
        for module in model.modules():
            if getattr(module, "motion_module", False):
                module.requires_grad_(False)


def candidate_blocks(blocks: Sequence[Block], which: str) -> list[Block]:
    """Return the blocks that may train: "all", or the "temporal" ones.

    Temporal are those that say so by `axis`, or whose name does (AnimateDiff's motion modules, SVD's temporal blocks).
    ValueError where a model has none.
    """
    if which == "all":
        return list(blocks)
    chosen = [b for b in blocks if getattr(b.module, "axis", "") == "time" or re.search("temporal|motion", b.name)]
    if which != "temporal" or not chosen:
        raise ValueError(f"candidates {which!r}: choose 'all', or 'temporal' for a model with temporal blocks; "
                         f"this one's are {[b.name for b in blocks][:8]} ...")  # fmt: skip
    return chosen


def new_modules(model: nn.Module, config: "RunConfig") -> tuple[str, ...]:
    """Name what was made for a run's conditions, where the model has it; it trains throughout.

    Nothing where only the temporal blocks may train.
    """
    if config.candidates != "all":
        return ()
    names = dict.fromkeys(n for c in config.conditions for n in NEW_MODULES[c])
    known = {n for n, _ in model.named_parameters()} | {n for n, _ in model.named_modules()}
    return tuple(n for n in names if n in known)
