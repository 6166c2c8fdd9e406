"""Which videos there are, whom they show, and who is kept for testing."""

import json
from pathlib import Path

import pytest

from entprog.data.sources import find_subjects, find_videos, split_sources


def test_layouts_of_videos_and_people_are_understood(tmp_path: Path) -> None:
    for name in ("x/a.mp4", "x/b.MOV", "x_dwpose/a.mp4", "y/a.mp4", "y/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    named = find_videos(tmp_path)
    assert list(named) == ["x/a", "x/b", "y/a"]
    (tmp_path / "list.json").write_text(json.dumps([{"video_path": "x/a.mp4", "kps_path": "x_dwpose/a.mp4"}]))
    assert list(find_videos(tmp_path / "list.json")) == ["a"]
    assert find_subjects(named, "folder") == {"x/a": "x", "x/b": "x", "y/a": "y"}
    (tmp_path / "who.csv").write_text("x/a,ann\nb.MOV,bob\ny/a,cleo\n")
    (tmp_path / "who.json").write_text(json.dumps({"x/a": "ann", "b": "bob", "y/a": "cleo"}))
    for file in ("who.csv", "who.json"):
        assert list(find_subjects(named, tmp_path / file).values()) == ["ann", "bob", "cleo"]
    (tmp_path / "bad.json").write_text("[1]")
    for call in (lambda: find_subjects(named, tmp_path / "bad.json"), lambda: find_videos(tmp_path / "bad.json"),
                 lambda: find_videos([]), lambda: find_subjects(named, "(")):  # fmt: skip
        with pytest.raises(ValueError):
            call()


def test_subjects_are_read_as_spreadsheets_write_them_and_nobody_is_called_none(tmp_path: Path) -> None:
    named = {name: Path(f"{name}.mp4") for name in ("a", "b")}
    (tmp_path / "who.csv").write_text('\ufeffa, ann\r\n b ,"bob "\r\n', encoding="utf-8")
    assert find_subjects(named, tmp_path / "who.csv") == {"a": "ann", "b": "bob"}
    for subject in (r"^a(.*)$|b", r"a|(b)", {"a": None, "b": "bob"}):
        with pytest.raises(ValueError, match="'a' has no person"):
            find_subjects(named, subject)  # type: ignore[arg-type]


def test_a_file_name_of_several_videos_is_refused_and_a_full_name_is_its_own() -> None:
    named = {n: Path(f"{n}.mp4") for n in ("ann/cam1", "bob/cam1", "bob/cam2", "cam2")}
    subjects = {name: name for name in named}
    for alias in ("cam1", "cam1.mp4"):
        with pytest.raises(ValueError, match=r"'ann/cam1', 'bob/cam1'"):
            split_sources(named, subjects, test_videos=[alias])
        with pytest.raises(ValueError, match=r"'ann/cam1', 'bob/cam1'"):
            find_subjects(named, {alias: "ann", "bob/cam2": "bob", "cam2": "cleo"})
    sources, _ = split_sources(named, subjects, test_videos=["bob/cam1", "cam2"])
    assert [s.name for s in sources if s.split == "test"] == ["bob/cam1", "cam2"]
    whole = {"ann/cam1": "ann", "bob/cam1": "bob", "cam2": "cleo"}
    assert find_subjects(named, whole | {"bob/cam2": "bob"})["cam2"] == "cleo"
    with pytest.raises(ValueError, match="'bob/cam2' has no person"):
        find_subjects(named, whole)  # cam2 is another video


def test_the_split_keeps_people_together_and_never_tests_on_all() -> None:
    named = {f"{p}{v}": Path(f"{p}{v}.mp4") for p in "abcdefghij" for v in "12"}
    subjects = {name: name[0] for name in named}
    for share in (0.01, 0.3, 0.99):
        sources, warnings = split_sources(named, subjects, test_share=share)
        sides = {side: {s.subject for s in sources if s.split == side} for side in ("train", "test")}
        assert not warnings and not sides["train"] & sides["test"]
        assert len(sides["test"]) == max(1, min(9, round(share * 10)))
    assert split_sources(named, subjects, test_share=0.3) == split_sources(named, subjects, test_share=0.3)
    assert split_sources(named, subjects, seed=1) != split_sources(named, subjects, seed=0)
    _, warnings = split_sources({"a": Path("a.mp4")}, {"a": "a"})
    assert "only subject" in warnings[0]
