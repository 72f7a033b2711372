"""Every target is encoded once, when a batch first needs it; every picture is looked at before the first step."""

import os
import pickle
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from standin import LATEST, SAMPLE, read_run, refusal

import support.listing
import train
from data import DrawnImages, PairedImages
from stable_diffusion import StableDiffusion
from support.batches import Batch, EncodedPairs, look_at
from support.errors import UserError


@pytest.fixture
def sd(nano, monkeypatch):
    """The nano base; `sd.encoded` counts the pictures that its VAE has encoded."""
    sd = StableDiffusion.load(nano)
    encode, sd.encoded = sd.vae.encode, 0

    def counted(images):
        sd.encoded += len(images)
        return encode(images)

    monkeypatch.setattr(sd.vae, "encode", counted)
    return sd


def moments(sd, pairs, path, encoder="encoder", vanish=False):
    """The moments of all pairs, and how many of them had to be encoded."""
    sd.encoded, indices = 0, list(range(len(pairs)))
    encoded = EncodedPairs(pairs, [pairs.content(i) for i in indices], path, encoder, 4)
    batch = Batch(0, indices, [], [], torch.zeros(()), encoded[indices][2])
    if vanish:  # after the process that loads pictures has seen them
        path.write_bytes(b"")
    return encoded.moments(batch, sd.vae.encode), sd.encoded


@torch.no_grad()
def test_what_is_kept(sd, tmp_path):
    """Half precision, from the first use on; each picture alone; and no picture is sent that is not needed."""
    pairs = DrawnImages(5, 64)
    first, encoded = moments(sd, pairs, tmp_path / "moments")
    again, encoded_again = moments(sd, pairs, tmp_path / "moments")
    assert (encoded, encoded_again) == (5, 0) and torch.equal(first, again)
    assert first.stride() == again.stride()  # which decides the order of sums
    for i in range(5):
        assert torch.equal(first[i], sd.vae.encode(pairs.image(i)[None])[0].half().float())
    known = EncodedPairs(pairs, [pairs.content(i) for i in range(5)], tmp_path / "moments", "encoder", 4)
    indices, hints, images = known[[3, 1]]
    assert indices == [3, 1] and images == [None, None]
    assert torch.equal(hints[0].float() / 255, pairs.hint(3))  # bytes lose nothing
    assert len(pickle.dumps(known)) < 5000  # the file is opened where it is needed, not sent along


def test_only_what_changed_is_encoded_again(sd, tmp_path):
    data, path = shutil.copytree(SAMPLE, tmp_path / "data"), tmp_path / "moments"

    def encoded(encoder="encoder", resolution=64):
        return moments(sd, PairedImages(data, resolution), path, encoder)[1]

    assert [encoded(), encoded()] == [4, 0]
    listing = data / "prompt.json"
    listing.write_text(listing.read_text().replace("coral circle", "red circle"))
    assert encoded() == 0  # a caption
    shutil.copy(data / "target" / "1.png", data / "target" / "0.png")
    assert [encoded(), encoded()] == [1, 0]
    shutil.move(data, tmp_path / "elsewhere")
    data = tmp_path / "elsewhere"
    assert encoded() == 0
    assert [encoded("another VAE"), encoded("another VAE")] == [4, 0]
    assert [encoded("another VAE", 128), encoded("another VAE", 128)] == [4, 0]


def test_whatever_a_crash_leaves_is_encoded_again(sd, tmp_path):
    """Cut off anywhere, with holes, with bits or whole rows of something else: never taken for a target's moments."""
    pairs, path, rng = DrawnImages(6, 64), tmp_path / "moments", random.Random(0)
    whole, _ = moments(sd, pairs, path)
    good = path.read_bytes()
    size = len(good) // 6
    swapped = good[size : 2 * size] + good[:size] + good[2 * size :]
    spoiled = [b"", swapped, *(good[: rng.randrange(len(good))] for _ in range(3))]
    for _ in range(6):
        content = bytearray(good)
        first = rng.randrange(len(good))
        last = min(first + rng.choice([1, 100, 5000]), len(good))
        content[first:last] = bytes(last - first) if rng.random() < 0.5 else rng.randbytes(last - first)
        spoiled.append(bytes(content))
    for content in spoiled:
        path.write_bytes(content)
        assert torch.equal(moments(sd, pairs, path)[0], whole) and path.read_bytes() == good
    rows, encoded = moments(sd, pairs, path, vanish=True)
    assert torch.equal(rows, whole) and encoded == 6


def test_encoding_follows_the_precision(trained, tmp_path, monkeypatch):
    """bf16 for VAE and text encoder, float32 beside fp16; and what was encoded in one is not taken for the other."""
    seen, open_inputs = [], train.open_inputs

    def spy(run, sd, *pairs):
        for network in (sd.vae.encoder.conv_in, sd.text_encoder.layers[0].mlp_in):
            network.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        return open_inputs(run, sd, *pairs)

    monkeypatch.setattr(train, "open_inputs", spy)
    monkeypatch.setattr(train, "HeldOut", lambda *_: SimpleNamespace(prompts=[""]))  # which encodes in float32 always
    first = trained("--max-train-steps", "3", "--mixed-precision", "bf16")
    assert seen == [torch.bfloat16] * 7  # four pictures, three batches of prompts
    shutil.copytree(first / "cache", tmp_path / "second" / "cache")
    trained("--max-train-steps", "3", "--mixed-precision", "fp16", folder=tmp_path / "second")
    assert seen[7:] == [torch.float32] * 7


def test_a_corrected_picture_costs_that_one(trained, tmp_path, monkeypatch):
    """The first one that can't be used ends no encoding, and neither are the others looked at again."""
    data, opened, content = shutil.copytree(SAMPLE, tmp_path / "data"), [], PairedImages.content
    good = (data / "target" / "2.png").read_bytes()
    (data / "target" / "2.png").write_bytes(good[:-100])
    monkeypatch.setattr(PairedImages, "content", lambda self, i: opened.append(i) or content(self, i))
    assert "2.png is damaged or no picture" in (told := refusal(trained, "--data", data)) and "line 3: " in told
    assert sorted(opened) == [0, 1, 2, 3]
    (data / "target" / "2.png").write_bytes(good)
    trained("--data", data, "--max-train-steps", "2")
    folder = trained("--data", data, "--max-train-steps", "3", *LATEST)
    assert sorted(opened) == [0, 1, 2, 2, 3] and len(read_run(folder)) == 3


def test_what_is_seen_before_the_first_step(tmp_path, monkeypatch):
    """Pictures that are cut off, and a PNG with one bit flipped; PNGs and JPEGs that look whole are not decoded."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    image, thumbnail = Image.fromarray(pixels), Image.Exif()
    thumbnail[0x010E] = "\xff\xd8\xff\xda\xff\xd9"  # a text with the marks of a whole JPEG, as a thumbnail has them
    image.save(tmp_path / "good.png")
    image.save(tmp_path / "good.jpg", exif=thumbnail)
    image.save(tmp_path / "good.webp")
    for name in ("cut.png", "cut.jpg", "cut.webp", "cut-progressive.jpg"):
        image.save(tmp_path / name, progressive="progressive" in name, exif=thumbnail)
        os.truncate(tmp_path / name, (tmp_path / name).stat().st_size // 2)
    flipped = bytearray((tmp_path / "good.png").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (tmp_path / "flipped.png").write_bytes(flipped)
    names = sorted(path.name for path in tmp_path.iterdir())
    lines = [f'{{"source": "{name}", "target": "good.png", "prompt": ""}}' for name in names]
    (tmp_path / "prompt.json").write_text("\n".join(lines))
    decoded, open_pair = [], support.listing.open_pair
    monkeypatch.setattr(support.listing, "open_pair", lambda pair: decoded.append(pair.hint.name) or open_pair(pair))
    with pytest.raises(UserError, match="5 of 8 entries are broken") as raised:
        look_at([(PairedImages(tmp_path, 64), i) for i in range(8)], record=tmp_path / "record" / "pictures.json")
    assert all(any(name in line for line in raised.value.args[1:]) for name in names if "good" not in name)
    assert set(names) - set(decoded) == {"good.png", "good.jpg"}
