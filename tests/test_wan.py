"""Wan's pipeline folders, tiny and random: encoding, training and sampling are those of the pipelines themselves."""

import json
import shutil
from pathlib import Path
from types import MethodType

import diffusers
import pytest
import torch
from conftest import ABOUT, make_clip
from safetensors.torch import load_file
from tiny_wan import euler, save, unipc

from entprog.bench import train_run
from entprog.cli import main
from entprog.config import load_config, make_config
from entprog.data.batches import batch_at, fixed_batches, load_data
from entprog.data.cache import pose_maps
from entprog.data.encode import Encoders, draw_clips, encode, fingerprint
from entprog.data.prepared import Prepared, ShardWriter
from entprog.models import wan
from entprog.models.pretrained import batch_settings, load_model, model_of, predict_and_loss
from entprog.objective import OBJECTIVES, shifted
from entprog.train import Trainer

FLOW = OBJECTIVES["flow_prediction"]
KINDS = ("t2v", "i2v", "vace", "animate")
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Noise of two shapes, with faces and captions; six frames, of which Wan takes five."""
    folder = tmp_path_factory.mktemp("wan") / "data"
    with ShardWriter(folder, ABOUT | {"size": 32}) as writer:
        for i in range(10):
            clip = make_clip(i, "train" if i < 7 else "test", size=16 if i in (4, 5, 9) else 32)
            face = torch.randint(0, 256, (6, 3, 16, 16), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
            about = {"caption": f"a person {('walks', 'dances')[i % 2]} in the red room"}
            writer.add(type(clip)(**{**vars(clip), "face": face, "about": about}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def get(kind, **how):
        key = (kind, *how)
        if key not in made:
            made[key] = save(tmp_path_factory.mktemp("models") / "-".join(key), kind, **how)
        return made[key]

    return get


def settings(folder, data, **more):
    return make_config({"model": str(folder), "data": str(data), "steps": 2, "batch_size": 2} | more)


# -- the recipes against the pipelines ---------------------------------------------------------------------------------


class Oracle:
    """Stands in for a transformer's forward: compares what the pipeline gives with what the recipe gives, then says
    the target."""

    def __init__(self, recipe_inputs, x0, noise):
        self.recipe_inputs, self.x0, self.noise, self.times = recipe_inputs, x0, noise, []

    def __call__(self, model, hidden_states, timestep, return_dict=True, attention_kwargs=None, **given):
        assert given.pop("motion_encode_batch_size", None) is None
        assert (given.pop("control_hidden_states_scale", torch.ones(1)) == 1).all()
        t = timestep.float() / 1000
        x_t = FLOW.noisy(self.x0, self.noise, t)
        wanted = self.recipe_inputs(x_t, t)
        own = {k: v for k, v in given.items() if v is not None}
        own |= {"hidden_states": hidden_states, "timestep": timestep.float()}
        assert own.keys() == wanted.keys()
        for name, value in own.items():  # UniPC rounds times down to integers, the cache holds half precision
            assert value.shape == wanted[name].shape and (value - wanted[name]).abs().max() < 8e-3, name
        self.times += t.tolist()
        return (FLOW.target(self.x0, self.noise, t),)


@pytest.mark.parametrize("scheduler", [unipc, euler], ids=["unipc", "euler"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_that_is_told_the_target_finds_the_clip(kind, scheduler, folders, data):
    """Noising, timestep, target and every condition are right: the pipeline's own loop ends at x0."""
    folder = folders(kind)
    config = settings(folder, data)
    column = load_data(config, "test")[0]
    (batch, *_) = fixed_batches({k: v.subset([0]) for k, v in column.items()}, batch_size=1, **batch_settings(config))
    seen = {}

    def spy(model, **inputs):
        seen.update(inputs)
        return (inputs["hidden_states"],)

    class Dry(torch.nn.Module):
        dtype = torch.float32
        forward = spy

    def recipe_inputs(x_t, t):
        wan.call(config)(Dry(), x_t, t, batch)
        return {k: v for k, v in seen.items() if k != "return_dict"}

    record = column["video"].prepared.records[0]
    raw = {k: v[record["row"]] for k, v in load_file(data / "shards" / record["shard"]).items()}
    pose = pose_maps(raw["keypoints"][:5], 32, 32)
    clip = wan.Clip(raw["video"][:5], pose, raw["reference"], raw["face"][:5])
    pipe = wan.open_pipeline(folder, scheduler=scheduler())
    pipe.scheduler.set_timesteps(7)
    first = pipe.scheduler.sigmas[:1].float()
    x0, noise = batch["video"], batch["noise"]
    oracle = Oracle(recipe_inputs, x0, noise)
    pipe.transformer.forward = MethodType(lambda self, *a, **k: oracle(self, *a, **k), pipe.transformer)
    out = pipe(
        prompt=record["caption"], **clip.size, num_inference_steps=7, guidance_scale=1.0, output_type="latent",
        latents=FLOW.noisy(x0, noise, first), **wan.pipeline_of(folder).asks(clip),
    ).frames  # fmt: skip
    if kind == "animate":  # its "latent" is already what the autoencoder decodes
        mean, std = (torch.tensor(pipe.vae.config[k]).view(1, -1, 1, 1, 1) for k in ("latents_mean", "latents_std"))
        out = (out - mean) / std
    assert (out - x0).abs().max() < 1e-5
    assert len(oracle.times) == 7 and oracle.times[0] > 0.99 and oracle.times == sorted(oracle.times, reverse=True)


@pytest.mark.parametrize("kind", [pytest.param("vace", marks=pytest.mark.slow), "animate"])
def test_without_text_the_model_gets_what_guidance_compares_with(kind, folders, data):
    folder = folders(kind)
    config = settings(folder, data)
    batch = batch_at(
        load_data(config, "train")[0], 0, batch_size=2, seed=0, condition_dropout=1, **batch_settings(config)
    )
    assert "text" not in batch
    seen = {}

    class Spy(torch.nn.Module):
        dtype = torch.float32

        def forward(self, **inputs):
            seen.update(inputs)
            return (inputs["hidden_states"],)

    wan.call(config)(Spy(), batch["video"], batch["t"], batch)
    pipe = wan.open_pipeline(folder)
    _, empty = pipe.encode_prompt("a person walks", None, True, max_sequence_length=512)
    assert torch.equal(seen["encoder_hidden_states"], empty.expand(2, -1, -1))
    assert "face" not in batch or (seen["face_pixel_values"] == -1).all()


def test_shifted_times_are_the_schedulers_sigmas():
    """sigma = s u / (1 + (s - 1) u), timestep = 1000 sigma, as both of Wan's schedulers have them."""
    flow = euler()
    flow.set_timesteps(9)
    u = torch.tensor([sigma / (5 - 4 * sigma) for sigma in flow.sigmas[:-1].tolist()])
    assert torch.allclose(shifted(u, 5.0), flow.sigmas[:-1]) and torch.allclose(1000 * shifted(u, 5.0), flow.timesteps)
    own = unipc()
    own.set_timesteps(9)
    even = torch.linspace(1, 1 / 1000, 10)[:-1]
    assert torch.allclose(shifted(even, 3.0), own.sigmas[:-1].float(), atol=2e-3)
    u = torch.rand(1000, dtype=torch.float64)
    assert torch.equal(shifted(u), u)
    low, high = shifted(u, 3.0, (0.0, 0.9)), shifted(u, 3.0, (0.9, 1.0))
    assert low.max() < 0.9 <= high.min() and high.max() <= 1
    every = shifted(torch.linspace(0, 1, 100_001, dtype=torch.float64), 3.0)  # the experts' times, put together
    share = (every >= 0.9).double().mean()
    grid = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    assert abs(every[every >= 0.9].mean() - shifted(grid, 3.0, (0.9, 1.0)).mean()) < 1e-4 and 0.2 < share < 0.3


# -- the cache ---------------------------------------------------------------------------------------------------------


def test_encoding_happens_once_and_knows_its_model_and_caption(folders, data):
    folder = folders("vace")
    assert main(["prepare", "--model", str(folder), str(data)]) == 0
    cache = encode(data, folder)
    before = {p: p.stat().st_mtime_ns for p in (data / cache).iterdir()}
    assert len(before) == 2 + len(list((data / "shards").iterdir()))  # the empty prompt, and a folder of texts
    assert encode(data, folder) == cache
    assert before == {p: p.stat().st_mtime_ns for p in (data / cache).iterdir()}
    config = settings(folder, data)
    column = load_data(config, "train")[0]
    assert column["video"].shape == (7, 4, 3, 4, 4) and column["control"].shape == (7, 72, 3, 4, 4)
    assert column["text"].shape == (7, 512, 16) and len(column["video"].buckets()) == 2
    texts = column["text"].take([0, 1, 2, 3])
    assert torch.equal(texts[0], texts[2]) and not torch.equal(texts[0], texts[1])


def test_a_changed_caption_is_encoded_again_and_the_video_is_not(folders, data, tmp_path, monkeypatch):
    folder, copied = folders("t2v"), tmp_path / "data"
    shutil.copytree(data, copied, ignore=shutil.ignore_patterns("cache"))

    def texts(caption=None):
        return load_data(settings(folder, copied, caption=caption), "train")[0]["text"].take(range(4))

    before = texts()
    monkeypatch.setattr(Encoders, "columns", lambda *_: pytest.fail("the video is encoded again"))
    one_for_all = texts("a person walks in the red room")
    assert torch.equal(one_for_all, before[:1].expand(4, -1, -1)), "clip 0's caption"
    manifest = copied / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace("a person dances", "nobody sings"))
    after = texts()
    assert torch.equal(after[::2], before[::2]) and not torch.equal(after[1], before[1])
    monkeypatch.setattr(Encoders, "__init__", lambda *_: pytest.fail("nothing is left to encode"))
    assert torch.equal(texts(), after) and torch.equal(texts("a person walks in the red room"), one_for_all)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("caption", [None, "a person walks in the red room"])
def test_a_line_taken_out_of_the_manifest_moves_no_other_clip(when, caption, folders, data, tmp_path):
    """Whether it is taken out before anything is encoded or after; and put back, it has its own text again."""
    config = settings(folders("t2v"), tmp_path, caption=caption)
    shutil.copytree(data, tmp_path, ignore=shutil.ignore_patterns("cache"), dirs_exist_ok=True)
    manifest = tmp_path / "manifest.jsonl"
    lines = manifest.read_text().splitlines(keepends=True)

    def clips(source=config):
        columns = load_data(source, "train")[0]
        ids = [r["id"] for r in columns["video"].prepared.records]
        return {i: [columns[k].take([row])[0] for k in ("video", "text")] for row, i in enumerate(ids)}

    whole = clips(settings(folders("t2v"), data, caption=caption))
    if when == "after":
        clips()
    manifest.write_text("".join(lines[1:]))
    left = clips()
    assert left.keys() == whole.keys() - {"clip-0"}
    manifest.write_text("".join(lines))
    for found in (left, clips()):
        for name, columns in found.items():
            assert all(torch.equal(x, y) for x, y in zip(columns, whole[name], strict=True)), name


def test_latents_have_the_models_own_normalisation(folders, data):
    folder = folders("t2v")
    pipe, clip = wan.open_pipeline(folder), make_clip(3, size=32)
    z = wan.latents(pipe, clip.video[:5])
    vae = pipe.vae
    slow = vae.encode(clip.video[:5].transpose(0, 1)[None] / 127.5 - 1).latent_dist.mode()
    for c in range(4):
        own = (slow[:, c] - vae.config.latents_mean[c]) / vae.config.latents_std[c]
        assert torch.allclose(z[:, c], own, atol=1e-5)


def test_a_changed_encoder_is_another_model(tmp_path):
    folder = save(tmp_path / "m", "t2v")
    before = fingerprint(folder)
    weights = next((folder / "vae").glob("*.safetensors"))
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert fingerprint(folder) != before


def test_bad_input_says_what_to_do(folders, data, tmp_path):
    folder = folders("t2v")
    with ShardWriter(tmp_path / "data", ABOUT) as writer:
        writer.add(make_clip(0))
    with pytest.raises(ValueError, match="has no caption.*--caption"):
        encode(tmp_path / "data", folder)
    with pytest.raises(ValueError, match="face crops"):
        encode(tmp_path / "data", folders("animate"), "a person")
    clip = make_clip(0, size=24)
    with pytest.raises(ValueError, match="do not divide by 16"):
        Encoders(folder).columns(wan.Clip(clip.video, clip.video, clip.reference))
    with pytest.raises(ValueError, match="leave them out"):
        model_of(settings(folder, data, objective="epsilon"))
    with pytest.raises(ValueError, match="leave expert out"):
        model_of(settings(folder, data, expert="low"))
    with pytest.raises(ValueError, match="pipeline folders"):
        model_of(make_config({"steps": 1, "dtype": "bfloat16"}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="'FluxPipeline': choose.*WanVACEPipeline"):
        model_of(settings(tmp_path / "other", data))
    assert main(["prepare", "--model", str(folder), str(tmp_path)]) == 2
    assert main(["prepare", "--model", str(folder)]) == 2


# -- runs --------------------------------------------------------------------------------------------------------------

SMALL = ["steps=4", "batch_size=2", "held_out_clips=2", "held_out_draws=1", "evaluations=1", "samples=1",
         "num_inference_steps=2", "stages=2", "checkpoint_every=2", "clock=model", "caption=null",
         "mixed_precision='no'"]  # fmt: skip


def train(kind, folder, data, out, *more):
    config = load_config(EXAMPLES / f"wan_{kind}.yaml", [f"model={folder}", f"data={data}", *SMALL, *more])
    return train_run(config, out)


def weights(folder):
    return load_file(next(folder.glob("*.safetensors")))


@pytest.mark.parametrize("kind", ["vace", pytest.param("t2v", marks=pytest.mark.slow)])
def test_a_run_from_folder_to_video(kind, folders, data, tmp_path, monkeypatch):
    folder, run = folders(kind), tmp_path / "run"
    results = train(kind, folder, data, run)
    assert results["held_out"]["samples"] >= 2 and (run / "samples" / "000_sample.webp").exists()
    final = run / "checkpoints" / "final"
    before, trained = weights(folder / "transformer"), weights(final)
    assert before.keys() == trained.keys()
    assert any(not torch.equal(before[k], trained[k]) for k in before if k.startswith("blocks."))

    steps = Trainer._train_step

    def crash(self, progress):
        if self.step == 3:
            raise KeyboardInterrupt
        steps(self, progress)

    monkeypatch.setattr(Trainer, "_train_step", crash)
    with pytest.raises(KeyboardInterrupt):
        train(kind, folder, data, tmp_path / "again")
    monkeypatch.setattr(Trainer, "_train_step", steps)
    train(kind, folder, data, tmp_path / "again")
    resumed = weights(tmp_path / "again" / "checkpoints" / "final")
    assert all(torch.equal(trained[k], resumed[k]) for k in trained)

    kinds = {"t2v": diffusers.WanTransformer3DModel, "vace": diffusers.WanVACETransformer3DModel}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, transformer=kinds[kind].from_pretrained(final))
    pipe.set_progress_bar_config(disable=True)
    frames = pipe("a person", height=32, width=32, num_frames=5, num_inference_steps=2, output_type="pt").frames
    assert frames.shape == (1, 5, 3, 32, 32) and frames.isfinite().all()
    each = ["--each", str(tmp_path / "each")]
    assert main(["sample", str(run), "--clips", "1", "--out", str(tmp_path / "s.mp4"), *each]) == 0
    assert (tmp_path / "s.mp4").stat().st_size > 500 and len(list((tmp_path / "each").glob("*.mp4"))) == 1
    assert main(["sample", str(run), "--pose-from", "clip-1"]) == 2
    assert main(["evaluate", str(run), "--networks"]) == 2  # of PoseDiT's runs only
    with pytest.raises(ValueError, match="not a PoseDiT"):
        load_model(str(final))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_example_runs_from_the_command_line(kind, folders, data, tmp_path):
    command = ["train", str(EXAMPLES / f"wan_{kind}.yaml"), f"model={folders(kind)}", f"data={data}", *SMALL]
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "samples" / "000_sample.webp").exists() and (tmp_path / "report.html").exists()


@pytest.mark.parametrize("kind", ["i2v", "animate"])
def test_every_recipe_trains_and_draws(kind, folders, data):
    config = settings(folders(kind), data, num_inference_steps=2, guidance_scale=2.0)
    model, (_, loss) = model_of(config), predict_and_loss(config)
    column = load_data(config, "train")[0]
    loss(model, batch_at(column, 0, batch_size=2, seed=0, **batch_settings(config))).mean().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "blocks." in n)
    drawn, truth, shown = draw_clips(config, model, load_data(config, "test")[0], 1)
    assert drawn.shape == truth.shape == (1, 3, 5, 32, 32) and drawn.isfinite().all()
    assert set(shown) == ({"reference", "pose"} if kind == "animate" else set())


@pytest.mark.parametrize("expert", ["high", "low"])
def test_an_expert_trains_in_its_own_noise(expert, folders, data):
    folder = folders("t2v", boundary=0.875)
    config = settings(folder, data, expert=expert, num_inference_steps=2)
    model = model_of(config)
    stored = load_file(next((folder / wan.part_of(config)).glob("*.safetensors")))
    assert all(torch.equal(v, stored[k]) for k, v in model.state_dict().items())
    seen = []

    class Spy(torch.nn.Module):
        dtype = torch.float32

        def forward(self, hidden_states, timestep, **others):
            seen.append(timestep)
            return (hidden_states,)

    predict, _ = predict_and_loss(config)
    column = load_data(config, "train")[0]
    for position in range(20):
        predict(Spy(), batch_at(column, position, batch_size=2, seed=0, **batch_settings(config)))
    drawn = torch.cat(seen)
    assert (drawn >= 875).all() if expert == "high" else (drawn < 875).all()
    with pytest.raises(ValueError, match="high or low"):
        model_of(settings(folder, data))
    if expert == "low":  # the other one is the folder's
        assert draw_clips(config, model, load_data(config, "test")[0], 1)[0].shape == (1, 3, 5, 32, 32)


def test_blocks_are_scored_without_a_run(folders, data, tmp_path):
    out = tmp_path / "scores.json"
    command = ["score", "--model", str(folders("vace")), "--data", str(data), "--samples", "4", "--out", str(out)]
    assert main(command) == 0
    scores = json.loads(out.read_text())
    assert len(scores["ranking"]) >= 3 and all(v == v for v in scores["values"].values())
    assert main([*command[:-2], "--conditions"]) == 0


def test_weights_may_be_half_as_large(folders, data):
    config = settings(folders("vace"), data, dtype="bfloat16")
    model, (predict, loss) = model_of(config), predict_and_loss(config)
    assert {p.dtype for p in model.blocks[0].attn1.parameters()} == {torch.bfloat16}
    batch = batch_at(load_data(config, "train")[0], 0, batch_size=2, seed=0, **batch_settings(config))
    whole = settings(folders("vace"), data)
    exact = predict_and_loss(whole)[0](model_of(whole), batch)
    assert (predict(model, batch).float() - exact).norm() < 0.05 * exact.norm()
    loss(model, batch).mean().backward()


def test_data_of_a_split_may_be_limited(folders, data):
    config = settings(folders("t2v"), data, held_out_clips=2)
    assert len(load_data(config, "test")[0]["video"]) == 2
    assert len(Prepared(data, "test")) == 3
