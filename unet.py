"""The UNet of Stable Diffusion 1.x: 12 encoder blocks, 1 middle block, 12 decoder blocks (paper, Fig. 3a).

Shapes throughout: latents x [B, 4, h, w] with h and w multiples of 8, time steps t int64 [B], context (the encoded
prompt) [B, 77, D]. `python unet.py` prints the block table, computed from the model.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support.norms import GroupNorm, LayerNorm


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet, Stable Diffusion 1.5's by default. Each entry of `channel_mult` is a level, finest first."""

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (0, 1, 2)  # where a SpatialTransformer follows every ResBlock
    num_heads: int = 8
    context_dim: int = 768
    norm_groups: int = 32


class TimeEmbedding(nn.Sequential):
    """Time steps t int64 [B] -> sinusoids, cosines first -> [B, 4 * model_channels], an input of every ResBlock."""

    def __init__(self, model_channels):
        width = 4 * model_channels
        super().__init__(nn.Linear(model_channels, width), nn.SiLU(), nn.Linear(width, width))
        self.half = model_channels // 2

    def forward(self, t: Tensor) -> Tensor:
        # ω_i = 10000^(-i/half) for i = 0 ... half - 1: from 1 down to about 1/10000 radian per time step
        frequencies = torch.exp(-math.log(10000) * torch.arange(self.half, device=t.device) / self.half)
        angles = t.float()[:, None] * frequencies
        return super().forward(torch.cat([angles.cos(), angles.sin()], dim=1).to(self[0].weight.dtype))


class ResBlock(nn.Module):
    """y = shortcut(x) + conv2(silu(norm2(h))) with h = conv1(silu(norm1(x))) + linear(silu(time)).

    [B, C_in, h, w] -> [B, C_out, h, w]. Without `time_channels` it is the VAE's ResBlock, which has no time input.
    """

    def __init__(self, in_channels, out_channels, time_channels=None, norm_groups=32, eps=1e-5):
        super().__init__()
        self.norm1 = GroupNorm(norm_groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_proj = nn.Linear(time_channels, out_channels) if time_channels else None
        self.norm2 = GroupNorm(norm_groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_proj is not None:  # one offset per channel, the same at every position
            h = h + self.time_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Multi-head attention from x [B, N, C] to context [B, M, D], or to x itself without a context.

    `causal`: a position attends to itself and to those before it, as in the text encoder.
    """

    def __init__(self, channels, num_heads, context_dim=None, bias=False, causal=False):
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context_dim or channels, channels, bias=bias)
        self.to_v = nn.Linear(context_dim or channels, channels, bias=bias)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        projected = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (p.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in projected)  # [B, heads, N, d]
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # softmax(Q K^T / sqrt(d)) V
        return self.to_out(h.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with a GEGLU between them: [B, N, C] -> [B, N, C]."""

    def __init__(self, channels):
        super().__init__()
        self.proj_in = nn.Linear(channels, 8 * channels)
        self.proj_out = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate))  # GEGLU(x) = (x W_1 + b_1) * GELU(x W_2 + b_2)


class SpatialTransformer(nn.Module):
    """The paper's "ViT": positions attend to each other, then to the prompt. [B, C, h, w] -> [B, C, h, w]."""

    def __init__(self, channels, num_heads, context_dim, norm_groups=32):
        super().__init__()
        self.norm = GroupNorm(norm_groups, channels, eps=1e-6)  # 1e-5 in the UNet's ResBlocks
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.norm1 = LayerNorm(channels)
        self.self_attention = Attention(channels, num_heads)
        self.norm2 = LayerNorm(channels)
        self.cross_attention = Attention(channels, num_heads, context_dim)
        self.norm3 = LayerNorm(channels)
        self.feed_forward = FeedForward(channels)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # [B, h*w, C]
        h = h + self.self_attention(self.norm1(h))
        h = h + self.cross_attention(self.norm2(h), context)
        h = h + self.feed_forward(self.norm3(h))
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))


class Upsample(nn.Module):
    """Nearest neighbour to twice the size, then a 3x3 convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Block(nn.Module):
    """One of the 25 blocks of Fig. 3a: its named layers, one after the other."""

    def __init__(self, **layers: nn.Module):
        super().__init__()
        self.checkpointing = False  # True: recompute activations in the backward pass; less memory, more time
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.apply_layers, x, time, context, use_reentrant=False)
        return self.apply_layers(x, time, context)

    def apply_layers(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        for layer in self.children():
            if isinstance(layer, ResBlock):
                x = layer(x, time)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


def encoder_channels(config: UNetConfig) -> list[int]:
    """Channels of the features after each of the 12 encoder blocks."""
    widths = [config.model_channels]
    for level, mult in enumerate(config.channel_mult):
        downsample = level < len(config.channel_mult) - 1
        widths += [mult * config.model_channels] * (config.num_res_blocks + downsample)
    return widths


class UNet(nn.Module):
    """ε_θ: predicts the noise in a latent from the latent, the time step and the prompt (paper, Fig. 3a).

    Stable Diffusion 1.5 on a 512x512 image, where c = 320, res is a ResBlock and vit a SpatialTransformer. Read down
    the left side, then up the right side; there, block i also takes the features of encoder block 11 - i.

        encoder 0       conv         c   64x64             decoder 9 10 11  res + vit        c   64x64
        encoder 1 2     res + vit    c   64x64             decoder 8        res + vit + up   2c  32x32 -> 64x64
        encoder 3       down         c   64x64 -> 32x32    decoder 6 7      res + vit        2c  32x32
        encoder 4 5     res + vit    2c  32x32             decoder 5        res + vit + up   4c  16x16 -> 32x32
        encoder 6       down         2c  32x32 -> 16x16    decoder 3 4      res + vit        4c  16x16
        encoder 7 8     res + vit    4c  16x16             decoder 2        res + up         4c  8x8 -> 16x16
        encoder 9       down         4c  16x16 -> 8x8      decoder 0 1      res              4c  8x8
        encoder 10 11   res          4c  8x8               middle           res + vit + res  4c  8x8
    """

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = config
        width, heads, groups = config.model_channels, config.num_heads, config.norm_groups
        res = partial(ResBlock, time_channels=4 * width, norm_groups=groups)
        vit = partial(SpatialTransformer, num_heads=heads, context_dim=config.context_dim, norm_groups=groups)

        def main_block(in_channels, out_channels, level):
            block = Block(resnet=res(in_channels, out_channels))
            if level in config.attention_levels:
                block.transformer = vit(out_channels)
            return block

        self.time_embed = TimeEmbedding(width)
        self.encoder = nn.ModuleList([Block(conv=nn.Conv2d(config.in_channels, width, 3, padding=1))])
        channels, skip_channels = width, encoder_channels(config)
        for level, mult in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                self.encoder.append(main_block(channels, mult * width, level))
                channels = mult * width
            if level < len(config.channel_mult) - 1:
                self.encoder.append(Block(downsample=nn.Conv2d(channels, channels, 3, stride=2, padding=1)))

        self.middle = Block(resnet1=res(channels, channels), transformer=vit(channels), resnet2=res(channels, channels))

        self.decoder = nn.ModuleList()
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for _ in range(config.num_res_blocks + 1):  # one for each skip at this resolution
                self.decoder.append(main_block(channels + skip_channels.pop(), mult * width, level))
                channels = mult * width
            if level > 0:
                self.decoder[-1].upsample = Upsample(channels)

        self.norm_out = GroupNorm(groups, channels)
        self.conv_out = nn.Conv2d(channels, config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, control: list[Tensor] | None = None) -> Tensor:
        """x [B, 4, h, w], t int64 [B], context [B, 77, D] -> ε [B, 4, h, w].

        `control`: a ControlNet's 13 residuals, 12 for the skip connections, shallow to deep, then the middle's.
        """
        time = self.time_embed(t)
        h, skips = x, []
        for block in self.encoder:
            h = block(h, time, context)
            skips.append(h)
        h = self.middle(h, time, context)

        if control is not None:  # equation (2): y_c = y + Z(...); the locked UNet may be in lower precision
            *skip_residuals, middle_residual = control
            h = h + middle_residual.to(h.dtype)
            skips = [skip + residual.to(skip.dtype) for skip, residual in zip(skips, skip_residuals, strict=True)]

        # Last in, first out: the decoder retraces the encoder's resolutions, so its block i fits encoder block 11 - i.
        for block in self.decoder:
            h = block(torch.cat([h, skips.pop()], dim=1), time, context)
        return self.conv_out(F.silu(self.norm_out(h)))


if __name__ == "__main__":
    from support.block_table import print_block_table

    with torch.device("meta"):  # shapes only: no memory, no arithmetic
        print_block_table(UNet())
