"""PoseDiT's motion modules, reference poses and weighted loss."""

import pytest
import torch

from entprog.blocks import find_blocks, record_example
from entprog.config import make_config
from entprog.data.prepared import LABELS
from entprog.models.pose_dit import PoseGuider, attend, pose_dit
from entprog.models.pretrained import (
    candidate_blocks,
    check_origin,
    freeze_for_good,
    load_model,
    loss_fn,
    model_of,
    region_share,
)
from entprog.objective import OBJECTIVES

FLOW = OBJECTIVES["flow_prediction"]


def latent_model(**options):
    torch.manual_seed(0)
    model = pose_dit("T", depth=4, in_channels=4, patch_size=1, pose_stride=8, motion_modules=True, **options)
    for p in (*model.adaLN_modulation.parameters(), *model.final_layer.parameters()):
        torch.nn.init.normal_(p, std=0.2)  # as after training: the gates are open
    for p in model.pose_guider.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return model.eval()


def inputs(frames=3, batch=2):
    g = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(batch, 4, frames, 4, 4, generator=g), "timestep": torch.rand(batch, generator=g),
        "pose": torch.rand(batch, 3, frames, 32, 32, generator=g),
        "reference": torch.randn(batch, 4, 4, 4, generator=g),
        "reference_pose": torch.rand(batch, 3, 32, 32, generator=g),
    }  # fmt: skip


@torch.no_grad()
def test_new_motion_modules_leave_every_frame_as_the_image_model_has_it():
    model, given = latent_model(), inputs()
    video = model(**given)
    for f in range(3):
        image = given | {k: given[k][:, :, f : f + 1] for k in ("sample", "pose")}
        assert torch.allclose(video[:, :, f : f + 1], model(**image), atol=1e-5)


@torch.no_grad()
def test_motion_modules_see_the_order_of_frames_and_leave_the_reference_alone():
    model, given = latent_model(), inputs()
    for block in model.blocks:
        if block.motion_module:
            torch.nn.init.normal_(block.proj.weight, std=0.3)
    turned = model(**(given | {k: given[k].flip(2) for k in ("sample", "pose")})).flip(2)
    assert (turned - model(**given)).abs().max() > 1e-3
    tokens, c = torch.randn(2, 4, 16, 96), torch.randn(2, 6, 96)
    moved = model.blocks[1](tokens, c)
    assert torch.equal(moved[:, 0], tokens[:, 0]) and not torch.allclose(moved[:, 1:], tokens[:, 1:])


@torch.no_grad()
def test_the_references_pose_counts_only_with_the_reference():
    model, given = latent_model(), inputs()
    whole, other = model(**given), model(**(given | {"reference_pose": given["reference_pose"].flip(-1)}))
    assert (whole - other).abs().max() > 1e-4
    without = {k: v for k, v in given.items() if k != "reference"}
    assert torch.equal(model(**without), model(**{k: v for k, v in without.items() if k != "reference_pose"}))


def test_images_have_no_temporal_blocks_and_videos_only_those_as_candidates():
    model = latent_model()
    image, video = inputs(1), inputs(3)
    assert [b.name for b in find_blocks(model, image)] == ["blocks.0", "blocks.2"]
    blocks = find_blocks(model, record_example(model, lambda: model(**video)))
    assert [b.name for b in candidate_blocks(blocks, "temporal")] == ["blocks.1", "blocks.3"]
    assert candidate_blocks(blocks, "all") == blocks
    plain = pose_dit("T", depth=2)
    with pytest.raises(ValueError, match="choose 'all', or 'temporal'"):
        candidate_blocks(find_blocks(plain)[:1], "temporal")


def test_what_no_strategy_may_train_is_frozen():
    def trainable(**values):
        model = latent_model()
        blocks = find_blocks(model, inputs(values["frames"]))
        config = make_config({"steps": 1} | values)
        freeze_for_good(model, candidate_blocks(blocks, config.candidates), config)
        return {n for n, p in model.named_parameters() if p.requires_grad}

    image, video = trainable(frames=1), trainable(frames=3, candidates="temporal")
    assert image and video and not image & video
    assert all(n.split(".")[:2] in (["blocks", "1"], ["blocks", "3"]) for n in video)
    assert len(image | video) == len(dict(latent_model().named_parameters()))


def test_attention_in_bf16_is_attention():
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.equal(attend(q, k, v), exact)
    assert (attend(*(x.bfloat16() for x in (q, k, v))).float() - exact).abs().max() < 0.03


def test_the_person_and_the_face_count_so_many_times():
    labels = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    labels[..., :2, :] = LABELS["top"]
    labels[..., 0, :] = LABELS["face"]
    batch = {
        "video": torch.zeros(1, 3, 1, 4, 4),
        "noise": torch.zeros(1, 3, 1, 4, 4),
        "t": torch.ones(1),
        "labels": labels,
    }
    assert region_share(batch, "person").mean() == 0.5 and region_share(batch, "face").mean() == 0.25
    small = batch | {"video": torch.zeros(1, 3, 1, 2, 2)}
    assert region_share(small, "face").flatten().tolist() == [0.5, 0.5, 0, 0]

    class Wrong(torch.nn.Module):
        def __init__(self, place):
            super().__init__()
            self.place = place

        def forward(self, x, t):
            y = torch.zeros_like(x)
            y[..., self.place, :] = 1
            return y

    def loss(place):
        return loss_fn(FLOW, person_weight=3.0, face_weight=2.0)(Wrong(place), batch).item()

    face, top, background = loss(0), loss(1), loss(3)
    assert face / top == pytest.approx(2) and top / background == pytest.approx(3)
    with pytest.raises(ValueError, match="needs labels"):
        loss_fn(FLOW, 2.0)(Wrong(0), {k: v for k, v in batch.items() if k != "labels"})


def test_a_model_for_other_channels_is_refused():
    with pytest.raises(ValueError, match="trained with autoencoder='' and not 'taef2'"):
        model_of(make_config({"steps": 1, "autoencoder": "taef2"}))  # the embedded base takes pixels
    model = load_model("T", autoencoder="taef2")
    assert model.config["in_channels"] == 32 and model.config["pose_stride"] == 8 and model.config["motion_modules"]


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5, 6, 8, 10, 12])
def test_every_patch_size_has_a_pose_guider(stride):
    model = pose_dit("T", depth=2, patch_size=stride, pose_stride=stride)
    side = 2 * stride
    video = model(torch.randn(1, 3, 2, side, side), torch.rand(1), pose=torch.rand(1, 3, 2, side, side))
    assert video.shape == (1, 3, 2, side, side)


def test_pose_guiders_keep_the_shapes_of_saved_weights_and_refuse_no_stride():
    old = {2: (3, 1), 4: (3, 2), 8: (12, 2), 16: (48, 2)}  # channels of the first convolution, halvings
    for stride, (channels, halvings) in old.items():
        layers = [m for m in PoseGuider(32, stride).modules() if isinstance(m, torch.nn.Conv2d)]
        inside = [32, 64][:halvings] + [64]
        assert [m.in_channels for m in layers] == [channels, *inside]
    with pytest.raises(ValueError, match="stride of 0 .* choose 1, 2, 3"):
        pose_dit("T", depth=2, pose_stride=0)


def test_a_model_for_other_latents_of_the_same_shape_or_another_objective_is_refused(tmp_path):
    people = {"steps": 1, "model": "people", "autoencoder": "taef2-people"}
    check_origin(make_config(people))
    with pytest.raises(ValueError, match="'people' was trained with autoencoder='taef2-people' and not 'taef2'"):
        model_of(make_config(people | {"autoencoder": "taef2"}))
    final = tmp_path / "checkpoints" / "final"
    pose_dit("T", hidden_size=32, depth=2, num_heads=2).save_pretrained(final)
    own = {"steps": 1, "model": str(final)}
    model_of(make_config(own | {"objective": "epsilon"}))  # nobody knows how it was made
    (tmp_path / "config.yaml").write_text("steps: 1\nobjective: epsilon\nautoencoder: ''\n")
    model_of(make_config(own | {"objective": "epsilon"}))
    for other in ({}, {"objective": "epsilon", "autoencoder": "taef2"}):
        with pytest.raises(ValueError, match=r"trained with (objective='epsilon'|autoencoder='') and not"):
            model_of(make_config(own | other))


def test_guidance_needs_a_condition_of_the_run():
    with pytest.raises(ValueError, match="must name at least one"):
        make_config({"steps": 1, "guidance_scale": 2.0, "conditions": ["pose"]})
    make_config({"steps": 1, "guidance_scale": 2.0, "conditions": ["pose"], "guided": ["pose"]})
