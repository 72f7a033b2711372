"""Stand-in weights: the official names and shapes, with the values that the golden numbers were computed with.

tests/golden/ holds what the authors' released code gave on them; see tests/golden/README.md.
"""

import json
from pathlib import Path

import numpy as np
import recipe
import torch

from clip_text import CLIPTextConfig, CLIPTextModel
from controlnet import ControlNet
from stable_diffusion import SD15
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig
from weights import load_official

GOLDEN = Path(__file__).parent / "golden"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())
CONFIGS = {
    "small": (
        UNetConfig(model_channels=32, num_heads=4, context_dim=48),
        VAEConfig(channels=32),
        CLIPTextConfig(vocab_size=600, width=48, mlp_width=192, num_layers=3, num_heads=4),
    ),
    "sd15": (SD15.unet, SD15.vae, SD15.text),
}
PARTS = {"unet": UNet, "control": ControlNet, "vae": AutoencoderKL, "clip": CLIPTextModel}


def stand_in(size: str, *parts: str) -> dict[str, torch.Tensor]:
    """Official names of the parts ("unet", "control", "vae", "clip") and their stand-in values."""
    shapes = {name: shape for part in parts for name, shape in MANIFEST[size][part].items()}
    return {name: torch.from_numpy(recipe.weight(name, shape)) for name, shape in shapes.items()}


def build(size: str, part: str) -> torch.nn.Module:
    """One part with its stand-in weights, through the loading path that real files take."""
    unet, vae, text = CONFIGS[size]
    with torch.device("meta"):
        module = {
            "unet": lambda: UNet(unet),
            "control": lambda: ControlNet.from_unet(UNet(unet)),
            "vae": lambda: AutoencoderKL(vae),
            "clip": lambda: CLIPTextModel(text),
        }[part]()
    load_official(module, stand_in(size, part))
    return module.requires_grad_(False)


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def deviation(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |b|, the measure of the golden numbers' tolerances."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return ((a - b).abs().max() / b.abs().max()).item()
