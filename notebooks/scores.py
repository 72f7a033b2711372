"""What experiments.py makes of its trainings: scored samples of held-out hints, losses, verdicts, pictures in docs."""

from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from textwrap import fill

import torch
from pictures import COLUMNS, animate, draw_curves, draw_sheet
from torch import Tensor

from controlnet import ControlNet
from convergence import FOLLOWED, HeldOut, jump_step, measure, plot_convergence
from data import DRAWN_HELD_OUT, DrawnImages, PairedImages, Pairs
from metrics import circle_iou, colour_error
from sample import generate
from stable_diffusion import TINY, StableDiffusion
from support.files import read_json, read_log, save_json, write_log
from support.pictures import read_strip, save_picture, side_by_side, to_picture
from support.verdict import verdict
from weights import load_controlnet

ROOT = Path(__file__).parent.parent
RUNS, DOCS, LOGS, MODELS = ROOT / "runs", ROOT / "docs", ROOT / "docs" / "logs", ROOT / "models"
HELD_OUT, FRESH, TRIED = (32, DRAWN_HELD_OUT), (256, 987654), (32, 777)  # drawn pairs: their number and seed
COLOURS_RIGHT = 0.1  # the largest colour error of what counts as right
PROMPTS = {  # Fig. 8's four kinds, made from a pair's own prompt
    "none": lambda prompt: "",
    "insufficient": lambda prompt: "a high-quality, detailed, and professional image",
    "conflicting": lambda prompt: prompt.replace(" circle ", " square "),
    "perfect": lambda prompt: prompt,
}
Arm = tuple[str, int, int | None]  # a run's name and seed, and a step of which there is a snapshot, or None: its end
sample = partial(generate, guidance_scale=TINY.guidance_scale, control_mode="conditional")
sample_fast = partial(sample, steps=TINY.sampling_steps // 2)


@cache
def base() -> StableDiffusion:
    return StableDiffusion.load("tiny").requires_grad_(False)


@cache
def drawn(count: int, seed: int, palette: bool = False) -> tuple[Pairs, Tensor]:
    """Pairs, and their hints [count, 3, H, W]."""
    pairs = DrawnImages(count, TINY.resolution, seed, palette)
    return pairs, torch.stack([pairs.hint(i) for i in range(count)])


def load(path: Path) -> ControlNet:
    return load_controlnet(path, base().unet).requires_grad_(False)


def load_arm(name: str, seed: int, step: int | None) -> ControlNet:
    file = "controlnet.safetensors" if step is None else f"snapshots/step-{step}.safetensors"
    return load(RUNS / f"{name}-{seed}" / file)


def scores_of(images: Tensor, hints: Tensor, prompts: list[str]) -> dict[str, list[float]]:
    """Each image's IoU, and its colour error where every prompt names colours."""
    scores = {"iou": circle_iou(images, hints).double().round(decimals=4).tolist()}
    if all(" background" in prompt for prompt in prompts):
        errors = colour_error(images, hints, prompts).mean(dim=1)
        scores["colour_error"] = errors.double().round(decimals=4).tolist()
    return scores


def score(arm: Arm, prompt: str = "perfect") -> tuple[dict, Tensor]:
    """Scores of each held-out hint's sample, and the first COLUMNS samples. Both stay in the run's folder."""
    name, seed, step = arm
    path = RUNS / f"{name}-{seed}" / "scores" / f"{'end' if step is None else step}-{prompt}.json"
    strip = path.with_suffix(".png")
    if not path.exists():
        pairs, hints = drawn(*HELD_OUT)
        prompts = [PROMPTS[prompt](own) for own in pairs.prompts]
        images = sample_fast(base(), [load_arm(*arm)], [hints], prompts, seed=seed)
        path.parent.mkdir(exist_ok=True)
        save_picture(side_by_side([to_picture(image) for image in images[:COLUMNS]]), strip)
        row = {"run": name, "seed": seed, "step": step, "prompt": prompt}
        save_json(row | scores_of(images, hints, prompts), path)
    return read_json(path, "delete it"), read_strip(strip, COLUMNS)


def follow(name: str, seed: int, steps: Iterable[int]) -> dict[int, list[float]]:
    """Each held-out hint's IoU at step 0 and at `steps`. The log in docs/logs gets them, as if previews had been on."""
    ious = {step: score((name, seed, step))[0]["iou"] for step in sorted({0, *steps})}

    def look(values: list[float], prefix: str = "") -> dict[str, float]:
        share = sum(iou >= FOLLOWED for iou in values) / len(values)
        return {f"{prefix}iou": sum(values) / len(values), f"{prefix}followed": share}

    looks = {step: look(values) | {"ious": values} | look(ious[0], "base_") for step, values in ious.items()}
    log = read_log(RUNS / f"{name}-{seed}" / "log.jsonl")
    write_log(LOGS / f"{name}-{seed}.jsonl", [entry | looks.get(entry["step"], {}) for entry in log])
    return ious


def flips(ious: dict[int, list[float]]) -> list[tuple[int, int]]:
    """For each hint that jumps: the last step of its wait, and the first at which it is followed.

    It waits while its IoU is at most 0.1 above that of step 0. `ious` has step 0 and every step around the jump.
    """
    found = []
    for base_iou, own in zip(ious[0], zip(*ious.values())):
        steps = dict(zip(ious, own))
        first = next((step for step, iou in steps.items() if iou >= FOLLOWED), 0)
        waits = [step for step, iou in steps.items() if 0 < step < first and iou <= base_iou + 0.1]
        if waits:
            found.append((waits[-1], first))
    return found


def judge(arm: Arm) -> dict:
    """As convergence.py has them: loss by hint in eight bands of t; sensitivity and gap, ± over pairs; the verdict."""
    heard = measure(base(), load_arm(*arm), drawn(*HELD_OUT)[0])
    losses = {hint: loss.mean(dim=0).double().round(decimals=4).tolist() for hint, loss in heard.loss.items()}
    figures = {name: [float(f"{x:.2g}") for x in heard.figures()[name]] for name in ("sensitivity", "gap")}
    return dict(zip(("run", "seed", "step"), arm)) | figures | {"verdict": verdict(heard), "loss": losses}


def residual_maps(seed: int, step: int) -> dict:
    """Held-out pair 2, t = 600: root mean squares over channels of the 13 residuals, and of the hint's part of them."""
    held, controlnet = HeldOut(base(), drawn(*HELD_OUT)[0], seed, RUNS, previews=False), load_arm("seed", seed, step)
    own, black = (controlnet(held.z, hint, held.t, held.context) for hint in (held.own, 0 * held.own))
    maps = [torch.stack([a, a - b])[:, 2].double().square().mean(dim=1).sqrt() for a, b in zip(own, black)]
    return {"seed": seed, "step": step, "maps": [two.round(decimals=4).tolist() for two in maps]}  # 13 of [2, h, w]


def score_fresh(controlnet: ControlNet, seed: int) -> dict:
    """Scores of samples of hints never looked at before, from other noise."""
    pairs, hints = drawn(*FRESH)
    return scores_of(sample_fast(base(), [controlnet], [hints], pairs.prompts, seed=900 + seed), hints, pairs.prompts)


def score_seeds(seeds: int, steps: int) -> list[dict]:
    """Samples at every step around each jump and every 20 elsewhere; at the end of hints never looked at before.

    docs/jump.webp, jump.png, convergence.png and logs/residuals.jsonl are of the seed whose jump is the median.
    """
    rows = []
    for seed in range(seeds):
        jump = jump_step(read_log(RUNS / f"seed-{seed}" / "log.jsonl")) or steps
        around = range(jump // 2, min(9 * jump // 8, steps) + 1)
        ious = follow("seed", seed, [*around, *range(0, steps + 1, 20)])
        row = {"seed": seed, "jump": jump, "flips": flips({step: ious[step] for step in (0, *around)})}
        rows.append(row | {"fresh": score_fresh(load_arm("seed", seed, None), seed)})
        rows += [judge(("seed", seed, step)) for step in (jump // 2, jump, steps)]
    jump, seed = sorted((row["jump"], row["seed"]) for row in rows if "jump" in row)[seeds // 2]
    write_log(LOGS / "residuals.jsonl", [residual_maps(seed, step) for step in (jump // 2, jump, steps)])
    log, (pairs, hints) = read_log(LOGS / f"seed-{seed}.jsonl"), drawn(*HELD_OUT)
    looks = [0, *(entry["step"] for entry in log if "followed" in entry)]
    samples = {step: score(("seed", seed, step))[1] for step in looks}
    ends = hints[:COLUMNS] * 2 - 1, torch.stack([pairs.image(i) for i in range(COLUMNS)])
    animate(log, samples, *ends, DOCS / "jump.webp")
    stills = {f"step {step}": samples[step] for step in (0, 2 * jump // 3, 5 * jump // 6, jump, steps)}
    draw_sheet({"hint": ends[0], **stills, "target": ends[1]}, DOCS / "jump.png")
    plot_convergence({f"seed {seed}": log}, DOCS / "convergence.png")
    return rows


def score_ablation(arms: list[Arm]) -> list[dict]:
    """Fig. 8: arms under four kinds of prompt. docs/ablation.png has one hint, with seed 0."""
    scored, hint = {arm: [score(arm, prompt) for prompt in PROMPTS] for arm in arms}, drawn(*HELD_OUT)[1][0] * 2 - 1
    rows = {run: [hint, *(samples[0] for _, samples in kinds)] for (run, i, _), kinds in scored.items() if i == 0}
    draw_sheet({"zero": rows.pop("seed"), **rows}, DOCS / "ablation.png", ["hint", *PROMPTS])
    return [row for kinds in scored.values() for row, _ in kinds]


def score_failures(arms: list[Arm]) -> list[dict]:
    """For docs/when-nothing-converges.md: samples without a prompt, verdicts, and its two pictures."""
    logs = {"default" if run == "seed" else run: read_log(LOGS / f"{run}-{i}.jsonl")[:step] for run, i, step in arms}
    draw_curves(logs, DOCS / "failure-curves.png")
    rows, samples = zip(*(score(arm, "none") for arm in arms))
    columns = zip(drawn(*HELD_OUT)[1] * 2 - 1, *samples)
    titles = ["hint", *(name.replace("-", "\n") for name in logs)]
    draw_sheet({str(i): row for i, row in enumerate(columns, 1)}, DOCS / "failures.png", titles)
    return [*rows, *map(judge, arms)]


def score_palette() -> list[dict]:
    """Fig. 6, ring and palette without a prompt: nine settings; then, on other pairs, the best and each hint alone.

    The best has the most samples with the place right and the colours, within COLOURS_RIGHT of the prompt's.
    """
    models = {"ring": "fill50k", "palette": "palette"}
    controlnets = {hint: load(MODELS / name / "controlnet.safetensors") for hint, name in models.items()}

    def scored(of: tuple[int, int], scale: float, strengths: dict[str, float]) -> dict:
        (pairs, rings), (_, palettes) = drawn(*of), drawn(*of, palette=True)
        hints, prompts = {"ring": rings, "palette": palettes}, [""] * len(rings)
        chosen = [controlnets[hint] for hint in strengths], [hints[hint] for hint in strengths]
        images = sample(base(), *chosen, prompts, guidance_scale=scale, strengths=[*strengths.values()])
        scores = scores_of(images, rings, pairs.prompts)
        right = [
            iou >= FOLLOWED and error <= COLOURS_RIGHT for iou, error in zip(scores["iou"], scores["colour_error"])
        ]
        return {"guidance_scale": scale, "strengths": strengths, "right": sum(right)} | scores

    grid = [(scale, {"ring": ring, "palette": 1.0}) for scale in (4.0, 6.0, 9.0) for ring in (1.0, 1.5, 2.0)]
    tried = [scored(TRIED, *setting) for setting in grid]
    scale, strengths = grid[max(range(len(grid)), key=lambda i: tried[i]["right"])]
    return tried + [scored(HELD_OUT, scale, kept) for kept in (strengths, {"ring": 1.0}, {"palette": 1.0})]


def score_fill50k() -> list[dict]:
    """Three samples of each of the authors' four pairs in tests/, docs/fill50k.png, and one of FRESH: what ships."""
    pairs = PairedImages(ROOT / "tests" / "fill50k", TINY.resolution)
    controlnet, rows, sheet = load(MODELS / "fill50k" / "controlnet.safetensors"), [], {}
    for i, prompt in enumerate(pairs.prompts):
        hints, prompts = pairs.hint(i).expand(3, -1, -1, -1), [prompt] * 3
        images = sample(base(), [controlnet], [hints], prompts)
        rows.append({"prompt": prompt} | scores_of(images, hints, prompts))
        sheet[fill(prompt, 14)] = [hints[0] * 2 - 1, pairs.image(i), *images]
    below = [["", "", *(f"IoU {iou:.2f}" for iou in row["iou"])] for row in rows]
    draw_sheet(sheet, DOCS / "fill50k.png", ["hint", "target", *["sample"] * 3], below)
    return [*rows, {"fresh": score_fresh(controlnet, 0)}]
