"""What a recipe file may say, checked before anything is made of it, and its clips before anything is trained."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entprog.config import RunConfig
from entprog.data.prepared import SPLITS, Prepared, read_about, read_manifest, shape_groups
from entprog.metrics.lpips import BACKBONES

# What `render_people` takes beside the people; without one of them it renders with this.
RENDERED: dict[str, float] = {"size": 64, "frames": 16, "fps": 10, "clips_per_person": 4, "seed": 0}

_LISTS = {"strategies": "full, ent-prog", "evaluation.splits": "test, hard", "evaluation.networks": "alex, vgg"}


def check_shape(values: Mapping[str, Any], phases: Sequence[str]) -> None:
    """Refuse what does not have a recipe's shape: mappings, lists and names where they belong.

    ValueError with the value and what is expected in its place.
    """
    for key in ("people", "common", "base", "phases", "evaluation"):
        value = values.get(key, {})
        if not isinstance(value, Mapping) and (key, value) != ("people", None):
            raise ValueError(f"{key} = {value!r}: give a mapping of names to values, or leave it out for the preset's")
    own: Mapping[str, Any] = values.get("phases", {})
    if wrong := sorted(set(map(str, own)) - set(phases)):
        raise ValueError(f"phases {wrong} are unknown: choose from {tuple(phases)}")
    for phase, value in own.items():
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"phases.{phase} = {value!r}: give a mapping of names to values, or null to leave it out")
    for where, run in (*((f"phases.{k}", v or {}) for k, v in own.items()), ("base", values.get("base", {}))):
        if "size" in run:
            raise ValueError(
                f"{where}.size = {run['size']!r}: all runs have the data's, set people.size and common.size"
            )
    evaluation: Mapping[str, Any] = values.get("evaluation", {})
    for name, choices in _LISTS.items():
        section, _, key = name.rpartition(".")
        given = evaluation if section else values
        if key in given:
            _check_list(name, given[key], choices)
    for name, given in (("preset", values), ("data", values), ("evaluation.pose", evaluation)):
        key = name.rpartition(".")[2]
        if key in given and not isinstance(given[key], str):
            raise ValueError(f"{name} = {given[key]!r}: give a name in letters")
    if values.get("people"):
        _check_people(values["people"])


def _check_list(name: str, value: Any, such_as: str) -> None:
    several = isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
    if not several or len(set(value)) < len(value) or not (value or name == "evaluation.networks"):
        raise ValueError(f"{name} = {value!r}: give a list of names, each once, such as [{such_as}]")


def _check_people(people: Mapping[str, Any]) -> None:
    """Refuse arguments that `render_people` would not take; null takes a split away."""
    known = ("people", *RENDERED)
    if unknown := sorted(set(map(str, people)) - set(known)):
        raise ValueError(f"people {unknown} are unknown: choose from {known}")
    counts = people.get("people", {})
    if not isinstance(counts, Mapping) or set(counts) - set(SPLITS):
        raise ValueError(f"people.people = {counts!r}: give a mapping, how many persons for each of {SPLITS}")
    numbers = {f"people.people.{k}": v for k, v in counts.items() if v is not None}
    for name, value in (numbers | {f"people.{k}": v for k, v in people.items() if k != "people"}).items():
        if isinstance(value, bool) or not isinstance(value, (int, float) if name == "people.fps" else int):
            raise ValueError(f"{name} = {value!r}: give a whole number")


def check_rendered(people: Mapping[str, Any], folder: Path) -> None:
    """Compare a finished folder of rendered people with what a recipe asks for. ValueError with both.

    Told by the manifest alone, so that nothing is loaded or drawn. `people` are arguments of `render_people`.
    """
    about = read_about(folder)
    clips = Counter((r["split"], r["subject_id"]) for r in read_manifest(folder))
    each = sorted(set(clips.values()))
    there = {k: about.get(k) for k in RENDERED}
    there |= {"clips_per_person": each[0] if len(each) == 1 else each, "people": dict(Counter(s for s, _ in clips))}
    wanted = RENDERED | dict(people) | {"people": {k: v for k, v in people["people"].items() if v}}
    if differ := [k for k in there if there[k] != wanted[k]]:
        raise ValueError(
            f"{folder} was rendered with { ({k: there[k] for k in differ}) }, the recipe says "
            f"{ ({k: wanted[k] for k in differ}) }: choose another data folder, change the recipe's people, or set "
            "people=null to train on what is there"
        )


def check_clips(runs: Mapping[str, RunConfig], splits: Sequence[str], evaluation: Mapping[str, Any]) -> None:
    """Refuse clips that a later run could not train on, or the evaluation not score, before the first step.

    `runs` by their place in the recipe, all of one data folder, of which `splits` are evaluated. ValueError with the
    value that does not fit and what to do.
    """
    data = next(iter(runs.values())).data
    train = Prepared(data, "train")
    sizes = sorted((len(group) for group in shape_groups(train.records)), reverse=True)
    for place, config in runs.items():
        for clips in (train, Prepared(data, "test", config.held_out_clips)):
            shortest = min(r["frames"] for r in clips.records)
            if shortest < config.frames:
                raise ValueError(f"{place}.frames {config.frames}: split {clips.split!r} of {data} has clips of "
                                 f"{shortest} frames, choose at most as many or prepare longer clips")  # fmt: skip
        if sizes[0] < config.batch_size:
            raise ValueError(f"{place}.batch_size {config.batch_size}: clips of one shape share a batch, split 'train' "
                             f"of {data} has {sizes}, choose at most {sizes[0]} or add clips")  # fmt: skip
    for split in splits:
        side = min(min(r["height"], r["width"]) for r in Prepared(data, split, evaluation["clips"]).records)
        for net in (n for n in evaluation["networks"] if n in BACKBONES):
            if side < (smallest := BACKBONES[net].smallest):
                raise ValueError(f"evaluation.networks {net!r} needs frames of at least {smallest}x{smallest} pixels, "
                                 f"split {split!r} of {data} has sides of {side}: leave it out or prepare larger "
                                 "clips")  # fmt: skip
