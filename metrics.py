"""Does the picture follow the hint? Scores for the circle task, and two figures that show it early, for any task.

The denoising loss hardly tells whether a ControlNet has learned its condition (Sec. 4.2, sudden convergence). These do.
"""

import math
import re
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import SHAPES, css_colour, signed_distance

EDGE = 0.02  # of the side: pixels so near to the outline are blends, and are left out of colours
FLAT = 0.04  # mean absolute difference under which two colours count as one
GRID, SIZES = 64, 25  # of best_shape
GROWTH, JUMP = 10, 0.2  # see growth_step and jump_step


def circle_distance(hint: Tensor) -> Tensor:
    """Distance in pixels [H, W] of every pixel from the circle that a hint [3, H, W] in [0, 1] shows, inside negative.

    The circle is fitted to the bright pixels (least squares on x² + y² = 2ax + 2by + c), so one that the border
    clips is found whole. Raises ValueError when they lie on no circle.
    """
    ring = hint.mean(dim=0).double()
    y, x = (torch.nonzero(ring > 0.3).T + 0.5).double()
    weight = ring[ring > 0.3].sqrt()[:, None]
    rows = torch.stack([2 * x, 2 * y, torch.ones_like(x)], dim=1)
    if len(x) < 8:
        raise ValueError("the hint shows no circle")
    a, b, c = torch.linalg.lstsq(weight * rows, weight * (x**2 + y**2)[:, None]).solution[:, 0]
    radius = (c + a**2 + b**2).clamp(min=0).sqrt()
    if not (torch.hypot(x - a, y - b) - radius).abs().max() <= max(2, 0.02 * hint.shape[-1]):
        raise ValueError("the hint shows no circle")
    rows, columns = (torch.arange(side, dtype=torch.float64) + 0.5 for side in hint.shape[1:])
    return torch.hypot(columns[None] - a, rows[:, None] - b) - radius


def prompt_colours(prompt: str) -> Tensor:
    """What a prompt of fill50k names: [2, 3] in [0, 1], the disc's colour and the background's.

    Raises ValueError for another kind of prompt.
    """
    names = re.fullmatch(rf"(.+) (?:{'|'.join(SHAPES)}) with (.+) background", prompt.strip())
    if not names:
        raise ValueError(f"no colours in {prompt!r}")
    return torch.from_numpy(np.stack([css_colour(name) for name in names.groups()])) / 255


def is_circle_task(hints: Tensor, prompts: list[str]) -> bool:
    """Whether circle_iou and colour_error can judge all these pairs."""
    try:
        for hint, prompt in zip(hints, prompts):
            circle_distance(hint), prompt_colours(prompt)
    except ValueError:
        return False
    return True


def segment(image: Tensor) -> Tensor:
    """What stands out from the background of an image [3, H, W] in [-1, 1]: bool [H, W].

    The background is the median colour of the outermost pixels, the foreground the median of those pixels that
    differ from it by more than half of the largest difference (the 98th percentile, against specks); then each pixel
    belongs to the nearer of the two (mean absolute difference). One flat colour has no foreground.
    """
    image = image.float().cpu() / 2 + 0.5
    frame = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], dim=1)
    background = frame.median(dim=1).values[:, None, None]
    distance = (image - background).abs().mean(dim=0)
    far = distance > distance.quantile(0.98) / 2
    if not far.any():
        return far
    foreground = image[:, far].median(dim=1).values[:, None, None]
    if (foreground - background).abs().mean() < FLAT:
        return torch.zeros_like(far)
    return (image - foreground).abs().mean(dim=0) < distance


def circle_iou(images: Tensor, hints: Tensor) -> Tensor:
    """How well the painted disc covers the hinted one: intersection over union, [B], 1 = exactly.

    images [B, 3, H, W] in [-1, 1]; hints [B, 3, H, W] in [0, 1], rings, drawn here or fill50k's own. The hinted disc
    is the one inside the hint's circle (circle_distance), the painted one what stands out in the image (segment),
    whatever its colour. Raises ValueError for a hint that shows no circle.
    """
    scores = []
    for image, hint in zip(images, hints, strict=True):
        painted, hinted = segment(image), circle_distance(hint.cpu()) <= 0
        scores.append((painted & hinted).sum() / (painted | hinted).sum())
    return torch.stack(scores).float()


def colour_error(images: Tensor, hints: Tensor, prompts: list[str]) -> Tensor:
    """Mean absolute error [B, 2] of the colours inside and outside the hinted disc, 0 to 1 of the range.

    Shapes and the disc are circle_iou's; the wanted colours are the prompt's. Pixels within 2 % of the side from the
    outline are left out. Raises ValueError for a hint without a circle or a prompt without two colours.
    """
    errors = []
    for image, hint, prompt in zip(images, hints, prompts, strict=True):
        distance, margin = circle_distance(hint.cpu()), EDGE * hint.shape[-1]
        wanted = prompt_colours(prompt)[..., None]
        image = image.float().cpu() / 2 + 0.5
        regions = (distance < -margin, distance > margin)
        errors.append(torch.stack([(image[:, r] - colour).abs().mean() for r, colour in zip(regions, wanted)]))
    return torch.stack(errors)


def hint_response(own: Tensor, other: Tensor, eps: Tensor) -> tuple[float, float]:
    """How much the hint moves the prediction, and whether in the right direction: (hint sensitivity, hint gap).

    own, other [B, 4, h, w]: ε_θ of the same noised latents, times and prompts, with each pair's own hint and with
    another pair's; eps the true noise. The sensitivity is the root mean square of own - other, the gap the loss
    (equation 5) with the other hint less the one with the own. Both are exactly 0 while the zero convolutions are.
    While samples still ignore the hint and the loss looks flat, the sensitivity grows by a steady factor a step.
    """
    own, other, eps = own.double(), other.double(), eps.double()  # a gap of 1e-9 is to be seen beside a loss of 0.02
    sensitivity = (own - other).square().mean().sqrt()
    gap = F.mse_loss(other, eps) - F.mse_loss(own, eps)
    return sensitivity.item(), gap.item()


def growth_step(history: list[dict]) -> int | None:
    """The first logged step at which the hint sensitivity is seen to grow, or None.

    Seen: three times running it was 10 times its smallest value so far or more, so that neither rounding noise nor a
    single spike is taken for growth.
    """
    smallest, running = math.inf, 0
    for entry in history:
        if value := entry.get("hint_sensitivity"):
            smallest = min(smallest, value)
            running = running + 1 if value >= GROWTH * smallest else 0
            if running == 3:
                return entry["step"]
    return None


def jump_step(history: list[dict]) -> int | None:
    """The first logged step at which another pair's hint costs a fifth of the loss (hint_gap / heldout_loss), or None.

    The samples follow their hints by then, or within a few steps.
    """
    return next((e["step"] for e in history if e.get("hint_gap", 0) >= JUMP * e.get("heldout_loss", 1)), None)


@cache
def shape_outlines() -> tuple[Tensor, Tensor]:
    """data.SHAPES at 25 sizes from 1/8 to 1/2 of the side: their spectra, and how many pixels of each lie inside a
    64 x 64 picture, [75, 64, 64] by the place of the centre.
    """
    y, x = np.mgrid[-GRID:GRID, -GRID:GRID]
    radii = np.linspace(1 / 8, 1 / 2, SIZES) * GRID
    outlines = np.stack([signed_distance(shape, x, y, radius) <= 0 for shape in SHAPES for radius in radii])
    spectra = torch.fft.rfft2(torch.from_numpy(np.fft.ifftshift(outlines, (1, 2))).float()).conj()
    return spectra, shared_pixels(torch.ones(GRID, GRID), spectra)


def shared_pixels(picture: Tensor, spectra: Tensor) -> Tensor:
    """Pixels that a picture [64, 64] shares with each outline at each place [75, 64, 64]: a correlation."""
    padded = torch.fft.rfft2(picture, s=(2 * GRID, 2 * GRID))
    return torch.fft.irfft2(padded * spectra)[:, :GRID, :GRID]


def best_shape(mask: Tensor) -> str:
    """Which of data.SHAPES a segmented picture [H, W] shows: the one that covers it best, at any place and size.

    Intersection over union with shape_outlines, clipped by the border, at each place of a 64 x 64 grid.
    """
    spectra, areas = shape_outlines()
    mask = (F.adaptive_avg_pool2d(mask[None].float(), GRID)[0] > 0.5).float()
    both = shared_pixels(mask, spectra)
    iou = both / (areas + mask.sum() - both).clamp(min=1)
    return SHAPES[iou.flatten().argmax().item() // iou[:SIZES].numel()]


def judge(sample: Tensor, caption: str) -> tuple[float, float, bool]:
    """A sample against its caption: errors of the shape's and the background's median colours (mean absolute, 0 to
    1), and whether it is the right shape. What is shape is told by segment, which by best_shape.
    """
    mask = segment(sample)
    regions = (mask if mask.any() else ~mask, ~mask)  # without any shape, its colour is taken to be the background's
    colours = torch.stack([sample[:, region].median(dim=1).values for region in regions]) / 2 + 0.5
    errors = (colours - prompt_colours(caption)).abs().mean(dim=1)
    return *errors.tolist(), mask.any().item() and f" {best_shape(mask)} with " in caption
