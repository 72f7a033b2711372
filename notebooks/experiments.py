"""The trainings whose logs the notebooks read: `python notebooks/experiments.py`, about an hour on two CPU cores.

Each run stays in runs/NAME and is not trained again once it is complete; its log is copied to docs/logs/NAME.jsonl.
Scores on 16 held-out hints go to docs/logs/ablation.json and pairs.json, samples to docs/ablation-ARM.png and
docs/jump.png.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data import DRAWN_HELD_OUT, DrawnImages
from metrics import circle_iou, colour_error
from sample import generate
from stable_diffusion import StableDiffusion
from support.log import read_log
from support.pictures import MARGIN, contact_sheet, save_picture, side_by_side, to_picture
from weights import load_controlnet

STEPS = 600
ARMS = {"zero": [], "gaussian": ["--connection", "gaussian"], "lite": ["--copy", "lite"]}
SEEDS = (0, 1)
PAIRS = (20, 200)  # and the 2,000 of the other runs
VARIANTS = {
    "lr-5e-4": ["--learning-rate", "5e-4"],
    "lr-2e-3": ["--learning-rate", "2e-3"],
    "batch-4": ["--train-batch-size", "4"],
    "prompts-never-empty": ["--proportion-empty-prompts", "0"],
    "prompts-always-empty": ["--proportion-empty-prompts", "1"],
}
FORECASTS = range(10)  # seeds on which convergence.forecast is judged, tests/test_convergence.py
PROMPTS = {  # Fig. 8's four kinds, from a held-out pair's prompt
    "none": lambda prompt: "",
    "insufficient": lambda prompt: "circle",
    "conflicting": lambda prompt: prompt.replace(" circle ", " square "),
    "perfect": lambda prompt: prompt,
}
HINTS = 16
JUMP_STEPS = (140, 180, 220, 300, 400)
SIDE = 128  # pixels of the miniature's pictures


def train(name: str, *options: str, steps: int = STEPS, encoded: str = "") -> Path:
    """Train the run `name` unless it is complete; returns its ControlNet. `encoded` is a run with the same latents."""
    folder = ROOT / "runs" / name
    if encoded and not folder.exists():
        shutil.copytree(ROOT / "runs" / encoded / "cache", folder / "cache")
    if len(read_log(folder / "log.jsonl")) < steps:
        command = [sys.executable, "train.py", "--output-dir", folder, "--max-train-steps", steps, *options]
        if (folder / "config.json").exists():
            command += ["--resume-from-checkpoint", "latest"]
        subprocess.run([str(word) for word in command], cwd=ROOT, check=True)
    shutil.copy(folder / "log.jsonl", ROOT / "docs" / "logs" / f"{name}.jsonl")
    return folder / "controlnet.safetensors"


def draw(count: int) -> Path:
    """The folder with `count` drawn pairs, made if it is not there."""
    folder = ROOT / "runs" / f"drawn-{count}"
    if not (folder / "prompt.json").exists():
        command = [sys.executable, "-m", "tools.draw_pairs", "--count", str(count), "--size", str(SIDE)]
        subprocess.run([*command, "--output", str(folder)], cwd=ROOT, check=True)
    return folder


def judge(sd: StableDiffusion, path: Path, kind: str) -> tuple[dict, torch.Tensor]:
    """IoU and colour error of held-out hints under one kind of prompt, and the first sample."""
    pairs = DrawnImages(HINTS, SIDE, DRAWN_HELD_OUT)
    hints, prompts = torch.stack([pairs.hint(i) for i in range(HINTS)]), [PROMPTS[kind](p) for p in pairs.prompts]
    controlnet = load_controlnet(path, sd.unet).requires_grad_(False)
    images = generate(sd, [controlnet], [hints], prompts, steps=10, guidance_scale=3.0, both_sides=False)
    scores = {"iou": circle_iou(images, hints).tolist()}
    if kind in ("perfect", "conflicting"):
        scores["colour_error"] = colour_error(images, hints, prompts).mean(dim=1).tolist()
    return scores, images[0]


def picture_of_the_jump(columns: int = 6) -> None:
    """docs/jump.png: held-out hints and their samples at JUMP_STEPS, cut from the previews of a run that has many."""
    controlnet = train("jump", "--validation-steps", "20", steps=max(JUMP_STEPS), encoded="ablation-zero-0")
    previews = controlnet.parent / "previews"

    def row(step: int, number: int) -> torch.Tensor:  # of the preview's hint, step 0, step N, target
        with Image.open(previews / f"step-{step}.png") as sheet:
            strip = sheet.crop((MARGIN, SIDE * number, MARGIN + SIDE * columns, SIDE * (number + 1)))
        pixels = torch.from_numpy(np.array(strip)) / 127.5 - 1
        return pixels.permute(2, 0, 1).unflatten(2, (columns, SIDE)).permute(2, 0, 1, 3)

    first = JUMP_STEPS[0]
    rows = {"hint": row(first, 0), "step 0": row(first, 1)} | {f"step {step}": row(step, 2) for step in JUMP_STEPS}
    prompts = DrawnImages(columns, SIDE, DRAWN_HELD_OUT).prompts
    save_picture(contact_sheet(rows, prompts), ROOT / "docs" / "jump.png")


def main() -> None:
    runs = {}
    for seed in SEEDS:
        for arm, options in ARMS.items():
            encoded = "" if arm == "zero" else f"ablation-zero-{seed}"
            runs[arm, seed] = train(f"ablation-{arm}-{seed}", "--seed", str(seed), *options, encoded=encoded)
    sd = StableDiffusion.load("tiny").requires_grad_(False)
    scores, rows = [], []
    for (arm, seed), path in runs.items():
        cells = {kind: judge(sd, path, kind) for kind in PROMPTS}
        scores += [{"arm": arm, "seed": seed, "prompt": kind} | found for kind, (found, _) in cells.items()]
        if seed == SEEDS[0]:
            rows.append(side_by_side([to_picture(image) for _, image in cells.values()]))
    (ROOT / "docs" / "logs" / "ablation.json").write_text(json.dumps(scores) + "\n")
    for arm, row in zip(ARMS, rows):
        save_picture(row, ROOT / "docs" / f"ablation-{arm}.png")

    for name, options in VARIANTS.items():
        train(name, *options, encoded="ablation-zero-0")
    picture_of_the_jump()

    for seed in FORECASTS:
        train(f"forecast-{seed}", "--seed", str(seed), "--validation-steps", "0", steps=300)

    paths = {count: train(f"pairs-{count}", "--data", str(draw(count))) for count in PAIRS}
    paths[2000] = runs["zero", 0]
    scores = [{"pairs": count} | judge(sd, path, "perfect")[0] for count, path in paths.items()]
    (ROOT / "docs" / "logs" / "pairs.json").write_text(json.dumps(scores) + "\n")


if __name__ == "__main__":
    main()
