"""Folders of clips: what is read is what was written, and what cannot be read is said."""

import json
import struct
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from entprog.config import make_config
from entprog.data.batches import load_data
from entprog.data.follow import sampled
from entprog.data.pose import TO_COCO17, draw_skeleton
from entprog.data.synthetic import figures
from entprog.data.video import decode, load_clips, read_manifest, write_mp4, write_png, write_webp

SIZE = 64


def moving(frames: int = 12, height: int = SIZE, width: int = SIZE) -> Tensor:
    """A smooth colour gradient that gets brighter every frame, (3, F, H, W) in [-1, 1]."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    still = torch.stack((x, y, 0.5 + 0 * x))[:, None]
    return 0.6 * (still * 2 - 1) + torch.linspace(-0.4, 0.4, frames)[None, :, None, None]


def skeleton(frames: int, size: int = SIZE, layout: str = "blazepose33") -> list[list[list[float]] | None]:
    """Keypoints that move one pixel a frame, in another layout: keypoint k sits at (10 + k, 20 + frame)."""
    count = {"coco17": 17, "blazepose33": 33}[layout]
    return [[[(10 + k) * size / SIZE, (20 + f) * size / SIZE, 0.9] for k in range(count)] for f in range(frames)]


def add_clip(folder: Path, name: str, *, frames: int = 12, points: list | None = None, **keys: object) -> None:
    """Write a video, its keypoints and its line of the manifest."""
    write_mp4(folder / f"{name}.mp4", moving(frames), 8)
    content = {"format": "blazepose33", "size": [SIZE, SIZE], "points": points or skeleton(frames)}
    (folder / f"{name}.pose.json").write_text(json.dumps(content))
    add_line(folder, {"id": name, "video": f"{name}.mp4", "pose": f"{name}.pose.json", "split": "train"} | keys)


def add_line(folder: Path, record: dict[str, object]) -> None:
    with (folder / "manifest.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def load(folder: Path, **options: object) -> tuple[dict, list]:
    return load_clips(folder, **({"split": "train", "size": 32, "frames": 4} | options))


def psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * ((a - b) / 2).square().mean().log10())


def test_mp4_round_trip_keeps_frames_and_colours(tmp_path: Path) -> None:
    video = moving()
    write_mp4(tmp_path / "a.mp4", video, 7.5)
    back = decode(tmp_path / "a.mp4")
    assert back.shape == (12, 3, SIZE, SIZE) and back.dtype == torch.uint8
    assert psnr(back.transpose(0, 1) / 127.5 - 1, video) > 38


def test_mp4_upscale_repeats_pixels_and_odd_sizes_are_refused(tmp_path: Path) -> None:
    video = figures(1, size=15, frames=3)["video"][0]
    with pytest.raises(ValueError, match="15x15.*upscale"):
        write_mp4(tmp_path / "a.mp4", video, 8)
    write_mp4(tmp_path / "a.mp4", video, 8, upscale=6)
    back = decode(tmp_path / "a.mp4", size=15).transpose(0, 1) / 127.5 - 1
    assert decode(tmp_path / "a.mp4").shape[-2:] == (90, 90)
    assert psnr(back, video) > 27


def test_values_outside_are_clamped_and_wrong_videos_refused(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", torch.tensor([3.0, -3.0, 0.0])[:, None, None].expand(3, 4, 5))
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (5, 4) and image.getpixel((0, 0)) == (255, 0, 128)
    for bad in (torch.zeros(2, 3, 8, 8), torch.zeros(3, 8, 8), torch.zeros(3, 0, 8, 8)):
        with pytest.raises(ValueError, match="3, F, H, W"):
            write_mp4(tmp_path / "a.mp4", bad, 8)
    for value, low in ((torch.nan, -1), (0, 0.5)):
        with pytest.raises(ValueError, match="low.*NaN"):
            write_webp(tmp_path / "a.webp", torch.full((3, 2, 8, 8), value), 8, low=low)


@pytest.mark.parametrize("low", [-1, 0])
def test_lossless_webp_returns_every_byte_and_the_speed(tmp_path: Path, low: int) -> None:
    levels = torch.randint(0, 256, (3, 6, 9, 11), generator=torch.Generator().manual_seed(0))
    write_webp(tmp_path / "a.webp", levels / 255 * (1 - low) + low, 30, low=low)
    lasted = 0
    with Image.open(tmp_path / "a.webp") as image:
        assert image.n_frames == 6
        for i in range(6):
            image.seek(i)
            image.load()
            lasted += image.info["duration"]
            pixels = torch.tensor(list(image.convert("RGB").tobytes())).reshape(9, 11, 3)
            assert torch.equal(pixels.permute(2, 0, 1), levels[:, i])
    assert lasted == 200


def test_decode_keeps_the_range_asked_for_and_resizes(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", moving(12, 48, 96), 8)
    whole = decode(tmp_path / "a.mp4")
    assert torch.equal(decode(tmp_path / "a.mp4", start=3, end=7), whole[3:7])
    wanted = interpolate(whole[..., 24:72].float(), size=(24, 24), mode="bilinear", antialias=True)
    assert (decode(tmp_path / "a.mp4", size=24) - wanted).abs().max() <= 0.5
    with pytest.raises(ValueError, match="12"):
        decode(tmp_path / "a.mp4", start=12)


def test_decode_turns_frames_as_a_player_does(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_mp4(path, moving(2, 32, 64), 8)
    upright, content = decode(path), bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44  # a clockwise quarter turn, as a telephone held upright writes it
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30)
    path.write_bytes(content)
    assert torch.equal(decode(path), upright.rot90(-1, (2, 3)))


def test_pixels_that_are_not_square_are_refused(tmp_path: Path) -> None:
    for ratio in (Fraction(4, 3), Fraction(1280, 1281)):
        with av.open(str(tmp_path / "a.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=8)
            stream.width = stream.height = 32
            stream.codec_context.sample_aspect_ratio = ratio
            container.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
            container.mux(stream.encode())
        if ratio > 1:
            for read in (lambda: decode(tmp_path / "a.mp4"), lambda: list(sampled(tmp_path / "a.mp4", 8))):
                with pytest.raises(ValueError, match=r"pixels of 4:3.*ffmpeg.*setsar=1"):
                    read()
    assert decode(tmp_path / "a.mp4").shape == (1, 3, 32, 32)  # all but square


def test_clips_have_the_layout_of_synthetic_clips(tmp_path: Path) -> None:
    add_clip(tmp_path, "a")
    add_clip(tmp_path, "b", frames=9)
    clips, errors = load(tmp_path)
    drawn = figures(5, size=32, frames=4)
    assert not errors
    assert clips["ids"] == ["a", "a", "a", "b", "b"] and clips["starts"].tolist() == [0, 4, 8, 0, 4]
    for key in ("video", "pose", "reference", "keypoints"):
        assert clips[key].shape == drawn[key].shape and clips[key].dtype == drawn[key].dtype
    assert psnr(clips["video"][0], interpolate(moving()[:, :4].transpose(0, 1), 32, mode="area").transpose(0, 1)) > 36
    assert clips["pose"].min() >= 0 and clips["pose"].max() <= 1


def test_blazepose_keypoints_are_mapped_scaled_and_drawn(tmp_path: Path) -> None:
    add_clip(tmp_path, "a")
    clips, _ = load(tmp_path, stride=3)
    assert clips["starts"].tolist() == [0]
    wanted = torch.tensor([[[(10 + k) / 2, (20 + f) / 2, 0.9] for k in TO_COCO17["blazepose33"]] for f in (0, 3, 6, 9)])
    assert torch.allclose(clips["keypoints"][0], wanted)
    assert torch.equal(clips["pose"][0], draw_skeleton(wanted, 32, 32).transpose(0, 1))


def test_keypoints_follow_the_crop_and_their_own_size(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", moving(4, 64, 128), 8)
    points = [[[200.0, 100.0, 1.0]] * 17] * 4  # in 256x128: (100, 50) in the video, (68, 50) in its centre square
    content = {"format": "coco17", "size": [256, 128], "points": points}
    (tmp_path / "a.json").write_text(json.dumps(content))
    add_line(tmp_path, {"id": "a", "video": "a.mp4", "pose": "a.json"})
    with pytest.raises(ValueError, match="0 with a person"):
        load(tmp_path)
    points[:] = [[[150.0, 100.0, 1.0]] * 17] * 4  # (75, 50), (43, 50): inside
    (tmp_path / "a.json").write_text(json.dumps(content))
    clips, _ = load(tmp_path)
    assert torch.allclose(clips["keypoints"][0, 0, 0], torch.tensor([21.5, 25.0, 1.0]))
    (tmp_path / "a.json").write_text(json.dumps(content | {"size": [256, 256]}))
    with pytest.raises(ValueError, match="256x256.*128x64"):
        load(tmp_path)


def test_windows_use_no_frame_without_a_person(tmp_path: Path) -> None:
    points = skeleton(12)
    points[0] = points[6] = None
    points[11] = [[1.0, 1.0, 0.1]] * 33  # found, nothing visible
    add_clip(tmp_path, "a", points=points)
    clips, _ = load(tmp_path)
    assert clips["starts"].tolist() == [1, 7]
    strided, _ = load(tmp_path, stride=2, frames=3)
    assert strided["starts"].tolist() == [1]  # 1 3 5; then 6 8 10 and 7 9 11 each use a frame without a person
    for key in ("video", "pose", "reference", "keypoints"):
        assert clips[key].isfinite().all()


def test_reference_is_the_farthest_frame_or_the_given_image(tmp_path: Path) -> None:
    points = skeleton(12)
    points[11] = None
    add_clip(tmp_path, "a", points=points)
    frames = decode(tmp_path / "a.mp4", size=32) / 127.5 - 1
    clips, _ = load(tmp_path)
    assert torch.equal(clips["reference"], frames[[10, 0]])  # frame 11 has no person
    write_png(tmp_path / "who.png", image := moving(1, 40, 40)[:, 0].flip(-1))
    add_clip(tmp_path, "b", reference="who.png")
    clips, _ = load(tmp_path)
    for i in (2, 3, 4):
        assert psnr(clips["reference"][i], interpolate(image[None], 32, mode="bilinear", antialias=True)[0]) > 45


def test_start_and_end_cut_video_and_pose_alike(tmp_path: Path) -> None:
    add_clip(tmp_path, "a", start=2, end=8)
    clips, _ = load(tmp_path)
    whole = decode(tmp_path / "a.mp4", size=32)
    assert clips["starts"].tolist() == [2]
    assert torch.equal(clips["video"][0], whole[2:6].transpose(0, 1) / 127.5 - 1)
    assert clips["keypoints"][0, 0, 0, 1] == 11
    assert torch.equal(clips["reference"][0], whole[7] / 127.5 - 1)


def test_pose_videos_are_resized_and_black_frames_left_out(tmp_path: Path) -> None:
    pose = draw_skeleton(torch.tensor(skeleton(12, layout="coco17")), SIZE, SIZE).transpose(0, 1).clone()
    pose[:, 3] = 0
    write_mp4(tmp_path / "a.mp4", moving(), 8)
    write_mp4(tmp_path / "a_pose.mp4", pose, 8, low=0)
    add_line(tmp_path, {"id": "a", "video": "a.mp4", "pose": "a_pose.mp4"})
    clips, _ = load(tmp_path)
    assert clips["starts"].tolist() == [4, 8] and "keypoints" not in clips
    small = interpolate(pose[:, 4:8].transpose(0, 1), 32, mode="area").transpose(0, 1)
    assert (clips["pose"][0] - small).abs().mean() < 0.02
    add_clip(tmp_path, "b")
    with pytest.raises(ValueError, match="interchangeable|alike"):
        load(tmp_path)


def damage(folder: Path) -> dict[str, str]:
    """Add one clip of every kind that cannot be read; returns what each one's error must mention."""
    for name in ("cut", "noise", "short", "layout", "nan", "pairs", "zero", "ragged"):
        add_clip(folder, name)
    add_clip(folder, "late", end=40)
    add_clip(folder, "size", width=65)
    add_clip(folder, "few", frames=3)
    add_clip(folder, "nobody", points=[None] * 12)
    (folder / "cut.mp4").write_bytes((folder / "cut.mp4").read_bytes()[:1000])
    write_mp4(folder / "noise.mp4", torch.rand(3, 12, SIZE, SIZE, generator=torch.Generator().manual_seed(0)), 8)
    content = bytearray((folder / "noise.mp4").read_bytes())
    middle = content.index(b"mdat") + 2500  # inside the first picture: the decoder paints over it and goes on
    content[middle : middle + 400] = bytes(400)
    (folder / "noise.mp4").write_bytes(content)
    for name, change in {
        "short": {"points": skeleton(10)},
        "layout": {"format": "openpose18"},
        "nan": {"points": [[[None, 1.0, 1.0]] * 33] * 12},
        "pairs": {"points": [[[1.0, 1.0]] * 33] * 12},
        "zero": {"size": [0, 0]},
        "ragged": {"points": [[[1.0, 1.0, 1.0]] * (33 - f % 2) for f in range(12)]},
    }.items():
        path = folder / f"{name}.pose.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    add_line(folder, {"id": "gone", "video": "nowhere.mp4", "pose": "cut.pose.json"})
    add_line(folder, {"id": "noref", "video": "few.mp4", "pose": "few.pose.json", "reference": "nowhere.png"})
    return {
        "cut": "cannot be decoded", "noise": "noise.mp4 is corrupt", "short": "12 frames", "layout": "blazepose33",
        "nan": "finite", "pairs": "visibility", "zero": "0x0", "ragged": "ragged.pose.json", "late": "40",
        "size": "65x64", "few": "spans 4", "nobody": "0 with a person", "gone": "nowhere.mp4", "noref": "nowhere.png",
    }  # fmt: skip


def test_clips_that_cannot_be_read_are_reported_and_the_others_used(tmp_path: Path) -> None:
    expected = damage(tmp_path)
    with pytest.raises(ValueError, match="no clip.*first errors"):
        load(tmp_path)
    add_clip(tmp_path, "good")
    clips, errors = load(tmp_path)
    assert set(clips["ids"]) == {"good"}
    found = {error["id"]: error["error"] for error in errors}
    assert found.keys() == expected.keys()
    for name, words in expected.items():
        assert words in found[name], found[name]
    with pytest.raises(ValueError, match="clip 'cut'"):
        load(tmp_path, on_error="raise")


@pytest.mark.parametrize("poses", [11, 13])
def test_one_frame_of_difference_is_trimmed_with_a_warning(tmp_path: Path, poses: int) -> None:
    add_clip(tmp_path, "a", points=skeleton(poses))
    with pytest.warns(UserWarning, match=f"'a': 12 frames, {poses} poses"):
        clips, errors = load(tmp_path)
    assert not errors and len(clips["ids"]) == (2 if poses == 11 else 3)


def test_manifest_keeps_unknown_keys_and_reads_numbers_as_names(tmp_path: Path) -> None:
    add_line(tmp_path, {"id": 7, "video": "a.mp4", "pose": "a.json", "camera": {"pan": 1}, "subject_id": 3})
    (record,) = read_manifest(tmp_path)
    assert (record.id, record.subject_id, record.split) == ("7", "3", "train")
    assert record.model_extra == {"camera": {"pan": 1}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"id": "a", "video": "v"}', 'line 1, {"id": "a".*pose: Field required'),
        ('{"id": "a", "video": "v", "pose": null}', "pose: .*got None"),
        ('{"id": "a", "video": "v", "pose": "p", "split": "val"}', "split: .*'train' or 'test', got 'val'"),
        ('{"id": "a", "video": "v", "pose": "p", "start": -1}', "start: .*got -1"),
        ('{"id": "a", "video": "v", "pose": "p", "start": 5, "end": 5}', "end 5 is not after start 5"),
        ('{"id": "a", "video": "v", "pose": "p"}\n\n{"id": "a", "video": "w", "pose": "p"}', "line 3.*used twice"),
        ("not json", "line 1.*JSON"),
        ('["a"]', "line 1.*object"),
        ("\n", "no record"),
    ],
)
def test_broken_manifests_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "manifest.jsonl").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_manifest(tmp_path)


@pytest.mark.parametrize("options", [{"split": "val"}, {"on_error": "skip"}, {"frames": 0}, {"stride": 0}, {"size": 0}])
def test_wrong_options_are_refused(tmp_path: Path, options: dict) -> None:
    add_clip(tmp_path, "a")
    with pytest.raises(ValueError, match="choose one of|at least 1"):
        load(tmp_path, **options)
    with pytest.raises(ValueError, match="no clip of split 'test'"):
        load(tmp_path, split="test")


def test_of_the_held_out_clips_there_are_as_many_as_the_run_asks_for(tmp_path: Path) -> None:
    for number in range(5):
        add_clip(tmp_path, f"c{number}", frames=4, split="test", points=skeleton(4))
    config = make_config({"data": str(tmp_path), "steps": 1, "size": 32, "frames": 4, "held_out_clips": 2})
    whole, _ = load_clips(tmp_path, split="test", size=32, frames=4)
    data, _ = load_data(config, "test")
    assert len(whole["video"]) == 5 and {len(v) for v in data.values()} == {2}
    assert torch.equal(data["video"], whole["video"][[0, 2]])  # spread over the split
    assert len(load_data(replace(config, held_out_clips=9), "test")[0]["video"]) == 5
