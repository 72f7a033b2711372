import json
import pickle
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from standin import ROOT

from data import COLOURS, DrawnImages, PairedImages, Selected, cache_latents, draw_fill50k, fetch_fill50k
from files import UserError, fit_image

SAMPLE = ROOT / "tests" / "fill50k"  # four real pairs


def test_colours():
    assert len(COLOURS) == 139
    assert len({tuple(colour) for colour in COLOURS.values()}) == 139
    assert tuple(COLOURS["pale golden rod"]) == (238, 232, 170)


def test_drawing_is_reproducible_and_like_the_real_set():
    for index in range(40):
        hint, target, prompt = draw_fill50k(index, 512, seed=3)
        again = draw_fill50k(index, 512, seed=3)
        assert (hint.tobytes(), target.tobytes(), prompt) == (again[0].tobytes(), again[1].tobytes(), again[2])
        assert hint.size == target.size == (512, 512)
        assert hint.mode == target.mode == "RGB"
        ring = np.asarray(hint)[..., 0]
        assert set(np.unique(ring)) == {0, 255}
        disc, background = (text.removesuffix(" background") for text in prompt.split(" circle with "))
        colours = np.asarray(target).reshape(-1, 3).astype(np.float32)
        inside = (colours == COLOURS[disc]).all(axis=1)
        outside = (colours == COLOURS[background]).all(axis=1)
        assert (inside | outside).mean() > 0.98  # all but the smooth edge
        ys, xs = np.nonzero(inside.reshape(512, 512))
        if xs.min() > 0 and xs.max() < 511:  # not clipped: the ring runs along the disc's rim
            radius = (xs.max() - xs.min() + 1) / 2
            assert 512 / 8 - 2 <= radius <= 512 / 2
            ring_xs = np.nonzero(ring.any(axis=0))[0]
            assert abs(ring_xs.min() - xs.min()) <= 4 and abs(ring_xs.max() - xs.max()) <= 4
    assert draw_fill50k(0, 64, seed=3)[2] == draw_fill50k(0, 512, seed=3)[2]  # the same scene at any size
    assert draw_fill50k(0)[2] != draw_fill50k(1)[2]


def test_reading_the_real_layout():
    pairs = PairedImages(SAMPLE, 128)
    assert len(pairs) == 4
    assert pairs.prompts[3] == "dark turquoise circle with medium spring green background"
    pair = pairs[0]
    assert pair["prompt"] == "coral circle with blue background"
    assert pair["hint"].shape == pair["image"].shape == (3, 128, 128)
    assert pair["hint"].min() == 0
    assert 0.9 < pair["hint"].max() <= 1  # the ring, 5 px wide at 512, is hardly more than one here
    # Top left is background, the middle of the disc is not. The targets went through a VAE: not quite pure colours.
    blue, coral = (torch.from_numpy(COLOURS[name]) / 127.5 - 1 for name in ("blue", "coral"))
    assert (pair["image"][:, 2, 2] - blue).abs().max() < 0.1
    assert (pair["image"][:, 50, 92] - coral).abs().max() < 0.1


def test_drawn_and_selected_pairs():
    pairs = DrawnImages(5, 64, seed=1)
    hint, target, prompt = draw_fill50k(3, 64, seed=1)
    pair = Selected(pairs, range(2, 5))[1]
    assert pair["prompt"] == prompt
    assert torch.equal(pair["hint"], fit_image(hint, 64))
    assert torch.equal(pair["image"], fit_image(target, 64) * 2 - 1)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "I;16"])
def test_any_picture_is_read(mode):
    grey = np.tile(np.linspace(0, 255, 96).astype(np.uint8), (80, 1))
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode, palette=Image.Palette.ADAPTIVE)
    tensor = fit_image(image, 64)
    assert tensor.shape == (3, 64, 64)
    expected = fit_image(Image.fromarray(grey), 64)
    assert (tensor - expected).abs().max() <= 0.01


def test_transparent_is_background():
    image = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    image.paste((255, 255, 255, 255), (0, 0, 32, 64))
    tensor = fit_image(image, 64)
    assert tensor[:, :, :32].min() == 1
    assert tensor[:, :, 32:].max() == 0


def test_sizes():
    wide = Image.new("RGB", (300, 100))
    assert fit_image(wide, 64).shape == (3, 64, 64)
    assert fit_image(wide, 64, square=False).shape == (3, 64, 192)
    assert fit_image(wide.transpose(Image.Transpose.ROTATE_90), 64, square=False).shape == (3, 192, 64)
    checks = Image.fromarray((np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8))
    grey = fit_image(checks, 128)  # antialiased: a fine chequer becomes grey
    assert grey.std() < 0.02 and abs(grey.mean() - 0.5) < 0.02


def test_hugging_face_layout(tmp_path):
    """metadata.jsonl, with either name of the hint's column; the same pairs as from prompt.json."""
    shutil.copytree(SAMPLE, tmp_path / "hf")
    (tmp_path / "hf" / "prompt.json").unlink()
    entries = [json.loads(line) for line in (SAMPLE / "prompt.json").read_text().splitlines()]
    for hint_key, target_key in (("conditioning_image", "file_name"), ("conditioning_image_file_name", "image")):
        lines = [{target_key: e["target"], hint_key: e["source"], "text": e["prompt"]} for e in entries]
        (tmp_path / "hf" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        ours, theirs = PairedImages(tmp_path / "hf", 64), PairedImages(SAMPLE, 64)
        assert ours.prompts == theirs.prompts
        assert all(torch.equal(ours.hint(i), theirs.hint(i)) for i in range(4))
        assert all(torch.equal(ours.image(i), theirs.image(i)) for i in range(4))
        assert ours.name(2) == str(tmp_path / "hf" / entries[2]["target"])


def test_pairs_of_odd_files(tmp_path):
    """A byte order mark, Windows line ends, blank lines; pictures of other sizes, turned by EXIF, but of one shape."""
    Image.new("RGB", (128, 64)).save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = Image.new("RGB", (64, 128))
    turned.paste((255, 255, 255), (0, 0, 64, 64))
    turned.save(tmp_path / "b.jpg", exif=exif)
    line = json.dumps({"source": "a.png", "target": "b.jpg", "prompt": ""}).encode()
    (tmp_path / "prompt.json").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line + b"\r\n")
    pairs = PairedImages(tmp_path, 64)
    assert pairs.prompts == ["", ""]
    assert pairs.image(0)[:, :, 40:].mean() > 0.9  # the upper half is the right one now
    assert pairs.image(0)[:, :, :24].mean() < -0.9


@pytest.mark.parametrize("inside", ["fill50k/", ""])
def test_fill50k_is_fetched_and_unpacked(inside, tmp_path, monkeypatch):
    archive = tmp_path / "fill50k.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(SAMPLE.rglob("*.*")):
            file.write(path, f"{inside}{path.relative_to(SAMPLE)}")
    asked = []
    monkeypatch.setattr("data.fetch", lambda repo, file, advice: asked.append((repo, file)) or archive)
    folder = fetch_fill50k(tmp_path / "fill50k")
    assert asked == [("lllyasviel/ControlNet", "training/fill50k.zip")]
    assert PairedImages(folder, 64).prompts == PairedImages(SAMPLE, 64).prompts
    fetch_fill50k(tmp_path / "fill50k")
    assert len(asked) == 1  # it is there already


@pytest.mark.parametrize("name", ["../escaped.txt", "/tmp/escaped.txt"])
def test_zip_entries_stay_inside(name, tmp_path, monkeypatch):
    archive = tmp_path / "evil.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("prompt.json", "")
        file.writestr(name, "boo")
    monkeypatch.setattr("data.fetch", lambda *_: archive)
    with pytest.raises(UserError, match="outside the folder"):
        fetch_fill50k(tmp_path / "fill50k")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.zip"]


def test_damaged_zip(tmp_path, monkeypatch):
    archive = tmp_path / "bad.zip"
    archive.write_bytes(b"PK" + bytes(100))
    monkeypatch.setattr("data.fetch", lambda *_: archive)
    with pytest.raises(UserError, match="damaged"):
        fetch_fill50k(tmp_path / "fill50k")


def test_command_line_writes_the_real_layout(tmp_path):
    folder = tmp_path / "drawn"
    command = [sys.executable, ROOT / "data.py", "--count", "3", "--size", "64", "--output", folder]
    subprocess.run(command, check=True, capture_output=True)
    pairs, drawn = PairedImages(folder, 64), DrawnImages(3, 64)
    for i in range(3):
        assert pairs.prompts[i] == drawn.prompts[i]
        assert torch.equal(pairs.hint(i), drawn.hint(i))
        assert torch.equal(pairs.image(i), drawn.image(i))
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ") and again.stderr.count("\n") == 1


def test_pairs_travel_to_other_processes(tmp_path):
    """The encoded rows are mapped where they are needed, not sent along."""
    cached = cache_latents(Encoders(), DrawnImages(200, 64), tmp_path / "cache", {})
    assert (tmp_path / "cache" / "contexts.npy").stat().st_size > 50_000
    assert len(pickle.dumps(cached)) < 50_000


class Encoders:
    """Counts calls, and encodes in a way that can be checked."""

    device = torch.device("cpu")
    calls = 0

    @property
    def vae(self):
        return self

    def encode(self, images):
        Encoders.calls += 1
        return images.mean(dim=(1, 2, 3))[:, None, None, None].expand(-1, 8, 2, 2)

    def encode_prompts(self, prompts):
        return torch.tensor([float(len(prompt)) for prompt in prompts])[:, None, None].expand(-1, 77, 4)


def test_cache_encodes_once(tmp_path):
    pairs, calls = DrawnImages(5, 64), Encoders.calls
    key = {"base": "tiny", "seed": 0}
    cached = cache_latents(Encoders(), pairs, tmp_path / "cache", key, batch_size=2)
    assert Encoders.calls == calls + 3
    for i in range(5):
        row = cached[i]
        assert torch.equal(row["hint"], pairs.hint(i))
        assert row["moments"].shape == (8, 2, 2)
        assert row["moments"][0, 0, 0].item() == pytest.approx(pairs.image(i).mean().item(), abs=1e-3)  # half precision
        assert row["context"][0, 0].item() == len(pairs.prompts[i])
    assert cached.empty_context.unique().tolist() == [0]
    cache_latents(Encoders(), pairs, tmp_path / "cache", key)
    assert Encoders.calls == calls + 3
    cache_latents(Encoders(), pairs, tmp_path / "cache", key | {"seed": 1}, batch_size=5)
    assert Encoders.calls == calls + 4
    (tmp_path / "cache" / "key.json").write_text("{")
    cache_latents(Encoders(), pairs, tmp_path / "cache", key, batch_size=5)
    assert Encoders.calls == calls + 5
