"""The KL autoencoder of Stable Diffusion: images to latents at an eighth of the resolution, and back.

Latents here are unscaled: the factor 0.18215 belongs to StableDiffusion, not to the autoencoder.
"""

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from support.norms import GroupNorm
from unet import ResBlock, Upsample


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of an autoencoder; the defaults are Stable Diffusion 1.5's. Four levels halve the image three times."""

    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    latent_channels: int = 4
    norm_groups: int = 32


resnet = partial(ResBlock, eps=1e-6)  # the UNet's have 1e-5; without a time embedding here


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions: [B, C, h, w] -> [B, C, h, w]."""

    def __init__(self, channels, norm_groups):
        super().__init__()
        self.norm = GroupNorm(norm_groups, channels, eps=1e-6)
        self.to_q = nn.Conv2d(channels, channels, 1)
        self.to_k = nn.Conv2d(channels, channels, 1)
        self.to_v = nn.Conv2d(channels, channels, 1)
        self.to_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # [B, 1, h*w, C]: only with an axis for the one head, and contiguous, is no h*w x h*w matrix made
        q, k, v = (f(h).flatten(2).mT[:, None].contiguous() for f in (self.to_q, self.to_k, self.to_v))
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]  # softmax(Q K^T / sqrt(C)) V
        return x + self.to_out(h.mT.unflatten(2, x.shape[2:]))


def make_middle(channels, norm_groups) -> nn.Sequential:
    """ResBlock, attention, ResBlock, at the latent's resolution."""
    res = partial(resnet, channels, channels, norm_groups=norm_groups)
    return nn.Sequential(OrderedDict(resnet1=res(), attention=SpatialAttention(channels, norm_groups), resnet2=res()))


class Downsample(nn.Module):
    """3x3 convolution with stride 2. As released, it pads only on the right and at the bottom."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def make_level(in_channels, out_channels, num_res_blocks, norm_groups, resample) -> nn.Sequential:
    """The ResBlocks of one resolution, then the resampler to the next one, if any."""
    widths = [in_channels, *[out_channels] * num_res_blocks]
    resnets = [resnet(*io, norm_groups=norm_groups) for io in zip(widths, widths[1:])]
    resample = resample(out_channels) if resample else nn.Identity()
    return nn.Sequential(OrderedDict(resnets=nn.Sequential(*resnets), resample=resample))


class Encoder(nn.Module):
    """Image [B, 3, H, W] -> features [B, 2 * latent_channels, H/8, W/8]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = [config.channels * mult for mult in config.channel_mult], config.norm_groups
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.levels = nn.Sequential()
        for i, (finer_width, width) in enumerate(zip([config.channels, *widths], widths)):
            resample = Downsample if i < len(widths) - 1 else None
            self.levels.append(make_level(finer_width, width, config.num_res_blocks, groups, resample))
        self.middle = make_middle(widths[-1], groups)
        self.norm_out = GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.middle(self.levels(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latent [B, latent_channels, H/8, W/8] -> image [B, 3, H, W]. Level 0 is the finest, as in the encoder."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = [config.channels * mult for mult in config.channel_mult], config.norm_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.middle = make_middle(widths[-1], groups)
        self.levels = nn.ModuleList()
        for i, (width, coarser_width) in enumerate(zip(widths, [*widths[1:], widths[-1]])):
            resample = Upsample if i > 0 else None
            self.levels.append(make_level(coarser_width, width, config.num_res_blocks + 1, groups, resample))
        self.norm_out = GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.middle(self.conv_in(z))
        for level in reversed(self.levels):  # coarse to fine
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class AutoencoderKL(nn.Module):
    """Images to latents and back, one latent position per 8x8 pixels. Diffusion runs on the latents."""

    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.to_moments = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.from_latent = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, image: Tensor) -> Tensor:
        """Image [B, 3, H, W] in [-1, 1] -> moments [B, 8, H/8, W/8]: 4 means, then 4 log variances."""
        return self.to_moments(self.encoder(image))

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latent [B, 4, h, w] -> image [B, 3, 8h, 8w], roughly in [-1, 1], not clipped."""
        return self.decoder(self.from_latent(z))


def sample_latent(moments: Tensor, noise: Tensor) -> Tensor:
    """Sample the encoder's Gaussian: moments [B, 8, h, w], standard normal noise [B, 4, h, w] -> unscaled latent."""
    mean, log_variance = moments.chunk(2, dim=1)
    sigma = (log_variance.clamp(-30, 20) / 2).exp()  # exp(log(σ²) / 2), clamped as released
    return mean + sigma * noise
