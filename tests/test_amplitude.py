"""notebooks/amplitude.py, which changes how large the hint's features begin."""

import math

import pytest
import torch
from standin import ROOT

from controlnet import ControlNet
from data import DrawnImages
from stable_diffusion import TINY
from unet import UNet


def test_scale(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "notebooks")
    from amplitude import scale, sizes

    pairs, unet, features = DrawnImages(4, 128), UNet(TINY.unet), {}
    hints = torch.stack([pairs.hint(i) for i in range(4)])
    for gain in (1.0, 2.0, 4.0):
        torch.manual_seed(0)
        controlnet = ControlNet.from_unet(unet, TINY.hint_channels, TINY.hint_init)
        scale(controlnet, gain)
        for layer in list(controlnet.hint_encoder)[:-1:2]:
            found = layer.weight.std().item() * math.sqrt(layer.weight[0].numel())
            assert found == pytest.approx(gain, rel=0.15)  # of 216 weights or more the error is below 5 %
        measured = sizes(controlnet, hints)
        assert measured["u"] == measured["v"] == 0
        features[gain] = measured["features"]
    assert 100 * features[1.0] < features[2.0] < features[4.0] / 100
