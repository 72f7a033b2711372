"""What made the miniature's shapes round: a VAE that forgives small errors, and a UNet that repairs its own.

A UNet decides each piece of an outline nearly alone, from noise, and trained on scenes with noise it never sees a dent.
What it painted in one step it takes for the truth in the next. And a VAE that never saw a latent that was slightly off
renders each error faithfully.
"""

from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import fill, signed_distance
from metrics import prompt_colours
from sample import generate
from stable_diffusion import TINY, StableDiffusion
from tools.fit import TRAIN, UNSEEN, Plan, draw_batch, fit
from tools.pretrain_vae import KL_WEIGHT, reconstruct
from tools.shapes import fit_shape
from vae import sample_latent

FORGIVEN = 0.3  # the most noise that the decoder learns to forgive, in standard deviations of the latents


def forgive(sd: StableDiffusion, folder: Path, plan: Plan) -> None:
    """Train the VAE of `sd` on, with noise on the latents that the decoder is shown.

    To find an outline in them it needs a stronger code for edges from the encoder, above all for those between similar
    colours. Elsewhere the latents are held where they were, so that the UNet need not learn the colours again.
    """
    before, vae = sd.vae.requires_grad_(False), deepcopy(sd.vae).requires_grad_(True)
    unseen, _ = draw_batch(UNSEEN, range(64), TINY.resolution)

    def loss_fn(step, generator):
        size, batch = (64, 2 * plan.batch) if step < 0.65 * plan.steps else (128, plan.batch)
        first = 1_000_000 + 2 * plan.batch * step
        images, _ = draw_batch(TRAIN, range(first, first + batch), size)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            held, moments = before.encode(images)[:, :4].float(), vae.encode(images).float()
            mean, log_variance = moments.chunk(2, dim=1)
            latents = sample_latent(moments, torch.randn(mean.shape, generator=generator))
            sigma = FORGIVEN / sd.latent_scale * torch.rand(batch, 1, 1, 1, generator=generator)
            noisy = latents + sigma * torch.randn(mean.shape, generator=generator)
            error = vae.decode(noisy).float() - images
        contrast = (images.amax((2, 3)) - images.amin((2, 3))).mean(dim=1)[:, None, None, None] / 2
        weight = 1 / (contrast + 0.15)  # an outline between similar colours counts as much as any other
        weighted = weight / weight.mean() * error
        edges = weighted.diff(dim=2).abs().mean() + weighted.diff(dim=3).abs().mean()
        near, moved = near_edges(images), (mean - held).square()
        flat, edge = ((1 - near) * moved).mean(), (near * moved).mean()
        kl = 0.5 * (log_variance.exp() - 1 - log_variance).sum() / images.numel()
        loss = weighted.abs().mean() + 0.5 * (weighted * error).mean() + edges + KL_WEIGHT * kl
        return loss + 0.3 * flat + 0.004 * edge, {"edges": edges.detach(), "flat": flat.detach()}

    @torch.no_grad()
    def show(average, step):
        tqdm.write(f"forgive step {step}: PSNR {reconstruct(average, unseen)[1]:.2f} dB on unseen pictures")

    sd.vae = fit("forgive", folder, vae, loss_fn, show, plan).to(memory_format=torch.channels_last)


def near_edges(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 1, H/8, W/8]: 1 where a latent position or one of its neighbours has more than one colour."""
    across, down = images.diff(dim=3).abs().amax(1, True), images.diff(dim=2).abs().amax(1, True)
    change = torch.maximum(F.pad(across, (1, 0)), F.pad(down, (0, 0, 1, 0)))
    return F.max_pool2d((F.max_pool2d(change, 8) > 0.004).float(), 3, 1, 1)


def slightly_wrong(
    images: Tensor, captions: list[str], *, cells: list[int], most: float, generator: torch.Generator
) -> Tensor:
    """Scenes [B, 3, H, W] as a UNet might paint them: outlines dented, colours off by region and in blotches.

    Displacements are smooth over a `cells`-th of the picture, by up to `most` pixels (root mean square).
    """
    count, _, height, width = images.shape

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    def field(channels, cells):  # smooth, mean 0, root mean square 1
        coarse = torch.randn(count, channels, cells, cells, generator=generator)
        fine = F.interpolate(coarse, (height, width), mode="bicubic")
        fine = fine - fine.mean((2, 3), keepdim=True)
        return fine / fine.square().mean((1, 2, 3), keepdim=True).sqrt()

    chosen = cells[int(torch.randint(len(cells), (1,), generator=generator))]
    dents = most * uniform(count, 1, 1, 1) * field(2, chosen)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    places = torch.stack([x, y], dim=-1) + dents.permute(0, 2, 3, 1)
    dented = F.grid_sample(images, places / height * 2 - 1, padding_mode="border", align_corners=False)
    blotches = 0.03 * uniform(count, 1, 1, 1) * field(3, 4)
    from_corner = [(pictures - images[:, :, :1, :1]).abs().amax(1, True) for pictures in (dented, images)]
    share = (from_corner[0] / from_corner[1].amax((2, 3), True)).clamp(0, 1)
    offsets = torch.randn(2, count, 3, 1, 1, generator=generator) * 0.03 * uniform(2, count, 1, 1, 1)
    return dented + blotches + offsets[0] * share + offsets[1] * (1 - share)


class Wrong(NamedTuple):
    """Scenes as they should be, and latents of the same scenes slightly wrong."""

    moments: Tensor  # [N, 8, h, w]
    captions: list[str]
    latents: Tensor  # [N, 4, h, w]
    rows: int  # of a batch
    least: float = 1.0  # share of what is wrong, from this to 1


def paint_midway(sd: StableDiffusion, count: int) -> tuple[Tensor, list[str], Tensor]:
    """What `sd` itself predicts midway, at t = 451 to 251: moments of what it should be, captions, and its latents.

    It should be the shape that fits it best, in the caption's colours. Where that is another shape, it is left out.
    """
    moments, captions, latents, (y, x) = [], [], [], np.mgrid[: TINY.resolution, : TINY.resolution] + 0.5
    settings = {"size": x.shape, "guidance_scale": TINY.guidance_scale}
    for first in tqdm(range(0, count, 8), desc="midway"):
        _, texts = draw_batch(TRAIN, range(2_000_000 + first, 2_000_000 + first + 8), 8)
        shown = []
        generate(sd, [], [], texts, seed=first, watch=shown.append, **settings)
        for z, text in zip(shown[10 + first // 8 % 5], texts):
            kind, (centre_x, centre_y, radius), error = fit_shape(sd.decode_latents(z[None])[0])
            if f" {kind} with " in text and error < 3:
                distance = signed_distance(kind, x - centre_x, y - centre_y, radius)
                image = torch.from_numpy(fill(distance, *prompt_colours(text).numpy())).permute(2, 0, 1).float()
                moments.append(sd.vae.encode(image[None] * 2 - 1))
                captions.append(text)
                latents.append(z[None] / sd.latent_scale)
    return torch.cat(moments), captions, torch.cat(latents)
