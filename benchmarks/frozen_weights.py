"""What frozen weights cost at each precision: error of output and gradients, bytes held, 3 of 12 blocks trainable.

    python benchmarks/frozen_weights.py              # writes benchmarks/results/frozen_weights.json

diffusers' Wan transformer with random weights, 1,024 tokens, blocks 1, 5 and 9 trainable, the others in mode `pass`.
Errors are relative to the same model unparked: |found - exact| / |exact| of the prediction, of the gradient of the
latents and of the trainable blocks' gradients. `layer` is one linear layer of the model on unit normal inputs.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from entprog.bench import environment, tiny_wan, wan_loss
from entprog.blocks import Block, find_blocks, first_tensor
from entprog.frozen import PRECISIONS, settle_weights, thaw, weight_bytes
from entprog.measure import saved_bytes
from entprog.modes import set_active

ACTIVE = (1, 5, 9)


def error(found: Tensor, exact: Tensor) -> float:
    """Return |found - exact| / |exact| in float64."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def one_step(model: nn.Module, blocks: list[Block], batch: dict[str, Tensor]) -> dict[str, Any]:
    """Forward and backward: prediction, gradients, bytes that autograd kept."""
    video = batch["video"].clone().requires_grad_(True)
    seen: list[Tensor] = []
    handle = model.register_forward_hook(lambda m, a, output: seen.append(first_tensor(output).detach()))
    with saved_bytes(ignore=list(model.parameters())) as held:
        loss = wan_loss(model, batch | {"video": video})
        kept = held()
    handle.remove()
    trained = [p for i in ACTIVE for p in blocks[i].parameters()]
    latents, *grads = torch.autograd.grad(loss, [video, *trained])
    return {"output": seen[0], "input": latents, "trained": torch.cat([g.flatten() for g in grads]), "kept": kept}


def one_layer(layer: nn.Module, width: int) -> list[Tensor]:
    """Output and input gradient of a layer on fixed inputs."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, width, generator=generator, dtype=torch.float32).to(layer.weight.dtype).requires_grad_(True)
    out = layer(x)
    grad = torch.randn(out.shape, generator=generator).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, x, grad)]


def measure(dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Rows of one model: as it is, then at each precision."""
    model, batch = tiny_wan(dim)
    model.to(dtype).requires_grad_(False)
    batch = {k: v.to(dtype) for k, v in batch.items()}
    blocks = find_blocks(model)
    set_active(blocks, [blocks[i] for i in ACTIVE], frozen="pass")
    layer = blocks[0].module.ffn.net[2]
    exact, exact_layer = one_step(model, blocks, batch), one_layer(layer, 4 * dim)
    rows = [{"precision": "as it is", "kept_bytes": exact["kept"]} | weight_bytes(model)]
    for precision in PRECISIONS:
        settle_weights(model, blocks, precision)
        if not weight_bytes(model)["host"]:
            continue  # bf16 of bfloat16 weights: nothing would get smaller
        found, found_layer = one_step(model, blocks, batch), one_layer(layer, 4 * dim)
        errors = {f"{k}_error": error(found[k], exact[k]) for k in ("output", "input", "trained")}
        of_layer = {f"layer_{k}_error": error(a, b) for k, a, b in zip(("output", "input"), found_layer, exact_layer,
                                                                       strict=True)}  # fmt: skip
        held = {"kept_bytes": found["kept"]} | weight_bytes(model)
        rows.append({"precision": precision} | held | errors | of_layer)
    thaw(model)
    again = one_step(model, blocks, batch)
    same = all(torch.equal(again[k], exact[k]) for k in ("output", "input", "trained"))
    return {"dim": dim, "dtype": str(dtype).removeprefix("torch."), "bit_equal_after_thaw": same, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "frozen_weights.json")
    args = parser.parse_args()
    console = Console()
    models = []
    for dim, dtype in ((128, torch.float32), (512, torch.float32), (512, torch.bfloat16)):
        models.append(measure(dim, dtype))
        columns = ("device", "host", "kept_bytes", "layer_output_error", "layer_input_error", "output_error",
                   "input_error", "trained_error")  # fmt: skip
        table = Table("precision", *columns, title=f"{dim} wide, {models[-1]['dtype']}")
        for row in models[-1]["rows"]:
            cells = {k: f"{v:.1e}" if isinstance(v, float) else f"{v}" for k, v in row.items()}
            table.add_row(*(cells.get(c, "") for c in ("precision", *columns)))
        console.print(table)
    args.out.write_text(json.dumps(environment() | {"active": ACTIVE, "models": models}, indent=1) + "\n")
    console.print(f"{args.out}")


if __name__ == "__main__":
    main()
