"""The command line: entprog demo | prepare | score | plan | train | sample | evaluate | export | report.

Exit codes: 0 done, 1 failed, 2 bad input.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table
from safetensors import SafetensorError

from entprog.cli_plan import add_plan
from entprog.cli_prepare import add_prepare
from entprog.config import RunConfig, load_config, make_config
from entprog.packaged import PackagedFileError
from entprog.tables import console, evaluation_table, progress_bar, results_table

BAD_INPUT = (
    ValueError,
    yaml.YAMLError,
    SafetensorError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    FileExistsError,
    PermissionError,
    ImportError,  # of an extra that is not installed
)


def _demo(args: argparse.Namespace) -> None:
    from entprog.bench import compare, pose_dit_step_cost, wan_step_cost, write_step_cost
    from entprog.config import demo
    from entprog.report import write_report

    out = Path(args.out)
    configs = {name: demo(name, args.seconds, args.seed) for name in ("full", "lora", "ent-prog")}
    with progress_bar() as show:
        results = compare(configs, out, "entprog demo: moving figures, new clothes, pose control", show)
        show({"run": "step cost", "message": "measuring one training step, here and Wan-shaped"})
        if not (out / "step_cost.json").exists():
            ranking = _last_ranking(out / "ent-prog")
            write_step_cost(out, [pose_dit_step_cost(configs["full"], ranking, 3), wan_step_cost(256, rounds=3)])
    console.print(results_table(results["strategies"]))
    console.print(f"report: {write_report(out)}", markup=False)


def _last_ranking(run: Path) -> list[str]:
    from entprog.cei import Scores

    return Scores.load(sorted((run / "scores").glob("*.json"))[-1]).ranking


def _evaluate(args: argparse.Namespace) -> None:
    import json

    from entprog.data.prepared import Prepared
    from entprog.evaluate import ESTIMATORS, compare, evaluate, load_networks, load_videos
    from entprog.measure import best_device
    from entprog.models import wan

    source, device = Path(args.source), str(best_device())
    final = source / "checkpoints" / "final"
    clips = 32 if args.clips is None else _at_least_one("clips", args.clips)
    config = load_config(source / "config.yaml", args.overrides) if final.exists() else None
    if config and wan.is_pipeline(config.model):
        raise ValueError("evaluate draws PoseDiT's runs only: draw a pipeline's clips as ID.mp4 and give their folder")
    if not config and not args.reference:
        raise ValueError("evaluating videos needs --reference DATA, the prepared folder they were made for")
    if not config and (args.overrides or args.clips is not None):
        raise ValueError(f"{source} holds no finished run: leave --clips and {args.overrides} out, which are for "
                         "drawing; all its videos are scored as they are")  # fmt: skip
    load_networks(args.networks, device)  # before a clip is drawn: what cannot be had is known at once
    estimate = ESTIMATORS[args.pose]()
    if config:
        from entprog.recipe import draw_videos

        config = replace(config, data=args.reference or config.data)
        with console.status(f"drawing {clips} clips"):
            videos, data = draw_videos(config, str(final), args.split, clips)
    else:
        videos, data = load_videos(source), Prepared(args.reference, args.split)
        whole = len(data.records)
        data.records = [r for r in data.records if r["id"] in videos]
        if len(data.records) < whole:
            told = f"{len(data.records)} of the {whole} clips of split {args.split} have a video"
            console.print(told, style="yellow", markup=False)
    with progress_bar() as show:
        result = evaluate(
            videos, data, estimate=estimate, networks=tuple(args.networks), device=device,
            on_progress=lambda done, total: show({"run": "evaluating", "done": done, "of": total}),
        )  # fmt: skip
    out = Path(args.out or source / f"evaluation-{args.split}.json")
    out.write_text(json.dumps(result, indent=1) + "\n")
    console.print(evaluation_table(result))
    if args.against:
        console.print_json(json.dumps(compare(result, json.loads(Path(args.against).read_text()))))
    console.print(f"evaluation: {out}", markup=False)


def _at_least_one(option: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"--{option} {value}: choose a whole number of at least 1")
    return value


def _one_process_only() -> None:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            "only `entprog train` of one configuration runs in several processes: start this without torchrun or "
            "accelerate launch, and train the phases of a recipe as configurations of their own"
        )


def _train(args: argparse.Namespace) -> None:
    from entprog.recipe import is_recipe

    if is_recipe(args.config):
        _train_recipe(args)
        return
    config = load_config(args.config, args.overrides)
    if args.dry_run:
        console.print(yaml.safe_dump(asdict(config), sort_keys=False), end="", markup=False)
        return
    from entprog.bench import train_run
    from entprog.parallel import rank
    from entprog.report import write_report

    out = Path(args.out)
    with progress_bar() as show:
        results = train_run(config, out, lambda info: show(info | {"run": config.strategy}))
    if rank():
        return
    console.print(results_table({config.strategy: results}))
    if (out / "data_errors.json").exists():
        told = f"some clips could not be read: see {out / 'data_errors.json'}"
        console.print(told, style="yellow", markup=False)
    console.print(f"model: {out / 'checkpoints' / 'final'}\nreport: {write_report(out)}", markup=False)


def _train_recipe(args: argparse.Namespace) -> None:
    from entprog.recipe import load_recipe, run_recipe
    from entprog.report import write_report

    _one_process_only()
    recipe, out = load_recipe(args.config, args.overrides), Path(args.out)
    if args.dry_run:
        console.print(yaml.safe_dump(asdict(recipe), sort_keys=False), end="", markup=False)
        return
    with progress_bar() as show:
        results = run_recipe(recipe, out, show)
    for split, found in results["evaluation"].items():
        for strategy, result in found.items():
            console.print(f"{strategy}, {split}", evaluation_table(result))
    console.print(f"report: {write_report(out)}", markup=False)


def _score(args: argparse.Namespace) -> None:
    import json

    from entprog.blocks import find_blocks, record_example
    from entprog.data.batches import fixed_batches, load_data, to_device
    from entprog.layouts import FILTERS, layer_filter
    from entprog.measure import best_device
    from entprog.models.pretrained import batch_settings, model_of, predict_and_loss
    from entprog.priority import lookup, score

    if args.conditions and (args.priority != "cei" or args.export):
        raise ValueError("--conditions tells CEI by condition and ranks nothing: leave --priority and --export out")
    overrides = [*args.overrides, *(f"{k}={v}" for k in ("model", "data") if (v := getattr(args, k)))]
    if args.config:
        config = load_config(args.config, overrides)
    else:
        given = {k: yaml.safe_load(v) for k, _, v in (o.partition("=") for o in overrides)}
        config = make_config({"steps": 1} | given)
    device = best_device()
    model = model_of(config).to(device)
    data, _ = load_data(replace(config, clips=args.samples), "train")
    data = {k: v[: args.samples] for k, v in data.items()}
    settings = batch_settings(config)
    batches = [to_device(b, device) for b in fixed_batches(data, batch_size=config.batch_size, **settings)]
    predict, loss = predict_and_loss(config)
    blocks = find_blocks(model, record_example(model, lambda: predict(model, batches[0])))
    if args.conditions:
        found = _print_conditions(model, blocks, predict, batches, settings["conditions"])
        if args.out:
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            Path(args.out).write_text(json.dumps({way: asdict(s) for way, s in found.items()}, indent=1) + "\n")
            console.print(f"scores: {args.out}", markup=False)
        return
    top = max(1, len(blocks) // 4) if args.top is None else args.top
    if args.export and (lookup(FILTERS, args.export, "export") and not 1 <= top <= len(blocks)):
        raise ValueError(f"--top {top} is not between 1 and the model's {len(blocks)} blocks")
    with console.status(f"scoring {len(blocks)} blocks on {len(data['video'])} clips"):
        scores = score(model, blocks, predict, batches, args.priority, loss_fn=lambda m, b: loss(m, b).mean(),
                       t=lambda batch: batch["t"])  # fmt: skip
    table = Table(title=f"{scores.priority}, {scores.samples} samples, {scores.share_negative:.0%} negative")
    for column in ("rank", "block", "score", "95 % interval"):
        table.add_column(column, justify="right")
    for rank, name in enumerate(scores.ranking, 1):
        low, high = scores.intervals[name]
        table.add_row(str(rank), name, f"{scores.values[name]:.4g}", f"{low:.4g} .. {high:.4g}")
    console.print(table)
    if args.out:
        scores.save(args.out)
        console.print(f"scores: {args.out}", markup=False)
    if args.export:
        print(layer_filter(model, scores.ranking[:top], args.export))  # as it is, to be pasted


def _print_conditions(model: Any, blocks: Any, predict: Any, batches: Any, conditions: Sequence[str]) -> dict[str, Any]:
    """Show CEI with all conditions, with each one dropped, and within each region where the data have labels.

    Returns them by name.
    """
    from entprog.cei import cei_per_condition
    from entprog.models.pretrained import scoring_ways

    ways, batches = scoring_ways(predict, batches, conditions)
    with console.status(f"scoring {len(blocks)} blocks {len(ways)} ways"):
        found = cei_per_condition(model, blocks, ways, batches)
    table = Table(title="CEI per condition")
    for column in ("block", *found):
        table.add_column(column, justify="right")
    for block in blocks:
        table.add_row(block.name, *(f"{scores.values[block.name]:+.4f}" for scores in found.values()))
    console.print(table)
    return found


def _sample(args: argparse.Namespace) -> None:
    import torch
    from torch import nn

    from entprog.bench import draw_held_out, driven, first_clips, frame_quality, sample_clips, shown
    from entprog.data.batches import load_data
    from entprog.data.video import write_mp4
    from entprog.measure import best_device
    from entprog.models import wan
    from entprog.models.pretrained import load_model

    run = Path(args.run)
    final = run / "checkpoints" / "final"
    if not final.exists():
        raise ValueError(f"{run} holds no finished model (checkpoints/final): run entprog train with --out {run} first")
    config = load_config(run / "config.yaml", args.overrides)
    config = replace(config, held_out_clips=_at_least_one("clips", args.clips))
    if args.frames is not None:
        _at_least_one("frames", args.frames)
    whole = wan.is_pipeline(config.model)
    if whole and (args.frames or args.pose_from or args.overlap is not None):
        raise ValueError("--frames, --pose-from and --overlap are for PoseDiT: a pipeline draws the clips as they are")
    model = nn.Module.to(wan.load(config, str(final)) if whole else load_model(str(final)), best_device())
    data, _ = load_data(config, "test")
    names = _clip_names(config, data, args.clips) if args.each else []
    with console.status(f"sampling {args.clips} clips, {config.num_inference_steps} steps each"):
        if whole:
            drawn, truth, clips = draw_held_out(config, model, data, args.clips)
        else:
            clips, truth = first_clips(config, data, args.clips, args.frames)
            clips = driven(clips, data, args.pose_from) if args.pose_from else clips
            drawn, clips = sample_clips(config, model, clips, overlap=args.overlap), shown(config, clips)
    stills = [clips["reference"][:, :, None].expand_as(drawn)] if "reference" in clips else []
    poses = [clips["pose"] * 2 - 1] if "pose" in clips else []
    columns = torch.cat((*stills, *poses, truth, drawn), dim=-1)  # side by side
    wall = torch.cat(list(columns), dim=-2)  # clips below each other
    out = Path(args.out or run / "samples.mp4")
    write_mp4(out, wall, args.fps, upscale=max(1, 128 // truth.shape[-1]))
    for name, video in zip(names, drawn, strict=False):  # no names unless --each asks for them
        path = Path(args.each) / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_mp4(path, video, args.fps)
    if len(drawn) < args.clips:
        told = f"{len(drawn)} clips and not {args.clips}: there are no more held-out clips of the first one's shape"
        console.print(told, style="yellow", markup=False)
    if args.pose_from:
        console.print(f"{out}: reference, pose of {args.pose_from}, the clip itself, sample", markup=False)
        return
    quality = frame_quality(drawn, truth)
    console.print(f"{out}: reference, pose, truth, sample; SSIM {quality['ssim']['mean']:.3f}, "
                  f"PSNR {quality['psnr']['mean']:.2f} dB", markup=False)  # fmt: skip


def _clip_names(config: RunConfig, data: Mapping[str, Any], count: int) -> list[str]:
    """Return the ids of the clips that are drawn first. ValueError for data whose clips have none."""
    column = data["video"]
    if not hasattr(column, "prepared"):
        raise ValueError(f"--each names videos by the ids of prepared clips, and {config.data} is not prepared")
    return list(column.ids(column.first(count)))


def _export(args: argparse.Namespace) -> None:
    from entprog.cei import Scores
    from entprog.export import export

    options = {"rank": args.rank, "energy": args.energy, "keys": args.keys}
    if args.scores:
        options["scores"] = Scores.load(args.scores)
    if args.example:
        from safetensors.torch import load_file

        options["example"] = load_file(args.example)
    written = export(args.source, args.form, args.out, base=args.base, **options)
    lists = Path(args.out).with_suffix(".json") if args.form == "lora" else args.out
    for name, value in written.items():
        told = value if not isinstance(value, list | dict) or len(value) <= 8 else f"{len(value)}, see {lists}"
        console.print(f"{name}: {told}", markup=False)
    console.print(f"{args.form}: {args.out}", markup=False)


def _report(args: argparse.Namespace) -> None:
    from entprog.report import write_report

    console.print(f"report: {write_report(Path(args.run))}", markup=False)


def _add_export(commands: Any) -> None:
    export = commands.add_parser("export", help="save a trained model in another form")
    export.add_argument("source", help="run folder, diffusers folder, or a delta or single file of this command")
    export.add_argument("--as", dest="form", required=True, metavar="FORM", help="diffusers, single-file, delta, lora")
    export.add_argument("--out", required=True, help="file, or folder for diffusers")
    export.add_argument("--base", help="what was trained (default: the run's); a delta as source needs it too")
    export.add_argument("--rank", type=int, help="of a lora, or")
    export.add_argument("--energy", type=float, help="share of each layer's squared change that a lora keeps")
    export.add_argument("--keys", help="of a lora: diffusers (default), or original, for ComfyUI")
    export.add_argument("--example", help="safetensors file of forward inputs to measure a lora's output error on")
    export.add_argument("--scores", help="score file that goes into a delta (default: the run's)")
    export.set_defaults(function=_export)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="entprog", description="Train the blocks of a video diffusion model that matter."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train full, lora and ent-prog on drawn figures and write a report")
    demo.add_argument("--out", default="runs/demo", help="run folder (default: %(default)s)")
    demo.add_argument("--seconds", type=float, default=60.0, help="net seconds per strategy (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(function=_demo)
    add_prepare(commands)
    train = commands.add_parser("train", help="train one configuration or a recipe; the same command resumes")
    train.add_argument("config", help="YAML file of RunConfig fields, or a recipe")
    train.add_argument("overrides", nargs="*", metavar="key=value")
    train.add_argument("--out", required=True, help="run folder")
    train.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    train.set_defaults(function=_train)
    score = commands.add_parser("score", help="rank a model's blocks")
    score.add_argument("config", nargs="?", help="YAML file (default: the embedded base on drawn figures)")
    score.add_argument("overrides", nargs="*", metavar="key=value")
    score.add_argument(
        "--model", help="in place of the configuration's: a folder of a whole diffusers pipeline, or a PoseDiT"
    )
    score.add_argument("--data", help="in place of the configuration's")
    score.add_argument("--priority", default="cei", help="a row of PRIORITIES (default: %(default)s)")
    score.add_argument("--conditions", action="store_true", help="CEI per condition and per region of the person")
    score.add_argument("--samples", type=int, default=64, help="drawn clips to score on (default: %(default)s)")
    score.add_argument("--out", help="write the scores as JSON; with --conditions those of each by name")
    score.add_argument("--export", metavar="PROGRAM", help="print the best blocks as its layer filter: peft, "
                       "musubi-tuner, diffsynth, videox-fun")  # fmt: skip
    score.add_argument("--top", type=int, help="how many blocks to export (default: a quarter)")
    score.set_defaults(function=_score)
    add_plan(commands)
    sample = commands.add_parser("sample", help="draw a trained run's held-out clips into an mp4")
    sample.add_argument("run", help="run folder")
    sample.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data=DIR num_inference_steps=50")
    sample.add_argument("--clips", type=int, default=4)
    sample.add_argument("--frames", type=int, help="frames of each clip; may be more than were trained on")
    sample.add_argument("--pose-from", metavar="ID", help="drive everybody with this clip's poses, fitted to the body")
    sample.add_argument("--overlap", type=int, help="frames that the windows of a long clip share (default: half)")
    sample.add_argument("--fps", type=float, default=8.0)
    sample.add_argument("--out", help="mp4 file (default: RUN/samples.mp4)")
    sample.add_argument("--each", metavar="DIR", help="also write every clip alone, as DIR/ID.mp4 for `evaluate`")
    sample.set_defaults(function=_sample)
    evaluate = commands.add_parser("evaluate", help="score a run's or anybody's videos of prepared clips")
    evaluate.add_argument("source", help="run folder, or a folder of ID.mp4")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. guidance_scale=4 sampler=ddpm")
    evaluate.add_argument("--reference", help="prepared folder (default: the run's)")
    evaluate.add_argument("--split", default="test", choices=("test", "hard"), help="default: %(default)s")
    evaluate.add_argument("--clips", type=int, help="drawn for a run (default: 32)")
    evaluate.add_argument("--pose", choices=("movenet", "blazepose"), default="movenet", help="who looks for the pose; "
                          "movenet needs npm once, to be fetched (default: %(default)s)")  # fmt: skip
    evaluate.add_argument("--networks", nargs="*", default=["alex", "vgg", "i3d", "face"], help="of these, all")
    evaluate.add_argument("--against", help="another evaluation's JSON: paired differences")
    evaluate.add_argument("--out", help="JSON file (default: evaluation-SPLIT.json in the folder)")
    evaluate.set_defaults(function=_evaluate)
    _add_export(commands)
    report = commands.add_parser("report", help="write a run folder's report.html again")
    report.add_argument("run", help="run folder")
    report.set_defaults(function=_report)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub; a lookup would only wait for a time-out
    parser = _parser()
    args, behind = parser.parse_known_args(argv)
    if behind and (not hasattr(args, "overrides") or any(b.startswith("-") or "=" not in b for b in behind)):
        parser.error(f"unrecognized arguments: {' '.join(behind)}")
    if behind:  # key=value behind an option, where argparse does not expect it any more
        args.overrides = [*args.overrides, *behind]
    if args.command == "score" and args.config and "=" in args.config:
        args.config, args.overrides = None, [args.config, *args.overrides]
    console.quiet = os.environ.get("RANK", "0") != "0"  # of several processes the first one talks
    try:
        if args.command != "train":
            _one_process_only()
        args.function(args)
    except (*BAD_INPUT, PackagedFileError) as error:
        console.print(f"entprog {args.command}: {error}", style="red", markup=False)
        return 1 if isinstance(error, PackagedFileError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
