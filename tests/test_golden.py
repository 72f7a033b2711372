"""The networks against numbers from the authors' released code, on stand-in weights under official names."""

import json

import pytest
import recipe
import torch
from standin import CONFIGS, GOLDEN, deviation, golden, golden_inputs, small_unet, stand_in

from clip_text import NUM_MERGES, Tokenizer
from controlnet import ControlNet, control_weights
from diffusion import NoiseSchedule, ddim, ddim_timesteps, guided_noise
from stable_diffusion import SD15, StableDiffusion
from weights import load_controlnet, official_names

# Another memory format or thread count was measured to move small results by 2e-6; a wrong key, head count, padding
# or activation shows at 1e-2. Full size sums over ten times as many terms.
TOLERANCE = {"small": 2e-5, "sd15": 1e-4}

sizes = pytest.mark.parametrize("size", ["small", pytest.param("sd15", marks=pytest.mark.slow)])


@sizes
@torch.no_grad()
def test_networks(size, checkpoint, control_checkpoint):
    """All parts, loaded as a user loads them, from single files with official names."""
    arrays, tolerance = golden_inputs(size), TOLERANCE[size]
    every_channel, every_token = (5, 4) if size == "sd15" else (1, 1)  # what the golden arrays keep
    sd = StableDiffusion.load(checkpoint(size))
    controlnet = load_controlnet(control_checkpoint(size), sd.unet)
    assert (sd.unet.config, sd.vae.config, sd.text_encoder.config) == CONFIGS[size]

    text = sd.text_encoder(arrays["tokens"])
    assert deviation(text[:, ::every_token], arrays["text"]) <= tolerance

    x, t = arrays["x"], arrays["t"]
    residuals = controlnet(x, arrays["hint"], t, text)
    assert len(residuals) == 13
    for i, residual in enumerate(residuals):
        assert deviation(residual[:, ::every_channel], arrays[f"residual_{i:02}"]) <= tolerance, i
    assert deviation(sd.unet(x, t, text), arrays["eps_uncontrolled"]) <= tolerance
    assert deviation(sd.unet(x, t, text, residuals), arrays["eps_controlled"]) <= tolerance
    middle_only = [torch.zeros_like(residual) for residual in residuals[:-1]] + residuals[-1:]
    assert deviation(sd.unet(x, t, text, middle_only), arrays["eps_mid_only"]) <= tolerance

    assert deviation(sd.vae.encode(arrays["image"]), arrays["vae_moments"]) <= tolerance
    assert deviation(sd.vae.decode(arrays["z"]), arrays["vae_decoded"]) <= tolerance


def test_schedule():
    schedule, arrays = NoiseSchedule(), golden("schedule")
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == torch.float64
    # A float64 product of 1000 factors: 1000 roundings of 1e-16 at most.
    torch.testing.assert_close(schedule.betas, arrays["betas"], rtol=1e-13, atol=0)
    torch.testing.assert_close(schedule.alphas_cumprod, arrays["alphas_cumprod"], rtol=1e-13, atol=0)


DDIM_CASES = {  # name: (steps, guidance scale, strength, mode)
    "plain_20_cfg9": (20, 9.0, 1.0, "uniform"),
    "half_strength_20_cfg4": (20, 4.0, 0.5, "uniform"),
    "guess_mode_20_cfg3": (20, 3.0, 1.0, "guess"),
    "steps_50_cfg1": (50, 1.0, 1.0, "uniform"),
}


@pytest.mark.parametrize("case", DDIM_CASES)
@torch.no_grad()
def test_ddim(case, control_checkpoint):
    steps, scale, strength, mode = DDIM_CASES[case]
    arrays, schedule = golden("ddim_small"), NoiseSchedule()
    unet = small_unet()
    controlnet = load_controlnet(control_checkpoint("small"), unet)
    weights = control_weights(mode, strength)

    def eps_fn(z, t):
        def eps(context, with_hint):
            if not with_hint:
                return unet(z, t, context)
            residuals = controlnet(z, arrays["hint"], t, context)
            return unet(z, t, context, [w * r for w, r in zip(weights, residuals)])

        return guided_noise(eps(arrays["text_uncond"], mode == "uniform"), eps(arrays["text"], True), scale)

    assert deviation(ddim(eps_fn, arrays["x_T"], schedule, steps), arrays[case]) <= TOLERANCE["small"]
    assert torch.equal(ddim_timesteps(schedule, steps), arrays[f"timesteps_{steps}"].sort().values)


# After each backward pass: 13 output zero convs; with the copy and the hint encoder's zero conv; all.
TENSORS_WITH_GRADIENT = (26, 326, 340, 340)


def test_gradient_flow():
    """Four steps from zero convolutions: which tensors have a gradient, and how large it is."""
    arrays, wanted = golden("small"), json.loads((GOLDEN / "gradient_flow.json").read_text())
    # One channel in each norm group here, so these gradients are zero but for rounding.
    rounding_only = {
        f"input_blocks.{i}.0.{name}"
        for i in (1, 2)
        for name in ("in_layers.2.bias", "emb_layers.1.weight", "emb_layers.1.bias")
    }
    unet = small_unet()
    controlnet = ControlNet.from_unet(unet)
    hint_tensors = {k: v for k, v in stand_in("small", "control").items() if "input_hint_block" in k}
    names = {ours: theirs.removeprefix("control_model.") for ours, theirs in official_names(controlnet).items()}
    with torch.no_grad():
        for ours, parameter in controlnet.named_parameters():
            if ours.startswith("hint_encoder.") and not ours.startswith("hint_encoder.14."):
                parameter.copy_(hint_tensors["control_model." + names[ours]])
    target = torch.from_numpy(recipe.draw("smallnoise", 2, 4, 16, 24))
    optimizer = torch.optim.SGD(controlnet.parameters(), lr=0.1)
    for step, expected in enumerate(wanted):
        residuals = controlnet(arrays["x"], arrays["hint"], arrays["t"], arrays["text"])
        loss = torch.nn.functional.mse_loss(unet(arrays["x"], arrays["t"], arrays["text"], residuals), target)
        optimizer.zero_grad()
        loss.backward()
        assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
        nonzero = 0
        for ours, parameter in controlnet.named_parameters():
            norm, name = parameter.grad.norm().item(), names[ours]
            nonzero += norm != 0
            if name in rounding_only:
                assert norm < 1e-8, (step, name)
            else:
                assert norm == pytest.approx(expected["grad_norm"][name], rel=1e-4, abs=0), (step, name)
        assert nonzero == TENSORS_WITH_GRADIENT[step]
        optimizer.step()


def test_tokenizer():
    """CLIP's ids, from the part of its published BPE list that these prompts need (see tests/golden/README.md)."""
    ranked = [line.split() for line in (GOLDEN / "merges.txt").read_text(encoding="utf-8").splitlines()]
    merges = [(f"unused {rank}", "") for rank in range(NUM_MERGES)]
    for rank, first, second in ranked:
        merges[int(rank)] = first, second
    tokenizer = Tokenizer(merges)
    assert len(tokenizer.ids) == SD15.text.vocab_size
    for case in json.loads((GOLDEN / "tokenizer.json").read_text()):
        assert tokenizer.encode(case["prompt"]) == case["ids"], case["prompt"]
        assert tokenizer([case["prompt"]])[0].tolist() == case["padded77"], case["prompt"]
