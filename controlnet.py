"""ControlNet: a trainable copy of the UNet's encoder between zero convolutions (Fig. 2, 3b; equations 1 to 4)."""

import math
from copy import deepcopy

import torch
from torch import Tensor, nn

import ablations
from unet import Block, UNet, UNetConfig, encoder_channels

HINT_CHANNELS = (16, 32, 96, 256)
GUESS_DECAY = 0.825  # as released; 10^(-1/12), rounded, would let the 13 factors run from 0.1 to 1, as in diffusers
CONTROL_MODES = {  # factors of the 13 residuals; in all but "uniform" only guidance's conditional side sees the hint
    "uniform": [1.0] * 13,  # as released
    "conditional": [1.0] * 13,
    "guess": [GUESS_DECAY ** (12 - i) for i in range(13)],  # as released
    # The paper's w_i = 64/h_i (Sec. 3.4), at any size the latent's side over the feature's; the released code has none.
    "resolution": [1.0] * 3 + [2.0] * 3 + [4.0] * 3 + [8.0] * 4,
}


def zero_conv(channels: int) -> nn.Conv2d:
    """Z in equation (2): a 1x1 convolution that starts at zero.

    It does train: for y = wx + b with w = b = 0 the gradients are dy/dw = x and dy/db = 1. Only dy/dx = w is zero,
    so whatever comes before it has to wait one step.
    """
    return zero_weights(nn.Conv2d(channels, channels, 1))


def zero_weights(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


class HintEncoder(nn.Sequential):
    """E in equation (4), from the hint image to the latent's size, and after it the zero convolution Z(·; Θ_z1).

    Hint [B, 3, H, W] in [0, 1] -> features [B, model_channels, H/8, W/8].

    Paper and released code differ. This is the released one: eight 3x3 convolutions with SiLU, strides 2 at the
    third, fifth and seventh, the last a zero convolution of 3x3 instead of 1x1. The paper describes four 4x4
    convolutions of stride 2 with ReLU, 16, 32, 64 and 128 channels and Gaussian weights, which would end at 1/16 of
    the side.
    """

    def __init__(self, out_channels: int, hint_channels: tuple[int, ...] = HINT_CHANNELS, init: str = "default"):
        layers, channels = [], 3
        for i, width in enumerate(hint_channels):
            layers += [nn.Conv2d(channels, width, 3, stride=2 if i > 0 else 1, padding=1), nn.SiLU()]
            if i < len(hint_channels) - 1:
                layers += [nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
            channels = width
        # "default" is PyTorch's, as released: what varies over the hint shrinks from layer to layer. "silu" keeps it,
        # and the plateau before the jump is shorter: a standard deviation of 2 / sqrt(inputs), since SiLU
        # passes small values at half their size (He et al. 2015 have √2 for ReLU).
        if init == "silu":
            for layer in layers[::2]:
                nn.init.normal_(layer.weight, std=2 / math.sqrt(layer.weight[0].numel()))
                nn.init.zeros_(layer.bias)
        elif init != "default":
            raise ValueError(f"hint_init is 'default' or 'silu', not {init!r}")
        super().__init__(*layers, zero_weights(nn.Conv2d(channels, out_channels, 3, padding=1)))


class ControlNet(nn.Module):
    """The trainable copy of an encoder: latent, hint, time and prompt to 13 residuals for the locked UNet."""

    def __init__(self, config: UNetConfig, time_embed, encoder, middle, hint_encoder):
        super().__init__()
        self.config = config
        self.time_embed = time_embed  # nn.Identity in a ControlNet-lite, which sees neither time nor prompt
        self.encoder, self.middle, self.hint_encoder = encoder, middle, hint_encoder
        widths = encoder_channels(config)
        self.zero_convs = nn.ModuleList(zero_conv(channels) for channels in widths)
        self.middle_zero_conv = zero_conv(widths[-1])

    @classmethod
    def from_unet(
        cls, unet: UNet, hint_channels: tuple[int, ...] = HINT_CHANNELS, hint_init: str = "default",
        connection: str = "zero", copy: str = "full",
    ) -> "ControlNet":  # fmt: skip
        """Copy the UNet's time embedding, encoder and middle block, dtype and device included, ready to train.

        connection="gaussian" and copy="lite" are ablations (Fig. 8b, 8c). Raises ValueError for other words.
        """
        hint_encoder = HintEncoder(unet.config.model_channels, hint_channels, hint_init)
        if copy == "full":
            parts = deepcopy(unet.time_embed), deepcopy(unet.encoder), deepcopy(unet.middle)
        elif copy == "lite":
            parts = ablations.lite_copy(unet, encoder_channels(unet.config))
        else:
            raise ValueError(f"copy is 'full' or 'lite', not {copy!r}")
        controlnet = cls(unet.config, *parts, hint_encoder)
        if connection == "gaussian":
            ablations.gaussian_weights(*controlnet.zero_convs, controlnet.middle_zero_conv, hint_encoder[-1])
        elif connection != "zero":
            raise ValueError(f"connection is 'zero' or 'gaussian', not {connection!r}")
        return controlnet.to(unet.conv_out.weight.device, unet.conv_out.weight.dtype).requires_grad_(True)

    @property
    def lite(self) -> bool:
        return isinstance(self.time_embed, nn.Identity)

    def forward(self, x: Tensor, hint: Tensor, t: Tensor, context: Tensor) -> list[Tensor]:
        """Equation (2) without its first term: Z(F(x + Z(c; Θ_z1); Θ_c); Θ_z2) for each of the 13 connections.

        x [B, 4, h, w], hint [B, 3, 8h, 8w] in [0, 1], t int64 [B], context [B, 77, D] -> 13 residuals, shallow to
        deep, the middle block's last. The UNet adds them to F(x; Θ), its own features: y_c = F(x; Θ) + residual.
        """
        return self.residuals(x, self.hint_encoder(hint), t, context)  # Z(c; Θ_z1), c = E(hint) as in equation (4)

    def residuals(self, x: Tensor, condition: Tensor, t: Tensor, context: Tensor) -> list[Tensor]:
        """`forward` from the hint encoder's output on, which stays the same from one sampling step to the next."""
        time = self.time_embed(t)
        first, *others = self.encoder
        # x + Z(c; Θ_z1). The latent has 4 channels, the condition model_channels: as released, they are added where
        # their widths agree, after the first block; in the paper's figure before it.
        features = [first(x, time, context) + condition]
        for block in (*others, self.middle):  # F(·; Θ_c), block by block
            features.append(block(features[-1], time, context))
        zero_convs = (*self.zero_convs, self.middle_zero_conv)
        return [zero(h) for zero, h in zip(zero_convs, features, strict=True)]  # Z(·; Θ_z2)


class Denoiser(nn.Module):
    """ε_θ(z_t, t, c_t, c_f) of equation (5): a UNet and its ControlNet as the one model that is trained.

    The UNet is locked here (Θ in equation 2) and stored in `precision`, which autocast computes in. The ControlNet
    keeps requires_grad as from_unet set it, but for `only_mid_control`. `trained` holds the modules that learn, by
    name, in float32.
    """

    def __init__(
        self, unet: UNet, controlnet: ControlNet, *, precision: torch.dtype = torch.float32,
        unlock_decoder: bool = False, only_mid_control: bool = False, checkpointing: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.unet, self.controlnet, self.precision = unet.requires_grad_(False), controlnet, precision
        self.trained: dict[str, nn.Module] = {"controlnet": controlnet}
        if unlock_decoder:  # the released code's sd_locked = False
            parts = ("decoder", "norm_out", "conv_out")
            self.trained |= {name: getattr(unet, name).requires_grad_(True) for name in parts}
        if only_mid_control:
            # The released code skips the other twelve residuals in the sum. Here their weights stay zero, so that any
            # program that reads the file does the same.
            for conv in controlnet.zero_convs:
                zero_weights(conv).requires_grad_(False)
        for name, part in unet.named_children():
            if name not in self.trained:
                part.to(precision)
        for module in self.modules():
            if isinstance(module, Block):
                module.checkpointing = checkpointing

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [p for module in self.trained.values() for p in module.parameters() if p.requires_grad]

    def forward(self, z: Tensor, t: Tensor, context: Tensor, hint: Tensor) -> Tensor:
        """z [B, 4, h, w], t int64 [B], context [B, 77, D], hint [B, 3, 8h, 8w] in [0, 1] -> ε [B, 4, h, w], float32."""
        with torch.autocast(z.device.type, self.precision, enabled=self.precision != torch.float32):
            return self.unet(z, t, context, self.controlnet(z, hint, t, context)).float()


def control_weights(mode: str, strength: float = 1.0) -> list[float]:
    """A factor for each of the 13 residuals, shallow to deep, the middle last. Raises ValueError for other modes."""
    if mode not in CONTROL_MODES:
        raise ValueError(f"control mode is one of {', '.join(CONTROL_MODES)}, not {mode!r}")
    return [strength * weight for weight in CONTROL_MODES[mode]]


def add_residuals(*lists: list[Tensor]) -> list[Tensor]:
    """Compose several ControlNets (Fig. 6): the sum of their residuals, connection by connection."""
    return [sum(residuals[1:], start=residuals[0]) for residuals in zip(*lists, strict=True)]
