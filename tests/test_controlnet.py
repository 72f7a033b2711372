"""What the paper claims of zero convolutions, and the shape of the networks."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from controlnet import ControlNet, Denoiser, HintEncoder, control_weights, zero_conv
from stable_diffusion import SD15, TINY
from support.block_table import block_table
from unet import UNet, encoder_channels
from vae import AutoencoderKL, SpatialAttention


def random_inputs(config, dtype=torch.float32, side=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, side, side, generator=generator)
    hint = torch.rand(2, 3, 8 * side, 8 * side, generator=generator)
    context = torch.randn(2, 77, config.context_dim, generator=generator)
    return x.to(dtype), hint.to(dtype), torch.tensor([3, 970]), context.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", [TINY, pytest.param(SD15, marks=pytest.mark.slow)], ids=["tiny", "sd15"])
@torch.no_grad()
def test_nothing_changes_at_step_zero(preset, dtype):
    """Equation (3), bit for bit."""
    torch.manual_seed(0)
    unet = UNet(preset.unet).to(dtype)
    controlnet = ControlNet.from_unet(unet, preset.hint_channels)
    ours, theirs = controlnet.encoder[1].resnet.conv1.weight, unet.encoder[1].resnet.conv1.weight
    assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()  # a copy
    x, hint, t, context = random_inputs(preset.unet, dtype)
    residuals = controlnet(x, hint, t, context)
    assert torch.equal(unet(x, t, context, residuals), unet(x, t, context))
    nn.init.normal_(controlnet.middle_zero_conv.weight, std=0.1)
    assert not torch.equal(unet(x, t, context, controlnet(x, hint, t, context)), unet(x, t, context))


def test_gradient_comes_in_three_waves():
    """13 output zero convs; the copy and the hint encoder's last conv; the rest of the hint encoder.

    On sizes where every tensor has a gradient: with more than one channel in a norm group, which would take a bias away
    again, and more than one position in the deepest attention.
    """
    torch.manual_seed(0)
    unet = UNet(TINY.unet).requires_grad_(False)
    controlnet = ControlNet.from_unet(unet, TINY.hint_channels)
    x, hint, t, context = random_inputs(TINY.unet, side=16)
    optimizer = torch.optim.SGD(controlnet.parameters(), lr=0.1)
    waves = []
    for _ in range(3):
        (unet(x, t, context, controlnet(x, hint, t, context)) - 1).square().mean().backward()
        waves.append({name for name, p in controlnet.named_parameters() if p.grad.count_nonzero()})
        optimizer.step()
        optimizer.zero_grad()
    names = dict(controlnet.named_parameters()).keys()
    outputs = {name for name in names if name.startswith(("zero_convs.", "middle_zero_conv."))}
    early_hint = {name for name in names if name.startswith("hint_encoder.") and ".14." not in name}
    assert waves == [outputs, names - early_hint, names] and len(outputs) == 26
    assert all(p.grad is None for p in unet.parameters())


def test_one_zero_layer_learns():
    """y = wx + b with w = b = 0: dy/dw = x and dy/db = 1 are not zero, only dy/dx = w is."""
    conv, x = zero_conv(1), torch.full((1, 1, 1, 1), 3.0, requires_grad=True)
    assert (conv.kernel_size, conv.weight.item(), conv.bias.item()) == ((1, 1), 0, 0)
    conv(x).backward()
    assert (conv.weight.grad.item(), conv.bias.grad.item(), x.grad.item()) == (3.0, 1.0, 0.0)


def test_two_zero_layers_in_series_stay_dead():
    """Each waits for the other: only the last bias, which needs neither, has a gradient, and does not help them."""
    first, last = zero_conv(1), zero_conv(1)
    for bias in (0.0, 0.5):
        nn.init.constant_(last.bias, bias)
        last(first(torch.full((1, 1, 1, 1), 3.0))).backward()
        assert [p.grad.item() for p in (first.weight, first.bias, last.weight)] == [0, 0, 0]
    assert last.bias.grad.item() == 2


def test_norm_epsilons():
    """The golden numbers are too coarse to see these."""
    unet, vae = UNet(TINY.unet), AutoencoderKL(TINY.vae)
    for name, module in [*unet.named_modules(), *ControlNet.from_unet(unet, TINY.hint_channels).named_modules()]:
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            assert module.eps == (1e-6 if name.endswith("transformer.norm") else 1e-5), name
    assert {module.eps for module in vae.modules() if isinstance(module, nn.GroupNorm)} == {1e-6}


def test_parameter_counts():
    with torch.device("meta"):
        unet = UNet(SD15.unet)
        controlnet = ControlNet.from_unet(unet)
        vae = AutoencoderKL(SD15.vae)

    def count(*modules):
        return sum(p.numel() for module in modules for p in module.parameters())

    assert (count(unet), count(vae), count(controlnet)) == (859_520_964, 83_653_863, 361_279_120)
    assert count(controlnet.encoder, controlnet.middle, controlnet.time_embed) == 348_712_960
    assert count(controlnet.zero_convs, controlnet.middle_zero_conv) == 11_479_680
    assert count(controlnet.hint_encoder) == 1_086_480


def test_block_table():
    with torch.device("meta"):
        rows = block_table(UNet(SD15.unet))
    _, layers, channels, resolutions, _ = zip(*rows)
    assert list(channels[:12]) == [320] * 4 + [640] * 3 + [1280] * 5 == encoder_channels(SD15.unet)
    assert list(channels[12:]) == [1280] * 7 + [640] * 3 + [320] * 3
    assert list(resolutions) == [64] * 3 + [32] * 3 + [16] * 3 + [8] * 6 + [16] * 3 + [32] * 3 + [64] * 4
    assert [sum(text.count(kind) for text in layers) for kind in ("ResBlock", "transformer", "sample")] == [22, 16, 6]


def test_ablations():
    unet = UNet(TINY.unet)
    x, hint, t, context = random_inputs(TINY.unet)
    full = ControlNet.from_unet(unet, TINY.hint_channels)(x, hint, t, context)
    gaussian = ControlNet.from_unet(unet, TINY.hint_channels, connection="gaussian")
    lite = ControlNet.from_unet(unet, TINY.hint_channels, copy="lite")
    assert all(residual.count_nonzero() == 0 for residual in full + lite(x, hint, t, context))
    assert all(residual.count_nonzero() > 0 for residual in gaussian(x, hint, t, context))
    for conv in (*gaussian.zero_convs, gaussian.middle_zero_conv, gaussian.hint_encoder[-1]):
        assert conv.weight.std().item() == pytest.approx(0.02, rel=0.15)
        assert conv.bias.count_nonzero() == 0
    assert [r.shape for r in lite(x, hint, t, context)] == [r.shape for r in full]
    convs = [module for module in [*lite.encoder.modules(), *lite.middle.modules()] if isinstance(module, nn.Conv2d)]
    assert [conv.kernel_size for conv in convs] == [(3, 3)] * 13
    assert [i for i, conv in enumerate(convs) if conv.stride == (2, 2)] == [3, 6, 9]
    for wrong in ({"connection": "one"}, {"copy": "half"}, {"hint_init": "she"}):
        with pytest.raises(ValueError, match=next(iter(wrong.values()))):
            ControlNet.from_unet(unet, **wrong)


def test_he_init_keeps_the_hint_alive():
    """The released initialisation shrinks the hint's variation on its way to less than a hundredth; "silu" does not."""
    hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    kept = {}
    for init in ("default", "silu"):
        torch.manual_seed(0)
        encoder = HintEncoder(32, TINY.hint_channels, init)
        before_zero_conv = nn.Sequential(*list(encoder)[:-1])
        kept[init] = (before_zero_conv(hint).std(dim=(2, 3)).mean() / hint.std()).item()
    assert kept["default"] < 0.01
    assert 1 < kept["silu"] < 10  # SiLU passes more than half of values that are not small


def test_control_weights():
    assert control_weights("uniform", 0.5) == [0.5] * 13
    assert control_weights("conditional") == [1.0] * 13
    assert control_weights("guess")[0] == pytest.approx(0.825**12)
    assert control_weights("guess", 2.0)[12] == 2.0
    assert control_weights("resolution") == [1, 1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8, 8]  # as in test_block_table
    with pytest.raises(ValueError, match="'strong'"):
        control_weights("strong")


def test_gradient_checkpointing_changes_nothing():
    torch.manual_seed(0)
    unet = UNet(TINY.unet).requires_grad_(False)
    controlnet = ControlNet.from_unet(unet, TINY.hint_channels, connection="gaussian")
    x, hint, t, context = random_inputs(TINY.unet)
    gradients = []
    for checkpointing in (False, True):
        Denoiser(unet, controlnet, checkpointing=checkpointing)
        controlnet.zero_grad()
        unet(x, t, context, controlnet(x, hint, t, context)).square().mean().backward()
        gradients.append([p.grad.clone() for p in controlnet.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@torch.no_grad()
def test_the_vae_s_attention_makes_no_matrix():
    """Of all pairs of positions: gigabytes for a large picture. Where only the fused kernel is allowed, it fits."""
    torch.manual_seed(0)
    attention, x = SpatialAttention(64, 8), torch.randn(2, 64, 16, 24)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        fused = attention(x)
    with sdpa_kernel(SDPBackend.MATH):
        exact = attention.double()(x.double())
    # Sums of 16 * 24 positions and 64 channels, each term rounded once at most by 2^-24 of the largest.
    assert (fused - exact).abs().max() < (16 * 24 + 64) * 2**-24 * exact.abs().max()
