"""A second base for the miniature's ControlNet (Fig. 12): `python -m tools.dusk`, which goes on where it was stopped.

It paints the same shapes at dusk, lit from above, and the background from below. The first base's ControlNet is then
put on both: docs/dusk.png, docs/logs/dusk.json. Empty runs/dusk when the first base has changed.
"""

from pathlib import Path

from support.command import run_command_line

import torch
from torch import Tensor

from convergence import FOLLOWED
from data import DRAWN_HELD_OUT, DrawnImages
from metrics import circle_distance, prompt_colours
from sample import generate
from stable_diffusion import TINY, TINY_FILE, StableDiffusion
from support.files import save_json
from support.options import ArgumentParser
from support.pictures import contact_sheet, save_picture
from tools.fit import Plan
from tools.pretrain import encode_scenes, learn_to_paint, pack
from weights import load_controlnet

ROOT = Path(__file__).parent.parent
PLAN, SCENES = Plan(1500, 16, 5e-4, constant=0), 2000
DUSK = 0.6  # of the brightness is lost where it is darkest
HINTS, SHOWN = 32, 8  # held-out hints that are scored, and the first of them, which are shown


def lit_colours(captions: list[str], height: int, dusk: float) -> Tensor:
    """What colours shapes and backgrounds of these captions have, row by row: [2, B, 3, height, 1] in [-1, 1]."""
    colours = torch.stack([prompt_colours(caption) for caption in captions], dim=1).float()[..., None, None]
    depth = (torch.arange(height) + 0.5)[:, None] / height  # 0 at the top, 1 at the bottom
    return colours * (1 - dusk * torch.stack([depth, 1 - depth])[:, None, None]) * 2 - 1


def at_dusk(images: Tensor, captions: list[str]) -> Tensor:
    """Scenes as they are drawn, [B, 3, H, W] in [-1, 1], in the second base's light."""
    colour, background = lit_colours(captions, images.shape[2], dusk=0)
    contrast = colour - background
    coverage = ((images - background) * contrast).sum(1, keepdim=True) / contrast.square().sum(1, keepdim=True)
    colour, background = lit_colours(captions, images.shape[2], DUSK)
    return coverage * colour + (1 - coverage) * background


def iou_in_light(images: Tensor, hints: Tensor, captions: list[str], dusk: float) -> Tensor:
    """metrics.circle_iou [B] where regions have no single colour: a pixel belongs to the nearer of the caption's."""
    colours = lit_colours(captions, images.shape[2], dusk)
    to_shape, to_background = ((images - colour).abs().mean(dim=1) for colour in colours)
    painted, hinted = to_shape < to_background, torch.stack([circle_distance(hint) <= 0 for hint in hints])
    return (painted & hinted).sum((1, 2)) / (painted | hinted).sum((1, 2))


def main() -> None:
    ArgumentParser(prog="python -m tools.dusk", description="Make a second base, in half an hour.").parse_args()
    folder, sd = ROOT / "runs" / "dusk", StableDiffusion.load("tiny")
    folder.mkdir(parents=True, exist_ok=True)
    moments, captions = encode_scenes(folder / "latents.safetensors", sd.vae, SCENES, at_dusk)
    learn_to_paint("dusk", folder, sd, moments, captions, PLAN)
    pack(sd, folder / TINY_FILE.name, TINY_FILE.parent)

    pairs = DrawnImages(HINTS, TINY.resolution, DRAWN_HELD_OUT)
    hints, targets = (torch.stack([part(i) for i in range(HINTS)]) for part in (pairs.hint, pairs.image))
    settings = {"size": hints.shape[2:], "guidance_scale": TINY.guidance_scale, "control_mode": "conditional"}
    rows, table = {"hint": hints * 2 - 1}, {}
    for name, base, dusk in (("first", "tiny", 0), ("second", folder / TINY_FILE.name, DUSK)):
        sd = StableDiffusion.load(base)
        controlnet = load_controlnet(ROOT / "models" / "fill50k" / "controlnet.safetensors", sd.unet)
        for label, networks in (("alone", []), ("controlled", [controlnet])):
            images = generate(sd, networks, [hints] * len(networks), pairs.prompts, **settings)
            iou = iou_in_light(images, hints, pairs.prompts, dusk)
            scores = {"iou": iou.mean(), "followed": (iou >= FOLLOWED).float().mean()}
            scores["error_as_drawn"] = (images - targets).abs().mean() / 2
            scores["error_at_dusk"] = (images - at_dusk(targets, pairs.prompts)).abs().mean() / 2
            table[f"{name} base, {label}"] = {score: round(value.item(), 4) for score, value in scores.items()}
            rows[f"{name}\nbase,\n{label}"] = images
    save_json(table, ROOT / "docs" / "logs" / "dusk.json")
    sheet = contact_sheet({label: images[:SHOWN] for label, images in rows.items()}, pairs.prompts[:SHOWN])
    save_picture(sheet, ROOT / "docs" / "dusk.png")


if __name__ == "__main__":
    run_command_line(main)
