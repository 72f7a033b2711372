"""What a dry run says is what a training takes, and it touches nothing."""

import re
import sys
from argparse import Namespace
from itertools import accumulate

import pytest
from standin import QUICK
from torch.profiler import ProfilerActivity, profile

import train
from sample import generate
from stable_diffusion import StableDiffusion
from support.dry_run import GB, count_training
from support.options import with_defaults


def count(monkeypatch, *options) -> dict:
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    args: Namespace = train.parse_arguments()
    args = with_defaults(args, StableDiffusion.without_weights(args.base).preset)
    return count_training(args, StableDiffusion.without_weights, train.assemble, train.train, generate)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "step"),
    [([], 10.5), (["--gradient-checkpointing"], 8.3), (["--train-batch-size", "8"], 14.3)],
    ids=["default", "checkpointing", "batch of 8"],
)
def test_stable_diffusion(options, step, monkeypatch):
    """Figures that were counted by another program, without VAE and text encoder: 0.83 GB in float32."""
    taken = count(monkeypatch, "--base", "sd15", "--validation-steps", "0", *options)
    assert taken["peaks"]["in a step"] / GB == pytest.approx(step + 0.83, rel=0.05)
    # Weights and Adam's moments in float32, 361,279,120 of each; the UNet, 859,520,964, in bf16; VAE and text encoder.
    assert taken["trained"] == taken["saved"] == 361_279_120
    assert taken["peaks"]["while saving"] / GB == pytest.approx(3 * 4 * 0.361 + 2 * 0.860 + 0.83, rel=0.02)


def test_a_real_step_takes_as_much(nano, trained, monkeypatch):
    """Of what PyTorch's profiler saw allocated and freed on the CPU, the most that was there at once."""
    options = ["--gradient-checkpointing", "--unlock-decoder", "--resolution", "128", "--train-batch-size", "8"]
    options += ["--data", "drawn", "--num-workers", "0"]
    peaks = count(monkeypatch, "--base", nano, *QUICK, *options)["peaks"]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        trained(*options, "--max-train-steps", "2", "--validation-hints", "1")
    changes = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max(accumulate(changes)) == pytest.approx(max(peaks.values()), rel=0.05)


def test_nothing_is_touched(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("support.hub.fetch", None)
    trained("--dry-run", "--max-train-steps", "10", "--unlock-decoder", "--snapshot-steps", "5")
    assert not list(tmp_path.iterdir())
    said = capsys.readouterr().out
    assert "it fits in 8, 12, 16, 24 GB\n" in said and "fetched, unless it was before: nothing\n" in said
    assert "3 snapshots" in said and ", 4 targets" in said
    assert re.search(r"TFLOP a step: [\d.e-]+, .*\nseconds a step, estimated at 40% .*: RTX 3090 [\d.e-]+", said)
