"""Recipes: human video in three phases, each its own run with its own scores, handed on from one to the next.

    subject   reference image -> another image of the same person
    pose      reference image and pose -> that frame
    video     reference image and poses -> clip; only the temporal blocks may train

A recipe file names a preset and changes what it likes of it. `run_recipe` renders or finds the data, trains the base
once (or takes one), then every phase with every strategy for the same net seconds or steps, draws and evaluates unseen
people, and writes one page. A strategy's phases hand their weights on; strategies share nothing but the base. Block
names stay the same across phases, so that their scores can be laid side by side.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from entprog.bench import compare, environment, first_clips, model_of, sample_clips, train_run
from entprog.checkpoint import write_whole
from entprog.config import RunConfig, make_config, read_yaml
from entprog.data.batches import load_data
from entprog.data.cache import Stored
from entprog.data.pose import draw_skeleton
from entprog.data.prepared import SPLITS, Prepared, is_prepared, read_about, spread_evenly, stored_size
from entprog.data.video import write_png, write_webp
from entprog.measure import best_device
from entprog.models.autoencoder import latent_places
from entprog.models.pretrained import EMBEDDED, check_origin
from entprog.recipe_check import check_clips, check_rendered, check_shape

OnProgress = Callable[[dict[str, Any]], None]
PHASES = ("subject", "pose", "video")

# What each phase is, whatever its size: what it is given, how many frames, and which blocks may train.
_TASKS: dict[str, dict[str, Any]] = {
    "base": {"conditions": ("reference",), "guided": ("reference",), "frames": 1, "condition_dropout": 0.2,
             "joint_dropout": 0.0},
    "subject": {"conditions": ("reference",), "guided": ("reference",), "frames": 1},
    "pose": {"conditions": ("pose", "reference"), "frames": 1},
    "video": {"conditions": ("pose", "reference"), "candidates": "temporal"},
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says, resolved: RunConfig values common to all runs, and each phase's own.

    `data` is a prepared folder, made with the arguments in `people` (of `render_people`) if it is not there; `people`
    is empty where nothing may be rendered. Its size is every run's, whatever the preset's. `base`
    holds the values of the run that pretrains the base, or {"model": one that is pretrained}. `evaluation`: splits,
    clips of each, networks, which detector looks for the pose.
    """

    data: str
    people: Mapping[str, Any] = field(default_factory=dict)
    strategies: tuple[str, ...] = ("full", "ent-prog")
    seed: int = 0
    common: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)
    phases: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)

    def config(self, phase: str, strategy: str, model: str) -> RunConfig:
        """Return one run's configuration. ValueError for values that RunConfig refuses."""
        own = self.base if phase == "base" else self.phases[phase]
        values = {"data": str(Path(self.data).resolve()), "seed": self.seed} | dict(self.common)
        if size := stored_size(self.data):  # a preset's is that of the people it renders
            values["size"] = size
        return make_config(values | _TASKS[phase] | dict(own) | {"strategy": strategy, "model": model})


def cpu() -> dict[str, Any]:
    """Preset: 64 px in the latents of TAEF2 as trained on with such people, 31 minutes of a core a strategy."""
    return {
        "people": {"people": {"train": 400, "test": 40, "hard": 40}, "size": 64, "frames": 16},
        "common": {
            "size": 64, "autoencoder": "taef2-people", "mixed_precision": "bf16", "clock": "wall", "lr_warmup": 0.05,
            "held_out_clips": 32, "evaluations": 6, "samples": 8, "num_inference_steps": 20, "ema_decay": 0.995,
            "condition_dropout": 0.0, "joint_dropout": 0.1, "guidance_scale": 3.5, "guided": ("pose", "reference"),
            "checkpoint_every": 500, "person_weight": 4.0,
        },
        "base": {"model": "people"},
        "phases": {
            "subject": {"seconds": 60, "batch_size": 16, "lr": 1e-3},
            "pose": {"seconds": 1400, "batch_size": 16, "lr": 4e-3},
            # noise that frames do not share makes samples flicker; training shares half, else frames that differ by
            # what moves alone teach to copy every difference
            "video": {"seconds": 400, "batch_size": 4, "lr": 4e-3, "frames": 8, "shared_noise": 0.5,
                      "sample_shared_noise": 1.0},
        },
        # faces of 64 px clips are a few pixels wide: nothing to recognise
        "evaluation": {"splits": ("test", "hard"), "clips": 32, "networks": ("alex", "vgg", "i3d"), "pose": "movenet"},
    }  # fmt: skip


def gpu() -> dict[str, Any]:
    """Preset: 256 px in the latents of TAEF2, PoseDiT-S, an hour or two on one GPU."""
    preset = cpu()
    preset["people"] = {"people": {"train": 2000, "test": 128, "hard": 128}, "size": 256, "frames": 16}
    preset["common"] |= {"size": 256, "autoencoder": "taef2", "patch_size": 2, "ema_decay": 0.999, "held_out_clips": 64}
    preset["base"] = {"model": "S", "steps": 20_000, "batch_size": 64, "lr": 3e-4}
    for name, values in (
        ("subject", {"seconds": 600, "batch_size": 32, "lr": 1e-4}),
        ("pose", {"seconds": 1800, "batch_size": 32, "lr": 1e-4}),
        ("video", {"seconds": 1800, "batch_size": 4, "lr": 1e-4, "frames": 16}),
    ):
        preset["phases"][name] |= values
    preset["evaluation"] |= {"clips": 256, "networks": ("alex", "vgg", "i3d", "face")}
    return preset


def paper() -> dict[str, Any]:
    """Preset: the published constants: 1e-5, noise prediction, 50k, 200k, 200k steps, IDDPM-100, guidance 4."""
    preset = gpu()
    preset["people"] = {"people": {"train": 4000, "test": 128, "hard": 128}, "size": 768, "frames": 16}
    preset["common"] |= {
        "size": 768, "objective": "epsilon", "lr": 1e-5, "lr_warmup": 0.0, "ema_decay": 0.0, "sampler": "ddpm",
        "num_inference_steps": 100, "guidance_scale": 4.0,
    }  # fmt: skip
    preset["base"] |= {"model": "XL"}
    preset["strategies"] = ("full", "paper")
    for name, steps, batch, extra in (
        ("subject", 50_000, 32, {}),
        ("pose", 200_000, 8, {}),
        ("video", 200_000, 4, {"frames": 10, "shared_noise": 0.0, "sample_shared_noise": 0.0}),
    ):
        own = {k: v for k, v in preset["phases"][name].items() if k not in ("seconds", "lr")}
        preset["phases"][name] = own | {"steps": steps, "batch_size": batch, "lr": 1e-5} | extra
    return preset


PRESETS: dict[str, Callable[[], dict[str, Any]]] = {"cpu": cpu, "gpu": gpu, "paper": paper}


def is_recipe(path: str | Path) -> bool:
    """Whether a YAML file is a recipe and not one run's configuration: it names a preset or phases."""
    values = read_yaml(path) or {}
    return isinstance(values, dict) and bool({"preset", "phases"} & set(values))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file: a preset, changed by what the file says and then by `a.b=value` overrides (value in YAML).

    ValueError for keys, presets, phases and values that are not valid.
    """
    values = read_yaml(path) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not a mapping of recipe keys to values")
    for item in overrides:
        key, separator, value = item.partition("=")
        if not separator:
            raise ValueError(f"override {item!r} is not of the form key=value")
        *parents, last = key.split(".")
        place = values
        for parent in parents:
            if place.get(parent) is None:  # a key with nothing below it is null in YAML
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                raise ValueError(f"override {item!r}: {parent} is {place!r} in {path}, not a mapping that holds {last}")
        place[last] = yaml.safe_load(value)
    return make_recipe(values)


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """Lay values over the preset they name, and check every run's configuration.

    `people: null` renders nobody, `phases: {subject: null}` leaves a phase out. ValueError as for `load_recipe`.
    """
    known = set(Recipe.__dataclass_fields__) | {"preset"}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"recipe keys {unknown} are unknown: choose from {sorted(known)}")
    check_shape(values, PHASES)
    if (name := values.get("preset", "cpu")) not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown: choose one of {sorted(PRESETS)}")
    merged = _laid_over(PRESETS[name](), {k: v for k, v in values.items() if k != "preset"})
    if "data" not in merged:
        raise ValueError("a recipe needs data: a prepared folder, or where to render one")
    if set(merged["evaluation"]) != {"splits", "clips", "networks", "pose"}:
        raise ValueError(f"evaluation takes splits, clips, networks and pose, not {sorted(merged['evaluation'])}")
    merged.setdefault("people", {})
    merged["strategies"] = tuple(merged.get("strategies", ("full", "ent-prog")))
    size, stored = values.get("common", {}).get("size"), stored_size(merged["data"]) or merged["people"].get("size")
    if size is not None and stored is not None and size != stored:
        raise ValueError(
            f"common.size {size}: the clips in {merged['data']} are of {stored} (people.size if they are still to be "
            "rendered). Set both to one value, or choose another data folder"
        )
    recipe = Recipe(**merged)
    _check(recipe)
    return recipe


def _check(recipe: Recipe) -> None:
    """Refuse before the first step what would fail after the last. ValueError with the choices."""
    from entprog.evaluate import ESTIMATORS, NETWORKS

    if not recipe.phases:
        raise ValueError(f"phases are all null, nothing would be trained: leave at least one of {PHASES} in")
    model = str(recipe.base.get("model"))
    if set(recipe.base) == {"model"} and model not in EMBEDDED and not (Path(model) / "config.json").exists():
        raise ValueError(
            f"base {model!r}: choose one of {sorted(EMBEDDED)} or a model's folder, or add a budget to train it"
        )
    configs = [config for _, config in _runs(recipe)]
    for autoencoder in {c.autoencoder for c in configs} - {""}:
        latent_places(autoencoder)
    for config in configs:
        check_origin(config)
    clips = recipe.evaluation["clips"]
    if not isinstance(clips, int) or isinstance(clips, bool) or clips < 1:
        raise ValueError(f"evaluation.clips {clips!r}: choose a whole number of at least 1")
    if recipe.evaluation["pose"] not in ESTIMATORS:
        raise ValueError(f"evaluation.pose {recipe.evaluation['pose']!r}: choose one of {sorted(ESTIMATORS)}")
    for what, choices in (("networks", NETWORKS), ("splits", SPLITS)):
        if unknown := sorted(set(recipe.evaluation[what]) - set(choices)):
            raise ValueError(f"evaluation.{what} {unknown} are unknown: choose from {choices}")


def _runs(recipe: Recipe) -> list[tuple[str, RunConfig]]:
    """Return where in the recipe each run stands, and its configuration; models that are still to be made are "P"."""
    model, ready = str(recipe.base.get("model")), set(recipe.base) == {"model"}
    base = [] if ready else [("base", recipe.config("base", "full", model))]
    phases = [(p, s) for p in recipe.phases for s in recipe.strategies]
    return base + [(f"phases.{p}", recipe.config(p, s, model if ready else "P")) for p, s in phases]


def _laid_over(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge mappings; null takes a key away, a budget in steps replaces one in seconds and the other way round."""
    out = dict(below)
    for budget, other in (("steps", "seconds"), ("seconds", "steps")):
        if above.get(budget) is not None:
            out.pop(other, None)
    for key, value in above.items():
        out[key] = _laid_over(out[key], value) if isinstance(value, Mapping) and key in out else value
    return {k: v for k, v in out.items() if v is not None}


def prepare_data(recipe: Recipe, on_progress: OnProgress) -> None:
    """Render the recipe's people if its data folder is not there yet, or was interrupted.

    ValueError for a folder of other rendered people than the recipe's, and for an interrupted one of videos.
    """
    folder, people = Path(recipe.data), dict(recipe.people)
    about = read_about(folder, finished=False) if is_prepared(folder) else None
    if about is not None and not (people and about.get("kind") == "rendered"):
        read_about(folder)  # refuses what was interrupted
        return
    if not people:
        raise ValueError(f"{recipe.data} is not prepared and the recipe has no people to render: run entprog prepare")
    if about is None or "split_hash" not in about:
        from entprog.data.rendered import render_people

        render_people(
            people["people"],
            folder,
            **{k: v for k, v in people.items() if k != "people"},
            on_progress=lambda done, total: on_progress({"run": "rendering", "message": f"{done} of {total} clips"}),
        )
    check_rendered(people, folder)


def train_base(recipe: Recipe, out: Path, on_progress: OnProgress) -> str:
    """Pretrain the model all strategies start from, an image model that knows a reference; returns its folder."""
    model = str(recipe.base["model"])
    if set(recipe.base) == {"model"}:
        return str(Path(model).resolve()) if Path(model).exists() else model
    train_run(recipe.config("base", "full", model), out / "base", lambda info: on_progress(info | {"run": "base"}))
    return str(out / "base" / "checkpoints" / "final")


def train_phases(recipe: Recipe, out: Path, base: str, on_progress: OnProgress) -> dict[str, Any]:
    """Train every phase with every strategy, each from its own weights of the phase before; {phase: comparison}."""
    models = dict.fromkeys(recipe.strategies, base)
    results = {}
    for phase in (p for p in PHASES if p in recipe.phases):
        configs = {s: recipe.config(phase, s, models[s]) for s in recipe.strategies}

        def tagged(info: dict[str, Any], phase: str = phase) -> None:
            on_progress(info | {"run": f"{phase}, {info['run']}"})

        results[phase] = compare(configs, out / phase, f"phase {phase}", tagged)
        models = {s: str(out / phase / s / "checkpoints" / "final") for s in recipe.strategies}
    return results


def draw_videos(
    config: RunConfig, model: str, split: str, clips: int, frames: int | None = None, at_once: int = 16
) -> tuple[dict[str, Tensor], Prepared]:
    """Draw clips of a split from their poses and references: ({id: uint8 (F, 3, H, W)}, the clips).

    The clips are spread evenly over the split, `frames` long, by default whole; `at_once` of them share a batch.
    """
    config = replace(config, held_out_clips=clips, model=model)
    data, _ = load_data(config, split)
    column, videos = data["video"], dict[str, Tensor]()
    network = nn.Module.to(model_of(config), best_device())
    if not isinstance(column, Stored):
        raise ValueError(f"{config.data} is not prepared: run entprog prepare, and train on what it makes")
    for bucket in column.buckets():
        for first in range(0, len(bucket), at_once):
            rows = bucket[first : first + at_once]
            part = {k: v.subset(rows) for k, v in data.items() if isinstance(v, Stored)}
            batch, _ = first_clips(config, part, len(rows), frames or part["video"].shape[2])
            drawn = sample_clips(replace(config, seed=config.seed + rows[0]), network, batch)
            pixels = ((drawn + 1) * 127.5).round().to(torch.uint8).transpose(1, 2).contiguous()
            videos |= dict(zip(column.ids(rows), pixels, strict=True))
    return videos, column.prepared


def _splits(recipe: Recipe) -> list[str]:
    """Those of the recipe's splits that the data hold: videos know no unseen motions. ValueError for none."""
    counts = {r["split"] for r in Prepared(recipe.data, "train").every}
    splits = [s for s in recipe.evaluation["splits"] if s in counts]
    if not splits:
        raise ValueError(f"{recipe.data} has the splits {sorted(counts)}, to be evaluated are "
                         f"{recipe.evaluation['splits']}: keep some people for testing")  # fmt: skip
    return splits


def evaluate_strategies(recipe: Recipe, out: Path, on_progress: OnProgress) -> dict[str, Any]:
    """Draw and score unseen people with every strategy's last phase: {split: {strategy: evaluation}}.

    Videos are kept as `OUT/videos/SPLIT-STRATEGY.safetensors`, evaluations as JSON beside them.
    """
    from entprog.evaluate import ESTIMATORS, evaluate

    last = [p for p in PHASES if p in recipe.phases][-1]
    settings = dict(recipe.evaluation)
    folder = out / "videos"
    folder.mkdir(exist_ok=True)
    results: dict[str, Any] = {}
    for split in _splits(recipe):
        for strategy in recipe.strategies:
            path = folder / f"{split}-{strategy}.json"
            if not path.exists():
                on_progress({"run": f"evaluation, {split}", "message": f"drawing {strategy}"})
                config = recipe.config(last, strategy, str(out / last / strategy / "checkpoints" / "final"))
                videos, prepared = draw_videos(config, config.model, split, settings["clips"])
                save_file(videos, path.with_suffix(".safetensors"))
                _keep_to_look_at(folder / split, strategy, videos, prepared)
                on_progress({"run": f"evaluation, {split}", "message": f"measuring {strategy}"})
                found = evaluate(
                    videos, prepared, estimate=ESTIMATORS[settings["pose"]](), networks=settings["networks"],
                    device=str(best_device()),
                )  # fmt: skip
                write_whole(path, json.dumps(found, indent=1) + "\n")
            results.setdefault(split, {})[strategy] = json.loads(path.read_text())
    return results


def _keep_to_look_at(folder: Path, strategy: str, videos: Mapping[str, Tensor], prepared: Prepared) -> None:
    """Write some clips as NNN_{reference,pose,truth,STRATEGY} for the report."""
    folder.mkdir(exist_ok=True)
    fps = prepared.records[0]["fps"]
    for i in spread_evenly(len(prepared), 8):
        clip = {k: v[0] for k, v in prepared.rows([i], ["video", "keypoints", "reference"]).items()}
        height, width = clip["video"].shape[-2:]
        write_png(folder / f"{i:03d}_reference.png", clip["reference"] / 127.5 - 1)
        write_webp(
            folder / f"{i:03d}_pose.webp", draw_skeleton(clip["keypoints"], height, width).transpose(0, 1), fps, low=0
        )
        own = videos[prepared.records[i]["id"]]
        for name, video in (("truth", clip["video"]), (strategy, own)):
            write_webp(folder / f"{i:03d}_{name}.webp", video.transpose(0, 1) / 127.5 - 1, fps)


def _pin_data(recipe: Recipe, out: Path) -> None:
    """Note which clips a recipe was begun with; ValueError if the data folder holds others now."""
    path, split_hash = out / "split_hash", Prepared(recipe.data, "train").about["split_hash"]
    if path.exists() and path.read_text() != split_hash:
        raise ValueError(f"{recipe.data} has changed since {out} was begun: choose another --out")
    write_whole(path, split_hash)


def run_recipe(recipe: Recipe, out: Path, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Do a whole recipe: data, base, phases, samples, evaluation. The same call resumes; returns results.json.

    ValueError if `out` was begun with another recipe or the clips do not fit this one, PackagedFileError if a network
    of the evaluation cannot be had.
    """
    from entprog.evaluate import ESTIMATORS, load_networks

    say, out = on_progress or (lambda info: None), out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    # what evaluation needs is fetched, or found missing, before the first step; on the CPU: a GPU's memory is the runs'
    ESTIMATORS[recipe.evaluation["pose"]]()
    load_networks(recipe.evaluation["networks"])
    mine, path = json.loads(json.dumps(asdict(recipe))), out / "recipe.yaml"
    if path.exists() and (saved := yaml.safe_load(path.read_text())) != mine:
        differing = {k: (saved.get(k), v) for k, v in mine.items() if saved.get(k) != v}
        raise ValueError(f"{out} holds another recipe; (saved, now): {differing}. Choose another --out")
    write_whole(path, yaml.safe_dump(mine, sort_keys=False))
    prepare_data(recipe, say)
    check_clips(dict(_runs(recipe)), _splits(recipe), recipe.evaluation)
    _pin_data(recipe, out)
    base = train_base(recipe, out, say)
    phases = train_phases(recipe, out, base, say)
    results = {"kind": "recipe", "title": "human video", "strategies": list(recipe.strategies), "base": base}
    results |= environment() | {"phases": phases, "evaluation": evaluate_strategies(recipe, out, say)}
    write_whole(out / "results.json", json.dumps(results, indent=1) + "\n")
    return results
