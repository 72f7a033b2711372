"""The benchmark compares equal work, and its command runs. No test looks at a time."""

from argparse import Namespace
from functools import partial

import diffusers
import pytest
import torch
from standin import run_main

from controlnet import ControlNet
from diffusion import NoiseSchedule
from stable_diffusion import TINY, TINY_FILE, StableDiffusion
from support.devices import PRECISIONS
from support.errors import UserError
from tools import bench, versus_diffusers
from weights import DIFFUSERS, save_controlnet

IDS = torch.tensor([[864, 5, 320, 7] + 73 * [865]] * 3)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The miniature and a ControlNet, here and in diffusers, in float64."""
    folder, sd = tmp_path_factory.mktemp("bench"), StableDiffusion.load("tiny").requires_grad_(False)
    torch.manual_seed(0)
    controlnet = ControlNet.from_unet(sd.unet, TINY.hint_channels, hint_init="he")
    for conv in (*controlnet.zero_convs, controlnet.middle_zero_conv, controlnet.hint_encoder[-1]):
        torch.nn.init.normal_(conv.weight, std=0.05)  # as if trained, so that every tensor has a gradient
    save_controlnet(controlnet, folder / "controlnet", layout="diffusers")
    sizes = {"unet": TINY.unet, "vae": TINY.vae, "text": TINY.text, "latent_scale": TINY.latent_scale}
    versus_diffusers.write_config(folder, sizes, sd.tokenizer)
    theirs = diffusers.StableDiffusionPipeline.from_single_file(
        str(TINY_FILE), config=str(folder), local_files_only=True, safety_checker=None
    )
    parts = [part.double().requires_grad_(False) for part in (theirs.unet, theirs.vae, theirs.text_encoder)]
    copy = diffusers.ControlNetModel.from_pretrained(folder / "controlnet").double()
    return (sd.double(), controlnet.double()), (*parts, copy)


@pytest.fixture
def in_float64(loaded, monkeypatch):
    """Both sides with the same networks and schedule, and in float64 also what either would cast to float32."""
    schedule, scheduler = NoiseSchedule(), diffusers.DDPMScheduler

    def exact(**settings):
        found = scheduler(**settings)
        # theirs is a product of 1,000 float32 factors, each rounded, and so is each step of the product
        torch.testing.assert_close(found.alphas_cumprod.double(), schedule.alphas_cumprod, rtol=2000 * 2**-23, atol=0)
        found.alphas_cumprod = schedule.alphas_cumprod
        return found

    ours, theirs = loaded
    monkeypatch.setattr(ours[0], "tokenizer", lambda prompts: IDS)
    monkeypatch.setattr(bench, "networks", lambda args, device: ours)
    monkeypatch.setattr(versus_diffusers, "networks", lambda args, device: theirs)
    monkeypatch.setattr(diffusers, "DDPMScheduler", exact)
    for draw in ("rand", "randn"):
        monkeypatch.setattr(torch, draw, partial(getattr(torch, draw), dtype=torch.float64))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setitem(PRECISIONS, "fp32", torch.float64)
    return ours[1], theirs[3]


def one_step(training, controlnet):
    """The gradients of a benchmark's training step, and how far it moves the weights, in learning rates."""
    before, gradients = {name: p.detach().clone() for name, p in controlnet.named_parameters()}, {}

    def lap(part):
        if part == "backward":
            gradients.update((name, p.grad.clone()) for name, p in controlnet.named_parameters())

    args = Namespace(work="train", preset=TINY, precision="fp32", batch_size=3, size=(64, 64), ids=IDS)
    torch.manual_seed(0)
    training(Namespace(gradient_checkpointing=False, **vars(args)), torch.device("cpu"))(lap)
    after = dict(controlnet.named_parameters())
    return gradients, {name: (after[name].detach() - p) / TINY.learning_rate for name, p in before.items()}


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # there is none to float64
def test_both_sides_do_the_same_work(in_float64):
    """The same pictures, noise and t give the same gradients, and the same weights after the optimizer's step.

    float64 rounds by 1e-16: sums in another order differ by less than 1e-12 of the whole gradient on any processor,
    and work that differs by 1e-3 and more. Adam's first step is g / (|g| + 1e-8) learning rates, beside weight decay,
    so an error of g counts at most 1e8-fold in it.
    """
    ours, theirs = in_float64
    gradients, moved = one_step(bench.training, ours)
    their_gradients, they_moved = one_step(versus_diffusers.training, theirs)
    assert len(gradients) == len(their_gradients) == 340
    whole = torch.nn.utils.get_total_norm(their_gradients.values())
    for name, gradient in gradients.items():
        other = DIFFUSERS[ControlNet][0].theirs(name)
        assert (gradient - their_gradients[other]).abs().max() <= 1e-12 * whole, name
        assert (moved[name] - they_moved[other]).abs().max() <= 1e-4 * whole, name


def test_command_line(monkeypatch, capsys):
    """Busy or not: with how much of the time a process has to run set to 0, it gives its ratio."""
    monkeypatch.setattr(bench, "QUIET", 0.0)
    options = ["--gradient-checkpointing", "--steps", "1", "--rounds", "1", "--resolution", "64", "--batch-size", "1"]
    run_main(monkeypatch, bench, "tiny", *options)
    lines = capsys.readouterr().out.splitlines()
    parts = {line.split(",")[0].strip() for line in lines if ", s, mean " in line}
    assert parts == {"encode", "forward", "backward", "optimizer"}
    assert lines[-1].startswith("ratio time ") and ", memory " in lines[-1]
    with pytest.raises(UserError, match="sampling has no backward pass"):
        run_main(monkeypatch, bench, "sample", *options)
