import json
import sys

import pytest
import torch
from PIL import Image
from standin import ROOT

import sample
from controlnet import ControlNet, control_weights
from diffusion import NoiseSchedule
from files import UserError, read_image
from sample import CONTROL_MODES, generate
from stable_diffusion import StableDiffusion
from weights import save_controlnet

HINT = ROOT / "tests" / "fill50k" / "source" / "0.png"


@pytest.fixture(scope="module")
def tiny():
    return StableDiffusion.load("tiny")


@pytest.fixture(scope="module")
def controlnet(tiny):
    """Untrained but not silent: its residuals are noise from the hint, small enough to leave a picture."""
    torch.manual_seed(0)
    return ControlNet.from_unet(tiny.unet, tiny.preset.hint_channels, "he", "gaussian").requires_grad_(False)


@pytest.fixture(scope="module")
def hint():
    return read_image(HINT, 64)[None]


def run(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, options)])
    sample.main()


def test_one_sample_does_not_depend_on_the_batch(tiny, controlnet, hint):
    prompts = ["red circle with blue background", "", "gold circle with navy background"]
    together = generate(tiny, [controlnet], [hint.repeat(3, 1, 1, 1)], prompts, steps=3, guidance_scale=3, seed=5)
    assert together.shape == (3, 3, 64, 64)
    assert together.abs().max() <= 1
    for i, prompt in enumerate(prompts):
        alone = generate(tiny, [controlnet], [hint], [prompt], steps=3, guidance_scale=3, seed=5 + i)
        assert (alone[0] - together[i]).abs().max() < 1e-4  # float32 sums in another order


@pytest.mark.parametrize("mode", CONTROL_MODES)
def test_step_zero_and_strength_zero_are_the_base(tiny, controlnet, mode):
    """Equation (3) in whole samples, bit for bit: a new ControlNet, and one that has learned but is turned off."""
    hint = read_image(HINT, 64)[None]
    prompts, settings = ["red circle with blue background"], {"steps": 3, "guidance_scale": 3.0}
    base = generate(tiny, [], [], prompts, size=(64, 64), **settings)
    new = ControlNet.from_unet(tiny.unet, tiny.preset.hint_channels, tiny.preset.hint_init).requires_grad_(False)
    assert torch.equal(generate(tiny, [new], [hint], prompts, mode=mode, **settings), base)
    assert torch.equal(generate(tiny, [controlnet], [hint], prompts, mode=mode, strengths=[0.0], **settings), base)
    assert not torch.equal(generate(tiny, [controlnet], [hint], prompts, mode=mode, **settings), base)


def test_modes(tiny, controlnet, hint):
    """Each mode's first step against the formula written out: guidance of two single calls."""
    seen = {}
    for mode in ("uniform", "conditional", "guess", "resolution"):
        z_T = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        t = torch.tensor([1])
        contexts = tiny.encode_prompts(["", "red circle with blue background"])

        def eps(context, with_hint, mode=mode, z_T=z_T, t=t):
            weights = control_weights(mode, 0.7)
            residuals = [w * r for w, r in zip(weights, controlnet(z_T, hint, t, context), strict=True)]
            return tiny.unet(z_T, t, context, residuals if with_hint else None)

        with torch.no_grad():
            uncond, cond = eps(contexts[:1], mode == "uniform"), eps(contexts[1:], True)
            last, alpha = NoiseSchedule().alphas_cumprod[:2].tolist()  # one step, from t = 1 to the end at t = 0
            noise = uncond + 4 * (cond - uncond)
            z0 = last**0.5 * (z_T - (1 - alpha) ** 0.5 * noise) / alpha**0.5 + (1 - last) ** 0.5 * noise
            expected = tiny.decode_latents(z0)
        got = generate(
            tiny, [controlnet], [hint], ["red circle with blue background"],
            steps=1, guidance_scale=4, strengths=[0.7], mode=mode,
        )  # fmt: skip
        assert (got - expected).abs().max() < 1e-4, mode
        seen[mode] = got
    assert len({tuple(image.flatten().tolist()) for image in seen.values()}) == 4


def test_two_controlnets_add_up(tiny, controlnet, hint):
    settings = {"prompts": [""], "steps": 2, "guidance_scale": 1.0}
    once = generate(tiny, [controlnet], [hint], **settings)
    halves = generate(tiny, [controlnet, controlnet], [hint, hint], strengths=[0.5, 0.5], **settings)
    assert (once - halves).abs().max() < 1e-4


def test_command_line(tiny, controlnet, tmp_path, monkeypatch, capsys):
    save_controlnet(controlnet, tmp_path / "c.safetensors")
    options = ["--controlnet", tmp_path / "c.safetensors", "--hint", HINT, "--steps", "2", "--prompt", "red circle"]
    run(monkeypatch, *options, "--num-samples", "2", "--seed", "3", "--output", tmp_path / "out.png")
    row, first, second = (Image.open(tmp_path / name) for name in ("out.png", "out-0.png", "out-1.png"))
    assert row.size == (3 * 128, 128) and first.size == second.size == (128, 128)
    assert row.crop((128, 0, 256, 128)).tobytes() == first.tobytes()
    settings = json.loads(second.text["settings"])
    assert (settings["seed"], settings["num_samples"], settings["steps"]) == (4, 1, 2)
    # Made again from what the picture says.
    run(
        monkeypatch, "--base", settings["base"], "--controlnet", settings["controlnet"][0], "--hint",
        settings["hint"][0], "--prompt", settings["prompt"], "--steps", settings["steps"],
        "--guidance-scale", settings["guidance_scale"], "--strength", settings["strength"][0],
        "--control-mode", settings["control_mode"], "--resolution", settings["resolution"],
        "--seed", settings["seed"], "--output", tmp_path / "again.png",
    )  # fmt: skip
    again = torch.frombuffer(bytearray(Image.open(tmp_path / "again-0.png").tobytes()), dtype=torch.uint8)
    before = torch.frombuffer(bytearray(second.tobytes()), dtype=torch.uint8)
    assert (again.int() - before.int()).abs().max() <= 1  # another batch size: float32 rounding


def test_base_alone(tmp_path, monkeypatch):
    run(monkeypatch, "--steps", "1", "--resolution", "64", "--output", tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").size == (64, 64)


def test_long_prompt_is_cut_with_a_warning(tmp_path, monkeypatch, capsys):
    prompt = "red circle " * 36 + "with blue background and more"
    run(monkeypatch, "--steps", "1", "--resolution", "64", "--prompt", prompt, "--output", tmp_path / "out.png")
    assert "cut from: and more\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--hint", HINT], "0 --controlnet but 1 --hint"),
        (["--resolution", "100"], "--resolution 100"),
        (["--steps", "0"], "--steps"),
        (["--steps", "1000"], "--steps"),
        (["--num-samples", "0"], "--num-samples 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--output", "out.jpg"], "must end in .png"),
        (["--strength", "1", "--strength", "2"], "2 --strength"),
        (["--control-mode", "strong"], "--control-mode"),
        (["--controlnet", "nowhere.safetensors", "--hint", "nowhere.png"], "nowhere.png: no such file"),
        (["--controlnet", "nowhere.safetensors", "--hint", HINT], "nowhere.safetensors: no such file"),
        (["--base", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_mistakes(options, message, monkeypatch):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, *options)
