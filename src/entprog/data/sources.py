"""Which videos there are, whom each one shows, and who is kept for testing: splits by person, never by clip."""

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")

_POSE_FOLDER = re.compile(r"(^|_)(dwpose|pose|poses|openpose)$")  # ready pose videos beside the videos


@dataclass(frozen=True)
class Source:
    """A video file: `name` is its path below the common folder, without the suffix."""

    path: Path
    name: str
    subject: str
    split: str


def find_videos(videos: str | Path | Sequence[str | Path]) -> dict[str, Path]:
    """Return the video files by name, sorted: a folder with subfolders, a list, or a JSON file.

    The JSON file is Moore-AnimateAnyone's [{"video_path": ..., "kps_path": ...}, ...]; its ready pose videos and
    folders named *_dwpose hold pictures of poses, not keypoints, and are left out: keypoints are found anew. (To train
    from ready pose videos as they are, write the manifest that entprog.data.video reads.) Names are paths relative to
    the common folder, without suffix. ValueError if there is no video or two have one name.
    """
    if isinstance(videos, str | Path):
        place = Path(videos)
        paths = _listed(place) if place.suffix == ".json" else _inside(place) if place.is_dir() else [place]
    else:
        paths = [Path(video) for video in videos]
    if not paths:
        raise ValueError(
            f"{videos} holds no video: give a folder with {', '.join(VIDEO_SUFFIXES)} files, or a list "
            "(folders named like *_pose are left out)"
        )
    root = Path(videos) if isinstance(videos, str | Path) and Path(videos).is_dir() else _common(paths)
    named: dict[str, Path] = {}
    for path in sorted(paths):
        name = Path(os.path.relpath(path, root)).with_suffix("").as_posix()
        if name in named:
            raise ValueError(f"{named[name]} and {path} would have the same name {name!r}: rename one")
        named[name] = path
    return named


def _inside(folder: Path) -> list[Path]:
    return [path for path, poses in _with_pose_folder(folder) if poses is None]


def _with_pose_folder(folder: Path) -> Iterator[tuple[Path, Path | None]]:
    """Yield every video below a folder, and its relative folder whose name says that it holds pose videos, or None."""
    for path in folder.rglob("*"):
        if path.suffix.lower() in VIDEO_SUFFIXES:
            above = reversed(path.relative_to(folder).parents)
            yield path, next((p for p in above if _POSE_FOLDER.search(p.name)), None)


def pose_folders(videos: str | Path | Sequence[str | Path]) -> list[str]:
    """Return the folders, relative to `videos`, that `find_videos` leaves out for their names alone.

    One that lies beside the folder of its videos, as x_dwpose beside x, is not among them.
    """
    if not isinstance(videos, str | Path) or not Path(videos).is_dir():
        return []
    found = {poses for _, poses in _with_pose_folder(Path(videos)) if poses is not None}
    of = {poses: _POSE_FOLDER.sub("", poses.name) for poses in found}
    beside = {poses for poses, name in of.items() if name and (Path(videos) / poses.parent / name).is_dir()}
    return sorted(poses.as_posix() for poses in found - beside)


def _listed(path: Path) -> list[Path]:
    try:
        return [path.parent / record["video_path"] for record in json.loads(path.read_text(encoding="utf-8"))]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path} is no list of {{"video_path": ...}}: {error!r}') from error


def _common(paths: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([path.absolute().parent for path in paths]))


def find_subjects(named: Mapping[str, Path], subject: str | Path | Mapping[str, str] = "video") -> dict[str, str]:
    """Return whom each video shows.

    `subject` is "video" (every video shows another person), "folder" (the parent folder is the person), a mapping
    from name or file name to person, a JSON or CSV file (two columns) with that mapping, or a regular expression with
    one group that is searched in the name, such as r"(\\w+)_cam". ValueError for anything else, for a video
    without a person, and for a file name in the mapping that several videos have.
    """
    if isinstance(subject, Mapping):
        mapping = dict(subject)
    elif subject == "video":
        return {name: name for name in named}
    elif subject == "folder":
        return {name: path.absolute().parent.name for name, path in named.items()}
    elif str(subject).endswith((".json", ".csv")):
        mapping = _read_mapping(Path(subject))
    else:
        mapping = _matched(named, str(subject))
    found, aliases = {}, _aliases(named)
    mapping = {key: str(who) for key, who in mapping.items() if who not in (None, "")}  # they name nobody
    for name, path in named.items():
        keys = [key for key in (name, path.name, path.stem) if key in mapping and name in aliases[key]]
        if not keys:
            raise ValueError(f"video {name!r} has no person in {subject}: add it, or choose 'video' or 'folder'")
        _only(keys[0], aliases)
        found[name] = mapping[keys[0]]
    return found


def _aliases(named: Mapping[str, Path]) -> dict[str, list[str]]:
    """Return the videos that a name means: a full name its own, a file name with or without suffix all that have it."""
    found: dict[str, list[str]] = {}
    for name, path in named.items():
        for alias in {path.name, path.stem}:
            found.setdefault(alias, []).append(name)
    return found | {name: [name] for name in named}


def _only(alias: str, aliases: Mapping[str, Sequence[str]]) -> str:
    """Return the one video that a name means; ValueError naming them if there are several."""
    if len(fits := aliases[alias]) > 1:
        raise ValueError(f"{alias!r} is the file name of {len(fits)} videos: write one of {sorted(fits)[:20]} instead")
    return fits[0]


def videos_called(named: Mapping[str, Path], called: Sequence[str]) -> set[str]:
    """Return the names of the videos meant by names or file names; ValueError for one that several videos have."""
    aliases = _aliases(named)
    return {_only(alias, aliases) for alias in called}


def _read_mapping(path: Path) -> dict[str, str]:
    text = path.read_text(encoding="utf-8-sig")  # spreadsheets begin a file with a byte order mark
    try:
        if path.suffix == ".json":
            return dict(json.loads(text))
        rows = csv.reader(text.splitlines(), skipinitialspace=True)
        return {video.strip(): who.strip() for video, who in rows}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not map videos to persons, two columns or a JSON object: {error}") from error


def _matched(named: Mapping[str, Path], pattern: str) -> dict[str, str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"subject {pattern!r} is no regular expression ({error}), nor 'video', nor 'folder'"
        ) from error
    if expression.groups != 1:
        message = f"subject {pattern!r} has {expression.groups} groups, the one group is the person: try r'^(\\w+?)_'"
        raise ValueError(f"{message}; or choose 'video', 'folder', or a .json or .csv file")
    found = {name: expression.search(name) for name in named}
    return {name: match[1] for name, match in found.items() if match}


def _order(subject: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}\t{subject}".encode()).hexdigest()


def split_sources(
    named: Mapping[str, Path],
    subjects: Mapping[str, str],
    *,
    test_share: float = 0.1,
    test_subjects: Sequence[str] = (),
    test_videos: Sequence[str] = (),
    seed: int = 0,
) -> tuple[list[Source], list[str]]:
    """Put every person into "train" or "test"; returns the sources and warnings.

    `test_subjects` names the people to test on, `test_videos` videos (names or file names); without either, the
    `test_share` of the people (at least one, never all) that a hash of the seed orders first. All videos of a person
    go together, except by `test_videos`, which is for a single person: then a warning says who is on both sides.
    ValueError for a share outside [0, 1), an unknown person or video, a file name that several videos have, and if no
    one is left to train on.
    """
    if not 0 <= test_share < 1:
        raise ValueError(f"test_share is {test_share}, a share of the people lies in [0, 1)")
    people = sorted(set(subjects.values()), key=lambda s: _order(s, seed))
    files = _aliases(named)
    for wanted, known in ((test_subjects, set(people)), (test_videos, set(files))):
        if unknown := sorted(set(wanted) - known):
            raise ValueError(f"{unknown} cannot be tested on: choose among {sorted(known)[:20]}")
    warnings = []
    chosen, videos = set(test_subjects), videos_called(named, test_videos)
    if not chosen and not videos and test_share:
        if len(people) == 1:
            warnings.append(f"the only subject is {people[0]!r}, so there is no test split: pass test_videos for one")
        chosen = set(people[: min(len(people) - 1, max(1, round(test_share * len(people))))])
    splits = {n: "test" if n in videos or subjects[n] in chosen else "train" for n in named}
    if "train" not in splits.values():
        raise ValueError(f"all of {sorted(splits)[:20]} are for testing: leave some to train on")
    shared = {subjects[n] for n in named if splits[n] == "test"} & {subjects[n] for n in named if splits[n] == "train"}
    if shared:
        warnings.append(f"subjects are shared between train and test: {sorted(shared)}")
    return [Source(path, name, subjects[name], splits[name]) for name, path in named.items()], warnings
