"""diffusers' folders: what they call our tensors, and what their config.json must say for us to read them right.

A ControlNet is one folder; a base is a folder with unet/, vae/, text_encoder/, tokenizer/ and scheduler/ in it.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from clip_text import CLIPTextModel
from controlnet import ControlNet
from diffusion import NoiseSchedule
from formats.layouts import Layout
from names import CLIP, TRANSFORMER, Rules, nest
from support.errors import UserError, warn
from support.files import read_json, save_json, save_tensors
from unet import UNet, UNetConfig
from vae import AutoencoderKL

FILE = "diffusion_pytorch_model.safetensors"
NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")  # the last two are the text encoder's
ENDINGS = (".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin")  # the order in which diffusers looks
FOLDERS = {UNet: "unet", AutoencoderKL: "vae", CLIPTextModel: "text_encoder"}  # in a base's
# What is fetched of a repository.
CONTROLNET_FILES = VAE_FILES = ["config.json", FILE]
BASE_FILES = ["*/config.json", "scheduler/*.json", "tokenizer/*", f"unet/{FILE}", f"vae/{FILE}",
              "text_encoder/model.safetensors"]  # fmt: skip

# Names. Blocks are numbered level by level; inside a transformer and in the text encoder names are the official ones.

RESNET = [
    ("norm1", "norm1"), ("conv1", "conv1"), ("time_proj", "time_emb_proj"),
    ("norm2", "norm2"), ("conv2", "conv2"), ("shortcut", "conv_shortcut"),
]  # fmt: skip
LINEAR = [("norm", "group_norm"), ("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out", "to_out.0")]
LEGACY_LINEAR = [("norm", "group_norm"), ("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out", "proj_attn")]
HINT = "controlnet_cond_embedding."


def main_blocks(ours: str, first: int, theirs: str, count: int) -> Rules:
    """The rules of the first `count` of each level's three blocks, which we number from `first` on."""
    rules = []
    for level in range(4):
        for i in range(count):
            block = f"{ours}.{first + 3 * level + i}"
            rules += nest(f"{block}.resnet", f"{theirs}.{level}.resnets.{i}", RESNET)
            rules += nest(f"{block}.transformer", f"{theirs}.{level}.attentions.{i}", TRANSFORMER)
    return rules


ENCODER = [
    ("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2"),
    ("encoder.0.conv", "conv_in"),
    *main_blocks("encoder", 1, "down_blocks", 2),
    *[(f"encoder.{3 * level + 3}.downsample", f"down_blocks.{level}.downsamplers.0.conv") for level in range(3)],
    *nest("middle.resnet1", "mid_block.resnets.0", RESNET),
    *nest("middle.transformer", "mid_block.attentions.0", TRANSFORMER),
    *nest("middle.resnet2", "mid_block.resnets.1", RESNET),
]  # fmt: skip
UNET = [
    *ENCODER,
    *main_blocks("decoder", 0, "up_blocks", 3),
    *[(f"decoder.{3 * level + 2}.upsample.conv", f"up_blocks.{level}.upsamplers.0.conv") for level in range(3)],
    ("norm_out", "conv_norm_out"), ("conv_out", "conv_out"),
]  # fmt: skip
CONTROLNET = [
    *ENCODER,
    ("zero_convs.{i}", "controlnet_down_blocks.{i}"), ("middle_zero_conv", "controlnet_mid_block"),
    ("hint_encoder.0", f"{HINT}conv_in"), ("hint_encoder.14", f"{HINT}conv_out"),
    *[(f"hint_encoder.{2 * i + 2}", f"{HINT}blocks.{i}") for i in range(6)],
]  # fmt: skip


def vae_rules(attention: Rules) -> Rules:
    rules = [("to_moments", "quant_conv"), ("from_latent", "post_quant_conv")]
    for side, way in ("encoder", "down"), ("decoder", "up"):
        rules += nest(side, side, [("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")])
        rules += nest(f"{side}.middle.resnet1", f"{side}.mid_block.resnets.0", RESNET)
        rules += nest(f"{side}.middle.attention", f"{side}.mid_block.attentions.0", attention)
        rules += nest(f"{side}.middle.resnet2", f"{side}.mid_block.resnets.1", RESNET)
        for level in range(4):  # the decoder's are numbered from the smallest features up, here from the picture down
            ours, theirs = f"{side}.levels.{level}", f"{side}.{way}_blocks.{level if way == 'down' else 3 - level}"
            rules += nest(f"{ours}.resnets.{{i}}", f"{theirs}.resnets.{{i}}", RESNET)
            rules += [(f"{ours}.resample.conv", f"{theirs}.{way}samplers.0.conv")]
    return rules


LAYOUTS = {  # the one that is written today comes first
    UNet: [Layout("diffusers", UNET, mark="conv_in.weight")],
    AutoencoderKL: [
        Layout("diffusers", vae_rules(attention), mark=f"decoder.mid_block.attentions.0.{attention[1][1]}.weight")
        for attention in (LINEAR, LEGACY_LINEAR)
    ],
    CLIPTextModel: [Layout("diffusers", CLIP, name, f"{name}final_layer_norm.weight") for name in ("text_model.", "")],
    ControlNet: [Layout("diffusers", CONTROLNET, mark=f"{HINT}conv_in.weight")],
}

# Settings, in config.json. The checked ones decide the numbers and show in no shape: Stable Diffusion 1.x has these,
# and folders may or may not say so. The ignored ones have no effect, or shapes show them, or they are read elsewhere.

CHECKED_SETTINGS = {
    "act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5, "downsample_padding": 1,
    "mid_block_scale_factor": 1, "resnet_out_scale_factor": 1, "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional", "only_cross_attention": False, "use_linear_projection": False,
    "class_embed_type": None, "addition_embed_type": None, "global_pool_conditions": False,
    "controlnet_conditioning_channel_order": "rgb", "shift_factor": None, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}  # fmt: skip
IGNORED_SETTINGS = (  # patterns
    "*_channels", "*_size", "*_dim", "*_heads", "*_layers", "*layers_per_block", "*_block_type*", "*_kernel",
    "*_token_id", "*dtype", "*upcast*", "use_*quant_conv", "initializer_*", "norm_num_groups", "scaling_factor",
    "max_position_embeddings", "mid_block_add_attention", "attention_type", "model_type", "architectures",
    "transformers_version",
)  # fmt: skip
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # NoiseSchedule's
SCHEDULE = BETAS | {
    "num_train_timesteps": NoiseSchedule().steps, "prediction_type": "epsilon", "rescale_betas_zero_snr": False,
    "trained_betas": None,
}  # fmt: skip
SCHEDULE_DEFAULTS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}  # diffusers' own


def check_settings(path: Path, theirs: dict, ours: dict) -> None:
    """Refuse settings that give other numbers than ours."""
    for name, wanted in ours.items():
        value = theirs.get(name, wanted)
        if value != wanted and (value or wanted):
            raise UserError(f"{path}: {name} is {value!r}, this program takes {wanted!r} alone: pass another model")


def read_settings(path: Path) -> dict[str, object]:
    """The sizes that no shape shows, out of a network's config.json; its other settings must be ours."""
    settings = read_json(path)
    check_settings(path, settings, CHECKED_SETTINGS)
    known = (*CHECKED_SETTINGS, *IGNORED_SETTINGS, "_*")
    given = [name for name, value in settings.items() if value not in (None, False)]
    if unknown := [name for name in given if not any(fnmatchcase(name, pattern) for pattern in known)]:
        warn(f"{path}: not known here, so ignored: {', '.join(unknown)}")
    return {
        "num_heads": settings.get("num_attention_heads") or settings.get("attention_head_dim", 8),  # their default
        "norm_groups": settings.get("norm_num_groups"),
        "latent_scale": settings.get("scaling_factor"),
    }


def weights_in(folder: Path) -> Path:
    """The weight file in the folder of a single network, or of a checkpoint that has a ControlNet's in it."""
    files = [folder / f"{name}{ending}" for ending in ENDINGS for name in NAMES]
    if file := next(filter(Path.is_file, files), None):
        return file
    if (folder / "unet").is_dir():
        raise UserError(f"{folder} is a base model's folder: pass it as the base")
    if (folder / "controlnet").is_dir():
        return weights_in(folder / "controlnet")
    others = " or ".join(sorted(path.name for path in folder.glob("*.safetensors"))[:3]) or "NAME.safetensors"
    raise UserError(f"{folder}: no {FILE} in this folder; pass a network's own folder or a single file: {others}")


def unet_settings(config: UNetConfig) -> dict:
    """The sizes of a UNet or ControlNet; in all else diffusers' defaults are Stable Diffusion 1.x's."""
    return {
        "attention_head_dim": config.num_heads,  # diffusers' name for the number of heads in SD 1.x
        "block_out_channels": [config.model_channels * mult for mult in config.channel_mult],
        "cross_attention_dim": config.context_dim,
        "layers_per_block": config.num_res_blocks, "norm_num_groups": config.norm_groups,
    }  # fmt: skip


def controlnet_settings(config: UNetConfig, hint_channels: Sequence[int]) -> dict:
    hint = {"conditioning_embedding_out_channels": list(hint_channels)}
    return {"_class_name": "ControlNetModel"} | unet_settings(config) | hint


def save_controlnet_folder(controlnet: ControlNet, folder: Path, dtype: torch.dtype | None) -> None:
    theirs, state = LAYOUTS[ControlNet][0].theirs, controlnet.state_dict()
    save_tensors({theirs(name): tensor.to(dtype=dtype) for name, tensor in state.items()}, folder / FILE)
    widths = [controlnet.hint_encoder[i].out_channels for i in (0, 4, 8, 12)]
    save_json(controlnet_settings(controlnet.config, widths), folder / "config.json")
