"""Wan's pipeline folders: what each makes of a clip, how its transformer is called, at which times it is trained.

A folder is what diffusers saves (model_index.json, transformer/, vae/, text_encoder/ ...). Whatever a pipeline
prepares for its transformer is prepared by that pipeline's own methods, and samples come out of its own call with the
scheduler of the folder, so that training cannot differ from use. PIPELINES has one row for each pipeline class:

    pipeline class             x0, from which the noise is told               besides text and time
    WanPipeline                the clip                                       -
    WanImageToVideoPipeline    the clip                                       first frame, mask, CLIP tokens
    WanVACEPipeline            reference, then the clip                       control: inactive, reactive, mask
    WanAnimatePipeline         reference, then the clip                       reference, mask, pose, face, CLIP tokens

All predict the flow, noise - x0, at timestep 1000 t. Letters: F frames, f latent frames, C latent channels, h, w.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from entprog.objective import shifted

if TYPE_CHECKING:
    from entprog.config import RunConfig

TOKENS = 512  # of a prompt, the default of every pipeline's call
# What a run of a pipeline folder leaves at its default: the folder and the prepared clips say it.
SETTLED = ("objective", "autoencoder", "conditions", "candidates", "size", "frames", "frame_stride", "patch_size",
           "person_weight", "face_weight", "joint_dropout", "sample_shared_noise",
           "sampler", "guided", "domain", "clips")  # fmt: skip


@dataclass(frozen=True)
class Clip:
    """One clip as bytes: video and pose maps (F, 3, H, W), reference (3, H, W), face crops (F, 3, S, S) or None."""

    video: Tensor
    pose: Tensor
    reference: Tensor
    face: Tensor | None = None

    @property
    def size(self) -> dict[str, int]:
        """Return the pipelines' height and width."""
        height, width = self.video.shape[-2:]
        return {"height": height, "width": width}


def images(frames: Tensor) -> list[Image.Image]:
    """Return bytes (F, 3, H, W) as pictures."""
    return [Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()) for frame in frames]


def latents(pipe: Any, frames: Tensor) -> Tensor:
    """Encode a video (F, 3, H, W) of bytes to (1, C, f, h, w), normalised by the autoencoder's own mean and std."""
    video = pipe.video_processor.preprocess_video(images(frames), *frames.shape[-2:])
    z = pipe.vae.encode(video.to(pipe.vae.device, pipe.vae.dtype)).latent_dist.mode().float()
    mean, std = (torch.tensor(pipe.vae.config[k]).view(1, -1, 1, 1, 1).to(z) for k in ("latents_mean", "latents_std"))
    return (z - mean) / std


@dataclass(frozen=True)
class PipelineKind:
    """A row of PIPELINES.

    encode(pipeline, clip) -> one clip's columns beside its text, each with a first axis of 1; `video` is x0.
    inputs(x_t, batch) -> the forward's arguments beside time and text.
    asks(clip) -> the arguments by which the pipeline's call is asked for such a clip.
    shows: the clip's conditions, to be seen beside a sample.
    """

    encode: Callable[[Any, Clip], dict[str, Tensor]]
    inputs: Callable[[Tensor, Mapping[str, Tensor]], dict[str, Tensor]]
    asks: Callable[[Clip], dict[str, Any]]
    shows: tuple[str, ...] = ()


# -- text to video -----------------------------------------------------------------------------------------------------


def _encode_text_only(pipe: Any, clip: Clip) -> dict[str, Tensor]:
    return {"video": latents(pipe, clip.video)}


def _ask_text_only(clip: Clip) -> dict[str, Any]:
    return {"num_frames": len(clip.video)}


# -- image to video: the clip's first frame is the image ---------------------------------------------------------------


def _encode_first_frame(pipe: Any, clip: Clip) -> dict[str, Tensor]:
    if pipe.config.expand_timesteps:
        raise ValueError("image to video with a time for each token (Wan2.2 5B) is not supported: train its text to "
                         "video, by a model_index.json of WanPipeline")  # fmt: skip
    (first,) = images(clip.video[:1])
    device, z = pipe.vae.device, latents(pipe, clip.video)
    image = pipe.video_processor.preprocess(first, **clip.size).to(device, torch.float32)
    size = (clip.size["height"], clip.size["width"], len(clip.video))
    _, condition = pipe.prepare_latents(image, 1, z.shape[1], *size, torch.float32, device, latents=z)
    columns = {"video": z, "condition": condition}  # condition (1, 4 + C, f, h, w)
    if pipe.transformer.config.image_dim is not None:  # Wan 2.1
        columns["image"] = pipe.encode_image(first, device)
    return columns


def _inputs_first_frame(x_t: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    inputs = {"hidden_states": torch.cat((x_t, batch["condition"]), 1)}
    return inputs | ({"encoder_hidden_states_image": batch["image"]} if "image" in batch else {})


def _ask_first_frame(clip: Clip) -> dict[str, Any]:
    return {"image": images(clip.video[:1])[0], "num_frames": len(clip.video)}


# -- VACE: pose video and reference image ------------------------------------------------------------------------------


def _encode_control(pipe: Any, clip: Clip) -> dict[str, Tensor]:
    asked, device = _ask_control(clip), pipe.vae.device
    size = (1, clip.size["height"], clip.size["width"], len(clip.video))
    video, mask, references = pipe.preprocess_conditions(
        asked["video"], None, asked["reference_images"], *size, torch.float32, device
    )
    control = pipe.prepare_video_latents(video, mask, references, device=device)
    z = latents(pipe, clip.video)
    x0 = torch.cat((control[:, : z.shape[1], :1], z), 2)  # the reference's latents come first
    return {"video": x0, "control": torch.cat((control, pipe.prepare_masks(mask, references).to(control)), 1)}


def _inputs_control(x_t: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"hidden_states": x_t, "control_hidden_states": batch["control"]}


def _ask_control(clip: Clip) -> dict[str, Any]:
    return {"video": images(clip.pose), "reference_images": images(clip.reference[None]), "num_frames": len(clip.video)}


# -- Wan-Animate: reference, pose and face; the first segment of a video -----------------------------------------------


def _encode_animate(pipe: Any, clip: Clip) -> dict[str, Tensor]:
    asked, device = _ask_animate(clip), pipe.vae.device
    image = pipe.vae_image_processor.preprocess(asked["image"], **clip.size, resize_mode="fill").to(device)
    reference = pipe.prepare_reference_image_latents(image.float(), 1, device=device)  # (1, 4 + C, 1, h, w)
    before = pipe.prepare_prev_segment_cond_latents(
        segment_frame_length=len(clip.video), **clip.size, task="animate", device=device
    )
    pose = pipe.video_processor.preprocess_video(asked["pose_video"], **clip.size)
    side = pipe.transformer.config.motion_encoder_size
    face = pipe.video_processor.preprocess_video(asked["face_video"], height=side, width=side)
    return {
        "video": torch.cat((reference[:, 4:], latents(pipe, clip.video)), 2),
        "condition": torch.cat((reference, before), 2),  # (1, 4 + C, 1 + f, h, w)
        "pose_latents": pipe.prepare_pose_latents(pose.float(), 1, device=device),
        "face": ((face + 1) * 127.5).round().to(torch.uint8),  # pictures: no more than bytes
        "image": pipe.encode_image(asked["image"], device),
    }


def _inputs_animate(x_t: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    inputs = _inputs_first_frame(x_t, batch)
    face = batch["face"] if "text" in batch else torch.full_like(batch["face"], -1)  # as without guidance
    return inputs | {"pose_hidden_states": batch["pose_latents"], "face_pixel_values": face}


def _ask_animate(clip: Clip) -> dict[str, Any]:
    if clip.face is None:
        raise ValueError("Wan-Animate needs face crops: make the data by entprog prepare --face-size 512")
    asked = {"image": images(clip.reference[None])[0], "pose_video": images(clip.pose), "face_video": images(clip.face)}
    return asked | {"segment_frame_length": len(clip.video)}


PIPELINES: dict[str, PipelineKind] = {
    "WanPipeline": PipelineKind(_encode_text_only, lambda x_t, batch: {"hidden_states": x_t}, _ask_text_only),
    "WanImageToVideoPipeline": PipelineKind(_encode_first_frame, _inputs_first_frame, _ask_first_frame),
    "WanVACEPipeline": PipelineKind(_encode_control, _inputs_control, _ask_control, ("reference", "pose")),
    "WanAnimatePipeline": PipelineKind(_encode_animate, _inputs_animate, _ask_animate, ("reference", "pose")),
}


# -- folders -----------------------------------------------------------------------------------------------------------


def is_pipeline(name: str) -> bool:
    """Whether a configuration's model is the folder of a diffusers pipeline."""
    return (Path(name) / "model_index.json").exists()


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def class_of(folder: str | Path) -> str:
    """Return the pipeline class of a folder, a row of PIPELINES. ValueError for one that PIPELINES lacks."""
    if not is_pipeline(str(folder)):
        raise ValueError(f"{folder} holds no model_index.json: choose the folder of a diffusers pipeline")
    name = _json(Path(folder) / "model_index.json").get("_class_name", "")
    if name not in PIPELINES:
        raise ValueError(f"{folder} holds a {name!r}: choose a folder of one of {sorted(PIPELINES)}")
    return name


def pipeline_of(folder: str | Path) -> PipelineKind:
    """Return what a pipeline folder's class makes of a clip."""
    return PIPELINES[class_of(folder)]


def check_settings(config: "RunConfig") -> None:
    """Refuse what a run of a pipeline folder cannot be told. ValueError with the keys or the experts to choose from."""
    pipeline_of(config.model)
    defaults = {f.name: f.default for f in fields(config)}
    if wrong := {k: getattr(config, k) for k in SETTLED if getattr(config, k) != defaults[k]}:
        raise ValueError(f"{wrong} cannot be set for a pipeline folder: leave them out, the folder and the clips tell")
    boundary = _json(Path(config.model) / "model_index.json").get("boundary_ratio")
    if (boundary is None) != (config.expert is None):
        choices = "leave expert out" if boundary is None else "choose expert: high or low, a run trains one of the two"
        raise ValueError(f"expert {config.expert} for {config.model} with boundary_ratio {boundary}: {choices}")


def part_of(config: "RunConfig") -> str:
    """Return which of the folder's parts a run trains: Wan2.2's low-noise expert is transformer_2."""
    return "transformer_2" if config.expert == "low" else "transformer"


def times(config: "RunConfig") -> Callable[[Tensor], Tensor]:
    """Return the map from u in [0, 1] to the times that a run trains at: shifted, within its expert's range.

    The shift is the configuration's, or that of the folder's scheduler.
    """
    scheduler = _json(Path(config.model) / "scheduler" / "scheduler_config.json")
    shift = config.shift or scheduler.get("flow_shift") or scheduler.get("shift") or 1.0
    boundary = _json(Path(config.model) / "model_index.json").get("boundary_ratio") or 0.0
    between = {None: (0.0, 1.0), "low": (0.0, boundary), "high": (boundary, 1.0)}[config.expert]
    return partial(shifted, shift=shift, between=between)


def load(config: "RunConfig", folder: str = "") -> nn.Module:
    """Load the transformer that a run trains; with `folder` a trained one of its class."""
    import diffusers

    check_settings(config)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    path = Path(folder) if folder else Path(config.model) / part_of(config)
    if not (path / "config.json").exists():
        raise ValueError(f"{path} holds no config.json: the folder of a transformer was expected")
    kind = getattr(diffusers, _json(path / "config.json")["_class_name"])
    with quiet():
        return kind.from_pretrained(path, torch_dtype=dtype, use_safetensors=True)


def call(config: "RunConfig") -> Callable[[nn.Module, Tensor, Tensor, Mapping[str, Tensor]], Tensor]:
    """Return call(model, x_t, t, batch): the prediction, as the pipeline calls its transformer.

    A batch without `text` gets what the pipeline's unconditional call gets: the empty prompt, and a blank face.
    """
    from entprog.data.encode import empty_text

    kind, empty = pipeline_of(config.model), list[Tensor]()
    each_token = _json(Path(config.model) / "model_index.json").get("expand_timesteps", False)  # Wan2.2 5B

    def run(model: nn.Module, x_t: Tensor, t: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        if "text" not in batch and not empty:
            empty.append(empty_text(config))
        text = batch["text"] if "text" in batch else empty[0].to(x_t.device).expand(len(x_t), -1, -1)
        timestep = 1000 * t
        if each_token:
            _, _, f, h, w = x_t.shape
            timestep = timestep[:, None].expand(-1, f * (h // 2) * (w // 2))
        inputs = kind.inputs(x_t, batch) | {"encoder_hidden_states": text}
        dtype: Any = model.dtype
        return model(**{k: v.to(dtype) for k, v in inputs.items()}, timestep=timestep, return_dict=False)[0]

    return run


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' own progress bars off the terminal."""
    import diffusers.utils.logging as ours
    import transformers.utils.logging as theirs

    shown = [library for library in (ours, theirs) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def open_pipeline(folder: str | Path, **parts: Any) -> Any:
    """Load a folder's pipeline with some parts given, None for those that are not needed.

    ImportError that names the extra where transformers or ftfy are missing.
    """
    try:
        import ftfy  # noqa: F401  # WanVACEPipeline cleans prompts with it, asked for or not
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "pipeline folders need text encoders: install the extra wan, pip install -e '.[wan]' in a clone"
        ) from error
    import diffusers

    index = _json(Path(folder) / "model_index.json")
    pipeline_of(folder)
    kind = getattr(diffusers, index["_class_name"])
    with quiet():
        pipe = kind.from_pretrained(folder, use_safetensors=True, **{k: v for k, v in parts.items() if k in index})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def open_encoders(folder: str | Path, device: torch.device) -> Any:
    """Load a folder's pipeline for encoding: its transformer is there by its configuration only.

    On a GPU text and images are encoded in bfloat16, as Wan's pipelines are run; the autoencoder stays in float32.
    """
    import diffusers

    about = _json(Path(folder) / "transformer" / "config.json")
    with torch.device("meta"):
        transformer = getattr(diffusers, about["_class_name"]).from_config(about)
    quick = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = open_pipeline(
        folder, transformer=transformer, transformer_2=None, torch_dtype={"default": quick, "vae": torch.float32}
    )
    for name in ("vae", "text_encoder", "image_encoder"):
        if getattr(pipe, name, None) is not None:
            getattr(pipe, name).to(device).eval()
    return pipe


@torch.no_grad()
def draw(
    config: "RunConfig", model: nn.Module, clips: Sequence[Clip], text: Tensor, empty: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Draw one video for each clip by the pipeline's own call: (drawn, truth, conditions to show).

    Videos are (N, 3, F, H, W) in [-1, 1]. `text` (N, L, D) are the prompts' embeddings, `empty` (1, L, D) that of the
    empty prompt. The expert that was not trained is the folder's.
    """
    kind, device = pipeline_of(config.model), next(model.parameters()).device
    dtype: Any = model.dtype
    pipe = open_pipeline(
        config.model, **{part_of(config): model}, text_encoder=None, tokenizer=None,
        torch_dtype={"default": dtype, "vae": torch.float32},
    ).to(device)  # fmt: skip
    drawn = []
    for i, clip in enumerate(clips):
        frames = pipe(
            prompt_embeds=text[i : i + 1].to(device), negative_prompt_embeds=empty.to(device), **clip.size,
            num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale,
            generator=torch.Generator().manual_seed(config.seed + i), output_type="pt", **kind.asks(clip),
        ).frames  # fmt: skip
        drawn.append(frames.transpose(1, 2).float().cpu() * 2 - 1)
    truth = torch.stack([c.video.transpose(0, 1) / 127.5 - 1 for c in clips])
    shown = {"reference": torch.stack([c.reference / 127.5 - 1 for c in clips]),
             "pose": torch.stack([c.pose.transpose(0, 1) / 255 for c in clips])}  # fmt: skip
    return torch.cat(drawn), truth, {k: shown[k] for k in kind.shows}
