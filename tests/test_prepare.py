"""Raw videos become clips: what is cut lies where the keypoints say, and what cannot be used is said."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import interpolate

from entprog.data.detect import Found, PoseEstimator, nobody
from entprog.data.follow import sampled
from entprog.data.framing import (
    body_extent,
    bucket_sizes,
    covers,
    crop_box,
    cut,
    cut_mask,
    face_boxes,
    holds,
    label,
    smooth_track,
    to_box,
)
from entprog.data.prepare import prepare_videos
from entprog.data.prepared import LABELS, Prepared, read_manifest
from entprog.data.sources import pose_folders
from entprog.data.video import write_mp4
from entprog.packaged import PackagedFileError
from entprog.recipe_report import _unseen

HEIGHT, WIDTH, TALL, BROAD = 96, 160, 60, 24
# A person as shares of the rectangle that stands for it: from the eyes near the top to the ankles near the bottom.
BODY = torch.tensor([
    (0.5, 0.12), (0.55, 0.1), (0.45, 0.1), (0.6, 0.12), (0.4, 0.12), (0.8, 0.25), (0.2, 0.25), (0.9, 0.4), (0.1, 0.4),
    (0.98, 0.55), (0.02, 0.55), (0.7, 0.55), (0.3, 0.55), (0.7, 0.75), (0.3, 0.75), (0.7, 0.98), (0.3, 0.98),
])  # fmt: skip


def scene(lefts: list[float | None], *, tops: list[float] | None = None, level: float = -0.5) -> Tensor:
    """A white rectangle (left in pixels, None: nobody) before a grey wall, (3, F, H, W) in [-1, 1]."""
    video = torch.full((3, len(lefts), HEIGHT, WIDTH), level)
    for f, left in enumerate(lefts):
        if left is not None:
            top = round(tops[f]) if tops else 20
            video[:, f, top : top + TALL, round(left) : round(left) + BROAD] = 0.95
    return video


class Bright:
    """Finds the white rectangle; `fails` raises after that many videos, `unseen` is a frame that hides its joints."""

    def __init__(self, fails: int | None = None, unseen: int | None = None) -> None:
        self.videos, self.frames, self.fails, self.unseen = 0, 0, fails, unseen

    def track(self, frames: Iterable[Tensor]) -> Iterator[Found]:
        self.videos += 1
        if self.fails is not None and self.videos > self.fails:
            raise KeyboardInterrupt
        for frame in frames:
            self.frames += 1
            mask = frame.float().mean(0) > 180
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            if mask.sum() < 50:
                yield nobody(frame.shape[1], frame.shape[2])
                continue
            low = torch.tensor((float(columns.min()), float(rows.min())))
            high = torch.tensor((float(columns.max()), float(rows.max()))) + 1
            seen = torch.full((17, 1), 0.1 if self.frames - 1 == self.unseen else 1.0)
            yield Found(torch.cat((low + BODY * (high - low), seen), -1), mask, 1.0)


def film(folder: Path, name: str, lefts: list[float | None], *, fps: float = 8, **options: object) -> None:
    path = folder / f"{name}.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(path, scene(lefts, **options), fps)  # type: ignore[arg-type]


def walk(frames: int = 24, start: float = 20, step: float = 3) -> list[float | None]:
    return [start + step * f for f in range(frames)]


def prepare(videos: object, out: Path, **options: object) -> dict:
    chosen = {"size": 64, "frames": 8, "fps": 8, "test_share": 0, "tracker": Bright(), "smooth": 0.01} | options
    return prepare_videos(videos, out, **chosen)  # type: ignore[arg-type]


def read(out: Path, split: str = "train") -> tuple[list[dict], list[dict[str, Tensor]]]:
    data = Prepared(out, split)
    shards = {r["shard"]: load_file(out / "shards" / r["shard"]) for r in data.records}
    return data.records, [{k: v[r["row"]] for k, v in shards[r["shard"]].items()} for r in data.records]


def white_extent(image: Tensor) -> list[float]:
    mask = image.float().mean(0) > 160
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return [float(columns.min()), float(rows.min()), float(columns.max()) + 1, float(rows.max()) + 1]


def test_keypoints_labels_and_pixels_of_a_clip_agree(tmp_path: Path) -> None:
    film(tmp_path / "in", "a", walk())
    result = prepare(tmp_path / "in", tmp_path / "out")
    records, clips = read(tmp_path / "out")
    assert (
        result["clips"] == {"train": 3}
        and not result["errors"]
        and json.loads((tmp_path / "out" / "errors.json").read_text()) == []
    )
    for record, clip in zip(records, clips, strict=True):
        assert clip["video"].shape == (8, 3, 64, 64) and clip["labels"].shape == (8, 64, 64)
        scale = 64 / record["box"][2]
        images = [*zip(clip["video"], clip["keypoints"], clip["labels"], strict=True)]
        images.append((clip["reference"], clip["reference_keypoints"], clip["reference_labels"]))
        for image, points, labels in images:
            left, top, right, bottom = white_extent(image)
            wanted = torch.tensor((left, top)) + BODY * torch.tensor((right - left, bottom - top))
            assert (points[:, :2] - wanted).abs().max() < 1.6
            shown, person = image.float().mean(0) > 160, labels > 0
            assert (shown & person).sum() / (shown | person).sum() > 0.85
            assert set(labels.unique().tolist()) == {0, LABELS["face"], LABELS["person"]}
            assert bottom - top == pytest.approx(TALL * scale, abs=2)


def test_windows_follow_each_other_and_the_reference_is_another_frame_far_away(tmp_path: Path) -> None:
    film(tmp_path / "in", "a", walk(26))
    prepare(tmp_path / "in", tmp_path / "out")
    records, _ = read(tmp_path / "out")
    assert sorted(r["id"] for r in records) == ["a@00000x8", "a@00008x8", "a@00016x8"]
    for record in records:
        own = range(round(record["seconds"] * 8), round(record["seconds"] * 8) + 8)
        assert round(record["reference_seconds"] * 8) not in own
        assert record["box"][2:] == record["reference_box"][2:]


def test_flips_add_the_mirrored_person_to_training_only(tmp_path: Path) -> None:
    for name in ("a", "b"):
        film(tmp_path / "in", name, walk(20))
    result = prepare(tmp_path / "in", tmp_path / "out", flips=True, test_subjects=("b",))
    assert result["clips"] == {"train": 4, "test": 2}
    clips = {r["id"]: (r, c) for r, c in zip(*read(tmp_path / "out"), strict=True)}
    for name in [n for n in clips if not n.endswith("-mirrored")]:
        (record, clip), (other, flipped) = clips[name], clips[f"{name}-mirrored"]
        assert record["subject_id"] == other["subject_id"] and other["mirrored"]
        for key in ("video", "labels", "reference", "reference_labels"):
            assert torch.equal(flipped[key], clip[key].flip(-1))
        left, right = 5, 6  # the shoulders change sides and names
        assert torch.allclose(flipped["keypoints"][:, left, 0], 64 - clip["keypoints"][:, right, 0])
        assert torch.allclose(flipped["keypoints"][:, left, 1], clip["keypoints"][:, right, 1])


def test_frames_are_sampled_by_their_times(tmp_path: Path) -> None:
    film(tmp_path, "a", walk(30, step=2), fps=30)
    for fps in (30, 15, 10, 7):
        shown = [white_extent(torch.from_numpy(f.to_ndarray(format="rgb24")).permute(2, 0, 1))[0]
                 for f, fresh in sampled(tmp_path / "a.mp4", fps) if fresh]  # fmt: skip
        wanted = 20 + 2 * np.round(np.arange(len(shown)) / fps * 30 + 1e-6)
        assert np.abs(np.array(shown) - wanted).max() <= (2 if fps == 7 else 0.5)
        assert len(shown) == pytest.approx(fps, abs=1)


def test_no_window_holds_a_frame_without_a_person_or_crosses_a_cut(tmp_path: Path) -> None:
    film(tmp_path / "in", "gap", [*walk(10), None, *walk(12, 60)])
    cut_video = torch.cat((scene(walk(10)), scene(walk(12, 30), level=0.3)), 1)
    write_mp4(tmp_path / "in" / "shots.mp4", cut_video, 8)
    film(tmp_path / "in", "jump", [*[4.0] * 10, *[132.0] * 12], tops=[30.0] * 22)
    prepare(tmp_path / "in", tmp_path / "out")
    starts = {r["id"] for r in read(tmp_path / "out")[0]}
    assert {"gap@00000x8", "gap@00011x8", "shots@00000x8", "shots@00010x8"} <= starts
    assert not {i for i in starts if i in ("gap@00008x8", "shots@00008x8")}
    for record in read(tmp_path / "out")[0]:
        if record["video"] == "shots":
            first_shot = record["seconds"] < 1.2
            assert (record["reference_seconds"] < 1.2) == first_shot


def test_a_reference_that_left_the_box_is_followed(tmp_path: Path) -> None:
    film(tmp_path / "in", "a", [*[10.0] * 8, 60.0, 85.0, 110.0, 120.0])
    prepare(tmp_path / "in", tmp_path / "out")
    (record,), (clip,) = read(tmp_path / "out")
    assert record["reference_box"][0] > record["box"][0]
    assert white_extent(clip["reference"])[2] <= 64 and clip["reference_keypoints"][:, 0].min() >= 0


def test_people_stay_in_one_split(tmp_path: Path) -> None:
    for person in ("ann", "bob", "cleo"):
        for view in "12":
            film(tmp_path / "in", f"{person}_cam{view}", walk(10))
    result = prepare(tmp_path / "in", tmp_path / "out", subject=r"^(\w+)_cam", test_share=0.34)
    sides = {s: {r["subject_id"] for r in read(tmp_path / "out", s)[0]} for s in ("train", "test")}
    assert result["clips"] == {"train": 4, "test": 2}
    assert len(sides["train"]) == 2 and len(sides["test"]) == 1 and not sides["train"] & sides["test"]
    assert Prepared(tmp_path / "out", "test").about["test"] == sorted(sides["test"])


def test_views_of_one_person_may_be_split_with_a_warning(tmp_path: Path) -> None:
    for view in "12":
        film(tmp_path / "in", f"cam{view}", walk(10))
    with pytest.warns(UserWarning, match="shared between train and test.*'in'"):
        prepare(tmp_path / "in", tmp_path / "out", subject="folder", test_videos=["cam2.mp4"])
    assert [r["video"] for r in read(tmp_path / "out", "test")[0]] == ["cam2"]
    about = Prepared(tmp_path / "out", "test").about
    assert about["test"] == ["cam2"], "the video, not the whole person"
    assert not _unseen({"data": about}) and _unseen({"data": about | {"warnings": []}})


def test_an_interrupted_run_goes_on_and_ends_alike(tmp_path: Path) -> None:
    for name in "abc":
        film(tmp_path / "in", name, walk(18))
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "in", tmp_path / "out", tracker=Bright(fails=1))
    assert {r["video"] for r in read_manifest(tmp_path / "out")} == {"a"}
    with pytest.raises(ValueError, match="not finished"):
        read(tmp_path / "out")
    with (tmp_path / "out" / "videos.jsonl").open("a") as file:
        file.write('{"video": "b", "i')  # killed while writing
    rest, again, seen = Bright(), Bright(), []
    prepare(tmp_path / "in", tmp_path / "out", tracker=rest, on_progress=lambda *what: seen.append(what))
    prepare(tmp_path / "in", tmp_path / "out", tracker=again)
    prepare(tmp_path / "in", tmp_path / "whole")
    assert rest.videos == 2 and again.videos == 0 and seen == [(0, 3, "a"), (1, 3, "b"), (2, 3, "c")]
    parts, whole = ({r["id"]: c for r, c in zip(*read(tmp_path / o), strict=True)} for o in ("out", "whole"))
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[i][k], whole[i][k]) for i in whole for k in whole[i])
    with pytest.raises(ValueError, match="choose another"):
        prepare(tmp_path / "in", tmp_path / "out", fps=4)


def test_videos_that_cannot_be_used_are_listed_and_the_others_used(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for name in ("good", "broken", "empty", "slow", "few", "alone"):
        film(folder, name, [None] * 12 if name == "empty" else walk({"few": 5, "alone": 8}.get(name, 12)),
             fps=4 if name == "slow" else 8)  # fmt: skip
    (folder / "broken.mp4").write_bytes((folder / "broken.mp4").read_bytes()[:900])
    (folder / "text.mp4").write_text("no video")
    result = prepare(folder, tmp_path / "out")
    errors = {Path(e["video"]).stem: e["error"] for e in result["errors"]}
    assert json.loads((tmp_path / "out" / "errors.json").read_text()) == result["errors"]
    assert errors.keys() == {"broken", "empty", "slow", "few", "alone", "text"}
    assert "0 with a person" in errors["empty"] and "frames per second, fewer than fps 8" in errors["slow"]
    assert "in a row" in errors["few"] and "reference" in errors["alone"] and "Invalid data" in errors["text"]
    assert {r["video"] for r in read(tmp_path / "out")[0]} == {"good"}
    with pytest.raises(ValueError, match="no clip.*smaller than 3"):
        prepare([folder / "good.mp4"], tmp_path / "tiny", min_person=3)


def test_the_shape_of_the_motion_chooses_the_aspect_and_lengths_fill_the_rest(tmp_path: Path) -> None:
    film(tmp_path / "in", "still", [60.0] * 14)
    film(tmp_path / "in", "runs", walk(14, 5, 8))
    prepare(tmp_path / "in", tmp_path / "out", aspects=["9:16", "1:1", "16:9"], frames=(4, 8))
    records, clips = read(tmp_path / "out")
    shapes = {r["id"]: tuple(c["video"].shape) for r, c in zip(records, clips, strict=True)}
    assert shapes["still@00000x8"] == (8, 3, 80, 48) and shapes["still@00008x4"] == (4, 3, 80, 48)
    assert shapes["runs@00000x8"][-1] > shapes["runs@00000x8"][-2]


def test_a_body_that_leaves_the_largest_crop_is_refused_or_gets_another_aspect(tmp_path: Path) -> None:
    film(tmp_path / "in", "across", [*walk(16, 0, 9), 130, 125])
    with pytest.raises(ValueError, match=r"leaves the largest crop: add --aspects 5:3.*\(1 windows\)"):
        prepare(tmp_path / "in", tmp_path / "square", frames=16)
    prepare(tmp_path / "in", tmp_path / "out", frames=16, aspects=["1:1", "5:3"])
    (record,), (clip,) = read(tmp_path / "out")
    assert record["box"] == [0, 0, 160, 96] and (clip["keypoints"][..., 2] == 1).all()
    film(tmp_path / "both", "ends", [*walk(16, 0, 9), *walk(20, 60, 1)])
    for _ in range(2):  # a finished video's are told again
        found = prepare(tmp_path / "both", tmp_path / "some", frames=16)
        assert found["clips"] == {"train": 1}
        ((reason, count),) = found["left_out"].items()
        assert count == 1 and "leaves the largest crop" in reason
    stretched = (160, 140, 560, 1140)  # a standing person in a telephone's upright video
    assert not holds(crop_box(stretched, (1280, 720), (256, 256)), stretched, (1280, 720))
    for extent in ((900, 10, 1200, 1070), (900, -30, 1200, 1100)):  # in a landscape one, head and feet at its borders
        assert holds(crop_box(extent, (1080, 1920), (256, 256)), extent, (1080, 1920))


def test_a_reference_shows_the_whole_body(tmp_path: Path) -> None:
    near = scene([60.0] * 12)
    near[:, 9:, 2:94, 50:90] = 0.95  # taller than the first frames' box
    (tmp_path / "in").mkdir()
    write_mp4(tmp_path / "in" / "a.mp4", near, 8)
    prepare(tmp_path / "in", tmp_path / "out")
    (record,), (clip,) = read(tmp_path / "out")
    assert record["reference_seconds"] == 1 and (clip["reference_keypoints"][:, 2] == 1).all()


def test_joints_outside_a_cut_are_not_visible() -> None:
    points = torch.tensor([[5.0, 5, 0.9], [4.9, 9, 0.9], [24.9, 14.9, 0.9], [25, 9, 0.9], [9, 15, 0.9], [9, 4, 0.9]])
    assert to_box(points, (5, 5, 20, 10), (40, 80))[:, 2].tolist() == pytest.approx([0.9, 0, 0.9, 0, 0, 0])


def test_masks_are_cut_where_their_pictures_are() -> None:
    mask = np.zeros((360, 640), dtype=np.uint8)  # of a frame of 3840x2160: a pixel of the mask is 5 of the cut
    mask[90:120, 170:200] = 1
    for left, top in ((1001, 503), (1004, 508), (999, 505)):
        found = cut_mask(mask, (2160, 3840), (left, top, 302, 302), (256, 256))
        edges = [(x - place) * 256 / 302 for x, place in ((1020, left), (540, top), (1200, left), (720, top))]
        rows, columns = found.any(1).nonzero(), found.any(0).nonzero()
        lows_highs = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert [float(x) for x in lows_highs] == pytest.approx(edges, abs=0.8)


def test_a_frame_without_visible_joints_is_no_reference_and_no_excuse_for_small_people(tmp_path: Path) -> None:
    film(tmp_path / "in", "a", walk(10))
    prepare(tmp_path / "in", tmp_path / "out", tracker=Bright(unseen=9))
    assert [r["reference_seconds"] for r in read(tmp_path / "out")[0]] == [1]
    with pytest.raises(ValueError, match="smaller than 3"):
        prepare(tmp_path / "in", tmp_path / "small", tracker=Bright(unseen=4), min_person=3)


def test_a_finished_video_that_is_now_another_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        film(tmp_path / "in", name, walk(10))
    who, out = {"a": "ann", "b": "bob"}, tmp_path / "out"
    prepare(tmp_path / "in", out, subject=who)
    finished = (out / "dataset.json").read_text()
    with pytest.raises(ValueError, match="'b': subject_id was 'bob', is 'ann'.*another --out, or delete"):
        prepare(tmp_path / "in", out, subject={"a": "ann", "b": "ann"})
    (out / "videos.jsonl").rename(tmp_path / "lines")  # as if interrupted: the clips know their person
    with pytest.raises(ValueError, match="'b': subject_id was"):
        prepare(tmp_path / "in", out, subject={"a": "ann", "b": "ann"})
    (tmp_path / "lines").rename(out / "videos.jsonl")
    film(tmp_path / "in", "b", walk(12))
    with pytest.raises(ValueError, match="'b': bytes was"):
        prepare(tmp_path / "in", out, subject=who)
    assert (out / "dataset.json").read_text() == finished
    old = [json.loads(line) for line in (out / "videos.jsonl").read_text().splitlines()]
    (out / "videos.jsonl").write_text("".join(json.dumps({k: r[k] for k in ("video", "ids")}) + "\n" for r in old))
    prepare(tmp_path / "in", out, subject=who)  # lines of older versions do not say which file it was


def test_face_crops_show_the_face(tmp_path: Path) -> None:
    film(tmp_path / "in", "a", walk(10))
    prepare(tmp_path / "in", tmp_path / "out", face_size=32)
    (_,), (clip,) = read(tmp_path / "out")
    assert clip["face"].shape == (8, 3, 32, 32)
    assert (clip["face"].float().mean((1, 2, 3)) > 120).all()  # mostly white


@pytest.mark.parametrize(
    ("options", "words"),
    [({"size": 60}, "multiple of 16"), ({"size": 272}, "multiple of 32"), ({"aspects": ["wide"]}, "width:height"),
     ({"frames": 0}, "positive"), ({"fps": 0}, "positive"), ({"test_subjects": ["zoe"]}, "zoe.*choose among"),
     ({"test_subjects": ["a"]}, "some to train on"), ({"subject": "(x)_(y)"}, "2 groups"),
     ({"subject": r"^(\d+)"}, "'a' has no person"), ({"test_share": 1}, "test_share is 1")],
)  # fmt: skip
def test_wrong_options_are_refused_before_anything_is_read(tmp_path: Path, options: dict, words: str) -> None:
    film(tmp_path / "in", "a", walk(10))
    with pytest.raises(ValueError, match=words):
        prepare(tmp_path / "in", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_folders_left_out_for_their_names_are_said(tmp_path: Path) -> None:
    for name in ("x/a", "x_dwpose/a", "yoga_pose/b", "deep/poses/c"):
        film(tmp_path / "in", name, walk(10))
    assert pose_folders(tmp_path / "in") == ["deep/poses", "yoga_pose"] and not pose_folders([tmp_path / "in"])
    with pytest.warns(UserWarning, match="yoga_pose was left out"):
        result = prepare(tmp_path / "in", tmp_path / "out", subject="folder")
    assert ["rename" in said for said in result["warnings"]] == [True, True] and result["clips"] == {"train": 1}


def test_boxes_stay_in_the_frame_have_the_aspect_and_hold_the_body() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in bucket_sizes(256, ["1:1", "9:16", "4:3"]):
        for _ in range(200):
            shape = torch.randint(120, 1080, (2,), generator=generator).tolist()
            corners = torch.rand(2, 2, generator=generator) * torch.tensor((shape[1], shape[0]))
            extent = (*corners.amin(0).tolist(), *corners.amax(0).tolist())
            left, top, width, height = box = crop_box(extent, tuple(shape), size)
            assert left >= 0 and top >= 0 and left + width <= shape[1] and top + height <= shape[0]
            assert width == pytest.approx(height * size[1] / size[0], abs=1.5)
            full = width >= shape[1] - 1 or height >= shape[0] - 1
            assert full or covers(box, tuple(x + d for x, d in zip(extent, (1, 1, -1, -1), strict=True)))


def test_cutting_repeats_the_border_and_keeps_constants() -> None:
    image = torch.arange(64, dtype=torch.uint8).expand(3, 8, 64)
    out = cut(image, (-10, -3, 20, 20), (20, 20))
    assert torch.equal(out[0, 5, :10], torch.zeros(10, dtype=torch.uint8)) and out[0, 5, -1] == 9
    assert bucket_sizes(64, ["1:1", "1:1"]) == [(64, 64)]


def test_smoothing_keeps_straight_motion_and_takes_out_jitter_and_spikes() -> None:
    frames, generator = 30, torch.Generator().manual_seed(0)
    body = torch.cat((BODY * torch.tensor((BROAD, TALL)), torch.ones(17, 1)), -1)
    straight = body.repeat(frames, 1, 1)
    straight[..., 0] += 2 * torch.arange(frames)[:, None]
    assert torch.allclose(smooth_track(straight, 30), straight, atol=1e-3)
    noisy = straight.clone()
    noisy[..., :2] += torch.randn(frames, 17, 2, generator=generator)
    before, after = ((x - straight)[..., :2].square().mean() for x in (noisy, smooth_track(noisy, 30)))
    assert after < 0.6 * before
    spiked = straight.clone()
    spiked[12, 9, :2] += 60
    assert torch.allclose(smooth_track(spiked, 30), straight, atol=1.0)
    assert torch.equal(smooth_track(noisy[:2], 30), noisy[:2])


def test_faces_are_labelled_only_where_they_are_seen() -> None:
    points = torch.cat((BODY * 60, torch.ones(17, 1)), -1)
    mask = torch.ones(64, 64, dtype=torch.bool)
    assert (label(mask, points) == LABELS["face"]).sum() > 20
    assert not (label(~mask, points)).any()
    points[1:3, 2] = 0.2
    assert (label(mask, points) == LABELS["person"]).all()
    boxes = face_boxes(points.repeat(3, 1, 1))
    assert len(set(boxes)) == 1 and boxes[0][2] == boxes[0][3]
    assert np.isnan(body_extent(torch.zeros(2, 17, 3))).all()


def test_a_photograph_that_moves_becomes_a_clip(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed")
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    try:
        tracker = PoseEstimator()
    except PackagedFileError as error:
        pytest.skip(f"the networks cannot be had: {error}")
    photo = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None] / 127.5 - 1
    small = interpolate(photo, 160, mode="area")[0]
    video = torch.full((3, 14, 160, 240), -0.4)
    for f in range(14):
        video[:, f, :, 3 * f : 3 * f + 160] = small
    write_mp4(tmp_path / "a.mp4", video, 8)
    prepare([tmp_path / "a.mp4"], tmp_path / "out", tracker=tracker)
    (record,), (clip,) = read(tmp_path / "out")
    nose = torch.stack([70 + 3 * torch.arange(8.0), torch.full((8,), 40.0)], -1)  # at (223, 128) of 512
    wanted = (nose - torch.tensor(record["box"][:2])) * (64 / record["box"][2])
    assert (clip["keypoints"][:, 0, :2] - wanted).norm(dim=-1).mean() < 1.5
    assert 0.1 < (clip["labels"] == LABELS["person"]).float().mean() < 0.8
