"""Fig. 3 drawn from the models themselves: `python notebooks/drawing.py` writes docs/architecture.png.

Lengths are pixels of a page WIDTH wide, y points down. The picture has twice as many, to stay sharp on fine screens.
"""

import sys
from pathlib import Path
from typing import BinaryIO

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Arc, Circle, FancyBboxPatch, Rectangle

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from controlnet import ControlNet
from unet import Block, UNet

WIDTH, HEIGHT = 830, 758
INK, LOCKED, TRAINED, CARD = "#1f2328", "#c9d6e3", "#ffd08a", "#f6f8fa"
FLOW, SKIP, RESIDUAL = "#6e7781", "#0b5394", "#b34700"  # told apart by their dashes too
ENCODER, DECODER, COPY, BOX = 16, 290, 578, 204  # left edges of the three columns, and their width
ADD = (ENCODER + BOX + DECODER) / 2  # where residuals meet skips
RIGHT = 808  # where the hint goes down
TOP, ROW, GAP, LEVEL_GAP = 180, 22, 11, 26
LATENT_Y, OUT_Y = 116, 134
DASHES = (0, (4, 1.5))
SHORT = {"resnet": "res", "transformer": "attn", "downsample": "down", "upsample": "up"}


def output_sizes(unet: UNet, controlnet: ControlNet, image_size: int) -> dict[torch.nn.Module, str]:
    """What each module puts out as an image passes through: "channels · height×width"."""
    sizes = {}

    def record(module, inputs, output):
        if isinstance(output, torch.Tensor) and output.ndim == 4:
            sizes[module] = f"{output.shape[1]} · {output.shape[2]}×{output.shape[3]}"

    modules = [*unet.modules(), *controlnet.modules()]
    handles = [module.register_forward_hook(record) for module in modules]
    zeros, side = unet.conv_out.weight.new_zeros, image_size // 8
    x, t, context = (
        zeros(1, unet.config.in_channels, side, side),
        zeros(1).long(),
        zeros(1, 77, unet.config.context_dim),
    )
    with torch.no_grad():
        unet(x, t, context, controlnet(x, zeros(1, 3, image_size, image_size), t, context))
    for handle in handles:
        handle.remove()
    return sizes


def layers(block: Block) -> str:
    """A block's layers as the boxes name them; the middle block numbers its two ResBlocks."""
    return " + ".join(SHORT.get(name.rstrip("12"), name) for name, _ in block.named_children())


class Page:
    """Shapes and words on a light card, which looks the same on a white page and on a dark one."""

    def __init__(self):
        self.figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100))
        self.figure.patch.set_alpha(0)
        self.axis = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        self.axis.axis("off")
        self.box(1, 1, WIDTH - 2, HEIGHT - 2, CARD, edge="#d0d7de", rounding=10, zorder=0)

    def box(self, x, y, width, height, face, edge=INK, rounding=3.0, **style):
        shape = {"boxstyle": f"round,pad=0,rounding_size={rounding}", "linewidth": 0.8, "zorder": 3} | style
        self.axis.add_patch(FancyBboxPatch((x, y), width, height, facecolor=face, edgecolor=edge, **shape))

    def text(self, x, y, words, size=8.0, **style):
        style = {"va": "center", "color": INK, "zorder": 5} | style
        self.axis.text(x, y, words, fontsize=size, **style)

    def named_box(self, x, y, words, size, face, width=BOX):
        """A box with its name at the left and its output's size at the right."""
        self.box(x, y, width, ROW, face)
        self.text(x + 7, y + ROW / 2, words)
        self.text(x + width - 7, y + ROW / 2, size, ha="right")

    def line(self, *points, colour=FLOW, arrow=True, **style):
        style = {"color": colour, "linewidth": 1.3, "solid_capstyle": "butt", "zorder": 2} | style
        self.axis.plot(*zip(*points), **style)
        if arrow:
            head = {"arrowstyle": "-|>,head_width=0.22,head_length=0.42", "color": colour, "linewidth": 0}
            head |= {"shrinkA": 0, "shrinkB": 0}
            self.axis.annotate("", points[-1], points[-2], arrowprops=head, zorder=4)

    def plus(self, x, y, colour=RESIDUAL):
        self.axis.add_patch(Circle((x, y), 7, facecolor="white", edgecolor=colour, linewidth=1.2, zorder=4))
        self.text(x, y, "+", 10, ha="center", color=colour)

    def zero(self, x, y):
        """A zero convolution, centred."""
        self.box(x - 9, y - 8, 18, 16, "white", edge=RESIDUAL, rounding=2, linewidth=1.2)
        self.text(x, y, "0", 8, ha="center", color=RESIDUAL, weight="bold")

    def lock(self, x, y, scale=0.7):
        shackle = {"theta1": 180, "theta2": 360, "linewidth": 1.8 * scale, "zorder": 5}
        self.axis.add_patch(Arc((x, y - 2 * scale), 8 * scale, 12 * scale, color=INK, **shackle))
        self.axis.add_patch(Rectangle((x - 6 * scale, y - 2 * scale), 12 * scale, 9 * scale, color=INK, zorder=5))


def row_tops(unet: UNet, sizes: dict[torch.nn.Module, str]) -> list[float]:
    """The y of the encoder's blocks. Levels stand apart, as in Fig. 3, and so does block 0, where the hint comes in."""
    tops, sides = [TOP], [sizes[block].split("×")[1] for block in unet.encoder]
    for i in range(1, len(sides)):
        tops.append(tops[-1] + ROW + (GAP if i > 1 and sides[i] == sides[i - 1] else LEVEL_GAP))
    return tops


def draw_architecture(unet: UNet, controlnet: ControlNet, file: str | Path | BinaryIO, image_size: int = 512) -> None:
    """Write the PNG: left the locked UNet, its encoder down and its decoder up, right what is trained."""
    page, sizes, half = Page(), output_sizes(unet, controlnet, image_size), BOX / 2
    tops = row_tops(unet, sizes)
    bottom = tops[-1] + ROW + LEVEL_GAP
    middle_y, hint_y = bottom + ROW / 2, tops[0] + ROW + LEVEL_GAP / 2
    zero_x = (DECODER + BOX + COPY) / 2

    # From block to block, behind the boxes.
    page.line((ENCODER + BOX, LATENT_Y), (COPY + 30, LATENT_Y), (COPY + 30, TOP))
    page.line((ENCODER + half, LATENT_Y), (ENCODER + half, TOP))
    for y, next_y in zip(tops, [*tops[1:], bottom]):
        arrow = next_y - y > ROW + GAP  # there is room for one
        page.line((ENCODER + half, y + ROW), (ENCODER + half, next_y), arrow=arrow)
        page.line((COPY + half, y + ROW), (COPY + half, next_y), arrow=arrow)
        page.line((DECODER + half, next_y), (DECODER + half, y + ROW), arrow=arrow)
    page.line((ENCODER + BOX, middle_y), (DECODER + half - 7, middle_y))
    page.line((DECODER + half, middle_y), (DECODER + half, bottom), arrow=False)
    page.line((DECODER + half, TOP), (DECODER + half, OUT_Y + ROW))

    # Encoder i; beside it decoder 11 - i, which takes encoder i's features; the copy of encoder i.
    for i, (block, copy, y) in enumerate(zip(unet.encoder, controlnet.encoder, tops, strict=True)):
        mirror, y_skip = unet.decoder[11 - i], y + ROW / 2
        below = (y + ROW + [*tops, bottom][i + 1]) / 2
        page.named_box(ENCODER, y, f"{i}  {layers(block)}", sizes[block], LOCKED)
        page.named_box(DECODER, y, f"{11 - i}  {layers(mirror)}", sizes[mirror], LOCKED)
        page.named_box(COPY, y, f"{i}  {layers(copy)}", sizes[copy], TRAINED)
        page.line((ENCODER + BOX, y_skip), (ADD - 7, y_skip), colour=SKIP, arrow=False)
        page.line((ADD + 7, y_skip), (DECODER, y_skip), colour=SKIP)
        # Residual 0 leaves after the hint has been added, the others at their blocks.
        start = [(COPY + half, hint_y)] if i == 0 else [(COPY, y_skip), (zero_x - 24, y_skip)]
        page.line(*start, (start[-1][0], below), (ADD, below), (ADD, y_skip + 7), colour=RESIDUAL, linestyle=DASHES)
        page.zero(zero_x, start[0][1])
        page.plus(ADD, y_skip)

    page.named_box(ENCODER, bottom, layers(unet.middle), sizes[unet.middle], LOCKED)
    page.named_box(COPY, bottom, layers(controlnet.middle), sizes[controlnet.middle], TRAINED)
    page.line((COPY, middle_y), (DECODER + half + 7, middle_y), colour=RESIDUAL, linestyle=DASHES)
    page.zero(zero_x, middle_y)
    page.plus(DECODER + half, middle_y)

    # What comes in and what goes out.
    side, encoder = image_size // 8, controlnet.hint_encoder
    latent_size = f"{unet.config.in_channels} · {side}×{side}"
    page.named_box(ENCODER, LATENT_Y - ROW / 2, "$z_t$, noised latent", latent_size, "white")
    page.named_box(DECODER, OUT_Y, "norm + conv", sizes[unet.conv_out], LOCKED)
    page.line((DECODER + BOX, OUT_Y + ROW / 2), (DECODER + BOX + 24, OUT_Y + ROW / 2))
    page.text(DECODER + BOX + 30, OUT_Y + ROW / 2, "ε", 11)
    page.named_box(COPY, 42, "hint image", f"{encoder[0].in_channels} · {image_size}×{image_size}", "white")
    page.line((COPY + half, 42 + ROW), (COPY + half, 78))
    page.named_box(COPY, 78, "hint encoder", sizes[encoder[-2]], TRAINED)
    way = [(COPY + BOX, 89), (RIGHT, 89), (RIGHT, hint_y), (COPY + half + 7, hint_y)]
    page.line(*way, colour=RESIDUAL, linestyle=DASHES)
    page.zero(RIGHT, 130)
    page.text(RIGHT - 14, 130, sizes[encoder[-1]], ha="right")
    page.plus(COPY + half, hint_y)
    end = bottom + ROW + 34
    inputs = [
        (ENCODER, 54, "time $t$", "time embedding", "every res", LOCKED),
        (ENCODER, 82, "prompt", "text encoder", "every attn, the copy's too", LOCKED),
        (COPY, end, "time $t$", "time embedding", "every res", TRAINED),
    ]
    for x, y, source, network, target, face in inputs:
        page.text(x, y, source)
        page.line((x + 43, y), (x + 58, y))
        page.box(x + 58, y - ROW / 2, 98, ROW, face)
        page.text(x + 107, y, network, 7.6, ha="center")
        page.line((x + 156, y), (x + 171, y))
        page.text(x + 175, y, target)

    # Headings and legend.
    for x, y, words in (
        (ENCODER, TOP, "encoder"), (DECODER, TOP, "decoder"), (COPY + 36, TOP, "copy of the encoder"),
        (ENCODER, bottom, "middle"), (COPY, bottom, "its copy"),
    ):  # fmt: skip
        page.text(x, y - 10, words, style="italic")
    for x, y in ((ENCODER, TOP), (DECODER, TOP), (ENCODER, bottom)):
        page.lock(x + BOX - 8, y - 10)
    page.lock(ENCODER + 8, 22, scale=1)
    page.text(ENCODER + 22, 22, "Stable Diffusion, locked", 11, weight="bold")
    page.text(COPY, 22, "ControlNet, trained", 11, weight="bold")
    page.line((ENCODER, end), (ENCODER + 28, end), colour=SKIP)
    page.text(ENCODER + 34, end, "skip connection")
    page.line((160, end), (188, end), colour=RESIDUAL, linestyle=DASHES)
    page.text(194, end, "what the ControlNet adds")
    page.zero(366, end)
    page.text(380, end, "zero convolution")
    page.plus(499, end)
    page.text(511, end, "sum")
    sizes_are = f"{sizes[unet.encoder[0]]}: channels · height×width of what a box puts out"
    page.text(ENCODER, end + 26, f"res: ResBlock, attn: transformer. {sizes_are}.")
    page.figure.savefig(file, format="png", dpi=200)


if __name__ == "__main__":
    with torch.device("meta"):  # shapes only: no memory, no arithmetic
        unet = UNet()
        draw_architecture(unet, ControlNet.from_unet(unet), ROOT / "docs" / "architecture.png")
