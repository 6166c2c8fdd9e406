"""Evaluation: the truth scores best, baselines sit beside it, and the result says what it measured."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from entprog import evaluate as module
from entprog.data.prepared import LABELS, Prepared, PreparedClip, ShardWriter, split_hash
from entprog.data.video import write_mp4
from entprog.evaluate import BETTER, compare, evaluate, load_videos
from entprog.packaged import PackagedFileError

SIZE, FRAMES, CLIPS = 48, 10, 5


def clip(number: int, frames: int = FRAMES, split: str = "test") -> PreparedClip:
    """A coloured figure of two garments that walks over noise; the pose says where it is."""
    generator = torch.Generator().manual_seed(number)
    video = torch.randint(90, 140, (1, 3, SIZE, SIZE), generator=generator).byte().repeat(frames, 1, 1, 1)
    labels = torch.zeros(frames, SIZE, SIZE, dtype=torch.uint8)
    keypoints = torch.rand(17, 2, generator=generator) * torch.tensor((10.0, 24.0))
    points = torch.ones(frames, 17, 3)
    colours = torch.randint(0, 255, (2, 3, 1, 1), generator=generator).byte()
    for f in range(frames):
        left = 4 + (2 + number % 2) * f % 28
        for part, (name, top) in enumerate((("top", 10), ("bottom", 22))):
            video[f, :, top : top + 12, left : left + 10] = colours[part]
            labels[f, top : top + 12, left : left + 10] = LABELS[name]
        points[f, :, :2] = keypoints + torch.tensor((left, 10.0))
    at = frames // 2
    return PreparedClip(
        id=f"clip{number}", subject_id=f"person{number}", split=split, fps=8.0, video=video, keypoints=points,
        labels=labels, reference=video[at], reference_keypoints=points[at], reference_labels=labels[at],
    )  # fmt: skip


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RESAMPLES", 100)


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    with ShardWriter(tmp_path / "data", about={"kind": "shapes", "size": SIZE}) as writer:
        for number in range(CLIPS):
            writer.add(clip(number))
    return Prepared(tmp_path / "data", "test")


def truths(data: Prepared) -> dict[str, Tensor]:
    return {r["id"]: data.rows([i], ["video"])["video"][0] for i, r in enumerate(data.records)}


def damaged(videos: dict[str, Tensor], amount: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def noisy(video: Tensor) -> Tensor:
        return (video + amount * torch.randn(video.shape, generator=generator)).round().clamp(0, 255).byte()

    return {name: noisy(video) for name, video in videos.items()}


def knows(data: Prepared, error: float = 0.0) -> Callable[[Tensor], Tensor]:
    """A detector that looks up the driving keypoints of the clip whose video is the most alike."""
    read = data.rows(range(len(data)), ["video", "keypoints"])

    def estimate(frames: Tensor) -> Tensor:
        nearest = (read["video"].float() - frames.float()).square().flatten(1).mean(1).argmin()
        return read["keypoints"][nearest] + error

    return estimate


@pytest.fixture
def toy_i3d(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of colours and changes instead of I3D, which takes seconds a clip and is tested elsewhere."""

    def features(video: Tensor, *, device: str = "cpu") -> Tensor:
        return torch.cat((video.mean((0, 2, 3)), video.diff(dim=0).abs().mean((0, 2, 3)))).double() * 100

    monkeypatch.setattr(module.frechet, "i3d_logits", features)
    monkeypatch.setattr(module.frechet, "load_i3d", lambda device: None)


@pytest.mark.usefixtures("toy_i3d")
def test_the_truth_scores_perfectly_and_above_its_baselines(prepared: Prepared) -> None:
    seen: list[tuple[int, int]] = []
    result = evaluate(
        truths(prepared), prepared, estimate=knows(prepared), networks=("i3d",),
        on_progress=lambda done, count: seen.append((done, count)),
    )  # fmt: skip
    assert seen == [(i + 1, CLIPS) for i in range(CLIPS)]
    means = {way: {k: v["mean"] for k, v in row["means"].items()} for way, row in result["rows"].items()}
    own = means["generated"]
    assert (own["psnr"], own["ssim"], own["l1"], own["flicker"]) == (100, pytest.approx(1), 0, 0)
    assert own["pck@0.1"] == own["oks"] == own["nearer_to_own"] == 1 and own["appearance_distance"] < 1e-9
    assert result["rows"]["generated"]["fvd"]["value"] < 1e-9 < result["rows"]["copy_reference"]["fvd"]["value"]
    assert result["pose_ratio"]["pck@0.1"] == 1
    for baseline in ("copy_reference", "shuffled"):
        assert means[baseline]["psnr"] < 40 and means[baseline]["l1"] > 0.001
        assert result["differences"][baseline]["psnr"]["better_on"] == 1
        assert result["differences"][baseline]["psnr"]["low"] > 0
    assert means["copy_reference"]["flicker"] < 0 and means["shuffled"]["nearer_to_own"] < 1
    assert means["shuffled"]["pck@0.1"] < 1
    assert set(own) <= set(BETTER)


@pytest.mark.usefixtures("toy_i3d")
def test_the_result_is_json_and_states_its_protocol(prepared: Prepared) -> None:
    result = evaluate(truths(prepared), prepared, networks=("i3d",), baselines=False)
    assert json.loads(json.dumps(result, allow_nan=False))["ids"] == [f"clip{i}" for i in range(CLIPS)]
    protocol = result["protocol"]
    assert protocol["split"] == "test" and protocol["split_hash"] == prepared.about["split_hash"]
    assert (protocol["clips"], protocol["frames"], protocol["sizes"]) == (CLIPS, [FRAMES], [(SIZE, SIZE)])
    assert set(protocol["networks"]) == {"i3d"} and protocol["estimator"] is None
    assert set(result["rows"]) == {"generated", "truth"} and "pck@0.1" not in result["rows"]["generated"]["means"]
    assert "only the order" in result["rows"]["generated"]["fvd"]["note"]
    assert result == evaluate(truths(prepared), prepared, networks=("i3d",), baselines=False)


@pytest.mark.usefixtures("toy_i3d")
def test_more_noise_scores_worse_and_compare_says_so(prepared: Prepared) -> None:
    few, many = (
        evaluate(damaged(truths(prepared), amount), prepared, networks=("i3d",), baselines=False) for amount in (5, 40)
    )
    read = json.loads(json.dumps(many))  # one fresh, one from a file
    found = compare(few, read)
    for name in ("psnr", "ssim", "l1", "flicker", "background_flicker"):
        assert found["differences"][name]["better_on"] == 1, name
        assert found["differences"][name]["low"] * found["differences"][name]["high"] > 0
    assert found["fvd"]["low"] <= found["fvd"]["difference"] < 0
    itself = compare(few, few)
    assert itself["fvd"]["difference"] == 0 and itself["differences"]["psnr"]["better_on"] == 0.5
    assert itself["differences"]["psnr"]["low"] == itself["differences"]["psnr"]["high"] == 0


def test_evaluations_of_different_clips_or_detectors_are_not_compared(prepared: Prepared, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "other", about={}) as writer:
        for number in (0, 7):
            writer.add(clip(number))
    other = Prepared(tmp_path / "other", "test")
    a, b = (evaluate(truths(d), d, networks=(), baselines=False) for d in (prepared, other))
    with pytest.raises(ValueError, match="clip_list_hash"):
        compare(a, b)
    posed = evaluate(truths(prepared), prepared, estimate=knows(prepared), networks=(), baselines=False)
    with pytest.raises(ValueError, match="estimator"):
        compare(a, posed)


def test_evaluations_on_data_of_other_frames_or_poses_are_not_compared(prepared: Prepared, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "other", about=prepared.about | {"fps": 25, "poses": "DWPose"}) as writer:
        for number in range(CLIPS):
            writer.add(clip(number))
    other = Prepared(tmp_path / "other", "test")
    a, b = (evaluate(truths(d), d, networks=(), baselines=False) for d in (prepared, other))
    with pytest.raises(ValueError, match="in data.fps: None and 25; data.poses: None and DWPose. Evaluate both"):
        compare(a, b)
    for result in (a, b):
        del result["protocol"]["data"]
    assert compare(a, json.loads(json.dumps(b)))["clips"] == CLIPS


def test_the_protocol_states_the_clips_that_the_manifest_still_lists(prepared: Prepared) -> None:
    manifest = prepared.folder / "manifest.jsonl"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[1:]))
    data = Prepared(prepared.folder, "test")
    protocol = evaluate(truths(data), data, networks=(), baselines=False)["protocol"]
    assert protocol["split_hash"] == split_hash(data.every) != prepared.about["split_hash"]
    assert protocol["data"]["clips"] == CLIPS - 1


def test_the_detectors_own_error_is_the_floor(prepared: Prepared) -> None:
    result = evaluate(truths(prepared), prepared, estimate=knows(prepared, error=1.0), networks=(), baselines=False)
    rows = result["rows"]
    assert (
        rows["truth"]["means"]["oks"] == rows["generated"]["means"]["oks"] and rows["truth"]["means"]["oks"]["mean"] < 1
    )
    assert result["pose_ratio"]["oks"] == result["pose_ratio"]["keypoint_error"] == 1


def test_videos_that_do_not_fit_are_named(prepared: Prepared) -> None:
    videos = truths(prepared)
    wrong: dict[str, Any] = {k: v for k, v in videos.items() if k != "clip3"} | {"stranger": videos["clip3"]}
    with pytest.raises(ValueError, match="missing: clip3; 1 not in the split: stranger"):
        evaluate(wrong, prepared, networks=())
    for bad in (videos["clip1"][:4], videos["clip1"] / 255, videos["clip1"][..., :40]):
        with pytest.raises(ValueError, match="clip1 is "):
            evaluate(videos | {"clip1": bad}, prepared, networks=())
    with pytest.raises(ValueError, match="inception"):
        evaluate(videos, prepared, networks=("inception",))


def test_clips_of_several_shapes_are_scored_and_what_cannot_be_is_said(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "data", about={}) as writer:
        for number, frames in ((0, 10), (1, 10), (2, 12)):
            writer.add(clip(number, frames))
    data = Prepared(tmp_path / "data", "test")
    result = evaluate(truths(data), data, networks=("i3d",))
    assert result["rows"]["generated"]["fvd"] == {
        "value": None,
        "videos": 3,
        "note": result["rows"]["generated"]["fvd"]["note"],
    }
    assert "[10, 12] frames" in result["rows"]["generated"]["fvd"]["note"] and "features" not in result
    shuffled = result["rows"]["shuffled"]  # the third has no partner of its shape
    assert shuffled["per_clip"]["psnr"][2] is None and shuffled["means"]["psnr"]["clips"] == 2
    assert result["differences"]["shuffled"]["psnr"]["clips"] == 2


def test_one_clip_has_no_other_person_and_no_fvd(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "data", about={}) as writer:
        writer.add(clip(0))
    data = Prepared(tmp_path / "data", "test")
    row = evaluate(truths(data), data, networks=("i3d",))["rows"]["generated"]
    assert row["fvd"]["value"] is None and "one video" in row["fvd"]["note"]
    assert row["per_clip"]["nearer_to_own"] == [None] and row["means"]["nearer_to_own"]["clips"] == 0


def test_videos_are_read_from_a_folder_by_id(prepared: Prepared, tmp_path: Path) -> None:
    videos = truths(prepared)
    (tmp_path / "samples").mkdir()
    with pytest.raises(ValueError, match="holds no .mp4"):
        load_videos(tmp_path / "samples")
    for name, video in videos.items():
        write_mp4(tmp_path / "samples" / f"{name}.mp4", video.transpose(0, 1) / 127.5 - 1, fps=8)
    read = load_videos(tmp_path / "samples")
    assert {k: (v.shape, v.dtype) for k, v in read.items()} == {k: (v.shape, v.dtype) for k, v in videos.items()}
    result = evaluate(read, prepared, networks=(), baselines=False)
    assert 20 < result["rows"]["generated"]["means"]["psnr"]["mean"] < 60  # what the codec leaves


def test_faces_and_lpips_are_scored_and_counted(prepared: Prepared) -> None:
    try:
        result = evaluate(truths(prepared), prepared, networks=("alex", "face"), baselines=False)
    except PackagedFileError as error:
        pytest.skip(f"networks cannot be had: {error}")
    row = result["rows"]["generated"]
    assert row["means"]["lpips[alex]"]["mean"] == 0
    # The figures have no face: nothing to look for, and said so.
    assert row["faces"] == {"looked": 0, "found": 0, "small": 0, "in_reference": 0, "clips_without_distance": CLIPS}
    assert row["means"]["face_distance"]["mean"] is None and not math.isnan(row["means"]["l1"]["mean"])
