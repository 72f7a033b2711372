import pytest
import torch

from diffusion import NoiseSchedule, ddim, ddim_timesteps


@pytest.mark.parametrize("steps", [1, 3, 20, 30, 600, 999])
def test_as_many_steps_as_asked_for(steps):
    """The last one no further from the end than a step."""
    timesteps = ddim_timesteps(NoiseSchedule(), steps)
    assert len(timesteps.unique()) == steps and timesteps.min() == 1
    assert 1000 - -(-1000 // steps) <= timesteps.max() <= 999


def test_one_noise_predictor_leads_back():
    """With the true noise as its prediction, DDIM walks straight back to z_0, up to the noise left at t = 0."""
    schedule, generator = NoiseSchedule(), torch.Generator().manual_seed(0)
    z0, eps = (torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    z_T = schedule.add_noise(z0, eps, torch.full((2,), 951))
    got = ddim(lambda z, t: eps, z_T, schedule, steps=20)
    expected = schedule.add_noise(z0, eps, torch.zeros(2, dtype=torch.long))
    # add_noise's two factors are below 1 and rounded to float32; the first step divides by sqrt(ᾱ_951) = 0.09.
    rounding = 2**-25 * (z0.abs().max() + eps.abs().max())
    assert (got - expected).abs().max() < rounding * (1 + 1 / schedule.alphas_cumprod[951].sqrt())


def test_eta_one_keeps_the_variance():
    """For data that is standard normal, ε_θ(z) = sqrt(1 - ᾱ) z is exact, and every z_t is standard normal too."""
    schedule = NoiseSchedule()

    def eps_fn(z, t):
        return (1 - schedule.alphas_cumprod[t]).sqrt().float()[:, None, None, None] * z

    z_T = torch.randn(16, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="eta is from 0 to 1, not 1.5"):
        ddim(eps_fn, z_T, schedule, 5, 1.5)
    few = [ddim(eps_fn, z_T, schedule, 5, 1.0, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(few[0], few[1]) and not torch.equal(few[0], few[2])  # it draws from its generator
    z_0 = ddim(eps_fn, z_T, schedule, 999, 1.0, torch.Generator().manual_seed(1))
    assert z_0.std().item() == pytest.approx(1, abs=5 / (2 * z_0.numel()) ** 0.5)  # of so many draws, five errors
