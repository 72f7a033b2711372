"""What turns a photograph into a hint: its edges, found by OpenCV, which is needed for nothing else."""

from argparse import ArgumentParser
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from support.errors import UserError, warn
from support.options import count_or_zero

KINDS = ("none", "canny", "scribble")
STROKE_BLUR = 3.0  # pixels, before and after the lines are found: that of the authors' fake scribbles
SCRIBBLE_THRESHOLDS = (30, 80)  # of the blurred picture, whose gradients are small
SHORTEST_STROKE = 50  # pixels
WHITE = 0.8  # or brighter: paper


def add_options(parser: ArgumentParser, several: bool = False) -> None:
    """Add --detect and Canny's two thresholds. `several`: there are many hints, and the parsed --detect is a list."""
    given = {"action": "append", "default": []} if several else {"default": "none"}
    told = "make the hint from a photograph (default: none, it is the hint)" + "; one for all, or one each" * several
    parser.add_argument("--detect", choices=KINDS, **given, help=told)
    parser.add_argument("--canny-low", type=count_or_zero, default=100, help="lower threshold of canny (default: 100)")
    parser.add_argument("--canny-high", type=count_or_zero, default=200, help="upper threshold of canny (default: 200)")


def detector(
    kind: str, canny_low: int = 100, canny_high: int = 200, invert: bool = False
) -> Callable[[Tensor], Tensor]:
    """What makes a hint, [3, H, W] of 0 and 1, from a picture [3, H, W] in [0, 1] that has its final size already.

    `kind` is "none" (the picture is a hint already and stays as it is, unless `invert` turns it), "canny" (with the
    thresholds of the authors' demo, by default) or "scribble".
    """
    if kind == "none":
        return lambda picture: 1 - picture if invert else picture
    try:
        import cv2
    except ImportError:
        raise UserError(f"--detect {kind} needs OpenCV: pip install opencv-python-headless, or pass a picture of the "
                        "edges without --detect") from None  # fmt: skip

    def detect(picture: Tensor) -> Tensor:
        pixels = (picture * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
        edges = cv2.Canny(pixels, canny_low, canny_high) if kind == "canny" else scribble(pixels)
        return torch.from_numpy(edges > 0).float().expand(3, -1, -1)

    return detect


def is_inverted(hint: Tensor) -> bool:
    """Whether a hint [3, H, W] looks like dark lines on white: most of it is white, and most of its frame."""
    white = hint.amin(0)  # bright in all channels: hints of colours are not meant
    frame = torch.cat([white[0], white[-1], white[:, 0], white[:, -1]])
    return bool(min(frame.median(), white.median()) > WHITE)


def warn_if_inverted(name: object, hint: Tensor) -> None:
    if is_inverted(hint):
        warn(f"{name}: the hint is dark on white, ControlNets are trained with white on black: turn it (sample.py "
             "--invert)")  # fmt: skip


def scribble(pixels: np.ndarray) -> np.ndarray:
    """Strokes along the main edges of a picture uint8 [H, W, 3]: bool [H, W].

    A blur removes fine texture; Canny finds edges one pixel wide; those shorter than SHORTEST_STROKE go; the others are
    widened to 11 pixels. The authors' fake scribbles end the same way, but their lines come from HED, a network that
    has learned which edges people draw. These come from contrast alone: they are not theirs.
    """
    import cv2

    lines = cv2.Canny(cv2.GaussianBlur(pixels, (0, 0), STROKE_BLUR), *SCRIBBLE_THRESHOLDS)
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(lines)
    long = statistics[:, cv2.CC_STAT_AREA] >= SHORTEST_STROKE  # of lines one pixel wide the area is the length
    long[0] = False  # what is no line
    return cv2.GaussianBlur(long[labels].astype(np.uint8) * 255, (0, 0), STROKE_BLUR) > 4
