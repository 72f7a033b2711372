"""The Stable Diffusion that ships here."""

import numpy as np
import pytest
import torch
from standin import ROOT

from clip_text import Tokenizer
from data import COLOURS, DRAWN_HELD_OUT, DrawnImages
from metrics import circle_distance, prompt_colours
from sample import generate
from stable_diffusion import TINY, TINY_FILE, StableDiffusion
from support.files import read_tensors
from support.pictures import fit_image, open_image
from tools import pretrain
from tools.dusk import DUSK, at_dusk, iou_in_light
from tools.shapes import judge
from weights import load_controlnet


@pytest.fixture(scope="module")
def tiny():
    return StableDiffusion.load("tiny")


def test_it_is_small_and_official(tiny):
    assert sum(path.stat().st_size for path in TINY_FILE.parent.iterdir()) <= 16e6
    tensors, metadata = read_tensors(TINY_FILE)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert "model.diffusion_model.input_blocks.0.0.weight" in tensors
    assert "config" in metadata
    assert tiny.preset is TINY
    assert (tiny.unet.config, tiny.vae.config, tiny.text_encoder.config) == (TINY.unet, TINY.vae, TINY.text)
    assert tiny.latent_scale == TINY.latent_scale


def test_the_palette_brings_the_colours(tiny):
    """Without a prompt, every pixel is near one of the hint's two colours, which the base alone can't know."""
    pairs = DrawnImages(8, 128, DRAWN_HELD_OUT, palette=True)
    hints = torch.stack([pairs.hint(i) for i in range(8)])
    colours = torch.stack([prompt_colours(prompt) for prompt in pairs.prompts])[..., None, None]  # [8, 2, 3, 1, 1]
    controlnet = load_controlnet(ROOT / "models" / "palette" / "controlnet.safetensors", tiny.unet)

    def distance(*control):
        settings = {"steps": 5, "guidance_scale": 4.0, "control_mode": "conditional", "size": (128, 128)}
        images = generate(tiny, *control, [""] * 8, **settings)[:, None] / 2 + 0.5
        return (images - colours).abs().mean(dim=2).amin(dim=1).mean()  # of a pixel from the nearer colour

    assert distance([controlnet], [hints]) < 0.05  # 0.026 on one machine
    assert distance([], []) > 0.15  # 0.21


@torch.no_grad()
def test_autoencoder(tiny):
    """32 dB: an error of 2.5 % of the range, hard to see."""
    images, _ = pretrain.draw_batch(pretrain.UNSEEN, range(1000, 1016), 128)
    assert pretrain.reconstruct(tiny.vae, images)[1] >= 32
    latents = tiny.encode_images(images, torch.Generator().manual_seed(0))
    assert latents.std().item() == pytest.approx(1, abs=0.25)  # the scale was measured on 1,000 pictures, here are 16
    real = fit_image(open_image(ROOT / "tests" / "fill50k" / "target" / "0.png"), 128)[None] * 2 - 1
    assert (pretrain.reconstruct(tiny.vae, real)[0] - real).abs().mean() < 0.05


def test_words_are_tokens(tiny):
    for name in COLOURS:
        assert len(tiny.tokenizer.encode(f"{name} triangle with {name} background")) == 2 * len(name.split()) + 3


def test_learning_merges(tmp_path):
    """The shipped merges are what the stage makes."""
    pretrain.learn_merges(tmp_path)
    assert (tmp_path / "merges.txt").read_bytes() == (TINY_FILE.parent / "merges.txt").read_bytes()
    assert len(Tokenizer.from_merges(tmp_path / "merges.txt").ids) == TINY.text.vocab_size


def test_stages_resume(tmp_path, monkeypatch):
    """The loop that the stages share: stopped after 2 of 4 steps and run again, it ends with the same weights."""
    monkeypatch.setattr(pretrain, "CHECKPOINT_EVERY", 2)

    def train(folder, last=4):
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 2, 3).to(memory_format=torch.channels_last)

        def loss_fn(step, generator):
            if step >= last:
                raise KeyboardInterrupt
            return model(torch.rand(1, 3, 8, 8, generator=generator)).square().mean(), {}

        return pretrain.fit("toy", pretrain.Fit(4, 1, 1e-3), folder, model, loss_fn, lambda *_: None)

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", last=3)
    parts = train(tmp_path / "parts")
    assert torch.equal(whole.weight, parts.weight)  # which also says that none is NaN


@torch.no_grad()
def test_base_paints_what_the_prompt_says(tiny):
    """Over 16 unseen captions: what the model card says of 256, with room for so few."""
    _, captions = pretrain.draw_batch(pretrain.UNSEEN, range(16), 8)
    images = generate(tiny, [], [], captions, size=(128, 128), steps=10, guidance_scale=TINY.guidance_scale)
    judged = torch.tensor([judge(image, caption) for image, caption in zip(images, captions)])
    shape_error, background_error, right_shape = judged.mean(dim=0).tolist()
    assert shape_error <= 0.06 and background_error <= 0.06
    assert right_shape >= 14 / 16


def test_judging_samples():
    """Drawn scenes are judged right; with another's caption they are not."""
    images, captions = pretrain.draw_batch(pretrain.UNSEEN, range(12), 128)
    for image, caption in zip(images, captions):
        shape_error, background_error, right = judge(image, caption)
        assert max(shape_error, background_error) < 0.01 and right
    others = [judge(image, caption) for image, caption in zip(images, captions[1:] + captions[:1])]
    assert np.mean([errors for *errors, _ in others]) > 0.1
    assert not all(right for *_, right in others)
    flat = torch.zeros_like(images[0])
    assert judge(flat, captions[0])[2] is False


def test_dusk():
    """The second base's light, and that a picture in it is scored like one without."""
    pairs = DrawnImages(4, 128, DRAWN_HELD_OUT)
    hints, images = (torch.stack([part(i) for i in range(4)]) for part in (pairs.hint, pairs.image))
    lit = at_dusk(images, pairs.prompts)
    assert (iou_in_light(lit, hints, pairs.prompts, at_dusk) > 0.97).all()
    assert (iou_in_light(lit, hints.roll(1, 0), pairs.prompts, at_dusk) < 0.7).all()
    depth = ((torch.arange(128) + 0.5) / 128)[:, None].expand(128, 128)
    for picture, dark, hint in zip(images, lit, hints):
        distance = circle_distance(hint)
        for region, light in ((distance < -3, 1 - DUSK * depth), (distance > 3, 1 - DUSK * (1 - depth))):
            # the colours of a drawn picture are rounded to 1 / 255
            torch.testing.assert_close((dark + 1)[:, region], ((picture + 1) * light)[:, region], rtol=0, atol=0.01)
