"""Saved forms reload to identical outputs (LoRA: to the error it reports); layer filters choose exactly the layers."""

import copy
import json
import re
import shlex

import diffusers
import pytest
import torch
from conftest import ZOO, first
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from entprog.blocks import find_blocks
from entprog.cei import Scores
from entprog.cli import main
from entprog.config import RunConfig
from entprog.data.synthetic import figures
from entprog.export import export, low_rank
from entprog.layouts import FILTERS, layer_filter, to_original, wan_key
from entprog.models.pretrained import NEW_MODULES, model_of
from entprog.train import Trainer
from entprog.weights import apply_delta, build, content_hash, read_weights

WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 12, "out_channels": 4,
    "text_dim": 16, "freq_dim": 32, "ffn_dim": 32, "num_layers": 12, "rope_max_seq_len": 32,
}  # fmt: skip
IMAGE = {"image_dim": 8, "added_kv_proj_dim": 24}
ANIMATE = {
    "latent_channels": 4, "motion_encoder_size": 16, "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
    "motion_style_dim": 16, "motion_dim": 4, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 6,
}  # fmt: skip
WANS = {
    "T2V": (diffusers.WanTransformer3DModel, WAN),
    "I2V": (diffusers.WanTransformer3DModel, WAN | IMAGE),
    "VACE": (diffusers.WanVACETransformer3DModel, WAN | {"vace_layers": [0, 5], "vace_in_channels": 8}),
    "Animate": (diffusers.WanAnimateTransformer3DModel, WAN | IMAGE | ANIMATE),
}


def trained(base, only_linears=False, seed=0, scale=0.02):
    """The model after training: its second block and one parameter outside blocks have moved."""
    model, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    block = find_blocks(model)[1].module
    moved = [m.weight for m in block.modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for p in moved if only_linears else [*block.parameters(), list(model.parameters())[-1]]:
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return model


def output(model, inputs):
    with torch.no_grad():
        return first(model.eval()(**inputs))


def same(a, b):
    return set(a) == set(b) and all(torch.equal(v, b[k]) and v.dtype == b[k].dtype for k, v in a.items())


@pytest.fixture
def wan():
    torch.manual_seed(0)
    return ZOO["wan"]()


# -- exact forms -----------------------------------------------------------------------------------------------------


def test_every_exact_form_reloads_to_identical_outputs(family, tmp_path):
    base, inputs = family
    model = trained(base)
    y = output(model, inputs)
    assert not torch.equal(y, output(base, inputs))
    plain = not hasattr(base, "save_pretrained")
    if not plain:
        base.save_pretrained(tmp_path / "base")
        export(model, "diffusers", tmp_path / "whole")
        loaded = type(base).from_pretrained(tmp_path / "whole", use_safetensors=True)
        assert torch.equal(output(loaded, inputs), y) and same(loaded.state_dict(), model.state_dict())
        export(model, "single-file", tmp_path / "one.safetensors")
        assert torch.equal(output(build(read_weights(tmp_path / "one.safetensors")), inputs), y)
    written = export(model, "delta", tmp_path / "delta.safetensors", base=base)
    assert written["blocks"] == [find_blocks(base)[1].name]
    again = apply_delta(base if plain else tmp_path / "base", tmp_path / "delta.safetensors")
    assert same(again.tensors, model.state_dict())
    rebuilt = copy.deepcopy(base)
    rebuilt.load_state_dict(again.tensors)
    assert torch.equal(output(rebuilt, inputs), y)


@pytest.mark.parametrize("name", WANS)
def test_diffusers_reads_a_wan_single_file(name, tmp_path):
    cls, config = WANS[name]
    model = cls(**config)
    model.save_pretrained(tmp_path / "config")
    export(model, "single-file", tmp_path / "one.safetensors")
    loaded = cls.from_single_file(str(tmp_path / "one.safetensors"), config=str(tmp_path / "config"))
    assert same(loaded.state_dict(), model.state_dict())
    keys = load_file(tmp_path / "one.safetensors").keys()
    original = {"head.modulation", "head.head.weight", "blocks.0.self_attn.q.weight", "blocks.11.cross_attn.o.bias",
                "text_embedding.2.bias", "blocks.0.ffn.2.weight", "blocks.0.modulation",
                "blocks.0.norm3.weight"}  # fmt: skip
    own = {
        "T2V": set(),
        "I2V": {"img_emb.proj.4.weight", "blocks.3.cross_attn.v_img.bias", "blocks.3.cross_attn.norm_k_img.weight"},
        "VACE": {"vace_blocks.0.before_proj.weight", "vace_blocks.1.after_proj.bias", "vace_blocks.1.self_attn.v.bias"},
        "Animate": {"face_adapter.fuser_blocks.1.linear1_kv.weight", "motion_encoder.enc.net_app.convs.2.conv2.2.bias",
                    "face_encoder.conv1_local.conv.weight", "motion_encoder.dec.direction.weight"},
    }  # fmt: skip
    assert original | own[name] <= set(keys)
    assert not any("attn1" in k or "scale_shift_table" in k or "to_q" in k for k in keys)


def test_a_class_without_a_known_layout_says_so(tmp_path):
    model, _ = ZOO["pose_dit"]()
    written = export(model, "single-file", tmp_path / "one.safetensors")
    assert "no original layout is known" in written["layout"]
    assert all(k.startswith("model.diffusion_model.") for k in load_file(tmp_path / "one.safetensors"))
    with pytest.raises(ValueError, match="known are those of .*Wan"):
        to_original("PoseDiT", model.state_dict())


def test_a_tensor_that_does_not_come_back_is_refused(wan):
    with pytest.raises(ValueError, match="do not come back"):
        to_original("WanTransformer3DModel", wan[0].state_dict() | {"blocks.0.norm3.weight": torch.ones(2)})


# -- deltas ----------------------------------------------------------------------------------------------------------


def test_a_delta_holds_what_changed_bit_for_bit(wan, tmp_path):
    base, _ = wan
    with torch.no_grad():
        base.patch_embedding.bias.zero_()
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.blocks[2].ffn.net[2].bias.add_(1e-8)  # lost in a sum of differences
        model.patch_embedding.bias.neg_()  # minus zero
    scores = Scores("cei", {"blocks.2": 1.0}, {"blocks.2": (0.5, 1.5)}, ["blocks.2"])
    export(model, "delta", tmp_path / "d.safetensors", base=base, scores=scores)
    kept = load_file(tmp_path / "d.safetensors")
    assert "patch_embedding.bias" in kept and set(kept) <= {"patch_embedding.bias", "blocks.2.ffn.net.2.bias"}
    again = apply_delta(base, tmp_path / "d.safetensors").tensors
    assert content_hash(again) == content_hash(model.state_dict())
    with safe_open(tmp_path / "d.safetensors", framework="pt") as file:
        about = file.metadata()
    assert json.loads(about["scores"])["ranking"] == ["blocks.2"] and about["base_sha256"] == content_hash(
        base.state_dict()
    )


def test_a_base_of_another_precision_is_cast(wan, tmp_path):
    base = wan[0].to(torch.bfloat16)
    model = trained(copy.deepcopy(base).float())
    written = export(model, "delta", tmp_path / "d.safetensors", base=base)
    assert written["tensors"] < written["of"] / 2
    assert same(apply_delta(base, tmp_path / "d.safetensors").tensors, model.state_dict())


def test_another_base_or_a_damaged_delta_is_refused(wan, tmp_path):
    base, _ = wan
    export(trained(base), "delta", tmp_path / "d.safetensors", base=base)
    other = trained(base, seed=3)
    with pytest.raises(ValueError, match=f"{content_hash(base.state_dict())}.*{content_hash(other.state_dict())}"):
        apply_delta(other, tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match="give the base"):
        export(tmp_path / "d.safetensors", "diffusers", tmp_path / "x")
    with safe_open(tmp_path / "d.safetensors", framework="pt") as file:
        about = file.metadata()
    save_file({k: v + 1 for k, v in load_file(tmp_path / "d.safetensors").items()}, tmp_path / "bad.safetensors", about)
    with pytest.raises(ValueError, match="damaged"):
        apply_delta(base, tmp_path / "bad.safetensors")
    export(base, "single-file", tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="no delta"):
        apply_delta(base, tmp_path / "one.safetensors")


def test_the_hash_does_not_depend_on_the_files(wan, tmp_path):
    base, _ = wan
    base.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert content_hash(read_weights(tmp_path / "shards").tensors) == content_hash(base.state_dict())
    assert content_hash(trained(base).state_dict()) != content_hash(base.state_dict())


# -- LoRA ------------------------------------------------------------------------------------------------------------


def test_low_rank_is_the_best_and_keeps_the_energy():
    matrix = torch.randn(12, 7, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(matrix)
    for rank in (1, 3, 7, 20):
        a, b = low_rank(matrix, rank, None)
        assert a.shape == (min(rank, 7), 7) and b.shape == (12, min(rank, 7))
        assert (matrix - b @ a).norm() == pytest.approx(float(singular[rank:].square().sum().sqrt()), abs=1e-5)
    for energy in (0.1, 0.5, 0.9, 1.0):
        a, _ = low_rank(matrix, None, energy)
        share = singular.square().cumsum(0) / singular.square().sum()
        assert len(a) == next(r for r in range(1, 8) if share[r - 1] >= energy - 1e-6)


@pytest.mark.parametrize("name", ["wan", "flux"])
@pytest.mark.parametrize("amount", [{"rank": 4}, {"energy": 0.9}, {"rank": 99}])
def test_a_lora_reloads_to_the_error_it_reports(name, amount, tmp_path):
    torch.manual_seed(0)
    base, inputs = ZOO[name]()
    model = trained(base)
    report = export(model, "lora", tmp_path / "l.safetensors", base=base, example=inputs, **amount)
    loaded = copy.deepcopy(base)
    loaded.load_lora_adapter(str(tmp_path / "l.safetensors"), prefix="transformer")
    y, y_base = output(model, inputs), output(base, inputs)
    error = (output(loaded, inputs) - y).norm()
    assert float(error / y.norm()) == pytest.approx(report["output_error"]["relative"], rel=1e-3, abs=1e-6)
    assert float(error / (y - y_base).norm()) == pytest.approx(report["output_error"]["of_change"], rel=1e-3, abs=1e-5)
    for layer, found in report["layers"].items():  # layer by layer
        true = (model.get_submodule(layer).weight - base.get_submodule(layer).weight).detach()
        got = loaded.get_submodule(layer).get_delta_weight("default_0").detach()
        assert float((got - true).norm() / true.norm()) == pytest.approx(found["relative_error"], rel=1e-3, abs=1e-4)
    assert all(p in dict(model.named_parameters()) for p in report["dropped"])
    assert json.loads((tmp_path / "l.json").read_text()) == report
    assert report["linear_error"] < (1e-4 if amount == {"rank": 99} else 0.33 if "energy" in amount else 1)


def test_a_lora_of_full_rank_is_exact_where_only_linear_weights_changed(wan, tmp_path):
    base, inputs = wan
    model = trained(base, only_linears=True)
    report = export(model, "lora", tmp_path / "l.safetensors", base=base, rank=99, example=inputs)
    assert not report["dropped"] and not report["stored_as_difference"]
    assert report["total_error"] < 1e-4 and report["output_error"]["of_change"] < 1e-4
    pipe = diffusers.WanPipeline(None, None, None, diffusers.FlowMatchEulerDiscreteScheduler(), copy.deepcopy(base))
    pipe.load_lora_weights(str(tmp_path / "l.safetensors"))
    assert torch.allclose(output(pipe.transformer, inputs), output(model, inputs), atol=1e-5)


def test_a_lora_with_original_keys_gives_the_trained_weights_by_comfyui_s_rule(wan, tmp_path):
    """weight + lora_B lora_A, or + diff; bias + diff_b: comfy/lora.py and weight_adapter/lora.py of ComfyUI."""
    base, inputs = wan
    model = trained(base)
    report = export(model, "lora", tmp_path / "l.safetensors", base=base, rank=99, keys="original", example=inputs)
    tensors = to_original("WanTransformer3DModel", {k: v.clone() for k, v in base.state_dict().items()})
    file = load_file(tmp_path / "l.safetensors")
    for key, value in file.items():
        name = key.removeprefix("diffusion_model.")
        if name.endswith(".lora_A.weight"):
            name = name.removesuffix(".lora_A.weight")
            tensors[f"{name}.weight"] += file[f"diffusion_model.{name}.lora_B.weight"] @ value
        elif name.endswith(".diff_b"):
            tensors[name.removesuffix(".diff_b") + ".bias"] += value
        elif name.endswith(".diff"):
            name = name.removesuffix(".diff")
            tensors[f"{name}.weight" if f"{name}.weight" in tensors else name] += value
    wanted = to_original("WanTransformer3DModel", model.state_dict())
    assert all(torch.allclose(v, wanted[k], atol=1e-6) for k, v in tensors.items())
    assert not report["dropped"] and "blocks.1.modulation" in report["stored_as_difference"]
    assert report["output_error"]["of_change"] < 1e-4


def test_any_network_can_be_saved_as_delta_and_lora(tmp_path):
    torch.manual_seed(0)
    base, inputs = ZOO["plain"]()
    model = trained(base)
    report = export(model, "lora", tmp_path / "l.safetensors", base=base, rank=99, example=inputs)
    assert report["dropped"] == ["head.bias"]  # its weight did not change
    assert report["output_error"]["relative"] > 1e-4 > report["linear_error"]


@pytest.mark.parametrize("form", ["delta", "single-file"])
def test_tied_weights_are_saved_in_full(form, tmp_path):
    torch.manual_seed(0)
    base, inputs = ZOO["pose_dit"]()
    first_block, second = (b.module for b in find_blocks(base)[:2])
    for name, module in second.named_modules():
        if isinstance(module, nn.Linear):
            module.weight = first_block.get_submodule(name).weight
    model = trained(base)
    export(model, form, tmp_path / "tied.safetensors", base=base if form == "delta" else None)
    again = read_weights(tmp_path / "tied.safetensors", base)
    assert same(again.tensors, model.state_dict()) and torch.equal(output(build(again), inputs), output(model, inputs))


def test_adapters_are_merged_first(wan, tmp_path):
    peft = pytest.importorskip("peft")
    base, _ = wan
    config = peft.LoraConfig(r=2, target_modules=["to_q"])
    for adapted in (peft.get_peft_model(copy.deepcopy(base), config), copy.deepcopy(base)):
        if adapted.__class__ is type(base):
            adapted.add_adapter(config)
        with pytest.raises(ValueError, match="merge_and_unload"):
            export(adapted, "diffusers", tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    merged = peft.get_peft_model(copy.deepcopy(base), config).merge_and_unload()
    export(merged, "diffusers", tmp_path / "whole")
    assert same(read_weights(tmp_path / "whole").tensors, base.state_dict())


# -- refusals --------------------------------------------------------------------------------------------------------


def test_refusals_say_what_to_do(wan, tmp_path):
    base, _ = wan
    model = trained(base)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "a.ckpt").write_bytes(b"x")
    save_file({"x": torch.ones(1)}, tmp_path / "foreign.safetensors")
    out = tmp_path / "out.safetensors"
    for source, form, options, says in (
        (model, "gguf", {}, "choose one of.*'single-file'"),
        (model, "delta", {}, "needs the base"),
        (model, "diffusers", {"rank": 3}, r"no option \['rank'\]"),
        (model, "lora", {"base": base}, "--rank 32.*--energy 0.9"),
        (model, "lora", {"base": base, "rank": 3, "energy": 0.5}, "exactly one"),
        (model, "lora", {"base": base, "energy": 1.5}, r"in \(0, 1\]"),
        (model, "lora", {"base": base, "rank": 0}, "at least 1"),
        (model, "lora", {"base": base, "energy": 0.0}, r"in \(0, 1\]"),
        (model, "lora", {"base": base, "rank": 3, "keys": "kohya"}, "choose one of"),
        (base, "lora", {"base": base, "rank": 3}, "nothing to write"),
        (model, "delta", {"base": ZOO["flux"]()[0]}, "another model's base"),
        (tmp_path / "pickled", "single-file", {}, "only safetensors are read"),
        (tmp_path / "a.ckpt", "single-file", {}, "only safetensors are read"),
        (tmp_path / "foreign.safetensors", "single-file", {}, "not written by entprog export"),
        (tmp_path / "nowhere", "single-file", {}, "neither a finished run"),
    ):
        with pytest.raises(ValueError, match=says):
            export(source, form, out, **options)
    assert not out.exists()


# -- runs and the command --------------------------------------------------------------------------------------------


def test_a_run_is_exported_with_its_own_base_and_scores_and_comes_back(tmp_path, capsys):
    config = RunConfig(
        strategy="ent-prog", model="T", priority="random", schedule="fixed", active_share=0.25, stages=1, steps=2,
        clock="model", clips=16, held_out_clips=8, size=8, frames=2, batch_size=2, evaluations=1,
    )  # fmt: skip
    trainer = Trainer(
        config, model_of(config), figures(24, size=8, frames=2), figures(8, size=8, frames=2), tmp_path / "run"
    )
    trainer.run()
    delta, whole = tmp_path / "d.safetensors", tmp_path / "whole"
    assert main(["export", str(tmp_path / "run"), "--as", "delta", "--out", str(delta)]) == 0
    with safe_open(delta, framework="pt") as file:
        about, kept = file.metadata(), set(file.keys())
    active = json.loads(about["blocks"])
    assert set(active) == set(trainer.prog.active) and json.loads(about["scores"])["priority"] == "random"
    frozen = [b.name for b in trainer.blocks if b.name not in active]
    assert frozen and not any(k.startswith(f"{b}.") for k in kept for b in frozen)
    assert {k.split(".")[0] for k in kept} <= {"blocks", "final_layer", *NEW_MODULES["reference"]}
    model_of(config).save_pretrained(tmp_path / "base")
    command = ["export", str(delta), "--as", "diffusers", "--out", str(whole)]
    assert main([*command, "--base", str(tmp_path / "base")]) == 0
    assert same(read_weights(whole).tensors, read_weights(tmp_path / "run").tensors)
    assert main(command) == 2 and main([*command, "--base", str(tmp_path / "run")]) == 2  # no base, another base
    command = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "l.safetensors"), "--as"]
    assert main([*command, "lora", "--rank", "4"]) == 0 and main([*command, "zip"]) == 2
    told = "".join(capsys.readouterr().out.split())
    assert "total_error" in told and "l.json" in told and "see" + str(tmp_path / "l.safetensors") not in told
    command = ["export", str(tmp_path / "run"), "--as", "single-file", "--out", str(tmp_path)]
    assert main(command) == 2 and "is a folder" in " ".join(capsys.readouterr().out.split())


def test_score_prints_the_best_blocks_as_a_filter(capsys):
    command = ["score", "--priority", "first", "--samples", "4", "size=8", "frames=2", "--export"]
    assert main([*command, "musubi-tuner", "--top", "2"]) == 0
    assert r"(?!(?:blocks\.0|blocks\.1)\.).*" in capsys.readouterr().out
    assert main([*command, "kohya"]) == 2 and main([*command, "peft", "--top", "99"]) == 2


# -- layer filters ---------------------------------------------------------------------------------------------------

BEST = ["blocks.1", "blocks.7"]  # and not blocks.10 or blocks.11


def linears(model, blocks):
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return {n for n in names if any(n.startswith(f"{b}.") for b in blocks)}


def original_modules(model):
    """Original name -> name here of every linear layer."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return {wan_key(f"{n}.weight").removesuffix(".weight"): n for n in names}


def test_peft_puts_adapters_on_exactly_the_linear_layers_of_the_blocks(family):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    model, _ = family
    best = [b.name for b in find_blocks(model)][1:3]
    wanted = linears(model, best)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=layer_filter(model, best, "peft")))
    assert {n for n, m in wrapped.get_base_model().named_modules() if isinstance(m, LoraLayer)} == wanted


@pytest.mark.parametrize("name", ["T2V", "I2V"])
def test_other_trainers_choose_exactly_the_blocks_by_their_own_rules(name):
    cls, config = WANS[name]
    model = cls(**config)
    modules, wanted = original_modules(model), linears(model, BEST)

    # docs/advanced_config.md of musubi-tuner: regular expressions for complete names; excluded unless included.
    # networks/lora_wan.py: linear layers in WanAttentionBlock; network_args are split at "=".
    flag, argument = shlex.split(layer_filter(model, BEST, "musubi-tuner"))
    key, value = argument.split("=")
    patterns = [*eval(value), r".*(patch_embedding|text_embedding|time_embedding|time_projection|norm|head).*"]
    inside = {o: n for o, n in modules.items() if o.startswith("blocks.")}
    assert (flag, key) == ("--network_args", "exclude_patterns")
    assert {n for o, n in inside.items() if not any(re.fullmatch(p, o) for p in patterns)} == wanted

    # diffsynth/diffusion/training_module.py: split at commas; peft takes equal names and those that end in ".name"
    arguments = shlex.split(layer_filter(model, BEST, "diffsynth"))
    targets = arguments[arguments.index("--lora_target_modules") + 1].split(",")
    assert {n for o, n in modules.items() if o in targets or any(o.endswith(f".{t}") for t in targets)} == wanted

    # scripts/wan2.1/train.py of VideoX-Fun: `if trainable_module_name in name` over named_parameters
    flag, *parts = shlex.split(layer_filter(model, BEST, "videox-fun"))
    parameters = to_original(cls.__name__, model.state_dict())
    assert flag == "--trainable_modules"
    chosen = {k for k in parameters if any(part in k for part in parts)}
    assert chosen == {k for k in parameters if k.split(".")[:2] in ([*b.split(".")] for b in BEST)}


def test_filters_refuse_what_they_cannot_say():
    cls, config = WANS["VACE"]
    model = cls(**config)
    with pytest.raises(ValueError, match="vace_blocks.1.*too"):
        layer_filter(model, ["blocks.1"], "videox-fun")
    assert layer_filter(model, ["vace_blocks.1", "blocks.7"], "videox-fun").endswith("vace_blocks.1. blocks.7.")
    for names, program, says in (
        (["blocks.1"], "kohya", f"choose one of.*{sorted(FILTERS)[0]}"),
        ([], "peft", "at least one"),
        (["blocks.99"], "peft", "no block"),
    ):
        with pytest.raises(ValueError, match=says):
            layer_filter(model, names, program)
