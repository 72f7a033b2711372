"""notebooks/mechanism.py, which looks into a training."""

import pytest
import torch
from standin import ROOT

from controlnet import ControlNet, Denoiser
from convergence import HeldOut
from data import DrawnImages
from stable_diffusion import TINY, StableDiffusion
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


def test_exchanges(monkeypatch, tmp_path):
    """Parts that did not change do nothing, in whatever order nothing is added; the one that did does all."""
    monkeypatch.syspath_prepend(ROOT / "notebooks")
    from mechanism import PARTS, exchanges, part_of

    torch.manual_seed(0)
    sd = StableDiffusion.load("tiny")
    controlnet = ControlNet.from_unet(sd.unet, TINY.hint_channels, TINY.hint_init, connection="gaussian")
    assert {part_of(name, controlnet) for name in controlnet.state_dict()} == set(PARTS)
    held_out = HeldOut(sd, DrawnImages(4, 64), 0, tmp_path, previews=False)
    before = {name: tensor.clone() for name, tensor in controlnet.state_dict().items()}
    for changed in PARTS:
        after = {n: x + 0.02 * (part_of(n, controlnet) == changed) * torch.rand_like(x) for n, x in before.items()}
        entry = exchanges(Denoiser(sd.unet, controlnet), held_out, before, after)
        assert entry["before"] != pytest.approx(entry["after"])
        for part in PARTS:
            only, all_but = ("after", "before") if part == changed else ("before", "after")
            assert entry[f"only_{part}"] == pytest.approx(entry[only])
            assert entry[f"all_but_{part}"] == pytest.approx(entry[all_but])
        assert (entry["features_before"] != entry["features_after"]) == (changed == "encoder")
        assert len(entry["features_only"]) == len(entry["moved"]) == 7
        expected = 0.02 / 3**0.5 if changed == "encoder" else 0  # root mean square of numbers from 0 to 0.02
        assert entry["moved"] == pytest.approx([expected] * 7, rel=0.1)
        if changed != "encoder":
            assert set(entry["features_shuffled"]) == {entry["features_before"]}
