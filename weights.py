"""Official Stable Diffusion and ControlNet weights to our modules and back: names, loading, other programs' layouts.

One table of rules gives for each of our tensor names the official one; loading uses it the other way round.
Everything is checked: a missing, unknown or misshapen name inside a part is an error, never passed over.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from clip_text import CLIPTextModel
from controlnet import ControlNet
from files import ArgumentParser, UserError, read_json, read_tensors, run, save_json, save_tensors
from unet import UNet, UNetConfig
from vae import AutoencoderKL

# ---------------------------------------------------------------------------------------------------------------
# Names. Rules are (ours, official), {i} and {j} standing for numbers; a name's last part (.weight, .bias) follows.


def nest(ours: str, theirs: str, rules: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(f"{ours}.{a}", f"{theirs}.{b}") for a, b in rules]


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
VAE_RESNET = [(name, name) for name in ("norm1", "conv1", "norm2", "conv2")] + [("shortcut", "nin_shortcut")]
VAE_SIDES = [  # the same names in encoder and decoder
    ("conv_in", "conv_in"), ("norm_out", "norm_out"), ("conv_out", "conv_out"),
    *nest("middle.resnet1", "mid.block_1", VAE_RESNET), *nest("middle.resnet2", "mid.block_2", VAE_RESNET),
    *[(f"middle.attention.{a}", f"mid.attn_1.{b}")
      for a, b in (("norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out", "proj_out"))],
]  # fmt: skip
RULES: dict[type[nn.Module], list[tuple[str, str]]] = {
    UNet: [
        *ENCODER,
        *nest("decoder.{i}.resnet", "output_blocks.{i}.0", RESNET),
        *nest("decoder.{i}.transformer", "output_blocks.{i}.1", TRANSFORMER),
        ("decoder.2.upsample.conv", "output_blocks.2.1.conv"),  # the block without a transformer
        ("decoder.{i}.upsample.conv", "output_blocks.{i}.2.conv"),
        ("norm_out", "out.0"),
        ("conv_out", "out.2"),
    ],
    ControlNet: [
        *ENCODER,
        ("hint_encoder.{i}", "input_hint_block.{i}"),
        ("zero_convs.{i}", "zero_convs.{i}.0"),
        ("middle_zero_conv", "middle_block_out.0"),
    ],
    AutoencoderKL: [
        *nest("encoder", "encoder", VAE_SIDES),
        *nest("encoder.levels.{i}.resnets.{j}", "encoder.down.{i}.block.{j}", VAE_RESNET),
        ("encoder.levels.{i}.resample.conv", "encoder.down.{i}.downsample.conv"),
        *nest("decoder", "decoder", VAE_SIDES),
        *nest("decoder.levels.{i}.resnets.{j}", "decoder.up.{i}.block.{j}", VAE_RESNET),
        ("decoder.levels.{i}.resample.conv", "decoder.up.{i}.upsample.conv"),
        ("to_moments", "quant_conv"),
        ("from_latent", "post_quant_conv"),
    ],
    CLIPTextModel: [
        ("token_embedding", "embeddings.token_embedding"),
        ("position_embedding", "embeddings.position_embedding"),
        *nest("layers.{i}", "encoder.layers.{i}", [
            ("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("mlp_in", "mlp.fc1"), ("mlp_out", "mlp.fc2"),
            *[(f"attention.{a}", f"self_attn.{b}_proj")
              for a, b in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out", "out"))],
        ]),
        ("norm_out", "final_layer_norm"),
    ],
}  # fmt: skip
PREFIXES = {
    UNet: "model.diffusion_model.",
    AutoencoderKL: "first_stage_model.",
    CLIPTextModel: "cond_stage_model.transformer.text_model.",
    ControlNet: "control_model.",
}
# In official files and rightly left out. Outside every part: the buffers that follow from the schedule (betas,
# alphas_cumprod, alphas_cumprod_prev, sqrt_…, log_…, posterior_…) and running averages (model_ema.*). Inside one:
IGNORED = {"cond_stage_model.transformer.text_model.embeddings.position_ids"}
# diffusers' ControlNetModel counts by levels and lays the hint encoder out by hand.
DIFFUSERS_RESNET = [
    ("norm1", "norm1"), ("conv1", "conv1"), ("time_proj", "time_emb_proj"),
    ("norm2", "norm2"), ("conv2", "conv2"), ("shortcut", "conv_shortcut"),
]  # fmt: skip
DIFFUSERS = [
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("encoder.0.conv", "conv_in"),
    ("hint_encoder.0", "controlnet_cond_embedding.conv_in"),
    *[(f"hint_encoder.{2 * i + 2}", f"controlnet_cond_embedding.blocks.{i}") for i in range(6)],
    ("hint_encoder.14", "controlnet_cond_embedding.conv_out"),
    *[
        rule
        for level in range(4)
        for j in range(2)
        for rule in (
            *nest(f"encoder.{3 * level + j + 1}.resnet", f"down_blocks.{level}.resnets.{j}", DIFFUSERS_RESNET),
            *nest(f"encoder.{3 * level + j + 1}.transformer", f"down_blocks.{level}.attentions.{j}", TRANSFORMER),
        )
    ],
    *[(f"encoder.{3 * i + 3}.downsample", f"down_blocks.{i}.downsamplers.0.conv") for i in range(3)],
    *nest("middle.resnet1", "mid_block.resnets.0", DIFFUSERS_RESNET),
    *nest("middle.transformer", "mid_block.attentions.0", TRANSFORMER),
    *nest("middle.resnet2", "mid_block.resnets.1", DIFFUSERS_RESNET),
    ("zero_convs.{i}", "controlnet_down_blocks.{i}"),
    ("middle_zero_conv", "controlnet_mid_block"),
]


# The hint encoder's convolutions whose widths are free, for reading them off a file.
HINT_WIDTHS = [f"hint_encoder.{i}.weight" for i in (0, 4, 8, 12)]


@cache
def pattern(template: str) -> re.Pattern:
    return re.compile(re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{j\}", r"(?P<j>\d+)"))


def translate(name: str, rules: list[tuple[str, str]]) -> str:
    """Our tensor name in the rules' other layout. Raises KeyError when no rule fits."""
    stem, leaf = name.rsplit(".", 1)
    for ours, theirs in rules:
        if match := pattern(ours).fullmatch(stem):
            return f"{theirs.format(**match.groupdict())}.{leaf}"
    raise KeyError(f"no rule for {name}")


def rename(module: nn.Module, rules: list[tuple[str, str]], prefix: str = "") -> dict[str, str]:
    """Our name -> the other layout's name, for every tensor of the module."""
    return {name: prefix + translate(name, rules) for name in module.state_dict()}


def official_layout(module: nn.Module) -> dict[str, str]:
    if isinstance(module, ControlNet) and module.lite:  # the ablation has no official form
        return {name: name for name in module.state_dict()}
    return rename(module, RULES[type(module)], PREFIXES[type(module)])


def official_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a UNet, AutoencoderKL, CLIPTextModel or ControlNet under their full official names."""
    state = module.state_dict()
    return {theirs: state[ours] for ours, theirs in official_layout(module).items()}


# ---------------------------------------------------------------------------------------------------------------
# Loading


def likely_cause(tensors: Mapping[str, Tensor]) -> str:
    """What a file that does not fit probably is, as the end of a sentence, or nothing."""

    def has(*fragments: str) -> bool:
        return any(fragment in name for name in tensors for fragment in fragments)

    to_k = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    if has("lora_up", "lora_down", "lora_A", "lora_B", "_lora.", "lora_unet_", "lora_te_"):
        return "; this looks like a LoRA, which changes a base model and is none: pass a full checkpoint"
    if has("conditioner.embedders."):
        return "; this looks like SDXL: only Stable Diffusion 1.x and its descendants fit"
    if has("cond_stage_model.model.") or (to_k in tensors and tensors[to_k].shape[-1] == 1024):
        return "; this looks like Stable Diffusion 2.x: only 1.x and its descendants fit"
    if has("controlnet_cond_embedding."):
        return "; this looks like a ControlNet in diffusers' layout: pass it as a ControlNet"
    if has("down_blocks."):
        return "; this looks like diffusers' layout: pass the single-file checkpoint (.safetensors) instead"
    if has("control_model.") and not has("model.diffusion_model."):
        return "; this looks like a ControlNet, not a base model: pass it as a ControlNet"
    if has("model.diffusion_model.") and not has("control_model."):
        return "; this looks like a base model, not a ControlNet: pass it as the base"
    return ""


def fill(module: nn.Module, tensors: Mapping[str, Tensor], names: dict[str, str], prefix: str, source: str) -> None:
    """Give every tensor of `module` its value; `names` says under which name each stands in `tensors`.

    Parameters on the meta device take the tensors themselves (memory-mapped ones stay so) in the parameter's dtype,
    all others are overwritten in place.
    """
    state = module.state_dict()
    for ours, theirs in names.items():
        if theirs not in tensors:
            shape = list(state[ours].shape)
            raise UserError(f"{source}: {theirs} {shape} is missing{likely_cause(tensors)}")
        expected, found = list(state[ours].shape), list(tensors[theirs].shape)
        if expected != found:
            raise UserError(f"{source}: {theirs} has shape {found}, expected {expected}{likely_cause(tensors)}")
    known = set(names.values()) | IGNORED
    unknown = next((name for name in tensors if name.startswith(prefix) and name not in known), None)
    if unknown is not None:
        shape = list(tensors[unknown].shape)
        raise UserError(f"{source}: {unknown} {shape} is no part of the model{likely_cause(tensors)}")

    values = {ours: tensors[theirs].to(state[ours].dtype) for ours, theirs in names.items()}
    module.load_state_dict(values, assign=any(tensor.is_meta for tensor in state.values()))


def load_official(module: nn.Module, tensors: Mapping[str, Tensor], source: str = "checkpoint") -> None:
    """Load a UNet, AutoencoderKL, CLIPTextModel or ControlNet from tensors under their full official names.

    Other parts' tensors may stand beside them. `source` names the file in errors. Raises UserError for the first
    missing, misshapen or unknown name inside the part, with its shapes and the likely cause; the module is
    then as it was.
    """
    fill(module, tensors, official_layout(module), PREFIXES[type(module)], source)


def unet_config(shape: Callable[[str], list[int]], has: Callable[[str], bool], **others) -> UNetConfig:
    """Widths and depths of a UNet, or of the encoder that a ControlNet copies, read off its tensors' shapes.

    `shape` and `has` take our tensor names. `others` are fields that no shape shows: heads and norm groups.
    """
    levels = range(len(UNetConfig().channel_mult))
    width, in_channels = shape("encoder.0.conv.weight")[:2]
    return UNetConfig(
        in_channels=in_channels,
        model_channels=width,
        channel_mult=tuple(shape(f"encoder.{3 * level + 1}.resnet.conv2.weight")[0] // width for level in levels),
        attention_levels=tuple(level for level in levels if has(f"encoder.{3 * level + 1}.transformer.norm.weight")),
        context_dim=shape("encoder.1.transformer.cross_attention.to_k.weight")[1],
        **others,
    )


def open_controlnet(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str], Callable[[str], str], str]:
    """The tensors of a ControlNet's file or diffusers folder, its metadata, a function from our tensor names to
    the file's, and the layout's name. Raises UserError as read_tensors does, or when it is no ControlNet.
    """
    path, settings = Path(path), {}
    if path.is_dir():
        names = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
        files = [path / name for name in names if (path / name).is_file()]
        if not files:
            raise UserError(f"{path}: no {names[0]} in this folder; pass a ControlNet's file or diffusers folder")
        settings = read_json(path / "config.json") if (path / "config.json").is_file() else {}
        path = files[0]
    tensors, metadata = read_tensors(path)
    if settings:
        hidden = {"num_heads": settings.get("attention_head_dim"), "norm_groups": settings.get("norm_num_groups")}
        metadata |= {"unet": json.dumps({name: value for name, value in hidden.items() if isinstance(value, int)})}
    prefix = PREFIXES[ControlNet]
    if "input_hint_block.0.weight" in tensors:  # official names without their prefix
        tensors = {prefix + name: value for name, value in tensors.items()}
    if metadata.get("copy") == "lite":
        layout, name = "lite", str
    elif any(name.startswith("controlnet_cond_embedding.") for name in tensors):
        layout, name = "diffusers", partial(translate, rules=DIFFUSERS)
    else:
        layout, name = "official", lambda ours: prefix + translate(ours, RULES[ControlNet])
    first_missing = next((name(width) for width in HINT_WIDTHS if name(width) not in tensors), None)
    if first_missing is not None:
        raise UserError(f"{path}: {first_missing} is missing, so this is no ControlNet{likely_cause(tensors)}")
    return tensors, metadata, name, layout


def load_controlnet(path: str | Path, unet: UNet) -> ControlNet:
    """A ControlNet in float32, for `unet`'s sizes, from any of the layouts in use.

    `path` is a single file with official names (prefix control_model., or none; other parts beside it are skipped),
    one in diffusers' layout, one of our own "lite" ablation, or a diffusers folder. Raises UserError as read_tensors
    and load_official do.
    """
    tensors, _, name, layout = open_controlnet(path)
    with torch.device("meta"):
        hint_channels = tuple(len(tensors[name(width)]) for width in HINT_WIDTHS)
        copy = "lite" if layout == "lite" else "full"
        controlnet = ControlNet.from_unet(UNet(unet.config), hint_channels, copy=copy)
    names = {ours: name(ours) for ours in controlnet.state_dict()}
    fill(controlnet, tensors, names, PREFIXES[ControlNet] if layout == "official" else "", str(path))
    return controlnet


# ---------------------------------------------------------------------------------------------------------------
# Writing


def save_controlnet(
    controlnet: ControlNet,
    path: str | Path,
    layout: str = "official",
    metadata: dict[str, str] | None = None,
    others: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a ControlNet for other programs.

    "official": one .safetensors with the prefix control_model., which A1111, ComfyUI and diffusers read.
    `others` are more tensors for that file, under official names: the base's decoder if it was trained too.
    "diffusers": a folder with config.json, for ControlNetModel.from_pretrained.
    The "lite" ablation exists only here: it is written under our own names, marked in the metadata, and has no
    diffusers layout. Raises UserError for that, or when writing fails; ValueError for another layout.
    """
    if layout == "official":
        config = controlnet.config
        hidden = {"num_heads": config.num_heads, "norm_groups": config.norm_groups}  # which no shape shows
        metadata = (metadata or {}) | {"unet": json.dumps(hidden)} | ({"copy": "lite"} if controlnet.lite else {})
        save_tensors(official_state_dict(controlnet) | dict(others or {}), path, metadata)
    elif layout == "diffusers":
        if controlnet.lite:
            raise UserError(f"{path}: a ControlNet-lite has no diffusers layout, only this project's own")
        state = controlnet.state_dict()
        names = rename(controlnet, DIFFUSERS)
        save_tensors({names[k]: v for k, v in state.items()}, Path(path) / "diffusion_pytorch_model.safetensors")
        save_json(diffusers_config(controlnet), Path(path) / "config.json")
    else:
        raise ValueError(f"layout is 'official' or 'diffusers', not {layout!r}")


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


# ---------------------------------------------------------------------------------------------------------------
# Command line


def main() -> None:
    parser = ArgumentParser(description="Turn a ControlNet's file into the other layout.")
    parser.add_argument("source", metavar="IN", type=Path, help="a ControlNet's file or diffusers folder")
    parser.add_argument("output", metavar="OUT", type=Path, help="a .safetensors file, for diffusers a folder")
    parser.add_argument("--layout", choices=("official", "diffusers"), required=True, help="of OUT")
    parser.add_argument("--dtype", choices=("fp16", "fp32"), default="fp32", help="default: fp32")
    args = parser.parse_args()
    if args.layout == "official" and args.output.suffix != ".safetensors":
        raise UserError(f"{args.output}: must end in .safetensors for --layout official")
    if args.layout == "diffusers" and args.output.is_file():
        raise UserError(f"{args.output} is a file: --layout diffusers writes a folder, name another OUT")

    tensors, metadata, name, layout = open_controlnet(args.source)
    if layout == "lite":
        raise UserError(f"{args.source} is a ControlNet-lite, which has no layout but this project's own")
    try:
        hidden = {key: int(value) for key, value in json.loads(metadata.get("unet", "{}")).items()}
        config = unet_config(lambda ours: list(tensors[name(ours)].shape), lambda ours: name(ours) in tensors, **hidden)
        with torch.device("meta"):
            unet = UNet(config)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{args.source} is no ControlNet of Stable Diffusion 1.x ({error!r}): fetch it again") from None
    dtype = {"fp16": torch.float16, "fp32": torch.float32}[args.dtype]
    controlnet = load_controlnet(args.source, unet).to(dtype)
    kept = {key: value for key, value in metadata.items() if key != "format"}
    decoder = {}
    if "unlock_decoder" in metadata:
        decoder = {name: tensor.to(dtype) for name, tensor in tensors.items() if name.startswith(PREFIXES[UNet])}
    save_controlnet(controlnet, args.output, args.layout, kept, decoder)
    print(f"{args.source}: ControlNet in the {layout} layout, {len(controlnet.state_dict())} tensors")
    if decoder and args.layout == "diffusers":
        print("warning: the decoder trained with it stays behind, diffusers' layout has no place for it: without "
              "it pictures differ", file=sys.stderr)  # fmt: skip
    print(f"wrote {args.output}, {args.layout} layout, {args.dtype}")


if __name__ == "__main__":
    run(main)
