"""Prepared folders, their latents, and the batches taken from them."""

import json
import os
import shutil

import pytest
import torch
from conftest import ABOUT, make_clip
from safetensors.torch import load_file, save_file

from entprog.bench import train_run
from entprog.checkpoint import write_results, write_whole
from entprog.config import check_same, check_size, load_config, make_config
from entprog.data.batches import batch_at, fixed_batches, load_data
from entprog.data.cache import load_split, take
from entprog.data.pose import draw_skeleton
from entprog.data.prepared import LABELS, Prepared, ShardWriter, mended_lines, read_manifest, split_hash
from entprog.models.autoencoder import Autoencoder


@pytest.fixture
def folder(tmp_path):
    with ShardWriter(tmp_path / "data", ABOUT, per_shard=3) as writer:
        for i in range(10):
            writer.add(make_clip(i, "train" if i < 8 else "test"))
    return tmp_path / "data"


def test_what_is_written_is_read(folder):
    data = Prepared(folder, "train")
    assert len(data) == 8 and data.about["clips"] == 10 and data.records[3]["motion"] == "walk"
    rows = data.rows([5, 0], ["video", "keypoints", "reference"])
    for row, i in enumerate((5, 0)):
        assert torch.equal(rows["video"][row], make_clip(i).video)
        assert torch.equal(rows["keypoints"][row], make_clip(i).keypoints)


def test_an_interrupted_writer_goes_on(folder, tmp_path):
    class Interrupted(Exception):
        pass

    with pytest.raises(Interrupted), ShardWriter(tmp_path / "other", ABOUT, per_shard=3) as writer:
        for i in range(5):
            writer.add(make_clip(i))
        raise Interrupted
    assert "split_hash" not in json.loads((tmp_path / "other" / "dataset.json").read_text())
    with pytest.raises(ValueError, match="run the same command again"):  # not trained on as if it were whole
        load_split(tmp_path / "other", "train")
    with ShardWriter(tmp_path / "other", ABOUT, per_shard=3) as writer:
        for i in range(10):
            if f"clip-{i}" not in writer.done:
                writer.add(make_clip(i, "train" if i < 8 else "test"))
    one, two = (json.loads((f / "dataset.json").read_text()) for f in (folder, tmp_path / "other"))
    assert one == two
    for f in (folder, tmp_path / "other"):
        assert torch.equal(Prepared(f, "train").rows([6], ["video"])["video"][0], make_clip(6).video)


def test_the_split_hash_sees_every_change():
    records = [{"id": str(i), "subject_id": "a", "split": "train"} for i in range(3)]
    assert split_hash(records) == split_hash(records[::-1])
    moved = [records[0] | {"split": "test"}, *records[1:]]
    assert split_hash(moved) != split_hash(records) != split_hash([records[0] | {"subject_id": "b"}, *records[1:]])


def test_the_stated_hash_is_that_of_the_lines_that_are_read(folder):
    manifest = folder / "manifest.jsonl"
    stated = Prepared(folder, "train").about
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(lines).replace('"motion"', '"caption": "a person walks", "motion"'))
    assert Prepared(folder, "train").about == stated
    manifest.write_text("".join(lines[:2] + lines[3:]))
    data = Prepared(folder, "train")
    assert len(data) == 7 and data.about["clips"] == 9
    assert data.about["split_hash"] == split_hash(read_manifest(folder)) != stated["split_hash"]


def test_an_attempt_that_made_no_clip_does_not_bind_the_next(tmp_path):
    with ShardWriter(tmp_path, ABOUT):
        pass
    with pytest.raises(ValueError, match="made no clip: run the same command again"):
        Prepared(tmp_path, "train")
    with pytest.raises(ValueError, match="no clip was made yet"):
        read_manifest(tmp_path)
    with ShardWriter(tmp_path, ABOUT | {"fps": 5}) as writer:
        writer.add(make_clip(0))
    assert Prepared(tmp_path, "train").about["fps"] == 5


def test_bad_folders_clips_and_splits_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="choose another --out"):
        ShardWriter(folder, ABOUT | {"seed": 1})
    with ShardWriter(tmp_path / "x", ABOUT) as writer:
        writer.add(make_clip(0))
        with pytest.raises(ValueError, match="used twice"):
            writer.add(make_clip(0))
        with pytest.raises(ValueError, match="choose one of"):
            writer.add(make_clip(1, "validation"))
    with pytest.raises(ValueError, match="no clip of split 'hard'"):
        Prepared(folder, "hard")
    with pytest.raises(ValueError, match="entprog prepare"):
        Prepared(tmp_path, "train")


def test_clips_of_different_shapes_never_share_a_batch(tmp_path):
    with ShardWriter(tmp_path, ABOUT) as writer:
        for i in range(12):
            writer.add(make_clip(i, size=24 if i % 3 == 0 else 16, frames=4 if i % 3 == 1 else 6))
    data = load_split(tmp_path, "train")
    wide = torch.tensor([data["video"].subset([i]).shape[-1] for i in range(12)])
    for epoch in range(3):
        batches = [batch_at(data, 6 * epoch + p, batch_size=2, seed=1, frames=3) for p in range(6)]
        assert sorted(b["video"].shape[-1] for b in batches) == [16] * 4 + [24] * 2
        assert all(b["pose"].shape[-1] == b["video"].shape[-1] and b["video"].shape[2] == 3 for b in batches)
        assert len({b["reference"][i].flatten()[:9].sum().item() for b in batches for i in range(2)}) == 12
    fixed = fixed_batches(data, batch_size=8, frames=4)
    assert sum(len(b["video"]) for b in fixed) == 12 and len({b["video"].shape[1:] for b in fixed}) == 2
    assert (wide == 24).sum() == 4
    with pytest.raises(ValueError, match="do not hold 5"):
        fixed_batches(data, batch_size=8, frames=5)


def test_a_limit_spreads_over_the_split(folder):
    assert [r["id"] for r in Prepared(folder, "train", 4).records] == ["clip-0", "clip-2", "clip-4", "clip-6"]
    assert len(Prepared(folder, "train", 100)) == 8


def test_pixels_from_disk_equal_the_clips(folder):
    data = load_split(folder, "train")
    assert data["video"].shape == (8, 3, 6, 16, 16) and len(data["video"][2:5]) == 3
    clip = make_clip(4)
    video = take(data["video"], "video", [4])[0]
    assert torch.allclose(video, clip.video.transpose(0, 1) / 127.5 - 1)
    window = take(data["video"], "video", [4], [slice(2, 4)])[0]
    assert torch.equal(window, video[:, 2:4])
    pose = take(data["pose"], "pose", [4])[0]
    assert (pose - draw_skeleton(clip.keypoints, 16, 16).transpose(0, 1)).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(take(data["labels"], "labels", [4])[0], clip.labels)
    assert torch.equal(take(data["reference"][3:], "reference", [1])[0], clip.reference / 127.5 - 1)


def test_latents_are_cached_once_and_decode_to_the_video(folder):
    autoencoder = Autoencoder("taef2")
    data = load_split(folder, "train", autoencoder)
    assert data["video"].shape == (8, 32, 6, 2, 2) and data["pose"].shape == (8, 3, 6, 16, 16)
    expected = autoencoder.encode(make_clip(1).video.transpose(0, 1)[None] / 127.5 - 1)[0]
    assert (
        take(data["video"], "video", [1])[0] - expected
    ).abs().max() < 0.1  # half precision, encoded in bf16 where that is fast
    before = {p: p.stat().st_mtime_ns for p in (folder / "cache").rglob("*.safetensors")}
    load_split(folder, "train", autoencoder)
    assert before == {p: p.stat().st_mtime_ns for p in (folder / "cache").rglob("*.safetensors")}


def _write_anew(folder, first):
    for made in ("dataset.json", "manifest.jsonl"):
        (folder / made).unlink(missing_ok=True)
    with ShardWriter(folder, ABOUT, per_shard=3) as writer:
        for i in range(first, first + 10):
            writer.add(make_clip(i, "train" if i < first + 8 else "test"))


def _times(folder):
    return {p.name: p.stat().st_mtime_ns for p in (folder / "cache").rglob("*.safetensors")}


def _shown(folder):
    return load_split(folder, "train")["labels"].take([1])[0]


def test_what_was_cached_of_other_clips_is_not_used(folder, tmp_path):
    assert torch.equal(_shown(folder), make_clip(1).labels)
    _write_anew(folder, 100)
    for path in (folder / "shards").iterdir():
        os.utime(path, ns=(0, 0))  # the files may well be older, brought here from elsewhere
    assert torch.equal(_shown(folder), make_clip(101).labels)
    shutil.copytree(folder / "cache", tmp_path / "copy" / "cache", copy_function=shutil.copyfile)
    before = _times(tmp_path / "copy")
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("cache"))  # fmt: skip
    assert torch.equal(_shown(tmp_path / "copy"), make_clip(101).labels) and _times(tmp_path / "copy") == before


def test_a_cache_and_shards_of_older_versions_are_told_by_their_times(folder):
    for path in (folder / "shards").iterdir():
        save_file(load_file(path), path)
    load_split(folder, "train")
    for path in (folder / "cache").rglob("*.safetensors"):
        save_file(load_file(path), path)
    before = _times(folder)
    load_split(folder, "train")
    assert _times(folder) == before
    _write_anew(folder, 100)
    for path in (folder / "cache").rglob("*.safetensors"):
        os.utime(path, ns=(0, 0))
    assert torch.equal(_shown(folder), make_clip(101).labels)


def test_batches_from_disk_equal_batches_from_memory(folder):
    stored = load_split(folder, "train")
    memory = {k: torch.stack([take(v, k, [i])[0] for i in range(8)]) for k, v in stored.items()}
    for frames in (None, 1, 4):
        a, b = (batch_at(d, 3, batch_size=2, seed=5, frames=frames) for d in (stored, memory))
        assert a.keys() == b.keys() and a["video"].shape[2] == (frames or 6)
        assert all(torch.equal(a[k], b[k]) for k in a)
        for x, y in zip(
            *(fixed_batches(d, batch_size=3, frames=frames, draws=2) for d in (stored, memory)), strict=True
        ):
            assert all(torch.equal(x[k], y[k]) for k in x)


def test_image_batches_see_every_frame(folder):
    data = load_split(folder, "train")
    seen = {
        tuple(batch_at(data, p, batch_size=1, seed=0, frames=1)["pose"].flatten()[:400].tolist()) for p in range(300)
    }
    assert len(seen) > 40  # of 48 frames


def test_a_reference_takes_its_pose_along_when_it_is_dropped(folder):
    data = load_split(folder, "train")
    for p in range(40):
        batch = batch_at(data, p, batch_size=1, seed=0, condition_dropout=0.5)
        assert ("reference" in batch) == ("reference_pose" in batch)
    assert all(
        set(batch_at(data, p, batch_size=1, seed=0, joint_dropout=0.5)) & {"pose", "reference"}
        in ({"pose", "reference"}, set())
        for p in range(40)
    )
    only = batch_at(data, 0, batch_size=1, seed=0, conditions=("reference",))
    assert "pose" not in only and "reference" in only
    with pytest.raises(ValueError, match="the data have no"):
        batch_at({"video": torch.zeros(2, 3, 1, 4, 4)}, 0, batch_size=1, seed=0, conditions=("pose",))


def test_too_few_frames_are_refused(folder):
    with pytest.raises(ValueError, match="do not hold 9"):
        batch_at(load_split(folder, "train"), 0, batch_size=1, seed=0, frames=9)


def test_a_run_loads_the_split_it_asks_for(folder):
    config = make_config({"data": str(folder), "steps": 1, "frames": 2, "held_out_clips": 1})
    assert len(load_data(config, "train")[0]["video"]) == 8
    assert len(load_data(config, "test")[0]["video"]) == 1
    with pytest.raises(ValueError, match="not prepared"):
        load_data(make_config({"data": str(folder.parent), "steps": 1, "autoencoder": "taef2"}), "train")


def test_the_configuration_says_the_size_that_is_trained_on(folder, tmp_path):
    values = {"data": str(folder), "steps": 1, "frames": 2, "model": "T"}
    config = make_config(values)
    check_size(config)
    assert config.size == ABOUT["size"] == 16 and make_config({"steps": 1}).size == 24
    with pytest.raises(ValueError, match="size 64: .* prepared at 16. Set size=16"):
        train_run(make_config(values | {"size": 64}), tmp_path / "run")
    config.save(tmp_path / "config.yaml")
    saved = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(saved.replace("size: 16", "size: 24"))  # of a version that did not look
    assert load_config(tmp_path / "config.yaml").size == 24
    check_same(config, tmp_path)


def test_labels_are_bytes():
    assert set(LABELS.values()) == set(range(8))


def test_a_torn_manifest_line_is_written_again(folder):
    manifest = folder / "manifest.jsonl"
    text = manifest.read_text()
    manifest.write_text(text[:-20])  # killed while writing the last line
    assert len(Prepared(folder, "train")) + len(Prepared(folder, "test")) == 9
    about = json.loads((folder / "dataset.json").read_text())
    with ShardWriter(folder, ABOUT) as writer:
        (torn,) = (i for i in range(10) if f"clip-{i}" not in writer.done)
        writer.add(make_clip(torn, "train" if torn < 8 else "test"))
    assert json.loads((folder / "dataset.json").read_text()) == about


def test_a_whole_manifest_is_not_written_again_and_a_line_without_its_end_counts(folder):
    manifest = folder / "manifest.jsonl"
    by_hand = (
        manifest.read_text().replace('"id": ', '"id":').rstrip("\n")
    )  # an editor saved it without the last newline
    manifest.write_text(by_hand)
    assert len(Prepared(folder, "train")) + len(Prepared(folder, "test")) == 10
    with ShardWriter(folder, ABOUT) as writer:
        assert len(writer.done) == 10
        writer.add(make_clip(10))
    assert manifest.read_text().startswith(by_hand + "\n") and len(mended_lines(manifest)) == 11


def test_a_kill_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_whole(path, "old")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("entprog.checkpoint.os.replace", killed)
    for write in (
        lambda: write_results(tmp_path, {"wall": 1.0}, {}),
        lambda: write_whole(path, "new"),
        lambda: make_config({"steps": 1}).save(path),
    ):
        with pytest.raises(KeyboardInterrupt):
            write()
        assert path.read_text() == "old"


def test_another_tools_manifest_is_not_touched(tmp_path):
    (tmp_path / "manifest.jsonl").write_text('{"id": "walk", "video": "walk.mp4"}\n')
    with pytest.raises(ValueError, match="manifest of something else"):
        ShardWriter(tmp_path, ABOUT)
    assert not (tmp_path / "dataset.json").exists()
