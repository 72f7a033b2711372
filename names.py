"""What the official files call our tensors: one table of rules for each network, read in both directions.

A rule is (ours, official), in which {i} and {j} stand for numbers. It is about a name without its last part (weight,
bias), which is the same in both; no name fits two rules of a table.
"""

import re
from functools import cache

from torch import nn

from clip_text import CLIPTextModel
from controlnet import ControlNet
from unet import UNet
from vae import AutoencoderKL

Rules = list[tuple[str, str]]


def nest(ours: str, theirs: str, rules: Rules) -> Rules:
    """The rules of a submodule that is called `ours` here and `theirs` there."""
    return [(f"{ours}.{a}", f"{theirs}.{b}") for a, b in rules]


@cache
def pattern(template: str) -> re.Pattern:
    return re.compile(re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{j\}", r"(?P<j>\d+)"))


def translate(name: str, rules: Rules) -> str | None:
    """A tensor's name from the left side of the rules to the right one; None if no rule fits."""
    stem, _, leaf = name.rpartition(".")
    for left, right in rules:
        if match := pattern(left).fullmatch(stem):
            return f"{right.format(**match.groupdict())}.{leaf}"
    return None


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
    ("encoder.0.conv", "input_blocks.0.0"), ("encoder.{i}.downsample", "input_blocks.{i}.0.op"),
    *nest("encoder.{i}.resnet", "input_blocks.{i}.0", RESNET),
    *nest("encoder.{i}.transformer", "input_blocks.{i}.1", TRANSFORMER),
    *nest("middle.resnet1", "middle_block.0", RESNET),
    *nest("middle.transformer", "middle_block.1", TRANSFORMER),
    *nest("middle.resnet2", "middle_block.2", RESNET),
]  # fmt: skip
UNET = [
    *ENCODER,
    *nest("decoder.{i}.resnet", "output_blocks.{i}.0", RESNET),
    *nest("decoder.{i}.transformer", "output_blocks.{i}.1", TRANSFORMER),
    ("decoder.2.upsample.conv", "output_blocks.2.1.conv"),  # it follows the ResBlock: level 3 has no transformers
    *[(f"decoder.{i}.upsample.conv", f"output_blocks.{i}.2.conv") for i in (5, 8)],
    ("norm_out", "out.0"), ("conv_out", "out.2"),
]  # fmt: skip
CONTROLNET = [
    *ENCODER,
    ("hint_encoder.{i}", "input_hint_block.{i}"),
    ("zero_convs.{i}", "zero_convs.{i}.0"), ("middle_zero_conv", "middle_block_out.0"),
]  # fmt: skip
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
    ("to_moments", "quant_conv"), ("from_latent", "post_quant_conv"),
]  # fmt: skip
CLIP_ATTENTION = [("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out", "out_proj")]
CLIP_LAYER = [
    ("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("mlp_in", "mlp.fc1"), ("mlp_out", "mlp.fc2"),
    *nest("attention", "self_attn", CLIP_ATTENTION),
]  # fmt: skip
CLIP = [
    ("token_embedding", "embeddings.token_embedding"), ("position_embedding", "embeddings.position_embedding"),
    *nest("layers.{i}", "encoder.layers.{i}", CLIP_LAYER),
    ("norm_out", "final_layer_norm"),
]  # fmt: skip

TABLES: dict[type[nn.Module], tuple[str, Rules]] = {  # the prefix of a network's names in a file, and their rules
    UNet: ("model.diffusion_model.", UNET),
    AutoencoderKL: ("first_stage_model.", VAE),
    CLIPTextModel: ("cond_stage_model.transformer.text_model.", CLIP),
    ControlNet: ("control_model.", CONTROLNET),
}
