"""Users' mistakes: each ends in one line on stderr that says what, where and what to do, with exit status 2."""

import errno
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from importlib import import_module

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image, features
from safetensors.torch import save_file
from standin import ROOT, SAMPLE, HostilePickle

from controlnet import ControlNet
from data import PairedImages
from stable_diffusion import TINY, TINY_FILE, StableDiffusion
from support.errors import UserError, run_command_line
from support.files import read_json, read_tensors
from support.pictures import fit_image, open_image
from unet import UNet
from weights import load_controlnet, official_state_dict, save_controlnet

HINT = SAMPLE / "source" / "0.png"
TRAP = ROOT / "tests" / "trap"  # made if a pickle is opened
SHIPPED = ROOT / "models" / "fill50k" / "controlnet.safetensors"
CONTROL = "--controlnet {}/control.safetensors"
LONG = "a" * 300
PAIRS = "tools.pictures_to_pairs"  # data.py's command line
GOOD = {"source": "a.png", "target": "a.png", "prompt": ""}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with one file for each thing that can be wrong with one."""
    folder = tmp_path_factory.mktemp("mistakes")
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    Image.new("RGB", (128, 64)).save(folder / "wide.png")
    (folder / "text.png").write_text("no picture")
    (folder / "cut.png").write_bytes(HINT.read_bytes()[:500])
    listings = {
        "json": '{"source": "a.png", "target',
        "keys": json.dumps({"source": "a.png", "prompt": ""}),
        "null": json.dumps(GOOD | {"prompt": None}),
        "list": "[1, 2]",
        "missing": json.dumps(GOOD | {"source": "b.png"}),
        "outside": json.dumps(GOOD | {"source": "../a.png"}),
        "text": json.dumps(GOOD | {"target": "text.png"}),
        "cut": json.dumps(GOOD | {"target": "cut.png"}),
        "shape": json.dumps(GOOD | {"target": "wide.png"}),
        "bytes": b"\xff\xfe{}",
        "deep": "[" * 100_000,
        "empty": "",
    }
    for name, line in listings.items():
        (folder / name).mkdir()
        for picture in ("a.png", "wide.png", "text.png", "cut.png"):
            shutil.copy(folder / picture, folder / name)
        line = line if isinstance(line, bytes) else line.encode()
        (folder / name / "prompt.json").write_bytes(line + b"\n")
    (folder / "hf").mkdir()
    shutil.copy(folder / "a.png", folder / "hf")
    (folder / "hf" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": ""}\n')
    (folder / "run").mkdir()
    (folder / "run" / "log.jsonl").write_text("")
    (folder / "a_file").write_text("")

    tiny, metadata = read_tensors(TINY_FILE)
    (folder / "cut.safetensors").write_bytes(TINY_FILE.read_bytes()[:100_000])
    for name in ("objects.ckpt", "objects.pth"):
        torch.save({"state_dict": {"weight": torch.ones(1)}, "callbacks": HostilePickle(TRAP)}, folder / name)
    (folder / "old.ckpt").write_bytes(pickle.dumps(HostilePickle(TRAP), protocol=2))
    (folder / "garbage.ckpt").write_bytes(bytes(range(256)))
    torch.save([1, 2], folder / "list.pt")
    (folder / "model.gguf").write_bytes(b"GGUF")
    lora = {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.ones(2, 2)}
    save_file(lora, folder / "lora.safetensors")
    save_file({"conditioner.embedders.0.x": torch.ones(1)}, folder / "sdxl.safetensors")
    save_file({"cond_stage_model.model.x": torch.ones(1)}, folder / "sd2.safetensors")
    save_file({"up_blocks.0.resnets.0.conv1.weight": torch.ones(1)}, folder / "diffusers.safetensors")
    (folder / "alone").mkdir()
    save_file(tiny, folder / "alone" / "tiny.safetensors")
    save_file(tiny, folder / "no_sizes.safetensors")
    (folder / "merges").mkdir()
    shutil.copy(TINY_FILE, folder / "merges" / "tiny.safetensors")
    (folder / "merges" / "merges.txt").write_text("#version: 0.2\na b\n")
    part = dict(tiny)
    part.pop("first_stage_model.encoder.conv_in.bias")
    save_file(part, folder / "part.safetensors", metadata)
    shutil.copy(TINY_FILE.parent / "merges.txt", folder)

    torch.manual_seed(0)
    unet = UNet(TINY.unet)
    save_controlnet(ControlNet.from_unet(unet, TINY.hint_channels), folder / "control.safetensors")
    save_controlnet(ControlNet.from_unet(unet, TINY.hint_channels, copy="lite"), folder / "lite.safetensors")
    control = official_state_dict(ControlNet.from_unet(unet, TINY.hint_channels))
    control["control_model.zero_convs.3.0.weight"] = torch.ones(5, 5, 1, 1)
    save_file(control, folder / "misshapen.safetensors")
    (folder / "nothing").mkdir()
    return folder


# program, options ({} is the folder above), what the line has to say: cause or place, and remedy
MISTAKES = [
    ("train", "--max-train-steps 0", ["--max-train-steps 0", "above 0"]),
    ("train", "--train-batch-size two", ["--train-batch-size two", "above 0", "--help"]),
    ("train", "--learning-rate -1", ["--learning-rate -1:", "above 0"]),
    ("train", "--learning-rate nan", ["--learning-rate nan", "above 0"]),
    ("train", "--resolution 100", ["--resolution 100", "multiple of 64"]),
    ("train", "--proportion-empty-prompts 1.5", ["--proportion-empty-prompts 1.5", "from 0 to 1"]),
    ("train", "--mixed-precision fp64", ["--mixed-precision", "'fp64'", "bf16"]),
    ("train", "--hint-init xavier", ["--hint-init", "'xavier'", "he"]),
    ("train", "--seed -1", ["--seed -1", "0 or more"]),
    ("train", "--num-workers -1", ["--num-workers -1", "0 or more"]),
    ("train", "--validation-hints 0", ["--validation-hints 0", "above 0"]),
    ("train", "--nonsense", ["--nonsense", "--help"]),
    ("train", "--device toaster", ["--device toaster", "cpu"]),
    ("train", "--device cuda:77", ["--device cuda:77", "cpu"]),
    ("train", "--resume-from-checkpoint latest", ["has no checkpoint", "leave --resume-from-checkpoint out"]),
    ("train", "--resume-from-checkpoint {}/nothing", ["nothing is no checkpoint", "pass latest"]),
    ("train", "--output-dir {}/run", ["run holds a run already", "--resume-from-checkpoint latest"]),
    ("train", "--data {}/empty", ["has no entries", "add"]),
    ("train", "--output-dir {}/a_file/out --resolution 64", ["a_file/out", "choose another --output-dir"]),
    ("train", "--output-dir {}/a_file/out --report-to tensorboard", ["a_file/out", "choose another --output-dir"]),
    ("train", "--base {}/nowhere.safetensors", ["nowhere.safetensors", "no such file"]),
    ("train", "--base {}", ["has no unet/ in it", "a single file"]),
    ("train", "--base {}/cut.safetensors", ["cut.safetensors", "damaged", "fetch it again"]),
    ("train", "--base {}/objects.ckpt", ["objects.ckpt", "more than tensors", ".safetensors"]),
    ("train", "--base {}/old.ckpt", ["old.ckpt", "more than tensors", ".safetensors"]),
    ("train", "--base {}/garbage.ckpt", ["garbage.ckpt", ".safetensors"]),
    ("train", "--base {}/list.pt", ["list.pt", "no named tensors", "pass a checkpoint"]),
    ("train", "--base {}/model.gguf", ["model.gguf", ".safetensors"]),
    ("train", "--base {}/lora.safetensors", ["lora.safetensors", "LoRA", "pass a full checkpoint"]),
    ("train", "--base {}/sdxl.safetensors", ["sdxl.safetensors", "SDXL", "only Stable Diffusion 1.x"]),
    ("train", "--base {}/sd2.safetensors", ["sd2.safetensors", "2.x", "only Stable Diffusion 1.x"]),
    ("train", "--base {}/diffusers.safetensors", ["diffusers.safetensors", "diffusers' layout", "pass the folder"]),
    ("train", "--base {}/control.safetensors", ["control.safetensors", "a ControlNet, not a base", "pass it as"]),
    ("train", "--base {}/no_sizes.safetensors", ["no_sizes.safetensors", "make no 12 heads", "pass another model"]),
    ("train", "--base {}/part.safetensors", ["encoder.conv_in.bias", "missing"]),
    ("train", "--base {}/merges/tiny.safetensors", ["merges.txt", "tokens", "put the merges.txt"]),
    ("train", "--data {}/nowhere", ["nowhere/prompt.json", "no such file", "metadata.jsonl"]),
    ("train", "--data {}/json", ["prompt.json line 1", "no JSON", "expected"]),
    ("train", "--data {}/keys", ["prompt.json line 1", '"target"', "expected"]),
    ("train", "--data {}/null", ["prompt.json line 1", '"prompt"', "expected"]),
    ("train", "--data {}/list", ["prompt.json line 1", '"source"', "expected"]),
    ("train", "--data {}/missing", ["prompt.json line 1", "b.png", "no such file"]),
    ("train", "--data {}/outside", ["prompt.json line 1", "../a.png", "outside the folder"]),
    ("train", "--data {}/text", ["prompt.json line 1", "text.png", "damaged or no picture", "save it again"]),
    ("train", "--data {}/cut", ["prompt.json line 1", "cut.png", "damaged or no picture", "save it again"]),
    ("train", "--data {}/shape", ["prompt.json line 1", "64x64", "128x64", "crop them alike"]),
    ("train", "--data {}/bytes", ["prompt.json line 1", "no JSON", "expected"]),
    ("train", "--data {}/deep", ["prompt.json line 1", "no JSON", "expected"]),
    ("train", "--data {}/hf", ["metadata.jsonl line 1", '"conditioning_image"', "expected"]),
    ("sample", "--controlnet x", ["1 --controlnet but 0 --hint", "each needs its own"]),
    (
        "sample",
        "--controlnet x --hint {}/a.png --strength 1 --strength 2",
        ["2 --strength, 1 --controlnet", "give one"],
    ),
    ("sample", "--hint {}/a.png", ["0 --controlnet but 1 --hint", "each needs its own"]),
    ("sample", "--controlnet x --hint {}/a.png --strength nan", ["--strength nan", "a finite number"]),
    ("sample", "--guidance-scale inf", ["--guidance-scale inf", "a finite number"]),
    ("sample", "--seed -1", ["--seed -1", "0 or more"]),
    ("sample", "--steps 0", ["--steps 0", "1 to 999"]),
    ("sample", "--base {}/nowhere.safetensors", ["nowhere.safetensors", "no such file"]),
    ("sample", "--num-samples 0", ["--num-samples 0", "above 0"]),
    ("sample", "--output out.jpg", ["--output out.jpg", ".png"]),
    ("sample", "--output {}/a_file/out.png --steps 1", ["a_file", "choose another folder"]),
    ("sample", "--control-start 0.6 --control-end 0.4", ["--control-start 0.6", "after --control-end 0.4", "swap"]),
    ("sample", "--control-end 1.5", ["--control-end 1.5", "0 to 1"]),
    ("sample", "--precision int8", ["--precision", "'int8'", "bf16"]),
    ("sample", "--steps 1000", ["--steps 1000", "1 to 999"]),
    ("sample", "--detect hed", ["--detect", "'hed'", "canny"]),
    ("sample", "--canny-low -1", ["--canny-low -1", "0 or more"]),
    (
        "sample",
        "--controlnet x --hint {}/a.png --detect canny --canny-low 201",
        ["--canny-low 201", "above --canny-high 200", "swap"],
    ),
    (
        "sample",
        "--controlnet x --hint {}/a.png --detect canny --detect none",
        ["2 --detect, 1 --controlnet", "give one, or one each"],
    ),
    ("sample", "--resolution 63", ["--resolution 63", "multiple of 64"]),
    ("sample", "--control-mode strong", ["--control-mode", "'strong'", "guess"]),
    ("sample", "--controlnet x --hint {}/nowhere.png", ["nowhere.png", "no such file"]),
    ("sample", "--controlnet x --hint {}/text.png", ["text.png", "damaged or no picture", "save it again"]),
    ("sample", "--controlnet {}/nowhere.pth --hint {}/a.png", ["nowhere.pth", "no such file"]),
    ("sample", "--controlnet {}/objects.pth --hint {}/a.png", ["objects.pth", "more than tensors", ".safetensors"]),
    ("sample", "--controlnet {}/misshapen.safetensors --hint {}/a.png", ["zero_convs.3", "[5, 5, 1, 1]", "expected"]),
    (
        "sample",
        f"--controlnet {TINY_FILE} --hint {{}}/a.png",
        ["a base model, not a ControlNet", "pass it as the base"],
    ),
    ("sample", "--controlnet {}/nothing --hint {}/a.png", ["nothing", "diffusion_pytorch_model", "pass"]),
    ("sample", f"{CONTROL} --hint {{}}/a.png {CONTROL} --hint {{}}/wide.png", ["different shapes", "crop them alike"]),
    ("tools.convert", "{}/control.safetensors {}/out.bin --layout official", ["out.bin", ".safetensors"]),
    ("tools.convert", "{}/control.safetensors {}/a_file --layout diffusers", ["a_file", "a folder"]),
    ("tools.convert", "{}/lite.safetensors {}/out --layout diffusers", ["lite.safetensors", "ControlNet-lite"]),
    ("tools.convert", f"{TINY_FILE} {{}}/out --layout diffusers", ["a base model, not a ControlNet"]),
    ("tools.convert", "{}/lora.safetensors {}/out --layout diffusers", ["lora.safetensors", "LoRA"]),
    (PAIRS, "--from-pictures {}/hf --output {}/out", ["--detect canny or scribble", "its own target"]),
    (PAIRS, "--from-pictures {}/nowhere --detect canny --output {}/out", ["nowhere", "no such folder"]),
    (PAIRS, "--from-pictures {}/run --detect canny --output {}/out", ["run has no pictures", "PNG"]),
    (PAIRS, "--from-pictures {}/hf --detect canny --output {}/hf/out", ["hf/out lies in", "outside"]),
    (PAIRS, "--from-pictures {}/hf --detect canny --output {}/json", ["json holds files already", "another --output"]),
    (PAIRS, "--from-pictures {}/hf --detect canny --output {}/a_file/out", ["a_file/out", "choose another"]),
    ("tools.draw_pairs", "--count 0 --output {}/out", ["--count 0", "above 0"]),
    ("tools.draw_pairs", "--output {}/a_file/out", ["a_file/out", "choose another --output"]),
    ("tools.draw_pairs", "--output {}/json", ["json holds files already", "another --output"]),
    ("tools.plot", "{}/nowhere.jsonl", ["nowhere.jsonl", "no such file"]),
    ("tools.plot", "{}/run/log.jsonl --output {}/run/log.jsonl", ["--output", "log.jsonl", ".png"]),
    ("tools.plot", "{}/run/log.jsonl {}/run/log.jsonl", ["two of the logs", "run", "another name"]),
    ("tools.listen", "--controlnet {}/a_file", ["a_file", "weights are read from"]),
    ("tools.listen", f"--controlnet {SHIPPED} --data {{}}/hf", ["metadata.jsonl line 1", "expected"]),
    ("tools.listen", f"--controlnet {SHIPPED} --pairs 1", ["--pairs 1", "above 1"]),
    ("tools.verify", "--base {}/nowhere.safetensors", ["nowhere.safetensors", "no such file"]),
    ("tools.verify", "--steps 15", ["--steps 15: must be a divisor of 1000"]),
    ("tools.dusk", "--controlnet {}/nowhere.safetensors", ["nowhere.safetensors", "no such file"]),
    ("tools.pretrain", "vea", ["'vea'", "vae"]),
    ("train", "--seed 18446744073709551616", ["--seed 18446744073709551616", "below 2^32 - 1"]),
    ("sample", f"--controlnet x --hint {LONG}.png", ["too long", "correct the path"]),
    ("sample", f"--output {LONG}.png --steps 1 --resolution 64", ["too long", "choose another folder"]),
    ("train", f"--base {LONG}", ["too long", "correct the path"]),
    ("train", f"--data {LONG}", ["too long", "correct the path"]),
    ("train", f"--output-dir {LONG}", ["too long", "choose another --output-dir"]),
]


def command(options: str, place) -> list[str]:
    return [word.format(*[place] * 4) for word in options.split()]


@pytest.mark.parametrize("program, options, fragments", MISTAKES)
def test_one_line(program, options, fragments, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *command(options, place)])
    with pytest.raises(SystemExit) as ended:
        run_command_line(import_module(program).main)
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for fragment in fragments:
        assert fragment in lines[0], lines
    assert not (tmp_path / "runs").exists()  # nothing was begun
    assert not TRAP.exists()  # no pickle ran


@pytest.mark.parametrize(
    "program, options, fragments",
    [
        ("train", "--learning-rate nan", ["--learning-rate nan"]),
        ("train", "--base {}/objects.ckpt", ["objects.ckpt"]),
        ("train", "--data {}/cut --resolution 64", ["cut.png is damaged"]),
        ("sample", "--controlnet {}/nowhere.pth --hint {}/a.png", ["nowhere.pth"]),
        ("tools.draw_pairs", "--output {}/json", ["json holds files already"]),
        ("tools.convert", "{}/lora.safetensors {}/out --layout diffusers", ["LoRA"]),
    ],
)
def test_through_the_shell(program, options, fragments, place, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", program, *command(options, place)]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (error,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert all(fragment in error for fragment in fragments)


def test_what_the_machine_refuses(tmp_path, capsys):
    """No room, no rights, no memory: one line that says where and what to do, from anywhere."""
    for number, told, remedy in (
        (errno.ENOSPC, "some/file: no space", "; make room"),
        (errno.EACCES, "some/file: permission", "; correct the path or its permissions"),
        (errno.EMFILE, "some/file: too many open", "; allow more open files (ulimit -n)"),
        (errno.ENOMEM, "out of memory", "try closing other programs"),
    ):

        def refused(number=number):
            raise OSError(number, os.strerror(number), "some/file")

        with pytest.raises(SystemExit) as ended:
            run_command_line(refused)
        line = capsys.readouterr().err
        assert ended.value.code == 2 and line.startswith(f"error: {told}") and line.count("\n") == 1
        assert line.endswith(f"{remedy}\n")


def test_processes_without_torchrun(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": None, "MASTER_PORT": None}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit):
        run_command_line(import_module("train").main)
    assert "torchrun" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_terminal_that_knows_ascii_alone():
    line = [sys.executable, ROOT / "sample.py", "--help"]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "\\u03b2 of classifier-free guidance" in done.stdout


def test_nobody_reads_the_output(tmp_path):
    """`| head`, and a full disk behind stdout, end no program."""
    line = f"{sys.executable} sample.py --resolution 64 --steps 1 --output {tmp_path / 'out.png'}"
    for ending in ("> /dev/full 2>&1", "2>&1 | true"):
        done = subprocess.run(f"set -o pipefail; {line} {ending}", cwd=ROOT, shell=True, executable="/bin/bash")
        assert done.returncode == 0
        (tmp_path / "out.png").unlink()


def test_twenty_broken_entries_and_a_count(tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    lines = [json.dumps(GOOD)] * 3 + ["{"] * 25 + [json.dumps(GOOD)]
    (tmp_path / "prompt.json").write_text("\n".join(lines))
    with pytest.raises(SystemExit):
        run_command_line(lambda: PairedImages(tmp_path, 64))
    *details, last = capsys.readouterr().err.strip().splitlines()
    assert [f"prompt.json line {i}:" in line for i, line in enumerate(details, start=4)] == [True] * 20
    assert "25 of 29 entries are broken" in last


def test_memory_that_runs_out(capsys):
    def greedy():
        torch.empty(1 << 60, dtype=torch.uint8)

    with pytest.raises(SystemExit) as ended:
        run_command_line(greedy, "a smaller --size")
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: out of memory") and "try a smaller --size" in line and line.count("\n") == 1
    for said, told in (
        ("CUDA error: out of memory", "out of memory"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "out of memory"),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "out of memory"),
        ("could not create a primitive", "out of memory"),
        ("DataLoader worker (pid 7) is killed by signal: Killed.", "--num-workers 0"),
        ("DataLoader worker (pid 7) is killed by signal: Bus error.", "--shm-size"),
    ):
        with pytest.raises(SystemExit):
            run_command_line(lambda said=said: (_ for _ in ()).throw(RuntimeError(said)))
        assert told in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a bug"):  # keeps its traceback
        run_command_line(lambda: (_ for _ in ()).throw(RuntimeError("a bug")))


def test_no_connection(tmp_path, monkeypatch, capsys):
    """A checkpoint without its merges.txt, and no hub to fetch it from: the line says where to put one."""

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    shutil.copy(TINY_FILE, tmp_path)
    with pytest.raises(UserError, match=r"can't fetch tokenizer/merges.txt .*put the tokenizer's merges.txt beside"):
        StableDiffusion.load(tmp_path / TINY_FILE.name)


def mutants(original: bytes, rng: random.Random, count: int):
    """Copies cut short, with flipped bits, with bytes put in, and other things altogether."""
    for i in range(count):
        content = bytearray(original)
        if i % 4 == 0:
            del content[rng.randrange(len(content)) :]
        elif i % 4 == 1:
            for _ in range(rng.randrange(1, 9)):
                content[rng.randrange(min(len(content), 4000))] ^= 1 << rng.randrange(8)
        elif i % 4 == 2:
            at = rng.randrange(min(len(content), 4000))
            content[at:at] = rng.randbytes(rng.randrange(1, 30))
        else:
            value = rng.choice([None, [], {}, 1e400, {"a": [1] * 9}, "text", [[[]]], -1, {"source": 1}, {"": {}}])
            content = bytearray(json.dumps(value).encode())
        yield bytes(content)


def test_mutated_files_end_in_one_line(tmp_path):
    """Whatever is in a file: read, or refused with a UserError; anything else fails this test."""
    rng = random.Random(0)
    torch.manual_seed(0)
    unet = UNet(TINY.unet)
    save_controlnet(ControlNet.from_unet(unet, TINY.hint_channels), tmp_path / "good.safetensors")
    torch.save({"weight": torch.ones(3)}, tmp_path / "good.pt")
    pixels = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)
    kinds = ["jpg", "webp", "tif", "gif", "ppm", "tga"] + ["avif"] * features.check("avif")
    for kind in kinds:
        Image.fromarray(pixels).save(tmp_path / f"a.{kind}")
    shutil.copy(HINT, tmp_path / "a.png")
    good = [json.dumps({"source": "a.png", "target": "a.png", "prompt": "x"})] * 3
    (tmp_path / "prompt.json").write_text("\n".join(good))
    (tmp_path / "config.json").write_text(json.dumps({"attention_head_dim": 4, "norm_num_groups": 8}))
    refused = 0
    for name, count, read in (
        ("good.safetensors", 80, lambda path: load_controlnet(path, unet)),
        ("good.pt", 40, read_tensors),
        ("a.png", 80, lambda path: fit_image(open_image(path), 64)),
        *((f"a.{kind}", 80, lambda path: fit_image(open_image(path), 64)) for kind in kinds),
        ("config.json", 40, read_json),
        ("prompt.json", 80, lambda path: PairedImages(path.parent, 64)),
    ):
        original = (tmp_path / name).read_bytes()
        for mutant in mutants(original, rng, count):
            (tmp_path / name).write_bytes(mutant)
            try:
                read(tmp_path / name)
            except UserError:
                refused += 1
        (tmp_path / name).write_bytes(original)
    assert refused > 200


def test_bombs(tmp_path):
    """A small picture that would decode to gigabytes, and a pickle in a zip file, are refused."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    image = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(60_001)))
        + chunk(b"IEND", b"")
    )
    (tmp_path / "bomb.png").write_bytes(image)
    with pytest.raises(UserError, match="bomb.png: Image size .* Make it smaller"):
        open_image(tmp_path / "bomb.png")
    with zipfile.ZipFile(tmp_path / "weights.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(HostilePickle(TRAP), protocol=2))
        archive.writestr("archive/version", "3\n")
    with pytest.raises(UserError):
        read_tensors(tmp_path / "weights.pth")
    assert not TRAP.exists()
