"""Where a run's model comes from, and how it is called and trained: the one place that knows a model family."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from entprog.data.batches import Data
from entprog.models.pose_dit import SIZES, PoseDiT, pose_dit
from entprog.objective import Objective

BASE_WEIGHTS = Path(__file__).parent / "pose_dit_t.safetensors"


def load_model(name: str, *, seed: int = 0) -> PoseDiT:
    """Load a PoseDiT: "base" (embedded, pretrained on the source figures), a size ("T" ...), or a saved folder.

    A size gives random weights from `seed`. ValueError for anything else, with the choices.
    """
    if name == "base":
        model = pose_dit("T")
        model.load_state_dict(load_file(BASE_WEIGHTS))
        return model
    if name in SIZES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return pose_dit(name)
    if (Path(name) / "config.json").exists():
        return PoseDiT.from_pretrained(name, use_safetensors=True)
    raise ValueError(
        f"model {name!r} is unknown: choose 'base', a size of {sorted(SIZES)}, or a folder with config.json"
    )


def conditioned(model: nn.Module, x_t: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    """Call a PoseDiT-like model with the conditions that are there."""
    return model(x_t, t, pose=conditions.get("pose"), reference=conditions.get("reference"))


def predict_fn(objective: Objective) -> Callable[[nn.Module, Data], Tensor]:
    """Return predict(model, batch): the raw prediction for a batch that holds its own times and noise."""

    def predict(model: nn.Module, batch: Data) -> Tensor:
        x_t = objective.noisy(batch["video"], batch["noise"], batch["t"])
        return conditioned(model, x_t, batch["t"], batch)

    return predict


def loss_fn(objective: Objective) -> Callable[[nn.Module, Data], Tensor]:
    """Return loss(model, batch): the mean squared error of each sample, (B,)."""
    predict = predict_fn(objective)

    def loss(model: nn.Module, batch: Data) -> Tensor:
        target = objective.target(batch["video"], batch["noise"], batch["t"])
        return (predict(model, batch).float() - target).square().flatten(1).mean(1)

    return loss
