"""A full-size stand-in checkpoint, 4.3 GB like the real one, through StableDiffusion.load. Minutes, so marked slow."""

import shutil
import subprocess
import sys

import pytest
import torch
from standin import ROOT, deviation, golden_inputs

from stable_diffusion import StableDiffusion
from support.files import read_tensors, save_tensors

pytestmark = pytest.mark.slow

PARAMETERS = 1_066_235_307  # of UNet, VAE and text encoder

FIRST_FORWARD = """
import sys, torch
from stable_diffusion import StableDiffusion
sd = StableDiffusion.load(sys.argv[1])
with torch.no_grad():
    context = sd.text_encoder(torch.full((1, 77), 7))
    z = sd.encode_images(torch.zeros(1, 3, 64, 64))
    sd.decode_latents(sd.unet(z, torch.tensor([5]), context))
assert sum(p.numel() for p in sd.parameters()) == int(sys.argv[2])
assert {p.dtype for p in sd.parameters()} == {torch.float32}
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.fixture(scope="module")
def half_checkpoint(checkpoint, scratch):
    full, path = checkpoint("sd15"), scratch / "half" / "model.safetensors"
    path.parent.mkdir()
    shutil.copy(full.parent / "merges.txt", path.parent)
    save_tensors({name: tensor.half() for name, tensor in read_tensors(full)[0].items()}, path)
    yield path
    path.unlink()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_memory(half_checkpoint):
    """The peak of a fresh process that loads a file and runs every part once, in sizes of the model in float32.

    A float16 file is converted part by part: with the UNet, four fifths of all, there are 1.2 of it; all at once, there
    would be 1.5. Python, libraries and activations are under 0.1. (A float32 file is mapped, which is less.)
    """
    command, most = [sys.executable, "-c", FIRST_FORWARD, half_checkpoint, str(PARAMETERS)], 1.45
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout) * 1024 <= most * 4 * PARAMETERS


@torch.no_grad()
def test_float16_file(checkpoint, half_checkpoint):
    """Every parameter is the float32 one rounded; the output moves by what that rounding does."""
    full, half = StableDiffusion.load(checkpoint("sd15")), StableDiffusion.load(half_checkpoint)
    ours, theirs = list(full.parameters()), list(half.parameters())
    assert len(ours) == 1130 and all(torch.equal(p.half().float(), q) for p, q in zip(ours, theirs, strict=True))
    arrays = golden_inputs("sd15")
    text = half.text_encoder(arrays["tokens"])
    # Rounding moves each weight by up to 2^-11 = 5e-4 of itself, at random, through some hundred layers.
    assert deviation(text[:, ::4], arrays["text"]) <= 5e-3
    assert deviation(half.unet(arrays["x"], arrays["t"], text), arrays["eps_uncontrolled"]) <= 5e-3
    assert deviation(half.vae.decode(arrays["z"]), arrays["vae_decoded"]) <= 5e-3
