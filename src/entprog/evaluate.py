"""Score generated videos against the clips of a prepared data set, with baselines, intervals and a stated protocol.

    result = evaluate(load_videos("samples"), Prepared("data", "test"), estimate=detector)
    json.dump(result, open("scores.json", "w"))
    compare(result, other)          # paired differences of two generators on the same clips

Anybody's generator can be scored: a folder of ID.mp4 is enough. A new metric is one function of a `Shown` and one row
in GROUPS. Letters: N clips, F frames, H, W pixels.
"""

import base64
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from entprog.data.detect import PoseEstimator
from entprog.data.movenet import MoveNet
from entprog.data.prepared import Prepared, shape_groups
from entprog.data.video import decode
from entprog.metrics import adherence, frechet, identity
from entprog.metrics.frame import l1, psnr, ssim
from entprog.metrics.lpips import BACKBONES, load_lpips, lpips
from entprog.metrics.lpips import PACKAGE as LPIPS_PACKAGE
from entprog.metrics.protocol import bootstrap_interval

PROTOCOL = "entprog-evaluate-v1"
NETWORKS = ("alex", "vgg", "i3d", "face")
ESTIMATORS: dict[str, Callable[[], Any]] = {"movenet": MoveNet, "blazepose": PoseEstimator}
PSNR_CAP = 100.0  # dB of equal frames, whose PSNR is infinite
SAME_FACE = 0.6  # dlib's threshold
_RESAMPLES = 2000
_FVD_RESAMPLES = 300  # each one is a distance of its own

Estimate = Callable[[Tensor], Tensor]  # frames (F, 3, H, W) uint8 -> COCO-17 keypoints (F, 17, 3), NaN: not found


@dataclass(frozen=True)
class Shown:
    """A video (F, 3, H, W) uint8 beside the prepared clip it should show, and what was measured beforehand.

    `own` and `other` are region colours (R, 3) of the clip's reference and of another person's; `keypoints` (F, 17, 3)
    and `reference_faces` are what the networks found, None without them.
    """

    video: Tensor
    clip: Mapping[str, Tensor]
    own: Tensor
    other: Tensor | None
    keypoints: Tensor | None
    reference_faces: identity.Faces | None
    device: str

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return the video and the truth in [0, 1], float64."""
        return self.video.double() / 255, self.clip["video"].double() / 255


def frame_scores(shown: Shown) -> dict[str, float]:
    """PSNR (equal frames count as PSNR_CAP dB), SSIM and mean absolute difference, averaged over frames."""
    a, b = shown.pair()
    decibel = psnr(a, b).clamp(max=PSNR_CAP)
    return {"psnr": decibel.mean().item(), "ssim": ssim(a, b).mean().item(), "l1": l1(a, b).mean().item()}


def lpips_alex(shown: Shown) -> dict[str, float]:
    """LPIPS with AlexNet, averaged over frames."""
    return {"lpips[alex]": lpips(*shown.pair(), "alex", device=shown.device).mean().item()}


def lpips_vgg(shown: Shown) -> dict[str, float]:
    """LPIPS with VGG16, averaged over frames."""
    return {"lpips[vgg]": lpips(*shown.pair(), "vgg", device=shown.device).mean().item()}


def pose_scores(shown: Shown) -> dict[str, float]:
    """Keypoints found on the video against the driving ones; the person's area is exact where garments are labelled."""
    assert shown.keypoints is not None
    labels, driving = shown.clip["labels"], shown.clip["keypoints"]
    area = (labels > 0).sum((1, 2))
    return {
        "pck@0.1": adherence.pck(shown.keypoints, driving),
        "oks": adherence.oks(shown.keypoints, driving, area if (area > 0).all() else None),
        "keypoint_error": adherence.keypoint_error(shown.keypoints, driving),
    }


def appearance_scores(shown: Shown) -> dict[str, float]:
    """Colours inside the true clip's masks against the reference's, and whether another person's are farther."""
    colours = adherence.region_colours(shown.video.double() / 255, shown.clip["labels"])
    nearer = math.nan if shown.other is None else adherence.nearer_to_own(colours, shown.own, shown.other)
    return {"appearance_distance": adherence.colour_distance(colours, shown.own), "nearer_to_own": nearer}


def face_scores(shown: Shown) -> dict[str, float]:
    """Distance of the video's faces to the reference's, and how many were looked for, found and too small."""
    assert shown.reference_faces is not None
    faces = identity.find_faces(shown.video, shown.clip["labels"])
    distance = identity.face_distance(faces, shown.reference_faces)
    same = math.nan if math.isnan(distance) else float(distance < SAME_FACE)
    counts = {"looked": faces.looked, "found": len(faces.descriptors), "small": faces.small}
    counts["in_reference"] = len(shown.reference_faces.descriptors)
    return {"face_distance": distance, "same_face": same, **{f"faces_{k}": v for k, v in counts.items()}}


def steadiness_scores(shown: Shown) -> dict[str, float]:
    """Flicker of everything and of the background, drift of the colours: all beyond the truth's own, 0 is like it."""
    pair, labels = shown.pair(), shown.clip["labels"]
    return {
        "flicker": adherence.flicker(*pair),
        "background_flicker": adherence.background_flicker(*pair, labels),
        "colour_drift": adherence.colour_drift(*pair, labels),
    }


class Group(NamedTuple):
    """Scores that are measured together: the function, what of `networks` or "estimate" it needs, and whether the
    true videos are scored as well, because what measures them errs too (the floor)."""

    score: Callable[[Shown], dict[str, float]]
    needs: str | None = None
    floor: bool = False


GROUPS = {
    "frames": Group(frame_scores),
    "lpips[alex]": Group(lpips_alex, "alex"),
    "lpips[vgg]": Group(lpips_vgg, "vgg"),
    "pose": Group(pose_scores, "estimate", floor=True),
    "appearance": Group(appearance_scores, floor=True),
    "face": Group(face_scores, "face", floor=True),
    "steadiness": Group(steadiness_scores),
}

# Which way is better: 1 up, -1 down, 0 nearer to zero.
BETTER = {
    "psnr": 1, "ssim": 1, "l1": -1, "lpips[alex]": -1, "lpips[vgg]": -1, "pck@0.1": 1, "oks": 1, "keypoint_error": -1,
    "appearance_distance": -1, "nearer_to_own": 1, "face_distance": -1, "same_face": 1, "flicker": 0,
    "background_flicker": 0, "colour_drift": 0,
}  # fmt: skip


def load_videos(folder: str | Path) -> dict[str, Tensor]:
    """Read the ID.mp4 files of a folder as ID -> uint8 (F, 3, H, W), at their own size.

    ValueError for a folder without any and for a file that cannot be decoded.
    """
    paths = sorted(Path(folder).rglob("*.mp4"))
    if not paths:
        raise ValueError(f"{folder} holds no .mp4 file: write one a clip, named by the clip's id")
    return {path.relative_to(folder).with_suffix("").as_posix(): decode(path) for path in paths}


def _check_videos(videos: Mapping[str, Tensor], data: Prepared) -> None:
    """Refuse videos that are missing, unknown or of the wrong shape or type, by id."""
    wanted = {r["id"]: (r["frames"], 3, r["height"], r["width"]) for r in data.records}
    problems = []
    for what, ids in (("missing", wanted.keys() - videos.keys()), ("not in the split", videos.keys() - wanted.keys())):
        if ids:
            problems.append(f"{len(ids)} {what}: {', '.join(sorted(ids)[:10])}{' ...' if len(ids) > 10 else ''}")
    for name in sorted(wanted.keys() & videos.keys()):
        if tuple(videos[name].shape) != wanted[name] or videos[name].dtype != torch.uint8:
            got = f"{tuple(videos[name].shape)} {videos[name].dtype}"
            problems.append(f"{name} is {got}, its clip {wanted[name]} torch.uint8")
    if problems:
        raise ValueError(f"the videos do not fit split {data.split!r}: {'; '.join(problems[:10])}")


def _partners(records: Sequence[Mapping[str, Any]]) -> list[int | None]:
    """The clip half a round away among those of the same shape, None for a clip that is alone."""
    partners: list[int | None] = [None] * len(records)
    for group in shape_groups(records):
        for place, i in enumerate(group):
            partners[i] = group[(place + len(group) // 2) % len(group)] if len(group) > 1 else None
    return partners


def _others(records: Sequence[Mapping[str, Any]]) -> list[int | None]:
    """A random clip of another person for each clip, the same at every call; None where there is no other person."""
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0)).tolist()
    others: list[int | None] = []
    for place, i in enumerate(order):
        turned = order[place + 1 :] + order[:place]
        others.append(next((j for j in turned if records[j]["subject_id"] != records[i]["subject_id"]), None))
    return [others[order.index(i)] for i in range(len(records))]


def _reference_colours(data: Prepared, index: int) -> Tensor:
    read = data.rows([index], ("reference", "reference_labels"))
    return adherence.region_colours(read["reference"].double() / 255, read["reference_labels"])


def _summary(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and bootstrap interval over the clips that have a value, and how many those are."""
    kept = torch.tensor([v for v in values if v is not None], dtype=torch.float64)
    if not len(kept):
        return {"mean": None, "low": None, "high": None, "clips": 0}
    low, high = bootstrap_interval(kept, resamples=_RESAMPLES)
    return {"mean": kept.mean().item(), "low": low, "high": high, "clips": len(kept)}


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Paired differences a - b of two rows, and the share of clips on which a is better (ties count half)."""
    result = {}
    for name, sign in BETTER.items():
        if name not in a["per_clip"] or name not in b["per_clip"]:
            continue
        pairs = zip(a["per_clip"][name], b["per_clip"][name], strict=True)
        both = [(x, y) for x, y in pairs if x is not None and y is not None]
        gains = [sign * (x - y) if sign else abs(y) - abs(x) for x, y in both]
        won = sum(0.5 if gain == 0 else float(gain > 0) for gain in gains) / len(both) if both else None
        result[name] = _summary([x - y for x, y in both]) | {"better_on": won}
    return result


def _row(scores: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Gather the scores of one way over the clips."""
    names = dict.fromkeys(name for clip in scores for name in clip)
    raw = {name: [clip.get(name, math.nan) for clip in scores] for name in names}
    per_clip = {name: [None if math.isnan(v) else v for v in values] for name, values in raw.items()}
    row: dict[str, Any] = {"per_clip": per_clip}
    row["means"] = {name: _summary(values) for name, values in per_clip.items() if name in BETTER}
    if "faces_looked" in per_clip:
        totals = {k[6:]: int(sum(v or 0 for v in values)) for k, values in per_clip.items() if k.startswith("faces_")}
        row["faces"] = totals | {"clips_without_distance": per_clip["face_distance"].count(None)}
    return row


def _encode(features: Tensor) -> dict[str, Any]:
    values = features.numpy().astype("<f4")
    return {"shape": list(values.shape), "float32": base64.b64encode(values.tobytes()).decode()}


def _decode(stored: Mapping[str, Any]) -> Tensor:
    values = np.frombuffer(base64.b64decode(stored["float32"]), dtype="<f4")
    return torch.from_numpy(values.reshape(stored["shape"]).astype(np.float64))


def _no_fvd(data: Prepared) -> str | None:
    """Why FVD cannot be measured on a split, None if it can."""
    lengths = sorted({r["frames"] for r in data.records})
    if len(data) < 2:
        return "one video has no covariance: FVD compares sets"
    if len(lengths) > 1:
        return f"the clips have {lengths} frames: FVD compares videos of one length"
    if lengths[0] < frechet.FVD_FRAMES:
        return f"FVD needs at least {frechet.FVD_FRAMES} frames, the clips have {lengths[0]}"
    return None


def _fvd_row(real: Tensor, generated: Tensor) -> dict[str, Any]:
    value = frechet.frechet_distance(real, generated)
    return {"value": value, "videos": len(real), "note": frechet.small_set(len(real))}


def _protocol(data: Prepared, estimate: Estimate | None, networks: Sequence[str]) -> dict[str, Any]:
    """Say what was measured, on what and how."""
    ids = [r["id"] for r in data.records]
    try:
        own_version = version("entprog")
    except PackageNotFoundError:
        own_version = "not installed"
    weights: dict[str, Any] = {
        **{net: {"package": "==".join(LPIPS_PACKAGE), "sha256": b.sha256} for net, b in BACKBONES.items()},
        "i3d": {"package": "==".join(frechet.PACKAGE), "sha256": frechet.SHA256, "features": frechet.I3D_LOGITS},
        "face": {"package": "==".join(identity.PACKAGE), "sha256": dict(identity.FILES)},
    }
    named = getattr(estimate, "__qualname__", type(estimate).__name__)
    return {
        "name": PROTOCOL,
        "clips": len(ids),
        "clip_list_hash": hashlib.sha256("\n".join(ids).encode()).hexdigest()[:12],
        "split": data.split,
        "split_hash": data.about["split_hash"],
        "data": data.about,
        "frames": sorted({r["frames"] for r in data.records}),
        "sizes": sorted({(r["height"], r["width"]) for r in data.records}),
        "resize": {"fvd": frechet.RESIZE, "other": "none"},
        "fvd": "one sample a clip, all its frames",
        "lpips": "version 0.1, inputs in [-1, 1]",
        "ssim": "RGB, uniform 7x7 window, data range 1",
        "psnr": f"mean over frames, equal frames count as {PSNR_CAP:g} dB",
        "pck": "box: within 0.1 of the longer side of the box around the visible driving keypoints",
        "oks": "COCO sigmas; area of the labels, or 0.53 of the box where nothing is labelled",
        "estimator": None if estimate is None else getattr(estimate, "name", named),
        "networks": {net: weights[net] for net in networks},
        "intervals": f"95 %, percentile bootstrap over clips, {_RESAMPLES} resamples",
        "versions": {"entprog": own_version, "torch": torch.__version__},
    }


def evaluate(
    videos: Mapping[str, Tensor],
    data: Prepared,
    *,
    estimate: Estimate | None = None,
    networks: Sequence[str] = NETWORKS,
    baselines: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Score one generated video for every clip of a split; the result can be written as JSON.

    `videos` maps clip ids to uint8 (F, 3, H, W). `estimate` finds keypoints, without it pose is not scored; `networks`
    are some of NETWORKS, on `device` where they can be. `on_progress(done, clips)` is called after each clip.

    Returns `protocol`, `ids` and `rows`: "generated"; "truth", the true videos through the same detectors (the floor);
    with `baselines` "copy_reference", the reference as a still video, and "shuffled", the video generated for the clip
    half a round away. A row holds `per_clip` (None: not defined there), `means` with intervals, counts of `faces` and
    `fvd` to the truth. `differences` are generated minus each baseline, paired; `pose_ratio` is the generated mean by
    the truth's; `features` are I3D logits, for `compare`.

    ValueError naming the ids for videos that are missing, unknown or of another shape, and for unknown networks;
    PackagedFileError when a network's weights cannot be had.
    """
    _check_videos(videos, data)
    at_hand = {*networks, *(["estimate"] if estimate else [])}
    no_fvd = "i3d is not among the networks" if "i3d" not in networks else _no_fvd(data)
    load_networks(networks, device, no_fvd is None)
    ways = ("generated", "truth", *(("copy_reference", "shuffled") if baselines else ()))
    scores: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    logits: dict[str, list[Tensor]] = {way: [] for way in ways if way != "shuffled"}
    partners, others, ids = _partners(data.records), _others(data.records), [r["id"] for r in data.records]
    found: dict[str, Tensor] = {}  # keypoints of the generated videos, which the shuffled baseline meets again

    def keypoints(way: str, clip: int, video: Tensor) -> Tensor | None:
        if estimate is None:
            return None
        if way not in ("generated", "shuffled"):
            return estimate(video)
        name = ids[clip] if way == "generated" else ids[partners[clip] or 0]
        if name not in found:
            found[name] = estimate(video)
        return found[name]

    for i in range(len(data)):
        names = ("video", "keypoints", "labels", "reference", "reference_labels")
        clip = {name: rows[0] for name, rows in data.rows([i], names).items()}
        partner, other = partners[i], others[i]
        shown_as: dict[str, Tensor | None] = {
            "generated": videos[ids[i]],
            "truth": clip["video"],
            "copy_reference": clip["reference"][None].expand_as(clip["video"]),
            "shuffled": None if partner is None else videos[ids[partner]],
        }
        own, theirs = _reference_colours(data, i), None if other is None else _reference_colours(data, other)
        faces = None
        if "face" in networks:
            faces = identity.find_faces(clip["reference"][None], clip["reference_labels"][None])
        for way in ways:
            if (video := shown_as[way]) is None:
                scores[way].append({})
                continue
            shown = Shown(video, clip, own, theirs, keypoints(way, i, video), faces, device)
            scores[way].append(_scores(shown, at_hand, floor_only=way == "truth"))
            if no_fvd is None and way in logits:
                logits[way].append(frechet.i3d_logits(video.float() / 255, device=device))
        if on_progress:
            on_progress(i + 1, len(data))

    rows = {way: _row(of_clips) for way, of_clips in scores.items()}
    result = {"protocol": _protocol(data, estimate, networks), "ids": ids, "rows": rows}
    if no_fvd is None:
        features = {way: torch.stack(of_clips) for way, of_clips in logits.items()}
        features["shuffled"] = features["generated"]  # the same set: FVD cannot see which video is whose
        for way in (w for w in ways if w != "truth"):
            rows[way]["fvd"] = _fvd_row(features["truth"], features[way])
        result["features"] = {way: _encode(features[way]) for way in ("truth", "generated")}
    else:
        rows["generated"]["fvd"] = {"value": None, "videos": len(data), "note": no_fvd}
    if estimate is not None:
        result["pose_ratio"] = _ratios(rows["generated"]["means"], rows["truth"]["means"])
    result["differences"] = {way: _differences(rows["generated"], rows[way]) for way in ways[2:]}
    return result


def load_networks(networks: Sequence[str], device: str = "cpu", fvd: bool = True) -> None:
    """Load networks before they are needed. ValueError for unknown ones, PackagedFileError for what cannot be had."""
    if unknown := set(networks) - set(NETWORKS):
        raise ValueError(f"networks {sorted(unknown)} are unknown: choose from {NETWORKS}")
    for net in (n for n in networks if n in BACKBONES):
        load_lpips(net, device)
    if fvd and "i3d" in networks:
        frechet.load_i3d(device)
    if "face" in networks:
        identity.check_face_networks()


def _scores(shown: Shown, at_hand: set[str], *, floor_only: bool) -> dict[str, float]:
    scores: dict[str, float] = {}
    for group in GROUPS.values():
        if (group.needs is None or group.needs in at_hand) and (group.floor or not floor_only):
            scores |= group.score(shown)
    return scores


def _ratios(means: Mapping[str, Any], floor: Mapping[str, Any]) -> dict[str, float | None]:
    """Pose scores as a multiple of what the detector reaches on the true videos: 1 is as good as can be told."""
    pairs = {name: (means[name]["mean"], floor[name]["mean"]) for name in ("pck@0.1", "oks", "keypoint_error")}
    return {name: None if a is None or not b else a / b for name, (a, b) in pairs.items()}


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Paired differences a - b of two evaluations of the same clips, with 95 % bootstrap intervals over clips.

    Returns `differences` by metric (`mean`, `low`, `high`, `clips`, and `better_on`: the share of clips on which a is
    better) and, where both have features, `fvd`: the difference of the two distances with an interval from resampling
    clips, the same clips for both; a resample repeats clips, which raises both distances alike.
    ValueError when the two differ in clips, split, data, sizes or networks, naming what differs.
    """
    first, second = _measured_on(a["protocol"]), _measured_on(b["protocol"])
    if differ := [key for key in first | second if first.get(key) != second.get(key)]:
        said = "; ".join(f"{key}: {first.get(key)} and {second.get(key)}" for key in differ)
        raise ValueError(f"the evaluations cannot be compared, they differ in {said}. Evaluate both on one data folder")
    generated = a["rows"]["generated"], b["rows"]["generated"]
    result: dict[str, Any] = {"clips": a["protocol"]["clips"], "differences": _differences(*generated), "fvd": None}
    if "features" in a and "features" in b:
        real, one, two = (_decode(e["features"][w]) for e, w in ((a, "truth"), (a, "generated"), (b, "generated")))
        result["fvd"] = _fvd_difference(real, one, two) | {"note": frechet.small_set(len(real))}
    return result


def _measured_on(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """What two evaluations must share, with what made the data's frames and poses; as JSON, where tuples are lists."""
    keys = ("name", "clip_list_hash", "split_hash", "frames", "sizes", "estimator", "networks")
    data = {f"data.{k}": v for k, v in (protocol.get("data") or {}).items() if k not in ("clips", "split_hash")}
    return json.loads(json.dumps({k: protocol[k] for k in keys} | data))


def _fvd_difference(real: Tensor, one: Tensor, two: Tensor) -> dict[str, float]:
    """FVD of one minus FVD of two, and its interval."""

    def difference(rows: Tensor) -> float:
        return frechet.frechet_distance(real[rows], one[rows]) - frechet.frechet_distance(real[rows], two[rows])

    generator = torch.Generator().manual_seed(0)
    count = len(real)
    drawn = [torch.randint(count, (count,), generator=generator) for _ in range(_FVD_RESAMPLES)]
    values = torch.tensor([difference(rows) for rows in drawn], dtype=torch.float64)
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"difference": difference(torch.arange(count)), "low": low, "high": high}
