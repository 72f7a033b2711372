import json
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from standin import ROOT, SAMPLE

from data import DRAWN_HELD_OUT, DRAWN_PAIRS, DrawnImages, PairedImages, draw_fill50k, open_pairs
from metrics import is_circle_task, prompt_colours
from support.colours import COLOURS
from support.errors import UserError
from support.hub import fetch_folder
from support.listing import write_folder
from support.pictures import fit_image


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
    assert pairs.prompts[0] == "coral circle with blue background"
    hint, image = pairs.hint(0), pairs.image(0)
    assert hint.shape == image.shape == (3, 128, 128)
    assert hint.min() == 0
    assert 0.9 < hint.max() <= 1  # the ring, 5 px wide at 512, is hardly more than one here
    # Top left is background, the middle of the disc is not. The targets went through a VAE: not quite pure colours.
    blue, coral = (torch.from_numpy(COLOURS[name]) / 127.5 - 1 for name in ("blue", "coral"))
    assert (image[:, 2, 2] - blue).abs().max() < 0.1
    assert (image[:, 50, 92] - coral).abs().max() < 0.1


def test_drawn_pairs():
    hint, target, prompt = draw_fill50k(3, 64, seed=1)
    pairs = DrawnImages(5, 64, seed=1)
    assert pairs.prompts[3] == prompt
    assert torch.equal(pairs.hint(3), fit_image(hint, 64))
    assert torch.equal(pairs.image(3), fit_image(target, 64) * 2 - 1)


def test_palettes_show_the_two_colours_of_the_same_pictures():
    rings, palettes = DrawnImages(5, 64, seed=1), open_pairs("drawn-palette", 64, seed=1, held_out=1)[0]
    assert palettes.prompts[:5] == rings.prompts
    for i in range(5):
        assert torch.equal(palettes.image(i), rings.image(i))
        hint, colours = palettes.hint(i), prompt_colours(palettes.prompts[i])
        for stripe, columns in enumerate(hint.split(4, dim=2)):  # sixteen, the shape's colour first
            assert torch.equal(columns, colours[stripe % 2, :, None, None].expand(3, 64, 4).float())
        assert palettes.content(i) != rings.content(i)
    assert not is_circle_task(palettes.hint(0)[None], palettes.prompts[:1])


def test_held_out_pairs_are_not_trained_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(DRAWN_PAIRS, "drawn", 5)
    training, held_out = open_pairs("drawn", 64, seed=0, held_out=3)
    assert (len(training), len(held_out)) == (5, 3)
    assert held_out.prompts == DrawnImages(3, 64, DRAWN_HELD_OUT).prompts

    entries = (SAMPLE / "prompt.json").read_text().splitlines() * 10
    shutil.copytree(SAMPLE, tmp_path / "data")
    (tmp_path / "data" / "prompt.json").write_text("\n".join(entries))
    training, held_out = open_pairs(tmp_path / "data", 64, seed=0, held_out=8)
    assert (len(training), len(held_out)) == (36, 4)  # a tenth at most
    assert training.name(35).endswith("line 36") and held_out.name(0).endswith("line 37")
    assert torch.equal(held_out.hint(1), training.hint(1))  # the listing repeats after four lines

    training, held_out = open_pairs(SAMPLE, 64, seed=0, held_out=3)
    assert (len(training), len(held_out)) == (4, 3)
    assert "none is held out" in capsys.readouterr().out


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
        assert ours.name(2) == f"{tmp_path / 'hf' / 'metadata.jsonl'} line 3"


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
    monkeypatch.setattr("support.hub.fetch", lambda repo, file, advice: asked.append((repo, file)) or archive)
    monkeypatch.chdir(tmp_path)
    training, _ = open_pairs("fill50k", 64, seed=0, held_out=1)
    assert asked == [("lllyasviel/ControlNet", "training/fill50k.zip")]
    assert training.prompts == PairedImages(SAMPLE, 64).prompts
    open_pairs("fill50k", 64, seed=0, held_out=1)
    assert len(asked) == 1  # it is there already


@pytest.mark.parametrize("name", ["../escaped.txt", "/tmp/escaped.txt"])
def test_zip_entries_stay_inside(name, tmp_path, monkeypatch):
    archive = tmp_path / "evil.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("prompt.json", "")
        file.writestr(name, "boo")
    monkeypatch.setattr("support.hub.fetch", lambda *_: archive)
    with pytest.raises(UserError, match="outside the folder"):
        fetch_folder("a/b", "c.zip", tmp_path / "fill50k", "prompt.json", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.zip"]


def test_damaged_zip(tmp_path, monkeypatch):
    archive = tmp_path / "bad.zip"
    archive.write_bytes(b"PK" + bytes(100))
    monkeypatch.setattr("support.hub.fetch", lambda *_: archive)
    with pytest.raises(UserError, match="damaged"):
        fetch_folder("a/b", "c.zip", tmp_path / "fill50k", "prompt.json", "")


def test_command_line_writes_the_real_layout(tmp_path):
    folder = tmp_path / "drawn"
    command = [sys.executable, "-m", "tools.draw_pairs", "--count", "3", "--size", "64", "--output", folder]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    pairs, drawn = PairedImages(folder, 64), DrawnImages(3, 64)
    for i in range(3):
        assert pairs.prompts[i] == drawn.prompts[i]
        assert torch.equal(pairs.hint(i), drawn.hint(i))
        assert torch.equal(pairs.image(i), drawn.image(i))
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ") and again.stderr.count("\n") == 1


def test_a_folder_of_pairs_is_whole_or_not_there(tmp_path):
    """What somebody else has in it stays; what was stopped halfway trains nobody."""
    (tmp_path / "own" / "source").mkdir(parents=True)
    (tmp_path / "own" / "source" / "0.png").write_text("mine")
    with pytest.raises(UserError, match="can't write .*own .*not empty.*choose another --output"):
        write_folder(tmp_path / "own", [draw_fill50k(0, 64)])
    assert [path.name for path in (tmp_path / "own").rglob("*.*")] == ["0.png"]
    assert (tmp_path / "own" / "source" / "0.png").read_text() == "mine"

    def stopped():
        yield draw_fill50k(0, 64)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "new", stopped())
    assert [path.name for path in tmp_path.iterdir()] == ["own"]
