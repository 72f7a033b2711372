"""Official Stable Diffusion and ControlNet weights to our modules and back: names, loading, saving.

For each network, one table of rules translates our tensor names into the official ones; read backwards, it translates
official names into ours. Loading is strict: a missing, unknown or misshapen tensor inside a network is an error.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from support.errors import UserError

import torch
from torch import Tensor, nn

from clip_text import CLIPTextModel
from controlnet import ControlNet
from support.diffusers_format import diffusers_layouts, save_controlnet_folder
from support.files import save_tensors
from support.formats import Layout, Part, nest
from support.reading import read_controlnet
from support.sizes import hint_channels, refuse_other_sizes, sizes_of
from unet import UNet
from vae import AutoencoderKL

# Names. A rule is (ours, official), {i} and {j} stand for numbers; a name's last part (weight, bias) is the same.

RESNET = [
    ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("shortcut", "skip_connection"),
]  # fmt: skip
ATTENTION = [("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out", "to_out.0")]
TRANSFORMER = [
    ("norm", "norm"), ("proj_in", "proj_in"), ("proj_out", "proj_out"),
    *[(f"norm{i}", f"transformer_blocks.0.norm{i}") for i in (1, 2, 3)],
    *nest("self_attention", "transformer_blocks.0.attn1", ATTENTION),
    *nest("cross_attention", "transformer_blocks.0.attn2", ATTENTION),
    *nest("feed_forward", "transformer_blocks.0.ff", [("proj_in", "net.0.proj"), ("proj_out", "net.2")]),
]  # fmt: skip
ENCODER = [  # what the UNet and its copy, the ControlNet, share
    ("time_embed.{i}", "time_embed.{i}"),
    ("encoder.0.conv", "input_blocks.0.0"),
    ("encoder.{i}.downsample", "input_blocks.{i}.0.op"),
    *nest("encoder.{i}.resnet", "input_blocks.{i}.0", RESNET),
    *nest("encoder.{i}.transformer", "input_blocks.{i}.1", TRANSFORMER),
    *nest("middle.resnet1", "middle_block.0", RESNET),
    *nest("middle.transformer", "middle_block.1", TRANSFORMER),
    *nest("middle.resnet2", "middle_block.2", RESNET),
]
UNET = [
    *ENCODER,
    *nest("decoder.{i}.resnet", "output_blocks.{i}.0", RESNET),
    *nest("decoder.{i}.transformer", "output_blocks.{i}.1", TRANSFORMER),
    ("decoder.2.upsample.conv", "output_blocks.2.1.conv"),  # it follows the ResBlock: level 3 has no transformers
    ("decoder.5.upsample.conv", "output_blocks.5.2.conv"),
    ("decoder.8.upsample.conv", "output_blocks.8.2.conv"),
    ("norm_out", "out.0"),
    ("conv_out", "out.2"),
]
CONTROLNET = [
    *ENCODER,
    ("hint_encoder.{i}", "input_hint_block.{i}"),
    ("zero_convs.{i}", "zero_convs.{i}.0"),
    ("middle_zero_conv", "middle_block_out.0"),
]
VAE_RESNET = [(name, name) for name in ("norm1", "conv1", "norm2", "conv2")] + [("shortcut", "nin_shortcut")]
VAE_ATTENTION = [("norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out", "proj_out")]
VAE_SIDE = [  # encoder and decoder have these in common
    ("conv_in", "conv_in"), ("norm_out", "norm_out"), ("conv_out", "conv_out"),
    *nest("middle.resnet1", "mid.block_1", VAE_RESNET),
    *nest("middle.attention", "mid.attn_1", VAE_ATTENTION),
    *nest("middle.resnet2", "mid.block_2", VAE_RESNET),
]  # fmt: skip
VAE = [
    *nest("encoder", "encoder", VAE_SIDE),
    *nest("encoder.levels.{i}.resnets.{j}", "encoder.down.{i}.block.{j}", VAE_RESNET),
    ("encoder.levels.{i}.resample.conv", "encoder.down.{i}.downsample.conv"),
    *nest("decoder", "decoder", VAE_SIDE),
    *nest("decoder.levels.{i}.resnets.{j}", "decoder.up.{i}.block.{j}", VAE_RESNET),
    ("decoder.levels.{i}.resample.conv", "decoder.up.{i}.upsample.conv"),
    ("to_moments", "quant_conv"),
    ("from_latent", "post_quant_conv"),
]
CLIP_ATTENTION = [("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out", "out_proj")]
CLIP_LAYER = [
    ("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("mlp_in", "mlp.fc1"), ("mlp_out", "mlp.fc2"),
    *nest("attention", "self_attn", CLIP_ATTENTION),
]  # fmt: skip
CLIP = [
    ("token_embedding", "embeddings.token_embedding"),
    ("position_embedding", "embeddings.position_embedding"),
    *nest("layers.{i}", "encoder.layers.{i}", CLIP_LAYER),
    ("norm_out", "final_layer_norm"),
]

# Ignored in official files: names with none of these prefixes (buffers that follow from the noise schedule, as betas,
# and running averages of the weights, model_ema.*), and CLIP's position_ids, which are just 0 to 76.
TEXT = "cond_stage_model.transformer.text_model."
OFFICIAL: dict[type[nn.Module], Layout] = {
    UNet: Layout("official", "base model", UNET, "model.diffusion_model."),
    AutoencoderKL: Layout("official", "base model", VAE, "first_stage_model."),
    CLIPTextModel: Layout("official", "base model", CLIP, TEXT, (TEXT + "embeddings.position_ids",)),
    ControlNet: Layout("official", "ControlNet", CONTROLNET, "control_model."),
}
DIFFUSERS = diffusers_layouts(TRANSFORMER, CLIP)
BASE = {network: [OFFICIAL[network]] for network in (UNet, AutoencoderKL, CLIPTextModel)}  # layouts in a single file
SHORT = TEXT.removesuffix("text_model.")  # in old merges, and as some trainers write it
BASE[CLIPTextModel] += [replace(
    OFFICIAL[CLIPTextModel], prefix=SHORT, mark=SHORT + "final_layer_norm.weight",
    others=(SHORT + "embeddings.position_ids", SHORT + "text_projection."),
)]  # fmt: skip
# A ControlNet's file may also have no prefix (others in it are told by theirs), or our own names: in checkpoints, and
# for the lite ablation, which no other program knows.
OTHERS = tuple(layout.prefix for network, layout in OFFICIAL.items() if network is not ControlNet)
BARE = replace(OFFICIAL[ControlNet], prefix="", others=OTHERS, mark="input_hint_block.0.weight")
OWN = Layout("own", "ControlNet", [], others=OTHERS, mark="hint_encoder.0.weight")
CONTROLNETS = [OFFICIAL[ControlNet], BARE, OWN, *DIFFUSERS[ControlNet]]


def official_names(module: nn.Module) -> dict[str, str]:
    """Our name -> the official one, for every tensor of a UNet, AutoencoderKL, CLIPTextModel or ControlNet."""
    return {name: layout_of(module).theirs(name) for name in module.state_dict()}


def official_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module under their full official names."""
    return dict(zip(official_names(module).values(), module.state_dict().values(), strict=True))


def layout_of(module: nn.Module) -> Layout:
    return OWN if isinstance(module, ControlNet) and module.lite else OFFICIAL[type(module)]


def load(module: nn.Module, part: Part) -> None:
    """Load all of the part's tensors into the module, which must have exactly these. Raises UserError otherwise.

    Parameters on the meta device are replaced by the tensors themselves, in the parameter's dtype, so that
    memory-mapped tensors stay mapped. Other parameters are overwritten in place.
    """
    state = module.state_dict()
    for name, parameter in state.items():
        expected = list(parameter.shape)
        if name not in part.tensors:
            raise part.error(name, f"{expected} is missing")
        if part.shape(name) != expected:
            raise part.error(name, f"has shape {part.shape(name)}, expected {expected}")
        if not part.tensors[name].is_floating_point():
            raise part.error(name, f"holds {part.tensors[name].dtype} numbers, not weights")
        if not part.tensors[name].sum(dtype=torch.float32).isfinite():  # NaN and inf stay in a sum, which makes no copy
            raise part.error(name, "has NaN or infinity in it", "; such a file is damaged: fetch or train it again")
    for name in sorted(part.tensors.keys() - state.keys()):
        raise part.error(name, f"{part.shape(name)} is no part of the model")
    values = {name: part.tensors[name].to(parameter.dtype) for name, parameter in state.items()}
    module.load_state_dict(values, assign=any(parameter.is_meta for parameter in state.values()))


def load_official(module: nn.Module, tensors: Mapping[str, Tensor], source: str = "checkpoint") -> None:
    """Load a UNet, AutoencoderKL, CLIPTextModel or ControlNet from tensors under their full official names.

    Other networks' tensors beside them are ignored. `source` names the file in errors. Raises UserError for the first
    missing, misshapen or unknown tensor, with its shapes and the likely cause; the module is then unchanged.
    """
    load(module, layout_of(module).pick(tensors, source))


def load_controlnet(path: str | Path, unet: UNet) -> ControlNet:
    """A ControlNet in float32 for `unet`, from a file, a folder of diffusers or a checkpoint of train.py.

    Raises UserError as read_controlnet and load_official do, and for one that was copied from a UNet of other sizes.
    """
    part, hidden, _ = read_controlnet(Path(path), CONTROLNETS)
    lite = part.layout is OWN and "time_embed.0.weight" not in part.tensors
    with sizes_of(path):
        refuse_other_sizes(path, hidden, unet.config)
        controlnet = ControlNet.from_unet(UNet(unet.config), hint_channels(part), copy="lite" if lite else "full")
    load(controlnet, part)
    return controlnet


def save_controlnet(
    controlnet: ControlNet, path: str | Path, layout: str = "official", metadata: dict[str, str] | None = None,
    others: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Write a ControlNet for other programs.

    "official" is one .safetensors file, which A1111, ComfyUI and diffusers read. `others` are more tensors for it,
    under official names: the base's decoder if that was trained too. "diffusers" is a folder, for ControlNetModel,
    with no place for `metadata` and `others`. `dtype` is what all tensors are rounded to. The lite ablation keeps our
    names, is marked in the metadata, and has no diffusers layout.
    Raises UserError for that, or when writing fails; ValueError for any other layout.
    """
    if layout == "official":
        config = controlnet.config
        hidden = {"num_heads": config.num_heads, "norm_groups": config.norm_groups}  # which no shape shows
        metadata = (metadata or {}) | {"unet": json.dumps(hidden)} | ({"copy": "lite"} if controlnet.lite else {})
        tensors = official_state_dict(controlnet) | dict(others or {})
        save_tensors({name: tensor.to(dtype=dtype) for name, tensor in tensors.items()}, path, metadata)
    elif layout == "diffusers":
        if controlnet.lite:
            raise UserError(f"{path}: a ControlNet-lite has no diffusers layout, only this project's own")
        save_controlnet_folder(controlnet, DIFFUSERS[ControlNet][0], Path(path), dtype)
    else:
        raise ValueError(f"layout is 'official' or 'diffusers', not {layout!r}")
