"""Names in both directions, the layouts of other programs, and what a file that does not fit says."""

import json
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from standin import CONFIGS, MANIFEST, ROOT, deviation, golden, small_unet, stand_in

import weights
from clip_text import CLIPTextModel
from controlnet import ControlNet
from files import UserError, fetch, locate, read_tensors
from stable_diffusion import StableDiffusion
from unet import UNet
from vae import AutoencoderKL
from weights import (
    diffusers_config,
    load_controlnet,
    load_official,
    official_layout,
    official_state_dict,
    save_controlnet,
)


def same_tensors(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("size", CONFIGS)
def test_names_are_the_official_ones(size):
    unet, vae, text = CONFIGS[size]
    with torch.device("meta"):
        modules = {
            "unet": UNet(unet),
            "control": ControlNet.from_unet(UNet(unet)),
            "vae": AutoencoderKL(vae),
            "clip": CLIPTextModel(text),
        }
    counts = {"unet": 686, "control": 340, "vae": 248, "clip": 196 if size == "sd15" else 52}
    for part, module in modules.items():
        names = official_layout(module)
        assert len(set(names.values())) == len(names) == counts[part]
        shapes = {theirs: list(module.state_dict()[ours].shape) for ours, theirs in names.items()}
        assert shapes == MANIFEST[size][part]


def test_loading_and_writing_are_inverse():
    tensors = stand_in("small", "unet")
    written = official_state_dict(small_unet())
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)


def test_loading_copies_into_real_parameters_and_shares_with_meta_ones():
    tensors = stand_in("small", "unet")
    unet = UNet(CONFIGS["small"][0])
    parameter = unet.conv_out.weight
    load_official(unet, tensors)
    assert unet.conv_out.weight is parameter
    parameter.data.zero_()
    assert tensors["model.diffusion_model.out.2.weight"].abs().sum() > 0
    with torch.device("meta"):
        shapes = UNet(CONFIGS["small"][0])
    load_official(shapes, tensors)
    assert shapes.conv_out.weight.data_ptr() == tensors["model.diffusion_model.out.2.weight"].data_ptr()


# ---------------------------------------------------------------------------------------------------------------
# ControlNet's layouts


@pytest.fixture
def controlnet(control_checkpoint):
    return load_controlnet(control_checkpoint("small"), small_unet()).requires_grad_(False)


def test_controlnet_layouts_round_trip(controlnet, tmp_path):
    unet = small_unet()
    official = stand_in("small", "control")
    prefix = "control_model."
    files = {
        "without prefix": {name.removeprefix(prefix): value for name, value in official.items()},
        "1.0, all of SD in it": official | stand_in("small", "unet", "vae", "clip"),
    }
    for i, tensors in enumerate(files.values()):
        save_file(tensors, tmp_path / f"{i}.safetensors")
        torch.save({"state_dict": tensors}, tmp_path / f"{i}.pth")
        for path in (tmp_path / f"{i}.safetensors", tmp_path / f"{i}.pth"):
            assert same_tensors(load_controlnet(path, unet), controlnet)
    save_controlnet(controlnet, tmp_path / "out.safetensors")
    assert read_tensors(tmp_path / "out.safetensors")[0].keys() == official.keys()
    save_controlnet(controlnet, tmp_path / "folder", layout="diffusers")
    for path in (tmp_path / "out.safetensors", tmp_path / "folder"):
        assert same_tensors(load_controlnet(path, unet), controlnet)


def test_lite_keeps_our_names_and_has_no_other_layout(tmp_path):
    unet = small_unet()
    lite = ControlNet.from_unet(unet, hint_channels=(8, 16, 24, 32), copy="lite")
    save_controlnet(lite, tmp_path / "lite.safetensors")
    assert read_tensors(tmp_path / "lite.safetensors")[1]["copy"] == "lite"
    assert same_tensors(load_controlnet(tmp_path / "lite.safetensors", unet), lite)
    with pytest.raises(UserError, match="no diffusers layout"):
        save_controlnet(lite, tmp_path / "folder", layout="diffusers")


def test_diffusers_reads_ours_and_we_read_theirs(controlnet, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from diffusers import ControlNetModel

    arrays = golden("small")
    ours = controlnet(arrays["x"], arrays["hint"], arrays["t"], arrays["text"])
    save_controlnet(controlnet, tmp_path / "folder", layout="diffusers")
    decoder = {k: v for k, v in official_state_dict(small_unet()).items() if ".output_blocks." in k or ".out." in k}
    save_controlnet(controlnet, tmp_path / "single.safetensors", others=decoder)  # as train.py --unlock-decoder
    theirs = [
        ControlNetModel.from_pretrained(tmp_path / "folder"),
        ControlNetModel.from_single_file(
            str(tmp_path / "single.safetensors"), config=str(tmp_path / "folder"), local_files_only=True
        ),
    ]
    for model in theirs:
        with torch.no_grad():
            down, middle = model(
                arrays["x"],
                arrays["t"],
                encoder_hidden_states=arrays["text"],
                controlnet_cond=arrays["hint"],
                return_dict=False,
            )
        assert max(deviation(a, b) for a, b in zip(ours, [*down, middle], strict=True)) <= 1e-4
    theirs[0].save_pretrained(tmp_path / "theirs")
    assert same_tensors(load_controlnet(tmp_path / "theirs", small_unet()), controlnet)


# ---------------------------------------------------------------------------------------------------------------
# Files that don't fit


class Payload:
    """What a hostile pickle holds: opening it would make a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def without_text(tensors):
    return {name: value for name, value in tensors.items() if not name.startswith("cond_stage")}


def sd2(folder):
    tensors = stand_in("small", "unet", "vae")
    for name in list(tensors):
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            tensors[name] = torch.zeros(len(tensors[name]), 1024)
        elif name.endswith(("proj_in.weight", "proj_out.weight")):
            tensors[name] = tensors[name][:, :, 0, 0].clone()
    tensors["cond_stage_model.model.token_embedding.weight"] = torch.zeros(8, 1024)
    save_file(tensors, folder / "bad.safetensors")


def sdxl(folder):
    tensors = without_text(stand_in("small", "unet", "vae"))
    tensors["conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"] = torch.zeros(768)
    save_file(tensors, folder / "bad.safetensors")


def lora(folder):
    save_file({"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(4, 4)}, folder / "bad.safetensors")


def diffusers_unet(folder):
    save_file({"down_blocks.0.resnets.0.norm1.weight": torch.zeros(4)}, folder / "bad.safetensors")


def diffusers_folder(folder):
    (folder / "bad.safetensors").mkdir()
    (folder / "bad.safetensors" / "model_index.json").write_text("{}")


def truncated(folder):
    save_file(stand_in("small", "vae"), folder / "whole.safetensors")
    (folder / "bad.safetensors").write_bytes((folder / "whole.safetensors").read_bytes()[:-1000])


def text_file(folder):
    (folder / "bad.safetensors").write_text("this is no weight file\n" * 100)


def wrong_shape(folder):
    tensors = stand_in("small", "unet", "vae", "clip")
    tensors["model.diffusion_model.out.2.bias"] = torch.zeros(5)
    save_file(tensors, folder / "bad.safetensors")


def missing_tensor(folder):
    tensors = stand_in("small", "unet", "vae", "clip")
    del tensors["first_stage_model.decoder.norm_out.weight"]
    save_file(tensors, folder / "bad.safetensors")


def unknown_tensor(folder):
    tensors = stand_in("small", "unet", "vae", "clip")
    tensors["model.diffusion_model.label_emb.0.0.weight"] = torch.zeros(3)
    save_file(tensors, folder / "bad.safetensors")


def controlnet_as_base(folder):
    save_file(stand_in("small", "control"), folder / "bad.safetensors")


def inpainting(folder):
    tensors = stand_in("small", "unet", "vae", "clip")
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(32, 9, 3, 3)
    save_file(tensors, folder / "bad.safetensors")


def broken_config(folder):
    save_file(stand_in("small", "unet", "vae", "clip"), folder / "bad.safetensors", {"config": '{"unet": 3}'})


def absent(folder):
    pass


WRONG_BASES = {  # what writes the file: what its line must say
    sd2: "Stable Diffusion 2.x",
    sdxl: "SDXL",
    lora: "LoRA",
    diffusers_unet: "diffusers' layout",
    diffusers_folder: "is a folder",
    truncated: "damaged",
    text_file: "no safetensors file",
    wrong_shape: "out.2.bias has shape [5], expected [4]",
    missing_tensor: "decoder.norm_out.weight [32] is missing",
    unknown_tensor: "label_emb.0.0.weight [3] is no part",
    controlnet_as_base: "a ControlNet, not a base model",
    inpainting: "an inpainting or InstructPix2Pix model",
    broken_config: "the config in its metadata is broken",
    absent: "no such file",
}


@pytest.mark.parametrize("write", WRONG_BASES, ids=lambda write: write.__name__)
def test_wrong_base_is_named(write, tmp_path, checkpoint):
    write(tmp_path)
    (tmp_path / "merges.txt").write_text((checkpoint("small").parent / "merges.txt").read_text())
    with pytest.raises(UserError) as raised:
        StableDiffusion.load(tmp_path / "bad.safetensors")
    message = str(raised.value)
    assert WRONG_BASES[write] in message
    assert "bad.safetensors" in message
    assert "\n" not in message


@pytest.mark.parametrize("suffix", [".ckpt", ".pth"])
@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_objects_are_not_built(suffix, legacy, tmp_path):
    path, trap = tmp_path / f"bad{suffix}", tmp_path / "trap"
    content = {"state_dict": {"a": torch.zeros(2)}, "callback": Payload(trap)}
    if legacy:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    for load in (StableDiffusion.load, lambda path: load_controlnet(path, small_unet())):
        with pytest.raises(UserError, match=r"can run code: use its \.safetensors version"):
            load(path)
    assert not trap.exists()


def test_base_as_controlnet_is_named(checkpoint):
    with pytest.raises(UserError, match="a base model, not a ControlNet"):
        load_controlnet(checkpoint("small"), small_unet())


def test_controlnet_of_another_size_is_named(control_checkpoint):
    with torch.device("meta"):
        unet = UNet(CONFIGS["sd15"][0])
    with pytest.raises(UserError, match=r"time_embed.0.weight has shape \[128, 32\], expected \[1280, 320\]"):
        load_controlnet(control_checkpoint("small"), unet)


def test_command_line_shows_one_line_and_status_2(tmp_path):
    text_file(tmp_path)
    command = [sys.executable, ROOT / "sample.py", "--base", tmp_path / "bad.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'bad.safetensors'} is no safetensors file")


# ---------------------------------------------------------------------------------------------------------------
# Download, against a stand-in for the hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that has one file, and counts what is asked of it."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked, stored = [], tmp_path / "stored.bin"
    stored.write_text("weights")

    def download(repo, file):
        asked.append((repo, file))
        if file != "there.safetensors":
            raise LocalEntryNotFoundError("no connection\nand more lines")
        return str(stored)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked, stored


def test_hub_sources(hub, tmp_path):
    asked, stored = hub
    assert locate("lllyasviel/ControlNet-v1-1:there.safetensors", "") == stored
    assert asked == [("lllyasviel/ControlNet-v1-1", "there.safetensors")]
    assert locate(tmp_path / "local.safetensors", "") == tmp_path / "local.safetensors"


def test_offline_names_repository_file_and_way_out(hub):
    with pytest.raises(UserError) as raised:
        StableDiffusion.load("sd15")
    message = str(raised.value)
    assert "\n" not in message
    for part in ("stable-diffusion-v1-5/stable-diffusion-v1-5", "v1-5-pruned-emaonly.safetensors", "--base FILE"):
        assert part in message


def test_cached_file_asks_nothing(hub, monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: str(tmp_path / "cached"))
    assert fetch("a/b", "c", "") == tmp_path / "cached"
    assert hub[0] == []


def test_sd15_fetches_weights_and_merges(checkpoint, hub, monkeypatch):
    import huggingface_hub

    small = checkpoint("small")
    files = {"v1-5-pruned-emaonly.safetensors": small, "tokenizer/merges.txt": small.parent / "merges.txt"}
    asked = []

    def download(repo, file):
        asked.append((repo, file))
        return str(files[file])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    sd = StableDiffusion.load("sd15")
    assert sd.unet.config == CONFIGS["small"][0]
    assert asked == [("stable-diffusion-v1-5/stable-diffusion-v1-5", "v1-5-pruned-emaonly.safetensors")]
    # The stand-in's merges lie beside it; a real hub cache keeps them in tokenizer/, and a lone file has none.
    monkeypatch.setattr("stable_diffusion.Path.is_file", lambda path: False)
    from stable_diffusion import load_tokenizer

    assert load_tokenizer(small, 600).start == 598
    assert asked[-1] == ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer/merges.txt")


def convert(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["weights.py", *map(str, arguments)])
    weights.main()


def test_converting_there_and_back(controlnet, tmp_path, monkeypatch, capsys):
    """Tensor by tensor; the sizes that no shape shows go along in the metadata and in config.json."""
    save_controlnet(controlnet, tmp_path / "a.safetensors", metadata={"license": "x"})
    convert(monkeypatch, tmp_path / "a.safetensors", tmp_path / "b", "--layout", "diffusers")
    convert(monkeypatch, tmp_path / "b", tmp_path / "c.safetensors", "--layout", "official")
    convert(monkeypatch, tmp_path / "c.safetensors", tmp_path / "d", "--layout", "diffusers", "--dtype", "fp16")
    output = capsys.readouterr().out
    assert f"{tmp_path / 'b'}: ControlNet in the diffusers layout, 340 tensors" in output
    (a, metadata), (c, _) = (read_tensors(tmp_path / name) for name in ("a.safetensors", "c.safetensors"))
    assert metadata["license"] == "x"
    assert a.keys() == c.keys() and all(torch.equal(a[name], c[name]) for name in a)
    b, d = (read_tensors(tmp_path / name / "diffusion_pytorch_model.safetensors")[0] for name in ("b", "d"))
    assert b.keys() == d.keys() and all(torch.equal(b[name].half(), d[name]) for name in b)
    assert {tensor.dtype for tensor in d.values()} == {torch.float16}
    b, d = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("b", "d"))
    assert b == d == diffusers_config(controlnet)


def test_converting_keeps_a_trained_decoder_or_says_so(controlnet, tmp_path, monkeypatch, capsys):
    decoder = {"model.diffusion_model.out.2.bias": torch.ones(4)}
    save_controlnet(controlnet, tmp_path / "a.safetensors", metadata={"unlock_decoder": "true"}, others=decoder)
    convert(monkeypatch, tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--layout", "official")
    assert capsys.readouterr().err == ""
    (a, marked), (b, still_marked) = (read_tensors(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    assert a.keys() == b.keys() and marked == still_marked
    convert(monkeypatch, tmp_path / "a.safetensors", tmp_path / "c", "--layout", "diffusers")
    assert "the decoder trained with it stays behind" in capsys.readouterr().err
