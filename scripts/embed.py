"""Embed a finished run's weights in the package, in half precision, with a JSON of how they were made.

python scripts/embed.py runs/base people --note "rendered people 0-399, seed 0"
"""

import argparse
import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from entprog.models.pretrained import EMBEDDED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("name", choices=sorted(EMBEDDED))
    parser.add_argument("--note", default="")
    args = parser.parse_args()
    (weights,) = (args.run / "checkpoints" / "final").glob("*.safetensors")
    out = Path(__file__).parents[1] / "src" / "entprog" / "models" / f"pose_dit_{EMBEDDED[args.name][0].lower()}"
    save_file({k: v.to(torch.float16) for k, v in load_file(weights).items()}, out.with_suffix(".safetensors"))
    results = json.loads((args.run / "results.json").read_text())
    config = yaml.safe_load((args.run / "config.yaml").read_text())
    kept = {k: results[k] for k in ("steps", "net_seconds", "device", "versions", "commit")}
    dropped = ("data", "model")  # where they lay
    about = {"note": args.note, "config": {k: v for k, v in config.items() if k not in dropped}}
    curve = [[round(p["net_seconds"]), round(p["loss"], 5)] for p in results["curve"]]
    about |= kept | {"held_out": results["held_out"]["loss"], "seconds_and_held_out_loss": curve}
    out.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    print(out.with_suffix(".safetensors"))


if __name__ == "__main__":
    main()
