"""The UNet of Stable Diffusion 1.x: 12 encoder blocks, 1 middle block, 12 decoder blocks (paper, Fig. 3a).

Shapes used throughout: latents x [B, 4, h, w] with h and w multiples of 8, time steps t int64 [B],
context (the encoded prompt) [B, 77, D], residuals as the encoder's features.
`python unet.py` prints the block table, computed from the model.
"""

import math
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet; the defaults are Stable Diffusion 1.5's.

    `channel_mult` has one entry a level, each level halving the resolution of the one before.
    `attention_levels` names the levels whose ResBlocks are followed by a SpatialTransformer.
    """

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (0, 1, 2)
    num_heads: int = 8
    context_dim: int = 768
    norm_groups: int = 32


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of time steps: t [B] -> float32 [B, dim], cosines first."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedding(nn.Sequential):
    """Time steps t int64 [B] -> [B, 4 * model_channels], which every ResBlock adds in its middle."""

    def __init__(self, model_channels):
        super().__init__(
            nn.Linear(model_channels, 4 * model_channels),
            nn.SiLU(),
            nn.Linear(4 * model_channels, 4 * model_channels),
        )
        self.model_channels = model_channels

    def forward(self, t: Tensor) -> Tensor:
        return super().forward(timestep_embedding(t, self.model_channels).to(self[0].weight.dtype))


class ResBlock(nn.Module):
    """Two 3x3 convolutions around the time embedding, with a shortcut: [B, C_in, h, w] -> [B, C_out, h, w].

    Without `time_channels` it is the VAE's ResBlock, which knows no time.
    """

    def __init__(self, in_channels, out_channels, time_channels=None, norm_groups=32, eps=1e-5):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_proj = nn.Linear(time_channels, out_channels) if time_channels else None
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_proj is not None:
            h = h + self.time_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Multi-head attention of x [B, N, C] over context [B, M, D]; over x itself when no context is given."""

    def __init__(self, channels, num_heads, context_dim=None):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_v = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context

        def split_heads(projected: Tensor) -> Tensor:  # [B, N, C] -> [B, heads, N, C / heads]
            return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        q, k, v = split_heads(self.to_q(x)), split_heads(self.to_k(context)), split_heads(self.to_v(context))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with a GEGLU gate between: [B, N, C] -> [B, N, C]."""

    def __init__(self, channels):
        super().__init__()
        self.proj_in = nn.Linear(channels, 8 * channels)
        self.proj_out = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate))


class SpatialTransformer(nn.Module):
    """The paper's "ViT": pixels attend to each other, then to the prompt. [B, C, h, w] -> [B, C, h, w]."""

    def __init__(self, channels, num_heads, context_dim, norm_groups=32):
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)  # 1e-6 here, 1e-5 in the ResBlocks
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.norm1 = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, num_heads)
        self.norm2 = nn.LayerNorm(channels)
        self.cross_attention = Attention(channels, num_heads, context_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        height, width = x.shape[2:]
        h = self.proj_in(self.norm(x))
        h = h.flatten(2).transpose(1, 2)  # [B, h*w, C]
        h = h + self.self_attention(self.norm1(h))
        h = h + self.cross_attention(self.norm2(h), context)
        h = h + self.feed_forward(self.norm3(h))
        h = h.transpose(1, 2).unflatten(2, (height, width))
        return x + self.proj_out(h)


class Upsample(nn.Module):
    """Nearest neighbour to twice the size, then a 3x3 convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ConvBlock(nn.Module):
    """The first encoder block: latent channels to model channels."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        return self.conv(x)


class DownBlock(nn.Module):
    """An encoder block that only halves the resolution."""

    def __init__(self, channels):
        super().__init__()
        self.downsample = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        return self.downsample(x)


class MainBlock(nn.Module):
    """ResBlock, then a SpatialTransformer and an upsampler where the table has one."""

    def __init__(self, in_channels, out_channels, config: UNetConfig, transformer=False, upsample=False):
        super().__init__()
        self.resnet = ResBlock(in_channels, out_channels, 4 * config.model_channels, config.norm_groups)
        self.transformer = (
            SpatialTransformer(out_channels, config.num_heads, config.context_dim, config.norm_groups)
            if transformer
            else None
        )
        self.upsample = Upsample(out_channels) if upsample else None

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        h = self.resnet(x, time)
        if self.transformer is not None:
            h = self.transformer(h, context)
        if self.upsample is not None:
            h = self.upsample(h)
        return h


class MiddleBlock(nn.Module):
    """ResBlock, SpatialTransformer, ResBlock at the lowest resolution."""

    def __init__(self, channels, config: UNetConfig):
        super().__init__()
        time_channels = 4 * config.model_channels
        self.resnet1 = ResBlock(channels, channels, time_channels, config.norm_groups)
        self.transformer = SpatialTransformer(channels, config.num_heads, config.context_dim, config.norm_groups)
        self.resnet2 = ResBlock(channels, channels, time_channels, config.norm_groups)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        return self.resnet2(self.transformer(self.resnet1(x, time), context), time)


def run_block(block: nn.Module, checkpointing: bool, *inputs: Tensor) -> Tensor:
    """block(*inputs); with checkpointing its activations are computed again in the backward pass, not kept."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


class UNet(nn.Module):
    """ε_θ: predicts the noise in a latent from the latent, the time step and the prompt (paper, Fig. 3a).

    At SD 1.5 size, with c = model_channels = 320 and the resolution for a 512x512 image:

        encoder 0       conv   c         64x64      decoder 9 10 11  res + transformer   c    64x64
        encoder 1 2     res+t  c         64x64      decoder 6 7 8    res + transformer   2c   32x32, 8 upsamples
        encoder 3       down   c         32x32
        encoder 4 5     res+t  2c        32x32      decoder 3 4 5    res + transformer   4c   16x16, 5 upsamples
        encoder 6       down   2c        16x16
        encoder 7 8     res+t  4c        16x16      decoder 0 1 2    res                 4c   8x8,   2 upsamples
        encoder 9       down   4c        8x8
        encoder 10 11   res    4c        8x8        middle           res + transformer + res  4c, 8x8

    Decoder block i takes the features of encoder block 11 - i beside its own input.
    """

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = config
        self.checkpointing = False  # set True to trade time for memory in training
        width, last_level = config.model_channels, len(config.channel_mult) - 1
        self.time_embed = TimeEmbedding(width)

        self.encoder = nn.ModuleList([ConvBlock(config.in_channels, width)])
        channels, skip_channels = width, [width]
        for level, mult in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                transformer = level in config.attention_levels
                self.encoder.append(MainBlock(channels, mult * width, config, transformer))
                channels = mult * width
                skip_channels.append(channels)
            if level != last_level:
                self.encoder.append(DownBlock(channels))
                skip_channels.append(channels)

        self.middle = MiddleBlock(channels, config)

        self.decoder = nn.ModuleList()
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for i in range(config.num_res_blocks + 1):
                in_channels = channels + skip_channels.pop()
                transformer = level in config.attention_levels
                upsample = level != 0 and i == config.num_res_blocks
                self.decoder.append(MainBlock(in_channels, mult * width, config, transformer, upsample))
                channels = mult * width

        self.norm_out = nn.GroupNorm(config.norm_groups, channels)
        self.conv_out = nn.Conv2d(channels, config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, control: list[Tensor] | None = None) -> Tensor:
        """x [B, 4, h, w], t int64 [B], context [B, 77, D] -> ε [B, 4, h, w].

        `control` are a ControlNet's 13 residuals: 12 for the skip connections, shallow to deep, then the middle's.
        """
        time = self.time_embed(t)
        h, skips = x, []
        for block in self.encoder:
            h = run_block(block, self.checkpointing, h, time, context)
            skips.append(h)
        h = run_block(self.middle, self.checkpointing, h, time, context)

        if control is not None:  # y_c = y + Z(...), equation (2); residuals may come in another precision
            *skip_residuals, middle_residual = control
            h = h + middle_residual.to(h.dtype)
            skips = [skip + residual.to(skip.dtype) for skip, residual in zip(skips, skip_residuals, strict=True)]

        for block in self.decoder:
            h = run_block(block, self.checkpointing, torch.cat([h, skips.pop()], dim=1), time, context)
        return self.conv_out(F.silu(self.norm_out(h)))


def block_table(unet: UNet, image_size: int = 512) -> list[tuple[str, str, int, int, int]]:
    """Rows (block, layers, channels, resolution, parameters), read off `unet` as an image passes through it."""
    config, rows = unet.config, []
    layer_names = {
        ConvBlock: "conv", DownBlock: "downsample", ResBlock: "ResBlock",
        SpatialTransformer: "transformer", Upsample: "upsample",
    }  # fmt: skip

    def record(name):
        def hook(block, inputs, output):
            layers = [layer_names[type(m)] for m in block.modules() if type(m) in layer_names]
            parameters = sum(p.numel() for p in block.parameters())
            rows.append((name, " + ".join(layers), output.shape[1], output.shape[3], parameters))

        return hook

    blocks = {f"encoder {i}": block for i, block in enumerate(unet.encoder)} | {"middle": unet.middle}
    blocks |= {f"decoder {i}": block for i, block in enumerate(unet.decoder)}
    handles = [block.register_forward_hook(record(name)) for name, block in blocks.items()]
    device, side = unet.conv_out.weight.device, image_size // 8
    with torch.no_grad():
        unet(
            torch.zeros(1, config.in_channels, side, side, device=device),
            torch.zeros(1, dtype=torch.long, device=device),
            torch.zeros(1, 77, config.context_dim, device=device),
        )
    for handle in handles:
        handle.remove()
    return rows


def main() -> None:
    with torch.device("meta"):  # shapes only: no memory, no arithmetic
        unet = UNet(UNetConfig())
    rows = block_table(unet)
    print("Stable Diffusion 1.5, one 512x512 image\n")
    print(f"{'block':12}{'layers':36}{'channels':>8}{'resolution':>12}{'parameters':>14}")
    for name, layers, channels, side, parameters in rows:
        print(f"{name:12}{layers:36}{channels:8}{f'{side}x{side}':>12}{parameters:14,}")
    total = sum(p.numel() for p in unet.parameters())
    rest = total - sum(row[-1] for row in rows)
    print(f"{'time, output':68}{rest:14,}\n{'all':68}{total:14,}\n")

    count = Counter(type(module) for module in unet.modules())
    resamplers = count[DownBlock] + count[Upsample]
    print(f"""\
The paper counts (Sec. 3.2): 25 blocks, 17 of them main blocks with 4 ResNet layers and 2 ViTs each, 8 for resampling.
This model has: {len(rows)} blocks, {count[ResBlock]} ResBlocks, {count[SpatialTransformer]} transformers, \
{resamplers} resamplers ({count[DownBlock]} down, {count[Upsample]} up).

The two do not agree. "4 ResNet layers and 2 ViTs" fits no single block; it fits one encoder level, if each of a
ResBlock's two convolutions counts as a layer: 2 x (ResBlock + transformer) = 4 convolutions and 2 transformers.
And the deepest level has no transformer outside the middle block.""")


if __name__ == "__main__":
    main()
