"""diffusers' folders: what they call our tensors, and what their config.json must say for us to read them right.

A ControlNet is one folder; a base is a folder with unet/, vae/, text_encoder/, tokenizer/ and scheduler/ in it.
"""

from collections.abc import Mapping
from pathlib import Path

from support.errors import UserError

import torch
from torch import nn

from clip_text import CLIPTextConfig, CLIPTextModel
from controlnet import ControlNet
from diffusion import NoiseSchedule
from support.files import read_json, read_tensors, save_json, save_tensors
from support.formats import Layout, Part, Rules, nest, read_part
from support.sizes import check_sizes, hint_channels, is_scale, sizes_from_shapes, sizes_of, unet_config
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig

FILE = "diffusion_pytorch_model.safetensors"
NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")  # the last two are the text encoder's
ENDINGS = (".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin")  # the order in which diffusers looks
FOLDERS = {UNet: "unet", AutoencoderKL: "vae", CLIPTextModel: "text_encoder"}  # in a base's
CLASSES = {UNet: "UNet2DConditionModel", AutoencoderKL: "AutoencoderKL", ControlNet: "ControlNetModel"}
HINT = "controlnet_cond_embedding."
ORDER = "controlnet_conditioning_channel_order"
# What is fetched of a repository.
CONTROLNET_FILES = ["config.json", FILE]
BASE_FILES = ["*/config.json", "scheduler/*.json", "tokenizer/*", f"unet/{FILE}", f"vae/{FILE}",
              "text_encoder/model.safetensors"]  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------
# Names. Blocks are numbered level by level; inside a transformer and in the text encoder names are the official ones.

RESNET = [
    ("norm1", "norm1"), ("conv1", "conv1"), ("time_proj", "time_emb_proj"),
    ("norm2", "norm2"), ("conv2", "conv2"), ("shortcut", "conv_shortcut"),
]  # fmt: skip
LINEAR = [("norm", "group_norm"), ("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out", "to_out.0")]
LINEAR_ONCE = [("norm", "group_norm"), ("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out", "proj_attn")]


def encoder_rules(transformer: Rules) -> Rules:
    rules = [
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("encoder.0.conv", "conv_in"),
        *[(f"encoder.{3 * level + 3}.downsample", f"down_blocks.{level}.downsamplers.0.conv") for level in range(3)],
        *nest("middle.resnet1", "mid_block.resnets.0", RESNET),
        *nest("middle.transformer", "mid_block.attentions.0", transformer),
        *nest("middle.resnet2", "mid_block.resnets.1", RESNET),
    ]
    for level in range(4):
        for i in range(2):
            block = f"encoder.{3 * level + 1 + i}"
            rules += nest(f"{block}.resnet", f"down_blocks.{level}.resnets.{i}", RESNET)
            rules += nest(f"{block}.transformer", f"down_blocks.{level}.attentions.{i}", transformer)
    return rules


def unet_rules(transformer: Rules) -> Rules:
    rules = [*encoder_rules(transformer), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")]
    for level in range(4):
        for i in range(3):
            block = f"decoder.{3 * level + i}"
            rules += nest(f"{block}.resnet", f"up_blocks.{level}.resnets.{i}", RESNET)
            rules += nest(f"{block}.transformer", f"up_blocks.{level}.attentions.{i}", transformer)
    return rules + [
        (f"decoder.{3 * level + 2}.upsample.conv", f"up_blocks.{level}.upsamplers.0.conv") for level in range(3)
    ]


def controlnet_rules(transformer: Rules) -> Rules:
    return [
        *encoder_rules(transformer),
        ("zero_convs.{i}", "controlnet_down_blocks.{i}"),
        ("middle_zero_conv", "controlnet_mid_block"),
        ("hint_encoder.0", f"{HINT}conv_in"),
        *[(f"hint_encoder.{2 * i + 2}", f"{HINT}blocks.{i}") for i in range(6)],
        ("hint_encoder.14", f"{HINT}conv_out"),
    ]


def vae_rules(attention: Rules) -> Rules:
    """The decoder's levels are numbered from the smallest features up, officially and here from the picture down."""
    rules = [("to_moments", "quant_conv"), ("from_latent", "post_quant_conv")]
    for side in ("encoder", "decoder"):
        rules += [
            (f"{side}.conv_in", f"{side}.conv_in"),
            (f"{side}.norm_out", f"{side}.conv_norm_out"),
            (f"{side}.conv_out", f"{side}.conv_out"),
            *nest(f"{side}.middle.resnet1", f"{side}.mid_block.resnets.0", RESNET),
            *nest(f"{side}.middle.attention", f"{side}.mid_block.attentions.0", attention),
            *nest(f"{side}.middle.resnet2", f"{side}.mid_block.resnets.1", RESNET),
        ]
    for level in range(4):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{3 - level}"
        rules += nest(f"encoder.levels.{level}.resnets.{{i}}", f"{down}.resnets.{{i}}", RESNET)
        rules += nest(f"decoder.levels.{level}.resnets.{{i}}", f"{up}.resnets.{{i}}", RESNET)
        if level < 3:
            rules.append((f"encoder.levels.{level}.resample.conv", f"{down}.downsamplers.0.conv"))
        if level > 0:
            rules.append((f"decoder.levels.{level}.resample.conv", f"{up}.upsamplers.0.conv"))
    return rules


def diffusers_layouts(transformer: Rules, clip: Rules) -> dict[type[nn.Module], tuple[Layout, ...]]:
    """For each network the layout that is written today, then another. The rules passed are the official ones."""
    not_used = ("text_model.embeddings.position_ids", "embeddings.position_ids", "text_projection.")

    def layout(kind: str, rules: Rules, mark: str, prefix: str = "", others: tuple[str, ...] = ()) -> Layout:
        return Layout("diffusers", kind, rules, prefix, others, mark)

    return {
        UNet: (layout("base model", unet_rules(transformer), "conv_in.weight"),),
        AutoencoderKL: tuple(
            layout("base model", vae_rules(attention), f"decoder.mid_block.attentions.0.{attention[1][1]}.weight")
            for attention in (LINEAR, LINEAR_ONCE)
        ),
        CLIPTextModel: tuple(
            layout("base model", clip, f"{prefix}final_layer_norm.weight", prefix, not_used)
            for prefix in ("text_model.", "")
        ),
        ControlNet: (
            layout("ControlNet", controlnet_rules(transformer), f"{HINT}conv_in.weight"),
        ),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Settings, in config.json. Ours are worked out from sizes, and a folder's must be equal to them.

NO_MATTER = (  # to the numbers, beside names that begin with _
    "sample_size", "upcast_attention", "force_upcast", "addition_embed_type_num_heads", "dropout",
    "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "initializer_factor",
    "initializer_range", "projection_dim", "transformers_version", "architectures", "num_attention_heads", "use_cache",
    "return_dict", "tie_word_embeddings", "output_attentions", "output_hidden_states",
)  # fmt: skip
ALWAYS = {  # what Stable Diffusion 1.5 has, and folders may or may not say
    "mid_block_type": "UNetMidBlock2DCrossAttn", "mid_block_scale_factor": 1, "transformer_layers_per_block": 1,
    "time_embedding_type": "positional", "resnet_time_scale_shift": "default", "resnet_out_scale_factor": 1,
    "conv_in_kernel": 3, "conv_out_kernel": 3, "attention_type": "default", "conditioning_channels": 3,
    ORDER: "rgb", "mid_block_add_attention": True, "use_quant_conv": True,
    "use_post_quant_conv": True,
}  # fmt: skip
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # NoiseSchedule's
SCHEDULE = BETAS | {
    "num_train_timesteps": NoiseSchedule().steps, "trained_betas": None, "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}  # fmt: skip
SCHEDULE_DEFAULTS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}  # diffusers' own
OTHER_PROCESSES = ("FlowMatch", "EDM")  # begin the names of schedulers that add noise in another way


def encoder_settings(config: UNetConfig) -> dict:
    levels = range(len(config.channel_mult))
    return {
        "act_fn": "silu",
        "attention_head_dim": config.num_heads,  # diffusers' name for the number of heads in SD 1.x
        "block_out_channels": [config.model_channels * mult for mult in config.channel_mult],
        "cross_attention_dim": config.context_dim,
        "down_block_types": ["CrossAttnDownBlock2D" if i in config.attention_levels else "DownBlock2D" for i in levels],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": config.in_channels,
        "layers_per_block": config.num_res_blocks,
        "norm_eps": 1e-5,
        "norm_num_groups": config.norm_groups,
    }


def unet_settings(config: UNetConfig) -> dict:
    levels = reversed(range(len(config.channel_mult)))
    return encoder_settings(config) | {
        "_class_name": CLASSES[UNet],
        "out_channels": config.out_channels,
        "up_block_types": ["CrossAttnUpBlock2D" if i in config.attention_levels else "UpBlock2D" for i in levels],
    }


def controlnet_settings(config: UNetConfig, hint_channels: tuple[int, ...]) -> dict:
    return encoder_settings(config) | {
        "_class_name": CLASSES[ControlNet],
        "conditioning_embedding_out_channels": list(hint_channels),
    }


def vae_settings(config: VAEConfig, scale: float | None) -> dict:
    return {
        "_class_name": CLASSES[AutoencoderKL],
        "act_fn": "silu",
        "block_out_channels": [config.channels * mult for mult in config.channel_mult],
        "down_block_types": ["DownEncoderBlock2D"] * len(config.channel_mult),
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.norm_groups,
        "out_channels": 3,
        "scaling_factor": scale,
        "up_block_types": ["UpDecoderBlock2D"] * len(config.channel_mult),
    }


def text_settings(config: CLIPTextConfig) -> dict:
    return {
        "hidden_act": "quick_gelu",
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": config.max_length,
        "model_type": "clip_text_model",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "vocab_size": config.vocab_size,
    }


def plain(value: object) -> object:
    """A setting as it is compared: one number for a list of equal ones, SiLU under one name."""
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        value = value[0]
    return "silu" if value == "swish" else value


def check_settings(path: Path, theirs: dict, ours: dict) -> None:
    """Raise UserError at the first setting that would give other numbers than ours."""
    ours = ALWAYS | ours
    for name, value in theirs.items():
        if name not in ours and (name.startswith("_") or name in NO_MATTER):
            continue
        wanted = ours.get(name)
        if plain(value) != plain(wanted) and not (wanted is None and value is False):
            known = f"this program takes {wanted!r} alone" if name in ours else "which this program lacks"
            raise UserError(f"{path}: {name} is {value!r}, {known}: pass another model")


def hidden_size(path: Path, settings: dict, name: str, default: int) -> int:
    """A size that no tensor's shape shows; diffusers' default where the settings do not say. Raises UserError."""
    value = plain(settings.get(name, default))
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer() or value < 1:
        raise UserError(f"{path}: {name} is {value!r}, but must be a whole number above 0: pass another model")
    return int(value)


def unet_sizes(path: Path, settings: dict) -> dict[str, int]:
    """The hidden sizes of a UNet or ControlNet."""
    default = UNetConfig()
    return {
        "num_heads": hidden_size(path, settings, "attention_head_dim", default.num_heads),
        "norm_groups": hidden_size(path, settings, "norm_num_groups", default.norm_groups),
    }


# ---------------------------------------------------------------------------------------------------------------
# Folders, in and out


def weights_in(folder: Path) -> Path:
    """The weight file in the folder of a single network. Raises UserError, with what may have been meant."""
    files = [folder / f"{name}{ending}" for ending in ENDINGS for name in NAMES]
    if file := next((file for file in files if file.is_file()), None):
        return file
    if (folder / "unet").is_dir():
        raise UserError(f"{folder} is a base model's folder: pass it as the base")
    if any(folder.glob("*index*.json")):
        raise UserError(f"{folder}: its weights are split over several files: save them as one, {FILE}")
    if (folder / "controlnet").is_dir():
        raise UserError(f"{folder} is a checkpoint of diffusers: pass {folder / 'controlnet'}")
    others = " or ".join(sorted(path.name for path in folder.glob("*.safetensors"))[:3]) or f"the one with {FILE}"
    raise UserError(f"{folder}: no {FILE} in this folder; pass a single file or a network's own folder: {others}")


def read_network(file: Path, network: type[nn.Module], layouts: tuple[Layout, ...]) -> tuple[Part, Path, dict]:
    """A network's tensors under our names, its config.json, and the settings in it, empty if there is none."""
    config, kind = file.with_name("config.json"), CLASSES.get(network)
    settings = read_json(config) if config.is_file() else {}
    if (found := settings.get("_class_name") or kind) != kind:
        raise UserError(f"{file.parent} holds {found}, not {kind}: pass another folder")
    tensors, _ = read_tensors(file)
    if network in (UNet, ControlNet) and settings.get("num_attention_heads"):  # a second name, which comes first
        settings["attention_head_dim"] = settings["num_attention_heads"]
    if settings.get(ORDER) == "bgr" and f"{HINT}conv_in.weight" in tensors:  # turn the weights, not each hint
        tensors[f"{HINT}conv_in.weight"] = tensors[f"{HINT}conv_in.weight"].flip(1)
        settings[ORDER] = "rgb"
    if network is AutoencoderKL:  # 1x1 convolutions here and officially, linear layers there
        flat = [name for name, tensor in tensors.items() if ".attentions." in name and tensor.ndim == 2]
        tensors |= {name: tensors[name][..., None, None] for name in flat}
    return read_part(layouts, tensors, file), config, settings


def is_controlnet_file(path: Path) -> bool:
    """Whether it is the weight file of a ControlNet's folder, so that the settings beside it are its own."""
    config = path.with_name("config.json")
    return path.is_file() and config.is_file() and read_json(config).get("_class_name") == CLASSES[ControlNet]


def read_controlnet_folder(path: Path, layouts: tuple[Layout, ...]) -> tuple[Part, dict[str, int]]:
    """The tensors of a ControlNetModel's folder, or of a file in it, and its hidden sizes.

    Raises UserError where settings or names don't fit.
    """
    part, config, settings = read_network(weights_in(path) if path.is_dir() else path, ControlNet, layouts)
    hidden = unet_sizes(config, settings) if settings else {}
    with sizes_of(path):
        ours = controlnet_settings(unet_config(part, **hidden), hint_channels(part))
    check_settings(config, settings, ours)
    return part, hidden


def read_folder_sizes(folder: Path, layouts: Mapping[type[nn.Module], tuple[Layout, ...]]) -> dict:
    """The sizes of a base's networks: arguments of StableDiffusion. Raises UserError."""
    missing = next((name for name in FOLDERS.values() if not (folder / name).is_dir()), None)
    if missing:
        raise UserError(f"{folder} has no {missing}/ in it, as a base's folder in diffusers' layout does: pass such a "
                        "folder, or a single file")  # fmt: skip
    check_schedule(folder / "scheduler" / "scheduler_config.json")
    found = {
        network: read_network(weights_in(folder / name), network, layouts[network]) for network, name in FOLDERS.items()
    }
    (_, unet_file, unet), (_, vae_file, vae), (_, text_file, text) = found.values()
    default = CLIPTextConfig().num_heads if not text else 8  # transformers', for a missing one
    hidden = {
        "unet": unet_sizes(unet_file, unet),
        "vae": {"norm_groups": hidden_size(vae_file, vae, "norm_num_groups", VAEConfig().norm_groups)},
        "text": {"num_heads": hidden_size(text_file, text, "num_attention_heads", default)},
    }
    with sizes_of(folder):
        sizes = sizes_from_shapes(*(part for part, _, _ in found.values()), hidden)
    if "scaling_factor" in vae:
        sizes["latent_scale"] = vae["scaling_factor"]
        if not is_scale(vae["scaling_factor"]):
            raise UserError(f"{vae_file}: scaling_factor is {vae['scaling_factor']!r}: correct it")
    check_sizes(folder, sizes)
    check_settings(unet_file, unet, unet_settings(sizes["unet"]))
    check_settings(vae_file, vae, vae_settings(sizes["vae"], sizes.get("latent_scale")))
    check_settings(text_file, text, text_settings(sizes["text"]))
    return sizes


def check_schedule(path: Path) -> None:
    """Raise UserError for a scheduler of another diffusion process; which sampler it names does not matter."""
    if path.is_file():
        settings = SCHEDULE_DEFAULTS | read_json(path)
        if str(settings.get("_class_name")).startswith(OTHER_PROCESSES):
            raise UserError(f"{path}: {settings['_class_name']} is of another diffusion process: pass another model")
        check_settings(path, {name: value for name, value in settings.items() if name in SCHEDULE}, SCHEDULE)


def save_controlnet_folder(controlnet: ControlNet, layout: Layout, folder: Path, dtype: torch.dtype | None) -> None:
    part = Part(controlnet.state_dict(), layout, str(folder), advice="")
    save_tensors({layout.theirs(name): tensor.to(dtype=dtype) for name, tensor in part.tensors.items()}, folder / FILE)
    save_json(controlnet_settings(controlnet.config, hint_channels(part)), folder / "config.json")
