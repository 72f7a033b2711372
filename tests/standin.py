"""What several tests need: stand-in weights, command lines in this process, logs, a hostile pickle.

Stand-in weights have the official names and shapes, and the values that the golden numbers were computed with: what
the authors' released code gave on them is in tests/golden (see the README there).
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import recipe
import torch
from PIL import Image

from clip_text import CLIPTextConfig, Tokenizer, byte_symbols
from data import draw_fill50k
from stable_diffusion import SD15
from support.errors import UserError
from support.files import read_log, read_tensors
from unet import UNet, UNetConfig
from vae import VAEConfig
from weights import load_official

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "tests" / "fill50k"  # four real pairs
GOLDEN = ROOT / "tests" / "golden"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())
SMALL_TEXT = CLIPTextConfig(vocab_size=600, width=48, mlp_width=192, num_layers=3, num_heads=4)
CONFIGS = {
    "small": (UNetConfig(model_channels=32, num_heads=4, context_dim=48), VAEConfig(channels=32), SMALL_TEXT),
    "sd15": (SD15.unet, SD15.vae, SD15.text),
}
NANO = (  # the fixture `nano`
    UNetConfig(model_channels=8, channel_mult=(1, 1, 1, 1), num_heads=1, context_dim=16, norm_groups=4),
    VAEConfig(channels=8, channel_mult=(1, 1, 1, 1), norm_groups=4),
    CLIPTextConfig(vocab_size=866, width=16, mlp_width=32, num_layers=1, num_heads=1),
)
HINT_CHANNELS = (4, 4, 8, 8)  # of its ControlNet, the fixture `controlnet`
# train.py's options for a short run, with `--base` the fixture `nano`: nothing is sampled, and more steps are the same
# training.
QUICK = ["--data", SAMPLE, "--resolution", "64", "--train-batch-size", "3", "--validation-steps", "0"]
QUICK += ["--snapshot-steps", "0", "--cooldown", "0"]
LATEST = ["--resume-from-checkpoint", "latest"]
# Of the fixture `snapshots`: from JUMP on they are the trained ControlNet, those before it the untrained one.
STEPS, JUMP = range(0, 50, 10), 20


def stand_in(size: str, *parts: str) -> dict[str, torch.Tensor]:
    """Official names of the parts ("unet", "control", "vae", "clip") and their stand-in values."""
    shapes = {name: shape for part in parts for name, shape in MANIFEST[size][part].items()}
    return {name: torch.from_numpy(recipe.weight(name, shape)) for name, shape in shapes.items()}


def small_unet() -> UNet:
    with torch.device("meta"):
        unet = UNet(CONFIGS["small"][0])
    load_official(unet, stand_in("small", "unet"))
    return unet.requires_grad_(False)


def make_up_merges(path: Path, vocab_size: int) -> Tokenizer:
    """Write a merges.txt that gives `vocab_size` tokens: pairs of single bytes, one after the other."""
    symbols = list(byte_symbols().values())
    pairs = [(a, b) for a in symbols for b in symbols][: vocab_size - 2 * len(symbols) - 2]
    path.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in pairs), encoding="utf-8")
    return Tokenizer.from_merges(path)


def golden(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(array) for key, array in np.load(GOLDEN / f"{name}.npz").items()}


def golden_inputs(size: str) -> dict[str, torch.Tensor]:
    """The golden arrays with all inputs: at full size hint and image are drawn, not stored."""
    arrays = golden(size)
    if size == "sd15":
        hint = torch.from_numpy(recipe.draw("sd15hint", 2, 3, 128, 192))
        arrays["hint"] = 1 / (1 + torch.exp(-hint))
        arrays["image"] = torch.from_numpy(recipe.draw("sd15im", 1, 3, 64, 96)).tanh()
    return arrays


def deviation(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |b|, the measure of the golden numbers' tolerances."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return ((a - b).abs().max() / b.abs().max()).item()


def run_main(monkeypatch, module, *options) -> None:
    """The command line of a program, in this process."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, options)])
    module.main()


def read_run(folder: Path) -> list[dict]:
    """A run's log, but for the seconds."""
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in read_log(folder / "log.jsonl")]


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_tensors(a: Path, b: Path) -> bool:
    """Whether two weight files hold the same tensors and metadata."""
    (a, a_metadata), (b, b_metadata) = read_tensors(a), read_tensors(b)
    return equal(a, b) and a_metadata == b_metadata


def in_layout(module: torch.nn.Module, layout) -> dict:
    return {layout.theirs(name): tensor for name, tensor in module.state_dict().items()}


def refusal(read, *arguments) -> str:
    """The one line of a UserError."""
    with pytest.raises(UserError) as raised:
        read(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def same_state(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return equal(a.state_dict(), b.state_dict())


def ring_picture(size: int = 128) -> Image.Image:
    return draw_fill50k(0, size)[0]


class HostilePickle:
    """Unpickled, it makes the file `trap`."""

    def __init__(self, trap: Path):
        self.trap = str(trap)

    def __reduce__(self):
        return open, (self.trap, "w")
