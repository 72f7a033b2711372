"""A full-size stand-in checkpoint, 4.3 GB like the real one, through StableDiffusion.load. Minutes, so marked slow."""

import shutil
import subprocess
import sys

import pytest
from standin import ROOT

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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_memory(checkpoint, tmp_path):
    """The peak of a fresh process that loads a file and runs every part once, in sizes of the model in float32.

    A float16 file is converted part by part: with the UNet, four fifths of all, there are 1.2 of it; all at once, there
    would be 1.5. Python, libraries and activations are under 0.1. (A float32 file is mapped, which is less.)
    """
    full, path, most = checkpoint("sd15"), tmp_path / "half.safetensors", 1.45
    shutil.copy(full.parent / "merges.txt", tmp_path)
    save_tensors({name: tensor.half() for name, tensor in read_tensors(full)[0].items()}, path)
    command = [sys.executable, "-c", FIRST_FORWARD, path, str(PARAMETERS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout) * 1024 <= most * 4 * PARAMETERS
    path.unlink()
