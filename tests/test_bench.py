"""The benchmark compares equal work, and its commands run. No test looks at a time."""

import subprocess
import sys
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from standin import ROOT

from bench import count, their_models
from controlnet import ControlNet
from data import DrawnImages
from diffusion import NoiseSchedule, denoising_loss
from stable_diffusion import TINY_FILE, StableDiffusion
from weights import DIFFUSERS, rename, save_controlnet


def test_both_sides_do_the_same_work(tmp_path, monkeypatch):
    """Same latents, noise and t: the same loss and the same gradients in diffusers' training step and here."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from diffusers import ControlNetModel, DDPMScheduler, UNet2DConditionModel

    sd = StableDiffusion.load("tiny").requires_grad_(False)
    torch.manual_seed(0)
    controlnet = ControlNet.from_unet(sd.unet, sd.preset.hint_channels, hint_init="he")
    for conv in (*controlnet.zero_convs, controlnet.middle_zero_conv, controlnet.hint_encoder[-1]):
        torch.nn.init.normal_(conv.weight, std=0.05)  # as if trained, so that every tensor has a gradient
    args = Namespace(work="tiny")
    their_models(args, torch.device("cpu"))["unet"].save_config(tmp_path / "unet")
    unet = UNet2DConditionModel.from_single_file(str(TINY_FILE), config=str(tmp_path / "unet"), local_files_only=True)
    unet.requires_grad_(False)
    save_controlnet(controlnet, tmp_path / "controlnet", layout="diffusers")
    theirs = ControlNetModel.from_pretrained(tmp_path / "controlnet").train()

    pairs = DrawnImages(3, 64)
    images, hints = (torch.stack([part(i) for i in range(3)]) for part in (pairs.image, pairs.hint))
    z0, context = sd.encode_images(images), sd.encode_prompts(pairs.prompts)
    eps, t = torch.randn(z0.shape), torch.tensor([20, 400, 900])
    loss = denoising_loss(
        lambda z, t: sd.unet(z, t, context, controlnet(z, hints, t, context)), z0, eps, t, NoiseSchedule()
    )
    loss.backward()

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    noisy = scheduler.add_noise(z0, eps, t)
    down, middle = theirs(noisy, t, context, controlnet_cond=hints, return_dict=False)
    predicted = unet(
        noisy, t, context, down_block_additional_residuals=down, mid_block_additional_residual=middle, return_dict=False
    )[0]
    their_loss = F.mse_loss(predicted, eps)
    their_loss.backward()

    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    gradients, names = {name: p.grad for name, p in theirs.named_parameters()}, rename(controlnet, DIFFUSERS)
    assert len(gradients) == 340
    # Of the tensor's norm, in float32: sums in another order. Where nearly all cancels, attention's queries and keys in
    # deep blocks, the rounding of what was summed is left: a millionth of the whole gradient.
    whole = torch.nn.utils.get_total_norm(gradients.values())
    for name, parameter in controlnet.named_parameters():
        other = gradients[names[name]]
        assert (parameter.grad - other).norm() <= 1e-4 * other.norm() + 1e-6 * whole, name


def test_counting():
    """Linear in the batch; checkpointing keeps little; 2.265 TFLOP for a locked step on one 512x512 image."""
    args = Namespace(work="train", gradient_checkpointing=False)
    flops, kept = count(args, 1, 512)
    assert flops == pytest.approx(2.265e12, rel=0.002)
    assert count(args, 2, 512) == (pytest.approx(2 * flops, rel=1e-3), pytest.approx(2 * kept, rel=1e-3))
    assert count(Namespace(work="train", gradient_checkpointing=True), 1, 512)[1] < kept / 5


@pytest.mark.parametrize("work", [["tiny"], ["tiny", "--precision", "bf16", "--gradient-checkpointing"]])
def test_command_line(work):
    command = [sys.executable, ROOT / "bench.py", *work, "--steps", "1", "--rounds", "1", "--resolution", "64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.split()[:1] == ["backward,"] for line in lines)
    assert lines[-1].startswith("ratio time ") and ", memory " in lines[-1]
