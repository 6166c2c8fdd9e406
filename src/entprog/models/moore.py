"""Animate-Anyone in the layout of Moore-AnimateAnyone, from diffusers' classes; its .pth files without unpickling.

Architecture and file layout are those of github.com/MooreThreads/Moore-AnimateAnyone, commit a914ef3: src/models/
(unet_2d_condition.py, unet_3d.py, motion_module.py, pose_guider.py, mutual_self_attention.py),
configs/inference/inference_v2.yaml and scripts/pose2vid.py. What was not seen is the published weights themselves.

    reference_unet.pth    Stable Diffusion 1.5's UNet without its output layers; its features are the bank
    denoising_unet.pth    the same UNet, frame by frame; self-attention also reads the bank
    motion_module.pth     temporal attention after every pair of layers, AnimateDiff's
    pose_guider.pth       convolutions from pose image to the denoiser's first features
"""

import io
import math
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

FILES = ("reference_unet", "denoising_unet", "motion_module", "pose_guider")

_STORAGES = {
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch DoubleStorage": torch.float64,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch BoolStorage": torch.bool,
}
_TENSOR, _PARAMETER, _DICT = (
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
)
_MARK = object()


class _Name(str):
    """A global the pickle names: kept as its name, never imported."""


def read_pth(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict that torch.save wrote, without unpickling: nothing is imported or called.

    The file is a zip of a pickle and raw storages. The pickle's opcodes are walked and only those that build a flat
    dict of tensors are carried out. ValueError, with its name, for any other opcode or global, and for other files.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no zip archive: only the format that torch.save has written since 1.6 is read")
    with zipfile.ZipFile(path) as archive:
        pickles = [n for n in archive.namelist() if n.endswith("data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"{path} holds {len(pickles)} data.pkl instead of one: it was not written by torch.save")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise ValueError(f"{path} was written on a big-endian machine, which is not supported")
        try:
            state = _walk(archive.read(pickles[0]), lambda key: archive.read(f"{root}data/{key}"), path)
        except (AttributeError, IndexError, KeyError, StopIteration, TypeError) as error:
            raise ValueError(f"{path} is damaged: its pickle or a storage is incomplete ({error!r})") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds something else than a flat state dict: a dict of names and tensors")
    return state


def convert_pth(source: str | Path, target: str | Path) -> None:
    """Write a .pth state dict as safetensors, under the same names."""
    save_file(read_pth(source), target)


def _walk(pickled: bytes, read: Any, path: str | Path) -> Any:
    """Carry out the opcodes of a state dict's pickle on a stack of our own."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    storages: dict[str, Tensor] = {}

    def popped() -> list[Any]:
        at = len(stack) - 1 - next(i for i, v in enumerate(reversed(stack)) if v is _MARK)
        items = stack[at + 1 :]
        del stack[at:]
        return items

    operations: Iterator[tuple[Any, Any, Any]] = pickletools.genops(io.BytesIO(pickled))
    for opcode, argument, _ in operations:
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            pass
        elif name == "STOP":
            return stack.pop()
        elif name == "GLOBAL":
            if argument not in {*_STORAGES, _TENSOR, _PARAMETER, _DICT}:
                raise ValueError(
                    f"{path} names {argument.replace(' ', '.')!r}, which a state dict does not need: refused"
                )
            stack.append(_Name(argument))
        elif name in ("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"):
            stack.append(argument)
        elif name in ("NEWTRUE", "NEWFALSE", "NONE"):
            stack.append({"NEWTRUE": True, "NEWFALSE": False, "NONE": None}[name])
        elif name in ("EMPTY_DICT", "EMPTY_TUPLE"):
            stack.append({} if name == "EMPTY_DICT" else ())
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            items = popped() if name == "TUPLE" else [stack.pop() for _ in range(int(name[-1]))][::-1]
            stack.append(tuple(items))
        elif name in ("SETITEM", "SETITEMS"):
            items = popped() if name == "SETITEMS" else [stack.pop() for _ in range(2)][::-1]
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "BINPERSID":
            stack[-1] = _storage(stack[-1], read, storages, path)
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_rebuilt(function, arguments, path))
        elif name == "BUILD":
            stack.pop()  # the state dict's _metadata: versions of modules, which these have none of
        else:
            raise ValueError(f"{path} uses the pickle opcode {name}, which a state dict does not need: refused")
    raise ValueError(f"{path} ends in the middle of its pickle")


def _storage(persistent: Any, read: Any, storages: dict[str, Tensor], path: str | Path) -> Tensor:
    """Return a raw storage of the archive as a flat tensor."""
    if not isinstance(persistent, tuple) or len(persistent) != 5 or persistent[1] not in _STORAGES:
        raise ValueError(f"{path} refers to something else than a storage: {str(persistent)[:80]}")
    _, kind, key, _, _ = persistent
    if key not in storages:
        data, dtype = bytearray(read(key)), _STORAGES[kind]
        storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.zeros(0, dtype=dtype)
    return storages[key]


def _rebuilt(function: Any, arguments: Any, path: str | Path) -> Any:
    """Return what the pickle wants made: an empty dict, a tensor out of a storage, or a parameter, as a tensor."""
    if function == _DICT and arguments == ():
        return {}
    if function == _TENSOR and isinstance(arguments[0], Tensor):
        storage, offset, size, stride = arguments[:4]
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if min((offset, *size, *stride), default=0) < 0 or (math.prod(size) and last >= len(storage)):
            raise ValueError(f"{path} holds a tensor {size} with stride {stride} beyond its storage of {len(storage)}")
        return storage.as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)
    if function == _PARAMETER and isinstance(arguments[0], Tensor):
        return arguments[0]
    raise ValueError(f"{path} calls {function!r} on {str(arguments)[:80]}, which a state dict does not need: refused")


class PoseGuider(nn.Module):
    """Convolutions with SiLU between them: pose images (N, 3, 8H, 8W) to features (N, channels, H, W)."""

    def __init__(self, channels: int = 320, widths: tuple[int, ...] = (16, 32, 96, 256)) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        steps = [(a, b, stride) for a, c in zip(widths, widths[1:], strict=False) for b, stride in ((a, 1), (c, 2))]
        self.blocks = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, stride=stride) for a, b, stride in steps)
        self.conv_out = nn.Conv2d(widths[-1], channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    def forward(self, pose: Tensor) -> Tensor:
        """Return the features that are added to the denoiser's first ones."""
        x = F.silu(self.conv_in(pose))
        for conv in self.blocks:
            x = F.silu(conv(x))
        return self.conv_out(x)


class _Attention:
    """Scaled dot-product attention; self-attention named in `reference` reads those tokens as well.

    The bank arrives as an argument of every block, so that a frozen block sees whether gradients must pass through it.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        reference: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if reference and self.name in reference:
            bank = reference[self.name]
            context = torch.cat((context, bank.repeat_interleave(len(context) // len(bank), 0)), 1)  # once a frame

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, k, v = heads(attn.to_q(hidden_states)), heads(attn.to_k(context)), heads(attn.to_v(context))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, scale=attn.scale)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


def _each_frame(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Normalise (B, C, F, H, W) frame by frame, as Moore does; diffusers takes all frames together."""
    flat = F.group_norm(x.transpose(1, 2).flatten(0, 1), norm.num_groups, norm.weight, norm.bias, norm.eps)
    return flat.unflatten(0, (len(x), -1)).transpose(1, 2)


class AnimateAnyone(nn.Module):
    """Reference net, denoiser and pose guider; `sizes` are arguments of both UNets, by default the published ones."""

    def __init__(self, pose_widths: tuple[int, ...] = (16, 32, 96, 256), frames: int = 32, **sizes: Any) -> None:
        super().__init__()
        sizes = {"cross_attention_dim": 768, "sample_size": 64} | sizes
        heads = sizes.pop("num_attention_heads", 8)
        types = {k: sizes.pop(k) for k in ("down_block_types", "up_block_types") if k in sizes}
        motion = {k: tuple(t.replace("2D", "Motion") for t in v) for k, v in types.items()}
        reference: Any = UNet2DConditionModel(attention_head_dim=heads, **types, **sizes)
        reference.conv_norm_out, reference.conv_out = None, nn.Identity()
        denoiser: Any = UNetMotionModel(
            num_attention_heads=heads, motion_num_attention_heads=heads, motion_max_seq_length=frames, **motion, **sizes
        )
        self.reference_unet, self.denoising_unet = reference, denoiser
        self.pose_guider = PoseGuider(denoiser.conv_in.out_channels, pose_widths)
        for name, module in denoiser.named_modules():
            if name.endswith(".norm") and "motion_modules" in name:
                module.forward = MethodType(_each_frame, module)
            if name.endswith((".attn1", ".attn2")) and ".attentions." in name:
                module.set_processor(_Attention(name))

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, reference: Tensor, pose: Tensor
    ) -> Tensor:
        """Predict for latents (B, C, F, H, W) at timesteps (B,), v in the published model.

        encoder_hidden_states: CLIP image tokens of the reference (B, N, D). reference: its latent (B, C, H, W).
        pose: pose images (B, 3, F, 8H, 8W).
        """
        with _recorded(self.reference_unet) as bank:
            self.reference_unet(reference, torch.zeros_like(timestep), encoder_hidden_states)
        features = self.pose_guider(pose.transpose(1, 2).flatten(0, 1))
        handle = self.denoising_unet.conv_in.register_forward_hook(lambda module, args, output: output + features)
        try:
            return self.denoising_unet(
                sample,
                timestep,
                encoder_hidden_states.repeat_interleave(sample.shape[2], 0),
                cross_attention_kwargs={"reference": bank},
            ).sample
        finally:
            handle.remove()


@contextmanager
def _recorded(unet: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect what every self-attention of a UNet gets, by name; a block that sits out gives nothing."""
    bank: dict[str, Tensor] = {}

    def hook_for(name: str) -> Any:
        return lambda module, args: bank.__setitem__(name, args[0])

    attentions = [(n, m) for n, m in unet.named_modules() if n.endswith(".attn1")]
    handles = [m.register_forward_pre_hook(hook_for(n)) for n, m in attentions]
    try:
        yield bank
    finally:
        for handle in handles:
            handle.remove()


_MOTION_NAMES = (
    (".temporal_transformer.", "."),
    (".attention_blocks.0.pos_encoder.", ".pos_embed."),
    (".attention_blocks.0.", ".attn1."),
    (".attention_blocks.1.", ".attn2."),
    (".norms.0.", ".norm1."),
    (".norms.1.", ".norm2."),
    (".ff_norm.", ".norm3."),
)


def from_moore(file: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename one file's state dict for AnimateAnyone; `file` is one of FILES. ValueError for another.

    Moore's two temporal attentions each keep the same table of positions, diffusers keeps it once.
    """
    if file not in FILES:
        raise ValueError(f"file {file!r} is unknown: choose one of {FILES}")
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if "motion_modules" in name:
            if ".attention_blocks.1.pos_encoder." in name:
                continue
            for theirs, ours in _MOTION_NAMES:
                name = name.replace(theirs, ours)
        renamed[f"{'denoising_unet' if file == 'motion_module' else file}.{name}"] = value
    return renamed


def load_moore(model: AnimateAnyone, folder: str | Path) -> None:
    """Load FILES, each .safetensors or .pth, into a model. ValueError for keys or shapes that do not fit it."""
    state: dict[str, Tensor] = {}
    for file in FILES:
        path = Path(folder) / f"{file}.safetensors"
        if path.exists():
            state |= from_moore(file, load_file(path))
        elif path.with_suffix(".pth").exists():
            state |= from_moore(file, read_pth(path.with_suffix(".pth")))
        else:
            raise ValueError(f"{folder} has neither {file}.safetensors nor {file}.pth: all of {FILES} are needed")
    check_fits(model, state)
    model.load_state_dict(state)


def check_fits(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """ValueError, with the first names, unless `state` has exactly the model's keys and shapes; works on meta."""
    wanted = {n: tuple(v.shape) for n, v in model.state_dict().items()}
    given = {n: tuple(v.shape) for n, v in state.items()}
    problems = {
        "missing": sorted(wanted.keys() - given.keys()),
        "unknown": sorted(given.keys() - wanted.keys()),
        "shape": [
            f"{n} {given[n]}, not {wanted[n]}" for n in sorted(wanted.keys() & given.keys()) if given[n] != wanted[n]
        ],
    }
    if any(problems.values()):
        found = {k: [len(v), *v[:3]] for k, v in problems.items() if v}
        raise ValueError(f"the checkpoint is not of Moore-AnimateAnyone's architecture (count, first names): {found}")
