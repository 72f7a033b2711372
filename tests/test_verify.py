"""The command that compares a user's files here and in diffusers, on the small stand-in."""

import json

import pytest
import torch
from standin import run_main

from tools import verify
from weights import load_controlnet

ROWS = ["tokens", "text", "VAE, encoded", "VAE, decoded", *[f"residual {i:2}" for i in range(1, 14)], "ε", "sample"]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(verify, "TIMES", (1, 901))
    return ["--resolution", "64", "--steps", "2"]


def test_the_same_file_there(quick, checkpoint, control_checkpoint, monkeypatch, capsys):
    run_main(monkeypatch, verify, "--base", checkpoint("small"), "--controlnet", control_checkpoint("small"), *quick)
    printed = capsys.readouterr().out
    for row in ROWS:
        assert f"\n{row} " in printed
    assert printed.endswith("the same, up to rounding\n")


def test_what_differs_is_named(quick, checkpoint, control_checkpoint, monkeypatch, capsys):
    def misread(path, unet):
        controlnet = load_controlnet(path, unet)
        controlnet.zero_convs[4].bias.data += 0.1 * controlnet.zero_convs[4].weight.std()
        return controlnet

    monkeypatch.setattr(verify, "load_controlnet", misread)
    files = "--base", checkpoint("small"), "--controlnet", control_checkpoint("small")
    with pytest.raises(SystemExit, match="1"):
        run_main(monkeypatch, verify, *files, *quick)
    assert "DIFFERENT: residual  5" in capsys.readouterr().out
    for value in (float("nan"), float("inf")):  # what is no number differs
        assert verify.compare({"text": torch.full((3,), value)}, {"text": torch.ones(3)}) == {"text": float("inf")}


def test_a_folder_there(quick, diffusers_base, monkeypatch, capsys):
    """With its own settings, but for a sampler that visits other times; without model_index.json and vocab.json."""
    schedule = diffusers_base / "scheduler" / "scheduler_config.json"
    saved = json.loads(schedule.read_text())
    schedule.write_text(json.dumps(saved | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}))
    run_main(monkeypatch, verify, "--base", diffusers_base, *quick)
    schedule.write_text(json.dumps(saved))
    assert capsys.readouterr().out.endswith("the same, up to rounding\n")
