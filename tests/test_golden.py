"""The networks against numbers from the authors' released code, on stand-in weights under official names."""

import json
import math

import pytest
import recipe
import torch
from standin import CONFIGS, GOLDEN, deviation, golden, golden_inputs, small_unet, stand_in

from clip_text import NUM_MERGES, Tokenizer
from controlnet import ControlNet, control_weights
from diffusion import NoiseSchedule, ddim, ddim_timesteps, guided_noise
from stable_diffusion import SD15, StableDiffusion
from weights import load_controlnet, official_names

# The small networks are run in float64, where nothing depends on the processor but the last bit of time's sinusoids;
# that, flipped, moves results by 1e-6. The golden numbers' own rounding is 2e-6, as they are float32.
# At full size both are float32: in each of some 200 layers in a row a sum of up to 9 * 2560 products, whose roundings
# of 2^-24 add up at random. A wrong key, head count, padding or activation shows at 1e-2.
TOLERANCE = {"small": 1e-5, "sd15": math.sqrt(200 * 9 * 2560) * 2**-24}
PRECISION = {"small": torch.float64, "sd15": torch.float32}

sizes = pytest.mark.parametrize("size", ["small", pytest.param("sd15", marks=pytest.mark.slow)])


@sizes
@torch.no_grad()
def test_networks(size, checkpoint, control_checkpoint):
    """All parts, loaded as a user loads them, from single files with official names."""
    arrays, precision = golden_inputs(size), PRECISION[size]
    every_channel, every_token = (5, 4) if size == "sd15" else (1, 1)  # what the golden arrays keep
    sd = StableDiffusion.load(checkpoint(size))
    controlnet = load_controlnet(control_checkpoint(size), sd.unet).to(precision)
    sd.to(precision)
    assert (sd.unet.config, sd.vae.config, sd.text_encoder.config) == CONFIGS[size]
    inputs = {name: tensor.to(precision) for name, tensor in arrays.items() if tensor.is_floating_point()}

    text, t = sd.text_encoder(arrays["tokens"]), arrays["t"]
    x, hint, image, z = (inputs[name] for name in ("x", "hint", "image", "z"))
    residuals = controlnet(x, hint, t, text)
    middle_only = [torch.zeros_like(residual) for residual in residuals[:-1]] + residuals[-1:]
    results = {f"residual_{i:02}": residual[:, ::every_channel] for i, residual in enumerate(residuals)}
    assert len(results) == 13
    results |= {
        "text": text[:, ::every_token],
        "eps_uncontrolled": sd.unet(x, t, text),
        "eps_controlled": sd.unet(x, t, text, residuals),
        "eps_mid_only": sd.unet(x, t, text, middle_only),
        "vae_moments": sd.vae.encode(image),
        "vae_decoded": sd.vae.decode(z),
    }
    for name, result in results.items():
        assert deviation(result, inputs[name]) <= TOLERANCE[size], name


def test_schedule():
    schedule, arrays = NoiseSchedule(), golden("schedule")
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == torch.float64
    # A float64 product of 1000 factors: 1000 roundings of 2^-53 = 1.1e-16, and as many in the golden numbers.
    torch.testing.assert_close(schedule.betas, arrays["betas"], rtol=3e-13, atol=0)
    torch.testing.assert_close(schedule.alphas_cumprod, arrays["alphas_cumprod"], rtol=3e-13, atol=0)


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
    arrays, schedule, unet = golden("ddim_small"), NoiseSchedule(), small_unet()
    controlnet = load_controlnet(control_checkpoint("small"), unet).double()
    unet.double()
    weights = control_weights(mode, strength)
    z_T, hint, text, empty = (arrays[name].double() for name in ("x_T", "hint", "text", "text_uncond"))

    def eps_fn(z, t):
        def eps(context, with_hint):
            residuals = [w * r for w, r in zip(weights, controlnet(z, hint, t, context))] if with_hint else None
            return unet(z, t, context, residuals)

        cond = eps(text, True)
        return guided_noise(eps(empty, mode == "uniform"), cond, scale) if scale != 1 else cond

    assert deviation(ddim(eps_fn, z_T, schedule, steps), arrays[case].double()) <= TOLERANCE["small"]
    assert torch.equal(ddim_timesteps(schedule, steps), arrays[f"timesteps_{steps}"].sort().values)


# One channel in each norm group of the small networks, so these gradients are zero but for rounding.
ROUNDING_ONLY = {
    f"input_blocks.{i}.0.{name}"
    for i in (1, 2)
    for name in ("in_layers.2.bias", "emb_layers.1.weight", "emb_layers.1.bias")
}


def test_gradient_flow():
    """Four steps from zero convolutions, in float64: which tensors have a gradient, and how large it is."""
    wanted = json.loads((GOLDEN / "gradient_flow.json").read_text())
    x, hint, text = (golden("small")[name].double() for name in ("x", "hint", "text"))
    t, target = golden("small")["t"], torch.from_numpy(recipe.draw("smallnoise", 2, 4, 16, 24)).double()
    unet = small_unet()
    controlnet = ControlNet.from_unet(unet).double()
    unet.double()
    weights = stand_in("small", "control")
    names = {ours: theirs.removeprefix("control_model.") for ours, theirs in official_names(controlnet).items()}
    with torch.no_grad():
        for ours, parameter in controlnet.named_parameters():
            if ours.startswith("hint_encoder.") and not ours.startswith("hint_encoder.14."):
                parameter.copy_(weights["control_model." + names[ours]])
    optimizer = torch.optim.SGD(controlnet.parameters(), lr=0.1)
    for step, expected in enumerate(wanted):
        loss = torch.nn.functional.mse_loss(unet(x, t, text, controlnet(x, hint, t, text)), target)
        optimizer.zero_grad()
        loss.backward()
        assert loss.item() == pytest.approx(expected["loss"], rel=TOLERANCE["small"])
        norms = {names[ours]: parameter.grad.norm().item() for ours, parameter in controlnet.named_parameters()}
        assert all(norms.pop(name) < 1e-8 for name in ROUNDING_ONLY)
        # 0 is 0 until a tensor's wave comes. The sinusoids' last bit is up to 1000 * 2^-24 = 6e-5 radian in an input.
        for name, norm in norms.items():
            assert norm == pytest.approx(expected["grad_norm"][name], rel=1e-4, abs=0), (step, name)
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
