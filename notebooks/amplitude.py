"""How large the hint's features begin, and when the jump comes: `python notebooks/amplitude.py`, for notebook 3.

The trainings are train.py's, with the miniature's preset and a constant learning rate, but for the hint encoder's
initial weights: normal numbers of the standard deviation gain / √fan_in. The preset's gain is 2 (`HintEncoder`); √2 is
He's for ReLU; PyTorch's own initialisation, the released one, has 1/√3. amplitude-GAIN-SEED.jsonl in docs/logs has
train.py's measurements, every five steps, and after each step the size of the factors on the hint's way to the output:

    features: of what enters u, the hint encoder's zero convolution: root mean square of what varies over the picture
    u, v: root mean square of the weights of u, and of the 13 output zero convolutions (their median)

A training that is complete in runs/ is not run again. All take about an hour of one core of an Intel Xeon with AVX-512.
"""

import math
import shutil
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from controlnet import ControlNet
from support.errors import run_command_line
from support.log import read_log, write_log
from support.run import Run
from train import parse_arguments, prepare, train

STEPS = {1.0: 240, math.sqrt(2): 200, 2.0: 120, 2 * math.sqrt(2): 120}  # of each gain: enough for most jumps
SEEDS = range(3)
LOGS = ROOT / "docs" / "logs"
FIELDS = ("step", "hint_sensitivity", "hint_gap", "heldout_loss")  # of train.py's log, which has them every five steps


def log_of(gain: float, seed: int) -> Path:
    return LOGS / f"amplitude-{gain:.2f}-{seed}.jsonl"


def folder_of(gain: float, seed: int) -> Path:
    return ROOT / "runs" / log_of(gain, seed).stem


@torch.no_grad()
def scale(controlnet: ControlNet, gain: float) -> None:
    """Give the hint encoder's layers before u this gain instead of 2."""
    for layer in list(controlnet.hint_encoder)[:-1:2]:
        layer.weight *= gain / 2


@torch.no_grad()
def sizes(controlnet: ControlNet, hints: Tensor) -> dict[str, float]:
    *encoder, u = controlnet.hint_encoder
    features = nn.Sequential(*encoder)(hints)
    zero_convs = [*controlnet.zero_convs, controlnet.middle_zero_conv]
    return {
        "features": rms(features - features.mean((2, 3), keepdim=True)),
        "u": rms(u.weight),
        "v": statistics.median(rms(conv.weight) for conv in zero_convs),
    }


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def measured_training(gain: float, seed: int, steps: int) -> list[dict]:
    """The log of one training; shorter than `steps` if it was stopped."""
    folder, encoded = folder_of(gain, seed), ROOT / "runs" / f"seed-{seed}" / "cache"
    if encoded.exists() and not folder.exists():  # the same pairs
        shutil.copytree(encoded, folder / "cache")
    sys.argv = ["train.py", "--output-dir", str(folder), "--max-train-steps", str(steps), "--seed", str(seed),
                "--validation-hints", "32", "--validation-steps", "0", "--snapshot-steps", "0",
                "--cooldown", "0"]  # fmt: skip
    args = parse_arguments()
    with Run(args) as run:
        training = prepare(args, run)
        controlnet, hints = training.denoiser.controlnet, training.held_out.own
        scale(controlnet, gain)
        entries = [{"step": 0} | sizes(controlnet, hints)]
        training.optimizer.register_step_post_hook(lambda *_: entries.append(sizes(controlnet, hints)))
        train(training, run)
    logged = [{}] + [{name: entry[name] for name in FIELDS if name in entry} for entry in run.history]
    return [{k: v if k == "step" else float(f"{v:.4g}") for k, v in (a | b).items()} for a, b in zip(entries, logged)]


def main() -> None:
    for seed in SEEDS:
        for gain, steps in STEPS.items():
            if len(read_log(folder_of(gain, seed) / "log.jsonl")) < steps:
                entries = measured_training(gain, seed, steps)
                if len(entries) <= steps:
                    sys.exit("stopped: delete its folder in runs/ and run it again, and this training starts over")
                write_log(log_of(gain, seed), entries)


if __name__ == "__main__":
    run_command_line(main)
