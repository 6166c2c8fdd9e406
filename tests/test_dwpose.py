"""DWPose: decoding by properties and a slow version, the whole by tiny networks whose answers are known."""

from pathlib import Path

import numpy as np
import pytest
import torch

from entprog.data import dwpose
from entprog.data.detect import overlap
from entprog.data.dwpose import DWPose, boxes_of, centred, keypoints_of, limb_mask

KEYPOINTS = torch.tensor([[144.0, 40.0 + 20 * k] for k in range(17)])  # on the landmark network's 288 x 384


def raw_boxes(cell: tuple[int, int], size: float, score: float) -> np.ndarray:
    """What YOLOX would answer for one person in the middle of a cell of stride 32."""
    out = np.zeros((8400, 85), np.float32)
    row = 80 * 80 + 40 * 40 + cell[1] * 20 + cell[0]
    out[row, :6] = (0.5, 0.5, np.log(size / 32), np.log(2 * size / 32), score, 1.0)
    return out


def simcc(points: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Distributions over half pixels that peak at points (K, 2), the others of 133 at the corner."""
    across, down = np.zeros((133, 576), np.float32), np.zeros((133, 768), np.float32)
    for k, (x, y) in enumerate(points.tolist()):
        across[k, int(2 * x)], down[k, int(2 * y)] = 0.9, 0.8
    return across, down


def save_constant(path: Path, shape: tuple[int, ...], outputs: list[np.ndarray]) -> None:
    """Write an ONNX network that answers the same whatever it sees."""
    onnx = pytest.importorskip("onnx")
    nodes, infos = [], []
    for i, value in enumerate(outputs):
        tensor = onnx.numpy_helper.from_array(value[None], f"value{i}")
        nodes.append(onnx.helper.make_node("Constant", [], [f"out{i}"], value=tensor))
        infos.append(onnx.helper.make_tensor_value_info(f"out{i}", onnx.TensorProto.FLOAT, value[None].shape))
    seen = onnx.helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, shape)
    graph = onnx.helper.make_graph(nodes, "constant", [seen], infos)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=10), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Networks that see one person, 96 by 192 in the middle of a 640-pixel square, with keypoints down the middle."""
    save_constant(tmp_path / dwpose.DETECTOR, (1, 3, 640, 640), [raw_boxes((9, 9), 96, 0.9)])
    save_constant(tmp_path / dwpose.LANDMARKS, (1, 3, 384, 288), list(simcc(KEYPOINTS)))
    return tmp_path


def test_boxes_are_decoded_as_each_cell_says() -> None:
    boxes, scores = boxes_of(raw_boxes((9, 4), 96, 0.7))
    assert scores.argmax() == 80 * 80 + 40 * 40 + 4 * 20 + 9 and scores.max() == pytest.approx(0.7)
    assert boxes[scores.argmax()] == pytest.approx([9.5 * 32 - 48, 4.5 * 32 - 96, 9.5 * 32 + 48, 4.5 * 32 + 96])
    slow = [(x, y, s) for s in (8, 16, 32) for y in range(640 // s) for x in range(640 // s)]
    centres = (boxes_of(np.zeros((8400, 85), np.float32))[0][:, :2] + boxes_of(np.zeros((8400, 85)))[0][:, 2:]) / 2
    assert np.allclose(centres, [(x * s, y * s) for x, y, s in slow])
    with pytest.raises(ValueError, match="answered 10 boxes"):
        boxes_of(np.zeros((10, 85)))


def test_overlap_is_one_with_itself_and_symmetric() -> None:
    a, b = centred(np.array([0.0, 0, 2, 2])), centred(np.array([1.0, 0, 3, 2]))
    assert overlap(a, np.stack((a, b))) == pytest.approx([1, 1 / 3])
    assert overlap(b, a[None]) == pytest.approx(overlap(a, b[None]))


def test_keypoints_are_the_peaks_and_the_lower_score() -> None:
    found = keypoints_of(*simcc(KEYPOINTS))
    assert np.allclose(found[:17, :2], KEYPOINTS + 0.25)  # the middle of a bin of half a pixel
    assert np.allclose(found[:17, 2], 0.8) and not found[17:, 2].any()


@pytest.mark.parametrize("size", [(320, 320), (480, 640), (90, 60)])
def test_keypoints_come_back_to_the_frame(folder: Path, size: tuple[int, int]) -> None:
    found = list(DWPose(folder).track(torch.zeros(2, 3, *size, dtype=torch.uint8)))
    scale = 640 / max(size)
    high = 192 * 1.25 / scale  # the window's height, which the box's decides; its width has the network's shape
    centre = 9.5 * 32 / scale
    wanted = torch.stack((torch.full((17,), centre), centre + ((KEYPOINTS[:, 1] + 0.25) / 384 - 0.5) * high), -1)
    for frame in found:
        assert torch.allclose(frame.keypoints[:, :2], wanted + torch.tensor([0.25 / 288 * high * 0.75, 0]), atol=1e-3)
        assert frame.presence == 1 and frame.mask.shape == size


def test_nobody_is_nan(folder: Path) -> None:
    assert DWPose(folder, min_score=0.95).estimate(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))[..., 0].isnan().all()


def test_the_crop_shows_what_the_window_holds() -> None:
    y, x = torch.meshgrid(torch.arange(60) + 0.5, torch.arange(80) + 0.5, indexing="ij")
    window = np.array([10.0, 5, 10 + 36, 5 + 48])
    seen = dwpose._crop(torch.stack((x, y, x)), window)
    assert seen[0, 200, 100].item() == pytest.approx(10 + 100.5 / 8, abs=0.02)
    assert seen[1, 200, 100].item() == pytest.approx(5 + 200.5 / 8, abs=0.02)


def test_the_mask_covers_the_limbs_and_needs_a_torso() -> None:
    points = torch.zeros(17, 3)
    points[[5, 6, 11, 12]] = torch.tensor([[36.0, 20, 1], [28, 20, 1], [36, 44, 1], [28, 44, 1]])
    points[13] = torch.tensor([36.0, 60, 1])
    mask = limb_mask(points, 64, 64)
    assert mask[30, 32] and mask[52, 36] and not mask[52, 20] and not mask[5, 32]
    points[5, 2] = 0.1
    assert not limb_mask(points, 64, 64).any()


def test_missing_files_and_wrong_frames_are_named(folder: Path) -> None:
    (folder / dwpose.LANDMARKS).rename(folder / "other.onnx")
    with pytest.raises(ValueError, match="lacks .*dw-ll_ucoco_384.onnx"):
        DWPose(folder)
    (folder / "other.onnx").rename(folder / dwpose.LANDMARKS)
    with pytest.raises(ValueError, match="uint8, not"):
        next(DWPose(folder).track([torch.zeros(3, 8, 8)]))
