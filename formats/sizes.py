"""The sizes of a network in a file: widths and depths by its tensors' shapes, and what no shape shows.

Heads, norm groups and the latents' scale come from our own metadata or a config.json, or are Stable Diffusion 1.5's.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict

from torch import nn

from clip_text import CLIPTextConfig, CLIPTextModel
from controlnet import ControlNet
from formats.layouts import LARGEST, Part
from support.errors import UserError
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig

HIDDEN = ("num_heads", "norm_groups")  # sizes of a UNet that no shape shows
KEYS = {UNet: "unet", AutoencoderKL: "vae", CLIPTextModel: "text"}  # in our metadata of a base


def config_metadata(sd) -> dict[str, str]:
    """The sizes of a StableDiffusion, for its file's metadata."""
    configs = {"text": asdict(sd.text_encoder.config), "vae": asdict(sd.vae.config), "unet": asdict(sd.unet.config)}
    return {"config": json.dumps(configs | {"latent_scale": sd.latent_scale})}


def own_metadata(metadata: dict[str, str], key: str) -> dict:
    """What we wrote under this key of a file's metadata; empty where another program put something else there."""
    try:
        content = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError):
        content = None
    return content if isinstance(content, dict) else {}


def sizes_in_metadata(metadata: dict[str, str], network: type[nn.Module]) -> dict[str, object]:
    """What our metadata says of a network's sizes, unchecked."""
    if network is ControlNet:  # the sizes of the UNet that it was copied from
        return own_metadata(metadata, "unet")
    config = own_metadata(metadata, "config")
    sizes = config.get(KEYS[network])
    return {"latent_scale": config.get("latent_scale")} | (sizes if isinstance(sizes, dict) else {})


def hidden_size(part: Part, name: str, default: int, widths: Sequence[int]) -> int:
    """A size that no shape shows, by which all widths are divisible. Raises UserError otherwise."""
    said = part.hidden.get(name)
    value = default if said is None else said
    whole = type(value) in (int, float) and value >= 1 and value % 1 == 0
    if not whole or any(width % value for width in widths):
        raise UserError(f"{part.source}: by its metadata or config.json {name} is {value!r}, but must be a whole "
                        f"number that divides {', '.join(map(str, widths))}{part.advice}")  # fmt: skip
    return int(value)


def level_widths(part: Part, first: str, of_level: str) -> list[int]:
    """The channels of a network's first convolution and of its four levels."""
    return [part.shape(name)[0] for name in (first, *(of_level.format(level, 3 * level + 1) for level in range(4)))]


def unet_config(part: Part) -> UNetConfig:
    """Of a UNet, or of the UNet that a ControlNet was copied from."""
    widths = level_widths(part, "encoder.0.conv.weight", "encoder.{1}.resnet.conv2.weight")
    in_channels, latent_channels = part.shape("encoder.0.conv.weight")[1], UNetConfig().in_channels
    if in_channels != latent_channels:
        raise part.error("encoder.0.conv.weight", f"takes {in_channels} channels, but latents have {latent_channels}",
                         "; an inpainting or InstructPix2Pix model does not fit")  # fmt: skip
    return UNetConfig(
        model_channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths[1:]),
        context_dim=part.shape("encoder.1.transformer.cross_attention.to_k.weight", 2)[1],
        num_heads=hidden_size(part, "num_heads", UNetConfig().num_heads, widths),
        norm_groups=hidden_size(part, "norm_groups", UNetConfig().norm_groups, widths),
    )


def vae_config(part: Part) -> VAEConfig:
    widths = level_widths(part, "encoder.conv_in.weight", "encoder.levels.{0}.resnets.0.conv2.weight")
    return VAEConfig(
        channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths[1:]),
        norm_groups=hidden_size(part, "norm_groups", VAEConfig().norm_groups, widths),
    )


def text_config(part: Part) -> CLIPTextConfig:
    vocab_size, width = part.shape("token_embedding.weight", 2)
    return CLIPTextConfig(
        vocab_size=vocab_size,
        width=width,
        mlp_width=part.shape("layers.0.mlp_in.weight", 2)[0],
        num_layers=len({name.split(".")[1] for name in part.tensors if name.startswith("layers.")}),
        num_heads=hidden_size(part, "num_heads", CLIPTextConfig().num_heads, [width]),
        max_length=part.shape("position_embedding.weight", 2)[0],
    )


def base_sizes(unet: Part, vae: Part, text: Part) -> dict:
    """Arguments of StableDiffusion, the scale of the latents only where the file says it."""
    sizes = {"unet": unet_config(unet), "vae": vae_config(vae), "text": text_config(text)}
    scales = [part.hidden.get("latent_scale") for part in (unet, vae)]  # the UNet's: it was trained with that
    if (scale := next((scale for scale in scales if scale is not None), None)) is None:
        return sizes
    if not isinstance(scale, int | float) or not 0 < scale < LARGEST:
        raise UserError(f"{vae.source}: by its metadata or config.json the scale of latents is {scale!r}: correct it")
    return sizes | {"latent_scale": scale}


def hint_channels(part: Part) -> tuple[int, ...]:
    """The widths of a ControlNet's hint encoder, of which each but the last has two convolutions."""
    in_channels = part.shape("hint_encoder.0.weight")[1]
    if in_channels != 3:
        told = f"takes {in_channels} hint channels, only 3 are read"
        raise part.error("hint_encoder.0.weight", told, "; pass a ControlNet for RGB hints")
    return tuple(part.shape(f"hint_encoder.{i}.weight")[0] for i in (0, 4, 8, 12))
