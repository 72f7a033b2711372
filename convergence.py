"""Sudden convergence (Fig. 4), made visible: fixed held-out pairs that a training is judged by, again and again.

The denoising loss hardly shows whether a ControlNet follows its hint. Samples of held-out hints do, and so do two
figures that need no samples: hint sensitivity and hint gap.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

from controlnet import ControlNet, Denoiser
from data import Pairs
from diffusion import NoiseSchedule
from metrics import circle_iou, colour_error, is_circle_task
from sample import generate
from stable_diffusion import StableDiffusion
from support.errors import run_command_line
from support.pictures import contact_sheet, read_strip, save_picture, side_by_side, to_picture
from support.plot import plot_logs
from support.randomness import HELD_OUT, generator_for

PREVIEWED = 8  # columns of a preview
RESPONSE_TIMES = (200, 400, 600, 800)  # at which hint sensitivity and gap are measured, one held-out pair each
FOLLOWED = 0.7  # IoU from which on a sample counts as following its hint
GROWTH, JUMP, EARLY, LEAD = 10, 0.5, 0.1, 1.6  # see growth_step, jump_step, forecast


def hint_response(own: Tensor, other: Tensor, eps: Tensor) -> tuple[float, float]:
    """How far the hint moves the prediction, and whether in the right direction: (hint sensitivity, hint gap).

    own, other [B, 4, h, w]: ε_θ of the same noised latents, times and prompts, once with each pair's own hint and once
    with another pair's; eps the true noise. The sensitivity is the root mean square of own - other. The gap is what
    the other hint adds to the loss of equation (5). With zero convolutions both are exactly 0 before
    the first step and after it: the hint encoder's moves in the second (notebook 1).
    """
    own, other, eps = (x.cpu().double() for x in (own, other, eps))  # to see a gap of 1e-9 beside a loss of 0.02
    sensitivity = (own - other).square().mean().sqrt()
    gap = F.mse_loss(other, eps) - F.mse_loss(own, eps)
    return sensitivity.item(), gap.item()


class HeldOut:
    """Held-out pairs, and all that stays fixed from one measurement to the next: noise, time steps, prompts.

    Make it before the first step: the samples of step 0 are the base's own (equation 3; Gaussian connections would
    change them at once). They are kept in `folder`/step-0.png, and read from there when a run is resumed. With
    `previews` False nothing is ever sampled.
    """

    @torch.no_grad()
    def __init__(self, sd: StableDiffusion, pairs: Pairs, seed: int, folder: Path, previews: bool = True):
        self.pairs, self.seed, self.folder, self.prompts = pairs, seed, folder, pairs.prompts
        self.hints = torch.stack([pairs.hint(i) for i in range(len(pairs))])
        self.targets = torch.stack([pairs.image(i) for i in range(len(pairs))])
        self.fix_response_inputs(sd)
        if previews:
            self.sd, self.scored = sd, is_circle_task(self.hints, self.prompts)
            if not (step_0_file := folder / "step-0.png").exists():
                save_picture(to_picture(self.hints[0] * 2 - 1), folder / "hint.png")
                save_picture(side_by_side([to_picture(image) for image in self.sample()]), step_0_file)
            self.step_0 = read_strip(step_0_file, len(pairs))
            self.base_scores = {f"base_{name}": score for name, score in self.scores(self.step_0).items()}

    def fix_response_inputs(self, sd: StableDiffusion) -> None:
        """What `response` feeds the model: one pair at each of RESPONSE_TIMES, and another pair's hint for it."""
        generator = generator_for(self.seed, HELD_OUT)
        chosen = [i % len(self.pairs) for i in range(len(RESPONSE_TIMES))]
        z0 = sd.encode_images(self.targets[chosen].to(sd.device), generator)
        self.eps = torch.randn(z0.shape, generator=generator).to(sd.device)
        self.t = torch.tensor(RESPONSE_TIMES, device=sd.device)
        self.z = NoiseSchedule(device=sd.device).add_noise(z0, self.eps, self.t)
        self.own = self.hints[chosen].to(sd.device)
        self.other = torch.stack([self.pairs.other_hint(i) for i in chosen]).to(sd.device)
        self.context = sd.encode_prompts([self.prompts[i] for i in chosen])

    @torch.no_grad()
    def response(self, denoiser: Denoiser) -> dict[str, float]:
        """hint_sensitivity, hint_gap, and heldout_loss with the pairs' own hints. Empty if no two hints differ."""
        if torch.equal(self.own, self.other):
            return {}
        own, other = (denoiser(self.z, self.t, self.context, hint) for hint in (self.own, self.other))
        sensitivity, gap = hint_response(own, other, self.eps)
        heldout_loss = F.mse_loss(own.cpu().double(), self.eps.cpu().double()).item()
        return {"hint_sensitivity": sensitivity, "hint_gap": gap, "heldout_loss": heldout_loss}

    def sample(self, *controlnets: ControlNet) -> Tensor:
        """The held-out hints as pictures, from the same noise each time; the hint on the conditional side alone."""
        preset, hints, size = self.sd.preset, [self.hints] * len(controlnets), tuple(self.hints.shape[2:])
        return generate(
            self.sd, list(controlnets), hints, self.prompts, control_mode="conditional", size=size, seed=self.seed,
            steps=preset.sampling_steps, guidance_scale=preset.guidance_scale,
        ).cpu()  # fmt: skip

    def scores(self, images: Tensor) -> dict[str, float | list[float]]:
        """Each hint's IoU and their mean, the share that is followed, and the colour error, if the task is circles."""
        if not self.scored:
            return {}
        iou, errors = circle_iou(images, self.hints), colour_error(images, self.hints, self.prompts)
        followed = (iou >= FOLLOWED).double()
        scores = {"iou": iou.mean(), "followed": followed.mean(), "colour_error": errors.mean()}
        return {name: score.item() for name, score in scores.items()} | {"ious": [round(x, 3) for x in iou.tolist()]}

    def preview(self, controlnet: ControlNet, step: int) -> dict[str, float | list[float]]:
        """Write previews/step-N.png; returns the scores, the base's beside them."""
        images = self.sample(controlnet)
        rows = {"hint": self.hints * 2 - 1, "step 0": self.step_0, f"step {step}": images, "target": self.targets}
        sheet = contact_sheet({label: row[:PREVIEWED] for label, row in rows.items()}, self.prompts[:PREVIEWED])
        save_picture(sheet, self.folder / f"step-{step}.png")
        return self.scores(images) | self.base_scores


def growth_step(history: list[dict]) -> int | None:
    """The first logged step at which the hint sensitivity is seen to grow, or None.

    Seen: in three measurements running it was at least 10 times its smallest value so far, so that neither rounding
    noise nor a single spike passes for growth.
    """
    smallest, running = math.inf, 0
    for entry in history:
        if value := entry.get("hint_sensitivity"):
            smallest = min(smallest, value)
            running = running + 1 if value >= GROWTH * smallest else 0
            if running == 3:
                return entry["step"]
    return None


def means_of_three(history: list[dict]) -> Iterator[tuple[int, float, float, float]]:
    """Step, hint sensitivity, hint gap and held-out loss, averaged over three measurements: single ones fluctuate."""
    measured, fields = [e for e in history if "hint_gap" in e], ("hint_sensitivity", "hint_gap", "heldout_loss")
    for three in zip(measured, measured[1:], measured[2:]):
        yield three[-1]["step"], *(fmean(entry[field] for entry in three) for field in fields)


def jump_step(history: list[dict]) -> int | None:
    """The first logged step by which another pair's hint raises the held-out loss by half, or None.

    About then samples begin to follow their hints: docs/convergence.md has how exactly, and in which trainings.
    """
    return next((step for step, _, gap, loss in means_of_three(history) if gap >= JUMP * loss), None)


def forecast(history: list[dict]) -> tuple[int, int] | None:
    """The first logged step at which jump_step can be forecast, and the forecast; None before.

    Were the prediction with the own hint the best possible (the mean of ε), another hint would add the square of the
    sensitivity to the loss, so the jump is near a sensitivity of sqrt(JUMP loss). At a tenth of it five eighths of the
    steps are done: measured, no theory.
    """
    for step, sensitivity, _, loss in means_of_three(history):
        if sensitivity >= EARLY * math.sqrt(JUMP * loss):
            return step, round(LEAD * step)
    return None


def milestones(history: list[dict]) -> list[str]:
    """What the last entry of a log tells the user of growth, forecast, jump and samples, a line each."""
    entry, lines = history[-1] if history else {}, []
    if "hint_gap" in entry:
        if growth_step(history) == entry["step"]:
            lines.append(f"the hint sensitivity is growing: {entry['hint_sensitivity']:.1e}")
        if (expected := forecast(history)) and expected[0] == entry["step"] and jump_step(history) is None:
            lines.append(f"samples begin to follow their hints at about step {expected[1]}, give or take a third")
        if jump_step(history) == entry["step"]:
            lines.append(
                "the jump: another pair's hint raises the held-out loss by half, samples begin to follow their hints"
            )
    if "iou" in entry:
        lines.append(f"IoU of samples and hints {entry['iou']:.2f} (the base's: {entry['base_iou']:.2f}), "
                     f"{entry['followed']:.0%} of hints followed")  # fmt: skip
    return [f"step {entry['step']}: {line}" for line in lines]


def plot_convergence(histories: dict[str, list[dict]], path: Path) -> None:
    """Plot the logs of one or more runs as a PNG. Dotted: the sensitivity is seen to grow. Dashed: the jump."""
    marks = {label: {":": growth_step(history), "--": jump_step(history)} for label, history in histories.items()}
    plot_logs(histories, marks, path)


if __name__ == "__main__":
    from tools.listen import main  # judges any ControlNet by these figures

    run_command_line(main, "a lower --resolution")
