"""Names of layers in other programs: the original repositories' keys, and a ranking as their layer filters.

LAYOUTS is the table of the first: a diffusers class -> a function from its keys to the original repository's. FILTERS
is that of the second: a program -> a function that writes the arguments by which it trains the best blocks only.
"""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Of a Wan key, (pattern, replacement) in this order; the inverse of diffusers' convert_wan_transformer_to_diffusers.
BLOCK = r"^((?:vace_)?blocks\.\d+)\."
RES = r"^motion_encoder\.res_blocks\.(\d+)\."
WAN: tuple[tuple[str, str], ...] = (
    (r"^condition_embedder\.(time|text)_embedder\.linear_1\.", r"\1_embedding.0."),
    (r"^condition_embedder\.(time|text)_embedder\.linear_2\.", r"\1_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
    (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (BLOCK + r"scale_shift_table$", r"\1.modulation"),
    (BLOCK + r"proj_in\.", r"\1.before_proj."),
    (BLOCK + r"proj_out\.", r"\1.after_proj."),
    (BLOCK + r"norm2\.", r"\1.norm3."),
    (BLOCK + r"ffn\.net\.0\.proj\.", r"\1.ffn.0."),
    (BLOCK + r"ffn\.net\.2\.", r"\1.ffn.2."),
    (BLOCK + r"attn1\.", r"\1.self_attn."),
    (BLOCK + r"attn2\.", r"\1.cross_attn."),
    (r"_attn\.to_([qkv])\.", r"_attn.\1."),
    (r"_attn\.to_out\.0\.", "_attn.o."),
    (r"_attn\.add_([kv])_proj\.", r"_attn.\1_img."),
    (r"_attn\.norm_added_k\.", "_attn.norm_k_img."),
    # Animate
    (r"^face_adapter\.(\d+)\.to_[kv]\.", r"face_adapter.fuser_blocks.\1.linear1_kv."),
    (r"^face_adapter\.(\d+)\.to_q\.", r"face_adapter.fuser_blocks.\1.linear1_q."),
    (r"^face_adapter\.(\d+)\.to_out\.", r"face_adapter.fuser_blocks.\1.linear2."),
    (r"^face_adapter\.(\d+)\.norm_([qk])\.", r"face_adapter.fuser_blocks.\1.\2_norm."),
    (r"^face_encoder\.(conv1_local|conv2|conv3)\.", r"face_encoder.\1.conv."),
    (r"^motion_encoder\.motion_synthesis_weight$", "motion_encoder.dec.direction.weight"),
    (r"^motion_encoder\.motion_network\.", "motion_encoder.enc.fc."),
    (r"^motion_encoder\.conv_in\.weight$", "motion_encoder.enc.net_app.convs.0.0.weight"),
    (r"^motion_encoder\.conv_in\.act_fn\.bias$", "motion_encoder.enc.net_app.convs.0.1.bias"),
    (r"^motion_encoder\.conv_out\.weight$", "motion_encoder.enc.net_app.convs.8.weight"),
    (RES + r"conv1\.weight$", r"motion_encoder.enc.net_app.convs.+\1.conv1.0.weight"),
    (RES + r"conv1\.act_fn\.bias$", r"motion_encoder.enc.net_app.convs.+\1.conv1.1.bias"),
    (RES + r"conv2\.weight$", r"motion_encoder.enc.net_app.convs.+\1.conv2.1.weight"),
    (RES + r"conv2\.act_fn\.bias$", r"motion_encoder.enc.net_app.convs.+\1.conv2.2.bias"),
    (RES + r"conv_skip\.weight$", r"motion_encoder.enc.net_app.convs.+\1.skip.1.weight"),
    (r"\.\+(\d+)\.", lambda m: f".{int(m[1]) + 1}."),  # type: ignore[assignment]  # the original counts conv_in
)


def wan_key(key: str) -> str:
    """Return the original repository's key of a Wan transformer's parameter."""
    for pattern, replacement in WAN:
        key = re.sub(pattern, replacement, key)
    return key


LAYOUTS: dict[str, Callable[[str], str]] = {
    "WanTransformer3DModel": wan_key,
    "WanVACETransformer3DModel": wan_key,
    "WanAnimateTransformer3DModel": wan_key,
}


def from_original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn a Wan transformer's original tensors into diffusers', by diffusers' own converter."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    return convert_wan_transformer_to_diffusers(dict(tensors))


def to_original(class_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn a model's tensors into those of its family's original repository.

    Keys and values of a class in LAYOUTS; Animate's face adapter has one tensor for keys and values there. What
    diffusers' converter makes of the result is compared with what went in. ValueError for a class without a known
    layout and where something does not come back.
    """
    if class_name not in LAYOUTS:
        raise ValueError(f"no original layout is known for {class_name!r}: known are those of {sorted(LAYOUTS)}")
    parts: dict[str, list[Tensor]] = {}
    for key, value in tensors.items():
        new = LAYOUTS[class_name](key)
        if ".net_app." in new and new.endswith(".bias"):
            value = value[None, :, None, None]
        parts.setdefault(new, []).append(value)
    made = {k: v[0] if len(v) == 1 else torch.cat(v) for k, v in parts.items()}
    back = from_original(made)
    wrong = sorted(set(back) ^ set(tensors)) or [k for k, v in tensors.items() if not torch.equal(back[k], v)]
    if wrong:
        raise ValueError(f"these tensors of {class_name} do not come back from the original layout: {wrong[:5]}")
    return made


@dataclass(frozen=True)
class Layers:
    """Names in one layout: the chosen blocks, the linear layers in them, every parameter of the model."""

    blocks: tuple[str, ...]
    linears: tuple[str, ...]
    parameters: tuple[str, ...]


def layers(model: nn.Module, names: Sequence[str], original: bool) -> Layers:
    """Name the blocks' layers as the model does, or as its original repository does where that is known.

    ValueError for a block that the model lacks.
    """
    modules = dict(model.named_modules())
    if unknown := [n for n in names if n not in modules]:
        raise ValueError(f"the model has no block {unknown}: it has {[n for n in modules if n][:8]} ...")
    rename = LAYOUTS.get(type(model).__name__, str) if original else str

    def module_name(name: str) -> str:
        return rename(f"{name}.weight").removesuffix(".weight")

    linears = [n for b in names for n, m in modules.items() if n.startswith(f"{b}.") and isinstance(m, nn.Linear)]
    parameters = [rename(n) for n, _ in model.named_parameters()]
    return Layers(tuple(names), tuple(module_name(n) for n in linears), tuple(parameters))


def peft_filter(model: nn.Module, names: Sequence[str]) -> str:
    """LoraConfig(target_modules=...): a regular expression that matches whole module names.

    Blocks that have the same linear layers share a group. Source: peft/tuners/tuners_utils.py,
    check_target_module_exists: a string is matched by re.fullmatch.
    """
    found = layers(model, names, original=False)
    groups: dict[tuple[str, ...], list[str]] = {}
    for block in found.blocks:
        inside = tuple(n.removeprefix(f"{block}.") for n in found.linears if n.startswith(f"{block}."))
        groups.setdefault(inside, []).append(block)
    return "|".join(rf"{_either(blocks)}\.{_either(inside)}" for inside, blocks in groups.items() if inside)


def _either(names: Sequence[str]) -> str:
    return "(?:" + "|".join(re.escape(n) for n in names) + ")"


def musubi_filter(model: nn.Module, names: Sequence[str]) -> str:
    """musubi-tuner's --network_args: all but the blocks are excluded.

    An exclude pattern leaves its own exclusions (norms, modulations) in force, an include pattern would override them.
    Source: docs/advanced_config.md of kohya-ss/musubi-tuner: complete matches, exclude_patterns before
    include_patterns. Its parser splits at "=", which no pattern here contains.
    """
    pattern = rf"(?!{_either(layers(model, names, original=True).blocks)}\.).*"
    return "--network_args " + shlex.quote(f'exclude_patterns=[r"{pattern}"]')


def diffsynth_filter(model: nn.Module, names: Sequence[str]) -> str:
    """DiffSynth-Studio's --lora_target_modules: the linear layers' full names.

    Source: diffsynth/diffusion/training_module.py of modelscope/DiffSynth-Studio: split at commas and handed to peft,
    which takes a name that equals the module's or ends it after a dot. --trainable_models takes whole models only, so
    blocks cannot be chosen for full training there.
    """
    return "--lora_base_model dit --lora_target_modules " + shlex.quote(",".join(layers(model, names, True).linears))


def videox_fun_filter(model: nn.Module, names: Sequence[str]) -> str:
    """VideoX-Fun's --trainable_modules: the blocks' names, each with a dot behind.

    Source: scripts/wan2.1/train.py of aigc-apps/VideoX-Fun: a parameter trains if one of the list is a part of its
    name; without the dot blocks.1 would take blocks.10 along. ValueError where another block's name contains a chosen
    one (VACE's vace_blocks.1 contains blocks.1), for that rule cannot tell them apart.
    """
    found = layers(model, names, original=True)
    parts = [f"{b}." for b in found.blocks]
    beside = [p for p in found.parameters if any(s in p for s in parts) and not any(p.startswith(s) for s in parts)]
    if beside:
        raise ValueError(
            f"VideoX-Fun trains what has a name of the list anywhere in its own, so {list(found.blocks)} would train "
            f"{beside[:2]} ... too: choose blocks whose names are not part of others'"
        )
    return "--trainable_modules " + " ".join(shlex.quote(s) for s in parts)


FILTERS: dict[str, Callable[[nn.Module, Sequence[str]], str]] = {
    "peft": peft_filter,
    "musubi-tuner": musubi_filter,
    "diffsynth": diffsynth_filter,
    "videox-fun": videox_fun_filter,
}


def layer_filter(model: nn.Module, names: Sequence[str], program: str) -> str:
    """Write the best blocks' names as another program's layer filter: a row of FILTERS.

    Names are those of the original repository for the classes in LAYOUTS (Wan), else the model's own. ValueError for
    an unknown program, no blocks, or a block that the model lacks.
    """
    if program not in FILTERS:
        raise ValueError(f"export {program!r} is unknown: choose one of {sorted(FILTERS)}")
    if not names:
        raise ValueError("no blocks were chosen: give at least one name, best first, e.g. scores.ranking[:6]")
    return FILTERS[program](model, names)
