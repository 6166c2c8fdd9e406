"""Planning: what a fine-tuning run will hold and cost, before any weight is loaded.

    peak = weights + gradients + optimizer state + activations + one recomputed block

Weights are those of the whole model, frozen blocks in their storage precision; gradients and optimizer state exist for
what trains. Activations and FLOPs come from the model's own code (profiling.py). Time is FLOPs: relative where no rate
is known. Not in it: the allocator's slack (5 to 10 % on a GPU), buffers inside one operation, text encoder and VAE.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from entprog.cei import Scores
from entprog.frozen import PRECISIONS
from entprog.plan_models import MODEL_CLASSES, PUBLISHED, block_names, build, inputs_of, latent_shape, read_model_config
from entprog.profiling import Profile, profile
from entprog.schedule import at_least_one

SHARES = (0.125, 0.25, 0.5, 0.75)  # of L, the numbers of trainable blocks that are listed
OPTIMIZERS = {"adamw": 8, "adamw8bit": 2}  # bytes of state for each trainable parameter: two moments
MASTER = 4  # bytes of a float32 copy of a trainable parameter that is stored in 16 bits
SMALL = {"bf16": 2, "int8": 1, "fp8": 1}  # bytes of a frozen block's parameter in the PRECISIONS that change them
STORED = ("float32", *PRECISIONS)  # what frozen blocks may be stored as, float32 only where the module is
RING = 2  # blocks on the GPU when frozen blocks live in pinned host memory
FROZEN_MODES = ("pass", "prefix", "bypass", "bypass_attn", "skip")
CHECKPOINTED = {"block": "with checkpointing", "parts": "checkpointing by parts", "none": "without checkpointing"}
UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(text: str | int | float) -> int:
    """Return the bytes that "24GiB", "80GB" or a number mean. ValueError for anything else."""
    if isinstance(text, int | float):
        return int(text)
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", text)
    if not match or (match[2] or "b").lower() not in UNITS:
        raise ValueError(f"memory {text!r} is not a size: write e.g. 24GiB or 80GB (units {list(UNITS)})")
    return int(float(match[1]) * UNITS[(match[2] or "b").lower()])


@dataclass(frozen=True)
class Setting:
    """One way to train: `active` trainable blocks, the mode of the others, their storage precision, checkpointing.

    method: "full", "lora" or "ent-prog". checkpointing: of every block that keeps something, "none", "block" or "parts"
    (checkpointing.py). weights, gradients, optimizer, activations, recompute: bytes. flops: of one step. seconds: of
    one step where a rate is known. own: whether frozen blocks stay in the module's own precision.
    """

    method: str
    active: int
    mode: str
    frozen: str
    checkpointing: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    recompute: int
    flops: int
    seconds: float | None = None
    own: bool = True

    @property
    def peak(self) -> int:
        """Bytes held at the worst moment of a step."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.recompute

    def describe(self) -> str:
        """Return the setting in words."""
        blocks = "" if self.method != "ent-prog" else f", {self.active} blocks, the others {self.mode}"
        stored = "" if self.own else f" and stored {self.frozen}"
        return f"{self.method}{blocks}{stored}, {CHECKPOINTED[self.checkpointing]}"


@dataclass(frozen=True)
class Plan:
    """What every setting would hold and cost; `plan` makes it.

    reference: full training, with checkpointing unless only settings without it were asked for.
    """

    model: str
    settings: tuple[Setting, ...]
    reference: Setting
    lora: Setting
    blocks: dict[str, int]  # name -> parameters
    parameters: int
    assumptions: dict[str, Any]
    profile: Profile = field(repr=False)

    def fits(self, memory: str | int) -> list[Setting]:
        """Return the settings whose peak is within some memory. ValueError with the smallest need if there is none."""
        limit = parse_bytes(memory)
        found = [s for s in self.settings if s.peak <= limit]
        if not found:
            least = min(self.settings, key=lambda s: s.peak)
            raise ValueError(
                f"nothing of {self.model} fits {limit / 2**30:.1f} GiB: the least is {least.peak / 2**30:.1f} GiB, "
                f"{least.describe()}. Fewer frames, a smaller frame or optimizer=adamw8bit need less"
            )
        return found

    def best(self, memory: str | int, modes: Iterable[str] = ("pass", "bypass")) -> Setting:
        """Return the setting that trains most blocks within some memory, and of those the fastest.

        Among full training and Ent-Prog with frozen blocks in `modes`, by default those that keep the forward pass and
        let any block train; on equal terms frozen weights stay as they are.
        """
        allowed = ("train", *modes)
        found = [s for s in self.fits(memory) if s.method != "lora" and s.mode in allowed]
        if not found:
            least = min((s for s in self.settings if s.method != "lora" and s.mode in allowed), key=lambda s: s.peak)
            raise ValueError(f"no setting with frozen blocks in {list(modes)} fits {memory}: the least is "
                             f"{least.peak / 2**30:.1f} GiB, {least.describe()}")  # fmt: skip
        return min(found, key=lambda s: (-s.active, s.flops, STORED.index(s.frozen)))

    def costs(self) -> dict[str, dict[str, int]]:
        """Return {"forward", "input", "weight"} FLOPs of each block, for `cost_aware`."""
        return self.profile.cost.parts()

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        first = next(iter(self.blocks))
        rows = [asdict(s) | {"peak": s.peak, "step": s.flops / self.reference.flops} for s in self.settings]
        able = self.profile.attention()
        shown = {n: [m for m in ("train", *FROZEN_MODES) if m != "bypass_attn" or n in able] for n in self._kinds()}
        kinds = {n: {m: self.profile.block(n, m) for m in modes} for n, modes in shown.items()}
        return {
            "model": self.model,
            "parameters": self.parameters,
            "blocks": len(self.blocks),
            "block_parameters": self.blocks[first],
            "assumptions": self.assumptions,
            "per_block": kinds,
            "settings": rows,
        }

    def _kinds(self) -> list[str]:
        """The second block of each size: with a gradient at its door, as most have."""
        seen: dict[int, list[str]] = {}
        for name, count in self.blocks.items():
            seen.setdefault(count, []).append(name)
        return [names[min(1, len(names) - 1)] for names in seen.values()]


def spread(count: int, active: int) -> list[int]:
    """Return `active` indices of `count`, each in the middle of an equal share: what a ranking may choose."""
    return sorted({int((i + 0.5) * count / active) for i in range(active)})


def modes_for(names: Sequence[str], active: int, mode: str, ranking: Sequence[str] | None = None) -> dict[str, str]:
    """Return name -> mode for a number of trainable blocks.

    They are the first of `ranking`, or spread evenly where there is none; for `prefix` the last ones, since only what
    lies in front of every trainable block runs so. `skip`: half of the blocks at most, the first that are frozen, sit
    out; the others are bypassed.
    """
    if mode == "prefix":
        chosen = set(names[len(names) - active :])
    elif ranking:
        chosen = set(ranking[:active])
    else:
        chosen = {names[i] for i in spread(len(names), active)}
    modes = {n: "train" if n in chosen else mode for n in names}
    if mode == "skip":
        order = [n for n in (reversed(ranking) if ranking else names) if n not in chosen]
        out = set(order[: len(names) // 2])
        modes = {n: m if m == "train" or n in out else "bypass" for n, m in modes.items()}
    return modes


@dataclass(frozen=True)
class Accounting:
    """How bytes are counted: optimizer, float32 master copies, and the rate that turns FLOPs into seconds."""

    optimizer: str = "adamw"
    master: bool = True
    rate: float | None = None  # FLOP/s

    def setting(
        self,
        measured: Profile,
        modes: Mapping[str, str],
        *,
        method: str = "ent-prog",
        mode: str = "train",
        frozen: str | None = None,
        checkpointing: str = "none",
    ) -> Setting:
        """Return what training with each block in a mode would hold and cost.

        Outside blocks everything trains with `full`, nothing with `lora`, otherwise the head and what was made for the
        task. frozen: None leaves frozen blocks as they are. ValueError for an unknown optimizer or precision.
        """
        own, frozen = own_precision(measured), frozen or own_precision(measured)
        if self.optimizer not in OPTIMIZERS or frozen not in (own, *PRECISIONS):
            raise ValueError(f"optimizer {self.optimizer!r}, frozen {frozen!r}: choose of {list(OPTIMIZERS)} and "
                             f"{list(dict.fromkeys((own, *PRECISIONS)))}")  # fmt: skip
        lora = method == "lora"
        outside = {"full": "all", "lora": "none"}.get(method, "always")
        step = measured.step(modes, outside=outside, checkpointing=checkpointing, lora=lora)
        trained = [n for n in measured.blocks if modes.get(n, "train") == "train" and not lora]
        width = sum(measured.bytes.values()) / sum(measured.blocks.values())  # bytes of a parameter
        extra = {"all": measured.outside, "always": measured.always, "none": (0, 0)}[outside]
        count = sum(measured.blocks[n] for n in trained) + extra[0]
        held = sum(measured.bytes[n] for n in trained) + extra[1]
        weights = measured.outside[1] + sum(measured.bytes[n] for n in trained)
        weights += _frozen_bytes(measured, [n for n in measured.blocks if n not in trained], frozen)
        if lora:
            count = sum(measured.adapters.values())
            held = int(count * width)
            weights += held
        state = OPTIMIZERS[self.optimizer] + (MASTER if self.master and width < 3.5 else 0)
        return Setting(
            method, len(trained), mode, frozen, checkpointing, weights, held, count * state, step["activations"],
            step["recompute"], step["flops"], step["flops"] / self.rate if self.rate else None,
            frozen == own,
        )  # fmt: skip


def own_precision(measured: Profile) -> str:
    """Return what the blocks' weights are as the module has them, a row of STORED: "bf16" for any 16 bits."""
    return "float32" if sum(measured.bytes.values()) > 3 * sum(measured.blocks.values()) else "bf16"


def _frozen_bytes(measured: Profile, names: Sequence[str], precision: str) -> int:
    """Bytes on the GPU of frozen blocks' weights in a storage precision."""
    if precision == "cpu":
        return sum(sorted((measured.bytes[n] for n in names), reverse=True)[:RING])
    if precision != own_precision(measured):
        return sum(measured.blocks[n] * SMALL[precision] for n in names)
    return sum(measured.bytes[n] for n in names)


def all_settings(
    measured: Profile,
    accounting: Accounting,
    *,
    checkpointing: Sequence[str] = tuple(CHECKPOINTED),
    ranking: Sequence[str] | None = None,
) -> list[Setting]:
    """List full training, LoRA and every (m, mode, precision) of Ent-Prog, m on {L/8, L/4, L/2, 3L/4, L}.

    With bypass_attn blocks without self-attention of their own are passed; the mode is left out where none has any.
    """
    attention = measured.attention()
    names, precisions = list(measured.blocks), dict.fromkeys((own_precision(measured), *PRECISIONS))
    rows = []
    for again in checkpointing:
        rows.append(accounting.setting(measured, {}, method="full", checkpointing=again))
        if any(measured.adapters.values()):
            modes = dict.fromkeys(names, "pass")
            rows.append(accounting.setting(measured, modes, method="lora", mode="pass", checkpointing=again))
        for active in sorted({at_least_one(s, len(names)) for s in SHARES} - {len(names)}):
            for mode in (m for m in FROZEN_MODES if m != "bypass_attn" or attention):
                modes = modes_for(names, active, mode, ranking)
                modes |= {n: "pass" for n, m in modes.items() if m == "bypass_attn" and n not in attention}
                rows += [
                    accounting.setting(measured, modes, mode=mode, frozen=p, checkpointing=again) for p in precisions
                ]
    return rows


def _resolve(model: Any, sample: Any, batch: int) -> tuple[str, nn.Module, dict[str, Any], Sequence[str] | None]:
    """Return (name, model, inputs, block names) of whatever `plan` was given."""
    preset = PUBLISHED.get(model) if isinstance(model, str) else None
    if isinstance(model, nn.Module):
        name, module = type(model).__name__, model
    elif preset is not None:
        name, module = model, build(preset.model_class, preset.config)
    else:
        about = model if isinstance(model, Mapping) else None
        family, config = (about.get("_class_name", ""), about) if about is not None else read_model_config(Path(model))
        name, module = family, build(family, config)
    said = sample[0] if sample is not None and not isinstance(sample, Mapping) and len(sample) == 5 else 1
    if batch not in (1, said):
        inputs = isinstance(sample, Mapping)
        raise ValueError(
            f"batch {batch} is for a size in pixels, and {'the inputs' if inputs else f'the latent {tuple(sample)}'} "  # type: ignore[arg-type]
            "have a batch of their own: leave batch out, or give it there"
        )
    if isinstance(sample, Mapping):
        return name, module, dict(sample), block_names(module)
    known = MODEL_CLASSES.get(type(module).__name__)
    if known is None:
        raise ValueError(
            f"{name} needs the inputs of its forward as a dict of tensors; shapes suffice for {list(MODEL_CLASSES)}"
        )
    if sample is None or len(sample) == 3:
        if sample is None and preset is None:
            raise ValueError(
                f"{name} needs a sample shape: (frames, height, width) in pixels or a latent (B, C, F, H, W)"
            )
        size = tuple(sample) if sample is not None else preset.size  # type: ignore[union-attr]
        patch = module.config["patch_size"]  # type: ignore[index]
        even = patch if isinstance(patch, int) else patch[-1]
        compression = (preset.compression if preset else None) or known.compression
        sample = latent_shape(size, compression, module.config["in_channels"], batch, even)  # type: ignore[index,arg-type]
    if len(sample) != 5:
        raise ValueError(f"sample shape {tuple(sample)}: give (frames, height, width) or a latent (B, C, F, H, W)")
    return name, module, inputs_of(module, tuple(sample)), block_names(module)  # type: ignore[arg-type]


def plan(
    model: nn.Module | str | Path | Mapping[str, Any],
    sample: Sequence[int] | Mapping[str, Any] | None = None,
    *,
    batch: int = 1,
    blocks: Sequence[Any] | None = None,
    always: Sequence[str] = (),
    ranking: Sequence[str] | None = None,
    optimizer: str = "adamw",
    master: bool = True,
    checkpointing: str | None = None,
    lora_rank: int = 64,
    rate: float | None = None,
    seconds_per_step: float | None = None,
    device: str = "cuda",
    dtype: torch.dtype | None = None,
) -> Plan:
    """Plan a fine-tuning run from a model's structure alone; no weight is read or made.

    model: a module, a name of PUBLISHED, a diffusers configuration (dict, or a folder with config.json). sample: pixels
    (frames, height, width), a latent shape (B, C, F, H, W), or a dict of forward inputs. batch: samples, of a size in
    pixels. blocks, always: as for EntProg. ranking: block names, best first; without one trainable blocks are spread
    evenly. master: float32 copies of what trains in 16 bits. checkpointing: only "block", "parts" or "none", by default
    all three. rate: FLOP/s; or seconds_per_step: of full training, measured. dtype: bf16 for configurations, a module's
    own.

    ValueError for anything unknown, with the choices.
    """
    name, module, inputs, names = _resolve(model, sample, batch)
    if dtype is None and not isinstance(model, nn.Module):
        dtype = torch.bfloat16
    if rate is not None and seconds_per_step is not None:
        raise ValueError(f"rate {rate} and seconds_per_step {seconds_per_step}: give one of them")
    measured = profile(
        module, inputs, blocks=blocks or names, always=always, device=device, dtype=dtype, lora_rank=lora_rank
    )
    if ranking is not None and (unknown := set(ranking) ^ set(measured.blocks)):
        raise ValueError(
            f"ranking and blocks differ in {sorted(unknown)[:8]}: name each of {list(measured.blocks)} once"
        )
    if checkpointing is not None and checkpointing not in CHECKPOINTED:
        raise ValueError(f"checkpointing {checkpointing!r} is unknown: choose one of {list(CHECKPOINTED)}, or None")
    keeps = tuple(CHECKPOINTED) if checkpointing is None else (checkpointing,)
    if seconds_per_step is not None:
        reference = Accounting(optimizer, master).setting(measured, {}, method="full", checkpointing=keeps[0])
        rate = reference.flops / seconds_per_step
    rows = all_settings(measured, Accounting(optimizer, master, rate), checkpointing=keeps, ranking=ranking)
    shapes = {k: tuple(v.shape) for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    return Plan(
        model=name,
        settings=tuple(rows),
        reference=next(s for s in rows if s.method == "full"),
        lora=next((s for s in rows if s.method == "lora"), rows[0]),
        blocks=measured.blocks,
        parameters=sum(measured.blocks.values()) + measured.outside[0],
        assumptions={
            "inputs": shapes,
            "optimizer": optimizer,
            "master": master,
            "lora_rank": lora_rank,
            "device": device,
            "rate": rate,
            "active": "of the ranking" if ranking else "spread evenly; prefix: the last ones",
        },
        profile=measured,
    )


def cost_aware(
    scores: Scores | Mapping[str, float], costs: Mapping[str, Mapping[str, float]], budget: float
) -> list[str]:
    """Choose the trainable blocks with the largest sum of scores whose step fits a time budget, others in `pass`.

        cost(S) = sum_b forward_b + sum_{b >= min S} input_b + sum_{b in S} weight_b

    The earliest trainable block sets the price of what follows it, so each block is tried as the earliest; behind it
    the undominated pairs (weight cost, score) of all subsets decide, which is exact. `costs`: name -> {"forward",
    "input", "weight"} in execution order, in the budget's unit. Returns names in execution order; at least one block.

    ValueError if names differ or not even the cheapest block fits.
    """
    values = scores.values if isinstance(scores, Scores) else scores
    if set(values) != set(costs):
        raise ValueError(f"scores and costs name different blocks: {sorted(set(values) ^ set(costs))}")
    names = list(costs)
    forward = sum(costs[n]["forward"] for n in names)
    behind: float = 0  # gradients of the inputs from here to the end; integers stay exact beyond 2^53
    frontier: list[tuple[float, float, tuple[str, ...]]] = [(0, 0.0, ())]  # of the blocks behind
    best: tuple[float, tuple[str, ...]] | None = None
    least = float("inf")
    for name in reversed(names):
        behind += costs[name]["input"]
        weight, score = costs[name]["weight"], values[name]
        fixed = forward + behind + weight
        least = min(least, fixed)
        for cost, total, chosen in reversed(frontier):  # dearest first, which scores most
            if fixed + cost <= budget:
                if best is None or total + score > best[0]:
                    best = (total + score, (name, *chosen))
                break
        frontier = _undominated(frontier, [(c + weight, t + score, (name, *chosen)) for c, t, chosen in frontier])
    if best is None:
        raise ValueError(f"no block can train within {budget:.4g}: the cheapest step costs {least:.4g}")
    return list(best[1])


def _undominated(a: list[tuple[float, float, Any]], b: list[tuple[float, float, Any]]) -> list[Any]:
    """Merge two lists by cost and keep what scores more than everything cheaper."""
    kept: list[Any] = []
    for item in sorted([*a, *b], key=lambda entry: (entry[0], -entry[1])):
        if not kept or item[1] > kept[-1][1]:
            kept.append(item)
    return kept
