"""How well `entprog plan` predicts what a step holds, against saved-tensor accounting of small models on the CPU.

    python benchmarks/plan_accuracy.py               # writes benchmarks/results/plan_accuracy.json
    python benchmarks/plan_accuracy.py --device cuda # the same against the CUDA allocator's peak

Each family runs with the last, the first and two spread blocks trainable, the others in each mode, with everything
trainable, and (where the model has it) with checkpointing. Float32, AdamW, one step; the prediction sees shapes only.
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

from entprog.bench import environment
from entprog.blocks import Block, find_blocks, outside_blocks
from entprog.measure import saved_bytes, training_bytes
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


def cases(names: list[str]) -> Iterator[tuple[str, list[str], str, str]]:
    """Yield (label, trainable blocks, mode of the others, what trains outside)."""
    yield "all", names, "pass", "all"
    yield "all blocks", names, "pass", "none"
    two = [names[i] for i in spread(len(names), 2)]
    for label, active in (("last", names[-1:]), ("first", names[:1]), ("two", two)):
        for mode in ("pass", "prefix", "bypass", "skip"):
            yield f"{label}, {mode}", active, mode, "always"


class Measured:
    """A model's real step on a device, for any setting."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any], blocks: list[Block]) -> None:
        self.model, self.inputs, self.blocks = model, inputs, blocks
        self.head, self.stem = outside_blocks(model, blocks, (), lambda: model(**inputs))

    def loss(self) -> Tensor:
        output = self.model(**self.inputs)
        return (output if isinstance(output, Tensor) else output[0]).sum()  # keeps nothing of its own

    def step(self, active: list[str], mode: str, outside: str, recompute: int = 0) -> tuple[int, int]:
        """Return (bytes kept for backward, bytes the step holds at most), AdamW's state included."""
        with preserved(self.model, self.blocks):
            for group, trains in ((self.head, outside != "none"), (self.stem, outside == "all")):
                for p in group:
                    p.requires_grad_(trains)
            set_active(self.blocks, active, frozen=mode)
            optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad])
            cuda = next(self.model.parameters()).is_cuda
            for _ in range(2 if cuda else 1):  # the allocator's peak is that of a step with optimizer state
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                with saved_bytes(ignore=list(self.model.parameters())) as held:
                    loss = self.loss()
                    kept = held()
                loss.backward()
                optimizer.step()
                total = training_bytes(self.model, optimizer, kept + recompute)
                optimizer.zero_grad(set_to_none=True)
                del loss
        return kept, total


def compare(name: str, device: str = "cpu", make: Callable[[], Made] | None = None) -> list[dict[str, Any]]:
    """Return one record a case: predicted and measured bytes kept and peak, and the relative errors."""
    torch.manual_seed(0)
    model, inputs = (make or FAMILIES[name])()
    model = model.to(device).train()
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    blocks = find_blocks(model, inputs)
    predicted, measured = profile(model, inputs, blocks=blocks, device=device), Measured(model, inputs, blocks)
    names = [b.name for b in blocks]
    rows = [_row(name, case, predicted, measured) for case in cases(names)]
    if getattr(model, "_supports_gradient_checkpointing", False) and name != "UNetMotion":
        model.enable_gradient_checkpointing()  # a UNet's checkpoints are not those of single blocks
        rows += [_row(name, case, predicted, measured, True) for case in cases(names) if "skip" not in case[0]]
    return rows


def _row(
    family: str, case: tuple[str, list[str], str, str], predicted: Profile, real: Measured, again: bool = False
) -> dict[str, Any]:
    label, active, mode, outside = case
    modes = {n: "train" if n in active else mode for n in predicted.blocks}
    method = {"all": "full", "none": "lora", "always": "ent-prog"}[outside]
    guess = predicted.step(modes, outside=outside, checkpointing=again)
    setting: Setting | None = None
    if outside != "none":
        setting = Accounting().setting(predicted, modes, method=method, mode=mode, checkpointing=again)
    recompute = _recomputed(real, active, mode, outside) if again else 0
    kept, peak = real.step(active, mode, outside, recompute)
    return {
        "family": family,
        "case": label,
        "checkpointing": again,
        "kept": {"predicted": guess["activations"], "measured": kept, "error": guess["activations"] / kept - 1},
        "peak": {"predicted": setting.peak, "measured": peak, "error": setting.peak / peak - 1} if setting else None,
    }


def _recomputed(real: Measured, active: list[str], mode: str, outside: str) -> int:
    """Bytes that the dearest block makes for backward, measured by running the model without checkpointing."""
    real.model.disable_gradient_checkpointing()  # type: ignore[operator]
    dearest = 0
    with preserved(real.model, real.blocks):
        for group, trains in ((real.head, outside != "none"), (real.stem, outside == "all")):
            for p in group:
                p.requires_grad_(trains)
        set_active(real.blocks, active, frozen=mode)
        for block in real.blocks:
            dearest = max(dearest, _kept_inside(real, block))
    real.model.enable_gradient_checkpointing()  # type: ignore[operator]
    return dearest


def _kept_inside(real: Measured, block: Block) -> int:
    """Bytes of new storages that autograd keeps within one block's call in a forward pass."""
    ignore: list[Tensor] = list(real.model.parameters())
    found: list[int] = []
    original = block.module.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        with saved_bytes(ignore=[*ignore, *given]) as held:
            output = original(*args, **kwargs)
            found.append(held())
        return output

    had = vars(block.module).get("forward")
    block.module.forward = watched  # type: ignore[method-assign]
    real.loss()
    if had is None:
        del block.module.forward
    else:
        block.module.forward = had
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="default: results/plan_accuracy.json, with _cuda on a GPU")
    args = parser.parse_args()
    suffix = "" if args.device == "cpu" else "_cuda"
    out = args.out or Path(__file__).parent / "results" / f"plan_accuracy{suffix}.json"
    rows: list[dict[str, Any]] = []
    table = Table(title="predicted / measured - 1, worst of all cases")
    for column in ("family", "cases", "kept for backward", "peak", "worst case"):
        table.add_column(column, justify="right")
    for name in FAMILIES:
        found = compare(name, args.device)
        worst = max(found, key=lambda r: abs(r["kept"]["error"]))
        peak = max((r["peak"]["error"] for r in found if r["peak"]), key=abs)
        label = f"{worst['case']}{', checkpoints' if worst['checkpointing'] else ''}"
        table.add_row(name, str(len(found)), f"{worst['kept']['error']:+.1%}", f"{peak:+.1%}", label)
        rows += found
        print(name, label, worst["kept"], peak, flush=True)
    out.write_text(json.dumps(environment() | {"rows": rows}, indent=1) + "\n")
    Console().print(table, f"{out}")


if __name__ == "__main__":
    main()
