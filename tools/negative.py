"""A second base for the miniature's ControlNet (Fig. 12): `python -m tools.negative` makes it, or goes on making it.

It paints the same scenes as a photographic negative. The first base's ControlNet is then put on both:
docs/negative.png, docs/logs/negative.json. Empty runs/negative when the first base has changed.
"""

from pathlib import Path

from support.command import run_command_line

import torch

from convergence import FOLLOWED
from data import DRAWN_HELD_OUT, DrawnImages
from metrics import circle_iou, colour_error
from sample import generate
from stable_diffusion import TINY, TINY_FILE, StableDiffusion
from support.files import save_json
from support.options import ArgumentParser
from support.pictures import contact_sheet, save_picture
from tools.fit import Plan
from tools.pretrain import encode_scenes, learn_to_paint, pack
from weights import load_controlnet

ROOT = Path(__file__).parent.parent
PLAN, SCENES = Plan(1500, 16, 5e-4, constant=0), 4000
HINTS, SHOWN = 32, 8  # held-out hints that are scored, and the first of them, which are shown


def main() -> None:
    ArgumentParser(prog="python -m tools.negative", description="Make a second base, in half an hour.").parse_args()
    folder, sd = ROOT / "runs" / "negative", StableDiffusion.load("tiny")
    folder.mkdir(parents=True, exist_ok=True)
    moments, captions = encode_scenes(folder / "latents.safetensors", sd.vae, SCENES, torch.neg)
    learn_to_paint("negative", folder, sd, moments, captions, PLAN)
    pack(sd, folder / TINY_FILE.name, TINY_FILE.parent)

    pairs = DrawnImages(HINTS, TINY.resolution, DRAWN_HELD_OUT)
    hints = torch.stack([pairs.hint(i) for i in range(HINTS)])
    settings = {"size": hints.shape[2:], "guidance_scale": TINY.guidance_scale, "control_mode": "conditional"}
    rows, table = {"hint": hints * 2 - 1}, {}
    for name, base in {"first": "tiny", "second": folder / TINY_FILE.name}.items():
        sd = StableDiffusion.load(base)
        controlnet = load_controlnet(ROOT / "models" / "fill50k" / "controlnet.safetensors", sd.unet)
        for label, networks in {"alone": [], "controlled": [controlnet]}.items():
            images = generate(sd, networks, [hints] * len(networks), pairs.prompts, **settings)
            iou = circle_iou(images, hints)
            scores = {"iou": iou.mean(), "followed": (iou >= FOLLOWED).float().mean()}
            if networks:  # else there is no place to look for the colours at
                scores["colour_error"] = colour_error(images, hints, pairs.prompts).mean()
                scores["colour_error_of_negative"] = colour_error(-images, hints, pairs.prompts).mean()
            table[f"{name} base, {label}"] = {score: round(value.item(), 4) for score, value in scores.items()}
            rows[f"{name}\nbase,\n{label}"] = images
    save_json(table, ROOT / "docs" / "logs" / "negative.json")
    sheet = contact_sheet({label: images[:SHOWN] for label, images in rows.items()}, pairs.prompts[:SHOWN])
    save_picture(sheet, ROOT / "docs" / "negative.png")


if __name__ == "__main__":
    run_command_line(main)
