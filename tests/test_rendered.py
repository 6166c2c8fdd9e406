"""Rendered people: the same for a seed, resumable, people and motions apart by split, labels that agree with pixels."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from entprog.data import body as body_module
from entprog.data import motions
from entprog.data.body import Body, make_body, moved
from entprog.data.pose import COCO17
from entprog.data.prepared import LABELS, Prepared
from entprog.data.rendered import Person, make_person, render_clip, render_people
from entprog.data.renderer import Camera, Renderer

pytest.importorskip("moderngl", reason="rendering people needs entprog[people]")
pytest.importorskip("pybullet_data", reason="rendering people needs entprog[people]")
if importlib.util.find_spec("anny") is None:  # importing it takes seconds
    pytest.skip("rendering people needs entprog[people]", allow_module_level=True)

PEOPLE = {"train": 2, "test": 1, "hard": 1}
SETTINGS = {"size": 48, "frames": 4, "fps": 8, "clips_per_person": 2, "seed": 3}
NAMES = ["video", "keypoints", "labels", "reference", "reference_keypoints", "reference_labels"]


@pytest.fixture(scope="module")
def renderer():
    try:
        made = Renderer(48, supersample=4)
    except RuntimeError as error:
        pytest.skip(str(error))
    with made:
        yield made


@pytest.fixture(scope="module")
def folder(renderer: Renderer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_people(PEOPLE, tmp_path_factory.mktemp("people"), **SETTINGS)


@pytest.fixture(scope="module")
def person() -> Person:
    return make_person(3, 0)


@pytest.fixture(scope="module")
def standing(person: Person) -> Body:
    return make_body(person.phenotype)


def every_clip(folder: Path, split: str) -> dict[str, torch.Tensor]:
    data = Prepared(folder, split)
    return data.rows(range(len(data)), NAMES)


def test_a_clip_depends_on_its_seed_and_number_alone(folder, renderer, person, standing):
    renderer.wear(standing, person.look)
    again = render_clip(renderer, standing, person, 1, split="train", frames=4, fps=8, seed=3)
    data = Prepared(folder, "train")
    row = [r["id"] for r in data.records].index(again.id)
    saved = data.rows([row], NAMES)
    for name, value in again.tensors().items():
        assert torch.equal(saved[name][0], value), name
    assert data.records[row]["motion"] == again.about["motion"]


def test_an_interrupted_run_goes_on_and_grows(folder, tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    few = {"train": 1, "test": 1, "hard": 1}
    with pytest.raises(KeyboardInterrupt):
        render_people(few, tmp_path, **SETTINGS, on_progress=interrupt)
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "shards").iterdir()}
    calls: list[tuple[int, int]] = []
    render_people(PEOPLE, tmp_path, **SETTINGS, on_progress=lambda *now: calls.append(now))
    assert calls == [(4, 8), (5, 8), (6, 8), (7, 8), (8, 8)]
    assert all((tmp_path / "shards" / name).stat().st_mtime_ns == time for name, time in kept.items())
    one, other = Prepared(folder, "train"), Prepared(tmp_path, "train")
    assert [r["id"] for r in one.records] == [r["id"] for r in other.records]
    assert one.about == other.about
    assert torch.equal(every_clip(folder, "train")["video"], every_clip(tmp_path, "train")["video"])
    with pytest.raises(ValueError, match="choose another"):
        render_people(PEOPLE, tmp_path, **SETTINGS | {"seed": 4})


def test_splits_share_no_person_and_hard_has_motions_of_its_own(folder):
    records = {split: Prepared(folder, split).records for split in PEOPLE}
    people = {split: {r["subject_id"] for r in lines} for split, lines in records.items()}
    assert {split: len(names) for split, names in people.items()} == PEOPLE
    assert len(set.union(*people.values())) == sum(PEOPLE.values())
    for split, lines in records.items():
        for record in lines:
            parts = [record["motion"], record["reference_motion"]]
            used = {part[key]["motion"] for part in parts for key in ("body", "arms") if key in part}
            assert {name in motions.HELD_OUT for name in used} == {split == "hard"}


def test_labels_and_keypoints_agree_with_the_picture(folder):
    on_person = hidden = on_face = noses = 0
    for split in PEOPLE:
        clips = every_clip(folder, split)
        points = torch.cat((clips["keypoints"].flatten(0, 1), clips["reference_keypoints"]))
        labels = torch.cat((clips["labels"].flatten(0, 1), clips["reference_labels"]))
        assert set(labels.unique().tolist()) <= set(LABELS.values()) - {LABELS["person"]}
        assert ((points[..., :2] > 0) & (points[..., :2] < 48)).all(), "the whole person is in the frame"
        assert set(points[..., 2].unique().tolist()) <= {0.5, 1.0}
        for frame, shown in zip(points, labels, strict=True):
            for name, (x, y, visible) in zip(COCO17, frame.tolist(), strict=True):
                near = shown[max(0, int(y) - 1) : int(y) + 2, max(0, int(x) - 1) : int(x) + 2]
                on_person, hidden = on_person + int((near > 0).any()), hidden + (visible < 1)
                if name == "nose" and visible == 1:
                    noses += 1
                    on_face += int((near == LABELS["face"]).any())
            assert {LABELS["top"], LABELS["bottom"]} <= set(shown.unique().tolist())
    total = 17 * sum(PEOPLE.values()) * 2 * 5
    assert on_person >= 0.98 * total
    assert 0 < hidden < 0.6 * total
    assert on_face >= 0.9 * noses > 0


def test_the_person_fills_the_frame_and_the_reference_differs(folder):
    clips = every_clip(folder, "train")
    for labels in clips["labels"].flatten(0, 1):
        rows = (labels > 0).any(1).nonzero()
        assert len(rows) > 0.3 * 48
    change = (clips["reference"][:, None].float() - clips["video"].float()).abs().mean((1, 2, 3, 4))
    assert (change > 2).all(), "another pose of the person"
    assert (clips["video"].float().mean((1, 2, 3, 4)) > 40).all(), "no dark clip"


def test_left_is_on_the_right_of_a_frame_seen_from_the_front(standing):
    camera = Camera(np.array([0, -4.0, 0.2]), np.array([0, 0, 0.2]), 40.0)
    seen = camera.see(standing.keypoints_at_rest)
    assert np.abs(seen[:, :2]).max() < 1
    for left, right in zip(range(1, 17, 2), range(2, 17, 2), strict=True):
        assert COCO17[left].startswith("left") and seen[left, 0] > 0 > seen[right, 0]


def test_carried_keypoints_equal_the_regressors_of_the_skinned_mesh(standing):
    transforms = standing.pose(motions.sample_motion("dance_a", np.array([0.3, 1.0])))
    mesh = standing.skin(transforms, np.arange(len(standing.vertices)))
    expected = np.einsum("pv,nvi->npi", standing.template.coco, mesh)
    assert np.allclose(standing.keypoints(transforms), expected, atol=1e-5)
    turned = moved(transforms, np.pi / 2, np.array([1.0, 0, 0]))
    quarter = np.stack((1 - expected[..., 1], expected[..., 0], expected[..., 2]), axis=-1)
    assert np.allclose(standing.keypoints(turned), quarter, atol=1e-5)


def test_a_mirrored_motion_is_the_mirror_image(standing):
    motion = motions.sample_motion("punch", np.linspace(0, 2, 5))
    back = motions.mirrored(motions.mirrored(motion))
    assert np.allclose(back.rotations, motion.rotations) and np.allclose(back.root, motion.root)
    one, other = (standing.keypoints(standing.pose(m)) for m in (motion, motions.mirrored(motion)))
    swap = [COCO17.index(motions._other_side(name)) for name in COCO17]
    assert np.abs(one[:, swap] * np.array([-1, 1, 1]) - other).max() < 0.02  # a body is not quite symmetric


def test_motions_go_on_without_a_jump():
    for name in motions.UPRIGHT + motions.FLOOR:
        length = motions.duration(name)
        motion = motions.sample_motion(name, np.array([length - 1e-3, length + 1e-3]))
        turn = np.abs((motion.rotations[0] * motion.rotations[1]).sum(-1))
        assert turn.min() > 0.995, name
        assert np.linalg.norm(motion.root[0] - motion.root[1]) < 0.05, name


def test_mixed_motions_keep_the_legs_and_swings_move_only_arms_and_neck():
    rng, times = np.random.default_rng(0), np.arange(6) / 8
    lower, upper = (motions.sample_motion(name, times) for name in ("walk", "dance_a"))
    both = motions.swung(motions.mixed(lower, upper), times, rng, 1.0)
    legs = [i for i, n in enumerate(motions.LINKS) if n.endswith(("hip", "knee", "ankle")) or n == "root"]
    assert np.array_equal(both.rotations[:, legs], lower.rotations[:, legs])
    chest = motions.LINKS.index("chest")
    assert np.array_equal(both.rotations[:, chest], upper.rotations[:, chest])
    assert np.allclose(np.linalg.norm(both.rotations, axis=-1), 1)


def test_people_differ(person):
    others = [make_person(3, number) for number in range(40)]
    assert others[0].look.top == person.look.top
    assert len({p.look.top[0] for p in others}) == 40
    assert {p.look.leg for p in others} == {"trousers", "shorts", "skirt"}
    ages = [p.phenotype["age"] for p in others]
    assert min(ages) < 0.5 < max(ages)


def test_what_is_wrong_is_said(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="choose one of"):
        motions.sample_motion("moonwalk", np.zeros(1))
    with pytest.raises(ValueError, match="split 'val' is unknown"):
        render_people({"val": 1}, tmp_path)
    with pytest.raises(ValueError, match="above 0"):
        render_people({"train": 1}, tmp_path, frames=0)
    for module in (motions, body_module):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    for needs in (motions._folder, body_module.package_folder):
        with pytest.raises(ImportError, match=r"pip install -e '\.\[people\]'"):
            needs()
