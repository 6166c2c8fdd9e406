"""Train full and ent-prog for long on the figures and swap poses and references of people never seen.

    python benchmarks/figures_long.py --seconds 1500 --out runs/long
    python benchmarks/figures_long.py --strategies ent-prog ...     # one of them, in a process of its own

Writes benchmarks/results/figures_long_STRATEGY_guidance_W.json each: the run's results, and for sample and baselines
the share of clips that follow a swapped pose and a swapped reference.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

from entprog.bench import environment, train_run
from entprog.cli import progress_bar
from entprog.config import demo
from entprog.data.synthetic import swapped
from entprog.metrics.swap import swap_scores
from entprog.models.pretrained import load_model
from entprog.objective import OBJECTIVES
from entprog.sample import sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1500.0)
    parser.add_argument("--strategies", nargs="*", default=["full", "ent-prog"])
    parser.add_argument("--guidance", type=float, default=2.0, help="guidance on the pose; 1 is none")
    parser.add_argument("--clips", type=int, default=64, help="unseen people to swap")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/long"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for strategy in args.strategies:
        config = replace(demo(strategy, args.seconds), clips=4096, held_out_clips=64)
        with progress_bar() as show:
            results = train_run(config, args.out / strategy, show)
        model = load_model(str(args.out / strategy / "checkpoints" / "final"))
        objective = OBJECTIVES[config.objective]

        def draw(pose: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
            shape = (len(pose), 3, *pose.shape[2:])
            conditions = {"pose": pose, "reference": reference}
            drawn = sample(
                model,  # noqa: B023
                objective,  # noqa: B023
                conditions,
                shape,
                num_inference_steps=10,
                guidance_scale=args.guidance,
                guided="pose",
            )
            return drawn.clamp(-1, 1)

        with Console().status(f"{strategy}: drawing {args.clips} clips three ways"):
            scores = swap_scores(draw, *swapped(args.clips, size=config.size, frames=config.frames, seed=4242))
        record = {"config": asdict(config), "results": results, "guidance": args.guidance, "swaps": scores}
        record |= environment()
        args.results.mkdir(parents=True, exist_ok=True)
        path = args.results / f"figures_long_{strategy}_guidance_{args.guidance:g}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(strategy, json.dumps(scores, indent=1), path)


if __name__ == "__main__":
    main()
