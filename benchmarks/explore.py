"""Train one configuration on the figures by the model clock and append what came out to a file.

    python benchmarks/explore.py NAME strategy=full lr=5.0e-4 ...

The model clock takes FLOPs for seconds, so a busy machine does not matter; 285 of its seconds are 325 steps of full
training. How benchmarks/results/explore.jsonl was made; docs/log.md quotes it by NAME.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from entprog.config import make_config
from entprog.data.batches import load_data
from entprog.models.pretrained import load_model
from entprog.train import Trainer

TASK: dict[str, Any] = {"seconds": 285, "clock": "model", "held_out_clips": 32, "evaluations": 6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "explore.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    words = {k: yaml.safe_load(v) for k, _, v in (o.partition("=") for o in args.overrides)}
    config = make_config(TASK | {"checkpoint_every": 100_000} | words)
    data, held_out = load_data(config, "train")[0], load_data(config, "test")[0]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, load_model(config.model), data, held_out, Path(folder))
        results = trainer.run()
    record = {
        "name": args.name,
        "kw": words,
        "steps": results["steps"],
        "loss": round(results["held_out"]["loss"], 5),
        "curve": [[round(c["net_seconds"]), round(c["loss"], 4)] for c in results["curve"]],
        "peak_MB": round(results["peak_bytes"] / 1e6),
        "mean_MB": round(results["mean_bytes"] / 1e6),
        "ranking": trainer.prog.scores.ranking if trainer.prog and trainer.prog.scores else None,
    }
    with args.out.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(record["name"], record["loss"], record["curve"])


if __name__ == "__main__":
    main()
