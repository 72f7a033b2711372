"""A second base for the miniature's ControlNet (Fig. 12): `python -m tools.dusk`, which goes on where it was stopped.

What ships is fine-tuned to paint the same shapes in another light, from above on the shape and from below on the
background. The ControlNet that was trained on the first base is then put on both, unchanged: the table that is printed
says what follows, and is kept in docs/logs/dusk.json; docs/dusk.png shows it.
"""

from pathlib import Path

import torch
from torch import Tensor

from convergence import FOLLOWED
from data import DRAWN_HELD_OUT, DrawnImages
from metrics import circle_distance, prompt_colours
from sample import generate, locate_controlnet
from stable_diffusion import TINY, TINY_FILE, StableDiffusion
from support.errors import run_command_line
from support.files import save_json
from support.options import ArgumentParser
from support.pictures import contact_sheet, save_picture
from tools.pretrain import Fit, encode_scenes, learn_to_paint, pack
from weights import load_controlnet

ROOT = Path(__file__).parent.parent
PLAN, SCENES = Fit(1500, 16, 5e-4, constant=0), 2000
DUSK = 0.6  # of the brightness is lost where it is darkest
HINTS, SHOWN = 32, 8  # held-out hints that are scored, and the first of them, which are shown


def at_dusk(images: Tensor, captions: list[str]) -> Tensor:
    """Scenes [B, 3, H, W] in [-1, 1] in another light: shapes lit from above, the background from below."""
    colour, background = named_colours(captions)
    contrast = colour - background
    share = ((images - background) * contrast).sum(1, keepdim=True) / contrast.square().sum(1, keepdim=True)
    depth = (torch.arange(images.shape[2]) + 0.5)[:, None] / images.shape[2]  # 0 at the top, 1 at the bottom
    colour, background = colour / 2 + 0.5, background / 2 + 0.5
    lit = share * colour * (1 - DUSK * depth) + (1 - share) * background * (1 - DUSK * (1 - depth))
    return lit * 2 - 1


def named_colours(captions: list[str]) -> Tensor:
    """The colours of shape and background that captions name: [2, B, 3, 1, 1] in [-1, 1]."""
    return torch.stack([prompt_colours(caption) for caption in captions], dim=1).float()[..., None, None] * 2 - 1


def iou_in_light(images: Tensor, hints: Tensor, captions: list[str], light) -> Tensor:
    """metrics.circle_iou [B] for pictures that `light` changed: a pixel is the shape's if it is nearer to its colour.

    `light` is at_dusk, or for pictures as they are drawn `daylight`. The colours are the caption's, since no region of
    a shaded picture has one of its own.
    """
    colours = [light(colour.expand_as(images), captions) for colour in named_colours(captions)]
    to_shape, to_background = ((images - colour).abs().mean(dim=1) for colour in colours)
    painted = to_shape < to_background
    hinted = torch.stack([circle_distance(hint) <= 0 for hint in hints])
    return (painted & hinted).sum((1, 2)) / (painted | hinted).sum((1, 2))


def daylight(images: Tensor, captions: list[str]) -> Tensor:
    return images


def train(folder: Path) -> None:
    """Write the second base to `folder`, where a training that was stopped goes on: empty it for another first base."""
    sd = StableDiffusion.load("tiny")
    moments, captions = encode_scenes(folder / "latents.safetensors", sd.vae, SCENES, at_dusk)
    learn_to_paint("dusk", PLAN, folder, sd, moments, captions)
    pack(sd, folder / TINY_FILE.name, TINY_FILE.parent)


@torch.no_grad()
def transfer(path: Path, controlnet: Path) -> None:
    """Print how the ControlNet does on each base, and save docs/logs/dusk.json and docs/dusk.png."""
    pairs = DrawnImages(HINTS, TINY.resolution, DRAWN_HELD_OUT)
    hints, targets = (torch.stack([part(i) for i in range(HINTS)]) for part in (pairs.hint, pairs.image))
    settings = {"steps": TINY.sampling_steps, "guidance_scale": TINY.guidance_scale, "control_mode": "conditional"}
    rows, table = {"hint": hints * 2 - 1}, {}
    print(f"{HINTS} held-out hints{'':13}IoU, mean   followed   error to the target: as drawn, at dusk")
    for name, base, light in (("first", "tiny", daylight), ("second", path, at_dusk)):
        sd = StableDiffusion.load(base)
        for label, networks in (("alone", []), ("controlled", [load_controlnet(controlnet, sd.unet)])):
            images = generate(sd, networks, [hints] * len(networks), pairs.prompts, size=hints.shape[2:], **settings)
            iou = iou_in_light(images, hints, pairs.prompts, light)
            errors = [(images - there(targets, pairs.prompts)).abs().mean() / 2 for there in (daylight, at_dusk)]
            scores = {"iou": iou.mean(), "followed": (iou >= FOLLOWED).float().mean()}
            scores |= {"error_as_drawn": errors[0], "error_at_dusk": errors[1]}
            table[f"{name} base, {label}"] = row = {score: round(value.item(), 4) for score, value in scores.items()}
            print("{:27}{iou:10.2f}{followed:10.0%}{error_as_drawn:15.3f}{error_at_dusk:11.3f}".format(
                f"{name} base, {label}", **row))  # fmt: skip
            rows[f"{name}\nbase,\n{label}"] = images
    save_json(table, ROOT / "docs" / "logs" / "dusk.json")
    shown = {label: images[:SHOWN] for label, images in rows.items()}
    save_picture(contact_sheet(shown, pairs.prompts[:SHOWN]), ROOT / "docs" / "dusk.png")


def main() -> None:
    parser = ArgumentParser(prog="python -m tools.dusk", description="Make a second base, and move to it.")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/dusk"), help="checkpoint, log and weights")
    parser.add_argument("--controlnet", default=ROOT / "models" / "fill50k" / "controlnet.safetensors")
    args = parser.parse_args()
    controlnet = locate_controlnet(args.controlnet)
    load_controlnet(controlnet, StableDiffusion.load("tiny").unet)  # a wrong one is reported before the training
    args.output_dir.mkdir(parents=True, exist_ok=True)
    train(args.output_dir)
    transfer(args.output_dir / TINY_FILE.name, controlnet)


if __name__ == "__main__":
    run_command_line(main)
