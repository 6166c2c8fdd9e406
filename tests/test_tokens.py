"""The token axis: smaller clips are right in themselves, only training sees them, and every run ends at full size."""

import base64
from dataclasses import replace

import diffusers
import pytest
import torch
from matplotlib import style
from torch import nn

import entprog
from entprog.charts import map_chart, search_chart
from entprog.config import make_config
from entprog.data.batches import batch_at
from entprog.data.synthetic import figures
from entprog.measure import count_flops
from entprog.models.pose_dit import places, pose_dit
from entprog.models.pretrained import conditioned
from entprog.models.shrinking import AXES
from entprog.report import CHART_STYLE
from entprog.schedule import SCHEDULES, Candidate, candidates
from entprog.strategy import Progressive
from entprog.tokens import WHOLE, Tokens, kept, shrinker

HALF = Tokens(0.5, 0.5)
SMALL = {"axes": "blocks,tokens", "token_grid": ((0.5, 0.5), (1.0, 0.5))}
VIDEO = {"video": "BCFHW", "noise": "BCFHW", "pose": "BCFHW", "still": "BCHW", "labels": "BFYX"}


def clips(b=2, c=3, f=6, h=12, w=8, pose=3):
    g = torch.Generator().manual_seed(0)
    shapes = {"video": (b, c, f, h, w), "noise": (b, c, f, h, w), "pose": (b, 3, f, pose * h, pose * w),
              "still": (b, c, h, w)}  # fmt: skip
    batch = {k: torch.randn(s, generator=g) for k, s in shapes.items()}
    return batch | {"labels": torch.randint(0, 9, (b, f, h, w), generator=g), "t": torch.rand(b), "text": "a walk"}


# -- a smaller batch ---------------------------------------------------------------------------------------------------


def test_a_half_is_the_mean_of_squares_of_the_first_frames_and_the_rest_stays():
    batch = clips()
    small = shrinker(VIDEO)(batch, HALF)
    for key in ("video", "pose"):
        slow = torch.stack([batch[key][:, :, :3, i::2, j::2] for i in (0, 1) for j in (0, 1)]).mean(0)
        assert torch.allclose(small[key], slow, atol=1e-6)
    slow = torch.stack([batch["still"][..., i::2, j::2] for i in (0, 1) for j in (0, 1)]).mean(0)
    assert torch.allclose(small["still"], slow, atol=1e-6)
    assert torch.equal(small["labels"], batch["labels"][:, :3]), "labels keep their sides, which the loss averages"
    assert small["t"] is batch["t"] and small["text"] == "a walk" and batch["video"].shape[2] == 6
    assert shrinker(VIDEO)(batch, WHOLE) is batch


@pytest.mark.parametrize("size", [0.25, 0.5, 0.67, 0.9])
@pytest.mark.parametrize("frames", ["first", "strided"])
def test_noise_stays_noise(size, frames):
    batch = {k: torch.randn(2, 4, 6, 24, 24, generator=torch.Generator().manual_seed(3)) for k in ("video", "noise")}
    layout = {"video": "BCFHW", "noise": "BCFHW"}
    small = shrinker(layout, frames=frames)(batch, Tokens(0.5, size))["noise"]
    tolerance = 4 / small.numel() ** 0.5
    assert small.std().item() == pytest.approx(1, abs=tolerance)
    flat = small.flatten(0, 1)
    assert abs((flat[..., 1:] * flat[..., :-1]).mean().item()) < 1.5 * tolerance, "neighbours are independent"
    assert torch.isin(small, batch["noise"]).all()


@pytest.mark.parametrize("axes", ["BCFHW", "BFCHW", "FHW"])
def test_axes_may_stand_in_any_order(axes):
    sizes = {"B": 2, "C": 3, "F": 5, "H": 8, "W": 6}
    x = torch.randn([sizes[a] for a in axes])
    for frames, chosen in (("first", [0, 1]), ("strided", [0, 4])):
        small = shrinker({"x": axes}, frames=frames)({"x": x}, Tokens(0.4, 0.5))["x"]
        expected = nn.functional.avg_pool2d(x.movedim(axes.index("F"), 0)[chosen].flatten(0, -3), 2)
        assert torch.allclose(small.movedim(axes.index("F"), 0).flatten(0, -3), expected, atol=1e-6)


def test_strided_frames_span_the_clip_and_are_told_or_refused():
    for count in range(1, 18):
        clip = {"x": torch.arange(count).float().view(1, 1, count, 1, 1)}
        for share in (0.1, 0.25, 0.4, 0.5, 0.6, 0.8, 1.0):
            few, cut = kept(count, share), shrinker({"x": "BCFHW"}, frames="strided", scale="s")
            if (count + 1) // 2 < few < count:
                with pytest.raises(ValueError, match=rf"{count} frames .* at most {(count + 1) // 2}/{count}.*'first'"):
                    cut(clip, Tokens(share, 1.0))
                continue
            small = cut(clip | {"s": torch.ones(1, 3)}, Tokens(share, 1.0))
            chosen = small["x"].flatten()
            assert len(chosen) == few and torch.allclose(torch.arange(few) / small["s"][0, 0], chosen, atol=1e-3)
            assert few in (1, count) or (chosen[1] >= 2 and count - 1 - chosen[-1] < few - 1), "no larger step fits"
    five = shrinker({"x": "BCFHW"}, frames="strided")({"x": torch.zeros(1, 1, 5, 1, 1)}, Tokens(0.5, 1.0))
    assert five["x"].shape[2] == 3


@pytest.mark.parametrize("unit", [1, 2, 4])
def test_counts_stay_multiples_and_never_vanish(unit):
    for count in range(unit, 40, unit):
        for share in (0.01, 0.3, 0.5, 0.77, 1.0):
            got = kept(count, share, unit)
            assert got % unit == 0 and unit <= got <= count and abs(got - share * count) <= max(unit / 2, unit - 0.01)
        assert kept(count, 1.0, unit) == count
    with pytest.raises(ValueError, match="do not divide into patches of 4"):
        kept(10, 0.5, 4)


@pytest.mark.parametrize(
    ("layout", "batch", "message"),
    [
        ({}, {}, "needs a video first"),
        ({"x": "BCHWF"}, {}, "H and W last"),
        ({"still": "BCHW"}, {}, "needs a video first"),
        ({"x": "BCFHW"}, {"y": torch.zeros(1)}, "needs a tensor 'x'.*holds.*'y'"),
        ({"x": "BCFHW"}, torch.zeros(1), "holds Tensor"),
        ({"x": "FHW", "y": "FHW"}, {"x": torch.zeros(4, 4, 4), "y": torch.zeros(3, 4, 4)}, "3 frames and the video 4"),
        ({"x": "FHW", "y": "HW"}, {"x": torch.zeros(4, 4, 4), "y": torch.zeros(5, 5)}, "no whole sides"),
        ({"x": "FHW"}, {"x": torch.zeros(4, 4, 4, dtype=torch.uint8)}, "no averages"),
    ],
)
def test_what_cannot_be_made_smaller_is_refused(layout, batch, message):
    with pytest.raises(ValueError, match=message):
        shrinker(layout)(batch, HALF)


def test_tokens_are_shares():
    assert (
        HALF.share == 0.125 and WHOLE.whole and not HALF.whole and str(HALF) == "0.5 of the frames at 0.5 of their size"
    )
    for wrong in ((0, 1), (1, 1.5), (-1, 0.5)):
        with pytest.raises(ValueError, match=r"both in \(0, 1\]"):
            Tokens(*wrong)
    with pytest.raises(ValueError, match="choose one of"):
        shrinker(VIDEO, frames="random")


# -- where smaller tokens lie ------------------------------------------------------------------------------------------


def test_places_of_a_smaller_grid_are_the_middles_of_the_full_ones():
    for side, scale in ((6, 0.5), (12, 0.25), (6, 1.0)):
        unit = round(1 / scale)
        middles = torch.arange(side).float().view(-1, unit).mean(1)
        assert torch.allclose(places(side // unit, torch.device("cpu"), torch.tensor(scale)), middles)
    assert torch.equal(places(5, torch.device("cpu")), torch.arange(5))


@pytest.mark.parametrize("motion", [False, True])
def test_pose_dit_reads_the_scale_and_without_it_is_what_it_was(motion):
    torch.manual_seed(0)
    model = pose_dit("T", hidden_size=32, depth=4, num_heads=2, motion_modules=motion)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    data = figures(4, size=24, frames=4)
    batch = batch_at(data, 0, batch_size=4, seed=0)

    def call(b):
        return conditioned(model, b["video"], b["t"], b)

    whole = torch.ones(4, 3)
    assert torch.allclose(call(batch), call(batch | {"grid_scale": whole}), atol=1e-5)
    small = shrinker(AXES["PoseDiT"], patch=(1, 4, 4), frames="strided", scale="grid_scale")(batch, HALF)
    assert torch.allclose(small["grid_scale"], torch.tensor([1 / 3, 0.5, 0.5]).expand(4, 3)), "frames 0 and 3 of 4"
    assert small["pose"].shape[-3:] == (2, 12, 12)
    kept_places = {k: v for k, v in small.items() if k != "grid_scale"}
    assert call(small).shape == (4, 3, 2, 12, 12)
    assert not torch.allclose(call(small), call(kept_places), atol=1e-4)
    strides = small | {"grid_scale": small["grid_scale"].clone()}
    strides["grid_scale"][:, 0] = 1
    assert not torch.allclose(call(small), call(strides), atol=1e-5), "every third frame is told as such"
    model.enable_gradient_checkpointing()
    assert torch.allclose(call(small), call(small | {}), atol=0)


# -- schedules ---------------------------------------------------------------------------------------------------------


def test_every_schedule_begins_small_and_ends_whole():
    settings = Progressive(**SMALL, tokens_until=0.7)
    assert [t.share for t in settings.tokens] == [0.125, 0.25, 1.0]
    for stages in (1, 2, 4, 8):
        fixed, linear = (
            [SCHEDULES[n](k, stages, 8, settings, None, None) for k in range(stages)] for n in ("fixed", "linear")
        )
        begun = [k / stages < 0.7 for k in range(stages)]
        assert [c.tokens for c in fixed] == [HALF if early else WHOLE for early in begun]
        shares = [c.tokens.share for c in linear]
        assert shares == sorted(shares) and shares[0] == 0.125 and [s < 1 for s in shares] == begun
    assert {c.tokens.share for c in linear} == {0.125, 0.25, 1.0}


def test_adaptive_races_all_pairs_and_tokens_never_get_fewer():
    settings, asked = Progressive(**SMALL), []
    SCHEDULES["adaptive"](0, 4, 8, settings, None, lambda options: asked.extend(options) or options[0])
    assert {(c.active, c.tokens.share) for c in asked} == {(m, s) for m in (1, 2, 4, 6, 8) for s in (0.125, 0.25, 1.0)}
    assert asked[0] == Candidate(1, 0, 0.5, 0.5) and asked[-1] == Candidate(8)
    later = candidates(8, settings, Candidate(4, 0, 1.0, 0.5), settings.tokens)
    assert {c.tokens.share for c in later} == {0.25, 1.0}
    after = []
    SCHEDULES["adaptive"](3, 4, 8, settings, None, lambda options: after.extend(options) or options[0])
    assert all(c.tokens.whole for c in after), "past tokens_until"


def test_blocks_alone_are_what_they_were():
    settings = Progressive(token_grid=((0.3, 0.3),), tokens_until=0.1)
    assert settings.tokens == [WHOLE]
    for name in ("fixed", "linear"):
        assert all(SCHEDULES[name](k, 4, 8, settings, None, None).tokens.whole for k in range(4))
    assert all(c.tokens.whole for c in candidates(8, settings, None)) and len(candidates(8, settings, None)) == 5


def test_settings_come_from_yaml_words():
    config = make_config(
        {"steps": 4, "axes": "blocks,tokens", "token_grid": [[0.5, 0.5], [1, 0.5]], "tokens_until": 0.3}
    )
    assert config.progressive().tokens == [HALF, Tokens(1.0, 0.5), WHOLE] and config.progressive().tokens_until == 0.3


def test_the_report_draws_tokens_where_they_were_used():
    def drawn(chart, events):
        with style.context(CHART_STYLE):
            return base64.b64decode(chart(events).partition(",")[2]).decode()

    small, whole = {"frames": 0.5, "size": 0.5}, {"frames": 1.0, "size": 1.0}
    event = {"event": "modes", "modes": {"a": "train"}, "active": ["a"]}
    plain = [event | {"step": i, "progress": i / 2} for i in range(2)]
    grown = [e | {"tokens": t} for e, t in zip(plain, (small, whole), strict=True)]
    assert ">tokens<" in drawn(map_chart, grown) and ">tokens<" not in drawn(map_chart, plain)
    entry = {"active": 1, "skipped": 0, "interval": [0.0, 1.0], "efficiency": 0.5}
    search = {"stage": 0, "estimator": "race", "rungs": [{"entries": [entry | small, entry | whole]}]}
    assert "0.5x0.5" in drawn(search_chart, [search | {"chosen": entry | small}])
    old = {"stage": 0, "estimator": "race", "rungs": [{"entries": [entry]}], "chosen": entry}
    assert "x0.5" not in drawn(search_chart, [old])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"axes": "tokens"}, "axes 'tokens' is unknown"),
        ({"axes": "blocks,tokens", "tokens_until": 1.0}, "ends at full size"),
        ({"axes": "blocks,tokens", "token_grid": ((1, 1),)}, "token_grid with less"),
        ({"token_grid": ((0.5, 0.5, 0.5),)}, "needs pairs"),
        ({"token_grid": ((2.0, 0.5),)}, r"token_grid .*both in \(0, 1\]"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Progressive(**wrong)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make_config({"steps": 4, "strategy": "ent-prog"} | wrong)


# -- in somebody's loop ------------------------------------------------------------------------------------------------


class Latents(nn.Module):
    """A tiny Wan on batches of latents, its loss as a user would write it."""

    @staticmethod
    def build():
        torch.manual_seed(0)
        return diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=8, freq_dim=16, ffn_dim=24, num_layers=3, rope_max_seq_len=32,
        )  # fmt: skip


def wan_loss(model, batch):
    x, noise = batch["latents"], batch["noise"]
    given = {"encoder_hidden_states": batch["text"], "timestep": torch.full((len(x),), 500)}
    prediction = model(hidden_states=(x + noise) / 2, **given, return_dict=False)[0]
    return (prediction - (noise - x)).square().flatten(1).mean(1)


def wan_batches(count=6):
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        shapes = {"latents": (2, 4, 4, 8, 8), "noise": (2, 4, 4, 8, 8), "text": (2, 3, 8)}
        yield {k: torch.randn(s, generator=g) for k, s in shapes.items()}


SHRINK = shrinker({"latents": "BCFHW", "noise": "BCFHW"}, patch=(1, 2, 2))


def wan_loop(settings, steps=8, shrink=SHRINK, seen=None, **kwargs):
    model, batches = Latents.build(), list(wan_batches())
    judged = []

    def loss_fn(model, batch):
        if not torch.is_grad_enabled():
            judged.append(tuple(batch["latents"].shape))
        return wan_loss(model, batch)

    prog = entprog.EntProg(model, loss_fn, held_out=batches[:2], train_batches=lambda: iter(batches[2:]), clock="model",
                           total_steps=steps, strategy=settings, shrink=shrink, **kwargs)  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    shapes = []
    for step in range(steps):
        prog.step(step, optimizer)
        batch = prog.shrunk(batches[2 + step % 4])
        shapes.append(tuple(batch["latents"].shape[2:]))
        wan_loss(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return prog, shapes, judged


@pytest.mark.parametrize("schedule", ["fixed", "linear", pytest.param("adaptive", marks=pytest.mark.slow)])
def test_training_grows_to_full_size_and_only_training_is_small(schedule):
    settings = Progressive(**SMALL, schedule=schedule, stages=2, search_budget=0.9, priority="first", grid=(1.0,))
    prog, shapes, judged = wan_loop(settings, steps=160 if schedule == "adaptive" else 10)
    assert shapes == sorted(shapes) and shapes[-1] == (4, 8, 8)
    assert shapes[0] == (2, 4, 4) or schedule == "adaptive"
    full = {s[2:] for s in judged} - {shapes[0]}
    assert full == {(4, 8, 8)} or schedule == "adaptive"
    assert all(tuple(b["latents"].shape[2:]) == (4, 8, 8) for b in prog.held_out)
    marks = [e for e in prog.events if e["event"] == "modes"]
    assert (
        marks[-1]["tokens"] == {"frames": 1.0, "size": 1.0}
        and prog.tokens.whole
        and settings.tokens_until in prog.boundaries()
    )
    if schedule == "adaptive":
        entries = [e for s in prog.events if s["event"] == "search" for r in s["rungs"] for e in r["entries"]]
        assert {(e["frames"], e["size"]) for e in entries} == {(0.5, 0.5), (1.0, 0.5), (1.0, 1.0)}


def test_held_out_losses_and_scores_are_those_of_the_whole_model_on_whole_clips():
    settings = Progressive(**SMALL, schedule="fixed", active_share=0.5, stages=1)
    prog, shapes, _ = wan_loop(settings, steps=3)
    small, _, _ = wan_loop(settings, steps=3)
    small.tokens = HALF
    assert torch.equal(prog.losses(), small.losses())
    plain, _, _ = wan_loop(replace(settings, axes="blocks"), steps=3)
    assert prog.scores == plain.scores, "taken before anything trained, on whole clips"
    assert prog.bypass_sets.keys() == {Candidate(3), Candidate(2)} and set(shapes) == {(2, 4, 4), (4, 8, 8)}


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_even_the_shortest_run_ends_at_full_size(steps):
    _, shapes, _ = wan_loop(Progressive(**SMALL, schedule="fixed", stages=1, tokens_until=0.95), steps=steps)
    assert shapes[-1] == (4, 8, 8) and (steps == 1 or shapes[0] == (2, 4, 4))


def test_costs_are_counted_at_each_scale():
    prog, _, _ = wan_loop(Progressive(**SMALL, schedule="linear", stages=4))
    batch = next(wan_batches())
    for tokens in (HALF, Tokens(1.0, 0.5), WHOLE):
        with torch.no_grad():
            flops = count_flops(lambda: wan_loss(prog.model, prog.shrunk(batch, tokens)))  # noqa: B023
        assert prog.step_cost(tokens).prediction({}) == pytest.approx(flops, rel=0.01)
    whole, half = prog.estimate(Candidate(3)), prog.estimate(Candidate(3, 0, 0.5, 0.5))
    assert half < whole / 4 and prog.cost(Candidate(3, 0, 0.5, 0.5)) == pytest.approx(half)


def test_a_loop_is_refused_that_cannot_or_does_not_get_smaller():
    settings = Progressive(**SMALL, schedule="linear", stages=2)
    with pytest.raises(ValueError, match="shrink\\(batch, tokens\\)"):
        wan_loop(settings, shrink=None)
    with pytest.raises(ValueError, match="must return a smaller batch"):
        wan_loop(settings, shrink=lambda batch, tokens: batch, steps=4)
    model, batches = Latents.build(), list(wan_batches())
    prog = entprog.EntProg(model, wan_loss, held_out=batches[:2], train_batches=lambda: iter(batches), total_steps=40,
                           strategy=settings, shrink=SHRINK, clock="model")  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(RuntimeError, match="prog.shrunk"):
        for step in range(20):
            prog.step(step, optimizer)


def test_a_shrink_without_the_axis_changes_nothing():
    plain = Progressive(schedule="linear", stages=2)
    one, shapes, _ = wan_loop(plain)
    other, _, _ = wan_loop(plain, shrink=None)
    assert set(shapes) == {(4, 8, 8)} and "tokens" not in one.events[-1]
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def test_a_memory_budget_is_checked_at_full_size():
    limit = 3 * 2**20
    prog, shapes, _ = wan_loop(Progressive(**SMALL, schedule="linear", stages=2, priority="first"), max_memory=limit)
    plain, _, _ = wan_loop(Progressive(schedule="linear", stages=2, priority="first"), max_memory=limit)
    checks = [[e for e in p.events if e["event"] == "plan_check"] for p in (prog, plain)]
    assert shapes[0] == (2, 4, 4)
    assert checks[0][0]["measured"] == checks[1][0]["measured"], "the trial ran on a whole batch"
    assert max(e["measured"] for e in checks[0]) <= limit
    prog.release()
