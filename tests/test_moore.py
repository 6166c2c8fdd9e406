"""Animate-Anyone in Moore's layout: safe reading, keys and shapes at full size, the reference bank."""

import os
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file

from entprog.blocks import find_blocks
from entprog.models.moore import (
    FILES,
    AnimateAnyone,
    PoseGuider,
    check_fits,
    convert_pth,
    from_moore,
    load_moore,
    read_pth,
)
from entprog.modes import set_active, skip

TINY = {
    "pose_widths": (4, 8, 8, 8), "frames": 4, "block_out_channels": (8, 16), "norm_num_groups": 4,
    "layers_per_block": 1, "cross_attention_dim": 8, "num_attention_heads": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    model = AnimateAnyone(**TINY).eval()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    inputs = {"sample": torch.randn(2, 4, 3, 4, 4), "timestep": torch.tensor([5, 500]),
              "encoder_hidden_states": torch.randn(2, 3, 8), "reference": torch.randn(2, 4, 4, 4),
              "pose": torch.rand(2, 3, 3, 32, 32)}  # fmt: skip
    return model, inputs


def as_moore_names_it(file, state):
    """A state dict of ours under the names of the repository's modules, with both tables of positions."""
    theirs = {}
    for name, value in state.items():
        if ".motion_modules." in name:
            head, tail = name.split(".motion_modules.")
            index, tail = tail.split(".", 1)
            for a, b in ((".attn1.", ".attention_blocks.0."), (".attn2.", ".attention_blocks.1."),
                         (".norm1.", ".norms.0."), (".norm2.", ".norms.1."), (".norm3.", ".ff_norm."),
                         (".pos_embed.", ".attention_blocks.0.pos_encoder.")):  # fmt: skip
                tail = tail.replace(a, b)
            name = f"{head}.motion_modules.{index}.temporal_transformer.{tail}"
            if "pos_encoder" in name:
                theirs[name.replace("blocks.0.pos", "blocks.1.pos")] = value
        theirs[name] = value
    return theirs


def files_of(model):
    motion = {n: v for n, v in model.denoising_unet.state_dict().items() if "motion_modules" in n}
    spatial = {n: v for n, v in model.denoising_unet.state_dict().items() if "motion_modules" not in n}
    states = (model.reference_unet.state_dict(), spatial, motion, model.pose_guider.state_dict())
    return {file: as_moore_names_it(file, state) for file, state in zip(FILES, states, strict=True)}


# -- the reader -------------------------------------------------------------------------------------------------------


def test_reader_equals_torch_load(tmp_path):
    base = torch.randn(4, 6)
    state = OrderedDict(
        half=base.half(), view=base.t()[1:3], bf=base.bfloat16(), count=torch.arange(3), one=torch.ones(())
    )
    state["parameter"], state["shared"], state["empty"] = torch.nn.Parameter(base), base, torch.zeros(0, 3)
    torch.save(state, tmp_path / "x.pth")
    read = read_pth(tmp_path / "x.pth")
    expected = torch.load(tmp_path / "x.pth", weights_only=True)
    assert list(read) == list(expected)
    assert all(v.dtype == expected[k].dtype and torch.equal(v, expected[k]) for k, v in read.items())
    convert_pth(tmp_path / "x.pth", tmp_path / "x.safetensors")
    assert all(torch.equal(v, expected[k]) for k, v in load_file(tmp_path / "x.safetensors").items())
    torch.save(torch.nn.BatchNorm2d(3).state_dict(), tmp_path / "y.pth")  # with _metadata
    assert set(read_pth(tmp_path / "y.pth")) == set(torch.nn.BatchNorm2d(3).state_dict())


class Evil:
    def __reduce__(self):
        return os.system, ("touch SHOULD_NOT_EXIST",)


@pytest.mark.parametrize("content, says", [
    ({"a": Evil()}, "system"), (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    ({"a": {"b": torch.ones(2)}}, "flat state dict"), ([torch.ones(2)], "opcode EMPTY_LIST"), ({"a": 1.5}, "BINFLOAT"),
])  # fmt: skip
def test_reader_refuses_everything_else_and_runs_nothing(tmp_path, monkeypatch, content, says):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "x.pth")
    with pytest.raises(ValueError, match=says):
        read_pth("x.pth")
    assert not (tmp_path / "SHOULD_NOT_EXIST").exists()
    (tmp_path / "old.pth").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ValueError, match="no zip archive"):
        read_pth("old.pth")


# -- the architecture -------------------------------------------------------------------------------------------------


def test_published_keys_and_shapes_at_full_size():
    """Figures derived from the repository's module definitions, not from this implementation."""
    with torch.device("meta"):
        model = AnimateAnyone()
    files = files_of(model)
    assert len(files["denoising_unet"]) == 686 and len(files["reference_unet"]) == 686 - 4, "SD 1.5, less the output"
    assert not [n for n in files["reference_unet"] if n.startswith(("conv_out", "conv_norm_out"))]
    modules = 4 * 2 + 1 + 4 * 3  # one after each layer of 4 down blocks, the mid block and 4 up blocks
    assert len(files["motion_module"]) == modules * (2 + 2 + 2 + 2 * (3 + 2 + 1 + 2) + 2 + 4)
    shape = {n: tuple(v.shape) for n, v in (files["motion_module"] | files["denoising_unet"]).items()}
    prefix = "down_blocks.1.motion_modules.0.temporal_transformer"
    assert shape[f"{prefix}.transformer_blocks.0.attention_blocks.1.pos_encoder.pe"] == (1, 32, 640)
    assert shape[f"{prefix}.transformer_blocks.0.ff.net.0.proj.weight"] == (5120, 640)
    assert shape[f"{prefix}.proj_in.weight"] == (640, 640)
    assert shape["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"] == (1280, 768)
    assert shape["up_blocks.3.resnets.0.conv1.weight"] == (320, 960, 3, 3)
    convolutions = [tuple(v.shape[:2]) for n, v in files["pose_guider"].items() if n.endswith("weight")]
    pairs = [(16, 3), (16, 16), (32, 16), (32, 32), (96, 32), (96, 96), (256, 96), (320, 256)]
    assert convolutions == pairs
    check_fits(model, {k: v for file, state in files.items() for k, v in from_moore(file, state).items()})


def test_a_checkpoint_loads_and_one_that_does_not_fit_is_refused(tiny, tmp_path):
    model, inputs = tiny
    for file, state in files_of(model).items():
        torch.save({k: v.clone() for k, v in state.items()}, tmp_path / f"{file}.pth")
    other = AnimateAnyone(**TINY).eval()
    load_moore(other, tmp_path)
    with torch.no_grad():
        assert torch.equal(other(**inputs), model(**inputs))
    save_file(PoseGuider(8, (4, 8, 8, 9)).state_dict(), tmp_path / "pose_guider.safetensors")
    with pytest.raises(ValueError, match=r"shape.*pose_guider.blocks.5"):
        load_moore(other, tmp_path)
    (tmp_path / "motion_module.pth").unlink()
    with pytest.raises(ValueError, match="neither motion_module.safetensors"):
        load_moore(other, tmp_path)


@torch.no_grad()
def test_temporal_module_equals_the_definition_written_out(tiny):
    """norm per frame, linear in, twice (norm, positions, attention over frames), feed-forward, linear out."""
    model, _ = tiny
    module = model.denoising_unet.down_blocks[0].motion_modules[0]
    w = {
        n.removeprefix("m.motion_modules.0.temporal_transformer."): v
        for n, v in as_moore_names_it(
            "motion_module", {f"m.motion_modules.0.{n}": v for n, v in module.state_dict().items()}
        ).items()
    }
    x = torch.randn(3, 8, 2, 2) * torch.tensor([1.0, 5.0, 0.2]).view(3, 1, 1, 1)  # three frames of one clip
    fn = torch.nn.functional

    def linear(v, name):
        return fn.linear(v, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(v, name):
        return fn.layer_norm(v, (8,), w[f"{name}.weight"], w[f"{name}.bias"])

    h = fn.group_norm(x, 4, w["norm.weight"], w["norm.bias"], 1e-6)
    h = linear(h.permute(2, 3, 0, 1).flatten(0, 1), "proj_in")  # (pixels, frames, channels)
    block = "transformer_blocks.0"
    for i in range(2):
        at = f"{block}.attention_blocks.{i}"
        v = norm(h, f"{block}.norms.{i}") + w[f"{at}.pos_encoder.pe"][:, :3]
        q, k, v = (linear(v, f"{at}.{part}").unflatten(-1, (2, 4)).transpose(1, 2) for part in ("to_q", "to_k", "to_v"))
        attended = ((q @ k.mT) / 2).softmax(-1) @ v
        h = h + linear(attended.transpose(1, 2).flatten(2), f"{at}.to_out.0")
    value, gate = linear(norm(h, f"{block}.ff_norm"), f"{block}.ff.net.0.proj").chunk(2, -1)
    h = linear(h + linear(value * fn.gelu(gate), f"{block}.ff.net.2"), "proj_out")
    expected = x + h.unflatten(0, (2, 2)).permute(2, 3, 0, 1)
    assert torch.allclose(module(x, num_frames=3), expected, atol=1e-5)


# -- the bank ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_reference_and_pose_change_the_output(tiny):
    model, inputs = tiny
    out = model(**inputs)
    assert out.shape == inputs["sample"].shape
    for name in ("reference", "pose"):
        changed = model(**inputs | {name: torch.randn_like(inputs[name])})
        assert (changed - out).abs().max() > 1e-4, name
    swapped = model(**{k: v.flip(0) for k, v in inputs.items()})
    assert torch.allclose(swapped.flip(0), out, atol=1e-5), "every clip reads its own reference"


@torch.no_grad()
def test_blocks_of_both_nets_are_found_and_skipped(tiny):
    model, inputs = tiny
    blocks = find_blocks(model, inputs)
    nets = [b.name.split(".")[0] for b in blocks]
    assert set(nets) == {"reference_unet", "denoising_unet"} and nets == sorted(nets, reverse=True)
    out = model(**inputs)
    for block in (b for b in blocks if b.name.startswith("denoising_unet")):
        with skip(block):
            skipped = model(**inputs)
        branch = [
            (n, p) for n, p in block.module.named_parameters() if "conv_shortcut" not in n
        ]  # it stays when skipped
        saved = {n: p.clone() for n, p in branch}
        for _, p in branch:
            p.zero_()
        assert torch.equal(model(**inputs), skipped) and not torch.equal(skipped, out), block.name
        for n, p in branch:
            p.copy_(saved[n])
    for block in (b for b in blocks if b.name.startswith("reference_unet") and ".attentions." in b.name):
        with skip(block):
            assert not torch.equal(model(**inputs), out), "what it would have written is not read"


@pytest.mark.slow
def test_a_frozen_denoiser_block_never_cuts_the_reference_net(tiny):
    model, inputs = tiny
    blocks = find_blocks(model, inputs)
    model.requires_grad_(False)
    readers = [b for b in blocks if b.name.startswith("denoising_unet")]
    model.reference_unet.conv_in.requires_grad_(True)
    grads = []
    for mode in ("pass", "prefix"):
        set_active(blocks, [], frozen=mode)
        model(**inputs).square().mean().backward()
        grads.append(model.reference_unet.conv_in.weight.grad.clone())
        model.zero_grad()
    assert readers and grads[0].any() and torch.equal(*grads)
