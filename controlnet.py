"""ControlNet: a trainable copy of the UNet's encoder between zero convolutions (Fig. 2, 3b; equations 1 to 4)."""

from copy import deepcopy

import torch.nn.functional as F
from torch import Tensor, nn

from unet import DownBlock, UNet, UNetConfig, run_block

HINT_CHANNELS = (16, 32, 96, 256)
GUESS_DECAY = 0.825  # guess mode's factor from one residual to the next, as released


def zero_conv(channels: int) -> nn.Conv2d:
    """Z in equation (2): a 1x1 convolution that starts at zero.

    It does train: for y = wx + b with w = b = 0 the gradients are dy/dw = x and dy/db = 1. Only dy/dx = w is zero,
    so whatever lies before it has to wait one step.
    """
    return zero_weights(nn.Conv2d(channels, channels, 1))


def zero_weights(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


class HintEncoder(nn.Sequential):
    """E in equation (4): the hint image to the latent's size, and the zero convolution Z(·; Θ_z1) after it.

    Hint [B, 3, H, W] in [0, 1] -> features [B, model_channels, H/8, W/8].

    This is the released one: eight 3x3 convolutions with SiLU, strides 2 at the third, fifth and seventh, the last
    a zero convolution of 3x3. The paper describes another: four 4x4 convolutions of stride 2 with ReLU and 16, 32,
    64 and 128 channels, Gaussian weights; taken literally that ends at 1/16 of the side and 128 channels.
    """

    def __init__(self, out_channels: int, hint_channels: tuple[int, ...] = HINT_CHANNELS, init: str = "default"):
        layers, channels = [], 3
        for i, width in enumerate(hint_channels):
            layers += [nn.Conv2d(channels, width, 3, stride=2 if i > 0 else 1, padding=1), nn.SiLU()]
            if i < len(hint_channels) - 1:
                layers += [nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
            channels = width
        # "default" is PyTorch's, as released: it shrinks the signal from layer to layer, and the plateau before
        # the sudden convergence is long. "he" keeps the signal's size.
        if init == "he":
            for layer in layers[::2]:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        elif init != "default":
            raise ValueError(f"hint_init is 'default' or 'he', not {init!r}")
        super().__init__(*layers, zero_weights(nn.Conv2d(channels, out_channels, 3, padding=1)))


class LiteBlock(nn.Module):
    """ControlNet-lite (Fig. 8c): one convolution in a copied block's place; it sees neither time nor prompt."""

    def __init__(self, in_channels, out_channels, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)

    def forward(self, x: Tensor, time: Tensor | None, context: Tensor) -> Tensor:
        return F.silu(self.conv(x))


class ControlNet(nn.Module):
    """The trainable copy of an encoder: latent, hint, time and prompt to 13 residuals for the locked UNet."""

    def __init__(self, config: UNetConfig, time_embed, encoder, middle, hint_encoder, connection="zero"):
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.time_embed = time_embed
        self.encoder = encoder
        self.middle = middle
        self.hint_encoder = hint_encoder
        widths = encoder_channels(config)
        self.zero_convs = nn.ModuleList(zero_conv(channels) for channels in widths)
        self.middle_zero_conv = zero_conv(widths[-1])
        if connection == "gaussian":  # the ablation of Fig. 8b: ordinary weights instead of zeros
            for conv in [*self.zero_convs, self.middle_zero_conv, hint_encoder[-1]]:
                nn.init.normal_(conv.weight, std=0.02)
        elif connection != "zero":
            raise ValueError(f"connection is 'zero' or 'gaussian', not {connection!r}")

    @classmethod
    def from_unet(
        cls,
        unet: UNet,
        hint_channels: tuple[int, ...] = HINT_CHANNELS,
        hint_init: str = "default",
        connection: str = "zero",
        copy: str = "full",
    ) -> "ControlNet":
        """Copy the UNet's encoder, middle block and time embedding, dtype and device included, ready to train.

        `connection="gaussian"` and `copy="lite"` are the paper's ablations (Fig. 8b, 8c).
        Raises ValueError for other words.
        """
        config, place = unet.config, unet.conv_out.weight
        hint_encoder = HintEncoder(config.model_channels, hint_channels, hint_init)
        if copy == "full":
            time_embed, encoder, middle = (deepcopy(part) for part in (unet.time_embed, unet.encoder, unet.middle))
        elif copy == "lite":
            widths = [config.in_channels, *encoder_channels(config)]
            strides = [2 if isinstance(block, DownBlock) else 1 for block in unet.encoder]
            time_embed, middle = None, LiteBlock(widths[-1], widths[-1])
            encoder = nn.ModuleList(LiteBlock(*io, stride) for *io, stride in zip(widths, widths[1:], strides))
        else:
            raise ValueError(f"copy is 'full' or 'lite', not {copy!r}")
        controlnet = cls(config, time_embed, encoder, middle, hint_encoder, connection)
        return controlnet.to(place.device, place.dtype).requires_grad_(True)

    @property
    def lite(self) -> bool:
        return self.time_embed is None

    def forward(self, x: Tensor, hint: Tensor, t: Tensor, context: Tensor) -> list[Tensor]:
        """Equation (2) without its first term: Z(F(x + Z(c; Θ_z1); Θ_c); Θ_z2) for each of the 13 connections.

        x [B, 4, h, w], hint [B, 3, 8h, 8w] in [0, 1], t int64 [B], context [B, 77, D] -> 13 residuals, shallow to
        deep, the middle block's last. The UNet adds them to F(x; Θ), its own features.
        """
        time = None if self.lite else self.time_embed(t)
        condition = self.hint_encoder(hint)  # c_f = E(c_i), equation (4), through Z(·; Θ_z1)
        residuals = []
        h = x
        for block, zero in zip(self.encoder, self.zero_convs, strict=True):
            h = run_block(block, self.checkpointing, h, time, context)
            if not residuals:
                h = h + condition  # after the first block, a convolution to model_channels
            residuals.append(zero(h))
        h = run_block(self.middle, self.checkpointing, h, time, context)
        return [*residuals, self.middle_zero_conv(h)]


def encoder_channels(config: UNetConfig) -> list[int]:
    """Channels of the features after each of the 12 encoder blocks."""
    widths = [config.model_channels]
    for level, mult in enumerate(config.channel_mult):
        downsample = level < len(config.channel_mult) - 1
        widths += [mult * config.model_channels] * (config.num_res_blocks + downsample)
    return widths


def control_weights(mode: str, strength: float = 1.0) -> list[float]:
    """A factor for each of the 13 residuals, in their order (shallow to deep, the middle last).

    "uniform" and "conditional": 1. "guess": 0.825^(12 - i), as released. "resolution": the paper's w_i = 64/h_i
    (Sec. 3.4), at any size the latent's side over the feature's side; the released code has no such formula, and
    the eightfold weight of the deepest level is too strong for some images. Which side of guidance sees the hint
    is sample.generate's part: "uniform" both, the others only the conditional one. Raises ValueError for other modes.
    """
    weights = {
        "uniform": [1.0] * 13,
        "conditional": [1.0] * 13,
        "guess": [GUESS_DECAY ** (12 - i) for i in range(13)],
        "resolution": [1.0] * 3 + [2.0] * 3 + [4.0] * 3 + [8.0] * 4,
    }
    if mode not in weights:
        raise ValueError(f"control mode is one of {', '.join(weights)}, not {mode!r}")
    return [strength * weight for weight in weights[mode]]


def add_residuals(*lists: list[Tensor]) -> list[Tensor]:
    """Compose several ControlNets (Fig. 6): the sum of their residuals, connection by connection."""
    return [sum(residuals[1:], start=residuals[0]) for residuals in zip(*lists, strict=True)]
