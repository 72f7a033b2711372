"""The sizes of the models in a file, from its metadata or its tensors' shapes, and the tokenizer that belongs to it."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from support.errors import UserError, reading

import torch

from clip_text import CLIPTextConfig, Tokenizer
from support.files import read_json
from support.formats import Part
from support.hub import fetch
from unet import UNetConfig
from vae import VAEConfig

HIDDEN = ("num_heads", "norm_groups")  # sizes of a UNet that no tensor's shape shows


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
    config = own_metadata(metadata, "config")
    with sizes_of(source):
        sizes = sizes_from_metadata(config) if "unet" in config else sizes_from_shapes(*parts)
    check_sizes(source, sizes)
    return sizes


def own_metadata(metadata: Mapping[str, str], key: str) -> dict:
    """What we wrote under this key of a file's metadata; empty where another program put something else there."""
    try:
        content = json.loads(metadata.get(key, "{}"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def sizes_from_metadata(config: dict) -> dict:
    kinds = {"unet": UNetConfig, "vae": VAEConfig, "text": CLIPTextConfig}
    sizes = {part: {k: tuple(v) if isinstance(v, list) else v for k, v in config[part].items()} for part in kinds}
    return {part: kinds[part](**sizes[part]) for part in kinds} | {"latent_scale": config["latent_scale"]}


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


def is_scale(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


def check_sizes(source: str | Path, sizes: dict) -> None:
    """Raise UserError for a UNet that takes more than latents, and for sizes that only fail when they are used."""
    unet, vae, text = (sizes[part] for part in ("unet", "vae", "text"))
    if unet.in_channels != vae.latent_channels:
        raise UserError(
            f"{source}: its UNet takes {unet.in_channels} channels, but latents have {vae.latent_channels}: an "
            "inpainting or InstructPix2Pix model can't serve as the base"
        )
    scale = sizes.get("latent_scale", 1.0)
    if not is_scale(scale):
        raise UserError(f"{source}: its latent_scale is {scale}, but must be above 0: fetch it again")
    widths = [(unet.model_channels * mult, unet.num_heads) for mult in unet.channel_mult]
    for width, heads in [*widths, (text.width, text.num_heads)]:
        if heads < 1 or width % heads:
            raise UserError(f"{source}: {width} channels make no {heads} heads: pass another model")


def refuse_other_sizes(source: str | Path, hidden: Mapping[str, int], config: UNetConfig) -> None:
    """Raise UserError for a ControlNet whose `hidden` sizes differ from those of the base's UNet."""
    for name, size in hidden.items():
        if getattr(config, name) != size:
            raise UserError(f"{source}: was copied from a base with {name} {size}, this one has "
                            f"{getattr(config, name)}: pass the base that it was trained with")  # fmt: skip


def read_tokenizer(checkpoint: Path, vocab_size: int, repo: str) -> Tokenizer:
    """Read the list of merges beside a checkpoint or in its folder, in tokenizer/ there, or in the hub's `repo`.

    That is merges.txt, or the tokenizer.json that transformers writes since its version 5. Raises UserError.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    places = [folder / name for name in ("merges.txt", "tokenizer/merges.txt", "tokenizer/tokenizer.json")]
    merges = next((place for place in places if place.is_file()), None)
    if merges is None:
        merges = fetch(repo, "tokenizer/merges.txt", f"put the tokenizer's merges.txt beside {checkpoint}")
    with reading(merges, "list of BPE merges"):
        if merges.suffix == ".json":
            pairs = read_json(merges)["model"]["merges"]
            tokenizer = Tokenizer([tuple(pair.split() if isinstance(pair, str) else pair) for pair in pairs])
        else:
            tokenizer = Tokenizer.from_merges(merges)
    if len(tokenizer.ids) != vocab_size:
        raise UserError(
            f"{merges} makes {len(tokenizer.ids)} tokens, but {checkpoint} was trained with {vocab_size}: "
            "put the merges.txt that belongs to the checkpoint beside it"
        )
    return tokenizer
