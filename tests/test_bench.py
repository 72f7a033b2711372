"""The benchmark compares equal work, and its command runs. No test looks at a time."""

from argparse import Namespace
from functools import partial

import diffusers
import pytest
import torch
from standin import run_main
from transformers import CLIPTextModel

from controlnet import ControlNet
from diffusion import NoiseSchedule
from formats.diffusers import LAYOUTS
from stable_diffusion import TINY, StableDiffusion
from support.devices import PRECISIONS
from tools import bench, versus_diffusers
from weights import save_controlnet


@pytest.fixture
def in_float64(nano, diffusers_base, tmp_path, monkeypatch):
    """Our ControlNet and theirs: both sides have the same networks, prompts and schedule, and cast to no less."""
    ids = torch.tensor([[864, 5, 320, 7] + 73 * [865]] * 3)
    sd = StableDiffusion.load(nano).requires_grad_(False).double()
    kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL, "text_encoder": CLIPTextModel}
    parts = [kind.from_pretrained(diffusers_base / folder).double() for folder, kind in kinds.items()]
    torch.manual_seed(0)
    ours = ControlNet.from_unet(sd.unet, TINY.hint_channels, hint_init="silu")
    for conv in (*ours.zero_convs, ours.middle_zero_conv, ours.hint_encoder[-1]):
        torch.nn.init.normal_(conv.weight, std=0.05)  # as if trained, so that every tensor has a gradient
    save_controlnet(ours, tmp_path / "controlnet", layout="diffusers")
    theirs = diffusers.ControlNetModel.from_pretrained(tmp_path / "controlnet", torch_dtype=torch.float64)
    exact, their_schedule = NoiseSchedule().alphas_cumprod, diffusers.DDPMScheduler

    def in_double(**settings):
        scheduler = their_schedule(**settings)
        # a product of 1,000 float32 factors: each is rounded, and so is each step of the product
        torch.testing.assert_close(scheduler.alphas_cumprod.double(), exact, rtol=2000 * 2**-23, atol=0)
        scheduler.alphas_cumprod = exact
        return scheduler

    monkeypatch.setattr(sd, "tokenizer", lambda prompts: ids)
    monkeypatch.setattr(bench, "networks", lambda args, device: (sd, ours))
    monkeypatch.setattr(
        versus_diffusers, "networks", lambda args, device: (*(part.requires_grad_(False) for part in parts), theirs)
    )
    monkeypatch.setattr(diffusers, "DDPMScheduler", in_double)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setitem(PRECISIONS, "fp32", torch.float64)
    for draw in ("rand", "randn"):
        monkeypatch.setattr(torch, draw, partial(getattr(torch, draw), dtype=torch.float64))
    return ours, theirs, ids


def one_step(training, controlnet, ids):
    """The gradients of a benchmark's training step, and how far it moves the weights, in learning rates."""
    before, gradients = {name: p.detach().clone() for name, p in controlnet.named_parameters()}, {}

    def lap(part):
        if part == "backward":
            gradients.update((name, p.grad.clone()) for name, p in controlnet.named_parameters())

    torch.manual_seed(0)
    args = Namespace(work="train", preset=TINY, precision="fp32", batch_size=3, resolution=64, ids=ids)
    training(args, torch.device("cpu"))(lap)
    after = dict(controlnet.named_parameters())
    return gradients, {name: (after[name].detach() - p) / TINY.learning_rate for name, p in before.items()}


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # there is none to float64
def test_both_sides_do_the_same_work(in_float64):
    """The same pictures, noise and t give the same gradients, and the same weights after the optimizer's step.

    float64 rounds by 1e-16: sums in another order differ by less than 1e-12 of the whole gradient on any processor,
    and work that differs by 1e-3 and more. Adam's first step is g / (|g| + 1e-8) learning rates, beside weight decay,
    so an error of g counts at most 1e8-fold in it.
    """
    ours, theirs, ids = in_float64
    gradients, moved = one_step(bench.training, ours, ids)
    their_gradients, they_moved = one_step(versus_diffusers.training, theirs, ids)
    assert len(gradients) == len(their_gradients) == 336
    whole = torch.nn.utils.get_total_norm(their_gradients.values())
    for name, gradient in gradients.items():
        other = LAYOUTS[ControlNet][0].theirs(name)
        assert (gradient - their_gradients[other]).abs().max() <= 1e-12 * whole, name
        assert (moved[name] - they_moved[other]).abs().max() <= 1e-4 * whole, name


def test_command_line(monkeypatch, capsys):
    run_main(monkeypatch, bench, "tiny", "--steps", "1", "--rounds", "1", "--resolution", "64", "--batch-size", "1")
    lines = capsys.readouterr().out.splitlines()
    parts = {line.split(",")[0].strip() for line in lines if ", s, mean " in line}
    assert parts == {"encode", "forward", "backward", "optimizer"}
    assert lines[-1].startswith("ratio time ") and ", memory " in lines[-1]
