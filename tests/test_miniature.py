"""The Stable Diffusion that ships here, and what made it."""

from statistics import mean

import pytest
import torch
from standin import ROOT

from clip_text import Tokenizer
from data import DRAWN_HELD_OUT, MIN_COLOUR_DISTANCE, DrawnImages
from metrics import circle_distance, prompt_colours
from sample import generate
from stable_diffusion import TINY, TINY_FILE
from support.files import read_tensors
from tools import fit, pretrain
from tools.dusk import DUSK, at_dusk, iou_in_light
from tools.pretrain_round import slightly_wrong
from tools.shapes import fit_shape, judge, outline_error
from weights import load_controlnet

APART = MIN_COLOUR_DISTANCE / 255 / 3  # mean absolute difference, at least, of a scene's two colours


@torch.no_grad()
def test_it_is_small_and_official(tiny):
    assert sum(path.stat().st_size for path in TINY_FILE.parent.iterdir()) <= 16e6
    tensors, metadata = read_tensors(TINY_FILE)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert "model.diffusion_model.input_blocks.0.0.weight" in tensors and "config" in metadata
    assert (tiny.unet.config, tiny.vae.config, tiny.text_encoder.config) == (TINY.unet, TINY.vae, TINY.text)
    assert tiny.latent_scale == TINY.latent_scale
    images, _ = fit.draw_batch(fit.UNSEEN, range(8), 128)
    assert pretrain.reconstruct(tiny.vae, images)[1] >= 32  # dB: an error of 2.5 % of the range, hard to see
    noisy, _ = pretrain.reconstruct(tiny.vae, images, 0.2 / tiny.latent_scale)
    assert (noisy - images).abs().mean() <= 0.02 and mean(map(outline_error, noisy)) <= 0.25  # px: the VAE forgives


def test_the_base_paints_what_the_prompt_says(tiny):
    """Eight unseen captions: colours nearer to what was asked than to the scene's other, shapes right; judged so."""
    _, captions = fit.draw_batch(fit.UNSEEN, range(8), 8)
    images = generate(tiny, [], [], captions, size=(128, 128), steps=10, guidance_scale=TINY.guidance_scale)
    judged = torch.tensor([judge(image, caption) for image, caption in zip(images, captions)])
    assert judged[:, :2].mean() <= APART / 2 and judged[:, 2].sum() >= 7 and mean(map(outline_error, images)) <= 0.4
    others = torch.tensor([judge(image, caption) for image, caption in zip(images, captions[1:] + captions[:1])])
    assert others[:, :2].mean() > APART


def test_the_palette_brings_the_colours(tiny):
    """Without a prompt: pixels are three times nearer to one of the hint's colours than the base alone paints them."""
    pairs = DrawnImages(4, 128, DRAWN_HELD_OUT, palette=True)
    hints = torch.stack([pairs.hint(i) for i in range(4)])
    colours = torch.stack([prompt_colours(prompt) for prompt in pairs.prompts])[..., None, None]  # [4, 2, 3, 1, 1]
    controlnet = load_controlnet(ROOT / "models" / "palette" / "controlnet.safetensors", tiny.unet)

    def distance(*control):
        settings = {"steps": 5, "guidance_scale": 4.0, "control_mode": "conditional", "size": (128, 128)}
        images = generate(tiny, *control, [""] * 4, **settings)[:, None] / 2 + 0.5
        return (images - colours).abs().mean(dim=2).amin(dim=1).mean()

    assert 3 * distance([controlnet], [hints]) < distance([], [])


def test_slightly_wrong_scenes_show_the_same():
    """A dented scene has a ragged outline, and still its caption's shape and colours, about where they were."""
    images, captions = fit.draw_batch(fit.UNSEEN, range(8), 128)
    generator = torch.Generator().manual_seed(0)
    dented = slightly_wrong(images, captions, generator=generator, **pretrain.SLIGHTLY["dented"])
    (names, places, smooth), (_, moved, ragged) = (zip(*map(fit_shape, pictures)) for pictures in (images, dented))
    assert all(f" {name} with " in caption for name, caption in zip(names, captions))
    assert max(smooth) < 0.05 and sum(ragged) / 8 > 0.2
    assert max(abs(a - b).max() for a, b in zip(places, moved)) < 2
    assert max(max(judge(picture, caption)[:2]) for picture, caption in zip(dented, captions)) < 0.05


def test_learning_merges(tmp_path):
    """The shipped merges are what the stage makes."""
    pretrain.learn_merges(tmp_path)
    assert (tmp_path / "merges.txt").read_bytes() == (TINY_FILE.parent / "merges.txt").read_bytes()
    assert len(Tokenizer.from_merges(tmp_path / "merges.txt").ids) == TINY.text.vocab_size


def test_stages_resume(tmp_path, monkeypatch):
    """The loop that the stages share: stopped after 2 of 4 steps and run again, it ends with the same weights."""
    monkeypatch.setattr(fit, "CHECKPOINT_EVERY", 2)

    def train(name, last=4):
        (tmp_path / name).mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 2, 3).to(memory_format=torch.channels_last)

        def loss_fn(step, generator):
            if step >= last:
                raise KeyboardInterrupt
            return model(torch.rand(1, 3, 8, 8, generator=generator)).square().mean(), {}

        plan = fit.Plan(4, 1, 1e-3)
        return fit.fit("toy", tmp_path / name, model, loss_fn, lambda *_: None, plan).weight

    with pytest.raises(KeyboardInterrupt):
        train("parts", last=3)
    assert torch.equal(train("parts"), train("whole"))  # which also says that none is NaN


def test_dusk():
    """The second base's light, and that a picture in it is scored like one without."""
    pairs = DrawnImages(4, 128, DRAWN_HELD_OUT)
    hints, images = (torch.stack([part(i) for i in range(4)]) for part in (pairs.hint, pairs.image))
    lit = at_dusk(images, pairs.prompts)
    own, other = (iou_in_light(lit, shown, pairs.prompts, DUSK) for shown in (hints, hints.roll(1, 0)))
    assert (own > 0.97).all() and (other < 0.7).all()
    depth = ((torch.arange(128) + 0.5) / 128)[:, None].expand(128, 128)
    inside = circle_distance(hints[0]) < -3
    expected = (images[0] + 1) * (1 - DUSK * depth)  # of colours that are rounded to 1/255, half a step of 2/255 apart
    torch.testing.assert_close((lit[0] + 1)[:, inside], expected[:, inside], rtol=0, atol=2 / 255)
