"""docs/fill50k.png: the four pairs of the authors' fill50k that are here, sampled. `python notebooks/fill50k.py`"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data import PairedImages
from metrics import circle_iou, colour_error
from sample import generate
from stable_diffusion import TINY, StableDiffusion
from support.pictures import to_picture
from weights import load_controlnet

SAMPLES = 3  # of each hint


def main() -> None:
    sd = StableDiffusion.load("tiny")
    controlnet = load_controlnet(ROOT / "models" / "fill50k" / "controlnet.safetensors", sd.unet)
    pairs = PairedImages(ROOT / "tests" / "fill50k", TINY.resolution)
    hints = torch.stack([pairs.hint(i) for i in range(len(pairs))]).repeat_interleave(SAMPLES, 0)
    prompts = [prompt for prompt in pairs.prompts for _ in range(SAMPLES)]
    images = generate(
        sd, [controlnet], [hints], prompts, steps=TINY.sampling_steps, guidance_scale=TINY.guidance_scale,
        control_mode="conditional",
    )  # fmt: skip
    ious = circle_iou(images, hints)
    print(f"IoU of each hint, mean of {SAMPLES}: {[round(iou, 3) for iou in ious.view(-1, SAMPLES).mean(1).tolist()]}")
    print(f"colour error: {colour_error(images, hints, prompts).mean():.3f}")

    figure, axes = plt.subplots(len(pairs), SAMPLES + 2, figsize=(8.3, 7.4), layout="constrained")
    for i, row in enumerate(axes):
        samples = range(SAMPLES * i, SAMPLES * (i + 1))
        shown = [("hint", pairs.hint(i) * 2 - 1), ("target", pairs.image(i))]
        shown += [(f"IoU {ious[j]:.2f}", images[j]) for j in samples]
        for axis, (label, image) in zip(row, shown):
            axis.imshow(to_picture(image))
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(label, fontsize=9)
        row[2].set_title(pairs.prompts[i], fontsize=10)
    figure.savefig(ROOT / "docs" / "fill50k.png", dpi=100)


if __name__ == "__main__":
    with torch.no_grad():
        main()
