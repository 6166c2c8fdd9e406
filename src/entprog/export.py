"""Saving forms of a trained model: a diffusers folder, a single file, a block delta, a LoRA. FORMS is the table.

    export("runs/mine", "delta", "mine.safetensors")          # what differs from the base, exactly
    export("mine.safetensors", "diffusers", "whole", base="base_folder")

Everything is safetensors. A delta holds the new weights, not differences: a sum is rounded, a copy is not.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from entprog.blocks import evaluating, find_blocks, first_tensor, forked_rng
from entprog.cei import Scores
from entprog.config import load_config
from entprog.layouts import LAYOUTS, from_original, to_original
from entprog.measure import best_device
from entprog.models.pretrained import model_of
from entprog.weights import PREFIX, Weights, build, changed_tensors, content_hash, read_weights, structure

LORA_PREFIX = {"diffusers": "transformer", "original": "diffusion_model"}


def _save(tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str]) -> None:
    """Write one file; tied weights, which safetensors refuses, each in full."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder, and this form is one file: give e.g. {path / 'model.safetensors'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    held: set[int] = set()
    apart = {}
    for name, value in tensors.items():
        memory = value.untyped_storage().data_ptr()
        apart[name] = value.detach().clone() if memory in held else value.detach().contiguous()
        held.add(memory)
    save_file(apart, path, {"format": "pt"} | dict(about))


# -- the forms -------------------------------------------------------------------------------------------------------


def save_diffusers(weights: Weights, out: Path) -> dict[str, Any]:
    """Write config.json and sharded safetensors, which from_pretrained loads."""
    from huggingface_hub import save_torch_state_dict

    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(weights.config, indent=2, sort_keys=True) + "\n")
    tensors = {k: v.detach() for k, v in weights.tensors.items()}
    save_torch_state_dict(tensors, out, filename_pattern="diffusion_pytorch_model{suffix}.safetensors")
    return {"tensors": len(tensors)}


def save_single_file(weights: Weights, out: Path) -> dict[str, Any]:
    """Write one file with the keys of the family's original repository, which ComfyUI and from_single_file read.

    A class that LAYOUTS lacks keeps diffusers' keys behind ComfyUI's prefix; the metadata's `layout` says which it is.
    """
    known = weights.class_name in LAYOUTS
    if known:
        tensors = to_original(weights.class_name, weights.tensors)
    else:
        tensors = {f"{PREFIX}{k}": v for k, v in weights.tensors.items()}
    layout = "original" if known else f"diffusers keys behind {PREFIX}: no original layout is known for this class"
    _save(tensors, out, {"entprog.form": "single-file", "layout": layout, "config": json.dumps(weights.config)})
    return {"tensors": len(tensors), "layout": layout}


def save_delta(weights: Weights, out: Path, base: Weights, scores: Scores | None = None) -> dict[str, Any]:
    """Write the new weights of every tensor that training changed, with the base's hash and the blocks' names.

    Metadata: base_sha256, trained_sha256 (content_hash), blocks (those with a changed tensor), scores, config, and
    casts, the precision of what is the base's but for its precision.
    """
    changed = set(changed_tensors(weights, base))
    names = [b.name for b in find_blocks(structure(weights))]
    blocks = [n for n in names if any(k.startswith(f"{n}.") for k in changed)]
    kept = {k: base.tensors[k].dtype for k in base.tensors if k not in changed}
    casts = {k: str(weights.tensors[k].dtype) for k, dtype in kept.items() if weights.tensors[k].dtype != dtype}
    about = {
        "entprog.form": "delta",
        "base_sha256": content_hash(base.tensors),
        "trained_sha256": content_hash(weights.tensors),
        "blocks": json.dumps(blocks),
        "scores": json.dumps(asdict(scores)) if scores else "",
        "config": json.dumps(weights.config),
        "casts": json.dumps(casts),
    }
    _save({k: weights.tensors[k] for k in sorted(changed)}, out, about)
    return {"tensors": len(changed), "of": len(weights.tensors), "blocks": blocks, "base_sha256": about["base_sha256"]}


# -- the difference as LoRA ------------------------------------------------------------------------------------------


def low_rank(delta: Tensor, rank: int | None, energy: float | None) -> tuple[Tensor, Tensor]:
    """Factor a matrix (out, in) into A (r, in) and B (out, r), the best of rank r (Eckart and Young, 1936).

        delta = U S V^T  ~  B A,   B = U_r S_r^(1/2),  A = S_r^(1/2) V_r^T

    r is `rank`, or the least that keeps the share `energy` of the squared singular values.
    """
    u, s, v = torch.linalg.svd(delta.to(best_device()).float(), full_matrices=False)
    if rank is None:
        kept = s.double().square().cumsum(0) / s.double().square().sum()
        rank = int((kept < float(energy or 1) - 1e-12).sum()) + 1
    root = s[:rank].sqrt()
    return (root[:, None] * v[:rank]).to(delta.device), (u[:, :rank] * root).to(delta.device)


@dataclass
class _Lora:
    """What a LoRA file will hold, and how far it is from the true difference."""

    tensors: dict[str, Tensor] = field(default_factory=dict)  # without the prefix
    model: dict[str, Tensor] = field(default_factory=dict)  # the base with it, in the layout of the file
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    stored: list[str] = field(default_factory=list)  # as plain differences
    dropped: list[str] = field(default_factory=list)
    change: float = 0.0  # squared norms: of everything that training changed in what the base has
    error: float = 0.0

    def add_linear(self, name: str, before: Tensor, after: Tensor, rank: int | None, energy: float | None) -> None:
        """Put a linear layer's weight in as A and B, in the trained precision."""
        delta = after.float() - before.float()
        a, b = (f.to(after.dtype).contiguous() for f in low_rank(delta, rank, energy))
        layer = name.removesuffix(".weight")
        self.tensors |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
        made = b.float() @ a.float()
        self.model[name] = (before.float() + made).to(after.dtype)
        change, error = float(delta.double().square().sum()), float((delta - made).double().square().sum())
        self.layers[layer] = {"rank": len(a), "relative_error": (error / change) ** 0.5, "change": change**0.5}
        self.change, self.error = self.change + change, self.error + error

    def add_other(self, name: str, before: Tensor | None, after: Tensor, key: str | None) -> None:
        """Put anything else in as a plain difference under `key`, or leave it out where there is none."""
        if before is None or before.shape != after.shape:
            self.dropped.append(name)
            return
        delta = after.float() - before.float()
        change = float(delta.double().square().sum())
        self.change += change
        if key is None:
            self.error += change
            self.dropped.append(name)
            return
        self.tensors[key] = delta.to(after.dtype)
        self.model[name] = (before.float() + self.tensors[key].float()).to(after.dtype)
        self.stored.append(name)


def _difference_key(name: str, keys: str, with_bias: set[str]) -> str | None:
    """Return the key under which the format knows a difference that is not a linear weight, None where it does not.

    ComfyUI (original keys) adds `.diff` and `.diff_b` to any tensor; peft has a bias in lora_B, in all layers or none.
    """
    if keys == "original":
        for ending, key in ((".weight", ".diff"), (".bias", ".diff_b")):
            if name.endswith(ending):
                return name.removesuffix(ending) + key
        return f"{name}.diff"
    layer = name.removesuffix(".bias")
    return f"{layer}.lora_B.bias" if layer in with_bias else None


def save_lora(
    weights: Weights,
    out: Path,
    base: Weights,
    *,
    rank: int | None = None,
    energy: float | None = None,
    keys: str = "diffusers",
    example: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the difference from the base as LoRA and OUT.json with its error; returns that report.

    rank: of every layer; energy: share of each layer's squared change to keep; give one. keys: "diffusers" for
    load_lora_weights and load_lora_adapter, "original" for ComfyUI. example: forward inputs to measure the outputs on.

    Report: relative Frobenius error |dW - BA| / |dW| of every layer, `linear_error` of all of them together,
    `total_error` with what was dropped, which is listed, and `output_error` relative to the output and to its change.
    """
    too_low = rank is not None and rank < 1
    if (rank is None) == (energy is None) or too_low or (energy is not None and not 0 < energy <= 1):
        raise ValueError(
            f"a lora needs exactly one of rank (at least 1, e.g. --rank 32) and energy (in (0, 1], e.g. --energy 0.9): "
            f"given were {rank} and {energy}"
        )
    if keys not in LORA_PREFIX:
        raise ValueError(f"keys {keys!r} are unknown: choose one of {sorted(LORA_PREFIX)}")
    changed = set(changed_tensors(weights, base))
    linear = {f"{n}.weight" for n, m in structure(weights).named_modules() if isinstance(m, nn.Linear)}
    after, before = weights.tensors, base.tensors
    if keys == "original":
        after, before = (to_original(w.class_name, w.tensors) for w in (weights, base))
        changed, linear = ({LAYOUTS[weights.class_name](n) for n in names} for names in (changed, linear))
    made = _decompose(after, before, changed, linear, keys, rank, energy)
    found = _lora_report(made)
    if example is not None:
        model = from_original(made.model) if keys == "original" else made.model
        found["output_error"] = output_error(weights, base, replace(base, tensors=model), example)
    prefix = LORA_PREFIX[keys]
    about = {
        "entprog.form": "lora",
        "base_sha256": content_hash(base.tensors),
        "total_error": str(found["total_error"]),
    }
    if keys == "diffusers":
        about["lora_adapter_metadata"] = json.dumps({f"{prefix}.{k}": v for k, v in _adapter_config(made).items()})
    _save({f"{prefix}.{k}": v for k, v in made.tensors.items()}, out, about)
    out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def _decompose(
    after: Mapping[str, Tensor], before: Mapping[str, Tensor], changed: set[str], linear: set[str], keys: str,
    rank: int | None, energy: float | None,
) -> _Lora:  # fmt: skip
    """Go through the changed tensors, linear weights first, in the layout of the file."""
    made = _Lora(model=dict(before))
    matrices = sorted(n for n in changed & linear if n in before and before[n].shape == after[n].shape)
    if not matrices:
        raise ValueError("no linear weight differs from the base's: there is nothing to write as LoRA")
    for name in matrices:
        made.add_linear(name, before[name], after[name], rank, energy)
    all_biased = all(f"{layer}.bias" in before for layer in made.layers)
    with_bias = set(made.layers) if all_biased else set()
    for name in sorted(changed - set(matrices)):
        made.add_other(name, before.get(name), after[name], _difference_key(name, keys, with_bias))
    if keys == "diffusers" and made.stored:
        for layer, b in ((n, made.tensors[f"{n}.lora_B.weight"]) for n in made.layers):
            made.tensors.setdefault(f"{layer}.lora_B.bias", torch.zeros_like(b[:, 0]))
    return made


def _lora_report(made: _Lora) -> dict[str, Any]:
    change = sum(v["change"] ** 2 for v in made.layers.values())
    error = sum((v["change"] * v["relative_error"]) ** 2 for v in made.layers.values())
    return {
        "layers": made.layers,
        "linear_error": (error / change) ** 0.5,
        "total_error": (made.error / made.change) ** 0.5,
        "dropped": made.dropped,
        "stored_as_difference": made.stored,
    }


def _adapter_config(made: _Lora) -> dict[str, Any]:
    """Return what peft's LoraConfig has to say: alpha equals the rank in every layer, so nothing is scaled."""
    ranks = {layer: int(v["rank"]) for layer, v in made.layers.items()}
    most = max(ranks.values())
    own = {f"^{layer}": r for layer, r in ranks.items() if r != most}
    config = {"r": most, "lora_alpha": most, "rank_pattern": own, "alpha_pattern": own, "target_modules": list(ranks)}
    return config | {"lora_bias": any(k.endswith("lora_B.bias") for k in made.tensors)}


def output_error(
    trained: Weights, base: Weights, other: Weights, example: Mapping[str, Any]
) -> dict[str, float | None]:
    """Return how far a model's output is from the trained one's on forward inputs.

    |y - y'| relative to the output |y'| (`relative`) and to what training changed in it, |y' - y_base| (`of_change`);
    None where that is zero.
    """
    outputs = []
    for weights in (trained, base, other):
        model = build(weights)
        with evaluating(model), forked_rng(0):
            output = model(**example)
            outputs.append(
                first_tensor(output if isinstance(output, Tensor | tuple) else tuple(output.values())).double()
            )
    y, y_base, y_other = outputs
    error = float((y_other - y).norm())
    return {
        name: error / float(size.norm()) if size.any() else None
        for name, size in (("relative", y), ("of_change", y - y_base))
    }


# form -> (function, its options)
FORMS: dict[str, tuple[Callable[..., dict[str, Any]], tuple[str, ...]]] = {
    "diffusers": (save_diffusers, ()),
    "single-file": (save_single_file, ()),
    "delta": (save_delta, ("base", "scores")),
    "lora": (save_lora, ("base", "rank", "energy", "keys", "example")),
}


def export(source: Any, form: str, out: str | Path, *, base: Any = None, **options: Any) -> dict[str, Any]:
    """Save a model in one of FORMS; returns what was written.

    source, base: a module, a diffusers folder, a run folder or a file of `export`; a run knows its base and scores.
    options: of the form's function. ValueError for an unknown form, an option the form lacks, a base that is missing.
    """
    if form not in FORMS:
        raise ValueError(f"form {form!r} is unknown: choose one of {list(FORMS)}")
    save, known = FORMS[form]
    given = {k: v for k, v in options.items() if v is not None}
    if wrong := sorted(set(given) - set(known)):
        raise ValueError(f"the form {form!r} has no option {wrong}: it has {list(known)}")
    weights = read_weights(source, base)
    if "base" in known:
        of_run = _of_run(source)
        base = of_run.get("base") if base is None else base
        if base is None:
            raise ValueError(f"the form {form!r} needs the base that was trained: give its folder")
        given["base"] = read_weights(base)
        if "scores" in known and "scores" in of_run:
            given.setdefault("scores", of_run["scores"])
    return save(weights, Path(out), **given)


def _of_run(source: Any) -> dict[str, Any]:
    """Return a run folder's base model and the scores that decided, as far as it has them."""
    if not isinstance(source, str | Path) or not (Path(source) / "config.yaml").exists():
        return {}
    config = load_config(Path(source) / "config.yaml")
    settings = config.progressive()
    files = sorted((Path(source) / "scores").glob(f"{settings.priority}-[0-9]*.json")) if settings else []
    return {"base": model_of(config)} | ({"scores": Scores.load(files[-1])} if files else {})
