"""The two architectures that the paper compares ControlNet with (Fig. 8b, 8c), kept out of controlnet.py."""

import torch.nn.functional as F
from torch import Tensor, nn

from unet import UNet


def gaussian_weights(*convs: nn.Conv2d) -> None:
    """Fig. 8b: Gaussian weights where ControlNet has zero convolutions. Std 0.02 is our choice; the bias stays 0."""
    for conv in convs:
        nn.init.normal_(conv.weight, std=0.02)


class LiteBlock(nn.Module):
    """Fig. 8c: one convolution, here 3x3 with SiLU, in a copied block's place; it sees neither time nor prompt."""

    def __init__(self, in_channels, out_channels, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        return F.silu(self.conv(x))


def lite_copy(unet: UNet, widths: list[int]) -> tuple[nn.Identity, nn.ModuleList, LiteBlock]:
    """ControlNet-lite's parts in the order of ControlNet's: no time embedding, 12 encoder blocks, the middle block.

    `widths` are the channels after each encoder block.
    """
    channels = [unet.config.in_channels, *widths]
    strides = [2 if hasattr(block, "downsample") else 1 for block in unet.encoder]
    blocks = nn.ModuleList(LiteBlock(*io, stride) for *io, stride in zip(channels, channels[1:], strides))
    return nn.Identity(), blocks, LiteBlock(widths[-1], widths[-1])
