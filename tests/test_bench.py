"""The benchmark compares equal work, and its commands run. No test looks at a time."""

import contextlib
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from standin import ROOT

from controlnet import ControlNet, Denoiser
from data import DrawnImages
from diffusion import NoiseSchedule
from formats.diffusers import LAYOUTS
from stable_diffusion import SD15, TINY, TINY_FILE, StableDiffusion
from support.errors import UserError
from tools import versus_diffusers
from tools.bench import count, refuse_if_busy
from weights import save_controlnet


def test_both_sides_do_the_same_work(tmp_path, monkeypatch):
    """Same latents, noise and t: the same loss and the same gradients in diffusers' training step and here."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from diffusers import ControlNetModel, DDPMScheduler, UNet2DConditionModel

    sd = StableDiffusion.load("tiny").requires_grad_(False)
    torch.manual_seed(0)
    controlnet = ControlNet.from_unet(sd.unet, TINY.hint_channels, hint_init="he")
    for conv in (*controlnet.zero_convs, controlnet.middle_zero_conv, controlnet.hint_encoder[-1]):
        torch.nn.init.normal_(conv.weight, std=0.05)  # as if trained, so that every tensor has a gradient
    versus_diffusers.models(TINY)[0].save_config(tmp_path / "unet")
    unet = UNet2DConditionModel.from_single_file(str(TINY_FILE), config=str(tmp_path / "unet"), local_files_only=True)
    unet.requires_grad_(False)
    save_controlnet(controlnet, tmp_path / "controlnet", layout="diffusers")
    theirs = ControlNetModel.from_pretrained(tmp_path / "controlnet").train()

    pairs = DrawnImages(3, 64)
    images, hints = (torch.stack([part(i) for i in range(3)]) for part in (pairs.image, pairs.hint))
    z0, context = sd.encode_images(images), sd.encode_prompts(pairs.prompts)
    eps, t = torch.randn(z0.shape), torch.tensor([20, 400, 900])
    z_t = NoiseSchedule().add_noise(z0, eps, t)
    loss = F.mse_loss(Denoiser(sd.unet, controlnet)(z_t, t, context, hints), eps)
    loss.backward()

    noisy = DDPMScheduler(**versus_diffusers.BETAS).add_noise(z0, eps, t)
    down, middle = theirs(noisy, t, context, controlnet_cond=hints, return_dict=False)
    predicted = unet(
        noisy, t, context, down_block_additional_residuals=down, mid_block_additional_residual=middle, return_dict=False
    )[0]
    their_loss = F.mse_loss(predicted, eps)
    their_loss.backward()

    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert len(gradients) == 340
    # Of the tensor's norm, in float32: sums in another order. Where nearly all cancels, as in the queries and keys of
    # deep blocks, the rounding of what was summed is left: a millionth of the whole gradient.
    whole = torch.nn.utils.get_total_norm(gradients.values())
    for name, parameter in controlnet.named_parameters():
        other = gradients[LAYOUTS[ControlNet][0].theirs(name)]
        assert (parameter.grad - other).norm() <= 1e-4 * other.norm() + 1e-6 * whole, name


def test_counting():
    """Linear in the batch; checkpointing keeps little; 2.265 TFLOP for a locked step on one 512x512 image."""
    flops, kept = count(SD15, 1, 512)
    assert flops == pytest.approx(2.265e12, rel=0.002)
    assert count(SD15, 2, 512) == (pytest.approx(2 * flops, rel=1e-3), pytest.approx(2 * kept, rel=1e-3))
    assert count(SD15, 1, 512, checkpointing=True)[1] < kept / 5


def test_command_line():
    command = [sys.executable, "-m", "tools.bench", "tiny", "--gradient-checkpointing"]
    command += ["--steps", "1", "--rounds", "1", "--resolution", "64"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    parts = {line.split(",")[0].strip() for line in lines if ", s " in line}
    assert parts == {"latents", "encode", "forward", "backward", "optimizer"}
    if done.returncode:  # on a machine that has other things to do
        assert done.stderr.startswith("error: no ratio: the machine was busy"), done.stderr
    else:
        assert lines[-1].startswith("ratio time ") and ", memory " in lines[-1]


@pytest.mark.parametrize(
    ("running", "seconds", "quiet"),
    [(0.95, [[1.0, 1.1], [2.0, 2.1]], True), (0.5, [[1.0, 1.1], [2.0, 2.1]], False), (0.95, [[1, 2.2], [2, 2]], False)],
)
def test_a_busy_machine_gives_no_ratio(running, seconds, quiet):
    results = [[{"seconds": [s, s], "running": running} for s in rounds] for rounds in seconds]
    refuse_if_busy(Namespace(work="load", device="cpu"), [[r | {"seconds": [1]} for r in side] for side in results])
    with contextlib.nullcontext() if quiet else pytest.raises(UserError, match="no ratio: the machine was busy"):
        refuse_if_busy(Namespace(work="train", device="cpu"), results)
