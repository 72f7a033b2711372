"""The table of trainings behind notebooks 3 to 5: each is a command that train.py takes."""

import sys

import pytest
import torch
from standin import ROOT

from controlnet import ControlNet
from train import parse_arguments

sys.path.insert(0, str(ROOT / "notebooks"))
try:
    from experiments import ALWAYS, EQUAL, SCORES, TABLE, base, distance
finally:
    sys.path.pop(0)

RUNS = [(group, runs) for group in TABLE for runs in TABLE[group]]


@pytest.mark.parametrize("runs", [runs for _, runs in RUNS], ids=lambda runs: f"{runs.name}-{runs.seeds[0]}")
def test_options(runs, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *f"{ALWAYS} {runs.options}".split()])
    args = parse_arguments()
    if args.snapshot_steps and runs.steps > 10:
        assert EQUAL % args.snapshot_steps == 0  # those that are scored are there


def test_table():
    trainings = {(runs.name, runs.steps, runs.options) for _, runs in RUNS}
    assert len(trainings) == len({name for name, *_ in trainings})  # a folder has one training, whichever group asks
    assert set(SCORES) <= set(TABLE)


def test_distance():
    """What was copied has none; shrunk by a thousandth, that is its distance, whatever else has moved."""
    controlnet = ControlNet.from_unet(base().unet, base().preset.hint_channels, connection="gaussian")
    assert distance(controlnet) == 0
    with torch.no_grad():
        for part in (controlnet.time_embed, controlnet.encoder, controlnet.middle):
            for weight in part.parameters():
                weight *= 0.999
    assert distance(controlnet) == pytest.approx(1e-3, rel=1e-4)
