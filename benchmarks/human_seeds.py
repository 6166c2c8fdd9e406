"""The human-video recipe with several seeds: is ent-prog worse than full at equal wall time, by any measure?

    python benchmarks/human_seeds.py examples/human_video.yaml --out runs/human --seeds 0 1 2

runs the recipe once for each seed into OUT/seed-N (from the same base if the recipe names one) and writes
benchmarks/results/human_seeds.json: for each split and measure the means of every seed, and the paired difference
(last strategy minus first) with a bootstrap interval over clips within a seed and over all seeds' clips together; and
the means of the rows beside the generated clips: truth, the reference as a still, the clip of another pose.
Finished seeds are not repeated. With --apart the strategies of a seed run at once, each in a process of its own into
OUT/seed-N/STRATEGY: equal wall time on cores that are equally loaded.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from entprog.bench import environment
from entprog.cli import progress_bar
from entprog.evaluate import compare
from entprog.metrics.protocol import bootstrap_interval
from entprog.recipe import load_recipe, run_recipe


def per_clip(evaluation: dict[str, Any], name: str) -> torch.Tensor:
    """One measure of the generated clips, NaN where it is not defined."""
    values = evaluation["rows"]["generated"]["per_clip"][name]
    return torch.tensor([float("nan") if v is None else v for v in values], dtype=torch.float64)


def summary(found: list[dict[str, Any]], one: str, other: str) -> dict[str, Any]:
    """Means, spread over seeds and paired differences of one split; `found` has {strategy: evaluation} a seed."""
    names = found[0][one]["rows"]["generated"]["means"]
    out: dict[str, Any] = {"fvd": {
        s: [f[s]["rows"]["generated"]["fvd"]["value"] for f in found] for s in (one, other)
    } | {"differences": [compare(f[one], f[other])["fvd"] for f in found]}}  # fmt: skip
    for name in names:
        means = {s: [per_clip(f[s], name).nanmean().item() for f in found] for s in (one, other)}
        pairs = torch.cat([per_clip(f[one], name) - per_clip(f[other], name) for f in found])
        pairs = pairs[pairs.isfinite()]
        if not len(pairs):
            continue
        spread = {s: stdev(v) if len(v) > 1 else None for s, v in means.items()}
        out[name] = {"means": means, "mean": {s: mean(v) for s, v in means.items()}, "sd_of_seeds": spread,
                     "difference": pairs.mean().item(), "interval": bootstrap_interval(pairs)}  # fmt: skip
    return out


def beside(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of one split's other rows, {row: {measure: {strategy: one a seed}}}; those of truth and still are alike."""
    out: dict[str, Any] = {}
    for row, of_row in next(iter(found[0].values()))["rows"].items():
        if row != "generated":
            out[row] = {name: {s: [f[s]["rows"][row]["means"][name]["mean"] for f in found] for s in found[0]}
                        for name in of_row["means"]}  # fmt: skip
            if of_row.get("fvd"):
                out[row]["fvd"] = {s: [f[s]["rows"][row]["fvd"]["value"] for f in found] for s in found[0]}
    return out


def run_apart(recipe: str, overrides: list[str], seed: int, threads: int, out: Path) -> dict[str, Any]:
    """Run each strategy of a recipe by itself, all at once; returns what `summary` needs of run_recipe's results."""
    found, running = {}, {}
    for strategy in load_recipe(recipe, overrides).strategies:
        folder = out / strategy
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "entprog.cli", "train", recipe, *overrides, f"seed={seed}"]
        command += [f"strategies=[{strategy}]", "--out", str(folder)]
        with (out / f"{strategy}.log").open("w") as log:
            running[strategy] = subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": str(threads)}
            )
    for strategy, process in running.items():
        if process.wait():
            raise RuntimeError(f"{strategy} failed: see {out / strategy}.log")
        found[strategy] = json.loads((out / strategy / "results.json").read_text())
    one = next(iter(found.values()))
    return {
        "phases": {
            phase: {"strategies": {s: r["phases"][phase]["strategies"][s] for s, r in found.items()}}
            for phase in one["phases"]
        },
        "evaluation": {split: {s: r["evaluation"][split][s] for s, r in found.items()} for split in one["evaluation"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--apart", action="store_true", help="all strategies of a seed at once")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    with progress_bar() as show:
        for seed in args.seeds:
            recipe, folder = load_recipe(args.recipe, [*args.overrides, f"seed={seed}"]), args.out / f"seed-{seed}"
            if args.apart:
                show({"run": f"seed {seed}", "message": f"{', '.join(recipe.strategies)}: logs in {folder}"})
                results.append(run_apart(args.recipe, args.overrides, seed, args.threads, folder))
            else:
                results.append(run_recipe(recipe, folder, show))
    first, *_, last = recipe.strategies
    content = environment() | {"recipe": str(args.recipe), "overrides": args.overrides, "seeds": args.seeds}
    content["phases"] = [
        {phase: {s: {k: r[k] for k in ("net_seconds", "steps", "peak_bytes", "mean_bytes", "held_out")}
                 for s, r in compared["strategies"].items()} for phase, compared in result["phases"].items()}
        for result in results
    ]  # fmt: skip
    content["splits"] = {
        split: summary([r["evaluation"][split] for r in results], last, first) for split in results[0]["evaluation"]
    }
    content["beside"] = {split: beside([r["evaluation"][split] for r in results]) for split in content["splits"]}
    path = Path(__file__).parent / "results" / "human_seeds.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
