"""The trainings that notebooks 3 to 5 read, by groups: `python notebooks/experiments.py`, or with some groups' names.

TABLE has them. A run is one `python train.py …`, kept in runs/NAME-SEED; one that is complete is not trained again,
and one that was stopped goes on. Its log goes to docs/logs/NAME-SEED.jsonl, what its samples score to
docs/logs/scores-GROUP.jsonl, pictures to docs. Delete runs/ when the base or the defaults have changed.

All of it takes about three hours of one core of an Intel Xeon with AVX-512.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from animation import COLUMNS, animate, cut

from controlnet import ControlNet, Denoiser
from convergence import HeldOut, measure, plot_convergence
from data import DRAWN_HELD_OUT, DrawnImages
from metrics import circle_iou, colour_error
from sample import generate
from stable_diffusion import TINY, StableDiffusion
from support.files import read_json, save_json
from support.log import read_log, write_log
from support.pictures import contact_sheet, save_picture, side_by_side, to_picture
from support.verdict import strongest_band
from weights import load_controlnet

RUNS, DOCS, LOGS = ROOT / "runs", ROOT / "docs", ROOT / "docs" / "logs"
EQUAL = 120  # steps after which the networks are compared
LONG = 400  # steps of lite, which jumps late
HINTS = 16  # held-out hints that are scored: the first of the 32 that each run holds out
PROMPTS = {  # Fig. 8's four kinds, from a held-out pair's prompt; its "insufficient" does not name what the hint shows
    "none": lambda prompt: "",
    "insufficient": lambda prompt: "circle",
    "conflicting": lambda prompt: prompt.replace(" circle ", " square "),
    "perfect": lambda prompt: prompt,
}
BOTH = [(4.0, 1.0, 1.0), (4.0, 1.5, 1.0), (4.0, 2.0, 1.0), (6.0, 1.0, 1.0), (6.0, 1.5, 1.0), (6.0, 2.0, 1.0)]
BOTH += [(6.0, 1.0, 0.7), (6.0, 1.5, 0.7), (6.0, 2.0, 0.7), (9.0, 1.0, 1.0)]  # guidance, strengths of ring and palette
LOSS_STEPS = (30, 120)  # before and after the jump of each seed: their loss is measured over t
JUMP_STEPS = (30, 50, 60, 80, 120, 240)  # in docs/jump.png


class Runs(NamedTuple):
    """Trainings that differ in their seed alone. The rest of train.py's options are its defaults, and ALWAYS."""

    name: str
    seeds: Sequence[int]
    steps: int
    options: str = ""


# All hold out the same 32 hints, so that runs of one seed have the same latents, encoded once. The learning rate is
# constant, but for the last steps of `seeds`, the default command, which the comparisons do not reach.
ALWAYS = "--validation-hints 32 --validation-steps 0 --snapshot-steps 0 --cooldown 0"
DEFAULT = f"--cooldown {TINY.cooldown} --validation-steps 10 --snapshot-steps 10"
assert TINY.max_train_steps * (1 - TINY.cooldown) >= EQUAL  # else `seeds` are no match for the others
EVERY_STEP = "--snapshot-steps 10 --checkpointing-steps 1 --checkpoints-total-limit 10"  # and step 0 as a snapshot
SEEDS = Runs("seed", range(5), TINY.max_train_steps, DEFAULT)  # two thirds of the time are the previews'
TABLE = {
    "seeds": [SEEDS],
    "verdict": [SEEDS._replace(seeds=range(3))],
    "batch": [  # beside `seeds`, of 32: enough steps for each jump
        Runs("batch-8", range(3), 480, "--train-batch-size 8"),
        Runs("batch-16", range(3), 240, "--train-batch-size 16"),
        Runs("batch-64", range(3), 80, "--train-batch-size 64"),
    ],
    "ablation": [
        SEEDS._replace(seeds=range(3)),
        Runs("gaussian", range(3), EQUAL, "--connection gaussian"),
        Runs("lite", range(3), LONG, f"--copy lite --snapshot-steps {EQUAL}"),
    ],
    "first": [  # the first ten steps
        Runs("first-zero", range(3), 10, EVERY_STEP),
        Runs("first-gaussian", range(3), 10, f"{EVERY_STEP} --connection gaussian"),
    ],
    "palette": [],  # no training: the two that ship
}


# Training


def train(runs: Runs, seed: int) -> None:
    """Train the run of this seed as far as it is not yet there, and copy its log."""
    folder, encoded = RUNS / f"{runs.name}-{seed}", RUNS / f"seed-{seed}" / "cache"
    if encoded.exists() and not folder.exists():
        shutil.copytree(encoded, folder / "cache")
    if len(read_log(folder / "log.jsonl")) < runs.steps:
        place = f"--output-dir runs/{folder.name} --seed {seed} --max-train-steps {runs.steps}"
        command = f"train.py {place} {ALWAYS} {runs.options}".split()
        if (folder / "config.json").exists():
            command += ["--resume-from-checkpoint", "latest"]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    shutil.copy(folder / "log.jsonl", LOGS / f"{folder.name}.jsonl")


# Scores


@cache
def base() -> StableDiffusion:
    return StableDiffusion.load("tiny").requires_grad_(False)


@cache
def held_out() -> tuple[DrawnImages, torch.Tensor]:
    """The held-out pairs that are scored, and their hints."""
    pairs = DrawnImages(HINTS, 128, DRAWN_HELD_OUT)
    return pairs, torch.stack([pairs.hint(i) for i in range(HINTS)])


def controlnet_at(run: str, seed: int, step: int) -> ControlNet:
    """A run's ControlNet after a step: from a checkpoint if it was kept, else from a snapshot, in half precision."""
    folder = RUNS / f"{run}-{seed}"
    checkpoint = folder / "checkpoints" / f"step-{step}"
    snapshot = folder / "snapshots" / f"step-{step}.safetensors"
    return load_controlnet(checkpoint if checkpoint.exists() else snapshot, base().unet).requires_grad_(False)


def picture(run: str, seed: int, step: int, prompt: str = "perfect") -> Path:
    """Where `score` leaves the sample of the first held-out hint."""
    return RUNS / f"{run}-{seed}" / "scores" / f"{step}-{prompt}.png"


def score(run: str, seed: int, step: int, prompt: str = "perfect") -> dict:
    """IoU and colour error of each held-out hint under a kind of prompt; half of the previews' DDIM steps, for time."""
    path = picture(run, seed, step, prompt)
    if not path.with_suffix(".json").exists():
        pairs, hints = held_out()
        prompts, preset = [PROMPTS[prompt](p) for p in pairs.prompts], base().preset
        images = generate(
            base(), [controlnet_at(run, seed, step)], [hints], prompts, steps=preset.sampling_steps // 2,
            guidance_scale=preset.guidance_scale, control_mode="conditional", seed=seed,
        )  # fmt: skip
        scores = {"iou": circle_iou(images, hints)}
        if prompt in ("perfect", "conflicting"):  # the others name no colours
            scores["colour_error"] = colour_error(images, hints, prompts).mean(dim=1)
        rounded = {name: [round(value, 4) for value in values.tolist()] for name, values in scores.items()}
        path.parent.mkdir(exist_ok=True)
        save_picture(to_picture(images[0]), path)
        save_json({"run": run, "seed": seed, "step": step, "prompt": prompt} | rounded, path.with_suffix(".json"))
    return read_json(path.with_suffix(".json"), "delete it")


def score_seeds() -> list[dict]:
    """Loss of equation (5) in eight bands of t before the jump and after it, and without a ControlNet: same noise."""
    pairs, rows = DrawnImages(32, 128, DRAWN_HELD_OUT), []
    for seed in range(5):
        for step in LOSS_STEPS:
            loss = measure(base(), controlnet_at("seed", seed, step), pairs).loss
            means = {name: [round(band, 6) for band in loss[name].mean(dim=0).tolist()] for name in ("own", "none")}
            rows.append({"seed": seed, "step": step} | means)
    return rows


def score_ablation() -> list[dict]:
    """Under each kind of prompt; the first hint's samples with seed 0 go to docs/ablation-ARM.png."""
    runs = ("seed", "gaussian", "lite")
    scored = [(run, EQUAL) for run in runs] + [("lite", LONG)]
    rows = [score(run, seed, step, prompt) for run, step in scored for seed in range(3) for prompt in PROMPTS]
    for run, step in scored:
        samples = [Image.open(picture(run, 0, step, prompt)) for prompt in PROMPTS]
        arm = f"{'zero' if run == 'seed' else run}{f'-{step}' * (step > EQUAL)}"
        save_picture(side_by_side(samples), DOCS / f"ablation-{arm}.png")
    return rows


def score_first() -> list[dict]:
    """Distance from the locked weights and held-out loss after each of ten steps; scores of samples after 0, 1, 10.

    The first hint's samples with seed 0 go to docs/first-ARM.png.
    """
    rows = []
    for arm in ("zero", "gaussian"):
        for seed in range(3):
            inputs = HeldOut(base(), held_out()[0], seed, RUNS / f"first-{arm}-{seed}", previews=False)
            for step in range(11):
                controlnet = controlnet_at(f"first-{arm}", seed, step)
                row = {"run": arm, "seed": seed, "step": step}
                row["distance"] = distance(controlnet)
                row |= inputs.response(Denoiser(base().unet, controlnet))
                rows.append((score(f"first-{arm}", seed, step) if step in (0, 1, 10) else {}) | row)
        samples = [Image.open(picture(f"first-{arm}", 0, step)) for step in (0, 1, 10)]
        save_picture(side_by_side(samples), DOCS / f"first-{arm}.png")
    return rows


def distance(controlnet: ControlNet) -> float:
    """‖Θc - Θ‖ / ‖Θ‖ over all weights that were copied.

    In float32 it has to be: half precision rounds by 2e-4, and one step of weight decay moves by 2e-5.
    """
    unet, squares = base().unet.state_dict(), torch.zeros(2, dtype=torch.float64)
    for name, weight in controlnet.state_dict().items():
        if name.split(".")[0] in ("time_embed", "encoder", "middle"):
            moved = weight.double() - unet[name].double()
            squares += torch.stack([moved.square().sum(), unet[name].double().square().sum()])
    return (squares[0] / squares[1]).sqrt().item()


def score_verdict() -> list[dict]:
    """What another hint adds to the loss, by which convergence.py judges, beside what samples do."""
    rows = []
    for seed in range(3):
        for step in range(40, EQUAL + 1, 10):
            adds, error, band = strongest_band(measure(base(), controlnet_at("seed", seed, step), held_out()[0]))
            heard = {"adds": round(adds, 3), "error": round(error, 3), "band": band}
            rows.append(score("seed", seed, step) | heard)
    return rows


def score_palette() -> list[dict]:
    """Fig. 6: rings and palettes with empty prompts; ten settings on 32 pairs, and what is kept on 32 held-out ones."""
    files = (ROOT / "models" / name / "controlnet.safetensors" for name in ("fill50k", "palette"))
    ring, palette = (load_controlnet(file, base().unet).requires_grad_(False) for file in files)
    settings = {"tried": [("both", *tried) for tried in BOTH]}
    settings["held out"] = [("ring", 6.0, 1.0), ("palette", 6.0, 1.0), ("both", 6.0, 1.0, 1.0), ("both", 6.0, 1.5, 0.7)]
    rows = []
    for of, seed in (("tried", 777), ("held out", DRAWN_HELD_OUT)):
        pairs, coloured = DrawnImages(32, 128, seed), DrawnImages(32, 128, seed, palette=True)
        rings, palettes = (torch.stack([p.hint(i) for i in range(32)]) for p in (pairs, coloured))
        conditions = {"ring": ([ring], [rings]), "palette": ([palette], [palettes])}
        conditions["both"] = ([ring, palette], [rings, palettes])
        for hints, scale, *strengths in settings[of]:
            row = {"pairs": of, "hints": hints, "guidance_scale": scale, "strengths": strengths}
            images = generate(
                base(), *conditions[hints], [""] * 32, steps=20, guidance_scale=scale, strengths=strengths,
                control_mode="conditional",
            )  # fmt: skip
            scores = {"iou": circle_iou(images, rings)}
            scores["colour_error"] = colour_error(images, rings, pairs.prompts).mean(dim=1)
            rows.append(row | {name: [round(x, 4) for x in values.tolist()] for name, values in scores.items()})
    return rows


SCORES = {
    "seeds": score_seeds,
    "ablation": score_ablation,
    "first": score_first,
    "verdict": score_verdict,
    "palette": score_palette,
}


# Pictures


def to_tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1


def pictures_of_the_jump() -> None:
    """docs/jump.webp, docs/jump.png and docs/convergence.png, of seed 0."""
    folder = RUNS / "seed-0"
    animate(folder, DOCS / "jump.webp")
    rows = {"hint": cut(folder, JUMP_STEPS[0], "hint"), "step 0": cut(folder, JUMP_STEPS[0], "step 0")}
    rows |= {f"step {step}": cut(folder, step, "sample") for step in JUMP_STEPS}
    tensors = {label: torch.stack([to_tensor(picture) for picture in row]) for label, row in rows.items()}
    save_picture(contact_sheet(tensors, held_out()[0].prompts[:COLUMNS]), DOCS / "jump.png")
    plot_convergence({"seed 0": read_log(folder / "log.jsonl")}, DOCS / "convergence.png")


def main() -> None:
    if unknown := set(sys.argv[1:]) - set(TABLE):
        sys.exit(f"no group {', '.join(sorted(unknown))}; there are {', '.join(TABLE)}")
    asked = sys.argv[1:] or list(TABLE)
    for group in asked:
        for runs in TABLE[group]:
            for seed in runs.seeds:
                train(runs, seed)
        if group in SCORES:
            write_log(LOGS / f"scores-{group}.jsonl", SCORES[group]())
        if group == "seeds":
            pictures_of_the_jump()


if __name__ == "__main__":
    main()
