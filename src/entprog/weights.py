"""A model as configuration and tensors: read from wherever it was saved, compared and hashed one tensor at a time."""

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from entprog.blocks import forked_rng
from entprog.layouts import from_original

PREFIX = "model.diffusion_model."  # which ComfyUI takes off


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of safetensors files, each read when it is asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.handles = [safe_open(f, framework="pt") for f in files]
        self.where = {k: h for h in self.handles for k in h.keys()}  # noqa: SIM118  # not a dict

    def __getitem__(self, name: str) -> Tensor:
        return self.where[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)


@dataclass(frozen=True)
class Weights:
    """A model as configuration and tensors; `config` is a diffusers config.json with `_class_name`.

    `module` is the model itself where it was given as one, which any network can be.
    """

    config: dict[str, Any]
    tensors: Mapping[str, Tensor] = field(repr=False)
    module: nn.Module | None = field(default=None, repr=False)

    @property
    def class_name(self) -> str:
        """Name of the model's class."""
        return str(self.config.get("_class_name", ""))


def read_weights(source: str | Path | nn.Module | Weights, base: Any = None) -> Weights:
    """Read a model: a module, a diffusers folder, a run folder, or a file that `export` wrote.

    A delta needs its base. ValueError for what is not safetensors, for a delta without its base or with another, and
    for a module with adapters that are not merged.
    """
    if isinstance(source, Weights):
        return source
    if isinstance(source, nn.Module):
        if hasattr(source, "merge_and_unload") or any(hasattr(m, "base_layer") for m in source.modules()):
            raise ValueError(
                f"this {type(source).__name__} carries adapters that are not merged: pass what "
                "model.merge_and_unload() returns, or call fuse_lora() and unload_lora() of a diffusers model first"
            )
        config = {"_class_name": type(source).__name__} | dict(getattr(source, "config", {}))
        return Weights(config, source.state_dict(), source)
    path = Path(source)
    if path.is_file():
        return _read_file(path, base)
    for inner in ("checkpoints/final", "transformer", "unet"):
        if not (path / "config.json").exists() and (path / inner / "config.json").exists():
            path = path / inner
    if not (path / "config.json").exists():
        raise ValueError(f"{path} is neither a finished run, nor a folder with config.json, nor a file of export")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        others = sorted(f.name for f in path.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        raise ValueError(f"{path} holds no safetensors{f', but {others}' if others else ''}: only safetensors are read")
    return Weights(json.loads((path / "config.json").read_text()), TensorFiles(files))


def _read_file(path: Path, base: Any) -> Weights:
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is not a safetensors file: only safetensors are read")
    with safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
    form, tensors = about.get("entprog.form"), TensorFiles([path])
    if form == "delta":
        if base is None:
            raise ValueError(f"{path} is a delta: give the base it was made for, hash {about['base_sha256'][:12]}")
        return apply_delta(base, path)
    if form != "single-file":
        raise ValueError(f"{path} was not written by entprog export as a delta or single file (form {form!r})")
    config = json.loads(about["config"])
    if about["layout"] == "original":
        return Weights(config, from_original(tensors))
    return Weights(config, {k.removeprefix(PREFIX): v for k, v in tensors.items()})


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit (minus zero is not zero, a NaN is itself)."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, one tensor at a time: the same however they lie in files."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(_bytes(value).numpy().data)
    return digest.hexdigest()


def model_class(name: str) -> Any:
    """Return the class of a configuration: PoseDiT or one of diffusers. ValueError for another."""
    import diffusers

    from entprog.models.pose_dit import PoseDiT

    found = PoseDiT if name == "PoseDiT" else getattr(diffusers, name, None)
    if found is None:
        raise ValueError(
            f"model class {name!r} is unknown: it is neither PoseDiT nor one of diffusers {diffusers.__version__}"
        )
    return found


def structure(weights: Weights) -> nn.Module:
    """Return the model without its values: the module that was given, or one on the meta device."""
    if weights.module is not None:
        return weights.module
    with torch.device("meta"):
        return model_class(weights.class_name).from_config(weights.config)


def build(weights: Weights) -> nn.Module:
    """Make the model, each tensor in its own precision."""
    if weights.module is not None:
        model = copy.deepcopy(weights.module)
    else:
        with forked_rng():
            model = model_class(weights.class_name).from_config(weights.config)
    model.load_state_dict({k: v.detach().clone() for k, v in weights.tensors.items()}, assign=True)
    return model


def changed_tensors(trained: Weights, base: Weights) -> list[str]:
    """Names of the tensors that differ bit for bit from the base's, or that it lacks.

    A base of another precision is cast first. ValueError if the base has tensors that the trained model lacks.
    """
    if lost := sorted(set(base.tensors) - set(trained.tensors)):
        raise ValueError(f"the base has tensors that the trained model lacks, {lost[:5]}: it is another model's base")
    changed = []
    for name, value in trained.tensors.items():
        before = base.tensors.get(name)
        if before is None or before.shape != value.shape or not _same(before.to(value.dtype), value):
            changed.append(name)
    return changed


def apply_delta(base: str | Path | nn.Module | Weights, delta: str | Path) -> Weights:
    """Put a delta on its base: the trained model, bit for bit.

    ValueError for another base, with both hashes, and for a file that is no delta or is damaged.
    """
    below = read_weights(base)
    with safe_open(delta, framework="pt") as file:
        about = file.metadata() or {}
    if about.get("entprog.form") != "delta":
        raise ValueError(f"{delta} is no delta of entprog export (form {about.get('entprog.form')!r})")
    if (found := content_hash(below.tensors)) != about["base_sha256"]:
        raise ValueError(f"{delta} was made for the base with hash {about['base_sha256']}, this one has {found}")
    tensors = dict(below.tensors)
    for name, dtype in json.loads(about["casts"]).items():
        tensors[name] = tensors[name].to(getattr(torch, dtype.removeprefix("torch.")))
    tensors |= TensorFiles([Path(delta)])
    if content_hash(tensors) != about["trained_sha256"]:
        raise ValueError(f"{delta} does not give the model it was made from: the file is damaged")
    return Weights(json.loads(about["config"]), tensors)
