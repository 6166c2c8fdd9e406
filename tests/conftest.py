"""Small models that every test file uses: the smallest of each family that still has all its parts."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from entprog.data.prepared import PreparedClip
from entprog.models.pose_dit import pose_dit

torch.set_num_threads(1)

# files are dealt out whole, in this order
LONG = ("parallel", "train", "recipe", "wan", "budget", "plugin", "commands", "examples")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the files that take longest begin, so that no process is left with one at the end."""
    place = {f"test_{name}.py": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


class Residual(nn.Module):
    """A plain residual block: x + MLP(x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Plain(nn.Module):
    """A user's own network: an input layer, residual blocks, an output layer."""

    def __init__(self, depth: int = 4, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Residual(width) for _ in range(depth))
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _plain() -> tuple[nn.Module, dict[str, Any]]:
    return Plain(), {"x": torch.randn(2, 5, 8)}


def _pose_dit() -> tuple[nn.Module, dict[str, Any]]:
    model = pose_dit("T", hidden_size=32, depth=4, num_heads=2)
    inputs = {"sample": torch.randn(2, 3, 3, 8, 8), "timestep": torch.rand(2)}
    return model, inputs | {"pose": torch.rand(2, 3, 3, 8, 8), "reference": torch.randn(2, 3, 8, 8)}


def _wan() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=32, num_layers=3, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(2, 4, 2, 8, 8), "encoder_hidden_states": torch.randn(2, 6, 16)}
    return model, inputs | {"timestep": torch.tensor([5, 500])}


def _flux() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(2, 16, 4), "encoder_hidden_states": torch.randn(2, 16, 32)}
    inputs |= {"pooled_projections": torch.randn(2, 32), "timestep": torch.tensor([0.3, 1.0])}
    return model, inputs | {"img_ids": torch.randn(16, 3), "txt_ids": torch.randn(16, 3)}


ZOO: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "plain": _plain,
    "pose_dit": _pose_dit,
    "wan": _wan,
    "flux": _flux,
}


def first(output: Any) -> Tensor:
    """The model's prediction as a tensor."""
    return output if isinstance(output, Tensor) else output[0]


@pytest.fixture(params=sorted(ZOO))
def family(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, Any]]:
    """Each family's tiny model, every parameter random (fresh zero gates would make skips trivial), and its inputs."""
    torch.manual_seed(0)
    model, inputs = ZOO[request.param]()
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.05)
    return model, inputs


def trained_by(inputs: dict[str, Any]) -> Callable[[nn.Module, Any], Tensor]:
    """A loss on fixed inputs: the prediction's distance from fixed noise."""

    def loss_fn(model: nn.Module, batch: Any = None) -> Tensor:
        prediction = first(model(**inputs))
        target = torch.randn(prediction.shape, generator=torch.Generator().manual_seed(7))
        return (prediction - target).square().flatten(1).mean(1)

    return loss_fn


# a prepared data set of noise
ABOUT = {"kind": "noise", "size": 16, "frames": 6, "fps": 10, "seed": 0}


def make_clip(i: int, split: str = "train", size: int = 16, frames: int = 6) -> PreparedClip:
    g = torch.Generator().manual_seed(i)

    def pixels(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)

    def points(*shape: int) -> torch.Tensor:
        return torch.cat((torch.rand(*shape, 17, 2, generator=g) * size, torch.ones(*shape, 17, 1)), -1)

    return PreparedClip(
        id=f"clip-{i}", subject_id=f"person-{i // 2}", split=split, fps=10.0, video=pixels(frames, 3, size, size),
        keypoints=points(frames), labels=pixels(frames, size, size) % 7, reference=pixels(3, size, size),
        reference_keypoints=points(), reference_labels=pixels(size, size) % 7, about={"motion": "walk"},
    )  # fmt: skip
