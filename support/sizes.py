"""The sizes of the models in a file, from its metadata or its tensors' shapes, and the tokenizer that belongs to it."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from clip_text import CLIPTextConfig, Tokenizer
from support.errors import UserError, reading
from support.formats import Part
from support.hub import fetch
from unet import UNetConfig
from vae import VAEConfig


@contextlib.contextmanager
def sizes_of(source: str | Path) -> Iterator[None]:
    """For reading a model's sizes off a file and building it on the meta device: UserError if they make no model."""
    try:
        with torch.device("meta"):
            yield
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(
            f"{source}: the sizes in its metadata or shapes make no model of Stable Diffusion 1.x ({error!r}): "
            "fetch it again"
        ) from None


def unet_config(part: Part, **hidden: int) -> UNetConfig:
    """The sizes of a UNet, or of the UNet that a ControlNet was copied from. `hidden` are those no shape shows."""
    levels = range(len(UNetConfig().channel_mult))
    width, in_channels = part.shape("encoder.0.conv.weight")[:2]
    return UNetConfig(
        in_channels=in_channels,
        model_channels=width,
        channel_mult=tuple(part.shape(f"encoder.{3 * level + 1}.resnet.conv2.weight")[0] // width for level in levels),
        attention_levels=tuple(
            level for level in levels if f"encoder.{3 * level + 1}.transformer.norm.weight" in part.tensors
        ),
        context_dim=part.shape("encoder.1.transformer.cross_attention.to_k.weight")[1],
        **hidden,
    )


def hint_channels(part: Part) -> tuple[int, ...]:
    """The widths of a ControlNet's hint encoder, of which each but the last has two convolutions."""
    return tuple(part.shape(f"hint_encoder.{i}.weight")[0] for i in (0, 4, 8, 12))


def read_sizes(source: str | Path, metadata: Mapping[str, str], parts: Sequence[Part]) -> dict:
    """Arguments of StableDiffusion, from a file's metadata or else from the shapes of its UNet, VAE and text encoder.

    Raises UserError where they make no Stable Diffusion 1.x.
    """
    with sizes_of(source):
        sizes = sizes_from_metadata(metadata) if "config" in metadata else sizes_from_shapes(*parts)
    refuse_more_channels(source, sizes)
    return sizes


def sizes_from_metadata(metadata: Mapping[str, str]) -> dict:
    config = json.loads(metadata["config"])
    kinds = {"unet": UNetConfig, "vae": VAEConfig, "text": CLIPTextConfig}
    sizes = {part: {k: tuple(v) if isinstance(v, list) else v for k, v in config[part].items()} for part in kinds}
    return {part: kinds[part](**sizes[part]) for part in kinds} | latent_scale(config["latent_scale"])


def config_metadata(sd) -> dict[str, str]:
    """The sizes, for the metadata of `sd`'s file: shapes do not show a miniature's heads, norm groups and scale."""
    configs = {"text": asdict(sd.text_encoder.config), "vae": asdict(sd.vae.config), "unet": asdict(sd.unet.config)}
    return {"config": json.dumps(configs | {"latent_scale": sd.latent_scale})}


def sizes_from_shapes(
    unet: Part, vae: Part, text: Part, hidden: Mapping[str, dict[str, int]] | None = None
) -> dict[str, UNetConfig | VAEConfig | CLIPTextConfig]:
    """Widths and depths from the shapes; what is `hidden` from these, for each part, is as in Stable Diffusion 1.x."""
    hidden = {"unet": {}, "vae": {}, "text": {}} | (hidden or {})
    vae_width, vae_levels = vae.shape("encoder.conv_in.weight")[0], range(len(VAEConfig().channel_mult))
    widths = (vae.shape(f"encoder.levels.{level}.resnets.0.conv2.weight")[0] for level in vae_levels)
    vocab_size, text_width = text.shape("token_embedding.weight")
    return {
        "unet": unet_config(unet, out_channels=unet.shape("conv_out.weight")[0], **hidden["unet"]),
        "vae": VAEConfig(
            channels=vae_width,
            channel_mult=tuple(width // vae_width for width in widths),
            latent_channels=vae.shape("from_latent.weight")[0],
            **hidden["vae"],
        ),
        "text": CLIPTextConfig(
            vocab_size=vocab_size,
            width=text_width,
            mlp_width=text.shape("layers.0.mlp_in.weight")[0],
            num_layers=len({name.split(".")[1] for name in text.tensors if name.startswith("layers.")}),
            max_length=text.shape("position_embedding.weight")[0],
            **hidden["text"],
        ),
    }


def latent_scale(value: object) -> dict[str, float]:
    scale = float(value)
    if not 0 < scale < math.inf:
        raise ValueError(f"latent_scale {scale}")
    return {"latent_scale": scale}


def refuse_more_channels(source: str | Path, sizes: dict) -> None:
    """Raise UserError for a UNet that takes more than latents."""
    channels, latent_channels = sizes["unet"].in_channels, sizes["vae"].latent_channels
    if channels != latent_channels:
        raise UserError(
            f"{source}: its UNet takes {channels} channels, but latents have {latent_channels}: an inpainting or "
            "InstructPix2Pix model can't serve as the base"
        )


def refuse_other_sizes(source: str | Path, hidden: Mapping[str, int], config: UNetConfig) -> None:
    """Raise UserError for a ControlNet whose `hidden` sizes differ from those of the base's UNet."""
    for name, size in hidden.items():
        if getattr(config, name) != size:
            raise UserError(f"{source}: was copied from a base with {name} {size}, this one has "
                            f"{getattr(config, name)}: pass the base that it was trained with")  # fmt: skip


def read_tokenizer(checkpoint: Path, vocab_size: int, repo: str) -> Tokenizer:
    """Read the merges.txt beside a checkpoint or in its folder, in tokenizer/ there, or in the hub's `repo`.

    Raises UserError.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    places = (folder / "merges.txt", folder / "tokenizer" / "merges.txt")
    merges = next((place for place in places if place.is_file()), None)
    if merges is None:
        merges = fetch(repo, "tokenizer/merges.txt", f"put the tokenizer's merges.txt beside {checkpoint}")
    with reading(merges, "list of BPE merges"):
        tokenizer = Tokenizer.from_merges(merges)
    if len(tokenizer.ids) != vocab_size:
        raise UserError(
            f"{merges} makes {len(tokenizer.ids)} tokens, but {checkpoint} was trained with {vocab_size}: "
            "put the merges.txt that belongs to the checkpoint beside it"
        )
    return tokenizer
