"""Whole runs and comparisons: load, train, sample, measure, one JSON each; and what a training step costs.

`train_run` is what `entprog train` does. `compare` trains several strategies on the same task for the same net seconds.
`step_cost` measures one training step in different modes as ratios to full training, all within one run.
"""

import json
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from entprog.blocks import Block, evaluating, find_blocks, record_example
from entprog.bypass import fidelity
from entprog.checkpoint import write_whole
from entprog.config import RunConfig, check_same, check_size
from entprog.data.batches import Batch, Data, fixed_batches, load_data
from entprog.data.cache import Stored
from entprog.data.pose import draw_skeleton
from entprog.data.prepared import Prepared
from entprog.data.retarget import fit_pose
from entprog.measure import count_flops, now, saved_bytes
from entprog.metrics.frame import psnr, ssim
from entprog.metrics.protocol import bootstrap_interval
from entprog.models.autoencoder import Autoencoder
from entprog.models.pretrained import model_of, precision
from entprog.models.wan import is_pipeline
from entprog.modes import LossFn, preserved, set_active
from entprog.objective import OBJECTIVES
from entprog.parallel import on_cpus
from entprog.sample import sample
from entprog.train import Trainer

OnProgress = Callable[[dict[str, Any]], None]


def environment() -> dict[str, Any]:
    """Return what a result depends on besides its configuration: device, versions, commit."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "-C", str(here), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    names = ("torch", "diffusers", "accelerate", "peft")
    return {
        "device": f"{device}, {torch.get_num_threads()} threads",
        "versions": {n: version(n) for n in names} | {"python": platform.python_version()},
        "commit": commit.stdout.strip() or "not a git checkout",
    }


def first_clips(config: RunConfig, data: Data, count: int, frames: int | None = None) -> tuple[Batch, Tensor]:
    """Return the first clips of a split with their conditions, and their true pixels (N, 3, F, H, W) in [-1, 1].

    `frames` from the beginning of each clip, by default as many as are trained on. ValueError if a clip has fewer.
    """
    frames, column = frames or config.frames, data["video"]
    if isinstance(column, Stored):
        first = column.first(count)
        data = {k: v.subset(first) for k, v in data.items() if isinstance(v, Stored)}
        column, count = data["video"], len(first)
    if frames > column.shape[2]:
        raise ValueError(f"clips of {column.shape[2]} frames do not hold {frames}: choose at most {column.shape[2]}")
    count = min(count, len(column))
    whole = fixed_batches({k: v[:count] for k, v in data.items()}, batch_size=count, conditions=config.conditions)[0]
    batch = {k: v[:, :, :frames] if k in ("video", "pose", "noise") else v for k, v in whole.items()}
    if not isinstance(column, Stored):
        return batch, batch["video"]
    pixels = column.prepared.rows(column.indices, ["video"])["video"]
    return batch, pixels[:, :frames].transpose(1, 2) / 127.5 - 1


def sample_clips(
    config: RunConfig,
    model: nn.Module,
    clips: Batch,
    on_step: Callable[[int], Any] | None = None,
    overlap: int | None = None,
) -> Tensor:
    """Draw one video for each clip from its conditions, (N, 3, F, H, W) in [-1, 1].

    Clips longer than the frames that were trained on are drawn in windows that overlap by `overlap`, by default half.
    """
    device = next(model.parameters()).device
    names = ("pose", "reference", "reference_pose")
    with precision(config, device):  # as it was trained
        drawn = sample(
            model,
            OBJECTIVES[config.objective],
            {k: clips[k].to(device) for k in names if k in clips},
            tuple(clips["video"].shape),
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            guided=config.guided,
            sampler=config.sampler,
            window=config.frames,
            overlap=config.frames // 2 if overlap is None else overlap,
            shared_noise=config.sample_shared_noise,
            seed=config.seed,
            on_step=on_step,
        )
    if config.autoencoder:
        drawn = _autoencoder(config.autoencoder).to(device).decode(drawn)
    return drawn.clamp(-1, 1).cpu()


@lru_cache(maxsize=1)
def _autoencoder(name: str) -> Autoencoder:
    """The last autoencoder that was asked for: evaluations decode batch after batch."""
    return Autoencoder(name)


def driven(clips: Batch, data: Data, driver: str) -> Batch:
    """Return the clips of `first_clips` with the poses of another clip, by its id, fitted to each reference's body.

    ValueError for an id that the split lacks, a clip that is too short, a model without poses, and data that are not a
    prepared folder.
    """
    column = data["pose"]
    if not isinstance(column, Stored) or "pose" not in clips:
        raise ValueError("poses of another clip need a prepared folder (entprog prepare) and a model that takes poses")
    whole = Prepared(column.prepared.folder, column.prepared.split)
    ids = [r["id"] for r in whole.records]
    if driver not in ids:
        raise ValueError(f"clip {driver!r} is not in split {whole.split!r}: choose one of {ids[:5]} ...")
    frames, (height, width) = clips["pose"].shape[2], clips["pose"].shape[-2:]
    driving = whole.rows([ids.index(driver)], ["keypoints"])["keypoints"][0, :frames]
    if len(driving) < frames:
        raise ValueError(f"clip {driver!r} has {len(driving)} frames, {frames} are to be drawn: choose a longer one")
    rows = [column.indices[row] for row in column.first(len(clips["pose"]))]
    bodies = column.prepared.rows(rows, ["reference_keypoints"])["reference_keypoints"]
    maps = [draw_skeleton(fit_pose(driving, body), height, width).transpose(0, 1) for body in bodies]
    return clips | {"pose": torch.stack(maps)}


def shown(config: RunConfig, clips: Batch) -> Batch:
    """Return clips whose reference is an image: decoded where it is latents."""
    if not config.autoencoder or "reference" not in clips:
        return clips
    reference = _autoencoder(config.autoencoder).decode(clips["reference"][:, :, None])[:, :, 0]
    return clips | {"reference": reference.cpu()}


def draw_held_out(config: RunConfig, model: nn.Module, data: Data, count: int) -> tuple[Tensor, Tensor, Batch]:
    """Draw the first clips of a split: (drawn, truth, the conditions as pictures)."""
    if is_pipeline(config.model):
        from entprog.data.encode import draw_clips

        with evaluating(model):
            return draw_clips(config, model, {k: v for k, v in data.items() if isinstance(v, Stored)}, count)
    clips, truth = first_clips(config, data, count)
    return sample_clips(config, model, clips), truth, shown(config, clips)


def frame_quality(drawn: Tensor, truth: Tensor) -> dict[str, Any]:
    """SSIM and PSNR of videos (N, 3, F, H, W) in [-1, 1] against the truth: mean over clips with a 95 % interval."""
    a, b = ((v.transpose(1, 2) + 1) / 2 for v in (drawn, truth))
    result = {}
    for name, metric in (("ssim", ssim), ("psnr", psnr)):
        per_clip = metric(a, b).mean(1)
        low, high = bootstrap_interval(per_clip)
        result[name] = {"mean": per_clip.mean().item(), "interval": [low, high]}
    return result


def save_samples(folder: Path, drawn: Tensor, truth: Tensor, clips: Batch, fps: float = 8) -> None:
    """Write each clip as NNN_{truth,sample}.webp, with NNN_pose.webp and NNN_reference.png of its conditions."""
    from entprog.data.video import write_png, write_webp

    folder.mkdir(parents=True, exist_ok=True)
    for i in range(len(drawn)):
        if "reference" in clips:
            write_png(folder / f"{i:03d}_reference.png", clips["reference"][i])
        if "pose" in clips:
            write_webp(folder / f"{i:03d}_pose.webp", clips["pose"][i], fps, low=0)
        write_webp(folder / f"{i:03d}_truth.webp", truth[i], fps)
        write_webp(folder / f"{i:03d}_sample.webp", drawn[i], fps)


def train_run(config: RunConfig, out: Path, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Do one run from configuration to results: load, train (or resume), sample, measure. Returns results.json.

    In several processes rank 0 alone samples and writes, and the others return without samples.
    """
    check_size(config)
    check_same(config, out)
    finished = out / "results.json"
    processes = PartialState(cpu=on_cpus())
    processes.wait_for_everyone()  # all look before one writes
    if finished.exists() and "metrics" in (done := json.loads(finished.read_text())):
        return done
    say = on_progress or (lambda info: None)
    say({"message": "loading data"})
    encodes = config.autoencoder or is_pipeline(config.model)
    encoding = {"message": "encoding clips that are not cached yet" if encodes else "reading"}
    with processes.main_process_first():  # which makes what is cached beside the data
        data, errors = load_data(config, "train", lambda share: say(encoding))
        held_out, more = load_data(config, "test", lambda share: say(encoding))
    trainer = Trainer(config, model_of(config), data, held_out, out, on_progress)
    if trainer.writes and (errors or more):
        (out / "data_errors.json").write_text(json.dumps(errors + more, indent=1) + "\n")
    results = trainer.run()
    if not trainer.writes:
        return results
    if config.samples and len(held_out["video"]):
        say({"message": "sampling"})
        with trainer.ledger("sampling"):
            drawn, truth, clips = draw_held_out(config, trainer.model, held_out, config.samples)
            save_samples(out / "samples", drawn, truth, clips)
        results["metrics"] = frame_quality(drawn, truth)
    return trainer.write_results(results | environment())


def time_to(curve: Sequence[dict[str, float]], loss: float) -> float | None:
    """Net seconds at which a held-out curve first reaches a loss, linear between measurements; None if never."""
    for before, after in zip(curve[:-1], curve[1:], strict=True):
        if after["loss"] <= loss:
            share = (before["loss"] - loss) / max(before["loss"] - after["loss"], 1e-12)
            return before["net_seconds"] + max(0.0, share) * (after["net_seconds"] - before["net_seconds"])
    return None


def paired_difference(losses: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """Mean difference of two runs' held-out losses, sample by sample, with its 95 % bootstrap interval."""
    difference = torch.tensor(losses, dtype=torch.float64) - torch.tensor(others, dtype=torch.float64)
    low, high = bootstrap_interval(difference)
    return {"difference": difference.mean().item(), "interval": [low, high]}


def with_speedups(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Add to each run when its curve reached the last loss of full training's, and how many times sooner than full did.

    Curves are of the weights as they train; `held_out` is the saved model's loss, of their average where one is kept,
    and is compared in `against_full`. Net counts scoring and search, gross leaves out what they took up to then. None
    where the loss was not reached or there is no `full`.
    """
    full = runs.get("full")
    goal = full["curve"][-1]["loss"] if full else None
    slow = (
        time_to(full["curve"], goal) if full and goal is not None else None
    )  # full may have been there before its end
    out = {}
    for name, run in runs.items():
        reached = time_to(run["curve"], goal) if goal is not None else None
        extra: dict[str, Any] = {"time_to_full_loss": reached, "net_speedup": None, "gross_speedup": None}
        if full:
            extra["against_full"] = paired_difference(run["held_out_losses"], full["held_out_losses"])
        if slow and reached:
            overhead = max(p.get("overhead_seconds", 0.0) for p in run["curve"] if p["net_seconds"] <= reached)
            extra["net_speedup"] = slow / reached
            extra["gross_speedup"] = slow / max(reached - overhead, 1e-9)
        out[name] = run | extra
    return out


def compare(
    configs: dict[str, RunConfig], out: Path, title: str, on_progress: OnProgress | None = None
) -> dict[str, Any]:
    """Train each named configuration into a sub-folder of `out` and write the comparison's results.json."""
    runs = {}
    for name, config in configs.items():

        def tagged(info: dict[str, Any], name: str = name) -> None:
            if on_progress:
                on_progress(info | {"run": name})

        runs[name] = train_run(config, out / name, tagged)
    budget = next(iter(configs.values())).seconds
    results = {"kind": "comparison", "title": title, "budget_seconds": budget} | environment()
    results["strategies"] = with_speedups(runs)
    write_whole(out / "results.json", json.dumps(results, indent=1) + "\n")
    return results


# -- what one step costs ---------------------------------------------------------------------------------------------


def tiny_wan(dim: int = 256, layers: int = 12, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build diffusers' Wan transformer, small, with random weights, 1,024 tokens: (model, batch for `wan_loss`)."""
    from diffusers import WanTransformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=dim // 64, attention_head_dim=64, in_channels=16, out_channels=16,
            text_dim=128, freq_dim=256, ffn_dim=4 * dim, num_layers=layers, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
        )  # fmt: skip
        video = torch.randn(1, 16, 4, 32, 32)
        batch = {"video": video, "target": torch.randn_like(video), "text": torch.randn(1, 64, 128)}
    return model, batch


def wan_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean squared error of tiny_wan's prediction at one timestep."""
    timestep = torch.tensor([500], device=batch["video"].device)
    prediction = model(
        hidden_states=batch["video"], encoder_hidden_states=batch["text"], timestep=timestep, return_dict=False
    )[0]
    return (prediction.float() - batch["target"]).square().mean()


def _freeze(model: nn.Module, blocks: Sequence[Block], active: Sequence[int], mode: str) -> None:
    """Train only some blocks; with all of them active, train everything."""
    whole = len(active) == len(blocks)
    for p in model.parameters():
        p.requires_grad_(whole)
    set_active(blocks, [blocks[i] for i in active], frozen=mode)


def step_cost(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    *,
    name: str,
    description: str,
    cases: Sequence[tuple[str, Sequence[int], str]],
    rounds: int = 5,
    timed: bool = True,
) -> dict[str, Any]:
    """Measure one training step (forward, backward, AdamW) in several modes as ratios to full training.

    `cases`: (label, indices of the trainable blocks, mode of the others). time_ratio is the median over rounds of the
    ratio within the round, each round timing every case once; bytes_ratio compares what autograd holds for backward,
    without weights; fidelity is the cosine of the trainable blocks' gradients to the exact ones.
    """
    blocks = find_blocks(model, record_example(model, lambda: loss_fn(model, batch)))
    everything = ("full", tuple(range(len(blocks))), "pass")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        loss_fn(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    rows: list[dict[str, Any]] = []
    times: list[list[float]] = []
    with preserved(model, blocks):
        for label, active, mode in (everything, *cases):
            _freeze(model, blocks, active, mode)
            with saved_bytes(ignore=list(model.parameters())) as held:
                loss = loss_fn(model, batch).mean()
                kept = held()
            del loss
            flops = count_flops(lambda: loss_fn(model, batch).mean().backward())
            optimizer.zero_grad(set_to_none=True)
            row = {"case": label, "active": list(active), "mode": mode, "flops": flops, "bytes": kept}
            rows.append(row | {"fidelity": _cosine(model, blocks, loss_fn, batch, active, mode)})
        for _ in range(rounds if timed else 0):
            times.append([])
            for _, active, mode in (everything, *cases):
                _freeze(model, blocks, active, mode)
                step()  # the first step after a switch does not count
                begun = now()
                step()
                times[-1].append(now() - begun)
    for i, row in enumerate(rows):
        row["flops_ratio"] = row["flops"] / rows[0]["flops"]
        row["bytes_ratio"] = row["bytes"] / rows[0]["bytes"]
        row["time_ratio"] = median(t[i] / t[0] for t in times) if times else None
    return {"model": name, "description": description, "rounds": rounds if timed else 0, "rows": rows}


def _cosine(
    model: nn.Module, blocks: Sequence[Block], loss_fn: LossFn, batch: Any, active: Sequence[int], mode: str
) -> float | None:
    if mode != "bypass":
        return 1.0 if mode in ("pass", "prefix") else None
    trained = [blocks[i] for i in active]
    bypassed = [b for b in blocks if b not in trained]
    return fidelity(model, blocks, lambda m, b: loss_fn(m, b).mean(), batch, trained, bypassed)["cosine"]


def wan_step_cost(dim: int = 256, rounds: int = 5, timed: bool = True) -> dict[str, Any]:
    """Step cost of the tiny Wan transformer: 12 blocks, 1,024 tokens, blocks 1, 5 and 9 trainable."""
    model, batch = tiny_wan(dim)
    cases = [("3 of 12, bypass", (1, 5, 9), "bypass"), ("3 of 12, pass", (1, 5, 9), "pass")]
    cases.append(("last 3 of 12, prefix", (9, 10, 11), "prefix"))
    about = f"diffusers WanTransformer3DModel, {dim} wide, 12 blocks, 1,024 tokens, random weights"
    return step_cost(
        model, wan_loss, batch, name="Wan-shaped", description=about, cases=cases, rounds=rounds, timed=timed
    )


def write_step_cost(out: Path, models: Sequence[dict[str, Any]]) -> None:
    """Write measured step costs as step_cost.json of a folder."""
    write_whole(out / "step_cost.json", json.dumps(environment() | {"models": list(models)}, indent=1) + "\n")


def pose_dit_step_cost(config: RunConfig, ranking: Sequence[str], rounds: int = 5) -> dict[str, Any]:
    """Step cost of the model that is trained here, the best 3, 6 blocks of a ranking trainable, the others bypassed."""
    from entprog.data.batches import batch_at
    from entprog.models.pretrained import loss_fn

    model = model_of(config)
    data, _ = load_data(replace(config, clips=config.batch_size), "train")
    batch = batch_at(data, 0, batch_size=config.batch_size, seed=0, frames=config.frames, conditions=config.conditions)
    index = {b.name: b.index for b in find_blocks(model)}
    order = [index[n] for n in ranking]
    cases = [(f"best {m} of {len(order)}, {mode}", tuple(sorted(order[:m])), mode) for m in (3, 6) for mode in
             ("bypass", "pass")]  # fmt: skip
    about = f"PoseDiT, {len(order)} blocks, batch of {config.batch_size}, {config.frames} frames of {config.size} px"
    function = loss_fn(OBJECTIVES[config.objective])
    return step_cost(model, function, batch, name="PoseDiT-T", description=about, cases=cases, rounds=rounds)
