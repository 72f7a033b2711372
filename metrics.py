"""Does the picture follow the hint? Scores for the circle task (fill50k, drawn or real)."""

import re

import torch
from torch import Tensor

from data import SHAPES
from support.colours import css_colour

EDGE = 0.02  # of the side: pixels this near the outline are blends, and are left out of colours
FLAT = 0.04  # mean absolute difference under which two colours count as one


def circle_distance(hint: Tensor) -> Tensor:
    """Distance in pixels [H, W] of every pixel from the circle that a hint [3, H, W] in [0, 1] shows, inside negative.

    The circle is fitted to the bright pixels (least squares on x² + y² = 2ax + 2by + c), so one that the border
    clips is found whole. Raises ValueError when they lie on no circle.
    """
    ring = hint.cpu().mean(dim=0).double()
    bright = ring > 0.3  # a real ring, 5 pixels wide at 512, is partly grey at 128
    y, x = (torch.nonzero(bright).T + 0.5).double()
    if len(x) < 8:  # too few for the fit to mean anything
        raise ValueError("the hint shows no circle")
    weight, design = ring[bright].sqrt()[:, None], torch.stack([2 * x, 2 * y, torch.ones_like(x)], dim=1)
    a, b, c = torch.linalg.lstsq(weight * design, weight * (x**2 + y**2)[:, None]).solution[:, 0]
    radius = (c + a**2 + b**2).clamp(min=0).sqrt()
    if not (torch.hypot(x - a, y - b) - radius).abs().max() <= max(2, 0.02 * hint.shape[-1]):
        raise ValueError("the hint shows no circle")
    y, x = (torch.arange(side, dtype=torch.float64) + 0.5 for side in hint.shape[1:])
    return torch.hypot(x[None] - a, y[:, None] - b) - radius


def prompt_colours(prompt: str) -> Tensor:
    """The colours of disc and background that a fill50k prompt names: [2, 3] in [0, 1]. Raises ValueError if none."""
    if not (names := re.fullmatch(rf"(.+) (?:{'|'.join(SHAPES)}) with (.+) background", prompt.strip())):
        raise ValueError(f"no colours in {prompt!r}")
    return torch.stack([torch.from_numpy(css_colour(name)) for name in names.groups()]) / 255


def is_circle_task(hints: Tensor, prompts: list[str]) -> bool:
    """Whether circle_iou and colour_error can judge all these pairs: they are tried."""
    try:
        colour_error(hints, hints, prompts)
        return True
    except ValueError:
        return False


def segment(image: Tensor) -> Tensor:
    """What stands out from the background of an image [3, H, W] in [-1, 1]: bool [H, W].

    The background is the median colour of the outermost pixels, the foreground the median of those pixels that differ
    from it by more than half of the largest difference (the 98th percentile, against specks); then each pixel belongs
    to the nearer of the two (mean absolute difference). One flat colour has no foreground.
    """
    image = image.float().cpu() / 2 + 0.5
    frame = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], dim=1)
    background = frame.median(dim=1).values[:, None, None]
    distance = (image - background).abs().mean(dim=0)
    far = distance > distance.quantile(0.98) / 2
    if not far.any():
        return far
    foreground = image[:, far].median(dim=1).values[:, None, None]
    visible = (foreground - background).abs().mean() >= FLAT
    return visible & ((image - foreground).abs().mean(dim=0) < distance)


def circle_iou(images: Tensor, hints: Tensor) -> Tensor:
    """How well the painted disc covers the hinted one: intersection over union, [B], 1 = exactly.

    images [B, 3, H, W] in [-1, 1]; hints [B, 3, H, W] in [0, 1], rings, drawn here or fill50k's own. The painted disc
    is what stands out in the image (segment), whatever its colour.
    """
    pairs = [(segment(image), circle_distance(hint) <= 0) for image, hint in zip(images, hints, strict=True)]
    return torch.stack([(painted & hinted).sum() / (painted | hinted).sum() for painted, hinted in pairs]).float()


def colour_error(images: Tensor, hints: Tensor, prompts: list[str]) -> Tensor:
    """Mean absolute error [B, 2] of the colours inside and outside the hinted disc, 0 to 1 of the range.

    images and hints as for circle_iou; the wanted colours are the prompt's. Pixels near the outline are left out.
    """
    errors = []
    for image, hint, prompt in zip(images, hints, prompts, strict=True):
        distance, margin = circle_distance(hint), EDGE * hint.shape[-1]
        wanted, image = prompt_colours(prompt)[..., None], image.float().cpu() / 2 + 0.5
        inside, outside = image[:, distance < -margin], image[:, distance > margin]
        errors.append(torch.stack([(inside - wanted[0]).abs().mean(), (outside - wanted[1]).abs().mean()]))
    return torch.stack(errors)
