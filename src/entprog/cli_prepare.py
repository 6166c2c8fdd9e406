"""entprog prepare: people rendered, videos cut and posed, data encoded for a model."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entprog.tables import console, progress_bar

# What both sources take, unless it is given; what only one of them takes has no default here.
_DEFAULTS: dict[str, Any] = {"size": 64, "frames": 16, "fps": 10.0, "seed": 0}
_OF_VIDEOS = ("aspects", "subject", "test_subjects", "test_videos", "flips", "face_size", "dwpose")
_OF_RENDERED = ("clips_per_person",)


def _given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def _refuse(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """ValueError for options that would do nothing here."""
    if given := [f"--{name.replace('_', '-')}" for name in _given(args, names)]:
        raise ValueError(f"{', '.join(given)} would do nothing: {why}")


def _prepare(args: argparse.Namespace) -> None:
    if not args.model:
        _refuse(args, ["caption"], "captions are encoded for a pipeline, add --model DIR or leave it out")
    if args.model and not args.out:
        _refuse(args, [*_DEFAULTS, *_OF_VIDEOS, *_OF_RENDERED, "rendered", "autoencoder"],
                "without --out, --model encodes the clips that DATA holds")  # fmt: skip
        _encode(args, args.videos)
        return
    if not args.out:
        raise ValueError("entprog prepare needs --out DATA, or --model DIR and a data folder that is there already")
    if bool(args.videos) == (args.rendered is not None):
        raise ValueError("entprog prepare takes either videos or --rendered N: one of them")
    if args.rendered is not None and args.rendered < 1:
        raise ValueError(f"--rendered {args.rendered}: choose at least 1 person")
    both = _DEFAULTS | _given(args, list(_DEFAULTS))
    with progress_bar() as show:
        if args.rendered:
            from entprog.data.rendered import render_people

            _refuse(args, _OF_VIDEOS, "rendered people know their poses, shapes and splits, it is for videos")
            unseen = max(2, args.rendered // 10)
            people = {"train": args.rendered, "test": unseen, "hard": unseen}
            render_people(
                people, args.out, **both, **_given(args, _OF_RENDERED),
                on_progress=lambda done, total: show({"run": "rendering", "done": done, "of": total}),
            )  # fmt: skip
        else:
            from entprog.data.dwpose import DWPose
            from entprog.data.prepare import prepare_videos

            _refuse(args, _OF_RENDERED, "it is for --rendered, a video gives the clips that it holds")
            found = prepare_videos(
                args.videos if len(args.videos) > 1 else args.videos[0],
                args.out,
                **both,
                **_given(args, [name for name in _OF_VIDEOS if name != "dwpose"]),
                tracker=DWPose(args.dwpose) if args.dwpose else None,
                on_progress=lambda done, total, name: show({"run": "videos", "done": done, "of": total, "at": name}),
            )
            console.print(f"clips: {found['clips']}", markup=False)
            left_out = [f"{count} windows left out: {reason}" for reason, count in found["left_out"].items()]
            for message in (*found["warnings"], *left_out, *(f"{e['video']}: {e['error']}" for e in found["errors"])):
                console.print(message, style="yellow", markup=False)
        if args.autoencoder:
            _cache_latents(args, show)
    console.print(f"data: {args.out}", markup=False)
    if args.model:
        _encode(args, [args.out])


def _encode(args: argparse.Namespace, folders: Sequence[str]) -> None:
    """Make what a pipeline folder needs of prepared data."""
    from entprog.data.encode import encode

    if len(folders) != 1:
        raise ValueError(f"entprog prepare --model encodes one prepared data folder, not {list(folders)}")
    with progress_bar() as show:
        cache = encode(
            folders[0], args.model, args.caption,
            on_progress=lambda share: show({"run": "encoding", "done": share, "of": 1}),
        )  # fmt: skip
    console.print(f"encoded for {args.model}: {Path(folders[0]) / cache}", markup=False)


def _cache_latents(args: argparse.Namespace, show: Any) -> None:
    from entprog.data.cache import load_split
    from entprog.data.prepared import SPLITS, Prepared
    from entprog.models.autoencoder import Autoencoder

    autoencoder = Autoencoder(args.autoencoder)
    for split in SPLITS:
        try:
            Prepared(args.out, split)
        except ValueError:
            continue  # no clips in it
        load_split(args.out, split, autoencoder, lambda share: show({"run": "encoding", "done": share, "of": 1}))


def add_prepare(commands: Any) -> None:
    """Add the command and its arguments to a parser's commands."""
    prepare = commands.add_parser("prepare", help="render people, or cut, pose and crop videos, into a data folder")
    prepare.add_argument("videos", nargs="*", help="video files or one folder of them; with --model, DATA")
    prepare.add_argument("--rendered", type=int, metavar="N", help="render N people, and a tenth more for each test")
    prepare.add_argument("--out", help="data folder; the same command resumes")
    prepare.add_argument("--size", type=int, help=f"pixels of a side (default: {_DEFAULTS['size']})")
    prepare.add_argument("--frames", type=int, help=f"frames of a clip (default: {_DEFAULTS['frames']})")
    prepare.add_argument("--fps", type=float, help=f"frames a second (default: {_DEFAULTS['fps']:g})")
    prepare.add_argument("--seed", type=int, help="of the people, or of who is kept for testing (default: 0)")
    prepare.add_argument("--clips-per-person", type=int, help="with --rendered (default: 4)")
    prepare.add_argument("--aspects", nargs="+", help="shapes of the crops, e.g. 1:1 3:4 9:16 (default: 1:1)")
    prepare.add_argument("--subject", help="video (default), folder, a pattern or a .json/.csv file: who is who")
    prepare.add_argument("--test-subjects", nargs="*", help="people kept for testing")
    prepare.add_argument("--test-videos", nargs="*", help="views kept for testing where people are few")
    prepare.add_argument(
        "--flips", action="store_true", default=None, help="each training clip a second time, mirrored"
    )
    prepare.add_argument("--face-size", type=int, help="pixels of face crops (default: none)")
    prepare.add_argument("--dwpose", metavar="DIR", help="pose by DWPose's two ONNX files, which lie in DIR")
    prepare.add_argument("--autoencoder", help="make its latents now: taef2, taef2-people, or a folder of "
                         "diffusers")  # fmt: skip
    prepare.add_argument("--model", help="folder of a diffusers pipeline: encode for it, DATA if there is no --out")
    prepare.add_argument("--caption", help="prompt of every clip for --model (default: each clip's in the manifest)")
    prepare.set_defaults(function=_prepare)
