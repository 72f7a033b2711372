import json

import pytest
import torch
from PIL import Image
from standin import SAMPLE, run_main

import sample
from controlnet import ControlNet, control_weights
from diffusion import NoiseSchedule
from draw import SHIPPED
from sample import CONTROL_MODES, generate
from support.colours import COLOURS
from support.devices import PRECISIONS, fast_precision, sampling_precision
from support.errors import UserError
from support.pictures import fit_image, open_image, read_strip
from weights import save_controlnet

HINT = SAMPLE / "source" / "0.png"


@pytest.fixture(scope="module")
def controlnet(tiny):
    """Untrained but not silent: its residuals are noise from the hint, small enough to leave a picture."""
    torch.manual_seed(0)
    return ControlNet.from_unet(tiny.unet, tiny.preset.hint_channels, "silu", "gaussian").requires_grad_(False)


@pytest.fixture(scope="module")
def hint():
    return fit_image(open_image(HINT), 64)[None]


@pytest.mark.parametrize("mode", CONTROL_MODES)
def test_step_zero_and_strength_zero_are_the_base(tiny, controlnet, hint, mode):
    """Equation (3) in whole samples, bit for bit: a new ControlNet, and one that has learned but is turned off."""
    prompts, settings = ["red circle with blue background"], {"steps": 3, "guidance_scale": 3.0}
    base = generate(tiny, [], [], prompts, size=(64, 64), **settings)
    settings |= {"control_mode": mode}
    new = ControlNet.from_unet(tiny.unet, tiny.preset.hint_channels, tiny.preset.hint_init).requires_grad_(False)
    assert torch.equal(generate(tiny, [new], [hint], prompts, **settings), base)
    assert torch.equal(generate(tiny, [controlnet], [hint], prompts, strengths=[0.0], **settings), base)
    assert not torch.equal(generate(tiny, [controlnet], [hint], prompts, **settings), base)


@pytest.mark.parametrize("mode", CONTROL_MODES)
@torch.no_grad()
def test_one_step_by_the_formula(tiny, controlnet, hint, mode):
    """Guidance of two single calls, written out: which residuals are weighted how, and which side sees the hint."""
    prompt = "red circle with blue background"
    z_T, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1])
    empty_context, context = tiny.encode_prompts(["", prompt]).split(1)

    def eps(context, with_hint):
        factors = control_weights(mode, 0.7)
        residuals = [w * r for w, r in zip(factors, controlnet(z_T, hint, t, context), strict=True)]
        return tiny.unet(z_T, t, context, residuals if with_hint else None)

    uncond, cond = eps(empty_context, mode == "uniform"), eps(context, True)
    last, alpha = NoiseSchedule().alphas_cumprod[:2].tolist()  # one step, from t = 1 to the end at t = 0
    noise = uncond + 4 * (cond - uncond)
    z0 = last**0.5 * (z_T - (1 - alpha) ** 0.5 * noise) / alpha**0.5 + (1 - last) ** 0.5 * noise
    settings = {"steps": 1, "guidance_scale": 4, "strengths": [0.7], "control_mode": mode}
    got = generate(tiny, [controlnet], [hint], [prompt], **settings)
    assert (got - tiny.decode_latents(z0)).abs().max() < 1e-4  # float32: the two sides as one batch or apart


def test_hints_that_are_not_one_for_each_prompt_are_refused(tiny, controlnet, hint):
    with pytest.raises(ValueError, match="2 prompts"):
        generate(tiny, [controlnet], [hint], ["", ""], steps=1)


@pytest.mark.parametrize("beyond", [{"strengths": [1e30]}, {"guidance_scale": 1e30}])
def test_a_latent_that_is_not_finite_is_no_picture(beyond, tiny, controlnet, hint):
    with pytest.raises(UserError, match="is not finite: take a --strength and a --guidance-scale nearer to 1"):
        generate(tiny, [controlnet], [hint], ["red circle"], steps=2, **beyond)


def test_two_controlnets_add_up(tiny, controlnet, hint):
    settings = {"prompts": [""], "steps": 2, "guidance_scale": 1.0}
    once = generate(tiny, [controlnet], [hint], **settings)
    halves = generate(tiny, [controlnet, controlnet], [hint, hint], strengths=[0.5, 0.5], **settings)
    assert (once - halves).abs().max() < 1e-4


def test_command_line(tiny, controlnet, tmp_path, monkeypatch, capsys):
    save_controlnet(controlnet, tmp_path / "c.safetensors")
    options = ["--controlnet", tmp_path / "c.safetensors", "--hint", HINT, "--steps", "2", "--prompt", "red circle"]
    run_main(monkeypatch, sample, *options, "--num-samples", "2", "--seed", "3", "--output", tmp_path / "out.png")
    row, first, second = (Image.open(tmp_path / name) for name in ("out.png", "out-0.png", "out-1.png"))
    assert row.size == (3 * 128, 128) and first.size == second.size == (128, 128)
    assert row.crop((128, 0, 256, 128)).tobytes() == first.tobytes()
    settings = json.loads(second.text["settings"])
    assert (settings["seed"], settings["num_samples"], settings["sampling_steps"]) == (4, 1, 2)
    # Made again from what the picture says.
    names = ("base", "prompt", "guidance_scale", "control_mode", "resolution", "precision", "seed")
    made_with = {name: settings[name] for name in names} | {"steps": settings["sampling_steps"]}
    made_with |= {name: settings[name][0] for name in ("controlnet", "hint", "strength")}
    options = [word for name, value in made_with.items() for word in (f"--{name.replace('_', '-')}", value)]
    run_main(monkeypatch, sample, *options, "--output", tmp_path / "again.png")
    again = torch.frombuffer(bytearray(Image.open(tmp_path / "again-0.png").tobytes()), dtype=torch.uint8)
    before = torch.frombuffer(bytearray(second.tobytes()), dtype=torch.uint8)
    assert (again.int() - before.int()).abs().max() <= 1  # another batch size: float32 rounding


@pytest.mark.parametrize(
    ("start", "end", "steps"), [(0, 1, [0, 1, 2, 3, 4]), (0.4, 1, [2, 3, 4]), (0, 0.6, [0, 1, 2]), (0.5, 0.55, [])]
)
def test_control_start_and_end(start, end, steps, tiny, controlnet, hint, monkeypatch):
    """Shares of the steps, as in diffusers: a step counts if it lies within. The hint is encoded once a picture."""
    ran, now, hints = [], [], []
    residuals, forward, encode = controlnet.residuals, tiny.unet.forward, controlnet.hint_encoder.forward
    monkeypatch.setattr(controlnet, "residuals", lambda *inputs: ran.append(len(now)) or residuals(*inputs))
    monkeypatch.setattr(tiny.unet, "forward", lambda *inputs: now.append(1) or forward(*inputs))
    monkeypatch.setattr(controlnet.hint_encoder, "forward", lambda hint: hints.append(1) or encode(hint))
    shares = {"control_start": start, "control_end": end}
    settings = {"prompts": ["red circle"], "steps": 5, "guidance_scale": 3.0}
    image = generate(tiny, [controlnet], [hint], **settings, **shares)
    assert (ran, len(now), len(hints)) == (steps, 5, 1)
    base = generate(tiny, [], [], size=(64, 64), **settings)
    assert torch.equal(image, base) == (not steps)


def test_many_images_are_sampled_in_parts(tiny, controlnet, hint, monkeypatch):
    """None depends on the others."""
    batches, forward, prompts = [], tiny.unet.forward, [f"{colour} circle" for colour in list(COLOURS)[:10]] + [""]
    monkeypatch.setattr(tiny.unet, "forward", lambda z, *others: batches.append(len(z)) or forward(z, *others))
    settings = {"steps": 1, "guidance_scale": 3.0, "control_mode": "conditional"}
    images = generate(tiny, [controlnet], [hint.expand(11, -1, -1, -1)], prompts, seed=5, **settings)
    assert images.shape == (11, 3, 64, 64) and images.abs().max() <= 1 and batches == [16, 6]  # both sides of guidance
    for i in (1, 10):
        alone = generate(tiny, [controlnet], [hint], prompts[i : i + 1], seed=5 + i, **settings)
        assert (images[i] - alone[0]).abs().max() < 1e-4  # float32 sums in another order


def test_half_precision(tmp_path, monkeypatch):
    """UNet and ControlNet compute in it; the VAE, whose numbers can be too large for fp16, and the text do not."""
    used, real = {}, generate

    def spy(sd, controlnets, *others, **options):
        networks = {"unet": sd.unet, "controlnet": controlnets[0], "vae": sd.vae, "text": sd.text_encoder}
        used.update({name: {p.dtype for p in network.parameters()} for name, network in networks.items()})
        assert options["control_mode"] == "guess"
        return real(sd, controlnets, *others, **options)

    monkeypatch.setattr(sample, "generate", spy)
    options = ["--controlnet", SHIPPED, "--hint", HINT, "--steps", "2", "--resolution", "64", "--prompt", "red circle"]
    options += ["--control-mode", "guess"]
    for word in ("bf16", "fp16", "fp32"):
        run_main(monkeypatch, sample, *options, "--precision", word, "--output", tmp_path / f"{word}.png")
        dtype = PRECISIONS[word]
        assert used == {"unet": {dtype}, "controlnet": {dtype}, "vae": {torch.float32}, "text": {torch.float32}}
    bf16, fp16, full = (read_strip(tmp_path / f"{word}-0.png", 1) for word in ("bf16", "fp16", "fp32"))
    for half in (bf16, fp16):
        assert 0 < (half - full).abs().mean() < 0.05  # of a range of 2


def test_auto_takes_what_the_device_is_fast_in(monkeypatch):
    """In training, and in sampling on a GPU alone."""
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    for bf16, half in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, bf16=bf16: bf16)
        assert fast_precision(cuda) == sampling_precision("auto", cuda) == half
    for instructions, word in (({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx2": True}, "no")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda instructions=instructions: instructions)
        assert (fast_precision(cpu), sampling_precision("auto", cpu)) == (word, "fp32")
    assert sampling_precision("bf16", cpu) == "bf16" and fast_precision(torch.device("meta")) == "no"


def test_the_base_alone_and_a_long_prompt(nano, tmp_path, monkeypatch, capsys):
    prompt = "red circle " * 36 + "with blue background and more"
    options = ["--base", nano, "--steps", "1", "--resolution", "64", "--prompt", prompt]
    run_main(monkeypatch, sample, *options, "--output", tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").size == (64, 64)
    assert "cut from: and more\n" in capsys.readouterr().err
