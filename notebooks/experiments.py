"""The trainings whose logs the notebooks read: `python notebooks/experiments.py`, about 40 minutes on two CPU cores.

Each run stays in runs/NAME, and one that is complete is not trained again; its log goes to docs/logs/NAME.jsonl. The
scores of 16 held-out hints go to docs/logs/ablation.json and pairs.json, samples to docs/ablation-ARM.png.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data import DrawnImages  # noqa: E402
from metrics import circle_iou, colour_error  # noqa: E402
from pictures import save_picture, side_by_side, to_picture  # noqa: E402
from sample import generate  # noqa: E402
from stable_diffusion import StableDiffusion  # noqa: E402
from train import DRAWN_HELD_OUT  # noqa: E402
from weights import load_controlnet  # noqa: E402

STEPS = 600
ARMS = {"zero": [], "gaussian": ["--connection", "gaussian"], "lite": ["--copy", "lite"]}
SEEDS = (0, 1)
PAIRS = (20, 200, 1000)  # and the 2,000 of the other runs
VARIANTS = {
    "lr-5e-4": ["--learning-rate", "5e-4"],
    "lr-2e-3": ["--learning-rate", "2e-3"],
    "batch-4": ["--train-batch-size", "4"],
    "prompts-never-empty": ["--proportion-empty-prompts", "0"],
    "prompts-always-empty": ["--proportion-empty-prompts", "1"],
}
PROMPTS = {  # Fig. 8's four kinds, from a held-out pair's prompt
    "none": lambda prompt: "",
    "insufficient": lambda prompt: "circle",
    "conflicting": lambda prompt: prompt.replace(" circle ", " square "),
    "perfect": lambda prompt: prompt,
}
HINTS = 16


def train(name: str, *options: str) -> Path:
    """Train the run `name` unless it is there; its log goes to docs/logs."""
    folder = ROOT / "runs" / name
    if not (folder / "convergence.png").exists():
        command = [sys.executable, "train.py", "--output-dir", folder, "--max-train-steps", STEPS, *options]
        if (folder / "config.json").exists():
            command += ["--resume-from-checkpoint", "latest"]
        subprocess.run([str(word) for word in command], cwd=ROOT, check=True)
    shutil.copy(folder / "log.jsonl", ROOT / "docs" / "logs" / f"{name}.jsonl")
    return folder / "controlnet.safetensors"


def draw(count: int) -> Path:
    """A folder with `count` drawn pairs."""
    folder = ROOT / "runs" / f"drawn-{count}"
    if not (folder / "prompt.json").exists():
        command = [sys.executable, "data.py", "--count", str(count), "--size", "128", "--output", str(folder)]
        subprocess.run(command, cwd=ROOT, check=True)
    return folder


def judge(sd: StableDiffusion, path: Path, kind: str) -> tuple[dict, torch.Tensor]:
    """IoU and colour error of held-out hints under one kind of prompt, and the first sample."""
    pairs = DrawnImages(HINTS, 128, DRAWN_HELD_OUT)
    hints, prompts = torch.stack([pairs.hint(i) for i in range(HINTS)]), [PROMPTS[kind](p) for p in pairs.prompts]
    controlnet = load_controlnet(path, sd.unet).requires_grad_(False)
    images = generate(sd, [controlnet], [hints], prompts, steps=10, guidance_scale=3.0, mode="conditional")
    scores = {"iou": circle_iou(images, hints).tolist()}
    if kind in ("perfect", "conflicting"):
        scores["colour_error"] = colour_error(images, hints, prompts).mean(dim=1).tolist()
    return scores, images[0]


def main() -> None:
    runs = {
        (arm, seed): train(f"ablation-{arm}-{seed}", "--seed", str(seed), *options)
        for seed in SEEDS
        for arm, options in ARMS.items()
    }
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
        train(name, *options)

    paths = {count: train(f"pairs-{count}", "--data", str(draw(count))) for count in PAIRS}
    paths[2000] = runs["zero", 0]
    scores = [{"pairs": count} | judge(sd, path, "perfect")[0] for count, path in paths.items()]
    (ROOT / "docs" / "logs" / "pairs.json").write_text(json.dumps(scores) + "\n")


if __name__ == "__main__":
    main()
