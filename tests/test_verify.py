"""The command that compares a user's files here and in diffusers, on the small stand-in."""

import pytest
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
    with pytest.raises(SystemExit) as ended:
        run_main(
            monkeypatch, verify, "--base", checkpoint("small"), "--controlnet", control_checkpoint("small"), *quick
        )
    assert ended.value.code == 1
    assert "DIFFERENT: residual  5" in capsys.readouterr().out
