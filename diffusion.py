"""The diffusion process: noise schedule, noising, classifier-free guidance, DDIM sampling."""

from collections.abc import Callable

import torch
from torch import Tensor

EpsFn = Callable[[Tensor, Tensor], Tensor]  # (z_t [B, 4, h, w], t int64 [B]) -> predicted noise [B, 4, h, w]


class NoiseSchedule:
    """Stable Diffusion's noise schedule: sqrt(β_t) rises linearly from sqrt(0.00085) to sqrt(0.0120).

    `betas` and `alphas_cumprod` are float64 [steps] on the CPU. ᾱ_t = (1 - β_0) ... (1 - β_t) is the share of z_t's
    variance that comes from the image, if z_0 has unit variance; the rest, 1 - ᾱ_t, is noise.
    """

    def __init__(self, steps: int = 1000, device: torch.device | str = "cpu"):
        self.steps = steps
        self.betas = torch.linspace(0.00085**0.5, 0.0120**0.5, steps, dtype=torch.float64) ** 2
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        scales = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        self.image_scale, self.noise_scale = (scale.float().to(device)[:, None, None, None] for scale in scales)

    def add_noise(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Sample q(z_t | z_0): z0 and standard normal eps [B, 4, h, w], t int64 [B], all on `device` -> z_t."""
        # z_t = sqrt(ᾱ_t) z_0 + sqrt(1 - ᾱ_t) ε
        return self.image_scale[t].to(z0.dtype) * z0 + self.noise_scale[t].to(z0.dtype) * eps


def guided_noise(eps_uncond: Tensor, eps_cond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Sec. 3.4), all [B, 4, h, w]. Scale 1 means no guidance, 0 ignores the prompt."""
    return eps_uncond + scale * (eps_cond - eps_uncond)  # ε_prd = ε_uc + β_cfg (ε_c - ε_uc)


def ddim_timesteps(schedule: NoiseSchedule, steps: int) -> Tensor:
    """The `steps` time steps that DDIM visits, int64 and ascending: 1, 51, ..., 951 for 20 of 1000.

    Where `steps` does not divide 1000, the released code takes more steps than it was asked for; this does not.
    Raises ValueError unless 1 <= steps < schedule.steps.
    """
    if not 1 <= steps < schedule.steps:
        raise ValueError(f"DDIM takes 1 to {schedule.steps - 1} steps, not {steps}")
    # + 1 as released: sampling ends at ᾱ_0, so a last step that also started at t = 0 would do nothing.
    return torch.arange(steps) * schedule.steps // steps + 1


def ddim(
    eps_fn: EpsFn, z_T: Tensor, schedule: NoiseSchedule, steps: int = 20, eta: float = 0.0,
    generator: torch.Generator | None = None, watch: Callable[[Tensor], None] | None = None,
) -> Tensor:  # fmt: skip
    """Sample z_0 from noise z_T [B, 4, h, w] with DDIM (Song et al. 2020, eq. 12 and 16).

    eta = 0 is deterministic; eta = 1 adds as much noise as DDPM. `generator` draws that noise on the CPU, so that the
    numbers are the same on every device; one with the seed that drew z_T would draw z_T again. `watch` is shown the z_0
    predicted at each step. Raises ValueError unless 1 <= steps < schedule.steps and 0 <= eta <= 1.
    """
    if not 0 <= eta <= 1:  # beyond 1, more than all of the noise would be fresh
        raise ValueError(f"eta is from 0 to 1, not {eta}")
    timesteps = ddim_timesteps(schedule, steps)
    alphas = schedule.alphas_cumprod[timesteps]
    # Each step leads from ᾱ_t to ᾱ_prev, that of the next smaller t. The last ends at ᾱ_0, not at 1, as released.
    previous_alphas = torch.cat([schedule.alphas_cumprod[:1], alphas[:-1]])
    z = z_T
    for t, alpha, previous in reversed(list(zip(timesteps.tolist(), alphas.tolist(), previous_alphas.tolist()))):
        eps = eps_fn(z, torch.full((len(z),), t, device=z.device))
        # predicted z_0 = (z_t - sqrt(1 - ᾱ_t) ε) / sqrt(ᾱ_t)
        z0 = (z - (1 - alpha) ** 0.5 * eps) / alpha**0.5
        if watch:
            watch(z0)
        # eq. 16: σ_t = η sqrt((1 - ᾱ_prev) / (1 - ᾱ_t)) sqrt(1 - ᾱ_t / ᾱ_prev)
        sigma = eta * ((1 - previous) / (1 - alpha) * (1 - alpha / previous)) ** 0.5
        # eq. 12: z_prev = sqrt(ᾱ_prev) z_0 + sqrt(1 - ᾱ_prev - σ_t²) ε + σ_t (fresh noise), with the predicted z_0;
        # the second term is the direction pointing to z_t
        z = previous**0.5 * z0 + (1 - previous - sigma**2) ** 0.5 * eps
        if sigma > 0:
            z = z + sigma * torch.randn(z.shape, generator=generator).to(z)
    return z
