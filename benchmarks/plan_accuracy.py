"""How well `entprog plan` predicts what a step holds, against saved-tensor accounting of small models on the CPU.

    python benchmarks/plan_accuracy.py               # writes benchmarks/results/plan_accuracy.json
    python benchmarks/plan_accuracy.py --device cuda # the same against the CUDA allocator's peak

Each family runs with the last, the first and two spread blocks trainable, the others in each mode, with everything
trainable, and each with checkpointing by block and by parts. Float32, AdamW, one step; the prediction sees shapes only.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from entprog.attention import patched
from entprog.bench import environment
from entprog.blocks import Block, find_blocks, outside_blocks
from entprog.checkpointing import CHECKPOINTS, checkpoint_blocks
from entprog.measure import saved_bytes, tensor_bytes, training_bytes
from entprog.meta import Flops
from entprog.models.pose_dit import pose_dit
from entprog.modes import preserved, set_active
from entprog.plan import Accounting, Setting, spread
from entprog.profiling import Profile, profile

Made = tuple[nn.Module, dict[str, Any]]
HEADS = {"num_attention_heads": 2, "attention_head_dim": 64}
random = torch.randn


def _wan() -> Made:
    model = diffusers.WanTransformer3DModel(
        **HEADS, in_channels=16, out_channels=16, text_dim=64, freq_dim=64, ffn_dim=512, num_layers=4,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
    )  # fmt: skip
    inputs = {"hidden_states": random(1, 16, 4, 24, 24), "encoder_hidden_states": random(1, 32, 64)}
    return model, inputs | {"timestep": torch.tensor([5])}


def _cogvideox() -> Made:
    model = diffusers.CogVideoXTransformer3DModel(
        **HEADS, time_embed_dim=64, text_embed_dim=64, num_layers=4, sample_width=24, sample_height=24,
        sample_frames=13, max_text_seq_length=32,
    )  # fmt: skip
    inputs = {"hidden_states": random(1, 4, 16, 24, 24), "encoder_hidden_states": random(1, 32, 64)}
    return model, inputs | {"timestep": torch.tensor([5])}


def _hunyuan_video() -> Made:
    model = diffusers.HunyuanVideoTransformer3DModel(
        **HEADS, num_layers=2, num_single_layers=2, num_refiner_layers=1, text_embed_dim=64, pooled_projection_dim=64,
        rope_axes_dim=(16, 24, 24),
    )  # fmt: skip
    inputs = {"hidden_states": random(1, 16, 4, 24, 24), "encoder_hidden_states": random(1, 32, 64)}
    inputs |= {"timestep": torch.tensor([5.0]), "guidance": torch.tensor([6.0])}
    return model, inputs | {"pooled_projections": random(1, 64), "encoder_attention_mask": torch.ones(1, 32)}


def _ltx() -> Made:
    model = diffusers.LTXVideoTransformer3DModel(
        **HEADS, in_channels=16, out_channels=16, cross_attention_dim=128, num_layers=4, caption_channels=64
    )
    inputs = {"hidden_states": random(1, 576, 16), "encoder_hidden_states": random(1, 32, 64)}
    inputs |= {"timestep": torch.tensor([5]), "encoder_attention_mask": torch.ones(1, 32)}
    return model, inputs | {"num_frames": 4, "height": 12, "width": 12}


def _mochi() -> Made:
    model = diffusers.MochiTransformer3DModel(
        **HEADS, num_layers=4, pooled_projection_dim=64, text_embed_dim=64, time_embed_dim=64, max_sequence_length=32
    )
    inputs = {"hidden_states": random(1, 12, 4, 24, 24), "encoder_hidden_states": random(1, 32, 64)}
    return model, inputs | {"timestep": torch.tensor([5]), "encoder_attention_mask": torch.ones(1, 32).bool()}


def _flux() -> Made:
    model = diffusers.FluxTransformer2DModel(
        **HEADS, in_channels=16, num_layers=2, num_single_layers=2, joint_attention_dim=64, pooled_projection_dim=64,
        axes_dims_rope=[16, 24, 24],
    )  # fmt: skip
    inputs = {"hidden_states": random(1, 576, 16), "encoder_hidden_states": random(1, 32, 64)}
    inputs |= {"pooled_projections": random(1, 64), "img_ids": random(576, 3), "txt_ids": random(32, 3)}
    return model, inputs | {"timestep": torch.tensor([0.5])}


def _sd3() -> Made:
    model = diffusers.SD3Transformer2DModel(
        **HEADS, sample_size=48, patch_size=2, num_layers=4, caption_projection_dim=128, joint_attention_dim=64,
        pooled_projection_dim=64, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    inputs = {"hidden_states": random(1, 16, 48, 48), "encoder_hidden_states": random(1, 32, 64)}
    return model, inputs | {"pooled_projections": random(1, 64), "timestep": torch.tensor([5])}


def _pixart() -> Made:
    model = diffusers.PixArtTransformer2DModel(
        **HEADS, sample_size=48, num_layers=4, cross_attention_dim=128, caption_channels=64,
        use_additional_conditions=False,
    )  # fmt: skip
    inputs = {"hidden_states": random(1, 4, 48, 48), "encoder_hidden_states": random(1, 32, 64)}
    inputs |= {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return model, inputs | {"timestep": torch.tensor([5])}


def _pose_dit() -> Made:
    model = pose_dit("T", depth=4)
    inputs = {"sample": random(2, 3, 4, 48, 48), "timestep": torch.rand(2), "reference": random(2, 3, 48, 48)}
    return model, inputs | {"pose": torch.rand(2, 3, 4, 48, 48)}


def _unet_motion() -> Made:
    model = diffusers.UNetMotionModel(
        block_out_channels=(32, 64), norm_num_groups=16,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), cross_attention_dim=32, num_attention_heads=2,
        layers_per_block=1, sample_size=32,
    )  # fmt: skip
    inputs = {"sample": random(1, 4, 4, 32, 32), "encoder_hidden_states": random(4, 8, 32)}
    return model, inputs | {"timestep": torch.tensor([5])}


FAMILIES: dict[str, Callable[[], Made]] = {
    "Wan": _wan,
    "CogVideoX": _cogvideox,
    "HunyuanVideo": _hunyuan_video,
    "LTX": _ltx,
    "Mochi": _mochi,
    "Flux": _flux,
    "SD3": _sd3,
    "PixArt": _pixart,
    "PoseDiT": _pose_dit,
    "UNetMotion": _unet_motion,
}


def cases(names: list[str], attention: bool) -> Iterator[tuple[str, list[str], str, str]]:
    """Yield (label, trainable blocks, mode of the others, what trains outside)."""
    yield "all", names, "pass", "all"
    yield "all blocks", names, "pass", "none"
    two = [names[i] for i in spread(len(names), 2)]
    for label, active in (("last", names[-1:]), ("first", names[:1]), ("two", two)):
        for mode in ("pass", "prefix", "bypass", "skip", *["bypass_attn"] * attention):
            yield f"{label}, {mode}", active, mode, "always"


class Measured:
    """A model's real step on a device, for any setting."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any], blocks: list[Block]) -> None:
        self.model, self.inputs, self.blocks = model, inputs, blocks
        self.head, self.stem = outside_blocks(model, blocks, (), lambda: model(**inputs))

    def loss(self) -> Tensor:
        output = self.model(**self.inputs)
        return (output if isinstance(output, Tensor) else output[0]).sum()  # keeps nothing of its own

    def step(self, active: list[str], frozen: dict[str, str], outside: str, recompute: int = 0) -> tuple[int, int, int]:
        """Return (bytes kept for backward, bytes the step holds at most, AdamW's state included, FLOPs)."""
        with preserved(self.model, self.blocks):
            for group, trains in ((self.head, outside != "none"), (self.stem, outside == "all")):
                for p in group:
                    p.requires_grad_(trains)
            set_active(self.blocks, active, frozen=frozen)
            cuda = next(self.model.parameters()).is_cuda
            optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], fused=cuda)
            # inputs and cuBLAS' workspaces, more than these small models: no part of a plan
            beside = torch.cuda.memory_allocated() - tensor_bytes(self.model.parameters()) if cuda else 0
            for _ in range(2 if cuda else 1):  # the allocator's peak is that of a step with optimizer state
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                with Flops() as counter:
                    with saved_bytes(ignore=list(self.model.parameters())) as held:
                        loss = self.loss()
                        kept = held()
                    loss.backward()
                optimizer.step()
                total = training_bytes(self.model, optimizer, kept + recompute) - beside
                optimizer.zero_grad(set_to_none=True)
                del loss
        return kept, total, counter.total


def compare(name: str, device: str = "cpu", make: Callable[[], Made] | None = None) -> list[dict[str, Any]]:
    """Return one record a case: predicted and measured bytes kept and peak, and the relative errors."""
    torch.manual_seed(0)
    model, inputs = (make or FAMILIES[name])()
    model = model.to(device).train()
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    blocks = find_blocks(model, inputs)
    predicted, measured = profile(model, inputs, blocks=blocks, device=device), Measured(model, inputs, blocks)
    able, rows = predicted.attention(), []
    if device == "cuda":
        measured.loss().backward()  # cuBLAS makes a workspace for each thread
        model.zero_grad(set_to_none=True)
    checkpoint_blocks(blocks, "parts")
    for mode in ("pass", "bypass_attn"):  # finds the blocks' parts and attention, which holds more, once
        set_active(blocks, [], frozen={b.name: mode if b.name in able else "pass" for b in blocks})
        measured.loss()
    for keep in CHECKPOINTS:
        checkpoint_blocks(blocks, keep)
        for case in cases([b.name for b in blocks], bool(able)):
            if keep == "none" or "skip" not in case[0]:
                rows.append(_row(name, case, predicted, measured, keep, able))
    return rows


def _row(
    family: str, case: tuple[str, list[str], str, str], predicted: Profile, real: Measured, keep: str, able: list[str]
) -> dict[str, Any]:
    label, active, mode, outside = case
    frozen = {n: mode if mode != "bypass_attn" or n in able else "pass" for n in predicted.blocks if n not in active}
    modes = dict.fromkeys(active, "train") | frozen
    method = {"all": "full", "none": "lora", "always": "ent-prog"}[outside]
    guess = predicted.step(modes, outside=outside, checkpointing=keep)
    setting: Setting | None = None
    if outside != "none":
        setting = Accounting().setting(predicted, modes, method=method, mode=mode, checkpointing=keep)
    recompute = _recomputed(real, active, frozen, outside, keep) if keep != "none" else 0
    kept, peak, flops = real.step(active, frozen, outside, recompute)
    return {
        "family": family,
        "case": label,
        "checkpointing": keep,
        "flops": {"predicted": guess["flops"], "measured": flops, "error": guess["flops"] / flops - 1},
        "kept": {"predicted": guess["activations"], "measured": kept, "error": guess["activations"] / kept - 1},
        "peak": {"predicted": setting.peak, "measured": peak, "error": setting.peak / peak - 1} if setting else None,
    }


def _recomputed(real: Measured, active: list[str], frozen: dict[str, str], outside: str, keep: str) -> int:
    """Bytes that the dearest block, or part of one, makes for backward, measured by running without checkpointing."""
    parts = {b.name: _parts(b, frozen.get(b.name, "train")) if keep == "parts" else ("",) for b in real.blocks}
    checkpoint_blocks(real.blocks, "none")
    with preserved(real.model, real.blocks):
        for group, trains in ((real.head, outside != "none"), (real.stem, outside == "all")):
            for p in group:
                p.requires_grad_(trains)
        set_active(real.blocks, active, frozen=frozen)
        run = [b for b in real.blocks if frozen.get(b.name) not in ("bypass", "skip")]
        dearest = _kept_inside(real, [b.module.get_submodule(n) for b in run for n in parts[b.name]])
    checkpoint_blocks(real.blocks, keep)
    return dearest


def _parts(block: Block, mode: str) -> tuple[str, ...]:
    """The parts that checkpointing runs again one by one, the block itself if it has none."""
    cut = block.attention or () if mode == "bypass_attn" else ()
    return tuple(n for n in block.segments or () if n not in cut) or ("",)


def _kept_inside(real: Measured, modules: list[nn.Module]) -> int:
    """Most bytes of new storages that autograd keeps within one of the modules' calls in a forward pass."""
    dearest = 0

    def watched(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal dearest
        given = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        with saved_bytes(ignore=[*real.model.parameters(), *given]) as held:
            output = forward(*args, **kwargs)
            dearest = max(dearest, held())
        return output

    with patched(modules, watched):
        real.loss()
    return dearest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="default: results/plan_accuracy.json, with _cuda on a GPU")
    args = parser.parse_args()
    suffix = "" if args.device == "cpu" else "_cuda"
    out = args.out or Path(__file__).parent / "results" / f"plan_accuracy{suffix}.json"
    rows: list[dict[str, Any]] = []
    table = Table(title="predicted / measured - 1, worst of all cases")
    for column in ("family", "cases", "FLOPs", "kept for backward", "peak", "worst case"):
        table.add_column(column, justify="right")
    for name in FAMILIES:
        found = compare(name, args.device)
        worst = max(found, key=lambda r: abs(r["kept"]["error"]))
        peak = max((r["peak"]["error"] for r in found if r["peak"]), key=abs)
        label = f"{worst['case']}, {worst['checkpointing']}"
        flops = max((r["flops"]["error"] for r in found), key=abs)
        table.add_row(name, str(len(found)), f"{flops:+.1%}", f"{worst['kept']['error']:+.1%}", f"{peak:+.1%}", label)
        rows += found
        print(name, label, worst["kept"], peak, flops, flush=True)
        out.write_text(json.dumps(environment() | {"rows": rows}, indent=1) + "\n")
    Console().print(table, f"{out}")


if __name__ == "__main__":
    main()
