"""Other programs' files: what they call our tensors, what sizes their models have, and why one does not fit.

weights.py, where the official names are, imports this file; so this file must not import weights.py.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from clip_text import CLIPTextConfig, Tokenizer
from controlnet import ControlNet
from support.errors import UserError, reading
from support.files import read_json, read_tensors, save_json, save_tensors
from support.hub import fetch
from unet import UNetConfig
from vae import VAEConfig

# ---------------------------------------------------------------------------------------------------------------
# Names, in both directions. A rule is a pair of templates in which {i} and {j} stand for numbers. It applies to a
# name without its last part (weight, bias), and no name fits two rules of a layout.

Rules = list[tuple[str, str]]  # (ours, theirs)


def nest(ours: str, theirs: str, rules: Rules) -> Rules:
    """The rules of a submodule that is called `ours` here and `theirs` there."""
    return [(f"{ours}.{a}", f"{theirs}.{b}") for a, b in rules]


@cache
def pattern(template: str) -> re.Pattern:
    return re.compile(re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{j\}", r"(?P<j>\d+)"))


def translate(name: str, rules: Rules) -> str | None:
    """A tensor name from the left side of the rules to the right one; None if no rule fits."""
    stem, _, leaf = name.rpartition(".")
    for left, right in rules:
        if match := pattern(left).fullmatch(stem):
            return f"{right.format(**match.groupdict())}.{leaf}"
    return None


@dataclass(frozen=True)
class Layout:
    """What a file calls the tensors of one network: `prefix`, then our name translated by `rules`.

    A name that no rule fits is the same in both. `kind` is the kind of file, "base model" or "ControlNet". Names that
    begin like one of `others` are not the network's.
    """

    name: str
    kind: str
    rules: Rules
    prefix: str = ""
    others: tuple[str, ...] = ()

    def theirs(self, name: str) -> str:
        """Our name -> the file's."""
        translated = translate(name, self.rules)
        return name if translated is None else self.prefix + translated

    def ours(self, name: str) -> str:
        """The file's name -> ours."""
        reversed_rules = [(theirs, ours) for ours, theirs in self.rules]
        return translate(name.removeprefix(self.prefix), reversed_rules) or name

    def pick(self, tensors: Mapping[str, Tensor], source: str | Path) -> "Part":
        """The network's tensors out of all in a file. `source` names the file in errors."""
        own = [name for name in tensors if name.startswith(self.prefix) and not name.startswith(self.others)]
        advice = likely_cause(tensors, self.kind)
        return Part({self.ours(name): tensors[name] for name in own}, self, str(source), advice)


@dataclass(frozen=True)
class Part:
    """One network's tensors from a file, under our names, and what an error message needs to know about the file."""

    tensors: dict[str, Tensor]
    layout: Layout
    source: str
    advice: str  # the end of an error's message

    def error(self, name: str, problem: str) -> UserError:
        """An error about one tensor, under the name that it has in the file."""
        return UserError(f"{self.source}: {self.layout.theirs(name)} {problem}{self.advice}")

    def shape(self, name: str) -> list[int]:
        """Raises UserError when there is no such tensor."""
        if name not in self.tensors:
            raise self.error(name, "is missing")
        return list(self.tensors[name].shape)


def likely_cause(tensors: Mapping[str, Tensor], wanted: str) -> str:
    """The end of an error message: what a file that does not fit as `wanted` probably is, and what to do."""

    def has(*fragments: str) -> bool:
        return any(fragment in name for name in tensors for fragment in fragments)

    base = has("model.diffusion_model.", "down_blocks.")
    controlnet = has("control_model.", "controlnet_cond_embedding.", "input_hint_block.", "hint_encoder.")
    to_k = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    if has("lora_up", "lora_down", "lora_A", "lora_B", "_lora.", "lora_unet_", "lora_te_"):
        return "; this looks like a LoRA, which only modifies a base model: pass a full checkpoint"
    if has("conditioner.embedders."):
        return "; this looks like SDXL: only Stable Diffusion 1.x and its descendants fit"
    if has("cond_stage_model.model.") or (to_k in tensors and tensors[to_k].shape[-1:] == (1024,)):
        return "; this looks like Stable Diffusion 2.x: only 1.x and its descendants fit"
    if wanted == "base model" and controlnet and not has("model.diffusion_model."):
        return "; this looks like a ControlNet, not a base model: pass it as a ControlNet"
    if wanted == "ControlNet" and base and not controlnet:
        return "; this looks like a base model, not a ControlNet: pass it as the base"
    if wanted == "base model" and has("down_blocks."):
        return "; this looks like diffusers' layout: pass the single-file checkpoint (.safetensors) instead"
    if wanted == "ControlNet":
        return "; pass a ControlNet for Stable Diffusion 1.x, trained for a base of this size"
    return "; pass a checkpoint of Stable Diffusion 1.x"


# ---------------------------------------------------------------------------------------------------------------
# Sizes, from metadata or shapes


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


def read_sizes(path: Path, metadata: Mapping[str, str], unet: Part, vae: Part, text: Part) -> dict:
    """Arguments of StableDiffusion: the configs of a checkpoint's three networks, and latent_scale if it is given.

    All from the metadata, or else widths and depths from the shapes and the rest as in Stable Diffusion 1.x: heads,
    norm groups, the scale. To be called within `sizes_of`. Raises UserError for a UNet that takes more than latents.
    """
    sizes = sizes_from_metadata(metadata) if "config" in metadata else sizes_from_shapes(unet, vae, text)
    channels, latent_channels = sizes["unet"].in_channels, sizes["vae"].latent_channels
    if channels != latent_channels:
        raise UserError(
            f"{path}: its UNet takes {channels} channels, but latents have {latent_channels}: an inpainting or "
            "InstructPix2Pix model can't serve as the base"
        )
    return sizes


def sizes_from_metadata(metadata: Mapping[str, str]) -> dict:
    config = json.loads(metadata["config"])
    kinds = {"unet": UNetConfig, "vae": VAEConfig, "text": CLIPTextConfig}
    sizes = {part: {k: tuple(v) if isinstance(v, list) else v for k, v in config[part].items()} for part in kinds}
    latent_scale = float(config["latent_scale"])
    if not 0 < latent_scale < math.inf:
        raise ValueError(f"latent_scale {latent_scale}")
    return {part: kinds[part](**sizes[part]) for part in kinds} | {"latent_scale": latent_scale}


def config_metadata(sd) -> dict[str, str]:
    """The sizes, for the metadata of `sd`'s file: shapes do not show a miniature's heads, norm groups and scale."""
    configs = {"text": asdict(sd.text_encoder.config), "vae": asdict(sd.vae.config), "unet": asdict(sd.unet.config)}
    return {"config": json.dumps(configs | {"latent_scale": sd.latent_scale})}


def sizes_from_shapes(unet: Part, vae: Part, text: Part) -> dict:
    vae_width, vae_levels = vae.shape("encoder.conv_in.weight")[0], range(len(VAEConfig().channel_mult))
    widths = (vae.shape(f"encoder.levels.{level}.resnets.0.conv2.weight")[0] for level in vae_levels)
    vocab_size, text_width = text.shape("token_embedding.weight")
    return {
        "unet": unet_config(unet, out_channels=unet.shape("conv_out.weight")[0]),
        "vae": VAEConfig(
            channels=vae_width,
            channel_mult=tuple(width // vae_width for width in widths),
            latent_channels=vae.shape("from_latent.weight")[0],
        ),
        "text": CLIPTextConfig(
            vocab_size=vocab_size,
            width=text_width,
            mlp_width=text.shape("layers.0.mlp_in.weight")[0],
            num_layers=len({name.split(".")[1] for name in text.tensors if name.startswith("layers.")}),
            max_length=text.shape("position_embedding.weight")[0],
        ),
    }


def read_tokenizer(checkpoint: Path, vocab_size: int, repo: str) -> Tokenizer:
    """Read the merges.txt beside a checkpoint, in tokenizer/ beside it, or in the hub's `repo`. Raises UserError."""
    places = (checkpoint.parent / "merges.txt", checkpoint.parent / "tokenizer" / "merges.txt")
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


# ---------------------------------------------------------------------------------------------------------------
# diffusers' ControlNetModel

DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
DIFFUSERS_RESNET = [
    ("norm1", "norm1"), ("conv1", "conv1"), ("time_proj", "time_emb_proj"),
    ("norm2", "norm2"), ("conv2", "conv2"), ("shortcut", "conv_shortcut"),
]  # fmt: skip


def diffusers_layout(transformer: Rules, others: tuple[str, ...]) -> Layout:
    """It numbers the blocks level by level, and keeps the official names inside a transformer: `transformer`."""
    rules = [
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("encoder.0.conv", "conv_in"),
        *[(f"encoder.{3 * level + 3}.downsample", f"down_blocks.{level}.downsamplers.0.conv") for level in range(3)],
        *nest("middle.resnet1", "mid_block.resnets.0", DIFFUSERS_RESNET),
        *nest("middle.transformer", "mid_block.attentions.0", transformer),
        *nest("middle.resnet2", "mid_block.resnets.1", DIFFUSERS_RESNET),
        ("zero_convs.{i}", "controlnet_down_blocks.{i}"),
        ("middle_zero_conv", "controlnet_mid_block"),
        ("hint_encoder.0", "controlnet_cond_embedding.conv_in"),
        *[(f"hint_encoder.{2 * i + 2}", f"controlnet_cond_embedding.blocks.{i}") for i in range(6)],
        ("hint_encoder.14", "controlnet_cond_embedding.conv_out"),
    ]
    for level in range(4):
        for i in range(2):
            block = f"encoder.{3 * level + 1 + i}"
            rules += nest(f"{block}.resnet", f"down_blocks.{level}.resnets.{i}", DIFFUSERS_RESNET)
            rules += nest(f"{block}.transformer", f"down_blocks.{level}.attentions.{i}", transformer)
    return Layout("diffusers", "ControlNet", rules, others=others)


def read_folder(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors in a ControlNet's diffusers folder, and metadata as in our own files. Raises UserError."""
    names = (DIFFUSERS_FILE, "diffusion_pytorch_model.bin")
    file = next((Path(folder) / name for name in names if (Path(folder) / name).is_file()), None)
    if file is None:
        raise UserError(
            f"{folder}: no {DIFFUSERS_FILE} in this folder; pass a ControlNet's file or its diffusers folder"
        )
    tensors, metadata = read_tensors(file)
    if (config := file.with_name("config.json")).is_file():
        settings = read_json(config)
        hidden = {"num_heads": settings.get("attention_head_dim"), "norm_groups": settings.get("norm_num_groups")}
        metadata |= {"unet": json.dumps({name: size for name, size in hidden.items() if isinstance(size, int)})}
    return tensors, metadata


def save_folder(controlnet: ControlNet, layout: Layout, folder: Path) -> None:
    tensors = {layout.theirs(name): tensor for name, tensor in controlnet.state_dict().items()}
    save_tensors(tensors, folder / DIFFUSERS_FILE)
    save_json(diffusers_config(controlnet), folder / "config.json")


def diffusers_config(controlnet: ControlNet) -> dict:
    """config.json of diffusers' ControlNetModel."""
    config = controlnet.config
    levels = range(len(config.channel_mult))
    hint_convs = [m for m in controlnet.hint_encoder if isinstance(m, nn.Conv2d)]
    return {
        "_class_name": "ControlNetModel",
        "act_fn": "silu",
        "attention_head_dim": config.num_heads,  # diffusers' name for the number of heads in SD 1.x
        "block_out_channels": [config.model_channels * mult for mult in config.channel_mult],
        "conditioning_embedding_out_channels": [conv.out_channels for conv in hint_convs[:-1:2]],
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
