"""What bypassing costs a new pose encoder in front of the blocks, and what gives its gradient back.

    python benchmarks/new_modules.py                  # writes benchmarks/results/new_modules.json

PoseDiT-T, drawn figures; guider and head are trained for some steps first. Trainable are the best blocks by gain. For
each setting of the frozen blocks: cosine of the gradients with the exact ones, of the trainable blocks, of the new pose
guider (whose output enters the stream) and of the time embedder (whose output reaches every block as an argument), and
the step's FLOPs relative to exact gradients through all frozen blocks (cost.StepCost).
"""

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
from priorities import warmed
from torch import nn

from entprog.bench import environment
from entprog.blocks import by_name, find_blocks, record_example
from entprog.bypass import _fidelities
from entprog.data.batches import fixed_batches
from entprog.data.synthetic import figures
from entprog.models.pretrained import loss_fn
from entprog.objective import OBJECTIVES
from entprog.priority import score
from entprog.profiling import cost_of

MODES = ("bypass", "bypass_attn")
PARTS = {"new": "pose_guider", "conditioning": "t_embedder"}


def orders(ranking: list[str], errors: dict[str, float], by_place: list[str]) -> dict[str, list[str]]:
    """Name -> frozen blocks in an order in which to run them cheaply."""
    frozen = [n for n in reversed(ranking) if n in by_place]
    return {
        "priority, ascending": frozen,
        "from the last": by_place[::-1],
        "error of its own, ascending": sorted(frozen, key=lambda n: errors[n]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm", type=int, nargs="*", default=[40], help="steps of guider and head beforehand")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "new_modules.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    per_sample = loss_fn(OBJECTIVES["flow_prediction"])
    clips = figures(192, size=24)
    batches = fixed_batches({k: v[:8] for k, v in clips.items()}, batch_size=4)

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return per_sample(model, batch).mean()

    results: dict[str, Any] = {}
    for warm in args.warm:
        model = warmed(clips, warm)
        blocks = find_blocks(model, record_example(model, lambda: loss(model, batches[0])))  # noqa: B023
        for block in blocks:
            block.module.requires_grad_(True)
        ranking = score(model, blocks, None, batches, "gain", loss_fn=loss).ranking
        cost = cost_of(model, blocks, lambda: loss(model, batches[0]))  # noqa: B023
        for count in (3, 6):
            active = ranking[:count]
            frozen = [b.name for b in blocks if b.name not in active]
            measure = {}
            for mode, part in product(MODES, PARTS):
                model.requires_grad_(False).get_submodule(PARTS[part]).requires_grad_(True)
                measure[mode, part] = _fidelities(model, blocks, loss, batches[:1], by_name(blocks, active), [], mode)
            errors = measure["bypass", "new"][1]
            exact = cost.step(dict.fromkeys(frozen, "pass"))
            rows = []
            for order, names in orders(ranking, errors, frozen).items():
                for mode, size in product(MODES, range(len(names) + 1)):
                    row: dict[str, Any] = {"order": order, "mode": mode, "size": size}
                    row["flops"] = cost.step(dict.fromkeys(frozen, "pass") | dict.fromkeys(names[:size], mode)) / exact
                    for part in PARTS:
                        model.requires_grad_(False).get_submodule(PARTS[part]).requires_grad_(True)
                        found = measure[mode, part][0](by_name(blocks, names[:size]))
                        row |= {"cosine": found["cosine"], part: found["new_modules_cosine"]}
                    rows.append(row)
                    print(warm, count, *(f"{v:.3f}" if isinstance(v, float) else v for v in row.values()), flush=True)
            results[f"{warm} steps, {count} active"] = {"active": active, "errors": errors, "rows": rows}
    args.out.write_text(json.dumps(environment() | results, indent=1) + "\n")


if __name__ == "__main__":
    main()
