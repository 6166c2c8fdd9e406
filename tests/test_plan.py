"""Plans: predicted from shapes, held against real steps, brute force and published numbers."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ZOO, Plain
from torch import nn

import entprog
from entprog.blocks import find_blocks
from entprog.cei import make_scores
from entprog.cli import main
from entprog.cost import OUTSIDE
from entprog.measure import count_flops
from entprog.plan import Accounting, modes_for, parse_bytes, spread
from entprog.plan_models import MODEL_CLASSES, PUBLISHED, build, latent_shape
from entprog.profiling import cost_of, profile
from entprog.tables import plan_table

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from plan_accuracy import FAMILIES as FAMILIES_TRIED  # noqa: E402
from plan_accuracy import Measured, compare  # noqa: E402


@pytest.mark.parametrize("name", ["pose_dit", pytest.param("wan", marks=pytest.mark.slow)])
def test_predictions_are_what_a_real_step_holds(name):
    rows = compare(name, make=ZOO[name])
    assert {r["checkpointing"] for r in rows} == {"none", "block", "parts"} and len(rows) > 30
    for row in rows:
        assert abs(row["kept"]["error"]) < 0.05 and abs(row["flops"]["error"]) < 0.05, row
        assert row["peak"] is None or abs(row["peak"]["error"]) < 0.1, row


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES_TRIED)
def test_predictions_of_other_families(name):
    for row in compare(name):
        assert abs(row["kept"]["error"]) < 0.05 and abs(row["flops"]["error"]) < 0.05, row
        assert row["peak"] is None or abs(row["peak"]["error"]) < 0.1, row


def small(**arguments):
    model, inputs = ZOO["plain"]()
    return entprog.plan(model, inputs, device="cpu", lora_rank=2, **arguments)


def test_flops_are_the_counters():
    model, inputs = ZOO["plain"]()
    found = profile(model, inputs, device="cpu", lora_rank=2)
    blocks = find_blocks(model, inputs)
    counted = cost_of(model, blocks, lambda: model(**inputs))
    assert [found.block(b.name)["forward"] for b in blocks] == list(counted.forward.values())
    first, *others = found.blocks
    frozen = dict.fromkeys(others, "pass") | {first: "train"}
    entprog.set_active(blocks, [first])
    model.embed.requires_grad_(False)
    assert found.step(frozen)["flops"] == count_flops(lambda: model(**inputs).sum().backward())


@pytest.mark.parametrize("why", ["does not run on shapes alone", "do not run once"])
def test_a_cost_that_is_reckoned_by_rule_says_why(why):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Plain()

        def forward(self, x):
            y = self.body(x)
            if "shapes" in why:
                return y * x.mean().item()
            return y if x.is_meta else self.body.blocks[0](y)

    model, x = Reads(), torch.randn(2, 5, 8)
    blocks = find_blocks(model.body)
    for i, block in enumerate(blocks):
        block.name = f"body.blocks.{i}"
    with pytest.warns(UserWarning, match=f"a Reads's steps are reckoned by rule.*{why}"):
        assert cost_of(model, blocks, lambda: model(x)).counted == "rule"


def test_predictions_are_the_same_at_every_call():
    """What lies between blocks is told apart by where it is saved, never by addresses, which are used again."""
    model, inputs = ZOO["wan"]()
    found, alive = [], []
    for _ in range(2):
        measured = profile(model, inputs, lora_rank=0)
        alive.append(torch.empty(1000, device="meta"))  # other addresses are free
        names = list(measured.blocks)
        steps = [measured.step(dict.fromkeys(names[:i], "pass"), outside=o) for i in (0, 1) for o in OUTSIDE]
        found.append((steps, {k: c.gaps for k, c in measured._machine.captures.items()}))
    assert found[0] == found[1]
    held = [label for gaps in found[0][1].values() for kept in gaps.values() for label in kept]
    assert any(label[0] == "between" for label in held)


def test_the_model_is_left_alone():
    model, inputs = ZOO["wan"]()
    model.enable_gradient_checkpointing()
    before = {n: (p.requires_grad, p.clone()) for n, p in model.named_parameters()}
    profile(model, inputs, device="cpu", lora_rank=2)
    assert model.gradient_checkpointing and not any("forward" in vars(m) for m in model.modules())
    assert all(p.requires_grad == before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters())


def test_blocks_that_do_not_run_back_cost_nothing():
    model, inputs = ZOO["pose_dit"]()
    found = profile(model, inputs, device="cpu", lora_rank=2)
    names = list(found.blocks)
    step = {m: found.step(dict.fromkeys(names[:-1], m), outside="none") for m in ("prefix", "bypass", "skip", "pass")}
    assert len({s["activations"] for s in step.values()}) == 1  # in front of the only trainable block
    assert step["skip"]["flops"] < step["bypass"]["flops"] == step["pass"]["flops"]
    behind = {m: found.step(dict.fromkeys(names[1:], m), outside="none") for m in ("prefix", "bypass", "pass")}
    assert behind["bypass"]["activations"] < behind["pass"]["activations"] == behind["prefix"]["activations"]
    kept = [found.block(names[1], m)["bytes"] for m in ("bypass", "pass", "train")]
    assert kept[0] == 0 and sorted(kept) == kept
    again = found.step({}, checkpointing="block")
    assert (
        again["activations"] < found.step({})["activations"]
        and again["recompute"] >= found.block(names[1])["bytes"] // 2
    )
    with pytest.raises(ValueError, match="no block is called"):
        found.step({"nobody": "pass"})


@pytest.mark.slow
def test_shortcuts_of_bypassed_and_skipped_blocks_are_counted():
    model, inputs = FAMILIES_TRIED["UNetMotion"]()
    blocks = find_blocks(model, inputs)
    assert any(b.outputs.shortcut for b in blocks[1:])
    found, real = profile(model, inputs, blocks=blocks, device="cpu", lora_rank=2), Measured(model, inputs, blocks)
    first, *others = found.blocks
    for mode in ("bypass", "skip"):
        kept, *_ = real.step([first], dict.fromkeys(others, mode), "none")
        assert found.step(dict.fromkeys(others, mode), outside="none")["activations"] == kept


def test_a_block_of_another_kind_is_not_taken_for_its_neighbour():
    model, inputs = ZOO["pose_dit"]()
    found = profile(model, inputs, device="cpu", lora_rank=2)
    space, time = list(found.blocks)[:2]  # same class, same shapes, another axis
    assert found.block(space, "pass")["bytes"] != found.block(time, "pass")["bytes"]


def test_bytes_of_weights_gradients_and_optimizer():
    plan = small()
    count, model = plan.parameters, ZOO["plain"]()[0]
    assert count == sum(p.numel() for p in model.parameters())
    full = plan.reference
    assert (full.weights, full.gradients, full.optimizer) == (4 * count, 4 * count, 8 * count)
    assert full.peak == 16 * count + full.activations + full.recompute
    in_bf16 = small(dtype=torch.bfloat16).reference
    assert (in_bf16.weights, in_bf16.gradients, in_bf16.optimizer) == (2 * count, 2 * count, 12 * count)
    assert small(dtype=torch.bfloat16, master=False, optimizer="adamw8bit").reference.optimizer == 2 * count
    rows = {s.frozen: s.weights for s in small(dtype=torch.bfloat16).settings if s.active == 1 and s.mode == "bypass"}
    block = next(iter(plan.blocks.values()))
    assert rows["bf16"] - rows["int8"] == 3 * block == rows["bf16"] - rows["fp8"]
    assert rows["bf16"] - rows["cpu"] == 2 * block  # of three frozen blocks two are in the ring
    rows = {s.frozen: s for s in plan.settings if s.active == 1 and s.mode == "bypass" and s.checkpointing == "none"}
    assert list(rows) == ["float32", "bf16", "int8", "fp8", "cpu"]
    assert rows["float32"].weights == 4 * count and rows["float32"].weights - rows["bf16"].weights == 3 * 2 * block
    assert "stored" not in rows["float32"].describe() and "stored bf16" in rows["bf16"].describe()
    header = [c.header for c in plan_table(plan).columns]
    assert header[3:7] == ["GiB float32", "bf16", "int8, fp8", "cpu"] and full.frozen == "float32"


def test_budget():
    plan = small()
    sizes = sorted(s.peak for s in plan.settings)
    assert len(plan.fits(sizes[-1])) == len(sizes) and plan.best(sizes[-1]).active == len(plan.blocks)
    with pytest.raises(ValueError, match="the least is .* GiB, .*checkpointing"):
        plan.fits(sizes[0] - 1)
    for limit in sizes:
        try:
            best = plan.best(limit)
        except ValueError:
            continue
        assert best.peak <= limit and best.mode in ("train", "pass", "bypass")
        others = [s for s in plan.fits(limit) if s.method != "lora" and s.mode in ("train", "pass", "bypass")]
        assert (best.active, -best.flops) == max((s.active, -s.flops) for s in others)
    assert parse_bytes("24GiB") == 24 * 2**30 and parse_bytes("1.5 kB") == 1500 and parse_bytes(7) == 7
    with pytest.raises(ValueError, match="write e.g. 24GiB"):
        parse_bytes("plenty")


def test_time_follows_the_rate_or_the_measured_step():
    fast = small(rate=1e6)
    assert fast.reference.seconds == fast.reference.flops / 1e6
    measured = small(seconds_per_step=3.0, checkpointing="none")
    assert measured.reference.seconds == pytest.approx(3.0) and measured.reference.checkpointing == "none"
    with pytest.raises(ValueError, match="one of them"):
        small(rate=1.0, seconds_per_step=1.0)


def test_sets_of_blocks():
    names = [f"b{i}" for i in range(8)]
    assert spread(8, 2) == [2, 6] and spread(40, 40) == list(range(40))
    assert all(len(spread(n, m)) == m for n in (5, 8, 30, 42) for m in range(1, n + 1))
    assert [n for n, m in modes_for(names, 3, "prefix").items() if m == "train"] == names[5:]
    ranked = modes_for(names, 2, "bypass", ranking=names[::-1])
    assert [n for n, m in ranked.items() if m == "train"] == ["b6", "b7"]
    skip = modes_for(names, 2, "skip", ranking=names)
    assert [skip.get(n) for n in names] == ["train"] * 2 + ["bypass"] * 2 + ["skip"] * 4
    with pytest.raises(ValueError, match="differ in"):
        small(ranking=["blocks.0"])


@pytest.mark.parametrize("seed", range(12))
def test_cost_aware_is_what_brute_force_finds(seed):
    g = torch.Generator().manual_seed(seed)
    count = 3 + seed % 6
    kinds = torch.rand(3, 3, generator=g).tolist()  # blocks of equal cost, as models have them, or all different
    rows = [kinds[i % 3] if seed % 2 else torch.rand(3, generator=g).tolist() for i in range(count)]
    costs = {f"b{i}": dict(zip(("forward", "input", "weight"), row, strict=True)) for i, row in enumerate(rows)}
    scores = {n: float(torch.randn((), generator=g)) + 0.5 for n in costs}
    names = list(costs)

    def price(chosen):
        start = min(names.index(n) for n in chosen)
        through = sum(costs[n]["input"] for n in names[start:])
        return sum(c["forward"] for c in costs.values()) + through + sum(costs[n]["weight"] for n in chosen)

    subsets = [s for k in range(1, count + 1) for s in itertools.combinations(names, k)]
    for budget in sorted(price(s) for s in subsets)[:: max(1, len(subsets) // 9)]:
        budget += 1e-9
        wanted = max(sum(scores[n] for n in s) for s in subsets if price(s) <= budget)
        found = entprog.cost_aware(scores, costs, budget)
        assert price(found) <= budget + 1e-9 and sum(scores[n] for n in found) == pytest.approx(wanted)
    with pytest.raises(ValueError, match="cheapest step costs"):
        entprog.cost_aware(scores, costs, min(map(price, subsets)) * 0.99)
    with pytest.raises(ValueError, match="different blocks"):
        entprog.cost_aware({"x": 1.0}, costs, 1.0)


def test_cost_aware_counts_flops_beyond_what_floats_tell_apart():
    cost = dict.fromkeys(("forward", "input", "weight"), 2**53 + 3)
    costs = {f"b{i}": dict(cost) for i in range(5)}
    whole = sum(sum(c.values()) for c in costs.values())
    assert entprog.cost_aware(dict.fromkeys(costs, 1.0), costs, whole) == list(costs)


def test_costs_of_a_plan_feed_cost_aware():
    plan = small()
    costs = plan.costs()
    whole = sum(sum(c.values()) for c in costs.values())
    scores = make_scores("cei", list(costs), torch.rand(3, len(costs)))
    assert entprog.cost_aware(scores, costs, 0.7 * whole) == entprog.cost_aware(scores.values, costs, 0.7 * whole)
    assert entprog.cost_aware(dict.fromkeys(costs, 1.0), costs, whole) == list(plan.blocks)
    assert entprog.cost_aware(dict.fromkeys(costs, 1.0), costs, 0.7 * whole) != list(plan.blocks)


# what the publisher calls it, billions of parameters; counted when the presets were written: billions, blocks, millions
# of the first block
SIZES = {
    "wan2.1-t2v-1.3b": (1.3, 1.42, 30, 46),
    "wan2.1-t2v-14b": (14, 14.29, 40, 351),
    "wan2.1-i2v-14b": (14, 16.39, 40, 404),
    "wan2.2-t2v-a14b": (14, 14.29, 40, 351),
    "wan2.2-i2v-a14b": (14, 14.29, 40, 351),
    "wan2.2-ti2v-5b": (5, 5.00, 30, 164),
    "wan2.2-animate-14b": (14, 17.27, 40, 404),
    "hunyuanvideo": (13, 12.82, 60, 340),
    "cogvideox-2b": (2, 1.69, 30, 56),
    "cogvideox-5b": (5, 5.57, 42, 132),
    "ltx-video": (2, 1.92, 28, 67),
    "mochi-1": (10, 10.03, 48, 208),
}


def test_presets_have_the_sizes_they_should():
    assert set(SIZES) == set(PUBLISHED)
    for name, (called, total, count, block) in SIZES.items():
        model = build(PUBLISHED[name].model_class, PUBLISHED[name].config)
        lists = [model.get_submodule(c) for c in MODEL_CLASSES[PUBLISHED[name].model_class].containers]
        parameters = sum(p.numel() for p in model.parameters()) / 1e9
        assert parameters == pytest.approx(total, abs=0.006) and parameters == pytest.approx(called, rel=0.25), name
        assert sum(map(len, lists)) == count
        assert sum(p.numel() for p in lists[0][0].parameters()) / 1e6 == pytest.approx(block, abs=0.6), name


def test_a_real_model_costs_what_was_calculated_by_hand():
    plan = entprog.plan("wan2.1-t2v-1.3b", checkpointing="block")
    block = plan.profile.block("blocks.3")
    # 32,760 tokens, d = 1536, ffn 8960, 512 text tokens: linear 2.74, attention 6.70 TFLOP
    assert block["forward"] / 1e12 == pytest.approx(9.43, abs=0.01)
    through = plan.profile.block("blocks.3", "pass")
    assert through["backward"] / block["forward"] == pytest.approx(2.065, abs=0.01)
    assert (block["backward"] - through["backward"]) / block["forward"] == pytest.approx(0.290, abs=0.01)
    assert 0.9 < plan.lora.flops / plan.reference.flops < 1


def test_sizes_that_do_not_fit_say_what_does():
    assert latent_shape((81, 480, 832), (4, 8), 16) == (1, 16, 21, 60, 104)
    with pytest.raises(ValueError, match="next is 81x480x832"):
        latent_shape((80, 475, 830), (4, 8), 16, even=2)
    with pytest.raises(ValueError, match="choose one of"):
        entprog.plan("wan9")
    with pytest.raises(ValueError, match="dict of tensors"):
        entprog.plan(ZOO["plain"]()[0])
    for sample, says in (((1, 16, 5, 16, 16), r"the latent \(1, 16, 5, 16, 16\)"), ({}, "the inputs")):
        with pytest.raises(ValueError, match=f"batch 4 .*{says}.*leave batch out"):
            entprog.plan("wan2.1-t2v-1.3b", sample, batch=4)
    with pytest.raises(ValueError, match=r"no _class_name.*\['num_layers'\].*WanTransformer3DModel"):
        entprog.plan({"num_layers": 2}, (5, 32, 32))


def test_the_command_prints_and_reads_a_configuration(tmp_path, capsys):
    config = {"_class_name": "WanTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 12,
              "ffn_dim": 32, "num_layers": 4, "text_dim": 16, "freq_dim": 32}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    size = ["--frames", "5", "--height", "32", "--width", "32", "--lora-rank", "2"]
    assert main(["plan", str(tmp_path), *size, "--json", "--memory", "1GiB"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["best"]["active"] == 4 and found["blocks"] == 4
    assert {"train", "pass", "prefix", "bypass", "bypass_attn", "skip"} == set(next(iter(found["per_block"].values())))
    assert main(["plan", str(tmp_path), *size, "--rate", "1"]) == 0
    assert "bypass" in capsys.readouterr().out
    assert main(["plan", str(tmp_path), *size, "--memory", "1kB"]) == 2
    assert main(["plan", str(tmp_path)]) == 2 and main(["plan", "nothing"]) == 2
    assert Accounting().optimizer == "adamw"


def test_attention_is_counted_where_a_mask_is_among_what_a_block_is_given():
    from entprog.meta import as_on

    q, mask = (torch.randn(shape, device="meta", requires_grad=True) for shape in ((1, 2, 4, 8), (1, 1, 4, 4)))
    with as_on("cuda"):
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    assert out.requires_grad and out.shape == q.shape
