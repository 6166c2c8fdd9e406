"""A run's configuration: one dataclass, presets as functions, YAML in and out, key=value on the command line."""

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from entprog.checkpoint import write_whole
from entprog.data.prepared import is_prepared, stored_size
from entprog.models.wan import is_pipeline
from entprog.plan import parse_bytes
from entprog.sample import SAMPLERS
from entprog.strategy import STRATEGIES, Progressive

Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]  # 0: none, or the default
Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class RunConfig:
    """Everything a training run depends on; the resolved one is saved as config.yaml of the run folder.

    The budget is `seconds` of net time (training, scoring, search and data, by the `clock`) or `steps`.
    """

    # what is trained
    strategy: str = "ent-prog"  # a row of STRATEGIES
    # "base", "people": embedded weights; "T", "P", "S", "B", "XL": random ones; else a saved folder, of a PoseDiT or of
    # a diffusers pipeline (models/wan.py)
    model: str = "base"
    expert: Literal["high", "low"] | None = None  # of a pipeline with two: the one for much noise, or for little
    dtype: Literal["float32", "bfloat16"] | None = None  # of a pipeline's weights; None: float32
    objective: Literal["epsilon", "v_prediction", "flow_prediction"] = "flow_prediction"
    shift: float | None = None  # of the times towards noise; None: 1, or that of the pipeline's scheduler
    # one word each for the ablations; None keeps the strategy's own
    priority: str | None = None
    schedule: str | None = None
    search: str | None = None
    stages: int | None = None
    active_share: float | None = None
    frozen: str | None = None
    min_fidelity: float | None = None
    min_new_fidelity: float | None = None
    min_saving: float | None = None
    skip: float | None = None
    restore_at: float | None = None
    restore: str | None = None
    stem: str | None = None
    rescore: str | None = None
    adapters: bool | None = None
    search_budget: float | None = None
    score_budget: float | None = None
    frozen_weights: Literal["bf16", "int8", "fp8", "cpu"] | None = None  # of frozen blocks; None: as they are
    optimizer_state: Literal["keep", "drop", "park"] | None = None  # of blocks that stop training
    growth: Literal["nested", "rotate"] | None = None  # None: nested until max_memory stops it, then rotating
    selection: Literal["top", "cost_aware"] | None = None  # cost_aware: late blocks are cheap with frozen: pass
    rotate_every: int | None = None  # steps; None: an eighth of a stage
    axes: Literal["blocks", "blocks,tokens"] | None = None  # with tokens training steps see smaller clips at first
    token_grid: tuple[tuple[float, float], ...] | None = None  # (share of the frames, scale of height and width), ...
    tokens_until: float | None = None  # share of the run; then clips are whole
    token_frames: Literal["first", "strided"] = "first"  # which ones: the first of a clip, or every n-th
    token_positions: Literal["scaled", "kept"] = "scaled"  # over the whole grid, or as of a smaller one; PoseDiT's
    max_memory: str | int | float | None = None  # what training may hold, as 24GiB; None: no limit
    checkpointing: Literal["none", "block", "parts"] = "none"  # of activations; with max_memory as it needs it
    lora_rank: Count = 8
    # on what
    data: str = "figures"  # "figures": drawn; else a prepared folder, or one with a manifest.jsonl
    patch_size: CountOrNone = 0  # of a new model's tokens; 0: 4 pixels, or 1 latent
    autoencoder: str = ""  # "": pixels; "taef2", "taef2-people", or a folder with a diffusers autoencoder: its latents
    conditions: tuple[Literal["pose", "reference"], ...] = ("pose", "reference")
    candidates: Literal["all", "temporal"] = "all"  # which blocks may train; the rest of the model stays frozen
    caption: str | None = None  # every clip's prompt for a pipeline; None: its own in the manifest
    domain: str = "target"  # of the drawn figures
    clips: Count = 1024  # drawn for training
    held_out_clips: Count = 32
    size: Count = 24  # pixels of a side; left out with a prepared folder: that folder's
    frames: Count = 6
    frame_stride: Count = 1  # of real clips
    # how
    seconds: Annotated[float, Field(gt=0)] | None = None
    steps: Count | None = None
    clock: Literal["wall", "model"] = "wall"
    batch_size: Count = 4
    lr: NotNegative = 1e-3
    lr_warmup: Share = 0.1  # share of the run
    weight_decay: NotNegative = 0.01
    max_grad_norm: NotNegative = 1.0
    condition_dropout: Share = 0.1  # of each condition, by batch
    joint_dropout: Share = 0.0  # of all conditions at once
    person_weight: NotNegative = 1.0  # of the loss where a person is, the background having 1; needs prepared data
    face_weight: NotNegative = 1.0  # where a face is, times as much again as the rest of the person
    shared_noise: Share = 0.0  # of its variance, by a clip's frames, in training
    ema_decay: Share = 0.0  # 0: no average is kept; with max_memory it lies in the host's memory
    # YAML reads a bare no as False
    mixed_precision: Annotated[Literal["no", "bf16"], BeforeValidator(lambda v: "no" if v is False else v)] = "no"
    seed: int = 0
    # what comes out
    evaluations: Count = 10  # held-out losses along the way
    checkpoint_every: Count = 200  # steps
    held_out_draws: Count = 1  # times and noises for each held-out clip
    samples: CountOrNone = 8
    sampler: str = "ddim"  # a row of SAMPLERS
    guided: tuple[Literal["pose", "reference"], ...] = ("reference",)  # what guidance moves away from lacking
    num_inference_steps: Count = 12
    sample_shared_noise: Share = 0.0  # of the noise that samples begin with: the more, the steadier
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy {self.strategy!r} is unknown: choose one of {sorted(STRATEGIES)}")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler {self.sampler!r} is unknown: choose one of {sorted(SAMPLERS)}")
        if self.shift is not None and self.shift <= 0:
            raise ValueError(
                f"shift {self.shift} must be more than 0: 1 leaves the times uniform, 3 to 5 is Wan's range"
            )
        if self.guidance_scale != 1 and (not self.guided or not set(self.guided) <= set(self.conditions)):
            raise ValueError(
                f"guided {self.guided} must name at least one of this run's conditions {self.conditions}, or set "
                "guidance_scale to 1"
            )
        if self.max_memory is not None:
            self._check_memory()
        if (self.seconds is None) == (self.steps is None):
            raise ValueError(
                f"give the budget either as seconds ({self.seconds}) or as steps ({self.steps}): exactly one"
            )

    def _check_memory(self) -> None:
        parse_bytes(self.max_memory)  # type: ignore[arg-type]
        if self.checkpointing != "none":
            raise ValueError(
                f"max_memory checkpoints blocks where it must, checkpointing {self.checkpointing!r} all of them: leave "
                "one of them out"
            )
        if STRATEGIES[self.strategy]() is None:
            raise ValueError(
                f"max_memory chooses which blocks train, and {self.strategy!r} trains the same ones throughout: "
                f"choose strategy one of {[n for n, make in STRATEGIES.items() if make() is not None]}, or leave it out"
            )

    def progressive(self) -> Progressive | None:
        """Return the strategy's setting with this run's one-word changes, None for strategies without one."""
        base = STRATEGIES[self.strategy]()
        if base is None:
            return None
        names = {f.name for f in fields(Progressive)} & {f.name for f in fields(type(self))}
        return replace(base, **{n: getattr(self, n) for n in names if getattr(self, n) is not None})

    def save(self, path: Path) -> None:
        """Write the configuration as YAML."""
        write_whole(path, yaml.safe_dump(asdict(self), sort_keys=False))


def make_config(values: dict[str, Any]) -> RunConfig:
    """Check values and make a configuration of them. ValueError with every wrong value and the valid choices.

    Without a `size`, that of a prepared folder is taken.
    """
    known = [f.name for f in fields(RunConfig)]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"configuration keys {unknown} are unknown: choose from {known}")
    if "size" not in values and (size := _size_of_data(values.get("data"), values.get("model"))):
        values = values | {"size": size}
    try:
        config = TypeAdapter(RunConfig).validate_python(values)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, e['loc'])) or 'configuration'} = {e.get('input')!r}: {e['msg']}"
            for e in error.errors()
        ]
        raise ValueError("the configuration is not valid: " + "; ".join(lines)) from None
    config.progressive()
    return config


def read_yaml(path: str | Path) -> Any:
    """Return what a YAML file holds; an error in it names the file."""
    with Path(path).open(encoding="utf-8") as file:
        return yaml.safe_load(file)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply `key=value` overrides, the value in YAML (so 1e-3 must be written 1.0e-3 or 0.001)."""
    values = read_yaml(path) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not a mapping of configuration keys to values")
    for item in overrides:
        key, separator, value = item.partition("=")
        if not separator:
            raise ValueError(f"override {item!r} is not of the form key=value")
        values[key] = yaml.safe_load(value)
    if "seconds" in {o.partition("=")[0] for o in overrides} and not any(o.startswith("steps=") for o in overrides):
        values.pop("steps", None)
    if "steps" in {o.partition("=")[0] for o in overrides} and not any(o.startswith("seconds=") for o in overrides):
        values.pop("seconds", None)
    return make_config(values)


def _size_of_data(data: Any, model: Any) -> int | None:
    """Return the size that a prepared folder's clips have; None for other data and for a pipeline's runs."""
    if not isinstance(data, str) or (isinstance(model, str) and is_pipeline(model)):
        return None
    return stored_size(data)


def check_size(config: RunConfig) -> None:
    """Refuse a size that is not that of the prepared clips: they are trained on as they are. ValueError with both."""
    if (size := _size_of_data(config.data, config.model)) not in (None, config.size):
        raise ValueError(
            f"size {config.size}: the clips in {config.data} were prepared at {size}. Set size={size}, or prepare a "
            f"folder with --size {config.size}"
        )


def check_same(config: RunConfig, folder: Path) -> None:
    """Refuse to go on in a run folder that was begun with another configuration.

    ValueError with the keys that differ, their saved and present values.
    """
    path = folder / "config.yaml"
    if not path.exists():
        return
    saved, mine = yaml.safe_load(path.read_text()), yaml.safe_load(yaml.safe_dump(asdict(config)))
    if is_prepared(config.data):  # whose size was not noted by earlier versions, though it was trained on
        saved["size"] = config.size
    differing = {k: (saved.get(k), v) for k, v in mine.items() if saved.get(k) != v}
    if differing:
        raise ValueError(
            f"{folder} holds a run with another configuration; (saved, now): {differing}. Choose another --out, or "
            "delete the folder to begin anew"
        )


# The best of the rates tried for each on the figures, and batches that suit all; docs/log.md has what was tried.
DEMO_RATES = {"full": 1e-3, "lora": 5e-3, "ent-prog": 1e-3, "ent-prog+lora": 1e-3, "paper": 1e-3}


def demo(strategy: str, seconds: float, seed: int = 0) -> RunConfig:
    """Preset: the figures' target domain on the embedded base, `seconds` of net time."""
    return RunConfig(strategy=strategy, seconds=seconds, seed=seed, lr=DEMO_RATES[strategy], batch_size=2)
