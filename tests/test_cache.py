"""Targets and prompts are encoded once, and again when what they depend on has changed."""

import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from standin import SAMPLE, HostilePickle

from data import DrawnImages, PairedImages
from stable_diffusion import StableDiffusion
from support import cache
from support.cache import CachedPairs, cache_latents, fingerprints
from support.files import ENDS, fingerprint


@pytest.fixture
def sd(monkeypatch):
    """The miniature; `sd.encoded` lists the sizes of the batches that it has encoded."""
    sd = StableDiffusion.load("tiny")
    encode, sd.encoded = sd.vae.encode, []
    monkeypatch.setattr(sd.vae, "encode", lambda images: sd.encoded.append(len(images)) or encode(images))
    return sd


def encode(sd, pairs, folder, batch_size=4):
    cache_latents(sd, pairs, [], folder, fingerprints(sd, pairs, []), batch_size=batch_size)
    return CachedPairs(pairs, folder)


@torch.no_grad()
def test_what_is_kept(sd, tmp_path):
    pairs = DrawnImages(5, 64)
    cached = encode(sd, pairs, tmp_path / "cache", batch_size=2)
    assert sd.encoded == [2, 2, 1]
    for i in range(5):
        index, hint, moments, context = cached[i]
        assert index == i and torch.equal(hint.float() / 255, pairs.hint(i))  # bytes lose nothing
        expected = sd.vae.encode(pairs.image(i)[None])[0]
        assert (moments - expected).abs().max() <= 1e-3 * expected.abs().max()  # half precision: 2^-11
        assert (context - sd.encode_prompts([pairs.prompts[i]])[0]).abs().max() <= 1e-3 * context.abs().max()
    assert torch.equal(cached.empty_context, sd.encode_prompts([""])[0].half().float())


def test_a_stopped_encoding_goes_on(sd, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "FLUSH_EVERY", 2)
    pairs, folder, read = DrawnImages(7, 64), tmp_path / "cache", DrawnImages.image

    def power_cut_at_5(self, index):
        if index == 5:
            raise KeyboardInterrupt
        return read(self, index)

    whole = encode(sd, pairs, tmp_path / "whole", batch_size=1)
    sd.encoded.clear()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(DrawnImages, "image", power_cut_at_5)
        encode(sd, pairs, folder, batch_size=1)
    assert len(sd.encoded) == 5
    resumed = encode(sd, pairs, folder, batch_size=1)
    assert len(sd.encoded) == 5 + 3  # four were on the disk for certain
    for ours, theirs in zip(resumed, whole, strict=True):
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(ours, theirs, strict=True))


def test_a_broken_cache_is_encoded_again(sd, tmp_path):
    pairs, folder = DrawnImages(3, 64), tmp_path / "cache"
    encode(sd, pairs, folder)
    good = {name: (folder / name).read_bytes() for name in ("key.json", "moments.npy", "contexts.npy")}
    np.save(tmp_path / "other.npy", np.zeros((3, 8, 7, 7), np.float16))
    np.save(tmp_path / "objects.npy", np.array([HostilePickle(tmp_path / "trap")] * 3), allow_pickle=True)
    other, objects = (tmp_path / "other.npy").read_bytes(), (tmp_path / "objects.npy").read_bytes()
    for name, content in (
        ("key.json", b"[]"), ("key.json", b'{"images": 3}'), ("moments.npy", None), ("moments.npy", b""),
        ("moments.npy", good["moments.npy"][:-1]), ("contexts.npy", b"garbage"), ("contexts.npy", None),
        ("moments.npy", other), ("moments.npy", objects),
    ):  # fmt: skip
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        sd.encoded.clear()
        encode(sd, pairs, folder)
        assert {name: (folder / name).read_bytes() for name in good} == good
        assert sd.encoded == [3]
    assert not (tmp_path / "trap").exists()


def test_encoded_once_unless_something_changed(sd, tmp_path):
    shutil.copytree(SAMPLE, tmp_path / "data")

    def times_encoded(resolution=64) -> int:
        sd.encoded.clear()
        encode(sd, PairedImages(tmp_path / "data", resolution), tmp_path / "cache", batch_size=4)
        return len(sd.encoded)

    assert [times_encoded(), times_encoded()] == [1, 0]
    shutil.copytree(tmp_path / "data", tmp_path / "copy")  # other times, the same content: as on another machine
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "copy").rename(tmp_path / "data")
    assert times_encoded() == 0
    (tmp_path / "cache" / "key.json").write_text("{")
    assert [times_encoded(), times_encoded()] == [1, 0]
    shutil.copy(tmp_path / "data" / "target" / "1.png", tmp_path / "data" / "target" / "0.png")
    assert [times_encoded(), times_encoded()] == [1, 0]
    shutil.copy(tmp_path / "data" / "source" / "1.png", tmp_path / "data" / "source" / "0.png")
    assert [times_encoded(), times_encoded()] == [1, 0]  # the new hint's shape has to be checked
    listing = tmp_path / "data" / "prompt.json"
    listing.write_text(listing.read_text().replace("coral circle", "red circle"))
    assert [times_encoded(), times_encoded()] == [1, 0]
    assert [times_encoded(resolution=128), times_encoded(resolution=128)] == [1, 0]
    with torch.no_grad():
        sd.text_encoder.norm_out.bias.add_(1e-3)
    assert [times_encoded(resolution=128), times_encoded(resolution=128)] == [1, 0]


def test_pairs_travel_to_other_processes(sd, tmp_path):
    """The encoded rows are mapped where they are needed, not sent along."""
    cached = encode(sd, DrawnImages(64, 64), tmp_path / "cache", batch_size=32)
    assert (tmp_path / "cache" / "contexts.npy").stat().st_size > 200_000
    assert len(pickle.dumps(cached)) < 50_000


@pytest.mark.parametrize("name", ["a.bmp", "a.png", "a.jpg"])
def test_a_fingerprint_sees_a_changed_picture(name, tmp_path):
    """Large files of one size: a pixel in the middle, or, of the JPEG, how it is to be turned."""
    pixels = np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8)
    seen = set()
    for change in (0, 1):
        exif = Image.Exif()
        exif[0x0112] = 1 + 2 * change
        pixels[128, 128] = 7 + change
        Image.fromarray(pixels).save(tmp_path / name, exif=exif, compress_level=0, quality=100, subsampling=0)
        seen.add(fingerprint(tmp_path / name))
    assert (tmp_path / name).stat().st_size > 2 * ENDS
    assert len(seen) == 2
