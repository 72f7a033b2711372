"""What a training is judged by: held-out hints, sampled again and again from the same noise, and ε's response."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from controlnet import ControlNet
from data import Pairs, generator_for
from diffusion import NoiseSchedule
from metrics import circle_iou, colour_error, hint_response, is_circle_task
from pictures import contact_sheet, save_picture, to_picture
from sample import generate
from stable_diffusion import StableDiffusion

PREVIEWED = 8  # columns of a preview
RESPONSE_TIMES = (200, 400, 600, 800)  # at which hint sensitivity and gap are measured, one held-out pair each


class Validation:
    """Held-out `pairs`, with all that stays the same from one look at them to the next.

    Has to be made before training: `before`, the samples of step 0, are the base's own (equation 3).
    """

    def __init__(self, sd: StableDiffusion, pairs: Pairs, seed: int, folder: Path):
        self.sd, self.seed, self.folder, self.prompts = sd, seed, folder, pairs.prompts
        self.hints, self.targets = (
            torch.stack([part(i) for i in range(len(pairs))]) for part in (pairs.hint, pairs.image)
        )
        self.scored = is_circle_task(self.hints, self.prompts)
        self.before, self.base_scores = self.sample([])
        save_picture(to_picture(self.hints[0] * 2 - 1), folder / "hint.png")

    def sample(self, controlnets: list[ControlNet]) -> tuple[Tensor, dict[str, float]]:
        """The held-out hints as pictures, and their mean scores if the task is circles.

        The hint is on the conditional side of guidance only, as in the paper (Sec. 3.4).
        """
        preset = self.sd.preset
        images = generate(
            self.sd, controlnets, [self.hints] * len(controlnets), self.prompts, mode="conditional",
            size=tuple(self.hints.shape[2:]), steps=preset.sampling_steps, guidance_scale=preset.guidance_scale,
            seed=self.seed,
        ).cpu()  # fmt: skip
        if not self.scored:
            return images, {}
        errors = colour_error(images, self.hints, self.prompts)
        return images, {"iou": circle_iou(images, self.hints).mean().item(), "colour_error": errors.mean().item()}

    def preview(self, controlnet: ControlNet, step: int) -> tuple[Image.Image, dict[str, float]]:
        """Write previews/step-N.png; returns it and the scores, the base's beside them."""
        images, scores = self.sample([controlnet])
        rows = {"hint": self.hints * 2 - 1, "step 0": self.before, f"step {step}": images, "target": self.targets}
        sheet = contact_sheet({label: row[:PREVIEWED] for label, row in rows.items()}, self.prompts[:PREVIEWED])
        save_picture(sheet, self.folder / f"step-{step}.png")
        return sheet, scores | {f"base_{name}": score for name, score in self.base_scores.items()}


class Response:
    """How far ε moves when held-out pairs are given another pair's hint: metrics.hint_response, times and noise fixed.

    Needs two `pairs` at least.
    """

    @torch.no_grad()
    def __init__(self, sd: StableDiffusion, pairs: Pairs, seed: int):
        generator, schedule = generator_for(seed, 2), NoiseSchedule()
        chosen = [i % len(pairs) for i in range(len(RESPONSE_TIMES))]
        others = [(i + 1) % len(pairs) for i in chosen]
        moments = sd.vae.encode(torch.stack([pairs.image(i) for i in chosen]).to(sd.device))
        noise, self.eps = (torch.randn(moments[:, :4].shape, generator=generator).to(sd.device) for _ in range(2))
        z0 = sd.sample_latents(moments, noise)
        self.t = torch.tensor(RESPONSE_TIMES, device=sd.device)
        self.z = schedule.add_noise(z0, self.eps, self.t)
        self.hints, self.other = (torch.stack([pairs.hint(i) for i in some]).to(sd.device) for some in (chosen, others))
        self.context = sd.encode_prompts([pairs.prompts[i] for i in chosen])

    @torch.no_grad()
    def measure(self, predict) -> dict[str, float]:
        """hint_sensitivity, hint_gap, and heldout_loss with the pairs' own hints; predict(z, t, context, hint) -> ε."""
        own, other = (predict(self.z, self.t, self.context, hint) for hint in (self.hints, self.other))
        sensitivity, gap = hint_response(own, other, self.eps)
        heldout_loss = (own.double() - self.eps).square().mean().item()
        return {"hint_sensitivity": sensitivity, "hint_gap": gap, "heldout_loss": heldout_loss}
