"""prepare, sample and evaluate from the command line, on noise and with a stand-in for the detector."""

import json
import re

import pytest
import torch
from conftest import ABOUT, make_clip

from entprog.bench import driven, first_clips
from entprog.cli import main
from entprog.config import make_config
from entprog.data.cache import load_split, take
from entprog.data.pose import draw_skeleton
from entprog.data.prepared import Prepared, ShardWriter
from entprog.data.retarget import fit_pose
from entprog.data.video import write_mp4
from entprog.evaluate import ESTIMATORS
from entprog.packaged import PackagedFileError


class Nowhere:
    """Finds everybody at one place."""

    def __call__(self, frames):
        return torch.full((len(frames), 17, 3), 4.0)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(ESTIMATORS, "movenet", Nowhere)
    with ShardWriter(tmp_path / "data", ABOUT) as writer:
        for i in range(16):
            writer.add(make_clip(i, "train" if i < 12 else "test"))
    return tmp_path / "data"


def test_anybodys_videos_are_scored(folder, tmp_path, capsys):
    data = Prepared(folder, "test")
    (tmp_path / "videos").mkdir()
    for i, record in enumerate(data.records[:3]):  # not all clips need to be there
        video = data.rows([i], ["video"])["video"][0].transpose(0, 1) / 127.5 - 1
        write_mp4(tmp_path / "videos" / f"{record['id']}.mp4", video, 10)
    command = ["evaluate", str(tmp_path / "videos"), "--reference", str(folder), "--networks"]
    assert main(command) == 0
    found = json.loads((tmp_path / "videos" / "evaluation-test.json").read_text())
    decibel = {way: row["means"]["psnr"]["mean"] for way, row in found["rows"].items() if "psnr" in row["means"]}
    assert found["protocol"]["clips"] == 3
    assert decibel["generated"] > 3 + decibel["copy_reference"]  # noise through H.264 against other noise
    assert "copy_reference" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "videos"), "--networks"]) == 2  # of which data?


def test_scores_by_condition_are_written_and_what_they_leave_out_is_refused(tmp_path, capsys):
    command = ["score", "size=16", "frames=2", "--samples", "4", "--conditions", "--out"]
    assert main([*command, str(tmp_path / "new" / "s.json")]) == 0
    found = json.loads((tmp_path / "new" / "s.json").read_text())
    assert set(found) == {"all conditions", "without pose", "without reference"}
    assert found["all conditions"]["values"] != found["without reference"]["values"]
    for more in (["--priority", "gain"], ["--export", "peft"]):
        assert main([*command, str(tmp_path / "t.json"), *more]) == 2 and "ranks nothing" in capsys.readouterr().out


def test_a_place_where_nothing_may_be_written_is_told_in_a_line(tmp_path, monkeypatch, capsys):
    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path / "run"))

    monkeypatch.setattr("entprog.bench.train_run", refused)  # root may write anywhere
    config = tmp_path / "c.yaml"
    config.write_text("steps: 1\n")
    assert main(["train", str(config), "--out", str(tmp_path / "run")]) == 2
    assert "Permission denied" in capsys.readouterr().out


def test_a_run_is_drawn_and_scored(folder, tmp_path, monkeypatch, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(
        f"data: {folder}\nmodel: T\nsize: 16\nframes: 3\nsteps: 2\nbatch_size: 2\nstrategy: full\n"
        "held_out_clips: 2\nsamples: 0\nevaluations: 1\nnum_inference_steps: 2\n"
    )
    run = tmp_path / "run"
    assert main(["train", str(config), "--out", str(run)]) == 0
    assert main(["evaluate", str(run), "--clips", "4", "--networks"]) == 0  # clips of 6 frames, by windows of 3
    assert json.loads((run / "evaluation-test.json").read_text())["protocol"]["frames"] == [6]
    sample = ["sample", str(run), "--clips", "2", "--pose-from", "clip-13", "--out", str(tmp_path / "s.mp4")]
    assert main(sample) == 0 and (tmp_path / "s.mp4").stat().st_size > 500
    assert main([*sample[:5], "nobody"]) == 2
    each = tmp_path / "each"
    assert main(["sample", str(run), "--clips", "2", "--frames", "6", "--each", str(each)]) == 0
    assert main(["evaluate", str(each), "--reference", str(folder), "--networks"]) == 0
    alone = json.loads((each / "evaluation-test.json").read_text())
    assert alone["ids"] == sorted(p.stem for p in each.glob("*.mp4")) and len(alone["ids"]) == 2

    drawn = []  # more clips than the run held out are there, and are drawn; more frames are not
    monkeypatch.setattr("entprog.data.video.write_mp4", lambda path, wall, fps, upscale: drawn.append(wall.shape))
    assert main(["sample", str(run), "--clips", "4", "--frames", "6"]) == 0 and drawn[0][1:3] == (6, 4 * 16)
    capsys.readouterr()
    for wrong, said in ((["--frames", "7"], "clips of 6 frames do not hold 7"), (["--clips", "0"], "--clips 0")):
        assert main(["sample", str(run), *wrong]) == 2 and said in capsys.readouterr().out
    assert main(["sample", str(run), "--clips", "9"]) == 0 and "4 clips and not 9" in capsys.readouterr().out

    monkeypatch.setattr("entprog.recipe.draw_videos", lambda *_: pytest.fail("draws before it looks"))

    def missing(*_):
        raise PackagedFileError("vgg cannot be downloaded")

    monkeypatch.setattr("entprog.evaluate.load_lpips", missing)
    assert main(["evaluate", str(run), "--networks", "vgg"]) == 1 and "vgg cannot be" in capsys.readouterr().out
    assert (
        main(["evaluate", str(run), "--networks", "vgg19"]) == 2 and "['vgg19'] are unknown" in capsys.readouterr().out
    )
    monkeypatch.setitem(ESTIMATORS, "movenet", missing)
    assert main(["evaluate", str(run), "--networks"]) == 1
    videos = ["evaluate", str(tmp_path), "--reference", str(folder), "--networks"]
    assert main([*videos, "--clips", "3"]) == 2 and main([*videos, "--out", "x", "sampler=ddpm"]) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--rendered", "3", "--aspects", "3:4"], "--aspects would do nothing"),
        (["--rendered", "3", "--flips", "--face-size", "64"], "--flips, --face-size would do nothing"),
        (["--rendered", "3", "--subject", "folder"], "--subject would"),
        (["--rendered", "3", "--test-subjects", "ann", "--test-videos", "a"], "--test-subjects, --test-videos would"),
        (["--rendered", "3", "--dwpose", "DIR"], "--dwpose would"),
        (["--rendered", "3", "--caption", "a dance"], "--caption would do nothing: .*add --model"),
        (["--rendered", "0"], "--rendered 0: choose at least 1"),
        (["VIDEOS", "--clips-per-person", "9"], "--clips-per-person would do nothing"),
    ],
)
def test_options_of_the_other_source_are_refused(given, said, tmp_path, capsys):
    assert main(["prepare", *given, "--out", str(tmp_path / "out")]) == 2
    assert re.search(said, " ".join(capsys.readouterr().out.split()))
    assert not (tmp_path / "out").exists()


def test_prepare_hands_on_what_is_given_and_its_defaults(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("entprog.data.rendered.render_people", lambda people, out, **k: calls.append((people, k)))
    assert main(["prepare", "--rendered", "400", "--out", str(tmp_path), "--clips-per-person", "5"]) == 0
    (people, given) = calls[0]
    del given["on_progress"]
    assert people == {"train": 400, "test": 40, "hard": 40}
    assert given == {"size": 64, "frames": 16, "fps": 10.0, "seed": 0, "clips_per_person": 5}
    assert main(["prepare", "--model", "DIR", "DATA", "--size", "480"]) == 2
    assert "--size would do nothing" in " ".join(capsys.readouterr().out.split())


def test_prepare_takes_one_source(tmp_path):
    assert main(["prepare", "--out", str(tmp_path)]) == 2
    assert main(["prepare", str(tmp_path), "--rendered", "3", "--out", str(tmp_path)]) == 2


def test_poses_of_another_clip_are_fitted_to_each_body(folder):
    data = load_split(folder, "test")
    clips = {k: take(v, k, [0, 1, 2]) for k, v in data.items()}
    moved = driven(clips, data, "clip-13")
    assert not torch.equal(moved["pose"], clips["pose"]) and moved["reference"] is clips["reference"]
    own = make_clip(13)  # whoever is driven by himself keeps his place, for his body has one size
    alone = {"pose": data["pose"].subset([1]), "video": data["video"].subset([1])}
    driving, body = own.keypoints, own.reference_keypoints
    expected = draw_skeleton(fit_pose(driving, body), 16, 16).transpose(0, 1)
    assert torch.allclose(driven({"pose": clips["pose"][1:2]}, alone, "clip-13")["pose"][0], expected)
    with pytest.raises(ValueError, match="choose one of"):
        driven(clips, data, "clip-1")
    with pytest.raises(ValueError, match="prepared folder"):
        driven(clips, clips, "clip-13")


def test_of_several_shapes_the_drawn_clips_get_the_poses_of_their_own_bodies(tmp_path):
    with ShardWriter(tmp_path, ABOUT, per_shard=1) as writer:
        for i, size in enumerate((16, 32, 32, 16)):
            writer.add(make_clip(i, "test", size))
    data = load_split(tmp_path, "test")
    clips, truth = first_clips(make_config({"steps": 1, "frames": 6}), data, 2)
    moved = driven(clips, data, "clip-1")["pose"]
    for row, own in enumerate((make_clip(0), make_clip(3))):
        assert torch.allclose(truth[row].transpose(0, 1), own.video / 127.5 - 1)
        fitted = fit_pose(make_clip(1, size=32).keypoints, own.reference_keypoints)
        assert torch.allclose(moved[row], draw_skeleton(fitted, 16, 16).transpose(0, 1))


def test_key_value_may_stand_before_and_behind_options(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("steps: 1\n")
    for command in (["strategy=none", "--out", "x"], ["--out", "x", "strategy=none"]):
        assert main(["train", str(tmp_path / "run.yaml"), *command]) == 2
        assert "strategy 'none' is unknown" in " ".join(capsys.readouterr().out.split())
    for wrong in ("--steps", "steps"):
        with pytest.raises(SystemExit):
            main(["train", str(tmp_path / "run.yaml"), "--out", "x", wrong])
