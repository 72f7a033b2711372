"""The diffusion process: noise schedule, noising, the training loss, DDIM sampling, guidance. Pure functions."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

EpsFn = Callable[[Tensor, Tensor], Tensor]  # (z_t [B, 4, h, w], t int64 [B]) -> predicted noise [B, 4, h, w]


class NoiseSchedule:
    """Stable Diffusion's variance schedule: β linear in its square root from 0.00085 to 0.0120.

    `betas` and `alphas_cumprod` (ᾱ_t, the share of the image left in z_t) are float64 [steps].
    """

    def __init__(self, steps: int = 1000):
        self.steps = steps
        self.betas = torch.linspace(0.00085**0.5, 0.0120**0.5, steps, dtype=torch.float64) ** 2
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)

    def add_noise(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """q(z_t | z_0): z_t = sqrt(ᾱ_t) z_0 + sqrt(1 - ᾱ_t) ε, for z0, eps [B, 4, h, w] and t int64 [B]."""
        alpha = self.alphas_cumprod.to(z0.device)[t][:, None, None, None]
        return alpha.sqrt().to(z0.dtype) * z0 + (1 - alpha).sqrt().to(z0.dtype) * eps


def denoising_loss(eps_fn: EpsFn, z0: Tensor, eps: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Equation (5): L = E ‖ε - ε_θ(z_t, t, c_t, c_f)‖², as the mean over all elements, in float32.

    The conditions, prompt c_t and hint c_f, are inside `eps_fn`.
    """
    predicted = eps_fn(schedule.add_noise(z0, eps, t), t)
    return F.mse_loss(predicted.float(), eps.float())


def guided_noise(eps_uncond: Tensor, eps_cond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Sec. 3.4): ε_prd = ε_uc + β_cfg (ε_c - ε_uc)."""
    return eps_uncond + scale * (eps_cond - eps_uncond)


def ddim_timesteps(schedule: NoiseSchedule, steps: int) -> Tensor:
    """The `steps` time steps that DDIM visits, ascending: 1, 51, …, 951 for 20 of 1000.

    Differs from the released code where `steps` does not divide 1000: that makes more steps than were asked for.
    Raises ValueError unless 1 <= steps < schedule.steps.
    """
    if not 1 <= steps < schedule.steps:
        raise ValueError(f"DDIM takes 1 to {schedule.steps - 1} steps, not {steps}")
    return torch.arange(steps) * schedule.steps // steps + 1


def ddim(
    eps_fn: EpsFn,
    z_T: Tensor,
    schedule: NoiseSchedule,
    steps: int = 20,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample z_0 from noise z_T [B, 4, h, w] with DDIM (Song et al. 2020, eq. 12).

    eta = 0 is deterministic; eta = 1 adds as much noise as DDPM, drawn from `generator` on z_T's device.
    """
    timesteps = ddim_timesteps(schedule, steps)
    alphas = schedule.alphas_cumprod[timesteps]
    # The last step ends at ᾱ_0, not at 1, as released.
    previous_alphas = torch.cat([schedule.alphas_cumprod[:1], alphas[:-1]])
    z = z_T
    for t, alpha, previous in reversed(list(zip(timesteps.tolist(), alphas.tolist(), previous_alphas.tolist()))):
        eps = eps_fn(z, torch.full((len(z),), t, device=z.device))
        z0 = (z - (1 - alpha) ** 0.5 * eps) / alpha**0.5
        sigma = eta * ((1 - previous) / (1 - alpha) * (1 - alpha / previous)) ** 0.5
        z = previous**0.5 * z0 + (1 - previous - sigma**2) ** 0.5 * eps
        if sigma > 0:
            z = z + sigma * torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
    return z
