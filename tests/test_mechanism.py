"""notebooks/mechanism.py, which looks into a training."""

import pytest
import torch
from standin import ROOT

from controlnet import ControlNet
from stable_diffusion import TINY
from unet import UNet


def test_gradients_of_the_two_halves(monkeypatch):
    """They add up to the gradient, and equal halves have the cosine 1; so have equal steps."""
    monkeypatch.syspath_prepend(ROOT / "notebooks")
    from mechanism import Mechanism

    torch.manual_seed(0)
    controlnet = ControlNet.from_unet(UNet(TINY.unet), TINY.hint_channels, connection="gaussian")
    mechanism = Mechanism(controlnet, torch.rand(2, 3, 64, 64))
    half = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 64, 64), torch.tensor([1, 700]), torch.randn(2, 77, 64)
    x, hint, t, context = (torch.cat([tensor, tensor]) for tensor in half)
    for _ in range(2):
        controlnet.zero_grad()
        sum(residual.square().mean() for residual in controlnet(x, hint, t, context)).backward()
        for conv in (conv for convs in mechanism.groups.values() for conv in convs):
            whole = torch.cat([conv.weight.grad.flatten(), conv.bias.grad])
            torch.testing.assert_close(sum(mechanism.halves[conv]), whole, rtol=1e-3, atol=1e-5 * whole.abs().max())
        mechanism.measure()
    first, second = mechanism.entries
    assert [first[f"halves_{name}"] for name in mechanism.groups] == pytest.approx([1, 1, 1], abs=1e-4)
    assert [second[f"turn_{name}"] for name in mechanism.groups] == pytest.approx([1, 1, 1], abs=1e-4)
    assert not any(name.startswith("turn") for name in first)
