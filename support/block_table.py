"""The UNet's blocks as a table, read off the model as an image passes through it."""

from collections import Counter

import torch
from torch import nn


def block_table(unet: nn.Module, image_size: int = 512) -> list[tuple[str, str, int, int, int]]:
    """A row for each block: name, layers, channels and resolution of its output, parameters; one forward pass."""
    rows, blocks = [], [*unet.encoder, unet.middle, *unet.decoder]

    def record(block, inputs, output) -> None:
        layers = " + ".join("ResBlock" if "resnet" in layer else layer for layer, _ in block.named_children())
        rows.append((layers, output.shape[1], output.shape[3], sum(p.numel() for p in block.parameters())))

    handles = [block.register_forward_hook(record) for block in blocks]
    zeros, side = unet.conv_out.weight.new_zeros, image_size // 8
    with torch.no_grad():
        unet(zeros(1, unet.config.in_channels, side, side), zeros(1).long(), zeros(1, 77, unet.config.context_dim))
    for handle in handles:
        handle.remove()
    encoder, decoder = ([f"{part} {i}" for i in range(len(rows) // 2)] for part in ("encoder", "decoder"))
    return [(name, *row) for name, row in zip([*encoder, "middle", *decoder], rows, strict=True)]


def print_block_table(unet: nn.Module) -> None:
    """Print the table, and what the paper counts beside what this model has."""
    rows = block_table(unet)
    print(f"Stable Diffusion 1.5, one 512x512 image\n\n{'block':12}{'layers':36}channels  resolution    parameters")
    for name, layers, channels, side, parameters in rows:
        print(f"{name:12}{layers:36}{channels:8}{f'{side}x{side}':>12}{parameters:14,}")
    total = sum(p.numel() for p in unet.parameters())
    count = Counter(layer for _, layers, *_ in rows for layer in layers.split(" + "))
    print(f"""{"all, with time embedding and output layers":68}{total:14,}

Paper (Sec. 3.2): 25 blocks; 8 of them resample, each of the other 17 has 4 ResNet layers and 2 ViTs.
This model: {len(rows)} blocks, {count["ResBlock"]} ResBlocks, {count["transformer"]} transformers, \
{count["downsample"]} downsamplers, {count["upsample"]} upsamplers.

The two do not agree. "4 ResNet layers and 2 ViTs" fits no block. It fits an encoder level, 2 x (ResBlock, transformer),
if a ResBlock counts as two layers, one per convolution. And only the middle block has a transformer at 8x8.""")
