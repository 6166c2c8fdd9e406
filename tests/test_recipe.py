"""Recipes: phases that hand on, temporal candidates, and the whole of it on noise."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ABOUT, make_clip

from entprog.data.prepared import ShardWriter
from entprog.evaluate import ESTIMATORS
from entprog.models.pretrained import load_model
from entprog.packaged import PackagedFileError
from entprog.recipe import PRESETS, is_recipe, load_recipe, make_recipe, prepare_data, run_recipe
from entprog.recipe_check import RENDERED
from entprog.report import write_report

TINY = {
    "common": {
        "size": 16, "autoencoder": "", "mixed_precision": "no", "clock": "model", "held_out_clips": 4,
        "evaluations": 2, "samples": 1, "num_inference_steps": 2, "checkpoint_every": 50, "ema_decay": 0.0,
    },
    "base": {"model": "T", "steps": 3, "batch_size": 4},
    "phases": {
        "subject": {"steps": 4, "batch_size": 4}, "pose": {"steps": 4, "batch_size": 4},
        "video": {"steps": 4, "batch_size": 2, "frames": 3},
    },
    "evaluation": {"splits": ["test"], "clips": 4, "networks": []},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    with ShardWriter(tmp_path / "data", ABOUT) as writer:
        for i in range(40):
            writer.add(make_clip(i, "train" if i < 32 else "test"))
    return tmp_path / "data"


def tiny(folder: Path, **changes: object):
    values = json.loads(json.dumps(TINY)) | {"data": str(folder), "people": {}} | changes
    return make_recipe(values)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_say_what_each_phase_may_train(preset):
    recipe = make_recipe({"preset": preset, "data": "d"})
    for strategy in recipe.strategies:
        configs = {p: recipe.config(p, strategy, "P") for p in ("subject", "pose", "video")}
        assert [c.frames for c in configs.values()][:2] == [1, 1] and configs["video"].frames > 1
        assert configs["subject"].conditions == ("reference",)
        assert [c.candidates for c in configs.values()] == ["all", "all", "temporal"]
        assert set(configs["video"].guided) == {"pose", "reference"}


def test_the_paper_preset_has_the_published_constants():
    recipe = make_recipe({"preset": "paper", "data": "d"})
    phases = [recipe.config(p, "paper", "XL") for p in ("subject", "pose", "video")]
    assert [(c.steps, c.batch_size, c.lr) for c in phases] == [
        (50_000, 32, 1e-5),
        (200_000, 8, 1e-5),
        (200_000, 4, 1e-5),
    ]
    settings = {(c.objective, c.sampler, c.num_inference_steps, c.guidance_scale) for c in phases}
    assert settings == {("epsilon", "ddpm", 100, 4.0)}


def test_a_file_lies_over_its_preset_and_overrides_over_the_file(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"preset": "cpu", "data": "d", "phases": {"pose": {"steps": 7}}}))
    recipe = load_recipe(path, ["phases.video.lr=0.5", "seed=3"])
    assert is_recipe(path) and recipe.seed == 3
    pose, video = (recipe.config(p, "full", "P") for p in ("pose", "video"))
    assert pose.steps == 7 and pose.seconds is None and video.lr == 0.5 and video.seed == 3
    (tmp_path / "c.yaml").write_text("steps: 3\n")
    assert not is_recipe(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "tpu", "data": "d"}, "choose one of"),
        ({"preset": "cpu"}, "needs data"),
        ({"preset": "cpu", "data": "d", "phase": {}}, "recipe keys"),
        ({"preset": "cpu", "data": "d", "phases": {"audio": {}}}, "phases \\['audio'\\]"),
        ({"preset": "cpu", "data": "d", "base": {"model": "nowhere"}}, "choose one of .'base', 'people'"),
        ({"preset": "gpu", "data": "d", "base": {"lerning_rate": 1}}, "lerning_rate"),
        (
            {"preset": "cpu", "data": "d", "evaluation": {"pose": "openpose"}},
            "evaluation.pose 'openpose': choose one of",
        ),
        ({"preset": "cpu", "data": "d", "evaluation": {"networks": ["vgg19"]}}, "networks .'vgg19'"),
        ({"preset": "cpu", "data": "d", "evaluation": {"clip": 3}}, "splits, clips, networks and pose"),
        ({"preset": "cpu", "data": "d", "common": {"lerning_rate": 1}}, "lerning_rate"),
        ({"data": "d", "preset": ["cpu"]}, "preset = .'cpu'.: give a name"),
        ({"data": 5}, "data = 5: give a name"),
        ({"data": "d", "evaluation": None}, "evaluation = None: give a mapping"),
        ({"data": "d", "common": None}, "common = None: give a mapping"),
        ({"data": "d", "base": "people"}, "base = 'people': give a mapping"),
        ({"data": "d", "phases": ["pose", "video"]}, "phases = .'pose', 'video'.: give a mapping"),
        ({"data": "d", "phases": {"pose": 60}}, "phases.pose = 60: give a mapping"),
        ({"data": "d", "phases": dict.fromkeys(("subject", "pose", "video"))}, "leave at least one"),
        ({"data": "d", "phases": {"pose": {"size": 32}}}, "phases.pose.size = 32: all runs"),
        ({"data": "d", "strategies": []}, r"strategies = \[\]: give a list of names"),
        ({"data": "d", "strategies": "full"}, "strategies = 'full': give a list"),
        ({"data": "d", "strategies": ["full", "full"]}, "each once"),
        ({"data": "d", "evaluation": {"splits": []}}, "evaluation.splits = "),
        ({"data": "d", "evaluation": {"networks": "vgg"}}, "evaluation.networks = 'vgg': give a list"),
        ({"data": "d", "evaluation": {"clips": -1}}, "evaluation.clips -1: choose .* at least 1"),
        ({"data": "d", "evaluation": {"clips": None}}, "splits, clips, networks and pose, not"),
        ({"data": "d", "common": {"autoencoder": "taef3"}}, "'taef3' is unknown: choose one of .'taef2'"),
        ({"data": "d", "common": {"autoencoder": "taef2"}}, "trained with autoencoder='taef2-people' and not 'taef2'"),
        ({"data": "d", "common": {"size": 128}}, "common.size 128: .* are of 64"),
        ({"data": "d", "people": {"peeple": 1}}, "people .'peeple'. are unknown"),
        ({"data": "d", "people": {"people": 400}}, "people.people = 400: give a mapping"),
        ({"data": "d", "people": {"people": {"dev": 4}}}, "people.people = .*'train'"),
        ({"data": "d", "people": {"people": {"train": "many"}}}, "people.people.train = 'many': give a whole"),
        ({"data": "d", "people": {"clips_per_person": None}}, "people.clips_per_person = None: give a whole"),
    ],
)
def test_bad_recipes_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        make_recipe(values)


def test_overrides_reach_below_an_empty_key_and_are_refused_below_a_value(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("preset: cpu\ndata: d\ncommon:\nseed: 3\n")
    assert load_recipe(path, ["common.lr=1"]).common["lr"] == 1
    for override in ("seed.lr=1", "seed.lr.x=1"):
        with pytest.raises(ValueError, match="seed is 3 in .*not a mapping"):
            load_recipe(path, [override])
    path.write_text("[phases]")
    with pytest.raises(ValueError, match="holds list"):
        load_recipe(path)


def rendered(folder: Path, people: int = 3, done: bool = True) -> Path:
    """A folder that says that it holds rendered people, two clips of each; the last one is for testing."""
    try:
        with ShardWriter(folder, ABOUT | {"kind": "rendered"}) as writer:
            for i in range(2 * people):
                writer.add(make_clip(i, "train" if i // 2 < people - 1 else "test"))
            if not done:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    return folder


PEOPLE = {"people": {"train": 2, "test": 1, "hard": None}, "size": 16, "frames": 6, "clips_per_person": 2}


def test_rendered_people_are_the_recipes_or_are_refused(tmp_path, monkeypatch):
    folder = rendered(tmp_path / "data")
    prepare_data(tiny(folder, people=PEOPLE), print)  # what the command line rendered goes on working
    prepare_data(tiny(folder, people=PEOPLE | {"fps": 10.0, "seed": 0}), print)
    for change, said in (
        ({"people": PEOPLE["people"] | {"train": 40}}, "'people': {'train': 2, 'test': 1}}, the recipe says .*40"),
        ({"seed": 7}, "{'seed': 0}, the recipe says {'seed': 7}"),
        ({"clips_per_person": 9}, "{'clips_per_person': 2}, the recipe says {'clips_per_person': 9}"),
        ({"frames": 8}, "{'frames': 6}, the recipe says {'frames': 8}"),
    ):
        with pytest.raises(ValueError, match=said):
            prepare_data(tiny(folder, people=PEOPLE | change), print)
    prepare_data(tiny(folder, people=None), print)  # as it is
    with pytest.raises(ValueError, match="no people to render"):
        prepare_data(tiny(tmp_path / "nothing", people=None, common={"size": 64}), print)
    asked = []
    torn = rendered(tmp_path / "torn", done=False)
    monkeypatch.setattr("entprog.data.rendered.render_people", lambda *a, **k: asked.append((a, k)) or rendered(torn))
    with pytest.raises(ValueError, match="not finished"):
        prepare_data(tiny(torn, people=None), print)
    monkeypatch.setattr("entprog.data.rendered.render_people", lambda *a, **k: asked.append((a, k)))
    with pytest.raises(ValueError, match="not finished"):  # for this stand-in renders nothing
        prepare_data(tiny(torn, people=PEOPLE), print)
    assert asked[0][0][0] == {"train": 2, "test": 1} and asked[0][1]["clips_per_person"] == 2


def test_what_is_rendered_without_saying_so_is_what_render_people_says():
    from inspect import signature

    from entprog.data.rendered import render_people

    known = signature(render_people).parameters
    assert {k: known[k].default for k in RENDERED} == RENDERED


def test_a_recipe_over_ones_own_footage_has_its_size(folder):
    values = json.loads(json.dumps(TINY)) | {"data": str(folder)}
    del values["common"]["size"]  # the preset's is 64
    assert make_recipe(values).config("pose", "full", "P").size == ABOUT["size"] == 16
    values["common"]["size"] = 64
    with pytest.raises(ValueError, match="common.size 64: .* are of 16"):
        make_recipe(values)


def test_networks_that_cannot_be_had_are_known_before_anything_is_made(folder, tmp_path, monkeypatch):
    def missing(*_):
        raise PackagedFileError("vgg cannot be downloaded")

    monkeypatch.setitem(ESTIMATORS, "movenet", object)
    monkeypatch.setattr("entprog.evaluate.load_lpips", missing)
    monkeypatch.setattr("entprog.recipe.train_base", lambda *_: pytest.fail("trains before it looks"))
    with pytest.raises(PackagedFileError, match="vgg cannot"):
        run_recipe(tiny(folder, evaluation=TINY["evaluation"] | {"networks": ["vgg"]}), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phases": {"video": {"steps": 4, "batch_size": 2, "frames": 7}}},
         "phases.video.frames 7: split 'train' of .* has clips of 6 frames"),
        ({"phases": {"pose": {"steps": 4, "batch_size": 33}}},
         r"phases.pose.batch_size 33: .* has \[32\], choose at most 32"),
        ({"base": {"model": "T", "steps": 3, "batch_size": 40}}, "base.batch_size 40"),
        ({"evaluation": {"splits": ["test"], "clips": 4, "networks": ["vgg", "alex"]}},
         "evaluation.networks 'vgg' needs frames of at least 16x16 pixels, split 'test' of .* has sides of 15"),
    ],
)  # fmt: skip
def test_clips_that_do_not_fit_are_known_before_the_first_step(changes, message, folder, tmp_path, monkeypatch):
    if "evaluation" in changes:  # one test clip is a pixel too small
        folder = tmp_path / "small"
        with ShardWriter(folder, ABOUT) as writer:
            for i in range(36):
                writer.add(make_clip(i, "train" if i < 32 else "test", size=15 if i == 35 else 16))
    monkeypatch.setitem(ESTIMATORS, "movenet", object)
    monkeypatch.setattr("entprog.evaluate.load_networks", lambda *_: None)
    monkeypatch.setattr("entprog.recipe.train_base", lambda *_: pytest.fail("trains before it looks"))
    with pytest.raises(ValueError, match=message):
        run_recipe(tiny(folder, **changes), tmp_path / "out")


def test_a_recipe_does_not_go_on_with_other_clips(folder, tmp_path, monkeypatch):
    class Begun(Exception):
        pass

    def begins(*_):
        raise Begun

    monkeypatch.setitem(ESTIMATORS, "movenet", object)
    monkeypatch.setattr("entprog.recipe.train_base", begins)
    with pytest.raises(Begun):
        run_recipe(tiny(folder), tmp_path / "out")
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match="has changed since"):
        run_recipe(tiny(folder), tmp_path / "out")
    with pytest.raises(Begun):  # what is left is good for a new one
        run_recipe(tiny(folder), tmp_path / "new")


def test_a_recipe_hands_on_from_phase_to_phase_and_writes_its_page(folder, tmp_path, monkeypatch):
    class Guess:  # the networks are tested apart; here is no person to be found
        def __call__(self, frames: torch.Tensor) -> torch.Tensor:
            return torch.full((len(frames), 17, 3), 4.0)

    monkeypatch.setitem(ESTIMATORS, "movenet", Guess)
    recipe, out = tiny(folder), tmp_path / "out"
    results = run_recipe(recipe, out)
    base = load_model(str(out / "base" / "checkpoints" / "final")).state_dict()

    def weights(phase: str, strategy: str) -> dict[str, torch.Tensor]:
        return load_model(str(out / phase / strategy / "checkpoints" / "final")).state_dict()

    for strategy in ("full", "ent-prog"):
        subject, pose, video = (weights(p, strategy) for p in ("subject", "pose", "video"))
        for name, value in video.items():
            temporal = name.startswith("blocks.") and int(name.split(".")[1]) % 2 == 1
            if temporal:  # an image has no time: these wait for the video phase
                assert torch.equal(pose[name], base[name])
            else:  # and in the video phase nothing else moves
                assert torch.equal(value, pose[name]), name
        assert not torch.equal(subject["blocks.0.qkv.weight"], pose["blocks.0.qkv.weight"])
        assert any(not torch.equal(video[n], pose[n]) for n in video)
        scored = [s.name for s in (out / "video" / strategy).glob("scores/*.json")]
        assert bool(scored) == (strategy == "ent-prog")
    assert set(results["evaluation"]["test"]) == {"full", "ent-prog"}
    page = write_report(out).read_text()
    for text in ("Unseen people", "ent-prog", "copy reference", "subject", "pose", "video", "recipe.yaml"):
        assert text in page
    assert (out / "pose" / "report.html").exists() and "http://" not in page
    before = json.loads((out / "results.json").read_text())
    assert run_recipe(recipe, out)["evaluation"] == before["evaluation"]  # the same call resumes, here after the end
    with pytest.raises(ValueError, match="another recipe"):
        run_recipe(tiny(folder, seed=1), out)
