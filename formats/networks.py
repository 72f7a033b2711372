"""One network out of any file or folder: a base's UNet, VAE or text encoder, or a ControlNet. And a base's words.

Its widths and depths are read off its tensors' shapes. What no shape shows, heads, norm groups and the latents' scale,
our own metadata or a config.json says; else they are Stable Diffusion 1.5's.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor, nn

from clip_text import CLIPTextConfig, CLIPTextModel, Tokenizer
from controlnet import ControlNet
from formats import diffusers
from formats.layouts import BARE, BARE_VAE, OFFICIAL, OWN, SHORT_TEXT, Part
from formats.wrong_files import likely_cause
from support.checkpoints import STATE, is_checkpoint, read_trained
from support.errors import DAMAGE, UserError, reading
from support.files import read_json, read_tensors
from support.hub import fetch
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig

LAYOUTS = {network: [layout, *diffusers.LAYOUTS[network]] for network, layout in OFFICIAL.items()}
LAYOUTS[CLIPTextModel].append(SHORT_TEXT)
LAYOUTS[AutoencoderKL].append(BARE_VAE)
LAYOUTS[ControlNet] += [BARE, OWN]
PREFIXES = tuple(layout.prefix for layout in OFFICIAL.values())
WRAPPERS = ("_orig_mod.", "module.", "controlnet.")  # before all names: torch.compile's, DataParallel's, a trainer's
TRAINERS = ("loss.", "model_ema.")  # what a VAE was trained with, beside it
# CLIP's position_ids are just 0 to 76, its projection is for comparing texts with pictures.
UNUSED = ("embeddings.position_ids", "text_projection.weight")
HIDDEN = ("num_heads", "norm_groups")  # sizes of a UNet that no shape shows
KEYS = {UNet: "unet", AutoencoderKL: "vae", CLIPTextModel: "text"}  # in our metadata of a base


def pick(tensors: Mapping[str, Tensor], network: type[nn.Module], source: object, metadata=None) -> Part:
    """A network's tensors out of all in a file, in the first of the known layouts that the file has.

    In official files all names with no network's prefix are ignored: buffers that follow from the noise schedule, as
    betas, and running averages of the weights, model_ema.*.
    """
    while os.path.commonprefix(list(tensors)).startswith(WRAPPERS):
        tensors = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}
    layout = next((layout for layout in LAYOUTS[network] if layout.mark in tensors), OFFICIAL[network])
    others = () if layout.prefix else (*PREFIXES, *TRAINERS)
    own = [name for name in tensors if name.startswith(layout.prefix) and not name.startswith(others)]
    picked = {layout.ours(name): tensors[name] for name in own if not name.endswith(UNUSED)}
    if network is AutoencoderKL:  # in diffusers' files linear layers, here 1x1 convolutions
        picked |= {name: tensor[..., None, None] for name, tensor in picked.items() if tensor.ndim == 2}
    advice, metadata = likely_cause(tensors, network is ControlNet), metadata or {}
    return Part(picked, layout, str(source), advice, metadata, sizes_in_metadata(metadata, network))


def read_network(path: Path, network: type[nn.Module]) -> Part:
    """A network out of a file, or out of its own folder in diffusers' layout.

    A config.json counts in such a folder, and beside a file that has that layout and one of diffusers' names.
    """
    file = diffusers.weights_in(path) if path.is_dir() else path
    tensors, metadata = read_tensors(file)
    if "difference" in tensors:  # it fits by all its names
        raise UserError(f"{path} holds differences to a base's weights, not weights: pass the full ControlNet that "
                        "they were extracted from")  # fmt: skip
    part, settings = pick(tensors, network, file, metadata), file.with_name("config.json")
    counts = part.layout.name == "diffusers" and (path.is_dir() or file.name.split(".")[0] in diffusers.NAMES)
    return replace(part, hidden=diffusers.read_settings(settings)) if counts and settings.is_file() else part


def read_base(path: Path, vae: Path | None = None) -> list[Part]:
    """A base's UNet, VAE (out of `vae`, if given) and text encoder, out of a file or a folder in diffusers' layout.

    Each from a mapping of its own, so that one that is let go gives its memory back.
    """
    places = {network: path / folder if path.is_dir() else path for network, folder in diffusers.FOLDERS.items()}
    if vae:
        places[AutoencoderKL] = vae
    if missing := [place.name for place in places.values() if place.parent == path and not place.is_dir()]:
        raise UserError(f"{path} has no {missing[0]}/ in it: pass a base's folder in diffusers' layout, or a single "
                        "file")  # fmt: skip
    schedule = path / "scheduler" / "scheduler_config.json"
    if schedule.is_file():  # the sampler that it names does not matter, the diffusion process does
        diffusers.check_settings(schedule, diffusers.SCHEDULE_DEFAULTS | read_json(schedule), diffusers.SCHEDULE)
    return [read_network(place, network) for network, place in places.items()]


def read_controlnet(path: Path) -> Part:
    """A ControlNet out of a file, a folder in diffusers' layout, or a checkpoint of train.py."""
    folder = path.parent if path.name == STATE else path
    if is_checkpoint(folder):
        return pick(read_trained(folder)[0], ControlNet, folder)
    return read_network(path, ControlNet)


def refuse_own(part: Part) -> None:
    """For other programs: refuse what only this project reads."""
    if part.layout is OWN:
        what = "ControlNet-lite: keep it as it is" if part.lite else "checkpoint: pass the run's controlnet.safetensors"
        raise UserError(f"no other program can read {part.source}, a {what}")


def read_tokenizer(base: Path, vocab_size: int, repo: str) -> Tokenizer:
    """Its merges are in a file beside a base or in its folder, in tokenizer/ there, or in the hub's `repo`."""
    folder = base if base.is_dir() else base.parent
    names = ("merges.txt", "tokenizer/merges.txt", "tokenizer/tokenizer.json")  # transformers 5 writes the last alone
    if (merges := next((folder / name for name in names if (folder / name).is_file()), None)) is None:
        merges = fetch(repo, "tokenizer/merges.txt", f"put the tokenizer's merges.txt beside {base}")
    with reading(merges, "list of BPE merges", damage=(*DAMAGE, TypeError)):
        if merges.suffix == ".json":
            pairs = json.loads(merges.read_bytes())["model"]["merges"]
            tokenizer = Tokenizer([tuple(pair.split() if isinstance(pair, str) else pair) for pair in pairs])
        else:
            tokenizer = Tokenizer.from_merges(merges)
    if len(tokenizer.ids) != vocab_size:
        raise UserError(f"{merges} makes {len(tokenizer.ids)} tokens, but {base} was trained with {vocab_size}: put "
                        "the merges.txt that belongs to it beside it")  # fmt: skip
    return tokenizer


def config_metadata(sd) -> dict[str, str]:
    """The sizes of a StableDiffusion, for its file's metadata."""
    configs = {"text": asdict(sd.text_encoder.config), "vae": asdict(sd.vae.config), "unet": asdict(sd.unet.config)}
    return {"config": json.dumps(configs | {"latent_scale": sd.latent_scale})}


def own_metadata(metadata: dict[str, str], *keys: str) -> dict:
    """What we wrote under these keys, one in the other, of a file's metadata; empty if another program wrote it."""
    try:
        content = json.loads(metadata[keys[0]])
        for key in keys[1:]:
            content = content[key]
    except (ValueError, RecursionError, LookupError, TypeError):
        content = None
    return content if isinstance(content, dict) else {}


def sizes_in_metadata(metadata: dict[str, str], network: type[nn.Module]) -> dict[str, object]:
    """What our metadata says of a network's sizes, unchecked."""
    if network is ControlNet:  # the sizes of the UNet that it was copied from
        return own_metadata(metadata, "unet")
    scale = own_metadata(metadata, "config").get("latent_scale")
    return own_metadata(metadata, "config", KEYS[network]) | {"latent_scale": scale}


def hidden_size(part: Part, name: str, default: int, widths: Sequence[int]) -> int:
    """A size that no shape shows, by which all widths must be divisible."""
    value = default if part.hidden.get(name) is None else part.hidden[name]
    if type(value) is not int or value < 1 or any(width % value for width in widths):
        raise UserError(f"{part.source}: by its metadata or config.json {name} is {value!r}, but must be a whole "
                        f"number that divides {', '.join(map(str, widths))}{part.advice}")  # fmt: skip
    return value


def level_sizes(part: Part, first: str, of_level: str) -> tuple[list[int], dict]:
    """The channels of a network's first convolution and of its four levels; what configs of both kinds say of them."""
    widths = [part.shape(name)[0] for name in (first, *(of_level.format(level, 3 * level + 1) for level in range(4)))]
    norm_groups = hidden_size(part, "norm_groups", UNetConfig().norm_groups, widths)
    return widths, {"channel_mult": tuple(width // widths[0] for width in widths[1:]), "norm_groups": norm_groups}


def unet_config(part: Part) -> UNetConfig:
    """Of a UNet, or of the UNet that a ControlNet was copied from."""
    widths, sizes = level_sizes(part, "encoder.0.conv.weight", "encoder.{1}.resnet.conv2.weight")
    in_channels, latent_channels = part.shape("encoder.0.conv.weight")[1], UNetConfig().in_channels
    if in_channels != latent_channels:
        raise part.error("encoder.0.conv.weight", f"takes {in_channels} channels, but latents have {latent_channels}",
                         "; an inpainting or InstructPix2Pix model does not fit")  # fmt: skip
    context_dim = part.shape("encoder.1.transformer.cross_attention.to_k.weight", 2)[1]
    num_heads = hidden_size(part, "num_heads", UNetConfig().num_heads, widths)
    return UNetConfig(model_channels=widths[0], context_dim=context_dim, num_heads=num_heads, **sizes)


def vae_config(part: Part) -> VAEConfig:
    widths, sizes = level_sizes(part, "encoder.conv_in.weight", "encoder.levels.{0}.resnets.0.conv2.weight")
    return VAEConfig(channels=widths[0], **sizes)


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
    scale = unet.hidden.get("latent_scale")  # with which it was trained, whatever VAE is taken
    scale = vae.hidden.get("latent_scale") if scale is None else scale
    if not isinstance(scale, int | float | None) or scale is not None and not 0 < scale < math.inf:
        raise UserError(f"{vae.source}: by its metadata or config.json the scale of latents is {scale!r}: correct it")
    sizes = {"unet": unet_config(unet), "vae": vae_config(vae), "text": text_config(text)}
    return sizes if scale is None else sizes | {"latent_scale": scale}


def hint_channels(part: Part) -> tuple[int, ...]:
    """The widths of a ControlNet's hint encoder, of which each but the last has two convolutions."""
    if (in_channels := part.shape("hint_encoder.0.weight")[1]) != 3:
        raise part.error("hint_encoder.0.weight", f"takes {in_channels} hint channels, only 3 are read",
                         "; pass a ControlNet for RGB hints")  # fmt: skip
    return tuple(part.shape(f"hint_encoder.{i}.weight")[0] for i in (0, 4, 8, 12))
